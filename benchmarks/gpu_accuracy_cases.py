"""Random layers of every kind that GPU kernels say they run, for ``gpu_accuracy.py``.

    weights    unsigned integers of 2, 3, 4, 5 and 8 bits x zero (none of its own, codes, float
               codes, offset), signed integers, small floats, a table; each in groups of 32, 64, 128
               and by row, the elements of scales taken in turn; and the kinds of real formats
    inputs     float, or rounded: int8, fp8, MX and NVFP4 with scales of run time or stored

Every kind with columns in order and reordered (``gather``, 5 % of them padding).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.kernels.activations import static_shape
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

__all__ = ["INPUTS", "PAIRS", "WEIGHTS", "WIDE", "make_layer", "make_op"]

_GRAINS = {"g32": group(32), "g64": group(64), "g128": group(128), "channel": CHANNEL}


def _s(element: str, grain: Grain, **more: object) -> Scale:
    return Scale(element=element, grain=grain, **more)  # type: ignore[arg-type]


def _float(name: str) -> Element:
    return Element(name=name, bits=int(name[2]), kind="float")


_E2M1, _E4M3, _NF4 = _float("fp4_e2m1"), _float("fp8_e4m3"), Element(name="nf4", bits=4, kind="lut")


def _product() -> Iterator[tuple[str, QuantSpec]]:
    turn = itertools.cycle(("bf16", "f16", "f32"))
    for bits, kind, (name, grain) in itertools.product(
        (4, 8, 2, 3, 5), ("mid", "code", "float", "offset"), _GRAINS.items()
    ):
        scale = next(turn)
        zero = {
            "mid": Zero(kind="const", value=1 << (bits - 1)),
            "code": Zero(kind="code", element=f"uint{bits}"),
            "float": Zero(kind="code", element="f16"),
            "offset": Zero(kind="offset", levels=(_s(scale, grain),)),
        }[kind]
        spec = QuantSpec(element=Element.uint(bits), scales=(_s(scale, grain),), zero=zero)
        yield f"uint{bits} {name} {kind}", spec
    for element in (Element.int(4), Element.int(8), _E2M1, _E4M3, _float("fp8_e5m2"),
                    _float("fp6_e2m3"), _float("fp6_e3m2"), _NF4):  # fmt: skip
        for name, grain in _GRAINS.items():
            yield (
                f"{element.name} {name}",
                QuantSpec(element=element, scales=(_s(next(turn), grain),)),
            )


_MID = Zero(kind="const", value=8)
_Q4K = (_s("uint6", group(32)), _s("f16", group(256)))
_Q2K = (_s("uint4", group(16)), _s("f16", group(256)))
WEIGHTS: dict[str, QuantSpec] = dict(_product()) | {
    "int4 g128 bf16": QuantSpec(
        element=Element.uint(4), scales=(_s("bf16", group(128)),), zero=_MID
    ),
    "int4 g256": QuantSpec(element=Element.uint(4), scales=(_s("bf16", group(256)),), zero=_MID),
    "int4 divisor": QuantSpec(
        element=Element.uint(4), scales=(_s("f32", group(128), inverse=True),), zero=_MID
    ),
    "int4 three factors": QuantSpec(
        element=Element.uint(4),
        scales=(_s("f32", group(128)), _s("f32", TENSOR, inverse=True), _s("f32", TENSOR)),
        zero=_MID,
    ),
    "int4 two levels": QuantSpec(
        element=Element.uint(4), scales=_Q4K, zero=Zero(kind="offset", levels=_Q4K)
    ),
    "int2 two levels": QuantSpec(
        element=Element.uint(2), scales=_Q2K, zero=Zero(kind="offset", levels=_Q2K)
    ),
    "int6 two levels": QuantSpec(
        element=Element.uint(6),
        scales=(_s("int8", group(16)), _s("f16", group(256))),
        zero=Zero(kind="const", value=32),
    ),
    "mxfp4": QuantSpec(element=_E2M1, scales=(_s("e8m0", group(32)),)),
    "mxfp8": QuantSpec(element=_E4M3, scales=(_s("e8m0", group(32)),)),
    "nvfp4": QuantSpec(element=_E2M1, scales=(_s("fp8_e4m3", group(16)), _s("f32", TENSOR))),
    "nvfp4 divisor": QuantSpec(
        element=_E2M1, scales=(_s("fp8_e4m3", group(16)), _s("f32", CHANNEL, inverse=True))
    ),
    "fp8 tensor": QuantSpec(element=_E4M3, scales=(_s("f32", TENSOR),)),
    "fp8 channel": QuantSpec(element=_E4M3, scales=(_s("f32", CHANNEL),)),
    "fp8 block": QuantSpec(element=_E4M3, scales=(_s("f32", block(128, 128)),)),
    "fp8 block e8m0": QuantSpec(element=_E4M3, scales=(_s("e8m0", block(128, 128)),)),
    "int8 channel f32": QuantSpec(element=Element.int(8), scales=(_s("f32", CHANNEL),)),
    "int8 tensor": QuantSpec(element=Element.int(8), scales=(_s("f32", TENSOR),)),
}
"""name -> weight."""

WIDE = ("int4 g128 bf16", "uint4 g32 code", "int4 two levels", "uint4 channel mid", "mxfp4",
        "nvfp4", "int8 channel f32", "fp8 channel", "fp8 block", "mxfp8", "uint8 g128 code",
        "uint3 g64 code")  # fmt: skip
"""Those that also run as a layer of many outputs, which other block sizes compute."""


def _at_run_time(element: Element, grain: Grain, scale: str = "f32", **more: object) -> QuantSpec:
    return QuantSpec(element=element, scales=(_s(scale, grain, static=False, **more),))


_FINE = _s("fp8_e4m3", group(16), static=False)
INPUTS: dict[str, QuantSpec] = {
    "fp8 token": _at_run_time(_E4M3, CHANNEL),
    "fp8 tensor": _at_run_time(_E4M3, TENSOR),
    "fp8 stored": QuantSpec(element=_E4M3, scales=(_s("f32", TENSOR),)),
    "fp8 g128": _at_run_time(_E4M3, group(128)),
    "int8 token": _at_run_time(Element.int(8), CHANNEL),
    "int8 stored": QuantSpec(element=Element.int(8), scales=(_s("f32", TENSOR),)),
    "mxfp8": _at_run_time(_E4M3, group(32), "e8m0"),
    "mxfp4": _at_run_time(_E2M1, group(32), "e8m0"),
    "nvfp4": QuantSpec(element=_E2M1, scales=(_FINE, _s("f32", TENSOR, static=False))),
    "nvfp4 stored": QuantSpec(element=_E2M1, scales=(_FINE, _s("f32", TENSOR))),
}
_INT4 = ("int4 g128 bf16", "uint4 g64 mid", "uint4 g32 mid", "uint4 channel mid", "int4 divisor",
         "int4 three factors", "uint4 g128 code")  # fmt: skip
PAIRS: list[tuple[str, str]] = [
    *((w, a) for w in _INT4 for a in ("fp8 token", "int8 token", "fp8 stored", "int8 stored")),
    *((w, a) for w in ("fp8 channel", "fp8 tensor")
      for a in ("fp8 token", "fp8 tensor", "fp8 stored")),
    *((w, a) for w in ("int8 channel f32", "int8 tensor", "int8 g128")
      for a in ("int8 token", "int8 stored")),
    ("fp8 block", "fp8 g128"), ("fp8 block e8m0", "fp8 g128"), ("fp8_e4m3 g128", "fp8 token"),
    ("mxfp4", "fp8 token"), ("mxfp4", "mxfp8"), ("mxfp4", "mxfp4"), ("mxfp8", "mxfp8"),
    ("nvfp4", "nvfp4"), ("nvfp4", "nvfp4 stored"), ("nvfp4 divisor", "fp8 token"),
]  # fmt: skip
"""Weights and activations that go together."""


def make_op(
    weight: QuantSpec, n: int, k: int, *, kind: str = "linear", act: str = "bfloat16",
    device: tuple[str, str], inputs: QuantSpec | None = None, experts: int = 0, bias: bool = True,
) -> OpSpec:  # fmt: skip
    """The operation of a layer with ``k`` stored columns."""
    features = {"bias"} if bias and kind != "embedding" else set()
    features |= {"gather"} if weight.gather else set()
    operands = [("weight", weight)]
    if inputs is not None:
        operands.append(("input", inputs))
        features |= {"input_scale"} if any(s.static for s in inputs.scales) else set()
    sizes = [("n", n), ("k", k - k // 20 if weight.gather else k), ("k_stored", k)]
    return OpSpec(
        op=kind,  # type: ignore[arg-type]
        operands=tuple(operands),
        sizes=(*sizes, *((("experts", experts),) if experts else ())),
        act_dtype=act,
        device=device,
        features=frozenset(features),
    )


def _values(s: Scale, n: int, k: int, g: torch.Generator, middle: float) -> Tensor:
    """Values of one factor around ``middle``, as raw bits of its element."""
    r, c = s.grain
    shape = (-(-n // r) if r else 1, -(-k // c) if c else 1)
    dtype = scale_dtype(s.element)
    if dtype.is_floating_point:
        v = (torch.rand(shape, generator=g) + 0.5) * middle
        return (1 / v if s.inverse else v).to(dtype)
    if s.element == "int8":
        return torch.randint(-100, 100, shape, generator=g).to(torch.int8).view(torch.uint8)
    low, high = {"e8m0": (118, 124), "fp8_e4m3": (16, 0x70)}.get(s.element, (1, 16))
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=g)


def _codes(e: Element, n: int, k: int, g: torch.Generator) -> Tensor:
    codes = torch.randint(0, 1 << e.bits, (n, k), dtype=torch.uint8, generator=g)
    worst = {"fp8_e4m3": 127, "fp8_e5m2": 124}.get(e.name)  # from here on not finite
    if worst is not None:
        codes[(codes & 127) >= worst] = 0
    return codes


def make_layer(op: OpSpec, *, seed: int = 0, zero: str = "") -> LayerTensors:
    """Random canonical tensors; outputs are of order 1.

    ``zero``: "codes" sets every weight to its zero point, "scales" every finest scale to 0.
    """
    spec, n, k = op.weight, op.size("n"), op.size("k_stored")
    g = torch.Generator().manual_seed(seed)
    z = spec.zero
    middles = (0.02, 0.002, 1.0)
    scales = [_values(s, n, k, g, middles[min(i, 2)]) for i, s in enumerate(spec.scales)]
    zeros, offset = None, ()
    if z is not None and z.kind == "code":
        like = Scale(element="f32", grain=spec.scales[0].grain)
        shape = _values(like, n, k, g, 1.0).shape
        zeros = torch.randint(0, 1 << spec.element.bits, shape, dtype=torch.uint8, generator=g)
        zeros = zeros.half() + 0.25 if z.element == "f16" else zeros
    elif z is not None and z.kind == "offset":
        last = len(z.levels) - 1
        offset = tuple(
            _values(s, n, k, g, 0.05 if i == 0 else 0.002)
            * (-1 if i == last and scale_dtype(s.element).is_floating_point else 1)
            for i, s in enumerate(z.levels)
        )
    codes = _codes(spec.element, n, k, g)
    if zero == "codes":
        codes.fill_(z.value if z is not None else 0)
        if zeros is not None:
            columns = torch.arange(k) // (spec.scales[0].grain[1] or k)
            codes = zeros[:, columns].contiguous()
    if zero == "scales":
        scales[0] = torch.zeros_like(scales[0])
        offset = tuple(torch.zeros_like(o) for o in offset)
    gather = None
    if spec.gather:
        gather = torch.randperm(k, generator=g).int()
        gather[gather >= op.size("k")] = -1
    book = (torch.randn(1 << spec.element.bits, generator=g),) * (spec.element.kind == "lut")
    qt = QuantizedTensor(
        spec=spec, shape=(n, k), codes=pack(codes, spec.element.bits, CANONICAL),
        scales=tuple(scales), zeros=zeros, offset=offset, gather=gather, codebook=book,
    )  # fmt: skip
    # a bias as models store it, in the type of x: cuBLAS adds it before it rounds
    bias = torch.randn(n, generator=g).to(getattr(torch, op.act_dtype)).float()
    out = LayerTensors(operands={"weight": qt}, bias=bias if "bias" in op.features else None)
    for name, (shape, dtype) in static_shape(op).items():
        out = replace(out, **{name: torch.full(shape, 0.011).to(dtype)})
    return out
