"""Decoder layers as one operator each of a compiled graph: when they are, and the same results.

What a graph computes is compared with the eager model, over a cache that grows, and with a model
loaded without kernels between its layers.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    SmolLM3Config,
    StaticCache,
)

from quant_core import load_model
from quant_core.engines.transformers_parts import parts_of
from quant_core.registry import registry
from quant_core.shared import weights_changed
from tiny_models import LLAMA_SIZES, make_tiny

OFF = "rms_norm=none,gated=none,rotary=none"
ROOM = 24
_CPU = "kernels_cpu" in registry().plugins
pytestmark = pytest.mark.skipif(not _CPU, reason="needs quant-kernels-cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("llama") / "m", LlamaConfig(**LLAMA_SIZES)).folder


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load(folder: Path, **options: object):
    """A model whose kernels are proved, as its first call outside of a graph would do."""
    model = load_model(folder, dtype=options.pop("dtype", torch.bfloat16), **options)
    parts_of(model)
    return model


class Recorder:
    """A backend of torch.compile that keeps how often each graph has which operator."""

    def __init__(self) -> None:
        self.graphs: list[Counter[str]] = []
        self.backend = aot_autograd(fw_compiler=self._keep)

    def _keep(self, gm: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
        names = [
            str(n.args[0] if "auto_functionalized" in str(n.target) else n.target) for n in nodes
        ]
        self.graphs.append(Counter(names))
        return gm

    @property
    def layers(self) -> list[int]:
        """Operators of decoder layers in each graph."""
        return [g["quant_cpu.decoder_layer.default"] for g in self.graphs]


def recorded(model, **options):
    """The compiled model and what was recorded."""
    seen = Recorder()
    run = torch.compile(model.forward, fullgraph=True, backend=seen.backend, **options)
    return run, seen


def ids(batch: int, count: int) -> torch.Tensor:
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(3))


def static(model) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=ROOM)


def decode(model, run, cache, *, batch=1, count=5, mask=None, prefill=None) -> torch.Tensor:
    """Logits of ``count`` steps by ``run`` behind a prefill by the eager model."""
    tokens, out = ids(batch, 7 + count), []
    fixed = isinstance(cache, StaticCache)
    with torch.no_grad():
        for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 7 + count))]:
            step = run if start else prefill or model
            given = {}
            if mask is not None:
                rest = torch.ones(batch, (ROOM if fixed else stop) - mask.shape[1])
                given = {"attention_mask": torch.cat([mask, rest.long()], 1)}
            logits = step(input_ids=tokens[:, start:stop], past_key_values=cache, **given).logits
            if start:
                out.append(logits[:, -1].float())
    return torch.stack(out)


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal but for roundings to bfloat16 that tipped: other orders of a float32 sum."""
    return bool((got - want).abs().max() <= 2.0**-5 * want.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_is_one_operator_a_layer_and_gives_eagers_bits(llama, dtype):
    model = load(llama, dtype=dtype)
    run, seen = recorded(model)
    cache = static(model)
    got = decode(model, run, cache)
    want = decode(model, model, DynamicCache(config=model.config))
    assert torch.equal(got, want)
    assert seen.layers == [2]  # one graph for all positions
    assert "quant_cpu.linear.default" not in seen.graphs[0]
    cache.reset()
    assert torch.equal(decode(model, run, cache), want)
    assert torch.equal(decode(model, run, static(model)), want)
    assert seen.layers == [2]


def test_the_cache_holds_what_eager_leaves_there(llama):
    model = load(llama)
    run, _ = recorded(model)
    fixed, grown = static(model), DynamicCache(config=model.config)
    decode(model, run, fixed)
    decode(model, model, grown)
    for got, want in zip(fixed.layers, grown.layers):
        assert int(got.cumulative_length) == 12
        assert torch.equal(got.keys[:, :, :12], want.keys)
        assert torch.equal(got.values[:, :, :12], want.values)
        assert not got.keys[:, :, 12:].any()


@pytest.mark.parametrize("padding", ["left", "middle", "none"])
def test_masks_of_batches_are_obeyed(llama, padding):
    model = load(llama)
    mask = torch.ones(3, 7, dtype=torch.long)
    if padding == "left":
        mask[0, :3], mask[2, :5] = 0, 0
    elif padding == "middle":
        mask[1, 2:4] = 0
    run, seen = recorded(model)
    got = decode(model, run, static(model), batch=3, mask=mask)
    want = decode(model, model, DynamicCache(config=model.config), batch=3, mask=mask)
    assert near(got, want)
    assert seen.layers == [2]
    if padding != "none":  # what is compared does depend on the mask
        other = decode(model, model, DynamicCache(config=model.config), batch=3)
        assert not near(got, other)


def test_a_compiled_prefill_runs_the_layers_own_code(llama):
    model = load(llama)
    run, seen = recorded(model)
    got = decode(model, run, static(model), prefill=run)
    assert near(got, decode(model, model, DynamicCache(config=model.config)))
    assert seen.layers == [0, 2]


def test_batches_are_one_operator_a_layer_and_large_ones_run_their_own_code(llama):
    model = load(llama)
    run, seen = recorded(model, dynamic=True)
    for batch in (2, 5):
        got = decode(model, run, static(model), batch=batch, count=3)
        want = decode(model, model, DynamicCache(config=model.config), batch=batch, count=3)
        assert torch.equal(got, want)
    assert set(seen.layers) == {2}  # a static cache has a fixed size: a graph for each
    got = decode(model, run, static(model), batch=9, count=3)
    assert near(got, decode(model, model, DynamicCache(config=model.config), batch=9, count=3))
    assert seen.layers[-1] == 0


@pytest.mark.parametrize("kind", ["hook", "forward", "global", "adapter", "training", "grad"])
def test_own_code_is_recorded_where_somebody_listens(llama, kind):
    model = load(llama)
    layer, undo = model.model.layers[0], lambda: None
    if kind == "hook":
        layer.mlp.up_proj.register_forward_hook(lambda m, a, y: y * 2)
    elif kind == "forward":
        own = layer.self_attn.q_proj.forward
        layer.self_attn.q_proj.forward = lambda x: own(x) * 2
    elif kind == "global":
        undo = nn.modules.module.register_module_forward_hook(lambda m, a, y: None).remove
    elif kind == "adapter":
        layer.mlp.down_proj = Twice(layer.mlp.down_proj)
    elif kind == "training":
        model.train()
    run, seen = recorded(model)
    try:
        with torch.set_grad_enabled(kind == "grad"):
            cache = static(model)
            with torch.no_grad():
                model(input_ids=ids(1, 7), past_key_values=cache)
            run(input_ids=ids(1, 1), past_key_values=cache)
    finally:
        undo()
    assert sum(seen.layers) == (0 if kind in ("global", "training", "grad") else 1)


class Twice(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) * 2


def test_a_module_that_is_replaced_later_is_seen(llama):
    model = load(llama)
    run, seen = recorded(model)
    before = decode(model, run, static(model))
    layer = model.model.layers[1]
    own, layer.mlp.down_proj = layer.mlp.down_proj, Twice(layer.mlp.down_proj)
    changed = decode(model, run, static(model))
    assert near(changed, decode(model, model, DynamicCache(config=model.config)))
    assert not near(changed, before)
    layer.mlp.down_proj = own
    assert torch.equal(decode(model, run, static(model)), before)
    assert seen.layers[:2] == [2, 1]
    other = load(llama)  # the same class, layout and sizes, other weights
    state = other.model.layers[0].self_attn.q_proj.codes
    state.copy_(state ^ 1)
    own = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = other.model.layers[0].self_attn.q_proj
    got = decode(model, run, static(model))
    assert near(got, decode(model, model, DynamicCache(config=model.config)))
    assert not torch.equal(got, before)


@pytest.mark.parametrize("again", [False, True], ids=["once", "after a reset of the compiler"])
def test_a_model_that_ran_in_graphs_only_is_proved_behind_the_first(llama, again):
    model = load_model(llama, dtype=torch.bfloat16)
    if again:
        run, _ = recorded(model)
        decode(model, run, static(model), prefill=run)
        torch._dynamo.reset()
        model = load_model(llama, dtype=torch.bfloat16)
    run, seen = recorded(model)
    got = decode(model, run, static(model), prefill=run)
    assert seen.layers == [0, 2]
    want = dict(parts_of(load(llama)).swapped)
    assert dict(parts_of(model).swapped) == want
    assert near(got, decode(model, model, DynamicCache(config=model.config)))


@pytest.mark.parametrize("assign", [False, True])
def test_changed_weights_are_seen_without_a_new_graph(llama, assign):
    model = load(llama)
    run, seen = recorded(model)
    before = decode(model, run, static(model))
    layer = model.model.layers[1]
    state = {n: t.clone() for n, t in layer.state_dict().items()}
    state["mlp.up_proj.codes"] = state["mlp.up_proj.codes"].flip(0) ^ 1
    layer.load_state_dict(state, assign=assign)
    layer.input_layernorm.weight.data *= 2
    got = decode(model, run, static(model))
    assert torch.equal(got, decode(model, model, DynamicCache(config=model.config)))
    assert not near(got, before)
    assert seen.layers[0] == 2
    assert len(seen.layers) <= 1 + assign  # assigned norms are other parameters


def test_copies_have_weights_of_their_own(llama):
    model = load(llama)
    want = decode(model, model, DynamicCache(config=model.config))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tables = [m.model.layers[0]._quant_layer.table.tensor for m in (model, other)]
        assert tables[0].data_ptr() != tables[1].data_ptr()
        torch._dynamo.reset()
        run, seen = recorded(other)
        assert torch.equal(decode(other, run, static(other)), want)
        assert seen.layers == [2]
        other.model.layers[0].mlp.gate_proj.codes.zero_()
        assert not near(decode(other, run, static(other)), want)
    assert torch.equal(decode(model, model, DynamicCache(config=model.config)), want)


def test_weights_that_are_gone_from_the_cpu_are_an_error_not_a_wrong_result(llama, caplog):
    model = load(llama)
    run, _ = recorded(model)
    decode(model, run, static(model))
    linear = model.model.layers[0].mlp.up_proj
    linear._buffers["codes"] = linear._buffers["codes"][:-1]
    weights_changed()
    with pytest.raises(RuntimeError, match="not those that the graph was made for"):
        decode(model, run, static(model))
    assert "expected" in caplog.text


def test_a_sliding_window_and_other_caches_run_the_layers_own_code(tmp_path):
    config = MistralConfig(**LLAMA_SIZES, sliding_window=8)
    model = load(make_tiny(tmp_path / "m", config).folder)
    run, seen = recorded(model)
    got = decode(model, run, static(model))
    want = decode(model, model, DynamicCache(config=model.config))
    assert near(got, want)
    assert set(seen.layers) == {0}


def test_other_attention_runs_the_layers_own_code(llama):
    model = load(llama)
    model.set_attn_implementation("eager")
    run, seen = recorded(model)
    decode(model, run, static(model), count=2)
    assert seen.layers == [0]


def test_a_layer_that_computes_something_else_is_proved_while_a_graph_is_traced(tmp_path, caplog):
    """Layers of one kind are probed once while loading, each of the others before its first use."""
    config = SmolLM3Config(**LLAMA_SIZES, no_rope_layers=[1, 1])
    model = load(make_tiny(tmp_path / "m", config).folder)
    last = model.model.layers[1]
    last.self_attn.use_rope = False  # what its number might have said
    run, seen = recorded(model)
    cache = static(model)
    got = decode(model, run, cache, prefill=run)
    assert "runs its own code" in caplog.text
    assert seen.layers == [0, 1]
    plain = load(tmp_path / "m", kernels=OFF)
    plain.model.layers[1].self_attn.use_rope = False
    assert near(got, decode(plain, plain, DynamicCache(config=plain.config)))


def test_inductor_copies_no_cache_and_computes_the_mask_once(llama):
    from torch._inductor.utils import run_and_get_code

    model = load(llama)
    compiled = torch.compile(model.forward, fullgraph=True)
    cache = static(model)
    with torch.no_grad():
        model(input_ids=ids(1, 7), past_key_values=cache)
        _, (code,) = run_and_get_code(compiled, input_ids=ids(1, 1), past_key_values=cache)
        body = code[code.index("def call(") :]
    assert body.count("torch.ops.quant_cpu.held_layers.default(") == 1  # both in one call
    assert "torch.ops.quant_cpu.decoder_layer.default(" not in body
    assert f"empty_strided_cpu((1, 2, {ROOM}, 16)" not in body
    assert body.count(f"empty_strided_cpu((1, 1, 1, {ROOM})") == 1
    model_again = static(model)
    got = decode(model, compiled, model_again)
    assert near(got, decode(model, model, DynamicCache(config=model.config)))
