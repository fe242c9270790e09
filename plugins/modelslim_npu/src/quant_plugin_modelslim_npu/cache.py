"""Scales of an int8 KV cache (C8), stored beside k_proj and v_proj, one per feature.

    <attention>.k_proj.kv_cache_scale, kv_cache_offset    float [heads * head_dim], v_proj likewise

    q = clamp(round(k / scale + offset), -128, 127)       k^ = (q - offset) * scale

An offer to the serving engine: the tool's own numbers are those of a float cache. Scales of
quantized attention (``fa_q``, ``fa_k``, ``fa_v``) are not applied.

Keys are meant after the rotary embedding: scales of the two features that it rotates into each
other are nearly equal in a real file, and those of k_proj's outputs are not.

Source: ModelSlim 26.1, files of its ``dynamic_cache`` processor.
"""

from __future__ import annotations

from quant_core.checkpoint.base import Checkpoint
from quant_core.kv_cache import CacheForm, CacheScheme, cache_schemes
from quant_core.spec import Element

__all__ = ["FORM", "schemes"]

_SUFFIXES = {
    **{x: f"{x}_proj.kv_cache_scale" for x in "kv"},
    **{f"{x}_zero": f"{x}_proj.kv_cache_offset" for x in "kv"},
}

FORM = CacheForm(
    names=_SUFFIXES, elements=("int8",), grain=(0, 1), zeros=("float32", "bfloat16", "float16")
)


def schemes(checkpoint: Checkpoint) -> dict[str, CacheScheme]:
    """Stored path of the attention module -> its scheme; empty if there is none to offer."""
    return cache_schemes(
        checkpoint, _SUFFIXES, element=Element.int(8), default=False, plugin="modelslim_npu"
    )
