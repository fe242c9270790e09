"""Running the kernels of ``between``: what they take, block sizes, launches; the torch ops.

    quant_triton::rms_norm(x, weight, eps, form) -> y
    quant_triton::add_rms_norm(x, delta, weight, eps, form) -> (x + delta, y)
    quant_triton::rotary(q, k, cos, sin) -> (q', k')    of [B, H, T, D], in memory [B, T, H, D]
    quant_triton::gated(gate, up, act) -> y

``form`` is "" or the features of the contract, joined by "+"; ``act`` "silu" or "gelu_tanh".
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from quant_core.kernels.calls import unobserved
from quant_kernels_triton.arguments import dependent, options
from quant_kernels_triton.jitted import Jits
from quant_kernels_triton.launch import Build, launch
from quant_kernels_triton.seen import on_device

__all__ = ["FLOATS", "run_gated", "run_norm", "run_rotary"]

between = Jits("between")

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_TILE = 2048  # elements of a program, where rows are short
_GATED = 1024  # columns of a program of ``gated``
_HEADS = 8  # heads of a program of ``rotary``


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _whole(*tensors: Tensor) -> bool:
    """Contiguous, at addresses that are multiples of 16 bytes; compiled code does not know them."""
    tracing = torch.compiler.is_compiling()
    return all(t.is_contiguous() and (tracing or t.data_ptr() % 16 == 0) for t in tensors)


# ----------------------------------------------------------------------------------------- norms


def _norm(
    x: Tensor, weight: Tensor, delta: Tensor | None, eps: float, form: str
) -> tuple[Tensor, Tensor]:
    k, device = weight.shape[0], x.device.index
    y = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    rows = x.numel() // k
    if rows:
        block = _power(k)
        each = max(1, min(_TILE // block, _power(rows)))
        pdl, add = dependent(device), delta is not None

        def build() -> Build:
            fixed = {"K": k, "BK": block, "BR": each, "ADD": add, "LAST": "round_last" in form,
                     "UNIT": "unit_offset" in form, "PDL": pdl}  # fmt: skip
            return Build(constants=fixed, options=options(pdl, _warps(block * each), 1))

        args = (x, weight, x if delta is None else delta, y, total, rows, eps)
        key = ("rms_norm", x.dtype, k, each, add, form)
        on_device(x, launch, between.rms_norm, key, (-(-rows // each), 1), args, device, build)
    return total, y


def _warps(elements: int) -> int:
    return max(1, min(16, elements // 512))


def _rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    return _norm(x, weight, None, eps, form)[1]


def _add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, form: str
) -> tuple[Tensor, Tensor]:
    return _norm(x, weight, delta, eps, form)


def run_norm(
    form: str, tensors: list[Tensor], x: Tensor, eps: float, delta: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The bound function of "rms_norm"; None for what it does not take."""
    weight = tensors[0]
    if (
        x.dtype not in FLOATS
        or weight.dtype != x.dtype
        or x.shape[-1:] != weight.shape
        or weight.device != x.device
        or not _whole(x, weight)
    ):
        return None
    if delta is None:
        run = _rms_norm if unobserved(x) else _norm_op
        return run(x, weight, eps, form)  # type: ignore[no-any-return, operator]
    if delta.shape != x.shape or delta.dtype != x.dtype or not _whole(delta):
        return None
    add = _add_rms_norm if unobserved(x) else _add_op
    return add(x, delta, weight, eps, form)  # type: ignore[no-any-return, operator]


# ------------------------------------------------------------------------------------- rotations


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    groups, rotated, device = k.shape[1], cos.shape[-1], q.device.index
    out = tuple(q.new_empty(batch, tokens, h, dim) for h in (heads, groups))
    if batch * tokens:
        each = min(_HEADS, _power(heads))
        pdl = dependent(device)

        def build() -> Build:
            fixed = {"D": dim, "R": rotated, "BD": _power(dim), "BH": each, "PDL": pdl}
            # a fused multiply-add would leave out the rounding of the product
            return Build(constants=fixed, options=options(pdl, 4, 1) | {"enable_fp_fusion": False})

        strides = [s // 16 for t in (q, k) for s in t.stride()[:3]]
        at = (0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1))
        args = (q, k, cos, sin, *out, tokens, heads, groups, *strides, *at)
        key = ("rotary", q.dtype, dim, rotated, each)
        grid = (batch * tokens, -(-heads // each) + -(-groups // each))
        on_device(q, launch, between.rotary, key, grid, args, device, build)
    return out[0].transpose(1, 2), out[1].transpose(1, 2)


def _lined(*tensors: Tensor) -> bool:
    """Rows of whole units of 16 elements, at addresses that are multiples of 16 bytes."""
    tracing = torch.compiler.is_compiling()
    return all(
        t.stride(-1) == 1
        and all(s % 16 == 0 for s in t.stride()[:-1])
        and (tracing or t.data_ptr() % 16 == 0)
        for t in tensors
    )


def run_rotary(
    tensors: list[Tensor], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The bound function of "rotary"; None for what it does not take."""
    if (
        q.dtype not in FLOATS
        or not q.dtype == k.dtype == cos.dtype == sin.dtype
        or not q.device == k.device == cos.device == sin.device
        or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:])
        or cos.dim() != 3
        or cos.shape != sin.shape
        or cos.stride() != sin.stride()
        or cos.shape[0] not in (1, q.shape[0])
        or cos.shape[1] != q.shape[2]
        or cos.shape[2] > q.shape[3]
        or cos.shape[2] % 2
        or not _lined(q, k, cos, sin)
    ):
        return None
    run = _rotary if unobserved(q) else _rotary_op
    return run(q, k, cos, sin)  # type: ignore[no-any-return, operator]


# ----------------------------------------------------------------------------------------- gates


def _row_stride(t: Tensor) -> int:
    """Elements between the rows of [..., K]; -1 where that is not one number."""
    if t.is_contiguous():
        return t.shape[-1]
    wide = [(s, n) for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n != 1]
    even = all(outer == inner * n for (outer, _), (inner, n) in itertools.pairwise(wide))
    return wide[-1][0] if wide and even and t.stride(-1) == 1 else -1


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    k, device = gate.shape[-1], gate.device.index
    y = gate.new_empty(gate.shape)
    rows = y.numel() // k if k else 0
    if rows:
        pdl = dependent(device)

        def build() -> Build:
            fixed = {"K": k, "BK": _GATED, "GELU": act == "gelu_tanh", "PDL": pdl}
            return Build(constants=fixed, options=options(pdl, 4, 1))

        args = (gate, up, y, _row_stride(gate) // 16, _row_stride(up) // 16)
        key, grid = ("gated", gate.dtype, k, act), (rows, -(-k // _GATED))
        on_device(gate, launch, between.gated, key, grid, args, device, build)
    return y


def run_gated(act: str, tensors: list[Tensor], gate: Tensor, up: Tensor) -> Tensor | None:
    """The bound function of "gated"; None for what it does not take."""
    if (
        gate.dtype not in FLOATS
        or gate.dtype != up.dtype
        or gate.shape != up.shape
        or gate.device != up.device
        or gate.shape[-1] % 16
        or any(_row_stride(t) % 16 for t in (gate, up))
        or not (torch.compiler.is_compiling() or gate.data_ptr() % 16 == up.data_ptr() % 16 == 0)
    ):
        return None
    run = _gated if unobserved(gate) else _gated_op
    return run(gate, up, act)  # type: ignore[no-any-return, operator]


# ------------------------------------------------------------------------------------------- ops


def _fake_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    return torch.empty_like(x)


def _fake_add(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, form: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _fake_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    out = [q.new_empty(batch, tokens, h, dim) for h in (heads, k.shape[1])]
    return out[0].transpose(1, 2), out[1].transpose(1, 2)


def _fake_gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gate.new_empty(gate.shape)


_lib = torch.library.Library("quant_triton", "FRAGMENT")
_lib.define("rms_norm(Tensor x, Tensor weight, float eps, str form) -> Tensor")
_lib.define(
    "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps, str form) -> (Tensor, Tensor)"
)
_lib.define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
_lib.define("gated(Tensor gate, Tensor up, str act) -> Tensor")
for _name, _impl, _fake in (
    ("rms_norm", _rms_norm, _fake_norm),
    ("add_rms_norm", _add_rms_norm, _fake_add),
    ("rotary", _rotary, _fake_rotary),
    ("gated", _gated, _fake_gated),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_triton::{_name}", _fake, lib=_lib)
_norm_op = torch.ops.quant_triton.rms_norm.default
_add_op = torch.ops.quant_triton.add_rms_norm.default
_rotary_op = torch.ops.quant_triton.rotary.default
_gated_op = torch.ops.quant_triton.gated.default
