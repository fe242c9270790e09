"""What a stage of ``gluon_ws`` holds: x, codes and factors of 64 columns, or of twice 64 (PER).

    x      [B1, 64] and [B2, 64]                by TMA, one thread
    codes  of each consumer, in stored order    by cp.async, all four warps of the producer
    factors by group, of each consumer          the same; those by rectangle are read from memory

A stage is full when x has come (its bytes are counted) and the 128 copying threads have arrived. Of
many rows few stages fit, so they are short and free early; of few rows a barrier costs more.
With codes in registers instead, every group of columns took one latency of memory: a loop moves
what was fetched ahead from register to register, and a move waits for its load.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from quant_kernels_triton.gluon_parts import (
    dequantize,
    dequantize_few,
    gdc_wait,
    parameters,
    per_half,
    raw_factor,
    row_factor,
    staged,
)
from quant_kernels_triton.gluon_share import segment, segments

__all__ = ["advanced", "buffers", "fetch", "make", "producer", "scales"]


@gluon.jit
def advanced(st, ph, ST: gl.constexpr):
    """The stage behind ``st`` in the ring, and the phase of its barriers."""
    over = st == ST - 1
    return gl.where(over, 0, st + 1), gl.where(over, ph ^ 1, ph)


@gluon.jit
def _stages(P, C: gl.constexpr, SPG: gl.constexpr, NT: gl.constexpr, SLOTS: gl.constexpr):
    """Shared memory for a factor by group; a place holder for any other."""
    if staged(C, SPG):
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        return gl.allocate_shared_memory(P.dtype.element_ty, [SLOTS, NT, per_half(C, SPG), 8],
                                         flat)  # fmt: skip
    else:
        return P


@gluon.jit
def buffers(S0, S1, Z, O0, O1, BITS: gl.constexpr, NT: gl.constexpr, SLOTS: gl.constexpr,
             SPG: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr,
             C3: gl.constexpr, C4: gl.constexpr):  # fmt: skip
    """Codes and factors of one consumer: SLOTS of 64 columns."""
    if BITS >= 4:
        WS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
        ws = gl.allocate_shared_memory(gl.int16, [SLOTS, NT, BITS // 4, 32, 8], WS)
    else:
        W3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        ws = gl.allocate_shared_memory(gl.int16, [SLOTS, NT, 32, 4], W3)
    hs = ws
    if BITS == 3:
        H2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        hs = gl.allocate_shared_memory(gl.int32, [SLOTS, NT, 32], H2)
    ms = (_stages(S0, C0, SPG, NT, SLOTS), _stages(S1, C1, SPG, NT, SLOTS),
          _stages(Z, C2, SPG, NT, SLOTS), _stages(O0, C3, SPG, NT, SLOTS),
          _stages(O1, C4, SPG, NT, SLOTS))  # fmt: skip
    return ws, hs, ms


@gluon.jit
def _fetch(SM, P, st, tile0, last, half, G, C: gl.constexpr, SPG: gl.constexpr, NT: gl.constexpr):
    """Copy the factor of 64 columns, of all tiles of the block, to stage ``st``."""
    if staged(C, SPG):
        COLS: gl.constexpr = (C >> 20) * 16
        PER: gl.constexpr = per_half(C, SPG)
        V: gl.constexpr = 128 // P.dtype.element_ty.primitive_bitwidth  # 16 bytes
        L: gl.constexpr = gl.BlockedLayout(
            [1, 1, V], [32 * V // 8 // PER, PER, 8 // V], [4, 1, 1], [2, 1, 0]
        )
        i0 = gl.arange(0, NT, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
        i1 = gl.arange(0, PER, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
        i2 = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
        groups = (G * 128 + COLS - 1) // COLS
        tile = gl.minimum(tile0 + i0, last)[:, None, None]
        at = (tile * groups + half * 64 // COLS + i1[None, :, None]) * 8 + i2[None, None, :]
        async_copy.async_copy_global_to_shared(SM.index(st), P + at)


@gluon.jit
def _bring(ws, hs, ms, W, HIGH, P, st, tile0, half, NP, G, NT: gl.constexpr, BITS: gl.constexpr,
           SPG: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr,
           C3: gl.constexpr, C4: gl.constexpr):  # fmt: skip
    """Codes and factors of NT tiles and 64 columns to stage ``st``, by all threads."""
    last = NP // 16 - 1  # tiles beyond it are computed again from it and not stored
    if BITS >= 4:
        S2: gl.constexpr = BITS // 4
        L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 1, 32, 1], [4, 1, 1, 1], [3, 2, 1, 0])
        iw = gl.arange(0, NT, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))
        ip = gl.arange(0, S2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
        il = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))
        ie = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))
        HW: gl.constexpr = 256 * S2  # 16-bit words of half a group of a tile
        rt = gl.minimum(tile0 + iw, last).to(gl.int64) * (G * (2 * HW)) + half * HW
        rt = rt[:, None, None, None] + ip[None, :, None, None] * 256
        inner = il[None, None, :, None] * 8 + ie[None, None, None, :]
        async_copy.async_copy_global_to_shared(ws.index(st), W + (rt + inner))
    else:
        L3: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [4, 1, 1], [2, 1, 0])
        jw = gl.arange(0, NT, layout=gl.SliceLayout(1, gl.SliceLayout(2, L3)))
        jl = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, L3)))
        je = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))
        to = gl.minimum(tile0 + jw, last).to(gl.int64) * (G * 256) + half // 2 * 256 + half % 2 * 4
        few = jl[None, :, None] * 8 + je[None, None, :]
        async_copy.async_copy_global_to_shared(ws.index(st), W + (to[:, None, None] + few))
    if BITS == 3:
        L2: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        hw = gl.arange(0, NT, layout=gl.SliceLayout(1, L2))
        hl = gl.arange(0, 32, layout=gl.SliceLayout(0, L2))
        rh = gl.minimum(tile0 + hw, last).to(gl.int64) * (G * 64) + half // 2 * 64 + half % 2
        async_copy.async_copy_global_to_shared(hs.index(st), HIGH + (rh[:, None] + hl[None, :] * 2))
    _fetch(ms[0], P[0], st, tile0, last, half, G, C0, SPG, NT)
    _fetch(ms[1], P[1], st, tile0, last, half, G, C1, SPG, NT)
    _fetch(ms[2], P[2], st, tile0, last, half, G, C2, SPG, NT)
    _fetch(ms[3], P[3], st, tile0, last, half, G, C3, SPG, NT)
    _fetch(ms[4], P[4], st, tile0, last, half, G, C4, SPG, NT)


@gluon.jit
def _bring_all(wss, hss, mss, full, W, HIGH, P, st, pn, half, NP, G, PER: gl.constexpr,
               NC: gl.constexpr, NT: gl.constexpr, BITS: gl.constexpr, SPG: gl.constexpr,
               C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr,
               C4: gl.constexpr):  # fmt: skip
    """Codes and factors for all consumers to stage ``st``, from 64 columns number ``half`` on."""
    for h in gl.static_range(PER):
        for i in gl.static_range(NC):
            _bring(wss[i], hss[i], mss[i], W, HIGH, P, st * PER + h, (pn * NC + i) * NT, half + h,
                   NP, G, NT, BITS, SPG, C0, C1, C2, C3, C4)  # fmt: skip
    async_copy.mbarrier_arrive(full.index(st), increment_count=False)


@gluon.jit
def producer(xd, xe, xs, xt, wss, hss, mss, full, empty, W, HIGH, P, M, NP, G, B1: gl.constexpr,
             B2: gl.constexpr, ST: gl.constexpr, PER: gl.constexpr, NC: gl.constexpr,
             NT: gl.constexpr, BITS: gl.constexpr, SPG: gl.constexpr, C0: gl.constexpr,
             C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr,
             GN: gl.constexpr, PDL: gl.constexpr, U: gl.constexpr):  # fmt: skip
    """Fill the stages of all segments of this program."""
    BYTES: gl.constexpr = PER * (xd.block_type.nbytes // B1) * (B1 + B2)
    nm = gl.cdiv(M, B1 + B2)
    nn = gl.cdiv(NP, NC * NT * 16)
    GU = G // U  # shares are counted in rounds of the loop
    STEPS: gl.constexpr = 2 * U // PER  # stages of a round
    ahead = 0
    if PDL:  # weights do not depend on the kernel before: only x has to wait for it
        pn, pm, k0, k1, _ = segment(0, nm, nn, GU, GN)
        ahead = gl.minimum((k1 - k0) * STEPS, ST)
        for i in range(ahead):
            _bring_all(wss, hss, mss, full, W, HIGH, P, i, pn, (k0 * STEPS + i) * PER, NP, G, PER,
                       NC, NT, BITS, SPG, C0, C1, C2, C3, C4)  # fmt: skip
        gdc_wait()
    st = 0
    ph = 1
    n = 0
    for s in range(segments(nm * nn, GU)):
        pn, pm, k0, k1, _ = segment(s, nm, nn, GU, GN)
        m0 = pm * (B1 + B2)
        for i in range(k0 * STEPS, k1 * STEPS):
            mbarrier.wait(empty.index(st), ph)
            mbarrier.expect(full.index(st), BYTES)
            for h in gl.static_range(PER):
                at = [m0, (i * PER + h) * 64]
                to = xs.index(st * PER + h)
                tma.async_copy_global_to_shared(xd, at, full.index(st), to)
                if B2:
                    at2 = [m0 + B1, (i * PER + h) * 64]
                    to2 = xt.index(st * PER + h)
                    tma.async_copy_global_to_shared(xe, at2, full.index(st), to2)
            if n >= ahead:
                _bring_all(wss, hss, mss, full, W, HIGH, P, st, pn, i * PER, NP, G, PER, NC, NT,
                           BITS, SPG, C0, C1, C2, C3, C4)  # fmt: skip
            n += 1
            st, ph = advanced(st, ph, ST)
    async_copy.wait_group(0)


@gluon.jit
def _raw(SM, P, st, row0, tile0, last, half, G, K, C: gl.constexpr, SPG: gl.constexpr,
         P2: gl.constexpr, SB: gl.constexpr, PL: gl.constexpr):  # fmt: skip
    """A raw factor of 64 features and 64 columns in the layout PL: from its stage, or from memory.

    ``row0``: the first tile in the block; ``tile0``: in the matrix.
    """
    P4: gl.constexpr = gl.SliceLayout(4, PL)
    jl = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, P4))))
    lane = jl[None, None, None, :, None]
    if C == 7:
        return lane
    elif staged(C, SPG):
        PER: gl.constexpr = per_half(C, SPG)
        R: gl.constexpr = gl.BlockedLayout([1, PER, 1, 1], [1, 1, 8, 4], [4, 1, 1, 1], [3, 2, 1, 0])
        v = gl.expand_dims(SM.index(st).slice(row0, 4, 0).load(gl.SliceLayout(3, R)), 3)
        v, _ = gl.broadcast(v, gl.zeros([4, PER, 8, 4], P.dtype.element_ty, R))
        if PER == P2 * SB:
            v = v.reshape([4, 1, P2, SB, 32])
        else:
            v = v.reshape([4, 1, 1, 1, 32])
        return gl.convert_layout(v.permute([0, 1, 2, 4, 3]), PL, assert_trivial=True)
    else:
        jw = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, P4))))
        js = gl.arange(0, P2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, P4))))
        jb = gl.arange(
            0, SB,
            layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PL)))),
        )  # fmt: skip
        sub = (js * SB)[None, None, :, None, None] + jb[None, None, None, None, :]
        pt = gl.minimum(tile0 + jw, last)[:, None, None, None, None]
        return raw_factor(P, pt, sub, lane, half, G, K, -1, SPG, C)


@gluon.constexpr_function
def _layouts(bits, spg):
    """Groups that differ within a lane's words, pieces with scales of their own, words."""
    bits, spg = int(bits), int(spg)
    if bits < 4:
        return 2, 1, 4
    if bits == 8:
        return (2 if spg == 8 else 1), (2 if spg >= 4 else 1), 8
    return (spg // 2 if spg >= 2 else 1), 1, 8


@gluon.jit
def fetch(ws, hs, ms, P, st, row0: gl.constexpr, tile0, last, half, G, K, BITS: gl.constexpr,
          HAS_P: gl.constexpr, SPG: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
          C2: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr):  # fmt: skip
    """Codes of 64 features and 64 columns, third bits and raw factors, from a stage's half."""
    S2: gl.constexpr = 2 if BITS == 8 else 1
    SB: gl.constexpr = _layouts(BITS, SPG)[0]
    P2: gl.constexpr = _layouts(BITS, SPG)[1]
    NW: gl.constexpr = _layouts(BITS, SPG)[2]
    W6: gl.constexpr = gl.BlockedLayout(
        [1, 1, S2, 1, SB, NW // SB], [1, 1, 1, 32, 1, 1], [4, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    PL: gl.constexpr = gl.SliceLayout(5, W6)
    if BITS >= 4:
        WL: gl.constexpr = gl.BlockedLayout(
            [1, S2, 1, 8], [1, 1, 32, 1], [4, 1, 1, 1], [3, 2, 1, 0]
        )
        w = ws.index(st).slice(row0, 4, 0).load(WL)
    else:
        L3: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [4, 1, 1], [2, 1, 0])
        w = ws.index(st).slice(row0, 4, 0).load(L3)
    high = w
    if BITS == 3:
        HL: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, PL)))
        high = hs.index(st).slice(row0, 4, 0).load(HL)
    f0 = w
    f1 = w
    z = w
    o0 = w
    o1 = w
    if HAS_P:
        f0 = _raw(ms[0], P[0], st, row0, tile0, last, half, G, K, C0, SPG, P2, SB, PL)
        f1 = _raw(ms[1], P[1], st, row0, tile0, last, half, G, K, C1, SPG, P2, SB, PL)
        z = _raw(ms[2], P[2], st, row0, tile0, last, half, G, K, C2, SPG, P2, SB, PL)
        o0 = _raw(ms[3], P[3], st, row0, tile0, last, half, G, K, C3, SPG, P2, SB, PL)
        o1 = _raw(ms[4], P[4], st, row0, tile0, last, half, G, K, C4, SPG, P2, SB, PL)
    return w, high, f0, f1, z, o0, o1


@gluon.jit
def make(held, BITS: gl.constexpr, BF16: gl.constexpr, SPG: gl.constexpr, C0: gl.constexpr,
         C1: gl.constexpr, C3: gl.constexpr, C4: gl.constexpr, MODE: gl.constexpr,
         ZERO: gl.constexpr, ASM: gl.constexpr, REGS: gl.constexpr, AL: gl.constexpr):  # fmt: skip
    """What ``fetch`` gave to the A operand."""
    BYTES: gl.constexpr = BITS == 8
    S2: gl.constexpr = 2 if BYTES else 1
    SB: gl.constexpr = _layouts(BITS, SPG)[0]
    NW: gl.constexpr = _layouts(BITS, SPG)[2]
    W6: gl.constexpr = gl.BlockedLayout(
        [1, 1, S2, 1, SB, NW // SB], [1, 1, 1, 32, 1, 1], [4, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    HAS_P: gl.constexpr = MODE != 0 or ZERO != 0
    p = held
    if HAS_P:
        p = parameters(held[2], held[3], held[4], held[5], held[6], C0, C1, C3, C4, MODE, ZERO,
                       BYTES, BF16)  # fmt: skip
    if BITS >= 4:
        return dequantize(held[0], p, 4, 1, BYTES, BF16, ASM, REGS, HAS_P, AL, W6, SB)
    else:
        PL: gl.constexpr = gl.SliceLayout(5, W6)
        by = gl.arange(
            0, 2,
            layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PL)))),
        )  # fmt: skip
        high = (by * 8)[None, None, None, None, :]
        if BITS == 3:
            high = gl.expand_dims(gl.expand_dims(gl.expand_dims(held[1], 1), 2), 4) >> high
        return dequantize_few(held[0], high, p, BF16, ASM, REGS, HAS_P, AL, W6)


@gluon.jit
def scales(ms, P, st, row0: gl.constexpr, tile0, last, half, G, K, C0: gl.constexpr,
            C1: gl.constexpr, RL: gl.constexpr):  # fmt: skip
    """The product of the grouped factors of 64 features, float32."""
    W6: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, 1, 8], [1, 1, 1, 32, 1, 1], [4, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    PL: gl.constexpr = gl.SliceLayout(5, W6)
    f0 = _raw(ms[0], P[0], st, row0, tile0, last, half, G, K, C0, 1, 1, 1, PL)
    f1 = _raw(ms[1], P[1], st, row0, tile0, last, half, G, K, C1, 1, 1, 1, PL)
    return row_factor(f0, f1, C0, C1, 4, RL)
