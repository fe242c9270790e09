"""Rotations of a layer's inputs that run with the model, as they are stored.

    x' = blocks(x * input_prescale) @ R        input_prescale  [K], may be absent
                                               input_rotation  [r, r], r divides K

``input_rotation`` in int8 holds the signs of a Hadamard matrix and is divided by sqrt(r); in
float64 it holds the matrix itself. One matrix for all layers (``shared_input_rotation_<r>``) is
refused. Read only: no checkpoint with a rotation was at hand.

Source: amd-quark 0.13 ``torch/export/nn/modules/qparamslinear.py`` (QParamsLinearWithRotation),
``torch/algorithm/rotation/rotation_utils.py`` (rotate_with_size, HadamardTransform).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quant_core.errors import ConfigError, printable
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.spec import Axis, ParamSpec, TensorInfo, Transform

__all__ = ["ROTATIONS", "SHARED", "Rotation", "rotation_of"]

ROTATION, PRESCALE = "input_rotation", "input_prescale"
ROTATIONS = frozenset((ROTATION, PRESCALE))
SHARED = "shared_input_rotation_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """One layer's rotation.

    Attributes:
        size: of the matrix; the inputs are rotated in blocks of it.
        dtype: stored: "int8" (signs) or "float64".
        prescale: stored dtype of the vector, "" if there is none.
    """

    layer: str
    size: int
    in_features: int
    dtype: str
    prescale: str = ""

    @property
    def signs(self) -> bool:
        return self.dtype == "int8"

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The vector, the matrix, the division by sqrt(size); those that there are."""
        key, tp = f"{self.layer}.{ROTATION}", "block"
        block = self.size if self.size < self.in_features else 0
        tp = "block" if block else "refuse"
        out = [Transform(site="input", kind="matrix", key=key, block=block, tp=tp)]  # type: ignore[arg-type]
        if self.prescale:
            scale = f"{self.layer}.{PRESCALE}"
            out.insert(0, Transform(site="input", kind="scale", key=scale, tp="block"))
        if self.signs:
            norm = f"{key}/norm"
            out.append(
                Transform(site="input", kind="scale", key=norm, inverse=True, tp="replicate")
            )
        return tuple(out)

    @property
    def params(self) -> tuple[ParamSpec, ...]:
        fixed = Axis(tag="fixed", cut="replicate")
        matrix = ParamSpec(
            name=ROTATION,
            shape=(self.size, self.size),
            dtypes=(self.dtype,),
            axes=(fixed, fixed),
            role="transform",
        )
        if not self.prescale:
            return (matrix,)
        vector = ParamSpec(
            name=PRESCALE,
            shape=(self.in_features,),
            dtypes=(self.prescale,),
            axes=(Axis(tag="in"),),
            role="transform",
        )
        return (matrix, vector)


def rotation_of(
    leaves: Mapping[str, TensorInfo], layer: str, in_features: int, file: str
) -> Rotation | None:
    """The rotation stored with a layer, None if there is none.

    Raises:
        ConfigError: ``Q-CFG-TRANSFORM`` if it cannot be applied.
    """
    if not ROTATIONS & leaves.keys():
        return None
    matrix, vector = leaves.get(ROTATION), leaves.get(PRESCALE)
    size = matrix.shape[0] if matrix is not None and matrix.shape else 0
    good = (
        matrix is not None
        and matrix.shape == (size, size)
        and size > 0
        and in_features % size == 0
        and matrix.dtype in ("int8", "float64")
        and (vector is None or vector.dtype in SCALE_ELEMENTS)
    )
    if matrix is None or not good:
        stored = {n: (i.dtype, i.shape) for n, i in leaves.items() if n in ROTATIONS}
        raise ConfigError(
            f"{file}: inputs of {printable(layer)!r} are rotated by {printable(stored)}, expected "
            f"{ROTATION} int8 or float64 [r, r] where r divides {in_features}. Export the model "
            "with rotations merged into the weights.",
            code="Q-CFG-TRANSFORM",
            path=file,
            tensor=layer,
            actual=stored,
            plugin="quark",
        )
    return Rotation(
        layer=layer,
        size=size,
        in_features=in_features,
        dtype=matrix.dtype,
        prescale="" if vector is None else vector.dtype,
    )
