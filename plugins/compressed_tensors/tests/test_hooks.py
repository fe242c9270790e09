"""The hooks as core calls them, what importing the plugin costs, and the config written back."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import quant_plugin_compressed_tensors as plugin
from quant_core.errors import LayoutError
from quant_core.spec import LayerDesc
from quant_plugin_compressed_tensors.config import parse_config
from quant_plugin_compressed_tensors.writer import config_for, describe

N, K, G = 16, 64, 32


def test_import_of_everything_but_layout_loads_no_torch():
    names = "args config detect floats header inputs layers matching packed plain scheme".split()
    names += ["transforms", "writer"]
    imports = ", ".join(f"{plugin.__name__}.{n}" for n in names)
    code = (
        f"import sys, {imports}\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_detection_goes_by_the_config_alone(ct, write):
    codes, scale, _ = ct.random_layer(N, K, G, 4)
    tensors = ct.named(ct.packed_layer(codes, scale, bits=4))
    assert plugin.detect_format(write(tensors, ct.block())).level == "declared"
    unnamed = ct.block()
    del unnamed["quant_method"]
    assert plugin.detect_format(write(tensors, unnamed)).evidence == "config_groups"
    assert plugin.detect_format(write(tensors, {"quant_method": "gptq", "bits": 4})) is None
    assert plugin.detect_format(write(tensors, None)) is None


def test_planning_by_groups_reads_no_tensor_and_loads_no_torch(ct, write):
    codes, scale, zeros = ct.random_layer(N, K, G, 4)
    tensors = ct.named(ct.packed_layer(codes, scale, zeros, bits=4))
    folder = write(tensors, ct.block(ct.args(4, G, symmetric=False))).folder
    code = (
        "import sys\n"
        "from quant_core.checkpoint.open import open_checkpoint\n"
        "from quant_core.plan import plan\n"
        "from quant_core.registry import load_registry\n"
        f"p = plan(open_checkpoint({str(folder)!r}), "
        "registry=load_registry(only=['compressed_tensors']))\n"
        "assert len(p.quantized) == 1 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_of_a_plan_from_this_format_is_the_stored_one(ct, write):
    codes, scale, _ = ct.random_layer(N, K, G, 4)
    config = ct.block(ct.args(4, G))
    planned = ct.plan(write(ct.named(ct.packed_layer(codes, scale, bits=4)), config))
    assert plugin.make_config(planned) == config


def _schemes(ct, write, layers):
    tensors, groups = {}, {}
    for i, (stored, args, inputs, fmt) in enumerate(layers):
        tensors |= ct.named(stored, f"m.{i}.proj")
        groups[f"g{i}"] = {
            "targets": [f"m.{i}.proj"], "weights": args, "input_activations": inputs, "format": fmt,
        }  # fmt: skip
    planned = ct.plan(write(tensors, ct.block(format=None) | {"config_groups": groups}))
    return planned, {n: m.scheme for n, m in planned.quantized.items()}


def test_described_config_reads_back_to_the_same_schemes(ct, write):
    codes, scale, zeros = ct.random_layer(N, K, G, 4)
    w4 = (ct.packed_layer(codes, scale, zeros, bits=4), ct.args(4, G, symmetric=False), None,
          "pack-quantized")  # fmt: skip
    int8 = {"weight": torch.zeros(N, K, dtype=torch.int8), "weight_scale": torch.ones(N, 1).half()}
    token = {"num_bits": 8, "strategy": "token", "dynamic": True}
    w8 = (int8, ct.args(8, -1), token, "int-quantized")
    for layers, fmt in (((w4, w4), "pack-quantized"), ((w4, w8), "mixed-precision")):
        planned, schemes = _schemes(ct, write, layers)
        block = describe(schemes, floats=["lm_head"])
        assert block["format"] == fmt
        config = parse_config(block, "config.json")
        for name, scheme in schemes.items():
            layer = LayerDesc(kind="linear", name=name, stored=name)
            match = SimpleNamespace(config=config)
            assert plugin.make_scheme(match, layer, planned.checkpoint) == scheme


def test_described_version_names_the_packing(ct, write):
    codes, scale, _ = ct.random_layer(N, K, G, 3)
    layers = [
        (ct.packed_layer(codes, scale, bits=3, pad=pad), ct.args(3, G), None, "pack-quantized")
        for pad in (False, True)
    ]
    for layer, version in zip(layers, ("0.18.0", "0.17.1"), strict=True):
        assert describe(_schemes(ct, write, [layer])[1])["version"] == version
    with pytest.raises(LayoutError) as err:
        describe(_schemes(ct, write, layers)[1])
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    nothing = SimpleNamespace(
        match=None, members={}, attention={}, checkpoint=SimpleNamespace(tensors={})
    )
    with pytest.raises(LayoutError):
        config_for(nothing)


def test_described_config_of_float_formats_reads_back(ct, write):
    fp8 = {
        "weight": torch.zeros(N, K).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(N, 1).bfloat16(),
    }
    nvfp4 = {
        "weight_packed": torch.zeros(N, K // 2, dtype=torch.uint8),
        "weight_scale": torch.ones(N, K // 16).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
        "input_global_scale": torch.ones(1),
    }
    mxfp4 = {
        "weight_packed": torch.zeros(N, K // 2, dtype=torch.uint8),
        "weight_scale": torch.full((N, K // 32), 127, dtype=torch.uint8),
    }
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    nv = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    mx = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    layers = [
        (fp8, token | {"strategy": "channel", "dynamic": False}, token, "float-quantized"),
        (nvfp4, nv, nv | {"dynamic": "local"}, "nvfp4-pack-quantized"),
        (mxfp4, mx | {"scale_dtype": "torch.uint8"}, None, "mxfp4-pack-quantized"),
    ]
    planned, schemes = _schemes(ct, write, layers)
    config = parse_config(describe(schemes), "config.json")
    for name, scheme in schemes.items():
        layer = LayerDesc(kind="linear", name=name, stored=name)
        match = SimpleNamespace(config=config)
        assert plugin.make_scheme(match, layer, planned.checkpoint) == scheme
