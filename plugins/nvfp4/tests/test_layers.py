"""From the header to schemes: presence and config together, and what contradicts what."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from quant_core.build import Builder
from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantError
from quant_core.load import load_tensor, read_matrix
from quant_core.nn import QuantLinear
from quant_core.spec import Unquantized
from quant_plugin_nvfp4.algos import ALGOS
from quant_plugin_nvfp4.scheme import KV_RULE

UP = "model.layers.{}.mlp.up_proj"


@pytest.fixture
def model(mo):
    """Two quantized layers, a plain head, a norm and an embedding."""

    def make(algo="NVFP4", **changes):
        out = {
            "model.embed_tokens.weight": torch.zeros(32, mo.K),
            "model.norm.weight": torch.ones(mo.K),
            "lm_head.weight": torch.zeros(32, mo.K),
        }
        for i in range(2):
            out |= mo.named(mo.stored(algo, seed=i), UP.format(i))
        return {k: v for k, v in (out | changes).items() if v is not None}

    return make


def raises(error, code, mo, checkpoint, match=None):
    with pytest.raises(error, match=match) as err:
        mo.plan(checkpoint)
    assert err.value.code == code
    return err.value


# ------------------------------------------------------------------------------ what is quantized


def test_presence_and_exclusion_decide(mo, write, model):
    planned = mo.plan(write(model(), mo.block()))
    assert list(planned.quantized) == [UP.format(i) for i in range(2)]
    assert planned.warnings == []
    rules = {n: m.scheme.rule for n, m in planned.members.items() if not m.quantized}
    assert rules["lm_head"] == "ignore"
    assert rules["model.embed_tokens"] == "no quantized tensor stored"
    scheme = planned.members[UP.format(0)].scheme
    assert (scheme.name, scheme.shape, scheme.group_size) == ("w4a4_nvfp4", (mo.N, mo.K), 16)
    assert scheme.operands["input"].scales[1].static


def test_quantized_although_excluded_is_a_contradiction(mo, write, model):
    for entry in (UP.format(1), "model.layers.1*", "*.up_proj"):
        error = raises(
            CheckpointError, "Q-CKPT-MISMATCH", mo, write(model(), mo.block(ignore=[entry]))
        )
        assert entry in str(error)
        assert "up_proj" in error.tensor


def test_plain_although_siblings_are_quantized_is_a_contradiction(mo, write, model):
    name = UP.format(1)
    plain = {k: None for k in model() if k.startswith(name)}
    plain |= {f"{name}.weight": torch.zeros(mo.N, mo.K)}
    error = raises(CheckpointError, "Q-CKPT-MISMATCH", mo, write(model(**plain), mo.block()))
    assert error.tensor == f"{name}.weight"
    planned = mo.plan(write(model(**plain), mo.block(ignore=["lm_head", "model.layers.1*"])))
    assert isinstance(planned.members[name].scheme, Unquantized)


def test_pattern_that_matches_nothing_is_reported(mo, write, model):
    planned = mo.plan(write(model(), mo.block(ignore=["lm_head", "model.layers.7*"])))
    (warning,) = planned.warnings
    assert "model.layers.7*" in warning


def test_mixed_precision_gives_each_layer_its_own(mo, write, model):
    name = UP.format(1)
    tensors = model(**{k: None for k in model() if k.startswith(name)})
    tensors |= mo.named(mo.stored("FP8"), name)
    layers = {UP.format(0): {"quant_algo": "NVFP4", "group_size": 16}, name: {"quant_algo": "FP8"}}
    planned = mo.plan(write(tensors, mo.block("MIXED_PRECISION", quantized_layers=layers)))
    assert [m.scheme.algo.name for m in planned.quantized.values()] == ["NVFP4", "FP8"]
    assert planned.members["lm_head"].scheme.rule == "not in quantized_layers"
    swapped = {UP.format(0): layers[name], name: layers[UP.format(0)]}
    config = mo.block("MIXED_PRECISION", quantized_layers=swapped)
    raises(ConfigError, "Q-CFG-CONFLICT", mo, write(tensors, config), "its weight is")


def test_mixed_precision_must_list_what_is_stored(mo, write, model):
    layers = {UP.format(0): {"quant_algo": "NVFP4"}}
    config = mo.block("MIXED_PRECISION", quantized_layers=layers)
    error = raises(CheckpointError, "Q-CKPT-MISMATCH", mo, write(model(), config))
    assert error.tensor == UP.format(1)
    plain = model(**{k: None for k in model() if k.startswith(UP.format(1))})
    plain |= {f"{UP.format(1)}.weight": torch.zeros(mo.N, mo.K)}
    layers |= {UP.format(1): {"quant_algo": "NVFP4"}}
    config = mo.block("MIXED_PRECISION", quantized_layers=layers)
    error = raises(CheckpointError, "Q-CKPT-MISMATCH", mo, write(plain, config), "lists it")
    assert error.tensor == f"{UP.format(1)}.weight"


@pytest.mark.parametrize(
    ("stored", "said"),
    [("FP8", "NVFP4"), ("NVFP4", "FP8"), ("MXFP8", "FP8"), ("FP8", "MXFP8"),
     ("NVFP4", "W4A8_MXFP4_FP8"), ("W4A8_MXFP4_FP8", "NVFP4"), ("W4A16_AWQ", "NVFP4"),
     ("W8A16", "FP8"), ("NVFP4", "W4A16_AWQ")],
)  # fmt: skip
def test_config_of_other_weights_is_a_contradiction(mo, write, stored, said):
    error = raises(
        ConfigError, "Q-CFG-CONFLICT", mo, write(mo.named(mo.stored(stored)), mo.block(said))
    )
    assert stored in error.expected
    assert error.actual == said


# ------------------------------------------------------------------------------- damaged tensors


@pytest.mark.parametrize("algo", ALGOS)
def test_every_lost_tensor_is_named(mo, write, algo):
    for leaf in mo.stored(algo):
        tensors = mo.named(mo.stored(algo))
        del tensors[f"{mo.NAME}.{leaf}"]
        error = raises(CheckpointError, "Q-TENSOR-MISSING", mo, write(tensors, mo.block(algo)))
        assert error.tensor == f"{mo.NAME}.{leaf}"


@pytest.mark.parametrize("algo", ALGOS)
def test_every_wrong_dtype_is_named(mo, write, algo):
    for leaf, value in mo.stored(algo).items():
        tensors = mo.named(mo.stored(algo))
        tensors[f"{mo.NAME}.{leaf}"] = torch.zeros(value.shape, dtype=torch.int64)
        with pytest.raises(QuantError) as err:
            mo.plan(write(tensors, mo.block(algo)))
        assert err.value.code == "Q-LAYOUT-DTYPE"
        assert err.value.tensor == f"{mo.NAME}.{leaf}"


@pytest.mark.parametrize("algo", ALGOS)
def test_every_wrong_shape_is_named(mo, write, algo):
    for leaf, value in mo.stored(algo).items():
        if leaf == "weight":
            continue
        tensors = mo.named(mo.stored(algo))
        odd = torch.zeros((3, *value.shape), dtype=torch.float32)
        tensors[f"{mo.NAME}.{leaf}"] = odd.to(value.dtype)
        with pytest.raises(QuantError) as err:
            mo.plan(write(tensors, mo.block(algo)))
        assert err.value.code in ("Q-LAYOUT-SHAPE", "Q-LAYOUT-GROUP")
        assert err.value.tensor == f"{mo.NAME}.{leaf}"


def test_unexpected_tensors_are_named(mo, write):
    for leaf in ("pre_quant_scale", "weight_zero_point", "svdquant_lora_a"):
        tensors = mo.named(mo.stored("NVFP4") | {leaf: torch.ones(mo.K)})
        error = raises(CheckpointError, "Q-TENSOR-UNEXPECTED", mo, write(tensors, mo.block()))
        assert error.tensor == f"{mo.NAME}.{leaf}"


@pytest.mark.parametrize(("algo", "size"), [("W4A16_AWQ", 64), ("W4A8_AWQ", 96)])
def test_group_size_that_contradicts_the_scales_is_told_the_right_one(mo, write, algo, size):
    config = mo.side(algo, group_size=size)
    checkpoint = write(mo.named(mo.stored(algo)), None, config)
    error = raises(LayoutError, "Q-LAYOUT-GROUP", mo, checkpoint, "imply group_size 128")
    assert error.tensor == f"{mo.NAME}.weight_scale"


def test_group_size_nobody_states_follows_from_the_shapes(mo, write):
    stored = mo.stored("W4A16_AWQ")
    stored["weight_scale"] = torch.rand(mo.N, mo.K // 32).add(0.1)
    planned = mo.plan(write(mo.named(stored), mo.block("W4A16_AWQ")))
    assert planned.members[mo.NAME].scheme.group_size == 32


@pytest.mark.parametrize("k", [250, 24])
def test_columns_that_fill_no_whole_groups_are_refused(mo, write, k):
    stored = mo.stored("NVFP4", k=256)
    stored["weight"] = stored["weight"][:, : k // 2]
    raises(LayoutError, "Q-LAYOUT-GROUP", mo, write(mo.named(stored), mo.block()))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale"])
def test_odd_single_scales_are_refused(mo, write, leaf, bad):
    stored = mo.stored("NVFP4") | {leaf: torch.tensor(bad)}
    planned = mo.plan(write(mo.named(stored), mo.block()))
    with pytest.raises(LayoutError) as err:
        load_tensor(planned, mo.NAME)
    assert err.value.code == "Q-VALUE-SCALE"
    assert err.value.tensor == f"{mo.NAME}.{leaf}"


def test_odd_block_scales_are_refused(mo, write):
    for algo, byte in (("NVFP4", 0x7F), ("MXFP8", 255)):
        stored = mo.stored(algo)
        stored["weight_scale"].view(torch.uint8)[2, 1] = byte
        planned = mo.plan(write(mo.named(stored), mo.block(algo)))
        with pytest.raises(LayoutError, match="NaN") as err:
            load_tensor(planned, mo.NAME)
        assert err.value.code == "Q-VALUE-SCALE"


def test_fp8_codes_of_nan_are_counted(mo, write):
    stored = mo.stored("FP8")
    stored["weight"].view(torch.uint8)[1, :2] = torch.tensor([0x7F, 0xFF]).byte()
    planned = mo.plan(write(mo.named(stored), mo.block("FP8")))
    with pytest.raises(LayoutError, match="2 of 4096") as err:
        load_tensor(planned, mo.NAME)
    assert err.value.code == "Q-VALUE-WEIGHT"


# -------------------------------------------------------------------------------- pre_quant_scale


def test_lost_pre_quant_scale_of_one_layer_is_named(mo, write, model):
    smooth = {f"{UP.format(0)}.pre_quant_scale": torch.rand(mo.K).add(0.5).bfloat16()}
    error = raises(
        CheckpointError, "Q-TENSOR-MISSING", mo,
        write(model("W4A16_AWQ", **smooth), mo.block("W4A16_AWQ")),
    )  # fmt: skip
    assert error.tensor == f"{UP.format(1)}.pre_quant_scale"


@pytest.mark.parametrize("algo", ["W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ", "W8A8_SQ_PER_CHANNEL"])
def test_pre_quant_scale_multiplies_the_input_before_it_is_rounded(mo, write, algo):
    scale = torch.rand(mo.K).add(0.5).bfloat16()
    stored = mo.stored(algo) | {"pre_quant_scale": scale}
    planned = mo.plan(write(mo.named(stored), mo.block(algo)))
    member = planned.members[mo.NAME]
    with_scale = Builder(plan=planned, dtype=torch.float32).linear("x", [member])
    del stored["pre_quant_scale"]
    plain = mo.plan(write(mo.named(stored), mo.block(algo)))
    without = Builder(plan=plain, dtype=torch.float32).linear("x", [plain.members[mo.NAME]])
    x = torch.randn(5, mo.K)
    assert torch.equal(with_scale(x), without(x * scale.float()))
    assert not torch.equal(with_scale(x), without(x))


# ----------------------------------------------------------------------------------- fused layers


@pytest.mark.parametrize("algo", ["NVFP4", "FP8", "W4A16_NVFP4", "W4A8_AWQ"])
def test_fused_members_with_unequal_scales_equal_the_unfused_ones(mo, write, algo):
    """Engines that keep the largest scale for both lose a factor here."""
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    tensors = {}
    for i, name in enumerate(names):
        stored = mo.stored(algo, seed=i)
        coarse = "weight_scale_2" if "weight_scale_2" in stored else "weight_scale"
        stored[coarse] = stored[coarse] * 4**i
        if "input_scale" in stored:  # one input, as exporters write it
            stored["input_scale"] = torch.tensor(0.01)
        tensors |= mo.named(stored, name)
    planned = mo.plan(write(tensors, mo.block(algo)))
    builder = Builder(plan=planned, dtype=torch.float64)
    members = [planned.members[n] for n in names]
    fused = builder.linear("qkv", members)
    assert type(fused) is QuantLinear
    x = torch.randn(7, mo.K, dtype=torch.float64)
    want = torch.cat([builder.linear(m.layer.name, [m])(x) for m in members], dim=-1)
    # float64 sums over 256 columns in another order
    assert torch.allclose(fused(x), want, rtol=1e-12, atol=1e-12)
    collapsed = [tensors[f"{n}.weight_scale{'_2' * ALGOS[algo].second}"] for n in names]
    assert len({float(c) for c in map(torch.max, collapsed)}) == 3


def test_experts_have_scales_of_their_own(mo, write):
    stem, experts, hidden, inner = "model.layers.0.mlp.experts", 3, 32, 48
    tensors = {}
    for e in range(experts):
        for i, (p, n, k) in enumerate(
            (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner))
        ):
            stored = mo.stored("NVFP4", n, k, seed=3 * e + i)
            stored["input_scale"] = torch.tensor(0.01 * (e + 1))
            stored["weight_scale_2"] = torch.tensor(0.001 * (e + 1))
            tensors |= mo.named(stored, f"{stem}.{e}.{p}_proj")
    planned = mo.plan(write(tensors, mo.block()))
    gate, up, down = (planned.members[f"{stem}.{p}_proj"] for p in ("gate", "up", "down"))
    builder = Builder(plan=planned, dtype=torch.float32)
    module = builder.experts("experts", gate=gate, up=up, down=down, activation=F.silu)

    def linear(member, e, x):
        from quant_core.kernels.activations import fake_quantize

        lt = read_matrix(planned, member, e)
        spec = member.scheme.operands["input"]
        return F.linear(fake_quantize(x, spec, lt.input_scale), lt.dequantize())

    x = torch.randn(6, hidden, generator=torch.Generator().manual_seed(0))
    got = module(x, torch.arange(6)[:, None] % experts, torch.ones(6, 1))
    for t in range(6):
        e, row = t % experts, x[t : t + 1]
        want = linear(down, e, F.silu(linear(gate, e, row)) * linear(up, e, row))
        # one row or several rows of a matmul: float32 sums in another order
        assert torch.allclose(got[t : t + 1], want, rtol=1e-4, atol=1e-6)


def test_plain_expert_in_a_quantized_stack_is_named(mo, write):
    stem = "model.layers.0.mlp.experts.{}.up_proj"
    tensors = mo.named(mo.stored("NVFP4"), stem.format(0))
    tensors[f"{stem.format(1)}.weight"] = torch.zeros(mo.N, mo.K)
    error = raises(CheckpointError, "Q-CKPT-MISMATCH", mo, write(tensors, mo.block()))
    assert error.tensor.startswith(stem.format(1))


def test_experts_stacked_in_one_tensor_are_refused(mo, write):
    weights = torch.zeros(2, mo.N, mo.K // 2, dtype=torch.uint8)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": weights}
    error = raises(CheckpointError, "Q-CKPT-MISMATCH", mo, write(tensors, mo.block()), "stacked")
    assert error.tensor in tensors


# -------------------------------------------------------------------------------------- the cache


def _cache(mo, model, *layers, quantized=True):
    attn = "model.layers.{}.self_attn.{}_proj"
    tensors = model()
    for i in (0, 1):
        for p in "kv":
            stored = mo.stored("NVFP4") if quantized else {"weight": torch.zeros(mo.N, mo.K)}
            if i in layers:
                stored[f"{p}_scale"] = torch.tensor(0.5)
            tensors |= mo.named(stored, attn.format(i, p))
    return tensors


@pytest.mark.parametrize("quantized", [True, False])
def test_scales_of_the_cache_are_accounted_for(mo, write, model, quantized):
    tensors = _cache(mo, model, 0, 1, quantized=quantized)
    planned = mo.plan(write(tensors, mo.block(kv_cache_scheme="NVFP4")))
    assert planned.warnings == [f"{KV_RULE} (2 attention modules)"]
    assert len(planned.ledger.skipped) == 4
    assert all(KV_RULE in rule for rule in planned.ledger.skipped.values())


def test_scales_of_the_cache_that_some_layers_lack_are_named(mo, write, model):
    error = raises(
        CheckpointError, "Q-TENSOR-MISSING", mo,
        write(_cache(mo, model, 1), mo.block(kv_cache_scheme="NVFP4")),
    )  # fmt: skip
    assert error.expected == [f"model.layers.0.self_attn.{p}_proj.{p}_scale" for p in "kv"]


def test_quantized_cache_without_scales_is_reported(mo, write, model):
    config = mo.block(kv_cache_scheme={"num_bits": 8, "type": "float"})
    (warning,) = mo.plan(write(_cache(mo, model), config)).warnings
    assert "the KV cache is FP8, but no scales are stored" in warning
