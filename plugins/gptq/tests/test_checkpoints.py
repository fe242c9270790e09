"""Real checkpoints: weights equal to the producer's, and the same bytes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import made_gptq as made
from quant_core.checkpoint.open import open_checkpoint
from quant_core.load import load_tensor, read_matrix
from quant_core.plan import Plan
from quant_core.scheme import Scheme

REPO = Path(__file__).resolve().parents[3]
SHIPPED = REPO / "tests" / "fixtures"
SHARED = REPO.parent / "shared" / "checkpoints"
SHIPPED_NAMES = ("gptqmodel-4bit-g128-asym-descact", "gptqmodel-dynamic-4-8bit-skip")
SHARED_NAMES = (
    "ar-w4g128-gptq",
    "gptqmodel-2bit-g32-asym",
    "gptqmodel-3bit-g128",
    "gptqmodel-4bit-g128-sym",
    "gptqmodel-4bit-g32-descact-sym",
    "gptqmodel-4bit-g64-asym-v2",
)
FOLDERS = [
    *(pytest.param(SHIPPED / n, id=n) for n in SHIPPED_NAMES),
    *(pytest.param(SHARED / n, id=n, marks=pytest.mark.shared) for n in SHARED_NAMES),
]


def _needs(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"checkpoint {folder.name} is not here")
    return folder


def _weights_equal(plan: Plan, folder: Path) -> list[bool]:
    """Per reference weight: equal after the rounding that expected.json names."""
    rounding = json.loads((folder / "expected.json").read_text())["reference_rounding"]["weights"]
    expected = open_checkpoint(folder / "expected.safetensors")
    out = []
    for name in expected.tensors:
        if not name.startswith("weight."):
            continue
        module, _, rows = name.removeprefix("weight.").partition("#")
        found = load_tensor(plan, module.removesuffix(".weight")).dequantize()
        if rounding is not None:
            found = found.to(getattr(torch, rounding)).float()
        want = expected.read(name)
        out.append(torch.equal(found[: int(rows)] if rows else found, want))
    return out


@pytest.mark.parametrize("folder", FOLDERS)
def test_weights_equal_the_producers(folder: Path) -> None:
    plan = made.plan_of(_needs(folder))
    assert len(plan.quantized) == 14
    equal = _weights_equal(plan, folder)
    assert len(equal) >= 3
    assert all(equal)


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_stored_tensors_come_back_bit_for_bit(folder: Path) -> None:
    plan = made.plan_of(_needs(folder))
    for member in plan.quantized.values():
        assert isinstance(member.scheme, Scheme)
        back = member.scheme.serialize(member.layer, read_matrix(plan, member))
        assert back.keys() == plan.checkpoint.modules[member.layer.stored].keys()
        for name, tensor in back.items():
            stored = plan.checkpoint.read(f"{member.layer.stored}.{name}")
            assert tensor.dtype == stored.dtype
            assert torch.equal(tensor, stored), f"{member.layer.stored}.{name}"
    config = plan.registry.call_one("gptq", "make_config", plan=plan)
    assert config == json.loads((folder / "config.json").read_text())["quantization_config"]


def _edited(folder: Path, to: Path, **changes: object) -> Path:
    """A copy of a checkpoint with other values in both of its configs."""
    shutil.copytree(folder, to)
    file = to / "config.json"
    model = json.loads(file.read_text())
    model["quantization_config"] |= changes
    file.write_text(json.dumps(model))
    (to / "quantize_config.json").unlink()
    return to


def test_v1_file_read_as_v2_fails_the_weight_check(tmp_path: Path) -> None:
    folder = _needs(SHIPPED / "gptqmodel-4bit-g128-asym-descact")
    flags = {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    plan = made.plan_of(_edited(folder, tmp_path / "copy", **flags))
    assert not any(_weights_equal(plan, folder))


def test_dynamic_rules_of_a_real_file_reach_their_layers() -> None:
    plan = made.plan_of(_needs(SHIPPED / "gptqmodel-dynamic-4-8bit-skip"))
    labels = {name: m.scheme.weight.label for name, m in plan.quantized.items()}  # type: ignore[union-attr]
    assert labels["model.layers.0.mlp.down_proj"] == "uint8 group(64):f16 zero=128"
    assert labels["model.layers.1.self_attn.q_proj"] == "uint4 group(32):f16 zero=8"
    assert labels["model.layers.0.self_attn.q_proj"] == "uint4 group(128):f16 zero=8"
    assert any("layers" in w and "match no module" in w for w in plan.warnings)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gptqmodel-awq-gemm-g128", "gptqmodel-vptq", "ar-w4g128-sym"])
def test_other_formats_are_not_claimed(name: str) -> None:
    from quant_plugin_gptq.detect import detect

    assert detect(open_checkpoint(_needs(SHARED / name))) is None
