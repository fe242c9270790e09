"""The config: what is read, what is refused, and which group a module gets."""

from __future__ import annotations

import json
import pickle
from types import MappingProxyType

import pytest

from quant_core.errors import ConfigError
from quant_plugin_compressed_tensors.args import PRESETS, parse_args
from quant_plugin_compressed_tensors.config import parse_config

TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
FP8_TOKEN = TOKEN | {"type": "float"}


def fails(code, call, *args, match=None):
    with pytest.raises(ConfigError, match=match) as err:
        call(*args)
    assert err.value.code == code
    assert err.value.plugin == "compressed_tensors"
    return err.value


# ---------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("raw", "strategy", "size"),
    [
        ({}, "tensor", 0),
        ({"group_size": -1}, "channel", 0),
        ({"group_size": 64}, "group", 64),
        ({"strategy": "CHANNEL", "group_size": -1}, "channel", 0),
        ({"strategy": "group", "group_size": 32}, "group", 32),
        ({"strategy": "tensor_group", "group_size": 16}, "tensor_group", 16),
    ],
)
def test_strategy_follows_from_group_size_when_absent(raw, strategy, size):
    args = parse_args(raw, "config.json", "weights")
    assert (args.strategy, args.group_size) == (strategy, size)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (None, ""), (False, ""), (True, "group"), ("group", "group"), ("dynamic", "group"),
        ("static", "weight"), ("weight", "weight"),
    ],
)  # fmt: skip
def test_actorder_spellings(value, meaning):
    assert parse_args({"actorder": value}, "config.json", "weights").actorder == meaning


def test_block_structure_is_read_as_list_and_as_text():
    for value in ([128, 64], "128x64"):
        raw = {"strategy": "block", "block_structure": value}
        assert parse_args(raw, "config.json", "weights").block == (128, 64)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        *(({"num_bits": v}, "Q-CFG-VALUE") for v in (0, 1, 9, 3.5, "4", True, -4, 10**9, None)),
        *(({"group_size": v}, "Q-CFG-VALUE") for v in (0, -2, "128", 10**12, True, 1.5)),
        ({"num_bits": 5, "type": "float"}, "Q-CFG-VALUE"),
        ({"type": "nf"}, "Q-CFG-VALUE"),
        ({"type": 3}, "Q-CFG-TYPE"),
        ({"symmetric": "yes"}, "Q-CFG-VALUE"),
        ({"strategy": "row"}, "Q-CFG-VALUE"),
        ({"strategy": "group"}, "Q-CFG-CONFLICT"),
        ({"strategy": "channel", "group_size": 128}, "Q-CFG-CONFLICT"),
        ({"strategy": "block"}, "Q-CFG-CONFLICT"),
        ({"block_structure": [128, 128]}, "Q-CFG-CONFLICT"),
        ({"strategy": "block", "block_structure": [128]}, "Q-CFG-VALUE"),
        ({"strategy": "block", "block_structure": "12 8"}, "Q-CFG-VALUE"),
        ({"dynamic": "global"}, "Q-CFG-VALUE"),
        ({"actorder": "sorted"}, "Q-CFG-VALUE"),
        ([], "Q-CFG-TYPE"),
    ],
)
def test_bad_arguments_name_the_key(raw, code):
    fails(code, parse_args, raw, "config.json", "config_groups.g.weights", match="config_groups.g")


def test_arguments_read_back_what_they_write():
    for preset in PRESETS.values():
        for raw in preset.values():
            args = parse_args(raw, "config.json", "x")
            assert parse_args(json.loads(json.dumps(args.to_json())), "config.json", "x") == args


# -------------------------------------------------------------------------------------- groups


def test_preset_stands_for_its_arguments(ct):
    config = parse_config(ct.block() | {"config_groups": {"w4a16": ["Linear"]}}, "config.json")
    group = config.groups["w4a16"]
    assert group.targets == ("Linear",)
    assert (group.weights.bits, group.weights.group_size, group.inputs) == (4, 128, None)
    fails(
        "Q-CFG-VALUE",
        parse_config,
        ct.block() | {"config_groups": {"W4A17": ["Linear"]}},
        "config.json",
        match="W4A17",
    )


@pytest.mark.parametrize(
    ("weights", "inputs", "fmt"),
    [
        ({"num_bits": 4, "group_size": 128}, None, "pack-quantized"),
        ({"num_bits": 8, "group_size": -1}, None, "pack-quantized"),
        ({"num_bits": 8, "group_size": -1}, TOKEN, "int-quantized"),
        ({"num_bits": 4, "group_size": 128}, FP8_TOKEN, "int-quantized"),
        ({"num_bits": 8, "type": "float"}, FP8_TOKEN, "float-quantized"),
        ({"num_bits": 8, "type": "float"}, None, "naive-quantized"),
        (
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            None,
            "nvfp4-pack-quantized",
        ),
        ({"num_bits": 4, "type": "float", "group_size": 32}, None, "mxfp4-pack-quantized"),
        (
            {"num_bits": 8, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"},
            None,
            "mxfp8-quantized",
        ),
    ],
)
def test_format_follows_from_the_arguments_when_absent(ct, weights, inputs, fmt):
    for absent in (None, "mixed-precision"):
        config = parse_config(ct.block(weights, inputs, format=absent), "config.json")
        assert config.groups["group_0"].format == fmt


def test_own_format_of_a_group_beats_the_global_one(ct):
    raw = ct.block(format="int-quantized")
    raw["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert parse_config(raw, "config.json").groups["group_0"].format == "pack-quantized"


def _groups(ct, *targets):
    groups = {f"g{i}": {"targets": list(t), "weights": ct.args(4)} for i, t in enumerate(targets)}
    return parse_config(ct.block() | {"config_groups": groups}, "config.json")


@pytest.mark.parametrize(
    ("targets", "group"),
    [
        ((["Linear"], ["re:.*up_proj"], ["a.up_proj"]), "g2"),  # exact before all
        ((["Linear"], ["re:.*up_proj"]), "g1"),  # expression before class
        ((["re:a.*"], ["re:.*up_proj"]), "g1"),  # expressions sorted as text: "." before "a"
        ((["Linear"], ["Linear"]), "g1"),  # the last group that names a target
        ((["re:up_proj"],), None),  # anchored at the start
        ((["re:a"],), "g0"),  # but not at the end
        ((["up_proj"],), None),  # a bare name is no suffix
        ((["linear"], ["Embedding"]), None),
    ],
)
def test_target_priority_is_the_librarys(ct, targets, group):
    found = _groups(ct, *targets).group_of("a.up_proj", "linear")
    assert (found[0].name if found else None) == group


def test_class_names_stand_for_kinds_of_layers(ct):
    config = _groups(ct, ["Linear"], ["Embedding"])
    assert config.group_of("e.3.up", "experts")[0].name == "g0"
    assert config.group_of("embed", "embedding")[0].name == "g1"


def test_ignore_entries(ct):
    config = parse_config(
        ct.block(ignore=["lm_head", "re:.*mlp.gate$", "Embedding"]), "config.json"
    )
    assert config.matcher.ignored("lm_head", "linear") == "lm_head"
    assert config.matcher.ignored("a.mlp.gate", "linear") == "re:.*mlp.gate$"
    assert config.matcher.ignored("a.mlp.gate_proj", "linear") == ""
    assert config.matcher.ignored("embed_tokens", "embedding") == "Embedding"
    assert {p.text for p in config.name_patterns()} == {"lm_head", ".*mlp.gate$"}


def test_invalid_expression_is_reported_at_once(ct):
    with pytest.raises(ConfigError) as err:
        parse_config(ct.block(ignore=["re:a(b"]), "config.json")
    assert err.value.code == "Q-CFG-REGEX"


# ----------------------------------------------------------------------------------- the block


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"config_groups": None}, "Q-CFG-TYPE"),
        ({"config_groups": {"g": 4}}, "Q-CFG-TYPE"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "Q-CFG-TYPE"),
        ({"config_groups": {"g": {"targets": [3]}}}, "Q-CFG-TYPE"),
        ({"ignore": "lm_head"}, "Q-CFG-TYPE"),
        ({"version": 19}, "Q-CFG-TYPE"),
        ({"version": "new"}, "Q-CFG-TYPE"),
        ({"format": 4}, "Q-CFG-TYPE"),
        ({"format": "marlin-24"}, "Q-CFG-VALUE"),
        ({"format": "sparse-24-bitmask"}, "Q-CFG-VALUE"),
        ({"format": "zip-quantized"}, "Q-CFG-VERSION"),
        ({"quantization_status": "frozen"}, "Q-CFG-VALUE"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "Q-CFG-VALUE"),
        ({"kv_cache_scheme": {"num_bits": 3, "type": "float"}}, "Q-CFG-VALUE"),
        ({"transform_config": {"config_groups": {"R": 3}}}, "Q-CFG-TYPE"),
    ],
)
def test_bad_blocks_are_refused(ct, change, code):
    fails(code, parse_config, ct.block() | change, "config.json", match=r"config\.json")


def test_quantized_outputs_are_refused(ct):
    raw = ct.block()
    raw["config_groups"]["group_0"]["output_activations"] = TOKEN
    fails("Q-CFG-VALUE", parse_config, raw, "config.json", match="output_activations")


@pytest.mark.parametrize("location", ["q_attn", "k_cache"])
def test_transforms_inside_the_attention_are_refused(ct, location):
    use = {"targets": ["re:.*self_attn$"], "location": location, "inverse": False, "ignore": []}
    offline = use | {"location": "weight_input"}
    raw = ct.block(
        transform_config={"config_groups": {"R3": {"type": "hadamard", "apply": [offline, use]}}}
    )
    err = fails("Q-CFG-TRANSFORM", parse_config, raw, "config.json", match="R3")
    assert err.actual == location


@pytest.mark.parametrize("change", [{"type": "random-matrix"}, {"type": None}, {"randomize": True}])
def test_transforms_of_unverified_kinds_are_refused(ct, change):
    use = {"targets": ["Linear"], "location": "input"}
    group = {"type": "hadamard", "apply": [use]} | change
    raw = ct.block(transform_config={"config_groups": {"R4": group}})
    fails("Q-CFG-TRANSFORM", parse_config, raw, "config.json", match="R4")


def test_transforms_at_inputs_and_outputs_are_read(ct):
    uses = [{"targets": ["Linear"], "location": at} for at in ("input", "output", "weight_input")]
    uses[1] |= {"inverse": True, "ignore": ["lm_head"]}
    group = {"type": "random-hadamard", "head_dim": 64, "apply": uses}
    config = parse_config(ct.block(transform_config={"config_groups": {"R": group}}), "config.json")
    first, second = config.transforms
    assert (first.leaf, first.inverse, first.block) == ("R_input", False, 64)
    assert (second.leaf, second.inverse) == ("R_output", True)
    assert first.applies("lm_head", "linear")
    assert not second.applies("lm_head", "linear")


def test_fused_transforms_need_nothing(ct):
    use = [{"targets": ["Linear"], "location": at} for at in ("weight_input", "weight_output")]
    raw = ct.block(transform_config={"config_groups": {"R1": {"type": "hadamard", "apply": use}}})
    assert parse_config(raw, "config.json").groups


def test_unknown_keys_are_one_warning(ct):
    raw = ct.block(ct.args(4, 128, colour="red"), new_key=1)
    (warning,) = parse_config(raw, "config.json").warnings
    assert "new_key" in warning
    assert "config_groups.group_0.weights.colour" in warning


def test_nested_block_of_older_files_is_read(ct):
    raw = {"quant_method": "compressed-tensors", "quantization_config": ct.block()}
    assert parse_config(raw, "config.json").groups["group_0"].weights.bits == 4


def test_config_pickles_as_text_and_the_input_is_not_changed(ct):
    raw = ct.block(ignore=["re:.*gate$"])
    config = parse_config(MappingProxyType(raw), "config.json")
    assert raw == ct.block(ignore=["re:.*gate$"])
    assert len(pickle.dumps(config)) < 2000
    assert pickle.loads(pickle.dumps(config)) == config
    assert json.loads(config.stored) == raw
