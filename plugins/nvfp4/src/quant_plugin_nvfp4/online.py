"""What ModelOpt's format holds of float weights without calibration, while they are loaded.

    nvfp4       W4A16_NVFP4: fp4 in 16s, fp8 scales under one float32; activations stay floats
    mxfp8       MXFP8: fp8 in 32s, a power of two each; activations the same at run time
    fp8         FP8_PER_CHANNEL_PER_TOKEN
    fp8_block   FP8_PB_WO: a scale per 128 x 128; activations stay floats

Algorithms with a stored input scale need measured activations and are not offered. Imports no
torch; the rounding is ``ModelOptScheme.quantize``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from quant_core.online import OnlineScheme
from quant_core.spec import LayerDesc, Unquantized
from quant_plugin_nvfp4.algos import ALGOS
from quant_plugin_nvfp4.scheme import ModelOptScheme, scheme_of

__all__ = ["ONLINE"]


def _make(name: str, layer: LayerDesc, options: Mapping[str, Any]) -> ModelOptScheme | Unquantized:
    algo, n, k = ALGOS[name], layer.out_features, layer.in_features
    assert n is not None
    assert k is not None
    size = algo.group_size
    if size and algo.weight != "fp8_block" and k % size:
        return Unquantized(rule=f"in_features is no multiple of {size}")
    return scheme_of(algo, (n, k))


def _offer(algo: str, summary: str) -> OnlineScheme:
    return OnlineScheme(summary=summary, make=functools.partial(_make, algo))


ONLINE: Mapping[str, OnlineScheme] = {
    "nvfp4": _offer("W4A16_NVFP4", "NVFP4 weights; activations stay floats"),
    "mxfp8": _offer("MXFP8", "MXFP8 weights and activations"),
    "fp8": _offer("FP8_PER_CHANNEL_PER_TOKEN", "fp8, a scale per row; activations fp8 per token"),
    "fp8_block": _offer("FP8_PB_WO", "fp8, a scale per 128 x 128; activations stay floats"),
}
