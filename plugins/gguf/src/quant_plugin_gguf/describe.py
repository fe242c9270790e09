"""``config.json`` in llama.cpp's words, for the architectures whose every setting is known here.

A setting that llama.cpp would silently treat otherwise (scaled rotary positions, sliding windows,
another activation) is refused, not dropped.

Source: llama.cpp, convert_hf_to_gguf.py; gguf 0.19.0, constants.py (Keys).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quant_core.errors import LayoutError, printable
from quant_plugin_gguf.kv import Pairs, encode
from quant_plugin_gguf.names import ARCHITECTURES, Architecture
from quant_plugin_gguf.vocab import vocabulary

if TYPE_CHECKING:
    from quant_core.convert.target import Target

__all__ = ["describe"]

_MODEL_TYPES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
_MOST = 3.4e38  # just below the largest float32
_EXPERTS = {
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}


def _refuse(key: str, found: Any, expected: str) -> LayoutError:
    return LayoutError(
        f"config.json: {key} is {printable(repr(found), 80)}, expected {expected} to write a GGUF "
        "file. Make a GGUF file of the original model with llama.cpp's converter and convert that.",
        code="Q-LAYOUT-REPRESENT",
        tensor=key,
        expected=expected,
        actual=found,
        plugin="gguf",
    )


def _count(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int and 0 < value < 1 << 31:
            return value
    raise _refuse(keys[0], config.get(keys[0]), "a positive integer of 31 bits")


def _given(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The key and its value, unless that is null."""
    return {} if config.get(key) is None else {key: config[key]}


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < _MOST:
        raise _refuse(key, value, "a positive number that float32 holds")
    return float(value)


def _rope(config: Mapping[str, Any]) -> float:
    """The base frequency; positions that are scaled are refused."""
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = block.get("rope_type", block.get("type", "default"))
    if kind != "default":
        raise _refuse("rope_parameters", kind, "rope_type 'default'")
    partial = block.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (1, None):
        raise _refuse("partial_rotary_factor", partial, "1")
    return _number({"rope_theta": 10000.0, **config, **block}, "rope_theta")


def _check(config: Mapping[str, Any], context: int) -> None:
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", True)
    for key, found, good, expected in (
        ("hidden_act", config.get("hidden_act", "silu"), ("silu",), "'silu'"),
        ("decoder_sparse_step", config.get("decoder_sparse_step", 1), (1,), "1"),
        ("mlp_only_layers", list(config.get("mlp_only_layers") or ()), ([],), "no layers"),
        ("norm_topk_prob", config.get("norm_topk_prob", True), (True,), "true"),
    ):
        if found not in good:
            raise _refuse(key, found, expected)
    if window and used and window < context:
        raise _refuse("sliding_window", window, "none")


def describe(target: Target) -> tuple[Pairs, Architecture, Callable[[str], int]]:
    """Metadata pairs, the architecture, and the heads whose rows it reorders by stored name.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for a model or tokenizer that cannot be described.
    """
    config = target.config
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise _refuse("model_type", kind, f"one of {', '.join(_MODEL_TYPES)}")
    arch = ARCHITECTURES[_MODEL_TYPES[kind]]
    context = _count(config, "max_position_embeddings")
    _check(config, context)
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    kv_heads = _count({"num_key_value_heads": heads, **config}, "num_key_value_heads")
    head_dim = _count({"head_dim": hidden // heads, **_given(config, "head_dim")}, "head_dim")
    counts = {
        "context_length": context,
        "embedding_length": hidden,
        "block_count": _count(config, "num_hidden_layers"),
        "feed_forward_length": _count(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": _count(config, "vocab_size"),
    }
    if arch.name.endswith("moe"):
        counts |= {key: _count(config, *names) for key, names in _EXPERTS.items()}
    name = str(config.get("_name_or_path") or target.source.checkpoint.folder.name)
    pairs = [
        encode("general.architecture", "string", arch.name),
        encode("general.name", "string", name.rstrip("/").rpartition("/")[2]),
        encode("general.quantization_version", "u32", 2),
        *(encode(f"{arch.name}.{key}", "u32", value) for key, value in counts.items()),
        encode(
            f"{arch.name}.attention.layer_norm_rms_epsilon", "f32", _number(config, "rms_norm_eps")
        ),
        encode(f"{arch.name}.rope.freq_base", "f32", _rope(config)),
        *vocabulary(target),
    ]

    def permuted(stored: str) -> int:
        which = arch.permuted_rows(stored.rpartition(".")[0])
        return {"q": heads, "k": kv_heads}.get(which, 0)

    return pairs, arch, permuted
