"""Norms, rotations and gates between linear layers; csrc/between.h, core's ``kernels.between``.

    quant_cpu::rms_norm(x, weight, eps, form) -> y
    quant_cpu::add_rms_norm(x, delta, weight, eps, form) -> (x + delta, y)
    quant_cpu::rotary(x, cos, sin) -> y
    quant_cpu::gated(gate, up, act) -> y

Results are rounded where torch's operators round them, so they differ from theirs only by the order
of a float32 sum, or by an exponential's last places.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant_core.errors import LimitError
from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.between import ACTIVATIONS, Weightless
from quant_core.spec import OpSpec
from quant_kernels_cpu.descriptor import DTYPES
from quant_kernels_cpu.library import ISAS, library, unavailable
from quant_kernels_cpu.watch import watched

__all__ = ["BETWEEN", "Gated", "RmsNorm", "Rotary", "form_of"]

_NORM = struct.Struct("@9qdq")  # csrc/between_calls.h
_GATE = struct.Struct("@7q")
_ROTATE = struct.Struct("@19q")
_ROUND_LAST, _UNIT_OFFSET = 1, 2
_MOST_ROTATED = 512  # features that fit the kernel's stack
_NAMES = ("bfloat16", "float16", "float32")


def form_of(op: OpSpec) -> int:
    """The bits of csrc/between_calls.h for the form of a norm."""
    return _ROUND_LAST * ("round_last" in op.features) | _UNIT_OFFSET * (
        "unit_offset" in op.features
    )


# ------------------------------------------------------------------------------------------- norms


def _norm_call(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, form: int
) -> tuple[Tensor | None, Tensor]:
    y = torch.empty_like(x)
    total = None if delta is None else torch.empty_like(x)
    k = weight.numel()
    lib = library()
    packed = _NORM.pack(
        weight.data_ptr(), x.data_ptr(), 0 if delta is None else delta.data_ptr(),
        0 if total is None else total.data_ptr(), y.data_ptr(), DTYPES[x.dtype], form,
        x.numel() // k, k, eps, lib.isa,
    )  # fmt: skip
    if lib.c.qk_rms_norm(packed):
        raise LimitError(
            f"rms_norm: no memory for a row of {k} numbers. Free memory.",
            code="Q-LIMIT-MEMORY",
            actual=k,
        )
    return total, y


def _norm(x: Tensor, weight: Tensor, eps: float, form: int) -> Tensor:
    return _norm_call(x.contiguous(), None, weight, eps, form)[1]


def _add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, form: int
) -> tuple[Tensor, Tensor]:
    total, y = _norm_call(x.contiguous(), delta.contiguous(), weight, eps, form)
    assert total is not None, "there is a delta"
    return total, y


def run_norm(
    form: int,
    dtype: torch.dtype,
    held: list[Tensor],
    x: Tensor,
    eps: float,
    delta: Tensor | None = None,
) -> Any:
    """As in ``kernels.between``; None for another dtype, device or size."""
    weight = held[0]
    if (
        x.dtype is not dtype
        or weight.dtype is not dtype
        or x.shape[-1] != weight.numel()
        or not weight.is_contiguous()
        or (delta is not None and (delta.dtype is not dtype or delta.shape != x.shape))
        or not (x.is_cpu and weight.is_cpu)
    ):
        return None
    if watched(x, weight):
        if delta is None:
            return _norm_op(x, weight, eps, form)
        return _add_norm_op(x, delta, weight, eps, form)
    return _norm(x, weight, eps, form) if delta is None else _add_norm(x, delta, weight, eps, form)


# --------------------------------------------------------------------------------------- rotations


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    y = torch.empty_strided(x.shape, (heads * tokens * dim, dim, heads * dim, 1), dtype=x.dtype)
    shared = cos.shape[0] == 1
    lib = library()
    packed = _ROTATE.pack(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), DTYPES[x.dtype], batch, heads,
        tokens, dim, cos.shape[2], *x.stride()[:3], *y.stride()[:3],
        0 if shared else cos.stride(0), cos.stride(1), lib.isa,
    )  # fmt: skip
    lib.c.qk_rotary(packed)
    return y


def _turnable(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.dtype is dtype
        and cos.dtype is dtype
        and sin.dtype is dtype
        and x.is_cpu
        and cos.is_cpu
        and x.dim() == 4
        and cos.shape == sin.shape
        and cos.stride() == sin.stride()
        and cos.dim() == 3
        and cos.shape[0] in (1, x.shape[0])
        and cos.shape[1] == x.shape[2]
        and cos.shape[2] <= min(x.shape[3], _MOST_ROTATED)
        and x.stride(3) == cos.stride(2) == 1
    )


def run_rotary(
    rotated: int, dtype: torch.dtype, held: list[Tensor], q: Tensor, k: Tensor, cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """As in ``kernels.between``; None for other shapes, dtypes or devices."""
    if cos.shape[-1] != rotated or not all(_turnable(x, cos, sin, dtype) for x in (q, k)):
        return None
    turn = _rotary_op if watched(q, cos) else _rotate
    return turn(q, cos, sin), turn(k, cos, sin)


# ------------------------------------------------------------------------------------------- gates


def _gate(gate: Tensor, up: Tensor, act: int) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    lib = library()
    lib.c.qk_gated(
        _GATE.pack(
            gate.data_ptr(), up.data_ptr(), y.data_ptr(), DTYPES[gate.dtype], act, y.numel(),
            lib.isa,
        )
    )  # fmt: skip
    return y


def run_gated(
    act: int, dtype: torch.dtype, held: list[Tensor], gate: Tensor, up: Tensor
) -> Tensor | None:
    """act(gate) * up; None for other dtypes or devices, or unlike shapes."""
    if gate.dtype is not dtype or up.dtype is not dtype or gate.shape != up.shape:
        return None
    if not (gate.is_cpu and up.is_cpu):
        return None
    if watched(gate, up):
        return _gated_op(gate, up, act)  # type: ignore[no-any-return]
    return _gate(gate, up, act)


# ------------------------------------------------------------------------------------------ the ops


def _fake_add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, form: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x.contiguous()), torch.empty_like(x.contiguous())


def _fake_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


_OPS: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...] = (
    (
        "rms_norm",
        "(Tensor x, Tensor weight, float eps, int form) -> Tensor",
        _norm,
        lambda x, weight, eps, form: torch.empty_like(x.contiguous()),
    ),
    (
        "add_rms_norm",
        "(Tensor x, Tensor delta, Tensor weight, float eps, int form) -> (Tensor, Tensor)",
        _add_norm,
        _fake_add_norm,
    ),
    ("rotary", "(Tensor x, Tensor cos, Tensor sin) -> Tensor", _rotate, _fake_rotate),
    (
        "gated",
        "(Tensor gate, Tensor up, int act) -> Tensor",
        _gate,
        lambda gate, up, act: torch.empty_like(gate.contiguous()),
    ),
)
_lib = torch.library.Library("quant_cpu", "FRAGMENT")
for _name, _schema, _impl, _fake in _OPS:
    _lib.define(_name + _schema)
    _lib.impl(_name, _impl, "CPU")
    torch.library.register_fake(f"quant_cpu::{_name}", _fake, lib=_lib)
_norm_op, _add_norm_op = (
    torch.ops.quant_cpu.rms_norm.default,
    torch.ops.quant_cpu.add_rms_norm.default,
)
_rotary_op, _gated_op = torch.ops.quant_cpu.rotary.default, torch.ops.quant_cpu.gated.default


class _Between(Weightless):
    """What the kernels here have in common: any CPU with the library, three dtypes."""

    op = ""

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.op != self.op:
            return Rejected(axis="op", have=op.op, need=self.op)
        if op.device[0] != "cpu":
            return Rejected(axis="device", have=op.device[0], need="cpu")
        if reason := unavailable():
            return Rejected(axis="library", have=f"none ({reason})", need="a compiled library")
        if op.act_dtype not in _NAMES:
            return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_NAMES))
        return self._fits(op) or Accepted(cost=5.0, note=ISAS[library().isa])

    def _fits(self, op: OpSpec) -> Rejected | None:
        return None


class RmsNorm(_Between):
    """Root-mean-square norms in all forms, with a residual sum before it."""

    name, op = "cpu_rms_norm", "rms_norm"

    def _fits(self, op: OpSpec) -> Rejected | None:
        if other := sorted(op.features - {"round_last", "unit_offset"}):
            return Rejected(
                axis="features", have=", ".join(other), need="the forms of kernels.between"
            )
        return None

    def bind(self, op: OpSpec) -> Callable[..., Any]:
        return functools.partial(run_norm, form_of(op), getattr(torch, op.act_dtype))


class Rotary(_Between):
    """Rotation of both halves of a head."""

    name, op = "cpu_rotary", "rotary"

    def _fits(self, op: OpSpec) -> Rejected | None:
        dim, rotated = op.size("k"), op.size("rotated")
        if rotated % 2 or not 0 < rotated <= min(dim, _MOST_ROTATED):
            need = f"even, at most {_MOST_ROTATED} and a head's features"
            return Rejected(axis="rotated", have=str(rotated), need=need)
        return None

    def bind(self, op: OpSpec) -> Callable[..., Any]:
        return functools.partial(run_rotary, op.size("rotated"), getattr(torch, op.act_dtype))


class Gated(_Between):
    """Gate times up, the gate through its activation."""

    name, op = "cpu_gated", "gated"

    def _fits(self, op: OpSpec) -> Rejected | None:
        if len(op.features & set(ACTIVATIONS)) != 1 or op.features - set(ACTIVATIONS):
            have = ", ".join(sorted(op.features)) or "none"
            return Rejected(axis="features", have=have, need=" or ".join(ACTIVATIONS))
        return None

    def bind(self, op: OpSpec) -> Callable[..., Any]:
        act = ACTIVATIONS.index(*op.features)
        return functools.partial(run_gated, act, getattr(torch, op.act_dtype))


BETWEEN: dict[str, Kernel] = {k.op: k for k in (RmsNorm(), Rotary(), Gated())}
"""Operation -> its kernel."""
