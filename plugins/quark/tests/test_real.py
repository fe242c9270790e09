"""Checkpoints made by amd-quark 0.13: logits within the bound of their reference. Their weights and
bytes are checked with all other checkpoints in tests/."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.nn import QuantModule
from quant_core.plan import plan

pytestmark = pytest.mark.shared
WEIGHT_ONLY = ("quark-uint4-g128-awq",)
ACTIVATIONS = (
    "quark-int4-fp8-w4a8",
    "quark-int8",
    "quark-mixed-mxfp4-fp8",
    "quark-moe-mxfp4",
    "quark-moe-mxfp4-attn-only",
    "quark-mxfp4",
    "quark-mxfp4-fp8",
    "quark-mxfp6-e2m3",
    "quark-nvfp4",
    "quark-ptpc-fp8",
)
WITH_CACHE = "quark-fp8-kvfp8"


def _expected(folder):
    tensors = open_checkpoint(folder / "expected.safetensors")
    meta = json.loads((folder / "expected.json").read_text())
    return tensors.read("input_ids"), tensors.read("logits"), meta


def _distances(model, ids, want, meta):
    with torch.inference_mode():
        got = model(ids.view(1, -1)).logits[0]
    d = (got - want).abs()
    within = meta["bound"].get("positions", {}).get("within", 0)
    return {
        "max": d.max().item(),
        "mean": d.mean().item(),
        "top1": int((got.argmax(-1) == want.argmax(-1)).sum()),
        "positions": int((d.amax(dim=-1) <= within).sum()),
    }


def _within(found, bound):
    least = bound.get("positions", {}).get("at_least", 0)
    return (
        found["max"] <= bound["max"]
        and found["mean"] <= bound["mean"]
        and found["top1"] >= bound["top1"]
        and found["positions"] >= least
    )


@pytest.mark.parametrize("name", WEIGHT_ONLY + ACTIVATIONS)
def test_logits_are_within_the_bound(shared, name):
    ids, want, meta = _expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32)
    found = _distances(model, ids, want, meta)
    assert _within(found, meta["bound"]), found


_REFERENCE = "torch_ref"  # its modules can be bound again for another operation


def _change_inputs(model, change):
    """Every module's quantized input as ``change`` makes it; None removes it."""
    for module in model.modules():
        if isinstance(module, QuantModule):
            operands = [(r, change(s) if r == "input" else s) for r, s in module.op.operands]
            module.op = replace(module.op, operands=tuple(o for o in operands if o[1]))
            module._bind()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_logits_miss_the_bound_without_activation_quantization(shared, name):
    ids, want, meta = _expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32, kernels=_REFERENCE)
    _change_inputs(model, lambda spec: None)
    found = _distances(model, ids, want, meta)
    assert not _within(found, meta["bound"])
    # as far off as the producer measured, to the digits it gave
    assert found["mean"] == pytest.approx(meta["distance_without_act_quant"], rel=0.001)


@pytest.mark.parametrize("rule", ["rceil", "floor"])
def test_another_rule_of_the_block_exponent_misses_the_bound(shared, rule):
    name = "quark-mxfp4"
    ids, want, meta = _expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32, kernels=_REFERENCE)
    _change_inputs(model, lambda s: replace(s, scales=(replace(s.scales[0], rule=rule),)))
    assert not _within(_distances(model, ids, want, meta), meta["bound"])


# ---------------------------------------------------------------------------------- KV-cache scales


@pytest.mark.parametrize("activations", [True, False])
def test_fp8_logits_are_within_the_bound_with_keys_and_values_rounded(shared, activations):
    ids, want, meta = _expected(shared / WITH_CACHE)
    model = load_model(shared / WITH_CACHE, dtype=torch.float32, strict=True, kernels=_REFERENCE)
    if not activations:
        _change_inputs(model, lambda spec: None)
    found = _distances(model, ids, want, meta)
    assert _within(found, meta["bound"]) is activations, found
    if not activations:
        off = meta["distance_without_act_quant"]
        assert found["mean"] == pytest.approx(off, rel=0.001)


def test_fp8_logits_miss_the_bound_with_a_float_cache(shared):
    ids, want, meta = _expected(shared / WITH_CACHE)
    model = load_model(shared / WITH_CACHE, dtype=torch.float32, kv_cache="float")
    found = _distances(model, ids, want, meta)
    assert not _within(found, meta["bound"])
    # everything but the cache is right: exactly as far off as the producer without it
    assert found["mean"] == pytest.approx(meta["distance_without_kv_quant"], abs=1e-6)


# --------------------------------------------------------------------------------------- fault case


def test_float_experts_that_the_config_does_not_exclude_load_with_a_warning(shared):
    planned = plan(open_checkpoint(shared / "quark-moe-mxfp4-attn-only"))
    (warning,) = planned.warnings
    assert "4 stacks of experts are stored as bfloat16" in warning
    assert "model.layers.0.mlp.experts.down_proj" in warning
    assert all(".self_attn." in name for name in planned.quantized)
