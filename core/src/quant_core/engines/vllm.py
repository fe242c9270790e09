"""The vLLM engine: what its entry point calls, in each of its processes.

``--quantization quant_core`` then serves every format that an installed plugin reads. Registering
names is all that happens here: nothing of vLLM is replaced, and neither the plugins nor torch are
imported by this module.

Source: vLLM 0.32.0, plugins/__init__.py (an exception of the called function would stop vLLM).
"""

from __future__ import annotations

import logging

__all__ = ["SUPPORTED", "register"]

SUPPORTED = ("0.32", "0.33")
"""vLLM versions this engine is tested with: first, and first one too new."""

log = logging.getLogger("quant_core")


def register() -> None:
    """Make the method and config format ``quant_core`` known to vLLM. Idempotent."""
    try:
        _register()
    except Exception as err:  # vLLM of another version may lack anything; it must still start
        log.error(
            "quant_core is not available in this vLLM (tested: >=%s,<%s): %s: %s",
            *SUPPORTED,
            type(err).__name__,
            err,
        )


def _register() -> None:
    from vllm.model_executor.layers import quantization

    from quant_core.engines.vllm_config import METHOD, QuantCoreConfig

    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    from vllm.transformers_utils.config import register_config_parser

    from quant_core.engines.vllm_parser import QuantCoreConfigParser

    # the load format is registered by the config, where it is used: its import is not small
    register_config_parser(METHOD)(QuantCoreConfigParser)
    quantization.register_quantization_config(METHOD)(QuantCoreConfig)
