"""What a cut does to the transforms around a matmul: slice, keep, or refuse with legal sizes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from quant_core.rewrites.refuse import refuse
from quant_core.spec import Transform

__all__ = ["Transforms", "cut_transforms"]

Transforms = tuple[tuple[Transform, tuple[Tensor, ...]], ...]


def _cut_one(
    transform: Transform, tensors: tuple[Tensor, ...], start: int, stop: int, size: int | None
) -> tuple[Tensor, ...]:
    if transform.kind == "scale":
        return tuple(t if t.numel() == 1 else t[..., start:stop] for t in tensors)
    if transform.tp == "replicate":
        return tensors
    block = transform.block
    between = block > 0 and start % block == 0 and (stop % block == 0 or stop == size)
    if transform.tp == "block" and between:
        last = -(-stop // block)
        return tuple(t[start // block : last] if t.dim() == 3 else t for t in tensors)
    fits = f"multiples of {block}" if transform.tp == "block" and block else "only the whole axis"
    raise refuse(
        "TP",
        f"cut [{start}, {stop}) crosses the {transform.kind} transform {transform.key!r} "
        f"(tp={transform.tp}), expected {fits}. Use a tensor-parallel size whose parts fit, or "
        "keep this layer whole on every rank.",
        expected=block or size,
        actual=(start, stop),
    )


def cut_transforms(
    transforms: Transforms,
    site: Literal["input", "output"],
    start: int,
    stop: int,
    size: int | None,
) -> Transforms:
    """Transforms of the part [start, stop) of the axis at ``site``; the others stay.

    A vector of scales is sliced; a block-diagonal map (``tp="block"``) is cut between blocks,
    [blocks, b, b] tensors sliced and a shared [b, b] kept; ``tp="replicate"`` is applied to the
    whole axis by every rank before the cut and stays.

    Raises:
        LayoutError: ``Q-LAYOUT-TP`` for a cut through a transform.
    """
    if start == 0 and stop == size:
        return transforms
    return tuple(
        (t, _cut_one(t, tensors, start, stop, size) if t.site == site else tensors)
        for t, tensors in transforms
    )
