"""From the header to schemes: presence and config together, and what contradicts what."""

from __future__ import annotations

import pytest
import torch

from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantError
from quant_core.kv_states import QuantCache
from quant_core.load import load_tensor, read_matrix
from quant_core.spec import CHANNEL, TENSOR, Unquantized
from quant_plugin_compressed_tensors.packed import PackedScheme
from quant_plugin_compressed_tensors.plain import PlainScheme

N, K, G = 16, 64, 32
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.fixture
def layer(ct):
    def make(bits=4, seed=0, **kw):
        codes, scale, _ = ct.random_layer(N, K, G, bits, seed)
        return ct.packed_layer(codes, scale, bits=bits, **kw)

    return make


@pytest.fixture
def model(ct, layer):
    """Two packed layers, a plain head, a norm and an embedding."""

    def make(**changes):
        out = {
            "model.embed_tokens.weight": torch.zeros(32, K),
            "model.norm.weight": torch.ones(K),
            "lm_head.weight": torch.zeros(32, K),
        }
        for i in range(2):
            out |= ct.named(layer(seed=i), f"model.layers.{i}.mlp.up_proj")
        return {k: v for k, v in (out | changes).items() if v is not None}

    return make


def raises(error, code, ct, checkpoint, match=None):
    with pytest.raises(error, match=match) as err:
        ct.plan(checkpoint)
    assert err.value.code == code
    return err.value


def test_presence_and_ignore_decide(ct, write, model):
    planned = ct.plan(write(model(), ct.block(ct.args(4, G))))
    assert list(planned.quantized) == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert planned.warnings == []
    rules = {n: m.scheme.rule for n, m in planned.members.items() if not m.quantized}
    assert rules["lm_head"] == "ignore"
    assert rules["model.embed_tokens"] == "no config group targets it"
    scheme = planned.quantized["model.layers.0.mlp.up_proj"].scheme
    assert isinstance(scheme, PackedScheme)
    assert (scheme.name, scheme.shape) == ("w4a16", (N, K))


def test_lm_head_without_an_ignore_entry_may_be_quantized(ct, write, model, layer):
    tensors = model(**{"lm_head.weight": None}) | ct.named(layer(), "lm_head")
    planned = ct.plan(write(tensors, ct.block(ct.args(4, G), ignore=[])))
    assert planned.members["lm_head"].quantized


def test_quantized_embedding_is_read(ct, write, model, layer):
    name = "model.embed_tokens"
    tensors = model(**{f"{name}.weight": None}) | ct.named(layer(), name)
    config = ct.block(ct.args(4, G))
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    checkpoint = write(tensors, config)
    assert ct.plan(checkpoint).members[name].quantized
    assert load_tensor(ct.plan(checkpoint), name).dequantize().shape == (N, K)


@pytest.mark.parametrize(
    ("inputs", "name", "grain", "static", "peak", "zero"),
    [
        (TOKEN, "w8a8", CHANNEL, False, 127.5, None),
        (TOKEN | {"symmetric": False}, "w8a8", CHANNEL, False, 0.0, "int8"),
        (TOKEN | {"num_bits": 4}, "w8a4", CHANNEL, False, 7.5, None),
        (TOKEN | {"type": "float"}, "w8afp8", CHANNEL, False, 0.0, None),
        ({"strategy": "tensor", "dynamic": True}, "w8a8", TENSOR, False, 127.5, None),
        ({"strategy": "tensor"}, "w8a8", TENSOR, True, 0.0, None),
        ({"strategy": "group", "group_size": 16, "dynamic": True}, "w8a8", (1, 16), False, 127.5,
         None),
    ],
)  # fmt: skip
def test_input_operand(ct, write, inputs, name, grain, static, peak, zero):
    stored = {
        "weight": torch.zeros(N, K, dtype=torch.int8),
        "weight_scale": torch.ones(N, 1).half(),
    }
    stored |= {"input_scale": torch.ones(1).half()} if static else {}
    config = ct.block(ct.args(8, -1), inputs, format="int-quantized")
    member = ct.plan(write(ct.named(stored), config)).members[ct.NAME]
    assert isinstance(member.scheme, PlainScheme)
    assert member.scheme.name == name
    spec = member.scheme.operands["input"]
    (scale,) = spec.scales
    assert (scale.grain, scale.static, scale.peak) == (grain, static, peak)
    assert scale.element == ("f16" if static else "f32")
    assert (spec.zero.element if spec.zero else None) == zero


def test_padded_words_are_told_by_their_width_whatever_the_version(ct, write, layer):
    for pad, version in ((True, "0.19.0"), (False, "0.9.4"), (True, None)):
        config = ct.block(ct.args(3, G), version=version)
        planned = ct.plan(write(ct.named(layer(3, pad=pad)), config))
        assert planned.members[ct.NAME].scheme.padded is pad


@pytest.mark.parametrize(("version", "pad"), [("0.17.1", True), ("0.18.0", False)])
def test_version_decides_where_both_packings_are_equally_wide(ct, write, version, pad):
    k = 20  # 3 bits: two words either way
    codes, _, _ = ct.random_layer(N, k, k, 3)
    stored = ct.named(ct.packed_layer(codes, torch.ones(N, 1).half(), bits=3, pad=pad))
    planned = ct.plan(write(stored, ct.block(ct.args(3, -1), version=version)))
    weight = load_tensor(planned, ct.NAME).dequantize()
    assert torch.equal(weight, codes.float() - 4)
    unknown = write(stored, ct.block(ct.args(3, -1), version=None))
    raises(ConfigError, "Q-CFG-CONFLICT", ct, unknown, "version")


def test_experts_are_one_stack_of_one_scheme(ct, write, layer):
    tensors = {}
    for e in range(3):
        for proj in ("gate_proj", "down_proj"):
            tensors |= ct.named(layer(seed=e), f"model.layers.0.mlp.experts.{e}.{proj}")
    planned = ct.plan(write(tensors, ct.block(ct.args(4, G))))
    member = planned.members["model.layers.0.mlp.experts.gate_proj"]
    assert member.layer.experts == (0, 1, 2)
    a, b = (read_matrix(planned, member, e).dequantize() for e in (0, 2))
    assert not torch.equal(a, b)
    groups = {
        "all": {"targets": ["Linear"], "weights": ct.args(4, G)},
        "one": {"targets": ["re:.*experts.1.gate"], "weights": ct.args(4, G)},
    }
    split = ct.block() | {"config_groups": groups}
    raises(ConfigError, "Q-CFG-CONFLICT", ct, write(tensors, split), r"experts\.1\.gate")
    del tensors["model.layers.0.mlp.experts.1.gate_proj.weight_packed"]
    err = raises(CheckpointError, "Q-TENSOR-MISSING", ct, write(tensors, ct.block(ct.args(4, G))))
    assert "experts.1.gate_proj.weight_packed" in str(err)


def test_groups_of_different_formats_in_one_file(ct, write, layer):
    int8 = {
        "weight": torch.zeros(N, K, dtype=torch.int8),
        "weight_scale": torch.ones(N, 1).half(),
    }
    groups = {
        "a": {"targets": ["re:.*up"], "weights": ct.args(4, G), "format": "pack-quantized"},
        "b": {
            "targets": ["re:.*down"], "weights": ct.args(8, -1), "input_activations": TOKEN,
            "format": "int-quantized",
        },
    }  # fmt: skip
    config = ct.block(format="mixed-precision") | {"config_groups": groups}
    tensors = ct.named(layer(), "m.up") | ct.named(int8, "m.down")
    planned = ct.plan(write(tensors, config))
    assert {n: m.scheme.name for n, m in planned.quantized.items()} == {
        "m.up": "w4a16", "m.down": "w8a8",
    }  # fmt: skip


# ------------------------------------------------------------------------------ contradictions


def test_quantized_but_ignored_raises(ct, write, model):
    config = ct.block(ct.args(4, G), ignore=["lm_head", "re:.*layers.1.*"])
    err = raises(CheckpointError, "Q-CKPT-MISMATCH", ct, write(model(), config))
    assert "model.layers.1.mlp.up_proj" in str(err)
    assert "re:.*layers.1.*" in str(err)


def test_quantized_but_untargeted_raises(ct, write, model):
    config = ct.block(ct.args(4, G))
    config["config_groups"]["group_0"]["targets"] = ["re:.*layers.0.*"]
    err = raises(CheckpointError, "Q-CKPT-MISMATCH", ct, write(model(), config))
    assert "model.layers.1.mlp.up_proj" in str(err)


@pytest.mark.parametrize("targets", [["Linear"], ["re:.*up_proj"]])
def test_plain_weight_where_config_and_neighbours_are_quantized_raises(ct, write, model, targets):
    name = "model.layers.1.mlp.up_proj"
    plain = {f"{name}.{x}": None for x in ("weight_packed", "weight_scale", "weight_shape")}
    tensors = model(**plain, **{f"{name}.weight": torch.zeros(N, K)})
    config = ct.block(ct.args(4, G))
    config["config_groups"]["group_0"]["targets"] = targets
    err = raises(CheckpointError, "Q-CKPT-MISMATCH", ct, write(tensors, config))
    assert name in str(err)
    config["ignore"] += [name]
    member = ct.plan(write(tensors, config)).members[name]
    assert isinstance(member.scheme, Unquantized)


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_shape"])
def test_lost_tensor_is_named(ct, write, model, leaf):
    name = f"model.layers.1.mlp.up_proj.{leaf}"
    err = raises(
        CheckpointError,
        "Q-TENSOR-MISSING",
        ct,
        write(model(**{name: None}), ct.block(ct.args(4, G))),
    )
    assert name in str(err)


def test_lost_zero_point_and_g_idx_are_named(ct, write, model):
    for args in (ct.args(4, G, symmetric=False), ct.args(4, G, actorder="group")):
        err = raises(CheckpointError, "Q-TENSOR-MISSING", ct, write(model(), ct.block(args)))
        assert "weight_zero_point" in str(err) or "weight_g_idx" in str(err)


def test_extra_tensor_is_named(ct, write, model):
    name = "model.layers.1.mlp.up_proj.weight_scale_2"
    tensors = model(**{name: torch.ones(1)})
    err = raises(
        CheckpointError, "Q-TENSOR-UNEXPECTED", ct, write(tensors, ct.block(ct.args(4, G)))
    )
    assert name in str(err)


def test_zero_points_of_a_symmetric_layer_contradict(ct, write, model):
    name = "model.layers.1.mlp.up_proj.weight_zero_point"
    tensors = model(**{name: torch.zeros(2, 2, dtype=torch.int32)})
    raises(ConfigError, "Q-CFG-CONFLICT", ct, write(tensors, ct.block(ct.args(4, G))), "symmetric")


@pytest.mark.parametrize(
    ("args", "error", "code", "match"),
    [
        ({"bits": 8, "group_size": G}, ConfigError, "Q-CFG-CONFLICT", "num_bits is 8.*say 4"),
        ({"bits": 4, "group_size": 16}, LayoutError, "Q-LAYOUT-GROUP", "group_size 32"),
        ({"bits": 4, "group_size": 64}, LayoutError, "Q-LAYOUT-GROUP", "group_size 32"),
        ({"bits": 4, "group_size": -1}, LayoutError, "Q-LAYOUT-SHAPE", "weight_scale"),
        ({"bits": 4, "group_size": None}, LayoutError, "Q-LAYOUT-SHAPE", "weight_scale"),
    ],
)
def test_config_of_other_weights_says_what_the_tensors_imply(
    ct, write, model, args, error, code, match
):
    raises(error, code, ct, write(model(), ct.block(ct.args(**args))), match)


@pytest.mark.parametrize(
    ("leaf", "change", "code"),
    [
        ("weight_packed", lambda t: t[:, :-1], "Q-LAYOUT-SHAPE"),
        ("weight_packed", lambda t: t[:-1], "Q-LAYOUT-SHAPE"),
        ("weight_packed", lambda t: t.to(torch.int64), "Q-LAYOUT-DTYPE"),
        ("weight_scale", lambda t: t[:-1], "Q-LAYOUT-SHAPE"),
        ("weight_scale", lambda t: t.to(torch.int32), "Q-LAYOUT-DTYPE"),
        ("weight_shape", lambda t: t.float(), "Q-LAYOUT-DTYPE"),
        ("weight_shape", lambda t: t[:1], "Q-LAYOUT-SHAPE"),
    ],
)
def test_wrong_shape_or_dtype_names_the_tensor(ct, write, model, leaf, change, code):
    name = f"model.layers.0.mlp.up_proj.{leaf}"
    tensors = model()
    tensors[name] = change(tensors[name])
    err = raises(QuantError, code, ct, write(tensors, ct.block(ct.args(4, G))))
    assert "model.layers.0.mlp.up_proj" in str(err)


def test_group_size_that_does_not_divide_raises(ct, write):
    stored = {
        "weight": torch.zeros(N, 100, dtype=torch.int8),
        "weight_scale": torch.ones(N, 4).half(),
    }
    config = ct.block(ct.args(8, 32), format="int-quantized")
    raises(LayoutError, "Q-LAYOUT-GROUP", ct, write(ct.named(stored), config), "in_features 100")


def test_codes_of_another_format_contradict(ct, write, model):
    config = ct.block(ct.args(4, G), format="int-quantized")
    raises(ConfigError, "Q-CFG-CONFLICT", ct, write(model(), config), "weight_packed is stored")


FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


@pytest.mark.parametrize(
    ("fmt", "weights", "inputs"),
    [
        ("int-quantized", {"num_bits": 8, "type": "float", "group_size": -1}, None),
        ("pack-quantized", FP4, None),
        ("float-quantized", {"num_bits": 8, "group_size": -1}, None),
        ("nvfp4-pack-quantized", {"num_bits": 4, "group_size": 32}, None),
        ("pack-quantized", {"num_bits": 4, "group_size": 32},
         {"num_bits": 4, "type": "float", "strategy": "tensor", "dynamic": True}),
        ("pack-quantized", {"num_bits": 4, "group_size": 32},
         {"strategy": "group", "group_size": 32}),
        ("pack-quantized", {"num_bits": 4, "group_size": 32}, FP4 | {"dynamic": True}),
        ("pack-quantized", {"num_bits": 4, "group_size": 32},
         {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True,
          "symmetric": False}),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(ct, write, model, fmt, weights, inputs):
    config = ct.block(weights, inputs, format=fmt)
    err = raises(ConfigError, "Q-CFG-VALUE", ct, write(model(), config), "not supported")
    assert "model.layers.0.mlp.up_proj" in str(err)
    assert inputs or fmt in str(err)


# ------------------------------------------------------------------------------------ attention


KV = {"num_bits": 8, "type": "float", "strategy": "tensor"}


def _cache(value=1.0, layers=(0, 1), suffix="{}_scale"):
    names = [f"model.layers.{i}.self_attn.{suffix.format(x)}" for i in layers for x in "kv"]
    return {name: torch.full((1,), value).bfloat16() for name in names}


def test_kv_scales_become_attention_members(ct, write, model):
    planned = ct.plan(write(model(**_cache()), ct.block(ct.args(4, G), kv_cache_scheme=KV)))
    assert not planned.warnings
    assert not planned.ledger.skipped
    assert list(planned.attention) == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    member = planned.attention["model.layers.0.self_attn"]
    assert {r: s.label for r, s in member.scheme.operands.items()} == {
        "k": "fp8_e4m3 tensor:bf16", "v": "fp8_e4m3 tensor:bf16",
    }  # fmt: skip
    assert (member.scheme.default, member.scheme.site) == (True, "cache")
    assert not set(_cache()) & set(planned.dense)
    assert "model.layers.0.self_attn" not in planned.members


def test_integer_kv_scales_keep_their_zero_points(ct, write, model):
    points = {n.replace("scale", "zero_point"): torch.tensor([-3], dtype=torch.int8)
              for n in _cache()}  # fmt: skip
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False}
    planned = ct.plan(
        write(model(**_cache(0.5), **points), ct.block(ct.args(4, G), kv_cache_scheme=scheme))
    )
    member = planned.attention["model.layers.1.self_attn"]
    lt = read_matrix(planned, member)
    cache = QuantCache(member.layer, member.scheme, lt)
    # (c - z) s with c in -128..127, z = -3, s = 0.5: from -62.5 to 65, in halves
    assert cache.rounded("k", torch.tensor([[0.3, -100.0, 100.0, 64.9]])).tolist() == [
        [0.5, -62.5, 65.0, 65.0]
    ]
    assert {n: t.dtype for n, t in cache.stored().items()} == {
        n: t.dtype for n, t in (_cache() | points).items() if "layers.1." in n
    }


@pytest.mark.parametrize("lost", ["one scale", "one layer"])
def test_kv_scale_that_a_layer_lacks_is_missing(ct, write, model, lost):
    kv = _cache(layers=(0,) if lost == "one layer" else (0, 1))
    kv.pop("model.layers.1.self_attn.v_scale", None)
    kv["model.layers.1.self_attn.q_norm.weight"] = torch.ones(8)
    path = write(model(**kv), ct.block(ct.args(4, G), kv_cache_scheme=KV))
    err = raises(CheckpointError, "Q-TENSOR-MISSING", ct, path, "model.layers.1.self_attn.v_scale")
    assert ("model.layers.1.self_attn.k_scale" in str(err)) == (lost == "one layer")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_kv_scale_that_is_not_positive_is_refused(ct, write, model, value):
    planned = ct.plan(write(model(**_cache(value)), ct.block(ct.args(4, G), kv_cache_scheme=KV)))
    with pytest.raises(LayoutError, match=r"self_attn\.k_scale") as info:
        read_matrix(planned, planned.attention["model.layers.0.self_attn"])
    assert info.value.code == "Q-VALUE-SCALE"


@pytest.mark.parametrize("scheme", [KV | {"num_bits": 4}, KV | {"strategy": "attn_head"}])
def test_kv_scales_of_other_kinds_are_accounted_for_and_warned_about(ct, write, model, scheme):
    planned = ct.plan(write(model(**_cache()), ct.block(ct.args(4, G), kv_cache_scheme=scheme)))
    assert planned.warnings == ["KV-cache scales present, not applied (2 attention modules)"]
    assert set(_cache()) <= set(planned.ledger.skipped)
    assert not planned.attention
    assert not set(_cache()) & set(planned.dense)


def test_kv_scheme_without_scales_is_warned_about(ct, write, model):
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    planned = ct.plan(write(model(), ct.block(ct.args(4, G), kv_cache_scheme=scheme)))
    assert "no scales are stored" in planned.warnings[0]


def test_older_kv_scales_beside_the_weights_belong_to_the_attention(ct, write, layer):
    tensors = {}
    for x in "kv":
        name = f"model.layers.0.self_attn.{x}_proj"
        tensors |= ct.named(layer(), name) | {f"{name}.output_scale": torch.ones(1).half()}
    block = ct.block(ct.args(4, G), ignore=[])
    planned = ct.plan(write(tensors, block))
    assert planned.warnings == ["KV-cache scales present, not applied (2 attention modules)"]
    assert len(planned.ledger.skipped) == 2
    planned = ct.plan(write(tensors, block | {"kv_cache_scheme": KV}))
    assert not planned.warnings
    assert not planned.ledger.skipped
    (member,) = planned.attention.values()
    assert [t.stored for t in member.scheme.tensors] == [
        f"model.layers.0.self_attn.{x}_proj.output_scale" for x in "kv"
    ]
