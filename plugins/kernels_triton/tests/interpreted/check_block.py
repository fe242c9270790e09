"""A decoder layer composed of this package's kernels, in Triton's interpreter, in transformers.

Run by test_interpreted.py in a process of its own; float16, see check_plain.py.
"""

from __future__ import annotations

import pickle

import pytest
import torch

from quant_core.engines.transformers_attention import attach_attention
from quant_core.engines.transformers_layers import attach_blocks
from quant_core.engines.transformers_parts import attach_norms_and_mlps
from quant_core.kernels.composed import BlockRun, GatedRun
from quant_core.live import quantize_model_
from quant_core.registry import registry
from quant_core.shared import share_inputs

transformers = pytest.importorskip("transformers")

OURS = "triton_wna16,triton_attention,triton_attention_update,triton_rms_norm,triton_rotary"
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
    "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def only_ours(monkeypatch):
    monkeypatch.setenv("QUANT_KERNELS", f"{OURS},triton_gated")


def make(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SIZES | changes), attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).half().eval().requires_grad_(False)
    quantize_model_(model, "int4", options={"group_size": 32})
    share_inputs(model, place=True)
    return model


def attach(model):
    held = {"dtype": torch.float16, "device": "cpu"}
    attach_attention(model, registry(), **held)
    parts = attach_norms_and_mlps(model, registry(), **held)
    attach_blocks(model, parts)
    return parts


def decode(model, steps, mask=None, room=0):
    """Logits of a prompt of 5 tokens and of each step after it, tokens given."""
    tokens = torch.randint(0, 96, (2, 5 + steps), generator=torch.Generator().manual_seed(3))
    cache, out = transformers.DynamicCache(), []
    if room:
        cache = transformers.StaticCache(config=model.config, max_cache_len=room)
    for part in (tokens[:, :5], *(tokens[:, i : i + 1] for i in range(5, 5 + steps))):
        seen = None if mask is None else mask[:, : int(cache.get_seq_length()) + part.shape[1]]
        with torch.no_grad():
            y = model(part, attention_mask=seen, past_key_values=cache, use_cache=True)
        out.append(y.logits[:, -1])
    return torch.stack(out), cache


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_decoder_layers_give_the_models_logits_and_cache(heads, monkeypatch):
    changes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0  # a shorter prompt
    plain = [decode(make(**changes), 2, m) for m in (None, mask)]
    model = make(**changes)
    parts = attach(model)
    layers = [n for n, run in parts.swapped.items() if run.startswith("decoder layer")]
    assert layers == ["model.layers.0", "model.layers.1"], parts.table
    decode(model, 1)  # the second layer is proved in its first step
    calls = []
    run = BlockRun.__call__
    monkeypatch.setattr(BlockRun, "__call__", lambda *a: (calls.append(1), run(*a))[1])
    for (want, cache), m in zip(plain, (None, mask), strict=True):
        got, mine = decode(model, 2, m)
        # a few roundings to float16 (2^-11) tip on the way through two layers
        assert error(got, want) < 3e-3
        for a, b in zip(mine.layers, cache.layers, strict=True):
            assert error(a.keys, b.keys) < 3e-3
            assert error(a.values, b.values) < 3e-3
    assert len(calls) == 2 * 2 * 2  # both runs, both layers, each step
    other, _ = decode(make(**changes, rope_theta=30.0), 2)
    assert error(other, plain[0][0]) > 1e-2  # control: the bound sees another rotation


def test_static_cache_is_written_where_it_says(monkeypatch):
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    want, cache = decode(make(), 2, mask, room=11)
    model = make()
    attach(model)
    decode(model, 1)  # the second layer is proved in its first step
    places = []
    run = BlockRun.__call__
    monkeypatch.setattr(BlockRun, "__call__", lambda *a: (places.append(int(a[-1])), run(*a))[1])
    got, mine = decode(model, 2, mask, room=11)
    assert places == [5, 5, 6, 6]  # both layers, each step
    assert error(got, want) < 3e-3
    for a, b in zip(mine.layers, cache.layers, strict=True):
        assert int(a.cumulative_length) == int(b.cumulative_length) == 7
        assert error(a.keys, b.keys) < 3e-3
        assert not a.keys[:, :, 7:].any()


def test_kernels_that_are_not_there_leave_the_layer(monkeypatch):
    monkeypatch.setenv("QUANT_KERNELS", OURS)  # no gate
    parts = attach(make())
    assert not any("decoder" in run or "MLP" in run for run in parts.swapped.values())


def test_mlp_runs_whole_and_copies_do():
    model = make()
    want = decode(model, 0)[0]
    attach(model)
    part = model.model.layers[0].mlp._quant_mlp
    assert isinstance(part.whole, GatedRun)
    assert error(decode(model, 0)[0], want) < 3e-3
    again = pickle.loads(pickle.dumps(model))
    share_inputs(again, place=True)
    assert error(decode(again, 2)[0], decode(model, 2)[0]) < 3e-3


def test_layers_that_do_not_lie_together_run_one_by_one():
    model = make()
    attach(model)
    want = decode(model, 2)[0]
    for layer in model.model.layers:
        for module in (*layer.self_attn.children(), *layer.mlp.children()):
            for name in getattr(module, "_names", ()):
                module._buffers[name] = module._buffers[name].clone()
    from quant_core.shared import weights_changed

    weights_changed()
    assert error(decode(model, 2)[0], want) < 3e-3
