"""Which of a format's schemes holds a matrix: tried in order, exactly first.

A plugin lists the schemes that come into question, those nearest to the source first; everything
between the source and a scheme is done by ``steps``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quant_core.convert.fit import Fit, Losses, cannot_hold
from quant_core.errors import LayoutError

if TYPE_CHECKING:
    from quant_core.scheme import Scheme
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["first_fit", "fit_linear"]

_CODE = "Q-LAYOUT-REPRESENT"


def fit_linear(
    layer: LayerDesc, tensors: LayerTensors, allow_inexact: bool, fit: Callable[[bool], Fit]
) -> Fit:
    """``fit(allow_inexact)`` for formats of linear layers.

    Embeddings are written as floats, and so is an lm_head that does not fit exactly.
    """
    as_floats = Fit(scheme=None, tensors=tensors)
    if layer.kind == "embedding":
        return as_floats
    if layer.name.rpartition(".")[2] != "lm_head":
        return fit(allow_inexact)
    try:
        return fit(False)
    except LayoutError as err:
        if err.code != _CODE:
            raise
        return as_floats


def first_fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    schemes: Iterable[Scheme],
    *,
    allow_inexact: bool,
    holds: str,
) -> Fit:
    """The first scheme that holds a matrix exactly; if losses are allowed, else the nearest.

    Nearest is first by what becomes of the activations (``steps.input_distance``), then by the
    order of ``schemes``.

    Args:
        holds: what the format holds, for the message if no scheme comes into question.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` with the reason why the nearest does not hold it.
    """
    from quant_core.convert.steps import ANOTHER, input_distance

    have = operands.get("input")
    ranked = sorted(schemes, key=lambda s: input_distance(have, s.operands.get("input")))
    first: LayoutError | None = None
    for allowed in (False, True) if allow_inexact else (False,):
        for scheme in ranked:
            try:
                return _fit(layer, tensors, operands, scheme, allowed)
            except LayoutError as err:
                if err.code != _CODE:
                    raise
                first = first or err
    if first is None:
        found = f"weights are {tensors.weight.spec.label}"
        raise cannot_hold(layer.name, found, holds, ANOTHER)
    raise first


def _fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    scheme: Scheme,
    allowed: bool,
) -> Fit:
    from quant_core.convert import steps

    losses = Losses(layer.name, allowed)
    lt = steps.plain_layer(tensors, scheme.transforms, layer.name)
    lt = steps.meet_input(lt, operands.get("input"), scheme.operands.get("input"), losses)
    weight = steps.meet(lt.weight, scheme.weight, scheme.shape[1], losses)
    lt = replace(lt, operands={"weight": weight})
    return Fit(scheme=scheme, tensors=lt, losses=losses.taken())
