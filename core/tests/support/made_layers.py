"""Random canonical layers of many specs, for tests of kernels, modules and rewrites."""

from __future__ import annotations

import torch

from quant_core.packing import pack
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    Element,
    OpSpec,
    QuantSpec,
    Scale,
    Zero,
    block,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor

F16 = "f16"
SPECS = {
    "uint4_code": QuantSpec(
        element=Element.uint(4), scales=(Scale(element=F16, grain=group(32)),),
        zero=Zero(kind="code"),
    ),
    "uint3_const": QuantSpec(
        element=Element.uint(3), scales=(Scale(element=F16, grain=group(32)),),
        zero=Zero(kind="const", value=4),
    ),
    "uint4_two_level_offset": QuantSpec(
        element=Element.uint(4),
        scales=(Scale(element="uint6", grain=group(32)), Scale(element=F16, grain=group(64))),
        zero=Zero(
            kind="offset",
            levels=(Scale(element="uint6", grain=group(32)), Scale(element=F16, grain=group(64))),
        ),
    ),
    "int8_channel": QuantSpec(
        element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),)
    ),
    "fp8_block": QuantSpec(
        element=Element(name="fp8_e4m3", bits=8, kind="float"),
        scales=(Scale(element="f32", grain=block(16, 32)),),
    ),
    "uint4_gather": QuantSpec(
        element=Element.uint(4), scales=(Scale(element=F16, grain=group(32)),),
        zero=Zero(kind="code"), gather=True,
    ),
}  # fmt: skip


def _grid(scale, n, k):
    r, c = scale.grain
    return (-(-n // r) if r else 1, -(-k // c) if c else 1)


def _values(scale, n, k, g):
    shape = _grid(scale, n, k)
    if scale.element == "uint6":
        return torch.randint(1, 64, shape, dtype=torch.uint8, generator=g)
    dtype = torch.float16 if scale.element == "f16" else torch.float32
    return (torch.rand(shape, generator=g) * 0.1 + 0.01).to(dtype)


def make_layer(spec, n=40, k=96, seed=0, bias=False):
    """Random canonical tensors of a spec; with gather, columns shuffled and 32 padding columns."""
    g = torch.Generator().manual_seed(seed)
    gather = None
    if spec.gather:
        gather = torch.cat([torch.randperm(k, generator=g), torch.full((32,), -1)]).int()
        k += 32
    high = 256 if spec.element.bits == 8 else 1 << spec.element.bits
    codes = torch.randint(0, high, (n, k), dtype=torch.uint8, generator=g)
    if spec.element.name == "fp8_e4m3":
        codes[(codes & 127) == 127] = 0  # no NaN
    zero = spec.zero
    zeros = None
    if zero is not None and zero.kind == "code":
        zeros = torch.randint(0, 16, _grid(spec.scales[0], n, k), dtype=torch.uint8, generator=g)
    levels = zero.levels if zero is not None else ()
    qt = QuantizedTensor(
        spec=spec,
        shape=(n, k),
        codes=pack(codes, spec.element.bits, CANONICAL),
        scales=tuple(_values(s, n, k, g) for s in spec.scales),
        zeros=zeros,
        offset=tuple(_values(s, n, k, g) for s in levels),
        gather=gather,
    )
    b = torch.randn(n, generator=g).half() if bias else None
    return LayerTensors(operands={"weight": qt}, bias=b)


def make_op(kind, lt, k=96, **sizes):
    qt = lt.weight
    features = {"bias", "bias:float16"} if lt.bias is not None else set()
    return OpSpec(
        op=kind,
        operands=(("weight", qt.spec),),
        packing=qt.packing,
        sizes=(("n", qt.shape[0]), ("k", k), ("k_stored", qt.shape[1]), *sizes.items()),
        act_dtype="float32",
        features=frozenset(features),
    )
