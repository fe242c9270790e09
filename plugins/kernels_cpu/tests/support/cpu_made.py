"""Random layers of the specs that the CPU kernels run."""

from __future__ import annotations

import torch

from quant_core.packing import pack
from quant_core.spec import CANONICAL, CHANNEL, Element, OpSpec, QuantSpec, Scale, Zero, group
from quant_core.tensors import LayerTensors, QuantizedTensor


def _scales(*factors: tuple[str, int]) -> tuple[Scale, ...]:
    return tuple(Scale(element=e, grain=group(g) if g else CHANNEL) for e, g in factors)


def _spec(bits: int, *factors: tuple[str, int], zero: Zero | None = None, **kw: bool) -> QuantSpec:
    return QuantSpec(element=Element.uint(bits), scales=_scales(*factors), zero=zero, **kw)


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
}
TABLE_SPECS = {
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
        return (torch.rand(shape, generator=g) * 0.1 + 0.01).to(_WIDE[scale.element])
    if scale.element.startswith("uint"):
        return torch.randint(1, 64, shape, dtype=torch.uint8, generator=g)
    if scale.element == "int8":
        return torch.randint(-99, 99, shape, dtype=torch.int8, generator=g).view(torch.uint8)
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
    zero, zeros = spec.zero, None
    levels = zero.levels if zero is not None else ()
    if zero is not None and zero.kind == "code":
        c = spec.scales[0].grain[1]
        shape = (n, -(-k // c) if c else 1)
        zeros = torch.randint(0, 1 << spec.element.bits, shape, dtype=torch.uint8, generator=g)
    qt = QuantizedTensor(
        spec=spec,
        shape=(n, k),
        codes=pack(codes, spec.element.bits, CANONICAL),
        scales=tuple(_values(s, n, k, g) for s in spec.scales),
        zeros=zeros,
        offset=tuple(_values(s, n, k, g) for s in levels),
        gather=gather,
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
