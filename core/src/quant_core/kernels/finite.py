"""Whether floats are finite, as an operation of its own: any kernel package may offer it.

    op "finite"    no operands, no sizes
    bind(op)       run([], values) -> bool

``values`` are tensors of float16, bfloat16 or float32 on the cpu, of any strides; the answer is
True if no value of any is infinite or NaN. Scales may lie in the blocks of a mapped file, beside
the codes, so that a look at them is a read of the file: tensors that lie side by side (equal
strides, one value apart) are best looked at together. ``torch_finite`` is always there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.between import Weightless
from quant_core.registry import Registry
from quant_core.spec import OpSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Look", "TorchFinite", "all_finite", "look_of"]

Look = Callable[[Sequence["Tensor"]], bool]

_ROWS = 1 << 10  # looked at together, so that the copy of them stays in the cache
_BEHIND = 1e6
_OP = OpSpec(op="finite", operands=(), act_dtype="float32")


@functools.cache
def _exponents() -> dict[torch.dtype, tuple[torch.dtype, int]]:
    """Integers of a float's size, and the bits of its exponent: all set in what is not finite."""
    import torch

    return {
        torch.float16: (torch.int16, 0x7C00),
        torch.bfloat16: (torch.int16, 0x7F80),
        torch.float32: (torch.int32, 0x7F800000),
    }


def all_finite(values: Sequence[Tensor]) -> bool:
    """The reference: by the bits of their exponents, without a float32 copy."""
    for value in values:
        kind, exponent = _exponents()[value.dtype]
        bits = value.view(kind)
        if not all(int((p & exponent).amax()) < exponent for p in bits.split(_ROWS) if p.numel()):
            return False
    return True


def _run(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    return all_finite(values)


class TorchFinite(Weightless):
    """``all_finite`` as a kernel."""

    name = "torch_finite"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.op != "finite":
            return Rejected(axis="op", have=op.op, need="finite")
        return Accepted(cost=_BEHIND, note="three torch operations for 1024 rows")

    def bind(self, op: OpSpec) -> Callable[..., Any]:
        return _run


@functools.lru_cache(maxsize=8)
def look_of(registry: Registry) -> Look:
    """Who looks in this process: the cheapest kernel of the registered packages."""
    from quant_core.kernels.failed import Whose
    from quant_core.kernels.quantizer import cheapest

    kernel, op, _ = cheapest(_OP, registry)
    whose = Whose(kernel=kernel, op=op)
    with whose.bound():
        run: Callable[..., Any] = kernel.bind(op)

    def look(values: Sequence[Tensor]) -> bool:
        try:
            return bool(run([], values))
        except Exception as err:
            whose.failed(err, values[0] if values else None)
            raise

    return look
