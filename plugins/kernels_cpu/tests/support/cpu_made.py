"""Random layers of the specs that the CPU kernels run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from quant_core.numerics import element_table
from quant_core.packing import pack
from quant_core.spec import CANONICAL, CHANNEL, Element, OpSpec, QuantSpec, Scale, Zero, group
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_kernels_cpu.kernel import WnA16


def _scales(*factors: tuple[str, int]) -> tuple[Scale, ...]:
    return tuple(Scale(element=e, grain=group(g) if g else CHANNEL) for e, g in factors)


def _spec(bits: int, *factors: tuple[str, int], zero: Zero | None = None, **kw: bool) -> QuantSpec:
    return QuantSpec(element=Element.uint(bits), scales=_scales(*factors), zero=zero, **kw)


def _of(element: Element, *scales: Scale) -> QuantSpec:
    return QuantSpec(element=element, scales=scales)


def _float8(name: str, *factors: tuple[str, int]) -> QuantSpec:
    return _of(Element(name=name, bits=int(name[2]), kind="float"), *_scales(*factors))


_E4M3 = Element(name="fp8_e4m3", bits=8, kind="float")
_CODE = Zero(kind="code")
SPECS = {
    "uint4 g32 f16 code": _spec(4, ("f16", 32), zero=_CODE),
    "uint4 g64 bf16 const": _spec(4, ("bf16", 64), zero=Zero(kind="const", value=8)),
    "uint4 g128 f32 code": _spec(4, ("f32", 128), zero=_CODE),
    "uint4 channel f32 none": _spec(4, ("f32", 0)),
    "uint4 g32 offset": _spec(
        4, ("f16", 32), zero=Zero(kind="offset", levels=_scales(("f16", 32)))
    ),
    "uint4 two-level offset": _spec(
        4,
        ("uint6", 32),
        ("f16", 256),
        zero=Zero(kind="offset", levels=_scales(("uint6", 32), ("f16", 256))),
    ),
    "uint2 g16 code": _spec(2, ("f16", 16), zero=_CODE),
    "uint3 g32 const": _spec(3, ("f16", 32), zero=Zero(kind="const", value=4)),
    "uint5 g32 offset": _spec(
        5, ("f16", 32), zero=Zero(kind="offset", levels=_scales(("f16", 32)))
    ),
    "uint6 two-level const": _spec(
        6, ("int8", 16), ("f16", 256), zero=Zero(kind="const", value=32)
    ),
    "uint8 g32 code": _spec(8, ("f16", 32), zero=Zero(kind="code", element="uint8")),
    "uint8 channel const": _spec(8, ("bf16", 0), zero=Zero(kind="const", value=100)),
    "uint8 g64 offset": _spec(
        8, ("f16", 64), zero=Zero(kind="offset", levels=_scales(("f16", 64)))
    ),
    "int8 channel f32": QuantSpec(element=Element.int(8), scales=_scales(("f32", 0))),
    "int8 g32 f16": QuantSpec(element=Element.int(8), scales=_scales(("f16", 32))),
    "uint4 g32 code gather": _spec(4, ("f16", 32), zero=_CODE, gather=True),
    "uint4 g64 f16 float zero": _spec(4, ("f16", 64), zero=Zero(kind="code", element="f16")),
    "uint3 g32 f32 float zero": _spec(3, ("f32", 32), zero=Zero(kind="code", element="f32")),
    "uint8 g32 bf16 float zero": _spec(8, ("bf16", 32), zero=Zero(kind="code", element="bf16")),
    "fp8 channel bf16": _float8("fp8_e4m3", ("bf16", 0)),
    "fp8 g32 e8m0": _float8("fp8_e4m3", ("e8m0", 32)),
    "fp8 e5m2 g64 f16": _float8("fp8_e5m2", ("f16", 64)),
    "fp8 e4m3_fnuz g128 f32": _float8("fp8_e4m3_fnuz", ("f32", 128)),
    "fp8 e5m2_fnuz channel f32": _float8("fp8_e5m2_fnuz", ("f32", 0)),
    "fp6 e2m3 g32 e8m0": _float8("fp6_e2m3", ("e8m0", 32)),
    "fp6 e3m2 g64 f16": _float8("fp6_e3m2", ("f16", 64)),
    "fp8 g32 two-level": _float8("fp8_e4m3", ("fp8_e4m3", 32), ("bf16", 0)),
}
NF4 = Element(name="nf4", bits=4, kind="lut")
_WHOLE = Scale(element="f32", grain=(0, 0))
RESOLVED_SPECS = {
    "fp8 block f32": _of(_E4M3, Scale(element="f32", grain=(32, 128))),
    "fp8 block bf16": _of(_E4M3, Scale(element="bf16", grain=(128, 128))),
    "fp8 tensor bf16": _of(_E4M3, Scale(element="bf16", grain=(0, 0))),
    "fp8 block, tensor inverse": _of(
        _E4M3, Scale(element="bf16", grain=(32, 64)), replace(_WHOLE, inverse=True)
    ),
    "uint8 block const": QuantSpec(
        element=Element.uint(8),
        scales=(Scale(element="f32", grain=(32, 128)),),
        zero=Zero(kind="const", value=128),
    ),
}
"""Scales that C does not read; every processor runs the elements."""
RESOLVED_TABLE_SPECS = {
    "nf4 nested": _of(
        NF4,
        replace(_WHOLE, add=True),
        Scale(element="lut8", grain=group(64)),
        Scale(element="f32", grain=(32, 0)),
    ),
    "nf4 nested, cut rows": _of(
        NF4,
        replace(_WHOLE, add=True),
        Scale(element="lut8", grain=group(64)),
        Scale(element="f32", grain=group(128)),
    ),
}
TABLE_SPECS = {
    "nf4 g64 f32": QuantSpec(element=NF4, scales=_scales(("f32", 64))),
    "nf4 g16 bf16": QuantSpec(element=NF4, scales=_scales(("bf16", 16))),
    "fp4 two-level, inverse": QuantSpec(
        element=Element(name="fp4_e2m1", bits=4, kind="float"),
        scales=(*_scales(("fp8_e4m3", 16)), Scale(element="f32", grain=(0, 0), inverse=True)),
    ),
    "int4 g32 f16": QuantSpec(element=Element.int(4), scales=_scales(("f16", 32))),
    "fp4 e8m0": QuantSpec(
        element=Element(name="fp4_e2m1", bits=4, kind="float"), scales=_scales(("e8m0", 32))
    ),
    "fp4 two-level": QuantSpec(
        element=Element(name="fp4_e2m1", bits=4, kind="float"),
        scales=(*_scales(("fp8_e4m3", 16)), Scale(element="f32", grain=(0, 0))),
    ),
}
_WIDE = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def _values(scale: Scale, n: int, k: int, g: torch.Generator) -> torch.Tensor:
    r, c = scale.grain
    shape = (-(-n // r) if r else 1, -(-k // c) if c else 1)
    if scale.element in _WIDE:
        values = torch.rand(shape, generator=g) * 0.1 + 0.01
        return (1 / values if scale.inverse else values).to(_WIDE[scale.element])
    if scale.element.startswith("uint"):
        return torch.randint(1, 64, shape, dtype=torch.uint8, generator=g)
    if scale.element == "int8":
        return torch.randint(-99, 99, shape, dtype=torch.int8, generator=g).view(torch.uint8)
    if scale.element == "lut8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
    low, high = (118, 132) if scale.element == "e8m0" else (8, 0x77)  # finite, not subnormal
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=g)


def make_layer(
    spec: QuantSpec, n: int, k: int, seed: int = 0, bias: torch.dtype | None = None
) -> LayerTensors:
    """Random canonical tensors; with gather, columns shuffled and 32 padding columns added."""
    g = torch.Generator().manual_seed(seed)
    gather = None
    if spec.gather:
        gather = torch.cat([torch.randperm(k, generator=g), torch.full((32,), -1)]).int()
        k += 32
    codes = torch.randint(0, 1 << spec.element.bits, (n, k), dtype=torch.uint8, generator=g)
    if spec.element.kind == "float":  # neither NaN nor infinity, and sums that float16 holds
        codes[~(element_table(spec.element.name)[codes.long()].abs() <= 30)] = 0
    zero, zeros = spec.zero, None
    levels = zero.levels if zero is not None else ()
    if zero is not None and zero.kind == "code":
        c = spec.scales[0].grain[1]
        shape = (n, -(-k // c) if c else 1)
        zeros = torch.randint(0, 1 << spec.element.bits, shape, dtype=torch.uint8, generator=g)
        if zero.element in _WIDE:  # between the codes
            zeros = (zeros + torch.rand(shape, generator=g)).to(_WIDE[zero.element])
    books = [16] * (spec.element.kind == "lut") + [256] * any(
        s.element == "lut8" for s in spec.scales
    )
    qt = QuantizedTensor(
        spec=spec,
        shape=(n, k),
        codes=pack(codes, spec.element.bits, CANONICAL),
        scales=tuple(_values(s, n, k, g) for s in spec.scales),
        zeros=zeros,
        offset=tuple(_values(s, n, k, g) for s in levels),
        gather=gather,
        codebook=tuple(torch.rand(size, generator=g) * 2 - 1 for size in books),
    )
    b = None if bias is None else torch.randn(n, generator=g).to(bias)
    return LayerTensors(operands={"weight": qt}, bias=b)


def make_op(kind: str, lt: LayerTensors, k: int, act: str = "float32", **sizes: int) -> OpSpec:
    features = set()
    if lt.bias is not None:
        features = {"bias", f"bias:{str(lt.bias.dtype).removeprefix('torch.')}"}
    n, stored = lt.weight.shape[-2:]
    return OpSpec(
        op=kind,  # type: ignore[arg-type]
        operands=(("weight", lt.weight.spec),),
        sizes=(("n", n), ("k", k), ("k_stored", stored), *sizes.items()),
        act_dtype=act,
        features=frozenset(features),
    )


# rounding of the result to the type of x: half a unit in its last place
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SUMS = 1e-6  # float32 sums of up to 1100 products, relative to the sum of their magnitudes


def bind(lt: LayerTensors, op: OpSpec) -> Callable[..., torch.Tensor]:
    """``WnA16`` over the layer's buffers."""
    kernel = WnA16()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    run, values = kernel.bind(op), list(buffers.values())
    return lambda *inputs: run(values, *inputs)


def excess(
    got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None
) -> float:
    """Largest error in units of what float32 sums and one rounding allow; fine up to 1."""
    b = None if bias is None else bias.double()
    want = F.linear(x.double(), w.double(), b)
    sums = x.double().abs() @ w.double().abs().t()
    # a row of tiny weights still cancels codes against zero points of its scale
    floor = x.double().abs().sum(-1, keepdim=True) * w.double().abs().amax(1)
    allowed = SUMS * (sums + floor / 8) + HALF_ULP[x.dtype] * want.abs() * 1.001 + 1e-30
    return ((got.double() - want).abs() / allowed).max().item() if got.numel() else 0.0
