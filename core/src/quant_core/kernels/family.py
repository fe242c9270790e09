"""Kernels that read one set of buffers, bound as one: the rows of x pick who runs.

    rows of x      1 .. 16      17 .. 255         256 ..
    runs           decode       ring              dequantize once, then a plain matmul
                      \\____________ one stored copy of the weights ____________/

Members declare the same ``layout``; their answers say what each costs per bucket of rows. The
table is made once, when a layer is bound, and a call looks the number of rows up in it. Rows that
no member runs go to the reference kernel, through ``restore``: said in the trace, and warned about
once.

Under ``torch.compile`` the lookup is inside one opaque op (``quant_core::rows_linear`` ...), so a
graph with a dynamic number of rows stays one graph and picks on every call. The op names its table
by text that is the same in every process, so compiled code may be kept on disk.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant_core.errors import KernelError
from quant_core.kernels.base import ANY_ROWS, Accepted, Kernel, Rejected
from quant_core.kernels.joined import JOINABLE, JoinedRun, joined_op
from quant_core.kernels.measured import answer as answer_of
from quant_core.spec import OpSpec, Packing
from quant_core.spec_json import to_text

if TYPE_CHECKING:
    from quant_core.kernels.between import Block
    from quant_core.kernels.composed import BlockRun, GatedRun
    from quant_core.tensors import LayerTensors

__all__ = ["Bucket", "Family", "RowsBound", "binder", "buckets", "layout_of", "uncovered"]

log = logging.getLogger("quant_core")

REFERENCE_COST = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Who runs up to ``rows`` rows (above the bucket before), and who came second."""

    rows: int
    kernel: str
    cost: float
    runner_up: str = ""
    runner_up_cost: float = math.inf

    def __str__(self) -> str:
        upto = "more" if self.rows >= ANY_ROWS else f"<={self.rows}"
        second = f", then {self.runner_up} {self.runner_up_cost:g}" if self.runner_up else ""
        return f"rows {upto}: {self.kernel} {self.cost:g}{second}"


def layout_of(kernel: Kernel) -> str:
    """The declared storage order; "" for a kernel that shares its buffers with none."""
    return str(getattr(kernel, "layout", ""))


def buckets(answers: Iterable[tuple[str, Accepted]]) -> tuple[Bucket, ...]:
    """The cheapest kernel of each range of rows, ties to the first name; ranges nobody runs are
    left out, neighbours with one winner and equal costs are joined.

    Args:
        answers: (kernel name, what it said).
    """
    given = list(answers)
    bounds = {bound for _, a in given for bound, _ in a.costs}
    bounds |= {ANY_ROWS for _, a in given if not a.costs}
    out: list[Bucket] = []
    for bound in sorted(bounds):
        ranked = sorted((a.cost_at(bound), name) for name, a in given)
        ranked = [r for r in ranked if r[0] < math.inf]
        if not ranked:
            continue
        (cost, name), *rest = ranked
        second = next((r for r in rest if r[1] != name), (math.inf, ""))
        made = Bucket(
            rows=bound, kernel=name, cost=cost, runner_up=second[1], runner_up_cost=second[0]
        )
        if out and replace(out[-1], rows=bound) == made:
            out.pop()
        out.append(made)
    return tuple(out)


def uncovered(answers: Iterable[Accepted]) -> str:
    """Which numbers of rows none of the kernels runs: "" or text like "17 to 64, above 255"."""
    given = list(answers)
    bounds = sorted({ANY_ROWS, *(bound for a in given for bound, _ in a.costs)})
    parts, low = [], 1
    for bound in bounds:
        if all(a.cost_at(bound) == math.inf for a in given):
            parts.append(f"above {low - 1}" if bound >= ANY_ROWS else f"{low} to {bound}")
        low = bound + 1
    return ", ".join(parts)


# ------------------------------------------------------------------------------- running by rows

_bound: dict[str, RowsBound] = {}
_lib = torch.library.Library("quant_core", "FRAGMENT")
_lib.define("rows_linear(Tensor x, Tensor[] tensors, int n, str key) -> Tensor")
_lib.define(
    "rows_grouped_linear(Tensor x, Tensor experts, Tensor[] tensors, int n, str key) -> Tensor"
)
_lib.define("rows_embedding(Tensor ids, Tensor[] tensors, int k, str dtype, str key) -> Tensor")


class RowsBound:
    """The function that ``Family.bind`` returns: the first entry whose bound holds x runs it.

    Attributes:
        table: (largest number of rows, function) in ascending order; the last has no limit.
    """

    def __init__(
        self, op: OpSpec, table: tuple[tuple[int, Callable[..., Tensor]], ...], key: str
    ) -> None:
        self.kind, self.k, self.n = op.op, op.size("k"), op.size("n")
        self.dtype = op.act_dtype
        self.table = table
        self.key = key
        _bound[key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _bound[self.key] = self

    def pick(self, rows: int) -> Callable[..., Tensor]:
        """What runs ``rows`` rows."""
        for bound, run in self.table:
            if rows <= bound:
                return run
        raise AssertionError("Family.bind leaves no rows out")

    def __call__(self, values: list[Tensor], x: Tensor, experts: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return self._traced(values, x, experts)
        if self.kind == "grouped_linear":
            return self.pick(x.shape[0])(values, x, experts)
        if self.kind == "embedding":
            return self.pick(x.numel())(values, x)
        return self.pick(x.numel() // self.k)(values, x)

    def _traced(self, values: list[Tensor], x: Tensor, experts: Tensor | None) -> Tensor:
        ops = torch.ops.quant_core
        if self.kind == "grouped_linear":
            return ops.rows_grouped_linear(x, experts, values, self.n, self.key)  # type: ignore[no-any-return]
        if self.kind == "embedding":
            return ops.rows_embedding(x, values, self.k, self.dtype, self.key)  # type: ignore[no-any-return]
        return ops.rows_linear(x, values, self.n, self.key)  # type: ignore[no-any-return]


def _held(key: str) -> RowsBound:
    bound = _bound.get(key)
    if bound is None:
        raise KernelError(
            f"compiled code names the kernel table {key!r}, which no layer of this process has. "
            "Build the model before running code that was compiled for it.",
            code="Q-KERNEL-TABLE",
            actual=key,
        )
    return bound


def _rows_linear(x: Tensor, tensors: list[Tensor], n: int, key: str) -> Tensor:
    bound = _held(key)
    return bound.pick(x.numel() // bound.k)(tensors, x)


def _rows_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], n: int, key: str) -> Tensor:
    return _held(key).pick(x.shape[0])(tensors, x, experts)


def _rows_embedding(ids: Tensor, tensors: list[Tensor], k: int, dtype: str, key: str) -> Tensor:
    return _held(key).pick(ids.numel())(tensors, ids)


def _fake_linear(x: Tensor, tensors: list[Tensor], n: int, key: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _fake_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], n: int, key: str) -> Tensor:
    return x.new_empty(x.shape[0], n)


def _fake_embedding(ids: Tensor, tensors: list[Tensor], k: int, dtype: str, key: str) -> Tensor:
    return torch.empty(*ids.shape, k, dtype=getattr(torch, dtype), device=ids.device)


for _name, _impl, _fake in (
    ("rows_linear", _rows_linear, _fake_linear),
    ("rows_grouped_linear", _rows_grouped, _fake_grouped),
    ("rows_embedding", _rows_embedding, _fake_embedding),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_core::{_name}", _fake, lib=_lib)


# ------------------------------------------------------------------------------------- the family


class Family:
    """Kernels of one layout as one kernel.

    Attributes:
        members: all kernels of the layout that may run, also those that reject this operation: a
            tied output layer is bound with another operation than its embedding.
        table: who runs how many rows of the operation it was chosen for.
    """

    TRANSFORMS = True  # asked only with the operations that its members accepted

    def __init__(self, layout: str, members: tuple[Kernel, ...], op: OpSpec) -> None:
        self.layout, self.members = layout, members
        answers = self._answers(op)
        self._owner = answers[0][0]
        self.table = buckets((k.name, a) for k, a in answers)
        self.name = "+".join(dict.fromkeys(b.kernel for b in self.table))

    def _answers(self, op: OpSpec) -> list[tuple[Kernel, Accepted]]:
        """Members that run ``op``; the reference, through ``restore``, completes them."""
        said = [(k, a) for k in self.members if isinstance(a := answer_of(k, op), Accepted)]
        missing = uncovered(a for _, a in said)
        if not missing:
            return said
        owner = said[0][0] if said else self._owner
        rest = RestoredReference(owner)
        answer = rest.accepts(op)
        if isinstance(answer, Accepted):
            _warn_once(self.layout or owner.name, op.op, missing)
            return [*said, (rest, answer)]
        raise KernelError(
            f"{op.op}: the kernels of layout {self.layout!r} do not run {missing} rows, and the "
            f"reference kernel rejects the operation ({answer}). Install a kernel package that "
            "runs them.",
            code="Q-KERNEL-NONE",
            actual=missing,
        )

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        answers = self._answers(op)
        table = buckets((k.name, a) for k, a in answers)
        return Accepted(
            exact=all(a.exact for _, a in answers),
            workspace_bytes=max(a.workspace_bytes for _, a in answers),
            cost=table[0].cost,
            costs=tuple((b.rows, b.cost) for b in table),
            note="; ".join(map(str, table)),
        )

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        return self._owner.allocate(op, device)

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        self._owner.load_(buffers, op, part, at)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        return self._owner.restore(buffers, op)

    def reads(self, op: OpSpec, packing: Packing) -> bool:
        """Whether ``load_`` takes parts whose codes lie in ``packing``: the owner's answer."""
        ask = getattr(self._owner, "reads", None)
        return ask is not None and bool(ask(op, packing))

    def bind_shared(self, ops: Sequence[OpSpec]) -> JoinedRun | None:
        """Layers of one input as one matrix, where they can be one."""
        op = joined_op(ops) if self.layout in JOINABLE else None
        if op is None:
            return None
        whole = Family(self.layout, self.members, op)
        return JoinedRun(whole, op, [self.bind(o) for o in ops], [o.size("n") for o in ops])

    def member(self, rows: int) -> Kernel | None:
        """Who runs ``rows`` rows; None for the reference kernel."""
        name = next(b.kernel for b in self.table if rows <= b.rows)
        return next((k for k in self.members if k.name == name), None)

    def bind_gated(
        self, ops: Sequence[OpSpec], activation: str, up_first: bool = False
    ) -> GatedRun | None:
        """A gated MLP of the kernels that there are (``kernels.composed``)."""
        from quant_core.kernels.composed import compose_gated

        return compose_gated(self, ops, activation)  # of three layers: ``up_first`` says nothing

    def bind_block(self, block: Block) -> BlockRun | None:
        """A decoder layer likewise."""
        from quant_core.kernels.composed import compose_block

        return compose_block(self, block)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        answers = self._answers(op)
        by_name = {k.name: k for k, _ in reversed(answers)}
        table = buckets((k.name, a) for k, a in answers)
        runs: dict[str, Callable[..., Tensor]] = {}
        for b in table:
            if b.kernel not in runs:
                runs[b.kernel] = by_name[b.kernel].bind(op)
        if len(runs) == 1:
            return next(iter(runs.values()))
        merged: list[tuple[int, str]] = []
        for b in table:
            if merged and merged[-1][1] == b.kernel:
                merged.pop()
            merged.append((b.rows, b.kernel))
        text = f"{self.layout}|{merged}|{to_text(op)}"
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        return RowsBound(op, tuple((rows, runs[name]) for rows, name in merged), key)


def binder(kernel: Kernel) -> object:
    """Equal for kernels of which each can bind the operations of all: they are one kernel, or
    families of one layout and the same members, whoever runs how many rows of which."""
    if isinstance(kernel, Family):
        return kernel.layout, tuple(m.name for m in kernel.members)
    return kernel.name


@functools.cache
def _warn_once(layout: str, op: str, missing: str) -> None:
    log.warning(
        "no kernel of layout %s runs %s with %s rows; the reference kernel does, slowly. Install "
        "a kernel package for them.",
        layout,
        op,
        missing,
    )


class RestoredReference:
    """Runs what nobody else does: restores the canonical tensors and asks the reference kernel."""

    name = "torch_ref"

    def __init__(self, owner: Kernel) -> None:
        self.owner = owner
        self.layout = layout_of(owner)

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        from quant_core.kernels.reference import ReferenceKernel

        answer = ReferenceKernel().accepts(op)
        if isinstance(answer, Rejected):
            return answer
        note = "restores the weights on every call"
        return replace(answer, cost=REFERENCE_COST, costs=(), note=note)

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        return self.owner.allocate(op, device)

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        self.owner.load_(buffers, op, part, at)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        return self.owner.restore(buffers, op)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        names = tuple(self.owner.allocate(op, "meta"))
        return functools.partial(_run_restored, self.owner, op, names)


def _run_restored(
    owner: Kernel, op: OpSpec, names: tuple[str, ...], values: list[Tensor], *inputs: Tensor
) -> Tensor:
    from quant_core.kernels.reference import ReferenceKernel
    from quant_core.parts import matrices

    held = owner.restore(dict(zip(names, values, strict=True)), op)
    op = replace(op, packing=held.weight.packing)
    reference = ReferenceKernel()
    buffers = reference.allocate(op, str(inputs[0].device))
    for expert, part in matrices(held, op.size("experts", 0)):
        reference.load_(
            buffers, op, part, {"row": 0} if expert is None else {"row": 0, "expert": expert}
        )
    return reference.bind(op)(list(buffers.values()), *inputs)
