"""Which bitsandbytes scheme holds a canonical matrix: its own 4-bit tables, or int8 rows.

    nf4, fp4 tables    as they are, with the blocks they have
    int8 per row       SCB = 127 * scale, where a float32 SCB gives the scale back; else a loss

Activations are floats here. There are no options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant_core.convert import steps
from quant_core.convert.choose import fit_linear, sizes_of
from quant_core.convert.fit import Fit, Losses, cannot_hold, check_options
from quant_core.spec import CHANNEL, Element, LayerDesc, QuantSpec, Scale
from quant_core.tensors import LayerTensors
from quant_plugin_bitsandbytes.scheme import FourBitScheme, four_bit, int8
from quant_plugin_bitsandbytes.state import QuantState

__all__ = ["fit"]

_ROWS = QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),))
_TYPES = {"nf4": "nf4", "fp4_table": "fp4"}
_STEP = 1 / 127
_NEAR = (0, -1, 1, -2, 2)  # float32 neighbours of 127 * scale, in the order they are tried


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, {}, "bitsandbytes")
    return fit_linear(layer, tensors, allow_inexact, lambda ok: _fit(layer, tensors, operands, ok))


def _fit(
    layer: LayerDesc, tensors: LayerTensors, operands: Mapping[str, QuantSpec], allowed: bool
) -> Fit:
    losses = Losses(layer.name, allowed)
    lt = steps.plain_layer(tensors, (), layer.name)
    lt = steps.meet_input(lt, operands.get("input"), None, losses)
    shape = sizes_of(layer, tensors)
    if lt.weight.spec.element.kind == "lut":
        return Fit(scheme=_four_bit(lt, layer, shape), tensors=lt, losses=losses.taken())
    scheme = int8(shape, has_format=True, source="config.json")
    qt = lt.weight
    if qt.spec != scheme.weight:
        qt = steps.meet(qt, _ROWS, shape[1], losses)
        largest, exact = _row_maxima(qt.scales[0])
        if not exact:
            losses.lose(
                "scales are not SCB / 127 for any float32 SCB",
                "scales of SCB / 127",
                "scales rounded to SCB / 127",
            )
        step = torch.tensor([[_STEP]], dtype=torch.float32)
        qt = replace(qt, spec=scheme.weight, scales=(largest, step))
    return Fit(scheme=scheme, tensors=replace(lt, operands={"weight": qt}), losses=losses.taken())


def _row_maxima(scale: Tensor) -> tuple[Tensor, bool]:
    """SCB of each row, and whether SCB * (1/127) is its scale in float32 everywhere."""
    first = (scale.double() * 127).float().contiguous()
    bits = first.view(torch.int32)
    near = torch.stack([(bits + d).view(torch.float32) for d in _NEAR])
    fits = near * torch.tensor(_STEP, dtype=torch.float32) == scale
    picked = near.gather(0, fits.int().argmax(dim=0, keepdim=True))[0]
    return torch.where(fits.any(dim=0), picked, first), bool(fits.any(dim=0).all())


def _four_bit(lt: LayerTensors, layer: LayerDesc, shape: tuple[int, int]) -> FourBitScheme:
    """The scheme of a matrix of this format's own codes.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for another table, or scales of another form.
    """
    spec, k = lt.weight.spec, shape[1]
    name = _TYPES.get(spec.element.name, "")
    nested = len(spec.scales) == 3
    blocks = [_consecutive(s.grain, k) for s in spec.scales[nested:]]
    block = blocks[0] if blocks else 0
    nested_block = blocks[1] // block if nested and block else 0
    scheme = None
    if name and block:
        keys: dict[str, Any] = {
            "quant_type": name,
            "blocksize": block,
            "dtype": layer.dtype,
            "shape": shape,
        }
        if nested:
            keys |= {"nested_blocksize": nested_block, "nested_dtype": "float32"}
            keys["nested_offset"] = 0.0
        state = QuantState(
            quant_type=name,
            block=block,
            shape=shape,
            nested_block=nested_block,
            offset=0.0,
            keys=tuple(keys.items()),
        )
        scheme = four_bit(state, "uint8", "config.json")
    if scheme is None or scheme.weight != spec:
        expected = "nf4 or fp4 tables in blocks of consecutive weights"
        raise cannot_hold(layer.name, f"weights are {spec.label}", expected, steps.ANOTHER)
    return scheme


def _consecutive(grain: tuple[int, int], k: int) -> int:
    """Consecutive weights under one value; 0 if they are not."""
    rows, cols = grain
    if cols == 0:
        return rows * k
    return cols if rows == 1 else 0
