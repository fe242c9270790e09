"""Codes out of packed words, as an operation of its own: any kernel package may offer it.

    op "unpack"    no operands, no sizes
    bind(op)       run([], work) -> None

``work`` is a sequence of pairs: ``packing.Packed``, and uint8 [N, K], contiguous, on the cpu, that
takes its codes. A load hands over the zero points of all layers that stay in their files at once;
by torch they took 0.4 ms a matrix. ``torch_unpack`` is always there.
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
    from torch import Tensor

    from quant_core.packing import Packed

__all__ = ["TorchUnpack", "unpack_all", "unpack_of"]

_BEHIND = 1e6
_OP = OpSpec(op="unpack", operands=(), act_dtype="float32")


def unpack_all(work: Sequence[tuple[Packed, Tensor]]) -> None:
    """The reference."""
    for packed, out in work:
        out.copy_(packed.codes())


def _run(buffers: Sequence[Tensor], work: Sequence[tuple[Packed, Tensor]]) -> None:
    unpack_all(work)


class TorchUnpack(Weightless):
    """``unpack_all`` as a kernel."""

    name = "torch_unpack"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.op != "unpack":
            return Rejected(axis="op", have=op.op, need="unpack")
        return Accepted(cost=_BEHIND, note="a dozen torch operations a tensor")

    def bind(self, op: OpSpec) -> Callable[..., Any]:
        return _run


@functools.lru_cache(maxsize=8)
def unpack_of(registry: Registry) -> Callable[[Sequence[tuple[Packed, Tensor]]], None]:
    """Who unpacks in this process: the cheapest kernel of the registered packages."""
    from quant_core.kernels.failed import Whose
    from quant_core.kernels.quantizer import cheapest

    kernel, op, _ = cheapest(_OP, registry)
    whose = Whose(kernel=kernel, op=op)
    with whose.bound():
        run: Callable[..., Any] = kernel.bind(op)

    def unpack(work: Sequence[tuple[Packed, Tensor]]) -> None:
        try:
            run([], work)
        except Exception as err:
            whose.failed(err, work[0][1] if work else None)
            raise

    return unpack
