"""Running the quantizers of ``codes_gluon``: buffers and launches."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_kernels_triton.jitted import Jitted
from quant_kernels_triton.launch import Build, launch
from quant_kernels_triton.scaled_plan import ScaledPlan

__all__ = ["Rule", "hopper_codes", "scaled_rule"]

group_codes, token_codes = (Jitted("codes_gluon", n) for n in ("group_codes", "token_codes"))

_GROUP_WARPS = 4  # of 4 tokens each


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How x is quantized. ``key`` names all that the compiled kernel depends on but dtypes."""

    key: Hashable
    k: int  # stored columns
    fp8: bool
    bounds: tuple[float, float, float]  # peak, least, most
    order: int = 0  # of columns: 0, 4 or 8
    grouped: bool = False  # a scale per 128 columns


@functools.cache
def scaled_rule(p: ScaledPlan) -> Rule:
    """How a plan of the kernels on rows quantizes x."""
    bounds = (p.peak, p.least, p.most)
    return Rule(key=p, k=p.k, fp8=p.kind != "int8", bounds=bounds, grouped=p.kind == "block")


def _power(size: int) -> int:
    return max(512, 1 << (size - 1).bit_length())


def hopper_codes(
    rule: Rule,
    x: Tensor,
    stored: Tensor | None = None,
    rows: Tensor | None = None,
    gather: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 (bits of e4m3) or int8 [T, K], and float32 scales [T] or [K / 128, T].

    Args:
        stored: the stored scale [1].
        rows: the row of x that each token is; None: all in order.
        gather: the column of x that each stored column is; None: the same.
    """
    t, k, device = x.shape[0] if rows is None else rows.shape[0], rule.k, x.device
    q = torch.empty(t, k, dtype=torch.uint8 if rule.fp8 else torch.int8, device=device)
    bounded = rule.bounds[1] > 0 or rule.bounds[2] > 0
    if rule.grouped:
        groups = -(-k // 128)
        s = torch.empty(groups, t, device=device)

        def build_groups() -> Build:
            constants = {"BOUNDED": bounded, "NW": _GROUP_WARPS}
            options = {"num_warps": _GROUP_WARPS, "launch_pdl": True}
            return Build(constants=constants, options=options)

        grid = (-(-t // (4 * _GROUP_WARPS)), groups)
        args = (x, q, s, t, k, *rule.bounds)
        launch(group_codes, ("group codes", rule.key, x.dtype), grid, args, device.index,
               build_groups)  # fmt: skip
        return q, s
    s = torch.empty(t, device=device)
    bk, bi = _power(k), _power(x.shape[1])

    def build() -> Build:
        warps = min(8, max(4, bk // 512))  # so many that three programs fit a multiprocessor
        constants = {
            "FP8": rule.fp8,
            "BOUNDED": bounded,
            "STATIC": stored is not None,
            "HAS_ROWS": rows is not None,
            "HAS_GATHER": gather is not None,
            "ORDER": rule.order,
            "BK": bk,
            "BI": bi if gather is not None else bk,
            "NW": warps,
        }
        return Build(constants=constants, options={"num_warps": warps, "launch_pdl": True})

    named = [s if v is None else v for v in (rows, stored, gather)]
    args = (x, *named, q, s, k, x.shape[1], *rule.bounds)
    key = ("token codes", rule.key, x.dtype, rows is None)
    launch(token_codes, key, (t, 1), args, device.index, build)
    return q, s
