"""From stored tensors to canonical ones: one matrix at a time, checked and ticked off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.answers import ask_scheme
from quant_core.errors import FormatError, printable
from quant_core.finite import Read, check_matrix
from quant_core.kernels.finite import look_of
from quant_core.plan import Member, Plan, param_sources
from quant_core.plan import plan as make_plan
from quant_core.scheme import Scheme
from quant_core.spec import Unquantized
from quant_core.tensors import LayerTensors

if TYPE_CHECKING:
    from quant_core.checkpoint.base import Checkpoint

__all__ = ["LoadedTensor", "load_tensor", "no_such_name", "read_matrix", "read_parameter"]


def read_matrix(
    plan: Plan,
    member: Member,
    expert: int | None = None,
    *,
    bias: bool = True,
    mapped: bool = False,
    in_place: bool = False,
    unlooked: list[Read] | None = None,
) -> LayerTensors:
    """One matrix of a quantized member in canonical form.

    Args:
        expert: which one of a stack; None for a plain layer.
        bias: False leaves a stored bias unread.
        mapped: whole stored tensors may be pages of their files, ``Checkpoint.mapped``.
        in_place: rows stay in the order in which they are stored, ``Scheme.row_order``, and scales
            where they can.
        unlooked: takes what was read, for a caller who sees to ``check_matrices`` himself; None:
            it is checked here.

    Raises:
        CheckpointError: the file changed or cannot be read.
        LayoutError: values that the format does not allow; ``Q-VALUE-SCALE`` and
            ``Q-VALUE-WEIGHT`` for numbers that are not finite.
    """
    scheme, layer, tensors = member.scheme, member.layer, {}
    assert isinstance(scheme, Scheme)
    for param in member.params:
        if param.need == "ignored" or (param.name == "bias" and not bias):
            continue
        parts = []
        for name, index in param_sources(layer, param, expert):
            if name in plan.checkpoint.tensors:
                part = plan.checkpoint.mapped(name) if mapped and not index else None
                parts.append(plan.checkpoint.read(name, index) if part is None else part)
                plan.ledger.load((name, index))
        if parts:
            tensors[param.name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    one = layer
    if expert is not None:
        one = replace(layer, stored=layer.stored.format(expert=expert), experts=())
    method = "canonicalize_in_place" if in_place else "canonicalize"
    lt: LayerTensors = ask_scheme(scheme, method, one, tensors)
    if unlooked is None:
        check_matrix(one, lt, tensors, look_of(plan.registry))
    else:
        unlooked.append((one, lt, tensors))
    return lt


def read_parameter(plan: Plan, name: str) -> Tensor:
    """A float tensor by its public name, as the model wants it.

    Raises:
        FormatError: ``Q-FMT-NAME`` if there is none of that name; a quantized weight is none.
    """
    stored = plan.dense.get(name)
    if stored is None:
        raise no_such_name(plan, name)
    value = plan.checkpoint.read_parameter(stored)
    plan.ledger.load((stored, ()))
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTensor:
    """One member of a checkpoint, by itself.

    Attributes:
        name: public module (or parameter) name.
        scheme: its scheme, or why it has none.
        matrices: canonical tensors, one per expert of a stack; empty for a float tensor.
        dense: the float tensor, if it is stored as floats.
    """

    name: str
    scheme: Scheme | Unquantized
    matrices: tuple[LayerTensors, ...] = ()
    experts: tuple[int, ...] = ()
    dense: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 weights: [N, K], or [E, N, K] for a stack of experts."""
        if self.dense is not None:
            return self.dense.float()
        assert isinstance(self.scheme, Scheme)
        weights = [_dense(lt, self.scheme.shape[1]) for lt in self.matrices]
        return torch.stack(weights) if self.experts else weights[0]


def _dense(lt: LayerTensors, in_features: int) -> Tensor:
    from quant_core.dequantize import dense_weight

    return dense_weight(lt.weight, in_features)


def _member_dense(plan: Plan, member: Member) -> Iterator[Tensor]:
    for name in member.stored:
        if name.endswith("weight"):
            yield plan.checkpoint.read_parameter(name)


def load_tensor(
    source: str | os.PathLike[str] | Checkpoint | Plan, name: str, *, expert: int | None = None
) -> LoadedTensor:
    """Load one module's weight, e.g. ``load_tensor(path, "model.layers.0.mlp.down_proj")``.

    Args:
        source: path, opened checkpoint, or plan.
        name: public module name, or the full name of a float parameter.
        expert: one expert of a stack; default all.

    Raises:
        FormatError: ``Q-FMT-NAME`` if the checkpoint has no such module; lists near names.
    """
    from quant_core.checkpoint.open import open_checkpoint

    if isinstance(source, str | os.PathLike):
        source = open_checkpoint(source)
    plan = source if isinstance(source, Plan) else make_plan(source)
    member = plan.members.get(name)
    if member is not None and member.quantized:
        ids = member.layer.experts if expert is None else (expert,)
        if expert is not None and expert not in member.layer.experts:
            there = member.layer.experts
            expected = f"one of {there[0]}..{there[-1]}" if there else "none: it is no stack"
            raise FormatError(
                f"{name}: expert {expert} asked for, expected {expected}. "
                f"{'Choose a stored expert' if there else 'Leave expert out'}.",
                code="Q-FMT-NAME",
                tensor=name,
                actual=expert,
            )
        matrices = tuple(read_matrix(plan, member, e) for e in ids or (None,))
        stacked = member.layer.experts if expert is None else ()
        return LoadedTensor(name=name, scheme=member.scheme, matrices=matrices, experts=stacked)
    if member is not None:
        weights = list(_member_dense(plan, member))
        if weights:
            value = torch.stack(weights) if len(weights) > 1 else weights[0]
            return LoadedTensor(name=name, scheme=member.scheme, dense=value)
    if name in plan.dense:
        return LoadedTensor(
            name=name,
            scheme=Unquantized(rule="float parameter"),
            dense=read_parameter(plan, name),
        )
    raise no_such_name(plan, name)


def no_such_name(plan: Plan, name: str) -> FormatError:
    """``Q-FMT-NAME`` for a name the checkpoint does not have, with near ones."""
    import difflib

    near = difflib.get_close_matches(name, [*plan.members, *plan.dense], n=3)
    hint = f"Near names: {', '.join(near)}." if near else "`quant inspect` lists all names."
    return FormatError(
        f"{plan.checkpoint.path}: no module or parameter {printable(name)!r}, expected a public "
        f"name. {hint}",
        code="Q-FMT-NAME",
        path=plan.checkpoint.path,
        tensor=name,
        expected=near,
    )
