"""Weights by 8-bit activations for some tens of rows: a ring of stages filled ahead.

    y^T [N, M] = W [N, K] x^T    W in registers, x in shared memory, both of 8 bits for wgmma

A block computes 16 * NW output features (one warp per tile of 16) of BM tokens. A stage of the ring
holds 128 columns: x by TMA, codes by cp.async. The sums of each piece (the columns under one scale)
are added to the total under their scale; other blocks of the multiprocessor multiply meanwhile. The
weights of the first stages are fetched before the kernel that quantizes x has ended.

GROUPED and SPLIT are those of ``gluon_ring``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quant_kernels_triton.gluon_parts import barrier, gdc_launch_dependents, gdc_wait
from quant_kernels_triton.mixed_parts import (
    factor,
    factor_offsets,
    moved,
    operand,
    outer,
    piece,
    raw_factors,
)

__all__ = ["mixed_ring"]


@gluon.jit
def _fetch_x(xd, xs, bar, m0, g, st, SUB: gl.constexpr):
    mbarrier.expect(bar.index(st), xd.block_type.nbytes)
    tma.async_copy_global_to_shared(xd, [m0, g * 128], bar.index(st), xs.index(st))


@gluon.jit(do_not_specialize=["M", "G"])  # Triton 3.6 fails on a loop of one round
def mixed_ring(xd, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART, COUNT, ORDER, EXPERT, BOUNDS,
               M, N, NP, G,
               BM: gl.constexpr, NW: gl.constexpr, ST: gl.constexpr, SPLIT: gl.constexpr,
               GN: gl.constexpr, GROUPED: gl.constexpr, PDL: gl.constexpr, SUB: gl.constexpr,
               BYTES: gl.constexpr, INT: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
               R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr, ASM: gl.constexpr,
               POWER: gl.constexpr):  # fmt: skip
    BN: gl.constexpr = NW * 16
    WG: gl.constexpr = 2048 if BYTES else 1024  # bytes of a group of a tile
    ELEMENT: gl.constexpr = gl.int8 if INT else gl.float8e4nv
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    WHOLE: gl.constexpr = INT and C0 == 7  # whole sums of integers are exact
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BM, 32]
    )
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    RL: gl.constexpr = gl.SliceLayout(1, mma)
    WL: gl.constexpr = gl.BlockedLayout([1, 1, 1, 16], [1, 1, 32, 1], [NW, 1, 1, 1], [3, 2, 1, 0])
    nm = gl.cdiv(M, BM)
    nn = gl.cdiv(NP, BN)
    pid = gl.program_id(0)
    tile = pid // SPLIT
    part = pid % SPLIT
    per = gl.cdiv(G, SPLIT)
    k0 = part * per
    k1 = gl.minimum(k0 + per, G)
    gid = tile // (GN * nm)
    first = gid * GN
    size = gl.minimum(nn - first, GN)
    pn = first + (tile % (GN * nm)) % size
    pm = (tile % (GN * nm)) // size
    m0 = pm * BM
    m1 = M
    if GROUPED:  # a block of rows of one expert; -1: none, nothing is read or stored
        expert = gl.load(EXPERT + pm)
        m0 = gl.load(BOUNDS + 2 * pm)
        m1 = gl.where(expert < 0, m0, gl.load(BOUNDS + 2 * pm + 1))
        k1 = gl.where(expert < 0, k0, k1)
        expert = gl.maximum(expert, 0)
        W = W + expert.to(gl.int64) * ((NP // 16) * G * WG)
        S0 = moved(S0, expert, NP, G, C0)
        S1 = moved(S1, expert, NP, G, C1)
        ROW0 = moved(ROW0, expert, NP, G, R0)
        ROW1 = moved(ROW1, expert, NP, G, R1)
        if HAS_BIAS:
            BIAS = BIAS + expert * N

    WS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    xs = gl.allocate_shared_memory(ELEMENT, [ST, BM, 128], xd.layout)
    ws = gl.allocate_shared_memory(gl.int8, [ST, NW, WG // 512, 32, 16], WS)
    bar = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(bar.index(i), count=1)
    fence_async_shared()
    barrier()

    iw = gl.arange(0, NW, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    ip = gl.arange(0, WG // 512, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    il = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WL))))
    ie = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WL))))
    # tiles beyond the last are computed again from the last one and not stored
    rt = gl.minimum(pn * NW + iw, NP // 16 - 1)
    wp = W + (rt.to(gl.int64)[:, None, None, None] * G * WG + ip[None, :, None, None] * 512
              + il[None, None, :, None] * 16 + ie[None, None, None, :])  # fmt: skip
    rows = gl.minimum(pn * BN + gl.arange(0, BN, layout=RL), NP - 1)
    at0 = factor_offsets(rows, G, C0)
    at1 = factor_offsets(rows, G, C1)

    if PDL:  # weights do not depend on the previous kernel: only x has to wait for it
        gdc_launch_dependents()
    for i in gl.static_range(ST):
        if k0 + i < k1:
            async_copy.async_copy_global_to_shared(ws.index(i), wp + (k0 + i) * WG)
        async_copy.commit_group()
    raw = raw_factors(S0, S1, at0, at1, k0, G, rows, SUB, C0, C1)
    later = raw_factors(S0, S1, at0, at1, k0 + 1, G, rows, SUB, C0, C1)
    if PDL:
        gdc_wait()
    for i in gl.static_range(ST):
        if k0 + i < k1:
            _fetch_x(xd, xs, bar, m0, k0 + i, i, SUB)

    acc = gl.zeros([BN, BM], SUM if WHOLE else gl.float32, mma)
    d = gl.zeros([BN, BM], SUM, mma)
    st = 0
    ph = 0
    for k in range(k0, k1):
        soon = raw_factors(S0, S1, at0, at1, k + 2, G, rows, SUB, C0, C1)
        async_copy.wait_group(ST - 1)
        words = ws.index(st)
        a = operand(piece(words, NW, 0, SUB, BYTES), BN, 128 // SUB, INT, BYTES, ASM, AL)
        mbarrier.wait(bar.index(st), ph)
        for j in gl.static_range(SUB):
            x = xs.index(st).slice(j * (128 // SUB), 128 // SUB, dim=1).permute((1, 0))
            if WHOLE:
                t = warpgroup_mma(a, x, acc, is_async=True)
            else:
                t = warpgroup_mma(a, x, d, use_acc=False, is_async=True)
            if j + 1 < SUB:
                a = operand(
                    piece(words, NW, j + 1, SUB, BYTES), BN, 128 // SUB, INT, BYTES, ASM, AL
                )
            if WHOLE:
                acc = warpgroup_mma_wait(0, deps=(t,))
            else:
                d = warpgroup_mma_wait(0, deps=(t,))
                if C0 == 7:
                    acc += d.to(gl.float32)
                else:
                    acc += d.to(gl.float32) * factor(raw[2 * j], raw[2 * j + 1], C0, C1)[:, None]
        raw = later
        later = soon
        barrier()
        if k + ST < k1:
            _fetch_x(xd, xs, bar, m0, k + ST, st, SUB)
            async_copy.async_copy_global_to_shared(words, wp + (k + ST) * WG)
        async_copy.commit_group()
        st += 1
        if st == ST:
            st = 0
            ph ^= 1

    on = pn * BN + gl.arange(0, BN, layout=RL)
    om = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, mma))
    to = om
    if GROUPED:
        to = gl.load(ORDER + om, mask=om < m1, other=0)
    at = to[None, :].to(gl.int64) * N + on[:, None]
    mask = (om < m1)[None, :] & (on < N)[:, None]
    ACT: gl.constexpr = Y.dtype.element_ty
    if SPLIT == 1:
        acc = outer(acc, SX, ROW0, ROW1, BIAS, on, om, N, m1, R0, R1, HAS_BIAS, POWER)
        gl.store(Y + at, acc.to(ACT), mask=mask)
    else:
        extent = M.to(gl.int64) * N
        gl.store(PART + part * extent + at, acc.to(gl.float32), mask=mask)
        barrier()
        arrived = gl.atomic_add(COUNT + tile, 1)
        if arrived == SPLIT - 1:
            barrier()
            total = gl.zeros([BN, BM], gl.float32, mma)
            for source in range(SPLIT):
                total += gl.load(
                    PART + source * extent + at, mask=mask, other=0.0, cache_modifier=".cg"
                )
            total = outer(total, SX, ROW0, ROW1, BIAS, on, om, N, m1, R0, R1, HAS_BIAS, POWER)
            gl.store(Y + at, total.to(ACT), mask=mask)
            gl.store(COUNT + tile, 0)
    async_copy.wait_group(0)
