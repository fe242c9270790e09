"""Gated MLPs of a transformers model through kernels: down(act(gate(x)) * up(x)).

A candidate has an activation and three packed layers, two of them alike, or two: one that gives
gate and up behind each other, in either order, and down. Which of them is which is found out by the
probe of ``transformers_parts``, and nothing of it by names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_core.engines.transformers_parts import Buffers, Parts, nearly, random
from quant_core.engines.transformers_swap import Guard, Swapped, graph_wanted, swap
from quant_core.kernels.between import gated_op
from quant_core.kernels.failed import Whose
from quant_core.kernels.family import binder
from quant_core.nn import QuantLinear

__all__ = ["MlpPart", "attach_mlp", "could_be_mlp"]

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(slots=True)
class MlpPart:
    """What a swapped MLP runs: one call for all of it, or one for what is between its layers."""

    names: tuple[str, ...]  # gate, up, down; or one layer of both sides, down
    up_first: bool  # up's outputs come before gate's, of one layer
    act: str  # name of the activation's module
    form: str  # which one it is
    run: Callable[..., Any]
    whose: Whose  # of ``run``
    whole: Callable[..., Any] | None
    products: Whose  # of ``whole``
    above: Guard  # the activation
    below: Guard  # everything
    kernel: str
    buffers: Buffers

    def apply(self, module: nn.Module, x: Tensor) -> Any:
        """The output; None for what the kernel does not take."""
        held: Any = module._modules
        *sides, down = (held[name] for name in self.names)
        if self.whole is not None and self.below.holds(module):
            try:
                y = self.whole(self.buffers.of((*sides, down)), x)
            except Exception as err:
                self.products.failed(err, x)
                raise
            if y is not None:
                return y
        if not self.above.holds(module):
            return None
        if len(sides) == 2:
            g, u = sides[0](x), sides[1](x)
        else:
            g, u = sides[0](x).chunk(2, -1)
            g, u = (u, g) if self.up_first else (g, u)
        try:
            y = self.run([], g, u)
        except Exception as err:
            self.whose.failed(err, g)
            raise
        return down(held[self.act](g) * u if y is None else y)


class _Mlp(Swapped):
    _quant_mlp: MlpPart

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not graph_wanted() and not self.training:  # type: ignore[attr-defined]
            y = self._quant_mlp.apply(self, args[0])  # type: ignore[arg-type]
            if y is not None:
                return y
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"kernel={self._quant_mlp.kernel}"


def _activation(module: nn.Module, parts: Parts) -> str:
    """Which known activation a module is, in float32 on a fine grid; "" for none."""
    x = torch.linspace(-12, 12, 4801, device=parts.device, dtype=torch.float32)
    try:
        got = module(x)
    except (TypeError, ValueError, RuntimeError):  # takes something else than one tensor
        return ""
    for name, plain in _ACTS.items():
        same = isinstance(got, Tensor) and got.shape == x.shape
        if same and bool(((got - plain(x)).abs() <= 2e-6 * x.abs().clamp(min=1)).all()):
            return name
    return ""


def could_be_mlp(module: nn.Module) -> bool:
    """Whether a module has what a gated MLP has, and nothing else."""
    return len(module._modules) in (3, 4) and _mlp_children(module) is not None


def _mlp_children(module: nn.Module) -> tuple[list[str], str] | None:
    """Names of the packed layers, the one that leads back last, and of the activation."""
    packed: list[str] = []
    others: list[str] = []
    for name, child in module._modules.items():
        (packed if type(child) is QuantLinear else others).append(name)
    if len(packed) not in (2, 3) or len(others) != 1 or module._parameters or module._buffers:
        return None
    layers: Any = [module._modules[n] for n in packed]
    shapes = [(c.in_features, c.out_features) for c in layers]
    for last in range(len(packed)):
        down = shapes[last]
        sides = [n for n in packed if n != packed[last]]
        found = [shapes[i] for i in range(len(packed)) if i != last]
        wide = down[0] if len(sides) == 2 else 2 * down[0]
        if all(shape == (down[1], wide) for shape in found):
            return [*sides, packed[last]], others[0]
    return None


def _orders(names: list[str]) -> list[tuple[tuple[str, ...], bool]]:
    """Which layer, or which half of one, may be gate: names, and whether up comes first."""
    if len(names) == 2:
        return [(tuple(names), False), (tuple(names), True)]
    one, two, down = names
    return [((one, two, down), False), ((two, one, down), False)]


def attach_mlp(name: str, module: nn.Module, parts: Parts) -> None:
    """Swap an MLP whose arithmetic a kernel has."""
    found = _mlp_children(module)
    if found is None:
        return
    layers, act_name = found
    act_module: Any = module._modules[act_name]
    act = _activation(act_module, parts)
    if not act:
        parts.left[name] = f"its {act_name} is none of {', '.join(_ACTS)}"
        return
    held: dict[str, Any] = dict(module._modules)
    op = gated_op(held[layers[-1]].in_features, act, *parts.key)
    choice = parts.chosen(op)
    if choice is None:
        return
    known = parts.knows(module)
    x = random((2, 3, held[layers[0]].in_features), parts)
    cases = [x[:1, :1], x] if known is None else []
    wants = [module(case) for case in cases]
    run, whose = parts.bound(choice, name)
    for names, up_first in _orders(layers) if known is None else (known,):
        below = Guard([(module, n) for n in (*names, act_name)])
        above = Guard([(module, act_name)])
        first: QuantLinear = held[names[0]]
        products = Whose(
            kernel=first.kernel, op=first.op, layer=name, trace=first.trace, method="bind_gated"
        )
        with products.bound():
            whole = _whole([held[n] for n in names], act, up_first)
        part = MlpPart(
            names,
            up_first,
            act_name,
            act,
            run,
            whose,
            whole,
            products,
            above,
            below,
            choice.kernel.name,
            Buffers(),
        )
        if all(_same(part, module, c, w) for c, w in zip(cases, wants, strict=True)):
            parts.learn(module, (names, up_first))
            part.kernel += f" in {first.kernel.name}" if whole is not None else ""
            module._quant_mlp = part  # type: ignore[assignment]
            swap(module, _Mlp)
            parts.swapped[name] = part.kernel
            return
    parts.left[name] = "it computes something else than down(act(gate) * up)"


def _same(part: MlpPart, module: nn.Module, x: Tensor, want: Any) -> bool:
    got = part.apply(module, x)
    return got is not None and nearly(got, want)


def _whole(layers: Sequence[QuantLinear], act: str, up_first: bool) -> Callable[..., Any] | None:
    """The MLP as one call of the kernel that all layers have in common."""
    ask = getattr(layers[0].kernel, "bind_gated", None)
    if ask is None or len({binder(layer.kernel) for layer in layers}) != 1:
        return None
    if not all(layer.owns_buffers for layer in layers):
        return None
    ops = [layer.op for layer in layers]
    return ask(ops, act, True) if up_first else ask(ops, act)  # type: ignore[no-any-return]
