"""From header to scheme: presence and config together, faults named from the header alone."""

from __future__ import annotations

import pytest
import torch

from quant_core.errors import CheckpointError, LayoutError
from quant_core.load import load_tensor, read_parameter
from quant_core.plan import plan
from quant_core.spec import CHANNEL, TENSOR
from quant_plugin_fp8.writer import config_for

UP = "model.layers.1.mlp.up_proj"
FAMILIES = ("static", "tensor", "block", "ue8m0", "fbgemm")


@pytest.mark.parametrize(
    ("family", "name", "grain", "element"),
    [
        ("static", "w8a8_fp8_static", TENSOR, "f32"),
        ("tensor", "w8a8_fp8_tensor", TENSOR, "f32"),
        ("block", "w8a8_fp8_block", (16, 32), "f32"),
        ("ue8m0", "w8a8_fp8_block_ue8m0", (16, 32), "e8m0"),
        ("fbgemm", "w8a8_fp8_channel", CHANNEL, "f32"),
    ],
)
def test_each_family_has_its_scheme(write, made, family, name, grain, element):
    planned = plan(write(made.model(family), made.configs[family]))
    assert list(planned.quantized) == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    scheme = planned.quantized[UP].scheme
    assert scheme.name == name
    assert (scheme.weight.scales[0].grain, scheme.weight.scales[0].element) == (grain, element)
    assert planned.warnings == []


@pytest.mark.parametrize("family", FAMILIES)
def test_config_comes_back(write, made, family):
    planned = plan(write(made.model(family), made.configs[family]))
    config = config_for(planned)
    assert config["modules_to_not_convert"] == ["lm_head"]
    theirs = {k: v for k, v in made.configs[family].items() if v is not None}
    assert {k: config[k] for k in theirs} == theirs


def test_config_of_layers_that_differ_raises_represent(write, made):
    from types import SimpleNamespace

    first = plan(write(made.model("block"), made.configs["block"]))
    second = plan(write(made.model("tensor"), made.configs["tensor"]))
    both = {f"a.{n}": m for n, m in first.members.items()} | dict(second.members)
    with pytest.raises(LayoutError, match="weight_block_size") as err:
        config_for(SimpleNamespace(members=both, checkpoint=second.checkpoint))
    assert err.value.code == "Q-LAYOUT-REPRESENT"


@pytest.mark.parametrize("shape", [(), (1,)])
def test_single_scales_keep_their_stored_shape(write, made, shape):
    tensors = made.model("static")
    for leaf in ("weight_scale", "input_scale"):
        tensors[f"{UP}.{leaf}"] = tensors[f"{UP}.{leaf}"].reshape(shape)
    member = plan(write(tensors, made.configs["static"])).quantized[UP]
    assert {p.name: p.shape for p in member.params}["weight_scale"] == shape
    assert {p.name: p.shape for p in member.params}["input_scale"] == shape


def test_names_of_transformers_for_single_scales_are_read(write, made):
    tensors = made.model("static")
    for i in range(2):
        up = f"model.layers.{i}.mlp.up_proj"
        tensors[f"{up}.weight_scale_inv"] = tensors.pop(f"{up}.weight_scale")
        tensors[f"{up}.activation_scale"] = tensors.pop(f"{up}.input_scale")
    checkpoint = write(tensors, made.configs["static"])
    _, want = made.layer("static", seed=1)
    got = load_tensor(checkpoint, UP).dequantize()
    assert torch.equal(got.double(), torch.from_numpy(want))


LOST = [(f, leaf) for f in FAMILIES for leaf in ("weight", "scale")] + [("static", "input_scale")]


@pytest.mark.parametrize(("family", "leaf"), LOST)
def test_lost_tensors_are_named(write, made, family, leaf):
    tensors = made.model(family)
    scale = "weight_scale_inv" if family in ("block", "ue8m0") else "weight_scale"
    name = f"{UP}.{scale if leaf == 'scale' else leaf}"
    del tensors[name]
    with pytest.raises(CheckpointError, match=name) as err:
        plan(write(tensors, made.configs[family]))
    assert err.value.code == "Q-TENSOR-MISSING"


@pytest.mark.parametrize(
    ("family", "leaf", "value"),
    [
        ("block", "weight_scale_inv", torch.ones(3, 3).t()[:, :2]),  # cut
        ("block", "weight_scale_inv", torch.ones(1, 1)),  # would broadcast
        ("block", "weight_scale_inv", torch.ones(9)),
        ("tensor", "weight_scale", torch.ones(40)),
        ("tensor", "weight_scale", torch.ones(3)),  # three members fused on disk
        ("fbgemm", "weight_scale", torch.ones(1)),
        ("fbgemm", "weight_scale", torch.ones(1, 40)),
        ("static", "input_scale", torch.ones(80)),
        ("block", "weight", torch.zeros(40 * 80).to(torch.float8_e4m3fn)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(write, made, family, leaf, value):
    tensors = made.model(family) | {f"{UP}.{leaf}": value}
    with pytest.raises(LayoutError, match=leaf) as err:
        plan(write(tensors, made.configs[family]))
    assert err.value.code == "Q-LAYOUT-SHAPE"
    assert err.value.tensor == f"{UP}.{leaf}"


@pytest.mark.parametrize(
    ("family", "leaf", "dtype"),
    [
        ("block", "weight", torch.int8),
        ("block", "weight", torch.uint8),
        ("block", "weight", torch.float8_e4m3fnuz),
        ("block", "weight", torch.float8_e5m2),
        ("block", "weight", torch.bfloat16),
        ("block", "weight_scale_inv", torch.int32),
        ("block", "weight_scale_inv", torch.uint8),  # an exponent only with scale_fmt ue8m0
        ("tensor", "weight_scale", torch.float8_e8m0fnu),
        ("static", "input_scale", torch.int32),
    ],
)
def test_wrong_types_are_refused_never_reinterpreted(write, made, family, leaf, dtype):
    tensors = made.model(family)
    old = tensors[f"{UP}.{leaf}"].float()
    tensors[f"{UP}.{leaf}"] = old.to(dtype) if dtype != torch.uint8 else old.to(torch.int8).byte()
    with pytest.raises(LayoutError, match=leaf) as err:
        plan(write(tensors, made.configs[family]))
    assert err.value.code == "Q-LAYOUT-DTYPE"
    assert str(dtype).removeprefix("torch.") in str(err.value)


def test_exponents_stored_as_plain_bytes_are_read_under_ue8m0(write, made):
    tensors = made.model("ue8m0")
    name = f"{UP}.weight_scale_inv"
    tensors[name] = tensors[name].view(torch.uint8)
    _, want = made.layer("ue8m0", seed=1)
    got = load_tensor(write(tensors, made.configs["ue8m0"]), UP).dequantize()
    assert torch.equal(got.double(), torch.from_numpy(want))


def test_power_of_two_scales_stored_as_floats_keep_their_type(write, made):
    tensors = made.model("ue8m0")
    for i in range(2):
        name = f"model.layers.{i}.mlp.up_proj.weight_scale_inv"
        tensors[name] = tensors[name].float()
    checkpoint = write(tensors, made.configs["ue8m0"])
    scheme = plan(checkpoint).quantized[UP].scheme
    assert scheme.weight.scales[0].element == "f32"
    assert scheme.operands["input"].scales[0].element == "e8m0"
    _, want = made.layer("ue8m0", seed=1)
    got = load_tensor(checkpoint, UP).dequantize()
    assert torch.equal(got.double(), torch.from_numpy(want))


def test_extra_tensor_in_a_layer_is_named(write, made):
    tensors = made.model("block") | {f"{UP}.input_scale": torch.ones(())}
    with pytest.raises(CheckpointError, match="input_scale") as err:
        plan(write(tensors, made.configs["block"]))
    assert err.value.code == "Q-TENSOR-UNEXPECTED"


def test_plain_weight_among_quantized_siblings_needs_an_entry(write, made):
    tensors = made.model("block")
    del tensors[f"{UP}.weight_scale_inv"]
    tensors[f"{UP}.weight"] = torch.zeros(40, 80)
    with pytest.raises(CheckpointError, match=UP) as err:
        plan(write(tensors, made.configs["block"]))
    assert err.value.code == "Q-CKPT-MISMATCH"
    allowed = made.configs["block"] | {"modules_to_not_convert": ["layers.1.mlp"]}
    planned = plan(write(tensors, allowed))
    assert list(planned.quantized) == ["model.layers.0.mlp.up_proj"]
    assert planned.members[UP].scheme.rule == "modules_to_not_convert"


def test_quantized_module_on_the_skip_list_is_a_contradiction(write, made):
    config = made.configs["block"] | {"ignored_layers": ["up_proj"]}
    with pytest.raises(CheckpointError, match="ignored_layers") as err:
        plan(write(made.model("block"), config))
    assert err.value.code == "Q-CKPT-MISMATCH"


def test_entry_without_a_match_is_warned_of(write, made):
    config = made.configs["block"] | {"ignored_layers": ["visual", "lm_head"]}
    warnings = " ".join(plan(write(made.model("block"), config)).warnings)
    assert "visual" in warnings
    assert "lm_head" not in warnings


def test_cache_scales_are_skipped_by_a_named_rule_and_warned_of(write, made):
    tensors = made.model("tensor")
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(())
    tensors["model.layers.0.mlp.up_proj.output_scale"] = torch.ones(())
    planned = plan(write(tensors, made.configs["tensor"]))
    assert "not applied (2 modules)" in " ".join(planned.warnings)
    assert sorted(planned.ledger.skipped) == [
        "model.layers.0.mlp.up_proj.output_scale", "model.layers.0.self_attn.k_scale"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("attn.k_scale", "attn.v_scale"),
    ],
)
def test_cache_scales_of_keys_and_values_are_offered_under_the_names_engines_read(
    write, made, names
):
    where, (k, v) = "model.layers.0.self_attn", names
    stored = {f"{where}.{k}": torch.tensor(0.25), f"{where}.{v}": torch.tensor(0.5)}
    planned = plan(write(made.model("tensor") | stored, made.configs["tensor"]))
    (member,) = planned.attention.values()
    assert not member.scheme.default  # whether the cache is quantized is the server's decision
    assert {t.stored for t in member.scheme.tensors} == set(stored)
    assert {r: s.element.name for r, s in member.scheme.operands.items()} == dict.fromkeys(
        "kv", "fp8_e4m3"
    )
    assert "not applied" not in " ".join(planned.warnings)
    lt = member.scheme.canonicalize(
        member.layer, {t.name: stored[t.stored] for t in member.scheme.tensors}
    )
    assert [float(lt.operands[r].scales[0]) for r in "kv"] == [0.25, 0.5]


# ------------------------------------------------------------- experts whose scales are stacked

EXPERTS = "model.layers.0.mlp.experts"


def moe(made, ref, experts=3, inter=32, hidden=64, rows=16, cols=32):
    """Experts one by one, their scales in two stacks, as transformers 5.23 saves them."""
    rng = torch.Generator().manual_seed(1)
    tensors = {"lm_head.weight": torch.zeros(8, 64)}
    sizes = {"gate_proj": (inter, hidden), "up_proj": (inter, hidden), "down_proj": (hidden, inter)}
    codes, scales = {}, {}
    for i, (leaf, (n, k)) in enumerate(sizes.items()):
        for e in range(experts):
            codes[leaf, e] = ref.random_codes(n, k, seed=10 * i + e)
            tensors[f"{EXPERTS}.{e}.{leaf}.weight"] = ref.stored(codes[leaf, e])
        shape = (experts, -(-n // rows), -(-k // cols))
        scales[leaf] = torch.rand(shape, generator=rng) + 0.1
    both = torch.cat([scales["gate_proj"], scales["up_proj"]], dim=1)
    tensors[f"{EXPERTS}.gate_up_proj_scale_inv"] = both
    tensors[f"{EXPERTS}.down_proj_scale_inv"] = scales["down_proj"]
    return tensors, codes, scales


def test_stacked_scales_reach_their_experts(write, made, ref):
    tensors, codes, scales = moe(made, ref)
    checkpoint = write(tensors, made.configs["block"])
    planned = plan(checkpoint)
    assert sorted(planned.quantized) == [
        f"{EXPERTS}.{x}" for x in ("down_proj", "gate_proj", "up_proj")
    ]
    assert EXPERTS not in planned.members
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        got = load_tensor(planned, f"{EXPERTS}.{leaf}").dequantize()
        for e in range(3):
            c = codes[leaf, e]
            wide = ref.spread(scales[leaf][e].double().numpy(), (16, 32), c.shape)
            want = torch.from_numpy(ref.values[c] * wide).float()
            assert torch.equal(got[e], want), (leaf, e)
    read_parameter(planned, "lm_head.weight")
    planned.ledger.check_loaded()


def test_stacked_scale_lost_is_named(write, made, ref):
    tensors, _, _ = moe(made, ref)
    del tensors[f"{EXPERTS}.gate_up_proj_scale_inv"]
    with pytest.raises(CheckpointError, match="gate_proj") as err:
        plan(write(tensors, made.configs["block"]))
    assert err.value.code == "Q-TENSOR-MISSING"


@pytest.mark.parametrize("cut", [(slice(0, 2),), (slice(None), slice(0, 3))])
def test_stacked_scale_of_other_experts_or_rows_is_refused(write, made, ref, cut):
    tensors, _, _ = moe(made, ref)
    name = f"{EXPERTS}.gate_up_proj_scale_inv"
    tensors[name] = tensors[name][cut].contiguous()
    with pytest.raises(LayoutError, match="gate_up_proj_scale_inv") as err:
        plan(write(tensors, made.configs["block"]))
    assert err.value.code == "Q-LAYOUT-SHAPE"


def test_halves_that_would_share_a_row_of_scales_are_refused(write, made, ref):
    tensors, _, _ = moe(made, ref, inter=40)
    with pytest.raises(LayoutError, match="whole blocks") as err:
        plan(write(tensors, made.configs["block"]))
    assert err.value.code == "Q-LAYOUT-SHAPE"


def test_lost_expert_is_named(write, made, ref):
    tensors, _, _ = moe(made, ref)
    del tensors[f"{EXPERTS}.1.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj") as err:
        plan(write(tensors, made.configs["block"]))
    assert err.value.code == "Q-TENSOR-MISSING"


def test_weights_stacked_into_one_tensor_are_refused_by_name(write, made):
    stack = torch.zeros(3, 64, 64).to(torch.float8_e4m3fn)
    tensors = {f"{EXPERTS}.gate_up_proj": stack, **made.model("block")}
    with pytest.raises(CheckpointError, match="gate_up_proj") as err:
        plan(write(tensors, made.configs["block"]))
    assert err.value.code == "Q-CKPT-MISMATCH"
