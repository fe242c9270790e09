"""Compiled decode steps in which one handle stands for all weights and one for the whole cache.

What such a step computes is the eager model's, bit for bit, whatever was put in a tensor's place
since it was recorded; and a graph in which something else touches the cache has none.
"""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache

from quant_core import load_model
from quant_core.engines.transformers_parts import parts_of
from quant_core.registry import registry
from tiny_models import LLAMA_SIZES, make_tiny

ROOM = 24
_CPU = "kernels_cpu" in registry().plugins
pytestmark = pytest.mark.skipif(not _CPU, reason="needs quant-kernels-cpu")
if _CPU:
    from quant_kernels_cpu.native import _torch_library

    if _torch_library() is None:
        pytest.skip("this torch has no stable C ABI", allow_module_level=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    where = tmp_path_factory.mktemp("llama")
    return {
        n: make_tiny(where / str(n), LlamaConfig(**{**LLAMA_SIZES, "num_hidden_layers": n})).folder
        for n in (2, 4)
    }


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(folders):
    return load(folders[2])


def load(folder: Path):
    made = load_model(folder, dtype=torch.bfloat16)
    parts_of(made)
    return made


def static(model) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=ROOM)


TOKENS = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def prefill(model, cache) -> None:
    model(input_ids=TOKENS[:, :7], past_key_values=cache)


@torch.no_grad()
def steps(run, cache, start: int = 7, stop: int = 12) -> torch.Tensor:
    """Logits of some steps behind a prefill."""
    out = [
        run(input_ids=TOKENS[:, i : i + 1], past_key_values=cache).logits[:, -1].float()
        for i in range(start, stop)
    ]
    return torch.stack(out)


def decoded(model, run, cache) -> torch.Tensor:
    prefill(model, cache)
    return steps(run, cache)


def eager(model) -> torch.Tensor:
    return decoded(model, model, DynamicCache(config=model.config))


def code_of(model, run, cache) -> str:
    """What Inductor makes of a step."""
    prefill(model, cache)
    with torch.no_grad():
        _, (code,) = run_and_get_code(run, input_ids=TOKENS[:, 7:8], past_key_values=cache)
    return code[code.index("def call(") :]


def counts(code: str) -> tuple[int, int]:
    """Calls with handles, and without."""
    return tuple(
        code.count(f"torch.ops.quant_cpu.{name}.default(")
        for name in ("held_layers", "decoder_layers")
    )


def test_the_number_of_inputs_does_not_grow_with_the_layers(folders):
    inputs = []
    for folder in folders.values():
        model = load(folder)
        cache = static(model)
        run = torch.compile(model.forward, fullgraph=True)
        code = code_of(model, run, cache)
        assert counts(code) == (1, 0)
        inputs.append(code.count("assert_size_stride(arg"))
        assert [int(c.cumulative_length) for c in cache.layers] == [8] * len(cache.layers)
        cache.reset()
        assert torch.equal(decoded(model, run, cache), eager(model))
        torch._dynamo.reset()
    assert inputs[0] == inputs[1]


def test_the_cache_holds_what_eager_leaves_there(model):
    fixed, grown = static(model), DynamicCache(config=model.config)
    decoded(model, torch.compile(model.forward, fullgraph=True), fixed)
    decoded(model, model, grown)
    for got, want in zip(fixed.layers, grown.layers):
        assert int(got.cumulative_length) == 12
        assert torch.equal(got.keys[:, :, :12], want.keys)
        assert torch.equal(got.values[:, :, :12], want.values)
        assert not got.keys[:, :, 12:].any()


def test_other_caches_need_no_other_graph(model):
    run, want = torch.compile(model.forward, fullgraph=True), eager(model)
    decoded(model, run, static(model))
    with torch.compiler.set_stance("fail_on_recompile"):
        caches = [static(model) for _ in range(3)]
        for cache in caches:
            prefill(model, cache)
        half = [steps(run, cache, 7, 9) for cache in caches]  # in turn
        rest = [steps(run, cache, 9, 12) for cache in caches]
    assert all(torch.equal(torch.cat(both), want) for both in zip(half, rest))


def test_a_copied_cache_is_written_apart(model):
    run, cache, want = torch.compile(model.forward, fullgraph=True), static(model), eager(model)
    prefill(model, cache)
    steps(run, cache, 7, 8)
    copied = copy.deepcopy(cache)
    kept = [t.clone() for c in cache.layers for t in (c.keys, c.cumulative_length)]
    assert torch.equal(steps(run, copied, 8), want[1:])
    now = [t for c in cache.layers for t in (c.keys, c.cumulative_length)]
    assert all(torch.equal(a, b) for a, b in zip(now, kept))
    assert torch.equal(steps(run, cache, 8), want[1:])


def test_a_cache_with_the_layers_of_another_is_its_own(model):
    run, first, want = torch.compile(model.forward, fullgraph=True), static(model), eager(model)
    prefill(model, first)
    steps(run, first, 7, 8)
    second = copy.copy(first)
    second.layers = copy.deepcopy(first.layers)
    kept = [c.keys.clone() for c in first.layers]
    assert torch.equal(steps(run, second, 8), want[1:])
    assert all(torch.equal(c.keys, k) for c, k in zip(first.layers, kept))


@pytest.mark.parametrize("what", ["keys", "layer", "norm", "norm data"])
def test_what_is_put_in_a_tensors_place_is_used(model, what):
    run, cache = torch.compile(model.forward, fullgraph=True), static(model)
    before, norm = eager(model), model.model.layers[1].input_layernorm
    prefill(model, cache)
    steps(run, cache, 7, 8)
    old = cache.layers[1].keys
    if what == "keys":
        cache.layers[1].keys = old * 2
    elif what == "layer":
        cache.layers[1] = copy.deepcopy(cache.layers[1])
        cache.layers[1].values *= 2
    elif what == "norm":
        norm.weight = nn.Parameter(norm.weight.detach() * 2)
    else:
        norm.weight.data = norm.weight.data * 2
    kept, other = old.clone(), copy.deepcopy(cache)
    want = steps(model, other, 8)
    got = steps(run, cache, 8)
    assert torch.equal(got, want)
    assert not torch.equal(got, before[1:])
    if what in ("keys", "layer"):
        assert torch.equal(old, kept)


def touching(model, how: str):
    """A step and something else of one graph."""

    def run(token, cache):
        if how == "counts":
            seen = cache.layers[1].cumulative_length + 0
        elif how == "clears":
            cache.reset()
            seen = token
        logits = model(input_ids=token, past_key_values=cache).logits
        if how == "reads":
            seen = cache.layers[1].keys.float().sum()
        elif how == "writes":
            cache.layers[0].values.zero_()
            seen = token
        return logits, seen

    return run


@pytest.mark.parametrize("how", ["reads", "writes", "counts", "clears"])
def test_a_graph_that_touches_the_cache_itself_has_no_handles(model, how):
    run = touching(model, how)
    ours, own = static(model), static(model)
    for cache in (ours, own):
        prefill(model, cache)
    compiled = torch.compile(run, fullgraph=True)
    with torch.no_grad():
        got, (code,) = run_and_get_code(compiled, TOKENS[:, 7:8], ours)
        want = run(TOKENS[:, 7:8], own)
    assert counts(code[code.index("def call(") :]) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    for a, b in zip(ours.layers, own.layers):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
        assert int(a.cumulative_length) == int(b.cumulative_length)


def test_after_a_reset_such_a_graph_takes_no_handles_from_others(model):
    cache = static(model)
    prefill(model, cache)
    with torch.no_grad():
        torch.compile(touching(model, "reads"), fullgraph=True)(TOKENS[:, 7:8], cache)
    torch._dynamo.reset()  # the next compilation has the number of that one
    run, cache = torch.compile(model.forward, fullgraph=True), static(model)
    assert counts(code_of(model, run, cache)) == (1, 0)


def test_graphs_for_others_than_our_pass_have_no_handles(model):
    def theirs(graph):
        return None

    options = {"pre_grad_custom_pass": theirs}
    for kept in (options, {"use_pre_grad_passes": False}):
        torch._dynamo.reset()
        run = torch.compile(model.forward, fullgraph=True, options=kept)
        assert counts(code_of(model, run, static(model)))[0] == 0
    seen = []

    def backend(gm, inputs):
        seen.append([str(n.target) for n in gm.graph.nodes])
        return gm

    torch._dynamo.reset()
    run, cache = torch.compile(model.forward, fullgraph=True, backend=backend), static(model)
    assert torch.equal(decoded(model, run, cache), eager(model))
    assert "quant_cpu.decoder_layer.default" in seen[0]
    assert "quant_cpu.held_layers.default" not in seen[0]
    assert config.pre_grad_custom_pass is not None


def test_caches_of_several_kinds_of_layers_have_no_handle(tmp_path):
    folder = make_tiny(tmp_path / "m", MistralConfig(**LLAMA_SIZES, sliding_window=8)).folder
    model = load(folder)
    cache = static(model)
    prefill(model, cache)
    assert getattr(cache, "_quant_stand", None) is None


def test_a_cache_that_is_dropped_is_freed(model):
    run, cache = torch.compile(model.forward, fullgraph=True), static(model)
    decoded(model, run, cache)
    seen = [weakref.ref(t) for c in cache.layers for t in (c.keys, c.values)]
    del cache
    gc.collect()
    assert not any(ref() is not None for ref in seen)
