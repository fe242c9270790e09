"""When a model's norms, MLPs and decoder layers are proved: on a CPU by its first own inference.

Proving runs modules on random input (``transformers_parts``, ``transformers_block``) and reads
their weights for it, which a load from mapped files would not do at all. So on a CPU a load only
marks the candidates. The first of them that is called without gradients, or copied or pickled, has
all of the model proved, once. Elsewhere that is done while loading: a first step may be recorded as
a graph.

Until then a marked module runs its own code, as it does under gradients. A graph that is traced
before holds that code too, and has the model proved as soon as it is done: torch's guards, which
look at classes, see that, and the next call is traced again.
While somebody listens to a module (hooks, a ``forward`` of its own) nothing is proved: random input
is none of their business. ``parts_of(model)`` proves first and then tells.
"""

from __future__ import annotations

import copyreg
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quant_core.engines.transformers_layers import attach_blocks
from quant_core.engines.transformers_mlp import could_be_mlp
from quant_core.engines.transformers_parts import (
    attach_norms_and_mlps,
    could_be_norm,
    prove_later,
)
from quant_core.engines.transformers_swap import (
    Swapped,
    graph_wanted,
    heard_globally,
    identified,
    original,
    swap,
    unswap,
    untouched,
)
from quant_core.kernels.device import device_key
from quant_core.registry import Registry
from quant_core.walk import modules_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach_parts"]

_PATIENCE = 1.0  # seconds after which modules that were listened to are looked at again


def attach_parts(
    model: PreTrainedModel,
    registry: Registry,
    *,
    dtype: torch.dtype,
    device: str,
    kernels: str | Sequence[str] | None = None,
) -> None:
    """Let kernels compute norms, MLPs and decoder layers where they prove to compute the same.

    Args:
        dtype, device: of activations.
        kernels: as in ``choose``; what ``QUANT_KERNELS`` says counts as of now.
    """
    kernels = kernels if kernels is not None else os.environ.get("QUANT_KERNELS") or None
    later = _Later(model, registry, dtype, device, kernels)
    if device_key(device)[0] != "cpu":
        later.prove()
        return
    for module in _candidates(model):
        later.mark(module)
    if later.marked:
        prove_later(model, later.prove)


def _candidates(model: nn.Module) -> list[nn.Module]:
    """Every module that proving may change: norms, MLPs, and what has two norms and an MLP."""
    modules = modules_of(model)
    found = [m for m in modules if could_be_norm(m) or could_be_mlp(m)]
    known = {id(m) for m in found}
    for module in modules:
        if len(module._modules) < 4:
            continue
        held = [id(c) in known for c in module._modules.values()]
        if sum(held) >= 3 and id(module) not in known:
            found.append(module)
    return found


class _Later:
    """What a marked module needs to have its model proved. Holds nothing alive."""

    def __init__(
        self,
        model: PreTrainedModel,
        registry: Registry,
        dtype: torch.dtype,
        device: str,
        kernels: str | Sequence[str] | None,
    ) -> None:
        self._model = weakref.ref(model)
        self._registry = registry
        self._asked: dict[str, Any] = {"dtype": dtype, "device": device, "kernels": kernels}
        self.marked: list[weakref.ref[nn.Module]] = []
        self._lock = threading.RLock()
        self._done = False
        self._not_before = 0.0

    def mark(self, module: nn.Module) -> None:
        module.__dict__["_quant_later"] = self
        swap(module, _Marked)
        self.marked.append(weakref.ref(module))

    def prove(self) -> bool:
        """Once, while nobody would hear of it; other threads that ask wait for the end."""
        with self._lock:
            if self._done:
                return True
            if time.monotonic() < self._not_before:
                return False
            marked = [m for ref in self.marked if (m := ref()) is not None]
            if heard_globally() or not all(untouched(d) for m in marked for d in m.modules()):
                self._not_before = time.monotonic() + _PATIENCE
                return False
            self._done = True
            for module in marked:
                unswap(module)
                del module._quant_later
            model, device = self._model(), torch.device(self._asked["device"]).type
            if model is None or any(p.device.type != device for p in model.parameters()):
                return True  # taken apart or moved since: it keeps its own code
            with torch.no_grad(), torch.autocast(device, enabled=False):
                parts = attach_norms_and_mlps(model, self._registry, **self._asked)
                attach_blocks(model, parts)
            return True


_asked: list[_Later] = []
"""Who is to prove once the graph that is being traced is done."""


@torch._dynamo.assume_constant_result
def _ask(later_id: int) -> bool:
    """A module must not change its class while it is traced: its model is proved right after."""
    later: _Later = identified(later_id)
    if later not in _asked:
        _asked.append(later)
    known = torch._dynamo.callback.callback_handler.end_callbacks
    if _prove_asked not in known:  # torch._dynamo.reset() forgets it
        known.append(_prove_asked)
    return True


def _prove_asked(*_: object) -> None:
    while _asked:
        _asked.pop().prove()


class _Marked(Swapped):
    _quant_later: _Later

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        later = self.__dict__.get("_quant_later")
        if later is None:  # a bound method that somebody kept since before
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            if not torch.is_grad_enabled() and not self.training:  # type: ignore[attr-defined]
                _ask(id(later))
        elif not graph_wanted() and not self.training and later.prove():  # type: ignore[attr-defined]
            return self.forward(*args, **kwargs)  # of its class as it is now
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy cannot ask for the model it comes from: what is not proved now, is not in it."""
        if self._quant_later.prove():
            return self.__reduce_ex__(protocol)
        parts: Any = super().__reduce_ex__(2)
        state = {k: v for k, v in parts[2].items() if k != "_quant_later"}
        return (copyreg.__newobj__, (original(self),), state)  # type: ignore[attr-defined, arg-type]
