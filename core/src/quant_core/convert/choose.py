"""Which of a format's schemes holds a matrix: tried in order, exactly first.

A plugin lists the schemes that come into question, those nearest to the source first; everything
between the source and a scheme is done by ``steps``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from quant_core.convert.fit import Fit, Losses, cannot_hold
from quant_core.errors import LayoutError

if TYPE_CHECKING:
    from quant_core.scheme import Scheme
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["first_fit", "fit_linear", "nearest_fit", "sizes_of", "wide_dtype"]

_CODE = "Q-LAYOUT-REPRESENT"
_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
_WIDE = tuple(_DTYPES)


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


def sizes_of(layer: LayerDesc, tensors: LayerTensors) -> tuple[int, int]:
    """(N, K) of a matrix: stored columns may be more or fewer than the layer's inputs."""
    n, k = tensors.weight.shape
    return n, k if layer.inp is None else layer.inp.total


def wide_dtype(spec: QuantSpec | None, *, static: bool = True) -> str:
    """Stored dtype of a float scale that keeps the finest one as it is; else float32.

    Args:
        spec: whose scales are kept; None gives float32.
        static: take the first stored scale, not a run-time one.
    """
    scales = [] if spec is None else [s for s in spec.scales if s.static or not static]
    return _DTYPES.get(scales[0].element, "float32") if scales else "float32"


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

    Nearest is first by what becomes of the activations (``steps.input_distance``), then by codes,
    factors and grains that stay as they are, then by the order of ``schemes``.

    Args:
        holds: what the format holds, for the message if no scheme comes into question.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``: what the nearest would lose, else why it does not
            hold the matrix.
    """
    from quant_core.convert.steps import ANOTHER, input_distance

    have = operands.get("input")
    weight = tensors.weight.spec

    def far(scheme: Scheme) -> tuple[int, int]:
        return input_distance(have, scheme.operands.get("input")), _far(weight, scheme.weight)

    ranked = sorted(schemes, key=far)
    first: LayoutError | None = None
    lossy: dict[tuple[int, bool], tuple[Fit, Losses]] = {}
    for scheme in ranked:
        losses = Losses(layer.name, True)
        try:
            found = _fit(tensors, operands, scheme, losses)
        except LayoutError as err:
            if err.code != _CODE:
                raise
            first = first or err
            continue
        if not found.losses:
            return found
        lossy.setdefault((far(scheme)[0], _coarse(weight, scheme.weight)), (found, losses))
    if lossy:
        found, losses = lossy[min(lossy)]
        losses.allowed = allow_inexact
        losses.taken()  # refuses if none is allowed, and says which would be
        return found
    if first is None:
        found_kind = f"weights are {tensors.weight.spec.label}"
        raise cannot_hold(layer.name, found_kind, holds, ANOTHER)
    raise first


def _far(have: QuantSpec, want: QuantSpec) -> int:
    """How much of a weight's description changes: codes, factors, grains, types of scales."""
    factors = [[(s.element in _WIDE or s.element, s.add) for s in q.scales] for q in (have, want)]
    grains = [[s.grain for s in q.scales] for q in (have, want)]
    return (
        8 * (have.element != want.element)
        + 4 * (factors[0] != factors[1])
        + 2 * (grains[0] != grains[1])
        + (have.scales != want.scales)
    )


def _coarse(have: QuantSpec, want: QuantSpec) -> bool:
    """Whether offsets would be rounded to a few codes: a grid of 8 bits errs a thirtieth of it."""
    zero = have.zero
    rounds = zero is not None and (zero.kind == "offset" or zero.element in _WIDE)
    kept = want.zero is not None and want.zero.element in _WIDE
    return rounds and not kept and want.element.bits < 8


def _fit(
    tensors: LayerTensors, operands: Mapping[str, QuantSpec], scheme: Scheme, losses: Losses
) -> Fit:
    from quant_core.convert import steps

    lt = steps.plain_layer(tensors, scheme.transforms, losses.where)
    lt = steps.meet_input(lt, operands.get("input"), scheme.operands.get("input"), losses)
    weight = steps.meet(lt.weight, scheme.weight, scheme.shape[1], losses)
    lt = replace(lt, operands={"weight": weight})
    return Fit(scheme=scheme, tensors=lt, losses=losses.taken())


def nearest_fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    schemes: Sequence[Scheme],
    allow_inexact: bool,
    *,
    holds: str,
) -> Fit:
    """``first_fit`` by the rules of ``fit_linear``: all that many a format's ``fit_scheme`` needs.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``.
    """

    def fit(allowed: bool) -> Fit:
        return first_fit(layer, tensors, operands, schemes, allow_inexact=allowed, holds=holds)

    return fit_linear(layer, tensors, allow_inexact, fit)
