"""Quantized keys and values: which stored scales belong to them, and what the config says.

    kv_cache_scheme, or a config group that targets attention classes
        <attention>.k_scale, .v_scale (.q_scale)   [1]      also .k_zero_point, .v_zero_point int8
        <attention>.k_proj.output_scale, v_proj    [1]      files before compressed-tensors 0.12

Values are rounded as a cache holds them, keys after the rotary embedding; the producer's own
forward does so too. Applied: integers of 8 bits and fp8 with one stored scale per tensor.

Sources: compressed-tensors 0.19.0 ``modeling/attention.py``, ``modeling/kvcache.py``; 0.9.4
``quantization/cache.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, Literal

from quant_core.checkpoint.base import Checkpoint
from quant_core.describe import one_value
from quant_core.kv_cache import CacheForm, CacheScheme, cache_schemes
from quant_core.spec import Element
from quant_plugin_compressed_tensors.args import QuantArgs
from quant_plugin_compressed_tensors.config import CtConfig

__all__ = ["FORM", "KV_LEAVES", "cache_warnings", "describe_cache", "schemes"]

KV_LEAVES = frozenset(
    f"{x}_{what}" for x in "qkv" for what in ("scale", "zero_point", "global_scale")
) | {"kv_scale"}
"""Last name components of the scales of quantized attention and its cache."""

_NEW = {x: f"{x}_scale" for x in "qkv"} | {f"{x}_zero": f"{x}_zero_point" for x in "qkv"}
FORM = CacheForm(
    names={k: v for k, v in _NEW.items() if k[0] in "kv"},
    elements=("fp8_e4m3", "int8"),
    shape=(1,),
    zeros=("int8",),
    default=True,
)
"""What ``kv_cache_scheme`` states: keys and values. Queries would need a config group."""

_OLD = {x: f"{x}_proj.output_scale" for x in "kv"} | {
    f"{x}_zero": f"{x}_proj.output_zero_point" for x in "kv"
}


def describe_cache(schemes: Iterable[CacheScheme]) -> dict[str, Any] | None:
    """``kv_cache_scheme`` of the attention modules; None if there are none.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if they differ.
    """
    kinds = {(o.element.name, o.zero is None) for s in schemes for o in s.operands.values()}
    if not kinds:
        return None
    (element, symmetric) = one_value(kinds, "kv_cache_scheme", plugin="compressed_tensors")
    kind: Literal["int", "float"] = "int" if element == "int8" else "float"
    return QuantArgs(bits=8, kind=kind, symmetric=symmetric).to_json()


def _arguments(config: CtConfig) -> QuantArgs | None:
    if config.kv_cache is not None:
        return config.kv_cache
    return next((g.inputs for g in config.groups.values() if g.is_attention), None)


def _is_applied(args: QuantArgs) -> bool:
    return args.bits == 8 and args.strategy == "tensor" and not args.dynamic


def schemes(config: CtConfig, checkpoint: Checkpoint) -> dict[str, CacheScheme]:
    """Stored path of the attention module -> its scheme; empty if there is none to apply."""
    args = _arguments(config)
    if args is None or not _is_applied(args):
        return {}
    is_int = args.kind == "int"
    element = Element.int(8) if is_int else Element(name="fp8_e4m3", bits=8, kind="float")
    names = _NEW if _stores(checkpoint, _NEW.values()) else _OLD
    used = {k: v for k, v in names.items() if is_int or not k.endswith("_zero")}
    found = cache_schemes(checkpoint, used, element=element, plugin="compressed_tensors")
    single = all(prod(t.shape) == 1 for scheme in found.values() for t in scheme.tensors)
    return found if single else {}


def _stores(checkpoint: Checkpoint, suffixes: Iterable[str]) -> bool:
    ends = tuple(f".{s}" for s in suffixes)
    return any(name.endswith(ends) for name in checkpoint.tensors)


def cache_warnings(config: CtConfig, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the file says of quantized attention and cannot be applied."""
    if schemes(config, checkpoint):
        return ()
    owners = {m for m, leaves in checkpoint.modules.items() if KV_LEAVES & leaves.keys()}
    output = {
        m
        for m, leaves in checkpoint.modules.items()
        if "output_scale" in leaves and m.rpartition(".")[2] in ("k_proj", "v_proj")
    }
    if owners or output:
        count = len(owners) or len(output)
        return (f"KV-cache scales present, not applied ({count} attention modules)",)
    if config.kv_cache is not None and not config.kv_cache.dynamic:
        return (
            f"{config.file}: kv_cache_scheme is {config.kv_cache.label}, but no scales are stored; "
            "the cache stays unquantized",
        )
    attention = [g.name for g in config.groups.values() if g.is_attention]
    if config.kv_cache is not None or attention:
        return (f"{config.file}: quantized attention is not applied; the cache stays unquantized",)
    return ()
