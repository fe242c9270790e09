"""Stored Hadamard matrices to canonical transforms and back, exactly.

    x V = (x H) / sqrt(n)       H: entries +-1, kept as int8; inverse: H transposed

The product is formed before the division, as the producer does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.spec import Transform

if TYPE_CHECKING:
    from quant_plugin_compressed_tensors.transforms import Rotation

__all__ = ["read_rotations", "stored_rotations"]

Transforms = tuple[tuple[Transform, tuple[Tensor, ...]], ...]


def read_rotations(
    rotations: Sequence[Rotation], where: str, tensors: Mapping[str, Tensor]
) -> Transforms:
    """Each rotation as its signs in int8 and the root of its size.

    Raises:
        LayoutError: ``Q-VALUE-ROTATION`` unless entries are +-1 and the rows orthogonal.
    """
    out: list[tuple[Transform, tuple[Tensor, ...]]] = []
    for rotation in rotations:
        stored, n = tensors[rotation.name], rotation.size
        signs = stored.to(torch.int8)
        ones = bool((stored.abs() == 1).all())
        first = signs.float() @ signs[0].float()
        if not ones or float(first.abs().sum()) != n:
            found = "its rows are not orthogonal" if ones else "holds values other than 1 and -1"
            fix = "The tensor is damaged, or of another kind; export the checkpoint again."
            tensor = f"{where}.{rotation.name}"
            raise LayoutError(
                f"{tensor}: {found}, expected a Hadamard matrix. {fix}",
                code="Q-VALUE-ROTATION",
                tensor=tensor,
                expected="a Hadamard matrix",
                actual=found,
                plugin="compressed_tensors",
            )
        signs = signs.t().contiguous() if rotation.inverse else signs
        matrix, root = rotation.transforms
        out += [(matrix, (signs,)), (root, (torch.tensor([math.sqrt(n)]),))]
    return tuple(out)


def stored_rotations(rotations: Sequence[Rotation], transforms: Transforms) -> dict[str, Tensor]:
    """Inverse of ``read_rotations``."""
    out = {}
    for rotation, (_, (signs, *_)) in zip(rotations, transforms[::2], strict=True):
        signs = signs.t().contiguous() if rotation.inverse else signs
        out[rotation.name] = signs.to(getattr(torch, rotation.dtype))
    return out
