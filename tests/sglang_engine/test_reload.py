"""Weights of a running model are replaced: as SGLang's weight updater does it, in place."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang_serving import forward, loaded, reference_logits, without_notes
from torch import Tensor

from checkpoint_sets import FIXTURES, SHARED
from quant_core.errors import CheckpointError, LayoutError

IDS = [5, 17, 200, 3, 99, 42, 7]
ACT_ORDER = FIXTURES / "gptqmodel-4bit-g128-asym-descact"


def changed(folder: Path, to: Path) -> Path:
    """The same checkpoint with other scales: every packed layer and nothing else changes."""
    out = without_notes(folder, to)
    tensors = load_file(out / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("scales") or (name.endswith("weight_scale") and value.is_floating_point()):
            tensors[name] = value * 0.5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def with_biases(folder: Path, to: Path, **values: Tensor) -> Path:
    """The same checkpoint in the shape of Qwen2: biases of the query, key and value layers.

    Args:
        values: of a leaf, for all layers; others are stored as zeros, where no layer has a bias.
    """
    out = without_notes(folder, to)
    config = json.loads((out / "config.json").read_text())
    if values:
        config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".scales")]:
        module, size = name.removesuffix(".scales"), tensors[name].shape[-1]
        value = values.get(module.rpartition(".")[2], torch.zeros(size))
        if bool(value.any()) or not values:
            tensors[f"{module}.bias"] = value.to(torch.float16).clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def update(model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """What update_weights_from_disk and a weight-update session do with a stream."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    device = torch.device("cpu")
    DefaultModelLoader.restore_weights_before_loading(model, device)
    DefaultModelLoader.load_weights_and_postprocess(model, iter(weights), device)


def stream(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def addresses(model: Any) -> list[int]:
    return [p.data_ptr() for n, p in model.named_parameters() if "packed" in n]


@pytest.mark.parametrize(
    "source", [ACT_ORDER, pytest.param(SHARED / "ar-moe-w4g64", marks=pytest.mark.shared)]
)
def test_new_weights_take_the_place_of_the_old(source: Path, tmp_path: Path) -> None:
    old, new = without_notes(source, tmp_path / "old"), changed(source, tmp_path / "new")
    with loaded(old) as model:
        before, places = forward(model, IDS), addresses(model)
        update(model, stream(new).items())
        after = forward(model, IDS)
        assert addresses(model) == places
        update(model, stream(old).items())
        again = forward(model, IDS)
    assert (after - reference_logits(new, IDS)).abs().max() <= 5e-5
    assert (after - before).abs().max() > 1e-2
    assert torch.equal(again, before)


def test_layers_with_a_bias_take_new_weights_and_biases(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    old, other = ({k: torch.randn(n, generator=g) for k, n in sizes.items()} for _ in range(2))
    first = with_biases(ACT_ORDER, tmp_path / "old", **old)
    plain = changed(ACT_ORDER, tmp_path / "plain")
    new = with_biases(plain, tmp_path / "new", **other)
    mixed = with_biases(plain, tmp_path / "mixed", **old)
    with loaded(first) as model:
        before = forward(model, IDS)
        update(model, stream(new).items())
        after = forward(model, IDS)
    assert (before - reference_logits(first, IDS)).abs().max() <= 5e-5
    want = reference_logits(new, IDS)
    assert (after - want).abs().max() <= 5e-5
    assert (want - reference_logits(mixed, IDS)).abs().max() > 1e-2  # biases count


def test_stored_zeros_where_no_layer_has_a_bias_are_no_part_of_an_update(tmp_path: Path) -> None:
    """As AutoGPTQ writes them for every layer."""
    old = with_biases(ACT_ORDER, tmp_path / "old")
    new = changed(old, tmp_path / "new")
    with loaded(old) as model:
        update(model, stream(new).items())
        after = forward(model, IDS)
    assert (after - reference_logits(new, IDS)).abs().max() <= 5e-5


def test_incomplete_update_changes_no_packed_layer(tmp_path: Path) -> None:
    old, new = without_notes(ACT_ORDER, tmp_path / "old"), changed(ACT_ORDER, tmp_path / "new")
    weights = stream(new)
    lost = "model.layers.1.self_attn.k_proj.g_idx"
    del weights[lost]
    with loaded(old) as model:
        before = forward(model, IDS)
        with pytest.raises(CheckpointError) as err:
            update(model, weights.items())
        assert torch.equal(forward(model, IDS), before)
    assert err.value.code == "Q-TENSOR-MISSING"
    assert lost in str(err.value)


def test_update_with_weights_of_another_format_is_refused(tmp_path: Path) -> None:
    old = without_notes(ACT_ORDER, tmp_path / "old")
    with loaded(old) as model:
        before = forward(model, IDS)
        with pytest.raises((CheckpointError, LayoutError)) as err:
            update(model, stream(FIXTURES / "gptqmodel-awq-gemm-g128").items())
        assert torch.equal(forward(model, IDS)[:0], before[:0])
    assert err.value.code in ("Q-TENSOR-MISSING", "Q-ENGINE-RELOAD")


def test_packed_weights_outside_of_an_update_are_refused(tmp_path: Path) -> None:
    old = without_notes(ACT_ORDER, tmp_path / "old")
    with loaded(old) as model, pytest.raises(LayoutError) as err:
        model.load_weights(iter(stream(old).items()))
    assert err.value.code == "Q-ENGINE-RELOAD"


def from_disk(model: Any, config: Any, folder: Path) -> None:
    """As update_weights_from_disk does it."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader

    config.model_path = str(folder)
    loader = get_model_loader(LoadConfig(load_format="private"), config)
    assert isinstance(loader, DefaultModelLoader)
    update(model, loader._get_weights_iterator(DefaultModelLoader.Source.init_new(config, model)))


def test_container_is_read_again_in_place(tmp_path: Path) -> None:
    from sglang.srt.runtime_context import process_model_config

    old = without_notes(FIXTURES / "gguf-llama-q4_k_m", tmp_path / "old")
    new = without_notes(FIXTURES / "gguf-llama-q4_k_m", tmp_path / "new")
    halve_scales(next(new.glob("*.gguf")))
    other = without_notes(FIXTURES / "gguf-llama-iq3_s", tmp_path / "other")
    want = reference_logits(new, IDS)
    with loaded(old, load_format="private") as model:
        config = process_model_config()
        before, places = forward(model, IDS), addresses(model)
        from_disk(model, config, new)
        after = forward(model, IDS)
        with pytest.raises(LayoutError) as err:
            from_disk(model, config, other)
        assert torch.equal(forward(model, IDS), after)
        from_disk(model, config, old)
        again = forward(model, IDS)
        assert addresses(model) == places
    assert err.value.code == "Q-ENGINE-RELOAD"
    assert (after - want).abs().max() <= 5e-5
    assert (after - before).abs().max() > 1e-2
    assert torch.equal(again, before)


def halve_scales(file: Path) -> None:
    """Of the first layer's Q4_K matrices: the two half floats that open each block of 144 bytes."""
    from gguf import GGMLQuantizationType, GGUFReader

    found = 0
    for tensor in GGUFReader(file, mode="r+").tensors:
        if tensor.tensor_type == GGMLQuantizationType.Q4_K and tensor.name.startswith("blk.0."):
            blocks = tensor.data.reshape(-1, 144)[:, :4].view("float16")
            blocks *= 0.5
            found += 1
    assert found
