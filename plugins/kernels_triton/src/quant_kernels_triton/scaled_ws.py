"""int8 codes by int8 codes on Hopper for many rows: one warp fetches, two warpgroups multiply.

    y^T [N, M] = W [N, K] x^T    W and x from shared memory, where TMA puts them

A block computes 128 output features of BT tokens, a consumer 64 of them. Sums of integers run over
all columns. PDL: the first stages of weights are fetched before the kernel that quantizes x ends.
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
from quant_kernels_triton.scaled_ring import _finished

__all__ = ["scaled_specialized"]


@gluon.jit
def _producer(wd, xd, ws, xs, full, empty, n0, m0, groups, PDL: gl.constexpr, BYTES: gl.constexpr,
              ST: gl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
    st = 0
    ph = 1
    for k in range(groups):
        mbarrier.wait(empty.index(st), ph)
        mbarrier.expect(full.index(st), BYTES)
        tma.async_copy_global_to_shared(wd, [n0, k * 128], full.index(st), ws.index(st))
        tma.async_copy_global_to_shared(xd, [m0, k * 128], full.index(st), xs.index(st))
        st += 1
        if st == ST:
            st = 0
            ph ^= 1


@gluon.jit
def _write(acc, SW, SX, BIAS, Y, M, N, n0, m0, HT: gl.constexpr, SINGLE: gl.constexpr,
           HAS_BIAS: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    rn = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    rm = m0 + gl.arange(0, HT, layout=gl.SliceLayout(0, mma))
    y = _finished(acc, SX, SW, BIAS, rn, rm, N, M, False, SINGLE, HAS_BIAS)
    OL: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    v = gl.convert_layout(y.to(Y.dtype.element_ty), OL)
    on = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OL))
    om = m0 + gl.arange(0, HT, layout=gl.SliceLayout(0, OL))
    at = om[None, :].to(gl.int64) * N + on[:, None]
    gl.store(Y + at, v, mask=(om < M)[None, :] & (on < N)[:, None])


@gluon.jit
def _consumer(ws, xs, full, empty, SW, SX, BIAS, Y, M, N, n0, m0, groups, ROW: gl.constexpr,
              PDL: gl.constexpr, BT: gl.constexpr, ST: gl.constexpr, SINGLE: gl.constexpr,
              HAS_BIAS: gl.constexpr):  # fmt: skip
    HT: gl.constexpr = BT // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HT, 32]
    )
    acc0 = gl.zeros([64, HT], gl.int32, mma)
    acc1 = acc0
    st = 0
    ph = 0
    for _ in range(groups):
        mbarrier.wait(full.index(st), ph)
        w = ws.index(st).slice(ROW * 64, 64, dim=0)
        x = xs.index(st)
        t = warpgroup_mma(w, x.slice(0, HT, dim=0).permute((1, 0)), acc0, is_async=True)
        u = warpgroup_mma(w, x.slice(HT, HT, dim=0).permute((1, 0)), acc1, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(0, deps=(t, u))
        mbarrier.arrive(empty.index(st), count=1)
        st += 1
        if st == ST:
            st = 0
            ph ^= 1
    if PDL:
        gdc_wait()
    n0 += ROW * 64
    _write(acc0, SW, SX, BIAS, Y, M, N, n0, m0, HT, SINGLE, HAS_BIAS, mma)
    _write(acc1, SW, SX, BIAS, Y, M, N, n0, m0 + HT, HT, SINGLE, HAS_BIAS, mma)


@gluon.jit(do_not_specialize=["M", "G"])
def scaled_specialized(wd, xd, SW, SX, BIAS, Y, M, N, G,
                       BT: gl.constexpr, ST: gl.constexpr, GN: gl.constexpr, PDL: gl.constexpr,
                       SINGLE: gl.constexpr, HAS_BIAS: gl.constexpr):  # fmt: skip
    nm = gl.cdiv(M, BT)
    nn = gl.cdiv(N, 128)
    pid = gl.program_id(0)
    gid = pid // (GN * nm)
    first = gid * GN
    size = gl.minimum(nn - first, GN)
    n0 = (first + (pid % (GN * nm)) % size) * 128
    m0 = (pid % (GN * nm)) // size * BT
    ws = gl.allocate_shared_memory(gl.int8, [ST, 128, 128], wd.layout)
    xs = gl.allocate_shared_memory(gl.int8, [ST, BT, 128], xd.layout)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    barrier()
    if PDL:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_consumer, (ws, xs, full, empty, SW, SX, BIAS, Y, M, N, n0, m0, G, 0, PDL, BT, ST,
                         SINGLE, HAS_BIAS)),
            (_consumer, (ws, xs, full, empty, SW, SX, BIAS, Y, M, N, n0, m0, G, 1, PDL, BT, ST,
                         SINGLE, HAS_BIAS)),
            (_producer, (wd, xd, ws, xs, full, empty, n0, m0, G, PDL, (128 + BT) * 128, ST)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
