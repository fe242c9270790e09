"""Real checkpoints with int8 activations: bits, codes and logits of the int8 kernel."""

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
from quant_core.nn import QuantModule
from quant_kernels_cpu.library import unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=f"no CPU kernels: {unavailable()}")
NAMES = (
    *("ct-w8a8-int8-dynamic-gptq", "ct-w8a8-int8-static-asym-act", "quark-int8"),
    *("msmodelslim-w8a8", "msmodelslim-moe-w8a8-dynamic", "msmodelslim-pdmix"),
    *("msmodelslim-w4a8-dynamic", "msmodelslim-quarot-w8a8"),
)
DIRS = [d for d in checkpoint_dirs(NAMES) if d.name in NAMES]


def _plan(folder):
    try:
        return plan(open_checkpoint(folder))
    except FormatError as err:  # its plugin is not installed: nothing to compare
        pytest.skip(str(err))


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_layers_give_their_bits_back_and_compute_what_the_reference_computes(folder):
    planned, ran = _plan(folder), 0
    for name, member in planned.quantized.items():
        if member.layer.kind != "linear" or ran == 8:
            continue
        module = Builder(plan=planned, dtype=torch.float32).linear(name, [member])
        if module.kernel.name != "cpu_w8a8":
            continue
        ran += 1
        reference = Builder(plan=planned, dtype=torch.float32, kernels="torch_ref")
        slow = reference.linear(name, [member])
        lt, want = module.restore(), slow.restore()
        assert lt.weight.spec == want.weight.spec
        for key, value in want.weight.tensors().items():
            assert torch.equal(lt.weight.tensors()[key], value), key
        for key in ("bias", "acc_bias", "out_scale", "input_scale", "input_zero"):
            held, value = getattr(lt, key), getattr(want, key)
            assert (held is None and value is None) or torch.equal(held, value), key
        x = torch.randn(9, module.in_features, generator=torch.Generator().manual_seed(1))
        got, expected = module(x), slow(x)
        assert (got - expected).norm() / expected.norm() < 1e-6, name
        if lt.acc_bias is None:  # negative control: float activations are something else
            plain = F.linear(x, lt.dequantize(), None if lt.bias is None else lt.bias.float())
            assert (plain - expected).norm() / expected.norm() > 1e-3, name
    assert ran


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_logits_are_within_the_producers_bound(folder):
    _plan(folder)
    expected = load_file(folder / "expected.safetensors")
    meta = json.loads((folder / "expected.json").read_text())
    model = load_model(folder, dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, QuantModule)]
    assert layers
    assert {m.kernel.name for m in layers} == {"cpu_w8a8"}
    with torch.inference_mode():
        got = model(expected["input_ids"][None], use_cache=False).logits[0]
    diff, bound = (got - expected["logits"]).abs(), meta["bound"]
    same = int((got.argmax(-1) == expected["logits"].argmax(-1)).sum())
    assert diff.mean() <= bound["mean"]
    assert diff.mean() < meta["distance_without_act_quant"] / 4  # the control that counts here
    assert diff.max() <= bound["max"]
    assert same >= bound["top1"]
    if positions := bound.get("positions"):
        assert int((diff.amax(-1) <= positions["within"]).sum()) >= positions["at_least"]
