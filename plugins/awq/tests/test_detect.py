"""Who claims a checkpoint, from which file, and which files must agree."""

from __future__ import annotations

import pytest
import torch

from quant_core.errors import ConfigError
from quant_core.resolve import numberless
from quant_plugin_awq.detect import detect

BLOCK = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
OLD = {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}


@pytest.mark.parametrize(
    ("config", "side", "file"),
    [
        (BLOCK, {}, "config.json"),
        (BLOCK | {"quant_method": "AWQ"}, {}, "config.json"),
        ({"method": "awq", "bits": 4, "group_size": 64}, {}, "config.json"),
        (None, {"quant_config.json": OLD}, "quant_config.json"),
        (None, {"quantize_config.json": BLOCK}, "quantize_config.json"),
        (None, {"quantization_config.json": BLOCK}, "quantization_config.json"),
        (BLOCK, {"quant_config.json": OLD}, "config.json"),
    ],
)
def test_declared_files_are_claimed_and_named(write, small, config, side, file):
    match = detect(write(small(), config, side))
    assert (match.plugin, match.level) == ("awq", "declared")
    assert file in match.evidence
    assert (match.config.bits, match.config.group_size, match.config.layout) == (4, 64, "gemm")
    assert match.config.quantized == {"model.layers.*.mlp.up_proj"}


@pytest.mark.parametrize(
    ("config", "side"),
    [
        ({"quant_method": "gptq", "bits": 4}, {}),
        ({"quant_method": "gptq", "bits": 4}, {"quant_config.json": OLD}),
        ({"bits": 4, "group_size": 64}, {}),
        (None, {"quantize_config.json": {"bits": 4, "group_size": 64, "desc_act": False}}),
    ],
)
def test_checkpoints_of_others_are_not_claimed(write, small, config, side):
    assert detect(write(small(), config, side)) is None


@pytest.mark.parametrize(
    ("side", "key"),
    [
        ({"quant_config.json": OLD | {"w_bit": 8}}, "bits"),
        ({"quant_config.json": OLD | {"q_group_size": 128}}, "group_size"),
        ({"quantize_config.json": BLOCK | {"zero_point": False}}, "zero_point"),
        ({"quantization_config.json": BLOCK | {"version": "gemv"}}, "version"),
        ({"quantize_config.json": BLOCK | {"quant_method": "gptq"}}, "quant_method"),
        ({"quantize_config.json": BLOCK | {"modules_to_not_convert": ["b"]}}, "modules_to_not"),
    ],
)
def test_files_that_disagree_raise_conflict_naming_both(write, small, side, key):
    checkpoint = write(small(), BLOCK | {"modules_to_not_convert": ["a"]}, side)
    with pytest.raises(ConfigError, match=f"config.json and {next(iter(side))}: {key}") as err:
        detect(checkpoint)
    assert err.value.code == "Q-CFG-CONFLICT"


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "llm-awq"])
@pytest.mark.parametrize("g", [64, 128])
def test_shapes_alone_are_claimed_structurally(write, small, layout, g):
    match = detect(write(small(layout, k=512, n=24, g=g)))
    assert match.level == "structural"
    assert (match.config.layout, match.config.group_size) == (layout, g)


def test_gptq_shapes_and_plain_floats_are_not_claimed(write):
    gptq = {
        "a.qweight": torch.zeros(16, 32, dtype=torch.int32),
        "a.qzeros": torch.zeros(2, 4, dtype=torch.int32),
        "a.scales": torch.ones(2, 32).half(),
    }
    assert detect(write(gptq)) is None
    assert detect(write({"a.weight": torch.ones(4, 4)})) is None


def test_side_file_of_another_method_blocks_the_structural_guess(write, small):
    side = {"quantize_config.json": {"quant_method": "gptq", "bits": 4}}
    assert detect(write(small(), None, side)) is None


def test_numberless_replaces_whole_components_only():
    assert numberless("model.layers.12.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert numberless("lm_head") == "lm_head"
    assert numberless("0.fc1") == "*.fc1"
