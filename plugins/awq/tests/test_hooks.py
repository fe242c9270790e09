"""The hooks as core calls them, and what importing the plugin costs."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import quant_plugin_awq
from quant_core.errors import LayoutError
from quant_core.plan import plan
from quant_plugin_awq.scheme import build_scheme
from quant_plugin_awq.writer import config_for

BLOCK = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}


def test_import_of_plugin_config_and_scheme_loads_no_torch():
    code = (
        "import sys, quant_plugin_awq, quant_plugin_awq.detect, quant_plugin_awq.layers, "
        "quant_plugin_awq.writer\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_through_the_registry_and_its_config(write, small):
    planned = plan(write(small(), BLOCK))
    assert list(planned.quantized) == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    config = quant_plugin_awq.make_config(planned)
    assert config == BLOCK | {"modules_to_not_convert": ["lm_head"]}


def test_plan_warns_of_unknown_keys_and_of_patterns_without_a_match(write, small):
    block = BLOCK | {"modules_to_not_convert": ["lm_head", "visual"], "new_key": 1}
    warnings = " ".join(plan(write(small(), block)).warnings)
    assert "new_key" in warnings
    assert "visual" in warnings
    assert "lm_head" not in warnings


def _plan_of(*schemes):
    members = {
        str(i): SimpleNamespace(
            scheme=s, quantized=True, stored=(), layer=SimpleNamespace(name=str(i), kind="linear")
        )
        for i, s in enumerate(schemes)
    }
    return SimpleNamespace(members=members, checkpoint=SimpleNamespace(tensors={}))


def _scheme(**kw):
    return build_scheme(**({"layout": "gemm", "shape": (8, 64), "bits": 4, "group_size": 32} | kw))


def test_config_of_layers_that_differ_raises_represent():
    with pytest.raises(LayoutError, match=r"group_size.*32, 64") as err:
        config_for(_plan_of(_scheme(), _scheme(group_size=64), _scheme(shape=(8, 128))))
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_config_of_whole_row_groups_is_minus_one():
    rows = [_scheme(group_size=64), _scheme(group_size=128, shape=(8, 128))]
    assert config_for(_plan_of(*rows))["group_size"] == -1


def test_config_of_other_bits_names_the_dialect():
    assert config_for(_plan_of(_scheme(bits=5)))["provider"] == "auto-round"
    natural = config_for(_plan_of(_scheme(bits=3, interleaved=False)))
    assert natural["meta"] == {"quantizer": ["gptqmodel"]}
