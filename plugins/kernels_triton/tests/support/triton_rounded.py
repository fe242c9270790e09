"""Activation specs of every kind core knows, and inputs that find rounding mistakes."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.numerics import MX_RULES
from quant_core.spec import CHANNEL, TENSOR, Element, Grain, QuantSpec, Scale, Zero, group

INT8, INT4, UINT8 = Element.int(8), Element.int(4), Element.uint(8)


def small(name: str) -> Element:
    """A small float element."""
    return Element(name=name, bits=int(name[2]), kind="float")


FP8, FP4 = small("fp8_e4m3"), small("fp4_e2m1")


def run_time(
    element: Element, grain: Grain, scale: str = "f32", zero: Zero | None = None,
    ties: str = "even", **more: object,
) -> QuantSpec:  # fmt: skip
    """A scale computed on every call."""
    fine = Scale(element=scale, grain=grain, static=False, **more)  # type: ignore[arg-type]
    return QuantSpec(element=element, scales=(fine,), zero=zero, ties=ties)  # type: ignore[arg-type]


def two_level(outer: Scale, scale: str = "fp8_e4m3", size: int = 16, **more: object) -> QuantSpec:
    """A small float per group of fp4 codes under one factor."""
    fine = Scale(element=scale, grain=group(size), static=False, **more)  # type: ignore[arg-type]
    return QuantSpec(element=FP4, scales=(fine, outer))


def _f32(grain: Grain = TENSOR, **more: object) -> Scale:
    return Scale(element="f32", grain=grain, **more)  # type: ignore[arg-type]


_ZERO = Zero(kind="code", element="int8")
SPECS: dict[str, QuantSpec] = {
    "int8 token": run_time(INT8, CHANNEL),
    "int8 token, half the range": run_time(INT8, CHANNEL, peak=127.5),
    "int8 tensor": run_time(INT8, TENSOR),
    "int8 groups": run_time(INT8, group(32)),
    "int8 groups of 24": run_time(INT8, group(24)),
    "int8 token, zero": run_time(INT8, CHANNEL, zero=_ZERO),
    "uint8 tensor, zero": run_time(UINT8, TENSOR, zero=Zero(kind="code", element="uint8")),
    "int8 groups, zero": run_time(INT8, group(32), zero=_ZERO),
    "int4 token": run_time(INT4, CHANNEL),
    "int4 token, ties up": run_time(INT4, CHANNEL, ties="up"),
    "int4 groups, ties down": run_time(INT4, group(16), ties="down"),
    "int4 clipped": QuantSpec(element=INT4, scales=(_f32(CHANNEL, static=False), _f32())),
    "fp8 token": run_time(FP8, CHANNEL),
    "fp8 tensor": run_time(FP8, TENSOR),
    "fp8 groups": run_time(FP8, group(128)),
    "fp8 bounded": run_time(FP8, CHANNEL, least=1e-3, most=2e-3),
    "fp8 scale per group": run_time(FP8, group(32), "fp8_e4m3"),
    "fnuz token": run_time(small("fp8_e4m3_fnuz"), CHANNEL),
    "e5m2 fnuz token": run_time(small("fp8_e5m2_fnuz"), CHANNEL),
    "fp6 token, ties away": run_time(small("fp6_e3m2"), CHANNEL, ties="away"),
    "mx bounded": run_time(FP4, group(32), "e8m0", least=2.0**-4, most=4.0),
    "mx fp8 peak": run_time(FP8, group(32), "e8m0", peak=240.0, rule="rceil"),
    "nvfp4": two_level(_f32(static=False)),
    "nvfp4 token": two_level(_f32(CHANNEL, static=False)),
    "nvfp4 peak": two_level(_f32(static=False, peak=2688.0), least=2.0**-9),
    "nvfp4 stored": two_level(_f32()),
    "nvfp4 stored inverse": two_level(_f32(inverse=True)),
    "nvfp4 token e5m2": two_level(_f32(CHANNEL, static=False, peak=1536.0), "fp8_e5m2", 32),
    "fp8 stored": QuantSpec(element=FP8, scales=(_f32(),)),
    "fp8 stored inverse": QuantSpec(element=FP8, scales=(_f32(inverse=True),)),
    "fp8 stored groups": QuantSpec(element=FP8, scales=(_f32((0, 32)),)),
    "fp8 stored columns": QuantSpec(element=FP8, scales=(_f32((0, 1)),)),
    "int8 stored": QuantSpec(
        element=INT8, scales=(Scale(element="bf16", grain=TENSOR),), zero=_ZERO
    ),
    "uint8 stored groups": QuantSpec(
        element=UINT8,
        scales=(Scale(element="f16", grain=(0, 32)),),
        zero=Zero(kind="code", element="uint8"),
    ),
    "int8 stored e8m0": QuantSpec(
        element=INT8,
        scales=(Scale(element="fp8_e4m3", grain=TENSOR, inverse=True),),
        zero=Zero(kind="code", element="f32"),
    ),
}
SPECS |= {
    f"mx {name} {rule}": run_time(small(name), group(32), "e8m0", rule=rule)
    for name in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2")
    for rule in MX_RULES
}


def stored(spec: QuantSpec, k: int, experts: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """Values of a static scale and its zero, fixed."""
    scale = next((s for s in spec.scales if s.static), None)
    if scale is None:
        return None, None
    count = -(-k // scale.grain[1]) if scale.grain[1] else 1
    g = torch.Generator().manual_seed(7)
    shape = (experts, count) if experts else (count,)
    values = torch.rand(shape, generator=g) * 0.05 + 0.01
    if scale.inverse:
        values = 1 / values
    if spec.element is INT4:
        values += 0.85  # a clip ratio
    kinds = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    if scale.element in kinds:
        values = values.to(kinds[scale.element])
    else:
        values = values.to(torch.float8_e4m3fn).view(torch.uint8)
    if spec.zero is None:
        return values, None
    zero = torch.randint(0, 200, shape, generator=g)
    return values, zero.float() if spec.zero.element == "f32" else zero.to(torch.uint8)


def inputs(k: int, dtype: torch.dtype) -> Tensor:
    """[13, K]: usual rows, and rows of zeros, outliers, tiny, huge and non-finite values."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(13, k, generator=g)
    x[1] *= torch.logspace(-6, 4, k)
    x[2] = 0
    x[3, :] = x[3, :].round() * 0.5  # ties under scales that are powers of two
    x[4] = 0
    x[4, k // 2] = -1e4
    x[5] *= 1e-38  # subnormal in float32
    x[6] *= 1e-44
    x[7] *= 1e36
    x[8, k - 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # as GPUs make it
    x[9, 0] = float("inf")
    x[10, 3] = float("-inf")
    x[11] = x[11].abs()
    x[12] = -x[12].abs() * torch.logspace(-3, 0, k)
    return x.to(dtype)


def same_bits(got: Tensor, want: Tensor) -> Tensor:
    """Where two tensors of floats hold the same: NaN equals NaN, -0 differs from 0."""
    signs = torch.signbit(got) == torch.signbit(want)
    return ((got == want) & signs) | (got.isnan() & want.isnan())
