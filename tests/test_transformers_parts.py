"""Norms, MLPs and decoder layers in kernels: what is swapped, what is not, and the same results.

Every model is loaded twice, with the kernels between linear layers and without; the second is what
transformers' own modules compute. Tiny models of many architectures stand for the ways in which
decoder layers are put together.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    DynamicCache,
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StaticCache,
)

from quant_core import load_model
from quant_core.engines.transformers_parts import parts_of
from quant_core.engines.transformers_swap import Swapped, original
from quant_core.registry import registry
from tiny_models import LLAMA_SIZES, make_tiny

OFF = "rms_norm=none,gated=none,rotary=none"
_SWITCHED = "kernels_cpu" in registry().plugins
pytestmark = pytest.mark.skipif(not _SWITCHED, reason="needs quant-kernels-cpu")


def config(kind, **changes):
    sizes = {k: v for k, v in LLAMA_SIZES.items() if k != "head_dim" or kind is not Phi3Config}
    return kind(**sizes | changes)


def load(folder: Path, **options: object) -> PreTrainedModel:
    return load_model(folder, dtype=options.pop("dtype", torch.bfloat16), **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("llama") / "m", config(LlamaConfig)).folder


def steps(model, *, batch=1, mask=None, cache=None, count=4) -> tuple[torch.Tensor, list]:
    """Logits of a prefill and some decode steps, and the cache's keys and values after them."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (batch, 7 + count), generator=g)
    cache = DynamicCache(config=model.config) if cache is None else cache
    out = []
    with torch.no_grad():
        for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 7 + count))]:
            given = {} if mask is None else {"attention_mask": mask[:, :stop]}
            logits = model(input_ids=ids[:, start:stop], past_key_values=cache, **given).logits
            out.append(logits[:, -1].float())
    return torch.stack(out), [(x.keys, x.values) for x in cache.layers]


def kinds(model) -> dict[str, int]:
    """What runs the model's modules, and how many of them."""
    parts = parts_of(model)
    assert parts is not None
    found: dict[str, int] = {}
    for run in parts.swapped.values():
        found[run] = found.get(run, 0) + 1
    return found


WHOLE = "decoder layer in cpu_wna16"
MLP = "cpu_gated in cpu_wna16"
NORM = "cpu_rms_norm"
EXPECTED = {
    "llama": (LlamaConfig, {}, {NORM: 5, MLP: 2, WHOLE: 2}),
    "llama, biases": (
        LlamaConfig, {"attention_bias": True, "mlp_bias": True}, {NORM: 5, MLP: 2, WHOLE: 2},
    ),
    "qwen2": (Qwen2Config, {}, {NORM: 5, MLP: 2, WHOLE: 2}),
    "mistral": (MistralConfig, {"sliding_window": None}, {NORM: 5, MLP: 2, WHOLE: 2}),
    "gemma": (GemmaConfig, {"hidden_act": "gelu_pytorch_tanh"}, {NORM: 5, MLP: 2, WHOLE: 2}),
    "llama, gelu": (LlamaConfig, {"hidden_act": "gelu"}, {NORM: 5}),
    "llama, relu": (LlamaConfig, {"hidden_act": "relu"}, {NORM: 5}),
    "gemma2": (Gemma2Config, {}, {NORM: 9, MLP: 2}),  # norms behind both branches
    "qwen3": (Qwen3Config, {}, {NORM: 9, MLP: 2, WHOLE: 2}),  # norms of queries and keys
    "phi3": (Phi3Config, {}, {NORM: 5, MLP: 2, WHOLE: 2}),  # fused q, k, v and gate, up
    "phi3, half turned": (
        Phi3Config,
        {"rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        }},
        {NORM: 5, MLP: 2, WHOLE: 2},
    ),
    "phi3, dropout": (Phi3Config, {"resid_pdrop": 0.1}, {NORM: 5, MLP: 2}),
    "granite": (
        GraniteConfig, {"residual_multiplier": 0.5, "attention_multiplier": 0.3}, {NORM: 5, MLP: 2},
    ),
    "olmo2": (Olmo2Config, {}, {NORM: 9, MLP: 2}),  # norms after
    "cohere": (CohereConfig, {}, {MLP: 2}),  # layer norms, parallel branches, other rotation
    "ministral3": (
        Ministral3Config,
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        }},
        {NORM: 5, MLP: 2},
    ),  # queries scaled by their position
    "smollm3": (
        SmolLM3Config, {"no_rope_layers": [1, 0]}, {NORM: 5, MLP: 2, WHOLE: 1},
    ),  # one layer without rotation
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_swapped_computes_the_same_and_nothing_else_is(name, tmp_path):
    kind, changes, expected = EXPECTED[name]
    folder = make_tiny(tmp_path / "m", config(kind, **changes)).folder
    model, plain = load(folder), load(folder, kernels=OFF)
    assert kinds(model) == expected
    assert not kinds(plain)
    for batch, mask in ((1, None), (2, torch.tensor([[0, 0] + [1] * 9, [1] * 11]))):
        got, cache = steps(model, batch=batch, mask=mask)
        want, own = steps(plain, batch=batch, mask=mask)
        assert want.abs().mean() > 0.05, "the comparison would see nothing"
        # exponentials may differ in the last place of float32, and tip a rounding to bfloat16
        assert (got - want).abs().mean() <= 2.0**-9 * want.abs().mean()
        assert all(a.shape == b.shape for x, y in zip(cache, own) for a, b in zip(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_llama_gives_the_same_bits(llama, dtype):
    model, plain = load(llama, dtype=dtype), load(llama, dtype=dtype, kernels=OFF)
    assert (kinds(model).get(WHOLE, 0) == 2) == (dtype != torch.float32)
    got, want = steps(model), steps(plain)
    if dtype == torch.float32:  # here the exponential's last place shows
        assert (got[0] - want[0]).abs().max() <= 2.0**-20 * want[0].abs().max()
        return
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for x, y in zip(got[1], want[1]) for a, b in zip(x, y))


def runs(model) -> dict[str, int]:
    """Counts calls of the kernels of decoder layers and MLPs from here on."""
    counted = {"layer": 0, "mlp": 0}

    def count(part, field, name):
        own = getattr(part, field)

        def run(*args):
            y = own(*args)
            counted[name] += y is not None
            return y

        setattr(part, field, run)

    for module in model.modules():
        if hasattr(module, "_quant_layer"):
            count(module._quant_layer, "run", "layer")
        if hasattr(module, "_quant_mlp") and module._quant_mlp.whole is not None:
            count(module._quant_mlp, "whole", "mlp")
    return counted


def test_decode_steps_take_one_call_a_layer_and_prefill_none(llama):
    model = load(llama)
    steps(model, count=1)  # the second layer is proved in its first step
    counted = runs(model)
    steps(model, count=3)
    assert counted == {"layer": 2 * 3, "mlp": 2}  # 7 tokens of the prefill are few enough for MLPs


def test_layer_that_differs_by_its_number_alone_keeps_its_own_code(llama, caplog):
    """Alike in code and settings, so not probed with the first; found out before its first step."""
    model = load(llama)
    layer = model.model.layers[1]
    own = original(layer)
    assert parts_of(model) is not None
    assert layer._quant_layer.proved is False

    def forward(self, x, *args, **kwargs):
        y = ordinary(self, x, *args, **kwargs)
        return 2 * y if self.self_attn.layer_idx else y

    ordinary = own.forward
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(own, "forward", forward)
        counted = runs(model)
        got = steps(model, count=3)
        assert counted["layer"] == 3 + 1  # those of the first layer, and the probe
        assert type(layer) is own
        reference = load(llama, kernels="torch_ref")
        want = steps(reference, count=3)
    assert "runs its own code" in caplog.text
    assert (got[0] - want[0]).abs().mean() <= 2.0**-5 * want[0].abs().mean()


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "global", "forward", "adapter", "training"])
@pytest.mark.parametrize("where", ["q_proj", "down_proj", "act_fn", "post_attention_layernorm", ""])
def test_whoever_listens_or_replaces_is_heard(llama, kind, where):
    """Every way of being between: the layer's own code runs then, and again after."""
    model = load(llama)
    steps(model, count=1)  # the second layer is proved in its first step
    counted = runs(model)
    layer = model.model.layers[0]
    name = next((n for n, _ in layer.named_modules() if n.endswith(where)), "") if where else ""
    target = layer.get_submodule(name)
    heard, undo = [], lambda: None
    if kind == "hook":
        undo = target.register_forward_hook(lambda m, a, y: heard.append(1)).remove
    elif kind == "pre-hook":
        undo = target.register_forward_pre_hook(lambda m, a: heard.append(1)).remove
    elif kind == "global":
        undo = nn.modules.module.register_module_forward_hook(
            lambda m, a, y: heard.append(1) if m is target else None
        ).remove
    elif kind == "forward":
        own = target.forward
        target.forward = lambda *a, **k: heard.append(1) or own(*a, **k)
        undo = lambda: target.__dict__.pop("forward")  # noqa: E731
    elif kind == "adapter":
        if not where:
            pytest.skip("a layer itself is not below one")

        class Adapter(nn.Module):
            def __init__(self):
                super().__init__()
                self.base = target

            def forward(self, x):
                heard.append(1)
                return self.base(x)

        parent, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(parent), leaf, Adapter())
        undo = lambda: setattr(layer.get_submodule(parent), leaf, target)  # noqa: E731
    else:
        model.train()
        heard, undo = [1], model.eval
    steps(model, count=2)
    assert heard
    first = counted["layer"]
    assert first == (0 if kind in ("global", "training") else 2)
    undo()
    steps(model, count=2)
    assert counted["layer"] == first + 4


def test_gradients_reach_adapters_norms_and_inputs(llama):
    model, plain = load(llama), load(llama, kernels=OFF)
    found = []
    for m in (model, plain):
        embeds = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        embeds.requires_grad_()
        m(inputs_embeds=embeds).logits.float().square().mean().backward()
        found.append((embeds.grad, m.model.norm.weight.grad))
    for got, want in zip(*found):
        assert got.abs().max() > 0
        assert torch.equal(got, want)


def test_torch_compile_runs_the_original_in_one_graph(llama):
    model, plain = load(llama), load(llama, kernels=OFF)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    x = torch.tensor([[5, 9, 4]])
    with torch.no_grad():
        got = compiled(input_ids=x, use_cache=False).logits
        want = plain(input_ids=x, use_cache=False).logits
    assert (got - want).abs().max() <= 2.0**-6 * want.abs().max()


def test_changed_weights_are_seen(llama):
    model, plain = load(llama), load(llama, kernels=OFF)
    steps(model)
    for m in (model, plain):
        layer = m.model.layers[1]
        state = {n: t.clone() for n, t in layer.state_dict().items()}
        codes = state["mlp.up_proj.codes"]
        state["mlp.up_proj.codes"] = codes.flip(0) ^ 1
        layer.load_state_dict(state)
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 2
        layer.post_attention_layernorm.weight.data *= 0.5
    assert torch.equal(steps(model)[0], steps(plain)[0])


def test_copies_pickles_and_moves_compute_the_same(llama):
    model = load(llama)
    want = steps(model)[0]
    copied, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, thawed, model.to("cpu")):
        counted = runs(other)
        assert torch.equal(steps(other)[0], want)
        assert counted["layer"] == 2 * 4
    assert copied.model.layers[0]._quant_layer.linears[0] is copied.model.layers[0].self_attn.q_proj
    half = copy.deepcopy(model).to(torch.float16)  # the kernels were bound for bfloat16
    counted = runs(half)
    assert steps(half)[0].isfinite().all()
    assert counted["layer"] == 0


def test_classes_names_and_state_stay(llama):
    model, plain = load(llama), load(llama, kernels=OFF)
    layer, own = model.model.layers[0], plain.model.layers[0]
    assert parts_of(model) is not None
    assert parts_of(plain) is not None
    assert isinstance(layer, Swapped)
    assert isinstance(layer, type(own))
    assert original(layer) is type(own)
    assert type(layer).__name__ == type(own).__name__
    assert type(layer).__module__ == type(own).__module__
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert f"kernel={WHOLE}" in repr(layer)


def test_the_account_says_who_runs_what_and_why_not(llama, tmp_path):
    text = parts_of(load(llama)).table
    assert f"{WHOLE}: 'model.layers.0'" in text
    assert "cpu_rms_norm" in text
    gelu = make_tiny(tmp_path / "m", config(LlamaConfig, hidden_act="gelu")).folder
    left = parts_of(load(gelu)).left
    assert left["model.layers.0.mlp"] == "its act_fn is none of silu, gelu_tanh"
    assert parts_of(copy.deepcopy(load(llama))) is None


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ("rms_norm=none", {MLP: 2}),
        ("gated=none", {NORM: 5}),
        ("rotary=none", {NORM: 5, MLP: 2}),
        ("attention=none", {NORM: 5, MLP: 2}),
        ("linear=torch_ref", {NORM: 5, "cpu_gated": 2}),
        ("torch_ref", {}),
    ],
)
def test_kernels_are_switched_off_like_all_others(llama, kernels, expected):
    assert kinds(load(llama, kernels=kernels)) == expected
    assert steps(load(llama, kernels=kernels))[0].isfinite().all()


def test_outputs_that_users_ask_for_are_complete(llama):
    model, plain = load(llama), load(llama, kernels=OFF)
    found = []
    for m in (model, plain):
        cache = DynamicCache(config=m.config)
        with torch.no_grad():
            m(torch.tensor([[5, 9, 4]]), past_key_values=cache)
            found.append(m(torch.tensor([[8]]), past_key_values=cache, output_hidden_states=True))
    assert len(found[0].hidden_states) == 3
    for got, want in zip(found[0].hidden_states, found[1].hidden_states):
        assert torch.equal(got, want)


def test_other_caches_and_attention_run_the_layers_own_code(llama):
    model, plain = load(llama), load(llama, kernels=OFF)
    counted = runs(model)
    caches = [StaticCache(config=m.config, max_cache_len=16) for m in (model, plain)]
    got, want = (steps(m, cache=c)[0] for m, c in zip((model, plain), caches))
    assert torch.equal(got, want)
    for m in (model, plain):
        m.set_attn_implementation("eager")
    assert torch.equal(steps(model)[0], steps(plain)[0])
    assert counted["layer"] == 0
