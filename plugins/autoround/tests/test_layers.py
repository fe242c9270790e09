"""Checkpoints on disk: detection, the two config files, and headers against the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import made_autoround as made
from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import CheckpointError, ConfigError, FormatError, LayoutError, QuantError
from quant_core.load import load_tensor, read_matrix
from quant_core.spec import LayerDesc, Span, Unquantized
from quant_plugin_autoround.detect import detect
from quant_plugin_autoround.layers import scheme_for
from quant_plugin_autoround.scheme import AutoRoundScheme, build_scheme
from quant_plugin_autoround.writer import config_for, describe

UP = "model.layers.{}.mlp.up_proj"
Modules = dict[str, dict[str, Tensor]]


def stack(count: int = 2, **kind: Any) -> Modules:
    return {UP.format(i): made.layer(32, 64, seed=i, **kind)[0] for i in range(count)}


def floats(*names: str, dtype: torch.dtype = torch.bfloat16) -> Modules:
    return {n: {"weight": torch.ones(32, 64).to(dtype)} for n in names}


def fails(folder: Path) -> QuantError:
    with pytest.raises(QuantError) as err:
        made.plan_of(folder)
    return err.value


# ------------------------------------------------------------------------------------ detection


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round", "Auto-Round"])
def test_quant_method_declares_the_format(tmp_path: Path, method: str) -> None:
    match = detect(open_checkpoint(made.save(tmp_path, stack(), made.config(quant_method=method))))
    assert match is not None
    assert (match.level, match.config.default.bits) == ("declared", 4)
    assert "auto_round:auto_gptq" in match.evidence


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_what_the_tool_exports_under_other_names_is_not_claimed(
    tmp_path: Path, method: str
) -> None:
    block = made.config(quant_method=method, provider="auto-round")
    assert detect(open_checkpoint(made.save(tmp_path, stack(), block))) is None


def test_tensors_alone_are_not_claimed(tmp_path: Path) -> None:
    assert detect(open_checkpoint(made.save(tmp_path, stack()))) is None
    assert isinstance(fails(tmp_path), FormatError)


def test_side_file_alone_declares_the_format(tmp_path: Path) -> None:
    side = {"quantization_config.json": made.config()}
    plan = made.plan_of(made.save(tmp_path, stack(), None, side))
    assert plan.match is not None
    assert plan.match.config.source == "quantization_config.json"
    assert len(plan.quantized) == 2


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("quant_method", "auto-round", "gptq"),
        ("bits", 4, 8),
        ("group_size", 32, 64),
        ("sym", True, False),
        ("packing_format", "auto_round:auto_gptq", "auto_round"),
        ("extra_config", {"a": {"bits": 2}}, {"a": {"bits": 8}}),
    ],
)
def test_files_that_disagree_raise_and_are_named(
    tmp_path: Path, key: str, ours: Any, theirs: Any
) -> None:
    side = {"quantization_config.json": made.config(**{key: theirs})}
    err = fails(made.save(tmp_path, stack(), made.config(**{key: ours}), side))
    assert isinstance(err, ConfigError)
    assert (err.code, err.tensor, err.expected, err.actual) == ("Q-CFG-CONFLICT", key, ours, theirs)
    assert "config.json" in str(err)
    assert "quantization_config.json" in str(err)


# -------------------------------------------------------------------------------- which modules


def test_mixed_bits_and_groups_inside_one_attention_are_read(tmp_path: Path) -> None:
    attn = "model.layers.0.self_attn."
    kinds: dict[str, dict[str, Any]] = {
        "q_proj": {"bits": 2, "sym": False},
        "k_proj": {"bits": 5, "group_size": 16},
        "v_proj": {"bits": 8, "group_size": -1},
    }
    made_layers = {attn + n: made.layer(32, 64, **kind) for n, kind in kinds.items()}
    modules = {n: tensors for n, (tensors, _) in made_layers.items()}
    modules |= floats(attn + "o_proj")
    extra: dict[str, Any] = {attn + n: kind for n, kind in kinds.items()}
    extra[attn + "o_proj"] = {"bits": 16, "data_type": "float"}
    plan = made.plan_of(made.save(tmp_path, modules, made.config(extra_config=extra)))
    for name, (_, expected) in made_layers.items():
        assert torch.equal(load_tensor(plan, name).dequantize(), expected)
    rule = plan.members[attn + "o_proj"].scheme
    assert isinstance(rule, Unquantized)
    assert "extra_config" in rule.rule
    assert plan.warnings == []


def test_quantized_lm_head_is_read_with_and_without_a_rule(tmp_path: Path) -> None:
    for i, extra in enumerate(({}, {"lm_head": {"bits": 4, "group_size": 32, "sym": True}})):
        folder = tmp_path / str(i)
        folder.mkdir()
        modules = stack() | {"lm_head": made.layer(32, 64)[0]}
        plan = made.plan_of(made.save(folder, modules, made.config(extra_config=extra)))
        assert plan.members["lm_head"].quantized


def test_router_pattern_that_also_hits_gate_proj_leaves_it_quantized(tmp_path: Path) -> None:
    mlp = "model.layers.0.mlp."
    modules = {mlp + "gate_proj": made.layer(32, 64)[0]} | floats(mlp + "gate")
    extra = {r".*model\.layers\.0\.mlp\.gate.*": {"bits": 16, "data_type": "float"}}
    plan = made.plan_of(made.save(tmp_path, modules, made.config(extra_config=extra)))
    assert plan.members[mlp + "gate_proj"].quantized
    assert not plan.members[mlp + "gate"].quantized


def test_packed_module_that_the_config_excludes_by_name_raises(tmp_path: Path) -> None:
    extra = {UP.format(1): {"bits": 16}}
    err = fails(made.save(tmp_path, stack(), made.config(extra_config=extra)))
    assert isinstance(err, CheckpointError)
    assert (err.code, err.tensor) == ("Q-CKPT-MISMATCH", UP.format(1))


@pytest.mark.parametrize("extra", [{}, {UP.format(1): {"bits": 8}}])
def test_float_weight_where_the_config_says_quantized_raises(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    modules = stack(1) | floats(UP.format(1))
    err = fails(made.save(tmp_path, modules, made.config(extra_config=extra)))
    assert (err.code, err.tensor) == ("Q-CKPT-MISMATCH", UP.format(1))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"extra_config": {UP.format(1): {"bits": 16}}}, "extra_config"),
        ({"extra_config": {".*layers.1.*": {"bits": 32}}}, "extra_config"),
        ({"block_name_to_quantize": "model.layers.0"}, "not in block_name_to_quantize"),
    ],
)
def test_float_weight_that_a_rule_explains_is_unquantized(
    tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    modules = stack(1) | floats(UP.format(1))
    plan = made.plan_of(made.save(tmp_path, modules, made.config(**changes)))
    found = plan.members[UP.format(1)].scheme
    assert isinstance(found, Unquantized)
    assert rule in found.rule


def test_norms_and_routers_of_a_block_are_unquantized(tmp_path: Path) -> None:
    norm = "model.layers.0.input_layernorm"
    modules = stack() | {norm: {"weight": torch.ones(64)}} | floats("model.layers.0.mlp.gate")
    plan = made.plan_of(made.save(tmp_path, modules, made.config()))
    for name in (norm, "model.layers.0.mlp.gate"):
        assert plan.members[name].scheme.rule == "no packed tensor stored"  # type: ignore[union-attr]


# ------------------------------------------------------------------------- what is not read here


@pytest.mark.parametrize(
    "leaves",
    [
        {"weight_packed": torch.zeros(32, 32, dtype=torch.uint8), "weight_scale": torch.ones(32)},
        {"weight": torch.zeros(32, 64).to(torch.float8_e4m3fn), "weight_scale": torch.ones(32)},
        {"weight": torch.zeros(32, 64).to(torch.float8_e4m3fn)},
        {"weight": torch.zeros(32, 64, dtype=torch.int8), "weight_scale": torch.ones(32)},
    ],
)
def test_float_and_8_bit_weights_of_unknown_types_are_refused_by_name(
    tmp_path: Path, leaves: dict[str, Tensor]
) -> None:
    block = made.config(packing_format="auto_round:llm_compressor", data_type="nv_fp4_v2")
    err = fails(made.save(tmp_path, {UP.format(0): leaves}, block))
    assert isinstance(err, ConfigError)
    assert (err.code, err.tensor, err.plugin) == ("Q-CFG-VALUE", UP.format(0), "autoround")
    assert "4-bit nv_fp4_v2 weights" in str(err)
    assert next(iter(leaves)) in str(err)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"act_bits": 8}, "8-bit int activations"),
        ({"super_bits": 6}, "super-groups"),
        ({"rotation_config": {"kind": "hadamard"}}, "rotated activations"),
        ({"data_type": "int_asym_dq"}, "int_asym_dq weights"),
        ({"packing_format": "auto_round:llm_compressor"}, "4-bit int weights"),
    ],
)
def test_packed_layers_that_need_more_than_weights_are_refused(
    tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    err = fails(made.save(tmp_path, stack(), made.config(**changes)))
    assert (err.code, err.tensor) == ("Q-CFG-VALUE", UP.format(0))
    assert found in str(err)


def test_one_layer_with_quantized_activations_is_refused_by_its_name(tmp_path: Path) -> None:
    extra = {UP.format(1): {"act_bits": 8, "act_data_type": "fp8"}}
    err = fails(made.save(tmp_path, stack(), made.config(extra_config=extra)))
    assert err.tensor == UP.format(1)
    assert "8-bit fp8 activations" in str(err)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_interleaved_words_of_widths_without_a_known_order_are_refused(
    tmp_path: Path, bits: int
) -> None:
    block = made.config(bits=bits, packing_format="auto_round:auto_awq")
    err = fails(made.save(tmp_path, stack(bits=bits, dialect="interleaved"), block))
    assert (err.code, err.actual) == ("Q-CFG-VALUE", bits)


# --------------------------------------------------------------------------- headers and sizes


@pytest.mark.parametrize("dialect", made.FORMATS)
@pytest.mark.parametrize("said", [4, 6])
def test_bits_that_contradict_the_shapes_raise_with_the_right_ones(
    tmp_path: Path, dialect: str, said: int
) -> None:
    block = made.config(bits=said, packing_format=made.FORMATS[dialect])
    err = fails(made.save(tmp_path, stack(bits=5, dialect=dialect), block))
    assert isinstance(err, ConfigError)
    assert (err.code, err.expected, err.actual) == ("Q-CFG-CONFLICT", 5, said)


@pytest.mark.parametrize("dialect", made.FORMATS)
def test_wrong_group_size_raises_and_names_the_implied_one(tmp_path: Path, dialect: str) -> None:
    layer = LayerDesc(
        kind="linear",
        name=UP.format(0),
        stored=UP.format(0),
        inp=Span.whole(64),
        out=Span.whole(32),
    )
    block = made.config(group_size=16, packing_format=made.FORMATS[dialect])
    checkpoint = open_checkpoint(made.save(tmp_path, stack(dialect=dialect), block))
    match = detect(checkpoint)
    assert match is not None
    with pytest.raises(LayoutError, match="group_size=32") as err:
        scheme_for(match, layer, checkpoint)
    assert (err.value.code, err.value.tensor) == ("Q-LAYOUT-GROUP", f"{UP.format(0)}.scales")


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("dialect", made.FORMATS)
def test_missing_tensor_is_named(tmp_path: Path, dialect: str, leaf: str) -> None:
    modules = stack(dialect=dialect)
    del modules[UP.format(1)][leaf]
    block = made.config(packing_format=made.FORMATS[dialect])
    err = fails(made.save(tmp_path, modules, block))
    assert isinstance(err, CheckpointError)
    assert (err.code, err.tensor) == ("Q-TENSOR-MISSING", f"{UP.format(1)}.{leaf}")


def test_module_that_stores_too_little_to_tell_its_sizes_raises(tmp_path: Path) -> None:
    modules = stack()
    modules[UP.format(1)] = {"qzeros": modules[UP.format(1)]["qzeros"]}
    err = fails(made.save(tmp_path, modules, made.config()))
    assert (err.code, err.tensor) == ("Q-TENSOR-MISSING", f"{UP.format(1)}.qweight")


def test_one_lost_g_idx_is_named(tmp_path: Path) -> None:
    modules = stack(3, g_idx=True, dialect="raw")
    del modules[UP.format(1)]["g_idx"]
    err = fails(made.save(tmp_path, modules, made.config(packing_format="auto_round:gptqmodel")))
    assert (err.code, err.tensor) == ("Q-TENSOR-MISSING", f"{UP.format(1)}.g_idx")


def test_unexpected_tensor_of_a_packed_layer_is_named(tmp_path: Path) -> None:
    modules = stack()
    modules[UP.format(0)]["extra"] = torch.zeros(2)
    err = fails(made.save(tmp_path, modules, made.config()))
    assert (err.code, err.tensor) == ("Q-TENSOR-UNEXPECTED", f"{UP.format(0)}.extra")


@pytest.mark.parametrize("dialect", made.FORMATS)
def test_sizes_come_from_the_shapes_and_the_last_group_may_be_short(
    tmp_path: Path, dialect: str
) -> None:
    tensors, expected = made.layer(64, 96, group_size=64, sym=False, dialect=dialect)
    block = made.config(group_size=64, sym=False, packing_format=made.FORMATS[dialect])
    plan = made.plan_of(made.save(tmp_path, {UP.format(0): tensors}, block))
    scheme = plan.members[UP.format(0)].scheme
    assert isinstance(scheme, AutoRoundScheme)
    assert (scheme.shape, scheme.groups) == ((64, 96), 2)
    assert torch.equal(load_tensor(plan, UP.format(0)).dequantize(), expected)


# ------------------------------------------------------------------------------------- experts


EXPERT = "model.layers.0.mlp.experts.{}.down_proj"


def experts(count: int = 4, **kind: Any) -> Modules:
    return {EXPERT.format(e): made.layer(32, 64, seed=e, **kind)[0] for e in range(count)}


def test_experts_are_read_as_one_stack(tmp_path: Path) -> None:
    plan = made.plan_of(made.save(tmp_path, experts(), made.config()))
    (member,) = plan.quantized.values()
    assert member.layer.experts == (0, 1, 2, 3)
    for e in range(4):
        expected = made.layer(32, 64, seed=e)[1]
        assert torch.equal(read_matrix(plan, member, e).dequantize(), expected)


@pytest.mark.parametrize("key", [EXPERT.format(2), r".*experts\.2\..*"])
def test_experts_with_unlike_settings_raise(tmp_path: Path, key: str) -> None:
    block = made.config(extra_config={key: {"bits": 8}})
    err = fails(made.save(tmp_path, experts(), block))
    assert (err.code, err.tensor) == ("Q-CFG-CONFLICT", EXPERT.format(2))


def test_float_expert_among_packed_ones_raises(tmp_path: Path) -> None:
    modules = experts() | floats(EXPERT.format(2))
    err = fails(made.save(tmp_path, modules, made.config()))
    assert (err.code, err.tensor) == ("Q-CKPT-MISMATCH", EXPERT.format(2))


def test_expert_of_another_shape_raises(tmp_path: Path) -> None:
    modules = experts() | {EXPERT.format(2): made.layer(64, 64)[0]}
    err = fails(made.save(tmp_path, modules, made.config()))
    assert err.code == "Q-LAYOUT-SHAPE"
    assert EXPERT.format(2) in str(err.tensor)


# ------------------------------------------------------------------------------------- writing


def test_config_of_an_autoround_plan_is_the_stored_one(tmp_path: Path) -> None:
    block = made.config(extra_config={"lm_head": {"bits": 16}}, iters=3)
    plan = made.plan_of(made.save(tmp_path, stack(), block))
    assert config_for(plan) == block


def _scheme(**changes: Any) -> AutoRoundScheme:
    kind: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": True, "dialect": "raw"}
    return build_scheme(shape=(32, 64), **(kind | changes))


def test_described_config_is_read_back_with_the_same_settings(tmp_path: Path) -> None:
    names = [UP.format(i) for i in range(4)]
    kinds: list[dict[str, Any]] = [{}, {}, {"bits": 8, "group_size": -1}, {"sym": False}]
    schemes = {n: _scheme(**kind) for n, kind in zip(names, kinds, strict=True)}
    schemes["lm_head"] = _scheme(bits=6)
    router = "model.layers.0.mlp.gate"
    block = describe(schemes, [router, "model.embed_tokens"])
    assert block["packing_format"] == "auto_round"
    assert block["block_name_to_quantize"] == "model.layers"
    assert set(block["extra_config"]) == {names[2], names[3], "lm_head", router}
    modules = {
        n: made.layer(32, 64, bits=s.bits, group_size=s.group_size, sym=s.sym, dialect="raw")[0]
        for n, s in schemes.items()
    } | floats(router, "model.embed_tokens")
    plan = made.plan_of(made.save(tmp_path, modules, block))
    assert {n: m.scheme for n, m in plan.quantized.items()} == schemes
    assert plan.warnings == []


@pytest.mark.parametrize(
    ("kind", "packing_format"),
    [
        ({"dialect": "minus_one"}, "auto_round:auto_gptq"),
        ({"dialect": "raw", "has_g_idx": True}, "auto_round:gptqmodel"),
        ({"dialect": "interleaved"}, "auto_round:auto_awq"),
    ],
)
def test_described_config_names_the_packing(kind: dict[str, Any], packing_format: str) -> None:
    assert describe({UP.format(0): _scheme(**kind)})["packing_format"] == packing_format


def test_mixed_dialects_cannot_be_described() -> None:
    schemes = {"a.0.b": _scheme(), "a.1.b": _scheme(dialect="interleaved")}
    for given in (schemes, {}):
        with pytest.raises(LayoutError, match="expected one packing_format") as err:
            describe(given)
        assert err.value.code == "Q-LAYOUT-REPRESENT"
