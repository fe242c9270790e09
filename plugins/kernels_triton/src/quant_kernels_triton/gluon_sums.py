"""Sums that one program of ``gluon_ws`` hands over to another, through memory, as they lie."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["give", "take"]


@gluon.jit
def _by_thread(acc, B: gl.constexpr):
    """Sums of 64 features of B rows as [thread, fours, 4]: what a thread holds lies in a row."""
    v = acc.reshape([4, 2, 8, B // 8, 4, 2]).permute([0, 2, 4, 3, 1, 5])
    return v.reshape([128, B // 8, 4])


@gluon.jit
def _places(PART, v, B: gl.constexpr):
    """Where ``_by_thread`` goes: 16 bytes of every thread side by side."""
    L: gl.constexpr = v.type.layout
    thread = gl.arange(0, 128, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    four = gl.arange(0, B // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    one = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    return PART + (four[None, :, None] * 512 + thread[:, None, None] * 4 + one[None, None, :])


@gluon.jit
def _give_one(acc, PART, B: gl.constexpr):
    v = _by_thread(acc, B)
    gl.store(_places(PART, v, B), v)


@gluon.jit
def _take_one(acc, PART, B: gl.constexpr, mma: gl.constexpr):
    v = _by_thread(acc, B)
    v += gl.load(_places(PART, v, B), cache_modifier=".cg")
    v = v.reshape([4, 8, 4, B // 8, 2, 2]).permute([0, 4, 1, 3, 2, 5]).reshape([64, B])
    return gl.convert_layout(v, mma, assert_trivial=True)


@gluon.jit
def give(acc, acc2, PART, B1: gl.constexpr, B2: gl.constexpr):
    """Store the sums of both tiles of rows."""
    _give_one(acc, PART, B1)
    if B2:
        _give_one(acc2, PART + 64 * B1, B2)


@gluon.jit
def take(acc, acc2, PART, B1: gl.constexpr, B2: gl.constexpr, mma: gl.constexpr,
          mmb: gl.constexpr):  # fmt: skip
    """Add what ``_give`` stored."""
    acc = _take_one(acc, PART, B1, mma)
    if B2:
        acc2 = _take_one(acc2, PART + 64 * B1, B2, mmb)
    return acc, acc2
