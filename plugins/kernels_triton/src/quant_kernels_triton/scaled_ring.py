"""8-bit codes by 8-bit codes on Hopper, both as they lie in memory: a ring of stages filled ahead.

    y^T [N, M] = W [N, K] x^T    W and x from shared memory, where TMA puts them

A block computes 16 * NW output features of BM tokens. A stage of the ring holds KS groups of 128
columns of both. The weights of the first stages are fetched before the kernel that quantizes x has
ended. Sums of 128 columns of fp8 are added in float32 outside the tensor cores, whose own sums keep
fewer bits; sums of integers run over all columns. BLOCKED: scales of 128 x 128 weights and of 128
columns of a token, which apply to these sums.

SPLIT blocks share the columns; the last one adds up what all have stored.
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

from quant_kernels_triton.gluon_parts import barrier, gdc_launch_dependents, gdc_wait

__all__ = ["scaled_ring"]


@gluon.jit
def _fetch(d, shared, bar, row, g, st, KS: gl.constexpr):
    for j in gl.static_range(KS):
        tma.async_copy_global_to_shared(
            d, [row, (g + j) * 128], bar.index(st), shared.index(st * KS + j)
        )


@gluon.jit
def _scales(SX, SW, sw_at, om, g, M, G, BLOCKED: gl.constexpr):
    """Scales of a group: of its tokens, and of the block's features."""
    if BLOCKED:
        at = gl.minimum(g, G - 1)
        sx = gl.load(SX + at * M + om, mask=om < M, other=0.0)
        return sx, gl.load(SW + sw_at + at).to(gl.float32)
    else:
        return om, om


@gluon.jit
def _added(acc, d, sx, sw, BLOCKED: gl.constexpr):
    if BLOCKED:
        return acc + d * (sx * sw)[None, :]
    else:
        return acc + d


@gluon.jit
def _finished(acc, SX, SW, BIAS, on, om, N, M, BLOCKED: gl.constexpr, SINGLE: gl.constexpr,
              HAS_BIAS: gl.constexpr):  # fmt: skip
    """acc [features, tokens] under the scales of rows and tokens, plus the bias."""
    y = acc.to(gl.float32)
    if not BLOCKED:
        sx = gl.load(SX + om, mask=om < M, other=0.0)
        if SINGLE:
            y = y * (sx * gl.load(SW).to(gl.float32))[None, :]
        else:
            sw = gl.load(SW + on, mask=on < N, other=0.0).to(gl.float32)
            y = y * sw[:, None] * sx[None, :]
    if HAS_BIAS:
        y += gl.load(BIAS + on, mask=on < N, other=0.0).to(gl.float32)[:, None]
    return y


@gluon.jit
def _store(y, Y, n0, m0, N, M, BN: gl.constexpr, BM: gl.constexpr, NW: gl.constexpr):
    OL: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [NW // 4, 4], [0, 1])
    v = gl.convert_layout(y.to(Y.dtype.element_ty), OL)
    on = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, OL))
    om = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, OL))
    at = om[None, :].to(gl.int64) * N + on[:, None]
    gl.store(Y + at, v, mask=(om < M)[None, :] & (on < N)[:, None])


@gluon.jit(do_not_specialize=["M", "G"])  # Triton 3.6 fails on a loop of one round
def scaled_ring(wd, xd, SW, SX, BIAS, Y, PART, COUNT, M, N, G,
                BM: gl.constexpr, NW: gl.constexpr, KS: gl.constexpr, ST: gl.constexpr,
                SPLIT: gl.constexpr, GN: gl.constexpr, PDL: gl.constexpr, INT: gl.constexpr,
                BLOCKED: gl.constexpr, SINGLE: gl.constexpr, HAS_BIAS: gl.constexpr):  # fmt: skip
    BN: gl.constexpr = NW * 16
    AHEAD: gl.constexpr = BM <= 64  # whether registers hold the scales of two steps
    ELEMENT: gl.constexpr = gl.int8 if INT else gl.float8e4nv
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BM, 32]
    )
    nm = gl.cdiv(M, BM)
    nn = gl.cdiv(N, BN)
    pid = gl.program_id(0)
    tile = pid // SPLIT
    part = pid % SPLIT
    steps = gl.cdiv(G, KS)
    per = gl.cdiv(steps, SPLIT)
    k0 = part * per
    k1 = gl.minimum(k0 + per, steps)
    gid = tile // (GN * nm)
    first = gid * GN
    size = gl.minimum(nn - first, GN)
    n0 = (first + (tile % (GN * nm)) % size) * BN
    m0 = (tile % (GN * nm)) // size * BM

    ws = gl.allocate_shared_memory(ELEMENT, [ST * KS, BN, 128], wd.layout)
    xs = gl.allocate_shared_memory(ELEMENT, [ST * KS, BM, 128], xd.layout)
    bar = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(bar.index(i), count=1)
    fence_async_shared()
    barrier()

    BYTES: gl.constexpr = (BN + BM) * 128 * KS
    if PDL:  # weights do not depend on the previous kernel: only x has to wait for it
        gdc_launch_dependents()
    for i in gl.static_range(ST):
        if k0 + i < k1:
            mbarrier.expect(bar.index(i), BYTES)
            _fetch(wd, ws, bar, n0, (k0 + i) * KS, i, KS)
    if PDL:
        gdc_wait()
    for i in gl.static_range(ST):
        if k0 + i < k1:
            _fetch(xd, xs, bar, m0, (k0 + i) * KS, i, KS)

    on = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, mma))
    om = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, mma))
    sw_at = gl.minimum(n0, N - 1) // 128 * G
    acc = gl.zeros([BN, BM], SUM, mma)
    d = gl.zeros([BN, BM], SUM, mma)
    e = d
    sx0, sw0 = _scales(SX, SW, sw_at, om, k0 * KS, M, G, BLOCKED)
    sx1, sw1 = sx0, sw0
    if KS == 2:
        sx1, sw1 = _scales(SX, SW, sw_at, om, k0 * KS + 1, M, G, BLOCKED)
    st = 0
    ph = 0
    for k in range(k0, k1):
        mbarrier.wait(bar.index(st), ph)
        x = xs.index(st * KS).permute((1, 0))
        if INT:
            t = warpgroup_mma(ws.index(st * KS), x, acc, is_async=True)
        else:
            t = warpgroup_mma(ws.index(st * KS), x, d, use_acc=False, is_async=True)
        if KS == 2:
            v = xs.index(st * KS + 1).permute((1, 0))
            if INT:
                t = warpgroup_mma(ws.index(st * KS + 1), v, t, is_async=True)
            else:
                u = warpgroup_mma(ws.index(st * KS + 1), v, e, use_acc=False, is_async=True)
        if AHEAD:
            px0, pw0, px1, pw1 = sx0, sw0, sx1, sw1
            sx0, sw0 = _scales(SX, SW, sw_at, om, (k + 1) * KS, M, G, BLOCKED)
            if KS == 2:
                sx1, sw1 = _scales(SX, SW, sw_at, om, (k + 1) * KS + 1, M, G, BLOCKED)
        else:
            px0, pw0 = _scales(SX, SW, sw_at, om, k * KS, M, G, BLOCKED)
        if k > k0:  # meanwhile the stage before is filled again
            barrier()
            if k - 1 + ST < k1:
                free = gl.where(st == 0, ST - 1, st - 1)
                mbarrier.expect(bar.index(free), BYTES)
                _fetch(wd, ws, bar, n0, (k - 1 + ST) * KS, free, KS)
                _fetch(xd, xs, bar, m0, (k - 1 + ST) * KS, free, KS)
        if INT:
            acc = warpgroup_mma_wait(0, deps=(t,))
        else:
            if KS == 2:
                d = warpgroup_mma_wait(1, deps=(t,))
                acc = _added(acc, d, px0, pw0, BLOCKED)
                if not AHEAD:
                    px1, pw1 = _scales(SX, SW, sw_at, om, k * KS + 1, M, G, BLOCKED)
                e = warpgroup_mma_wait(0, deps=(u,))
                acc = _added(acc, e, px1, pw1, BLOCKED)
            else:
                d = warpgroup_mma_wait(0, deps=(t,))
                acc = _added(acc, d, px0, pw0, BLOCKED)
        st += 1
        if st == ST:
            st = 0
            ph ^= 1

    if SPLIT == 1:
        y = _finished(acc, SX, SW, BIAS, on, om, N, M, BLOCKED, SINGLE, HAS_BIAS)
        _store(y, Y, n0, m0, N, M, BN, BM, NW)
    else:
        base = PART + tile.to(gl.int64) * (SPLIT * BN * BM)
        rows = gl.arange(0, BN, layout=gl.SliceLayout(1, mma))
        columns = gl.arange(0, BM, layout=gl.SliceLayout(0, mma))
        at = rows[:, None] * BM + columns[None, :]
        gl.store(base + part * (BN * BM) + at, acc.to(gl.float32))
        barrier()
        arrived = gl.atomic_add(COUNT + tile, 1)
        if arrived == SPLIT - 1:
            barrier()
            total = gl.zeros([BN, BM], gl.float32, mma)
            for source in gl.static_range(SPLIT):
                total += gl.load(base + source * (BN * BM) + at, cache_modifier=".cg")
            y = _finished(total, SX, SW, BIAS, on, om, N, M, BLOCKED, SINGLE, HAS_BIAS)
            _store(y, Y, n0, m0, N, M, BN, BM, NW)
            gl.store(COUNT + tile, 0)
