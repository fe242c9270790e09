"""Every type, layers made by hand: weights, bytes given back, and what the kernel computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.build import Builder
from quant_core.errors import CheckpointError, LayoutError
from quant_core.load import read_matrix
from quant_core.packing import repack
from quant_core.spec import CANONICAL
from quant_plugin_modelslim_npu.kinds import KINDS

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _made(ms, write, kind, tensors=None, **keys):
    tensors = ms.layer(kind) if tensors is None else tensors
    planned = ms.plan(write(ms.named(tensors), ms.described(tensors, kind), **keys))
    return planned, planned.members[ms.NAME], tensors


def _dense(kind, t, ms):
    """float64 weights, from the documented formulas."""
    store = KINDS[kind].store
    if store == "int4_words":
        codes = [[(w >> 4 * i & 15) - 8 for w in row for i in range(8)]
                 for row in t["weight_packed"].tolist()]  # fmt: skip
        return torch.tensor(codes).double() * t["weight_scale"].double().repeat_interleave(32, 1)
    w = t["weight"]
    if store == "fp4":
        rows = [[(-1) ** (c >> 3) * FP4[c & 7] for b in row for c in (b & 15, b >> 4)]
                for row in w.tolist()]  # fmt: skip
        w = torch.tensor(rows)
    elif w.shape[0] * 2 == ms.N:
        rows = []
        for pair in w.view(torch.uint8).tolist():
            rows += [[(b & 15) - 16 * (b >> 3 & 1) for b in pair],
                     [(b >> 4) - 16 * (b >> 7) for b in pair]]  # fmt: skip
        w = torch.tensor(rows)
    if KINDS[kind].mx:
        return w.double() * torch.exp2(t["weight_scale"].double() - 127).repeat_interleave(32, 1)
    if kind == "W8A8":
        return w.double() * (t["deq_scale"].double() / t["input_scale"].double())[:, None]
    return w.double() * t["weight_scale"].double()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_the_formula(ms, write, kind):
    planned, member, tensors = _made(ms, write, kind)
    got = read_matrix(planned, member).dequantize()
    want = _dense(kind, tensors, ms)
    # float32: one rounding of the scale, one of the product
    assert torch.allclose(got.double(), want, rtol=2e-7, atol=0)
    assert want.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_come_back_from_any_packing(ms, write, kind):
    planned, member, tensors = _made(ms, write, kind)
    lt = read_matrix(planned, member)
    qt = lt.weight
    plain = repack(qt.codes, qt.spec.element.bits, qt.shape, qt.packing, CANONICAL)
    other = replace(lt, operands={"weight": replace(qt, codes=plain, packing=CANONICAL)})
    for one in (lt, other):
        stored = member.scheme.serialize(member.layer, one)
        ignored = {p.name for p in member.params if p.need == "ignored"}
        assert stored.keys() == tensors.keys() - ignored
        for leaf, value in stored.items():
            assert value.dtype == tensors[leaf].dtype
            assert torch.equal(value.view(torch.uint8), tensors[leaf].view(torch.uint8))


def test_worked_bytes_of_row_pairs(ms, write):
    """formats-float.md 5.3: W = [[1,2],[-3,4],[5,-6],[-8,7]] is D1 42 / 85 7A."""
    w = torch.tensor([[1, 2], [-3, 4], [5, -6], [-8, 7]], dtype=torch.int8)
    stored = torch.tensor([[0xD1, 0x42], [0x85, 0x7A]], dtype=torch.uint8).view(torch.int8)
    tensors = {"weight": stored, "weight_scale": torch.ones(4, 1)}
    planned, member, _ = _made(ms, write, "W4A8_DYNAMIC", tensors)
    assert torch.equal(read_matrix(planned, member).dequantize(), w.float())


def test_worked_int64_deq_scale(ms, write):
    """formats-float.md 5.3: 0.5 is 1056964608, 1.0 is 1065353216."""
    tensors = ms.layer("W8A8")
    tensors["deq_scale"] = torch.tensor([1056964608, 1065353216] * 3)
    planned, member, _ = _made(ms, write, "W8A8", tensors)
    lt = read_matrix(planned, member)
    assert lt.out_scale.tolist() == [0.5, 1.0] * 3
    back = member.scheme.serialize(member.layer, lt)["deq_scale"]
    assert back.dtype == torch.int64
    assert torch.equal(back, tensors["deq_scale"])


def _module(ms, planned):
    return Builder(plan=planned, dtype=torch.float32).linear("x", [planned.members[ms.NAME]])


def _x(ms):
    return torch.randn(3, ms.K, generator=torch.Generator().manual_seed(5)) * 2


def test_static_layer_computes_the_documented_sum(ms, write):
    planned, _, t = _made(ms, write, "W8A8")
    x = _x(ms)
    q = (x.double() / 0.0625 - 33).round().clamp(-128, 127)
    want = (q @ t["weight"].double().T + t["quant_bias"].double()) * t["deq_scale"].double()
    assert torch.equal(_module(ms, planned)(x), want.float())


def test_bias_beside_quant_bias_is_not_added_again(ms, write):
    planned, _, t = _made(ms, write, "W8A8")
    alone = _module(ms, planned)(_x(ms))
    planned, _, _ = _made(ms, write, "W8A8", t | {"bias": torch.ones(ms.N)})
    assert torch.equal(_module(ms, planned)(_x(ms)), alone)
    assert planned.ledger.skipped == {f"{ms.NAME}.bias": "bias is inside quant_bias"}


def _per_token(x, top):
    s = x.abs().amax(dim=1, keepdim=True) / top
    return (x / s).round().clamp(-top - 1, top) * s


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A8_MIX", "W4A8_DYNAMIC", "W4A4_DYNAMIC"])
def test_run_time_scales_are_per_token(ms, write, kind):
    planned, _, t = _made(ms, write, kind)
    x = _x(ms)
    rounded = _per_token(x.double(), 7 if "A4" in kind else 127)
    want = rounded @ _dense(kind, t, ms).T
    assert torch.allclose(_module(ms, planned)(x).double(), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(x.double() @ _dense(kind, t, ms).T, want, rtol=1e-5, atol=1e-5)


def test_scale_bias_does_not_enter_the_result(ms, write):
    planned, _, t = _made(ms, write, "W4A8_DYNAMIC")
    first = _module(ms, planned)(_x(ms))
    t["scale_bias"] = t["scale_bias"] + 100
    planned, _, _ = _made(ms, write, "W4A8_DYNAMIC", t)
    assert torch.equal(_module(ms, planned)(_x(ms)), first)


def test_flat_layer_transforms_clips_and_rounds(ms, write):
    kind = "W4A4_FLATQUANT_DYNAMIC"
    planned, _, t = _made(ms, write, kind)
    x = _x(ms).double()
    moved = x @ torch.kron(t["left_trans"].double(), t["right_trans"].double())
    s = moved.abs().amax(dim=1, keepdim=True) * 0.875 / 7
    want = (moved / s).round().clamp(-8, 7) * s @ _dense(kind, t, ms).T
    got = _module(ms, planned)(x.float()).double()
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(x @ _dense(kind, t, ms).T, want, rtol=0.1, atol=0.1)


def test_two_factors_multiply(ms, write):
    tensors = ms.layer("W4A8_DYNAMIC") | {
        "weight_scale_second": ms.scale(g=4, seed=9),
        "weight_offset_second": torch.zeros(ms.N, 4),
    }
    planned, member, t = _made(ms, write, "W4A8_DYNAMIC", tensors, group_size=16)
    want = _dense("W4A8_DYNAMIC", t, ms) * t["weight_scale_second"].double().repeat_interleave(
        16, 1
    )
    lt = read_matrix(planned, member)
    assert torch.allclose(lt.dequantize().double(), want, rtol=3e-7, atol=0)
    stored = member.scheme.serialize(member.layer, lt)
    assert torch.equal(stored["weight_scale_second"], t["weight_scale_second"])


def test_last_block_of_a_row_may_be_short(ms, write):
    """formats-float.md 10.14: K = 80 has three scales."""
    tensors = {
        "weight": torch.ones(2, 80).to(torch.float8_e4m3fn),
        "weight_scale": torch.tensor([[127, 128, 129], [126, 125, 124]], dtype=torch.uint8),
    }
    planned, member, _ = _made(ms, write, "W8A8_MXFP8", tensors)
    got = read_matrix(planned, member).dequantize()
    assert got[0].tolist() == [1.0] * 32 + [2.0] * 32 + [4.0] * 16
    assert got[1, 64:].tolist() == [0.125] * 16
    assert _module(ms, planned)(torch.ones(1, 80)).tolist() == [[160.0, 26.0]]


def test_four_bit_values_may_come_packed_in_rows_for_every_four_bit_type(ms, write):
    tensors = ms.layer("W4A4_DYNAMIC")
    planned, member, _ = _made(ms, write, "W4A4_DYNAMIC", tensors)
    want = read_matrix(planned, member).dequantize()
    packed = tensors | {"weight": ms.row_pairs(tensors["weight"])}
    planned, member, _ = _made(ms, write, "W4A4_DYNAMIC", packed)
    assert torch.equal(read_matrix(planned, member).dequantize(), want)


# ------------------------------------------------------------------------------------- faults


def _change(ms, write, kind, leaf, value, **keys):
    tensors = ms.layer(kind)
    tensors[leaf] = value(tensors[leaf]) if callable(value) else value
    planned, member, _ = _made(ms, write, kind, tensors, **keys)
    return read_matrix(planned, member)


@pytest.mark.parametrize(
    ("kind", "leaf", "value", "code"),
    [
        ("W8A8", "input_scale", torch.tensor([0.0]), "Q-VALUE-SCALE"),
        ("W8A8", "input_scale", torch.tensor([float("nan")]), "Q-VALUE-SCALE"),
        ("W8A8", "input_offset", torch.tensor([0.5]), "Q-VALUE-CODE"),
        ("W8A8", "input_offset", torch.tensor([300.0]), "Q-VALUE-CODE"),
        ("W8A8", "deq_scale", torch.full((6,), float("inf")), "Q-VALUE-SCALE"),
        ("W8A8", "deq_scale", torch.full((6,), 1 << 40), "Q-VALUE-SCALE"),
        ("W8A8", "deq_scale", torch.full((6,), -1), "Q-VALUE-SCALE"),
        ("W8A8", "quant_bias", torch.zeros(6), "Q-LAYOUT-DTYPE"),
        ("W8A8", "deq_scale", torch.ones(6, 1), "Q-LAYOUT-SHAPE"),
        ("W8A8", "weight", torch.zeros(5, 64, dtype=torch.int8), "Q-LAYOUT-SHAPE"),
        ("W8A8_DYNAMIC", "weight_offset", torch.ones(6, 1), "Q-VALUE-OFFSET"),
        ("W8A16", "weight_offset", torch.full((6, 1), -3.0), "Q-VALUE-OFFSET"),
        ("W8A8_DYNAMIC", "weight_scale", torch.full((6, 1), float("nan")), "Q-VALUE-SCALE"),
        ("W8A8_DYNAMIC", "weight_scale", torch.ones(6), "Q-LAYOUT-SHAPE"),
        ("W8A8_DYNAMIC", "weight_scale", torch.ones(6, 1).to(torch.int32), "Q-LAYOUT-DTYPE"),
        ("W8A8_DYNAMIC", "weight_scale", torch.ones(6, 3), "Q-LAYOUT-GROUP"),
        ("W8A8_DYNAMIC", "weight", torch.zeros(3, 64, dtype=torch.int8), "Q-LAYOUT-SHAPE"),
        ("W4A8_DYNAMIC", "weight_scale", torch.ones(5, 1), "Q-LAYOUT-SHAPE"),
        ("W4A4_DYNAMIC", "weight", torch.full((6, 64), 8, dtype=torch.int8), "Q-VALUE-CODE"),
        ("W8A8_MXFP8", "weight_scale", torch.ones(6, 2), "Q-LAYOUT-DTYPE"),
        ("W8A8_MXFP8", "weight_scale", torch.full((6, 2), 255, dtype=torch.uint8),
         "Q-VALUE-SCALE"),
        ("W4A4_MXFP4", "weight_scale", torch.full((6, 3), 127, dtype=torch.uint8),
         "Q-LAYOUT-GROUP"),
        ("W4A4_MXFP4", "weight_scale", torch.full((6, 1), 127, dtype=torch.uint8),
         "Q-LAYOUT-GROUP"),
        ("WFP8AFP8_DYNAMIC", "weight", torch.full((6, 64), float("nan")).to(torch.float8_e4m3fn),
         "Q-VALUE-WEIGHT"),
        ("W4A4_FLATQUANT_DYNAMIC", "left_trans", torch.eye(5), "Q-LAYOUT-SHAPE"),
        ("W4A4_FLATQUANT_DYNAMIC", "right_trans", torch.ones(16, 4), "Q-LAYOUT-SHAPE"),
        ("W4A4_FLATQUANT_DYNAMIC", "right_trans", torch.full((16, 16), float("inf")),
         "Q-VALUE-WEIGHT"),
        ("W4A4_FLATQUANT_DYNAMIC", "clip_ratio", torch.zeros(1), "Q-VALUE-SCALE"),
    ],
)  # fmt: skip
def test_damaged_tensor_is_named(ms, write, kind, leaf, value, code):
    with pytest.raises((LayoutError, CheckpointError)) as err:
        _change(ms, write, kind, leaf, value)
    assert err.value.code == code
    assert leaf in str(err.value) or ms.NAME in str(err.value)


def test_group_size_that_contradicts_the_scales_is_named(ms, write):
    with pytest.raises(LayoutError, match="group_size=32") as err:
        _change(ms, write, "W8A8_DYNAMIC", "weight_scale", torch.ones(6, 2), group_size=16)
    assert err.value.code == "Q-LAYOUT-GROUP"


def test_exponent_byte_zero_is_the_smallest_power(ms, write):
    zeros = torch.zeros(6, 2, dtype=torch.uint8)
    lt = _change(ms, write, "W8A8_MXFP8", "weight_scale", zeros)
    want = ms.layer("W8A8_MXFP8")["weight"].double() * 2.0**-127
    assert torch.equal(lt.dequantize().double(), want)  # float32 subnormals, exact
    assert want.abs().max() > 0


def test_what_a_type_cannot_hold_is_refused(ms, write):
    planned, member, _ = _made(ms, write, "W8A8")
    lt = read_matrix(planned, member)
    cases = {
        "acc_bias": replace(lt, acc_bias=None),
        "bias": replace(lt, bias=torch.zeros(ms.N)),
        "weight scales": replace(
            lt, operands={"weight": replace(lt.weight, scales=(lt.weight.scales[0] * 2,))}
        ),
    }
    for case in cases.values():
        with pytest.raises(LayoutError) as err:
            member.scheme.serialize(member.layer, case)
        assert err.value.code == "Q-LAYOUT-REPRESENT"
