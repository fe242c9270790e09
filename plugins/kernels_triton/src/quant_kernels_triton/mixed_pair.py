"""Weights by 8-bit activations for some hundred rows: two warpgroups share the columns of a tile.

    y^T [N, M] = W [N, K] x^T    W in registers, x in shared memory, both of 8 bits for wgmma

As ``mixed_ws``, for layers with too few tiles to fill the card: a block computes 64 output features
of BT tokens, its consumers take the groups of 128 columns in turn, and the first adds up both sums.
SPLIT blocks share the columns besides; the last one adds up what all have stored.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quant_kernels_triton.gluon_parts import barrier, gdc_launch_dependents, gdc_wait
from quant_kernels_triton.mixed_parts import (
    factor_offsets,
    operand,
    outer,
    piece,
    raw_factors,
)
from quant_kernels_triton.mixed_ws import _added, _fetch

__all__ = ["mixed_pair"]


@gluon.jit
def _producer(xd, xs, full, empty, m0, k0, k1, PDL: gl.constexpr, BT: gl.constexpr,
              ST: gl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
    st = 0
    ph = 1
    for k in range(k0, k1):
        mbarrier.wait(empty.index(st), ph)
        _fetch(xd, xs, full, m0, k, st, BT, 1, 1)
        st += 1
        if st == ST:
            st = 0
            ph ^= 1


@gluon.jit
def _consumer(xs, ws, sums, full, empty, done, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART, COUNT, M,
              N, NP, G, k0, k1, pn, m0, tile, part, ROW: gl.constexpr, PDL: gl.constexpr,
              SPLIT: gl.constexpr, BT: gl.constexpr, ST: gl.constexpr, WST: gl.constexpr,
              SUB: gl.constexpr, BYTES: gl.constexpr, INT: gl.constexpr, C0: gl.constexpr,
              C1: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr,
              ASM: gl.constexpr, POWER: gl.constexpr):  # fmt: skip
    WG: gl.constexpr = 2048 if BYTES else 1024  # bytes of a group of a tile
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    WHOLE: gl.constexpr = INT and C0 == 7  # whole sums of integers are exact
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BT, 32]
    )
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    RL: gl.constexpr = gl.SliceLayout(1, mma)
    WL: gl.constexpr = gl.BlockedLayout([1, 1, 1, 16], [1, 1, 32, 1], [4, 1, 1, 1], [3, 2, 1, 0])
    iw = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    ip = gl.arange(0, WG // 512, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    il = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WL))))
    ie = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WL))))
    n0 = pn * 64
    rt = gl.minimum(n0 // 16 + iw, NP // 16 - 1)
    Wp = W + (rt.to(gl.int64)[:, None, None, None] * G * WG + ip[None, :, None, None] * 512
              + il[None, None, :, None] * 16 + ie[None, None, None, :])  # fmt: skip
    rows = gl.minimum(n0 + gl.arange(0, 64, layout=RL), NP - 1)
    at0 = factor_offsets(rows, G, C0)
    at1 = factor_offsets(rows, G, C1)
    first = k0 + ROW
    for i in gl.static_range(WST):
        if first + 2 * i < k1:
            async_copy.async_copy_global_to_shared(
                ws.index(ROW * WST + i), Wp + (first + 2 * i) * WG
            )
        async_copy.commit_group()
    later = raw_factors(S0, S1, at0, at1, first, G, rows, SUB, C0, C1)
    d = gl.zeros([64, BT], SUM, mma)
    acc = gl.zeros([64, BT], SUM if WHOLE else gl.float32, mma)
    st = ROW
    ph = 0
    wt = 0
    PW: gl.constexpr = 128 // SUB
    for g in range(first, k1, 2):
        raw = later
        later = raw_factors(S0, S1, at0, at1, g + 2, G, rows, SUB, C0, C1)
        async_copy.wait_group(WST - 1)
        words = ws.index(ROW * WST + wt)
        a = operand(piece(words, 4, 0, SUB, BYTES), 64, PW, INT, BYTES, ASM, AL)
        mbarrier.wait(full.index(st), ph)
        for j in gl.static_range(SUB):
            x = xs.index(st).slice(j * PW, PW, dim=1).permute((1, 0))
            if WHOLE:
                t = warpgroup_mma(a, x, acc, is_async=True)
            else:
                t = warpgroup_mma(a, x, d, use_acc=False, is_async=True)
            if j + 1 < SUB:
                a = operand(piece(words, 4, j + 1, SUB, BYTES), 64, PW, INT, BYTES, ASM, AL)
            if WHOLE:
                acc = warpgroup_mma_wait(0, deps=(t,))
            else:
                d = warpgroup_mma_wait(0, deps=(t,))
                acc = _added(acc, d, raw[2 * j], raw[2 * j + 1], C0, C1)
        mbarrier.arrive(empty.index(st), count=1)
        if g + 2 * WST < k1:
            async_copy.async_copy_global_to_shared(words, Wp + (g + 2 * WST) * WG)
        async_copy.commit_group()
        st += 2
        if st >= ST:
            st -= ST
            ph ^= 1
        wt = gl.where(wt + 1 == WST, 0, wt + 1)
    async_copy.wait_group(0)
    if ROW == 1:
        sums.store(acc)
        mbarrier.arrive(done, count=1)
    else:
        mbarrier.wait(done, 0)
        acc += sums.load(mma)
        on = n0 + gl.arange(0, 64, layout=RL)
        om = m0 + gl.arange(0, BT, layout=gl.SliceLayout(0, mma))
        at = om[None, :].to(gl.int64) * N + on[:, None]
        mask = (om < M)[None, :] & (on < N)[:, None]
        if PDL:  # SX and the buffers of sums belong to kernels before until they have ended
            gdc_wait()
        if SPLIT == 1:
            y = outer(acc, SX, ROW0, ROW1, BIAS, on, om, N, M, R0, R1, HAS_BIAS, POWER)
            gl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)
        else:
            base = PART + tile.to(gl.int64) * (SPLIT * 64 * BT)
            own = gl.arange(0, 64, layout=RL)[:, None] * BT
            own += gl.arange(0, BT, layout=gl.SliceLayout(0, mma))[None, :]
            gl.store(base + part * (64 * BT) + own, acc.to(gl.float32))
            barrier()
            arrived = gl.atomic_add(COUNT + tile, 1)
            if arrived == SPLIT - 1:
                barrier()
                total = gl.zeros([64, BT], gl.float32, mma)
                for source in gl.static_range(SPLIT):
                    total += gl.load(base + source * (64 * BT) + own, cache_modifier=".cg")
                y = outer(total, SX, ROW0, ROW1, BIAS, on, om, N, M, R0, R1, HAS_BIAS, POWER)
                gl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)
                gl.store(COUNT + tile, 0)


@gluon.jit(do_not_specialize=["M", "G"])
def mixed_pair(xd, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART, COUNT, M, N, NP, G,
               BT: gl.constexpr, ST: gl.constexpr, WST: gl.constexpr, SPLIT: gl.constexpr,
               GN: gl.constexpr, PDL: gl.constexpr, SUB: gl.constexpr, BYTES: gl.constexpr,
               INT: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, R0: gl.constexpr,
               R1: gl.constexpr, HAS_BIAS: gl.constexpr, ASM: gl.constexpr,
               POWER: gl.constexpr):  # fmt: skip
    ELEMENT: gl.constexpr = gl.int8 if INT else gl.float8e4nv
    SUM: gl.constexpr = gl.int32 if INT and C0 == 7 else gl.float32
    WG: gl.constexpr = 2048 if BYTES else 1024
    gl.static_assert(ST % 2 == 0)
    pid = gl.program_id(0)
    tile = pid // SPLIT
    part = pid % SPLIT
    per = gl.cdiv(G, SPLIT)
    k0 = part * per
    k1 = gl.minimum(k0 + per, G)
    nm = gl.cdiv(M, BT)
    nn = gl.cdiv(NP, 64)
    gid = tile // (GN * nm)
    first = gid * GN
    size = gl.minimum(nn - first, GN)
    pn = first + (tile % (GN * nm)) % size
    m0 = (tile % (GN * nm)) // size * BT
    xs = gl.allocate_shared_memory(ELEMENT, [ST, BT, 128], xd.layout)
    WS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    ws = gl.allocate_shared_memory(gl.int8, [2 * WST, 4, WG // 512, 32, 16], WS)
    SS: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    sums = gl.allocate_shared_memory(SUM, [64, BT], SS)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(done, count=1)
    fence_async_shared()
    barrier()
    if PDL:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_consumer, (xs, ws, sums, full, empty, done, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART,
                         COUNT, M, N, NP, G, k0, k1, pn, m0, tile, part, 0, PDL, SPLIT, BT, ST,
                         WST, SUB, BYTES, INT, C0, C1, R0, R1, HAS_BIAS, ASM, POWER)),
            (_consumer, (xs, ws, sums, full, empty, done, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART,
                         COUNT, M, N, NP, G, k0, k1, pn, m0, tile, part, 1, PDL, SPLIT, BT, ST,
                         WST, SUB, BYTES, INT, C0, C1, R0, R1, HAS_BIAS, ASM, POWER)),
            (_producer, (xd, xs, full, empty, m0, k0, k1, PDL, BT, ST)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
