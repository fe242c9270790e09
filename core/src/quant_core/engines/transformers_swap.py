"""Another ``forward`` for one module, which stays what it is: class, names, hooks, pickling.

``swap(module, Mixin)`` makes the module an instance of a class made of ``Mixin`` and its own class,
with the own class' name. ``isinstance``, ``super().forward``, state dicts, hooks on the module,
``copy.deepcopy`` and pickling work as before; ``unswap`` gives the own class back.

``Guard`` says on every call whether a fused ``forward`` may go past the modules below: it may not
once one of them was replaced (an adapter), got a hook, or a ``forward`` of its own (offloading).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.utils.hooks import RemovableHandle

from quant_core.nn import QuantModule
from quant_core.shared import weights_changed, weights_epoch

__all__ = [
    "Guard",
    "Swapped",
    "graph_wanted",
    "heard_globally",
    "identified",
    "original",
    "swap",
    "unswap",
    "untouched",
]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


class Swapped:
    """Base of the mixins."""

    _swapped: tuple[type, type]  # the mixin and the module's own class

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            weights_changed()
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The made class has no name to pickle by; its two parents have."""
        parts: Any = super().__reduce_ex__(2)
        return (_blank, self._swapped, *parts[2:])


@functools.cache
def _made(parents: tuple[Any, Any]) -> Any:
    base = parents[1]
    names = {n: getattr(base, n) for n in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, parents, {**names, "_swapped": parents})


def _blank(mixin: type, base: type) -> Any:
    made = _made((mixin, base))
    return made.__new__(made)


def original(module: nn.Module) -> type[nn.Module]:
    """The module's own class."""
    return module._swapped[1] if isinstance(module, Swapped) else type(module)


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Let ``mixin.forward`` run; ``super().forward`` there is the module's own."""
    module.__class__ = _made((mixin, original(module)))


def unswap(module: nn.Module) -> None:
    """The module's own class again."""
    module.__class__ = original(module)


def untouched(module: nn.Module) -> bool:
    """Nobody listens to the module's calls, and its ``forward`` is that of its class."""
    held = module.__dict__
    return (
        "forward" not in held
        and not any(held.get(name) for name in _HOOKS)
        and held.get("_compiled_call_impl") is None
    )


def heard_globally() -> bool:
    """Whether somebody listens to the calls of all modules."""
    return any(getattr(_module, name) for name in _GLOBAL)


class Guard:
    """Whether the modules below a fused one are those that were fused, and nobody listens to them.

    Every hook of torch gets a number from ``RemovableHandle.next_id``, and our modules count a new
    ``forward`` by ``weights_changed``. While both stand still only identities are compared: a
    decode step finds the caches full of weights, and every object it looks at costs.
    """

    __slots__ = ("_clean", "_held", "_others", "_seen")
    _clean: bool
    _held: tuple[Any, ...]
    _others: tuple[dict[str, Any], ...]
    _seen: tuple[int, int]

    def __init__(self, modules: Sequence[tuple[nn.Module, str]]) -> None:
        """``modules``: (parent, name) of each module that is gone past."""
        self.__setstate__(tuple((p._modules, name, p._modules[name]) for p, name in modules))

    def holds(self, top: nn.Module) -> bool:
        """To be asked on every call; ``top``, above all others, is gone past as well."""
        for modules, name, child in self._held:
            if modules.get(name) is not child:
                return False
        for held in self._others:
            if "forward" in held:
                return False
        now = RemovableHandle.next_id, weights_epoch()
        if now != self._seen or not self._clean:
            self._seen = now
            below = all(untouched(child) for _, _, child in self._held)
            self._clean = below and untouched(top) and not heard_globally()
        return self._clean

    def __getstate__(self) -> Any:
        return self._held

    def __setstate__(self, held: Any) -> None:
        self._held, self._seen, self._clean = held, (-1, -1), False
        own = Swapped | QuantModule
        self._others = tuple(c.__dict__ for _, _, c in held if not isinstance(c, own))


def graph_wanted() -> bool:
    """Whether a call must leave a graph behind, or is being compiled into one."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def identified(identity: int) -> Any:
    """The object whose ``id`` is ``identity``, for functions that Dynamo calls while it traces.

    Whoever is traced holds the object, so it is alive. An integer is what every torch passes on to
    a function with a constant result, and ``id`` is what it guards; 2.11 refuses objects there.
    """
    return ctypes.cast(identity, ctypes.py_object).value
