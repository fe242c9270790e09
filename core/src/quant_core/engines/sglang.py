"""The SGLang engine: what its entry point calls, in each of its processes.

``--quantization quant_core`` then serves every format that an installed plugin reads. Registering
a name is all that happens here: nothing of SGLang is replaced or hooked, and no plugin of ours is
imported.

Source: SGLang 0.5.23, srt/plugins/__init__.py, srt/layers/quantization/__init__.py,
srt/configs/model_config.py (the first method in the order of the dict that claims a checkpoint
has it; so ours goes first, and claims only what the user says).
"""

from __future__ import annotations

import logging

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
