"""quant-core: checkpoint formats, kernels and engines that meet in one canonical form.

Importing this package loads neither torch nor any plugin; names are imported on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant_core.hookspecs import hookimpl as hookimpl

__version__ = "0.1.0"

_EXPORTS = {
    "hookimpl": "quant_core.hookspecs",
    "open_checkpoint": "quant_core.checkpoint.open",
    "plan": "quant_core.plan",
    "load_tensor": "quant_core.load",
    "convert": "quant_core.convert",
    "diff": "quant_core.convert",
    "load_model": "quant_core.engines.transformers",
    "install": "quant_core.engines.transformers",
    "as_config": "quant_core.engines.transformers",
    "registry": "quant_core.registry",
    "QuantError": "quant_core.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Importing a submodule binds it in its package; here it must not hide a function.

    ``quant_core.plan`` is the function, whoever has imported the module of that name before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
