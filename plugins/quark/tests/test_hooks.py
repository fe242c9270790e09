"""The hooks as core calls them, what importing the plugin costs, and the config written back."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import quant_plugin_quark as plugin
from quant_core.errors import LayoutError


def test_import_of_everything_but_layout_loads_no_torch():
    names = "args beside config detect header inputs layers names scheme transforms weights writer"
    imports = ", ".join(f"{plugin.__name__}.{n}" for n in names.split())
    code = (
        f"import sys, {imports}\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_planning_reads_no_tensor_and_loads_no_torch(qk, write):
    folder = write(qk.named(qk.int8_layer()), qk.block(qk.spec("int8"), qk.spec("int8"))).folder
    code = (
        "import sys\n"
        "from quant_core.checkpoint.open import open_checkpoint\n"
        "from quant_core.plan import plan\n"
        "from quant_core.registry import load_registry\n"
        f"p = plan(open_checkpoint({str(folder)!r}), registry=load_registry(only=['quark']))\n"
        "assert len(p.quantized) == 1 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_detection_goes_by_the_method_alone(qk, write):
    tensors = qk.named(qk.mxfp4_layer())
    match = plugin.detect_format(write(tensors, qk.block(qk.mx("fp4"))))
    assert (match.plugin, match.level) == ("quark", "declared")
    # exports in a custom mode carry the method of another format
    other = qk.block(qk.mx("fp4")) | {"quant_method": "fp8"}
    assert plugin.detect_format(write(tensors, other)) is None
    assert plugin.detect_format(write(tensors, None)) is None


def test_config_of_a_plan_from_this_format_is_the_stored_one(qk, write):
    config = qk.block(qk.mx("fp4"), qk.mx("fp4", is_dynamic=True))
    planned = qk.plan(write(qk.named(qk.mxfp4_layer()), config))
    assert plugin.make_config(planned) == config


def test_a_plan_without_a_layer_has_no_config():
    checkpoint = SimpleNamespace(tensors={})
    with pytest.raises(LayoutError) as err:
        plugin.make_config(SimpleNamespace(match=None, members={}, checkpoint=checkpoint))
    assert err.value.code == "Q-LAYOUT-REPRESENT"
