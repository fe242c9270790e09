"""Running ``attend`` and ``combine``: what they take, how positions are split, launches; the op.

    quant_triton::attention_step(q, k, v, mask, scale) -> y

        q [B, H, 1, D]   k [B, Hkv, L, D]   v [B, Hkv, L, Dv]   ->   y [B, 1, H, Dv]
        mask  bool (True = attend) or float (added), broadcast to [B, H, 1, L]

    quant_triton::attention_decode(qkv, cos, sin, at, keys, values, mask, scale) -> y

        qkv [B, (H + 2 Hkv) D]   cos, sin [1 or B, R], either with more axes of size 1
        at int64 [1 or B], None: the last position
        keys, values [B, Hkv, L, D], written at position ``at``   ->   y [B, H D], as qkv

The second rotates q and k, writes the cache and attends to positions 0 to ``at`` in one call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.kernels.calls import unobserved
from quant_kernels_triton.arguments import dependent, options
from quant_kernels_triton.jitted import Jitted
from quant_kernels_triton.launch import Build, launch
from quant_kernels_triton.seen import on_device

__all__ = ["FLOATS", "decode_step", "run_decode", "run_step"]

attend, combine = Jitted("attention", "attend"), Jitted("attention", "combine")

FLOATS = (torch.bfloat16, torch.float16)
_MOST = 256  # features of a head that fit the kernel's registers
_MASKS = (torch.float32, *FLOATS)
_LEAST = 32  # positions of a block where there are few


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _processors(device: int | None) -> int:
    if device is None:  # the interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _cut(pairs: int, length: int, device: int | None) -> tuple[int, int]:
    """(positions of a block, splits): short chains for few programs, no sums to add for many."""
    wanted = max(1, 2 * _processors(device) // max(pairs, 1))
    block = _LEAST if length <= 2 * _LEAST * wanted else 2 * _LEAST
    return block, max(1, min(-(-length // block), wanted))


def _lined(*tensors: Tensor) -> bool:
    """Rows are whole units of 16 elements."""
    return all(t.stride(-1) == 1 and all(s % 16 == 0 for s in t.stride()[:-1]) for t in tensors)


def _placed(*tensors: Tensor) -> bool:
    """Addresses are multiples of 16 bytes; compiled code does not know them."""
    return torch.compiler.is_compiling() or not any(t.data_ptr() % 16 for t in tensors)


def _masks(mask: Tensor | None, k: Tensor) -> bool:
    return mask is None or (
        mask.dim() == 4
        and mask.shape[2] == 1
        and mask.shape[3] == k.shape[2]
        and mask.device == k.device
        and (mask.dtype == torch.bool or mask.dtype in _MASKS)
    )


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    return (
        q.shape[2] == 1
        and q.dtype in FLOATS
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
        and q.shape[1] % k.shape[1] == 0
        and q.shape[3] % 16 == v.shape[3] % 16 == 0
        and max(q.shape[3], v.shape[3]) <= _MOST
        and _masks(mask, k)
        and _lined(q, k, v)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What calls of one signature share: all but addresses."""

    part: int  # numbers that ``attend`` leaves for ``combine``; 0 without splits
    sizes: tuple[int, ...]  # length, splits, cache heads, strides
    grids: tuple[tuple[int, int], tuple[int, int]]
    key: tuple[Hashable, ...]
    sum_key: tuple[Hashable, ...]
    build: Callable[[], Build]
    build_sum: Callable[[], Build]
    bytes: bool  # the mask is of bools


def _plan(
    q: Tensor, heads: int, k: Tensor, v: Tensor, mask: Tensor | None, cos: Tensor | None,
    at: Tensor | None,
) -> _Plan:  # fmt: skip
    """For q [B, ...] with ``heads`` heads of queries; with ``cos`` it is a step's joint product."""
    (batch, groups, length, dim), wide, device = k.shape, v.shape[3], q.device.index
    each, pdl = heads // groups, dependent(device)
    block, splits = _cut(batch * groups, length, device)
    kind, steps = 0, (0, 0, 0)
    if mask is not None:
        kind, shown = 1 if mask.dtype == torch.bool else 2, mask.expand(batch, heads, 1, length)
        steps = (shown.stride(0), shown.stride(1), shown.stride(3))
    per_head, step = steps[1] != 0, 0 if cos is None else 2 if at is None else 1
    rotated = 0 if cos is None else cos.shape[-1]
    rest = [0 if t is None or t.shape[0] == 1 else t.stride(0) for t in (cos, at)]
    strides = [s // 16 for s in (q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3])]

    def build() -> Build:
        fixed = {
            "G": each, "D": dim, "DV": wide, "R": rotated, "BG": max(16, _power(each)),
            "BD": _power(dim), "BDV": _power(wide), "BN": block, "KIND": kind,
            "PER_HEAD": per_head, "STEP": step, "SPLIT": splits > 1, "PDL": pdl,
        }  # fmt: skip
        # without fused multiply-adds: they would leave out roundings of the rotation
        more = {"enable_fp_fusion": False} if step else {}
        return Build(constants=fixed, options=options(pdl, 4, 3 if dim <= 128 else 2) | more)

    def build_sum() -> Build:
        fixed = {"DV": wide, "BDV": _power(wide), "BS": 16, "PDL": pdl}
        return Build(constants=fixed, options=options(pdl, 4, 2))

    return _Plan(
        part=batch * heads * splits * (wide + 2) if splits > 1 else 0,
        sizes=(length, splits, groups, *strides, *steps, *rest),
        grids=((splits, batch * groups), (batch * heads, 1)),
        key=("attend", q.dtype, mask.dtype if mask is not None else None, each, dim, wide, rotated,
             block, per_head, step, splits > 1),
        sum_key=("combine", q.dtype, wide),
        build=build,
        build_sum=build_sum,
        bytes=kind == 1,
    )  # fmt: skip


_plans: dict[Hashable, _Plan | None] = {}
_KEPT = 4096


def _planned(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    at: Tensor | None,
) -> _Plan | None:  # fmt: skip
    """The plan of a call, found by what it depends on; None for what the kernels do not take."""
    signature = (
        q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device,
        v.shape, v.stride(), v.dtype, v.device,
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
        None if cos is None or sin is None else (
            cos.shape, cos.stride(), cos.dtype, cos.device,
            sin.shape, sin.stride(), sin.dtype, sin.device),
        None if at is None else (at.shape, at.stride(), at.dtype, at.device),
    )  # fmt: skip
    found = _plans.get(signature, _plans)
    if found is not _plans:
        return found  # type: ignore[return-value]
    if cos is None or sin is None:
        plan = _plan(q, q.shape[1], k, v, mask, None, None) if _fits(q, k, v, mask) else None
    elif _decodes(q, cos, sin, at, k, v, mask):
        heads = q.shape[-1] // k.shape[3] - 2 * k.shape[1]
        plan = _plan(q, heads, k, v, mask, cos, at)
    else:
        plan = None
    if len(_plans) >= _KEPT:  # a growing cache makes a new one for each length
        _plans.clear()
    _plans[signature] = plan
    return plan


def _launch(
    plan: _Plan, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor,
    at: Tensor, y: Tensor, scale: float,
) -> None:  # fmt: skip
    part, device = y, q.device.index
    if plan.part:
        part = torch.empty(plan.part, dtype=torch.float32, device=q.device)
    held = q if mask is None else mask.view(torch.uint8) if plan.bytes else mask
    args = (q, k, v, held, cos, sin, at, y, part, scale, *plan.sizes)
    launch(attend, plan.key, plan.grids[0], args, device, plan.build)
    if plan.part:
        args = (part, y, plan.sizes[1])
        launch(combine, plan.sum_key, plan.grids[1], args, device, plan.build_sum)


def _run_step(
    plan: _Plan, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    y = q.new_empty((q.shape[0], 1, q.shape[1], v.shape[3]))
    if y.numel():
        on_device(q, _launch, plan, q, k, v, mask, q, q, q, y, scale)
    return y


def _step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (t if _placed(t) else t.clone() for t in (q, k, v))
    plan = _planned(q, k, v, mask, None, None, None)
    if plan is None:
        raise _refused("attention_step", q, k, v, mask)
    return _run_step(plan, q, k, v, mask, scale)


def _refused(name: str, *tensors: Tensor | None) -> LayoutError:
    found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors if t is not None)
    return LayoutError(
        f"{name}: found {found}; expected 16-bit floats of one type in rows of whole units of 16 "
        f"elements, heads of up to {_MOST} features. Pass what the op's description says.",
        code="Q-LAYOUT-INPUT",
        actual=found,
    )


def _fake_step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], v.shape[3]))


def _decodes(
    qkv: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None, keys: Tensor, values: Tensor,
    mask: Tensor | None,
) -> bool:  # fmt: skip
    """For qkv [B, ..., N] and cos, sin [1 or B, ..., R], the axes between of size 1."""
    batch, groups, _, dim = keys.shape
    heads = qkv.shape[-1] // dim - 2 * groups
    return (
        qkv.shape[0] == batch and qkv.numel() == batch * (heads + 2 * groups) * dim
        and heads > 0 and heads % groups == 0
        and keys.shape == values.shape and dim % 16 == 0 and dim <= _MOST
        and qkv.dtype in FLOATS and qkv.dtype == keys.dtype == values.dtype
        and qkv.dtype == cos.dtype == sin.dtype
        and qkv.device == keys.device == values.device == cos.device == sin.device
        and _masks(mask, keys) and keys.shape[2] > 0
        and (at is None or (at.dtype == torch.int64 and at.shape in ((1,), (batch,))
                            and at.device == keys.device))
        and cos.shape == sin.shape and cos.stride() == sin.stride()
        and cos.shape[0] in (1, batch) and cos.numel() == cos.shape[0] * cos.shape[-1]
        and cos.shape[-1] % 16 == 0 and cos.shape[-1] <= dim and cos.stride(-1) == 1
        and _lined(qkv, keys, values)
    )  # fmt: skip


def _decode(
    qkv: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None, keys: Tensor, values: Tensor,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    plan = _planned(qkv, keys, values, mask, cos, sin, at)
    if plan is None or not _placed(qkv, keys, values, cos, sin):
        raise _refused("attention_decode", qkv, keys, values, cos, sin, at, mask)
    return _run_decode(plan, qkv, cos, sin, at, keys, values, mask, scale)


def _run_decode(
    plan: _Plan, qkv: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None, keys: Tensor,
    values: Tensor, mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    width = qkv.shape[-1] - 2 * keys.shape[1] * keys.shape[3]
    y = qkv.new_empty((*qkv.shape[:-1], width))
    if y.numel():
        where = qkv if at is None else at
        on_device(qkv, _launch, plan, qkv, keys, values, mask, cos, sin, where, y, scale)
    return y


def _fake_decode(
    qkv: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None, keys: Tensor, values: Tensor,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] - 2 * keys.shape[1] * keys.shape[3]))


_lib = torch.library.Library("quant_triton", "FRAGMENT")
_lib.define("attention_step(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")
_lib.define(
    "attention_decode(Tensor qkv, Tensor cos, Tensor sin, Tensor? at, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor? mask, float scale) -> Tensor"
)
for _name, _impl, _fake in (
    ("attention_step", _step, _fake_step),
    ("attention_decode", _decode, _fake_decode),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_triton::{_name}", _fake, lib=_lib)
_op = torch.ops.quant_triton.attention_step.default
decode_step = torch.ops.quant_triton.attention_decode.default


def run_step(
    buffers: list[Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor | None:
    """As in the module's docstring; None for what this kernel does not take."""
    if not unobserved(q):
        fits = _fits(q, k, v, mask) and _placed(q, k, v)
        return _op(q, k, v, mask, scale) if fits else None
    plan = _planned(q, k, v, mask, None, None, None)
    if plan is None or not _placed(q, k, v):
        return None
    return _run_step(plan, q, k, v, mask, scale)


def run_decode(
    buffers: list[Tensor], qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    mask: Tensor | None, scale: float, at: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The bound function of "attention_update"; None for what it does not take."""
    if not unobserved(qkv):
        fits = _decodes(qkv, cos, sin, at, keys, values, mask)
        fits = fits and _placed(qkv, keys, values, cos, sin)
        return decode_step(qkv, cos, sin, at, keys, values, mask, scale) if fits else None
    plan = _planned(qkv, keys, values, mask, cos, sin, at)
    if plan is None or not _placed(qkv, keys, values, cos, sin):
        return None
    return _run_decode(plan, qkv, cos, sin, at, keys, values, mask, scale)
