"""Gluon GEMM for many rows on Hopper: four warps fetch, two or three warpgroups multiply.

    y^T [N, M] = W [N, K] x^T: W is the register operand of wgmma, x the shared one.

A consumer warpgroup owns 64 or 128 output features (R tiles) of B1 + B2 rows (B2 may be 0: two
tiles make row counts that are no power of two). Stages of 64 or 128 columns hold x, codes and
factors (gluon_stages), guarded by a pair of barriers each. A consumer dequantizes the next operand
while wgmma works on the present one: a product is issued before the one ahead of it is waited for,
or else ptxas would put off the dequantization until that one is done. At the end of a round of the
loop, U groups of 128 columns, all products are waited for: with sums under way over the loop's edge
ptxas would make every product wait. With ACC the group's scale multiplies its sums in float32
instead of its weights; they are scaled while the next group's first product works.

Blocks stay: each takes whole tiles in turn, and the last one or two rounds of tiles are cut along K
into equal shares (gluon_share), so that no processor waits for a round that is not full. A
share that ends inside a tile owns it: it adds the sums of the shares behind in their order, so
results repeat bit for bit. It waits for blocks of smaller number only, which were started earlier:
nothing is assumed about how many run at once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from quant_kernels_triton.gluon_parts import (
    all_staged,
    barrier,
    gdc_launch_dependents,
    gdc_wait,
    issued,
)
from quant_kernels_triton.gluon_share import beginner, groups_of, segment, segments
from quant_kernels_triton.gluon_stages import advanced, buffers, fetch, make, producer, scales
from quant_kernels_triton.gluon_sums import give, take
from quant_kernels_triton.gluon_tile import multiply, store, waited

__all__ = ["specialized"]


@gluon.jit
def _wait4(d, d2, e, e2, B2: gl.constexpr, LEFT: gl.constexpr):
    """``waited`` for the sums of two tiles of outputs."""
    if B2:
        d, d2, e, e2 = warpgroup_mma_wait(2 * LEFT, deps=(d, d2, e, e2))
    else:
        d, e = warpgroup_mma_wait(LEFT, deps=(d, e))
        d2 = d
        e2 = e
    return d, d2, e, e2


@gluon.jit
def _scaled(acc, acc2, d, d2, f, B2: gl.constexpr, mmb: gl.constexpr):
    """Sums plus those of a group times its scales."""
    acc += d * f[:, None]
    if B2:
        f2 = gl.convert_layout(f, gl.SliceLayout(1, mmb), assert_trivial=True)
        acc2 += d2 * f2[:, None]
    return acc, acc2


@gluon.jit
def _next(S: gl.constexpr, ws, hs, ms, P, full, st, ph, t0, last, g, more, G, K, ST: gl.constexpr,
          PER: gl.constexpr, U: gl.constexpr, R: gl.constexpr, BITS: gl.constexpr,
          HAS_P: gl.constexpr, SPG: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
          C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr):  # fmt: skip
    """Codes of operand number S of round ``g``, which are behind those read last.

    Of the next round (S of 2 U R or more) only if there is ``more``; else of a stale stage, unused.
    """
    H: gl.constexpr = S // R  # sixty-four columns
    T: gl.constexpr = S % R * 4  # tiles
    if T == 0 and (PER == 1 or H % 2 == 0):
        st, ph = advanced(st, ph, ST)
        if H < 2 * U or more:
            mbarrier.wait(full.index(st), ph)
    k = gl.minimum(g * (2 * U) + H, G * 2 - 1)
    w = fetch(ws, hs, ms, P, st * PER + H % PER, T, t0 + T, last, k, G, K, BITS, HAS_P, SPG, C0, C1,
              C2, C3, C4)  # fmt: skip
    return w, st, ph


@gluon.constexpr_function
def _sums(b):
    """The layout of the sums of ``b`` rows."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, int(b), 16]
    )


@gluon.jit
def _round(a, w, acc, acc2, low, low2, st, ph, fs, fp, xs, xt, ws, hs, ms, P, full, empty, t0, last,
           g, n, total, G, K, B1: gl.constexpr, B2: gl.constexpr, ST: gl.constexpr,
           PER: gl.constexpr, R: gl.constexpr, ACC: gl.constexpr, BITS: gl.constexpr,
           BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr,
           C3: gl.constexpr, C4: gl.constexpr, DM: gl.constexpr, ZERO: gl.constexpr,
           SPG: gl.constexpr, ASM: gl.constexpr, REGS: gl.constexpr, EARLY: gl.constexpr,
           U: gl.constexpr):  # fmt: skip
    """Products of U groups of columns, and the operand of the next ones."""
    mma: gl.constexpr = _sums(B1)
    mmb: gl.constexpr = _sums(B2 if B2 else B1)
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    AL2: gl.constexpr = gl.DotOperandLayout(0, mmb, 2)
    RL: gl.constexpr = gl.SliceLayout(1, mma)
    HAS_P: gl.constexpr = DM != 0 or ZERO != 0
    here = st
    hp = ph
    f = gl.zeros([64], gl.float32, RL)
    f1 = f
    d = acc
    d2 = acc2
    e = low
    e2 = low2
    for q in gl.static_range(2 * U * R):
        slot = st * PER + q // R % PER
        if R == 1:
            e = d  # sums of the group before
            e2 = d2
        if ACC and q // R % 2 == 0 and q % R == 0:
            d, d2 = multiply(a, xs.index(slot), xt.index(slot), acc, acc2, True, B2, AL2)
        elif ACC and q // R % 2 == 0:
            e, e2 = multiply(a, xs.index(slot), xt.index(slot), low, low2, True, B2, AL2)
        elif q % R == 0:
            d, d2 = multiply(a, xs.index(slot), xt.index(slot), d, d2, False, B2, AL2)
        else:
            e, e2 = multiply(a, xs.index(slot), xt.index(slot), e, e2, False, B2, AL2)
        if not EARLY:
            issued()
        if not EARLY or q % 2 == 1:
            w, fs, fp = _next(q + 1, ws, hs, ms, P, full, fs, fp, t0, last, g, n + 1 < total,
                              G, K, ST, PER, U, R, BITS, HAS_P, SPG, C0, C1, C2, C3,
                              C4)  # fmt: skip
        if q > 0 and (R == 2 or (ACC and q % 2 == 0)):
            d, d2, e, e2 = _wait4(d, d2, e, e2, B2, 1)
        elif q > 0:
            d, d2 = waited(d, d2, B2, 1)
        if q > 0 and q % R == 0 and (PER == 1 or q // R % 2 == 0):
            mbarrier.arrive(empty.index(here), count=1)
        a = make(w, BITS, BF16, SPG, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL)
        if EARLY and q % 2 == 1:
            w, fs, fp = _next(q + 2, ws, hs, ms, P, full, fs, fp, t0, last, g, n + 1 < total,
                              G, K, ST, PER, U, R, BITS, HAS_P, SPG, C0, C1, C2, C3,
                              C4)  # fmt: skip
        if ACC and R == 1 and q > 0 and q % 2 == 0:
            acc, acc2 = _scaled(acc, acc2, e, e2, f, B2, mmb)
        if ACC and R == 2 and q % 4 == 3:
            acc, acc2 = _scaled(acc, acc2, d, d2, f, B2, mmb)
        if ACC and R == 2 and q > 0 and q % 4 == 0:
            low, low2 = _scaled(low, low2, e, e2, f1, B2, mmb)
        if ACC and q // R % 2 == 1:
            if q % R == 0:
                f = scales(ms, P, slot, 0, t0, last, g * (2 * U) + q // R - 1, G, K, C0, C1, RL)
            else:
                f1 = scales(ms, P, slot, 4, t0 + 4, last, g * (2 * U) + q // R - 1, G, K, C0, C1,
                            RL)  # fmt: skip
        here = st
        hp = ph
        if q % R == R - 1 and (PER == 1 or q // R % 2 == 1):
            st, ph = advanced(st, ph, ST)
    if ACC:  # passes at once; without it ptxas puts the dequantization behind the wait
        mbarrier.wait(full.index(here), hp)
    if R == 2:
        d, d2, e, e2 = _wait4(d, d2, e, e2, B2, 0)
    else:
        d, d2 = waited(d, d2, B2, 0)
    mbarrier.arrive(empty.index(here), count=1)
    if ACC and R == 2:
        low, low2 = _scaled(low, low2, e, e2, f1, B2, mmb)
    elif ACC:
        acc, acc2 = _scaled(acc, acc2, d, d2, f, B2, mmb)
    else:
        acc = d
        acc2 = d2
        if R == 2:
            low = e
            low2 = e2
    return a, w, acc, acc2, low, low2, st, ph, fs, fp


@gluon.jit
def _ended(acc, acc2, low, low2, ROW0, ROW1, BIAS, Y, PART, COUNT, M, N, k0, other, pn, m0, nn, nm,
           GU, ROW: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr, NC: gl.constexpr,
           R: gl.constexpr, BF16: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr,
           HAS_BIAS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Hand over the sums of a share, or add those behind and store a tile."""
    mma: gl.constexpr = _sums(B1)
    mmb: gl.constexpr = _sums(B2 if B2 else B1)
    if PDL:
        gdc_wait()
    own = gl.num_programs(0) - 1 - gl.program_id(0)
    SIZE: gl.constexpr = 64 * (B1 + B2)
    if k0 > 0:
        slot = own * NC + ROW
        give(acc, acc2, PART + slot * (SIZE * R), B1, B2)
        if R == 2:
            give(low, low2, PART + slot * (SIZE * R) + SIZE, B1, B2)
        barrier()
        gl.atomic_add(COUNT + beginner(nm * nn, GU) * NC + ROW, 1)
    else:
        if other > 0:  # counts the shares that have handed over, and ends at zero
            slot = own * NC + ROW
            while gl.atomic_cas(COUNT + slot, other, 0) != other:
                pass
            barrier()
        for j in range(own + 1, own + 1 + other):
            slot = j * NC + ROW
            acc, acc2 = take(acc, acc2, PART + slot * (SIZE * R), B1, B2, mma, mmb)
            if R == 2:
                low, low2 = take(low, low2, PART + slot * (SIZE * R) + SIZE, B1, B2, mma, mmb)
        n0 = (pn * NC + ROW) * (64 * R)
        store(acc, ROW0, ROW1, BIAS, Y, COUNT, m0, M, n0, N, B1, BF16, R0, R1, HAS_BIAS, False,
              mma)  # fmt: skip
        if B2:
            store(acc2, ROW0, ROW1, BIAS, Y, COUNT, m0 + B1, M, n0, N, B2, BF16, R0, R1, HAS_BIAS,
                  False, mmb)  # fmt: skip
        if R == 2:
            store(low, ROW0, ROW1, BIAS, Y, COUNT, m0, M, n0 + 64, N, B1, BF16, R0, R1, HAS_BIAS,
                  False, mma)  # fmt: skip
            if B2:
                store(low2, ROW0, ROW1, BIAS, Y, COUNT, m0 + B1, M, n0 + 64, N, B2, BF16, R0, R1,
                      HAS_BIAS, False, mmb)  # fmt: skip


@gluon.jit
def _consumer(xs, xt, ws, hs, ms, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART, COUNT, M, N, NP, K,
              G, ROW: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr, ST: gl.constexpr,
              PER: gl.constexpr, NC: gl.constexpr, R: gl.constexpr, GN: gl.constexpr,
              ACC: gl.constexpr, BITS: gl.constexpr, BYTES: gl.constexpr, BF16: gl.constexpr,
              C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr,
              C4: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr,
              ZERO: gl.constexpr, MODE: gl.constexpr, SPG: gl.constexpr, ASM: gl.constexpr,
              REGS: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr,
              U: gl.constexpr):  # fmt: skip
    # bodies of loops are functions: Triton goes through a loop twice, through each loop in it too
    DM: gl.constexpr = 0 if ACC else MODE
    mma: gl.constexpr = _sums(B1)
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    LAST: gl.constexpr = PER - 1
    last = NP // 16 - 1
    nm = gl.cdiv(M, B1 + B2)
    nn = gl.cdiv(NP, NC * R * 64)
    GU = G // U  # shares are counted in rounds of the loop
    count = segments(nm * nn, GU)
    total = groups_of(nm * nn, GU)
    pn, pm, k0, k1, other = segment(0, nm, nn, GU, GN)
    HAS_P: gl.constexpr = DM != 0 or ZERO != 0
    st = 0
    ph = 0
    fs = 0  # the stage that was read last
    fp = 0
    n = 0
    mbarrier.wait(full.index(0), 0)
    t0 = (pn * NC + ROW) * R * 4
    w = fetch(ws, hs, ms, P, 0, 0, t0, last, k0 * (2 * U), G, K, BITS, HAS_P, SPG, C0, C1, C2, C3,
              C4)  # fmt: skip
    a = make(w, BITS, BF16, SPG, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL)
    if EARLY:
        w, fs, fp = _next(1, ws, hs, ms, P, full, fs, fp, t0, last, k0, True, G, K, ST, PER, U,
                          R, BITS, HAS_P, SPG, C0, C1, C2, C3, C4)  # fmt: skip
    for s in range(count):
        # asked again, not carried: Triton 3.6 keeps a loop bound that is assigned under an ``if``
        pn, pm, k0, k1, other = segment(s, nm, nn, GU, GN)
        m0 = pm * (B1 + B2)
        t0 = (pn * NC + ROW) * R * 4
        if not all_staged(SPG, C0, C1, C2, C3, C4):  # made ahead with factors of another tile
            w = fetch(ws, hs, ms, P, st * PER, 0, t0, last, k0 * (2 * U), G, K, BITS, HAS_P, SPG,
                      C0, C1, C2, C3, C4)  # fmt: skip
            a = make(w, BITS, BF16, SPG, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL)
            if EARLY:
                w = fetch(ws, hs, ms, P, fs * PER + LAST, 0, t0, last, k0 * (2 * U) + 1, G, K, BITS,
                          HAS_P, SPG, C0, C1, C2, C3, C4)  # fmt: skip
        acc = gl.zeros([64, B1], gl.float32, mma)
        acc2 = acc
        if B2:
            acc2 = gl.zeros([64, B2], gl.float32, _sums(B2))
        low = acc
        low2 = acc2
        for g in range(k0, k1):
            a, w, acc, acc2, low, low2, st, ph, fs, fp = _round(
                a, w, acc, acc2, low, low2, st, ph, fs, fp, xs, xt, ws, hs, ms, P, full, empty, t0,
                last, g, n, total, G, K, B1, B2, ST, PER, R, ACC, BITS, BF16, C0, C1, C2, C3,
                C4, DM, ZERO, SPG, ASM, REGS, EARLY, U,
            )  # fmt: skip
            n += 1
        _ended(acc, acc2, low, low2, ROW0, ROW1, BIAS, Y, PART, COUNT, M, N, k0, other, pn, m0, nn,
               nm, GU, ROW, B1, B2, NC, R, BF16, R0, R1, HAS_BIAS, PDL)  # fmt: skip


@gluon.jit(do_not_specialize=["M", "G"])
def specialized(xd, xe, W, S0, S1, Z, O0, O1, ROW0, ROW1, BIAS, Y, PART, COUNT, HIGH, M, N, NP, K,
                G, B1: gl.constexpr, B2: gl.constexpr, ST: gl.constexpr, PER: gl.constexpr,
                NC: gl.constexpr, R: gl.constexpr, GN: gl.constexpr, ACC: gl.constexpr,
                PDL: gl.constexpr, EARLY: gl.constexpr, BYTES: gl.constexpr, BITS: gl.constexpr,
                BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr,
                C3: gl.constexpr, C4: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr,
                HAS_BIAS: gl.constexpr, ZERO: gl.constexpr, MODE: gl.constexpr, SPG: gl.constexpr,
                ASM: gl.constexpr, REGS: gl.constexpr, U: gl.constexpr):  # fmt: skip
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    if BITS == 3:
        HIGH = HIGH.to(gl.pointer_type(gl.int32), bitcast=True)
    SLOTS: gl.constexpr = ST * PER
    xs = gl.allocate_shared_memory(ACT, [SLOTS, B1, 64], xd.layout)
    xt = xs
    if B2:
        xt = gl.allocate_shared_memory(ACT, [SLOTS, B2, 64], xe.layout)
    NT: gl.constexpr = R * 4
    w0, h0, f0 = buffers(S0, S1, Z, O0, O1, BITS, NT, SLOTS, SPG, C0, C1, C2, C3, C4)
    w1, h1, f1 = buffers(S0, S1, Z, O0, O1, BITS, NT, SLOTS, SPG, C0, C1, C2, C3, C4)
    w2, h2, f2 = w1, h1, f1
    if NC == 3:
        w2, h2, f2 = buffers(S0, S1, Z, O0, O1, BITS, NT, SLOTS, SPG, C0, C1, C2, C3, C4)
    wss = (w0, w1, w2)
    hss = (h0, h1, h2)
    mss = (f0, f1, f2)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1 + 128)
        mbarrier.init(empty.index(i), count=NC)
    fence_async_shared()
    barrier()
    if PDL:
        gdc_launch_dependents()
    P = (S0, S1, Z, O0, O1)
    if NC == 2:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, w0, h0, f0, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, M, N, NP, K, G, 0, B1, B2, ST, PER, NC, R, GN, ACC, BITS,
                             BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG,
                             ASM, REGS, PDL, EARLY, U)),
                (_consumer, (xs, xt, w1, h1, f1, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, M, N, NP, K, G, 1, B1, B2, ST, PER, NC, R, GN, ACC, BITS,
                             BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG,
                             ASM, REGS, PDL, EARLY, U)),
                (producer, (xd, xe, xs, xt, wss, hss, mss, full, empty, W, HIGH, P, M, NP, G, B1,
                            B2, ST, PER, NC, NT, BITS, SPG, C0, C1, C2, C3, C4, GN, PDL, U)),
            ],
            [4, 4],
            [216, 56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, w0, h0, f0, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, M, N, NP, K, G, 0, B1, B2, ST, PER, NC, R, GN, ACC, BITS,
                             BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG,
                             ASM, REGS, PDL, EARLY, U)),
                (_consumer, (xs, xt, w1, h1, f1, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, M, N, NP, K, G, 1, B1, B2, ST, PER, NC, R, GN, ACC, BITS,
                             BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG,
                             ASM, REGS, PDL, EARLY, U)),
                (_consumer, (xs, xt, w2, h2, f2, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, M, N, NP, K, G, 2, B1, B2, ST, PER, NC, R, GN, ACC, BITS,
                             BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG,
                             ASM, REGS, PDL, EARLY, U)),
                (producer, (xd, xe, xs, xt, wss, hss, mss, full, empty, W, HIGH, P, M, NP, G, B1,
                            B2, ST, PER, NC, NT, BITS, SPG, C0, C1, C2, C3, C4, GN, PDL, U)),
            ],
            [4, 4, 4],
            [152, 152, 56],
        )  # fmt: skip
