"""Transforms around a matmul in plain torch: which are possible, their buffers, and the maths.

    y = T_out(T_in(x) @ W^T + b)        several at one site are applied in the order they are listed

A kernel keeps tensor j of transform i as the buffer ``transform_<i>_<j>``; its dtype and shape
stand in the operation's features, so buffers can be allocated from the operation alone; that a
matrix is a Hadamard matrix stands there too ("transform_<i>_hadamard:<order>x<order of C>"). The
product is formed in float32 (float64 for a float64 x) and rounded once to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant_core.kernels.base import Rejected
from quant_core.kernels.hadamard import factors
from quant_core.spec import OpSpec, Transform

__all__ = [
    "Transforms",
    "apply_one",
    "apply_transforms",
    "hadamard_orders",
    "held_transforms",
    "transform_buffers",
    "transform_features",
    "transform_shapes",
    "unsupported_transform",
]

Transforms = tuple[tuple[Transform, tuple[Tensor, ...]], ...]

_KINDS = ("scale", "matrix", "kron")
_SITES = ("input", "output")


def unsupported_transform(op: OpSpec) -> Rejected | None:
    """Why a transform of the operation cannot be computed here; None if all can."""
    for t in op.transforms:
        have = f"{t.kind} at {t.site}"
        if t.kind not in _KINDS or t.site not in _SITES:
            need = f"{' or '.join(_KINDS)} at {' or '.join(_SITES)}"
            return Rejected(axis="transforms", have=have, need=need)
        if op.op == "embedding":
            return Rejected(axis="transforms", have=have, need="none for an embedding")
    return None


def transform_buffers(transforms: Transforms) -> dict[str, Tensor]:
    """Tensors of one matrix under the names of the buffers that hold them."""
    return {
        f"transform_{i}_{j}": value
        for i, (_, values) in enumerate(transforms)
        for j, value in enumerate(values)
    }


def transform_features(transforms: Transforms) -> frozenset[str]:
    """Features of an operation that state dtype and shape of its transforms' tensors, and which
    matrices are Hadamard matrices with factors."""
    found = {
        f"{name}:{str(t.dtype).removeprefix('torch.')}:{'x'.join(map(str, t.shape))}"
        for name, t in transform_buffers(transforms).items()
    }
    for i, (transform, values) in enumerate(transforms):
        if transform.kind == "matrix" and (f := factors(values[0])) is not None:
            found.add(f"transform_{i}_hadamard:{f.rows.numel()}x{f.core.shape[0]}")
    return frozenset(found)


def hadamard_orders(op: OpSpec) -> dict[int, tuple[int, int]]:
    """Position of each transform that is a Hadamard matrix -> (its order, the order of its C)."""
    texts = (f.split(":") for f in op.features if "_hadamard:" in f)
    pairs = ((name, sizes.split("x")) for name, sizes in texts)
    return {int(name.split("_")[1]): (int(n), int(m)) for name, (n, m) in pairs}


def transform_shapes(op: OpSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Buffer name -> (shape without the expert axis, dtype), in the order of the transforms."""
    found = {}
    for text in op.features:
        if text.startswith("transform_") and "_hadamard:" not in text:
            name, dtype, shape = text.split(":")
            sizes = tuple(int(s) for s in shape.split("x") if s)
            found[name] = (sizes, getattr(torch, dtype))
    return dict(sorted(found.items(), key=lambda item: _position(item[0])))


def _position(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("_")[1:])


def held_transforms(
    op: OpSpec, buffers: Mapping[str, Tensor], expert: int | None = None
) -> Transforms:
    """The transforms that ``buffers`` hold; with ``expert``, that expert's."""
    values: list[list[Tensor]] = [[] for _ in op.transforms]
    for name in transform_shapes(op):
        value = buffers[name]
        values[_position(name)[0]].append(value if expert is None else value[expert])
    return tuple((t, tuple(v)) for t, v in zip(op.transforms, values, strict=True))


def apply_one(x: Tensor, transform: Transform, tensors: tuple[Tensor, ...]) -> Tensor:
    """One map of x in its own dtype."""
    values = tensors[0].to(x.dtype)
    if transform.kind == "kron":
        left, right = values, tensors[1].to(x.dtype)
        grid = x.unflatten(-1, (left.shape[-1], right.shape[-1]))
        return (left.mT @ grid @ right).flatten(-2)
    if transform.kind == "scale":
        return x / values if transform.inverse else x * values
    blocks = x.unflatten(-1, (-1, values.shape[-1])).unsqueeze(-2)
    return (blocks @ values).flatten(-3)


def apply_transforms(x: Tensor, transforms: Transforms, site: str) -> Tensor:
    """``x`` [T, K] after all transforms of ``site``; shape and dtype as before."""
    mine = [(t, values) for t, values in transforms if t.site == site]
    if not mine:
        return x
    work = x if x.dtype == torch.float64 else x.float()
    for transform, values in mine:
        work = apply_one(work, transform, values)
    return work.to(x.dtype)
