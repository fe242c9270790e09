"""Formats x engines x layer kinds: the data of test_engine_table.py, of the engines' own tests and
of docs/engines/table.md. Imports no torch.

A new engine adds its name to ``ENGINES``, its tests to ``RUNS`` and one cell to each of
``FEATURES``; its tests take their checkpoints from ``served``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "CHECKPOINTS",
    "ENGINES",
    "FEATURES",
    "KINDS",
    "REFUSED",
    "RUNS",
    "Holds",
    "No",
    "Yes",
    "refused",
    "served",
]

ENGINES = ("transformers", "vllm", "sglang")

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
_VLLM, _SGLANG = "tests/vllm_engine", "tests/sglang_engine"
_GGUF = tuple(name for name, holds in CHECKPOINTS.items() if holds.format == "gguf")
_ALONE_RUN = ("hf-gptoss-mxfp4",)  # its attention needs SGLang's kernels: the experts alone
_CLAMPED = "test_clamped_experts_stored_as_one_tensor_compute_the_same"
_FED = f"{_SGLANG}/test_logits.py::test_container_is_loaded_by_our_own_loader"

RUNS = {
    "transformers": {f"{_HERE}::test_transformers_keeps_every_member_packed": tuple(CHECKPOINTS)},
    "vllm": {
        f"{_VLLM}/test_tokens.py::test_every_checkpoint_gives_the_same_tokens": _OTHERS,
        f"{_VLLM}/test_modes.py::test_cache_scales_of_the_file_reach_the_attention_layers": _CACHES,
    },
    "sglang": {
        f"{_SGLANG}/test_logits.py::test_every_checkpoint_gives_the_same_logits": tuple(
            name for name in _OTHERS if name not in (*_GGUF, *_ALONE_RUN)
        ),
        _FED: _GGUF,
        f"{_SGLANG}/test_logits.py::{_CLAMPED}": _ALONE_RUN,
        f"{_SGLANG}/test_logits.py::test_cache_scales_are_those_of_the_file": _CACHES,
    },
}
"""Engine -> test -> checkpoints that it is run on."""

REFUSED: dict[str, dict[str, tuple[str, ...]]] = {}
"""Engine -> test that shows the refusal -> checkpoints that it does not serve."""


def served(test: str) -> tuple[str, ...]:
    """The checkpoints that a test named ``file::function`` is run on."""
    return next(runs[test] for runs in RUNS.values() if test in runs)


def refused(engine: str) -> tuple[str, ...]:
    """The checkpoints that an engine does not serve."""
    return tuple(name for names in REFUSED.get(engine, {}).values() for name in names)


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
_START, _LOGITS = f"{_SGLANG}/test_start.py", f"{_SGLANG}/test_logits.py"
_RANKS, _AGAIN = f"{_SGLANG}/test_parallel.py", f"{_SGLANG}/test_reload.py"
_IN_TURN = "ranks one after the other"

FEATURES: dict[str, dict[str, Yes | No]] = {
    "unlike members of one fused layer": {
        "transformers": Yes(test=f"{_HERE}::test_transformers_keeps_every_member_packed"),
        "vllm": Yes(test=f"{_MODES}::test_float_and_packed_members_of_one_fused_layer"),
        "sglang": Yes(test=f"{_LOGITS}::test_every_checkpoint_gives_the_same_logits"),
    },
    "latent attention (MLA)": {
        "transformers": Yes(test=f"{_MODELS}::{_DENSE}"),
        "vllm": Yes(
            test=f"{_TOKENS}::test_latent_attention_gives_the_tokens_of_vllm_on_dequantized_weights"
        ),
        "sglang": Yes(
            test=f"{_START}::test_packed_latent_attention_is_loaded_by_our_own_loader",
            note="loaded, not run",
        ),
    },
    "container without config.json": {
        "transformers": Yes(test=f"tests/test_config_from_container.py::{_ALONE}"),
        "vllm": Yes(test=f"{_TOKENS}::test_container_without_config_gives_the_same_tokens"),
        "sglang": Yes(test=f"{_LOGITS}::test_container_without_config_gives_the_same_logits"),
    },
    "a single file given as the model": {
        "transformers": Yes(test=f"tests/test_config_from_container.py::{_ALONE}"),
        "vllm": No(
            why="vLLM reads it as config.json; give its folder",
            test=f"{_ASKS}::test_single_file_is_refused_by_vllm_and_its_folder_is_served",
        ),
        "sglang": No(
            why="SGLang takes it for one of its own; give its folder",
            test=f"{_START}::test_single_file_is_refused_and_its_folder_is_served",
        ),
    },
    "online quantization": {
        "transformers": Yes(test="tests/test_online.py::test_tiny_models"),
        "vllm": Yes(test=f"{_TOKENS}::test_online_quantization_of_a_float_model"),
        "sglang": Yes(test=f"{_LOGITS}::test_online_quantization_gives_the_same_logits"),
    },
    "dropped tensor stops the load": {
        "transformers": Yes(
            test=f"{_ENGINE}::test_dropping_any_tensor_of_a_real_checkpoint_raises_and_names_it"
        ),
        "vllm": Yes(test=f"{_FAULTS}::test_dropped_tensor_stops_the_start"),
        "sglang": Yes(test=f"{_START}::test_dropped_tensor_stops_the_start"),
    },
    "broken plugin of somebody else is set aside": {
        "transformers": Yes(test=f"core/tests/test_registry.py::{_ASIDE}"),
        "vllm": Yes(
            test=f"{_FAULTS}::test_broken_plugin_of_somebody_else_does_not_stop_the_engine"
        ),
        "sglang": Yes(test=f"core/tests/test_registry.py::{_ASIDE}", note="in core"),
    },
    "taking over the engine's own formats": {
        "transformers": Yes(
            test=f"{_ENGINE}::test_installed_from_pretrained_gives_the_same_model",
            note="by `install()`",
        ),
        "vllm": Yes(test=f"{_ASKS}::test_listed_method_is_taken_over", note="on request"),
        "sglang": Yes(test=f"{_START}::test_method_is_ours_only_on_request", note="on request"),
    },
    "compiled graphs": {
        "transformers": Yes(test=f"{_ENGINE}::test_compiled_forward_is_one_graph_and_equal"),
        "vllm": Yes(test=f"{_MODES}::test_own_processes_and_compiled_gives_the_same_tokens"),
        "sglang": No(why="not tested"),
    },
    "tensor parallelism": {
        "transformers": No(
            why="use a serving engine", test=f"core/tests/engines/test_transformers.py::{_MAPS}"
        ),
        "vllm": Yes(test=f"{_MODES}::test_two_ranks_give_the_same_tokens"),
        "sglang": Yes(test=f"{_RANKS}::test_parts_of_ranks_are_parts_of_the_whole", note=_IN_TURN),
    },
    "expert parallelism": {
        "transformers": No(
            why="use a serving engine", test=f"core/tests/engines/test_transformers.py::{_MAPS}"
        ),
        "vllm": Yes(test=f"{_MODES}::test_two_ranks_give_the_same_tokens"),
        "sglang": Yes(test=f"{_RANKS}::test_expert_parallel_ranks_add_up", note=_IN_TURN),
    },
    "redundant experts (EPLB)": {
        "transformers": No(why="has no such thing"),
        "vllm": No(
            why="refused by vLLM for methods that do not offer it",
            test=f"{_ASKS}::test_redundant_experts_are_refused",
        ),
        "sglang": No(why="refused", test=f"{_START}::test_balanced_experts_are_refused"),
    },
    "LoRA on a packed base": {
        "transformers": No(why="not tested"),
        "vllm": Yes(test=f"{_MODES}::test_lora_on_a_packed_base_adds_what_it_says"),
        "sglang": Yes(
            test=f"{_LOGITS}::test_lora_on_a_packed_base_adds_what_it_says",
            note="on linear layers; refused on experts",
        ),
    },
    "weights loaded again, from disk": {
        "transformers": Yes(test=f"{_ENGINE}::test_copy_and_state_dict_round_trip"),
        "vllm": Yes(test=f"{_FAULTS}::test_reload_fills_the_same_storage"),
        "sglang": Yes(test=f"{_AGAIN}::test_new_weights_take_the_place_of_the_old"),
    },
    "weights loaded again, from memory": {
        "transformers": Yes(test=f"{_ENGINE}::test_copy_and_state_dict_round_trip"),
        "vllm": Yes(
            test=f"{_VLLM}/test_refit.py::test_packed_tensors_are_taken_in_any_order",
            note="safetensors checkpoints",
        ),
        "sglang": Yes(test=f"{_AGAIN}::test_new_weights_take_the_place_of_the_old"),
    },
    "draft layers (MTP) in the file": {
        "transformers": Yes(test=f"{_MODELS}::{_FURTHER}", note="passed over"),
        "vllm": Yes(
            test=f"{_TOKENS}::test_packed_draft_layers_propose_tokens",
            note="as a draft, or passed over",
        ),
        "sglang": Yes(
            test=f"{_START}::test_layers_beyond_those_of_the_model_are_passed_over",
            note="passed over",
        ),
    },
}
"""What may be asked of an engine -> engine -> whether it is so, and the test."""
