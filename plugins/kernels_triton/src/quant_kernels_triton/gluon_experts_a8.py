"""Gluon GEMM for stacks of experts by 8-bit activations on Hopper.

    rows by expert      the tables of ``schedule``: blocks of at most NH * BT + B2 rows of an expert
    y^T = W x^T         a tile: 64 * NC outputs of a block, by the weights of its expert

``gluon_experts`` with the arithmetic of ``mixed_ws``. One warp fetches codes of weights and of x by
TMA in stages of 128 columns, across the ends of tiles; NC warpgroups multiply. Programs are as many
as the card has multiprocessors, share whole tiles in turn and cut the last ones along K
(``gluon_share``). Sums of one stage are kept apart and added to the total in float32: the tensor
cores' own sums of fp8 hold few bits. A block is multiplied in pieces of BT rows. With TURNS they
take turns with two buffers of sums, so that one is multiplied while the one before is added up.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quant_kernels_triton.gluon_experts_parts import clear
from quant_kernels_triton.gluon_parts import barrier, gdc_launch_dependents, gdc_wait
from quant_kernels_triton.gluon_share import segment, segments
from quant_kernels_triton.gluon_tile import sums
from quant_kernels_triton.mixed_parts import (
    factor,
    factor_offsets,
    moved,
    operand,
    outer,
    raw_factors,
)

__all__ = ["grouped_a8"]


@gluon.jit
def _producer(xd, xe, wd, xs, xt, ws, full, empty, BLOCKS, EXPERT, BOUNDS, NP, G,
              BM: gl.constexpr, B2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr,
              GN: gl.constexpr, HB: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
    WT: gl.constexpr = wd.block_type.shape[0]  # tiles of a copy
    PER: gl.constexpr = NC * 4 // WT
    TAIL: gl.constexpr = xe.block_type.nbytes if B2 else 0
    BYTES: gl.constexpr = xd.block_type.nbytes + TAIL + wd.block_type.nbytes * PER * HB
    nm = gl.load(BLOCKS)
    nn = gl.cdiv(NP, NC * 64)
    st = 0
    ph = 1
    for s in range(segments(nm * nn, G)):
        pn, pm, k0, k1, _ = segment(s, nm, nn, G, GN)
        m0 = gl.load(BOUNDS + 2 * pm)
        t0 = gl.load(EXPERT + pm) * (NP // 16) + pn * (NC * 4)
        for k in range(k0, k1):
            mbarrier.wait(empty.index(st), ph)
            mbarrier.expect(full.index(st), BYTES)
            for h in gl.static_range(HB):
                for i in gl.static_range(PER):
                    tma.async_copy_global_to_shared(
                        wd, [t0 + i * WT, (k * HB + h) * 256], full.index(st),
                        ws.index((st * HB + h) * PER + i),
                    )  # fmt: skip
            tma.async_copy_global_to_shared(xd, [m0, k * 128], full.index(st), xs.index(st))
            if B2:
                tma.async_copy_global_to_shared(
                    xe, [m0 + BM - B2, k * 128], full.index(st), xt.index(st)
                )
            st += 1
            if st == ST:
                st = 0
                ph ^= 1


@gluon.jit
def _issued(a, b, x, d, HB: gl.constexpr, FRESH: gl.constexpr):
    """d (+)= the product of 128 columns, not waited for."""
    if HB == 2:
        d = warpgroup_mma(a, x.slice(0, 64, dim=1).permute((1, 0)), d, use_acc=not FRESH,
                          is_async=True)  # fmt: skip
        return warpgroup_mma(b, x.slice(64, 64, dim=1).permute((1, 0)), d, is_async=True)
    else:
        return warpgroup_mma(a, x.permute((1, 0)), d, use_acc=not FRESH, is_async=True)


@gluon.jit
def _added(acc, d, raw0, raw1, C0: gl.constexpr, C1: gl.constexpr, RL: gl.constexpr):
    """acc plus the sums of one stage under their scale."""
    if C0 == 7:
        return acc + d.to(gl.float32)
    else:
        f = gl.convert_layout(factor(raw0, raw1, C0, C1), RL, assert_trivial=True)
        return acc + d.to(gl.float32) * f[:, None]


@gluon.jit
def _multiplied(a, b, x, tail, acc, raw, NH: gl.constexpr, BT: gl.constexpr, B2: gl.constexpr,
                HB: gl.constexpr, TURNS: gl.constexpr, SUM: gl.constexpr, WHOLE: gl.constexpr,
                C0: gl.constexpr, C1: gl.constexpr, mma: gl.constexpr,
                mmb: gl.constexpr):  # fmt: skip
    """The totals of all pieces plus the products of a stage."""
    RL: gl.constexpr = gl.SliceLayout(1, mma)
    RB: gl.constexpr = gl.SliceLayout(1, mmb)
    TL: gl.constexpr = gl.DotOperandLayout(0, mmb, 4)
    out = ()
    if WHOLE:  # whole sums of integers are exact
        for c in gl.static_range(NH):
            out = out + (_issued(a, b, x.slice(c * BT, BT, dim=0), acc[c], HB, False),)
        if B2:
            a2 = gl.convert_layout(a, TL, assert_trivial=True)
            b2 = gl.convert_layout(b, TL, assert_trivial=True)
            out = out + (_issued(a2, b2, tail, acc[NH], HB, False),)
        if NH + (1 if B2 else 0) == 1:
            return (warpgroup_mma_wait(0, deps=(out[0],)),)
        else:
            return warpgroup_mma_wait(0, deps=out)
    else:
        d = gl.zeros([64, BT], SUM, mma)
        e = d
        now = _issued(a, b, x.slice(0, BT, dim=0), d, HB, True)
        for c in gl.static_range(1, NH):
            part = x.slice(c * BT, BT, dim=0)
            if TURNS:
                after = _issued(a, b, part, e, HB, True)
                d = warpgroup_mma_wait(HB, deps=(now,))
                out = out + (_added(acc[c - 1], d, raw[0], raw[1], C0, C1, RL),)
                e = d
                now = after
            else:
                d = warpgroup_mma_wait(0, deps=(now,))
                out = out + (_added(acc[c - 1], d, raw[0], raw[1], C0, C1, RL),)
                now = _issued(a, b, part, d, HB, True)
        if B2:
            a2 = gl.convert_layout(a, TL, assert_trivial=True)
            b2 = gl.convert_layout(b, TL, assert_trivial=True)
            last = _issued(a2, b2, tail, gl.zeros([64, B2], SUM, mmb), HB, True)
            d = warpgroup_mma_wait(HB, deps=(now,))
            out = out + (_added(acc[NH - 1], d, raw[0], raw[1], C0, C1, RL),)
            r = warpgroup_mma_wait(0, deps=(last,))
            return out + (_added(acc[NH], r, raw[0], raw[1], C0, C1, RB),)
        else:
            d = warpgroup_mma_wait(0, deps=(now,))
            return out + (_added(acc[NH - 1], d, raw[0], raw[1], C0, C1, RL),)


@gluon.jit
def _begun(NH: gl.constexpr, BT: gl.constexpr, B2: gl.constexpr, KEEP: gl.constexpr,
           mma: gl.constexpr, mmb: gl.constexpr):  # fmt: skip
    out = ()
    for _ in gl.static_range(NH):
        out = out + (gl.zeros([64, BT], KEEP, mma),)
    if B2:
        out = out + (gl.zeros([64, B2], KEEP, mmb),)
    return out


@gluon.jit
def _store(acc, SX, ROW0, ROW1, BIAS, Y, ORDER, m0, m1, n0, N, B: gl.constexpr, R0: gl.constexpr,
           R1: gl.constexpr, HAS_BIAS: gl.constexpr, POWER: gl.constexpr, SORTED: gl.constexpr,
           mma: gl.constexpr):  # fmt: skip
    """Rows m0 .. m1 of y, 64 outputs from n0 on."""
    rn = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    rm = m0 + gl.arange(0, B, layout=gl.SliceLayout(0, mma))
    acc = outer(acc, SX, ROW0, ROW1, BIAS, rn, rm, N, m1, R0, R1, HAS_BIAS, POWER)
    OL: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    y = gl.convert_layout(acc.to(Y.dtype.element_ty), OL)
    on = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OL))
    om = m0 + gl.arange(0, B, layout=gl.SliceLayout(0, OL))
    to = om
    if not SORTED:
        to = gl.load(ORDER + om, mask=om < m1, other=0)
    gl.store(Y + to[None, :].to(gl.int64) * N + on[:, None], y,
             mask=(om < m1)[None, :] & (on < N)[:, None])  # fmt: skip


@gluon.jit
def _consumer(xs, xt, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART, COUNT, ORDER,
              COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, G, E, ROW: gl.constexpr, NH: gl.constexpr,
              BT: gl.constexpr, B2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr,
              GN: gl.constexpr, HB: gl.constexpr, TURNS: gl.constexpr, INT: gl.constexpr,
              C0: gl.constexpr, C1: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr,
              HAS_BIAS: gl.constexpr, ASM: gl.constexpr, POWER: gl.constexpr,
              SORTED: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    WHOLE: gl.constexpr = INT and C0 == 7
    KEEP: gl.constexpr = gl.int32 if WHOLE else gl.float32
    BM: gl.constexpr = NH * BT + B2
    SIZE: gl.constexpr = 64 * BM
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BT, 32]
    )
    mmb: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B2 if B2 else BT, 32]
    )
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    RL: gl.constexpr = gl.SliceLayout(1, mma)
    WL: gl.constexpr = gl.BlockedLayout([1, 2, 1, 16], [1, 1, 32, 1], [4, 1, 1, 1], [3, 2, 1, 0])
    COLS: gl.constexpr = 128 // HB
    if PDL:
        gdc_wait()
    if ROW == 0 and not SORTED:
        clear(Y, ORDER, COUNTS, T, N, E)
    nm = gl.load(BLOCKS)
    nn = gl.cdiv(NP, NC * 64)
    own = gl.num_programs(0) - 1 - gl.program_id(0)
    st = 0
    ph = 0
    for s in range(segments(nm * nn, G)):
        pn, pm, k0, k1, other = segment(s, nm, nn, G, GN)
        m0 = gl.load(BOUNDS + 2 * pm)
        m1 = gl.load(BOUNDS + 2 * pm + 1)
        expert = gl.load(EXPERT + pm)
        n0 = (pn * NC + ROW) * 64
        rows = gl.minimum(n0 + gl.arange(0, 64, layout=RL), NP - 1)
        F0 = moved(S0, expert, NP, G, C0)
        F1 = moved(S1, expert, NP, G, C1)
        at0 = factor_offsets(rows, G, C0)
        at1 = factor_offsets(rows, G, C1)
        later = raw_factors(F0, F1, at0, at1, k0, G, rows, 1, C0, C1)
        acc = _begun(NH, BT, B2, KEEP, mma, mmb)
        for g in range(k0, k1):
            raw = later
            later = raw_factors(F0, F1, at0, at1, g + 1, G, rows, 1, C0, C1)
            mbarrier.wait(full.index(st), ph)
            a = operand(words.index(st * HB * NC + ROW).load(WL), 64, COLS, INT, HB == 2, ASM, AL)
            b = a
            if HB == 2:
                more = words.index((st * HB + 1) * NC + ROW).load(WL)
                b = operand(more, 64, COLS, INT, True, ASM, AL)
            acc = _multiplied(a, b, xs.index(st), xt.index(st), acc, raw, NH, BT, B2, HB, TURNS,
                              SUM, WHOLE, C0, C1, mma, mmb)  # fmt: skip
            mbarrier.arrive(empty.index(st), count=1)
            st += 1
            if st == ST:
                st = 0
                ph ^= 1
        total = ()
        for c in gl.static_range(NH + (1 if B2 else 0)):
            total = total + (acc[c].to(gl.float32),)
        if k0 > 0:
            to = PART + (own * NC + ROW) * SIZE
            for c in gl.static_range(NH):
                gl.store(sums(to + c * 64 * BT, BT, mma), total[c])
            if B2:
                gl.store(sums(to + NH * 64 * BT, B2, mmb), total[NH])
            barrier()
            gl.atomic_xchg(COUNT + own * NC + ROW, 1)
        else:
            for j in range(own + 1, own + 1 + other):
                slot = j * NC + ROW
                seen = gl.atomic_cas(COUNT + slot, 1, 0)
                while seen != 1:
                    seen = gl.atomic_cas(COUNT + slot, 1, 0)
                barrier()
                summed = ()
                for c in gl.static_range(NH):
                    at = sums(PART + slot * SIZE + c * 64 * BT, BT, mma)
                    summed = summed + (total[c] + gl.load(at, cache_modifier=".cg"),)
                if B2:
                    at = sums(PART + slot * SIZE + NH * 64 * BT, B2, mmb)
                    summed = summed + (total[NH] + gl.load(at, cache_modifier=".cg"),)
                total = summed
            V0 = moved(ROW0, expert, NP, G, R0)
            V1 = moved(ROW1, expert, NP, G, R1)
            B = BIAS
            if HAS_BIAS:
                B = BIAS + expert * N
            for c in gl.static_range(NH):
                _store(total[c], SX, V0, V1, B, Y, ORDER, m0 + c * BT, m1, n0, N, BT, R0, R1,
                       HAS_BIAS, POWER, SORTED, mma)  # fmt: skip
            if B2:
                _store(total[NH], SX, V0, V1, B, Y, ORDER, m0 + NH * BT, m1, n0, N, B2, R0, R1,
                       HAS_BIAS, POWER, SORTED, mmb)  # fmt: skip


@gluon.jit(do_not_specialize=["T", "G", "E"])  # Triton 3.6 fails on a loop of one round
def grouped_a8(xd, xe, wd, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART, COUNT, ORDER, COUNTS, BLOCKS,
               EXPERT, BOUNDS, T, N, NP, G, E, NH: gl.constexpr, BT: gl.constexpr,
               B2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, GN: gl.constexpr,
               TURNS: gl.constexpr, SORTED: gl.constexpr, KEEP: gl.constexpr,
               BYTES: gl.constexpr, INT: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
               R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr, ASM: gl.constexpr,
               POWER: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Y [T, N]: row ORDER[i] is row i of what ``xd`` describes, times SX[i], through the expert of
    its block; zeros in the rows of none. SORTED: row i instead, and the others stay as they are.

    ``wd`` describes the codes of all E experts as [E * NP / 16, words]. COUNTS, BLOCKS, EXPERT and
    BOUNDS are those of ``schedule``. KEEP: registers of a thread of a consumer.
    """
    ELEMENT: gl.constexpr = gl.int8 if INT else gl.float8e4nv
    HB: gl.constexpr = 2 if BYTES else 1  # copies of 1 KB a tile that 128 columns take
    BM: gl.constexpr = NH * BT + B2
    WT: gl.constexpr = wd.block_type.shape[0]
    xs = gl.allocate_shared_memory(ELEMENT, [ST, NH * BT, 128], xd.layout)
    xt = xs
    if B2:
        xt = gl.allocate_shared_memory(ELEMENT, [ST, B2, 128], xe.layout)
    ws = gl.allocate_shared_memory(gl.int32, [ST * HB * NC * 4 // WT, WT, 256], wd.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    words = ws._reinterpret(gl.int8, [ST * HB * NC, 4, 2, 32, 16], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=NC)
    fence_async_shared()
    barrier()
    if PDL:
        gdc_launch_dependents()
    if NC == 2:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART,
                             COUNT, ORDER, COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, G, E, 0, NH,
                             BT, B2, ST, NC, GN, HB, TURNS, INT, C0, C1, R0, R1, HAS_BIAS, ASM,
                             POWER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART,
                             COUNT, ORDER, COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, G, E, 1, NH,
                             BT, B2, ST, NC, GN, HB, TURNS, INT, C0, C1, R0, R1, HAS_BIAS, ASM,
                             POWER, SORTED, PDL)),
                (_producer, (xd, xe, wd, xs, xt, ws, full, empty, BLOCKS, EXPERT, BOUNDS, NP, G,
                             BM, B2, ST, NC, GN, HB, PDL)),
            ],
            [4, 1],
            [KEEP, 24],
        )  # fmt: skip
    else:
        gl.static_assert(NC == 4)
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART,
                             COUNT, ORDER, COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, G, E, 0, NH,
                             BT, B2, ST, NC, GN, HB, TURNS, INT, C0, C1, R0, R1, HAS_BIAS, ASM,
                             POWER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART,
                             COUNT, ORDER, COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, G, E, 1, NH,
                             BT, B2, ST, NC, GN, HB, TURNS, INT, C0, C1, R0, R1, HAS_BIAS, ASM,
                             POWER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART,
                             COUNT, ORDER, COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, G, E, 2, NH,
                             BT, B2, ST, NC, GN, HB, TURNS, INT, C0, C1, R0, R1, HAS_BIAS, ASM,
                             POWER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART,
                             COUNT, ORDER, COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, G, E, 3, NH,
                             BT, B2, ST, NC, GN, HB, TURNS, INT, C0, C1, R0, R1, HAS_BIAS, ASM,
                             POWER, SORTED, PDL)),
                (_producer, (xd, xe, wd, xs, xt, ws, full, empty, BLOCKS, EXPERT, BOUNDS, NP, G,
                             BM, B2, ST, NC, GN, HB, PDL)),
            ],
            [4, 4, 4, 1],
            [KEEP, KEEP, KEEP, 24],
        )  # fmt: skip
