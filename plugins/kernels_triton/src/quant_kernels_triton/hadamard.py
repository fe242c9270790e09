"""Product with a Hadamard matrix of order n = m * 2^p, given as its factors, in one pass.

    y = ((x * rows) (C x S)) * cols / root        S of 2^p = A * B:  S_A x S_B

    a tile of x seen as [R, MP, A, B]    last axis times S_B, third times S_A, second times C

A program holds R runs of n features (MP = m rounded up to a power of two). S is made in place from
the parity of its indices. Every product is one of matrices of 1 and -1 by float32 values on the
tensor cores: the values are cut into three bfloat16 parts, which hold all 24 bits, so only the
float32 sums round. The interpreter multiplies in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["hadamard"]


@triton.jit
def _sylvester(SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    v = i[:, None] & i[None, :]
    v = v ^ (v >> 4)
    v = v ^ (v >> 2)
    v = v ^ (v >> 1)
    return (1 - 2 * (v & 1)).to(tl.float32)


@triton.jit
def _times(x, h, EXACT: tl.constexpr, INTERPRET: tl.constexpr):
    """x [P, Q] @ h [Q, Q] of 1, -1 and 0. EXACT: x holds bfloat16 values."""
    if INTERPRET:
        return tl.dot(x, h, input_precision="ieee")
    else:
        signs = h.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        if EXACT:
            return tl.dot(high, signs)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        y = tl.dot(low, signs)
        y = tl.dot(middle, signs, acc=y)
        return tl.dot(high, signs, acc=y)


@triton.jit(do_not_specialize=["RUNS"])
def hadamard(X, Y, ROWS, CORE, COLS, ROOT, RUNS,
             N: tl.constexpr, M: tl.constexpr, HAS_ROOT: tl.constexpr, EXACT: tl.constexpr,
             R: tl.constexpr, MP: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
             INTERPRET: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """X [RUNS, N] to Y; see the module's docstring."""
    q = tl.arange(0, R * MP * A)
    run = tl.program_id(0) * R + q // (MP * A)
    i = (q // A) % MP
    column = (i * A + q % A)[:, None] * B + tl.arange(0, B)[None, :]
    keep = (run < RUNS)[:, None] & (column < N)
    at = run.to(tl.int64)[:, None] * N + column
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(X + at, mask=keep, other=0.0).to(tl.float32)
    x = x * tl.load(ROWS + column, mask=column < N, other=0).to(tl.float32)
    x = _times(x, _sylvester(B), EXACT, INTERPRET)
    if A > 1:
        x = tl.permute(tl.reshape(x, [R * MP, A, B]), [0, 2, 1])
        x = _times(tl.reshape(x, [R * MP * B, A]), _sylvester(A), False, INTERPRET)
        x = tl.permute(tl.reshape(x, [R * MP, B, A]), [0, 2, 1])
        x = tl.reshape(x, [R * MP * A, B])
    if M > 1:
        c = tl.arange(0, MP)
        inside = (c < M)[:, None] & (c < M)[None, :]
        core = tl.load(CORE + c[:, None] * M + c[None, :], mask=inside, other=0).to(tl.float32)
        x = tl.permute(tl.reshape(x, [R, MP, A * B]), [0, 2, 1])
        x = _times(tl.reshape(x, [R * A * B, MP]), core, False, INTERPRET)
        x = tl.permute(tl.reshape(x, [R, A * B, MP]), [0, 2, 1])
        x = tl.reshape(x, [R * MP * A, B])
    x = x * tl.load(COLS + column, mask=column < N, other=0).to(tl.float32)
    if HAS_ROOT:
        x = tl.div_rn(x, tl.zeros([R * MP * A, B], tl.float32) + tl.load(ROOT).to(tl.float32))
    tl.store(Y + at, x.to(Y.dtype.element_ty), mask=keep)
