"""Norms, MLPs and layers are proved by a model's first own inference, and nobody hears of it."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from quant_core import load_model
from quant_core.engines.transformers_parts import parts_of
from quant_core.engines.transformers_swap import original
from quant_core.registry import registry
from tiny_models import make_tiny

pytestmark = pytest.mark.skipif(
    "kernels_cpu" not in registry().plugins, reason="needs quant-kernels-cpu"
)
OFF = "rms_norm=none,gated=none,rotary=none"
IDS = torch.tensor([[5, 9, 4, 11]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    return make_tiny(tmp_path_factory.mktemp("llama") / "m", config).folder


def load(folder: Path, **options: object):
    return load_model(folder, dtype=torch.bfloat16, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def in_kernels(model) -> int:
    names = ("_quant_norm", "_quant_mlp", "_quant_layer")
    return sum(any(hasattr(m, n) for n in names) for m in model.modules())


def marked(model) -> int:
    return sum(hasattr(m, "_quant_later") for m in model.modules())


@pytest.fixture(scope="module")
def want(llama) -> torch.Tensor:
    return logits(load(llama, kernels=OFF))


def test_load_proves_nothing_and_the_first_pass_does(llama, want):
    model = load(llama)
    assert (in_kernels(model), marked(model)) == (0, 9)  # 5 norms, 2 MLPs, 2 layers
    assert torch.equal(logits(model), want)
    assert (in_kernels(model), marked(model)) == (9, 0)
    assert torch.equal(logits(model), want)


def test_no_kernel_is_asked_again_where_the_user_left_none(llama, want, monkeypatch):
    monkeypatch.setenv("QUANT_KERNELS", OFF)
    model = load(llama)
    monkeypatch.delenv("QUANT_KERNELS")
    assert torch.equal(logits(model), want)
    assert in_kernels(model) == 0


@pytest.mark.parametrize("kind", ["hook", "global", "forward"])
def test_who_listens_before_the_first_pass_hears_only_the_model(llama, want, kind, monkeypatch):
    model, seen = load(llama), []
    mlp = model.model.layers[1].mlp
    if kind == "forward":
        own = mlp.forward
        mlp.forward = lambda x: seen.append(x.shape) or own(x)
        undo = lambda: mlp.__dict__.pop("forward")  # noqa: E731
    else:
        note = lambda m, a: seen.append(a[0].shape) if m is mlp else None  # noqa: E731
        everywhere = torch.nn.modules.module.register_module_forward_pre_hook
        undo = (
            everywhere(note) if kind == "global" else mlp.register_forward_pre_hook(note)
        ).remove
    assert torch.equal(logits(model), want)
    assert seen == [(1, 4, 64)]
    assert in_kernels(model) == 0
    undo()
    monkeypatch.setattr("time.monotonic", lambda: float("inf"))  # they are looked at in a while
    assert torch.equal(logits(model), want)
    assert in_kernels(model) == 9
    assert len(seen) == 1


def test_method_that_somebody_kept_goes_on_working(llama):
    model = load(llama)
    mlp = model.model.layers[0].mlp
    kept, x = mlp.forward, torch.randn(1, 3, 64).bfloat16()
    with torch.no_grad():
        before = original(mlp).forward(mlp, x)
        logits(model)
        assert torch.equal(kept(x), before)


def test_gradients_and_graphs_prove_nothing(llama):
    model = load(llama)
    model(input_ids=IDS).logits.float().sum().backward()
    assert in_kernels(model) == 0
    assert model.model.norm.weight.grad.abs().max() > 0


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_made_before_the_first_pass_is_proved(llama, want, way):
    model = load(llama)
    other = way(model)
    assert (in_kernels(other), marked(other)) == (9, 0)
    assert torch.equal(logits(other), want)


def test_copy_made_while_somebody_listens_runs_its_own_code(llama, want):
    model = load(llama)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda m, a: None)
    other = copy.deepcopy(model)
    handle.remove()
    assert (in_kernels(other), marked(other)) == (0, 0)
    assert type(other.model.layers[0].mlp) is original(model.model.layers[0].mlp)
    assert torch.equal(logits(other), want)


def test_layers_outlive_their_model(llama):
    model = load(llama)
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    want = original(mlp).forward(mlp, x := torch.ones(1, 1, 64).bfloat16())
    del model
    with torch.no_grad():
        assert torch.equal(mlp(x), want)
    assert not hasattr(norm, "_quant_later")


def test_threads_that_start_together_all_get_the_answer(llama, want):
    model, start, found = load(llama), threading.Barrier(4), []

    def run() -> None:
        start.wait()
        found.append(torch.equal(logits(model), want))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [True] * 4
    assert in_kernels(model) == 9


def test_the_account_proves_first(llama):
    model = load(llama)
    assert len(parts_of(model).swapped) == 9
    assert in_kernels(model) == 9
