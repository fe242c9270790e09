"""Weights by 8-bit activations for many rows: one warp fetches x, two warpgroups multiply.

    y^T [N, M] = W [N, K] x^T    W in registers, x in shared memory, both of 8 bits for wgmma

As ``gluon_ws``, with the differences that 8 bits ask for. Sums of one group of columns are kept
apart and added to the total in float32 under the group's scale: the tensor cores' own sums of fp8
hold few bits, and int4 codes under their scale would not be 8-bit numbers. A consumer owns 64
output features of NH * BT tokens in NH halves, which take turns with one buffer of sums; the other
consumer multiplies meanwhile. It fetches its own codes into shared memory, WST groups ahead.
PARTIAL: blocks whose second half has no tokens compute the first alone.
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

__all__ = ["mixed_specialized"]


@gluon.jit
def _fetch(xd, xs, full, m0, k, st, BT: gl.constexpr, NH: gl.constexpr, USED: gl.constexpr):
    mbarrier.expect(full.index(st), xd.block_type.nbytes * USED)
    for h in gl.static_range(USED):
        tma.async_copy_global_to_shared(
            xd, [m0 + h * BT, k * 128], full.index(st), xs.index(st * NH + h)
        )


@gluon.jit
def _producer(xd, xs, full, empty, m0, m1, groups, BT: gl.constexpr, NH: gl.constexpr,
              PARTIAL: gl.constexpr, ST: gl.constexpr):  # fmt: skip
    st = 0
    ph = 1
    for k in range(groups):
        mbarrier.wait(empty.index(st), ph)
        if NH == 2 and PARTIAL:
            if m0 + BT < m1:
                _fetch(xd, xs, full, m0, k, st, BT, NH, 2)
            else:
                _fetch(xd, xs, full, m0, k, st, BT, NH, 1)
        else:
            _fetch(xd, xs, full, m0, k, st, BT, NH, NH)
        st += 1
        if st == ST:
            st = 0
            ph ^= 1


@gluon.jit
def _added(acc, d, raw0, raw1, C0: gl.constexpr, C1: gl.constexpr):
    """acc plus the sums of one piece under their scale."""
    if C0 == 7:
        return acc + d.to(gl.float32)
    else:
        return acc + d.to(gl.float32) * factor(raw0, raw1, C0, C1)[:, None]


@gluon.jit
def _multiply(a, b, acc, d, raw0, raw1, C0: gl.constexpr, C1: gl.constexpr, INT: gl.constexpr):
    """acc plus the scaled product of a group, and the buffer ``d`` of that product."""
    if INT and C0 == 7:  # whole sums of integers are exact
        return warpgroup_mma_wait(0, deps=(warpgroup_mma(a, b, acc, is_async=True),)), d
    else:
        d = warpgroup_mma_wait(0, deps=(warpgroup_mma(a, b, d, use_acc=False, is_async=True),))
        return _added(acc, d, raw0, raw1, C0, C1), d


@gluon.jit
def _store(acc, h, Y, ORDER, SX, ROW0, ROW1, BIAS, M, N, n0, m0, mma: gl.constexpr,
           BT: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr,
           POWER: gl.constexpr, GROUPED: gl.constexpr):  # fmt: skip
    ACT: gl.constexpr = Y.dtype.element_ty
    rn = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    rm = m0 + h * BT + gl.arange(0, BT, layout=gl.SliceLayout(0, mma))
    acc = outer(acc, SX, ROW0, ROW1, BIAS, rn, rm, N, M, R0, R1, HAS_BIAS, POWER)
    OL: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    y = gl.convert_layout(acc.to(ACT), OL)
    on = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OL))
    om = m0 + h * BT + gl.arange(0, BT, layout=gl.SliceLayout(0, OL))
    to = om
    if GROUPED:
        to = gl.load(ORDER + om, mask=om < M, other=0)
    gl.store(Y + to[None, :].to(gl.int64) * N + on[:, None], y,
             mask=(om < M)[None, :] & (on < N)[:, None])  # fmt: skip


@gluon.jit
def _halves(xs, ws, full, empty, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, ORDER, M, N, NP, G, groups,
            pn, m0, USED: gl.constexpr, ROW: gl.constexpr, BT: gl.constexpr, NH: gl.constexpr,
            ST: gl.constexpr, WST: gl.constexpr, NC: gl.constexpr, SUB: gl.constexpr,
            BYTES: gl.constexpr, INT: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
            R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr, ASM: gl.constexpr,
            POWER: gl.constexpr, GROUPED: gl.constexpr):  # fmt: skip
    """64 output features of the first USED of NH halves."""
    WG: gl.constexpr = 2048 if BYTES else 1024  # bytes of a group of a tile
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    KEEP: gl.constexpr = gl.int32 if (INT and C0 == 7) else gl.float32
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
    # tiles beyond the last are computed again from the last one and not stored
    n0 = (pn * NC + ROW) * 64
    rt = gl.minimum(n0 // 16 + iw, NP // 16 - 1)
    Wp = W + (rt.to(gl.int64)[:, None, None, None] * G * WG + ip[None, :, None, None] * 512
              + il[None, None, :, None] * 16 + ie[None, None, None, :])  # fmt: skip
    rows = gl.minimum(n0 + gl.arange(0, 64, layout=RL), NP - 1)
    at0 = factor_offsets(rows, G, C0)
    at1 = factor_offsets(rows, G, C1)

    for i in gl.static_range(WST):
        if i < groups:
            async_copy.async_copy_global_to_shared(ws.index(ROW * WST + i), Wp + i * WG)
        async_copy.commit_group()
    later = raw_factors(S0, S1, at0, at1, 0, G, rows, SUB, C0, C1)
    d = gl.zeros([64, BT], SUM, mma)
    e = d
    acc0 = gl.zeros([64, BT], KEEP, mma)
    acc1 = acc0
    st = 0
    ph = 0
    wt = 0
    for g in range(groups):
        raw = later
        later = raw_factors(S0, S1, at0, at1, g + 1, G, rows, SUB, C0, C1)
        async_copy.wait_group(WST - 1)
        words = ws.index(ROW * WST + wt)
        PW: gl.constexpr = 128 // SUB
        a = operand(piece(words, 4, 0, SUB, BYTES), 64, PW, INT, BYTES, ASM, AL)
        mbarrier.wait(full.index(st), ph)
        if SUB == 1:
            x0 = xs.index(st * NH).permute((1, 0))
            acc0, d = _multiply(a, x0, acc0, d, raw[0], raw[1], C0, C1, INT)
            if USED == 2:
                x1 = xs.index(st * NH + 1).permute((1, 0))
                acc1, d = _multiply(a, x1, acc1, d, raw[0], raw[1], C0, C1, INT)
        else:  # a piece is multiplied while the sums of the one before are scaled
            gl.static_assert(NH == 1)
            x = xs.index(st)
            now = warpgroup_mma(
                a, x.slice(0, PW, dim=1).permute((1, 0)), d, use_acc=False, is_async=True
            )
            for j in gl.static_range(1, SUB):
                a = operand(piece(words, 4, j, SUB, BYTES), 64, PW, INT, BYTES, ASM, AL)
                part = x.slice(j * PW, PW, dim=1).permute((1, 0))
                after = warpgroup_mma(a, part, e, use_acc=False, is_async=True)
                d = warpgroup_mma_wait(1, deps=(now,))
                acc0 = _added(acc0, d, raw[2 * j - 2], raw[2 * j - 1], C0, C1)
                e = d
                now = after
            d = warpgroup_mma_wait(0, deps=(now,))
            acc0 = _added(acc0, d, raw[2 * SUB - 2], raw[2 * SUB - 1], C0, C1)
        mbarrier.arrive(empty.index(st), count=1)
        if g + WST < groups:
            async_copy.async_copy_global_to_shared(words, Wp + (g + WST) * WG)
        async_copy.commit_group()
        st += 1
        if st == ST:
            st = 0
            ph ^= 1
        wt = gl.where(wt + 1 == WST, 0, wt + 1)
    async_copy.wait_group(0)
    _store(acc0, 0, Y, ORDER, SX, ROW0, ROW1, BIAS, M, N, n0, m0, mma, BT, R0, R1, HAS_BIAS, POWER,
           GROUPED)  # fmt: skip
    if USED == 2:
        _store(acc1, 1, Y, ORDER, SX, ROW0, ROW1, BIAS, M, N, n0, m0, mma, BT, R0, R1, HAS_BIAS,
               POWER, GROUPED)  # fmt: skip


@gluon.jit
def _consumer(xs, ws, full, empty, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, ORDER, M, N, NP, G, groups,
              pn, m0, ROW: gl.constexpr, BT: gl.constexpr, NH: gl.constexpr, ST: gl.constexpr,
              WST: gl.constexpr, NC: gl.constexpr, SUB: gl.constexpr, BYTES: gl.constexpr,
              INT: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, R0: gl.constexpr,
              R1: gl.constexpr, HAS_BIAS: gl.constexpr, ASM: gl.constexpr, POWER: gl.constexpr,
              GROUPED: gl.constexpr, PARTIAL: gl.constexpr):  # fmt: skip
    if NH == 2 and PARTIAL:
        if m0 + BT < M:
            _halves(xs, ws, full, empty, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, ORDER, M, N, NP, G,
                    groups, pn, m0, 2, ROW, BT, NH, ST, WST, NC, SUB, BYTES, INT, C0, C1, R0, R1,
                    HAS_BIAS, ASM, POWER, GROUPED)  # fmt: skip
        else:  # the second half is left out where it has no tokens
            _halves(xs, ws, full, empty, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, ORDER, M, N, NP, G,
                    groups, pn, m0, 1, ROW, BT, NH, ST, WST, NC, SUB, BYTES, INT, C0, C1, R0, R1,
                    HAS_BIAS, ASM, POWER, GROUPED)  # fmt: skip
    else:
        _halves(xs, ws, full, empty, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, ORDER, M, N, NP, G,
                groups, pn, m0, NH, ROW, BT, NH, ST, WST, NC, SUB, BYTES, INT, C0, C1, R0, R1,
                HAS_BIAS, ASM, POWER, GROUPED)  # fmt: skip


@gluon.jit(do_not_specialize=["M", "G"])  # Triton 3.6 fails on a loop of one round
def mixed_specialized(xd, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, ORDER, EXPERT, BOUNDS, M, N, NP, G,
                      BT: gl.constexpr, NH: gl.constexpr, ST: gl.constexpr, WST: gl.constexpr,
                      GN: gl.constexpr, GROUPED: gl.constexpr, PARTIAL: gl.constexpr,
                      PDL: gl.constexpr, SUB: gl.constexpr, BYTES: gl.constexpr,
                      INT: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, R0: gl.constexpr,
                      R1: gl.constexpr, HAS_BIAS: gl.constexpr, ASM: gl.constexpr,
                      POWER: gl.constexpr):  # fmt: skip
    ELEMENT: gl.constexpr = gl.int8 if INT else gl.float8e4nv
    NC: gl.constexpr = 2
    WG: gl.constexpr = 2048 if BYTES else 1024
    BM: gl.constexpr = BT * NH
    pid = gl.program_id(0)
    nm = gl.cdiv(M, BM)
    nn = gl.cdiv(NP, NC * 64)
    gid = pid // (GN * nm)
    first = gid * GN
    size = gl.minimum(nn - first, GN)
    pn = first + (pid % (GN * nm)) % size
    pm = (pid % (GN * nm)) // size
    m0 = pm * BM
    m1 = M
    groups = G
    if GROUPED:  # a block of rows of one expert; -1: none, nothing is read or stored
        expert = gl.load(EXPERT + pm)
        m0 = gl.load(BOUNDS + 2 * pm)
        m1 = gl.where(expert < 0, m0, gl.load(BOUNDS + 2 * pm + 1))
        groups = gl.where(expert < 0, 0, G)
        expert = gl.maximum(expert, 0)
        W = W + expert.to(gl.int64) * ((NP // 16) * G * WG)
        S0 = moved(S0, expert, NP, G, C0)
        S1 = moved(S1, expert, NP, G, C1)
        ROW0 = moved(ROW0, expert, NP, G, R0)
        ROW1 = moved(ROW1, expert, NP, G, R1)
        if HAS_BIAS:
            BIAS = BIAS + expert * N
    xs = gl.allocate_shared_memory(ELEMENT, [ST * NH, BT, 128], xd.layout)
    WS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    ws = gl.allocate_shared_memory(gl.int8, [NC * WST, 4, WG // 512, 32, 16], WS)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=NC)
    fence_async_shared()
    barrier()
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gl.warp_specialize(
        [
            (_consumer, (xs, ws, full, empty, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, ORDER, m1, N, NP,
                         G, groups, pn, m0, 0, BT, NH, ST, WST, NC, SUB, BYTES, INT, C0,
                         C1, R0, R1, HAS_BIAS, ASM, POWER, GROUPED, PARTIAL)),
            (_consumer, (xs, ws, full, empty, W, S0, S1, ROW0, ROW1, BIAS, SX, Y, ORDER, m1, N, NP,
                         G, groups, pn, m0, 1, BT, NH, ST, WST, NC, SUB, BYTES, INT, C0,
                         C1, R0, R1, HAS_BIAS, ASM, POWER, GROUPED, PARTIAL)),
            (_producer, (xd, xs, full, empty, m0, m1, groups, BT, NH, PARTIAL, ST)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
