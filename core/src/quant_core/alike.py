"""Layers that are stored alike: what one is to its stored tensors, the others are to theirs.

Layers of a model differ by their number. Where weights stay pages of their files, all that a layer
holds are views of stored tensors, so the first of a kind shows which: from then on a layer is those
views of its own tensors, the same operation, kernel and bound function. That takes a fifth of
canonicalizing, choosing and binding it again.

A layer shows a ``Pattern`` if its scheme says what it depends on (``Scheme.pattern``), and if all
its tensors lie inside stored ones, or are what the scheme unpacks, and says so
(``Scheme.unpacked``): that is unpacked for every layer, of all of them in one call. Whether numbers
are finite is looked at for every layer all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant_core.kernels.choose import Choice
from quant_core.memory import poisoned, written_whole
from quant_core.nn import BoundMember, Mould, QuantModule
from quant_core.packing import Packed
from quant_core.scheme import Scheme
from quant_core.spec import Packing
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["Pattern", "pattern_of", "unpacking"]


@dataclass(frozen=True, slots=True)
class _View:
    """A part of the tensor ``param``, stored or unpacked; ``at``, ``stride`` in elements."""

    param: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    at: int
    whole: bool  # it is the stored tensor itself


def _at(views: Iterable[_View], stored: Mapping[str, Tensor]) -> list[Tensor]:
    """Each view of its tensor."""
    out, flat = [], dict[tuple[str, torch.dtype], Tensor]()
    for view in views:
        value = stored[view.param]
        if not view.whole:
            if value.dtype != view.dtype:
                key = view.param, view.dtype
                if key not in flat:
                    flat[key] = value.view(-1).view(view.dtype)
                value = flat[key]
            value = value.as_strided(view.shape, view.stride, value.storage_offset() + view.at)
        out.append(value)
    return out


def _view(value: Tensor, stored: Mapping[str, Tensor]) -> _View | None:
    """Where ``value`` lies in one of the stored tensors; None if in none."""
    size = value.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    for param, whole in stored.items():
        at = value.data_ptr() - whole.data_ptr()
        if not (value.numel() and whole.is_contiguous() and 0 <= at <= whole.nbytes - span * size):
            continue
        if at % size or whole.nbytes % size:
            return None
        same = not at and (value.dtype, value.shape) == (whole.dtype, whole.shape)
        same = same and value.stride() == whole.stride()
        shape, stride = tuple(value.shape), tuple(value.stride())
        return _View(param, value.dtype, shape, stride, at // size, same)
    return None


def _under(name: str) -> str:
    """A name that no stored tensor has."""
    return f"={name}"


def _held(scheme: Scheme, one: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of ``one`` that were unpacked, contiguous, under the names of ``unpacking``."""
    has = one.tensors()
    mine = {_under(name): has[name] for name in scheme.unpacks if name in has}
    return {n: t.t() if t.dim() == 2 and not t.is_contiguous() else t for n, t in mine.items()}


def unpacking(
    scheme: Scheme, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[tuple[Packed, Tensor]]]:
    """Room for what the scheme unpacks of a layer, by names for its pattern, and what goes there.

    The room is not written yet.
    """
    with written_whole(0):
        work = {
            _under(name): (packed, poisoned(packed.shape, torch.uint8))
            for name, packed in scheme.unpacked(stored).items()
        }
    return {name: room for name, (_, room) in work.items()}, list(work.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """One layer, and its tensors as views of the stored ones.

    Attributes:
        looked_at: values of the params at which the scheme looks; those of a layer alike are equal.
        places: all its tensors; what the others name by their number.
        made: makes modules like the one that was built of it, ``rows`` outputs of ``packing``.
    """

    choice: Choice
    looked_at: Mapping[str, Any]
    places: tuple[_View, ...]
    made: Mould
    rows: int
    packing: Packing
    buffers: Mapping[str, int]
    weight: QuantizedTensor
    tensors: Mapping[str, int]  # of the weight, as ``QuantizedTensor.tensors``
    bias: int | None
    unpacks: bool  # some views are of tensors that the scheme unpacks

    def fits(self, stored: Mapping[str, Tensor]) -> bool:
        """Whether the params that the scheme looks at have the same values."""
        return all(stored[name].tolist() == value for name, value in self.looked_at.items())

    def layer(
        self, stored: Mapping[str, Tensor], name: str, rechoose: Callable[..., Choice]
    ) -> tuple[LayerTensors, QuantModule]:
        """A layer alike, whose only member is called ``name``: its canonical form, its module.

        Args:
            stored: its stored tensors, and where it ``unpacks``, the rooms of ``unpacking``.
        """
        held = _at(self.places, stored)
        member = BoundMember(name=name, start=0, stop=self.rows, packing=self.packing)
        buffers = {buffer: held[i] for buffer, i in self.buffers.items()}
        return self._canonical(held), self.made(buffers, (member,), rechoose)

    def _canonical(self, held: Sequence[Tensor]) -> LayerTensors:
        one, at = self.weight, self.tensors
        weight = QuantizedTensor(
            spec=one.spec,
            shape=one.shape,
            codes=held[at["codes"]],
            packing=one.packing,
            scales=tuple(held[at[f"scales_{i}"]] for i in range(len(one.scales))),
            zeros=held[at["zeros"]] if "zeros" in at else None,
            offset=tuple(held[at[f"offset_{i}"]] for i in range(len(one.offset))),
            gather=held[at["gather"]] if "gather" in at else None,
        )
        bias = None if self.bias is None else held[self.bias]
        return LayerTensors(operands={"weight": weight}, bias=bias)


def pattern_of(
    module: QuantModule,
    choice: Choice,
    lt: LayerTensors,
    stored: Mapping[str, Tensor],
    scheme: Scheme,
) -> Pattern | None:
    """The pattern of a layer that has just been built, of one member; None if it shows none.

    Args:
        stored: its stored tensors, by param.
    """
    assert scheme.pattern is not None, "Who has none is not asked"
    if not scheme.alike(stored):
        return None
    one, others = lt.weight, (lt.acc_bias, lt.out_scale, lt.input_scale, lt.input_zero)
    odd = len(lt.operands) > 1 or lt.transforms or one.codebook or len(module.members) != 1
    if odd or any(t is not None for t in others):
        return None
    unpacked = _held(scheme, one)
    parts = {**stored, **unpacked}
    numbers: dict[_View, int] = {}

    def numbered(values: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, int]:
        views = {name: _view(t, whole) for name, t in values.items()}
        return {n: numbers.setdefault(v, len(numbers)) for n, v in views.items() if v is not None}

    tensors, buffers = one.tensors(), module.tensors
    found, held = numbered(tensors, parts), numbered(buffers, parts)
    bias = {} if lt.bias is None else numbered({"bias": lt.bias}, stored)
    if (len(found), len(held)) != (len(tensors), len(buffers)) or bool(bias) != (
        lt.bias is not None
    ):
        return None
    (only,) = module.members
    return Pattern(
        choice=choice,
        looked_at={n: stored[n].tolist() for n in scheme.pattern[1] if n in stored},
        places=tuple(numbers),
        made=Mould(module),
        rows=only.stop,
        packing=only.packing,
        buffers=held,
        weight=one,
        tensors=found,
        bias=bias.get("bias"),
        unpacks=bool(unpacked),
    )
