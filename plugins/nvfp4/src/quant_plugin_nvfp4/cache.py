"""Scales of a quantized KV cache, which ModelOpt stores beside k_proj and v_proj.

    <attention>.k_proj.k_scale, <attention>.v_proj.v_scale      [] float: amax / 448, or / 127

They are an offer: whether the cache is quantized is decided where the model is served, and logits
of the exported model are those of a float cache. Offered are FP8 and INT8; NVFP4 has run-time
scales under the stored ones, and affine caches (``k_bias``, ``v_bias``) are shifted: not applied.

Source: ModelOpt 0.47 ``torch/export/quant_utils.py`` (get_kv_cache_scaling_factor).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quant_core.checkpoint.base import Checkpoint
from quant_core.describe import one_value
from quant_core.kv_cache import CacheForm, CacheScheme, cache_schemes
from quant_core.spec import Element
from quant_plugin_nvfp4.config import ModelOptConfig

__all__ = ["FORM", "cache_block", "schemes"]

_ELEMENTS = {"FP8": Element(name="fp8_e4m3", bits=8, kind="float"), "INT8": Element.int(8)}
_SUFFIXES = {"k": "k_proj.k_scale", "v": "v_proj.v_scale"}
FORM = CacheForm(names=_SUFFIXES, elements=tuple(e.name for e in _ELEMENTS.values()))
_SHIFTS = (".k_proj.k_bias", ".v_proj.v_bias")


def cache_block(schemes: Iterable[CacheScheme]) -> dict[str, Any]:
    """``kv_cache_scheme`` of the attention modules.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if they differ.
    """
    kinds = {o.element.kind for s in schemes for o in s.operands.values()}
    kind = one_value(kinds, "kv_cache_scheme", plugin="nvfp4")
    return {"dynamic": False, "num_bits": 8, "type": kind}


def schemes(config: ModelOptConfig, checkpoint: Checkpoint) -> dict[str, CacheScheme]:
    """Stored path of the attention module -> its scheme; empty if there is none to offer."""
    element = _ELEMENTS.get(config.kv)
    if element is None or any(name.endswith(_SHIFTS) for name in checkpoint.tensors):
        return {}
    return cache_schemes(checkpoint, _SUFFIXES, element=element, default=False, plugin="nvfp4")
