"""Real checkpoints of float weights, tables and float zero points: bits, products and logits."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from checkpoint_sets import checkpoint_dirs
from quant_core import load_model, open_checkpoint, plan
from quant_core.build import Builder
from quant_core.errors import FormatError
from quant_core.kernels.rounded import RoundedInput
from quant_core.nn import QuantModule
from quant_kernels_cpu.library import unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")
WEIGHTS = (
    *("bnb-nf4-dq", "hqq-4bit-g64", "modelopt-fp8-pb-wo"),
    *("ct-nvfp4a16", "modelopt-w4a16-nvfp4", "hf-gptoss-mxfp4"),
)
ROUNDED = (
    *("hf-fp8-block128", "hf-fp8-block128-moe", "modelopt-fp8-pc-pt", "modelopt-moe-fp8"),
    *("ct-fp8-block128", "ct-fp8-dynamic", "ct-fp8-static-tensor", "ct-moe-fp8-dynamic"),
    *("ct-mxfp8", "modelopt-mxfp8", "msmodelslim-mxfp8", "quark-ptpc-fp8"),
    *("ct-mla-fp8-block", "ct-nvfp4", "quark-mixed-mxfp4-fp8"),
    "quark-mxfp6-e2m3",
)
"""Their activations are rounded in front of the same kernel."""
DIRS = [d for d in checkpoint_dirs((*WEIGHTS, *ROUNDED)) if d.name in WEIGHTS + ROUNDED]


def _plan(folder):
    try:
        return plan(open_checkpoint(folder))
    except FormatError as err:  # its plugin is not installed: nothing to compare
        pytest.skip(str(err))


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_layers_give_their_bits_back_and_compute_what_they_hold(folder):
    planned, ran = _plan(folder), 0
    for name, member in planned.quantized.items():
        if member.layer.kind != "linear" or ran == 8:
            continue
        module = Builder(plan=planned, dtype=torch.float32).linear(name, [member])
        if not module.kernel.name.startswith("cpu_wna16"):
            continue
        ran += 1
        slow = Builder(plan=planned, dtype=torch.float32, kernels="torch_ref")
        lt, want = module.restore(), slow.linear(name, [member]).restore()
        assert lt.weight.spec == want.weight.spec
        assert set(lt.weight.tensors()) == set(want.weight.tensors())
        for key, value in want.weight.tensors().items():
            assert torch.equal(lt.weight.tensors()[key], value), key
        if folder.name in ROUNDED:
            continue
        bias = None if lt.bias is None else lt.bias.double()
        for m in (1, 9):
            x = torch.randn(m, module.in_features, generator=torch.Generator().manual_seed(m))
            exact = F.linear(x.double(), want.dequantize().double(), bias)
            assert (module(x).double() - exact).norm() / exact.norm() < 1e-6, name  # float32 sums
    assert ran or not any(m.layer.kind == "linear" for m in planned.quantized.values())


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_logits_are_within_the_producers_bound(folder):
    _plan(folder)
    expected = load_file(folder / "expected.safetensors")
    meta = json.loads((folder / "expected.json").read_text())
    model = load_model(folder, dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, QuantModule)]
    names = {m.kernel.name for m in layers}
    assert names == {"cpu_wna16@rounded" if folder.name in ROUNDED else "cpu_wna16"}
    by = {m.kernel.quantizer.name for m in layers if isinstance(m.kernel, RoundedInput)}
    assert by == ({"cpu_round"} if folder.name in ROUNDED else set())
    with torch.inference_mode():
        got = model(expected["input_ids"][None], use_cache=False).logits[0]
    diff, bound = (got - expected["logits"]).abs(), meta["bound"]
    same = int((got.argmax(-1) == expected["logits"].argmax(-1)).sum())
    assert diff.mean() <= bound["mean"]
    assert diff.max() <= bound["max"]
    assert same >= bound["top1"]
    if positions := bound.get("positions"):
        assert int((diff.amax(-1) <= positions["within"]).sum()) >= positions["at_least"]
