"""Checkpoints made by amd-quark 0.13: logits within the bound of their reference. Their weights and
bytes are checked with all other checkpoints in tests/."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from producers import distances, expected, missed, within
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


@pytest.mark.parametrize("name", WEIGHT_ONLY + ACTIVATIONS)
def test_logits_are_within_the_bound(shared, name):
    want = expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32)
    found = distances(model, want)
    assert missed(found, want) == [], found


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
    want = expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32, kernels=_REFERENCE)
    _change_inputs(model, lambda spec: None)
    found = distances(model, want)
    assert missed(found, want)
    # as far off as the producer measured, to the digits it gave
    assert found["mean"] == pytest.approx(want.meta["distance_without_act_quant"], rel=0.001)


@pytest.mark.parametrize("rule", ["rceil", "floor"])
def test_another_rule_of_the_block_exponent_misses_the_bound(shared, rule):
    name = "quark-mxfp4"
    want = expected(shared / name)
    model = load_model(shared / name, dtype=torch.float32, kernels=_REFERENCE)
    _change_inputs(model, lambda s: replace(s, scales=(replace(s.scales[0], rule=rule),)))
    assert not within(model, want)


# ---------------------------------------------------------------------------------- KV-cache scales


@pytest.mark.parametrize("activations", [True, False])
def test_fp8_logits_are_within_the_bound_with_keys_and_values_rounded(shared, activations):
    want = expected(shared / WITH_CACHE)
    model = load_model(shared / WITH_CACHE, dtype=torch.float32, strict=True, kernels=_REFERENCE)
    if not activations:
        _change_inputs(model, lambda spec: None)
    found = distances(model, want)
    assert (missed(found, want) == []) is activations, found
    if not activations:
        off = want.meta["distance_without_act_quant"]
        assert found["mean"] == pytest.approx(off, rel=0.001)


def test_fp8_logits_miss_the_bound_with_a_float_cache(shared):
    want = expected(shared / WITH_CACHE)
    model = load_model(shared / WITH_CACHE, dtype=torch.float32, kv_cache="float")
    found = distances(model, want)
    assert missed(found, want)
    # everything but the cache is right: exactly as far off as the producer without it
    assert found["mean"] == pytest.approx(want.meta["distance_without_kv_quant"], abs=1e-6)


# --------------------------------------------------------------------------------------- fault case


def test_float_experts_that_the_config_does_not_exclude_load_with_a_warning(shared):
    planned = plan(open_checkpoint(shared / "quark-moe-mxfp4-attn-only"))
    (warning,) = planned.warnings
    assert "4 stacks of experts are stored as bfloat16" in warning
    assert "model.layers.0.mlp.experts.down_proj" in warning
    assert all(".self_attn." in name for name in planned.quantized)
