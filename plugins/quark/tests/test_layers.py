"""From the header to schemes and values: what decides, and faults that must not pass."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from quant_core.build import Builder
from quant_core.errors import CheckpointError, ConfigError, LayoutError
from quant_core.load import read_matrix
from quant_core.spec import CHANNEL, TENSOR
from quant_plugin_quark.scheme import KV_RULE

ATTN = "model.layers.0.self_attn"


def plan_and_read(qk, checkpoint):
    planned = qk.plan(checkpoint)
    for member in planned.quantized.values():
        read_matrix(planned, member, 0 if member.layer.experts else None)


def fails(error, code, qk, checkpoint):
    with pytest.raises(error) as err:
        plan_and_read(qk, checkpoint)
    assert err.value.code == code
    return err.value


@pytest.fixture
def fp4(qk):
    return qk.block(qk.mx("fp4"), qk.mx("fp4", is_dynamic=True))


@pytest.fixture
def int8(qk):
    return qk.block(qk.spec("int8"), qk.spec("int8"))


# ---------------------------------------------------------------------------------- what decides


def test_stored_tensors_and_config_decide_together(qk, write, fp4):
    tensors = qk.named(qk.mxfp4_layer()) | {
        "model.embed_tokens.weight": torch.zeros(32, 64),
        "model.norm.weight": torch.ones(64),
        "lm_head.weight": torch.zeros(32, 64),
    }
    planned = qk.plan(write(tensors, fp4))
    assert list(planned.quantized) == [qk.NAME]
    assert planned.members["lm_head"].scheme.rule == "exclude"
    assert planned.warnings == []
    scheme = planned.quantized[qk.NAME].scheme
    assert (scheme.name, scheme.shape) == ("wmxfp4amxfp4", (16, 64))


def test_excluded_module_that_is_quantized_contradicts(qk, write, fp4):
    checkpoint = write(qk.named(qk.mxfp4_layer()), fp4 | {"exclude": ["*up_proj"]})
    assert "up_proj" in fails(CheckpointError, "Q-CKPT-MISMATCH", qk, checkpoint).tensor


def test_quantized_module_without_weight_arguments_contradicts(qk, write):
    checkpoint = write(qk.named(qk.mxfp4_layer()), qk.block(None))
    fails(CheckpointError, "Q-CKPT-MISMATCH", qk, checkpoint)


def test_float_weight_among_quantized_siblings_contradicts(qk, write, fp4):
    lost = "model.layers.1.mlp.up_proj"
    tensors = qk.named(qk.mxfp4_layer()) | {f"{lost}.weight": torch.zeros(16, 64)}
    assert lost in fails(CheckpointError, "Q-CKPT-MISMATCH", qk, write(tensors, fp4)).tensor
    planned = qk.plan(write(tensors, fp4 | {"exclude": ["model.layers.1.*"]}))
    assert list(planned.quantized) == [qk.NAME]


def test_layer_arguments_decide_each_layer(qk, write, fp4):
    other = "model.layers.1.mlp.up_proj"
    config = fp4 | {
        "layer_quant_config": {"*layers.1.*": qk.args(qk.spec("int8"), qk.spec("int8"))}
    }
    tensors = qk.named(qk.mxfp4_layer()) | qk.named(qk.int8_layer(), other)
    planned = qk.plan(write(tensors, config))
    names = {n: m.scheme.name for n, m in planned.quantized.items()}
    assert names == {qk.NAME: "wmxfp4amxfp4", other: "w8a8"}


@pytest.mark.parametrize(
    ("inputs", "element", "grain", "static", "peak", "rule"),
    [
        (("int8", "per_tensor", {}), "int8", TENSOR, True, 0.0, ""),
        (("int8", "per_tensor", {"is_dynamic": True}), "int8", TENSOR, False, 127.5, ""),
        (("int8", "per_channel", {"is_dynamic": True, "ch_axis": 1}), "int8", CHANNEL, False,
         127.5, ""),
        (("fp8_e4m3", "per_tensor", {"is_dynamic": True}), "fp8_e4m3", TENSOR, False, 0.0, ""),
        (("fp8_e4m3", "per_channel", {"is_dynamic": True, "ch_axis": 1}), "fp8_e4m3", CHANNEL,
         False, 0.0, ""),
        (("fp8_e4m3", "per_group", {"is_dynamic": True, "ch_axis": -1, "group_size": 128}),
         "fp8_e4m3", (1, 128), False, 0.0, ""),
        (("fp6_e3m2", "per_group", {"is_dynamic": True, "ch_axis": -1, "group_size": 32,
          "scale_format": "e8m0", "scale_calculation_mode": "floor"}),
         "fp6_e3m2", (1, 32), False, 0.0, "floor"),
    ],
)  # fmt: skip
def test_inputs_mean(qk, write, inputs, element, grain, static, peak, rule):
    dtype, qscheme, keys = inputs
    config = qk.block(qk.spec("int8"), qk.spec(dtype, qscheme, **keys))
    stored = qk.int8_layer()
    if not static:
        del stored["input_scale"], stored["input_zero_point"]
    planned = qk.plan(write(qk.named(stored), config))
    spec = planned.quantized[qk.NAME].scheme.operands["input"]
    (scale,) = spec.scales
    found = (spec.element.name, scale.grain, scale.static, scale.peak, scale.rule)
    assert found == (element, grain, static, peak, rule)


@pytest.mark.parametrize(
    ("weight", "inputs", "keys"),
    [
        ("int8", ("int8", "per_channel", {"is_dynamic": True, "ch_axis": 2}), {}),
        ("int8", ("fp8_e4m3", "per_channel", {"ch_axis": 1}), {}),
        ("int8", ("uint8", "per_tensor", {}), {}),
        ("int8", ("int4", "per_tensor", {"is_dynamic": True}), {}),
        ("int8", None, {"bias": True}),
        ("int8", None, {"output_tensors": True}),
        ("fp4", None, {}),  # no e8m0
    ],
)
def test_unsupported_arguments_are_refused_with_the_layer(qk, write, weight, inputs, keys):
    dtype, qscheme, more = inputs or (None, None, {})
    given = qk.spec(dtype, qscheme, **more) if inputs else None
    extra = {k: qk.spec("int8") for k in keys}
    config = qk.block(qk.spec("int8"))
    weight = qk.grouped("fp4", 32) if weight == "fp4" else qk.spec(weight)
    config["global_quant_config"] = qk.args(weight, given, **extra)
    checkpoint = write(qk.named(qk.int8_layer()), config)
    err = fails(ConfigError, "Q-CFG-VALUE", qk, checkpoint)
    assert qk.NAME in str(err)
    assert "global_quant_config" in str(err)


# ----------------------------------------------------------------------------------------- experts


def experts(qk, count=3, lost=None):
    out = {}
    for e in range(count):
        out |= qk.named(qk.mxfp4_layer(seed=e), f"model.layers.0.mlp.experts.{e}.up_proj")
    return {k: v for k, v in out.items() if k != lost}


def test_experts_form_one_stack_of_one_kind(qk, write, fp4):
    planned = qk.plan(write(experts(qk), fp4))
    member = planned.members["model.layers.0.mlp.experts.up_proj"]
    assert member.layer.experts == (0, 1, 2)
    got = [read_matrix(planned, member, e).weight.codes for e in range(3)]
    assert all(torch.equal(c, qk.mxfp4_layer(seed=e)["weight"]) for e, c in enumerate(got))
    config = fp4 | {"layer_quant_config": {"*experts.1.*": qk.args(qk.spec("int8"))}}
    err = fails(ConfigError, "Q-CFG-CONFLICT", qk, write(experts(qk), config))
    assert "experts.1.up_proj" in err.tensor


def test_lost_scale_of_one_expert_is_named(qk, write, fp4):
    name = "model.layers.0.mlp.experts.1.up_proj.weight_scale"
    err = fails(CheckpointError, "Q-TENSOR-MISSING", qk, write(experts(qk, lost=name), fp4))
    assert name in str(err)


# ----------------------------------------------------------------------------------- stored tensors


@pytest.mark.parametrize("lost", ["weight", "weight_scale", "input_scale"])
def test_missing_tensor_is_named(qk, write, int8, lost):
    stored = qk.int8_layer()
    del stored[lost]
    err = fails(CheckpointError, "Q-TENSOR-MISSING", qk, write(qk.named(stored), int8))
    assert f"{qk.NAME}.{lost}" in f"{err.tensor} {err}"


def test_unexpected_tensor_is_refused(qk, write, int8):
    stored = qk.int8_layer() | {"weight_scale_2": torch.ones(())}
    fails(CheckpointError, "Q-TENSOR-UNEXPECTED", qk, write(qk.named(stored), int8))


@pytest.mark.parametrize(
    ("leaf", "value", "code"),
    [
        ("weight_scale", torch.ones(3), "Q-LAYOUT-SHAPE"),
        ("weight_scale", torch.ones((), dtype=torch.int32), "Q-LAYOUT-DTYPE"),
        ("weight", torch.zeros(16, 64, dtype=torch.uint8), "Q-LAYOUT-DTYPE"),
        ("weight_scale", torch.tensor(math.nan), "Q-VALUE-SCALE"),
        ("weight_scale", torch.tensor(math.inf), "Q-VALUE-SCALE"),
        ("input_scale", torch.tensor(0.0), "Q-VALUE-SCALE"),
        ("input_scale", torch.tensor(-1.0), "Q-VALUE-SCALE"),
        ("input_scale", torch.tensor(math.nan), "Q-VALUE-SCALE"),
    ],
)
def test_damaged_tensor_is_refused(qk, write, int8, leaf, value, code):
    stored = qk.int8_layer() | {leaf: value}
    err = fails(LayoutError, code, qk, write(qk.named(stored), int8))
    assert f"{qk.NAME}.{leaf}" in str(err)


@pytest.mark.parametrize("leaf", ["weight_zero_point", "input_zero_point"])
def test_zero_points_of_symmetric_operands_must_be_zero(qk, write, int8, leaf):
    stored = qk.int8_layer() | {leaf: torch.tensor(-1, dtype=torch.int8)}
    err = fails(ConfigError, "Q-CFG-CONFLICT", qk, write(qk.named(stored), int8))
    assert leaf in err.tensor


@pytest.mark.parametrize("rank", [(), (1,)])
def test_single_scales_may_have_an_axis(qk, write, int8, rank):
    stored = qk.int8_layer()
    for name in ("weight_scale", "input_scale"):
        stored[name] = stored[name].reshape(rank)
    planned = qk.plan(write(qk.named(stored), int8))
    member = planned.quantized[qk.NAME]
    lt = read_matrix(planned, member)
    assert torch.equal(lt.dequantize(), stored["weight"].float() * stored["weight_scale"])
    back = member.scheme.serialize(member.layer, lt)
    assert all(torch.equal(back[n], t) and back[n].shape == t.shape for n, t in stored.items())


def test_wrong_group_size_names_the_one_that_fits(qk, write):
    stored = {
        "weight": torch.zeros(64, 2, dtype=torch.int32),
        "weight_scale": torch.ones(2, 16),
    }
    config = qk.block(qk.grouped("int4", 16))
    err = fails(LayoutError, "Q-LAYOUT-GROUP", qk, write(qk.named(stored), config))
    assert "group_size 32" in str(err)
    mx = {**qk.mxfp4_layer(), "weight_scale": torch.zeros(16, 4, dtype=torch.uint8)}
    config = qk.block(qk.mx("fp4"))
    fails(LayoutError, "Q-LAYOUT-GROUP", qk, write(qk.named(mx), config))


def test_exponent_byte_255_is_refused_and_0_is_the_smallest_power(qk, write):
    config = qk.block(qk.mx("fp4"))
    stored = qk.mxfp4_layer()
    stored["weight"].fill_(0x22)  # 1.0 everywhere
    stored["weight_scale"].fill_(0)
    planned = qk.plan(write(qk.named(stored), config))
    got = read_matrix(planned, planned.quantized[qk.NAME]).dequantize()
    assert (got == 2.0**-127).all()
    stored["weight_scale"][3, 1] = 255
    err = fails(LayoutError, "Q-VALUE-SCALE", qk, write(qk.named(stored), config))
    assert "(3, 1)" in str(err)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "bad"),
    [
        ("fp8_e4m3", torch.float8_e4m3fn, (0x7F, 0xFF)),
        ("fp8_e5m2", torch.float8_e5m2, (0x7D, 0xFE)),
    ],
)
def test_nan_among_fp8_codes_is_refused(qk, write, dtype, torch_dtype, bad):
    config = qk.block(qk.spec(dtype))
    for code in (*bad, 0x3C):
        raw = torch.zeros(16, 64, dtype=torch.uint8)
        raw[1, 2] = code
        stored = {"weight": raw.view(torch_dtype), "weight_scale": torch.tensor(1.0)}
        checkpoint = write(qk.named(stored), config)
        if code in bad:
            fails(LayoutError, "Q-VALUE-WEIGHT", qk, checkpoint)
        else:
            read_matrix(qk.plan(checkpoint), qk.plan(checkpoint).quantized[qk.NAME])


def test_weights_of_another_kind_are_not_written(qk, write, int8, fp4):
    planned = qk.plan(write(qk.named(qk.int8_layer()), int8))
    member = planned.quantized[qk.NAME]
    lt = read_matrix(planned, member)
    other = qk.plan(write(qk.named(qk.mxfp4_layer()), fp4)).quantized[qk.NAME]
    with pytest.raises(LayoutError) as err:
        other.scheme.serialize(other.layer, lt)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


# ---------------------------------------------------------------------------------- cache scales


def test_cache_scales_are_accounted_for_by_their_rule(qk, write, fp4):
    tensors = qk.named(qk.mxfp4_layer(), f"{ATTN}.k_proj")
    tensors |= {
        f"{ATTN}.k_proj.output_scale": torch.ones(()),
        f"{ATTN}.v_proj.weight": torch.zeros(16, 64),  # excluded, but its outputs are values
        f"{ATTN}.v_proj.output_scale": torch.ones(()),
        f"{ATTN}.prob_output_scale": torch.ones(()),
    }
    planned = qk.plan(write(tensors, fp4 | {"exclude": ["*v_proj"]}))
    assert planned.warnings == [f"{KV_RULE} (1 attention modules)"]
    assert set(planned.ledger.skipped.values()) == {KV_RULE}
    assert len(planned.ledger.skipped) == 3


def _fp8_outputs(fp4, **changes):
    outputs = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}
    layer = fp4["global_quant_config"] | {"output_tensors": outputs | changes}
    return fp4 | {"layer_quant_config": {"*k_proj": layer, "*v_proj": layer}, "exclude": []}


def _cached_layer(qk):
    out = {}
    for name in (f"{ATTN}.k_proj", f"{ATTN}.v_proj"):
        out |= qk.named(qk.mxfp4_layer(), name) | {f"{name}.output_scale": torch.ones(())}
    return out


@pytest.mark.parametrize("post_rope", [False, True])
def test_scales_of_keys_and_values_become_an_attention_member(qk, write, fp4, post_rope):
    config = _fp8_outputs(fp4) | {"kv_cache_post_rope": post_rope}
    planned = qk.plan(write(_cached_layer(qk), config))
    assert not planned.warnings
    assert not planned.ledger.skipped
    scheme = planned.attention[ATTN].scheme
    assert {r: s.label for r, s in scheme.operands.items()} == dict.fromkeys(
        "kv", "fp8_e4m3 tensor:f32"
    )
    assert scheme.site == ("cache" if post_rope else "projection")
    assert scheme.projections == {"k": "k_proj", "v": "v_proj"}


def test_outputs_of_other_kinds_are_accounted_for_and_warned_about(qk, write, fp4):
    config = _fp8_outputs(fp4, dtype="fp8_e5m2")
    planned = qk.plan(write(_cached_layer(qk), config))
    assert planned.warnings == [f"{KV_RULE} (1 attention modules)"]
    assert not planned.attention


def test_scale_of_keys_that_a_layer_lacks_is_missing(qk, write, fp4):
    tensors = _cached_layer(qk)
    second = {n.replace("layers.0", "layers.1"): t for n, t in tensors.items()}
    second.pop(f"{ATTN}.k_proj.output_scale".replace("layers.0", "layers.1"))
    fails(CheckpointError, "Q-TENSOR-MISSING", qk, write(tensors | second, _fp8_outputs(fp4)))


def test_cache_scales_elsewhere_are_unexpected(qk, write, fp4):
    tensors = qk.named(qk.mxfp4_layer()) | {f"{qk.NAME}.output_scale": torch.ones(())}
    fails(CheckpointError, "Q-TENSOR-UNEXPECTED", qk, write(tensors, fp4))


def test_cache_scales_that_are_announced_but_absent_are_said(qk, write, fp4):
    fp4["export"]["kv_cache_group"] = ["*k_proj"]
    fp4["exclude"] = []
    (warning,) = qk.plan(write(qk.named(qk.mxfp4_layer()), fp4)).warnings
    assert "stays unquantized" in warning


# -------------------------------------------------------------------------------------- rotations


def hadamard(n):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h.to(torch.int8)


@pytest.mark.parametrize("size", [64, 16])
@pytest.mark.parametrize("prescale", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_rotation_of_the_inputs_is_applied(qk, write, size, prescale, trained):
    rng = torch.Generator().manual_seed(1)
    stored = qk.mxfp4_layer()
    signs = hadamard(size)[torch.randperm(size, generator=rng)].contiguous()
    matrix = signs.double() / math.sqrt(size)
    stored["input_rotation"] = matrix if trained else signs
    scale = torch.rand(64, generator=rng) + 0.5
    if prescale:
        stored["input_prescale"] = scale.bfloat16()
    planned = qk.plan(write(qk.named(stored), qk.block(qk.mx("fp4"))))
    member = planned.quantized[qk.NAME]
    lt = read_matrix(planned, member)
    back = member.scheme.serialize(member.layer, lt)
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in stored.items())

    x = torch.randn(5, 64, generator=rng)
    scaled = x.double() * (scale.bfloat16().double() if prescale else 1)
    turned = (scaled.view(5, -1, size) @ matrix).view(5, 64).float()
    module = Builder(plan=planned, dtype=torch.float32).linear(qk.NAME, [member])
    got, weight = module(x), lt.dequantize()
    # float32 sums over 64 columns in another order
    assert torch.allclose(got, F.linear(turned, weight), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, F.linear(x, weight), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_rotation": torch.ones(48, 48, dtype=torch.int8)},  # 48 does not divide 64
        {"input_rotation": torch.ones(16, 32, dtype=torch.int8)},
        {"input_rotation": torch.eye(16)},  # float32: neither signs nor trained
        {"input_prescale": torch.ones(64)},  # alone
    ],
)
def test_rotation_of_another_kind_is_refused(qk, write, changes):
    checkpoint = write(qk.named(qk.mxfp4_layer() | changes), qk.block(qk.mx("fp4")))
    fails(ConfigError, "Q-CFG-TRANSFORM", qk, checkpoint)


def test_matrix_that_is_not_orthogonal_is_refused(qk, write):
    for matrix in (torch.ones(16, 16, dtype=torch.int8), torch.ones(16, 16).double()):
        stored = qk.mxfp4_layer() | {"input_rotation": matrix}
        checkpoint = write(qk.named(stored), qk.block(qk.mx("fp4")))
        fails(LayoutError, "Q-VALUE-ROTATION", qk, checkpoint)


def test_rotation_that_is_announced_but_not_stored_is_refused(qk, write):
    config = qk.block(qk.mx("fp4"), algo_config=[{"name": "rotation", "r4": True}])
    tensors = qk.named(qk.mxfp4_layer())
    fails(ConfigError, "Q-CFG-TRANSFORM", qk, write(tensors, config))
    shared = tensors | {"shared_input_rotation_64": hadamard(64)}
    fails(ConfigError, "Q-CFG-TRANSFORM", qk, write(shared, config))
    merged = qk.block(qk.mx("fp4"), algo_config=[{"name": "rotation", "r1": True, "r4": False}])
    assert len(qk.plan(write(tensors, merged)).quantized) == 1
