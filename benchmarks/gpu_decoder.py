"""One decode step over the modules of a Llama model, its layer compiled: for gpu_model.py.

Every candidate gets the same: q, k, v and gate, up as one matrix each, rotation, norms, gating and
softmax fused by ``torch.compile`` (one graph, compiled once for all layers), attention that reads
each key and value once for the heads that share it. What is left of a step is its matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_core.nn import QuantLinear
from quant_core.shared import joined

__all__ = ["Decoder", "grouped_attention"]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """q [B, H, 1, D] over k, v [B, Hkv, L, D], without a copy of them for each head.

    Args:
        hidden: bool, broadcast to [B, 1, 1, L]: positions that are not attended to.
    """
    b, h, _, d = q.shape
    groups = k.shape[1]
    scores = q.reshape(b, groups, h // groups, d) @ k.transpose(-1, -2)
    scores = (scores.float() * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1).to(q.dtype) @ v).reshape(b, h, 1, d)


class _Several(nn.Module):
    """Layers that are not one matrix, side by side."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def _one(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer with the outputs of all behind each other."""
    if all(isinstance(a, QuantLinear) for a in layers):
        made = joined(layers)  # type: ignore[arg-type]
        if made is not None:
            return made
        print(f"not one matrix, called one by one: {[str(a) for a in layers]}")
        return _Several(layers)
    weight = torch.cat([a.weight for a in layers])  # type: ignore[misc]
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    out.weight = nn.Parameter(weight, requires_grad=False)
    return out


class _Block(nn.Module):
    """What a step needs of a decoder layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _one([attention.q_proj, attention.k_proj, attention.v_proj])
        attention.q_proj = attention.k_proj = attention.v_proj = None
        self.gate_up = _one([mlp.gate_proj, mlp.up_proj])
        mlp.gate_proj = mlp.up_proj = None
        self.o, self.down = attention.o_proj, mlp.down_proj
        self.first, self.second = (
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
        )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def _layer(
    h: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor, at: Tensor, keys: Tensor, values: Tensor,
    block: _Block, eps: float,
) -> Tensor:  # fmt: skip
    b, groups, _, d = keys.shape
    width = groups * d
    x = F.rms_norm(h, h.shape[-1:], block.first, eps)
    qkv = block.qkv(x)
    q, k, v = qkv.split([qkv.shape[-1] - 2 * width, width, width], -1)
    q = _rotated(q.reshape(b, -1, 1, d), cos, sin)
    keys.index_copy_(2, at, _rotated(k.reshape(b, groups, 1, d), cos, sin))
    values.index_copy_(2, at, v.reshape(b, groups, 1, d))
    y = grouped_attention(q, keys, values, hidden, d**-0.5)
    h = h + block.o(y.reshape(b, 1, -1))
    gate, up = block.gate_up(F.rms_norm(h, h.shape[-1:], block.second, eps)).chunk(2, -1)
    return h + block.down(F.silu(gate) * up)


def _begin(table: Tensor, token: Tensor, at: Tensor, inv: Tensor, room: int) -> tuple[Tensor, ...]:
    h = F.embedding(token, table)
    angles = torch.cat([at[:, None].float() * inv] * 2, -1)
    hidden = torch.arange(room, device=at.device) > at
    return h, angles.cos().to(h.dtype), angles.sin().to(h.dtype), hidden


class Decoder:
    """Takes a model's layers apart, into joined ones; the model cannot be called afterwards."""

    def __init__(self, model: Any, *, compiled: bool) -> None:
        config = model.config
        self.blocks = [_Block(layer) for layer in model.model.layers]
        self.table, self.head = model.model.embed_tokens.weight, model.lm_head
        self.norm, self.eps = model.model.norm.weight, config.rms_norm_eps
        self.inv = model.model.rotary_emb.inv_freq.float()
        self.groups = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self._layer, self._begin = _layer, _begin
        if compiled:
            torch._dynamo.reset()
            self._layer = torch.compile(_layer, fullgraph=True, dynamic=False)
            self._begin = torch.compile(_begin, fullgraph=True, dynamic=False)

    def caches(self, batch: int, room: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, random: what they hold changes no time."""
        shape = (batch, self.groups, room, self.head_dim)
        made = {"dtype": self.table.dtype, "device": self.table.device}
        return [(torch.randn(shape, **made), torch.randn(shape, **made)) for _ in self.blocks]

    def step(self, token: Tensor, at: Tensor, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits [B, 1, V] of token [B, 1] at position ``at`` [1]; writes the caches."""
        room = caches[0][0].shape[2]
        h, cos, sin, hidden = self._begin(self.table, token, at, self.inv, room)
        for block, (keys, values) in zip(self.blocks, caches, strict=True):
            h = self._layer(h, cos, sin, hidden, at, keys, values, block, self.eps)
        return self.head(F.rms_norm(h, h.shape[-1:], self.norm, self.eps))
