"""Microseconds of a cut, roughly, on an H100: what orders the candidates of ``schedule.py``.

    max of  weights from memory,  turns of a warp,  instructions of all  (and shared memory)
    + x  + what a kernel costs whatever it does

``max`` is the third root of the sum of cubes: near a tie each is felt. Instructions of a group of
16 x 128 weights were counted in compiled code. The other constants are fitted to measured cuts: of
int4 to 619 of 4-bit codes at five layers, 1 to 16 rows, of MXFP4 and NVFP4 to 554 of a later build
(40 choices are within 0.4 % of the best in the mean, the worst within 2.1 %), of other weights to
cuts of an earlier build (2 % in the mean).
"""

from __future__ import annotations

from dataclasses import dataclass

from quant_kernels_cuda.cut import Schedule, sums_bytes
from quant_kernels_cuda.variant import Variant

__all__ = ["estimate", "instructions"]

_CODE = {"2": 89, "3": 142, "4": 77, "5": 79, "6": 79, "7": 79, "8": 79}  # by CODE_BITS
_FLOAT_CODE = {"4": 133, "8": 135}
_FP4_CODE = 107.6  # of 4-bit floats with their scale: fitted, a part hides behind the rest
_PER_US = 4 * 1755.0  # instructions of a multiprocessor: four schedulers at 1.755 GHz


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """Constants; of rates that a multiprocessor has, per microsecond.

    Attributes:
        bytes, x: of weights and of x that resident.cu reads.
        turn_us, instruction_us, turn: of a turn of its loop; what each instruction adds; how many
            a turn has beside those for weights.
        us: that a kernel costs whatever it does.
        join_us, join_block_us: of a cluster, and of every block beyond four.
        deep_us, deep_per_us, deep_most, deep_least: a deep ring helps where memory is the limit and
            keeps x waiting; by tiles of 8 rows.
        half_us, half_per_us, half_x, half_most, half_least: half of a stage before x lets x come
            sooner and weights later: per microsecond of reading weights, and of reading x.
        four_us, tight: four groups in registers leave none for scales, decoded late; the part that
            eight scales per 128 columns cost with three groups, or with two of 20 warps.
        general_*: the same of decode.cu; ``wide``: with 16 rows.
        chunk_us, chunk_instruction_us, chunk: of a chunk of its line.
        fill_us, slot_us: of what its ring holds, of a warp that shares a tile.
    """

    bytes: float
    x: float
    turn_us: float
    instruction_us: float
    turn: float
    us: float
    join_us: float
    join_block_us: float
    deep_us: tuple[float, float]
    deep_per_us: float
    deep_most: float
    deep_least: float
    half_us: float = 0.0
    half_per_us: float = 0.0
    half_x: float = 0.0
    half_most: float = 0.0
    half_least: float = 0.0
    four_us: float = 0.0
    tight: float = 0.0
    general_bytes: float
    general_x: float
    general_us: float
    chunk_us: float = 0.0023
    chunk_instruction_us: float
    chunk: float
    fill_us: float
    slot_us: float
    wide: float


_FOUR = _Fit(
    bytes=25.3e3, x=47.3e3, turn_us=0.177, instruction_us=0.00262, turn=63.1, us=2.35,
    join_us=0.533, join_block_us=0.262,
    deep_us=(1.98, 3.21), deep_per_us=0.399, deep_most=0.969, deep_least=-0.905,
    general_bytes=20.7e3, general_x=91.4e3, general_us=0.988,
    chunk_instruction_us=0.000127, chunk=106.0, fill_us=0.171, slot_us=0.0299, wide=1.12,
)  # fmt: skip
_FP4 = _Fit(  # scales in the weight
    bytes=26e3, x=49.4e3, turn_us=0.226, instruction_us=0.00235, turn=43.2, us=2.72,
    join_us=0.0986, join_block_us=0.254,
    deep_us=(2.05, 3.95), deep_per_us=0.356, deep_most=2.07, deep_least=-0.835,
    half_us=-0.17, half_per_us=0.0747, half_x=0.31, half_most=0.278, half_least=-0.391,
    four_us=0.606, tight=0.05,
    general_bytes=25.2e3, general_x=127e3, general_us=2.61, chunk_us=0.00148,
    chunk_instruction_us=0.000116, chunk=90.6, fill_us=0.187, slot_us=0.0153, wide=1.07,
)  # fmt: skip
_OTHER = _Fit(
    bytes=25e3, x=40.3e3, turn_us=0.243, instruction_us=0.00194, turn=102.0, us=2.24,
    join_us=0.3, join_block_us=0.25,
    deep_us=(1.3, 2.1), deep_per_us=0.28, deep_most=0.9, deep_least=-0.8,
    general_bytes=25e3, general_x=90.3e3, general_us=1.74,
    chunk_instruction_us=0.000129, chunk=127.0, fill_us=0.168, slot_us=0.0351, wide=1.15,
)  # fmt: skip
_JOIN_FREE = 4  # blocks of a cluster
_SHARED_PER_US, _SUMS_PER_US = 695e3, 16.1e3  # bytes of shared memory; of warps' sums
_IDLE, _PHASE_US, _CLUSTER_US = 0.238, 2.7, 1.38
_MANY_US, _MANY_PER_US, _MANY_MOST, _MANY_LEAST = 2.9, 0.2, 1.8, -0.7  # more than 16 warps


def _fit(v: Variant) -> _Fit:
    if v.bits != 4 or v.xsums:
        return _OTHER
    return _FP4 if dict(v.defines)["IN_WEIGHT"] == "1" else _FOUR


def instructions(v: Variant, nt: int) -> float:
    """Of one warp for 16 rows and 128 columns, with ``nt`` tiles of 8 rows of x."""
    d = dict(v.defines)
    if d["FLOAT_CODES"] == "1":
        out = float(_FLOAT_CODE[d["CODE_BITS"]])
        if d["IN_WEIGHT"] == "1":
            out = _FP4_CODE if d["CODE_BITS"] == "4" else out
            out += 3.5 * int(d["S0_SUBS"])
    else:
        out = float(_CODE[d["CODE_BITS"]])
    if d["Z_TYPE"] == "4":
        out += 3 + 8 * int(d["Z_SUBS"])
    out += v.parts * (4 * nt + 2.5 * (v.parts > 1))
    if v.xsums:
        out += v.parts * (4 * nt + 18)
    return out + 8 * nt


def _most(*values: float) -> float:
    return sum(v**3 for v in values) ** (1 / 3)


def _per_group(v: Variant) -> float:
    """Bytes of 16 x 128 weights."""
    return v.weight_bytes / (-(-v.n // 64) * 4 * v.groups)


def _busiest(s: Schedule, slots: int) -> int:
    """Groups of the scheduler that has most, where a team of ``slots`` warps shares a slice."""
    few, more = divmod(s.slice, slots)
    mine = [few + (slot < more) for slot in range(slots)] * s.sets
    return max(sum(mine[i::4]) for i in range(4))


def _resident(v: Variant, s: Schedule) -> float:
    f, each, groups = _fit(v), instructions(v, s.nt), s.mine * s.slice
    read = groups * _per_group(v) / f.bytes
    together = s.gpc * _busiest(s, s.slots) / _busiest(s, -(-s.slice // s.gpc))
    turns = -(-s.mine // s.sets) * (f.turn_us + together * each * f.instruction_us)
    issued = groups * (each + f.turn / s.gpc) / _PER_US
    x = s.m * s.slice * s.sets * 256 / f.x
    us = _most(read, turns, issued) + x + f.us
    if s.cluster > 1:
        us += f.join_us + f.join_block_us * max(0, s.cluster - _JOIN_FREE)
    if s.run > 1:
        limit = f.deep_us[s.nt - 1] + (s.nt == 2) * (v.parts > 1)
        us += max(f.deep_least, min(f.deep_most, limit - f.deep_per_us * (read - issued)))
    if s.run == 0 and s.gpc < 4:
        late = f.half_us + f.half_per_us * read - f.half_x * x
        us += max(f.half_least, min(f.half_most, late))
    if s.gpc == 4:
        us += f.four_us
    crowded = s.gpc == 3 or (s.gpc == 2 and s.warps > 16)
    if crowded and max((g.subs for _, g in v.ring), default=1) > 4:
        us *= 1 + f.tight
    return us


def _general(v: Variant, s: Schedule) -> float:
    f, each, groups = _fit(v), instructions(v, s.nt) + 4 * s.nt, s.mine * s.slice
    per_group = _per_group(v) * s.rt
    chunks = s.mine * s.phases * -(-s.span // s.gpc)
    runs = s.mine * s.phases * -(-s.span // (s.gpc << s.run))
    turns = -(-runs // s.warps) << s.run
    idle = turns * s.warps / chunks - 1
    read = groups * per_group / f.general_bytes * (1 + _IDLE * idle)
    moved = 2 * groups * (per_group + s.nt * 1024) / _SHARED_PER_US
    moved += 2 * s.mine * s.phases * sums_bytes(s) / _SUMS_PER_US
    work = turns * (f.chunk_us + s.gpc * s.rt * each * f.chunk_instruction_us)
    issued = groups * s.rt * (each + f.chunk / s.gpc / s.rt) / _PER_US
    us = _most(read, moved, work, issued) + s.m * s.slice * 256 / f.general_x
    us += _PHASE_US * (s.phases - 1) + -(-s.mine // s.batch) * _CLUSTER_US * (s.cluster > 1)
    us += f.fill_us * s.stages * s.gpc * s.rt + f.slot_us * s.slots + f.general_us
    if s.warps > 16:
        us += max(_MANY_LEAST, min(_MANY_MOST, _MANY_US - _MANY_PER_US * read))
    return us * f.wide if s.nt == 2 else us


def estimate(v: Variant, s: Schedule) -> float:
    """Microseconds of a call."""
    return _resident(v, s) if s.kernel == "resident" else _general(v, s)
