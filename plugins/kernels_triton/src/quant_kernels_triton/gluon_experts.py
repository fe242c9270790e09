"""Gluon GEMM for stacks of experts on Hopper: some warps fetch codes and x, warpgroups multiply.

    rows by expert      the tables of ``schedule``: blocks of at most B1 + B2 rows of one expert
    y^T = W x^T         a tile: 64 * NC outputs of a block, by the weights of its expert

As ``gluon_ws``, with what many small products ask for. Blocks are counted on the device: a fixed
number of programs shares the tiles there are, whole ones in turn and the last rounds of them cut
along K into equal shares (``gluon_share``). Codes come by TMA too: stages of H times 64 columns of
codes and x are fetched across the ends of tiles, so that consumers wait for memory once, and four
of them hide each other's dequantization where blocks are small. A consumer dequantizes the second
half of a group while the first is multiplied; with both in one stage it waits half as often.

With GATHER four warps copy the rows of x from where they are, 16 bytes a thread and piece; else x
lies in the order of experts and comes by TMA. A block's missing rows are some other rows: their
sums are not stored.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
)

from quant_kernels_triton.gluon_experts_parts import clear, factors, few_rows, many_rows
from quant_kernels_triton.gluon_parts import (
    barrier,
    gdc_launch_dependents,
    gdc_wait,
    shifted,
)
from quant_kernels_triton.gluon_share import segment, segments
from quant_kernels_triton.gluon_tile import store, sums

__all__ = ["grouped"]


@gluon.jit
def _addresses(X, ORDER, m0, m1, KX, TOP, B: gl.constexpr, GL: gl.constexpr):
    """Of the first 64 columns of B rows of x; the last row again beyond the block."""
    rows = m0 + gl.arange(0, B, layout=gl.SliceLayout(1, GL))
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, GL))
    at = gl.load(ORDER + gl.minimum(rows, m1 - 1)) // TOP
    return X + (at.to(gl.int64)[:, None] * KX + cols[None, :])


@gluon.jit
def _producer(xd, xe, wd, X, xs, xt, ws, full, empty, ORDER, BLOCKS, EXPERT, BOUNDS, NP, G, KX,
              TOP, B1: gl.constexpr, B2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr,
              GN: gl.constexpr, H: gl.constexpr, HC: gl.constexpr, GATHER: gl.constexpr,
              PDL: gl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
    WT: gl.constexpr = wd.block_type.shape[0] // 4  # consumers that one copy serves
    HW: gl.constexpr = wd.block_type.shape[1]
    CODES: gl.constexpr = wd.block_type.nbytes * (NC // WT) * HC
    ROWS: gl.constexpr = 0 if GATHER else xd.block_type.nbytes // B1 * (B1 + B2) * H
    BYTES: gl.constexpr = CODES + ROWS
    GL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4 if GATHER else 1, 1], [1, 0])
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, GL))
    nm = gl.load(BLOCKS)
    nn = gl.cdiv(NP, NC * 64)
    st = 0
    ph = 1
    for s in range(segments(nm * nn, G)):
        pn, pm, k0, k1, _ = segment(s, nm, nn, G, GN)
        m0 = gl.load(BOUNDS + 2 * pm)
        t0 = gl.load(EXPERT + pm) * (NP // 16) + pn * (NC * 4)
        if GATHER:
            m1 = gl.load(BOUNDS + 2 * pm + 1)
            x1 = _addresses(X, ORDER, m0, m1, KX, TOP, B1, GL)
            x2 = x1
            if B2:
                x2 = _addresses(X, ORDER, m0 + B1, m1, KX, TOP, B2, GL)
        for f in range(k0 * 2, k1 * 2, H):
            mbarrier.wait(empty.index(st), ph)
            mbarrier.expect(full.index(st), BYTES)
            for c in gl.static_range(HC):
                for i in gl.static_range(NC // WT):
                    tma.async_copy_global_to_shared(
                        wd, [t0 + i * WT * 4, (f // H * HC + c) * HW], full.index(st),
                        ws.index((st * HC + c) * (NC // WT) + i),
                    )  # fmt: skip
            for h in gl.static_range(H):
                k = f + h
                xh = xs.index(st * H + h)
                if GATHER:
                    inside = (cols + k * 64 < KX)[None, :]
                    async_copy.async_copy_global_to_shared(xh, x1 + k * 64, mask=inside)
                    if B2:
                        xg = xt.index(st * H + h)
                        async_copy.async_copy_global_to_shared(xg, x2 + k * 64, mask=inside)
                else:
                    tma.async_copy_global_to_shared(xd, [m0, k * 64], full.index(st), xh)
                    if B2:
                        tma.async_copy_global_to_shared(
                            xe, [m0 + B1, k * 64], full.index(st), xt.index(st * H + h)
                        )
            if GATHER:
                async_copy.mbarrier_arrive(full.index(st), increment_count=False)
            st += 1
            if st == ST:
                st = 0
                ph ^= 1


@gluon.jit
def _begin(P, EXPERT, jw, sub, lane, s, nm, nn, N, NP, G, K, ROW: gl.constexpr,
           NC: gl.constexpr, GN: gl.constexpr, SPG: gl.constexpr,
           C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr,
           C4: gl.constexpr):  # fmt: skip
    """Where the factors of segment ``s`` lie, and those of its first two groups."""
    pn, pm, k0, _, _ = segment(s, nm, nn, G, GN)
    pm = gl.minimum(gl.maximum(pm, 0), nm - 1)  # a program without tiles reads, but not beyond
    pn = gl.minimum(gl.maximum(pn, 0), nn - 1)
    e = gl.maximum(gl.load(EXPERT + pm), 0)
    # tiles beyond the last are computed again from the last one and not stored
    pt = gl.minimum((pn * NC + ROW) * 4 + jw, NP // 16 - 1)[:, None, None, None, None]
    Q = (
        shifted(P[0], e, NP, G, N, K, C0),
        shifted(P[1], e, NP, G, N, K, C1),
        shifted(P[2], e, NP, G, N, K, C2),
        shifted(P[3], e, NP, G, N, K, C3),
        shifted(P[4], e, NP, G, N, K, C4),
    )
    sa, sb = factors(Q, pt, sub, lane, k0, G, K, SPG, C0, C1, C2, C3, C4)
    ta, tb = factors(Q, pt, sub, lane, k0 + 1, G, K, SPG, C0, C1, C2, C3, C4)
    return Q, pt, sa, sb, ta, tb


@gluon.jit
def _consumer(xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER, COUNTS,
              BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, ROW: gl.constexpr, B1: gl.constexpr,
              B2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, GN: gl.constexpr,
              H: gl.constexpr, HC: gl.constexpr, FEW: gl.constexpr,
              ACC: gl.constexpr, BYTES: gl.constexpr, BF16: gl.constexpr, C0: gl.constexpr,
              C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr,
              R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr, ZERO: gl.constexpr,
              MODE: gl.constexpr, SPG: gl.constexpr, ASM: gl.constexpr, REGS: gl.constexpr,
              GATHER: gl.constexpr, SORTED: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    BM: gl.constexpr = B1 + B2
    S2: gl.constexpr = 2 if BYTES else 1
    SB: gl.constexpr = (2 if SPG == 8 else 1) if BYTES else (SPG // 2 if SPG >= 2 else 1)
    P2: gl.constexpr = S2 if SPG >= 4 else 1
    DM: gl.constexpr = 0 if ACC else MODE
    few: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8]
    )
    many: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B1, 16]
    )
    mma: gl.constexpr = few if FEW else many
    mmb: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B2 if B2 else B1, 16]
    )
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    AL2: gl.constexpr = gl.DotOperandLayout(0, mmb, 2)
    WL: gl.constexpr = gl.BlockedLayout([1, S2, 1, 4], [1, 1, 32, 1], [4, 1, 1, 1], [3, 2, 1, 0])
    W6: gl.constexpr = gl.BlockedLayout(
        [1, 1, S2, 1, SB, 8 // SB], [1, 1, 1, 32, 1, 1], [4, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    PL: gl.constexpr = gl.SliceLayout(5, W6)
    P4: gl.constexpr = gl.SliceLayout(4, PL)
    jw = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, P4))))
    js = gl.arange(0, P2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, P4))))
    jl = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, P4))))
    jb = gl.arange(
        0, SB, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PL))))
    )
    sub = (js * SB)[None, None, :, None, None] + jb[None, None, None, None, :]
    lane = jl[None, None, None, :, None]

    if PDL:
        gdc_wait()
    if ROW == 0 and not SORTED:
        clear(Y, ORDER, COUNTS, T, N, E)
    blocks = gl.load(BLOCKS)
    nm = gl.maximum(blocks, 1)
    nn = gl.cdiv(NP, NC * 64)
    count = segments(blocks * nn, G)
    Q, pt, sa, sb, ta, tb = _begin(P, EXPERT, jw, sub, lane, 0, nm, nn, N, NP, G, K, ROW,
                                   NC, GN, SPG, C0, C1, C2, C3, C4)  # fmt: skip
    st = 0
    ph = 0
    for s in range(count):
        pn, pm, k0, k1, other = segment(s, nm, nn, G, GN)
        m0 = gl.load(BOUNDS + 2 * pm)
        m1 = gl.load(BOUNDS + 2 * pm + 1)
        expert = gl.load(EXPERT + pm)
        n0 = (pn * NC + ROW) * 64
        acc = gl.zeros([64, B1], gl.float32, mma)
        acc2 = acc
        if B2:
            acc2 = gl.zeros([64, B2], gl.float32, mmb)
        if FEW:
            acc, st, ph = few_rows(
                words, xs, full, empty, Q, pt, sub, lane, sa, sb, ta, tb, acc, st, ph, k0, k1, G,
                K, ROW, NC, ST, H, HC, ACC, BYTES, BF16, C0, C1, C2, C3, C4, DM, ZERO, SPG, ASM,
                REGS, AL, W6, WL, SB, mma,
            )  # fmt: skip
        else:
            acc, acc2, st, ph = many_rows(
                words, xs, xt, full, empty, Q, pt, sub, lane, sa, sb, ta, tb, acc, acc2, st, ph,
                k0, k1, G, K, ROW, NC, ST, H, HC, B2, GATHER, ACC, BYTES, BF16, C0, C1, C2,
                C3, C4, DM, ZERO, SPG, ASM, REGS, AL, AL2, W6, WL, SB, mma, mmb,
            )  # fmt: skip
        own = gl.num_programs(0) - 1 - gl.program_id(0)
        SIZE: gl.constexpr = 64 * BM
        if k0 > 0:
            slot = own * NC + ROW
            gl.store(sums(PART + slot * SIZE, B1, mma), acc)
            if B2:
                gl.store(sums(PART + slot * SIZE + 64 * B1, B2, mmb), acc2)
            barrier()
            gl.atomic_xchg(COUNT + slot, 1)
        else:
            for j in range(own + 1, own + 1 + other):
                slot = j * NC + ROW
                seen = gl.atomic_cas(COUNT + slot, 1, 0)
                while seen != 1:
                    seen = gl.atomic_cas(COUNT + slot, 1, 0)
                barrier()
                acc += gl.load(sums(PART + slot * SIZE, B1, mma), cache_modifier=".cg")
                if B2:
                    at = sums(PART + slot * SIZE + 64 * B1, B2, mmb)
                    acc2 += gl.load(at, cache_modifier=".cg")
        if s + 1 < count:  # the next first factors arrive while this tile is stored
            Q, pt, sa, sb, ta, tb = _begin(
                P, EXPERT, jw, sub, lane, s + 1, nm, nn, N, NP, G, K, ROW, NC, GN, SPG, C0,
                C1, C2, C3, C4,
            )  # fmt: skip
        if k0 == 0:
            V0 = shifted(ROW0, expert, NP, G, N, K, R0)
            V1 = shifted(ROW1, expert, NP, G, N, K, R1)
            B = BIAS
            if HAS_BIAS:
                B = BIAS + expert * N
            store(acc, V0, V1, B, Y, ORDER, m0, m1, n0, N, B1, BF16, R0, R1, HAS_BIAS,
                   not SORTED, mma)  # fmt: skip
            if B2:
                store(acc2, V0, V1, B, Y, ORDER, m0 + B1, m1, n0, N, B2, BF16, R0, R1, HAS_BIAS,
                       not SORTED, mmb)  # fmt: skip


@gluon.jit(do_not_specialize=["T", "G", "E", "TOP"])
def grouped(xd, xe, wd, X, S0, S1, Z, O0, O1, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER, COUNTS,
            BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, KX, TOP,
            B1: gl.constexpr, B2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr,
            GN: gl.constexpr, H: gl.constexpr, FEW: gl.constexpr,
            GATHER: gl.constexpr, SORTED: gl.constexpr,
            KEEP: gl.constexpr, FETCH: gl.constexpr, ACC: gl.constexpr, PDL: gl.constexpr,
            BYTES: gl.constexpr,
            BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr,
            C3: gl.constexpr, C4: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr,
            HAS_BIAS: gl.constexpr, ZERO: gl.constexpr, MODE: gl.constexpr, SPG: gl.constexpr,
            ASM: gl.constexpr, REGS: gl.constexpr):  # fmt: skip
    """Y [T, N]: row ORDER[i] is row i of what ``xd`` describes through the expert of its block;
    zeros in the rows of none. SORTED: row i instead, and the others stay as they are.

    GATHER: x is row ORDER[i] // TOP of X [., KX]; the descriptors only say how it lies in shared
    memory.

    ``wd`` describes the codes of all E experts as [E * NP / 16, words]. COUNTS, BLOCKS, EXPERT and
    BOUNDS are those of ``schedule``. KEEP and FETCH: registers of a thread of a consumer, and of
    those that fetch.
    """
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    S2: gl.constexpr = 2 if BYTES else 1
    xs = gl.allocate_shared_memory(ACT, [ST * H, B1, 64], xd.layout)
    xt = xs
    if B2:
        xt = gl.allocate_shared_memory(ACT, [ST * H, B2, 64], xe.layout)
    WT: gl.constexpr = wd.block_type.shape[0]
    HW: gl.constexpr = wd.block_type.shape[1]
    HC: gl.constexpr = H * 128 * S2 // HW  # copies of codes of a tile in a stage
    ws = gl.allocate_shared_memory(gl.int32, [ST * HC * NC * 4 // WT, WT, HW], wd.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    words = ws._reinterpret(gl.int32, [ST * HC * NC, 4, H * S2 // HC, 32, 4], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=129 if GATHER else 1)
        mbarrier.init(empty.index(i), count=NC)
    fence_async_shared()
    barrier()
    if PDL:
        gdc_launch_dependents()
    P = (S0, S1, Z, O0, O1)
    FW: gl.constexpr = 4 if GATHER else 1  # warps that fetch
    if NC == 2:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, 0, B1, B2, ST, NC,
                             GN, H, HC, FEW, ACC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                             HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GATHER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, 1, B1, B2, ST, NC,
                             GN, H, HC, FEW, ACC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                             HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GATHER, SORTED, PDL)),
                (_producer, (xd, xe, wd, X, xs, xt, ws, full, empty, ORDER, BLOCKS, EXPERT, BOUNDS,
                             NP, G, KX, TOP, B1, B2, ST, NC, GN, H, HC, GATHER, PDL)),
            ],
            [4, FW],
            [KEEP, FETCH],
        )  # fmt: skip
    elif NC == 3:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, 0, B1, B2, ST, NC,
                             GN, H, HC, FEW, ACC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                             HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GATHER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, 1, B1, B2, ST, NC,
                             GN, H, HC, FEW, ACC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                             HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GATHER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, 2, B1, B2, ST, NC,
                             GN, H, HC, FEW, ACC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                             HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GATHER, SORTED, PDL)),
                (_producer, (xd, xe, wd, X, xs, xt, ws, full, empty, ORDER, BLOCKS, EXPERT, BOUNDS,
                             NP, G, KX, TOP, B1, B2, ST, NC, GN, H, HC, GATHER, PDL)),
            ],
            [4, 4, FW],
            [KEEP, KEEP, FETCH],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, 0, B1, B2, ST, NC,
                             GN, H, HC, FEW, ACC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                             HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GATHER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, 1, B1, B2, ST, NC,
                             GN, H, HC, FEW, ACC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                             HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GATHER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, 2, B1, B2, ST, NC,
                             GN, H, HC, FEW, ACC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                             HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GATHER, SORTED, PDL)),
                (_consumer, (xs, xt, words, full, empty, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             COUNTS, BLOCKS, EXPERT, BOUNDS, T, N, NP, K, G, E, 3, B1, B2, ST, NC,
                             GN, H, HC, FEW, ACC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                             HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GATHER, SORTED, PDL)),
                (_producer, (xd, xe, wd, X, xs, xt, ws, full, empty, ORDER, BLOCKS, EXPERT, BOUNDS,
                             NP, G, KX, TOP, B1, B2, ST, NC, GN, H, HC, GATHER, PDL)),
            ],
            [4, 4, 4, FW],
            [KEEP, KEEP, KEEP, FETCH],
        )  # fmt: skip
