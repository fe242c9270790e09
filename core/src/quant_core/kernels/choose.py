"""One kernel choice, with a trace: the same decisions are the log line, the table and the error.

Candidates come from the plugins' ``apply`` hook plus core's reference kernel, which always exists.
The cheapest accepted candidate wins; ties go to the first name. ``QUANT_KERNELS`` (or the
``kernels`` argument) restricts the candidates by name; a restriction that leaves none is an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from quant_core.errors import KernelError
from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.registry import Registry
from quant_core.spec import CANONICAL, OpSpec

__all__ = ["Choice", "Decision", "choose"]

log = logging.getLogger("quant_core")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one candidate said."""

    kernel: str
    provider: str
    answer: Accepted | Rejected

    def __str__(self) -> str:
        if isinstance(self.answer, Rejected):
            return f"{self.kernel:<18} rejected: {self.answer}"
        note = f" ({self.answer.note})" if self.answer.note else ""
        return f"{self.kernel:<18} accepted: cost {self.answer.cost:g}{note}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The winner, the operation as it will run it (its packing), and how it was found."""

    kernel: Kernel
    op: OpSpec
    trace: tuple[Decision, ...]

    @property
    def table(self) -> str:
        return "\n".join(f"  {d}" for d in self.trace)


def _candidates(registry: Registry, op: OpSpec) -> list[tuple[str, Kernel]]:
    from quant_core.kernels.reference import ReferenceKernel

    found: list[tuple[str, Kernel]] = [("quant-core", ReferenceKernel())]
    for plugin_id, kernels in registry.call_all("apply", op=op):
        found += [(plugin_id, k) for k in kernels]
    return found


def _ask(kernel: Kernel, op: OpSpec) -> tuple[OpSpec, Accepted | Rejected]:
    """The kernel's answer for the stored packing, else for the canonical one."""
    if op.transforms and not getattr(kernel, "TRANSFORMS", False):
        have = ", ".join(f"{t.kind} at {t.site}" for t in op.transforms)
        return op, Rejected(axis="transforms", have=have, need="none")
    answer = kernel.accepts(op)
    if isinstance(answer, Rejected) and answer.axis == "packing" and op.packing != CANONICAL:
        op = replace(op, packing=CANONICAL)
        return op, kernel.accepts(op)
    return op, answer


def _allowed(kernels: str | Iterable[str] | None) -> set[str] | None:
    if kernels is None:
        kernels = os.environ.get("QUANT_KERNELS") or None
    if kernels is None:
        return None
    names = kernels.split(",") if isinstance(kernels, str) else kernels
    return {n.strip() for n in names if n.strip()}


def _describe(op: OpSpec) -> str:
    sizes = " ".join(f"{k}={v}" for k, v in op.sizes)
    operands = ", ".join(f"{r}: {s.label}" for r, s in op.operands)
    return f"{op.op} [{operands}] {sizes} {op.act_dtype} on {op.device[0]}"


def choose(op: OpSpec, registry: Registry, *, kernels: str | Sequence[str] | None = None) -> Choice:
    """The kernel that runs ``op``.

    Args:
        kernels: names to allow; default from ``QUANT_KERNELS``, else all.

    Raises:
        KernelError: ``Q-KERNEL-NONE`` with every candidate's reason.
    """
    allowed = _allowed(kernels)
    trace: list[Decision] = []
    accepted: list[tuple[float, str, Kernel, OpSpec]] = []
    for provider, kernel in _candidates(registry, op):
        if allowed is not None and kernel.name not in allowed:
            answer: Accepted | Rejected = Rejected(
                axis="override", have=kernel.name, need=" or ".join(sorted(allowed))
            )
            as_run = op
        else:
            as_run, answer = _ask(kernel, op)
        trace.append(Decision(kernel=kernel.name, provider=provider, answer=answer))
        if isinstance(answer, Accepted):
            accepted.append((answer.cost, kernel.name, kernel, as_run))
    if not accepted:
        table = "\n".join(f"  {d}" for d in trace)
        unknown = sorted(allowed - {d.kernel for d in trace}) if allowed else []
        fix = (
            f"No installed kernel is called {', '.join(unknown)}."
            if unknown
            else "Unset QUANT_KERNELS to allow the reference kernel."
            if allowed is not None
            else "Install a kernel package for this operation."
        )
        raise KernelError(
            f"no kernel for {_describe(op)}:\n{table}\n{fix}",
            code="Q-KERNEL-NONE",
            trace=trace,
            actual=_describe(op),
        )
    _, _, kernel, as_run = min(accepted, key=lambda a: (a[0], a[1]))
    choice = Choice(kernel=kernel, op=as_run, trace=tuple(trace))
    log.debug("kernel for %s: %s\n%s", _describe(op), kernel.name, choice.table)
    return choice
