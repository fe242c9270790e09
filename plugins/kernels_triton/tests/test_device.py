"""The kernels without weights on a CUDA device: what the interpreter cannot show.

Roundings to bfloat16, the compiler's choices (fused multiply-adds), kernels that start before the
one in front has ended, and transformers' decoder layers composed of them. More cases and times:
benchmarks/gpu_step.py, benchmarks/gpu_model.py.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
DTYPES = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a unit of the last place


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def turned(x, cos, sin):
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def made(*shape, dtype):
    return torch.randn(shape, dtype=getattr(torch, dtype), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_equal_torchs_bit_for_bit(dtype):
    from quant_kernels_triton.between_run import run_rotary

    q, k = (made(2, 5, h, 128, dtype=dtype).transpose(1, 2) for h in (8, 2))
    cos, sin = (made(2, 5, 128, dtype=dtype) for _ in "cs")
    got = run_rotary([], q, k, cos, sin)
    for y, x in zip(got, (q, k), strict=True):
        assert torch.equal(y, turned(x, cos[:, None], sin[:, None]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 130, None])
def test_a_step_in_a_chain_equals_the_formula_and_repeats(dtype, at):
    from quant_kernels_triton.attention_run import decode_step
    from quant_kernels_triton.between_run import run_norm

    torch.manual_seed(0)
    heads, groups, length, d = 8, 2, 300, 128
    wide = made(2, (heads + 2 * groups) * d, dtype=dtype)
    weight, cos, sin = made(wide.shape[1], dtype=dtype), *(made(1, d, dtype=dtype) for _ in "cs")
    keys, values = (made(2, groups, length, d, dtype=dtype) for _ in "kv")
    where = None if at is None else torch.tensor([at], device=DEVICE)
    results = []
    for _ in range(3):  # the norm before it is what a step must wait for
        qkv = run_norm("", [weight], wide, 1e-5)
        results.append(decode_step(qkv, cos, sin, where, keys, values, None, d**-0.5))
    assert all(torch.equal(y, results[0]) for y in results)
    last = length - 1 if at is None else at
    q, k, v = qkv.view(2, -1, 1, d).split([heads, groups, groups], 1)
    assert torch.equal(keys[:, :, last : last + 1], turned(k, cos, sin))
    assert torch.equal(values[:, :, last : last + 1], v)
    each = heads // groups
    k, v = (t[:, :, : last + 1].double().repeat_interleave(each, 1) for t in (keys, values))
    scores = turned(q, cos, sin).double() @ k.transpose(2, 3) * d**-0.5
    assert error(results[0], (scores.softmax(-1) @ v).reshape(2, -1)) < 0.6 * DTYPES[dtype]


def llama(config):
    import transformers

    from quant_core.live import quantize_model_
    from quant_core.shared import share_inputs

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    model.to(DEVICE)
    quantize_model_(model, "int4", options={"group_size": 64})
    share_inputs(model)
    return model


def decode(model, tokens, cache):
    out = []
    for part in (tokens[:, :9], *(tokens[:, i : i + 1] for i in range(9, tokens.shape[1]))):
        with torch.no_grad():
            out.append(model(part, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(out)


def test_transformers_layers_in_one_call_give_the_same_tokens(monkeypatch):
    transformers = pytest.importorskip("transformers")
    from quant_core.engines.transformers_attention import attach_attention
    from quant_core.engines.transformers_block import LayerPart
    from quant_core.engines.transformers_layers import attach_blocks
    from quant_core.engines.transformers_parts import attach_norms_and_mlps
    from quant_core.registry import registry

    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=64, initializer_range=0.05,
        attn_implementation="sdpa",
    )  # fmt: skip
    tokens = torch.randint(0, 256, (2, 14), device=DEVICE)

    def caches():
        return transformers.DynamicCache(), transformers.StaticCache(config, max_cache_len=20)

    plain = llama(config)
    want = [decode(plain, tokens, cache) for cache in caches()]
    model = llama(config)
    held = {"dtype": torch.bfloat16, "device": DEVICE}
    attach_attention(model, registry(), **held)
    parts = attach_norms_and_mlps(model, registry(), **held)
    attach_blocks(model, parts)
    layers = [n for n, run in parts.swapped.items() if run.startswith("decoder layer")]
    assert len(layers) == 2, parts.table
    in_one_call, step = [], LayerPart.step

    def counted(self, module, x, kwargs, **more):
        y = step(self, module, x, kwargs, **more)
        if not more.get("proving"):
            in_one_call.append(y is not None)
        return y

    monkeypatch.setattr(LayerPart, "step", counted)
    for cache, expected in zip(caches(), want, strict=True):
        in_one_call.clear()
        # single roundings to bfloat16 (2^-9) that tip, through two layers
        assert error(decode(model, tokens, cache), expected) < 2e-2
        assert in_one_call == [False] * 2 + [True] * 10, "two layers: a prompt, then five tokens"
    other = decode(model, tokens.roll(1, 0), transformers.DynamicCache())
    assert error(other, want[0]) > 0.1  # control: other tokens
