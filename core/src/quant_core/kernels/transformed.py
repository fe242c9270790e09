"""Transforms around kernels that know none: x is moved first, y afterwards.

    x -> T_in(x) -> kernel of the rest -> T_out(y)

So layers with rotations or smoothing run on every kernel of their weights; the trace calls it
``<kernel>@transformed``. A Hadamard matrix is kept as its factors (``kernels.hadamard``) and the
product with it is an operation that packages offer; other maps are torch's. What is computed
between transforms is float32, rounded once to the dtype of x, as in the reference.

The tensors of the transforms are buffers behind those of the kernel, under a layout name of its
own. Linear layers only: experts may differ in their transforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.hadamard import Factors, TorchHadamard, factors, hadamard_op, matrix
from quant_core.kernels.measured import answer as answer_of
from quant_core.kernels.transforms import (
    apply_one,
    hadamard_orders,
    held_transforms,
    transform_buffers,
    transform_shapes,
    unsupported_transform,
)
from quant_core.memory import poisoned
from quant_core.spec import OpSpec, Packing, Transform

if TYPE_CHECKING:
    from quant_core.tensors import LayerTensors

__all__ = ["Transformed", "without_transforms"]

_PARTS = ("rows", "core", "cols")
_TORCH_US = 12.0  # of a map by torch's own ops


def without_transforms(op: OpSpec) -> OpSpec:
    """``op`` for inputs that are moved already and outputs that are moved later."""
    features = frozenset(f for f in op.features if not f.startswith("transform_"))
    return replace(op, transforms=(), features=features)


@dataclass(frozen=True, slots=True)
class _Step:
    """One map: of torch, or ``run`` of a Hadamard matrix, with the division behind it if any.

    ``at``: positions of its tensors among the buffers.
    """

    transform: Transform
    at: tuple[int, ...]
    run: Callable[..., Tensor] | None = None


class Transformed:
    """``inner`` between the transforms of its operation."""

    TRANSFORMS = True

    def __init__(self, inner: Kernel, hadamard: Kernel | None = None) -> None:
        self.inner = inner
        self.hadamard: Kernel = TorchHadamard() if hadamard is None else hadamard
        self.name = f"{inner.name}@transformed"
        layout = str(getattr(inner, "layout", ""))
        self.layout = f"{layout}+transforms" if layout else ""

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.op != "linear" or not op.transforms:
            return Rejected(axis="op", have=op.op, need="linear with transforms")
        if odd := unsupported_transform(op):
            return odd
        said = answer_of(self.inner, without_transforms(op))
        if isinstance(said, Rejected):
            return said
        cost, names = 0.0, []
        orders = hadamard_orders(op)
        for i in range(len(op.transforms)):
            if i in orders:
                by = answer_of(
                    self.hadamard, hadamard_op(op, op.transforms[i].site, *orders[i], True)
                )
                if isinstance(by, Rejected):
                    return by
                cost += by.cost
                names.append(self.hadamard.name)
            else:
                cost += _TORCH_US
        kinds = ", ".join(f"{t.kind} at {t.site}" for t in op.transforms)
        note = f"{kinds}, first" + (f" by {', '.join(dict.fromkeys(names))}" if names else "")
        return replace(
            said,
            cost=said.cost + cost,
            costs=tuple((m, us + cost) for m, us in said.costs),
            note=f"{said.note}; {note}" if said.note else note,
        )

    def _shapes(self, op: OpSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Own buffers: the transforms' tensors, factors in place of Hadamard matrices."""
        out, orders = {}, hadamard_orders(op)
        for name, (shape, dtype) in transform_shapes(op).items():
            i = int(name.split("_")[1])
            if i not in orders:
                out[name] = (shape, dtype)
                continue
            n, m = orders[i]
            sizes = ((n,), (m, m), (n,))
            out |= {f"{name}_{part}": (s, torch.int8) for part, s in zip(_PARTS, sizes)}
        return out

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        out = self.inner.allocate(without_transforms(op), device)
        for name, (shape, dtype) in self._shapes(op).items():
            out[name] = poisoned(shape, dtype, device)
        return out

    def reads(self, op: OpSpec, packing: Packing) -> bool:
        """Whether ``load_`` takes parts whose codes lie in ``packing``: the kernel's answer."""
        ask = getattr(self.inner, "reads", None)
        return ask is not None and bool(ask(without_transforms(op), packing))

    def _split(
        self, op: OpSpec, buffers: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own = self._shapes(op)
        weights = {n: t for n, t in buffers.items() if n not in own}
        return weights, {n: buffers[n] for n in own}

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        weights, own = self._split(op, buffers)
        bare = replace(part, transforms=())
        self.inner.load_(weights, without_transforms(op), bare, at)
        orders = hadamard_orders(op)
        for name, value in transform_buffers(part.transforms).items():
            if int(name.split("_")[1]) not in orders:
                own[name].copy_(value)
                continue
            f = factors(value)
            assert f is not None, "the operation's feature says so"
            for piece in _PARTS:
                own[f"{name}_{piece}"].copy_(getattr(f, piece))

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        weights, own = self._split(op, buffers)
        orders = hadamard_orders(op)
        whole = {}
        for name in transform_shapes(op):
            if int(name.split("_")[1]) in orders:
                rows, core, cols = (own[f"{name}_{piece}"] for piece in _PARTS)
                whole[name] = matrix(Factors(rows=rows, core=core, cols=cols))
            else:
                whole[name] = own[name].clone()
        back = self.inner.restore(weights, without_transforms(op))
        return replace(back, transforms=held_transforms(op, whole))

    def _steps(self, op: OpSpec, site: str, first: int) -> tuple[_Step, ...]:
        names = {name: first + i for i, name in enumerate(self._shapes(op))}
        orders, out = hadamard_orders(op), []
        skip = -1
        for i, t in enumerate(op.transforms):
            if t.site != site or i == skip:
                continue
            mine = tuple(p for n, p in names.items() if n.startswith(f"transform_{i}_"))
            if i not in orders:
                out.append(_Step(t, mine))
                continue
            then = op.transforms[i + 1] if i + 1 < len(op.transforms) else None
            shape = transform_shapes(op).get(f"transform_{i + 1}_0", ((), None))[0]
            root = (
                then is not None
                and (then.kind, then.site, then.inverse) == ("scale", site, True)
                and shape == (1,)
            )
            if root:
                mine += (names[f"transform_{i + 1}_0"],)
                skip = i + 1
            n, m = orders[i]
            out.append(_Step(t, mine, self.hadamard.bind(hadamard_op(op, site, n, m, root))))
        return tuple(out)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        bare = without_transforms(op)
        count = len(self.inner.allocate(bare, "meta"))
        before, after = self._steps(op, "input", count), self._steps(op, "output", count)
        return functools.partial(_run, self.inner.bind(bare), count, before, after)


def _move(x: Tensor, steps: tuple[_Step, ...], values: list[Tensor]) -> Tensor:
    if not steps:
        return x
    if len(steps) == 1 and steps[0].run is not None:
        return steps[0].run([], x, *(values[i] for i in steps[0].at))
    work = x if x.dtype == torch.float64 else x.float()
    for step in steps:
        tensors = tuple(values[i] for i in step.at)
        work = (
            apply_one(work, step.transform, tensors)
            if step.run is None
            else step.run([], work, *tensors)
        )
    return work.to(x.dtype)


def _run(
    inner: Callable[..., Tensor], count: int, before: tuple[_Step, ...],
    after: tuple[_Step, ...], values: list[Tensor], x: Tensor, *rest: Any,
) -> Tensor:  # fmt: skip
    y = inner(values[:count], _move(x, before, values), *rest)
    return _move(y, after, values)
