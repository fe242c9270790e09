"""Made layers through plan and loader, both ways; what must fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.errors import LayoutError, QuantError
from quant_core.load import read_matrix
from quant_core.spec import LayerDesc
from quant_plugin_mxfp8.scheme import Mxfp8Scheme

N, K = 12, 96
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def dense():
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(N, K, generator=rng) * torch.exp2(torch.randint(-9, 9, (N, 1), generator=rng))
    w[0, :32] = 0.0
    w[1, 40] = 1e4
    return w


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_layer_reads_and_writes_exactly(mx, write, dense, name, dtype):
    stored = mx.stored(dense, name)
    want = mx.read(*stored.values())
    stored[name] = stored[name].view(dtype)
    stored["bias"] = torch.randn(N).bfloat16()
    planned = mx.plan(write(mx.named(stored)))
    member = planned.members[mx.NAME]
    lt = read_matrix(planned, member)
    assert torch.equal(lt.dequantize(), want)
    back = member.scheme.serialize(member.layer, lt)
    assert back.keys() == stored.keys()
    for leaf, value in stored.items():
        assert back[leaf].dtype == value.dtype
        assert torch.equal(back[leaf].view(torch.uint8), value.view(torch.uint8)), leaf


def test_short_last_block_reads_and_writes_exactly(mx, write):
    stored = {
        "weight": torch.full((2, 40), 0x38, dtype=torch.uint8).view(E4M3),  # 1.0
        "weight_scale_inv": torch.tensor([[127, 128], [126, 130]], dtype=torch.uint8),
    }
    planned = mx.plan(write(mx.named(stored)))
    member = planned.members[mx.NAME]
    lt = read_matrix(planned, member)
    assert lt.dequantize()[0].tolist() == [1.0] * 32 + [2.0] * 8
    assert lt.dequantize()[1].tolist() == [0.5] * 32 + [8.0] * 8
    back = member.scheme.serialize(member.layer, lt)
    assert torch.equal(back["weight_scale_inv"], stored["weight_scale_inv"])


def test_scale_read_as_a_divisor_misses_the_weights(mx, write, dense):
    stored = mx.stored(dense)
    planned = mx.plan(write(mx.named(stored)))
    qt = read_matrix(planned, planned.members[mx.NAME]).weight
    divided = replace(qt.spec, scales=(replace(qt.spec.scales[0], inverse=True),))
    wrong = replace(qt, spec=divided).dequantize()
    assert not torch.allclose(wrong, mx.read(*stored.values()), rtol=0.5)


def test_activations_are_rounded_per_32_by_the_bits(mx, write, dense):
    planned = mx.plan(write(mx.named(mx.stored(dense))))
    spec = planned.members[mx.NAME].scheme.operands["input"]
    (scale,) = spec.scales
    assert (spec.element.name, scale.element, scale.grain, scale.static, scale.rule) == (
        "fp8_e4m3", "e8m0", (1, 32), False, "rceil",
    )  # fmt: skip


# ----------------------------------------------------------------------------------- quantizing


def _quantize(w):
    layer = LayerDesc(kind="linear", name="m", stored="m")
    return Mxfp8Scheme.of(tuple(w.shape)).quantize(layer, w)


def test_quantized_bytes_are_the_independent_writers(mx, dense):
    weight, scale = mx.write(dense)
    qt = _quantize(dense).weight
    assert torch.equal(qt.scales[0], scale)
    assert torch.equal(qt.codes, weight.view(torch.uint8))


@pytest.mark.parametrize(
    ("amax", "byte"),
    [
        (1.75, 119), (1.7500001, 120), (256.0, 127), (448.0, 127), (449.0, 128), (511.0, 128),
        (512.0, 128), (0.0, 0),
    ],
)  # fmt: skip
def test_published_bytes_of_one_block(amax, byte):
    w = torch.zeros(1, 32)
    w[0, 7] = amax
    qt = _quantize(w).weight
    assert qt.scales[0].tolist() == [[byte]]
    assert torch.isfinite(qt.dequantize()).all()


def test_values_between_codes_round_half_to_even():
    w = torch.zeros(1, 32)
    w[0, :6] = torch.tensor([448.0, 17.0, 19.0, 0.3, 1.0625, 1.1875])
    assert _quantize(w).weight.dequantize()[0, :6].tolist() == [448, 16, 20, 0.3125, 1.0, 1.25]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value):
    w = torch.zeros(2, 64)
    w[1, 3] = value
    with pytest.raises(LayoutError, match="1 of 128") as err:
        _quantize(w)
    assert err.value.code == "Q-VALUE-WEIGHT"


# ------------------------------------------------------------------------------- what must fail


def raises(code, mx, checkpoint, match=None):
    with pytest.raises(QuantError, match=match) as err:
        mx.plan(checkpoint)
    assert err.value.code == code
    return err.value


@pytest.mark.parametrize("leaf", ["weight", "weight_scale_inv"])
def test_lost_tensor_is_named(mx, write, dense, leaf):
    tensors = mx.named(mx.stored(dense)) | mx.named(mx.stored(dense), "model.layers.1.mlp.up_proj")
    del tensors[f"{mx.NAME}.{leaf}"]
    assert f"{mx.NAME}.{leaf}" in str(raises("Q-TENSOR-MISSING", mx, write(tensors)))


@pytest.mark.parametrize(
    ("leaf", "change", "code"),
    [
        ("weight", lambda t: t.float(), "Q-LAYOUT-DTYPE"),
        ("weight", lambda t: t.view(torch.uint8), "Q-LAYOUT-DTYPE"),
        ("weight", lambda t: t.unsqueeze(0), "Q-LAYOUT-SHAPE"),
        ("weight", lambda t: t[:, :64], "Q-LAYOUT-SHAPE"),
        ("weight_scale_inv", lambda t: t.float(), "Q-LAYOUT-DTYPE"),
        ("weight_scale_inv", lambda t: t[:, :-1], "Q-LAYOUT-SHAPE"),
        ("weight_scale_inv", lambda t: t.t().contiguous(), "Q-LAYOUT-SHAPE"),
        ("weight_scale_inv", lambda t: t[:1, :1], "Q-LAYOUT-SHAPE"),
    ],
)
def test_wrong_shape_or_dtype_names_the_tensor(mx, write, dense, leaf, change, code):
    stored = mx.stored(dense)
    stored[leaf] = change(stored[leaf])
    assert mx.NAME in str(raises(code, mx, write(mx.named(stored))))


def test_extra_tensor_is_named(mx, write, dense):
    stored = mx.stored(dense) | {"weight_scale": torch.ones(1)}
    assert "weight_scale" in str(raises("Q-TENSOR-UNEXPECTED", mx, write(mx.named(stored))))


@pytest.mark.parametrize("value", [0x7F, 0xFF])
def test_nan_codes_are_reported(mx, write, dense, value):
    stored = mx.stored(dense)
    stored["weight"].view(torch.uint8)[3, 5] = value
    planned = mx.plan(write(mx.named(stored)))
    with pytest.raises(LayoutError, match=rf"1 of {N * K}") as err:
        read_matrix(planned, planned.members[mx.NAME])
    assert err.value.code == "Q-VALUE-WEIGHT"


def test_nan_scale_is_reported_and_byte_zero_is_no_zero(mx, write, dense):
    stored = mx.stored(dense)
    stored["weight"].view(torch.uint8)[5, :32] = 0x38
    stored["weight_scale_inv"][5, 0] = 0
    planned = mx.plan(write(mx.named(stored)))
    assert read_matrix(planned, planned.members[mx.NAME]).dequantize()[5, 0].item() == 2.0**-127
    stored["weight_scale_inv"][2, 1] = 255
    planned = mx.plan(write(mx.named(stored)))
    with pytest.raises(LayoutError, match="1 of 36") as err:
        read_matrix(planned, planned.members[mx.NAME])
    assert err.value.code == "Q-VALUE-SCALE"


def test_contradictions_of_config_and_tensors(mx, write, dense):
    listed = mx.CONFIG | {"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}
    raises("Q-CKPT-MISMATCH", mx, write(mx.named(mx.stored(dense)), listed), "up_proj")
    other = "model.layers.1.mlp.up_proj"
    tensors = mx.named(mx.stored(dense)) | {f"{other}.weight": dense}
    raises("Q-CKPT-MISMATCH", mx, write(tensors), "layers.1")
    listed = mx.CONFIG | {"modules_to_not_convert": None, "ignored_layers": [other]}
    assert not mx.plan(write(tensors, listed)).members[other].quantized


def test_experts_are_one_stack(mx, write, dense):
    stem = "model.layers.0.mlp.experts"
    tensors = {}
    for e in range(3):
        tensors |= mx.named(mx.stored(dense + e), f"{stem}.{e}.up_proj")
    planned = mx.plan(write(tensors))
    member = planned.members[f"{stem}.up_proj"]
    assert member.layer.experts == (0, 1, 2)
    got = read_matrix(planned, member, 2).dequantize()
    assert torch.equal(got, mx.read(*mx.write(dense + 2)))
    del tensors[f"{stem}.1.up_proj.weight_scale_inv"]
    assert f"{stem}.1.up_proj" in str(raises("Q-TENSOR-MISSING", mx, write(tensors)))


def test_kv_scales_are_accounted_for_and_warned_about(mx, write, dense):
    kv = {f"model.layers.0.self_attn.{x}_scale": torch.ones(1) for x in "kv"}
    proj = "model.layers.0.self_attn.k_proj"
    kv[f"{proj}.k_scale"] = torch.ones(1)
    planned = mx.plan(write(mx.named(mx.stored(dense), proj) | kv))
    assert "KV-cache scales present, not applied (2 modules)" in planned.warnings
    assert set(kv) == set(planned.ledger.skipped)
    scheme = mx.CONFIG | {"kv_cache_scheme": {"num_bits": 8}}
    planned = mx.plan(write(mx.named(mx.stored(dense)), scheme))
    assert any("no scales are stored" in w for w in planned.warnings)


def test_kv_scales_of_keys_and_values_are_offered(mx, write, dense):
    kv = {f"model.layers.0.self_attn.{x}_scale": torch.full((1,), 0.5) for x in "kv"}
    planned = mx.plan(write(mx.named(mx.stored(dense)) | kv))
    (member,) = planned.attention.values()
    assert not member.scheme.default
    assert {t.stored for t in member.scheme.tensors} == set(kv)
    assert not any("not applied" in w for w in planned.warnings)


def test_what_mxfp8_cannot_hold_raises(mx, write, dense):
    planned = mx.plan(write(mx.named(mx.stored(dense))))
    member = planned.members[mx.NAME]
    lt = read_matrix(planned, member)
    qt = lt.weight
    wide = replace(qt.spec, scales=(replace(qt.spec.scales[0], grain=(1, 16)),))
    for bad in (
        replace(lt, operands={"weight": replace(qt, spec=wide)}),
        replace(lt, operands={"weight": replace(qt, shape=(N, 64))}),
        replace(lt, input_scale=torch.ones(1)),
    ):
        with pytest.raises(LayoutError) as err:
            member.scheme.serialize(member.layer, bad)
        assert err.value.code == "Q-LAYOUT-REPRESENT"
