"""Experts that a float checkpoint holds as 3-D stacks are quantized while they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.load import load_tensor
from quant_core.nn import QuantModule
from quant_core.online import OnlineRequest
from quant_core.online_plan import quantize_plan
from quant_core.online_stacks import StackLayout, stack_parts
from quant_core.plan import plan

IDS = torch.arange(24).view(1, 24) % 61
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = "model.layers.{}.mlp.experts"


def gpt_oss() -> GptOssConfig:
    """Matrices [in, out], gate and up in turn, biases."""
    return GptOssConfig(**SIZES, num_local_experts=4, intermediate_size=32)


def qwen3_moe() -> Qwen3MoeConfig:
    """Matrices [out, in], gate before up, no biases."""
    return Qwen3MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=32, intermediate_size=96, norm_topk_prob=True
    )


def written(config, folder: Path):
    """The dense model, and its parameters stored under their own names."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({n: p.data for n, p in model.named_parameters()}, folder / "model.safetensors")
    return model.float()


def halves(stack: torch.Tensor, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of one expert as [out, in], from the model's own stack."""
    if isinstance(config, GptOssConfig):
        return stack[:, ::2].T, stack[:, 1::2].T
    return stack.chunk(2)


@pytest.mark.parametrize("make", [gpt_oss, qwen3_moe])
def test_stacked_experts_give_the_logits_of_the_rounded_dense_model(make, tmp_path):
    config = make()
    dense = written(config, tmp_path / "float")
    packed = load_model(tmp_path / "float", online="mxfp4", dtype=torch.float32)
    stacks = [n for n, m in packed.named_modules() if isinstance(m, QuantModule) and "experts" in n]
    assert len(stacks) == 6
    packed.save_pretrained(tmp_path / "packed")
    saved = plan(open_checkpoint(tmp_path / "packed"))
    for layer in range(2):
        experts = dense.get_submodule(EXPERTS.format(layer))
        got = {
            role: load_tensor(saved, f"{EXPERTS.format(layer)}.{role}_proj").dequantize()
            for role in ("gate", "up", "down")
        }
        with torch.no_grad():
            for e in range(4):
                gate, up = halves(experts.gate_up_proj[e], config)
                down = experts.down_proj[e].T if make is gpt_oss else experts.down_proj[e]
                for name, own in (("gate", gate), ("up", up), ("down", down)):
                    # fp4 under the block's power of two: within a sixth of the block's largest
                    assert (got[name][e] - own).abs().max() < own.abs().max() / 5, name
                    own.copy_(got[name][e])
    for name, member in saved.quantized.items():
        if not member.layer.experts:
            with torch.no_grad():
                dense.get_submodule(name).weight.copy_(load_tensor(saved, name).dequantize())
    with torch.inference_mode():
        want, have = dense(IDS).logits, packed(IDS).logits
        # the same weights; kernels add in another order
        assert (want - have).abs().max() < 1e-3 * want.abs().max()
        again = load_model(tmp_path / "packed", dtype=torch.float32)(IDS).logits
    assert torch.equal(have, again)


def test_stacks_that_are_skipped_stay_as_they_are(tmp_path):
    written(gpt_oss(), tmp_path / "float")
    model = load_model(tmp_path / "float", online="mxfp4", skip=["experts"], dtype=torch.float32)
    assert type(model.get_submodule(EXPERTS.format(0))).__name__ == "GptOssExperts"


@pytest.mark.parametrize("make", [gpt_oss, qwen3_moe])
def test_a_stack_cut_the_other_way_would_give_other_logits(make, tmp_path, monkeypatch):
    """Negative control: gate and up read in turn where they follow each other, or the reverse."""
    import quant_core.engines.transformers_online as engine

    written(make(), tmp_path / "float")
    right = load_model(tmp_path / "float", online="mxfp4", dtype=torch.float32)
    honest = engine.StackLayout

    def other(*, transposed, in_turn):
        return honest(transposed=transposed, in_turn=not in_turn)

    monkeypatch.setattr(engine, "StackLayout", other)
    wrong = load_model(tmp_path / "float", online="mxfp4", dtype=torch.float32)
    with torch.inference_mode():
        a, b = right(IDS).logits, wrong(IDS).logits
    assert (a - b).abs().max() > 0.05 * a.abs().max()


def test_parts_of_a_stack_by_hand(tmp_path):
    """[E, H, 2I] with E = 2, H = 3, I = 2, in turn: up of expert 1 is every second column."""
    stack = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    save_file(
        {
            "m.experts.gate_up_proj": stack,
            "m.experts.down_proj": torch.zeros(2, 2, 3),
            "m.experts.gate_up_proj_bias": torch.arange(8.0).view(2, 4),
            "m.experts.down_proj_bias": torch.zeros(2, 3),
        },
        tmp_path / "model.safetensors",
    )
    source = plan(open_checkpoint(tmp_path))
    layouts = {"m.experts": StackLayout(transposed=True, in_turn=True)}
    gate, up, down = stack_parts(source, layouts)["m.experts"]
    assert [(p.layer.out_features, p.layer.in_features) for p in (gate, up, down)] == [
        (2, 3), (2, 3), (3, 2)
    ]  # fmt: skip
    weight, bias = up.params()
    index = tuple(1 if i == "expert" else i for i in weight.sources[0].index)
    assert source.checkpoint.read(weight.sources[0].name, index).tolist() == [
        [13, 15], [17, 19], [21, 23]
    ]  # fmt: skip
    index = tuple(1 if i == "expert" else i for i in bias.sources[0].index)
    assert source.checkpoint.read(bias.sources[0].name, index).tolist() == [5, 7]


def test_experts_that_the_engine_does_not_know_are_left_as_floats(tmp_path):
    written(gpt_oss(), tmp_path / "float")
    source = plan(open_checkpoint(tmp_path / "float"))
    online = quantize_plan(source, OnlineRequest(name="mxfp4"), lambda member: "")
    assert not [n for n in online.plan.quantized if "experts" in n]
    assert any("gate_up_proj" in rule for rule in online.kept)
