"""Detection, config, and what importing the plugin costs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import quant_plugin_mxfp4 as plugin
from quant_core.errors import ConfigError
from quant_plugin_mxfp4.config import parse_config


def test_import_of_everything_but_layout_loads_no_torch():
    names = "config detect layers scheme".split()
    imports = ", ".join(f"{plugin.__name__}.{n}" for n in names)
    code = (
        f"import sys, {imports}\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_detection(mx, write):
    tensors = mx.named(mx.experts().stored)
    declared = plugin.detect_format(write(tensors))
    assert (declared.level, declared.plugin) == ("declared", "mxfp4")
    assert pickle.loads(pickle.dumps(declared)) == declared
    assert plugin.detect_format(write(tensors, None)).level == "structural"
    assert plugin.detect_format(write(tensors, {"quant_method": "MXFP4"})).level == "declared"
    assert plugin.detect_format(write(tensors, {"quant_method": "mxfp8"})) is None
    assert plugin.detect_format(write(tensors, {"quant_method": "quark"})) is None
    floats = {"lm_head.weight": torch.zeros(4, 4)}
    assert plugin.detect_format(write(floats, None)) is None


@pytest.mark.parametrize(
    ("entry", "name", "hit"),
    [
        ("model.layers.*.self_attn", "model.layers.11.self_attn.q_proj", True),
        ("model.layers.1", "model.layers.1.mlp", True),
        ("model.layers.1", "model.layers.11.mlp", False),
        ("mlp.router", "model.layers.0.mlp.router", True),
        ("model.layers.0.mlp.router", "model.layers.0.mlp.router_x", False),
        ("lm_head", "lm_head", True),
    ],
)
def test_entries_match_as_in_transformers(entry, name, hit):
    config = parse_config({"modules_to_not_convert": ["nothing", entry]}, "config.json")
    assert config.skip_entry(name) == (entry if hit else "")


@pytest.mark.parametrize(
    ("block", "code"),
    [
        ({"modules_to_not_convert": "lm_head x"}, "Q-CFG-TYPE"),
        ({"modules_to_not_convert": [3]}, "Q-CFG-TYPE"),
        ({"modules_to_not_convert": ["a(b"]}, "Q-CFG-REGEX"),
        ({"dequantize": "yes"}, "Q-CFG-VALUE"),
    ],
)
def test_bad_configs_are_refused(block, code):
    with pytest.raises(ConfigError) as err:
        parse_config(block, "config.json")
    assert err.value.code == code


def test_entry_without_a_module_is_reported_as_it_was_written(mx, write):
    stored = mx.experts().stored
    block = {**mx.CONFIG, "modules_to_not_convert": ["model.layers.*.nowhere"]}
    planned = mx.plan(write(mx.named(stored), block))
    assert planned.warnings == [
        "1 name pattern(s) match no module: 'modules_to_not_convert: model.layers.*.nowhere'"
    ]


def test_unknown_keys_are_one_warning():
    (warning,) = parse_config({"quant_method": "mxfp4", "colour": 1}, "config.json").warnings
    assert "colour" in warning


def test_config_is_written_back_or_made(mx, write):
    tensors = mx.named(mx.experts().stored) | {"lm_head.weight": torch.zeros(8, 64)}
    planned = mx.plan(write(tensors))
    assert plugin.make_config(planned) == mx.CONFIG
    other = SimpleNamespace(match=None, members=planned.members, checkpoint=planned.checkpoint)
    made = plugin.make_config(other)
    assert made == {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    assert parse_config(made, "config.json").skip_entry("lm_head") == "lm_head"
