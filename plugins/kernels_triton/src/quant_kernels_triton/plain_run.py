"""Running the plain kernels on a layer's buffers: block sizes, schedules of experts, launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_kernels_triton.arguments import NAMES, WORDS, constants, pointers
from quant_kernels_triton.interpreter import interpreting
from quant_kernels_triton.jitted import Jits
from quant_kernels_triton.launch import Build, aligned, launch
from quant_kernels_triton.recipe import Recipe

__all__ = ["dense_weight", "expert_blocks", "run_dense", "run_embedding", "run_gemm", "run_grouped"]

plain = Jits("plain")

_NT = 4  # row tiles of a block: 64 output features
_BK = 256  # columns of a row that a block of ``embed`` writes


def _block_rows(rows: int) -> int:
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def _sizes(r: Recipe) -> tuple[int, ...]:
    return r.n, r.rows, r.k, r.k_in, r.groups


def _views(r: Recipe, first: int) -> dict[int, torch.dtype]:
    """The word types of the buffers of ``pointers``, which begin at argument ``first``."""
    words = {first + NAMES.index(name): dtype for name, dtype in WORDS.items()}
    absent = [first + i for i, name in enumerate(NAMES) if name not in r.buffers]
    return words | dict.fromkeys(absent, torch.int32)


def _gemm(
    r: Recipe, x: Tensor, tensors: Sequence[Tensor], y: Tensor, blocks: int, bm: int,
    schedule: tuple[Tensor, Tensor, Tensor] | None,
) -> None:  # fmt: skip
    held = dict(zip(r.buffers, tensors, strict=True))
    codes = held["codes"]
    side = schedule or (codes, codes, codes)
    n, rows, k, k_in, groups = _sizes(r)
    args = (
        x, *pointers(r, tensors), held.get("gather", codes), held.get("bias", codes), y, *side,
        x.shape[0], n, rows, k, k_in, groups,
    )  # fmt: skip
    grouped = schedule is not None

    def build() -> Build:
        fixed = constants(r) | {
            "HAS_GATHER": r.gather,
            "HAS_BIAS": r.bias,
            "GROUPED": grouped,
            "BM": bm,
            "NT": _NT,
            "INTERPRET": interpreting(),
        }
        views = _views(r, 1)
        views |= {} if r.gather else {1 + len(NAMES): torch.int32}
        return Build(
            constants=fixed, options={"num_warps": 4, "num_stages": 3}, views=views
        )  # fmt: skip

    key = ("gemm", r, x.dtype, bm, grouped)
    launch(plain.gemm, key, (blocks * (rows // 64), 1), args, x.device.index, build)


def run_gemm(r: Recipe, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """y [M, N] = x [M, K] W^T (+ bias)."""
    x = aligned(x)
    y = x.new_empty(x.shape[0], r.n)
    if x.shape[0]:
        bm = _block_rows(x.shape[0])
        _gemm(r, x, tensors, y, -(-x.shape[0] // bm), bm, None)
    return y


def expert_blocks(experts: Tensor, count: int, bm: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert, and blocks of at most ``bm`` rows of one expert each.

    Made on the device, without knowing any count on the host: there are as many blocks as there
    could be, and those too many have the expert -1.

    Returns:
        order int32 [T]: rows, sorted by expert, rows of no expert last.
        expert int32 [B]; bounds int32 [B, 2]: first and last + 1 position in ``order``.
    """
    t = experts.shape[0]
    known = (experts >= 0) & (experts < count)
    # a stable sort keeps the order of tokens, so that results do not depend on its algorithm
    ids, order = torch.where(known, experts, count).sort(stable=True)
    every = torch.arange(count + 1, device=experts.device, dtype=ids.dtype)
    first = torch.searchsorted(ids, every)
    blocks = (first.diff() + (bm - 1)) // bm
    ends = blocks.cumsum(0)
    most = min(t, -(-t // bm) + count)
    b = torch.arange(most, device=experts.device)
    owner = torch.searchsorted(ends, b, right=True)
    expert = torch.where(owner < count, owner, -1)
    held = owner.clamp(max=count - 1)
    start = first[held] + (b - (ends[held] - blocks[held])) * bm
    stop = torch.minimum(start + bm, first[held + 1])
    return order.int(), expert.int(), torch.stack([start, stop], 1).int()


def run_grouped(r: Recipe, x: Tensor, experts: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """y [T, N]: row t through expert ``experts[t]``; zeros where that is no expert."""
    x = aligned(x)
    t = x.shape[0]
    y = x.new_zeros(t, r.n)
    if t:
        bm = _block_rows(-(-t // max(r.experts, 1)))
        order, expert, bounds = expert_blocks(experts, r.experts, bm)
        _gemm(r, x, tensors, y, expert.shape[0], bm, (order, expert, bounds))
    return y


def dense_weight(r: Recipe, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[N, K] weights of a matrix in stored column order."""
    codes = tensors[r.buffers.index("codes")]
    out = torch.empty(r.n, r.k, dtype=dtype, device=codes.device)
    args = (*pointers(r, tensors), out, r.n, r.rows, r.k, r.groups, 0)

    def build() -> Build:
        fixed = constants(r) | {"NT": _NT}
        return Build(constants=fixed, options={"num_warps": 4}, views=_views(r, 0))

    grid = (r.rows // 64, r.groups)
    launch(plain.dense, ("dense", r, dtype), grid, args, codes.device.index, build)
    return out


def run_dense(r: Recipe, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """y = x W^T through weights in the type of x and torch's own matmul."""
    held, weight = dict(zip(r.buffers, tensors, strict=True)), dense_weight(r, tensors, x.dtype)
    if x.device.type == "meta":  # planned
        return x.new_empty(x.shape[0], r.n)
    if r.gather:  # -1 picks the appended zero column
        x = F.pad(x, (0, 1))[:, held["gather"][: r.k].long()]
    return F.linear(x, weight, held["bias"].to(x.dtype) if r.bias else None)


def run_embedding(r: Recipe, ids: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Rows [T, K] of the ids [T]."""
    flat = aligned(ids.reshape(-1))
    out = torch.empty(flat.numel(), r.k, dtype=getattr(torch, r.act_dtype), device=flat.device)
    if flat.numel():
        args = (flat, *pointers(r, tensors), out, r.n, r.rows, r.k, r.groups)

        def build() -> Build:
            fixed = constants(r) | {"BK": _BK}
            return Build(constants=fixed, options={"num_warps": 4}, views=_views(r, 1))

        grid, key = (flat.numel(), -(-r.k // _BK)), ("embed", r, flat.dtype)
        launch(plain.embed, key, grid, args, flat.device.index, build)
    return out
