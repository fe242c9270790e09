"""A recipe and its buffers as the arguments of the plain kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_kernels_triton.recipe import FLOATS, Recipe

__all__ = ["constants", "interpreted", "pointers"]

_POINTERS = (
    ("codes", torch.int32),
    ("codes_high", torch.int32),
    ("scales_0", None),
    ("scales_1", None),
    ("scales_2", None),
    ("zeros", None),
    ("offset_0", None),
    ("offset_1", None),
    ("codebook_0", None),
)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    from quant_kernels_triton import plain

    return type(plain.gemm).__name__ == "InterpretedFunction"


def pointers(recipe: Recipe, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Codes, high plane, three factors, zeros, two offsets, table; the codes where one is absent.

    Codes are viewed as 32-bit words, in which the kernels read them.
    """
    held = dict(zip(recipe.buffers, tensors, strict=True))
    words = held["codes"].view(torch.int32)
    out = []
    for name, dtype in _POINTERS:
        t = held.get(name, words)
        out.append(t if dtype is None or t.dtype == dtype else t.view(dtype))
    return out


@functools.lru_cache(maxsize=1024)
def constants(recipe: Recipe) -> dict[str, Any]:
    """The compile-time constants that say how codes and factors are read."""
    exp, man = (-1, 0) if recipe.element == "lut" else FLOATS.get(recipe.element, (0, 0))
    return {
        "SF": tuple(f.constants() for f in recipe.scales),
        "OF": tuple(f.constants() for f in recipe.offsets),
        "ZERO": recipe.zero,
        "ZV": recipe.zero_value,
        "BITS": recipe.bits,
        "EXP": exp,
        "MAN": man,
        "SIGNED": recipe.element.startswith("int"),
    }
