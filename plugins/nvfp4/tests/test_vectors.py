"""Worked numbers: published examples, and layers whose values are made one weight at a time."""

from __future__ import annotations

import pytest
import torch

from quant_core.kernels.activations import fake_quantize
from quant_core.load import load_tensor
from quant_core.numerics import decode_scale
from quant_plugin_nvfp4.algos import ALGOS

ROW = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0, 1.1, -1.2, 1.3, -1.4, 1.5, -3.0]
ROUNDED = [0, -0.25, 0.25, -0.5, 0.5, -0.5, 0.75, -0.75, 1, -1, 1, -1, 1.5, -1.5, 1.5, -3]


def loaded(mo, write, algo, stored, **keys):
    planned = mo.plan(write(mo.named(stored), mo.block(algo, **keys)))
    return load_tensor(planned, mo.NAME)


def test_nvfp4_example_of_the_producer(mo, write):
    """ModelOpt 0.47.0 NVFP4QTensor: one row, amax 3, global scale 3 / 2688."""
    stored = {
        "weight": torch.tensor([[0x90, 0xA1, 0xA2, 0xB3, 0xC4, 0xC4, 0xD5, 0xF5]]).byte(),
        "weight_scale": torch.tensor([[448.0]]).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(3 / 2688),
    }
    assert stored["weight_scale"].view(torch.uint8).item() == 0x7E
    got = loaded(mo, write, "W4A16_NVFP4", stored).dequantize()
    # 448 * (3 / 2688) is 0.5 to one rounding
    assert torch.allclose(got, torch.tensor([ROUNDED]), rtol=1e-6, atol=0)


def test_nvfp4_activations_round_as_the_producer_rounds_weights():
    """The example again, as an input: the same rule with the global scale of the activations."""
    spec = ALGOS["NVFP4"].input_spec("f32")
    got = fake_quantize(torch.tensor([ROW]), spec, torch.tensor([3 / 2688]))
    assert torch.allclose(got, torch.tensor([ROUNDED]), rtol=1e-6, atol=0)


def test_nvfp4_block_scale_of_activations_is_at_least_the_smallest_fp8():
    """A block far below the calibrated range: scale 2**-9, where a scale of 0 would lose it."""
    spec = ALGOS["NVFP4"].input_spec("f32")
    g = torch.tensor([1.0])
    x = torch.full((1, 16), 2.0**-10)
    got = fake_quantize(x, spec, g)
    assert torch.equal(got, torch.full((1, 16), 2.0**-10))  # code 0.5 times 2**-9
    zeros = fake_quantize(torch.zeros(1, 16), spec, g)
    assert torch.equal(zeros, torch.zeros(1, 16))


def test_fp8_example_of_the_specification(mo, write):
    stored = {
        "weight": torch.tensor([[0x7E, 0xB8], [0x30, 0x28]]).byte().view(torch.float8_e4m3fn),
        "weight_scale": torch.tensor(2.0),
        "input_scale": torch.tensor(1.0),
    }
    got = loaded(mo, write, "FP8", stored).dequantize()
    assert torch.equal(got, torch.tensor([[896.0, -2.0], [1.0, 0.5]]))


def test_int4_holds_two_rows_in_a_byte(mo, write):
    weight = torch.zeros(1, 128, dtype=torch.uint8)
    weight[0, 0], weight[0, 1] = 0x7F, 0x81  # rows (-1, 7), (1, -8)
    stored = {"weight": weight, "weight_scale": torch.tensor([[2.0], [0.5]])}
    got = loaded(mo, write, "W4A16_AWQ", stored).dequantize()
    assert got[:, :3].tolist() == [[-2.0, 2.0, 0.0], [3.5, -4.0, 0.0]]


def test_mxfp8_exponents(mo, write):
    weight = torch.tensor([[0x38] * 96]).byte().view(torch.float8_e4m3fn)  # 1.0
    scale = torch.tensor([[127, 0, 254]]).byte()
    got = loaded(mo, write, "MXFP8", {"weight": weight, "weight_scale": scale}).dequantize()
    assert got[0, ::32].tolist() == [1.0, 2.0**-127, 2.0**127]  # byte 0 is no zero


def test_fp8_blocks_may_be_ragged(mo, write):
    n, k = 130, 144
    weight = torch.full((n, k), 1.0).to(torch.float8_e4m3fn)
    grid = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    want = torch.ones(n, k)
    want[:128, 128:], want[128:, :128], want[128:, 128:] = 2, 3, 4
    for scale in (grid.reshape(2, 1, 2, 1), grid):  # producers write both shapes
        got = loaded(mo, write, "FP8_PB_WO", {"weight": weight, "weight_scale": scale})
        assert torch.equal(got.dequantize(), want)


@pytest.mark.parametrize("algo", ALGOS)
def test_weights_are_what_the_page_says(mo, write, algo):
    stored = mo.stored(algo)
    got = loaded(mo, write, algo, stored)
    want = mo.dense(algo, stored)
    if algo.startswith(("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4")):  # code * (s * g): one order
        assert torch.allclose(got.dequantize(), want, rtol=2e-7, atol=0)
    else:
        assert torch.equal(got.dequantize(), want)


@pytest.mark.parametrize(
    ("algo", "smooth"),
    [(name, smooth) for name, a in ALGOS.items() for smooth in (False, True)[: 1 + a.smooth]],
)
def test_stored_bytes_come_back(mo, write, algo, smooth):
    stored = mo.stored(algo) | {"bias": torch.randn(mo.N).bfloat16()}
    if smooth and not ALGOS[algo].smooth:
        pytest.skip(f"{algo} has no pre_quant_scale")
    if smooth:
        stored["pre_quant_scale"] = torch.rand(mo.K).add(0.5).bfloat16()
    planned = mo.plan(write(mo.named(stored), mo.block(algo)))
    member = planned.members[mo.NAME]
    (lt,) = load_tensor(planned, mo.NAME).matrices
    assert len(lt.transforms) == smooth
    back = member.scheme.serialize(member.layer, lt)
    assert back.keys() == stored.keys()
    for name, value in stored.items():
        assert (back[name].dtype, back[name].shape) == (value.dtype, value.shape), name
        a, b = (t.reshape(-1).view(torch.uint8) for t in (back[name], value))
        assert torch.equal(a, b), name


def test_shapes_of_single_values_come_back(mo, write):
    stored = mo.stored("NVFP4")
    for name in ("weight_scale_2", "input_scale"):
        stored[name] = stored[name].reshape(1)
    planned = mo.plan(write(mo.named(stored), mo.block()))
    (lt,) = load_tensor(planned, mo.NAME).matrices
    member = planned.members[mo.NAME]
    back = member.scheme.serialize(member.layer, lt)
    assert back["weight_scale_2"].shape == back["input_scale"].shape == (1,)


def test_second_scale_of_w4a8_is_kept_and_changes_no_weight(mo, write):
    stored = mo.stored("W4A8_AWQ")
    a = loaded(mo, write, "W4A8_AWQ", stored).matrices[0]
    b = loaded(mo, write, "W4A8_AWQ", stored | {"weight_scale_2": torch.tensor(0.3)}).matrices[0]
    assert torch.equal(a.dequantize(), b.dequantize())
    assert not torch.equal(a.weight.scales[2], b.weight.scales[2])


def test_small_scales_are_bytes_that_no_cast_can_touch(mo, write):
    for algo, element in (("NVFP4", "fp8_e4m3"), ("MXFP8", "e8m0")):
        stored = mo.stored(algo)
        (lt,) = loaded(mo, write, algo, stored).matrices
        scale = lt.weight.scales[0]
        assert scale.dtype == torch.uint8
        assert torch.equal(scale, stored["weight_scale"].view(torch.uint8))
        assert bool(torch.isfinite(decode_scale(scale, element)).all())
