"""Real checkpoints of AutoRound 0.16.1: weights, bytes, logits, and what must not agree."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import made_autoround as made
from producers import within
from quant_core import load_model
from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import QuantError
from quant_core.load import load_tensor, read_matrix
from quant_core.nn import QuantModule
from quant_core.plan import Plan
from quant_core.scheme import Scheme

pytestmark = pytest.mark.shared
_EXPERT = re.compile(r"(?<=\.experts)\.(\d+)")
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "checkpoints"
NAMES = (
    "ar-lmhead-w4",
    "ar-mixed-bits",
    "ar-moe-w4g64",
    "ar-mxfp4",
    "ar-nvfp4",
    "ar-w2g32-asym",
    "ar-w3g128-sym",
    "ar-w4g128-sym",
    "ar-w4g64-asym",
)


PACKED = frozenset(
    "qweight qzeros scales "
    "weight_packed weight_scale weight_global_scale input_global_scale".split()
)


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    return _needs(request.param)


def _needs(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"checkpoint {name} is not here")
    return SHARED / name


def _weights_equal(plan: Plan, folder: Path) -> list[bool]:
    """Per reference weight: equal after the rounding that expected.json names."""
    rounding = json.loads((folder / "expected.json").read_text())["reference_rounding"]["weights"]
    dtype, out = getattr(torch, rounding or "float32"), []
    for key, want in load_file(folder / "expected.safetensors").items():
        if key.startswith("weight."):
            module = key.removeprefix("weight.").partition("#")[0].removesuffix(".weight")
            number = _EXPERT.search(module)
            expert = int(number[1]) if number else None
            name = _EXPERT.sub("", module)
            found = load_tensor(plan, name, expert=expert).dequantize()[: want.shape[0]]
            if "global_scale" in " ".join(plan.checkpoint.tensors):
                # a divisor: the producer multiplies by its inverse, one float32 ulp apart
                ulp = torch.nextafter(want.abs(), torch.tensor(torch.inf)) - want.abs()
                out.append(bool(((found - want).abs() <= ulp).all()))
                continue
            out.append(torch.equal(found.to(dtype).float(), want.to(dtype).float()))
    return out


def _within_bound(folder: Path, like: Path) -> bool:
    """Whether the float32 model of ``folder`` gives the logits that ``like`` expects."""
    model = load_model(folder, dtype=torch.float32)
    assert any(isinstance(m, QuantModule) for m in model.modules())
    return within(model, like)


def _edited(folder: Path, to: Path, **changes: object) -> Path:
    """A copy of a checkpoint with another config."""
    shutil.copytree(folder, to)
    file = to / "config.json"
    model = json.loads(file.read_text())
    model["quantization_config"] |= changes
    file.write_text(json.dumps(model))
    (to / "quantization_config.json").unlink()
    return to


def test_weights_equal_the_producers(folder: Path) -> None:
    equal = _weights_equal(made.plan_of(folder), folder)
    assert len(equal) >= 3
    assert all(equal)


def test_all_stored_tensors_and_the_config_come_back(folder: Path) -> None:
    plan = made.plan_of(folder)
    assert plan.warnings == []
    for member in plan.quantized.values():
        assert isinstance(member.scheme, Scheme)
        for expert in member.layer.experts or (None,):
            back = member.scheme.serialize(member.layer, read_matrix(plan, member, expert))
            path = member.layer.stored.format(expert=expert)
            assert back.keys() == plan.checkpoint.modules[path].keys()
            for name, tensor in back.items():
                stored = plan.checkpoint.read(f"{path}.{name}")
                assert made.same_bytes(tensor, stored), f"{path}.{name}"
    config = plan.registry.call_one("autoround", "make_config", plan=plan)
    assert config == json.loads((folder / "config.json").read_text())["quantization_config"]


def test_logits_within_the_producers_bound(folder: Path) -> None:
    assert _within_bound(folder, folder)


@pytest.mark.parametrize("name", ["ar-mixed-bits", "ar-moe-w4g64", "ar-nvfp4", "ar-w4g64-asym"])
def test_saved_model_holds_the_same_packed_bytes(name: str, tmp_path: Path) -> None:
    folder = _needs(name)
    load_model(folder).save_pretrained(tmp_path)
    source, saved = open_checkpoint(folder), open_checkpoint(tmp_path)
    packed = [t for t in source.tensors if t.rpartition(".")[2] in PACKED]
    assert len(packed) > 30
    assert all(made.same_bytes(source.read(t), saved.read(t)) for t in packed)
    assert _weights_equal(made.plan_of(tmp_path), folder) == _weights_equal(
        made.plan_of(folder), folder
    )


def test_mixed_bits_of_a_real_file_reach_their_layers() -> None:
    plan = made.plan_of(_needs("ar-mixed-bits"))
    labels = {name: m.scheme.weight.label for name, m in plan.quantized.items()}  # type: ignore[union-attr]
    assert labels["model.layers.0.mlp.down_proj"] == "uint8 group(128):f16 zero=128"
    assert labels["model.layers.1.mlp.gate_proj"] == "uint2 group(32):f16 code-zero"
    assert labels["model.layers.1.self_attn.q_proj"] == "uint4 group(128):f16 zero=8"
    assert not plan.members["model.layers.1.self_attn.o_proj"].quantized


@pytest.mark.parametrize(
    ("name", "weight", "inputs"),
    [
        ("ar-mxfp4", "fp4_e2m1 group(32):e8m0", "fp4_e2m1 group(32):e8m0/floor"),
        ("ar-nvfp4", "fp4_e2m1 group(16):fp8_e4m3 tensor:f32/inv", None),
    ],
)
def test_small_floats_quantize_their_activations(
    name: str, weight: str, inputs: str | None
) -> None:
    plan = made.plan_of(_needs(name))
    assert len(plan.quantized) == 14
    for member in plan.quantized.values():
        operands = member.scheme.operands  # type: ignore[union-attr]
        assert operands["weight"].label == weight
        assert operands["input"].label == (inputs or weight)
        assert not operands["input"].scales[0].static


# -------------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ar-w2g32-asym", {"packing_format": "auto_round:auto_gptq"}),  # z - 1 for z
        ("ar-w4g128-sym", {"sym": False, "packing_format": "auto_round"}),  # z for z - 1
    ],
)
def test_zeros_of_the_other_dialect_fail_weights_and_logits(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    folder = _needs(name)
    copy = _edited(folder, tmp_path / "copy", **changes)
    assert not any(_weights_equal(made.plan_of(copy), folder))
    assert not _within_bound(copy, folder)


@pytest.mark.parametrize("change", ["float activations", "another rule"])
@pytest.mark.parametrize("name", ["ar-mxfp4", "ar-nvfp4"])
def test_small_floats_miss_the_bound_with_other_activations(name: str, change: str) -> None:
    if change == "another rule" and name == "ar-nvfp4":
        pytest.skip("rules of exponents are those of MX")
    folder = _needs(name)
    meta = json.loads((folder / "expected.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    model = load_model(folder, dtype=torch.float32, kernels="torch_ref")
    for module in model.modules():
        if isinstance(module, QuantModule):
            weight, (role, acts) = module.op.operands
            scale = replace(acts.scales[0], rule="even")
            kept = (weight, (role, replace(acts, scales=(scale,))))
            module.op = replace(module.op, operands=kept if "rule" in change else (weight,))
            module._bind()
    with torch.no_grad():
        got = model(expected["input_ids"][None], use_cache=False).logits[0]
    mean = (got - expected["logits"]).abs().mean().item()
    assert mean > meta["bound"]["mean"]
    if change == "float activations":
        assert mean == pytest.approx(meta["distance_without_act_quant"], rel=1e-3)


def test_interleaved_zeros_off_by_one_fail_weights_and_logits(tmp_path: Path) -> None:
    folder = _needs("ar-w4g64-asym")
    copy = _edited(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".qzeros")]:
        words = (tensors[name].long() + 0x11111111) & 0xFFFFFFFF
        tensors[name] = (words - ((words >> 31) << 32)).to(torch.int32)
    made.save_tensors(copy, tensors)
    assert not any(_weights_equal(made.plan_of(copy), folder))
    assert not _within_bound(copy, folder)


def test_interleaved_words_taken_as_words_along_k_are_refused(tmp_path: Path) -> None:
    folder = _needs("ar-w4g64-asym")
    copy = _edited(folder, tmp_path / "copy", packing_format="auto_round")
    with pytest.raises(QuantError, match="expected") as err:
        made.plan_of(copy)
    assert err.value.code in ("Q-LAYOUT-GROUP", "Q-LAYOUT-SHAPE")
