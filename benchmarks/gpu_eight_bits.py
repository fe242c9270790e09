"""Checks on a GPU of what ``gpu_mixed.py`` does not time: codes of activations, and scaled_ring."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quant_core.kernels.activations import fake_quantize
from quant_core.spec import CHANNEL, Element, QuantSpec, Scale
from quant_kernels_triton import scaled_run
from quant_kernels_triton.codes_run import Rule, hopper_codes, scaled_rule
from quant_kernels_triton.scaled_plan import ScaledPlan
from quant_kernels_triton.scaled_ring_plan import MOST, RingSizes, WideSizes
from quant_kernels_triton.scaled_ring_run import run_ring

__all__ = ["check_codes", "check_ring", "eight_bit_layer", "eight_bit_plan"]

BOUND = 5e-3
ELEMENTS = {True: Element(name="fp8_e4m3", bits=8, kind="float"), False: Element.int(8)}
SIZES = [
    RingSizes(bm, warps, groups, 3, split)
    for bm in (16, 64, 128)
    for warps in (4, 8)
    for groups in (1, 2)
    for split in (1, 2, 4)
]

WIDE = [WideSizes(64, 8), WideSizes(64, 12, True), WideSizes(128, 6), WideSizes(128, 8, True),
        WideSizes(256, 4)]  # fmt: skip


def eight_bit_plan(kind: str, n: int, k: int) -> ScaledPlan:
    """The plan of a layer of ``kind``: "fp8", "block" or "int8"."""
    return ScaledPlan(
        kind=kind, n=n, k=k, single=False, static=False, peak=127.0 if kind == "int8" else 448.0,
        least=0.0, most=0.0, bias=False, act_dtype="bfloat16", buffers=("codes", "scales_0"),
        types=("f32", "f32"),
    )  # fmt: skip


def eight_bit_layer(kind: str, n: int, k: int) -> tuple[list[Tensor], Tensor]:
    """Random buffers in the order "rows", and the float64 weights that they are."""
    if kind == "int8":
        codes = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
    else:
        codes = (torch.randn(n, k, device="cuda") * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    grid = (-(-n // 128), -(-k // 128)) if kind == "block" else (n, 1)
    s = torch.rand(grid, device="cuda") * 0.01 + 0.001
    wide = s.double()
    if kind == "block":
        wide = wide.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return [codes.view(torch.uint8), s], codes.double() * wide


def acts(kind: str) -> QuantSpec:
    grain = (1, 128) if kind == "block" else CHANNEL
    scale = Scale(element="f32", grain=grain, static=False)
    return QuantSpec(element=ELEMENTS[kind != "int8"], scales=(scale,))


def _inputs(rows: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(rows, k, device="cuda")
    small = 1e-30 if dtype != torch.float16 else 1e-6
    odd = x.clone()
    odd[3], odd[7, 1:] = 0, 0
    odd[4, 7], odd[5, 9] = math.nan, math.inf
    whole = torch.randint(-500, 500, (rows, k), device="cuda").float()  # ties
    spread = x * (torch.rand(rows, 1, device="cuda") * 60 - 30).exp2()
    return [v.to(dtype) for v in (x, spread, whole, x * small, odd)]


def _same(q: Tensor, s: Tensor, q0: Tensor, s0: Tensor, per: int) -> bool:
    """Equal codes and scales wherever the scale is a number, and NaN in the same places."""
    fine = s0 == s0
    wide = fine.repeat_interleave(per, 1)[:, : q.shape[1]]
    return (
        torch.equal(s[fine], s0[fine])
        and torch.equal(fine, s == s)
        and torch.equal(q[wide], q0[wide])
    )


def check_codes(widths: Sequence[int] = (512, 544, 4096, 14336)) -> dict:
    """Codes and scales of both quantizers equal, bit for bit, those of the portable kernels."""
    bad, rows = [], 37
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for k in widths:
            for i, x in enumerate(_inputs(rows, k, dtype)):
                for kind in ("fp8", "int8"):
                    p = eight_bit_plan(kind, 512, k)
                    q0, s0 = scaled_run.codes_of(p, x, None)
                    for order in (0, 4, 8):
                        rule = Rule(key=(p, order), k=k, fp8=kind == "fp8",
                                    bounds=(p.peak, 0.0, 0.0), order=order)  # fmt: skip
                        q, s = hopper_codes(rule, x)
                        v = q0.view(rows, k // 16, 2, 4, 2)
                        v = (
                            v
                            if not order
                            else v.permute(0, 1, 3, *((4, 2) if order == 4 else (2, 4)))
                        )
                        if not _same(q, s[:, None], v.reshape(rows, k), s0[:, None], k):
                            bad.append((str(dtype), k, i, kind, order))
                p = eight_bit_plan("block", 512, k)
                q0, s0 = scaled_run.codes_of(p, x, None, column_major=True)
                q, s = hopper_codes(scaled_rule(p), x)
                if not _same(q, s.t(), q0, s0, 128):
                    bad.append((str(dtype), k, i, "block"))
    return {"spec": "codes", "bad": bad}


SHAPES, ROWS = ((512, 1024), (328, 3600), (200, 544)), (1, 5, 16, 33, 64, 100, 129, 300)


def check_ring(
    kind: str,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    only: Sequence[RingSizes | WideSizes] = (),
) -> dict:
    """Every block size on sizes that are no multiples of it, against float64.

    Args:
        only: these block sizes instead, for all numbers of rows.
    """
    bad, worst = [], 0.0
    for n, k in shapes:
        p = eight_bit_plan(kind, n, k)
        held, w = eight_bit_layer(kind, n, k)
        for m in rows:
            x = torch.randn(m, k, device="cuda").bfloat16()
            want = fake_quantize(x.float(), acts(kind)).double() @ w.t()
            wide = [c for c in WIDE if kind != "block" or c.bm == 64]
            picked = (None,) if m <= MOST[kind] else ()  # more rows are not offered
            some = (*picked, *SIZES[m % 3 :: 3], *wide)
            for c in only or some:
                try:
                    y = run_ring(p, x, held, c)
                    e = float((y.double() - want).norm() / want.norm())
                    worst = max(worst, e)
                    if not (e <= BOUND and torch.equal(y, run_ring(p, x, held, c))):
                        bad.append((n, k, m, str(c), f"{e:.2e}"))
                except Exception as err:  # a benchmark goes on and reports it
                    bad.append((n, k, m, str(c), repr(err)[:200]))
    return {"spec": "ring", "kind": kind, "worst": worst, "bad": bad}
