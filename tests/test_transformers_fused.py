"""Decoder layers with fused q, k, v and gate, up, and with norms of queries and keys, in one call.

Each case edits the source of transformers' own modules, so that what looks the same computes
something else: it must be found out by the probe, and either run in its roles or be left alone.
"""

from __future__ import annotations

import inspect
import sys
import textwrap

import pytest
import torch
from transformers import DynamicCache, Phi3Config, Qwen3Config
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen3 import modeling_qwen3

from test_transformers_compiled import Recorder, decode, static
from test_transformers_parts import OFF, WHOLE, config, kinds, load, parts_of, pytestmark, steps
from tiny_models import make_tiny

__all__ = ["pytestmark"]


def edited(monkeypatch, owner: type, *changes: tuple[str, str]) -> None:
    """``owner.forward`` with some of its text replaced."""
    source = textwrap.dedent(inspect.getsource(owner.forward))
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    space = dict(vars(sys.modules[owner.__module__]))
    exec(compile(source, "edited", "exec"), space)
    monkeypatch.setattr(owner, "forward", space["forward"])


PHI, PHI_MLP = modeling_phi3.Phi3Attention, modeling_phi3.Phi3MLP
QWEN = modeling_qwen3.Qwen3Attention
_Q = "query_states = qkv[..., :query_pos]"
_KV = "self.num_key_value_heads * self.head_dim"
CASES = {
    "phi3": (Phi3Config, PHI, (), 2),
    "up before gate": (Phi3Config, PHI_MLP, (("gate, up_states =", "up_states, gate ="),), 2),
    "gate without activation": (
        Phi3Config, PHI_MLP, (("self.activation_fn(gate)", "gate"),), 0,
    ),
    "values before keys": (
        Phi3Config, PHI,
        (("key_states = qkv", "value_states_ = qkv"), ("value_states = qkv", "key_states = qkv"),
         ("value_states = value_states.view", "value_states = value_states_.view")), 0,
    ),
    "queries last": (
        Phi3Config, PHI,
        ((_Q, "query_states = qkv[..., -query_pos:]"),
         (f"qkv[..., query_pos : query_pos + {_KV}]", f"qkv[..., :{_KV}]"),
         (f"qkv[..., query_pos + {_KV} :]", f"qkv[..., {_KV} : -query_pos]")), 0,
    ),
    "scaled queries": (Phi3Config, PHI, ((_Q, _Q + " * 0.5"),), 0),
    "qwen3": (Qwen3Config, QWEN, (), 2),
    "norms of heads in each other's place": (
        Qwen3Config, QWEN, (("self.q_norm(", "self.x_norm("), ("self.k_norm(", "self.q_norm("),
                            ("self.x_norm(", "self.k_norm(")), 2,
    ),
    "no norm of keys": (Qwen3Config, QWEN, (("self.k_norm(", "("),), 0),
    "values through a norm": (
        Qwen3Config, QWEN, (("self.v_proj(hidden_states).view(hidden_shape)",
                             "self.k_norm(self.v_proj(hidden_states).view(hidden_shape))"),), 0,
    ),
    "one norm for both": (Qwen3Config, QWEN, (("self.k_norm(", "self.q_norm("),), 0),
    "norms behind the rotation": (
        Qwen3Config, QWEN,
        (("self.q_norm(", "("), ("self.k_norm(", "("),
         ("query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)",
          "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin); "
          "query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)")), 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_layers_run_in_their_roles_or_are_left_alone(name, tmp_path, monkeypatch):
    kind, owner, changes, whole = CASES[name]
    folder = make_tiny(tmp_path / "m", config(kind)).folder
    edited(monkeypatch, owner, *changes)
    model, plain = load(folder), load(folder, kernels=OFF)
    assert kinds(model).get(WHOLE, 0) == whole
    for batch, mask in ((1, None), (3, torch.tensor([[0, 0] + [1] * 9, [1] * 11, [1] * 11]))):
        got, cache = steps(model, batch=batch, mask=mask)
        want, own = steps(plain, batch=batch, mask=mask)
        # exponentials may differ in the last place of float32, and tip a rounding to bfloat16
        assert (got - want).abs().mean() <= 2.0**-8 * want.abs().mean()
        assert all(a.shape == b.shape for x, y in zip(cache, own) for a, b in zip(x, y))


def test_norms_that_cannot_be_told_apart_leave_the_layer_alone(tmp_path):
    tiny = make_tiny(tmp_path / "m", config(Qwen3Config))
    model = load(tiny.folder)
    for layer in model.model.layers:  # before anything is proved
        layer.self_attn.k_norm.weight.data = layer.self_attn.q_norm.weight.data.clone()
    parts = parts_of(model)
    assert WHOLE not in parts.swapped.values()
    assert "cannot be told apart" in parts.left["model.layers.0"]


@pytest.mark.parametrize("kind", [Phi3Config, Qwen3Config])
def test_compiled_steps_are_one_operator_a_layer(kind, tmp_path):
    torch._dynamo.reset()
    model = load(make_tiny(tmp_path / "m", config(kind)).folder)
    parts_of(model)
    seen = Recorder()
    run = torch.compile(model.forward, fullgraph=True, backend=seen.backend)
    for batch in (1, 2):
        got = decode(model, run, static(model), batch=batch)
        want = decode(model, model, DynamicCache(config=model.config), batch=batch)
        assert torch.equal(got, want)
    assert set(seen.layers) == {2}
    torch._dynamo.reset()


def test_hooks_and_changed_weights_of_head_norms_are_seen(tmp_path):
    folder = make_tiny(tmp_path / "m", config(Qwen3Config)).folder
    model, plain = load(folder), load(folder, kernels=OFF)
    before = steps(model)[0]
    for m in (model, plain):
        m.model.layers[1].self_attn.q_norm.weight.data *= 1.5
    changed = steps(model)[0]
    assert torch.equal(changed, steps(plain)[0])
    assert not torch.equal(changed, before)
    heard = []
    model.model.layers[0].self_attn.k_norm.register_forward_hook(lambda m, a, y: heard.append(1))
    assert torch.equal(steps(model)[0], changed)
    assert len(heard) == 5
