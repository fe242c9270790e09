"""Modules that engines put in place of their own: thin, packed, and safe to move and cast.

A module owns its kernel's buffers as torch buffers. ``.to(dtype)``, ``.half()`` and friends cannot
touch codes or scales; ``.to(device)`` moves the bytes and, where the device type changes, asks for
a kernel again. A tied lm_head reads the embedding's buffers and owns none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.gradients import grouped_with_grad, linear_with_grad, wants_grad
from quant_core.kernels.base import Kernel
from quant_core.kernels.choose import Choice, Decision
from quant_core.kernels.device import device_key
from quant_core.kernels.failed import allocated, asked, check_output, name_failure
from quant_core.kernels.routed import ExpertsRun
from quant_core.parts import load_part_, matrices
from quant_core.row_order import in_model_order
from quant_core.shared import MOST_TOKENS, SharedGroup, Siblings, together, weights_changed
from quant_core.spec import OpSpec, Packing
from quant_core.tensors import LayerTensors

__all__ = [
    "BoundMember",
    "ClampedSwiglu",
    "Mould",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "QuantModule",
    "moved",
]

Rechoose = Callable[[OpSpec], Choice]
_EMPTY = (dict, set, OrderedDict)  # what torch gives every module of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundMember:
    """Where one checkpoint member lies in a module: its name, its rows, its stored packing."""

    name: str
    start: int
    stop: int
    packing: Packing


class QuantModule(nn.Module):
    """Buffers of one bound operation.

    Attributes:
        op: what runs, kernel: who runs it, trace: how it was chosen.
        members: the checkpoint members whose rows it holds, in row order.
    """

    op: OpSpec
    kernel: Kernel
    trace: tuple[Decision, ...]
    members: tuple[BoundMember, ...]
    _rechoose: Rechoose | None
    _names: tuple[str, ...]
    _answered: object = None  # the run whose first answer was checked

    def __init__(
        self,
        choice: Choice,
        buffers: Mapping[str, Tensor],
        members: Iterable[BoundMember] = (),
        rechoose: Rechoose | None = None,
    ) -> None:
        super().__init__()
        self.__dict__.update(  # no tensors, no modules: nothing that setattr would look for
            op=choice.op,
            kernel=choice.kernel,
            trace=choice.trace,
            members=tuple(members),
            _rechoose=rechoose,
            _names=tuple(buffers),
        )
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._bind()

    def _bind(self) -> None:
        self.__dict__["_run"] = self._bound(self.op)

    def _bound(self, op: OpSpec) -> Any:
        with asked("bind", self.kernel, op, self.layer, self.trace):
            return self.kernel.bind(op)

    @property
    def layer(self) -> str:
        """Where it is from, for messages: its first member, and how many more there are."""
        more = f" and {len(self.members) - 1} more" if len(self.members) > 1 else ""
        return f"{self.members[0].name}{more}" if self.members else ""

    def _name_failure(self, err: Exception, x: Tensor) -> None:
        """Raise what says more than ``err`` of a call; nothing if ``err`` is fit to be seen."""
        held: Mapping[str, Any] = self._buffers
        values = list(held.values())
        name_failure(err, self.kernel, self.op, self.layer, self.trace, values, x)

    def _check(self, y: Any, x: Tensor) -> None:
        """The first answer of what was bound is what was promised."""
        check_output(y, x, self.kernel, self.op, self.layer, self.trace)
        self.__dict__["_answered"] = self._run

    @property
    def owns_buffers(self) -> bool:
        """Whether the weights are held here; False for a tied layer."""
        return bool(self._names)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The kernel's buffers."""
        return {name: getattr(self, name) for name in self._names}

    def restore(self) -> LayerTensors:
        """Canonical tensors, bit for bit."""
        with asked("restore", self.kernel, self.op, self.layer, self.trace):
            return self.kernel.restore(self.tensors, self.op)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        weights_changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        """Move, never cast: ``fn`` sees the bytes of each buffer, which no float cast changes."""
        if not self._names:
            return self
        weights_changed()
        here = getattr(self, self._names[0]).device
        target = fn(torch.empty(0, dtype=torch.uint8, device=here)).device
        if target.type not in (here.type, "meta") and self._rechoose is not None:
            self._rebind(target)
            return self
        for name in self._names:
            self._buffers[name] = moved(fn, getattr(self, name))
        return self

    def _rebind(self, device: torch.device) -> None:
        """Choose again for another type of device and load through the canonical form.

        The canonical tensors are restored where the buffers are, by the kernel that wrote them.
        """
        assert self._rechoose is not None
        canonical = self.restore()
        op = in_model_order(self.op)
        choice = self._rechoose(replace(op, device=device_key(str(device))))
        buffers = allocated(choice.kernel, choice.op, str(device), self.layer, choice.trace)
        for expert, part in matrices(canonical, self.op.size("experts", 0)):
            at = {"row": 0} if expert is None else {"row": 0, "expert": expert}
            load_part_(choice, buffers, part, at, self.layer)
        for name in self._names:
            del self._buffers[name]
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._names = tuple(buffers)
        self.op, self.kernel, self.trace = choice.op, choice.kernel, choice.trace
        self._bind()

    def _values(self) -> list[Tensor]:
        held: dict[str, Any] = self._buffers
        return [held[name] for name in self._names]

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{k}={v}" for k, v in self.op.sizes)
        return f"{sizes}, {self.op.weight.label}, kernel={self.kernel.name}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # who runs several layers in one call must ask again
            weights_changed()
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "_names" in self.__dict__:
            raise AttributeError(
                f"{type(self).__name__} holds packed weights and has no 'weight'; "
                "use .restore().dequantize() for a float32 copy"
            )
        return super().__getattr__(name)


class Mould:
    """Makes modules of the operation of one that nobody has touched yet: bound as that one is."""

    def __init__(self, first: QuantModule) -> None:
        held = first.__dict__
        own = {k: type(v) for k, v in held.items() if type(v) in _EMPTY and not v}
        self._class, self._own = type(first), tuple(own.items())
        self._held = {k: v for k, v in held.items() if k not in own and k != "_buffers"}

    def __call__(
        self,
        buffers: Mapping[str, Tensor],
        members: tuple[BoundMember, ...],
        rechoose: Rechoose | None,
    ) -> QuantModule:
        """The same operation over other buffers, of the same names in the same order."""
        made = self._class.__new__(self._class)
        held = made.__dict__
        held.update(self._held)
        for name, empty in self._own:
            held[name] = empty()
        held.update(_buffers=dict(buffers), members=members, _rechoose=rechoose)
        return made


def moved(fn: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """``value`` where ``fn`` of ``Module._apply`` puts it, bit for bit: it sees bytes only."""
    raw = value.contiguous().view(torch.uint8)
    there = fn(raw)
    if there.dtype != torch.uint8:  # .type(...) casts integers too: keep only the move
        there = raw.to(there.device)
    return there.view(value.dtype)


class QuantLinear(QuantModule):
    """y = x W^T + bias. x [..., in_features] float -> [..., out_features] of x's dtype.

    Neighbours that get the same input may run in one call; ``quant_core.shared`` says when.
    """

    _owner: QuantEmbedding | None = None
    _shared: tuple[SharedGroup, int] | None = None
    _siblings: tuple[Siblings, int] | None = None

    @classmethod
    def tied(cls, owner: QuantEmbedding, bias: None = None) -> QuantLinear:
        """A linear layer over the embedding's buffers: one copy, both see it."""
        op = replace(owner.op, op="linear")
        module = cls(Choice(kernel=owner.kernel, op=op, trace=owner.trace), {}, owner.members)
        object.__setattr__(module, "_owner", owner)  # hidden: it must not be moved or saved twice
        return module

    @property
    def in_features(self) -> int:
        return self.op.size("k")

    @property
    def out_features(self) -> int:
        return self.op.size("n")

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            run, values = self._call()
            return run(values, x)  # type: ignore[no-any-return]
        try:
            if wants_grad(x):
                y = linear_with_grad(self, *self._call(), x)
            else:
                if self._siblings is not None:
                    self._siblings[0].note(self._siblings[1], x)
                if self._shared is not None and x.numel() <= self._most:
                    y = self._shared[0].take(self._shared[1], x)
                else:
                    run, values = self._call()
                    y = run(values, x)
        except Exception as err:
            self._name_failure(err, x)
            raise
        if self._answered is not self._run:
            self._check(y, x)
        return y

    def _call(self) -> tuple[Callable[..., Any], list[Tensor]]:
        """Who runs, and the buffers it takes."""
        owner = self._owner
        if owner is not None:
            return owner._run_tied, owner._values()
        return self._run, self._values()

    def _bind(self) -> None:
        super()._bind()
        self.__dict__["_most"] = MOST_TOKENS * self.op.size("k")
        if self._shared is not None:
            self._shared[0].bind()

    def __getstate__(self) -> dict[str, Any]:
        """A copy shares no call with the layers beside the original."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_shared", "_siblings")}

    def restore(self) -> LayerTensors:
        return super().restore() if self._owner is None else self._owner.restore()


class QuantEmbedding(QuantModule):
    """ids [...] -> rows [..., embedding_dim] of ``op.act_dtype``."""

    @property
    def num_embeddings(self) -> int:
        return self.op.size("n")

    @property
    def embedding_dim(self) -> int:
        return self.op.size("k")

    def _bind(self) -> None:
        super()._bind()
        self._run_tied = self._bound(replace(self.op, op="linear"))

    def forward(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._run(self._values(), ids)
        try:
            y = self._run(self._values(), ids)
        except Exception as err:
            self._name_failure(err, ids)
            raise
        if self._answered is not self._run:
            self._check(y, ids)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        """As for every module, and a float cast changes the dtype of the rows returned."""
        dtype = getattr(torch, self.op.act_dtype)
        probe = fn(torch.empty(0, dtype=dtype))
        super()._apply(fn, recurse)
        if probe.is_floating_point() and probe.dtype != dtype:
            self.op = replace(self.op, act_dtype=str(probe.dtype).removeprefix("torch."))
            self._bind()
        return self


class QuantComposite(nn.Module):
    """Members of one layer that cannot share buffers, side by side along the output.

    Those of one kernel run in one call, which quantizes x once for all that quantize it alike.
    """

    def __init__(self, parts: Iterable[QuantLinear], reason: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.reason = reason
        self._calls = together(list(self.parts))  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantComposite:
        super()._apply(fn, recurse)
        self._calls = together(list(self.parts))  # type: ignore[arg-type]
        return self

    def _part(self, index: int) -> QuantLinear:
        return self.parts[index]  # type: ignore[return-value]

    def _called(self, run: Callable[..., Any], places: tuple[int, ...], x: Tensor) -> list[Tensor]:
        values = [self._part(i)._values() for i in places]
        if torch.compiler.is_compiling():
            return run(values, x)  # type: ignore[no-any-return]
        try:
            return run(values, x)  # type: ignore[no-any-return]
        except Exception as err:
            self._part(places[0])._name_failure(err, x)
            raise

    def forward(self, x: Tensor) -> Tensor:
        if wants_grad(x):
            return torch.cat([part(x) for part in self.parts], dim=-1)
        out: dict[int, Tensor] = {}
        for run, places in self._calls:
            out |= zip(places, self._called(run, places, x), strict=True)
        return torch.cat([out[i] for i in range(len(self.parts))], dim=-1)


class QuantGrouped(QuantModule):
    """One stack of experts: x [T, K], expert index [T] -> [T, N]."""

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._run(self._values(), x, experts)
        try:
            if wants_grad(x):
                y = grouped_with_grad(self, self._run, x, experts)
            else:
                y = self._run(self._values(), x, experts)
        except Exception as err:
            self._name_failure(err, x)
            raise
        if self._answered is not self._run:
            self._check(y, x)
        return y


class ClampedSwiglu(nn.Module):
    """(u + 1) * g * sigmoid(alpha * g), g = min(gate, limit), u = clamp(up, -limit, limit)."""

    def __init__(self, limit: float, alpha: float) -> None:
        super().__init__()
        self.limit, self.alpha = limit, alpha

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))

    def extra_repr(self) -> str:
        return f"limit={self.limit}, alpha={self.alpha}"


class QuantExperts(nn.Module):
    """Routed experts: out[t] = sum_j w[t, j] * down_e(gating(gate_e(x), up_e(x))), e = index[t, j].

    The gating is act(gate) * up unless another one is given.

    Shapes:
        hidden_states (T, H), top_k_index (T, k) int64, top_k_weights (T, k) -> (T, H)
        an index outside 0..E-1 means "no expert here" and contributes nothing
    """

    def __init__(
        self,
        gate: nn.Module,
        up: nn.Module | None,
        down: nn.Module,
        activation: Callable[[Tensor], Tensor] | None,
        num_experts: int,
        gating: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate  # holds gate and up when they are fused; ``up`` is None then
        self.up = up
        self.down = down
        self.activation = activation
        self.gating = gating
        self.num_experts = num_experts
        self._one: ExpertsRun | None = None

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.gating is not None:
            return self.gating(gate, up)
        assert self.activation is not None, "Builder.experts sees to it"
        return self.activation(gate) * up

    def _as_one(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """All of it as one call of the stacks' kernel; None where they have to run one by one."""
        stacks = (self.gate, self.up, self.down)
        if wants_grad(x) or any(
            type(s) is not QuantGrouped or s._forward_hooks or s._forward_pre_hooks for s in stacks
        ):
            return None
        kernels = [s.kernel for s in stacks]  # type: ignore[union-attr]
        ops = [s.op for s in stacks]  # type: ignore[union-attr]
        if self._one is None or not self._one.of(kernels, ops):  # type: ignore[arg-type]
            gate: Any = self.gate
            self._one = ExpertsRun(kernels, ops, gate.layer, gate.trace)  # type: ignore[arg-type]
        values = [s._values() for s in stacks]  # type: ignore[union-attr, operator]
        return self._one(values, self._gated, x, index, weights)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made again."""
        return self.__dict__ | {"_one": None}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if (y := self._as_one(hidden_states, top_k_index, top_k_weights)) is not None:
            return y
        tokens, top_k = top_k_index.shape
        experts = top_k_index.reshape(-1)
        x = hidden_states.repeat_interleave(top_k, dim=0)
        if self.up is None:
            gate, up = self.gate(x, experts).chunk(2, dim=-1)
        else:
            gate, up = self.gate(x, experts), self.up(x, experts)
        y = self.down(self._gated(gate, up), experts)
        y = y * top_k_weights.reshape(-1, 1)
        return y.view(tokens, top_k, y.shape[-1]).sum(dim=1).to(hidden_states.dtype)
