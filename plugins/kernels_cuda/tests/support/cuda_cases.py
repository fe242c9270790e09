"""Layers of every kind that the decode kernel runs, with random canonical tensors."""

from __future__ import annotations

import torch

from quant_core.packing import pack
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    OpSpec,
    QuantSpec,
    Scale,
    Zero,
    block,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor

E2M1 = Element(name="fp4_e2m1", bits=4, kind="float")
E4M3 = Element(name="fp8_e4m3", bits=8, kind="float")


def scale(element, grain, **more):
    return Scale(element=element, grain=grain, **more)


def integer(bits, *scales, zero="sym", gather=False):
    """Codes of ``bits``; zero "sym": the middle of the range, "codes", "f16", or an offset."""
    z = {
        "none": None,
        "sym": Zero(kind="const", value=1 << (bits - 1)),
        "codes": Zero(kind="code", element=f"uint{bits}"),
        "f16": Zero(kind="code", element="f16"),
    }.get(zero) if isinstance(zero, str) else Zero(kind="offset", levels=tuple(zero))  # fmt: skip
    return QuantSpec(element=Element.uint(bits), scales=scales, zero=z, gather=gather)


BF, F16 = "bf16", "f16"
Q4K = (scale("uint6", group(32)), scale(F16, group(256)))
SPECS = {
    "int4_g128": integer(4, scale(BF, group(128))),
    "int4_g64": integer(4, scale(F16, group(64))),
    "int4_g32": integer(4, scale(BF, group(32))),
    "int4_g256": integer(4, scale(BF, group(256))),
    "int4_channel": integer(4, scale(BF, CHANNEL)),
    "int4_g128_f32": integer(4, scale("f32", group(128))),
    "int4_g128_zeros": integer(4, scale(F16, group(128)), zero="codes"),
    "int4_g32_zeros": integer(4, scale(F16, group(32)), zero="codes"),
    "int4_channel_zeros": integer(4, scale(F16, CHANNEL), zero="codes"),
    "int4_g64_float_zeros": integer(4, scale(F16, group(64)), zero="f16"),
    "int4_g128_offset": integer(4, scale(F16, group(128)), zero=[scale(F16, group(128))]),
    "int4_channel_offset": integer(4, scale(F16, CHANNEL), zero=[scale("f32", CHANNEL)]),
    "int4_two_level": integer(4, *Q4K, zero=Q4K),
    "int4_g128_gather": integer(4, scale(F16, group(128)), zero="codes", gather=True),
    "int2_g64": integer(2, scale(F16, group(64)), zero="codes"),
    "int2_two_level": integer(2, scale("uint4", group(16)), scale(F16, group(256)),
                              zero=(scale("uint4", group(16)), scale(F16, group(256)))),
    "int3_g128": integer(3, scale(F16, group(128))),
    "int3_g64_zeros": integer(3, scale(F16, group(64)), zero="codes"),
    "int5_g32_offset": integer(5, scale(F16, group(32)), zero=[scale(F16, group(32))]),
    "int6_two_level": QuantSpec(
        element=Element.uint(6), zero=Zero(kind="const", value=32),
        scales=(scale("int8", group(16)), scale(F16, group(256)))),
    "int8_channel": QuantSpec(element=Element.int(8), scales=(scale("f32", CHANNEL),)),
    "int8_g32": QuantSpec(element=Element.int(8), scales=(scale(F16, group(32)),)),
    "int4_signed": QuantSpec(element=Element.int(4), scales=(scale(BF, group(128)),)),
    "uint8_g128": integer(8, scale(BF, group(128))),
    "uint8_g128_zeros": integer(8, scale(BF, group(128)), zero="codes"),
    "fp4_e8m0_g32": QuantSpec(element=E2M1, scales=(scale("e8m0", group(32)),)),
    "fp4_e4m3_g16": QuantSpec(
        element=E2M1, scales=(scale("fp8_e4m3", group(16)), scale("f32", TENSOR))),
    "fp4_e4m3_g16_divisor": QuantSpec(
        element=E2M1,
        scales=(scale("fp8_e4m3", group(16)), scale("f32", CHANNEL, inverse=True))),
    "fp4_bf16_g64": QuantSpec(element=E2M1, scales=(scale(BF, group(64)),)),
    "fp8_channel": QuantSpec(element=E4M3, scales=(scale("f32", CHANNEL),)),
    "fp8_tensor": QuantSpec(element=E4M3, scales=(scale("f32", TENSOR),)),
    "fp8_block": QuantSpec(element=E4M3, scales=(scale("f32", block(128, 128)),)),
    "fp8_block_e8m0": QuantSpec(element=E4M3, scales=(scale("e8m0", block(128, 128)),)),
    "fp8_e8m0_g32": QuantSpec(element=E4M3, scales=(scale("e8m0", group(32)),)),
}  # fmt: skip
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def _values(s, n, k, g, middle):
    """Values of one factor around ``middle``, as raw bits of its element."""
    r, c = s.grain
    shape = (-(-n // r) if r else 1, -(-k // c) if c else 1)
    if s.element.startswith("uint"):
        return torch.randint(1, 1 << int(s.element[4:]), shape, dtype=torch.uint8, generator=g)
    if s.element == "int8":
        return torch.randint(-100, 100, shape, generator=g).to(torch.int8).view(torch.uint8)
    if s.element == "e8m0":
        return torch.randint(118, 124, shape, dtype=torch.uint8, generator=g)
    if s.element == "fp8_e4m3":
        return torch.randint(16, 0x70, shape, dtype=torch.uint8, generator=g)
    v = (torch.rand(shape, generator=g) + 0.5) * middle
    return (1 / v if s.inverse else v).to(DTYPES[s.element])


def make_layer(spec, n, k, seed=0, bias=True):
    """Random canonical tensors; ``k`` columns are stored, with gather 5 % of them padding."""
    g = torch.Generator().manual_seed(seed)
    bits, zero = spec.element.bits, spec.zero
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=g)
    if spec.element.name == "fp8_e4m3":
        codes[(codes & 127) == 127] = 0  # no NaN
    middles = [0.01, 0.002]
    scales = tuple(_values(s, n, k, g, middles[min(i, 1)]) for i, s in enumerate(spec.scales))
    zeros = None
    if zero is not None and zero.kind == "code":
        r, c = spec.scales[0].grain
        shape = (-(-n // r) if r else 1, -(-k // c) if c else 1)
        if zero.element == "f16":
            zeros = (torch.rand(shape, generator=g) * (1 << bits)).half()
        else:
            zeros = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=g)
    levels = zero.levels if zero is not None else ()
    offset = tuple(
        -_values(s, n, k, g, 0.05 if i == 0 else 0.002)
        if s.element in DTYPES and i == len(levels) - 1
        else _values(s, n, k, g, 0.01)
        for i, s in enumerate(levels)
    )
    gather = None
    if spec.gather:
        gather = torch.randperm(k, generator=g).int()
        gather[gather >= k - k // 20] = -1
    qt = QuantizedTensor(
        spec=spec, shape=(n, k), codes=pack(codes, bits, CANONICAL), scales=scales, zeros=zeros,
        offset=offset, gather=gather,
    )  # fmt: skip
    b = torch.randn(n, generator=g).half() if bias else None
    return LayerTensors(operands={"weight": qt}, bias=b)


def make_op(lt, k_in, act="bfloat16", kind="linear", capability="9.0", **sizes):
    qt = lt.weight
    features = {"bias", "bias:float16"} if lt.bias is not None else set()
    return OpSpec(
        op=kind,
        operands=(("weight", qt.spec),),
        packing=qt.packing,
        sizes=(("n", qt.shape[0]), ("k", k_in), ("k_stored", qt.shape[1]), *sizes.items()),
        act_dtype=act,
        device=("cuda", capability),
        features=frozenset(features),
    )


def inputs_of(spec, k):
    """Input features of a layer with ``k`` stored columns: fewer with gather."""
    return k - k // 20 if spec.gather else k
