"""Names of online schemes, patterns of what to skip, and the plan that comes of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from quant_core.errors import ConfigError, LayoutError, PluginError
from quant_core.load import read_matrix
from quant_core.online import OnlineRequest, OnlineScheme, SkipRules, find_online
from quant_core.online_plan import OnLoad, quantize_plan
from quant_core.plan import Plan
from quant_core.plan import plan as make_plan
from quant_core.quantize import quantize_weight
from quant_core.registry import Registry
from quant_core.scheme import Scheme
from quant_core.spec import LayerDesc, Unquantized
from quant_core.tensors import LayerTensors
from toy import SPEC, MemoryCheckpoint, ToyScheme, toy_checkpoint, toy_layer, toy_module
from toy import toy_registry as registry_of


class OnlineToy(ToyScheme):
    def quantize(
        self,
        layer: LayerDesc,
        dense: torch.Tensor,
        stats: Mapping[str, torch.Tensor] | None = None,
    ) -> LayerTensors:
        return LayerTensors(operands={"weight": quantize_weight(layer.name, dense, self.weight)})


def make(layer: LayerDesc, options: Mapping[str, Any]) -> Scheme | Unquantized:
    assert layer.out_features is not None
    assert layer.in_features is not None
    if layer.in_features % options["multiple"]:
        return Unquantized(rule=f"in_features is no multiple of {options['multiple']}")
    shape = (layer.out_features, layer.in_features)
    return OnlineToy(name="w8a16", shape=shape, operands={"weight": SPEC})


def scheme(**kw: Any) -> OnlineScheme:
    return OnlineScheme(summary="", make=make, options={"multiple": 4}, **kw)


def registry(*offers: tuple[str, Any]) -> Registry:
    def module(name: str, answer: Any) -> Any:
        return toy_module(
            name,
            online_schemes=lambda: answer,
            make_config=lambda plan: {"quant_method": name, "layers": sorted(plan.quantized)},
        )

    return registry_of(*(module(name, answer) for name, answer in offers))


REGISTRY = registry(("toy", {"toy": scheme(), "other": scheme(), "bare": scheme(bare=True)}))


# ------------------------------------------------------------------------------------------ names


def test_bare_name_belongs_to_the_plugin_of_that_id() -> None:
    both = registry(("a", {"b": scheme(bare=True)}), ("b", {"b": scheme(), "a": scheme()}))
    assert find_online(both, "b")[0] == "b"
    assert find_online(both, "a:b")[0] == "a"


def test_bare_name_that_no_id_offers_goes_to_its_one_claim() -> None:
    assert find_online(REGISTRY, "bare")[0] == "toy"
    absent = registry(("a", {"x": scheme(bare=True)}), ("x", {"y": scheme()}))
    assert find_online(absent, "x")[0] == "a"


def test_two_claims_of_one_bare_name_conflict() -> None:
    both = registry(("a", {"x": scheme(bare=True)}), ("b", {"x": scheme(bare=True)}))
    with pytest.raises(PluginError, match="a:x or b:x") as info:
        find_online(both, "x")
    assert info.value.code == "Q-PLUGIN-CONFLICT"
    assert find_online(both, "b:x")[0] == "b"


@pytest.mark.parametrize("name", ["other", "absent", "toy:absent", "absent:toy", "", ":", "toy:"])
def test_unknown_names_list_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match=r"'bare', 'toy', 'toy:other'") as info:
        find_online(REGISTRY, name)
    assert info.value.code == "Q-CFG-VALUE"


@pytest.mark.parametrize("answer", [["toy"], {"toy": None}, {1: scheme()}])
def test_wrong_answers_are_the_plugins_fault(answer: Any) -> None:
    with pytest.raises(PluginError) as info:
        find_online(registry(("toy", answer)), "toy")
    assert (info.value.code, info.value.plugin) == ("Q-PLUGIN-RESULT", "toy")


# ------------------------------------------------------------------------------------------- skip


@pytest.mark.parametrize(
    ("skip", "name", "rule"),
    [
        ((), "lm_head", "lm_head"),
        ((), "model.layers.0.mlp.gate", "gate"),
        ((), "model.layers.0.mlp.gate_proj", ""),
        (("!lm_head",), "lm_head", ""),
        (("layers.1",), "model.layers.1.mlp.up_proj", "layers.1"),
        (("layers.1",), "model.layers.11.mlp.up_proj", ""),
        (("*.self_attn.*",), "model.layers.1.self_attn.q_proj", "*.self_attn.*"),
        (("*.self_attn.*", "!q_proj"), "model.layers.1.self_attn.q_proj", ""),
        (("!q_proj", "*.self_attn.*"), "model.layers.1.self_attn.q_proj", "*.self_attn.*"),
        (("re:.*[02]\\.mlp",), "model.layers.2.mlp.up_proj", "re:.*[02]\\.mlp"),
    ],
)
def test_last_matching_pattern_decides(skip: tuple[str, ...], name: str, rule: str) -> None:
    assert SkipRules(skip)(name) == rule


def test_unused_patterns_are_reported_and_defaults_are_not() -> None:
    rules = SkipRules(("q_proj", "absent", "!lm_head"))
    assert rules("model.layers.0.self_attn.q_proj") == "q_proj"
    assert rules.unused == ["absent", "!lm_head"]


@pytest.mark.parametrize(
    ("skip", "code"), [(("re:(",), "Q-CFG-REGEX"), ((1,), "Q-CFG-TYPE"), (("!",), "Q-CFG-TYPE")]
)
def test_bad_patterns_are_refused(skip: tuple[Any, ...], code: str) -> None:
    with pytest.raises(ConfigError) as info:
        SkipRules(skip)
    assert info.value.code == code


# ------------------------------------------------------------------------------------------- plan


def floats(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    names = {"a.q_proj.weight": (4, 8), "a.k_proj.weight": (4, 6), "lm_head.weight": (10, 8)}
    names |= {f"m.experts.{e}.{r}_proj.weight": (4, 8) for e in (0, 1) for r in ("gate", "up")}
    out = {n: torch.randn(*s, generator=g) for n, s in names.items()}
    out |= {"a.q_proj.bias": torch.ones(4), "norm.weight": torch.ones(8)}
    return out | changes


def planned(tensors: Mapping[str, torch.Tensor]) -> Plan:
    checkpoint = MemoryCheckpoint(tensors, {})
    checkpoint.container = "safetensors"
    return make_plan(checkpoint, registry=REGISTRY)


def quantized(
    tensors: Mapping[str, torch.Tensor], replaceable: Any = lambda m: "", **kw: Any
) -> Any:
    return quantize_plan(planned(tensors), OnlineRequest(name="toy", **kw), replaceable)


def test_plan_says_what_is_loaded_and_what_is_stored() -> None:
    online = quantized(floats())
    names = ["a.q_proj", "m.experts.gate_proj", "m.experts.up_proj"]
    assert sorted(online.plan.quantized) == names
    assert online.config == {"quant_method": "toy", "layers": names}
    assert online.kept == {
        "in_features is no multiple of 4": ["a.k_proj"],
        "skip: lm_head": ["lm_head"],
    }
    assert [w for w in online.plan.warnings if "a.k_proj" in w]
    assert not [w for w in online.plan.warnings if "lm_head" in w]
    assert set(online.plan.dense) == {"a.k_proj.weight", "lm_head.weight", "norm.weight"}
    assert online.target["m.experts.up_proj"].layer.stored == "m.experts.{expert}.up_proj"


def test_member_is_rounded_when_it_is_read() -> None:
    tensors = floats()
    plan = quantized(tensors).plan
    lt = read_matrix(plan, plan.members["a.q_proj"])
    want = quantize_weight("w", tensors["a.q_proj.weight"], SPEC)
    assert torch.equal(lt.weight.codes, want.codes)
    assert torch.equal(lt.bias, tensors["a.q_proj.bias"])  # type: ignore[arg-type]
    assert isinstance(plan.members["a.q_proj"].scheme, OnLoad)


def test_experts_are_quantized_together_or_not_at_all() -> None:
    online = quantized(floats(), lambda m: "too odd" if "up_proj" in m.layer.name else "")
    assert sorted(online.plan.quantized) == ["a.q_proj"]
    assert len(online.kept) == 4


def test_nan_in_the_source_is_named_and_counted() -> None:
    bad = torch.ones(4, 8)
    bad[1, 2] = float("nan")
    bad[3] = float("inf")
    plan = quantized(floats(**{"m.experts.1.up_proj.weight": bad})).plan
    member = plan.members["m.experts.up_proj"]
    read_matrix(plan, member, 0)
    with pytest.raises(LayoutError) as info:
        read_matrix(plan, member, 1)
    assert info.value.code == "Q-VALUE-WEIGHT"
    assert (info.value.tensor, info.value.actual) == ("m.experts.1.up_proj.weight", 9)


def test_experts_of_unlike_sizes_are_refused() -> None:
    plan = quantized(floats(**{"m.experts.1.up_proj.weight": torch.ones(4, 4)})).plan
    with pytest.raises(LayoutError) as info:
        read_matrix(plan, plan.members["m.experts.up_proj"], 1)
    assert info.value.code == "Q-LAYOUT-SHAPE"


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'group'.*'multiple'") as info:
        quantized(floats(), options={"group": 1})
    assert info.value.code == "Q-CFG-KEY"
    assert "a.k_proj" in quantized(floats(), options={"multiple": 2}).plan.quantized


def test_nothing_to_quantize_is_an_error_with_reasons() -> None:
    with pytest.raises(ConfigError, match="no multiple of 1024") as info:
        quantized(floats(), options={"multiple": 1024})
    assert info.value.code == "Q-CFG-VALUE"


def test_quantized_source_is_refused_unless_asked_for() -> None:
    stored = toy_checkpoint({"a.q_proj": toy_layer(4, 8)})
    plan = make_plan(stored, registry=REGISTRY)
    with pytest.raises(ConfigError, match=r"toy, 1 layers.*requantize=True") as info:
        quantize_plan(plan, OnlineRequest(name="toy"), lambda m: "")
    assert info.value.code == "Q-CFG-CONFLICT"
    request = OnlineRequest(name="toy", requantize=True)
    again = quantize_plan(plan, request, lambda m: "").plan
    lt = read_matrix(again, again.members["a.q_proj"])
    dense = read_matrix(plan, plan.members["a.q_proj"]).dequantize()
    assert torch.equal(lt.weight.codes, quantize_weight("w", dense, SPEC).codes)
