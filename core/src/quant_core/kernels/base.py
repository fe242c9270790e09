"""What a kernel is: it accepts or rejects an OpSpec with a reason, owns buffers, and runs.

Life of a kernel: ``accepts`` (cheap, no torch import needed) -> ``allocate`` final buffers ->
``load_`` one member or expert at a time -> ``bind`` once -> run many times. ``restore`` gives the
canonical tensors back exactly; saving, ``.to(device)``, refit and conversion go through it.
Kernels see canonical types only and never learn which format a tensor came from.

Kernels of several packages may read the same buffers: those that declare an equal ``layout`` (a
name of the storage order). Core then binds them as one (``kernels.family``): the buffers exist
once, and the number of rows of x picks the member that runs. ``kernels.storage`` has the shared
orders as bases to derive a kernel from; docs/plugins.md a complete package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["ANY_ROWS", "Accepted", "Kernel", "Rejected"]

ANY_ROWS = 1 << 31
"""The bound of a bucket without a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The kernel can run the operation.

    ``cost`` orders candidates, smallest first: an estimate of microseconds per call where a
    measured table exists, else a rough rank (reference kernels use 1e6 and above).

    ``costs`` says the same per number of rows M of x: (largest M of the bucket, microseconds),
    bounds ascending; a bucket begins above the bound before it. What the kernel cannot run is left
    out: above the last bound, or by a cost of infinity. ``ANY_ROWS`` is the bound without a limit.
    Empty: ``cost`` holds for every M.
    """

    exact: bool = True  # False: changes numerics beyond rounding order
    workspace_bytes: int = 0
    cost: float = 1e3
    note: str = ""
    costs: tuple[tuple[int, float], ...] = ()

    def cost_at(self, rows: int) -> float:
        """Microseconds for ``rows`` rows; infinity if the kernel cannot run them."""
        if not self.costs:
            return self.cost
        return next((cost for bound, cost in self.costs if rows <= bound), math.inf)


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
    """See the module's docstring. Ten attributes are optional:

    TRANSFORMS  True: the kernel applies transforms; core asks no other for an operation with any.
    layout      name of the storage order of its buffers; kernels with an equal one must agree on
                ``allocate``, ``load_`` and ``restore``, bit for bit.
    reads       reads(op, packing) -> bool: ``load_`` takes parts whose codes lie in ``packing``;
                without it core repacks every part to ``op.packing`` first.
    strided     True: ``load_`` takes scales, zeros and offsets with any strides; else core makes
                them contiguous first.
    adopt       adopt(op, part) -> buffers | None: those of ``allocate``, made of the tensors of a
                part that is the whole layer, its codes not copied; ``op.packing`` is the part's.
                Asked where weights are pages of a file (``mapped``). None: not this part. Rows may
                lie as a feature of ``row_order`` says; ``load_`` and ``restore`` put them in order.
    starts_early  True: it reads nothing but weights before it waits for the kernel before it, and a
                program of it fills a multiprocessor: that kernel may let it start at once.
    bind_shared bind_shared(ops) -> run | None: linear layers of one input as one call,
                run([[buffers of a layer...], ...], x) -> [y, ...], each y as ``bind`` gives it (up
                to the order of float32 sums); layers that quantize x alike share that. None: not
                these.
    bind_gated  bind_gated(ops of gate, up, down, activation) -> run | None: a gated MLP as one
                call, run([[buffers of gate], [of up], [of down]], x) -> y as its parts give it;
                the run answers None for an x that it does not take. Of two ops the first is a
                layer of gate's outputs and up's behind them, or before, by a third argument True.
    bind_block  bind_block(block) -> run | None: a decoder layer as one call for one new token a
                sequence, ``kernels.between.Block``.
    bind_experts  bind_experts(ops of gate, up, down) -> run | None: routed experts as one call,
                run([[buffers of gate], [of up], [of down]], gating, x [T, H], index [T, k],
                weights [T, k]) -> [T, H], or None for an x that it does not take; ``gating`` of
                rows of both sides, in any order, is [rows, K of down]. ``kernels.routed``.
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
        attention     run([], q, k, v, mask, scale) -> y, or None for what it does not take;
                      q [B, H, 1, D] of one new token (feature "one_token"), k and v
                      [B, Hkv, L, D], mask bool (True = attend), float (added) or None,
                      broadcast to [B, H, 1, L], y [B, 1, H, D]
        rms_norm, rotary, gated   as in ``kernels.between``; None for what it does not take
        It must pickle (a partial of a module-level function) and trace under torch.compile.
        """
