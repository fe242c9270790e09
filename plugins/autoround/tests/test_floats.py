"""FP8 and MX layers made by hand: no file of these kinds is among the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import made_autoround as made
from quant_core.build import Builder
from quant_core.errors import QuantError
from quant_core.load import load_tensor, read_matrix

N, K = 48, 64
NAME = "model.layers.0.mlp.up_proj"
FP8 = torch.float8_e4m3fn
MX8 = {
    "packing_format": "auto_round:llm_compressor", "data_type": "mx_fp", "bits": 8,
    "act_bits": 8, "act_data_type": "mx_fp_rceil", "act_group_size": 32, "act_dynamic": True,
}  # fmt: skip
STATIC = {
    "packing_format": "auto_round:fp8_static", "data_type": "fp", "bits": 8, "group_size": 0,
    "act_bits": 8, "act_data_type": "fp", "act_group_size": 0, "act_dynamic": False,
}  # fmt: skip
CHANNEL = STATIC | {
    "packing_format": "auto_round:fp8", "group_size": -1, "act_group_size": -1, "act_dynamic": True,
}  # fmt: skip
BLOCK = CHANNEL | {"group_size": [32, 32], "act_group_size": 32}


def _codes(rows: int = N) -> Tensor:
    rng = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, K, generator=rng) * 4).to(FP8)


def _stored(**scales: Tensor) -> dict[str, Tensor]:
    return {"weight": _codes(), **scales}


def _exponents() -> Tensor:
    return torch.randint(110, 130, (N, K // 32), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )


def _rows() -> Tensor:
    return torch.rand(N, 1, generator=torch.Generator().manual_seed(2)) + 0.01


def _mx8() -> tuple[dict[str, Tensor], Tensor]:
    e = _exponents()
    return _stored(weight_scale=e), 2.0 ** (e.float() - 127).repeat_interleave(32, 1)


def _static() -> tuple[dict[str, Tensor], Tensor]:
    scale = torch.tensor(0.37).bfloat16()
    return _stored(weight_scale=scale, input_scale=torch.tensor([0.05])), scale.float()


def _channel() -> tuple[dict[str, Tensor], Tensor]:
    return _stored(weight_scale=_rows()), _rows()


def _block() -> tuple[dict[str, Tensor], Tensor]:
    scale = torch.tensor([[0.5, 0.3], [0.2, 0.7]])  # the last block of rows is half full
    grown = scale.repeat_interleave(32, 0)[:N].repeat_interleave(32, 1)
    return _stored(weight_scale_inv=scale), grown


@pytest.mark.parametrize(
    ("config", "make", "name", "weight", "inputs"),
    [
        (MX8, _mx8, "wmxfp8amxfp8", "group(32):e8m0", "group(32):e8m0/rceil"),
        (STATIC, _static, "wfp8afp8", "tensor:bf16", "tensor:f32"),
        (CHANNEL, _channel, "wfp8afp8", "channel:f32", "channel:f32"),
        (BLOCK, _block, "wfp8afp8", "block(32,32):f32", "group(32):f32"),
    ],
    ids=["mxfp8", "fp8-static", "fp8-channel", "fp8-block"],
)
def test_layer_of_8_bit_floats_is_read_run_and_written_back(
    tmp_path: Path, config: dict[str, Any], make: Any, name: str, weight: str, inputs: str
) -> None:
    stored, scale = make()
    stored["bias"] = torch.arange(N).bfloat16()
    plan = made.plan_of(made.save(tmp_path, {NAME: stored}, made.config(**config)))
    assert not plan.warnings
    member = plan.quantized[NAME]
    operands = member.scheme.operands  # type: ignore[union-attr]
    assert member.scheme.name == name  # type: ignore[union-attr]
    assert operands["weight"].label == f"fp8_e4m3 {weight}"
    assert operands["input"].label == f"fp8_e4m3 {inputs}"
    assert operands["input"].scales[0].static is (config is STATIC)
    want = _codes().float() * scale
    assert torch.equal(load_tensor(plan, NAME).dequantize(), want)
    back = member.scheme.serialize(member.layer, read_matrix(plan, member))  # type: ignore[union-attr]
    assert back.keys() == stored.keys()
    assert all(made.same_bytes(back[n], stored[n]) for n in stored)
    layer = Builder(plan=plan, dtype=torch.float32).linear(NAME, [member])
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3))
    exact = x @ want.T + stored["bias"].float()
    error = (layer(x) - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.1  # e4m3 keeps 3 bits of a mantissa: up to 1/16 for each input


def test_weights_alone_may_be_quantized(tmp_path: Path) -> None:
    block = made.config(**{k: v for k, v in CHANNEL.items() if not k.startswith("act_")})
    plan = made.plan_of(made.save(tmp_path, {NAME: _channel()[0]}, block))
    assert list(plan.quantized[NAME].scheme.operands) == ["weight"]  # type: ignore[union-attr]
    assert plan.quantized[NAME].scheme.name == "wfp8a16"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "make", "code"),
    [
        (MX8 | {"bits": 4, "act_bits": 16}, _mx8, "Q-CFG-CONFLICT"),  # bytes, not nibbles
        (MX8 | {"group_size": 64}, _mx8, "Q-CFG-VALUE"),
        (MX8 | {"sym": False}, _mx8, "Q-CFG-VALUE"),
        (MX8 | {"act_data_type": "int"}, _mx8, "Q-CFG-VALUE"),
        (MX8 | {"act_group_size": 64}, _mx8, "Q-CFG-VALUE"),
        (MX8 | {"act_dynamic": False}, _mx8, "Q-CFG-VALUE"),
        (MX8 | {"rotation_config": {"kind": "hadamard"}}, _mx8, "Q-CFG-VALUE"),
        (MX8 | {"super_bits": 6}, _mx8, "Q-CFG-VALUE"),
        (BLOCK | {"group_size": -1}, _block, "Q-CFG-VALUE"),
        (BLOCK | {"group_size": [32]}, _block, "Q-CFG-VALUE"),
        (BLOCK | {"group_size": [64, 64]}, _block, "Q-LAYOUT-SHAPE"),
        (CHANNEL | {"act_dynamic": False, "act_group_size": 32}, _channel, "Q-CFG-VALUE"),
        (CHANNEL | {"act_dynamic": False}, _channel, "Q-TENSOR-MISSING"),  # input_scale
        (STATIC | {"act_bits": 16}, _static, "Q-TENSOR-UNEXPECTED"),  # input_scale
    ],
)
def test_config_that_does_not_fit_the_tensors_is_refused(
    tmp_path: Path, config: dict[str, Any], make: Any, code: str
) -> None:
    folder = made.save(tmp_path, {NAME: make()[0]}, made.config(**config))
    with pytest.raises(QuantError) as err:
        made.plan_of(folder)
    assert err.value.code == code


def test_groups_that_the_scales_do_not_fit_are_named(tmp_path: Path) -> None:
    stored = _stored(weight_scale=_exponents().repeat(1, 2))
    folder = made.save(tmp_path, {NAME: stored}, made.config(**MX8))
    with pytest.raises(QuantError, match="imply groups of 16") as err:
        made.plan_of(folder)
    assert err.value.code == "Q-LAYOUT-GROUP"


@pytest.mark.parametrize(
    ("make", "config", "name", "value", "code"),
    [
        (_mx8, MX8, "weight_scale", 255, "Q-VALUE-SCALE"),  # e8m0: NaN
        (_mx8, MX8, "weight", 0x7F, "Q-VALUE-WEIGHT"),
        (_static, STATIC, "input_scale", 0.0, "Q-VALUE-SCALE"),
        (_static, STATIC, "weight_scale", float("nan"), "Q-VALUE-SCALE"),
    ],
)
def test_values_that_are_no_numbers_are_refused(
    tmp_path: Path, make: Any, config: dict[str, Any], name: str, value: float, code: str
) -> None:
    stored, _ = make()
    view = stored[name].view(torch.uint8) if stored[name].dtype == FP8 else stored[name]
    view.reshape(-1)[0] = value
    plan = made.plan_of(made.save(tmp_path, {NAME: stored}, made.config(**config)))
    with pytest.raises(QuantError) as err:
        read_matrix(plan, plan.quantized[NAME])
    assert err.value.code == code


@pytest.mark.parametrize("lost", ["weight", "weight_scale"])
def test_lost_tensor_is_missing(tmp_path: Path, lost: str) -> None:
    stored = _mx8()[0]
    del stored[lost]
    with pytest.raises(QuantError, match=lost) as err:
        made.plan_of(made.save(tmp_path, {NAME: stored}, made.config(**MX8)))
    assert err.value.code == "Q-TENSOR-MISSING"


def test_experts_are_one_stack_and_alike(tmp_path: Path) -> None:
    path = "model.layers.0.mlp.experts.{}.up_proj"
    modules = {path.format(e): _mx8()[0] for e in range(3)}
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
    plan = made.plan_of(made.save(tmp_path / "good", modules, made.config(**MX8)))
    (member,) = plan.quantized.values()
    assert member.layer.experts == (0, 1, 2)
    modules[path.format(1)] = {"weight": torch.ones(N, K)}
    with pytest.raises(QuantError, match=r"experts\.1") as err:
        made.plan_of(made.save(tmp_path / "bad", modules, made.config(**MX8)))
    assert err.value.code == "Q-CKPT-MISMATCH"
