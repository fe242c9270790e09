"""Storage orders that kernels of several packages share, as bases to derive a kernel from.

    class Mine(Tiles16):       layout, allocate, load_ and restore are the order's
        name = "mine"
        def accepts(self, op): ...
        def bind(self, op): ...

Kernels of one order agree bit for bit because nobody writes its buffers twice. Torch is imported
when a buffer is made, so a kernel's module may be imported without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quant_core.errors import KernelError
from quant_core.kernels.base import Rejected
from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["Rows", "Tiles16", "misused"]


class Tiles16:
    """The order of the GPU kernels; see ``quant_core.kernels.tiles``."""

    layout = "tiles16"

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        from quant_core.kernels import tiles

        return tiles.allocate(op, device)

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        from quant_core.kernels import tiles

        tiles.load_(buffers, op, part, at)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        from quant_core.kernels import tiles

        return tiles.restore(buffers, op)


class Rows:
    """The canonical tensors as they are, row-major; see ``quant_core.kernels.reference``."""

    layout = "rows"

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        from quant_core.kernels.reference import ReferenceKernel

        return ReferenceKernel().allocate(op, device)

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        from quant_core.kernels.reference import ReferenceKernel

        ReferenceKernel().load_(buffers, op, part, at)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        from quant_core.kernels.reference import ReferenceKernel

        return ReferenceKernel().restore(buffers, op)


def misused(kernel: str, said: Rejected) -> KernelError:
    """The error of a kernel that is asked to hold or run what it rejects."""
    return KernelError(
        f"{kernel} was asked to run what it rejects: {said}. Choose a kernel that accepts the "
        "operation.",
        code="Q-KERNEL-NONE",
        expected=said.need,
        actual=said.have,
    )
