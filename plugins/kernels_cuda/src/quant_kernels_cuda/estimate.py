"""Microseconds of a cut, roughly, on an H100: what orders the candidates of ``schedule.py``.

    max of  weights from memory,  turns of a warp,  instructions of all  (and shared memory)
    + x  + what a kernel costs whatever it does

``max`` is the third root of the sum of cubes: near a tie each is felt. Instructions of a group of
16 x 128 weights were counted in compiled code. The other constants are fitted to measured cuts of
five layers of int4, fp4 and fp8, 1 to 16 rows: of 64 choices the mean is within 2 % of the best.
"""

from __future__ import annotations

from quant_kernels_cuda.cut import Schedule, sums_bytes
from quant_kernels_cuda.variant import Variant

__all__ = ["estimate", "instructions"]

_CODE = {"2": 89, "3": 142, "4": 77, "5": 79, "6": 79, "7": 79, "8": 79}  # by CODE_BITS
_FLOAT_CODE = {"4": 134, "8": 135}
_PER_US = 4 * 1755.0  # instructions of a multiprocessor: four schedulers at 1.755 GHz

_BYTES_PER_US, _X_PER_US = 25e3, 40.3e3  # of a multiprocessor: weights, x
_TURN_US, _INSTRUCTION_US, _TURN = 0.243, 0.00194, 102.0  # _TURN: instructions
_RESIDENT_US = 2.24
_JOIN_US, _JOIN_BLOCK_US, _JOIN_FREE = 0.3, 0.25, 4  # of a cluster, and of blocks beyond four
# A deep ring helps where memory is the limit, and keeps x waiting: us, by tiles of 8 rows
_DEEP_US, _DEEP_PER_US, _DEEP_MOST, _DEEP_LEAST = {1: 1.3, 2: 2.1}, 0.28, 0.9, -0.8

_GENERAL_BYTES_PER_US, _GENERAL_X_PER_US = 25e3, 90.3e3
_SHARED_PER_US, _SUMS_PER_US = 695e3, 16.1e3  # bytes of shared memory; of warps' sums
_IDLE, _PHASE_US, _CLUSTER_US, _FILL_US = 0.238, 2.7, 1.38, 0.168
_CHUNK_US, _CHUNK_INSTRUCTION_US, _CHUNK = 0.0023, 0.000129, 127.0
_GENERAL_US, _SLOT_US = 1.74, 0.0351
_WIDE = 1.15  # 16 rows
_MANY_US, _MANY_PER_US, _MANY_MOST, _MANY_LEAST = 2.9, 0.2, 1.8, -0.7  # more than 16 warps


def instructions(v: Variant, nt: int) -> float:
    """Of one warp for 16 rows and 128 columns, with ``nt`` tiles of 8 rows of x."""
    d = dict(v.defines)
    if d["FLOAT_CODES"] == "1":
        out = _FLOAT_CODE[d["CODE_BITS"]] + 3.5 * int(d["S0_SUBS"]) * int(d["IN_WEIGHT"])
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
    each, groups = instructions(v, s.nt), s.mine * s.slice
    read = groups * _per_group(v) / _BYTES_PER_US
    together = s.gpc * _busiest(s, s.slots) / _busiest(s, -(-s.slice // s.gpc))
    turns = -(-s.mine // s.sets) * (_TURN_US + together * each * _INSTRUCTION_US)
    issued = groups * (each + _TURN / s.gpc) / _PER_US
    us = _most(read, turns, issued) + s.m * s.slice * s.sets * 256 / _X_PER_US + _RESIDENT_US
    if s.cluster > 1:
        us += _JOIN_US + _JOIN_BLOCK_US * max(0, s.cluster - _JOIN_FREE)
    if s.run * s.gpc > 3:
        limit = _DEEP_US[s.nt] + (s.nt == 2) * (v.parts > 1)
        us += max(_DEEP_LEAST, min(_DEEP_MOST, limit - _DEEP_PER_US * (read - issued)))
    return us


def _general(v: Variant, s: Schedule) -> float:
    each, groups = instructions(v, s.nt) + 4 * s.nt, s.mine * s.slice
    per_group = _per_group(v) * s.rt
    chunks = s.mine * s.phases * -(-s.span // s.gpc)
    runs = s.mine * s.phases * -(-s.span // (s.gpc << s.run))
    turns = -(-runs // s.warps) << s.run
    idle = turns * s.warps / chunks - 1
    read = groups * per_group / _GENERAL_BYTES_PER_US * (1 + _IDLE * idle)
    moved = 2 * groups * (per_group + s.nt * 1024) / _SHARED_PER_US
    moved += 2 * s.mine * s.phases * sums_bytes(s) / _SUMS_PER_US
    work = turns * (_CHUNK_US + s.gpc * s.rt * each * _CHUNK_INSTRUCTION_US)
    issued = groups * s.rt * (each + _CHUNK / s.gpc / s.rt) / _PER_US
    us = _most(read, moved, work, issued) + s.m * s.slice * 256 / _GENERAL_X_PER_US
    us += _PHASE_US * (s.phases - 1) + -(-s.mine // s.batch) * _CLUSTER_US * (s.cluster > 1)
    us += _FILL_US * s.stages * s.gpc * s.rt + _SLOT_US * s.slots + _GENERAL_US
    if s.warps > 16:
        us += max(_MANY_LEAST, min(_MANY_MOST, _MANY_US - _MANY_PER_US * read))
    return us * _WIDE if s.nt == 2 else us


def estimate(v: Variant, s: Schedule) -> float:
    """Microseconds of a call."""
    return _resident(v, s) if s.kernel == "resident" else _general(v, s)
