"""New weights from memory, in place, as trainers send them: supported, or refused by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_serving import (
    addresses,
    first_difference,
    float_llama,
    greedy,
    model_of,
    prompts,
    reference,
    served,
    without_notes,
)

from checkpoint_sets import FIXTURES
from quant_core.errors import LayoutError
from tiny_models import make_tiny

ORDER, ACTIVATIONS = 5e-5, 3e-2  # as in test_tokens.py
ACT_ORDER = FIXTURES / "gptqmodel-4bit-g128-asym-descact"
ONLINE = {"quantization_config": {"quant_method": "quant_core", "online": "mxfp8"}}


def send(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    worker = llm.llm_engine.model_executor.driver_worker
    worker.model_runner.reload_weights(weights_iterator=iter(list(weights)))


def send_in_parts(llm: Any, weights: dict[str, Tensor], size: int) -> None:
    """As vLLM's weight transfer does: one update, tensors in several calls."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    items = list(weights.items())
    with set_current_vllm_config(runner.vllm_config):
        initialize_layerwise_reload(runner.model)
        for start in range(0, len(items), size):
            part = [(name, value.clone()) for name, value in items[start : start + size]]
            runner.model.load_weights(part)
            for _, value in part:
                value.zero_()  # a buffer of the transfer, used again
        finalize_layerwise_reload(runner.model, runner.model_config)


def changed(folder: Path) -> Path:
    """The same checkpoint with other scales."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("scales"):
            value.mul_(torch.linspace(0.6, 1.4, value.shape[-1]).to(value.dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.short
@pytest.mark.parametrize("size", [10**6, 5])
def test_float_tensors_are_quantized_on_arrival(tmp_path: Path, size: int) -> None:
    old, new = float_llama(tmp_path / "old"), float_llama(tmp_path / "new", seed=1)
    want = reference(new, prompts(), online="mxfp8")
    with served(old, hf_overrides=ONLINE) as llm:
        before = addresses(llm)
        assert first_difference(greedy(llm, prompts()), want, ACTIVATIONS)
        send_in_parts(llm, load_file(new / "model.safetensors"), size)
        assert first_difference(greedy(llm, prompts()), want, ACTIVATIONS) == ""
        assert addresses(llm) == before
        send(llm, load_file(old / "model.safetensors").items())
        again = greedy(llm, prompts())
    assert first_difference(again, reference(old, prompts(), online="mxfp8"), ACTIVATIONS) == ""


@pytest.mark.parametrize(
    "load_format", ["quant_core", pytest.param("auto", marks=pytest.mark.short)]
)
def test_packed_tensors_are_taken_in_any_order(tmp_path: Path, load_format: str) -> None:
    new = changed(without_notes(ACT_ORDER, tmp_path / "new"))
    old = without_notes(ACT_ORDER, tmp_path / "old")
    want = reference(new, prompts())
    with served(old, load_format=load_format) as llm:
        before = addresses(llm)
        assert first_difference(greedy(llm, prompts()), want, ORDER)
        send(llm, reversed(load_file(new / "model.safetensors").items()))
        assert first_difference(greedy(llm, prompts()), want, ORDER) == ""
        assert addresses(llm) == before


def qwen(kind: str) -> Any:
    from transformers import Qwen2Config, Qwen3MoeConfig

    sizes = {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "biases":
        return Qwen2Config(**sizes)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return Qwen3MoeConfig(**sizes, **experts, head_dim=32, norm_topk_prob=True)


@pytest.mark.parametrize("kind", ["experts", "biases"])
def test_layers_of_several_tensors_are_taken_whole(tmp_path: Path, kind: str) -> None:
    old = make_tiny(tmp_path / "old", qwen(kind), seed=0).folder
    new = make_tiny(tmp_path / "new", qwen(kind), seed=1).folder
    want = reference(new, prompts())
    with served(old) as llm:
        assert first_difference(greedy(llm, prompts()), want, ORDER)
        send(llm, load_file(new / "model.safetensors").items())
        assert first_difference(greedy(llm, prompts()), want, ORDER) == ""


# --------------------------------------------------------------------------------- what is refused


def refused(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> str:
    with served(folder) as llm:
        with pytest.raises(LayoutError) as err:
            send(llm, weights)
        assert model_of(llm) is not None
    assert err.value.code == "Q-ENGINE-RELOAD"
    return str(err.value)


def test_floats_for_packed_layers_are_refused() -> None:
    floats = [("model.layers.0.self_attn.q_proj.weight", torch.zeros(256, 256))]
    assert "packed layer" in refused(ACT_ORDER, floats)


def test_other_shape_is_refused() -> None:
    tensors = load_file(ACT_ORDER / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.scales"
    tensors[name] = tensors[name][:, :-8].contiguous()
    assert name in refused(ACT_ORDER, tensors.items())


def test_changed_description_is_refused() -> None:
    folder = FIXTURES / "bnb-nf4-dq"
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "quant_state" in n)
    tensors[name] = tensors[name].roll(1)
    assert name in refused(folder, tensors.items())


def test_container_is_refused() -> None:
    with served(FIXTURES / "gguf-llama-q4_k_m") as llm, pytest.raises(LayoutError) as err:
        send(llm, [("model.norm.weight", torch.ones(256))])
    assert err.value.code == "Q-ENGINE-RELOAD"


def test_layer_that_is_incomplete_keeps_its_weights_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = load_file(ACT_ORDER / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.scales"
    with served(ACT_ORDER) as llm:
        want = greedy(llm, prompts())
        with caplog.at_level(logging.WARNING, "quant_core"):
            send(llm, [(name, tensors[name] * 2)])
        assert name in caplog.text
        assert first_difference(greedy(llm, prompts()), want, 0.0) == ""
