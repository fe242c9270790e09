"""Gluon GEMM for many rows on Hopper: four warps fetch, two to four warpgroups multiply.

    y^T [N, M] = W [N, K] x^T: W is the register operand of wgmma, x the shared one.

A consumer warpgroup owns 64 or 128 output features (R tiles) of B1 + B2 rows (B2 may be 0: two
tiles make row counts that are no power of two). Stages of 64 columns hold x, codes and factors
(gluon_stages), guarded by a pair of barriers each. A consumer dequantizes the next operand while
wgmma works on the present one: a product is issued before the one ahead of it is waited for, or
else ptxas would put off the dequantization until that one is done. With ACC the group's scale
multiplies its sums in float32 instead of its weights.

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
    shifted,
)
from quant_kernels_triton.gluon_share import beginner, groups_of, segment, segments
from quant_kernels_triton.gluon_stages import buffers, fetch, make, producer, scales
from quant_kernels_triton.gluon_tile import multiply, store

__all__ = ["specialized"]


@gluon.jit
def _wait(d, e, B2: gl.constexpr, LEFT: gl.constexpr):
    """Until the products of at most LEFT operands are under way."""
    if B2:
        d, e = warpgroup_mma_wait(2 * LEFT, deps=(d, e))
    else:
        d = warpgroup_mma_wait(LEFT, deps=(d,))
        e = d
    return d, e


@gluon.jit
def _wait4(d, d2, e, e2, B2: gl.constexpr, LEFT: gl.constexpr):
    if B2:
        d, d2, e, e2 = warpgroup_mma_wait(2 * LEFT, deps=(d, d2, e, e2))
    else:
        d, e = warpgroup_mma_wait(LEFT, deps=(d, e))
        d2 = d
        e2 = e
    return d, d2, e, e2


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
def _give(acc, acc2, PART, B1: gl.constexpr, B2: gl.constexpr):
    """Store the sums of both tiles of rows."""
    _give_one(acc, PART, B1)
    if B2:
        _give_one(acc2, PART + 64 * B1, B2)


@gluon.jit
def _take(acc, acc2, PART, B1: gl.constexpr, B2: gl.constexpr, mma: gl.constexpr,
          mmb: gl.constexpr):  # fmt: skip
    """Add what ``_give`` stored."""
    acc = _take_one(acc, PART, B1, mma)
    if B2:
        acc2 = _take_one(acc2, PART + 64 * B1, B2, mmb)
    return acc, acc2


@gluon.jit
def _consumer(xs, xt, ws, hs, ms, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
              EXPERT, BOUNDS, M, N, NP, K, G, ROW: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr,
              ST: gl.constexpr, NC: gl.constexpr, R: gl.constexpr, GN: gl.constexpr,
              ACC: gl.constexpr, BITS: gl.constexpr, BYTES: gl.constexpr, BF16: gl.constexpr,
              C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr,
              C4: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr,
              ZERO: gl.constexpr, MODE: gl.constexpr, SPG: gl.constexpr, ASM: gl.constexpr,
              REGS: gl.constexpr, GROUPED: gl.constexpr, PDL: gl.constexpr,
              EARLY: gl.constexpr):  # fmt: skip
    BM: gl.constexpr = B1 + B2
    DM: gl.constexpr = 0 if ACC else MODE
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B1, 16]
    )
    mmb: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B2 if B2 else B1, 16]
    )
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    AL2: gl.constexpr = gl.DotOperandLayout(0, mmb, 2)
    RL: gl.constexpr = gl.SliceLayout(1, mma)
    last = NP // 16 - 1
    nm = gl.cdiv(M, BM)
    nn = gl.cdiv(NP, NC * R * 64)
    count = segments(nm * nn, G)
    total = groups_of(nm * nn, G)
    pn, pm, k0, k1, other = segment(0, nm, nn, G, GN)
    if GROUPED:
        total = gl.where(gl.load(EXPERT + pm) < 0, 0, total)
    HAS_P: gl.constexpr = DM != 0 or ZERO != 0
    st = 0
    ph = 0
    n = 0
    if total > 0:
        mbarrier.wait(full.index(0), 0)
    t0 = (pn * NC + ROW) * R * 4
    w = fetch(ws, hs, ms, P, 0, 0, t0, last, k0 * 2, G, K, BITS, HAS_P, SPG, C0, C1, C2, C3, C4)
    a = make(w, BITS, BF16, SPG, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL)
    if EARLY:
        w = fetch(ws, hs, ms, P, 1, 0, t0, last, k0 * 2 + 1, G, K, BITS, HAS_P, SPG, C0, C1, C2, C3,
                  C4)  # fmt: skip
    for s in range(count):
        # asked again, not carried: Triton 3.6 keeps a loop bound that is assigned under an ``if``
        pn, pm, k0, k1, other = segment(s, nm, nn, G, GN)
        m0 = pm * BM
        m1 = M
        if GROUPED:
            m0 = gl.load(BOUNDS + 2 * pm)
            expert = gl.load(EXPERT + pm)  # -1: none, nothing is read or stored
            m1 = gl.where(expert < 0, m0, gl.load(BOUNDS + 2 * pm + 1))
            k1 = gl.where(expert < 0, k0, k1)
        t0 = (pn * NC + ROW) * R * 4
        if not all_staged(SPG, C0, C1, C2, C3, C4):  # made ahead with factors of another tile
            w = fetch(ws, hs, ms, P, st * 2, 0, t0, last, k0 * 2, G, K, BITS, HAS_P, SPG, C0, C1,
                      C2, C3, C4)  # fmt: skip
            a = make(w, BITS, BF16, SPG, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL)
            if EARLY:
                w = fetch(ws, hs, ms, P, st * 2 + 1, 0, t0, last, k0 * 2 + 1, G, K, BITS, HAS_P,
                          SPG, C0, C1, C2, C3, C4)  # fmt: skip
        acc = gl.zeros([64, B1], gl.float32, mma)
        acc2 = acc
        if B2:
            acc2 = gl.zeros([64, B2], gl.float32, mmb)
        low = acc
        low2 = acc2
        for g in range(k0, k1):
            e = low
            e2 = low2
            d, d2 = multiply(a, xs.index(st * 2), xt.index(st * 2), acc, acc2, ACC, B2, AL2)
            if not EARLY:
                issued()
            if R == 2:
                w = fetch(ws, hs, ms, P, st * 2, 4, t0 + 4, last, g * 2, G, K, BITS, HAS_P, SPG, C0,
                          C1, C2, C3, C4)  # fmt: skip
                a1 = make(w, BITS, BF16, SPG, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL)
                e, e2 = multiply(a1, xs.index(st * 2), xt.index(st * 2), low, low2, ACC, B2, AL2)
                issued()
            if not EARLY:
                w = fetch(ws, hs, ms, P, st * 2 + 1, 0, t0, last, g * 2 + 1, G, K, BITS, HAS_P, SPG,
                          C0, C1, C2, C3, C4)  # fmt: skip
            if R == 2:
                d, d2, e, e2 = _wait4(d, d2, e, e2, B2, 1)
            a2 = make(w, BITS, BF16, SPG, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL)
            d, d2 = multiply(a2, xs.index(st * 2 + 1), xt.index(st * 2 + 1), d, d2, False, B2, AL2)
            if not EARLY:
                issued()
            if R == 2:
                w = fetch(ws, hs, ms, P, st * 2 + 1, 4, t0 + 4, last, g * 2 + 1, G, K, BITS, HAS_P,
                          SPG, C0, C1, C2, C3, C4)  # fmt: skip
                d, d2, e, e2 = _wait4(d, d2, e, e2, B2, 1)
                a3 = make(w, BITS, BF16, SPG, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL)
                e, e2 = multiply(a3, xs.index(st * 2 + 1), xt.index(st * 2 + 1), e, e2, False, B2,
                                  AL2)  # fmt: skip
                issued()
            f = d
            f1 = d
            if ACC:
                f = scales(ms, P, st * 2, 0, t0, last, g * 2, G, K, C0, C1, RL)
                if R == 2:
                    f1 = scales(ms, P, st * 2, 4, t0 + 4, last, g * 2, G, K, C0, C1, RL)
            here = st
            st += 1
            if st == ST:
                st = 0
                ph ^= 1
            n += 1
            if n < total:
                mbarrier.wait(full.index(st), ph)
            # the last round makes an operand of a stale stage, unused
            kn = gl.minimum(g + 1, G - 1) * 2
            w = fetch(ws, hs, ms, P, st * 2, 0, t0, last, kn, G, K, BITS, HAS_P, SPG, C0, C1, C2,
                      C3, C4)  # fmt: skip
            if R == 2:
                d, d2, e, e2 = _wait4(d, d2, e, e2, B2, 1)
            else:
                d, d2 = _wait(d, d2, B2, 1)
            a = make(w, BITS, BF16, SPG, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL)
            if EARLY:
                w = fetch(ws, hs, ms, P, st * 2 + 1, 0, t0, last, kn + 1, G, K, BITS, HAS_P, SPG,
                          C0, C1, C2, C3, C4)  # fmt: skip
            if R == 2:
                d, d2, e, e2 = _wait4(d, d2, e, e2, B2, 0)
            else:
                d, d2 = _wait(d, d2, B2, 0)
            mbarrier.arrive(empty.index(here), count=1)
            if ACC:
                acc += d * f[:, None]
                if B2:
                    f2 = gl.convert_layout(f, gl.SliceLayout(1, mmb), assert_trivial=True)
                    acc2 += d2 * f2[:, None]
                if R == 2:
                    low += e * f1[:, None]
                    if B2:
                        f2 = gl.convert_layout(f1, gl.SliceLayout(1, mmb), assert_trivial=True)
                        low2 += e2 * f2[:, None]
            else:
                acc = d
                acc2 = d2
                low = e
                low2 = e2
        if PDL:
            gdc_wait()
        own = gl.num_programs(0) - 1 - gl.program_id(0)
        SIZE: gl.constexpr = 64 * BM
        if k0 > 0:
            slot = own * NC + ROW
            _give(acc, acc2, PART + slot * (SIZE * R), B1, B2)
            if R == 2:
                _give(low, low2, PART + slot * (SIZE * R) + SIZE, B1, B2)
            barrier()
            gl.atomic_add(COUNT + beginner(nm * nn, G) * NC + ROW, 1)
        else:
            if other > 0:  # counts the shares that have handed over, and ends at zero
                slot = own * NC + ROW
                while gl.atomic_cas(COUNT + slot, other, 0) != other:
                    pass
                barrier()
            for j in range(own + 1, own + 1 + other):
                slot = j * NC + ROW
                acc, acc2 = _take(acc, acc2, PART + slot * (SIZE * R), B1, B2, mma, mmb)
                if R == 2:
                    low, low2 = _take(low, low2, PART + slot * (SIZE * R) + SIZE, B1, B2, mma, mmb)
            n0 = (pn * NC + ROW) * (64 * R)
            store(acc, ROW0, ROW1, BIAS, Y, ORDER, m0, m1, n0, N, B1, BF16, R0, R1, HAS_BIAS,
                   GROUPED, mma)  # fmt: skip
            if B2:
                store(acc2, ROW0, ROW1, BIAS, Y, ORDER, m0 + B1, m1, n0, N, B2, BF16, R0, R1,
                       HAS_BIAS, GROUPED, mmb)  # fmt: skip
            if R == 2:
                store(low, ROW0, ROW1, BIAS, Y, ORDER, m0, m1, n0 + 64, N, B1, BF16, R0, R1,
                       HAS_BIAS, GROUPED, mma)  # fmt: skip
                if B2:
                    store(low2, ROW0, ROW1, BIAS, Y, ORDER, m0 + B1, m1, n0 + 64, N, B2, BF16, R0,
                           R1, HAS_BIAS, GROUPED, mmb)  # fmt: skip


@gluon.jit(do_not_specialize=["M", "G"])
def specialized(xd, xe, W, S0, S1, Z, O0, O1, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER, EXPERT,
                BOUNDS, HIGH, M, N, NP, K, G, B1: gl.constexpr, B2: gl.constexpr, ST: gl.constexpr,
                NC: gl.constexpr, R: gl.constexpr, GN: gl.constexpr, ACC: gl.constexpr,
                GROUPED: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr, BYTES: gl.constexpr,
                BITS: gl.constexpr, BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
                C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr, R0: gl.constexpr,
                R1: gl.constexpr, HAS_BIAS: gl.constexpr, ZERO: gl.constexpr, MODE: gl.constexpr,
                SPG: gl.constexpr, ASM: gl.constexpr, REGS: gl.constexpr):  # fmt: skip
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    if BITS == 3:
        HIGH = HIGH.to(gl.pointer_type(gl.int32), bitcast=True)
    if GROUPED:  # one tile for each program, of one expert; see gluon_ring
        if PDL:
            gdc_wait()
        nm = gl.cdiv(M, B1 + B2)
        _, pm, _, _, _ = segment(0, nm, gl.cdiv(NP, NC * R * 64), G, GN)
        expert = gl.maximum(gl.load(EXPERT + pm), 0)
        WG: gl.constexpr = 256 if BITS < 4 else 128 * BITS
        W = W + expert.to(gl.int64) * ((NP // 16) * G * WG)
        if BITS == 3:
            HIGH = HIGH + expert.to(gl.int64) * ((NP // 16) * G * 64)
        S0 = shifted(S0, expert, NP, G, N, K, C0)
        S1 = shifted(S1, expert, NP, G, N, K, C1)
        Z = shifted(Z, expert, NP, G, N, K, C2)
        O0 = shifted(O0, expert, NP, G, N, K, C3)
        O1 = shifted(O1, expert, NP, G, N, K, C4)
        ROW0 = shifted(ROW0, expert, NP, G, N, K, R0)
        ROW1 = shifted(ROW1, expert, NP, G, N, K, R1)
        if HAS_BIAS:
            BIAS = BIAS + expert * N
    xs = gl.allocate_shared_memory(ACT, [2 * ST, B1, 64], xd.layout)
    xt = xs
    if B2:
        xt = gl.allocate_shared_memory(ACT, [2 * ST, B2, 64], xe.layout)
    NT: gl.constexpr = R * 4
    w0, h0, f0 = buffers(S0, S1, Z, O0, O1, BITS, NT, ST, SPG, C0, C1, C2, C3, C4)
    w1, h1, f1 = buffers(S0, S1, Z, O0, O1, BITS, NT, ST, SPG, C0, C1, C2, C3, C4)
    w2, h2, f2 = w1, h1, f1
    w3, h3, f3 = w1, h1, f1
    if NC >= 3:
        w2, h2, f2 = buffers(S0, S1, Z, O0, O1, BITS, NT, ST, SPG, C0, C1, C2, C3, C4)
    if NC >= 4:
        w3, h3, f3 = buffers(S0, S1, Z, O0, O1, BITS, NT, ST, SPG, C0, C1, C2, C3, C4)
    wss = (w0, w1, w2, w3)
    hss = (h0, h1, h2, h3)
    mss = (f0, f1, f2, f3)
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
                             COUNT, ORDER, EXPERT, BOUNDS, M, N, NP, K, G, 0, B1, B2, ST, NC, R, GN,
                             ACC, BITS, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO,
                             MODE, SPG, ASM, REGS, GROUPED, PDL, EARLY)),
                (_consumer, (xs, xt, w1, h1, f1, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, ORDER, EXPERT, BOUNDS, M, N, NP, K, G, 1, B1, B2, ST, NC, R, GN,
                             ACC, BITS, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO,
                             MODE, SPG, ASM, REGS, GROUPED, PDL, EARLY)),
                (producer, (xd, xe, xs, xt, wss, hss, mss, full, empty, W, HIGH, P, M, NP, G,
                            EXPERT, BOUNDS, B1, B2, ST, NC, NT, BITS, SPG, C0, C1, C2, C3, C4, GN,
                            GROUPED, PDL)),
            ],
            [4, 4],
            [216, 56],
        )  # fmt: skip
    elif NC == 3:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, w0, h0, f0, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, ORDER, EXPERT, BOUNDS, M, N, NP, K, G, 0, B1, B2, ST, NC, R, GN,
                             ACC, BITS, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO,
                             MODE, SPG, ASM, REGS, GROUPED, PDL, EARLY)),
                (_consumer, (xs, xt, w1, h1, f1, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, ORDER, EXPERT, BOUNDS, M, N, NP, K, G, 1, B1, B2, ST, NC, R, GN,
                             ACC, BITS, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO,
                             MODE, SPG, ASM, REGS, GROUPED, PDL, EARLY)),
                (_consumer, (xs, xt, w2, h2, f2, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, ORDER, EXPERT, BOUNDS, M, N, NP, K, G, 2, B1, B2, ST, NC, R, GN,
                             ACC, BITS, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO,
                             MODE, SPG, ASM, REGS, GROUPED, PDL, EARLY)),
                (producer, (xd, xe, xs, xt, wss, hss, mss, full, empty, W, HIGH, P, M, NP, G,
                            EXPERT, BOUNDS, B1, B2, ST, NC, NT, BITS, SPG, C0, C1, C2, C3, C4, GN,
                            GROUPED, PDL)),
            ],
            [4, 4, 4],
            [144, 144, 56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, w0, h0, f0, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, ORDER, EXPERT, BOUNDS, M, N, NP, K, G, 0, B1, B2, ST, NC, R, GN,
                             ACC, BITS, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO,
                             MODE, SPG, ASM, REGS, GROUPED, PDL, EARLY)),
                (_consumer, (xs, xt, w1, h1, f1, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, ORDER, EXPERT, BOUNDS, M, N, NP, K, G, 1, B1, B2, ST, NC, R, GN,
                             ACC, BITS, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO,
                             MODE, SPG, ASM, REGS, GROUPED, PDL, EARLY)),
                (_consumer, (xs, xt, w2, h2, f2, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, ORDER, EXPERT, BOUNDS, M, N, NP, K, G, 2, B1, B2, ST, NC, R, GN,
                             ACC, BITS, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO,
                             MODE, SPG, ASM, REGS, GROUPED, PDL, EARLY)),
                (_consumer, (xs, xt, w3, h3, f3, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART,
                             COUNT, ORDER, EXPERT, BOUNDS, M, N, NP, K, G, 3, B1, B2, ST, NC, R, GN,
                             ACC, BITS, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO,
                             MODE, SPG, ASM, REGS, GROUPED, PDL, EARLY)),
                (producer, (xd, xe, xs, xt, wss, hss, mss, full, empty, W, HIGH, P, M, NP, G,
                            EXPERT, BOUNDS, B1, B2, ST, NC, NT, BITS, SPG, C0, C1, C2, C3, C4, GN,
                            GROUPED, PDL)),
            ],
            [4, 4, 4, 4],
            [112, 112, 112, 48],
        )  # fmt: skip
