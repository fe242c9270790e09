"""Running ``attend`` and ``combine``: what they take, how positions are split, launches; the op.

    quant_triton::attention_step(q, k, v, mask, scale) -> y

        q [B, H, 1, D]   k [B, Hkv, L, D]   v [B, Hkv, L, Dv]   ->   y [B, 1, H, Dv]
        mask  bool (True = attend) or float (added), broadcast to [B, H, 1, L]

    quant_triton::attention_decode(qkv, cos, sin, at, keys, values, mask, scale) -> y

        qkv [B, (H + 2 Hkv) D]   cos, sin [1 or B, R]   at int64 [1 or B], None: the last position
        keys, values [B, Hkv, L, D], written at position ``at``   ->   y [B, H D]

The second rotates q and k, writes the cache and attends to positions 0 to ``at`` in one call.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_kernels_triton.arguments import dependent, options
from quant_kernels_triton.attention import attend, combine
from quant_kernels_triton.launch import Build, launch
from quant_kernels_triton.seen import on_device, plain

__all__ = ["FLOATS", "decode_step", "run_decode", "run_step"]

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
    wanted = max(1, 2 * _processors(device) // pairs)
    block = _LEAST if length <= 2 * _LEAST * wanted else 2 * _LEAST
    return block, max(1, min(-(-length // block), wanted))


def _aligned(*tensors: Tensor) -> bool:
    """Rows of 16-element units at addresses that are multiples of 16 bytes."""
    return all(
        t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def _masks(mask: Tensor | None, length: int) -> bool:
    return mask is None or (
        mask.dim() == 4
        and mask.shape[2] == 1
        and mask.shape[3] == length
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
        and _masks(mask, k.shape[2])
        and (torch.compiler.is_compiling() or _aligned(q, k, v))
    )


def _launch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, y: Tensor, scale: float, heads: int,
    rotary: tuple[Tensor, Tensor, Tensor | None] | None,
) -> None:  # fmt: skip
    batch, groups, length, dim = k.shape
    wide, device = v.shape[3], q.device.index
    each = heads // groups
    block, splits = _cut(batch * groups, length, device)
    part = y
    if splits > 1:
        part = torch.empty(
            batch * heads * splits * (wide + 2), dtype=torch.float32, device=q.device
        )
    cos, sin, at = rotary or (q, q, None)
    kind, per_head, held, smb, smh, smn = 0, False, q, 0, 0, 0
    if mask is not None:
        mask = mask.expand(batch, heads, 1, length)
        kind, held = (1, mask.view(torch.uint8)) if mask.dtype == torch.bool else (2, mask)
        smb, smh, smn = mask.stride(0), mask.stride(1), mask.stride(3)
        per_head = smh != 0
    strides = [s // 16 for s in (q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3])]
    step = 0 if rotary is None else 2 if at is None else 1
    at = q if at is None else at
    steps = [0 if t.shape[0] == 1 or not step else t.stride(0) for t in (cos, at)]
    pdl, split = dependent(device), splits > 1
    rotated = cos.shape[-1] if step else 0
    args = (q, k, v, held, cos, sin, at, y, part, scale, length, splits, groups, *strides,
            smb, smh, smn, *steps)  # fmt: skip
    key = ("attend", q.dtype, held.dtype, each, dim, wide, rotated, block, kind, per_head, step,
           split)  # fmt: skip

    def build() -> Build:
        fixed = {
            "G": each, "D": dim, "DV": wide, "R": rotated, "BG": max(16, _power(each)),
            "BD": _power(dim), "BDV": _power(wide), "BN": block, "KIND": kind,
            "PER_HEAD": per_head, "STEP": step, "SPLIT": split, "PDL": pdl,
        }  # fmt: skip
        # without fused multiply-adds: they would leave out roundings of the rotation
        more = {"enable_fp_fusion": False} if step else {}
        return Build(constants=fixed, options=options(pdl, 4, 3 if dim <= 128 else 2) | more)

    launch(attend, key, (splits, batch * groups), args, device, build)
    if not split:
        return

    def build_sum() -> Build:
        fixed = {"DV": wide, "BDV": _power(wide), "BS": 16, "PDL": pdl}
        return Build(constants=fixed, options=options(pdl, 4, 2))

    launch(combine, ("combine", q.dtype, wide), (batch * heads, 1), (part, y, splits), device,
           build_sum)  # fmt: skip


def _step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if not _aligned(q, k, v):  # compiled code does not know addresses
        q, k, v = (t if _aligned(t) else t.clone(memory_format=torch.contiguous_format)
                   for t in (q, k, v))  # fmt: skip
    batch, heads, wide = q.shape[0], q.shape[1], v.shape[3]
    y = q.new_empty((batch, 1, heads, wide))
    if y.numel():
        on_device(q, _launch, q, k, v, mask, y, scale, heads, None)
    return y


def _fake_step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], v.shape[3]))


def _decodes(
    qkv: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None, keys: Tensor, values: Tensor,
    mask: Tensor | None,
) -> bool:  # fmt: skip
    batch, groups, _, dim = keys.shape
    return (
        qkv.dim() == 2 and qkv.shape[0] == batch and qkv.shape[1] % dim == 0
        and qkv.shape[1] // dim > 2 * groups and (qkv.shape[1] // dim - 2 * groups) % groups == 0
        and keys.shape == values.shape and dim % 16 == 0 and dim <= _MOST
        and qkv.dtype in FLOATS and qkv.dtype == keys.dtype == values.dtype
        and qkv.dtype == cos.dtype == sin.dtype
        and _masks(mask, keys.shape[2])
        and (at is None or (at.dtype == torch.int64 and at.shape in ((1,), (batch,))))
        and cos.dim() == 2 and cos.shape == sin.shape and cos.stride() == sin.stride()
        and cos.shape[0] in (1, batch) and cos.shape[1] % 16 == 0 and cos.shape[1] <= dim
        and cos.stride(1) == 1
        and (torch.compiler.is_compiling() or (
            _aligned(qkv, keys, values) and cos.data_ptr() % 16 == sin.data_ptr() % 16 == 0))
    )  # fmt: skip


def _decode(
    qkv: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None, keys: Tensor, values: Tensor,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    batch, groups, _, dim = keys.shape
    if not _decodes(qkv, cos, sin, at, keys, values, mask):
        raise LayoutError(
            f"attention_decode: found qkv {tuple(qkv.shape)} {qkv.dtype}, caches "
            f"{tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}, cos "
            f"{tuple(cos.shape)} {cos.dtype}; expected qkv [B, (H + 2 Hkv) D] and caches "
            f"[B, Hkv, L, D] of one 16-bit type at addresses of 16 bytes, D a multiple of 16 up to "
            f"{_MOST}, cos and sin [1 or B, R] of that type, at int64 [1 or B]. Pass what the "
            "op's description says.",
            code="Q-LAYOUT-INPUT",
            actual=tuple(qkv.shape),
        )
    heads = qkv.shape[1] // dim - 2 * groups
    y = qkv.new_empty((batch, heads * dim))
    if y.numel():
        q = qkv.view(batch, -1, 1, dim)
        on_device(q, _launch, q, keys, values, mask, y, scale, heads, (cos, sin, at))
    return y


def _fake_decode(
    qkv: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None, keys: Tensor, values: Tensor,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]))


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
    if not _fits(q, k, v, mask):
        return None
    if plain(q):
        return _step(q, k, v, mask, scale)
    return _op(q, k, v, mask, scale)  # type: ignore[no-any-return]


def run_decode(
    buffers: list[Tensor], qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    mask: Tensor | None, scale: float, at: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The bound function of "attention_update"; None for what it does not take."""
    flat, cos, sin = qkv[:, 0], cos[:, 0], sin[:, 0]
    if not _decodes(flat, cos, sin, at, keys, values, mask):
        return None
    run = _decode if plain(flat) else decode_step
    y: Tensor = run(flat, cos, sin, at, keys, values, mask, scale)
    return y[:, None]
