"""Another ``forward`` for one module, which stays what it is: class, names, hooks, pickling.

``swap(module, Mixin)`` makes the module an instance of a class made of ``Mixin`` and its own class,
with the own class' name. ``isinstance``, ``super().forward``, state dicts, hooks on the module,
``copy.deepcopy`` and pickling work as before; ``unswap`` gives the own class back.

``Guard`` says on every call whether a fused ``forward`` may go past the modules below: it may not
once one of them was replaced (an adapter), got a hook, or a ``forward`` of its own (offloading).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module
from torch.utils.hooks import RemovableHandle

__all__ = ["Guard", "Swapped", "graph_wanted", "original", "swap", "unswap", "untouched"]

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


class Guard:
    """Whether the modules below a fused one are those that were fused, and nobody listens to them.

    Every hook of torch gets a number from ``RemovableHandle.next_id``; while it stands still,
    no hook was added, and only the modules' identities are compared.
    """

    __slots__ = ("_clean", "_held", "_seen")

    def __init__(self, modules: Sequence[tuple[nn.Module, str]]) -> None:
        """``modules``: (parent, name) of each module that is gone past."""
        self._held = tuple(
            (parent._modules, name, parent._modules[name]) for parent, name in modules
        )
        self._seen, self._clean = -1, False

    def holds(self, top: nn.Module | None = None) -> bool:
        """To be asked on every call; ``top``: a module whose own hooks would be gone past too."""
        if top is not None and not untouched(top):
            return False
        for modules, name, child in self._held:
            if modules.get(name) is not child or "forward" in child.__dict__:  # type: ignore[union-attr]
                return False
        if self._seen != RemovableHandle.next_id or not self._clean:
            self._seen = RemovableHandle.next_id
            below = all(untouched(child) for _, _, child in self._held if child is not None)
            self._clean = below and not any(getattr(_module, name) for name in _GLOBAL)
        return self._clean

    def __getstate__(self) -> Any:
        return self._held

    def __setstate__(self, held: Any) -> None:
        self._held, self._seen, self._clean = held, -1, False


def graph_wanted() -> bool:
    """Whether a call must leave a graph behind, or is being compiled into one."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()
