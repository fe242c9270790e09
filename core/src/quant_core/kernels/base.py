"""What a kernel is: it accepts or rejects an OpSpec with a reason, owns buffers, and runs.

Life of a kernel: ``accepts`` (cheap, no torch import needed) -> ``allocate`` final buffers ->
``load_`` one member or expert at a time -> ``bind`` once -> run many times. ``restore`` gives the
canonical tensors back exactly; saving, ``.to(device)``, refit and conversion go through it.
Kernels see canonical types only and never learn which format a tensor came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["Accepted", "Kernel", "Rejected"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The kernel can run the operation.

    ``cost`` orders candidates, smallest first: an estimate of microseconds per call where a
    measured table exists, else a rough rank (reference kernels use 1e6 and above).
    """

    exact: bool = True  # False: changes numerics beyond rounding order
    workspace_bytes: int = 0
    cost: float = 1e3
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The kernel cannot run the operation: which axis of it, what it has, what is needed."""

    axis: str
    have: str
    need: str

    def __str__(self) -> str:
        return f"{self.axis}: needs {self.need}, found {self.have}"


@runtime_checkable
class Kernel(Protocol):
    """See the module's docstring. A kernel that applies transforms has ``TRANSFORMS = True``.

    Core asks no other kernel for an operation that has any.
    """

    name: str

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        """Whether this kernel can run ``op``. Pure and cheap."""

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        """Final buffers under fixed names; names and addresses survive a reload."""

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        """Write one part into ``buffers``. ``at``: {"row": first output row, "expert": index}."""

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        """The canonical tensors back, bit for bit (a stack keeps its leading expert axis)."""

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        """The function that runs ``op``; called once, so that nothing is decided in a forward.

        It is called with the buffers' values in the order of ``allocate``, then the inputs:
        linear        run([buffers...], x [..., K]) -> [..., N]
        embedding     run([buffers...], ids [...]) -> [..., K]
        grouped_linear  run([buffers...], x [T, K], expert index [T]) -> [T, N]
        It must pickle (a partial of a module-level function) and trace under torch.compile.
        """
