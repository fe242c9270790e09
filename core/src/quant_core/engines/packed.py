"""A rank's packed layer inside an engine's module: read, cut, fused, bound; run by an opaque op.

    pieces --read, cut--> LayerTensors --fuse or compose--> Bound parts --attach--> parameters

Engines trace and cache graphs by their own settings, not by what a checkpoint holds. So a layer is
ONE op that names it, ``quant_core::packed_linear(x, "model.layers.0.mlp.down_proj", rows)``: the
graph does not depend on the format, the kernel or the number of parts, and runs what eager code
runs, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from quant_core.build import Builder, check_alike
from quant_core.engines.parallel import cut
from quant_core.engines.sharing import Piece
from quant_core.errors import LayoutError
from quant_core.fuse import Composite, fuse
from quant_core.kernels.base import Kernel
from quant_core.kernels.choose import Choice, choose
from quant_core.kernels.failed import allocated, asked, name_failure
from quant_core.kernels.routed import ExpertsRun
from quant_core.load import read_matrix, read_parameter
from quant_core.parts import load_part_
from quant_core.plan import Member
from quant_core.scheme import Scheme
from quant_core.spec import OpSpec
from quant_core.tensors import LayerTensors

__all__ = [
    "Bound",
    "Packed",
    "attach",
    "bind_embedding",
    "bind_linear",
    "bind_stack",
    "gating_of",
    "neutral",
    "read_piece",
    "run_experts",
]

Run = Callable[..., Tensor]


@dataclass(slots=True, kw_only=True)
class Bound:
    """One matrix (or stack) that can run: ``run(list(tensors.values()), x)``.

    Attributes:
        rows: output features.
        op: what runs; None for a float matrix.
        run_linear: of an embedding: the same table as the weight of a linear layer.
        stack: of a stack of experts: its kernel.
        choice: how the kernel was chosen; None for a float matrix.
    """

    run: Run
    tensors: dict[str, Tensor]
    rows: int
    op: OpSpec | None
    kernel: str
    run_linear: Run | None = None
    stack: Kernel | None = None
    choice: Choice | None = None


@contextmanager
def neutral() -> Iterator[None]:
    """On the CPU and in float32, whatever default device and dtype an engine has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)


def _scheme(member: Member) -> Scheme:
    assert isinstance(member.scheme, Scheme), "float members are read by read_float"
    return member.scheme


def read_piece(
    builder: Builder, piece: Piece, expert: int | None = None, *, bias: bool = True
) -> LayerTensors:
    """A rank's part of one matrix, in canonical form.

    Args:
        bias: False leaves a stored bias unread.

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE`` if the engine's sizes are not those of the checkpoint,
            ``Q-LAYOUT-TP`` for a cut that has no exact answer.
    """
    found, wanted = _scheme(piece.member).shape, (piece.out.total, piece.inp.total)
    if found != wanted:
        name = piece.member.layer.name
        raise LayoutError(
            f"{name}: the checkpoint holds a {found[0]} x {found[1]} matrix, the model expects "
            f"{wanted[0]} x {wanted[1]}. config.json describes another model, or the checkpoint "
            "was cut.",
            code="Q-LAYOUT-SHAPE",
            tensor=name,
            expected=wanted,
            actual=found,
        )
    matrix = read_matrix(builder.plan, piece.member, expert, bias=bias)
    return cut(matrix, out=piece.out, inp=piece.inp)


def _run_of(choice: Choice, op: OpSpec, name: str) -> Callable[..., Tensor]:
    with asked("bind", choice.kernel, op, name, choice.trace):
        return choice.kernel.bind(op)


def _bind(
    builder: Builder, name: str, kind: str, lt: LayerTensors, member: Member, k: int
) -> Bound:
    op = builder.op_for(kind, lt, member, in_features=k)
    choice = choose(op, builder.plan.registry, kernels=builder.kernels)
    builder.choices.append((name, choice))
    buffers = allocated(choice.kernel, choice.op, builder.device, name, choice.trace)
    load_part_(choice, buffers, lt, {"row": 0}, name)
    as_linear = replace(choice.op, op="linear")
    return Bound(
        run=_run_of(choice, choice.op, name),
        tensors=buffers,
        rows=lt.weight.shape[0],
        op=choice.op,
        kernel=choice.kernel.name,
        choice=choice,
        run_linear=_run_of(choice, as_linear, name) if kind == "embedding" else None,
    )


def _run_float(values: list[Tensor], x: Tensor) -> Tensor:
    return nn.functional.linear(x, values[0])


def _bind_float(builder: Builder, piece: Piece) -> Bound:
    weight = read_parameter(builder.plan, f"{piece.member.layer.name}.weight")
    part = weight[piece.out.start : piece.out.stop, piece.inp.start : piece.inp.stop]
    part = part.to(device=builder.device, dtype=builder.dtype).contiguous()
    return Bound(
        run=_run_float, tensors={"weight": part}, rows=part.shape[0], op=None, kernel="float"
    )


def bind_linear(
    builder: Builder, name: str, pieces: Sequence[Piece], *, bias: bool = False
) -> list[Bound]:
    """A linear layer from its pieces in row order. Members that agree become one part.

    Args:
        bias: read and keep the checkpoint's bias; engines usually load and add it themselves. A
            bias that is all zeros is never kept.

    Raises:
        LayoutError: as ``read_piece``.
        KernelError: nothing can run it.
    """
    parts: list[Bound] = []
    for quantized, group in groupby(pieces, key=lambda p: p.member.quantized):
        if not quantized:
            parts += [_bind_float(builder, p) for p in group]
            continue
        run = list(group)
        loaded = [read_piece(builder, p, bias=bias) for p in run]
        fused = fuse(loaded, [_scheme(p.member).operands.get("input") for p in run])
        if not isinstance(fused, Composite):
            parts.append(_bind(builder, name, "linear", fused, run[0].member, run[0].inp.size))
            continue
        starts, row = [], 0
        for lt in loaded:
            starts.append(row)
            row += lt.weight.shape[0]
        for start, lt in fused.parts:
            first = run[starts.index(start)]
            parts.append(_bind(builder, name, "linear", lt, first.member, first.inp.size))
    return parts


def bind_embedding(builder: Builder, name: str, piece: Piece) -> Bound:
    """An embedding table; ``run_linear`` serves a tied output layer from the same copy."""
    lt = read_piece(builder, piece)
    return _bind(builder, name, "embedding", lt, piece.member, piece.inp.size)


def bind_stack(builder: Builder, name: str, piece: Piece, experts: Sequence[int]) -> Bound:
    """The experts of one role that this rank holds, read one by one into the kernel's buffers.

    Args:
        experts: their numbers in the checkpoint, in the order of the engine's slots.

    Raises:
        LayoutError: ``Q-LAYOUT-FUSED`` if experts are of unlike layouts.
    """
    first = read_piece(builder, piece, experts[0])
    op = builder.op_for(
        "grouped_linear", first, piece.member, in_features=piece.inp.size, experts=len(experts)
    )
    choice = choose(op, builder.plan.registry, kernels=builder.kernels)
    builder.choices.append((name, choice))
    buffers = allocated(choice.kernel, choice.op, builder.device, name, choice.trace)
    for slot, expert in enumerate(experts):
        lt = first if slot == 0 else read_piece(builder, piece, expert)
        check_alike(name, experts[0], first, expert, lt)
        load_part_(choice, buffers, lt, {"row": 0, "expert": slot}, name)
    return Bound(
        run=_run_of(choice, choice.op, name),
        tensors=buffers,
        rows=first.weight.shape[0],
        op=choice.op,
        kernel=choice.kernel.name,
        choice=choice,
        stack=choice.kernel,
    )


# --------------------------------------------------------------------------- inside a module


class Packed:
    """The parts of one layer, whose tensors are parameters of the engine's module.

    Calls read the module's parameters each time, so an engine may move, offload or refill them.
    """

    def __init__(self, name: str, layer: nn.Module, parts: Sequence[Bound], prefix: str) -> None:
        self._layer, self._prefix = weakref.ref(layer), prefix
        self._hold(parts)
        self.key = _enter(name, self)

    def _hold(self, parts: Sequence[Bound]) -> None:
        layer = self._layer()
        assert layer is not None, "a module outlives its loading"
        self.parts, self.names = list(parts), list[list[str]]()
        self.one: ExpertsRun | None = None  # of a gate: with up and down
        self.rows = sum(part.rows for part in parts)
        for i, part in enumerate(parts):
            names = [f"{self._prefix}{i}_{name}" for name in part.tensors]
            for name, value in zip(names, part.tensors.values(), strict=True):
                layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
            self.names.append(names)
            part.tensors = {}  # the module holds them now

    def replace(self, parts: Sequence[Bound]) -> None:
        """New weights in new parameters of the same names, for engines that copy them themselves.

        Raises:
            LayoutError: ``Q-ENGINE-RELOAD`` unless they run as the old ones do.
        """
        self._check_alike(parts)
        self._hold(parts)

    def refill(self, parts: Sequence[Bound]) -> None:
        """New weights into the same storage: addresses stay, captured graphs stay valid.

        Raises:
            LayoutError: ``Q-ENGINE-RELOAD`` unless they run as the old ones do.
        """
        self._check_alike(parts)
        for i, part in enumerate(parts):
            for there, value in zip(self.values(i), part.tensors.values(), strict=True):
                there.data.copy_(value)

    def _check_alike(self, parts: Sequence[Bound]) -> None:
        old = [(p.op, p.kernel, p.rows) for p in self.parts]
        new = [(p.op, p.kernel, p.rows) for p in parts]
        if old != new:
            raise LayoutError(
                f"{self.key}: the new weights are stored or run in another way than those they "
                "replace, expected the same. Restart the engine with the new checkpoint.",
                code="Q-ENGINE-RELOAD",
                tensor=self.key,
                expected=old,
                actual=new,
            )

    def values(self, part: int) -> list[Tensor]:
        layer = self._layer()
        assert layer is not None, "a module outlives its calls"
        return [layer._parameters[name] for name in self.names[part]]  # type: ignore[misc]

    def grouped(self, x: Tensor, experts: Tensor) -> Tensor:
        """Of a stack: x [T, K], expert's slot [T] -> [T, N]."""
        return self._called(0, self.parts[0].run, x, experts)

    def linear(self, x: Tensor) -> Tensor:
        outs = [
            self._called(i, part.run if part.run_linear is None else part.run_linear, x)
            for i, part in enumerate(self.parts)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def embedding(self, ids: Tensor) -> Tensor:
        return self._called(0, self.parts[0].run, ids)

    def _called(self, index: int, run: Run, x: Tensor, *rest: Tensor) -> Tensor:
        values = self.values(index)
        try:
            return run(values, x, *rest)
        except Exception as err:
            c = self.parts[index].choice
            if c is not None:
                name_failure(err, c.kernel, c.op, self.key, c.trace, values, x)
            raise

    # the same as ops, which a traced graph keeps as they are

    def call_linear(self, x: Tensor) -> Tensor:
        return torch.ops.quant_core.packed_linear(x, self.key, self.rows)  # type: ignore[no-any-return]

    def call_embedding(self, ids: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        return torch.ops.quant_core.packed_embedding(ids, self.key, k, dtype)  # type: ignore[no-any-return]


def attach(name: str, layer: nn.Module, parts: Sequence[Bound], prefix: str = "packed") -> Packed:
    """Make the parts' tensors parameters ``<prefix><part>_<buffer>`` of ``layer``."""
    return Packed(name, layer, parts, prefix)


_entered: weakref.WeakValueDictionary[str, Packed] = weakref.WeakValueDictionary()


def _enter(name: str, packed: Packed) -> str:
    """A key for graphs: the layer's name, so that it is the same in every process and run.

    The layer that has it now keeps it: a second model in one process gets a number.
    """
    key, number = name, 1
    while key in _entered:
        number += 1
        key = f"{name}#{number}"
    _entered[key] = packed
    return key


_lib = torch.library.Library("quant_core", "FRAGMENT")
_lib.define("packed_linear(Tensor x, str layer, int rows) -> Tensor")
_lib.define("packed_embedding(Tensor ids, str layer, int k, ScalarType dtype) -> Tensor")


def _packed_linear(x: Tensor, layer: str, rows: int) -> Tensor:
    return _entered[layer].linear(x)


def _packed_embedding(ids: Tensor, layer: str, k: int, dtype: torch.dtype) -> Tensor:
    return _entered[layer].embedding(ids).to(dtype)


_lib.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
_lib.impl("packed_embedding", _packed_embedding, "CompositeExplicitAutograd")
torch.library.register_fake(
    "quant_core::packed_linear",
    lambda x, layer, rows: x.new_empty((*x.shape[:-1], rows)),
    lib=_lib,
)
torch.library.register_fake(
    "quant_core::packed_embedding",
    lambda ids, layer, k, dtype: ids.new_empty((*ids.shape, k), dtype=dtype),
    lib=_lib,
)


# --------------------------------------------------------------------------------- experts


def _as_one(
    stacks: Sequence[Packed], gating: Callable[[Tensor, Tensor], Tensor], x: Tensor, index: Tensor,
    weights: Tensor,
) -> Tensor | None:  # fmt: skip
    """One call of the stacks' kernel; None where they have to run one by one."""
    gate, parts = stacks[0], [stack.parts[0] for stack in stacks]
    bound = [(p.stack, p.op) for p in parts if p.stack is not None and p.op is not None]
    if len(bound) != len(parts):
        return None
    kernels, ops = zip(*bound, strict=True)
    if gate.one is None or not gate.one.of(kernels, ops):
        choice = parts[0].choice
        gate.one = ExpertsRun(kernels, ops, gate.key, () if choice is None else choice.trace)
    return gate.one([s.values(0) for s in stacks], gating, x, index.long(), weights)


def run_experts(
    gate: Packed,
    up: Packed,
    down: Packed,
    gating: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """sum_j w[t, j] * down_e(gating(gate_e(x), up_e(x))), e = index[t, j]; -1 contributes nothing.

    Shapes: x (T, H), index (T, k) integer, weights (T, k) -> (T, H) of x's dtype.
    """
    if (y := _as_one((gate, up, down), gating, x, index, weights)) is not None:
        return y
    tokens, top_k = index.shape
    slots = index.reshape(-1).long()
    rows = x.repeat_interleave(top_k, dim=0)
    y = down.grouped(gating(gate.grouped(rows, slots), up.grouped(rows, slots)), slots)
    y = y * weights.reshape(-1, 1)
    return y.view(tokens, top_k, y.shape[-1]).sum(dim=1).to(x.dtype)


def _act_and_mul(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def gating_of(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """act(gate) * up."""
    return partial(_act_and_mul, activation)
