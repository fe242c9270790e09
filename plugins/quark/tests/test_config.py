"""The config: what it means for a layer, and what is refused with which words."""

from __future__ import annotations

import pickle

import pytest

from quant_core.errors import ConfigError
from quant_plugin_quark.config import parse_config
from quant_plugin_quark.names import first_of, pattern, spellings


def raises(code, block, key):
    with pytest.raises(ConfigError) as err:
        parse_config(block, "config.json")
    assert err.value.code == code
    assert key in err.value.tensor
    assert "config.json" in str(err.value)
    return str(err.value)


def test_first_layer_pattern_beats_layer_type_beats_global(qk):
    config = parse_config(
        qk.block(
            qk.spec("int8"),
            layer_quant_config={
                "*self_attn*": qk.args(qk.mx("fp4")),
                "*q_proj": qk.args(qk.mx("fp6_e2m3")),
            },
            layer_type_quant_config={"Linear": qk.args(qk.grouped("uint4", 128))},
        ),
        "config.json",
    )
    dtypes = {
        name: config.args_of(name).weight[0].dtype
        for name in ("model.layers.0.self_attn.q_proj", "x.q_proj", "model.layers.0.mlp.up_proj")
    }
    assert list(dtypes.values()) == ["fp4", "fp6_e2m3", "uint4"]
    typeless = parse_config(qk.block(qk.spec("int8")), "config.json")
    assert typeless.args_of("any").weight[0].dtype == "int8"


@pytest.mark.parametrize(
    ("text", "name", "hit"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "language_model.lm_head", True),
        ("lm_head", "model.not_lm_head", False),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.1.*", "model.layers.10.mlp.gate", False),
        # quantized as a part of a multimodal model, stored with the wrapper elsewhere
        ("model.language_model.layers.0.mlp.*", "language_model.model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.*", "language_model.model.layers.0.mlp.gate", True),
        ("model.language_model.layers.0.mlp.gate", "model.layers.0.mlp.gate", True),
        ("model.visual.*", "model.layers.0.mlp.gate", False),
        ("mtp.*", "mtp.layers.0.mlp.up_proj", True),
        ("re:.*mtp.*", "model.mtp.0.up_proj", True),
        ("re:mtp", "model.mtp.0.up_proj", False),
    ],
)
def test_patterns_match_module_names_whatever_the_wrapper(text, name, hit):
    found = first_of([pattern(text, "exclude")], name)
    assert (found is not None) is hit


def test_own_spelling_of_a_name_comes_first():
    assert spellings("language_model.model.x")[0] == "language_model.model.x"
    assert spellings("visual.x") == ("visual.x",)


def test_config_pickles_small_and_comes_back_equal(qk):
    config = parse_config(
        qk.block(qk.nvfp4(), qk.nvfp4(dynamic=True), exclude=["lm_head", "re:.*gate"]),
        "config.json",
    )
    data = pickle.dumps(config)
    assert pickle.loads(data) == config
    assert len(data) < 10_000


def test_unknown_keys_are_named_in_one_warning(qk):
    block = qk.block(qk.spec("int8", surprise=1), novelty=2)
    (warning,) = parse_config(block, "config.json").warnings
    assert "'novelty'" in warning
    assert "global_quant_config.weight.surprise" in warning


def test_softmax_quantization_is_said_to_be_left_out(qk):
    block = qk.block(qk.spec("int8"), softmax_quant_spec=qk.spec("fp8_e4m3"))
    (warning,) = parse_config(block, "config.json").warnings
    assert "softmax" in warning


@pytest.mark.parametrize(
    ("keys", "code", "key"),
    [
        ({"dtype": "int5"}, "Q-CFG-VALUE", "weight.dtype"),
        ({"dtype": None}, "Q-CFG-VALUE", "weight.dtype"),
        ({"qscheme": "per_row"}, "Q-CFG-VALUE", "weight.qscheme"),
        ({"qscheme": None}, "Q-CFG-VALUE", "weight.qscheme"),
        ({"qscheme": "per_group"}, "Q-CFG-CONFLICT", "weight.group_size"),
        ({"qscheme": "per_group", "group_size": 0}, "Q-CFG-VALUE", "weight.group_size"),
        ({"qscheme": "per_group", "group_size": True}, "Q-CFG-VALUE", "weight.group_size"),
        ({"qscheme": "per_block", "block_size": [128]}, "Q-CFG-VALUE", "weight.block_size"),
        ({"symmetric": "yes"}, "Q-CFG-VALUE", "weight.symmetric"),
        ({"scale_format": "e5m3"}, "Q-CFG-VALUE", "weight.scale_format"),
        ({"scale_calculation_mode": "round"}, "Q-CFG-VALUE", "weight.scale_calculation_mode"),
        ({"round_method": "floor"}, "Q-CFG-VALUE", "weight.round_method"),
    ],
)
def test_bad_argument_is_named(qk, keys, code, key):
    raises(code, qk.block(qk.spec("int8") | keys), key)


def test_interleaved_mx_of_old_exports_is_refused_by_name(qk):
    text = raises("Q-CFG-VALUE", qk.block(qk.spec("mx")), "weight.dtype")
    assert "older mx export" in text


@pytest.mark.parametrize(
    ("changes", "code", "key"),
    [
        ({"global_quant_config": []}, "Q-CFG-TYPE", "global_quant_config"),
        ({"global_quant_config": {"weight": "int8"}}, "Q-CFG-TYPE", "weight"),
        ({"layer_quant_config": ["x"]}, "Q-CFG-TYPE", "layer_quant_config"),
        ({"exclude": [1]}, "Q-CFG-TYPE", "exclude"),
        ({"exclude": ["re:("]}, "Q-CFG-REGEX", "("),
        ({"algo_config": ["awq"]}, "Q-CFG-TYPE", "algo_config"),
        ({"export": {"weight_format": "fake_quantized"}}, "Q-CFG-VALUE", "export.weight_format"),
        ({"export": {"pack_method": "shuffle"}}, "Q-CFG-VALUE", "export.pack_method"),
        ({"algo_config": [{"name": "rotation", "r3": True}]}, "Q-CFG-TRANSFORM", "r3"),
    ],
)
def test_bad_block_is_named(qk, changes, code, key):
    with pytest.raises(ConfigError) as err:
        parse_config(qk.block(qk.spec("int8")) | changes, "config.json")
    assert err.value.code == code
    assert key in err.value.tensor


def test_three_quantizations_of_one_operand_are_refused(qk):
    raises("Q-CFG-VALUE", qk.block([qk.spec("int8")] * 3), "weight")
