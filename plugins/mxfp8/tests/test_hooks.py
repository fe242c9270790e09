"""Detection, config, and what importing the plugin costs."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

import quant_plugin_mxfp8 as plugin
from quant_core.errors import ConfigError
from quant_plugin_mxfp8.config import parse_config


def test_import_of_everything_but_layout_loads_no_torch():
    names = "config detect layers scheme".split()
    imports = ", ".join(f"{plugin.__name__}.{n}" for n in names)
    code = (
        f"import sys, {imports}\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", ["fp8", "modelopt", "mxfp4", "w4afp8"])
def test_only_its_own_method_is_claimed(mx, write, method):
    tensors = mx.named(mx.stored(torch.randn(4, 32)))
    found = plugin.detect_format(write(tensors))
    assert (found.level, found.plugin) == ("declared", "mxfp8")
    assert pickle.loads(pickle.dumps(found)) == found
    assert plugin.detect_format(write(tensors, {"quant_method": method})) is None
    assert plugin.detect_format(write(tensors, None)) is None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"activation_scheme": "static"}, "Q-CFG-VALUE"),
        ({"weight_block_size": [128, 128]}, "Q-CFG-VALUE"),
        ({"weight_block_size": "1x32"}, "Q-CFG-VALUE"),
        ({"fmt": "e5m2"}, "Q-CFG-VALUE"),
        ({"scale_fmt": "float"}, "Q-CFG-VALUE"),
        ({"fmt": 3}, "Q-CFG-TYPE"),
        ({"moe_quant_algo": "NVFP4"}, "Q-CFG-VALUE"),
        ({"ignored_layers": "lm_head"}, "Q-CFG-TYPE"),
        ({"ignored_layers": ["."]}, "Q-CFG-VALUE"),
    ],
)
def test_bad_configs_are_refused(mx, change, code):
    with pytest.raises(ConfigError) as err:
        parse_config(mx.CONFIG | change, "config.json")
    assert err.value.code == code
    assert next(iter(change)) in str(err.value)


def test_keys_may_be_absent_and_unknown_ones_are_one_warning():
    assert parse_config({"quant_method": "mxfp8"}, "config.json").warnings == ()
    (warning,) = parse_config({"quant_method": "mxfp8", "colour": 1}, "config.json").warnings
    assert "colour" in warning


def test_config_that_is_made_reads_back(mx, write):
    tensors = mx.named(mx.stored(torch.randn(4, 32))) | {"lm_head.weight": torch.zeros(8, 32)}
    made = plugin.make_config(mx.plan(write(tensors)))
    assert made == mx.CONFIG
    parse_config(made, "config.json")
