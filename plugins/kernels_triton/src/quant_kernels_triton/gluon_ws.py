"""Gluon GEMM for many rows on Hopper: one warp fetches x, two warpgroups multiply.

    y^T [N, M] = W [N, K] x^T: W is the register operand of wgmma, x the shared one.

A consumer warpgroup owns 64 output features of BM rows. It reads its codes from memory straight
into registers two groups of columns ahead and dequantizes the next 64 columns while wgmma works on
the present ones; the two consumers do so independently, so that one dequantizes while the other
multiplies. x arrives by TMA in stages of 64 columns, guarded by a pair of barriers each.
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

from quant_kernels_triton.gluon_parts import (
    barrier,
    dequantize,
    gdc_launch_dependents,
    gdc_wait,
    outer_factors,
    parameters,
    raw_factor,
    shifted,
)

__all__ = ["specialized"]


@gluon.jit
def _producer(xd, xs, full, empty, m0, G, BM: gl.constexpr, ST: gl.constexpr):
    st = 0
    ph = 1
    for k in range(G * 2):
        mbarrier.wait(empty.index(st), ph)
        mbarrier.expect(full.index(st), xd.block_type.nbytes)
        tma.async_copy_global_to_shared(xd, [m0, k * 64], full.index(st), xs.index(st))
        st += 1
        if st == ST:
            st = 0
            ph ^= 1


@gluon.jit
def _raws(P, tile, sub, lane, group, G, K, HALF: gl.constexpr, SPG: gl.constexpr,
          C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr,
          C4: gl.constexpr):  # fmt: skip
    """Raw factors of half a group; ``lane`` stands for absent ones."""
    f0 = lane
    f1 = lane
    z = lane
    o0 = lane
    o1 = lane
    if C0 != 7:
        f0 = raw_factor(P[0], tile, sub, lane, group, G, K, HALF, SPG, C0)
    if C1 != 7:
        f1 = raw_factor(P[1], tile, sub, lane, group, G, K, HALF, SPG, C1)
    if C2 != 7:
        z = raw_factor(P[2], tile, sub, lane, group, G, K, HALF, SPG, C2)
    if C3 != 7:
        o0 = raw_factor(P[3], tile, sub, lane, group, G, K, HALF, SPG, C3)
    if C4 != 7:
        o1 = raw_factor(P[4], tile, sub, lane, group, G, K, HALF, SPG, C4)
    return f0, f1, z, o0, o1


@gluon.jit
def _operand(w, raw, BYTES: gl.constexpr, BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
             C3: gl.constexpr, C4: gl.constexpr, MODE: gl.constexpr, ZERO: gl.constexpr,
             ASM: gl.constexpr, REGS: gl.constexpr, AL: gl.constexpr, W6: gl.constexpr,
             SB: gl.constexpr):  # fmt: skip
    """Codes of 64 columns and their raw factors to the A operand."""
    HAS_P: gl.constexpr = MODE != 0 or ZERO != 0
    p = raw
    if HAS_P:
        p = parameters(
            raw[0], raw[1], raw[2], raw[3], raw[4], C0, C1, C3, C4, MODE, ZERO, BYTES, BF16
        )
    return dequantize(w, p, 4, 1, BYTES, BF16, ASM, REGS, HAS_P, AL, W6, SB)


@gluon.jit
def _consumer(xs, full, empty, W, P, ROW0, ROW1, BIAS, Y, ORDER, M, N, NP, K, G, groups, pn, m0,
              ROW: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr,
              BYTES: gl.constexpr, BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
              C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr, R0: gl.constexpr,
              R1: gl.constexpr, HAS_BIAS: gl.constexpr, ZERO: gl.constexpr, MODE: gl.constexpr,
              SPG: gl.constexpr, ASM: gl.constexpr, REGS: gl.constexpr,
              GROUPED: gl.constexpr):  # fmt: skip
    S2: gl.constexpr = 2 if BYTES else 1
    SB: gl.constexpr = (2 if SPG == 8 else 1) if BYTES else (SPG // 2 if SPG >= 2 else 1)
    P2: gl.constexpr = S2 if SPG >= 4 else 1
    TWO: gl.constexpr = SPG >= 2  # the halves of a group have scales of their own
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16]
    )
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    WL: gl.constexpr = gl.BlockedLayout([1, S2, 1, 8], [1, 1, 32, 1], [4, 1, 1, 1], [3, 2, 1, 0])
    W6: gl.constexpr = gl.BlockedLayout(
        [1, 1, S2, 1, SB, 8 // SB], [1, 1, 1, 32, 1, 1], [4, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    PL: gl.constexpr = gl.SliceLayout(5, W6)
    P4: gl.constexpr = gl.SliceLayout(4, PL)
    iw = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    ip = gl.arange(0, S2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    il = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WL))))
    ie = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WL))))
    # tiles beyond the last are computed again from the last one and not stored
    rt = gl.minimum((pn * NC + ROW) * 4 + iw, NP // 16 - 1)
    HW: gl.constexpr = 256 * S2  # words of half a group of a tile
    Wp = W + (rt.to(gl.int64)[:, None, None, None] * G * (2 * HW) + ip[None, :, None, None] * 256
              + il[None, None, :, None] * 8 + ie[None, None, None, :])  # fmt: skip

    jw = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, P4))))
    js = gl.arange(0, P2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, P4))))
    jl = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, P4))))
    jb = gl.arange(
        0, SB, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PL))))
    )
    pt = gl.minimum((pn * NC + ROW) * 4 + jw, NP // 16 - 1)[:, None, None, None, None]
    sub = (js * SB)[None, None, :, None, None] + jb[None, None, None, None, :]
    lane = jl[None, None, None, :, None]

    # registers: half 1 of group g, both halves of g + 1; g + 2 is fetched during g
    wa = gl.load(Wp)
    wb = gl.load(Wp + HW)
    sa = _raws(P, pt, sub, lane, 0, G, K, 0, SPG, C0, C1, C2, C3, C4)
    sb = sa
    if TWO:
        sb = _raws(P, pt, sub, lane, 0, G, K, 1, SPG, C0, C1, C2, C3, C4)
    g1 = gl.minimum(1, G - 1)
    na = gl.load(Wp + g1 * (2 * HW))
    nb = gl.load(Wp + g1 * (2 * HW) + HW)
    ta = _raws(P, pt, sub, lane, g1, G, K, 0, SPG, C0, C1, C2, C3, C4)
    tb = ta
    if TWO:
        tb = _raws(P, pt, sub, lane, g1, G, K, 1, SPG, C0, C1, C2, C3, C4)
    a = _operand(wa, sa, BYTES, BF16, C0, C1, C3, C4, MODE, ZERO, ASM, REGS, AL, W6, SB)
    acc = gl.zeros([64, BM], gl.float32, mma)
    st = 0
    ph = 0
    for g in range(groups):
        g2 = gl.minimum(g + 2, G - 1)
        ma = gl.load(Wp + g2 * (2 * HW))
        mb = gl.load(Wp + g2 * (2 * HW) + HW)
        ua = _raws(P, pt, sub, lane, g2, G, K, 0, SPG, C0, C1, C2, C3, C4)
        ub = ua
        if TWO:
            ub = _raws(P, pt, sub, lane, g2, G, K, 1, SPG, C0, C1, C2, C3, C4)
        mbarrier.wait(full.index(st), ph)
        d = warpgroup_mma(a, xs.index(st).permute((1, 0)), acc, is_async=True)
        a = _operand(wb, sb, BYTES, BF16, C0, C1, C3, C4, MODE, ZERO, ASM, REGS, AL, W6, SB)
        acc = warpgroup_mma_wait(0, deps=(d,))
        mbarrier.arrive(empty.index(st), count=1)
        st += 1
        if st == ST:
            st = 0
            ph ^= 1
        mbarrier.wait(full.index(st), ph)
        d = warpgroup_mma(a, xs.index(st).permute((1, 0)), acc, is_async=True)
        a = _operand(na, ta, BYTES, BF16, C0, C1, C3, C4, MODE, ZERO, ASM, REGS, AL, W6, SB)
        acc = warpgroup_mma_wait(0, deps=(d,))
        mbarrier.arrive(empty.index(st), count=1)
        st += 1
        if st == ST:
            st = 0
            ph ^= 1
        wb = nb
        sb = tb
        na = ma
        nb = mb
        ta = ua
        tb = ub
    n0 = (pn * NC + ROW) * 64
    rn = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    acc = outer_factors(acc, ROW0, ROW1, BIAS, rn, N, R0, R1, HAS_BIAS)
    OL: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    y = gl.convert_layout(acc.to(ACT), OL)
    on = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OL))
    om = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, OL))
    to = om
    if GROUPED:
        to = gl.load(ORDER + om, mask=om < M, other=0)
    gl.store(Y + to[None, :].to(gl.int64) * N + on[:, None], y,
             mask=(om < M)[None, :] & (on < N)[:, None])  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def specialized(xd, W, S0, S1, Z, O0, O1, ROW0, ROW1, BIAS, Y, ORDER, EXPERT, BOUNDS,
                M, N, NP, K, G,
                BM: gl.constexpr, ST: gl.constexpr, GN: gl.constexpr, GROUPED: gl.constexpr,
                PDL: gl.constexpr, BYTES: gl.constexpr, BF16: gl.constexpr,
                C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr,
                C4: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr,
                ZERO: gl.constexpr, MODE: gl.constexpr,
                SPG: gl.constexpr, ASM: gl.constexpr, REGS: gl.constexpr):  # fmt: skip
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    NC: gl.constexpr = 2
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
    if GROUPED:  # as in gluon_ring
        expert = gl.load(EXPERT + pm)
        m0 = gl.load(BOUNDS + 2 * pm)
        m1 = gl.where(expert < 0, m0, gl.load(BOUNDS + 2 * pm + 1))
        groups = gl.where(expert < 0, 0, G)
        expert = gl.maximum(expert, 0)
        WG: gl.constexpr = 1024 if BYTES else 512
        W = W + expert.to(gl.int64) * ((NP // 16) * G * WG)
        S0 = shifted(S0, expert, NP, G, N, K, C0)
        S1 = shifted(S1, expert, NP, G, N, K, C1)
        Z = shifted(Z, expert, NP, G, N, K, C2)
        O0 = shifted(O0, expert, NP, G, N, K, C3)
        O1 = shifted(O1, expert, NP, G, N, K, C4)
        ROW0 = shifted(ROW0, expert, NP, G, N, K, R0)
        ROW1 = shifted(ROW1, expert, NP, G, N, K, R1)
        if HAS_BIAS:
            BIAS = BIAS + expert * N
    xs = gl.allocate_shared_memory(ACT, [ST, BM, 64], xd.layout)
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
    P = (S0, S1, Z, O0, O1)
    gl.warp_specialize(
        [
            (_consumer, (xs, full, empty, W, P, ROW0, ROW1, BIAS, Y, ORDER, m1, N, NP, K, G, groups,
                         pn, m0, 0, BM, ST, NC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                         HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GROUPED)),
            (_consumer, (xs, full, empty, W, P, ROW0, ROW1, BIAS, Y, ORDER, m1, N, NP, K, G, groups,
                         pn, m0, 1, BM, ST, NC, BYTES, BF16, C0, C1, C2, C3, C4, R0, R1,
                         HAS_BIAS, ZERO, MODE, SPG, ASM, REGS, GROUPED)),
            (_producer, (xd, xs, full, empty, m0, groups, BM, ST)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip
