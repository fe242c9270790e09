"""8-bit codes by 8-bit codes on Hopper for many rows: one warp fetches, two warpgroups multiply.

    y^T [N, M] = W [N, K] x^T    W and x from shared memory, where TMA puts them

A block computes 128 output features of BT tokens, a consumer 64 of them, two groups of 128 columns
in each round of its loop: the sums of the first are added to the total while the second is
multiplied. PAIR, for layers with too few tiles to fill the card: a block computes 64 features, its
consumers take the groups in turn, and the first adds up both totals.

Sums of 128 columns of fp8 are added in float32 outside the tensor cores, whose own sums keep fewer
bits; sums of integers run over all columns. BLOCKED: scales of 128 x 128 weights and of 128 columns
of a token, which apply to these sums. The weights of the first stages are fetched before the kernel
that quantizes x has ended.
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
from quant_kernels_triton.scaled_ring import _added, _finished, _scales

__all__ = ["scaled_specialized"]


@gluon.jit
def _producer(wd, xd, ws, xs, full, empty, n0, m0, groups, PDL: gl.constexpr, BYTES: gl.constexpr,
              ST: gl.constexpr):  # fmt: skip
    for i in gl.static_range(ST):
        if i < groups:
            mbarrier.expect(full.index(i), BYTES)
            tma.async_copy_global_to_shared(wd, [n0, i * 128], full.index(i), ws.index(i))
    if PDL:
        gdc_wait()
    for i in gl.static_range(ST):
        if i < groups:
            tma.async_copy_global_to_shared(xd, [m0, i * 128], full.index(i), xs.index(i))
    st = 0
    ph = 0
    for k in range(ST, groups):
        mbarrier.wait(empty.index(st), ph)
        mbarrier.expect(full.index(st), BYTES)
        tma.async_copy_global_to_shared(wd, [n0, k * 128], full.index(st), ws.index(st))
        tma.async_copy_global_to_shared(xd, [m0, k * 128], full.index(st), xs.index(st))
        st += 1
        if st == ST:
            st = 0
            ph ^= 1


@gluon.jit
def _tokens(x, H: gl.constexpr, HT: gl.constexpr):
    """The operand of half H of a stage's tokens."""
    return x.slice(H * HT, HT, dim=0).permute((1, 0))


@gluon.jit
def _write(acc, SW, SX, BIAS, Y, M, N, n0, m0, HT: gl.constexpr, BLOCKED: gl.constexpr,
           SINGLE: gl.constexpr, HAS_BIAS: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    rn = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    rm = m0 + gl.arange(0, HT, layout=gl.SliceLayout(0, mma))
    y = _finished(acc, SX, SW, BIAS, rn, rm, N, M, BLOCKED, SINGLE, HAS_BIAS)
    OL: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    v = gl.convert_layout(y.to(Y.dtype.element_ty), OL)
    on = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OL))
    om = m0 + gl.arange(0, HT, layout=gl.SliceLayout(0, OL))
    at = om[None, :].to(gl.int64) * N + on[:, None]
    gl.store(Y + at, v, mask=(om < M)[None, :] & (on < N)[:, None])


@gluon.jit
def _whole(ws, xs, full, empty, acc0, acc1, st, ph, W0: gl.constexpr, NEXT: gl.constexpr,
           HT: gl.constexpr, NH: gl.constexpr):  # fmt: skip
    """Two groups of integers: whole sums are exact."""
    mbarrier.wait(full.index(st), ph)
    w = ws.index(st).slice(W0, 64, dim=0)
    v = ws.index(st + NEXT).slice(W0, 64, dim=0)
    x = xs.index(st)
    z = xs.index(st + NEXT)
    t = warpgroup_mma(w, _tokens(x, 0, HT), acc0, is_async=True)
    u = t
    if NH == 2:
        u = warpgroup_mma(w, _tokens(x, 1, HT), acc1, is_async=True)
    mbarrier.wait(full.index(st + NEXT), ph)
    t = warpgroup_mma(v, _tokens(z, 0, HT), t, is_async=True)
    if NH == 2:
        u = warpgroup_mma(v, _tokens(z, 1, HT), u, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(0, deps=(t, u))
    else:
        acc0 = warpgroup_mma_wait(0, deps=(t,))
    mbarrier.arrive(empty.index(st), count=1)
    mbarrier.arrive(empty.index(st + NEXT), count=1)
    return acc0, acc1


@gluon.jit
def _halves(ws, xs, full, empty, acc0, acc1, d, st, ph, W0: gl.constexpr, HT: gl.constexpr):
    """A group of two halves of tokens, which take turns with one buffer of sums."""
    mbarrier.wait(full.index(st), ph)
    w = ws.index(st).slice(W0, 64, dim=0)
    x = xs.index(st)
    t = warpgroup_mma(w, _tokens(x, 0, HT), d, use_acc=False, is_async=True)
    d = warpgroup_mma_wait(0, deps=(t,))
    acc0 += d
    t = warpgroup_mma(w, _tokens(x, 1, HT), d, use_acc=False, is_async=True)
    d = warpgroup_mma_wait(0, deps=(t,))
    mbarrier.arrive(empty.index(st), count=1)
    acc1 += d
    return acc0, acc1, d


@gluon.jit
def _consumer(ws, xs, sums, full, empty, done, SW, SX, BIAS, Y, M, N, G, n0, m0, groups,
              ROW: gl.constexpr, PDL: gl.constexpr, PAIR: gl.constexpr, BT: gl.constexpr,
              ST: gl.constexpr, INT: gl.constexpr, BLOCKED: gl.constexpr, SINGLE: gl.constexpr,
              HAS_BIAS: gl.constexpr):  # fmt: skip
    HT: gl.constexpr = BT if BT < 128 else 128
    NH: gl.constexpr = BT // HT
    ONE: gl.constexpr = NH == 2 and not INT  # group a round: registers hold both halves' totals
    W0: gl.constexpr = 0 if PAIR else ROW * 64
    NEXT: gl.constexpr = 2 if PAIR else 1
    STEP: gl.constexpr = 1 if ONE else 2 * NEXT
    FIRST: gl.constexpr = ROW if PAIR else 0
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    MOST: gl.constexpr = 64 if BLOCKED else 256  # the sums of two groups and tokens' scales
    gl.static_assert(INT or BT <= MOST)
    gl.static_assert(ST % STEP == 0)
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HT, 32]
    )
    om = m0 + gl.arange(0, HT, layout=gl.SliceLayout(0, mma))
    sw_at = gl.minimum(n0, N - 1) // 128 * G
    acc0 = gl.zeros([64, HT], SUM, mma)
    acc1 = acc0
    d = acc0
    e = acc0
    if BLOCKED and PDL:
        gdc_wait()
    sx0, sw0 = _scales(SX, SW, sw_at, om, FIRST, M, G, BLOCKED)
    sx1, sw1 = _scales(SX, SW, sw_at, om, FIRST + NEXT, M, G, BLOCKED)
    st = FIRST
    ph = 0
    for k in range(FIRST, groups, STEP):
        if INT:
            acc0, acc1 = _whole(ws, xs, full, empty, acc0, acc1, st, ph, W0, NEXT, HT, NH)
        elif ONE:
            acc0, acc1, d = _halves(ws, xs, full, empty, acc0, acc1, d, st, ph, W0, HT)
        else:
            mbarrier.wait(full.index(st), ph)
            w = ws.index(st).slice(W0, 64, dim=0)
            t = warpgroup_mma(w, _tokens(xs.index(st), 0, HT), d, use_acc=False, is_async=True)
            mbarrier.wait(full.index(st + NEXT), ph)
            w = ws.index(st + NEXT).slice(W0, 64, dim=0)
            x = xs.index(st + NEXT)
            u = warpgroup_mma(w, _tokens(x, 0, HT), e, use_acc=False, is_async=True)
            px0, pw0, px1, pw1 = sx0, sw0, sx1, sw1
            sx0, sw0 = _scales(SX, SW, sw_at, om, k + STEP, M, G, BLOCKED)
            sx1, sw1 = _scales(SX, SW, sw_at, om, k + STEP + NEXT, M, G, BLOCKED)
            d = warpgroup_mma_wait(1, deps=(t,))
            mbarrier.arrive(empty.index(st), count=1)
            acc0 = _added(acc0, d, px0, pw0, BLOCKED)
            e = warpgroup_mma_wait(0, deps=(u,))
            mbarrier.arrive(empty.index(st + NEXT), count=1)
            acc0 = _added(acc0, e, px1, pw1, BLOCKED)
        st += STEP
        if st >= ST:
            st = FIRST
            ph ^= 1
    if PAIR and ROW == 1:
        sums.store(acc0)
        mbarrier.arrive(done, count=1)
    else:
        if PAIR:
            mbarrier.wait(done, 0)
            acc0 += sums.load(mma)
        if PDL:  # SX belongs to the kernel before until it has ended
            gdc_wait()
        _write(acc0, SW, SX, BIAS, Y, M, N, n0 + W0, m0, HT, BLOCKED, SINGLE, HAS_BIAS, mma)
        if NH == 2:
            _write(acc1, SW, SX, BIAS, Y, M, N, n0 + W0, m0 + HT, HT, BLOCKED, SINGLE, HAS_BIAS,
                   mma)  # fmt: skip


@gluon.jit(do_not_specialize=["M", "G"])
def scaled_specialized(wd, xd, SW, SX, BIAS, Y, M, N, G,
                       BT: gl.constexpr, ST: gl.constexpr, GN: gl.constexpr, PAIR: gl.constexpr,
                       PDL: gl.constexpr, INT: gl.constexpr, BLOCKED: gl.constexpr,
                       SINGLE: gl.constexpr, HAS_BIAS: gl.constexpr):  # fmt: skip
    ELEMENT: gl.constexpr = gl.int8 if INT else gl.float8e4nv
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    BN: gl.constexpr = 64 if PAIR else 128
    TOGETHER: gl.constexpr = 4 if PAIR else 2  # groups of a round of all consumers
    gl.static_assert(not PAIR or BT <= 128)
    nm = gl.cdiv(M, BT)
    nn = gl.cdiv(N, BN)
    pid = gl.program_id(0)
    groups = gl.cdiv(G, TOGETHER) * TOGETHER  # those beyond G are read as zeros
    gid = pid // (GN * nm)
    first = gid * GN
    size = gl.minimum(nn - first, GN)
    n0 = (first + (pid % (GN * nm)) % size) * BN
    m0 = (pid % (GN * nm)) // size * BT
    ws = gl.allocate_shared_memory(ELEMENT, [ST, BN, 128], wd.layout)
    xs = gl.allocate_shared_memory(ELEMENT, [ST, BT, 128], xd.layout)
    SS: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    sums = gl.allocate_shared_memory(SUM, [64, BT] if PAIR else [1, 4], SS)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1 if PAIR else 2)
    mbarrier.init(done, count=1)
    fence_async_shared()
    barrier()
    if PDL:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_consumer, (ws, xs, sums, full, empty, done, SW, SX, BIAS, Y, M, N, G, n0, m0, groups,
                         0, PDL, PAIR, BT, ST, INT, BLOCKED, SINGLE, HAS_BIAS)),
            (_consumer, (ws, xs, sums, full, empty, done, SW, SX, BIAS, Y, M, N, G, n0, m0, groups,
                         1, PDL, PAIR, BT, ST, INT, BLOCKED, SINGLE, HAS_BIAS)),
            (_producer, (wd, xd, ws, xs, full, empty, n0, m0, groups, PDL, (BN + BT) * 128, ST)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
