from __future__ import annotations

import typing

import pytest
import torch

import toy
from quant_core.errors import CheckpointError, FormatError, LayoutError, PluginError, QuantError
from quant_core.load import load_tensor, read_matrix
from quant_core.plan import plan
from quant_core.resolve import NamePattern
from quant_core.spec import FormatMatch


def _layers(n=3, bias=False):
    return {f"model.layers.{i}.proj": toy.toy_layer(8, 16, bias=bias, seed=i) for i in range(n)}


def _plan(layers, dense=None, *modules, **kw):
    return plan(toy.toy_checkpoint(layers, dense or {}), registry=toy.toy_registry(*modules), **kw)


def test_plan_separates_quantized_members_and_float_parameters():
    p = _plan(_layers(), {"model.norm.weight": torch.ones(8)})
    assert sorted(p.quantized) == [f"model.layers.{i}.proj" for i in range(3)]
    assert p.dense == {"model.norm.weight": "model.norm.weight"}
    assert p.match.plugin == "toy"
    assert p.members["model.norm"].scheme.rule == "no packed tensor stored"


def test_loading_ticks_off_every_part():
    p = _plan(_layers(2))
    read_matrix(p, p.members["model.layers.0.proj"])
    with pytest.raises(CheckpointError) as e:
        p.ledger.check_loaded()
    assert e.value.code == "Q-TENSOR-UNREAD"
    assert "model.layers.1.proj.q" in str(e.value)
    read_matrix(p, p.members["model.layers.1.proj"])
    p.ledger.check_loaded()


@pytest.mark.parametrize("leaf", ["q", "s"])
def test_dropped_tensor_is_named(leaf):
    layers = _layers()
    del layers["model.layers.1.proj"][leaf]
    with pytest.raises(QuantError) as e:
        _plan(layers)
    assert f"model.layers.1.proj.{leaf}" in str(e.value) or e.value.code == "Q-LAYOUT-SHAPE"


def test_all_missing_tensors_are_reported_at_once():
    layers = _layers(15)
    for tensors in layers.values():
        del tensors["s"]
    with pytest.raises(CheckpointError, match="15 tensor") as e:
        _plan(layers)
    assert e.value.code == "Q-TENSOR-MISSING"
    assert len(e.value.expected) == 15
    assert "and 5 more" in str(e.value)


def test_cohort_tensor_missing_from_one_layer_is_named():
    layers = _layers(4, bias=True)
    del layers["model.layers.2.proj"]["b"]
    with pytest.raises(CheckpointError) as e:
        _plan(layers)
    assert e.value.code == "Q-TENSOR-MISSING"
    assert e.value.tensor == "model.layers.2.proj.b"


def test_cohort_tensor_on_one_layer_only_is_unexpected():
    layers = _layers(4)
    layers["model.layers.2.proj"]["b"] = torch.zeros(8).half()
    with pytest.raises(CheckpointError) as e:
        _plan(layers)
    assert e.value.code == "Q-TENSOR-UNEXPECTED"
    assert e.value.tensor == "model.layers.2.proj.b"


def test_extra_tensor_in_a_quantized_layer_is_named():
    layers = _layers()
    layers["model.layers.0.proj"]["weight"] = torch.zeros(8, 16)
    with pytest.raises(CheckpointError) as e:
        _plan(layers)
    assert e.value.code == "Q-TENSOR-UNEXPECTED"
    assert "model.layers.0.proj.weight" in str(e.value)


def test_wrong_shape_and_dtype_name_file_tensor_expected_and_found():
    layers = _layers()
    layers["model.layers.0.proj"]["s"] = torch.ones(4).half()
    with pytest.raises(LayoutError) as e:
        _plan(layers)
    assert (e.value.code, e.value.expected, e.value.actual) == ("Q-LAYOUT-SHAPE", (8,), (4,))
    layers["model.layers.0.proj"]["s"] = torch.ones(8)
    with pytest.raises(LayoutError) as e:
        _plan(layers)
    assert e.value.code == "Q-LAYOUT-DTYPE"
    assert e.value.tensor == "model.layers.0.proj.s"


def test_integer_weight_never_counts_as_float():
    with pytest.raises(CheckpointError) as e:
        _plan(_layers(1), {"model.other.weight": torch.zeros(4, 4, dtype=torch.int8)})
    assert e.value.code == "Q-CKPT-MISMATCH"


def test_packed_words_outside_every_layer_are_refused():
    with pytest.raises(CheckpointError) as e:
        _plan(_layers(1), {"model.other.copy": torch.zeros(4, 4, dtype=torch.int32)})
    assert e.value.code == "Q-CKPT-MISMATCH"
    assert e.value.tensor == "model.other.copy"


class _Renaming(toy.MemoryCheckpoint):
    """Stores the parameters of one module under two paths of its own."""

    names: typing.ClassVar = {"a.weight": "m.gate.weight", "b.bias": "m.gate.bias"}

    def public_name(self, stored):
        return self.names.get(stored, stored)


def test_one_module_stored_under_two_paths_is_one_member_unless_names_clash():
    tensors = {"a.weight": torch.ones(4, 4), "b.bias": torch.ones(4)}
    p = plan(_Renaming(tensors, {}), registry=toy.toy_registry())
    assert p.members["m.gate"].stored == ("a.weight", "b.bias")
    assert p.dense == {"m.gate.weight": "a.weight", "m.gate.bias": "b.bias"}
    tensors["m.gate.bias"] = torch.ones(4)
    with pytest.raises(CheckpointError) as e:
        plan(_Renaming(tensors, {}), registry=toy.toy_registry())
    assert e.value.code == "Q-TENSOR-DUPLICATE"


def test_experts_form_one_stack_and_a_gap_is_named():
    experts = {f"m.experts.{e}.up_proj": toy.toy_layer(8, 16, seed=e) for e in range(4)}
    p = _plan(experts)
    member = p.members["m.experts.up_proj"]
    assert member.layer.experts == (0, 1, 2, 3)
    assert member.layer.stored == "m.experts.{expert}.up_proj"
    del experts["m.experts.2.up_proj"]
    with pytest.raises(CheckpointError) as e:
        _plan(experts)
    assert "m.experts.2.up_proj" in str(e.value)


def test_number_of_an_expert_that_is_absurd_or_given_twice_is_named():
    experts = {f"m.experts.{e}.up_proj": toy.toy_layer(8, 16, seed=e) for e in range(3)}
    with pytest.raises(CheckpointError, match=r"'m\.experts\.3\.up_proj\.\*'") as e:
        _plan(experts | {"m.experts.999999999.up_proj": toy.toy_layer(8, 16)})  # at once
    assert e.value.code == "Q-TENSOR-MISSING"
    with pytest.raises(CheckpointError, match=r"m\.experts\.02\.up_proj") as e:
        _plan(experts | {"m.experts.02.up_proj": toy.toy_layer(8, 16)})
    assert e.value.code == "Q-TENSOR-DUPLICATE"


def test_expert_of_a_layer_that_is_no_stack_is_refused():
    p = _plan(_layers())
    name = next(iter(p.quantized))
    with pytest.raises(FormatError, match="expected none: it is no stack") as e:
        load_tensor(p, name, expert=0)
    assert e.value.code == "Q-FMT-NAME"


def test_plan_takes_a_path(fixtures):
    folder = fixtures / "gptqmodel-awq-gemm-g128"
    assert len(plan(str(folder)).quantized) == len(plan(folder).quantized) == 14


def test_brace_in_a_name_is_refused():
    with pytest.raises(CheckpointError, match=r"'m\.\{expert\}' holds a brace") as e:
        _plan({"m.{expert}": toy.toy_layer(8, 16)})
    assert e.value.code == "Q-CKPT-NAME"


def test_load_tensor_dequantizes_exactly_and_suggests_near_names():
    p = _plan(_layers(), {"model.norm.weight": torch.arange(8.0)})
    src = toy.toy_layer(8, 16, seed=1)
    got = load_tensor(p, "model.layers.1.proj").dequantize()
    assert torch.equal(got, src["q"].float() * src["s"].float()[:, None])
    assert torch.equal(load_tensor(p, "model.norm").dequantize(), torch.arange(8.0))
    with pytest.raises(FormatError, match=r"model\.layers\.1\.proj") as e:
        load_tensor(p, "model.layers.1.prj")
    assert e.value.code == "Q-FMT-NAME"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scale_that_is_not_finite_is_an_error_with_its_place(bad):
    layers = _layers(1)
    layers["model.layers.0.proj"]["s"][3] = bad
    p = _plan(layers)
    with pytest.raises(LayoutError) as e:
        read_matrix(p, p.members["model.layers.0.proj"])
    assert e.value.code == "Q-VALUE-SCALE"
    assert "(3, 0)" in str(e.value)


# ---------------------------------------------------------------------------------- detection


def _ckpt(config, **tensors):
    return toy.MemoryCheckpoint(tensors or {"w.weight": torch.ones(2, 2)}, config)


def _kernels():
    module = toy.toy_module("kernels")
    del module.detect_format, module.make_scheme
    return module


def test_unknown_quant_method_lists_installed_plugins():
    with pytest.raises(FormatError) as e:
        plan(_ckpt({"quantization_config": {"quant_method": "evil; rm"}}),
             registry=toy.toy_registry(toy.toy_module(), _kernels()))  # fmt: skip
    assert e.value.code == "Q-FMT-UNKNOWN"
    assert "'toy'" in str(e.value)
    assert "kernels" not in str(e.value)
    assert "pip install evil" not in str(e.value)


@pytest.mark.parametrize(
    "block", [[1], "x", 3, {"quant_method": None}, {"quant_method": 3}, {"quant_method": "x" * 100},
              {"quant_method": ["a"]}, {"bits": 4}],
)  # fmt: skip
def test_malformed_quantization_config_is_a_type_error(block):
    with pytest.raises(QuantError) as e:
        plan(_ckpt({"quantization_config": block}), registry=toy.toy_registry())
    assert e.value.code == "Q-CFG-TYPE"
    assert len(str(e.value)) < 1000


def test_float_checkpoint_is_planned_as_float_and_odd_dtypes_are_refused():
    p = plan(_ckpt({}), registry=toy.toy_registry())
    assert p.match is None
    assert list(p.dense) == ["w.weight"]
    with pytest.raises(FormatError) as e:
        plan(_ckpt({}, **{"w.qweight": torch.zeros(2, 2, dtype=torch.int32)}),
             registry=toy.toy_registry())  # fmt: skip
    assert e.value.code == "Q-FMT-UNKNOWN"
    assert "w.qweight" in str(e.value)


def test_override_that_contradicts_the_checkpoint_is_refused_with_evidence():
    with pytest.raises(FormatError) as e:
        _plan(_layers(1), {}, toy.toy_module(), toy.toy_module("other"), format="other")
    assert e.value.code == "Q-FMT-OVERRIDE"
    assert "quant_method=toy" in str(e.value)


def _claims(name, level):
    def detect_format(checkpoint):
        return FormatMatch(plugin=name, level=level, evidence="looks like it")

    return toy.toy_module(name, detect_format=detect_format)


def test_two_claims_of_one_level_are_ambiguous_in_any_order():
    reg = [toy.candidate(_claims(n, "structural"), n) for n in ("b", "a")]
    from quant_core.registry import load_registry

    for order in (reg, reg[::-1]):
        with pytest.raises(FormatError) as e:
            plan(_ckpt({}), registry=load_registry(order))
        assert e.value.code == "Q-FMT-AMBIGUOUS"
        assert e.value.actual == ["a", "b"]


def test_declared_claim_beats_structural():
    from quant_core.registry import load_registry

    reg = load_registry(
        [toy.candidate(_claims("a", "structural"), "a"),
         toy.candidate(_claims("b", "declared"), "b")]
    )  # fmt: skip
    assert plan(_ckpt({}), registry=reg).match.plugin == "b"


@pytest.mark.parametrize("answer", ["toy", FormatMatch(plugin="x", level="declared", evidence="")])
def test_detect_format_with_a_wrong_result_is_a_plugin_error(answer):
    with pytest.raises(PluginError) as e:
        plan(_ckpt({}), registry=toy.toy_registry(toy.toy_module(detect_format=lambda: answer)))
    assert e.value.code == "Q-PLUGIN-RESULT"


def test_make_scheme_that_returns_none_is_a_plugin_error():
    with pytest.raises(PluginError, match="make_scheme"):
        _plan(_layers(1), {}, toy.toy_module(make_scheme=lambda layer: None))


class _Config:
    warnings = ("unknown key 'foo'",)

    def name_patterns(self):
        return (
            NamePattern(kind="exact", text="model.layers.0.proj", purpose="skip"),
            NamePattern(kind="exact", text="model.nowhere", purpose="skip"),
        )


def test_patterns_that_match_nothing_and_unknown_keys_are_reported():
    def detect_format(checkpoint):
        return FormatMatch(plugin="toy", level="declared", evidence="x", config=_Config())

    p = _plan(_layers(1), {}, toy.toy_module(detect_format=detect_format))
    assert "unknown key 'foo'" in p.warnings
    assert any("model.nowhere" in w and "model.layers.0.proj" not in w for w in p.warnings)


def test_module_whose_members_a_plugin_leaves_out_does_not_vanish():
    module = toy.toy_module(split_modules=lambda match, checkpoint: {"lost": []})
    layers = {"m": toy.toy_layer(8, 16), "lost": toy.toy_layer(8, 16)}
    with pytest.raises(CheckpointError, match=r"lost\.q") as e:
        plan(toy.toy_checkpoint(layers), registry=toy.toy_registry(module))
    assert e.value.code == "Q-TENSOR-UNEXPECTED"
