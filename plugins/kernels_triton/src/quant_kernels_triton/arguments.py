"""A recipe and its buffers as the arguments of the plain kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_core.kernels.calls import planned
from quant_kernels_triton.interpreter import interpreting
from quant_kernels_triton.recipe import ABSENT, FLOATS, Factor, Recipe

__all__ = ["NAMES", "WORDS", "capability", "constants", "dependent", "options", "pointers"]

NAMES = (
    "codes",
    "codes_high",
    "scales_0",
    "scales_1",
    "scales_2",
    "zeros",
    "offset_0",
    "offset_1",
    "codebook_0",
)
WORDS = {"codes": torch.int32, "codes_high": torch.int32}
"""Buffers that the kernels read in words of another type."""


def dependent(device: int | None) -> bool:
    """Whether kernels may start while the one before still runs (Hopper and newer)."""
    return capability(device) >= 90


def capability(device: int | None) -> int:
    """Compute capability of a CUDA device, 90 for 9.0; 0 of others."""
    if planned.jobs is not None:
        return planned.capability
    return 0 if device is None else _capability(device)


@functools.cache
def _capability(device: int) -> int:
    if torch.version.hip is not None or interpreting():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def options(pdl: bool, warps: int, stages: int) -> dict[str, int | bool]:
    """Compile options of a kernel, with programmatic dependent launch where ``pdl``."""
    held: dict[str, int | bool] = {"num_warps": warps, "num_stages": stages}
    return held | {"launch_pdl": True} if pdl else held


def pointers(recipe: Recipe, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The buffers of ``NAMES``; the codes where one is absent."""
    held = dict(zip(recipe.buffers, tensors, strict=True))
    codes = held["codes"]
    return [held.get(name, codes) for name in NAMES]


def _factors(name: str, factors: Sequence[Factor], count: int) -> dict[str, int]:
    absent = [ABSENT] * (count - len(factors))
    return {f"{name}{i}": c for i, c in enumerate([f.constant() for f in factors] + absent)}


def constants(recipe: Recipe) -> dict[str, Any]:
    """The compile-time constants that say how codes and factors are read."""
    exp, man = (-1, 0) if recipe.element == "lut" else FLOATS.get(recipe.element, (0, 0))
    return {
        **_factors("SF", recipe.scales, 3),
        **_factors("OF", recipe.offsets, 2),
        "ZERO": recipe.zero,
        "ZV": recipe.zero_value,
        "BITS": recipe.bits,
        "EXP": exp,
        "MAN": man,
        "SIGNED": recipe.element.startswith("int"),
    }
