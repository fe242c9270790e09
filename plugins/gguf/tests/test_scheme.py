"""From a stored tensor to a scheme, to canonical tensors, and back to the same bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import CheckpointError, LayoutError
from quant_core.load import read_matrix
from quant_core.plan import plan
from quant_core.spec import EXPERT, LayerDesc, Source, Span, Unquantized
from quant_plugin_gguf.blocks import split_rows
from quant_plugin_gguf.scheme import scheme_for

META = {
    "general.architecture": "llama",
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}
Q, EXPS = "blk.0.attn_q", "blk.0.ffn_up_exps"


@pytest.fixture
def model(gguf, random_rows):
    """A llama file with one of each: permuted q with bias, experts, opaque v, float k."""

    def rows(name, size, n, blocks):
        return random_rows(name, size, n, blocks).tobytes()

    bias = np.arange(16, dtype=np.float32)
    tensors = [
        ("token_embd.weight", "q8_0", (8, 256), rows("q8_0", 34, 8, 8)),
        (f"{Q}.weight", "q4_k", (16, 256), rows("q4_k", 144, 16, 1)),
        (f"{Q}.bias", "f32", (16,), bias.tobytes()),
        ("blk.0.attn_k.weight", "f16", (8, 256), bytes(4096)),
        ("blk.0.attn_v.weight", "iq3_s", (8, 256), rows("iq3_s", 110, 8, 1)),
        (f"{EXPS}.weight", "mxfp4", (3, 16, 64), rows("mxfp4", 17, 48, 2)),
        ("blk.0.ffn_down.weight", "nvfp4", (8, 128), rows("nvfp4", 36, 8, 2)),
        ("blk.0.ffn_down.scale", "f32", (1,), np.float32([0.3]).tobytes()),
    ]
    return open_checkpoint(gguf.write(gguf.model(tensors, META)))


def _member(checkpoint, name):
    m = plan(checkpoint).members[name]
    return m.layer, m.scheme


def test_types_decide_schemes_and_nothing_is_left_over(model):
    p = plan(model)
    names = {n: m.scheme.name for n, m in p.members.items() if m.quantized}
    assert names == {
        "model.embed_tokens": "q8_0",
        "model.layers.0.self_attn.q_proj": "q4_k",
        "model.layers.0.self_attn.v_proj": "iq3_s",
        "model.layers.0.mlp.experts.up_proj": "mxfp4",
        "model.layers.0.mlp.down_proj": "nvfp4",
    }
    k = p.members["model.layers.0.self_attn.k_proj"].scheme
    assert k == Unquantized(rule="stored as float", evidence="blk.0.attn_k.weight is float16")
    assert p.ledger.unclaimed() == []
    assert p.match.evidence.startswith("GGUF version 3, architecture 'llama'")


def test_q_rows_and_bias_come_in_model_order_and_go_back(model):
    layer, scheme = _member(model, "model.layers.0.self_attn.q_proj")
    stored = {leaf: model.read(f"{Q}.{leaf}") for leaf in ("weight", "bias")}
    lt = scheme.canonicalize(layer, stored)
    heads = torch.arange(16).view(4, 2, 2).transpose(1, 2).flatten()
    assert torch.equal(lt.bias, stored["bias"][heads])
    whole = split_rows(stored["weight"], "q4_k").dequantize()
    assert torch.equal(lt.dequantize(), whole[heads])
    assert not torch.equal(lt.dequantize(), whole)  # negative control
    back = scheme.serialize(layer, lt)
    assert set(back) == {"weight", "bias"}
    assert all(torch.equal(back[n], stored[n]) for n in stored)


def test_experts_are_read_one_by_one_from_the_stack(model):
    layer, scheme = _member(model, "model.layers.0.mlp.experts.up_proj")
    assert layer.experts == (0, 1, 2)
    (param,) = scheme.params(layer)
    assert (param.shape, param.dtypes) == ((16, 64), ("mxfp4",))
    assert param.sources == (Source(name=f"{EXPS}.weight", index=(EXPERT,)),)
    rows = model.read(f"{EXPS}.weight", (2,))
    lt = scheme.canonicalize(layer, {"weight": rows})
    assert torch.equal(lt.dequantize(), model.read_parameter(f"{EXPS}.weight")[2])
    assert torch.equal(scheme.serialize(layer, lt)["weight"], rows)


def test_opaque_rows_stay_bytes(model):
    layer, scheme = _member(model, "model.layers.0.self_attn.v_proj")
    rows = model.read("blk.0.attn_v.weight")
    lt = scheme.canonicalize(layer, {"weight": rows})
    assert lt.weight.spec.blocks == "gguf_iq3_s"
    assert lt.weight.codes is rows
    assert torch.equal(lt.dequantize(), model.read_parameter("blk.0.attn_v.weight"))
    assert torch.equal(scheme.serialize(layer, lt)["weight"], rows)


def test_nvfp4_tensor_scale_is_a_factor_of_its_own(model):
    layer, scheme = _member(model, "model.layers.0.mlp.down_proj")
    stored = {leaf: model.read(f"blk.0.ffn_down.{leaf}") for leaf in ("weight", "scale")}
    lt = scheme.canonicalize(layer, stored)
    assert [s.element for s in lt.weight.spec.scales] == ["fp8_e4m3", "f32"]
    alone = split_rows(stored["weight"], "nvfp4").dequantize()
    assert (lt.dequantize() / alone).nanmean().item() == pytest.approx(0.3, rel=1e-6)
    back = scheme.serialize(layer, lt)
    assert all(torch.equal(back[n], stored[n]) for n in stored)


def test_absent_output_is_no_member_and_claims_nothing(model):
    """Tying is the engine's: the embedding's bytes have one owner in the ledger."""
    p = plan(model)
    assert "lm_head" not in p.members
    assert p.ledger.claims[("token_embd.weight", ())] == "model.embed_tokens"
    layer = LayerDesc(kind="linear", name="lm_head", stored="output", tied_to="model.embed_tokens")
    with pytest.raises(CheckpointError, match=r"output\.weight"):
        scheme_for(p.match, layer, model)


def test_missing_weight_and_wrong_sizes_are_errors(model):
    match = plan(model).match
    nothing = LayerDesc(kind="linear", name="x", stored="blk.7.attn_q")
    with pytest.raises(CheckpointError) as err:
        scheme_for(match, nothing, model)
    assert err.value.code == "Q-TENSOR-MISSING"
    for layer in (
        LayerDesc(kind="linear", name="q", stored=Q, inp=Span.whole(512), out=Span.whole(16)),
        LayerDesc(kind="linear", name="q", stored=Q, inp=Span.whole(256), out=Span.whole(8)),
        LayerDesc(kind="experts", name="q", stored=Q, experts=(0, 1)),
        LayerDesc(kind="linear", name="up", stored=EXPS),
    ):
        with pytest.raises(LayoutError) as err:
            scheme_for(match, layer, model)
        assert err.value.code == "Q-LAYOUT-SHAPE"


def test_canonicalize_refuses_rows_of_another_length(model):
    layer, scheme = _member(model, "model.layers.0.self_attn.q_proj")
    with pytest.raises(LayoutError) as err:
        scheme.canonicalize(layer, {"weight": model.read(f"{Q}.weight")[:, :-1]})
    assert err.value.code == "Q-LAYOUT-SHAPE"


@pytest.mark.parametrize(
    ("name", "at", "raw"),
    [
        ("q4_0", 0, b"\x00\x7c"),  # inf
        ("q8_0", 0, b"\x01\x7e"),  # NaN
        ("q4_k", 2, b"\x00\xfc"),  # minimum -inf
        ("mxfp4", 0, b"\xff"),  # e8m0 NaN
        ("nvfp4", 1, b"\x90"),  # a sign bit
    ],
)
def test_loading_a_broken_scale_raises_value_scale(gguf, random_rows, name, at, raw):
    _, weights, size = gguf.TYPES[name]
    rows = random_rows(name, size, 4, 2)
    tensors = [("blk.0.ffn_up.weight", name, (4, 2 * weights), rows.tobytes())]
    good = plan(open_checkpoint(gguf.write(gguf.model(tensors, META), "good.gguf")))
    member = good.members["model.layers.0.mlp.up_proj"]
    assert torch.isfinite(read_matrix(good, member).dequantize()).all()  # negative control
    rows[1, size + at : size + at + len(raw)] = list(raw)
    tensors = [(*tensors[0][:3], rows.tobytes())]
    bad = plan(open_checkpoint(gguf.write(gguf.model(tensors, META), "bad.gguf")))
    with pytest.raises(LayoutError, match=r"blk\.0\.ffn_up") as err:
        read_matrix(bad, bad.members["model.layers.0.mlp.up_proj"])
    assert err.value.code == "Q-VALUE-SCALE"


def test_serialize_refuses_what_the_type_cannot_hold(model):
    layer, scheme = _member(model, "model.layers.0.self_attn.q_proj")
    stored = {leaf: model.read(f"{Q}.{leaf}") for leaf in ("weight", "bias")}
    lt = scheme.canonicalize(layer, stored)
    other = split_rows(model.read("token_embd.weight"), "q8_0")
    for changed in (
        replace(lt, bias=None),
        replace(lt, out_scale=torch.ones(16)),
        replace(lt, input_scale=torch.ones(1)),
        replace(lt, operands={"weight": other}),
        replace(lt, operands={"weight": replace(lt.weight, shape=(8, 256))}),
    ):
        with pytest.raises(LayoutError) as err:
            scheme.serialize(layer, changed)
        assert err.value.code == "Q-LAYOUT-REPRESENT"
    assert torch.equal(scheme.serialize(layer, lt)["weight"], stored["weight"])
