"""Gluon GEMM for many rows on Hopper: one warp fetches x, two or three warpgroups multiply.

    y^T [N, M] = W [N, K] x^T: W is the register operand of wgmma, x the shared one.

A consumer warpgroup owns 64 output features of B1 + B2 rows (B2 may be 0: two tiles make row counts
that are no power of two). It reads its codes from memory straight into registers two groups of
columns ahead and dequantizes the next 64 columns while wgmma works on the present ones; consumers
run independently, so that one dequantizes while another multiplies. x arrives by TMA in stages of
64 columns, guarded by a pair of barriers each. With ACC the group's scale multiplies its sums in
float32 instead of its weights.

Blocks stay: each takes whole tiles in turn, and the last one or two rounds of tiles are cut along K
into equal shares (``gluon_share``), so that no processor waits for a round that is not full. A
share that ends inside a tile owns it: it adds the sums of the shares behind in their order, so
results repeat bit for bit. It waits for blocks of smaller number only, which were started earlier:
nothing is assumed about how many run at once.
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
    row_factor,
    shifted,
)
from quant_kernels_triton.gluon_share import segment, segments

__all__ = ["specialized"]


@gluon.jit
def _producer(xd, xe, xs, xt, full, empty, M, NP, G, EXPERT, BOUNDS, B1: gl.constexpr,
              B2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, GN: gl.constexpr,
              GROUPED: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    if PDL:
        gdc_wait()
    BYTES: gl.constexpr = xd.block_type.nbytes // B1 * (B1 + B2)
    nm = gl.cdiv(M, B1 + B2)
    nn = gl.cdiv(NP, NC * 64)
    st = 0
    ph = 1
    for s in range(segments(nm * nn, G)):
        _, pm, k0, k1, _ = segment(s, nm, nn, G, GN)
        m0 = pm * (B1 + B2)
        if GROUPED:
            m0 = gl.load(BOUNDS + 2 * pm)
            k1 = gl.where(gl.load(EXPERT + pm) < 0, k0, k1)
        for k in range(k0 * 2, k1 * 2):
            mbarrier.wait(empty.index(st), ph)
            mbarrier.expect(full.index(st), BYTES)
            tma.async_copy_global_to_shared(xd, [m0, k * 64], full.index(st), xs.index(st))
            if B2:
                tma.async_copy_global_to_shared(xe, [m0 + B1, k * 64], full.index(st), xt.index(st))
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
def _fetch(Wp, P, pt, sub, lane, g, G, K, HW: gl.constexpr, SPG: gl.constexpr, C0: gl.constexpr,
           C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr):  # fmt: skip
    """Codes of both halves of group ``g`` and their raw factors."""
    g = gl.minimum(g, G - 1)
    wa = gl.load(Wp + g * (2 * HW))
    wb = gl.load(Wp + g * (2 * HW) + HW)
    sa = _raws(P, pt, sub, lane, g, G, K, 0, SPG, C0, C1, C2, C3, C4)
    sb = sa
    if SPG >= 2:  # the halves of a group have scales of their own
        sb = _raws(P, pt, sub, lane, g, G, K, 1, SPG, C0, C1, C2, C3, C4)
    return wa, wb, sa, sb


@gluon.jit
def _begin(W, P, iw, inner, jw, sub, lane, s, nm, nn, NP, G, K, ROW: gl.constexpr, NC: gl.constexpr,
           GN: gl.constexpr, HW: gl.constexpr, SPG: gl.constexpr, C0: gl.constexpr,
           C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr):  # fmt: skip
    """Addresses of segment ``s``, and the codes and raw factors of its first two groups."""
    pn, _, k0, _, _ = segment(s, nm, nn, G, GN)
    # tiles beyond the last are computed again from the last one and not stored
    rt = gl.minimum((pn * NC + ROW) * 4 + iw, NP // 16 - 1)
    Wp = W + (rt.to(gl.int64)[:, None, None, None] * G * (2 * HW) + inner)
    pt = gl.minimum((pn * NC + ROW) * 4 + jw, NP // 16 - 1)[:, None, None, None, None]
    wa, wb, sa, sb = _fetch(Wp, P, pt, sub, lane, k0, G, K, HW, SPG, C0, C1, C2, C3, C4)
    na, nb, ta, tb = _fetch(Wp, P, pt, sub, lane, k0 + 1, G, K, HW, SPG, C0, C1, C2, C3, C4)
    return Wp, pt, wa, wb, sa, sb, na, nb, ta, tb


@gluon.jit
def _operand(w, raw, BYTES: gl.constexpr, BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
             C3: gl.constexpr, C4: gl.constexpr, MODE: gl.constexpr, ZERO: gl.constexpr,
             ASM: gl.constexpr, REGS: gl.constexpr, AL: gl.constexpr, W6: gl.constexpr,
             SB: gl.constexpr):  # fmt: skip
    """Codes of 64 columns and their raw factors to the A operand."""
    HAS_P: gl.constexpr = MODE != 0 or ZERO != 0
    S2: gl.constexpr = 2 if BYTES else 1
    # carried as 32-bit words: two 16-bit ones would take a register each
    w = gl.join(w.to(gl.int16), (w >> 16).to(gl.int16)).reshape([4, S2, 32, 8])
    p = raw
    if HAS_P:
        p = parameters(
            raw[0], raw[1], raw[2], raw[3], raw[4], C0, C1, C3, C4, MODE, ZERO, BYTES, BF16
        )
    return dequantize(w, p, 4, 1, BYTES, BF16, ASM, REGS, HAS_P, AL, W6, SB)


@gluon.jit
def _multiply(a, x1, x2, acc, acc2, FIRST: gl.constexpr, B2: gl.constexpr, AL2: gl.constexpr):
    """acc += a x for both tiles of rows; with FIRST the sums start at zero. Not waited for."""
    d = warpgroup_mma(a, x1.permute((1, 0)), acc, use_acc=not FIRST, is_async=True)
    e = acc2
    if B2:
        a2 = gl.convert_layout(a, AL2, assert_trivial=True)
        e = warpgroup_mma(a2, x2.permute((1, 0)), acc2, use_acc=not FIRST, is_async=True)
    return d, e


@gluon.jit
def _wait(d, e, B2: gl.constexpr):
    if B2:
        d, e = warpgroup_mma_wait(0, deps=(d, e))
    else:
        d = warpgroup_mma_wait(0, deps=(d,))
        e = d
    return d, e


@gluon.jit
def _sums(PART, B: gl.constexpr, mma: gl.constexpr):
    """Addresses of the sums of 64 features of B rows, in the order of the registers."""
    on = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    om = gl.arange(0, B, layout=gl.SliceLayout(0, mma))
    lane = (on // 16 * 32 + on % 8 * 4)[:, None] + (om % 8 // 2)[None, :]
    register = (om // 8 * 4 + om % 2)[None, :] + (on // 8 % 2 * 2)[:, None]
    return PART + (register * 128 + lane)


@gluon.jit
def _store(acc, ROW0, ROW1, BIAS, Y, ORDER, m0, m1, n0, N, B: gl.constexpr, BF16: gl.constexpr,
           R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr, GROUPED: gl.constexpr,
           mma: gl.constexpr):  # fmt: skip
    """Rows m0 .. m1 of y, 64 features from n0 on."""
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    rn = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    acc = outer_factors(acc, ROW0, ROW1, BIAS, rn, N, R0, R1, HAS_BIAS)
    OL: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    y = gl.convert_layout(acc.to(ACT), OL)
    on = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OL))
    om = m0 + gl.arange(0, B, layout=gl.SliceLayout(0, OL))
    to = om
    if GROUPED:
        to = gl.load(ORDER + om, mask=om < m1, other=0)
    gl.store(Y + to[None, :].to(gl.int64) * N + on[:, None], y,
             mask=(om < m1)[None, :] & (on < N)[:, None])  # fmt: skip


@gluon.jit
def _consumer(xs, xt, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER, EXPERT,
              BOUNDS, M, N, NP, K, G, ROW: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr,
              ST: gl.constexpr, NC: gl.constexpr, GN: gl.constexpr, ACC: gl.constexpr,
              BYTES: gl.constexpr, BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
              C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr, R0: gl.constexpr,
              R1: gl.constexpr, HAS_BIAS: gl.constexpr, ZERO: gl.constexpr, MODE: gl.constexpr,
              SPG: gl.constexpr, ASM: gl.constexpr, REGS: gl.constexpr, GROUPED: gl.constexpr,
              PDL: gl.constexpr):  # fmt: skip
    BM: gl.constexpr = B1 + B2
    S2: gl.constexpr = 2 if BYTES else 1
    SB: gl.constexpr = (2 if SPG == 8 else 1) if BYTES else (SPG // 2 if SPG >= 2 else 1)
    P2: gl.constexpr = S2 if SPG >= 4 else 1
    DM: gl.constexpr = 0 if ACC else MODE
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B1, 16]
    )
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
    iw = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    ip = gl.arange(0, S2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    il = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WL))))
    ie = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WL))))
    HW: gl.constexpr = 128 * S2  # words of half a group of a tile
    inner = ip[None, :, None, None] * 128 + il[None, None, :, None] * 4 + ie[None, None, None, :]
    jw = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, P4))))
    js = gl.arange(0, P2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, P4))))
    jl = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, P4))))
    jb = gl.arange(
        0, SB, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PL))))
    )
    sub = (js * SB)[None, None, :, None, None] + jb[None, None, None, None, :]
    lane = jl[None, None, None, :, None]

    nm = gl.cdiv(M, BM)
    nn = gl.cdiv(NP, NC * 64)
    count = segments(nm * nn, G)
    # registers: codes and factors of two groups; see the loop
    Wp, pt, wa, wb, sa, sb, na, nb, ta, tb = _begin(
        W, P, iw, inner, jw, sub, lane, 0, nm, nn, NP, G, K, ROW, NC, GN, HW, SPG, C0, C1, C2, C3,
        C4,
    )  # fmt: skip
    st = 0
    ph = 0
    for s in range(count):
        # asked again, not carried: Triton 3.6 keeps a loop bound that is assigned under an ``if``
        pn, pm, k0, k1, other = segment(s, nm, nn, G, GN)
        m0 = pm * BM
        m1 = M
        if GROUPED:
            m0 = gl.load(BOUNDS + 2 * pm)
            expert = gl.load(EXPERT + pm)  # -1: none, nothing is read or stored
            m1 = gl.where(expert < 0, m0, gl.load(BOUNDS + 2 * pm + 1))
            k1 = gl.where(expert < 0, k0, k1)
        n0 = (pn * NC + ROW) * 64
        # registers: half 1 of group g, both halves of g + 1; g + 2 is fetched during g
        a = _operand(wa, sa, BYTES, BF16, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL, W6, SB)
        acc = gl.zeros([64, B1], gl.float32, mma)
        acc2 = acc
        if B2:
            acc2 = gl.zeros([64, B2], gl.float32, mmb)
        for g in range(k0, k1):
            ma, mb, ua, ub = _fetch(Wp, P, pt, sub, lane, g + 2, G, K, HW, SPG, C0, C1, C2, C3, C4)
            mbarrier.wait(full.index(st), ph)
            d, e = _multiply(a, xs.index(st), xt.index(st), acc, acc2, ACC, B2, AL2)
            a = _operand(wb, sb, BYTES, BF16, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL, W6, SB)
            d, e = _wait(d, e, B2)
            mbarrier.arrive(empty.index(st), count=1)
            st += 1
            if st == ST:
                st = 0
                ph ^= 1
            mbarrier.wait(full.index(st), ph)
            d, e = _multiply(a, xs.index(st), xt.index(st), d, e, False, B2, AL2)
            a = _operand(na, ta, BYTES, BF16, C0, C1, C3, C4, DM, ZERO, ASM, REGS, AL, W6, SB)
            if ACC:
                f = row_factor(sa[0], sa[1], C0, C1, 4, gl.SliceLayout(1, mma))
                d, e = _wait(d, e, B2)
                acc += d * f[:, None]
                if B2:
                    f2 = gl.convert_layout(f, gl.SliceLayout(1, mmb), assert_trivial=True)
                    acc2 += e * f2[:, None]
                sa = ta
            else:
                acc, acc2 = _wait(d, e, B2)
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
        if PDL:
            gdc_wait()
        own = gl.num_programs(0) - 1 - gl.program_id(0)
        SIZE: gl.constexpr = 64 * BM
        if k0 > 0:
            slot = own * NC + ROW
            gl.store(_sums(PART + slot * SIZE, B1, mma), acc)
            if B2:
                gl.store(_sums(PART + slot * SIZE + 64 * B1, B2, mmb), acc2)
            barrier()
            gl.atomic_xchg(COUNT + slot, 1)
        else:
            for j in range(own + 1, own + 1 + other):
                slot = j * NC + ROW
                seen = gl.atomic_cas(COUNT + slot, 1, 0)
                while seen != 1:
                    seen = gl.atomic_cas(COUNT + slot, 1, 0)
                barrier()
                acc += gl.load(_sums(PART + slot * SIZE, B1, mma), cache_modifier=".cg")
                if B2:
                    at = _sums(PART + slot * SIZE + 64 * B1, B2, mmb)
                    acc2 += gl.load(at, cache_modifier=".cg")
        if s + 1 < count:  # the next first codes arrive while this tile is stored
            Wp, pt, wa, wb, sa, sb, na, nb, ta, tb = _begin(
                W, P, iw, inner, jw, sub, lane, s + 1, nm, nn, NP, G, K, ROW, NC, GN, HW, SPG, C0,
                C1, C2, C3, C4,
            )  # fmt: skip
        if k0 == 0:
            _store(acc, ROW0, ROW1, BIAS, Y, ORDER, m0, m1, n0, N, B1, BF16, R0, R1, HAS_BIAS,
                   GROUPED, mma)  # fmt: skip
            if B2:
                _store(acc2, ROW0, ROW1, BIAS, Y, ORDER, m0 + B1, m1, n0, N, B2, BF16, R0, R1,
                       HAS_BIAS, GROUPED, mmb)  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def specialized(xd, xe, W, S0, S1, Z, O0, O1, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER, EXPERT,
                BOUNDS, M, N, NP, K, G,
                B1: gl.constexpr, B2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr,
                GN: gl.constexpr, ACC: gl.constexpr, GROUPED: gl.constexpr,
                PDL: gl.constexpr, BYTES: gl.constexpr, BF16: gl.constexpr,
                C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr,
                C4: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr,
                ZERO: gl.constexpr, MODE: gl.constexpr,
                SPG: gl.constexpr, ASM: gl.constexpr, REGS: gl.constexpr):  # fmt: skip
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    W = W.to(gl.pointer_type(gl.int32), bitcast=True)
    if GROUPED:  # one tile for each program, of one expert; see gluon_ring
        if PDL:
            gdc_wait()
        nm = gl.cdiv(M, B1 + B2)
        _, pm, _, _, _ = segment(0, nm, gl.cdiv(NP, NC * 64), G, GN)
        expert = gl.maximum(gl.load(EXPERT + pm), 0)
        WG: gl.constexpr = 512 if BYTES else 256
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
    xs = gl.allocate_shared_memory(ACT, [ST, B1, 64], xd.layout)
    xt = xs
    if B2:
        xt = gl.allocate_shared_memory(ACT, [ST, B2, 64], xe.layout)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=NC)
    fence_async_shared()
    barrier()
    if PDL:
        gdc_launch_dependents()
    P = (S0, S1, Z, O0, O1)
    if NC == 2:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             EXPERT, BOUNDS, M, N, NP, K, G, 0, B1, B2, ST, NC, GN, ACC, BYTES,
                             BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG, ASM, REGS,
                             GROUPED, PDL)),
                (_consumer, (xs, xt, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             EXPERT, BOUNDS, M, N, NP, K, G, 1, B1, B2, ST, NC, GN, ACC, BYTES,
                             BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG, ASM, REGS,
                             GROUPED, PDL)),
                (_producer, (xd, xe, xs, xt, full, empty, M, NP, G, EXPERT, BOUNDS, B1, B2, ST, NC,
                             GN, GROUPED, PDL)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (xs, xt, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             EXPERT, BOUNDS, M, N, NP, K, G, 0, B1, B2, ST, NC, GN, ACC, BYTES,
                             BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG, ASM, REGS,
                             GROUPED, PDL)),
                (_consumer, (xs, xt, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             EXPERT, BOUNDS, M, N, NP, K, G, 1, B1, B2, ST, NC, GN, ACC, BYTES,
                             BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG, ASM, REGS,
                             GROUPED, PDL)),
                (_consumer, (xs, xt, full, empty, W, P, ROW0, ROW1, BIAS, Y, PART, COUNT, ORDER,
                             EXPERT, BOUNDS, M, N, NP, K, G, 2, B1, B2, ST, NC, GN, ACC, BYTES,
                             BF16, C0, C1, C2, C3, C4, R0, R1, HAS_BIAS, ZERO, MODE, SPG, ASM, REGS,
                             GROUPED, PDL)),
                (_producer, (xd, xe, xs, xt, full, empty, M, NP, G, EXPERT, BOUNDS, B1, B2, ST, NC,
                             GN, GROUPED, PDL)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
