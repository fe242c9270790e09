"""Checkpoints made by llm-compressor 0.14.0.1 (compressed-tensors 0.19.0): logits within the bound
of their reference. Their weights and bytes are checked with all other checkpoints in tests/."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from producers import distances, expected, missed
from quant_core.build import Builder
from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.load import load_tensor, read_matrix
from quant_core.nn import QuantComposite, QuantLinear, QuantModule
from quant_core.packing import unpack
from quant_core.plan import plan

pytestmark = pytest.mark.shared
WEIGHT_ONLY = (
    "ct-w3a16-gptq",
    "ct-w4a16-awq-asym",
    "ct-w4a16-g128-sym-rtn",
    "ct-w8a16-g128",
    "ct-moe-w4a16-g128",
    "ct-spinquant-r1r2-w4a16",
    "ct-spinquant-r1r2r4-w4a16",
    "ct-nvfp4a16",
)
ACTIVATIONS = (
    "ct-w8a8-int8-dynamic-gptq",
    "ct-w8a8-int8-static-asym-act",
    "ct-w4afp8",
    "ct-fp8-block128",
    "ct-fp8-dynamic",
    "ct-fp8-static-tensor",
    "ct-mla-fp8-block",
    "ct-moe-fp8-dynamic",
    "ct-moe-nvfp4",
    "ct-mxfp4",
    "ct-mxfp8",
    "ct-nvfp4",
    "ct-mixed-fp8attn-w4mlp-nvfp4last",
)


@pytest.mark.parametrize("name", WEIGHT_ONLY + ACTIVATIONS)
def test_logits_are_within_the_bound(shared, name):
    want = expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32)
    found = distances(model, want)
    assert missed(found, want) == [], found


def _without_activation_quantization(model):
    for module in model.modules():
        if isinstance(module, QuantModule):
            operands = tuple(o for o in module.op.operands if o[0] != "input")
            module.op = replace(module.op, operands=operands)
            module._bind()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_logits_miss_the_bound_without_activation_quantization(shared, name):
    want = expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32, kernels="torch_ref")
    _without_activation_quantization(model)
    found = distances(model, want)
    assert missed(found, want)
    # as far off as the producer measured, to the digits it gave
    assert found["mean"] == pytest.approx(want.meta["distance_without_act_quant"], rel=0.02)


def test_run_time_scale_over_127_instead_of_half_the_range_is_farther_off(shared):
    name = "ct-w8a8-int8-dynamic-gptq"
    want = expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32, kernels="torch_ref")
    right = distances(model, want)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            changed = tuple(
                (r, replace(s, scales=(replace(s.scales[0], peak=127.0),))) if r == "input"
                else (r, s)
                for r, s in module.op.operands
            )  # fmt: skip
            module.op = replace(module.op, operands=changed)
            module._bind()
    wrong = distances(model, want)
    assert wrong["mean"] > 2 * right["mean"]


CACHED = "ct-kvfp8-w4a16"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_and_values_are_rounded_as_by_the_producer(shared, attention):
    want = expected(shared / CACHED)
    model = load_model(
        shared / CACHED, dtype=torch.float32, attn_implementation=attention, strict=True
    )
    found = distances(model, want)
    assert missed(found, want) == []
    assert found["mean"] < 1e-5  # the same fp8 codes; float32 sums in another order
    # the cache of a step by step run gives the same keys and values
    with torch.inference_mode():
        first = model(want.ids[:40].view(1, -1), use_cache=True)
        rest = model(want.ids[40:].view(1, -1), past_key_values=first.past_key_values).logits[0]
    assert (rest - want.logits[40:]).abs().mean() < 1e-5


def test_logits_miss_the_bound_with_a_float_cache(shared):
    want = expected(shared / CACHED)
    model = load_model(shared / CACHED, dtype=torch.float32, kv_cache="float")
    found = distances(model, want)
    assert missed(found, want)
    # everything but the cache is right: exactly as far off as the producer without it
    assert found["mean"] == pytest.approx(want.meta["distance_without_kv_quant"], abs=1e-6)


@pytest.mark.parametrize("change", ["dropped", "not divided"])
def test_logits_miss_the_bound_without_the_rotation(shared, change):
    name = "ct-spinquant-r1r2r4-w4a16"
    want = expected(shared / name)
    # the kernel that keeps the matrix as it is
    model = load_model(shared / name, dtype=torch.float32, kernels="torch_ref")
    rotated = [m for m in model.modules() if isinstance(m, QuantLinear) and m.op.transforms]
    assert len(rotated) == 2  # both layers share the one matrix that the file holds
    for module in rotated:
        for i, transform in enumerate(module.op.transforms):
            value = getattr(module, f"transform_{i}_0")
            if transform.kind == "scale":
                value.fill_(1.0)
            elif change == "dropped":
                value.copy_(torch.eye(len(value)))
    found = distances(model, want)
    assert missed(found, want)
    assert found["mean"] > 100 * want.meta["bound"]["mean"]


@pytest.mark.parametrize("rule", ["rceil", "floor"])
def test_another_rule_of_the_block_exponent_is_farther_off(shared, rule):
    name = "ct-mxfp4"
    want = expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32)
    right = distances(model, want)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.op = replace(
                module.op,
                operands=tuple(
                    (r, replace(s, scales=(replace(s.scales[0], rule=rule),)))
                    if r == "input" else (r, s)
                    for r, s in module.op.operands
                ),
            )  # fmt: skip
            module._bind()
    assert distances(model, want)["mean"] > 100 * right["mean"]


def test_unequal_global_scales_fuse_without_a_change(shared):
    planned = plan(open_checkpoint(shared / "ct-nvfp4a16"))
    builder = Builder(plan=planned, dtype=torch.float32)
    members = [planned.members[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1)]
    factors = {read_matrix(planned, m).weight.scales[1].item() for m in members}
    assert len(factors) > 1
    module = builder.linear("both", members)
    assert isinstance(module, QuantLinear)
    want = torch.cat([read_matrix(planned, m).dequantize() for m in members])
    assert torch.equal(module.restore().dequantize(), want)


def test_nvfp4_weights_miss_if_the_factor_multiplies_or_nibbles_swap(shared):
    folder = shared / "ct-nvfp4a16"
    planned = plan(open_checkpoint(folder))
    made = open_checkpoint(folder / "expected.safetensors")
    key = next(k for k in made.tensors if k.startswith("weight."))
    module = key.removeprefix("weight.").partition("#")[0].removesuffix(".weight")
    qt = read_matrix(planned, planned.members[module]).weight
    want = made.read(key)
    assert torch.equal(qt.dequantize()[: want.shape[0]], want)
    fine, factor = qt.spec.scales
    multiplied = replace(qt.spec, scales=(fine, replace(factor, inverse=False)))
    swapped = qt.codes >> 4 | qt.codes << 4
    for wrong in (replace(qt, spec=multiplied), replace(qt, codes=swapped)):
        assert not torch.allclose(wrong.dequantize()[: want.shape[0]], want, rtol=0.1)


def test_members_fuse_only_if_their_static_scales_agree(shared):
    planned = plan(open_checkpoint(shared / "ct-w8a8-int8-static-asym-act"))
    builder = Builder(plan=planned, dtype=torch.float32)
    x = torch.randn(5, 256)
    layers = [f"model.layers.{i}.self_attn" for i in (0, 1)]
    alike = [planned.members[f"{layers[0]}.{p}_proj"] for p in "qkv"]  # one input
    unlike = [planned.members[f"{layer}.q_proj"] for layer in layers]
    for members, kind in ((alike, QuantLinear), (unlike, QuantComposite)):
        module = builder.linear("fused", members)
        assert type(module) is kind
        want = torch.cat([builder.linear(m.layer.name, [m])(x) for m in members], dim=-1)
        # the same float32 products, summed in another order over 256 columns
        assert torch.allclose(module(x), want, rtol=1e-5, atol=1e-4)


def test_three_bit_words_read_as_padded_miss_the_weights(shared):
    folder = shared / "ct-w3a16-gptq"
    planned = plan(open_checkpoint(folder))
    made = open_checkpoint(folder / "expected.safetensors")
    key = next(k for k in made.tensors if k.startswith("weight."))
    module = key.removeprefix("weight.").partition("#")[0].removesuffix(".weight")
    (lt,) = load_tensor(planned, module).matrices
    want = made.read(key)
    assert torch.equal(lt.dequantize()[: want.shape[0]], want)
    qt = lt.weight
    padded = replace(qt.packing, straddle=False)
    n, k = qt.shape[0], qt.codes.shape[1] * 10
    codes = unpack(qt.codes, 3, (n, k), padded)[:, : want.shape[1]]
    right = unpack(qt.codes, 3, qt.shape, qt.packing)[:, : codes.shape[1]]
    assert not torch.equal(codes, right)


@pytest.mark.parametrize(
    "name", ["ct-spinquant-r1r2r4-w4a16", "ct-moe-nvfp4", "ct-mixed-fp8attn-w4mlp-nvfp4last"]
)
def test_saving_gives_the_stored_bytes_back(shared, tmp_path, name):
    load_model(shared / name, dtype=torch.bfloat16).save_pretrained(tmp_path)
    old, new = open_checkpoint(shared / name / "model.safetensors"), open_checkpoint(tmp_path)
    assert set(old.tensors) == set(new.tensors)
    for tensor in old.tensors:
        a, b = old.read(tensor), new.read(tensor)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), tensor
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), tensor
