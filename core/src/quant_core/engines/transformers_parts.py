"""Norms of a transformers model through kernels, where they compute what ours do; the probe.

What a module computes is found out, not read off its name: its own ``forward`` and the kernel's
run on the same random input, and only where both give the same, up to the order of a float32 sum,
is the module swapped (``transformers_swap``); once for modules of the same code, settings and
operations. A norm has one vector ``weight``, no other state, and a small positive number, its
epsilon; ``transformers_mlp`` has the MLPs, ``transformers_layers`` whole decoder layers.

The module's own code still runs where gradients are enabled, under ``torch.compile`` (Inductor
fuses it), and for what the kernel declines. Without a kernel nothing changes; ``QUANT_KERNELS`` and
``kernels=`` apply as for every operation. ``parts_of(model)`` says what was swapped, and why not.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_core.engines.transformers_swap import Swapped, graph_wanted, original, swap
from quant_core.errors import KernelError, summarize
from quant_core.kernels.base import Accepted
from quant_core.kernels.between import NORMS, norm_op
from quant_core.kernels.choose import Choice, Decision, choose
from quant_core.kernels.device import device_key
from quant_core.kernels.failed import Whose
from quant_core.nn import QuantLinear
from quant_core.registry import Registry
from quant_core.shared import weights_epoch
from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Buffers",
    "NormPart",
    "Parts",
    "Place",
    "attach_norms_and_mlps",
    "could_be_norm",
    "equal",
    "nearly",
    "parts_of",
    "prove_later",
    "random",
]

log = logging.getLogger("quant_core")

_MOST_EPS = 1e-2


@dataclass(slots=True, kw_only=True)
class Parts:
    """What of a model runs in kernels, besides its packed layers.

    Attributes:
        swapped: module name -> what runs it.
        left: module name of a candidate -> why it stays as it is.
        choices: operation -> who was chosen, or why nobody.
    """

    registry: Registry
    kernels: str | Sequence[str] | None
    dtype: torch.dtype
    device: str
    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    choices: dict[OpSpec, Choice | KernelError] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)

    def knows(self, module: nn.Module) -> Any:
        """What was found out about a module of the same code, settings and operations, or None."""
        return self.known.get(_kind(module))

    def learn(self, module: nn.Module, found: Any) -> None:
        """``module`` was probed thoroughly; its place in the model alone may set others apart."""
        self.known[_kind(module)] = found

    def chosen(self, op: OpSpec) -> Choice | None:
        """The kernel for ``op``; None, and remembered, if there is none."""
        if op not in self.choices:
            try:
                self.choices[op] = choose(op, self.registry, kernels=self.kernels)
            except KernelError as err:
                self.choices[op] = err
        found = self.choices[op]
        return found if isinstance(found, Choice) else None

    def bound(self, choice: Choice, name: str) -> tuple[Callable[..., Any], Whose]:
        """What was chosen, ready to run, and whose it is; ``name`` is the module's."""
        whose = Whose(kernel=choice.kernel, op=choice.op, layer=name, trace=choice.trace)
        with whose.bound():
            return choice.kernel.bind(choice.op), whose

    @property
    def key(self) -> tuple[str, tuple[str, str]]:
        """dtype and device as operations name them."""
        return str(self.dtype).removeprefix("torch."), device_key(self.device)

    @property
    def table(self) -> str:
        """What was swapped and what was not, and every kernel's answer."""
        runs: dict[str, list[str]] = {}
        for name, run in self.swapped.items():
            runs.setdefault(run, []).append(name)
        lines = [f"{run}: {summarize(names, 3)}" for run, names in runs.items()]
        lines += [f"{name}: as it is, {why}" for name, why in self.left.items()]
        for op, found in self.choices.items():
            sizes = " ".join(f"{k}={v}" for k, v in op.sizes)
            lines.append(f"{op.op} {sizes} {' '.join(sorted(op.features))}".rstrip())
            lines += [f"  {d}" for d in found.trace or () if _of_interest(d)]
        return "\n".join(lines)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Classes, plain settings and operations of a module and of all below it, but no numbers."""

    def settings(m: nn.Module) -> tuple[Any, ...]:
        held = m.__dict__
        plain = [(n, v) for n, v in held.items() if isinstance(v, int | float | str)]
        return tuple(sorted(n for n in plain if n[0] != "layer_idx")), id(held.get("config"))

    return tuple((original(m), settings(m), getattr(m, "op", None)) for m in module.modules())


def _of_interest(decision: Decision) -> bool:
    return isinstance(decision.answer, Accepted) or decision.answer.axis != "op"


def parts_of(model: nn.Module) -> Parts | None:
    """What was found out about a model, now if not before; None for copies and other models."""
    found = getattr(model, "_quant_parts", None)
    if isinstance(found, _Kept) and found.prove is not None:
        found.prove()
        found = getattr(model, "_quant_parts", None)
    return found.parts if isinstance(found, _Kept) else None


def prove_later(model: nn.Module, prove: Callable[[], Any]) -> None:
    """Let ``parts_of(model)`` call ``prove``, which ends in ``attach_norms_and_mlps``."""
    model._quant_parts = _Kept(prove=prove)  # type: ignore[assignment]


class _Kept:
    """Held by a model; its copies keep what was swapped, not the account of it."""

    def __init__(self, parts: Parts | None = None, prove: Callable[[], Any] | None = None) -> None:
        self.parts, self.prove = parts, prove

    def __reduce__(self) -> tuple[object, ...]:
        return _Kept, ()


# ------------------------------------------------------------------------------------- the probe


@dataclass(frozen=True, slots=True)
class Place:
    """Where a probe runs."""

    dtype: torch.dtype
    device: str


def random(shape: Sequence[int], parts: Parts | Place, seed: int = 0) -> Tensor:
    """Normal numbers in the model's dtype, on its device; torch's own state is left alone."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
    return values.to(device=parts.device, dtype=parts.dtype)


def equal(got: Tensor | None, want: Any) -> float | None:
    """How many numbers differ, of 1, if both are equal within rounding; None if they are not.

    A number may be off by two units in the last place, few of them may be off at all.
    """
    if got is None or not isinstance(want, Tensor) or got.dtype != want.dtype:
        return None
    if got.shape != want.shape or not bool(want.isfinite().all()):
        return None
    off = (got.double() - want.double()).abs()
    unit = torch.finfo(want.dtype).eps
    loose = 8 if want.dtype == torch.float32 else 1  # sums of other orders show there
    size = want.double().abs()
    if bool((off > 2 * loose * unit * size + 1e-30).any()):
        return None
    if bool(off.mean() > 0.1 * loose * unit * size.mean()):
        return None
    return float((off > 0).double().mean())


def nearly(got: Any, want: Any, *, mean: float = 0.25) -> bool:
    """Equal but for single roundings that tipped and went through a matrix since.

    Args:
        mean: largest mean distance, in units of the last place of the mean.
    """
    if not isinstance(want, Tensor) or not isinstance(got, Tensor) or got.shape != want.shape:
        return False
    if got.dtype != want.dtype or not bool(want.isfinite().all()):
        return False
    off, size = (got.double() - want.double()).abs(), want.double().abs()
    unit = torch.finfo(want.dtype).eps * (8 if want.dtype == torch.float32 else 1)
    return bool(off.mean() <= mean * unit * size.mean() and off.max() <= 4 * unit * size.max())


# ----------------------------------------------------------------------------------------- norms


@dataclass(slots=True)
class NormPart:
    """What a swapped norm runs; ``eps`` names its attribute."""

    run: Callable[..., Any]
    eps: str
    whose: Whose

    @property
    def op(self) -> OpSpec:
        return self.whose.op

    @property
    def kernel(self) -> str:
        return self.whose.kernel.name

    def apply(self, weight: Tensor, x: Tensor, eps: float) -> Any:
        """The output; None for what the kernel does not take."""
        try:
            return self.run([weight], x, eps)
        except Exception as err:
            self.whose.failed(err, x)
            raise


class _Norm(Swapped):
    _quant_norm: NormPart

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not graph_wanted():
            held: Any = self.__dict__
            part, weight = self._quant_norm, held["_parameters"].get("weight")
            if type(weight) is nn.Parameter:
                y = part.apply(weight, args[0], held[part.eps])
                if y is not None:
                    return y
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self._quant_norm.kernel}"  # type: ignore[misc]


def _epsilons(module: nn.Module) -> list[str]:
    held = module.__dict__.items()
    return [n for n, v in held if type(v) is float and 0 < v <= _MOST_EPS]


def could_be_norm(module: nn.Module) -> bool:
    """Whether a module has what a norm has, and nothing else."""
    weight = module._parameters.get("weight")
    if weight is None or module._modules or module._buffers:
        return False
    return (
        [n for n, v in module._parameters.items() if v is not None] == ["weight"]
        and weight.dim() == 1
        and weight.numel() > 1
        and bool(_epsilons(module))
    )


def _norm_inputs(k: int, eps: float, parts: Parts) -> Tensor:
    """Rows of all sizes: large, with a mean, and so small that epsilon decides."""
    x = random((6, k), parts)
    x[1] *= 100.0
    x[2] += 1.0
    x[3:] *= eps**0.5
    x[4] *= 0.1
    x[5] *= 0.0
    return x[None]


def _attach_norm(name: str, module: nn.Module, parts: Parts) -> None:
    weight: Any = module._parameters["weight"]
    if weight.dtype != parts.dtype or type(module.forward).__name__ != "method":
        parts.left[name] = f"its weight is {weight.dtype}, or its forward is not its class'"
        return
    known, size = parts.knows(module), weight.numel()
    if known is not None and (choice := parts.chosen(norm_op(size, known[1], *parts.key))):
        run, whose = parts.bound(choice, name)
        module._quant_norm = NormPart(run, known[0], whose)  # type: ignore[assignment]
        swap(module, _Norm)
        parts.swapped[name] = choice.kernel.name
        return
    best: tuple[float, NormPart] | None = None
    found: tuple[str, Any] = ("", None)
    offered = False
    # weights of its own for the probe: stored ones may all be 1, which hides where they round
    other = nn.Parameter(1 + random((size,), parts, 1) / 4, requires_grad=False)
    twin = copy.copy(module)  # the module itself may be running in another thread
    twin.__dict__["_parameters"] = {**module._parameters, "weight": other}
    for eps in _epsilons(module):
        x = _norm_inputs(size, getattr(module, eps), parts)
        want = twin(x)
        for form in NORMS:
            choice = parts.chosen(norm_op(size, form, *parts.key))
            if choice is None:
                continue
            offered = True
            run, whose = parts.bound(choice, name)
            part = NormPart(run, eps, whose)
            off = equal(part.apply(other, x.clone(), getattr(module, eps)), want)
            if off is not None and (best is None or off < best[0]):
                best = off, part
                found = eps, form
    if best is not None:
        parts.learn(module, found)
        module._quant_norm = best[1]  # type: ignore[assignment]
        swap(module, _Norm)
        parts.swapped[name] = best[1].kernel
    elif offered:
        parts.left[name] = "it computes something else than a root-mean-square norm"


class Buffers:
    """The buffers of some layers: the same list as long as no weights changed anywhere."""

    __slots__ = ("_epoch", "_values")

    def __init__(self) -> None:
        self._epoch = -1
        self._values: list[list[Tensor]] = []

    def of(self, layers: Sequence[QuantLinear]) -> list[list[Tensor]]:
        now = weights_epoch()
        if now != self._epoch:
            self._values, self._epoch = [layer._values() for layer in layers], now
        return self._values

    def __reduce__(self) -> tuple[object, ...]:
        return Buffers, ()


# -------------------------------------------------------------------------------------- the model


@torch.no_grad()
def attach_norms_and_mlps(
    model: PreTrainedModel,
    registry: Registry,
    *,
    dtype: torch.dtype,
    device: str,
    kernels: str | Sequence[str] | None = None,
) -> Parts:
    """Swap norms and MLPs that kernels compute as well; see the module's docstring.

    Args:
        dtype, device: of activations.
        kernels: as in ``choose``.
    """
    from quant_core.engines.transformers_mlp import attach_mlp, could_be_mlp

    parts = Parts(registry=registry, kernels=kernels, dtype=dtype, device=device)
    for name, module in model.named_modules():
        if isinstance(module, Swapped | QuantLinear):
            continue
        if could_be_norm(module):
            _attach_norm(name, module, parts)
        elif could_be_mlp(module):
            attach_mlp(name, module, parts)
    model._quant_parts = _Kept(parts)
    if parts.swapped:
        log.info("%d module(s) run in kernels:\n%s", len(parts.swapped), parts.table)
    return parts
