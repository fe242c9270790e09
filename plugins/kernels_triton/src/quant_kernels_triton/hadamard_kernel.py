"""The Hadamard transform behind core's contract (op "hadamard"), and its tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.quantizer import Weightless
from quant_core.kernels.storage import misused
from quant_core.spec import OpSpec
from quant_kernels_triton.interpreter import interpreting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hadamard", "tile", "warps"]

_ACTS = ("bfloat16", "float16", "float32")
_MOST = 32768  # elements of a tile: what a program holds in registers
_LEAST = 16  # of each side of a product
_US = 4.0  # one small launch; torch's operations took four to nine times as long on an H100


def tile(n: int, m: int) -> tuple[int, int, int, int] | None:
    """(runs, m as a power of two, A, B) of a tile; None if no tile holds ``n`` features.

    A is 1 or at least 16, as are B and, unless it is 1, the padded m.
    """
    size = n // m
    if size & (size - 1) or size * m != n or size < _LEAST:
        return None
    p = size.bit_length() - 1
    a = 1 if p <= 7 else 1 << (p // 2)
    mp = 1 if m == 1 else max(_LEAST, 1 << (m - 1).bit_length())
    b, held = size // a, mp * size
    if held > _MOST or b > 128 or mp > 64:
        return None
    return max(1, _LEAST // (mp * a), 2048 // held), mp, a, b


def warps(held: int) -> int:
    """Warps for a tile of ``held`` elements."""
    return 4 if held <= 4096 else 8 if held <= 16384 else 16


class Hadamard(Weightless):
    """See ``hadamard``."""

    name = "triton_hadamard"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.op != "hadamard":
            return Rejected(axis="op", have=op.op, need="hadamard")
        if op.device[0] != "cuda" and not (op.device[0] == "cpu" and interpreting()):
            return Rejected(axis="device", have=op.device[0], need="cuda")
        if op.device[1] and int(op.device[1].split(".")[0]) < 8:
            return Rejected(axis="compute capability", have=op.device[1], need="8.0 or newer")
        if op.act_dtype not in _ACTS:
            return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_ACTS))
        n, m = op.size("n"), op.size("m")
        if tile(n, m) is None:
            need = f"m * 2^p of at most {_MOST} in all, m up to 64, 2^p from 16 to 16384"
            return Rejected(axis="sizes", have=f"{m} * {n // m}", need=need)
        return Accepted(cost=_US, note="one kernel")

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        answer = self.accepts(op)
        if isinstance(answer, Rejected):
            raise misused(self.name, answer)
        from quant_kernels_triton.hadamard_run import bound_hadamard

        return functools.partial(bound_hadamard, op.size("k"))
