"""Static scales and rotations of a layer's inputs: stored tensors to canonical ones and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_plugin_quark.transforms import PRESCALE, ROTATION, Rotation
from quant_plugin_quark.values import bad_tensor, byte_codes, check_finite, check_null

if TYPE_CHECKING:
    from quant_core.tensors import LayerTensors
    from quant_plugin_quark.scheme import QuarkScheme

__all__ = ["read_inputs", "read_rotation", "stored_inputs", "stored_rotation"]


def read_inputs(
    scheme: QuarkScheme, where: str, tensors: Mapping[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Static scale and zero point of activations.

    Raises:
        LayoutError: ``Q-VALUE-SCALE`` for a scale that is not finite and positive.
    """
    if not scheme.input_scale:
        return None, None
    tensor = f"{where}.{scheme.input_scale}"
    scale = tensors[scheme.input_scale].reshape(1)
    if not bool(torch.isfinite(scale) & (scale > 0)):
        found = f"has value {scale.item()}"
        raise bad_tensor(
            "Q-VALUE-SCALE", tensor, found, "a finite positive scale", "Calibrate and export again."
        )
    if not scheme.input_zero:
        return scale, None
    zero, name = tensors[scheme.input_zero].reshape(1), f"{where}.{scheme.input_zero}"
    spec = scheme.operands["input"]
    if spec.zero is None:
        check_null(scheme, name, zero)
        return scale, None
    return scale, byte_codes(zero, name, spec.element.name)


def stored_inputs(scheme: QuarkScheme, tensors: LayerTensors) -> dict[str, Tensor]:
    """Inverse of ``read_inputs``."""
    if not scheme.input_scale or tensors.input_scale is None:
        return {}
    param = scheme.stored(scheme.input_scale)
    out = {param.name: tensors.input_scale.reshape(param.shape)}
    if scheme.input_zero:
        zero = scheme.stored(scheme.input_zero)
        dtype = getattr(torch, zero.dtypes[0])
        if tensors.input_zero is None:
            out[zero.name] = torch.zeros(zero.shape, dtype=dtype)
        else:
            signed = scheme.operands["input"].element.kind == "int"
            value = tensors.input_zero.view(torch.int8 if signed else torch.uint8)
            out[zero.name] = value.to(dtype).reshape(zero.shape)
    return out


def read_rotation(
    rotation: Rotation, where: str, tensors: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], ...]:
    """Tensors of each transform of ``rotation``.

    Raises:
        LayoutError: ``Q-VALUE-ROTATION`` unless signs are +-1 and the matrix is orthogonal.
    """
    matrix, n = tensors[ROTATION], rotation.size
    work = matrix.double()
    square = work @ work.T
    want = torch.eye(n, dtype=torch.float64) * (n if rotation.signs else 1)
    # float64 entries were trained in lower precision: orthogonal to 1e-3 of a row's length
    right = torch.equal(square, want) if rotation.signs else (square - want).abs().max() < 1e-3
    if not bool(right) or (rotation.signs and bool((matrix.abs() != 1).any())):
        fix = "The tensor is damaged, or of another kind; export the checkpoint again."
        found = "is no orthogonal matrix"
        expected = "a Hadamard matrix of signs" if rotation.signs else "an orthogonal matrix"
        raise bad_tensor("Q-VALUE-ROTATION", f"{where}.{ROTATION}", found, expected, fix)
    out: list[tuple[Tensor, ...]] = [(matrix,)]
    if rotation.prescale:
        check_finite(f"{where}.{PRESCALE}", tensors[PRESCALE])
        out.insert(0, (tensors[PRESCALE],))
    if rotation.signs:
        out.append((torch.tensor([math.sqrt(n)]),))
    return tuple(out)


def stored_rotation(scheme: QuarkScheme, tensors: LayerTensors) -> dict[str, Tensor]:
    """Inverse of ``read_rotation``."""
    if scheme.rotation is None:
        return {}
    values = [v[0] for _, v in tensors.transforms]
    if not scheme.rotation.prescale:
        return {ROTATION: values[0]}
    return {PRESCALE: values[0], ROTATION: values[1]}
