"""Logits of SGLang's own models on packed layers are those of the transformers engine.

Same kernels, same float32 arithmetic around them: no difference was seen. The limit allows another
order of sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from sglang_serving import (
    forward,
    loaded,
    reference_logits,
    reference_model,
    served_logits,
    without_notes,
)

from checkpoint_sets import FIXTURES, SHARED
from engine_table import served as served_names

ORDER = 5e-5  # of logits around 10; 0 was seen
IDS = [5, 17, 200, 3, 99, 42, 7]

_HERE = "tests/sglang_engine/test_logits.py"


def checkpoints(test: str) -> list[Any]:
    """Those of the engine table; what is not shipped is marked."""
    return [
        pytest.param(name, marks=[] if (FIXTURES / name).is_dir() else pytest.mark.shared)
        for name in served_names(f"{_HERE}::{test}")
    ]


def folder_of(name: str) -> Path:
    return (FIXTURES if (FIXTURES / name).is_dir() else SHARED) / name


def compare(path: Path, to: Path, options: dict[str, Any] | None = None, **settings: Any) -> None:
    folder = without_notes(path, to / path.name)
    got = served_logits(folder, IDS, **settings)
    want = reference_logits(folder, IDS, kv_cache="float", **options or {})
    assert want.abs().max() > 1
    assert (got - want).abs().max() <= ORDER


@pytest.mark.parametrize("name", checkpoints("test_every_checkpoint_gives_the_same_logits"))
def test_every_checkpoint_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    compare(folder_of(name), tmp_path)


@pytest.mark.parametrize("name", checkpoints("test_container_is_loaded_by_our_own_loader"))
def test_container_is_loaded_by_our_own_loader(name: str, tmp_path: Path) -> None:
    compare(folder_of(name), tmp_path, load_format="private")


@pytest.mark.parametrize("name", ["gptqmodel-4bit-g128-asym-descact", "bnb-nf4-dq"])
def test_our_own_loader_reads_safetensors_too(name: str, tmp_path: Path) -> None:
    compare(folder_of(name), tmp_path, load_format="private")


def test_container_without_config_gives_the_same_logits(tmp_path: Path) -> None:
    folder = without_notes(FIXTURES / "gguf-llama-q4_k_m", tmp_path / "model")
    for file in folder.glob("*.json"):
        file.unlink()
    assert [f.suffix for f in folder.iterdir()] == [".gguf"]
    got = served_logits(folder, IDS, load_format="private", model_config_parser="quant_core")
    want = reference_logits(folder, IDS, kv_cache="float")
    assert want.abs().max() > 1
    assert (got - want).abs().max() <= ORDER


@pytest.mark.shared
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3moe"])
def test_online_quantization_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    block = '{"quantization_config": {"quant_method": "quant_core", "online": "mxfp8"}}'
    compare(SHARED / "base" / name, tmp_path, {"online": "mxfp8"}, json_model_override_args=block)


def test_clamped_experts_stored_as_one_tensor_compute_the_same(tmp_path: Path) -> None:
    """The experts alone: this model's attention needs SGLang's kernels."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    folder = without_notes(FIXTURES / "hf-gptoss-mxfp4", tmp_path / "model")
    want_experts = reference_model(folder).model.layers[0].mlp.experts
    with loaded(folder) as model:
        layer = model.model.layers[0].mlp.experts
        g = torch.Generator().manual_seed(0)
        x = torch.randn(5, layer.hidden_size, generator=g)
        index = torch.randint(0, layer.num_experts, (5, 2), generator=g)
        weights = torch.rand(5, 2, generator=g)
        topk = StandardTopKOutput(weights, index, weights)
        got = layer.quant_method.apply(layer, StandardDispatchOutput(x, None, topk))
    with torch.no_grad():
        want = want_experts(x, index, weights)
    assert (got.hidden_states - want).abs().max() <= ORDER * want.abs().max()


@pytest.mark.parametrize("name", checkpoints("test_cache_scales_are_those_of_the_file"))
def test_cache_scales_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    folder = without_notes(folder_of(name), tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    with loaded(folder) as model:
        for number, layer in enumerate(model.model.layers):
            for role in ("k", "v"):
                at = f"model.layers.{number}.self_attn."
                found = [n for n in stored if n.startswith(at) and n.endswith(f".{role}_scale")]
                want = float(stored[found[0]])
                assert want not in (0.0, 1.0, -1.0)
                assert getattr(layer.self_attn.attn, f"{role}_scale_float") == want


def test_comparison_notices_other_weights(tmp_path: Path) -> None:
    one = without_notes(FIXTURES / "gptqmodel-4bit-g128-asym-descact", tmp_path / "one")
    two = without_notes(FIXTURES / "gptqmodel-awq-gemm-g128", tmp_path / "two")
    with loaded(one) as model:
        got = forward(model, IDS)
    assert (got - reference_logits(two, IDS)).abs().max() > 100 * ORDER


def test_lora_on_a_packed_base_adds_what_it_says(tmp_path: Path) -> None:
    """SGLang's own wrapper and its backend in plain torch, one adapter of rank 4 on one layer."""
    from sglang.srt.lora.backend.torch_backend import (
        TorchNativeLoRABackend,
        TorchNativeLoRABatchInfo,
    )
    from sglang.srt.lora.layers import get_lora_layer

    folder = without_notes(FIXTURES / "ct-w4a16-awq-asym", tmp_path / "model")
    want = reference_model(folder)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 256, generator=g) * 0.2, torch.randn(256, 4, generator=g) * 0.2
    layer = want.model.layers[0].self_attn.o_proj
    layer.register_forward_hook(lambda module, x, y: y + x[0] @ (b @ a).T * 2.0)
    one = torch.ones(1, dtype=torch.int32)
    rank, scale, indptr = one * 4, torch.tensor([2.0]), torch.tensor([0, len(IDS)])
    tensor = torch.tensor

    def unpinned(*args: Any, pin_memory: bool = False, **kw: Any) -> torch.Tensor:
        return tensor(*args, **kw)  # pinned memory needs an accelerator

    with loaded(folder) as model, mock.patch("torch.tensor", unpinned):
        without = forward(model, IDS)
        backend = TorchNativeLoRABackend(max_loras_per_batch=1, device=torch.device("cpu"))
        backend.batch_info = TorchNativeLoRABatchInfo(
            use_cuda_graph=False, bs=1, num_segments=1, seg_indptr=indptr, weight_indices=one * 0,
            lora_ranks=rank, scalings=scale, max_len=len(IDS), seg_lens=one * len(IDS),
            has_active_lora=True, lora_ranks_cpu=rank, seg_indptr_cpu=indptr,
            seg_lens_cpu=one * len(IDS), weight_indices_cpu=one * 0, scalings_cpu=scale,
        )  # fmt: skip
        attention = model.model.layers[0].self_attn
        attention.o_proj = get_lora_layer(attention.o_proj, backend)
        attention.o_proj.set_lora_info(a[None].clone(), b[None].clone())
        got = forward(model, IDS)
    with torch.no_grad():
        logits = want(torch.tensor([IDS])).logits[0].float()
    assert (got - logits).abs().max() <= ORDER * 10
    assert (got - without).abs().max() > 1e-2
