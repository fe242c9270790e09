"""The hooks as core calls them, what importing the plugin costs, and the config written back."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import quant_plugin_nvfp4 as plugin
from quant_core.errors import ConfigError, LayoutError
from quant_core.load import load_tensor
from quant_core.spec import LayerDesc
from quant_plugin_nvfp4.config import parse_config
from quant_plugin_nvfp4.writer import config_for, describe


def test_import_of_everything_but_layout_loads_no_torch():
    names = "algos config detect exclude layers scheme writer".split()
    imports = ", ".join(f"{plugin.__name__}.{n}" for n in names)
    code = (
        f"import sys, {imports}\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", ["modelopt", "modelopt_fp4", "modelopt_mixed"])
def test_all_method_names_are_one_format(mo, write, method):
    tensors = mo.named(mo.stored("NVFP4"))
    match = plugin.detect_format(write(tensors, mo.block(quant_method=method)))
    assert (match.level, match.plugin) == ("declared", "nvfp4")
    assert match.config.uniform.algo.name == "NVFP4"


def test_side_file_counts_where_config_json_says_nothing(mo, write):
    tensors = mo.named(mo.stored("FP8"))
    match = plugin.detect_format(write(tensors, None, mo.side("FP8")))
    assert (match.level, match.evidence) == ("declared", "hf_quant_config.json")
    other = {"quant_method": "compressed-tensors", "config_groups": {}}
    assert plugin.detect_format(write(tensors, other, mo.side("FP8"))) is None


def test_nothing_says_so(mo, write):
    assert plugin.detect_format(write(mo.named(mo.stored("NVFP4")))) is None
    fp8 = {"quant_method": "fp8"}
    assert plugin.detect_format(write(mo.named(mo.stored("FP8")), fp8)) is None


def test_two_files_that_disagree_are_refused(mo, write):
    checkpoint = write(mo.named(mo.stored("NVFP4")), mo.block("NVFP4"), mo.side("FP8"))
    with pytest.raises(ConfigError) as err:
        plugin.detect_format(checkpoint)
    assert err.value.code == "Q-CFG-CONFLICT"


def test_planning_reads_no_tensor_and_loads_no_torch(mo, write):
    tensors = mo.named(mo.stored("W4A8_AWQ") | {"pre_quant_scale": torch.ones(mo.K)})
    folder = write(tensors, mo.block("W4A8_AWQ")).folder
    code = (
        "import sys\n"
        "from quant_core.checkpoint.open import open_checkpoint\n"
        "from quant_core.plan import plan\n"
        "from quant_core.registry import load_registry\n"
        f"p = plan(open_checkpoint({str(folder)!r}), registry=load_registry(only=['nvfp4']))\n"
        "assert len(p.quantized) == 1 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_of_a_plan_from_this_format_is_the_stored_one(mo, write):
    tensors = mo.named(mo.stored("NVFP4"))
    config = mo.block()
    assert plugin.make_config(mo.plan(write(tensors, config))) == config


def test_config_of_a_side_file_moves_to_the_dialect_of_config_json(mo, write):
    tensors = mo.named(mo.stored("W4A16_AWQ"))
    side = mo.side("W4A16_AWQ", group_size=128, kv_cache_quant_algo="FP8")
    planned = mo.plan(write(tensors, None, side))
    config = plugin.make_config(planned)
    assert config["quant_method"] == "modelopt"
    read = parse_config(config, "hf_quant_config.json")
    assert read.uniform == planned.match.config.uniform
    assert (read.kv, read.exclude) == ("FP8", ("lm_head",))
    assert read.warnings == ()


def test_described_config_reads_back_to_the_same_schemes(mo, write):
    for algos in (("NVFP4", "NVFP4"), ("NVFP4", "FP8"), ("W4A16_AWQ", "MXFP8")):
        tensors, layers = {}, {}
        for i, algo in enumerate(algos):
            tensors |= mo.named(mo.stored(algo, seed=i), f"m.{i}.proj")
            layers[f"m.{i}.proj"] = {"quant_algo": algo}
        planned = mo.plan(
            write(tensors, mo.block("MIXED_PRECISION", quantized_layers=layers, ignore=[]))
        )
        schemes = {n: m.scheme for n, m in planned.quantized.items()}
        block = describe(schemes)
        assert (block["quant_algo"] == "MIXED_PRECISION") == (len(set(algos)) == 2)
        config = parse_config(block, "config.json")
        for name, scheme in schemes.items():
            layer = LayerDesc(kind="linear", name=name, stored=name)
            match = SimpleNamespace(config=config)
            assert plugin.make_scheme(match, layer, planned.checkpoint) == scheme
    nothing = SimpleNamespace(match=None, members={}, checkpoint=None)
    with pytest.raises(LayoutError) as err:
        config_for(nothing)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_other_specs_cannot_be_stored(mo, write):
    tensors = mo.named(mo.stored("NVFP4"), "m.0.proj") | mo.named(mo.stored("FP8"), "m.1.proj")
    layers = {"m.0.proj": {"quant_algo": "NVFP4"}, "m.1.proj": {"quant_algo": "FP8"}}
    planned = mo.plan(write(tensors, mo.block("MIXED_PRECISION", quantized_layers=layers)))
    a, b = (planned.members[n] for n in layers)
    (lt,) = load_tensor(planned, b.layer.name).matrices
    with pytest.raises(LayoutError, match="NVFP4") as err:
        a.scheme.serialize(a.layer, lt)
    assert err.value.code == "Q-LAYOUT-REPRESENT"
