"""Names against the gguf package's own table; refused architectures; row order of q and k."""

from __future__ import annotations

import gguf as oracle
import pytest
import torch

from quant_core.errors import FormatError, LayoutError
from quant_plugin_gguf.names import ARCHITECTURES, REFUSED, architecture
from quant_plugin_gguf.rows import to_public_rows, to_stored_rows


def _theirs(arch: str):
    (key,) = [k for k, v in oracle.MODEL_ARCH_NAMES.items() if v == arch]
    return key, oracle.get_tensor_name_map(key, 3)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_public_names_are_mapped_back_by_gguf_package(arch):
    ours, (key, table) = ARCHITECTURES[arch], _theirs(arch)
    tied = oracle.MODEL_TENSOR.OUTPUT not in oracle.MODEL_TENSORS[key]  # gemma, gemma2
    top = ["token_embd", "output_norm"] + ([] if tied else ["output"])
    modules = [*top, *(f"blk.2.{m}" for m in ours.layer)]
    for stored in modules:
        if stored.endswith("exp_probs_b"):
            continue
        public = ours.public_name(f"{stored}.weight")
        assert public is not None
        assert table.get_name(public, try_suffixes=(".weight",)) == f"{stored}.weight"
        assert ours.stored_name(public) == f"{stored}.weight"


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_tensor_of_the_architecture_is_named_or_known(arch):
    ours, (key, _) = ARCHITECTURES[arch], _theirs(arch)
    unused = {"blk.0.attn_rot_embd"}  # written by no converter
    if arch == "phi3":  # its attn_qkv holds all three
        unused |= {"blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"}
    for t in oracle.MODEL_TENSORS[key]:
        name = oracle.TENSOR_NAMES[t].format(bid=0)
        known = ours.public_name(f"{name}.weight") or f"{name}.weight" in ours.factors
        assert known or name in unused, name


def test_public_names_of_the_contract():
    llama, moe = ARCHITECTURES["llama"], ARCHITECTURES["qwen2moe"]
    pairs = {
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.11.attn_q.bias": "model.layers.11.self_attn.q_proj.bias",
        "blk.0.ffn_gate_exps.weight": "model.layers.0.mlp.experts.gate_proj.weight",
        "blk.0.ffn_gate_inp.weight": "model.layers.0.mlp.gate.weight",
        "blk.0.exp_probs_b.bias": "model.layers.0.mlp.gate.e_score_correction_bias",
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }
    for stored, public in pairs.items():
        assert llama.public_name(stored) == public
        assert llama.stored_name(public) == stored
    shared = "model.layers.0.mlp.shared_expert.up_proj.weight"
    assert moe.public_name("blk.0.ffn_up_shexp.weight") == shared
    assert llama.public_name("blk.0.ssm_a") is None
    assert llama.public_name("rope_freqs.weight") is None
    assert llama.stored_name("model.layers.0.mlp.nothing.weight") is None
    assert llama.stored_name("visual.patch.weight") is None


@pytest.mark.parametrize("name", [*sorted(REFUSED), "no-such-arch", None, 7])
def test_architecture_not_listed_raises_naming_it_and_the_known_ones(name):
    with pytest.raises(FormatError) as err:
        architecture(name, "m.gguf")
    assert err.value.code == "Q-GGUF-ARCH"
    assert repr(name) in str(err.value)
    assert "qwen3moe" in str(err.value)
    assert REFUSED.get(name, "") in str(err.value)


def test_refused_and_known_architectures_are_disjoint_and_real():
    assert not set(REFUSED) & set(ARCHITECTURES)
    real = {*oracle.MODEL_ARCH_NAMES.values(), "clip"}
    assert set(REFUSED) <= real
    assert set(ARCHITECTURES) <= real


def test_row_order_worked_vector():
    """h = 2, D = 8: stored row r holds the model's row ..."""
    order = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    stored = torch.tensor(order)
    assert to_public_rows(stored, 2).tolist() == list(range(16))
    assert to_stored_rows(torch.arange(16), 2).tolist() == order
    rows = stored[:, None] * torch.ones(1, 5, dtype=torch.int64)
    assert to_public_rows(rows, 2)[:, 3].tolist() == list(range(16))
    assert to_public_rows(stored, 4).tolist() != list(range(16))  # negative control


def test_row_order_heads_that_do_not_divide_raise_layout_error():
    with pytest.raises(LayoutError) as err:
        to_public_rows(torch.zeros(18, 4), 4, "blk.0.attn_q.weight")
    assert err.value.code == "Q-LAYOUT-SHAPE"
    assert "blk.0.attn_q.weight" in str(err.value)
