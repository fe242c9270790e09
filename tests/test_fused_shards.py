"""Members of a fused layer whose tensor-wide scales differ: the fused layer is the unfused ones.

Serving engines merge q, k and v (gate and up) into one matrix. Others then keep one global scale of
all members, which is 7 to 35 times off where those are far apart. Each case here makes such a
checkpoint: a real file whose scales are multiplied by factors that are no powers of two.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint_sets import FIXTURES, REPO, SHARED
from quant_core.build import Builder
from quant_core.checkpoint.open import open_checkpoint
from quant_core.load import load_tensor
from quant_core.nn import QuantComposite, QuantLinear
from quant_core.plan import plan

ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"
QKV = tuple(f"{ATTENTION}.{x}_proj" for x in "qkv")
KV = QKV[1:]
GATE_UP = (f"{MLP}.gate_proj", f"{MLP}.up_proj")
FACTORS = (3.7, 1.0, 0.31)


@dataclass(frozen=True)
class Case:
    """A source, the members of one fused layer in it, and the scales to pull apart."""

    source: str
    members: tuple[str, ...]
    weight: str
    input: str = ""


CASES = [
    Case("ct-nvfp4", QKV, "weight_global_scale", "input_global_scale"),
    Case("ct-nvfp4", GATE_UP, "weight_global_scale", "input_global_scale"),
    Case("ct-fp8-static-tensor", QKV, "weight_scale", "input_scale"),
    Case("modelopt-nvfp4", QKV, "weight_scale_2", "input_scale"),
    Case("modelopt-nvfp4", GATE_UP, "weight_scale_2", "input_scale"),
    Case("modelopt-fp8-kvfp8", KV, "weight_scale", "input_scale"),
    Case("quark-fp8-kvfp8", KV, "weight_scale", "input_scale"),
    Case("quark-nvfp4", QKV, "weight_scale_2", "input_scale_2"),
    Case("made-fp8-tensor", KV, "weight_scale", "input_scale"),
]


def _folder(name):
    if name == "made-fp8-tensor":
        name = "modelopt-fp8-kvfp8"  # the same tensors, which another config describes
    roots = (FIXTURES, SHARED, REPO / "tests" / "slices")
    return next((r / name for r in roots if (r / name).is_dir()), None)


IDS = [f"{c.source}-{len(c.members)}" for c in CASES]
cases = pytest.mark.parametrize("case", CASES, ids=IDS)


def _made(case, folder, factors, input_factors=(1.0, 1.0, 1.0)):
    """A copy of the source with the scales of each member multiplied."""
    source = _folder(case.source)
    if source is None:
        pytest.skip("needs the full set of checkpoints beside the repository")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("expected.*", "tokenizer*"))
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name, factor, of_input in zip(case.members, factors, input_factors, strict=False):
        for leaf, by in ((case.weight, factor), (case.input, of_input)):
            stored = tensors[f"{name}.{leaf}"]
            tensors[f"{name}.{leaf}"] = (stored.float() * by).to(stored.dtype)
    if case.source.startswith("made-"):
        tensors = {n: t for n, t in tensors.items() if not n.endswith(("k_scale", "v_scale"))}
        (folder / "hf_quant_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        block = {"quant_method": "fp8", "activation_scheme": "static"}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    save_file(tensors, file, metadata=metadata)
    return plan(open_checkpoint(folder))


def _fused(p, case):
    build = Builder(plan=p, dtype=torch.float32, kernels="torch_ref")
    return build.linear("fused", [p.members[n] for n in case.members])


def _alone(p, case, x):
    build = Builder(plan=p, dtype=torch.float32, kernels="torch_ref")
    return torch.cat([build.linear(n, [p.members[n]])(x) for n in case.members], dim=-1)


def _x(p, case):
    k = p.members[case.members[0]].scheme.shape[1]
    return torch.randn(5, k, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 4


@cases
def test_fused_layer_equals_its_members_exactly(case, tmp_path):
    p = _made(case, tmp_path / "c", FACTORS)
    fused = _fused(p, case)
    assert isinstance(fused, QuantLinear), "equal inputs: one matrix, one call"
    own = [load_tensor(p, n).dequantize() for n in case.members]
    assert torch.equal(fused.restore().dequantize(), torch.cat(own))
    x = _x(p, case)
    assert torch.equal(fused(x).float(), _alone(p, case, x).float())  # float64 sums, rounded once
    # the checkpoint is what it is meant to be: members lie that far apart, and only these changed
    before = plan(open_checkpoint(_folder(case.source)))
    for name, factor, weight in zip(case.members, FACTORS, own, strict=False):
        ratio = weight.norm() / load_tensor(before, name).dequantize().norm()
        stored_inverse = p.members[name].scheme.weight.scales[-1].inverse
        assert ratio.item() == pytest.approx(1 / factor if stored_inverse else factor, rel=5e-3)


@cases
def test_one_scale_for_all_would_be_far_off(case, tmp_path):
    """Negative control: the collapse that others make."""
    p = _made(case, tmp_path / "c", FACTORS)
    fused = _fused(p, case)
    before = [load_tensor(plan(open_checkpoint(_folder(case.source))), n) for n in case.members]
    collapsed = torch.cat([t.dequantize() for t in before])  # everybody's scale is the old one
    got = fused.restore().dequantize()
    assert (got - collapsed).norm() > 0.3 * got.norm()


@cases
def test_members_with_unequal_inputs_stay_apart_and_equal_the_unfused(case, tmp_path):
    p = _made(case, tmp_path / "c", FACTORS, input_factors=(1.0, 1.9, 0.6))
    fused = _fused(p, case)
    assert isinstance(fused, QuantComposite)
    assert len(fused.parts) == len(case.members)
    x = _x(p, case)
    assert torch.equal(fused(x), _alone(p, case, x))
    together = _made(case, tmp_path / "d", FACTORS)  # negative control: the inputs matter
    assert not torch.equal(fused(x), _fused(together, case)(x))
