"""The first pass: how the target holds each matrix, checked before a byte is written.

Every matrix is fitted, serialized by the target's scheme, read back through it, and compared with
the source. What cannot be held is collected and refused in one report; what is inexact is named
and measured. The result is a ``Target``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quant_core.answers import ask_scheme
from quant_core.convert.cache import cache_label, check_cache, fit_cache
from quant_core.convert.fit import Fit, cannot_hold
from quant_core.convert.measure import Distance, distance
from quant_core.convert.stacks import whole_shape
from quant_core.convert.target import Outline, Target, fit_matrix, target_layer
from quant_core.errors import LayoutError, PluginError
from quant_core.kv_cache import CacheScheme
from quant_core.ledger import Ledger
from quant_core.load import read_matrix
from quant_core.plan import Member, Plan, param_sources
from quant_core.scheme import Scheme
from quant_core.spec import TensorInfo, Unquantized

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["LayerReport", "Survey", "survey"]

_ROUNDS = 4  # one, and one for each time the target may settle its options
_SHOWN = 10
_FLOATS = ("bfloat16", "float16", "float32")


@dataclass(slots=True, kw_only=True)
class LayerReport:
    """What became of one quantized member.

    Attributes:
        before, after: labels of the source's and the target's weights.
        losses: what is not kept; () = exact.
        error: relative error of the weights, ||a - b|| / ||a||.
    """

    name: str
    before: str
    after: str
    losses: tuple[str, ...] = ()
    error: float = 0.0


@dataclass(slots=True)
class Survey:
    """Everything that is known after the first pass."""

    target: Target
    layers: list[LayerReport] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Pass:
    """One walk over all matrices under fixed options."""

    source: Plan
    format: str
    options: Mapping[str, Any]
    allow_inexact: bool
    unfit_as_float: bool
    step: Callable[[str], None]
    refused: list[LayoutError] = field(default_factory=list)
    schemes: dict[str, tuple[Scheme, ...]] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(default_factory=dict)
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)  # parameter -> torch dtype name
    caches: dict[str, Member] = field(default_factory=dict)  # attention module -> member
    hints: dict[str, int] = field(default_factory=dict)  # how to lose less -> modules

    def run(self) -> None:
        for name, member in self.source.quantized.items():
            try:
                self._member(name, member)
            except LayoutError as err:
                if err.code != "Q-LAYOUT-REPRESENT":
                    raise
                self.refused.append(err)
            self.step(name)
        for name, member in self.source.attention.items():
            try:
                self._cache(name, member)
            except LayoutError as err:
                if err.code != "Q-LAYOUT-REPRESENT":
                    raise
                self.refused.append(err)

    def _cache(self, name: str, member: Member) -> None:
        """The scales of keys and values of one attention module."""
        assert isinstance(member.scheme, CacheScheme)
        layer, label = target_layer(member.layer), cache_label(member.scheme)
        registry = self.source.registry
        scheme, losses = fit_cache(registry, self.format, layer, member.scheme, self.allow_inexact)
        after = label if scheme else "float"
        self.reports[name] = LayerReport(name=name, before=label, after=after, losses=losses)
        if scheme is None:
            return
        tensors = read_matrix(self.source, member)
        stored = scheme.serialize(layer, tensors)
        if not check_cache(tensors, scheme.canonicalize(layer, stored)):
            raise PluginError(
                f"plugin {self.format!r}: the scales of keys and values of {name!r} read back "
                "differently from its cache_form, expected the same. This is a bug of the plugin; "
                "report it there.",
                code="Q-PLUGIN-RESULT",
                plugin=self.format,
                tensor=name,
            )
        for t in scheme.tensors:
            self._add(t.stored, t.dtype, t.shape)
        self.caches[name] = Member(layer=layer, scheme=scheme, params=tuple(scheme.params(layer)))

    def _member(self, name: str, member: Member) -> None:
        assert isinstance(member.scheme, Scheme)
        report = LayerReport(name=name, before=member.scheme.weight.label, after="")
        total, found, hints = Distance(), [], set()
        for expert in member.layer.experts or (None,):
            tensors, fit = self._fit(member, expert)
            report.losses = tuple(dict.fromkeys((*report.losses, *fit.losses)))
            hints |= {fit.hint} - {""}
            if fit.scheme is None:
                self._float(report, member, tensors)
                continue
            found.append(fit.scheme)
            self._check(member, expert, tensors, fit, total)
        if found:
            self.schemes[name] = tuple(found)
            report.after, report.error = found[0].weight.label, total.relative
        self.reports[name] = report
        for hint in hints:
            self.hints[hint] = self.hints.get(hint, 0) + 1

    def _fit(self, member: Member, expert: int | None) -> tuple[LayerTensors, Fit]:
        tensors = read_matrix(self.source, member, expert)
        try:
            return tensors, fit_matrix(
                self.source, self.format, member, tensors, self.options, self.allow_inexact
            )
        except LayoutError as err:
            if not self.unfit_as_float or err.code != "Q-LAYOUT-REPRESENT":
                raise
            return tensors, Fit(scheme=None, tensors=tensors)

    def _float(self, report: LayerReport, member: Member, tensors: LayerTensors) -> None:
        """The weight as floats of the narrowest type that holds all of them."""
        if member.layer.experts:
            raise cannot_hold(
                member.layer.name,
                "is a stack of experts that the target would write as floats",
                "a scheme for every expert",
                "Choose another target format.",
            )
        dtype = _narrowest(tensors, member)
        for leaf, shape in (("weight", _shape(member)), ("bias", _shape(member)[:1])):
            if leaf == "bias":
                if tensors.bias is None:
                    continue
                dtype = str(tensors.bias.dtype).removeprefix("torch.")
            self.floats[f"{report.name}.{leaf}"] = dtype
            self._add(f"{report.name}.{leaf}", dtype, shape)
        report.after = f"float {self.floats[f'{report.name}.weight']}"

    def _check(
        self, member: Member, expert: int | None, lt: LayerTensors, fit: Fit, total: Distance
    ) -> None:
        """Serialize, read back, compare."""
        scheme, layer = fit.scheme, target_layer(member.layer)
        assert scheme is not None
        stored = ask_scheme(scheme, "serialize", layer, fit.tensors)
        one = layer if expert is None else replace(layer, experts=())
        back = ask_scheme(scheme, "canonicalize", one, stored)
        before = total.squared
        distance(lt.weight, back.weight, scheme.shape[1], total)
        differ = [
            what
            for what, same in (
                ("weights", total.squared == before or fit.losses),
                ("bias", _equal(lt.bias, back.bias)),
                ("activations", _same_input(member, lt, scheme, back) or fit.losses),
            )
            if not same
        ]
        if differ:
            raise PluginError(
                f"plugin {self.format!r}: fit_scheme named no loss for {layer.name!r}, but "
                f"{' and '.join(differ)} read back from what it writes differ. "
                "This is a bug of the plugin; report it there.",
                code="Q-PLUGIN-RESULT",
                plugin=self.format,
                tensor=layer.name,
            )
        for param in ask_scheme(scheme, "params", layer):
            if param.name in stored:
                value = stored[param.name]
                for name, index in param_sources(layer, param, expert):
                    shape = tuple(value.shape)
                    if index:
                        known = self.infos[name].shape if name in self.infos else ()
                        shape = whole_shape(index, shape, known)
                    self._add(name, str(value.dtype).removeprefix("torch."), shape)

    def _add(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.infos[name] = TensorInfo(
            name=name, dtype=dtype, shape=shape, file="", offset=0, nbytes=0
        )

    def members(self) -> dict[str, Member]:
        """The source's members with the target's schemes."""
        out = {}
        for name, member in self.source.members.items():
            layer = target_layer(member.layer)
            if name in self.schemes:
                scheme = self.schemes[name][0]
                params = tuple(scheme.params(layer))
                out[name] = Member(layer=layer, scheme=scheme, params=params)
                continue
            stored = tuple(n for n in self.infos if n.rpartition(".")[0] == name)
            why = Unquantized(rule="written as floats")
            out[name] = Member(
                layer=layer,
                scheme=member.scheme if isinstance(member.scheme, Unquantized) else why,
                stored=stored,
            )
        return out


def _same_input(member: Member, lt: LayerTensors, scheme: Scheme, back: LayerTensors) -> bool:
    """Activations are quantized alike, by stored scales and zeros of the same values."""
    from quant_core.convert.steps import same_input

    assert isinstance(member.scheme, Scheme)
    if not same_input(member.scheme.operands.get("input"), scheme.operands.get("input")):
        return False
    pairs = ((lt.input_scale, back.input_scale), (lt.input_zero, back.input_zero))
    return all(_equal(a, b) for a, b in pairs)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Both absent, or equal as float32."""
    if a is None or b is None:
        return a is b
    return bool((a.float() == b.float()).all())


def _shape(member: Member) -> tuple[int, int]:
    assert isinstance(member.scheme, Scheme)
    return member.scheme.shape


def _narrowest(lt: LayerTensors, member: Member) -> str:
    import torch

    from quant_core.convert.steps import row_blocks
    from quant_core.dequantize import dense_weight
    from quant_core.rewrites.cut import slice_rows_of

    n, k = _shape(member)
    fits = dict.fromkeys(_FLOATS, True)
    for start, stop in row_blocks(n, k):
        block: Tensor = dense_weight(slice_rows_of(lt.weight, start, stop), k)
        for dtype in _FLOATS[:2]:
            same = torch.equal(block.to(getattr(torch, dtype)).float(), block)
            fits[dtype] = fits[dtype] and same
    return next(d for d in _FLOATS if fits[d])


def _refusal(source: Plan, format: str, refused: list[LayoutError], allowed: bool) -> LayoutError:
    shown = "".join(f"\n  {err}" for err in refused[:_SHOWN])
    more = f"\n  and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    word = "" if allowed else " exactly"
    return LayoutError(
        f"{source.checkpoint.path}: {len(refused)} of "
        f"{len(source.quantized) + len(source.attention)} quantized modules "
        f"cannot be held by {format!r}{word}, expected all of them to fit:{shown}{more}",
        code="Q-LAYOUT-REPRESENT",
        path=source.checkpoint.path,
        tensor=refused[0].tensor,
        expected=format,
        actual=tuple(err.tensor for err in refused),
        plugin=format,
    )


def _alike(schemes: Mapping[str, tuple[Scheme, ...]], format: str) -> list[LayoutError]:
    return [
        cannot_hold(
            name,
            f"its {len(found)} matrices need {len(_unlike(found))} schemes of {format!r}",
            "one scheme for a stack",
            "Allow inexact conversion, or choose another target format.",
        )
        for name, found in schemes.items()
        if len(_unlike(found)) > 1
    ]


def _unlike(schemes: tuple[Scheme, ...]) -> list[Scheme]:
    out: list[Scheme] = []
    for scheme in schemes:
        if scheme not in out:
            out.append(scheme)
    return out


def survey(
    source: Plan,
    format: str,
    *,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    allow_inexact: bool = False,
    unfit_as_float: bool = False,
    step: Callable[[str], None] = lambda name: None,
) -> Survey:
    """Fit and check every matrix of ``source``.

    Args:
        config: the model's config, without a quantization block.
        options: for the target's plugin.
        unfit_as_float: write modules that the target cannot hold as floats.
        step: called with each member's name once it is done.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``: all matrices that the target cannot hold.
        PluginError: ``Q-PLUGIN-RESULT``: the target's plugin contradicts itself.
    """
    for _ in range(_ROUNDS):
        walk = _Pass(source, format, options, allow_inexact, unfit_as_float, step)
        walk.run()
        if walk.refused:
            raise _refusal(source, format, walk.refused, allow_inexact)
        settled = source.registry.call_one(
            format, "settle_options", schemes=walk.schemes, options=options
        )
        if settled is None or dict(settled) == dict(options):
            break
        options = dict(settled)
    if unlike := _alike(walk.schemes, format):
        raise _refusal(source, format, unlike, allow_inexact)
    for name, (dtype, shape) in _dense(source):
        walk._add(name, dtype, shape)
    outline = Outline(source.checkpoint.path, walk.infos, config)
    plan = Plan(
        checkpoint=outline,
        match=None,
        registry=source.registry,
        members=walk.members(),
        dense={name: name for name in (*source.dense, *walk.floats)},
        ledger=Ledger(outline),
        attention=walk.caches,
    )
    target = Target(
        format=format,
        plan=plan,
        source=source,
        config=config,
        options=options,
        allow_inexact=allow_inexact,
        float_dtypes=walk.floats,
    )
    hints = [f"{count} modules lose more than they must. {h}" for h, count in walk.hints.items()]
    return Survey(target, list(walk.reports.values()), hints)


def _dense(source: Plan) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """(public name, (dtype, shape)) of the float parameters, from the header."""
    for public, stored in source.dense.items():
        info = source.checkpoint.tensors[stored]
        yield public, (info.dtype, info.shape)
