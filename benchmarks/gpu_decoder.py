"""One decode step over the modules of a Llama model, q, k, v and gate, up as one matrix each.

For gpu_model.py; every candidate gets the same pieces around its matrices:

fused     nine calls a layer: four products; attention with rotation and the cache's write; residual
          and norm as one, twice; the gate. Those between the products are the kernels that the plan
          picks (``quant_core.kernels.between``) and ``quant_triton::attention_decode``.
compiled  ``torch.compile`` of a layer (one graph, compiled once for all), attention that reads each
          key and value once for the heads that share it
eager     the same, not compiled: to try this on a CPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_core.kernels.between import gated_op, norm_op
from quant_core.kernels.choose import choose
from quant_core.kernels.device import device_key
from quant_core.nn import QuantLinear
from quant_core.registry import registry
from quant_core.shared import joined

__all__ = ["WAYS", "Decoder", "grouped_attention"]

WAYS = ("fused", "compiled", "eager")


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


def _attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor, at: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """What ``quant_triton::attention_decode`` does, in torch's operators; -> [B, H D]."""
    b, groups, _, d = keys.shape
    width = groups * d
    q, k, v = qkv.split([qkv.shape[-1] - 2 * width, width, width], -1)
    q = _rotated(q.reshape(b, -1, 1, d), cos, sin)
    keys.index_copy_(2, at, _rotated(k.reshape(b, groups, 1, d), cos, sin))
    values.index_copy_(2, at, v.reshape(b, groups, 1, d))
    return grouped_attention(q, keys, values, hidden, d**-0.5).reshape(b, -1)


def _layer(
    h: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor, at: Tensor, keys: Tensor, values: Tensor,
    block: _Block, eps: float,
) -> Tensor:  # fmt: skip
    x = F.rms_norm(h, h.shape[-1:], block.first, eps)
    h = h + block.o(_attend(block.qkv(x), cos, sin, hidden, at, keys, values))
    gate, up = block.gate_up(F.rms_norm(h, h.shape[-1:], block.second, eps)).chunk(2, -1)
    return h + block.down(F.silu(gate) * up)


def _begin(table: Tensor, token: Tensor, at: Tensor, inv: Tensor, room: int) -> tuple[Tensor, ...]:
    h = F.embedding(token, table)[:, 0]
    angles = torch.cat([at[:, None].float() * inv] * 2, -1)
    hidden = torch.arange(room, device=at.device) > at
    return h, angles.cos().to(h.dtype), angles.sin().to(h.dtype), hidden


class Decoder:
    """Takes a model's layers apart, into joined ones; the model cannot be called afterwards.

    Attributes:
        way: one of ``WAYS``; may be set between steps.
        kernels: name of each operation between the products and who runs it, for "fused".
    """

    def __init__(self, model: Any, *, way: str) -> None:
        config = model.config
        self.blocks = [_Block(layer) for layer in model.model.layers]
        self.table, self.head = model.model.embed_tokens.weight, model.lm_head
        self.norm, self.eps = model.model.norm.weight, config.rms_norm_eps
        self.inv = model.model.rotary_emb.inv_freq.float()
        self.groups = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.way = way
        torch._dynamo.reset()
        self._compiled = torch.compile(_layer, fullgraph=True, dynamic=False)
        self._compiled_begin = torch.compile(_begin, fullgraph=True, dynamic=False)
        dtype = str(self.table.dtype).removeprefix("torch.")
        device = device_key(str(self.table.device))
        ops = (
            norm_op(config.hidden_size, frozenset(), dtype, device),
            gated_op(config.intermediate_size, "silu", dtype, device),
        )
        choices = [choose(op, registry()) for op in ops]
        self._rms_norm, self._gated = (c.kernel.bind(c.op) for c in choices)
        self.kernels = {c.op.op: c.kernel.name for c in choices}
        self._attention: Callable[..., Tensor] | None = None
        if self.table.is_cuda:
            from quant_kernels_triton.attention_run import decode_step

            self._attention = decode_step

    def caches(self, batch: int, room: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, random: what they hold changes no time."""
        shape = (batch, self.groups, room, self.head_dim)
        made = {"dtype": self.table.dtype, "device": self.table.device}
        return [(torch.randn(shape, **made), torch.randn(shape, **made)) for _ in self.blocks]

    def step(self, token: Tensor, at: Tensor, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits [B, V] of token [B, 1] at position ``at`` [1]; writes the caches."""
        begin = _begin if self.way == "eager" else self._compiled_begin
        h, cos, sin, hidden = begin(self.table, token, at, self.inv, caches[0][0].shape[2])
        if self.way == "fused":
            return self._fused(h, cos, sin, hidden, at, caches)
        layer = _layer if self.way == "eager" else self._compiled
        for block, (keys, values) in zip(self.blocks, caches, strict=True):
            h = layer(h, cos, sin, hidden, at, keys, values, block, self.eps)
        return self.head(F.rms_norm(h, h.shape[-1:], self.norm, self.eps))

    def _fused(
        self, h: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor, at: Tensor,
        caches: list[tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        scale = self.head_dim**-0.5
        after = [block.first for block in self.blocks[1:]] + [self.norm]
        x = self._rms_norm([self.blocks[0].first], h, self.eps)
        for block, (keys, values), weight in zip(self.blocks, caches, after, strict=True):
            qkv = block.qkv(x)
            if self._attention is None:
                y = _attend(qkv, cos, sin, hidden, at, keys, values)
            else:
                y = self._attention(qkv, cos, sin, at, keys, values, None, scale)
            h, x = self._rms_norm([block.second], h, self.eps, block.o(y))
            gated = self._gated([], *block.gate_up(x).chunk(2, -1))
            h, x = self._rms_norm([weight], h, self.eps, block.down(gated))
        return self.head(x)

    def matrices(self, batch: int) -> Callable[[], Tensor]:
        """The products of a step alone, one behind the other: the floor of any way."""
        made = {"dtype": self.table.dtype, "device": self.table.device}
        first = self.blocks[0]
        x = torch.randn(batch, self.table.shape[1], **made)
        wide = torch.randn(batch, first.gate_up(x).shape[-1] // 2, **made)

        def run() -> Tensor:
            for block in self.blocks:
                block.qkv(x), block.o(x), block.gate_up(x), block.down(wide)
            return self.head(x)

        return run
