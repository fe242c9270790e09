"""Scales of a quantized KV cache, which ModelOpt stores beside k_proj and v_proj.

    <attention>.k_proj.k_scale, <attention>.v_proj.v_scale      [] float: amax / 448, or / 127

They are an offer: whether the cache is quantized is decided where the model is served, and logits
of the exported model are those of a float cache. Offered are FP8 and INT8; NVFP4 has run-time
scales under the stored ones, and affine caches (``k_bias``, ``v_bias``) are shifted: not applied.

Source: ModelOpt 0.47 ``torch/export/quant_utils.py`` (get_kv_cache_scaling_factor).
"""

from __future__ import annotations

from quant_core.checkpoint.base import Checkpoint
from quant_core.kv_cache import CacheScheme, cache_schemes
from quant_core.spec import Element
from quant_plugin_nvfp4.config import ModelOptConfig

__all__ = ["schemes"]

_ELEMENTS = {"FP8": Element(name="fp8_e4m3", bits=8, kind="float"), "INT8": Element.int(8)}
_SUFFIXES = {"k": "k_proj.k_scale", "v": "v_proj.v_scale"}
_SHIFTS = (".k_proj.k_bias", ".v_proj.v_bias")


def schemes(config: ModelOptConfig, checkpoint: Checkpoint) -> dict[str, CacheScheme]:
    """Stored path of the attention module -> its scheme; empty if there is none to offer."""
    element = _ELEMENTS.get(config.kv)
    if element is None or any(name.endswith(_SHIFTS) for name in checkpoint.tensors):
        return {}
    return cache_schemes(checkpoint, _SUFFIXES, element=element, default=False, plugin="nvfp4")
