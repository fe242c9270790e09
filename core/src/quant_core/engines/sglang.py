"""The SGLang engine: what its entry point calls, in each of its processes.

``--quantization quant_core`` then serves every format that an installed plugin reads. Registering
names is all that happens here: nothing of SGLang is replaced or hooked, and no plugin of ours is
imported.

    quant_core    the method, and a parser that makes a model's config from a container
    private       the load format that SGLang leaves to others, unless another has taken it

Source: SGLang 0.5.23, srt/plugins/__init__.py, srt/layers/quantization/__init__.py,
srt/configs/model_config.py (the first method in the order of the dict that claims a checkpoint
has it; so ours goes first, and claims only what the user says),
srt/configs/model_config_parser_registry.py, srt/model_loader/loader.py (get_model_loader).
"""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["SUPPORTED", "register"]

SUPPORTED = ("0.5.23", "0.5.24")
"""SGLang versions this engine is tested with: first, and first one too new."""

log = logging.getLogger("quant_core")


def register() -> None:
    """Make the method ``quant_core`` known to SGLang. Idempotent."""
    try:
        _register()
    except Exception as err:  # SGLang of another version may lack anything; it must still start
        log.error(
            "quant_core is not available in this SGLang (tested: >=%s,<%s): %s: %s",
            *SUPPORTED,
            type(err).__name__,
            err,
        )


def _register() -> None:
    from sglang.srt.arg_groups.choices import (
        QUANTIZATION_CHOICES,
        add_quantization_method_choices,
    )
    from sglang.srt.layers import quantization

    from quant_core.engines.sglang_config import METHOD, QuantCoreConfig

    methods = quantization.QUANTIZATION_METHODS
    if METHOD not in methods:
        others = dict(methods)
        methods.clear()  # never rebound: other modules hold this dict
        methods.update({METHOD: QuantCoreConfig} | others)
    quantization.CPU_QUANTIZATION_METHODS.setdefault(METHOD, QuantCoreConfig)
    if METHOD not in QUANTIZATION_CHOICES:
        add_quantization_method_choices([METHOD])
    _register_parser(METHOD)
    _register_loader()


def _register_parser(name: str) -> None:
    from sglang.srt.configs import model_config_parser_registry as parsers

    from quant_core.engines.sglang_parser import QuantCoreConfigParser

    if name not in parsers._MODEL_CONFIG_PARSER_REGISTRY:
        parsers.register_model_config_parser(name)(QuantCoreConfigParser)


class _Lazy(ModuleType):
    """Imports the loader where it is asked for: its import is not small."""

    def __getattr__(self, name: str) -> Any:
        if name != "PrivateModelLoader":
            raise AttributeError(name)
        from quant_core.engines.sglang_loader import PrivateModelLoader

        return PrivateModelLoader


def _register_loader() -> None:
    package, module = "sglang.private", "sglang.private.private_model_loader"
    if package in sys.modules or find_spec(package) is not None:
        log.debug("%s is there already: --load-format private is not quant_core's", package)
        return
    for name in (package, module):
        sys.modules[name] = lazy = _Lazy(name)
        lazy.__spec__ = ModuleSpec(name, None, is_package=name == package)
