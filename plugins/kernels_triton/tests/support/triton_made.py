"""Random layers of the specs that the kernels run."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.numerics import scale_dtype
from quant_core.packing import pack
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    Grain,
    OpSpec,
    QuantSpec,
    Scale,
    Zero,
    block,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor


def _s(element: str, grain: Grain) -> Scale:
    return Scale(element=element, grain=grain)


def _float(name: str, bits: int) -> Element:
    return Element(name=name, bits=bits, kind="float")


def _uint(bits: int, *scales: Scale, zero: Zero | None = None, gather: bool = False) -> QuantSpec:
    return QuantSpec(element=Element.uint(bits), scales=scales, zero=zero, gather=gather)


_MID = Zero(kind="const", value=8)
_CODE = Zero(kind="code")
_E2M1, _E4M3 = _float("fp4_e2m1", 4), _float("fp8_e4m3", 8)
_Q4K = (_s("uint6", group(32)), _s("f16", group(256)))
SPECS = {
    "uint4 g128 f16": _uint(4, _s("f16", group(128)), zero=_MID),
    "uint4 g128 bf16": _uint(4, _s("bf16", group(128)), zero=_MID),
    "uint4 g32 bf16 code": _uint(4, _s("bf16", group(32)), zero=_CODE),
    "uint4 g64 f16 offset": _uint(
        4, _s("f16", group(64)), zero=Zero(kind="offset", levels=(_s("f16", group(64)),))
    ),
    "uint4 g16 f32 code": _uint(4, _s("f32", group(16)), zero=_CODE),
    "uint4 channel": _uint(4, _s("f32", CHANNEL), zero=_MID),
    "uint4 two-level offset": _uint(4, *_Q4K, zero=Zero(kind="offset", levels=_Q4K)),
    "uint4 g128 gather": _uint(4, _s("f16", group(128)), zero=_MID, gather=True),
    "uint4 inverse": _uint(4, Scale(element="f32", grain=group(128), inverse=True), zero=_MID),
    "uint4 three factors": _uint(
        4,
        _s("f32", group(128)),
        Scale(element="f32", grain=TENSOR, inverse=True),
        _s("f32", TENSOR),
        zero=_MID,
    ),
    "uint2 g64 code": _uint(2, _s("f16", group(64)), zero=Zero(kind="code", element="uint2")),
    "uint3 g128": _uint(3, _s("f16", group(128)), zero=Zero(kind="const", value=4)),
    "uint5 g32": _uint(5, _s("f16", group(32)), zero=Zero(kind="const", value=16)),
    "uint8 g128 code": _uint(8, _s("f16", group(128)), zero=Zero(kind="code", element="uint8")),
    "int8 channel": QuantSpec(element=Element.int(8), scales=(_s("f32", CHANNEL),)),
    "mxfp4": QuantSpec(element=_E2M1, scales=(_s("e8m0", group(32)),)),
    "nvfp4": QuantSpec(element=_E2M1, scales=(_s("fp8_e4m3", group(16)), _s("f32", TENSOR))),
    "fp8 channel": QuantSpec(element=_E4M3, scales=(_s("f32", CHANNEL),)),
    "fp8 tensor": QuantSpec(element=_E4M3, scales=(_s("f32", TENSOR),)),
    "fp8 block": QuantSpec(element=_E4M3, scales=(_s("f32", block(128, 128)),)),
    "fp8_e5m2 g128": QuantSpec(element=_float("fp8_e5m2", 8), scales=(_s("bf16", group(128)),)),
    "fp6_e2m3 g32": QuantSpec(element=_float("fp6_e2m3", 6), scales=(_s("e8m0", group(32)),)),
    "mxfp8": QuantSpec(element=_E4M3, scales=(_s("e8m0", group(32)),)),
    "table of 16": QuantSpec(
        element=Element(name="nf4", bits=4, kind="lut"), scales=(_s("f32", group(64)),)
    ),
}
"""name -> spec."""


def _grid(s: Scale, n: int, k: int) -> tuple[int, int]:
    r, c = s.grain
    return (-(-n // r) if r else 1, -(-k // c) if c else 1)


def _values(s: Scale, n: int, k: int, g: torch.Generator, sign: float = 1.0) -> Tensor:
    shape = _grid(s, n, k)
    if s.inverse:
        return torch.rand(shape, generator=g) * 50 + 40
    if scale_dtype(s.element).is_floating_point:
        return (sign * (torch.rand(shape, generator=g) * 0.02 + 0.005)).to(scale_dtype(s.element))
    low, high = {"e8m0": (118, 124), "fp8_e4m3": (40, 70)}.get(s.element, (1, 60))
    return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)


def make_layer(
    spec: QuantSpec, n: int, k: int, *, seed: int = 0, bias: bool = False
) -> LayerTensors:
    """Random codes and scales; scales around 0.01, so that outputs are of order 1."""
    g = torch.Generator().manual_seed(seed)
    e, zero = spec.element, spec.zero
    codes = torch.randint(0, 1 << e.bits, (n, k), generator=g, dtype=torch.uint8)
    if e.name == "fp8_e4m3":  # no NaN
        codes = torch.where((codes & 127) == 127, codes & 128, codes)
    if e.name == "fp8_e5m2":  # no infinity, no NaN
        codes = torch.where((codes & 127) >= 124, codes & 128, codes)
    zeros, offset = None, ()
    if zero is not None and zero.kind == "code":
        shape = _grid(spec.scales[0], n, k)
        zeros = torch.randint(0, 1 << min(e.bits, 4), shape, generator=g, dtype=torch.uint8)
    if zero is not None and zero.kind == "offset":
        offset = tuple(_values(s, n, k, g, -1.0) for s in zero.levels)
    gather = None
    if spec.gather:
        gather = torch.randperm(k, generator=g).int()
        gather[3] = -1
    book = (torch.randn(1 << e.bits, generator=g),) if e.kind == "lut" else ()
    qt = QuantizedTensor(
        spec=spec,
        shape=(n, k),
        codes=pack(codes, e.bits, CANONICAL),
        scales=tuple(_values(s, n, k, g) for s in spec.scales),
        zeros=zeros,
        offset=offset,
        gather=gather,
        codebook=book,
    )
    held = torch.randn(n, generator=g) if bias else None
    return LayerTensors(operands={"weight": qt}, bias=held)


def make_op(
    spec: QuantSpec,
    n: int,
    k: int,
    *,
    op: str = "linear",
    act: str = "float16",
    bias: bool = False,
    experts: int = 0,
    device: tuple[str, str] = ("cpu", ""),
) -> OpSpec:
    """The operation of a layer."""
    features = {"bias"} if bias else set()
    features |= {"gather"} if spec.gather else set()
    sizes = (("n", n), ("k", k), *((("experts", experts),) if experts else ()))
    return OpSpec(
        op=op,  # type: ignore[arg-type]
        operands=(("weight", spec),),
        sizes=sizes,
        act_dtype=act,
        features=frozenset(features),
        device=device,
    )
