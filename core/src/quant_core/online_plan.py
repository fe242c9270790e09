"""A float checkpoint's plan made one of quantized members, for loading and for saving.

    plan of floats --quantize_plan--> plan of OnLoad members   (loader, kernels: as ever)
                                  +-> target: the same members in the owning plugin's format

``OnLoad`` is a scheme like any other: its stored tensors are the float weight and bias, and its
canonical form is what the wanted scheme's ``quantize`` makes of them. So one matrix at a time is
read, rounded and bound, and nothing downstream knows that it was not stored so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quant_core.answers import ask_offer, ask_scheme
from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import FLOAT_DTYPES
from quant_core.errors import ConfigError, LayoutError, summarize
from quant_core.online import OnlineRequest, OnlineScheme, SkipRules, find_online, settled_options
from quant_core.online_stacks import StackLayout, StackPart, stack_parts
from quant_core.plan import Member, Plan, member_parts
from quant_core.scheme import Scheme
from quant_core.spec import Axis, LayerDesc, ParamSpec, Span, Unquantized

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["NOT_IN_MODEL", "OnLoad", "OnlinePlan", "quantize_plan"]

Replaceable = Callable[[Member], str]
"""Why an engine cannot put a packed layer in a member's place; "" if it can."""

NOT_IN_MODEL = "not part of the model"

_FLOATS = tuple(sorted(FLOAT_DTYPES))


@dataclass(frozen=True, kw_only=True)
class OnLoad(Scheme):
    """Float tensors in, ``wanted`` out.

    Attributes:
        wanted: the scheme of the result.
        source: how the weight is stored now, None for floats.
        stack: the part of stacked experts that is read, None for a weight of its own.
    """

    wanted: Scheme
    source: Scheme | None = None
    stack: StackPart | None = None

    @staticmethod
    def of(wanted: Scheme, source: Scheme | None, stack: StackPart | None = None) -> OnLoad:
        return OnLoad(
            name=wanted.name,
            shape=wanted.shape,
            operands=wanted.operands,
            transforms=wanted.transforms,
            wanted=wanted,
            source=source,
            stack=stack,
        )

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        if self.source is not None:
            return self.source.params(layer)
        if self.stack is not None:
            return self.stack.params()
        out, inp = Axis(tag="out"), Axis(tag="in")
        weight = ParamSpec(name="weight", shape=self.shape, dtypes=_FLOATS, axes=(out, inp))
        if not layer.bias:
            return (weight,)
        shape = self.shape[:1]
        bias = ParamSpec(name="bias", shape=shape, dtypes=_FLOATS, axes=(out,), role="bias")
        return (weight, bias)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        """Round one matrix.

        Raises:
            LayoutError: ``Q-VALUE-WEIGHT`` for NaN or infinity, ``Q-LAYOUT-SHAPE`` for experts of
                unlike sizes, ``Q-LAYOUT-REPRESENT`` for a source with more than weight and bias.
        """
        from quant_core.quantize import check_finite

        dense, bias = self._dense(layer, tensors)
        where = f"{layer.stored}.weight"
        if tuple(dense.shape) != self.shape:
            raise LayoutError(
                f"{where}: has shape {tuple(dense.shape)}, expected {self.shape} like the other "
                "experts. The checkpoint is damaged.",
                code="Q-LAYOUT-SHAPE",
                tensor=where,
                expected=self.shape,
                actual=tuple(dense.shape),
            )
        check_finite(where, dense)
        return replace(ask_scheme(self.wanted, "quantize", layer, dense, None), bias=bias)

    def _dense(
        self, layer: LayerDesc, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if self.source is None:
            weight = tensors["weight"]
            turned = self.stack is not None and self.stack.transposed
            return (weight.T.contiguous() if turned else weight), tensors.get("bias")
        from quant_core.dequantize import dense_weight

        lt = self.source.canonicalize(layer, tensors)
        extras = [n for n in ("acc_bias", "out_scale") if getattr(lt, n) is not None]
        extras += ["transforms"] if lt.transforms else []
        if extras:
            raise LayoutError(
                f"{layer.stored}: holds {', '.join(extras)}, expected a weight and a bias alone to "
                "quantize again. Start from the float checkpoint, or skip this layer.",
                code="Q-LAYOUT-REPRESENT",
                tensor=layer.stored,
                actual=extras,
            )
        return dense_weight(lt.weight, self.shape[1]), lt.bias


@dataclass(slots=True, kw_only=True)
class OnlinePlan:
    """What is loaded, and what would be saved.

    Attributes:
        plugin: id of the plugin that owns the result's format.
        plan: members to load; quantized ones are ``OnLoad``.
        target: the same members as the plugin's format stores them.
        config: its config block; None if the plugin writes none.
        kept: rule -> modules with a matrix that stay as they are.
    """

    plugin: str
    plan: Plan
    target: Mapping[str, Member]
    config: Mapping[str, Any] | None
    kept: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def foreign(self) -> list[str]:
        """Quantized members that keep the source's format."""
        plain = (n for n, m in self.plan.members.items() if not isinstance(m.scheme, OnLoad))
        return [n for n in plain if self.plan.members[n].quantized]


def quantize_plan(
    plan: Plan,
    request: OnlineRequest,
    replaceable: Replaceable,
    stacks: Mapping[str, StackLayout] | None = None,
) -> OnlinePlan:
    """Decide what of ``plan`` is quantized while it is loaded; reads no tensor.

    Args:
        plan: of a float checkpoint; its ledger goes on counting for the result.
        replaceable: of the engine.
        stacks: experts that are stored as stacks and can be replaced: public module name -> how
            they lie.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT`` for a quantized source without ``requantize``,
            ``Q-CFG-VALUE`` for an unknown name or option, or if no layer can be quantized.
        PluginError: ``Q-PLUGIN-CONFLICT``, ``Q-PLUGIN-RESULT``.
    """
    plugin, scheme = find_online(plan.registry, request.name)
    options = settled_options(request.name, scheme, request.options)
    _check_source(plan, request)
    skip = SkipRules(request.skip)
    found: dict[str, OnLoad] = {}
    kept: dict[str, str] = {}
    parts = stack_parts(plan, stacks or {})
    for name, member in plan.members.items():
        if name in parts:
            made = [_part(plugin, scheme, options, skip, p) for p in parts[name]]
            rule = next((m for m in made if isinstance(m, str)), "")
            if rule:
                kept[name] = rule
            found |= {p.layer.name: m for p, m in zip(parts[name], made)
                      if isinstance(m, OnLoad) and not rule}  # fmt: skip
            continue
        answer = _decide(plan, member, plugin, scheme, options, skip, replaceable)
        if isinstance(answer, OnLoad):
            found[name] = answer
        elif answer:
            kept[name] = answer
    _whole_experts(plan, found, kept)
    rules: dict[str, list[str]] = {}
    for name, rule in kept.items():
        rules.setdefault(rule, []).append(name)
    if not found:
        reasons = "; ".join(f"{rule}: {summarize(names, 2)}" for rule, names in rules.items())
        raise ConfigError(
            f"{plan.checkpoint.path}: online={request.name!r} quantizes no layer "
            f"({reasons or 'there is no linear layer'}), expected at least one. "
            "Choose another scheme, other options, or fewer patterns in skip.",
            code="Q-CFG-VALUE",
            path=plan.checkpoint.path,
            tensor="online",
            actual=request.name,
        )
    return _result(plan, plugin, found, rules, skip.unused)


def _check_source(plan: Plan, request: OnlineRequest) -> None:
    quantized = list(plan.quantized)
    if quantized and not request.requantize:
        owner = plan.match.plugin if plan.match is not None else "unknown"
        raise ConfigError(
            f"{plan.checkpoint.path}: is quantized already ({owner}, {len(quantized)} layers: "
            f"{summarize(quantized, 2)}), expected floats for online={request.name!r}. Load it as "
            "it is, start from the float checkpoint, or pass requantize=True to round its "
            "dequantized weights again.",
            code="Q-CFG-CONFLICT",
            path=plan.checkpoint.path,
            tensor=quantized[0],
            expected="floats",
            actual=owner,
        )


def _decide(
    plan: Plan,
    member: Member,
    plugin: str,
    scheme: OnlineScheme,
    options: Mapping[str, Any],
    skip: SkipRules,
    replaceable: Replaceable,
) -> OnLoad | str:
    """How a member is quantized, or why not; "" for what holds no matrix."""
    layer = _matrix(plan.checkpoint, member)
    if layer is None:
        return ""
    skipped = skip(layer.name)
    if layer.kind == "embedding":
        return "embedding"
    if skipped:
        return f"skip: {skipped}"
    leaves = {n.rpartition(".")[2] for n in member.stored}
    if not member.quantized and (leaves - {"weight", "bias"} or "weight" not in leaves):
        return f"stored as {summarize(sorted(leaves))}, not as one weight a matrix"
    if not member.quantized and plan.checkpoint.container != "safetensors":
        return f"floats in a {plan.checkpoint.container} container"
    if why := replaceable(member):
        return why
    wanted = _wanted(plugin, scheme, options, layer)
    if isinstance(wanted, str):
        return wanted
    return OnLoad.of(wanted, member.scheme if isinstance(member.scheme, Scheme) else None)


def _part(
    plugin: str,
    scheme: OnlineScheme,
    options: Mapping[str, Any],
    skip: SkipRules,
    part: StackPart,
) -> OnLoad | str:
    """How one role of stacked experts is quantized, or why not."""
    if skipped := skip(part.layer.name):
        return f"skip: {skipped}"
    wanted = _wanted(plugin, scheme, options, part.layer)
    return wanted if isinstance(wanted, str) else OnLoad.of(wanted, None, part)


def _wanted(
    plugin: str, scheme: OnlineScheme, options: Mapping[str, Any], layer: LayerDesc
) -> Scheme | str:
    """The scheme of one layer, or the rule by which there is none."""
    wanted: Scheme | Unquantized = ask_offer(plugin, scheme, layer, options)
    return wanted.rule if isinstance(wanted, Unquantized) else wanted


def _matrix(checkpoint: Checkpoint, member: Member) -> LayerDesc | None:
    """The member's description with its sizes and dtype; None if it holds no matrix."""
    layer = member.layer
    if isinstance(member.scheme, Scheme):
        bias = any(p.name == "bias" and n in checkpoint.tensors for p, n, _, _ in
                   member_parts(member))  # fmt: skip
        return replace(layer, bias=bias, dtype="bfloat16")
    infos = [checkpoint.tensors[n] for n in member.stored]
    weight = next((i for i in infos if len(i.shape) in (2, 3) and i.dtype in FLOAT_DTYPES), None)
    if weight is None:
        return None
    bias = any(i.name.endswith(".bias") for i in infos)
    n, k = weight.shape[-2:]
    return replace(layer, inp=Span.whole(k), out=Span.whole(n), bias=bias, dtype=weight.dtype)


def _whole_experts(plan: Plan, found: dict[str, OnLoad], kept: dict[str, str]) -> None:
    """Experts are quantized with all their matrices or not at all."""
    stacks: dict[str, list[str]] = {}
    for name in (*found, *kept):
        member = plan.members.get(name)  # parts of a stack were decided together
        if member is not None and member.layer.experts:
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
    for names in stacks.values():
        plain = [n for n in names if n in kept]
        for name in names if plain else ():
            if name in found:
                del found[name]
                kept[name] = f"{kept[plain[0]]} ({plain[0]}, of the same experts)"


def _by_name(layer: LayerDesc) -> LayerDesc:
    """A member as the result stores it: in the model's own names, experts one by one."""
    before, _, after = layer.name.rpartition("experts.")
    stored = f"{before}experts.{{expert}}.{after}" if layer.experts else layer.name
    return replace(layer, stored=stored)


def _result(
    plan: Plan, plugin: str, found: Mapping[str, OnLoad], rules: Mapping[str, list[str]],
    unused: Iterable[str],
) -> OnlinePlan:  # fmt: skip
    members, target = dict(plan.members), dict(plan.members)
    claimed: set[str] = set()
    for name, scheme in found.items():
        if scheme.stack is not None:
            layer, stored = scheme.stack.layer, scheme.stack.stored
            for whole in (members, target):
                whole.pop(name.rpartition(".")[0], None)
            params = tuple(scheme.params(layer))
        else:
            old = plan.members[name]
            matrix, stored = _matrix(plan.checkpoint, old), old.stored
            assert matrix is not None
            layer = matrix
            params = old.params if old.quantized else tuple(scheme.params(layer))
        members[name] = Member(layer=layer, scheme=scheme, params=params)
        written = _by_name(layer)
        target[name] = Member(
            layer=written, scheme=scheme.wanted, params=tuple(scheme.wanted.params(written))
        )
        claimed |= set(stored)
    _divide(plan, members, found)
    dense = {public: stored for public, stored in plan.dense.items() if stored not in claimed}
    warnings = [*plan.warnings]
    meant = ("embedding", NOT_IN_MODEL)
    refused = {r: n for r, n in rules.items() if r not in meant and not r.startswith("skip: ")}
    warnings += [f"{len(n)} matrices stay floats ({r}): {summarize(n)}" for r, n in refused.items()]
    if unused := list(unused):
        warnings.append(f"{len(unused)} pattern(s) of skip match no layer: {summarize(unused)}")
    result = replace(plan, members=members, dense=dense, warnings=warnings)
    made = replace(result, match=None, members=target)
    answer = plan.registry.call_one(plugin, "make_config", plan=made)
    return OnlinePlan(
        plugin=plugin,
        plan=result,
        target=target,
        config=None if answer is None else dict(answer),
        kept=rules,
    )


def _divide(plan: Plan, members: Mapping[str, Member], found: Mapping[str, OnLoad]) -> None:
    """Count stacks by their parts: each is read once, and all of them are the tensor."""
    for scheme in found.values():
        for stored in () if scheme.stack is None else scheme.stack.stored:
            plan.ledger.release(stored)
    for name, scheme in found.items():
        if scheme.stack is not None:
            for _, _, _, part in member_parts(members[name]):
                plan.ledger.claim(part, name)
