"""Model shapes of the transformers engine, each against a dense model of the same weights."""

from __future__ import annotations

import copy
import logging
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import (
    Concatenate,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from quant_core import load_model
from quant_core.errors import CheckpointError, LayoutError, QuantError
from quant_core.nn import QuantExperts, QuantLinear
from tiny_models import Tiny, make_tiny, pack_gptq

TOLERANCE = 2e-5  # float32 sums of a few hundred products in another order; logits are about 1
IDS = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(1))
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}


def qwen2(**changes: object) -> PreTrainedConfig:
    return Qwen2Config(**_SIZES | {"tie_word_embeddings": True} | changes)


def llama(**changes: object) -> PreTrainedConfig:
    return LlamaConfig(**_SIZES | {"tie_word_embeddings": False} | changes)


def qwen3_moe(**changes: object) -> PreTrainedConfig:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    extra = {"head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 1}
    return Qwen3MoeConfig(**_SIZES | sizes | extra | changes)


def deepseek_v3(**changes: object) -> PreTrainedConfig:
    sizes = {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    }
    return DeepseekV3Config(**_SIZES | sizes | changes)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def assert_same(tiny: Tiny, model: PreTrainedModel) -> None:
    want = logits(tiny.dense)
    assert want.abs().mean() > 0.1, "the comparison would see nothing"
    assert (logits(model) - want).abs().max() <= TOLERANCE * want.abs().max().clamp(min=1)
    assert not [n for n, t in model.state_dict().items() if t.is_meta]


@pytest.mark.parametrize("make", [qwen2, llama, qwen3_moe, deepseek_v3])
def test_load_model_equals_dense_model_of_the_dequantized_weights(
    make: object, tmp_path: Path
) -> None:
    tiny = make_tiny(tmp_path / "m", make())  # type: ignore[operator]
    assert_same(tiny, load_model(tiny.folder))


def test_wrong_scale_moves_logits_beyond_the_tolerance(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    name = "model.layers.0.mlp.down_proj.scales"
    tiny.tensors[name] = tiny.tensors[name].clone()
    tiny.tensors[name][0, 0] *= 1.1
    with pytest.raises(AssertionError):
        assert_same(tiny, load_model(tiny.write()))


def test_experts_stay_packed_and_router_stays_float(tmp_path: Path) -> None:
    model = load_model(make_tiny(tmp_path / "m", qwen3_moe()).folder)
    block = model.model.layers[0].mlp
    assert isinstance(block.experts, QuantExperts)
    assert block.gate.weight.dtype == torch.float32


def test_unquantized_experts_are_merged_into_one_parameter(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", qwen3_moe(), quantized=lambda n, kind: kind == "linear")
    model = load_model(tiny.folder)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 64, 64)
    assert_same(tiny, model)


def test_partly_quantized_experts_raise_mismatch(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", qwen3_moe(), quantized=lambda n, k: "down_proj" not in n)
    with pytest.raises(CheckpointError) as err:
        load_model(tiny.folder)
    assert err.value.code in ("Q-CKPT-MISMATCH", "Q-TENSOR-MISSING")
    assert "experts" in str(err.value)


# --------------------------------------------------------------------------------------- tied


def test_tied_dense_embedding_is_one_parameter(tmp_path: Path) -> None:
    model = load_model(make_tiny(tmp_path / "m", qwen2()).folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_packed_lm_head_of_a_tied_config_follows_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = make_tiny(tmp_path / "m", qwen2(), lm_head=True)
    head = torch.randn(96, 64, generator=torch.Generator().manual_seed(3))
    stored, dense = pack_gptq(head)
    tiny.tensors |= {f"lm_head.{leaf}": t for leaf, t in stored.items()}
    tiny.write()
    with caplog.at_level(logging.INFO, "quant_core"):
        model = load_model(tiny.folder)
    assert isinstance(model.lm_head, QuantLinear)
    assert not model.config.tie_word_embeddings
    assert "lm_head.weight" in caplog.text
    tiny.dense.lm_head.weight = torch.nn.Parameter(dense)
    assert_same(tiny, model)
    model.tie_weights()
    assert_same(tiny, model)


def _tied_file(folder: Path, config: PreTrainedConfig) -> Tiny:
    """A single-file container whose embedding is packed and serves as the output too."""
    import gguf

    torch.manual_seed(5)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config).eval()
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    with torch.no_grad():
        for name, p in model.state_dict().items():
            if name == "lm_head.weight":
                continue
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
                writer.add_tensor(stored, p.numpy())
                continue
            packed = gguf.quants.quantize(p.numpy(), gguf.GGMLQuantizationType.Q8_0)
            dense = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            p.copy_(torch.from_numpy(dense))
            writer.add_tensor(stored, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tiny(folder, model)


def test_packed_tied_embedding_is_held_once(tmp_path: Path) -> None:
    tiny = _tied_file(tmp_path / "m", qwen2())
    model = load_model(tiny.folder, kernels="torch_ref")
    assert isinstance(model.lm_head, QuantLinear)
    assert not model.lm_head.tensors
    assert model.model.embed_tokens.nbytes == 96 * 64 // 32 * 34
    assert_same(tiny, model)
    twin = copy.deepcopy(model)
    for t in model.model.embed_tokens.tensors.values():
        t.zero_()
    assert_same(tiny, twin)
    assert not logits(model).any()
    twin.tie_weights()
    assert_same(tiny, twin)


# -------------------------------------------------------------------------------------- biases


def test_bias_missing_from_the_file_is_named(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", qwen2())
    del tiny.tensors["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError) as err:
        load_model(tiny.write())
    assert err.value.code == "Q-TENSOR-MISSING"
    assert "model.layers.1.self_attn.k_proj.bias" in str(err.value)


def test_zero_bias_of_a_layer_without_bias_is_skipped_by_its_rule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    name = "model.layers.0.mlp.up_proj.bias"
    tiny.tensors[name] = torch.zeros(96, dtype=torch.float16)
    with caplog.at_level(logging.INFO, "quant_core"):
        model = load_model(tiny.write())
    assert "all-zero bias" in caplog.text
    assert name in caplog.text
    assert_same(tiny, model)


def test_nonzero_bias_of_a_layer_without_bias_is_unexpected(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    name = "model.layers.0.mlp.up_proj.bias"
    tiny.tensors[name] = torch.full((96,), 0.01, dtype=torch.float16)
    with pytest.raises(CheckpointError) as err:
        load_model(tiny.write())
    assert (err.value.code, name in str(err.value)) == ("Q-TENSOR-UNEXPECTED", True)


# ------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("make", [qwen2, qwen3_moe])
def test_dropping_or_renaming_any_tensor_raises_and_names_it(make: object, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", make(num_hidden_layers=1))  # type: ignore[operator]
    whole = dict(tiny.tensors)
    for name in whole:
        tiny.tensors = {n: t for n, t in whole.items() if n != name}
        renamed = f"{name.rpartition('.')[0]}.other"
        for tensors in (tiny.tensors, tiny.tensors | {renamed: whole[name]}):
            tiny.tensors = tensors
            with pytest.raises(QuantError) as err:
                load_model(tiny.write())
            module = name.rpartition(".")[0]
            assert module in str(err.value), (name, str(err.value))
    tiny.tensors = whole
    assert_same(tiny, load_model(tiny.write()))


def test_last_expert_missing_is_named(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", qwen3_moe(), quantized=lambda n, kind: kind == "linear")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tiny.tensors[name]
    with pytest.raises(CheckpointError) as err:
        load_model(tiny.write())
    assert (err.value.code, name in str(err.value)) == ("Q-TENSOR-MISSING", True)


def test_extra_tensors_are_all_named(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    extra = ["model.extra.weight", "model.layers.5.input_layernorm.weight"]
    tiny.tensors |= {n: torch.ones(64) for n in extra}
    with pytest.raises(CheckpointError) as err:
        load_model(tiny.write())
    assert err.value.code == "Q-TENSOR-UNEXPECTED"
    assert all(n in str(err.value) for n in extra)


def test_same_parameter_under_two_names_raises_duplicate(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    tiny.tensors["norm.weight"] = tiny.tensors["model.norm.weight"]
    with pytest.raises(CheckpointError) as err:
        load_model(tiny.write())
    assert err.value.code == "Q-TENSOR-DUPLICATE"
    assert "model.norm.weight" in str(err.value)


def test_announced_further_layers_and_rotary_tables_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = make_tiny(tmp_path / "m", deepseek_v3())
    extra = {n.replace("layers.1.", "layers.2."): t for n, t in tiny.tensors.items() if ".1." in n}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tiny.tensors |= {n: t for n, t in extra.items() if "layers.2." in n or "inv_freq" in n}
    tiny.write(num_nextn_predict_layers=1)
    with caplog.at_level(logging.INFO, "quant_core"):
        model = load_model(tiny.folder)
    assert "layers 2..2 are not part of the model" in caplog.text
    assert "computed by the model" in caplog.text
    assert_same(tiny, model)
    with pytest.raises(CheckpointError) as err:
        load_model(tiny.write(num_nextn_predict_layers=0))
    assert err.value.code == "Q-TENSOR-UNEXPECTED"


def test_fewer_layers_by_override_leave_the_rest_unread(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    model = load_model(tiny.folder, num_hidden_layers=1)
    assert len(model.model.layers) == 1
    del tiny.dense.model.layers[1]
    assert_same(tiny, model)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [({"intermediate_size": 128}, "mlp"), ({"vocab_size": 100}, "embed_tokens")],
)
def test_config_of_another_size_raises_shape_with_both_sizes(
    change: dict[str, int], tensor: str, tmp_path: Path
) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    with pytest.raises(LayoutError) as err:
        load_model(tiny.write(**change))
    assert err.value.code == "Q-LAYOUT-SHAPE"
    assert tensor in str(err.value)
    assert str(next(iter(change.values()))) in str(err.value)
    assert_same(tiny, load_model(tiny.write()))


# --------------------------------------------------------------------------- other names, fused


conversion_mapping = import_module("transformers.conversion_mapping")


def _mapping(monkeypatch: pytest.MonkeyPatch, *transforms: object) -> None:
    def mapping(*args: object, **kwargs: object) -> list[object]:
        return list(transforms)

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", mapping)


def _fused(target: str, *sources: str) -> WeightConverter:
    patterns = [f"{s}.weight" for s in sources]
    return WeightConverter(patterns, f"{target}.weight", [Concatenate(dim=0)])


@pytest.mark.parametrize("packed", [True, False])
def test_members_stored_apart_fill_and_leave_a_fused_layer(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny(
        tmp_path / "m",
        Phi3Config(**_SIZES, pad_token_id=0, tie_word_embeddings=False),
        quantized=lambda name, kind: packed,
        split={"qkv_proj": {"q": 64, "k": 32, "v": 32}, "gate_up_proj": {"gate": 96, "up": 96}},
    )
    attention = [f"self_attn.{x}_proj" for x in "qkv"]
    _mapping(
        monkeypatch,
        _fused("self_attn.qkv_proj", *attention),
        _fused("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
    )
    assert any("k_proj" in n for n in tiny.tensors)
    model = load_model(tiny.folder)
    assert_same(tiny, model)
    model.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == set(tiny.tensors)
    assert all(torch.equal(saved[n], t) for n, t in tiny.tensors.items())


def test_renamings_of_transformers_apply_to_packed_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    tiny.tensors = {n.replace("self_attn", "attention"): t for n, t in tiny.tensors.items()}
    _mapping(monkeypatch, WeightRenaming(r"\.attention\.", ".self_attn."))
    assert_same(tiny, load_model(tiny.write()))


def test_converter_that_is_not_understood_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    norm = "input_layernorm.weight"
    _mapping(monkeypatch, WeightConverter(norm, norm, [Transpose(0, 0)]))
    with pytest.raises(LayoutError, match="Transpose") as err:
        load_model(tiny.folder)
    assert err.value.code == "Q-ENGINE-CONVERTER"


def test_packed_layer_that_is_no_linear_is_refused_by_name(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "m", qwen3_moe(num_experts=8))
    for router in ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate"):
        stored, _ = pack_gptq(tiny.tensors.pop(f"{router}.weight"))
        tiny.tensors |= {f"{router}.{leaf}": t for leaf, t in stored.items()}
    with pytest.raises(LayoutError, match=r"layers\.0\.mlp\.gate: is a Qwen3MoeTopKRouter") as err:
        load_model(tiny.write())
    assert err.value.code == "Q-ENGINE-MODULE"


def test_moe_saves_the_same_bytes(tmp_path: Path) -> None:
    for name, choose in (("a", lambda n, kind: kind != "other"), ("b", lambda n, k: k == "linear")):
        tiny = make_tiny(tmp_path / name, deepseek_v3(), quantized=choose)
        load_model(tiny.folder).save_pretrained(tmp_path / f"{name}-out")
        saved = load_file(tmp_path / f"{name}-out" / "model.safetensors")
        assert set(saved) == set(tiny.tensors)
        assert all(torch.equal(saved[n], t) for n, t in tiny.tensors.items())


def test_saving_keeps_what_a_rule_left_unread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = make_tiny(tmp_path / "m", llama())
    extra = {"model.layers.0.mlp.up_proj.bias": torch.zeros(96, dtype=torch.float16)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tiny.tensors |= extra
    model = load_model(tiny.write())
    model.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[n], t) for n, t in tiny.tensors.items())
    shutil.rmtree(tiny.folder)
    model.save_pretrained(tmp_path / "alone")
    assert "not saved" in caplog.text
    assert_same(tiny, load_model(tmp_path / "alone"))
