"""Steps of ``gluon_experts``: a consumer's sums over the groups of a tile.

many_rows   by wgmma: a consumer dequantizes the second half of a group while the first is
            multiplied, and the next group's first half while the second is
few_rows    by mma.sync, for 32 rows and less: wgmma takes as long for 8 rows as for 64, and
            its warpgroups wait for one another; here dequantization and products of a warp
            mix freely. Rows of x are read from shared memory by every warp, which is why it
            does not pay for more.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from quant_kernels_triton.gluon_parts import row_factor
from quant_kernels_triton.gluon_tile import multiply, operand, raws, waited

__all__ = ["clear", "factors", "few_rows", "many_rows"]

# 16 registers through; the mask of the barrier, all ones, is only known once they are
_THROUGH = gl.constexpr(
    "{ .reg .b32 m; xor.b32 m, $16, $17; "
    + " ".join(f"xor.b32 m, m, ${i};" for i in range(18, 32))
    + " max.u32 m, m, 0xffffffff; bar.warp.sync m; "
    + " ".join(f"mov.b32 ${i}, ${i + 16};" for i in range(16))
    + " }"
)
_SIXTEEN = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 16))


@gluon.jit
def factors(P, pt, sub, lane, g, G, K, SPG: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
             C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr):  # fmt: skip
    """Raw factors of both halves of group ``g``."""
    g = gl.minimum(g, G - 1)
    sa = raws(P, pt, sub, lane, g, G, K, 0, SPG, C0, C1, C2, C3, C4)
    sb = sa
    if SPG >= 2:  # the halves of a group have scales of their own
        sb = raws(P, pt, sub, lane, g, G, K, 1, SPG, C0, C1, C2, C3, C4)
    return sa, sb


@gluon.jit
def clear(Y, ORDER, COUNTS, T, N, E):
    """Zeros in this program's share of the rows of no expert, which ORDER lists last."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    for i in range(T - gl.load(COUNTS + E) + gl.program_id(0), T, gl.num_programs(0)):
        row = Y + gl.load(ORDER + i).to(gl.int64) * N
        for n0 in range(0, N, 512):
            n = n0 + gl.arange(0, 512, layout=L)
            gl.store(row + n, gl.zeros([512], Y.dtype.element_ty, L), mask=n < N)


@gluon.jit
def _filled(full, st, ph, GATHER: gl.constexpr):
    """Wait for a stage. Threads have copied gathered rows, which the tensor cores read next."""
    mbarrier.wait(full.index(st), ph)
    if GATHER:
        fence_async_shared()


@gluon.jit
def _ready(a):
    """``a``, which is computed before anything behind is issued.

    ptxas would wait for a product as soon as it can, and dequantize while the tensor cores rest.
    """
    return gl.inline_asm_elementwise(_THROUGH, _SIXTEEN, [a], dtype=a.dtype, is_pure=False, pack=32)


@gluon.jit
def _half(words, st, h: gl.constexpr, ROW: gl.constexpr, NC: gl.constexpr, H: gl.constexpr,
          HC: gl.constexpr, WL: gl.constexpr):  # fmt: skip
    """A consumer's words of 64 columns of a stage."""
    if HC < H:
        return words.index(st * NC + ROW).slice(h, 1, dim=1).load(WL)
    else:
        return words.index((st * H + h) * NC + ROW).load(WL)


@gluon.jit
def _next(st, ph, ST: gl.constexpr):
    """The stage after ``st`` and its phase."""
    last = st + 1 == ST
    return gl.where(last, 0, st + 1), gl.where(last, ph ^ 1, ph)


@gluon.jit
def few_rows(words, xs, full, empty, Q, pt, sub, lane, sa, sb, ta, tb, acc, st, ph, k0, k1, G, K,
             ROW: gl.constexpr, NC: gl.constexpr, ST: gl.constexpr, H: gl.constexpr,
             HC: gl.constexpr, ACC: gl.constexpr, BYTES: gl.constexpr, BF16: gl.constexpr,
             C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr,
             C4: gl.constexpr, DM: gl.constexpr, ZERO: gl.constexpr, SPG: gl.constexpr,
             ASM: gl.constexpr, REGS: gl.constexpr, AL: gl.constexpr, W6: gl.constexpr,
             WL: gl.constexpr, SB: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """The sums of groups k0 .. k1 - 1 and the next stage; stages hold whole groups."""
    XL: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    for g in range(k0, k1):
        ua, ub = factors(Q, pt, sub, lane, g + 2, G, K, SPG, C0, C1, C2, C3, C4)
        mbarrier.wait(full.index(st), ph)
        d = acc
        if ACC:
            d = gl.zeros_like(acc)
        x = xs.index(st * H).permute((1, 0)).load(XL)
        a = operand(_half(words, st, 0, ROW, NC, H, HC, WL), sa, BYTES, BF16, C0, C1, C3, C4, DM,
                     ZERO, ASM, REGS, AL, W6, SB)  # fmt: skip
        d = mma_v2(a, x, d)
        x = xs.index(st * H + (H - 1)).permute((1, 0)).load(XL)
        a = operand(_half(words, st, H - 1, ROW, NC, H, HC, WL), sb, BYTES, BF16, C0, C1, C3, C4,
                     DM, ZERO, ASM, REGS, AL, W6, SB)  # fmt: skip
        d = mma_v2(a, x, d)
        mbarrier.arrive(empty.index(st), count=1)
        if ACC:
            f = row_factor(sa[0], sa[1], C0, C1, 4, gl.SliceLayout(1, mma))
            acc += d * f[:, None]
        else:
            acc = d
        st, ph = _next(st, ph, ST)
        sa = ta
        sb = tb
        ta = ua
        tb = ub
    return acc, st, ph


@gluon.jit
def many_rows(words, xs, xt, full, empty, Q, pt, sub, lane, sa, sb, ta, tb, acc, acc2, st, ph, k0,
              k1, G, K, ROW: gl.constexpr, NC: gl.constexpr, ST: gl.constexpr, H: gl.constexpr,
              HC: gl.constexpr, B2: gl.constexpr, GATHER: gl.constexpr,
              ACC: gl.constexpr, BYTES: gl.constexpr, BF16: gl.constexpr, C0: gl.constexpr,
              C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr,
              DM: gl.constexpr, ZERO: gl.constexpr, SPG: gl.constexpr, ASM: gl.constexpr,
              REGS: gl.constexpr, AL: gl.constexpr, AL2: gl.constexpr, W6: gl.constexpr,
              WL: gl.constexpr, SB: gl.constexpr, mma: gl.constexpr,
              mmb: gl.constexpr):  # fmt: skip
    """The sums of both tiles of rows over groups k0 .. k1 - 1 and the next stage."""
    _filled(full, st, ph, GATHER)
    a = operand(_half(words, st, 0, ROW, NC, H, HC, WL), sa, BYTES, BF16, C0, C1, C3, C4, DM, ZERO,
                 ASM, REGS, AL, W6, SB)  # fmt: skip
    for g in range(k0, k1):
        ua, ub = factors(Q, pt, sub, lane, g + 2, G, K, SPG, C0, C1, C2, C3, C4)
        d, e = multiply(a, xs.index(st * H), xt.index(st * H), acc, acc2, ACC, B2, AL2)
        sn = st
        pp = ph
        if H == 1:
            sn, pp = _next(st, ph, ST)
            _filled(full, sn, pp, GATHER)
        at = sn * H + (H - 1)
        b = operand(_half(words, sn, H - 1, ROW, NC, H, HC, WL), sb, BYTES, BF16, C0, C1, C3, C4,
                     DM, ZERO, ASM, REGS, AL, W6, SB)  # fmt: skip
        d, e = multiply(b, xs.index(at), xt.index(at), d, e, False, B2, AL2)
        if H == 1:
            d, e = waited(d, e, B2, 1)
            mbarrier.arrive(empty.index(st), count=1)
        st, ph = _next(sn, pp, ST)
        # behind the last group stands the next tile's: its own stage is read again instead
        here = gl.where(g + 1 < k1, st, sn)
        _filled(full, here, gl.where(g + 1 < k1, ph, pp), GATHER)
        a = operand(_half(words, here, 0, ROW, NC, H, HC, WL), ta, BYTES, BF16, C0, C1, C3, C4, DM,
                     ZERO, ASM, REGS, AL, W6, SB)  # fmt: skip
        if NC == 2:
            a = _ready(a)
        d, e = waited(d, e, B2, 0)
        if ACC:
            f = row_factor(sa[0], sa[1], C0, C1, 4, gl.SliceLayout(1, mma))
            acc += d * f[:, None]
            if B2:
                f2 = gl.convert_layout(f, gl.SliceLayout(1, mmb), assert_trivial=True)
                acc2 += e * f2[:, None]
        else:
            acc = d
            acc2 = e
        mbarrier.arrive(empty.index(sn), count=1)
        sa = ta
        sb = tb
        ta = ua
        tb = ub
    return acc, acc2, st, ph
