"""4-bit weights by 8-bit activations for many rows: programs stay, one warp fetches all.

    y^T [N, M] = W [N, K] x^T    W in registers, x in shared memory, both of 8 bits for wgmma

The arithmetic of ``mixed_ws``: a consumer owns 64 output features of NH * BT tokens in NH halves,
which take turns with one buffer of sums. One warp fetches codes and x by TMA, across the ends of
tiles, so that the next tile begins while the last one is written. Codes that a consumer fetched
itself by ``cp.async`` would cost it two barriers for every 128 columns, which took a seventh of the
time.

SPLIT programs share the columns of a tile where a layer has few tiles; the first of them adds up
the sums of all, in order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from quant_kernels_triton.gluon_parts import barrier, gdc_launch_dependents, gdc_wait
from quant_kernels_triton.gluon_sums import give, take
from quant_kernels_triton.mixed_parts import factor_offsets, operand, piece, raw_factors
from quant_kernels_triton.mixed_ws import _multiply, _store

__all__ = ["mixed_turns"]


@gluon.jit
def _tile(i, M, NP, BM: gl.constexpr, GN: gl.constexpr):
    """Which 128 outputs, and the first token, of tile i."""
    nm = gl.cdiv(M, BM)
    nn = gl.cdiv(NP, 128)
    first = i // (GN * nm) * GN
    size = gl.minimum(nn - first, GN)
    return first + (i % (GN * nm)) % size, (i % (GN * nm)) // size * BM


@gluon.jit
def _part(i, tiles, G, SPLIT: gl.constexpr):
    """The tile of item i, its part of K, and the groups of that part.

    The parts that hand over their sums come first: a program that waits for them waits for programs
    that were started before it.
    """
    if SPLIT == 1:
        return i, 0, 0, G
    else:
        part = SPLIT - 1 - i // tiles
        per = gl.cdiv(G, SPLIT)
        return i % tiles, part, part * per, gl.minimum(part * per + per, G)


@gluon.jit
def _producer(xd, wd, xs, ws, full, empty, M, NP, G, tiles, BT: gl.constexpr, NH: gl.constexpr,
              GN: gl.constexpr, PDL: gl.constexpr, ST: gl.constexpr,
              SPLIT: gl.constexpr):  # fmt: skip
    BYTES: gl.constexpr = xd.block_type.nbytes * NH + wd.block_type.nbytes
    begun = 0
    if PDL:  # codes do not depend on the kernel before: only x has to wait for it
        tile, _, k0, k1 = _part(gl.program_id(0), tiles, G, SPLIT)
        pn, m0 = _tile(tile, M, NP, BT * NH, GN)
        begun = gl.minimum(k1 - k0, ST)
        for i in range(begun):
            mbarrier.expect(full.index(i), BYTES)
            tma.async_copy_global_to_shared(
                wd, [pn * 8, (k0 + i) * 256], full.index(i), ws.index(i)
            )
        gdc_wait()
    st = 0
    ph = 1
    for t in range(gl.program_id(0), tiles * SPLIT, gl.num_programs(0)):
        tile, _, k0, k1 = _part(t, tiles, G, SPLIT)
        pn, m0 = _tile(tile, M, NP, BT * NH, GN)
        for k in range(k0, k1):
            mbarrier.wait(empty.index(st), ph)
            if begun > 0:
                begun -= 1
            else:
                mbarrier.expect(full.index(st), BYTES)
                tma.async_copy_global_to_shared(wd, [pn * 8, k * 256], full.index(st), ws.index(st))
            for h in gl.static_range(NH):
                tma.async_copy_global_to_shared(
                    xd, [m0 + h * BT, k * 128], full.index(st), xs.index(st * NH + h)
                )
            st += 1
            if st == ST:
                st = 0
                ph ^= 1


@gluon.jit
def _both(acc0, acc1, Y, SX, ROW0, ROW1, BIAS, M, N, n0, m0, mma: gl.constexpr, BT: gl.constexpr,
          NH: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr,
          POWER: gl.constexpr):  # fmt: skip
    _store(acc0, 0, Y, SX, SX, ROW0, ROW1, BIAS, M, N, n0, m0, mma, BT, R0, R1, HAS_BIAS,
           POWER, False)  # fmt: skip
    if NH == 2:
        _store(acc1, 1, Y, SX, SX, ROW0, ROW1, BIAS, M, N, n0, m0, mma, BT, R0, R1, HAS_BIAS,
               POWER, False)  # fmt: skip


@gluon.jit
def _finish(acc0, acc1, tile, part, Y, SX, ROW0, ROW1, BIAS, PART, COUNT, M, N, n0, m0,
            mma: gl.constexpr, ROW: gl.constexpr, BT: gl.constexpr, NH: gl.constexpr,
            R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr, POWER: gl.constexpr,
            SPLIT: gl.constexpr):  # fmt: skip
    """Hand over the sums of a part, or add those of the others and store the tile."""
    if SPLIT == 1:
        _both(acc0, acc1, Y, SX, ROW0, ROW1, BIAS, M, N, n0, m0, mma, BT, NH, R0, R1, HAS_BIAS,
              POWER)  # fmt: skip
    else:
        SIZE: gl.constexpr = 64 * BT * NH
        B2: gl.constexpr = BT if NH == 2 else 0
        acc0 = acc0.to(gl.float32)
        acc1 = acc1.to(gl.float32)
        slot = tile * 2 + ROW
        own = PART + slot.to(gl.int64) * (SIZE * (SPLIT - 1))
        if part > 0:
            give(acc0, acc1, own + (part - 1) * SIZE, BT, B2)
            barrier()
            gl.atomic_add(COUNT + slot, 1)
        else:
            while gl.atomic_cas(COUNT + slot, SPLIT - 1, 0) != SPLIT - 1:
                pass
            barrier()
            for j in range(SPLIT - 1):
                acc0, acc1 = take(acc0, acc1, own + j * SIZE, BT, B2, mma, mma)
            _both(acc0, acc1, Y, SX, ROW0, ROW1, BIAS, M, N, n0, m0, mma, BT, NH, R0, R1, HAS_BIAS,
                  POWER)  # fmt: skip


@gluon.jit
def _consumer(xs, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART, COUNT, M, N, NP, G,
              tiles,
              ROW: gl.constexpr, BT: gl.constexpr, NH: gl.constexpr, GN: gl.constexpr,
              PDL: gl.constexpr, ST: gl.constexpr, INT: gl.constexpr, C0: gl.constexpr,
              C1: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr,
              ASM: gl.constexpr, POWER: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    """64 output features of every tile of this program."""
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    KEEP: gl.constexpr = gl.int32 if (INT and C0 == 7) else gl.float32
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BT, 32]
    )
    AL: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    RL: gl.constexpr = gl.SliceLayout(1, mma)
    st = 0
    ph = 0
    for t in range(gl.program_id(0), tiles * SPLIT, gl.num_programs(0)):
        tile, part, k0, k1 = _part(t, tiles, G, SPLIT)
        pn, m0 = _tile(tile, M, NP, BT * NH, GN)
        n0 = (pn * 2 + ROW) * 64
        rows = gl.minimum(n0 + gl.arange(0, 64, layout=RL), NP - 1)
        at0 = factor_offsets(rows, G, C0)
        at1 = factor_offsets(rows, G, C1)
        later = raw_factors(S0, S1, at0, at1, k0, G, rows, 1, C0, C1)
        d = gl.zeros([64, BT], SUM, mma)
        acc0 = gl.zeros([64, BT], KEEP, mma)
        acc1 = acc0
        for g in range(k0, k1):
            raw = later
            later = raw_factors(S0, S1, at0, at1, g + 1, G, rows, 1, C0, C1)
            mbarrier.wait(full.index(st), ph)
            codes = piece(words.index(st * 2 + ROW), 4, 0, 1, False)
            a = operand(codes, 64, 128, INT, False, ASM, AL)
            x0 = xs.index(st * NH).permute((1, 0))
            acc0, d = _multiply(a, x0, acc0, d, raw[0], raw[1], C0, C1, INT)
            if NH == 2:
                x1 = xs.index(st * NH + 1).permute((1, 0))
                acc1, d = _multiply(a, x1, acc1, d, raw[0], raw[1], C0, C1, INT)
            mbarrier.arrive(empty.index(st), count=1)
            st += 1
            if st == ST:
                st = 0
                ph ^= 1
        if PDL:  # SX belongs to the kernel before until it has ended
            gdc_wait()
        _finish(acc0, acc1, tile, part, Y, SX, ROW0, ROW1, BIAS, PART, COUNT, M, N, n0, m0, mma,
                ROW, BT, NH, R0, R1, HAS_BIAS, POWER, SPLIT)  # fmt: skip


@gluon.jit(do_not_specialize=["M", "G"])  # Triton 3.6 fails on a loop of one round
def mixed_turns(xd, wd, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART, COUNT, M, N, NP, G,
                BT: gl.constexpr, NH: gl.constexpr, ST: gl.constexpr, GN: gl.constexpr,
                PDL: gl.constexpr, INT: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
                R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr, ASM: gl.constexpr,
                POWER: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    """``wd`` describes the codes as [NP / 16, words]."""
    ELEMENT: gl.constexpr = gl.int8 if INT else gl.float8e4nv
    tiles = gl.cdiv(M, BT * NH) * gl.cdiv(NP, 128)
    xs = gl.allocate_shared_memory(ELEMENT, [ST * NH, BT, 128], xd.layout)
    ws = gl.allocate_shared_memory(gl.int32, [ST, 8, 256], wd.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    words = ws._reinterpret(gl.int8, [ST * 2, 4, 2, 32, 16], FLAT)
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
            (_consumer, (xs, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART, COUNT, M,
                         N, NP, G, tiles, 0, BT, NH, GN, PDL, ST, INT, C0, C1, R0, R1, HAS_BIAS,
                         ASM, POWER, SPLIT)),
            (_consumer, (xs, words, full, empty, S0, S1, ROW0, ROW1, BIAS, SX, Y, PART, COUNT, M,
                         N, NP, G, tiles, 1, BT, NH, GN, PDL, ST, INT, C0, C1, R0, R1, HAS_BIAS,
                         ASM, POWER, SPLIT)),
            (_producer, (xd, wd, xs, ws, full, empty, M, NP, G, tiles, BT, NH, GN, PDL, ST, SPLIT)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
