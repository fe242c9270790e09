"""Presence decides with the config; header shapes are cross-checked before any data is read."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from quant_core.errors import CheckpointError, ConfigError, LayoutError
from quant_core.spec import Scale, Span, Unquantized, Zero, group
from quant_plugin_awq.detect import detect
from quant_plugin_awq.layers import scheme_for

BLOCK = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
UP0 = "model.layers.0.mlp.up_proj"


def _scheme(checkpoint, layer):
    return scheme_for(detect(checkpoint), layer, checkpoint)


def test_packed_layer_gets_a_scheme_with_params_and_axes(write, small, linear):
    scheme = _scheme(write(small(), BLOCK), linear())
    assert (scheme.name, scheme.shape, scheme.group_size) == ("w4a16", (16, 128), 64)
    assert scheme.weight.zero == Zero(kind="code", element="uint4")
    assert scheme.weight.scales == (Scale(element="f16", grain=group(64)),)
    params = {p.name: p for p in scheme.params(linear())}
    assert {n: (p.shape, p.dtypes[0], p.need) for n, p in params.items()} == {
        "qweight": ((128, 2), "int32", "required"),
        "qzeros": ((2, 2), "int32", "required"),
        "scales": ((2, 16), "float16", "required"),
        "bias": ((16,), "float16", "optional"),
    }
    tags = [(a.tag, a.per) for a in params["qzeros"].axes]
    assert tags == [("group", Fraction(64)), ("out", Fraction(8))]
    assert all(len(p.axes) == len(p.shape) for p in params.values())
    with_bias = {p.name: p.need for p in scheme.params(linear(bias=True))}
    assert with_bias["bias"] == "required"


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast", "llm-awq"])
def test_other_layouts_take_sizes_from_the_header(write, small, linear, layout):
    scheme = _scheme(write(small(layout), BLOCK | {"version": layout}), linear())
    assert scheme.shape == (16, 128)
    kind = "code" if layout == "gemv" else "offset"
    assert scheme.weight.zero.kind == kind
    names = [p.name for p in scheme.params(linear())]
    assert names[1] == ("scaled_zeros" if layout == "llm-awq" else "qzeros")


def test_gemv_fast_that_stores_scaled_zeros_is_read_by_that_name(write, small, linear):
    scheme = _scheme(write(small("llm-awq"), BLOCK | {"version": "gemv_fast"}), linear())
    assert scheme.zeros == "scaled_zeros"


def test_scale_element_follows_the_stored_dtype(write, small, linear):
    tensors = small()
    tensors[f"{UP0}.scales"] = tensors[f"{UP0}.scales"].bfloat16()
    scheme = _scheme(write(tensors, BLOCK), linear())
    assert scheme.weight.scales[0].element == "bf16"
    assert scheme.params(linear())[2].dtypes == ("bfloat16",)


def test_group_size_minus_one_is_the_whole_row(write, small, linear):
    scheme = _scheme(write(small(g=128), BLOCK | {"group_size": -1}), linear())
    assert scheme.group_size == 128


def test_plain_layers_are_unquantized_with_the_rule_that_decided(write, small, linear):
    checkpoint = write(small(), BLOCK | {"modules_to_not_convert": ["lm_head"]})
    head = _scheme(checkpoint, linear("lm_head"))
    assert head == Unquantized(rule="modules_to_not_convert", evidence="pattern 'lm_head'")
    norm = _scheme(checkpoint, linear("model.norm"))
    assert norm.rule == "no packed tensor stored"


def test_packed_lm_head_is_read(write, small, linear):
    tensors = small()
    del tensors["lm_head.weight"]
    tensors |= {f"lm_head.{n}": tensors[f"{UP0}.{n}"].clone() for n in ("qweight", "qzeros")}
    tensors["lm_head.scales"] = tensors[f"{UP0}.scales"].clone()
    assert _scheme(write(tensors, BLOCK | {"lm_head": True}), linear("lm_head")).bits == 4


def test_lm_head_true_with_a_plain_weight_is_a_mismatch(write, small, linear):
    with pytest.raises(CheckpointError, match=r"lm_head\.weight") as err:
        _scheme(write(small(), BLOCK | {"lm_head": True}), linear("lm_head"))
    assert err.value.code == "Q-CKPT-MISMATCH"


def _with_plain_weight(tensors):
    for leaf in ("qweight", "qzeros", "scales"):
        del tensors[f"{UP0}.{leaf}"]
    tensors[f"{UP0}.weight"] = torch.zeros(16, 128)
    return tensors


def test_plain_weight_where_the_other_layers_are_packed_is_a_mismatch(write, small, linear):
    with pytest.raises(CheckpointError, match=rf"{UP0}\.weight.*{UP0}\.qweight") as err:
        _scheme(write(_with_plain_weight(small()), BLOCK), linear())
    assert err.value.code == "Q-CKPT-MISMATCH"


def test_plain_weight_that_the_config_excludes_is_unquantized(write, small, linear):
    block = BLOCK | {"modules_to_not_convert": ["layers.0.mlp"]}
    assert isinstance(_scheme(write(_with_plain_weight(small()), block), linear()), Unquantized)


def test_packed_layer_that_the_config_excludes_is_a_mismatch(write, small, linear):
    block = BLOCK | {"modules_to_not_convert": ["layers.0.mlp.up_proj"]}
    with pytest.raises(CheckpointError, match=rf"{UP0}\.qweight.*layers\.0\.mlp\.up_proj") as err:
        _scheme(write(small(), block), linear())
    assert err.value.code == "Q-CKPT-MISMATCH"


def test_substring_that_hits_half_a_name_leaves_the_decision_to_presence(write, small, linear):
    block = BLOCK | {"modules_to_not_convert": ["layers.0.mlp.up"]}
    assert _scheme(write(small(), block), linear()).bits == 4


def test_plain_and_packed_weight_of_one_layer_is_a_mismatch(write, small, linear):
    checkpoint = write(small() | {f"{UP0}.weight": torch.zeros(16, 128)}, BLOCK)
    with pytest.raises(CheckpointError) as err:
        _scheme(checkpoint, linear())
    assert err.value.code == "Q-CKPT-MISMATCH"


def test_layer_gone_altogether_is_missing_and_names_its_tensors(write, small, linear):
    tensors = {k: v for k, v in small().items() if not k.startswith(UP0)}
    with pytest.raises(CheckpointError, match=f"{UP0}.qweight.*{UP0}.qzeros") as err:
        _scheme(write(tensors, BLOCK), linear())
    assert err.value.code == "Q-TENSOR-MISSING"


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("layout", ["gemm", "gemv"])
def test_one_lost_tensor_keeps_the_layer_quantized_or_is_named(write, small, linear, leaf, layout):
    tensors = small(layout)
    del tensors[f"{UP0}.{leaf}"]
    checkpoint = write(tensors, BLOCK | {"version": layout})
    if layout == "gemv" and leaf == "qweight":  # padding hides in_features
        with pytest.raises(CheckpointError, match=f"{UP0}.qweight") as err:
            _scheme(checkpoint, linear())
        assert err.value.code == "Q-TENSOR-MISSING"
        return
    scheme = _scheme(checkpoint, linear())
    assert scheme.shape == (16, 128)
    assert leaf in [p.name for p in scheme.params(linear()) if p.need == "required"]


@pytest.mark.parametrize(
    ("block", "error", "code", "text"),
    [
        ({"group_size": 48}, LayoutError, "Q-LAYOUT-GROUP", "48 does not divide in_features 128"),
        ({"group_size": 10**12}, LayoutError, "Q-LAYOUT-GROUP", "imply group_size 64"),
        ({"group_size": 32}, LayoutError, "Q-LAYOUT-GROUP", "made with group_size 64"),
        ({"group_size": 128}, LayoutError, "Q-LAYOUT-GROUP", "made with group_size 64"),
        (
            {"bits": 8, "meta": {"quantizer": "gptqmodel:7"}},
            ConfigError,
            "Q-CFG-CONFLICT",
            "holds 4-bit codes",
        ),
    ],
)
def test_config_that_contradicts_the_shapes_says_what_they_imply(
    write, small, linear, block, error, code, text
):
    with pytest.raises(error, match=text) as err:
        _scheme(write(small(), BLOCK | block), linear())
    assert err.value.code == code
    assert UP0 in str(err.value)


def test_wrong_version_names_the_one_that_fits(write, small, linear):
    layer = linear(inp=Span.whole(128), out=Span.whole(16))
    checkpoint = write(small("gemv"), BLOCK)
    with pytest.raises(LayoutError, match="fit version 'gemv'"):
        _scheme(checkpoint, layer)


@pytest.mark.parametrize(
    ("leaf", "change", "code"),
    [
        ("qweight", lambda t: t[:64], "Q-LAYOUT-SHAPE"),
        ("qweight", lambda t: t.t(), "Q-LAYOUT-SHAPE"),
        ("qweight", lambda t: t.flatten(), "Q-LAYOUT-SHAPE"),
        ("qweight", lambda t: t.long(), "Q-LAYOUT-DTYPE"),
        ("qzeros", lambda t: t[:1], "Q-LAYOUT-GROUP"),
        ("qzeros", lambda t: t[:, :1], "Q-LAYOUT-SHAPE"),
        ("scales", lambda t: t.int(), "Q-LAYOUT-DTYPE"),
        ("scales", lambda t: t[:, :12], "Q-LAYOUT-SHAPE"),
        ("scales", lambda t: t[:1], "Q-LAYOUT-GROUP"),
    ],
)
def test_wrong_header_raises_and_names_the_tensor(write, small, linear, leaf, change, code):
    tensors = small()
    tensors[f"{UP0}.{leaf}"] = change(tensors[f"{UP0}.{leaf}"])
    layer = linear(inp=Span.whole(128), out=Span.whole(16))
    with pytest.raises(LayoutError, match=rf"model.safetensors: tensor '{UP0}\.{leaf}'") as err:
        _scheme(write(tensors, BLOCK), layer)
    assert err.value.code == code
    assert err.value.expected != err.value.actual


@pytest.mark.parametrize("leaf", ["qzeros", "scales"])
def test_header_alone_still_blames_the_short_tensor(write, small, linear, leaf):
    tensors = small()
    tensors[f"{UP0}.{leaf}"] = tensors[f"{UP0}.{leaf}"][:, :1]
    with pytest.raises(LayoutError) as err:
        _scheme(write(tensors, BLOCK), linear())
    assert err.value.tensor == f"{UP0}.{leaf}"


def test_zero_point_false_makes_zeros_optional_and_constant(write, small, linear):
    tensors = small()
    block = BLOCK | {"zero_point": False}
    stored = _scheme(write(tensors, block), linear())
    assert stored.weight.zero.kind == "code"
    tensors = {k: v for k, v in tensors.items() if not k.endswith("qzeros")}
    absent = _scheme(write(tensors, block), linear())
    assert absent.weight.zero == Zero(kind="const", value=8)
    assert "qzeros" not in [p.name for p in absent.params(linear())]


def _experts(small, count=3):
    packed = small()
    leaves = ("qweight", "qzeros", "scales")
    return {
        f"model.layers.0.mlp.experts.{e}.up_proj.{leaf}": packed[f"{UP0}.{leaf}"].clone()
        for e in range(count)
        for leaf in leaves
    }


def _stack(linear, count=3):
    return linear(
        "model.layers.0.mlp.experts.{expert}.up_proj", kind="experts", experts=tuple(range(count))
    )


def test_experts_that_agree_share_one_scheme(write, small, linear):
    assert _scheme(write(_experts(small), BLOCK), _stack(linear)).shape == (16, 128)


def test_expert_with_a_plain_weight_is_a_mismatch(write, small, linear):
    tensors = _experts(small)
    for leaf in ("qweight", "qzeros", "scales"):
        del tensors[f"model.layers.0.mlp.experts.1.up_proj.{leaf}"]
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.zeros(16, 128)
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight") as err:
        _scheme(write(tensors, BLOCK), _stack(linear))
    assert err.value.code == "Q-CKPT-MISMATCH"


def test_expert_not_stored_is_missing_with_its_number(write, small, linear):
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.qweight") as err:
        _scheme(write(_experts(small), BLOCK), _stack(linear, 4))
    assert err.value.code == "Q-TENSOR-MISSING"


def test_expert_of_another_shape_or_dtype_is_named(write, small, linear):
    name = "model.layers.0.mlp.experts.2.up_proj.scales"
    for change, code in ((lambda t: t[:1], "Q-LAYOUT-GROUP"), (torch.Tensor.bfloat16, "DTYPE")):
        tensors = _experts(small)
        tensors[name] = change(tensors[name])
        with pytest.raises(LayoutError, match=r"experts\.2\.up_proj\.scales") as err:
            _scheme(write(tensors, BLOCK), _stack(linear))
        assert code in err.value.code


def test_scaled_activation_is_refused_by_name(write, small, linear):
    checkpoint = write(small() | {"model.layers.0.mlp.act.scales": torch.ones(64).half()}, BLOCK)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.act\.scales") as err:
        _scheme(checkpoint, linear())
    assert err.value.code == "Q-TENSOR-UNEXPECTED"
