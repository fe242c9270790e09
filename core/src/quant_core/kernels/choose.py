"""One kernel choice, with a trace: the same decisions are the log line, the table and the error.

Candidates come from the plugins' ``apply`` hook plus core's reference kernel, which always exists.
Those with an equal ``layout`` share their buffers and are bound as one (``kernels.family``); the
number of rows then picks among them on every call. What remains is a choice among storage orders:

    score = sum over M of  weight(M) * cost(M) / least cost of all at M

and the smallest wins, ties to the first name. The weights are those of ``WEIGHTS[prefer]``;
``QUANT_PREFER`` or the ``prefer`` argument says which. ``QUANT_KERNELS`` (or ``kernels``) restricts
the candidates; a restriction that leaves none is an error:

    a,b               only the kernels (or layouts) a and b, for everything
    linear=a          only a for operations of this kind; others stay free
    *.lm_head=a       only a in modules whose name matches the glob
    quantize=a        only a rounds activations for kernels of float ones (``kernels.quantizer``)
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from quant_core.errors import ConfigError, KernelError
from quant_core.kernels.base import ANY_ROWS, Accepted, Kernel, Rejected
from quant_core.kernels.family import Bucket, Family, RestoredReference, layout_of, uncovered
from quant_core.kernels.measured import answer as answer_of
from quant_core.memory import collector_paused
from quant_core.registry import Registry
from quant_core.row_order import in_model_order
from quant_core.spec import CANONICAL, OpSpec

__all__ = [
    "WEIGHTS",
    "Choice",
    "Decision",
    "Memo",
    "accepting",
    "allowed_names",
    "choose",
    "choose_in_place",
]

log = logging.getLogger("quant_core")

WEIGHTS: dict[str, dict[int, float]] = {
    "decode": {1: 8, 2: 1, 4: 1, 8: 2, 16: 2, 32: 1, 64: 1},
    "prefill": {256: 1, 512: 2, 1024: 2, 4096: 2},
    "balanced": {1: 5, 8: 2, 16: 2, 32: 1, 64: 1, 128: 1, 256: 1, 512: 1, 1024: 2, 4096: 2},
}
"""Rows of x -> weight, by what a user prefers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one candidate said."""

    kernel: str
    provider: str
    answer: Accepted | Rejected
    layout: str = ""

    def __str__(self) -> str:
        if isinstance(self.answer, Rejected):
            return f"{self.kernel:<18} rejected: {self.answer}"
        a = self.answer
        cost = f"cost {a.cost:g}"
        if a.costs:
            named = (f"{'more' if m >= ANY_ROWS else f'<={m}'}: {c:g}" for m, c in a.costs)
            cost = f"cost by rows {', '.join(named)}"
        notes = [f"layout {self.layout}"] if self.layout else []
        notes += [a.note] if a.note else []
        told = f" ({'; '.join(notes)})" if notes else ""
        return f"{self.kernel:<18} accepted: {cost}{told}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The winner, the operation as it will run it (its packing), and how it was found.

    ``kernel`` is a ``Family`` where several kernels share the buffers; ``buckets`` then says who
    runs how many rows.
    """

    kernel: Kernel
    op: OpSpec
    trace: tuple[Decision, ...]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.kernel.table if isinstance(self.kernel, Family) else ()

    @property
    def table(self) -> str:
        lines = [f"  {d}" for d in self.trace]
        return "\n".join([*lines, *(f"  -> {b}" for b in self.buckets)])


@dataclass(frozen=True, slots=True)
class _Candidate:
    kernel: Kernel
    op: OpSpec
    answer: Accepted


Memo = dict[tuple[OpSpec, frozenset[str], tuple[tuple[int, float], ...]], Choice]
"""Operation, names allowed and weights of the buckets -> what was chosen."""


def _candidates(registry: Registry, op: OpSpec) -> list[tuple[str, Kernel]]:
    from quant_core.kernels.reference import ReferenceKernel

    reference: Kernel = ReferenceKernel()
    if op.op == "quantize":
        from quant_core.kernels.quantizer import TorchRound

        reference = TorchRound()
    elif op.op == "hadamard":
        from quant_core.kernels.hadamard import TorchHadamard

        reference = TorchHadamard()
    elif op.op == "finite":
        from quant_core.kernels.finite import TorchFinite

        reference = TorchFinite()
    elif op.op == "unpack":
        from quant_core.kernels.unpack import TorchUnpack

        reference = TorchUnpack()
    found: list[tuple[str, Kernel]] = [("quant-core", reference)]
    with collector_paused():  # the first of a process imports their modules
        for plugin_id, kernels in registry.call_all("apply", op=op):
            found += [(plugin_id, k) for k in kernels]
    return found


def _ask(kernel: Kernel, op: OpSpec) -> tuple[OpSpec, Accepted | Rejected]:
    """The kernel's answer for the stored packing, else for the canonical one."""
    if op.transforms and not getattr(kernel, "TRANSFORMS", False):
        have = ", ".join(f"{t.kind} at {t.site}" for t in op.transforms)
        return op, Rejected(axis="transforms", have=have, need="none")
    answer = answer_of(kernel, op)
    if isinstance(answer, Rejected) and answer.axis == "packing" and op.packing != CANONICAL:
        op = replace(op, packing=CANONICAL)
        return op, answer_of(kernel, op)
    return op, answer


def _transformed(
    kernel: Kernel, op: OpSpec, quantizer: Callable[[], Kernel], hadamard: Callable[[], Kernel]
) -> list[tuple[Kernel, OpSpec, Accepted | Rejected]]:
    """The kernel between the operation's transforms, behind a rounding where it takes floats."""
    from quant_core.kernels.transformed import Transformed, without_transforms
    from quant_core.kernels.transforms import hadamard_orders

    if op.op != "linear":
        return []
    bare = without_transforms(op)
    inner = [kernel, *(k for k, _, _ in _rounded(kernel, bare, quantizer))]
    out: list[tuple[Kernel, OpSpec, Accepted | Rejected]] = []
    for one in inner:
        wrapped = Transformed(one, hadamard() if hadamard_orders(op) else None)
        as_run, answer = _ask(wrapped, op)
        if isinstance(answer, Accepted):
            out.append((wrapped, as_run, answer))
    return out


def _rounded(
    kernel: Kernel, op: OpSpec, quantizer: Callable[[], Kernel]
) -> list[tuple[Kernel, OpSpec, Accepted | Rejected]]:
    """The kernel behind a rounding of its activations, if it takes float ones."""
    if op.operand("input") is None or op.transforms or op.op == "quantize":
        return []
    from quant_core.kernels.rounded import RoundedInput

    wrapped = RoundedInput.of(kernel, op, quantizer)
    if wrapped is None:
        return []
    as_run, answer = _ask(wrapped, op)
    return [(wrapped, as_run, answer)] if isinstance(answer, Accepted) else []


def _expanded(kernel: Kernel, op: OpSpec) -> list[tuple[Kernel, OpSpec, Accepted | Rejected]]:
    """The kernel on codes that stand for opaque blocks, if the plugin of the blocks has such."""
    from quant_core.kernels.expanded import Expanded

    wrapped = Expanded.of(kernel, op)
    if wrapped is None:
        return []
    as_run, answer = _ask(wrapped, op)
    return [(wrapped, as_run, answer)] if isinstance(answer, Accepted) else []


def allowed_names(
    kernels: str | Iterable[str] | None, kind: str, module: str
) -> frozenset[str] | None:
    """Names that may run operations of this kind in this module; None for all."""
    if kernels is None:
        kernels = os.environ.get("QUANT_KERNELS") or None
    if kernels is None:
        return None
    names = kernels.split(",") if isinstance(kernels, str) else kernels
    chosen: set[str] = set()
    for text in (n.strip() for n in names):
        where, equals, name = text.rpartition("=")
        if text and (not equals or where == kind or fnmatchcase(module, where)):
            chosen.add(name)
    return frozenset(chosen) or None


def _weights(prefer: str | None) -> dict[int, float]:
    name = prefer or os.environ.get("QUANT_PREFER") or "balanced"
    if name not in WEIGHTS:
        raise ConfigError(
            f"preferred kernels: found {name!r}, expected one of {', '.join(sorted(WEIGHTS))}. "
            "Correct the argument or QUANT_PREFER.",
            code="Q-KERNEL-PREFER",
            expected=sorted(WEIGHTS),
            actual=name,
        )
    return WEIGHTS[name]


def _describe(op: OpSpec) -> str:
    sizes = " ".join(f"{k}={v}" for k, v in op.sizes)
    operands = ", ".join(f"{r}: {s.label}" for r, s in op.operands)
    return f"{op.op} [{operands}] {sizes} {op.act_dtype} on {op.device[0]}"


def _none(op: OpSpec, trace: Sequence[Decision], allowed: frozenset[str] | None) -> KernelError:
    table = "\n".join(f"  {d}" for d in trace)
    unknown = sorted(allowed - {d.kernel for d in trace}) if allowed else []
    fix = (
        f"No installed kernel is called {', '.join(unknown)}."
        if unknown
        else "Unset QUANT_KERNELS to allow the reference kernel."
        if allowed is not None
        else "Install a kernel package for this operation."
    )
    return KernelError(
        f"no kernel for {_describe(op)}:\n{table}\n{fix}",
        code="Q-KERNEL-NONE",
        trace=trace,
        actual=_describe(op),
    )


def _grouped(accepted: Sequence[_Candidate], allowed: Sequence[Kernel]) -> list[_Candidate]:
    """One candidate per set of buffers: kernels of one layout become a family."""
    out: list[_Candidate] = []
    seen: set[tuple[str, OpSpec]] = set()
    for c in accepted:
        layout = layout_of(c.kernel)
        if not layout and not c.answer.costs:
            out.append(c)
            continue
        mine = [a for a in accepted if layout and layout_of(a.kernel) == layout and a.op == c.op]
        if (layout, c.op) in seen:
            continue
        if layout:
            seen.add((layout, c.op))
        if uncovered([a.answer for a in mine or [c]]) and isinstance(
            RestoredReference(c.kernel).accepts(c.op), Rejected
        ):
            continue  # some number of rows would have no kernel at all
        # kernels of the layout that reject this operation may run that of a tied output layer
        members = [k for k in allowed if layout_of(k) == layout] if layout else [c.kernel]
        family = Family(layout, tuple(members), c.op)
        answer = family.accepts(c.op)
        assert isinstance(answer, Accepted), "Family raises where it cannot run"
        out.append(_Candidate(family, c.op, answer))
    return out


def _decide(
    op: OpSpec,
    registry: Registry,
    names: frozenset[str] | None,
    kernels: str | Sequence[str] | None,
    module: str,
) -> tuple[list[Decision], list[_Candidate], list[Kernel]]:
    """(what each candidate said, who accepted, who was asked at all)."""

    @functools.cache
    def rounds() -> Kernel:
        from quant_core.kernels.quantizer import cheapest, quantize_op

        return cheapest(quantize_op(op), registry, kernels=kernels, module=module)[0]

    @functools.cache
    def turns() -> Kernel:
        from quant_core.kernels.hadamard import hadamard_op
        from quant_core.kernels.quantizer import cheapest
        from quant_core.kernels.transforms import hadamard_orders

        at, orders = next(iter(sorted(hadamard_orders(op).items())))
        asked = hadamard_op(op, op.transforms[at].site, *orders, True)
        return cheapest(asked, registry, kernels=kernels, module=module)[0]

    bare = None if names is None else names | {n.partition("@")[0] for n in names}
    trace: list[Decision] = []
    accepted: list[_Candidate] = []
    allowed: list[Kernel] = []
    for provider, kernel in _candidates(registry, op):
        layout = layout_of(kernel)
        if bare is not None and kernel.name not in bare and layout not in bare:
            answer: Accepted | Rejected = Rejected(
                axis="override", have=kernel.name, need=" or ".join(sorted(names or ()))
            )
            as_run = op
        else:
            allowed.append(kernel)
            as_run, answer = _ask(kernel, op)
        said = [(kernel, as_run, answer)]
        if isinstance(answer, Rejected) and answer.axis in ("operands", "features", "input"):
            said += _rounded(kernel, op, rounds)
        elif isinstance(answer, Rejected) and answer.axis == "blocks":
            said += _expanded(kernel, op)
        elif isinstance(answer, Rejected) and answer.axis == "transforms":
            said += _transformed(kernel, op, rounds, turns)
        allowed += [k for k, _, _ in said[1:]]
        for one, its_op, its in said:
            of = layout_of(one)
            trace.append(Decision(kernel=one.name, provider=provider, answer=its, layout=of))
            if isinstance(its, Accepted):
                accepted.append(_Candidate(one, its_op, its))
    return trace, accepted, allowed


def accepting(
    op: OpSpec, registry: Registry, *, kernels: str | Sequence[str] | None = None, module: str = ""
) -> list[tuple[Kernel, OpSpec, Accepted]]:
    """Every kernel that runs ``op``, the operation as it runs it, and its answer; for measuring."""
    names = allowed_names(kernels, op.op, module)
    return [(c.kernel, c.op, c.answer) for c in _decide(op, registry, names, kernels, module)[1]]


def _scores(candidates: Sequence[_Candidate], weights: Mapping[int, float]) -> list[float]:
    """What each costs, relative to the best at each number of rows; see the module's docstring."""
    least = {
        m: max(min(c.answer.cost_at(m) for c in candidates), 1e-9) for m in weights if candidates
    }
    return [sum(w * c.answer.cost_at(m) / least[m] for m, w in weights.items()) for c in candidates]


def choose_in_place(
    op: OpSpec,
    registry: Registry,
    *,
    kernels: str | Sequence[str] | None = None,
    module: str = "",
    memo: dict[tuple[OpSpec, frozenset[str]], Choice | None] | None = None,
    most: float | None = None,
) -> Choice | None:
    """Who runs ``op`` on its tensors as they are stored (``Kernel.adopt``); None if nobody does.

    The cheapest by its own estimate. Other arguments as in ``choose``.

    Args:
        most: nobody either if it costs more than that many times what ``choose`` would take;
            None: whatever it costs.
    """
    names = allowed_names(kernels, op.op, module)
    key = (op, frozenset(names or ()))
    if memo is not None and key in memo:
        return memo[key]
    trace, accepted, allowed = _decide(op, registry, names, kernels, module)
    found = [c for c in accepted if hasattr(c.kernel, "adopt") and c.op == op]
    weights, best = _weights(None), found[0] if found else None
    if found and (most is not None or len(found) > 1):  # else nothing hangs on what others cost
        if (turned := in_model_order(op)) != op and most is not None:  # as it is run when copied
            _, accepted, allowed = _decide(turned, registry, names, kernels, module)
        scores = _scores([*found, *_grouped(accepted, allowed)], weights)
        ranked = zip(scores, found, strict=False)
        score, best = min(ranked, key=lambda c: (c[0], c[1].kernel.name))
        if most is not None and score > most * min(scores):
            best = None
    choice = Choice(kernel=best.kernel, op=best.op, trace=tuple(trace)) if best else None
    if memo is not None:
        memo[key] = choice
    return choice


def choose(
    op: OpSpec,
    registry: Registry,
    *,
    kernels: str | Sequence[str] | None = None,
    prefer: str | None = None,
    module: str = "",
    memo: Memo | None = None,
) -> Choice:
    """The kernel that runs ``op``.

    Args:
        kernels: names to allow, see the module's docstring; default from ``QUANT_KERNELS``.
        prefer: a key of ``WEIGHTS``; default from ``QUANT_PREFER``, else "balanced".
        module: name of the module it is for, matched by ``kernels``.
        memo: answers given before, for callers that ask the same of many layers.

    Raises:
        KernelError: ``Q-KERNEL-NONE`` with every candidate's reason.
        ConfigError: ``Q-KERNEL-PREFER``.
    """
    weights = _weights(prefer)
    names = allowed_names(kernels, op.op, module)
    key = (op, frozenset(names or ()), tuple(weights.items()))
    if memo is not None and key in memo:
        return memo[key]
    trace, accepted, allowed = _decide(op, registry, names, kernels, module)
    final = _grouped(accepted, allowed)
    if not final:
        raise _none(op, trace, names)
    best = min(
        zip(_scores(final, weights), final, strict=True), key=lambda c: (c[0], c[1].kernel.name)
    )[1]
    choice = Choice(kernel=best.kernel, op=best.op, trace=tuple(trace))
    if log.isEnabledFor(logging.DEBUG):
        log.debug("kernel for %s: %s\n%s", _describe(op), best.kernel.name, choice.table)
    if memo is not None:
        memo[key] = choice
    return choice
