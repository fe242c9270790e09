"""Scales of keys and values in another format: carried over bit by bit, or refused with a reason.

A scale keeps its value and dtype; its name and the number of its axes become the target's. What
cannot be carried (a scale per feature where the target has one per tensor, codes of another kind,
zero points) is refused; with losses allowed it is left behind, and the cache stays float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_core.convert.fit import Losses
from quant_core.kv_cache import CacheForm, CacheScheme
from quant_core.spec import TENSOR, LayerDesc

if TYPE_CHECKING:
    from quant_core.plan import Member, Plan
    from quant_core.registry import Registry
    from quant_core.tensors import LayerTensors

__all__ = ["cache_label", "cache_warnings", "check_cache", "fit_cache"]

_SITES = {"cache": "after the rotary embedding", "projection": "before the rotary embedding"}
_GRAINS = {True: "one scale per tensor", False: "scales per feature"}


def cache_label(scheme: CacheScheme) -> str:
    """Short text for tables: ``keys and values fp8_e4m3 tensor:bf16``."""
    labels = dict.fromkeys(spec.label for spec in scheme.operands.values())
    return f"{'queries, ' * ('q' in scheme.operands)}keys and values {'; '.join(labels)}"


def _misfits(scheme: CacheScheme, form: CacheForm) -> Iterator[tuple[str, str]]:
    """(what the source has, what the target holds)."""
    roles = scheme.operands.keys()
    for role in roles - form.names.keys():
        yield f"scales of {role!r}", f"scales of {', '.join(r for r in form.names if len(r) == 1)}"
    if missing := {"k", "v"} - roles:
        yield f"no scales of {', '.join(sorted(missing))}", "scales of keys and values both"
    for spec in scheme.operands.values():
        if spec.element.name not in form.elements:
            yield f"{spec.element.name} codes", f"{' or '.join(form.elements)} codes"
        if spec.scales[0].grain != form.grain:
            yield _GRAINS[spec.scales[0].grain == TENSOR], _GRAINS[form.grain == TENSOR]
    for tensor in scheme.tensors:
        if tensor.what == "zero" and tensor.dtype not in form.zeros:
            yield f"zero points of {tensor.dtype}", f"{' or '.join(form.zeros) or 'no'} zero points"


def _scheme(layer: LayerDesc, scheme: CacheScheme, form: CacheForm, plugin: str) -> CacheScheme:
    tensors = tuple(
        replace(
            t,
            stored=f"{layer.stored}.{form.names[t.role + '_zero' * (t.what == 'zero')]}",
            shape=form.shape if form.grain == TENSOR else t.shape,
        )
        for t in scheme.tensors
    )
    return replace(
        scheme,
        tensors=tensors,
        site=scheme.site if scheme.site in form.sites else form.sites[0],
        projections={r: n for r, n in form.projections.items() if r in scheme.operands},
        default=form.default,
        plugin=plugin,
    )


def fit_cache(
    registry: Registry, format: str, layer: LayerDesc, scheme: CacheScheme, allow_inexact: bool
) -> tuple[CacheScheme | None, tuple[str, ...]]:
    """How the target stores the scales of one attention module; None: it does not.

    Args:
        layer: in the model's own names.

    Returns:
        The target's scheme, and what is lost.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for a loss that is not allowed.
    """
    form: CacheForm | None = registry.call_one(format, "cache_form")
    losses = Losses(layer.name, allow_inexact)
    gone = "keys and values are no longer quantized"
    if form is None:
        losses.lose(cache_label(scheme), f"no scales of keys and values in {format!r}", gone)
        return None, losses.taken()
    misfits = list(dict.fromkeys(_misfits(scheme, form)))
    if misfits:
        have, want = (" and ".join(dict.fromkeys(texts)) for texts in zip(*misfits, strict=True))
        losses.lose(f"keys and values have {have}", f"{want} in {format!r}", gone)
        return None, losses.taken()
    if scheme.site not in form.sites:
        here = _SITES[form.sites[0]]
        losses.lose(
            f"keys are quantized {_SITES[scheme.site]}", f"{here} in {format!r}",
            f"keys quantized {here}",
        )  # fmt: skip
    return _scheme(layer, scheme, form, format), losses.taken()


def check_cache(before: LayerTensors, after: LayerTensors) -> bool:
    """Whether the same numbers mean the same: specs, scales and zero points of all operands."""

    def facts(lt: LayerTensors) -> Mapping[str, Any]:
        return {
            role: (
                op.spec,
                op.scales[0].flatten().tolist(),
                None if op.zeros is None else op.zeros.flatten().tolist(),
            )
            for role, op in lt.operands.items()
        }

    return facts(before) == facts(after)


def cache_warnings(source: Plan, attention: Mapping[str, Member], format: str) -> list[str]:
    """What changes for the user although every scale is carried over."""
    pairs = [(source.attention[n].scheme, m.scheme) for n, m in attention.items()]
    turns = {
        b.default
        for a, b in pairs
        if isinstance(a, CacheScheme) and isinstance(b, CacheScheme) and a.default != b.default
    }
    said = {
        True: "quantized as soon as the result is loaded; in the source they were on demand "
        "(kv_cache='float' leaves them)",
        False: "quantized on demand in the result (kv_cache='checkpoint'); in the source they "
        "were as soon as it was loaded",
    }
    where = f"{source.checkpoint.path}: as files of {format!r} are read, keys and values are"
    return [f"{where} {said[turn]}" for turn in sorted(turns)]
