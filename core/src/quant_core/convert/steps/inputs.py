"""Quantized activations: whether a target's meaning is the source's, and what differs if not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_core.convert.fit import Losses, cannot_hold
from quant_core.convert.steps.layer import ANOTHER
from quant_core.convert.steps.scales import divisor_of
from quant_core.numerics import decode_scale, scale_dtype
from quant_core.spec import QuantSpec, Scale
from quant_core.tensors import LayerTensors

__all__ = ["input_distance", "meet_input", "same_input"]

_FAR = 9  # no way from one to the other


def _shape(spec: QuantSpec) -> tuple[object, ...]:
    """What may not differ: the codes, and which scales there are, stored or made at run time."""
    levels = tuple((s.grain, s.static, s.element if not s.static else "") for s in spec.scales)
    return (spec.element, levels, spec.zero)


def same_input(a: QuantSpec | None, b: QuantSpec | None) -> bool:
    """Whether activations become the same codes, given stored scales of the same values."""
    if a is None or b is None:
        return a is b
    return _plain(a) == _plain(b)


def _plain(spec: QuantSpec) -> QuantSpec:
    """Without the types of stored scales: their values are compared."""
    scales = tuple(replace(s, element="f32") if s.static else s for s in spec.scales)
    return replace(spec, scales=scales)


def input_distance(have: QuantSpec | None, want: QuantSpec | None) -> int:
    """How far a target's activations are from the source's: 0 equal, 1 to 4 a loss, 9 no way.

    1 rounded by another rule, 2 not quantized any more, 3 quantized though they were floats,
    4 quantized in another way. No way leads to a stored scale that was never measured.
    """
    if same_input(have, want):
        return 0
    if want is None:
        return 2
    if have is not None and _shape(have) == _shape(want):
        return 1
    if any(s.static for s in want.scales):
        return _FAR
    return 3 if have is None else 4


def meet_input(
    lt: LayerTensors, have: QuantSpec | None, want: QuantSpec | None, losses: Losses
) -> LayerTensors:
    """The layer with activations as ``want`` has them.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if stored scales would have to be made up, or overflow.
    """
    far = input_distance(have, want)
    if have is None and want is None:
        return lt
    if far == 2:
        assert have is not None
        losses.lose(
            f"quantizes its activations ({have.label})",
            "float activations",
            "activations are no longer quantized",
        )
        return replace(lt, input_scale=None, input_zero=None)
    assert want is not None
    if far == _FAR:
        found = "float activations" if have is None else f"activations of {have.label}"
        raise cannot_hold(losses.where, found, f"activations of {want.label}", ANOTHER)
    if have is None:
        losses.lose(
            "leaves its activations as floats",
            f"activations quantized ({want.label})",
            "activations become quantized",
        )
        return lt
    if far == 4:
        losses.lose(
            f"quantizes its activations as {have.label}",
            f"activations quantized as {want.label}",
            f"activations quantized as {want.label}",
        )
        return replace(lt, input_scale=None, input_zero=None)
    if far == 1:
        losses.lose(
            f"rounds its activations as {_rule(have)}",
            f"activations rounded as {_rule(want)}",
            "activations rounded by another rule",
        )
    if lt.input_scale is None:
        return lt
    old, new = _static(have), _static(want)
    return replace(lt, input_scale=_stored(lt.input_scale, old, new, losses))


def _static(spec: QuantSpec) -> Scale:
    return next(s for s in spec.scales if s.static)


def _stored(value: Tensor, old: Scale, new: Scale, losses: Losses) -> Tensor:
    if old.inverse != new.inverse:  # the change of the rule is named already
        value = decode_scale(value, old.element)
        value = 1 / value if old.inverse else divisor_of(value)[0]
        old = replace(old, element="f32")
    if old.element == new.element:
        return value
    wide = decode_scale(value, old.element)
    out = wide.to(scale_dtype(new.element))
    if not bool(torch.isfinite(out).all()):
        raise cannot_hold(losses.where, "an input scale overflows", new.element, ANOTHER)
    if not torch.equal(out.float(), wide):
        losses.lose(
            f"an input scale is not {new.element} exactly",
            f"an input scale of {new.element}",
            f"input scale rounded to {new.element}",
        )
    return out


def _rule(spec: QuantSpec) -> str:
    """What sets a rule apart: bounds, peak, direction and ties."""
    parts = []
    for s in spec.scales:
        marks = [s.rule] if s.rule else []
        marks += [f"max|x|/{s.peak:g}"] if s.peak else []
        marks += [f"at least {s.least:.2g}"] if s.least else []
        marks += [f"at most {s.most:.4g}"] if s.most else []
        marks += ["divided"] if s.inverse else []
        parts.append(f"{s.element}{' (' + ', '.join(marks) + ')' if marks else ''}")
    tail = f", ties {spec.ties}" if spec.ties != "even" else ""
    return " under ".join(parts) + tail
