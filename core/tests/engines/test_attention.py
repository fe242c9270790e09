from __future__ import annotations

import copy
import pickle

import pytest
import torch

import toy
from quant_core.engines.transformers_attention import STEP, attach_attention
from quant_core.kernels.base import Accepted, Rejected

transformers = pytest.importorskip("transformers")

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
calls: list[int] = []


def plain(buffers, q, k, v, mask, scale):
    """The formula in float32; takes one token only."""
    if q.shape[2] != 1:
        return None
    calls.append(k.shape[2])
    k, v = (t.float().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.float() @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, -1) @ v).to(q.dtype).transpose(1, 2)


class Step:
    name = "plain_step"

    def accepts(self, op):
        if op.op != "attention" or op.act_dtype != "bfloat16":
            return Rejected(axis="op", have=op.op, need="attention in bfloat16")
        return Accepted(cost=1.0)

    def bind(self, op):
        return plain


REGISTRY = toy.toy_registry(toy.toy_module(apply=lambda op: (Step(),)))


def make(implementation="sdpa", dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, attn_implementation=implementation)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def attach(model, dtype=torch.bfloat16, **options):
    attach_attention(model, REGISTRY, dtype=dtype, device="cpu", **options)
    calls.clear()
    return model


def decode(model, cache, mask=None, steps=3):
    ids = torch.tensor([[5, 9, 2, 7], [1, 8, 3, 3]])
    out = []
    with torch.no_grad():
        for step in range(steps + 1):
            now = ids if step == 0 else torch.tensor([[10 + step], [20 + step]])
            given = {} if mask is None else {"attention_mask": mask[:, : 4 + step]}
            out.append(model(input_ids=now, past_key_values=cache, **given).logits[:, -1].float())
    return torch.stack(out)


def caches(model):
    return {
        "dynamic": transformers.DynamicCache(config=model.config),
        "static": transformers.StaticCache(config=model.config, max_cache_len=16),
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decode_steps_go_to_the_kernel_and_agree_with_eager(kind, padded):
    model, eager = attach(make()), make("eager")
    mask = torch.tensor([[1] * 8, [0, 0] + [1] * 6]) if padded else None
    got = decode(model, caches(model)[kind], mask)
    assert len(calls) == 2 * 3  # layers x decode steps; the prefill is not one of them
    want = decode(eager, caches(eager)[kind], mask)
    assert (got - want).abs().max() < 0.02  # bfloat16 logits of about 1, rounded apart
    blind = decode(eager, caches(eager)[kind], None if padded else torch.tensor([[1, 0] * 4] * 2))
    assert (got - blind).abs().max() > 0.02


def test_generate_goes_through_the_kernel():
    model = attach(make())
    ids = torch.tensor([[5, 9, 2, 7]])
    out = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert out.shape == (1, 10)
    assert len(calls) == 2 * 5


def test_setting_sdpa_again_undoes_it():
    model = attach(make())
    assert model.config._attn_implementation == STEP
    model.set_attn_implementation("sdpa")
    decode(model, caches(model)["dynamic"])
    assert not calls


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (("eager", torch.bfloat16), {}),
        (("sdpa", torch.float32), {"dtype": torch.float32}),
        (("sdpa", torch.bfloat16), {"kernels": "torch_ref"}),
    ],
    ids=["eager", "no kernel for the dtype", "kernel not allowed"],
)
def test_nothing_changes_where_it_does_not_apply(model, options):
    routed = attach(make(*model), **options)
    assert routed.config._attn_implementation == model[0]


def test_gradients_flow_through_the_engines_own_attention():
    model = attach(make())
    cache = caches(model)["dynamic"]
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 9]]), past_key_values=cache)
    model(input_ids=torch.tensor([[3]]), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert not calls


def test_copies_and_pickles_keep_working(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = attach(make())
    want = decode(model, caches(model)["dynamic"])
    assert torch.equal(decode(copy.deepcopy(model), caches(model)["dynamic"]), want)
    stored = pickle.dumps(model)
    monkeypatch.delitem(ALL_ATTENTION_FUNCTIONS._global_mapping, STEP)  # as in another process
    again = pickle.loads(stored)
    assert (decode(again, caches(model)["dynamic"]) - want).abs().max() < 0.02


def test_compiled_step_is_one_graph():
    model = attach(make())
    want = decode(model, caches(model)["static"])
    calls.clear()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(decode(model, caches(model)["static"]), want)
