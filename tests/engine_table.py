"""Formats x engines x layer kinds: the data of test_engine_table.py, of the engines' own tests and
of docs/engines/table.md. Imports no torch.

A new engine adds its name to ``ENGINES``, its tests to ``RUNS`` and one cell to each of
``FEATURES``; its tests take their checkpoints from ``served``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["CHECKPOINTS", "ENGINES", "FEATURES", "KINDS", "RUNS", "Holds", "No", "Yes", "served"]

ENGINES = ("transformers", "vllm")

KINDS = ("linear", "lm_head", "embedding", "experts", "stacked experts", "attention")
"""As in format_table.py."""


class Holds(NamedTuple):
    """What of a checkpoint is quantized: its format, and kinds of layers."""

    format: str
    kinds: tuple[str, ...]


_LINEAR = ("linear",)
_TABLES = ("linear", "lm_head", "embedding")
_EXPERTS = ("linear", "experts")
_CACHE = ("linear", "attention")

CHECKPOINTS = {
    "ar-lmhead-w4": Holds("autoround", ("linear", "lm_head")),
    "ar-mixed-bits": Holds("autoround", _LINEAR),
    "ar-moe-w4g64": Holds("autoround", _EXPERTS),
    "bnb-nf4-dq": Holds("bitsandbytes", _LINEAR),
    "ct-kvfp8-w4a16": Holds("compressed_tensors", _CACHE),
    "ct-mixed-fp8attn-w4mlp-nvfp4last": Holds("compressed_tensors", _LINEAR),
    "ct-moe-w4a16-g128": Holds("compressed_tensors", _EXPERTS),
    "ct-nvfp4": Holds("compressed_tensors", _LINEAR),
    "ct-w4a16-awq-asym": Holds("compressed_tensors", _LINEAR),
    "ct-w8a8-int8-dynamic-gptq": Holds("compressed_tensors", _LINEAR),
    "gguf-llama-iq3_s": Holds("gguf", _TABLES),
    "gguf-llama-q4_k_m": Holds("gguf", _TABLES),
    "gguf-moe-q4_k_m": Holds("gguf", (*_TABLES, "stacked experts")),
    "gptqmodel-4bit-g128-asym-descact": Holds("gptq", _LINEAR),
    "gptqmodel-4bit-g32-descact-sym": Holds("gptq", _LINEAR),
    "gptqmodel-awq-gemm-g128": Holds("awq", _LINEAR),
    "gptqmodel-dynamic-4-8bit-skip": Holds("gptq", _LINEAR),
    "hf-fp8-block128": Holds("fp8", _LINEAR),
    "hf-fp8-block128-moe": Holds("fp8", _EXPERTS),
    "hf-gptoss-mxfp4": Holds("mxfp4", ("stacked experts",)),
    "hqq-4bit-g64": Holds("hqq", _LINEAR),
    "modelopt-fp8-kvfp8": Holds("nvfp4", _CACHE),
    "modelopt-moe-nvfp4": Holds("nvfp4", _EXPERTS),
    "modelopt-nvfp4": Holds("nvfp4", _LINEAR),
    "msmodelslim-moe-w8a8-dynamic": Holds("modelslim_npu", _EXPERTS),
    "msmodelslim-w8a8": Holds("modelslim_npu", _LINEAR),
    "quark-moe-mxfp4": Holds("quark", _EXPERTS),
    "quark-mxfp4": Holds("quark", _LINEAR),
    "torchao-int8wo": Holds("torchao", _LINEAR),
}
"""Folder in tests/fixtures, or in the full set beside the repository -> what it holds."""

_CACHES = ("ct-kvfp8-w4a16", "modelopt-fp8-kvfp8")
_OTHERS = tuple(name for name in CHECKPOINTS if name not in _CACHES)
_HERE = "tests/test_engine_table.py"
_VLLM = "tests/vllm_engine"

RUNS = {
    "transformers": {f"{_HERE}::test_transformers_keeps_every_member_packed": tuple(CHECKPOINTS)},
    "vllm": {
        f"{_VLLM}/test_tokens.py::test_every_checkpoint_gives_the_same_tokens": _OTHERS,
        f"{_VLLM}/test_modes.py::test_cache_scales_of_the_file_reach_the_attention_layers": _CACHES,
    },
}
"""Engine -> test -> checkpoints that it is run on."""


def served(test: str) -> tuple[str, ...]:
    """The checkpoints that a test named ``file::function`` is run on."""
    return next(runs[test] for runs in RUNS.values() if test in runs)


@dataclass(frozen=True, kw_only=True)
class Yes:
    """Supported, and what shows it."""

    test: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class No:
    """Not supported: why, and what shows the refusal ("" = nothing)."""

    why: str
    test: str = ""


_ENGINE = "tests/test_transformers_engine.py"
_MODELS = "tests/test_transformers_models.py"
_DENSE = "test_load_model_equals_dense_model_of_the_dequantized_weights"
_FURTHER = "test_announced_further_layers_and_rotary_tables_are_skipped"
_ALONE = "test_file_alone_gives_the_producers_logits"
_ASIDE = "test_plugin_that_raises_at_import_is_set_aside_and_others_work"
_MAPS = "test_device_map_over_several_devices_is_refused_before_loading"
_TOKENS, _MODES, _FAULTS = (f"{_VLLM}/test_{name}.py" for name in ("tokens", "modes", "faults"))
_ASKS = f"{_VLLM}/test_requests.py"

FEATURES: dict[str, dict[str, Yes | No]] = {
    "unlike members of one fused layer": {
        "transformers": Yes(test=f"{_HERE}::test_transformers_keeps_every_member_packed"),
        "vllm": Yes(test=f"{_MODES}::test_float_and_packed_members_of_one_fused_layer"),
    },
    "latent attention (MLA)": {
        "transformers": Yes(test=f"{_MODELS}::{_DENSE}"),
        "vllm": Yes(
            test=f"{_TOKENS}::test_latent_attention_gives_the_tokens_of_vllm_on_dequantized_weights"
        ),
    },
    "container without config.json": {
        "transformers": Yes(test=f"tests/test_config_from_container.py::{_ALONE}"),
        "vllm": Yes(test=f"{_TOKENS}::test_container_without_config_gives_the_same_tokens"),
    },
    "a single file given as the model": {
        "transformers": Yes(test=f"tests/test_config_from_container.py::{_ALONE}"),
        "vllm": No(
            why="vLLM reads it as config.json; give its folder",
            test=f"{_ASKS}::test_single_file_is_refused_by_vllm_and_its_folder_is_served",
        ),
    },
    "online quantization": {
        "transformers": Yes(test="tests/test_online.py::test_tiny_models"),
        "vllm": Yes(test=f"{_TOKENS}::test_online_quantization_of_a_float_model"),
    },
    "dropped tensor stops the load": {
        "transformers": Yes(
            test=f"{_ENGINE}::test_dropping_any_tensor_of_a_real_checkpoint_raises_and_names_it"
        ),
        "vllm": Yes(test=f"{_FAULTS}::test_dropped_tensor_stops_the_start"),
    },
    "broken plugin of somebody else is set aside": {
        "transformers": Yes(test=f"core/tests/test_registry.py::{_ASIDE}"),
        "vllm": Yes(
            test=f"{_FAULTS}::test_broken_plugin_of_somebody_else_does_not_stop_the_engine"
        ),
    },
    "taking over the engine's own formats": {
        "transformers": Yes(
            test=f"{_ENGINE}::test_installed_from_pretrained_gives_the_same_model",
            note="by `install()`",
        ),
        "vllm": Yes(test=f"{_ASKS}::test_listed_method_is_taken_over", note="on request"),
    },
    "compiled graphs": {
        "transformers": Yes(test=f"{_ENGINE}::test_compiled_forward_is_one_graph_and_equal"),
        "vllm": Yes(test=f"{_MODES}::test_own_processes_and_compiled_gives_the_same_tokens"),
    },
    "tensor parallelism": {
        "transformers": No(
            why="use a serving engine", test=f"core/tests/engines/test_transformers.py::{_MAPS}"
        ),
        "vllm": Yes(test=f"{_MODES}::test_two_ranks_give_the_same_tokens"),
    },
    "expert parallelism": {
        "transformers": No(
            why="use a serving engine", test=f"core/tests/engines/test_transformers.py::{_MAPS}"
        ),
        "vllm": Yes(test=f"{_MODES}::test_two_ranks_give_the_same_tokens"),
    },
    "redundant experts (EPLB)": {
        "transformers": No(why="has no such thing"),
        "vllm": No(
            why="refused by vLLM for methods that do not offer it",
            test=f"{_ASKS}::test_redundant_experts_are_refused",
        ),
    },
    "LoRA on a packed base": {
        "transformers": No(why="not tested"),
        "vllm": Yes(test=f"{_MODES}::test_lora_on_a_packed_base_adds_what_it_says"),
    },
    "weights loaded again, from disk": {
        "transformers": Yes(test=f"{_ENGINE}::test_copy_and_state_dict_round_trip"),
        "vllm": Yes(test=f"{_FAULTS}::test_reload_fills_the_same_storage"),
    },
    "weights loaded again, from memory": {
        "transformers": Yes(test=f"{_ENGINE}::test_copy_and_state_dict_round_trip"),
        "vllm": Yes(
            test=f"{_VLLM}/test_refit.py::test_packed_tensors_are_taken_in_any_order",
            note="safetensors checkpoints",
        ),
    },
    "draft layers (MTP) in the file": {
        "transformers": Yes(test=f"{_MODELS}::{_FURTHER}", note="passed over"),
        "vllm": Yes(
            test=f"{_TOKENS}::test_draft_layers_in_the_file_are_passed_over", note="passed over"
        ),
    },
}
"""What may be asked of an engine -> engine -> whether it is so, and the test."""
