"""All modules of a model, for code that visits them several times while it loads.

In the order of ``Module.named_modules``, whose generators, one inside the other, take six times as
long: 0.6 ms for 400 modules.
"""

from __future__ import annotations

from torch import nn

__all__ = ["modules_of", "named_modules_of"]


def modules_of(top: nn.Module) -> list[nn.Module]:
    """``top`` and all modules below it, each once."""
    found: dict[int, nn.Module] = {}
    todo: list[nn.Module | None] = [top]
    while todo:
        module = todo.pop()
        if module is None or id(module) in found:
            continue
        found[id(module)] = module
        if module._modules:
            todo.extend(reversed(module._modules.values()))
    return list(found.values())


def named_modules_of(top: nn.Module) -> dict[str, nn.Module]:
    """The same by name; a module in two places has its first one's."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module | None]] = [("", top)]
    while todo:
        name, module = todo.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        if module._modules:
            prefix = f"{name}." if name else ""
            todo.extend((prefix + n, m) for n, m in reversed(module._modules.items()))
    return found
