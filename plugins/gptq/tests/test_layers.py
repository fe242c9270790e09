"""Checkpoints on disk: detection, config files, and header checks against the stored tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import made_gptq as made
from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import CheckpointError, ConfigError, FormatError, LayoutError, QuantError
from quant_core.load import load_tensor, read_matrix
from quant_core.spec import LayerDesc, Span, Unquantized
from quant_plugin_gptq.detect import detect
from quant_plugin_gptq.layers import scheme_for
from quant_plugin_gptq.writer import config_for, describe

Q = "model.layers.{}.self_attn.q_proj"


def stack(count: int = 2, **kind: Any) -> dict[str, dict[str, Tensor]]:
    return {Q.format(i): made.layer(32, 64, seed=i, **kind)[0] for i in range(count)}


def fails(folder: Path) -> QuantError:
    with pytest.raises(QuantError) as err:
        made.plan_of(folder)
    return err.value


# ------------------------------------------------------------------------------------ detection


@pytest.mark.parametrize("method", ["gptq", "GPTQ"])
def test_quant_method_declares_the_format(tmp_path: Path, method: str) -> None:
    match = detect(open_checkpoint(made.save(tmp_path, stack(), made.config(quant_method=method))))
    assert match is not None
    assert (match.level, match.config.bits) == ("declared", 4)
    assert "config.json" in match.evidence


def test_method_key_alone_declares_the_format(tmp_path: Path) -> None:
    block = made.config(quant_method=..., method="gptq")
    match = detect(open_checkpoint(made.save(tmp_path, stack(), block)))
    assert match is not None
    assert match.level == "declared"


@pytest.mark.parametrize("method", ["awq", "auto-round", "marlin"])
def test_other_quant_method_is_not_claimed(tmp_path: Path, method: str) -> None:
    folder = made.save(tmp_path, stack(), made.config(quant_method=method))
    assert detect(open_checkpoint(folder)) is None


def test_block_without_quant_method_is_an_error(tmp_path: Path) -> None:
    err = fails(made.save(tmp_path, stack(), made.config(quant_method=...)))
    assert err.code == "Q-CFG-TYPE"


@pytest.mark.parametrize("method", [None, ["gptq"], 4, "g" * 65])
def test_side_file_with_a_bad_quant_method_is_an_error(tmp_path: Path, method: Any) -> None:
    side = {"quantize_config.json": made.config(quant_method=method)}
    err = fails(made.save(tmp_path, stack(), None, side))
    assert (err.code, err.path) == ("Q-CFG-TYPE", "quantize_config.json")


@pytest.mark.parametrize(
    "name", ["quantize_config.json", "quant_config.json", "quantization_config.json"]
)
def test_old_side_file_alone_declares_the_format(tmp_path: Path, name: str) -> None:
    block = made.config(quant_method=..., checkpoint_format=..., pack_dtype=..., meta=...)
    plan = made.plan_of(made.save(tmp_path, stack(), None, {name: block}))
    assert plan.match is not None
    assert plan.match.level == "declared"
    assert plan.match.config.source == name
    assert len(plan.quantized) == 2


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("bits", 4, 8),
        ("group_size", 32, 64),
        ("sym", True, False),
        ("desc_act", False, True),
        ("checkpoint_format", "gptq", "gptq_v2"),
        ("quant_method", "gptq", "awq"),
        ("dynamic", {"-:a": {}}, {"-:b": {}}),
    ],
)
def test_files_that_disagree_raise_and_are_named(
    tmp_path: Path, key: str, ours: Any, theirs: Any
) -> None:
    side = {"quantize_config.json": made.config(**{key: theirs})}
    err = fails(made.save(tmp_path, stack(), made.config(**{key: ours}), side))
    assert isinstance(err, ConfigError)
    assert (err.code, err.tensor, err.expected, err.actual) == ("Q-CFG-CONFLICT", key, ours, theirs)
    assert "config.json" in str(err)
    assert "quantize_config.json" in str(err)


def test_side_file_fills_in_what_config_json_leaves_out(tmp_path: Path) -> None:
    side = {"quantize_config.json": made.config(format="gptq_v2", checkpoint_format=...)}
    folder = made.save(tmp_path, stack(v1=False), made.config(checkpoint_format=...), side)
    match = detect(open_checkpoint(folder))
    assert match is not None
    assert match.config.checkpoint_format == "gptq_v2"


def test_tensors_alone_are_read_when_symmetric(tmp_path: Path) -> None:
    for v1 in (True, False):
        folder = tmp_path / str(v1)
        folder.mkdir()
        modules = {Q.format(0): made.layer(32, 64, v1=v1)[0]}
        plan = made.plan_of(made.save(folder, modules))
        assert plan.match is not None
        assert plan.match.level == "structural"
        assert torch.equal(load_tensor(plan, Q.format(0)).dequantize(), made.layer(32, 64)[1])


def test_tensors_alone_ask_for_the_flag_when_asymmetric(tmp_path: Path) -> None:
    plan = made.plan_of(made.save(tmp_path, stack(sym=False)))
    with pytest.raises(ConfigError, match=r"quantize_config\.json") as err:
        load_tensor(plan, Q.format(0))
    assert err.value.code == "Q-CFG-CONFLICT"


def test_float_checkpoint_is_not_claimed(tmp_path: Path) -> None:
    folder = made.save(tmp_path, {"lin": {"weight": torch.zeros(4, 4)}})
    assert detect(open_checkpoint(folder)) is None


@pytest.mark.parametrize(
    ("qweight", "qzeros", "scales"),
    [
        ((64, 4), (2, 4), (2, 32)),  # packed along the outputs
        ((64, 32), (64, 4), (64, 32)),  # row-major, K = 256, scales padded to 32 groups
        ((8, 32), (2, 4), (1, 32)),  # group counts differ
    ],
)
def test_tensors_of_other_layouts_are_not_claimed(
    tmp_path: Path, qweight: Any, qzeros: Any, scales: Any
) -> None:
    leaves = {
        "qweight": torch.zeros(qweight, dtype=torch.int32),
        "qzeros": torch.zeros(qzeros, dtype=torch.int32),
        "scales": torch.ones(scales, dtype=torch.float16),
    }
    assert detect(open_checkpoint(made.save(tmp_path, {"lin": leaves}))) is None


# ------------------------------------------------------------------------- config against tensors


def test_sizes_come_from_the_header_and_cohort_shares_a_name(tmp_path: Path) -> None:
    plan = made.plan_of(made.save(tmp_path, stack(), made.config()))
    schemes = [m.scheme for m in plan.quantized.values()]
    assert [(s.name, s.shape) for s in schemes] == [("w4a16", (32, 64))] * 2  # type: ignore[union-attr]
    assert schemes[0] == schemes[1]


@pytest.mark.parametrize("said", [2, 8])
@pytest.mark.parametrize("drop_g_idx", [True, False])
def test_bits_that_contradict_the_tensors_raise(
    tmp_path: Path, said: int, drop_g_idx: bool
) -> None:
    modules = stack()
    if drop_g_idx:
        for leaves in modules.values():
            del leaves["g_idx"]
    err = fails(made.save(tmp_path, modules, made.config(bits=said)))
    assert (err.code, err.expected, err.actual) == ("Q-CFG-CONFLICT", 4, said)


@pytest.mark.parametrize("said", [16, 1000, -1])
def test_group_size_that_contradicts_the_tensors_raises(tmp_path: Path, said: int) -> None:
    err = fails(made.save(tmp_path, stack(), made.config(group_size=said)))
    assert isinstance(err, LayoutError)
    assert (err.code, err.actual) == ("Q-LAYOUT-GROUP", 2)
    for part in ("in_features=64", "group_size=32", Q.format(0)):
        assert part in str(err)


def test_group_size_with_the_same_number_of_groups_is_found_from_g_idx(tmp_path: Path) -> None:
    plan = made.plan_of(made.save(tmp_path, stack(), made.config(group_size=48)))
    with pytest.raises(LayoutError, match="groups of 32 columns") as err:
        load_tensor(plan, Q.format(0))
    assert (err.value.code, err.value.expected, err.value.actual) == ("Q-LAYOUT-GROUP", 48, 32)


def test_desc_act_without_any_g_idx_raises(tmp_path: Path) -> None:
    modules = stack()
    for leaves in modules.values():
        del leaves["g_idx"]
    err = fails(made.save(tmp_path, modules, made.config(desc_act=True)))
    assert err.code == "Q-CFG-CONFLICT"
    assert "g_idx" in str(err)


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales", "g_idx"])
def test_one_lost_tensor_is_named(tmp_path: Path, leaf: str, desc_act: bool) -> None:
    modules = stack(3)
    del modules[Q.format(1)][leaf]
    err = fails(made.save(tmp_path, modules, made.config(desc_act=desc_act)))
    assert (err.code, err.tensor) == ("Q-TENSOR-MISSING", f"{Q.format(1)}.{leaf}")


def test_renamed_tensor_is_named(tmp_path: Path) -> None:
    modules = stack(3)
    modules[Q.format(1)]["qweights"] = modules[Q.format(1)].pop("qweight")
    assert fails(made.save(tmp_path, modules, made.config())).tensor == f"{Q.format(1)}.qweight"


def test_absent_g_idx_of_all_layers_is_fine(tmp_path: Path) -> None:
    modules = stack()
    for leaves in modules.values():
        del leaves["g_idx"]
    plan = made.plan_of(made.save(tmp_path, modules, made.config()))
    assert torch.equal(load_tensor(plan, Q.format(0)).dequantize(), made.layer(32, 64)[1])


def test_float_layer_among_packed_ones_is_a_mismatch(tmp_path: Path) -> None:
    modules = stack(3) | {Q.format(1): {"weight": torch.zeros(32, 64)}}
    err = fails(made.save(tmp_path, modules, made.config()))
    assert isinstance(err, CheckpointError)
    assert (err.code, err.tensor) == ("Q-CKPT-MISMATCH", Q.format(1))
    assert Q.format(0) in str(err)


def test_float_layer_that_dynamic_excludes_is_unquantized(tmp_path: Path) -> None:
    modules = stack(3) | {Q.format(1): {"weight": torch.zeros(32, 64)}}
    block = made.config(dynamic={"-:.*layers\\.1\\.": {}})
    plan = made.plan_of(made.save(tmp_path, modules, block))
    scheme = plan.members[Q.format(1)].scheme
    assert isinstance(scheme, Unquantized)
    assert scheme.rule == "dynamic -:.*layers\\.1\\."


def test_packed_layer_that_dynamic_excludes_is_a_mismatch(tmp_path: Path) -> None:
    block = made.config(dynamic={"-:.*layers\\.1\\.": {}})
    err = fails(made.save(tmp_path, stack(), block))
    assert (err.code, err.tensor) == ("Q-CKPT-MISMATCH", Q.format(1))


def test_packed_layer_with_an_override_before_the_exclusion_is_quantized(tmp_path: Path) -> None:
    block = made.config(dynamic={"+:.*q_proj": {"sym": True}, "-:.*layers\\.1\\.": {}})
    plan = made.plan_of(made.save(tmp_path, stack(), block))
    assert len(plan.quantized) == 2


def test_float_lm_head_is_unquantized_unless_the_config_says_so(tmp_path: Path) -> None:
    modules = stack() | {"lm_head": {"weight": torch.zeros(32, 64)}}
    plan = made.plan_of(made.save(tmp_path, modules, made.config()))
    assert isinstance(plan.members["lm_head"].scheme, Unquantized)
    err = fails(made.save(tmp_path, modules, made.config(lm_head=True)))
    assert (err.code, err.tensor) == ("Q-CKPT-MISMATCH", "lm_head")


def test_packed_lm_head_is_quantized(tmp_path: Path) -> None:
    tensors, expected = made.layer(64, 64)
    plan = made.plan_of(made.save(tmp_path, {"lm_head": tensors}, made.config(lm_head=True)))
    assert torch.equal(load_tensor(plan, "lm_head").dequantize(), expected)


def test_stored_bias_is_read_and_a_needed_one_is_required(tmp_path: Path) -> None:
    modules = stack(bias=True)
    plan = made.plan_of(made.save(tmp_path, modules, made.config()))
    member = plan.members[Q.format(0)]
    bias = read_matrix(plan, member).bias
    assert bias is not None
    assert torch.equal(bias, modules[Q.format(0)]["bias"])
    layer = LayerDesc(kind="linear", name="a", stored="a", bias=True)
    needs = {p.name: p.need for p in member.scheme.params(layer)}  # type: ignore[union-attr]
    assert needs["bias"] == "required"


def test_engine_sizes_are_checked_against_the_shapes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made.save(tmp_path, stack(), made.config()))
    match = detect(checkpoint)
    assert match is not None
    layer = LayerDesc(
        kind="linear",
        name="q",
        stored=Q.format(0),
        inp=Span.whole(128),
        out=Span.whole(32),
    )
    with pytest.raises(LayoutError) as err:
        scheme_for(match, layer, checkpoint)
    assert err.value.code == "Q-LAYOUT-GROUP"


def test_nan_scale_is_found_while_loading(tmp_path: Path) -> None:
    modules = stack()
    modules[Q.format(1)]["scales"][1, 3] = float("nan")
    plan = made.plan_of(made.save(tmp_path, modules, made.config()))
    with pytest.raises(LayoutError) as err:
        load_tensor(plan, Q.format(1))
    assert err.value.code == "Q-VALUE-SCALE"


def test_planar_sizes_must_fill_runs(tmp_path: Path) -> None:
    modules = {"lin": made.layer(40, 64, bits=3, v1=False, planar=True, sym=False)[0]}
    err = fails(made.save(tmp_path, modules, made.config(bits=3, checkpoint_format="gptq_p")))
    assert err.code in ("Q-LAYOUT-SHAPE", "Q-CFG-CONFLICT")
    assert "lin" in str(err)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_odd_widths_follow_the_dialect(tmp_path: Path, bits: int) -> None:
    dense, expected = made.layer(32, 64, bits=bits, sym=False)
    block = made.config(bits=bits, sym=False, provider="auto-round")
    plan = made.plan_of(made.save(tmp_path, {"lin": dense}, block))
    assert torch.equal(load_tensor(plan, "lin").dequantize(), expected)
    block = made.config(bits=bits, sym=False, checkpoint_format="gptq_p")
    plan = made.plan_of(made.save(tmp_path, {"lin": dense}, block))
    assert not torch.equal(load_tensor(plan, "lin").dequantize(), expected)


# ----------------------------------------------------------------------------------------- experts

E = "model.layers.0.mlp.experts.{}.up_proj"


def test_experts_form_one_stack(tmp_path: Path) -> None:
    layers = [made.layer(32, 64, seed=i) for i in range(3)]
    modules = {E.format(i): layer[0] for i, layer in enumerate(layers)}
    plan = made.plan_of(made.save(tmp_path, modules, made.config()))
    found = load_tensor(plan, "model.layers.0.mlp.experts.up_proj").dequantize()
    assert torch.equal(found, torch.stack([layer[1] for layer in layers]))


def test_experts_of_unlike_shape_raise(tmp_path: Path) -> None:
    modules = {E.format(0): made.layer(32, 64)[0], E.format(1): made.layer(32, 96)[0]}
    err = fails(made.save(tmp_path, modules, made.config()))
    assert (err.code, err.tensor.rpartition(".")[0]) == ("Q-LAYOUT-SHAPE", E.format(1))  # type: ignore[union-attr]


def test_experts_with_unlike_rules_raise(tmp_path: Path) -> None:
    modules = {E.format(i): made.layer(32, 64)[0] for i in range(2)}
    block = made.config(dynamic={".*experts\\.1\\.": {"sym": False}})
    err = fails(made.save(tmp_path, modules, block))
    assert (err.code, err.tensor) == ("Q-CFG-CONFLICT", E.format(1))


def test_float_expert_in_a_packed_stack_is_a_mismatch(tmp_path: Path) -> None:
    modules = {E.format(0): made.layer(32, 64)[0], E.format(1): {"weight": torch.zeros(32, 64)}}
    err = fails(made.save(tmp_path, modules, made.config()))
    assert (err.code, err.tensor) == ("Q-CKPT-MISMATCH", E.format(1))


# ------------------------------------------------------------------------------------------ writer


def test_config_of_a_loaded_plan_is_the_stored_block(tmp_path: Path) -> None:
    block = made.config(dynamic={"-:.*layers\\.7": {}}, colour="red")
    plan = made.plan_of(made.save(tmp_path, stack(), block))
    assert config_for(plan) == block


def test_described_config_reads_back_the_same_schemes(tmp_path: Path) -> None:
    modules = stack(3)
    modules["model.layers.0.mlp.down_proj"] = made.layer(32, 64, bits=8, group_size=64)[0]
    modules["model.layers.3.self_attn.q_proj"] = {"weight": torch.zeros(32, 64)}
    modules["lm_head"] = {"weight": torch.zeros(32, 64)}
    block = made.config(dynamic={".*down": {"bits": 8, "group_size": 64}, "-:.*layers\\.3": {}})
    plan = made.plan_of(made.save(tmp_path, modules, block))
    schemes = {n: m.scheme for n, m in plan.quantized.items()}
    floats = [n for n, m in plan.members.items() if not m.quantized]
    written = describe(schemes, floats)  # type: ignore[arg-type]
    assert written["bits"] == 4
    assert [k for k in written["dynamic"] if k.startswith("-:")] == [
        "-:model\\.layers\\.3\\.self_attn\\.q_proj$"
    ]
    again = made.plan_of(made.save(tmp_path, modules, written))
    assert {n: m.scheme for n, m in again.quantized.items()} == schemes


def test_mixed_dialects_cannot_be_described(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one = made.plan_of(made.save(tmp_path, stack(), made.config()))
    two = made.plan_of(
        made.save(tmp_path / "b", stack(v1=False), made.config(checkpoint_format="gptq_v2"))
    )
    schemes = {
        "a": one.members[Q.format(0)].scheme,
        "b": two.members[Q.format(0)].scheme,
    }
    with pytest.raises(LayoutError) as err:
        describe(schemes)  # type: ignore[arg-type]
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_user_override_to_another_format_is_refused(tmp_path: Path) -> None:
    from quant_core.plan import plan

    folder = made.save(tmp_path, stack(), made.config(quant_method="awq"))
    with pytest.raises(FormatError) as err:
        plan(open_checkpoint(folder), registry=made.registry(), format="gptq")
    assert err.value.code == "Q-FMT-OVERRIDE"
