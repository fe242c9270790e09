"""What serving engines share: options, the plan, names of layers, and what was taken of it.

An engine builds its own modules and asks, layer by layer, how each is computed. The answer comes
from the plan of the checkpoint's header:

    engine's name --Names--> members of the plan --Piece (rank's Span)--> engines.packed

and when the engine is done, ``Account`` says whether every quantized member found a layer. Nothing
here knows an engine. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable, summarize
from quant_core.ledger import missing_error, unexpected_error
from quant_core.online import OnlineRequest
from quant_core.online_plan import quantize_plan
from quant_core.plan import Member, Plan, member_parts
from quant_core.plan import plan as make_plan
from quant_core.scheme import Scheme
from quant_core.spec import Span

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "METHOD",
    "Account",
    "Names",
    "Options",
    "Piece",
    "open_plan",
    "read_bias",
    "roles_of",
    "stored_bias",
]

log = logging.getLogger("quant_core")

METHOD = "quant_core"
"""Name of the quantization method, load format and config format in every engine."""

Rename = Callable[[str], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may ask for, as plain data that crosses process borders.

    Attributes:
        path: the checkpoint, if it is not where the engine found the model.
        format, strict, kernels: as in ``load_model``.
        online, skip, online_options, requantize: as in ``load_model``.
    """

    path: str | None = None
    format: str | None = None
    strict: bool = False
    kernels: tuple[str, ...] | None = None
    online: str | None = None
    skip: tuple[str, ...] = ()
    online_options: Mapping[str, Any] = field(default_factory=dict)
    requantize: bool = False

    @staticmethod
    def parse(block: Mapping[str, Any]) -> Options:
        """Options from a ``quantization_config`` whose ``quant_method`` is ours.

        Raises:
            ConfigError: ``Q-CFG-KEY`` for an unknown key, ``Q-CFG-TYPE`` for a wrong type,
                ``Q-CFG-CONFLICT`` for settings of online quantization without ``online``.
        """
        given = {k: v for k, v in block.items() if k != "quant_method"}
        known = {f.name for f in fields(Options)}
        if unknown := sorted(set(given) - known):
            raise ConfigError(
                f"quantization_config: {summarize(unknown)} is no setting of {METHOD!r}, expected "
                f"some of {summarize(sorted(known))}. Remove it.",
                code="Q-CFG-KEY",
                tensor=unknown[0],
                expected=sorted(known),
                actual=unknown,
            )
        for name in ("kernels", "skip"):
            value = given.get(name)
            if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
                raise ConfigError(
                    f"quantization_config: {name} is {printable(repr(value))}, expected a list of "
                    f'texts. Write "{name}": [...].',
                    code="Q-CFG-TYPE",
                    tensor=name,
                    actual=value,
                )
            if value is not None:
                given[name] = tuple(value)
        out = Options(**given)
        if out.online is None and (out.skip or out.online_options or out.requantize):
            raise ConfigError(
                "quantization_config: skip, online_options or requantize given without online, "
                "expected both or neither. Say what to quantize to.",
                code="Q-CFG-CONFLICT",
                tensor="online",
            )
        return out


def open_plan(path: str, options: Options) -> Plan:
    """Plan the checkpoint at ``path``, or at ``options.path``; reads no tensor.

    Raises:
        CheckpointError: among others ``Q-STRICT`` for warnings with ``strict``.
        ConfigError, FormatError, LayoutError, PluginError: as ``quant_core.plan``.
    """
    plan = make_plan(open_checkpoint(options.path or path), format=options.format)
    if options.online is not None:
        request = OnlineRequest(
            name=options.online,
            skip=options.skip,
            options=options.online_options,
            requantize=options.requantize,
        )
        plan = quantize_plan(plan, request, lambda member: "").plan
    for warning in plan.warnings:
        log.warning("%s", warning)
    if plan.warnings and options.strict:
        raise CheckpointError(
            f"{plan.checkpoint.path}: {len(plan.warnings)} warning(s): "
            f"{summarize(plan.warnings, 3)}; expected none with strict. "
            "Correct the checkpoint, or load without strict.",
            code="Q-STRICT",
            path=plan.checkpoint.path,
            actual=tuple(plan.warnings),
        )
    return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rank's part of one member. Of a stack of experts: of each of its matrices."""

    member: Member
    out: Span
    inp: Span

    @staticmethod
    def whole(member: Member, shape: tuple[int, int] | None = None) -> Piece:
        """All of a member.

        Args:
            shape: of one that is stored as floats, [out, in]; a quantized one knows its own.

        Raises:
            LayoutError: ``Q-LAYOUT-SHAPE`` for a float member without a shape.
        """
        if isinstance(member.scheme, Scheme):
            shape = member.scheme.shape
        if shape is None:
            raise LayoutError(
                f"{member.layer.name}: is stored as floats and says no shape, expected one. Pass "
                "the sizes of the engine's layer.",
                code="Q-LAYOUT-SHAPE",
                tensor=member.layer.name,
            )
        return Piece(member=member, out=Span.whole(shape[0]), inp=Span.whole(shape[1]))


class Names:
    """Members of a plan by the names of an engine's modules.

    Args:
        rename: name of a parameter in the checkpoint's own naming -> in the engine's; None if the
            engine leaves it out. Members of one fused module keep their own last names.
    """

    def __init__(self, plan: Plan, rename: Rename | None = None) -> None:
        self.plan = plan
        self.members: dict[str, Member] = {}
        for name, member in plan.members.items():
            new = name if rename is None else rename(f"{name}.weight")
            if new is not None:
                self.members[new.removesuffix(".weight")] = member

    def of(self, module: str, fused: Mapping[str, Sequence[str]]) -> list[Member]:
        """The members of a module in output order; [] if the checkpoint has none of that name.

        Args:
            fused: last name of a fused module -> last names of its members, in order.

        Raises:
            CheckpointError: ``Q-TENSOR-MISSING`` if only some members of a fused module exist.
        """
        if module in self.members:
            return [self.members[module]]
        parent, _, last = module.rpartition(".")
        names = [f"{parent}.{m}" if parent else m for m in fused.get(last, ())]
        found = [self.members[n] for n in names if n in self.members]
        if found and len(found) != len(names):
            lacking = [f"{n}.*" for n in names if n not in self.members]
            raise missing_error(self.plan.checkpoint, lacking, f"{module}, which fuses them")
        return found

    def below(self, module: str) -> dict[str, Member]:
        """Last name -> stack of experts, of those that lie directly below ``module``."""
        start = f"{module}."
        return {
            n.removeprefix(start): m
            for n, m in self.members.items()
            if n.startswith(start) and "." not in n.removeprefix(start) and m.layer.experts
        }

    def attention(self, module: str) -> Member | None:
        """The quantized cache of an attention module, or of the module around it."""
        found = self.plan.attention
        return found.get(module) or found.get(module.rpartition(".")[0])


def roles_of(
    plan: Plan, module: str, stacks: Mapping[str, Member], names: Mapping[str, str]
) -> dict[str, Member]:
    """ "gate", "up", "down" -> its stack, of the experts of one module.

    Args:
        stacks: last name -> stack, as ``Names.below``.
        names: last name in the checkpoint -> role, as the engine's model has it. A role that the
            format itself gives its member counts first.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING`` if a role has no stack, ``Q-CKPT-MISMATCH`` if some
            are quantized and others are not.
    """
    roles = {m.layer.role or names.get(last, last): m for last, m in stacks.items()}
    if lacking := sorted({"gate", "up", "down"} - set(roles)):
        raise missing_error(plan.checkpoint, [f"{module}.*.{r}" for r in lacking], module)
    if len({m.quantized for m in roles.values()}) != 1:
        kinds = {role: "quantized" if m.quantized else "float" for role, m in roles.items()}
        raise CheckpointError(
            f"{plan.checkpoint.path}: experts {printable(module)!r} are {kinds}, expected all of "
            "them alike. Quantize all experts, or none.",
            code="Q-CKPT-MISMATCH",
            path=plan.checkpoint.path,
            tensor=module,
            actual=kinds,
        )
    return roles


def stored_bias(plan: Plan, member: Member) -> str | None:
    """Stored name of a quantized member's bias; None if it has none. Not for experts."""
    for param, name, _, _ in member_parts(member):
        if param.name == "bias" and name in plan.checkpoint.tensors:
            return name
    return None


def read_bias(plan: Plan, member: Member) -> Tensor | None:
    """The bias that an engine keeps as its own parameter; None if none is stored."""
    from quant_core.engines.packed import neutral

    name = stored_bias(plan, member)
    if name is None:
        return None
    with neutral():
        value = plan.checkpoint.read_parameter(name)
    plan.ledger.load((name, ()))
    return value


@dataclass(slots=True)
class Account:
    """Which members an engine took, and for which of its modules."""

    plan: Plan
    taken: dict[str, str] = field(default_factory=dict)  # member -> engine's module

    def take(self, module: str, members: Iterable[Member]) -> None:
        for member in members:
            self.taken[member.layer.name] = module

    def check(self, allowed: Callable[[str], str] = lambda name: "") -> None:
        """After the engine has built its model: every quantized member has a layer.

        Args:
            allowed: name of a member -> the rule by which it has none here (another pipeline
                stage, a draft layer), or "".

        Raises:
            CheckpointError: ``Q-TENSOR-UNEXPECTED`` naming the tensors of the others.
        """
        rules: dict[str, list[str]] = {}
        extra: list[str] = []
        for member in self._left():
            names = [n for n in _stored(self.plan, member) if n in self.plan.checkpoint.tensors]
            rule = allowed(member.layer.name)
            if not rule:
                extra += names
                continue
            rules.setdefault(rule, []).append(member.layer.name)
            for name in names:
                self.plan.ledger.skip(name, rule)
        if extra:
            raise unexpected_error(
                self.plan.checkpoint, extra, "only what the engine's model has layers for"
            )
        for rule, names in rules.items():
            log.info("%d member(s) not loaded (%s): %s", len(names), rule, summarize(names, 3))

    def _left(self) -> Iterator[Member]:
        for member in self.plan.members.values():
            if member.quantized and member.layer.name not in self.taken:
                yield member


def _stored(plan: Plan, member: Member) -> Iterator[str]:
    yield from dict.fromkeys(name for _, name, _, _ in member_parts(member))
