"""Layers that torchao stored: its weights and outputs, the way back, stacks, negative controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.build import Builder
from quant_core.errors import LayoutError
from quant_core.load import load_tensor, read_matrix
from quant_core.spec import Zero

EPS = torch.finfo(torch.float32).eps


def _planned(write, ao, c, **change):
    return ao.plan(write(ao.named(c.stored), ao.header({ao.NAME: c.entry | change}), ao.block()))


def test_weights_equal_torchaos(write, ao, stored_case):
    planned = _planned(write, ao, stored_case)
    weight = load_tensor(planned, ao.NAME).dequantize()
    want = stored_case.expected["weight"]
    assert ((weight - want).abs() <= EPS * want.abs()).all()  # one unit in the last place


def test_stored_tensors_come_back(write, ao, stored_case):
    planned = _planned(write, ao, stored_case)
    (member,) = planned.quantized.values()
    back = member.scheme.serialize(member.layer, read_matrix(planned, member))
    assert back.keys() == stored_case.stored.keys()
    for name, want in stored_case.stored.items():
        assert back[name].dtype == want.dtype, name
        assert back[name].shape == want.shape, name
        assert torch.equal(back[name].view(torch.uint8), want.view(torch.uint8)), name


def _output(planned, name, x, *, inputs=True):
    member = planned.members[name]
    if not inputs:
        operands = {"weight": member.scheme.operands["weight"]}
        member = replace(member, scheme=replace(member.scheme, operands=operands))
    return Builder(plan=planned, dtype=torch.float32).linear(name, [member])(x)


def test_outputs_equal_torchaos(write, ao, stored_case):
    planned = _planned(write, ao, stored_case)
    y = _output(planned, ao.NAME, stored_case.expected["x"])
    # float32 sums of 64 products in another order; |y| is below 40
    assert torch.allclose(y, stored_case.expected["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int8dyn-row", "int8dyn-asym", "int8dyn-intx4"])
def test_outputs_without_activation_quantization_miss_torchaos(write, ao, name):
    stored, entry, expected = ao.case(name)
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), ao.block()))
    assert set(planned.members[ao.NAME].scheme.operands) == {"weight", "input"}
    y = _output(planned, ao.NAME, expected["x"], inputs=False)
    assert not torch.allclose(y, expected["y"], rtol=1e-3, atol=1e-3)


def test_symmetric_activations_take_half_the_range(write, ao):
    stored, entry, expected = ao.case("int8dyn-row")
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), ao.block()))
    member = planned.members[ao.NAME]
    spec = member.scheme.operands["input"]
    wrong = replace(spec, scales=(replace(spec.scales[0], peak=127.0),))
    operands = {**member.scheme.operands, "input": wrong}
    member = replace(member, scheme=replace(member.scheme, operands=operands))
    y = Builder(plan=planned, dtype=torch.float32).linear(ao.NAME, [member])(expected["x"])
    assert not torch.allclose(y, expected["y"], rtol=1e-3, atol=1e-3)


def test_zeros_of_asymmetric_weights_matter(write, ao):
    stored, entry, expected = ao.case("intx4-g16-asym")
    stored["_weight_zero_point"] = torch.zeros_like(stored["_weight_zero_point"])
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), ao.block()))
    weight = load_tensor(planned, ao.NAME).dequantize()
    assert not torch.allclose(weight, expected["weight"], atol=1e-2)


def test_zeros_that_are_all_zero_become_a_constant(write, ao):
    for name, zero in (("int8wo-row", None), ("intx3-g32", Zero(kind="const", value=4))):
        stored, entry, _ = ao.case(name)
        planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), ao.block()))
        (lt,) = load_tensor(planned, ao.NAME).matrices
        assert lt.weight.spec.zero == zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_zeros_are_subtracted_before_the_scale(write, ao, dtype):
    stored, entry, _ = ao.case("intx4-g16-asym")
    zeros = torch.linspace(-3.3, 3.3, 32).view(8, 4).to(dtype)
    stored["_weight_zero_point"] = zeros
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), ao.block()))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    spread = [t.float().repeat_interleave(16, 1) for t in (zeros, stored["_weight_scale"])]
    assert torch.equal(lt.dequantize(), (stored["_weight_qdata"].float() - spread[0]) * spread[1])
    back = member.scheme.serialize(member.layer, lt)
    assert torch.equal(back["_weight_zero_point"], zeros)
    assert torch.equal(back["_weight_qdata"], stored["_weight_qdata"])


def test_per_tensor_scale_stored_as_a_scalar(write, ao):
    stored, entry, expected = ao.case("int8wo-tensor")
    for leaf in ("_weight_scale", "_weight_zero_point"):
        stored[leaf] = stored[leaf].reshape(())
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), ao.block()))
    assert torch.equal(load_tensor(planned, ao.NAME).dequantize(), expected["weight"])


def test_blocks_of_rows_and_columns_and_blocks_told_by_the_scale(write, ao):
    stored, entry, _ = ao.case("fp8wo")
    scale = torch.rand(4, 2) + 0.1
    stored["_weight_scale"] = scale
    want = stored["_weight_qdata"].float() * scale.repeat_interleave(2, 0).repeat_interleave(32, 1)
    for size in ([2, 32], []):
        data = entry["_data"] | {"block_size": size}
        meta = ao.header({ao.NAME: entry | {"_data": data}})
        planned = ao.plan(write(ao.named(stored), meta, ao.block()))
        assert torch.equal(load_tensor(planned, ao.NAME).dequantize(), want)


def test_fp8_activations_are_read_from_the_header(write, ao):
    stored, entry, _ = ao.case("fp8wo")
    dtype = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
    kwargs = {
        "float8_dtype": dtype, "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mm_config": None, "hp_value_lb": None, "hp_value_ub": None,
    }  # fmt: skip
    act = {"_type": "QuantizeTensorToFloat8Kwargs", "_data": kwargs}
    meta = ao.header({ao.NAME: entry | {"_data": entry["_data"] | {"act_quant_kwargs": act}}})
    planned = ao.plan(write(ao.named(stored), meta, ao.block()))
    x = torch.randn(3, 64)
    s = x.abs().amax(1, keepdim=True) / 448
    rounded = (x / s).to(torch.float8_e4m3fn).float() * s
    weight = load_tensor(planned, ao.NAME).dequantize()
    want = rounded @ weight.T + stored["bias"]
    assert torch.allclose(_output(planned, ao.NAME, x), want, rtol=1e-5, atol=1e-5)


def test_experts_load_as_one_stack_and_must_be_alike(write, ao):
    stored, entry, expected = ao.case("intx3-g32")
    paths = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(2)]
    tensors = {k: v for p in paths for k, v in ao.named(stored, p).items()}
    planned = ao.plan(write(tensors, ao.header(dict.fromkeys(paths, entry)), ao.block()))
    loaded = load_tensor(planned, "model.layers.0.mlp.experts.up_proj").dequantize()
    assert torch.equal(loaded[1], expected["weight"])
    odd = entry | {"_data": entry["_data"] | {"block_size": [1, 16]}}
    with pytest.raises(LayoutError, match=r"experts\.1") as err:
        ao.plan(write(tensors, ao.header({paths[0]: entry, paths[1]: odd}), ao.block()))
    assert err.value.code == "Q-LAYOUT-FUSED"


@pytest.mark.parametrize(
    ("leaf", "bad", "code"),
    [
        ("_weight_scale", float("nan"), "Q-VALUE-SCALE"),
        ("_weight_scale", float("inf"), "Q-VALUE-SCALE"),
        ("_weight_qdata", 8, "Q-VALUE-CODE"),
        ("_weight_qdata", -9, "Q-VALUE-CODE"),
        ("_weight_zero_point", 100, "Q-VALUE-CODE"),
    ],
)
def test_values_out_of_range_are_refused(write, ao, leaf, bad, code):
    stored, entry, _ = ao.case("intx4-g16-asym")
    stored[leaf][0, 0] = bad
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), ao.block()))
    with pytest.raises(LayoutError, match=ao.NAME) as err:
        load_tensor(planned, ao.NAME)
    assert err.value.code == code


def test_another_meaning_is_not_written(write, ao):
    stored, entry, _ = ao.case("int8wo-row")
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), ao.block()))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    odd = replace(lt.weight, spec=replace(lt.weight.spec, zero=Zero(kind="const", value=3)))
    with pytest.raises(LayoutError) as err:
        member.scheme.serialize(member.layer, replace(lt, operands={"weight": odd}))
    assert err.value.code == "Q-LAYOUT-REPRESENT"
