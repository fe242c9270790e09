"""Ranks, one after the other: their parts are those of the whole layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from sglang_serving import published, without_notes
from torch import Tensor

from checkpoint_sets import FIXTURES, SHARED
from quant_core.engines.sglang_config import QuantCoreConfig

ACT_ORDER = FIXTURES / "gptqmodel-4bit-g128-asym-descact"


def place(tp: tuple[int, int], **moe: tuple[int, int]) -> Any:
    """As if this process were one of several; no group that talks to them."""
    from sglang.srt.runtime_context import get_parallel

    sizes: dict[str, Any] = {}
    for name, (at, of) in {"tp": tp, "attn_tp": tp, **moe}.items():
        sizes |= {f"{name}_rank": at, f"{name}_size": of, f"{name}_group": None}
    return get_parallel().override(**sizes)


def rank(config: QuantCoreConfig, make: Any, at: int, of: int) -> Any:
    """One layer as rank ``at`` of ``of`` builds and loads it."""
    with place(tp=(at, of), moe_tp=(at, of)), torch.no_grad():
        layer = make(config)
        config.checked = True  # one layer alone is no model
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def qkv(config: QuantCoreConfig) -> Any:
    from sglang.srt.layers.linear import QKVParallelLinear

    text = config.plan.checkpoint.config
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
    size = text["hidden_size"]
    return QKVParallelLinear(
        size, text.get("head_dim") or size // heads, heads, kv, bias=False, quant_config=config,
        params_dtype=torch.float32, prefix="model.layers.0.self_attn.qkv_proj",
    )  # fmt: skip


def gate_up(config: QuantCoreConfig) -> Any:
    from sglang.srt.layers.linear import MergedColumnParallelLinear

    text = config.plan.checkpoint.config
    return MergedColumnParallelLinear(
        text["hidden_size"], [text["intermediate_size"]] * 2, bias=False, quant_config=config,
        params_dtype=torch.float32, prefix="model.layers.0.mlp.gate_up_proj",
    )  # fmt: skip


def down(config: QuantCoreConfig) -> Any:
    from sglang.srt.layers.linear import RowParallelLinear

    text = config.plan.checkpoint.config
    return RowParallelLinear(
        text["intermediate_size"], text["hidden_size"], bias=False, quant_config=config,
        params_dtype=torch.float32, prefix="model.layers.0.mlp.down_proj",
    )  # fmt: skip


def weight(layer: Any, k: int) -> Tensor:
    """The dense weight, out of the layer's own method."""
    with torch.no_grad():
        return layer.quant_method.apply(layer, torch.eye(k)).T.clone()


def test_parts_of_ranks_are_parts_of_the_whole(tmp_path: Path) -> None:
    with published(without_notes(ACT_ORDER, tmp_path / "model")) as served:
        config = QuantCoreConfig(model=served.model_path)
        text = config.plan.checkpoint.config
        k, inner = text["hidden_size"], text["intermediate_size"]
        whole = {make: rank(config, make, 0, 1) for make in (qkv, gate_up, down)}
        parts = {make: [rank(config, make, r, 2) for r in range(2)] for make in whole}
        want = weight(whole[gate_up], k).view(2, 2, inner // 2, k)
        for r, layer in enumerate(parts[gate_up]):
            assert torch.equal(weight(layer, k), want[:, r].reshape(-1, k))
        want = weight(whole[down], inner)
        got = torch.cat([weight(layer, inner // 2) for layer in parts[down]], dim=1)
        assert torch.equal(got, want)
        sizes = whole[qkv].output_sizes
        members = weight(whole[qkv], k).split(sizes)
        for r, layer in enumerate(parts[qkv]):
            got_members = weight(layer, k).split(layer.output_partition_sizes)
            for got, member in zip(got_members, members, strict=True):
                assert torch.equal(got, member.chunk(2)[r])


def test_key_heads_fewer_than_ranks_are_held_by_several(tmp_path: Path) -> None:
    with published(without_notes(ACT_ORDER, tmp_path / "model")) as served:
        config = QuantCoreConfig(model=served.model_path)
        text = config.plan.checkpoint.config
        heads, kv, k = (
            text["num_attention_heads"], text["num_key_value_heads"], text["hidden_size"]
        )  # fmt: skip
        if heads <= kv:
            pytest.skip("as many key heads as heads")
        layer = rank(config, qkv, heads - 1, heads)
        whole = weight(rank(config, qkv, 0, 1), k)
        _, keys, values = layer.output_partition_sizes
        got = weight(layer, k)
    assert torch.equal(got[-values:], whole[-values:])
    assert layer.num_kv_head_replicas == heads // kv
    assert keys == values


@pytest.mark.shared
def test_expert_parallel_ranks_add_up(tmp_path: Path) -> None:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    folder = without_notes(SHARED / "ar-moe-w4g64", tmp_path / "model")
    with published(folder) as served, torch.no_grad():
        config = QuantCoreConfig(model=served.model_path)
        text = config.plan.checkpoint.config
        count, size = served.hf_config.num_experts, text["hidden_size"]
        g = torch.Generator().manual_seed(0)
        x = torch.randn(9, size, generator=g)
        index = torch.rand(9, count, generator=g).topk(2).indices
        weights = torch.rand(9, 2, generator=g)

        def experts(ranks: int, at: int) -> Tensor:
            with place(tp=(at, ranks), moe_ep=(at, ranks)):
                layer = FusedMoE(
                    count, size, text["moe_intermediate_size"], 0, top_k=2, quant_config=config,
                    params_dtype=torch.float32, prefix="model.layers.0.mlp.experts",
                )  # fmt: skip
                config.checked = True
                layer.quant_method.process_weights_after_loading(layer)
                assert layer.num_local_experts == count // ranks
                topk = StandardTopKOutput(weights, index, weights)
                out = layer.dispatcher.dispatch(x, topk)
            assert isinstance(out, StandardDispatchOutput)
            return layer.quant_method.apply(layer, out).hidden_states

        whole = experts(1, 0)
        parts = [experts(2, at) for at in range(2)]
    assert (sum(parts) - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert all(part.abs().max() > 0 for part in parts)


def table(config: QuantCoreConfig) -> Any:
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    text = config.plan.checkpoint.tensors["token_embd.weight"].shape
    return VocabParallelEmbedding(
        text[0], text[1], params_dtype=torch.float32, quant_config=config,
        prefix="model.embed_tokens",
    )  # fmt: skip


def head(config: QuantCoreConfig) -> Any:
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    size, width = config.plan.checkpoint.tensors["token_embd.weight"].shape
    return ParallelLMHead(
        size, width, params_dtype=torch.float32, quant_config=config, prefix="lm_head"
    )


def test_packed_table_gives_rows_and_logits_of_every_rank(tmp_path: Path) -> None:
    """The layer alone, without a loader."""
    from quant_core import load_tensor
    from quant_core.dequantize import dequantize

    folder = without_notes(FIXTURES / "gguf-llama-q4_k_m", tmp_path / "model")
    dense = dequantize(load_tensor(folder, "model.embed_tokens").matrices[0].weight)
    ids = torch.tensor([3, 0, len(dense) - 1, 17])
    x = torch.randn(2, dense.shape[1], generator=torch.Generator().manual_seed(0))
    allowed = mock.patch("quant_core.engines.sglang_config._check_container")
    with allowed, published(ACT_ORDER), torch.no_grad():
        config = QuantCoreConfig(model=str(folder))
        whole = rank(config, table, 0, 1)
        del config.names.members["lm_head"]  # as in a checkpoint that ties it
        tied = rank(config, head, 0, 1)
        again = tied.quant_method.apply(tied, x)[:, : len(dense)]
        parts = [rank(config, table, at, 2) for at in range(2)]
        rows = whole.quant_method.embedding(whole, ids)
        logits = whole.quant_method.apply(whole, x)[:, : len(dense)]
        halves = [p.quant_method.apply(p, x) for p in parts]
    assert torch.equal(rows, dense[ids])
    assert torch.equal(again, logits)
    assert not tied.weight.numel()
    assert (logits - x @ dense.T).abs().max() <= 1e-4 * logits.abs().max()
    assert torch.equal(torch.cat(halves, dim=1)[:, : len(dense)], logits)
