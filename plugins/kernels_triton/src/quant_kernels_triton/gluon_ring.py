"""Gluon GEMM for some tens of rows on Hopper: a ring of stages filled ahead of the tensor cores.

    y^T [N, M] = W [N, K] x^T: W is the register operand of wgmma, x the shared one.

A block computes 16 * NW output features (one warp per tile of 16) of BM rows. A stage of the ring
holds one group of 128 columns: x by TMA, codes and their factors by cp.async. The wgmma of a group
runs while the codes of the next one are dequantized. The accumulator is waited for in the same
iteration: in flight across the loop's edge, ptxas would serialize. With ACC the group's scale
multiplies its sums in float32 instead of its weights.

SPLIT > 1 cuts K: each part writes its sums to a buffer of its own, the block that arrives last adds
them in order and writes y. Sums repeat bit for bit. The counters end at zero.
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

from quant_kernels_triton.gluon_parts import (
    barrier,
    dequantize,
    gdc_launch_dependents,
    gdc_wait,
    outer_factors,
    parameters,
    raw_factor,
    row_factor,
)

__all__ = ["ring"]


@gluon.jit
def _stages(P, C: gl.constexpr, SPG: gl.constexpr, NW: gl.constexpr, ST: gl.constexpr):
    """Shared memory for a factor by group; a place holder for any other."""
    COLS: gl.constexpr = (C >> 20) * 16
    PER: gl.constexpr = 128 // COLS if (COLS > 0 and COLS < 128) else 1
    if (C & 7) == 2 and (PER == SPG or PER == 1):
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        return gl.allocate_shared_memory(P.dtype.element_ty, [ST, NW, PER, 8], flat)
    else:
        return P


@gluon.jit
def _fetch(SM, P, st, tile0, last, group, G, C: gl.constexpr, SPG: gl.constexpr,
           NW: gl.constexpr):  # fmt: skip
    """Copy the factor of one group of columns, of all tiles of the block, to stage ``st``."""
    COLS: gl.constexpr = (C >> 20) * 16
    PER: gl.constexpr = 128 // COLS if (COLS > 0 and COLS < 128) else 1
    if (C & 7) == 2 and (PER == SPG or PER == 1):
        WIDE: gl.constexpr = 2 if P.dtype.element_ty.primitive_bitwidth == 16 else 1  # 4 bytes
        L: gl.constexpr = gl.BlockedLayout([1, 1, WIDE], [1, 4 * WIDE, 8 // WIDE], [NW, 1, 1],
                                           [2, 1, 0])  # fmt: skip
        i0 = gl.arange(0, NW, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
        i1 = gl.arange(0, PER, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
        i2 = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
        groups = (G * 128 + COLS - 1) // COLS
        tile = gl.minimum(tile0 + i0, last)[:, None, None]
        at = (tile * groups + group * 128 // COLS + i1[None, :, None]) * 8 + i2[None, None, :]
        async_copy.async_copy_global_to_shared(SM.index(st), P + at)


@gluon.jit
def _raw(SM, P, st, tile, sub, lane, group, G, K, C: gl.constexpr, SPG: gl.constexpr,
         NW: gl.constexpr, HP: gl.constexpr, P2: gl.constexpr, SB: gl.constexpr,
         PL: gl.constexpr):  # fmt: skip
    """A raw factor in the layout PL: from its stage, or from memory; ``lane`` if it is absent."""
    COLS: gl.constexpr = (C >> 20) * 16
    PER: gl.constexpr = 128 // COLS if (COLS > 0 and COLS < 128) else 1
    if C == 7:
        return lane
    elif (C & 7) == 2 and (PER == SPG or PER == 1):
        R: gl.constexpr = gl.BlockedLayout(
            [1, PER, 1, 1], [1, 1, 8, 4], [NW, 1, 1, 1], [3, 2, 1, 0]
        )
        v = gl.expand_dims(SM.index(st).load(gl.SliceLayout(3, R)), 3)
        v, _ = gl.broadcast(v, gl.zeros([NW, PER, 8, 4], P.dtype.element_ty, R))
        if PER == SPG:
            v = v.reshape([NW, HP, P2, SB, 32])
        else:
            v = v.reshape([NW, 1, 1, 1, 32])
        return gl.convert_layout(v.permute([0, 1, 2, 4, 3]), PL, assert_trivial=True)
    else:
        return raw_factor(P, tile, sub, lane, group, G, K, 0, SPG, C)


@gluon.jit(do_not_specialize=["M", "G"])  # Triton 3.6 fails on a loop of one round
def ring(xd, W, S0, S1, Z, O0, O1, ROW0, ROW1, BIAS, Y, PART, COUNT, M, N, NP, K, G,
         BM: gl.constexpr, NW: gl.constexpr, ST: gl.constexpr, SPLIT: gl.constexpr,
         GN: gl.constexpr, ACC: gl.constexpr, PDL: gl.constexpr, BYTES: gl.constexpr,
         BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr,
         C3: gl.constexpr, C4: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr,
         HAS_BIAS: gl.constexpr, ZERO: gl.constexpr, MODE: gl.constexpr, SPG: gl.constexpr,
         ASM: gl.constexpr, REGS: gl.constexpr):  # fmt: skip
    BN: gl.constexpr = NW * 16
    S2: gl.constexpr = 2 if BYTES else 1
    SB: gl.constexpr = (2 if SPG == 8 else 1) if BYTES else (SPG // 2 if SPG >= 2 else 1)
    HP: gl.constexpr = 2 if SPG >= 2 else 1
    P2: gl.constexpr = S2 if SPG >= 4 else 1
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BM, 16]
    )
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    RL: gl.constexpr = gl.SliceLayout(1, mma)
    WL: gl.constexpr = gl.BlockedLayout(
        [1, 2 * S2, 1, 8], [1, 1, 32, 1], [NW, 1, 1, 1], [3, 2, 1, 0]
    )
    W6: gl.constexpr = gl.BlockedLayout(
        [1, 2, S2, 1, SB, 8 // SB], [1, 1, 1, 32, 1, 1], [NW, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    PL: gl.constexpr = gl.SliceLayout(5, W6)
    WS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
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
    WG: gl.constexpr = 512 * S2

    xs = gl.allocate_shared_memory(ACT, [ST, BM, 128], xd.layout)
    ws = gl.allocate_shared_memory(gl.int16, [ST, NW, 2 * S2, 32, 8], WS)
    m_s0 = _stages(S0, C0, SPG, NW, ST)
    m_s1 = _stages(S1, C1, SPG, NW, ST)
    m_z = _stages(Z, C2, SPG, NW, ST)
    m_o0 = _stages(O0, C3, SPG, NW, ST)
    m_o1 = _stages(O1, C4, SPG, NW, ST)
    bar = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(bar.index(i), count=1)
    fence_async_shared()
    barrier()

    iw = gl.arange(0, NW, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    ip = gl.arange(0, 2 * S2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    il = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WL))))
    ie = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WL))))
    last = NP // 16 - 1
    rt = gl.minimum(pn * NW + iw, last)
    woff = (rt[:, None, None, None] * G * WG + ip[None, :, None, None] * 256
            + il[None, None, :, None] * 8 + ie[None, None, None, :])  # fmt: skip
    wp = W + woff

    # indices of parameters: tile, group within the half and the half, lane
    jw = gl.arange(
        0, NW, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, PL))))
    )
    jh = gl.arange(
        0, HP, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, PL))))
    )
    js = gl.arange(
        0, P2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, PL))))
    )
    jl = gl.arange(
        0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, PL))))
    )
    jb = gl.arange(
        0, SB, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PL))))
    )
    pt = gl.minimum(pn * NW + jw, last)[:, None, None, None, None]
    sub = (
        (jh * (SPG // 2))[None, :, None, None, None]
        + (js * SB)[None, None, :, None, None]
        + jb[None, None, None, None, :]
    )
    lane = jl[None, None, None, :, None]

    if PDL:  # weights do not depend on the previous kernel: only x has to wait for it
        gdc_launch_dependents()
    t0 = pn * NW
    for i in gl.static_range(ST):
        if k0 + i < k1:
            async_copy.async_copy_global_to_shared(ws.index(i), wp + (k0 + i) * WG)
            _fetch(m_s0, S0, i, t0, last, k0 + i, G, C0, SPG, NW)
            _fetch(m_s1, S1, i, t0, last, k0 + i, G, C1, SPG, NW)
            _fetch(m_z, Z, i, t0, last, k0 + i, G, C2, SPG, NW)
            _fetch(m_o0, O0, i, t0, last, k0 + i, G, C3, SPG, NW)
            _fetch(m_o1, O1, i, t0, last, k0 + i, G, C4, SPG, NW)
        async_copy.commit_group()
    if PDL:
        gdc_wait()
    for i in gl.static_range(ST):
        if k0 + i < k1:
            mbarrier.expect(bar.index(i), xd.block_type.nbytes)
            tma.async_copy_global_to_shared(xd, [m0, (k0 + i) * 128], bar.index(i), xs.index(i))

    acc = gl.zeros([BN, BM], gl.float32, mma)
    async_copy.wait_group(ST - 1)
    DM: gl.constexpr = 0 if ACC else MODE
    DP: gl.constexpr = DM != 0 or ZERO != 0
    f0 = _raw(m_s0, S0, 0, pt, sub, lane, k0, G, K, C0, SPG, NW, HP, P2, SB, PL)
    f1 = _raw(m_s1, S1, 0, pt, sub, lane, k0, G, K, C1, SPG, NW, HP, P2, SB, PL)
    z = _raw(m_z, Z, 0, pt, sub, lane, k0, G, K, C2, SPG, NW, HP, P2, SB, PL)
    o0 = _raw(m_o0, O0, 0, pt, sub, lane, k0, G, K, C3, SPG, NW, HP, P2, SB, PL)
    o1 = _raw(m_o1, O1, 0, pt, sub, lane, k0, G, K, C4, SPG, NW, HP, P2, SB, PL)
    p = lane
    if DP:
        p = parameters(f0, f1, z, o0, o1, C0, C1, C3, C4, DM, ZERO, BYTES, BF16)
    a = dequantize(ws.index(0).load(WL), p, NW, 2, BYTES, BF16, ASM, REGS, DP, AL, W6, SB)
    f = gl.zeros([BN], gl.float32, RL)
    if ACC:
        f = row_factor(f0, f1, C0, C1, NW, RL)
    st = 0
    ph = 0
    early = lane  # a factor by rectangles, read one group ahead
    if (C0 & 7) == 3:
        early = raw_factor(S0, pt, sub, lane, gl.minimum(k0 + 1, G - 1), G, K, 0, SPG, C0)
    for k in range(k0, k1):
        here = early
        if (C0 & 7) == 3:
            early = raw_factor(S0, pt, sub, lane, gl.minimum(k + 2, G - 1), G, K, 0, SPG, C0)
        mbarrier.wait(bar.index(st), ph)
        b = xs.index(st).permute((1, 0))
        sn = gl.where(st + 1 == ST, 0, st + 1)
        if ACC:
            zero = gl.zeros([BN, BM], gl.float32, mma)
            d = warpgroup_mma(a, b, zero, use_acc=False, is_async=True)
        else:
            d = warpgroup_mma(a, b, acc, is_async=True)
        async_copy.wait_group(ST - 2)
        # the last round dequantizes a stale stage, unused
        kn = gl.minimum(k + 1, G - 1)
        if (C0 & 7) == 3:
            f0 = here
        else:
            f0 = _raw(m_s0, S0, sn, pt, sub, lane, kn, G, K, C0, SPG, NW, HP, P2, SB, PL)
        f1 = _raw(m_s1, S1, sn, pt, sub, lane, kn, G, K, C1, SPG, NW, HP, P2, SB, PL)
        z = _raw(m_z, Z, sn, pt, sub, lane, kn, G, K, C2, SPG, NW, HP, P2, SB, PL)
        o0 = _raw(m_o0, O0, sn, pt, sub, lane, kn, G, K, C3, SPG, NW, HP, P2, SB, PL)
        o1 = _raw(m_o1, O1, sn, pt, sub, lane, kn, G, K, C4, SPG, NW, HP, P2, SB, PL)
        if DP:
            p = parameters(f0, f1, z, o0, o1, C0, C1, C3, C4, DM, ZERO, BYTES, BF16)
        a = dequantize(ws.index(sn).load(WL), p, NW, 2, BYTES, BF16, ASM, REGS, DP, AL, W6, SB)
        d = warpgroup_mma_wait(0, deps=(d,))
        if ACC:
            acc += d * f[:, None]
            f = row_factor(f0, f1, C0, C1, NW, RL)
        else:
            acc = d
        barrier()
        nx = k + ST
        if nx < k1:
            mbarrier.expect(bar.index(st), xd.block_type.nbytes)
            tma.async_copy_global_to_shared(xd, [m0, nx * 128], bar.index(st), xs.index(st))
            async_copy.async_copy_global_to_shared(ws.index(st), wp + nx * WG)
            _fetch(m_s0, S0, st, t0, last, nx, G, C0, SPG, NW)
            _fetch(m_s1, S1, st, t0, last, nx, G, C1, SPG, NW)
            _fetch(m_z, Z, st, t0, last, nx, G, C2, SPG, NW)
            _fetch(m_o0, O0, st, t0, last, nx, G, C3, SPG, NW)
            _fetch(m_o1, O1, st, t0, last, nx, G, C4, SPG, NW)
        async_copy.commit_group()
        st += 1
        if st == ST:
            st = 0
            ph ^= 1

    on = pn * BN + gl.arange(0, BN, layout=RL)
    om = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, mma))
    at = om[None, :].to(gl.int64) * N + on[:, None]
    mask = (om < M)[None, :] & (on < N)[:, None]
    if SPLIT == 1:
        acc = outer_factors(acc, ROW0, ROW1, BIAS, on, N, R0, R1, HAS_BIAS)
        gl.store(Y + at, acc.to(ACT), mask=mask)
    else:
        extent = M.to(gl.int64) * N
        gl.store(PART + part * extent + at, acc, mask=mask)
        barrier()
        arrived = gl.atomic_add(COUNT + tile, 1)
        if arrived == SPLIT - 1:
            barrier()
            total = gl.zeros([BN, BM], gl.float32, mma)
            for j in range(SPLIT):
                total += gl.load(PART + j * extent + at, mask=mask, other=0.0, cache_modifier=".cg")
            total = outer_factors(total, ROW0, ROW1, BIAS, on, N, R0, R1, HAS_BIAS)
            gl.store(Y + at, total.to(ACT), mask=mask)
            gl.store(COUNT + tile, 0)
    async_copy.wait_group(0)
