"""An engine in one file: a Llama with modules of its own runs every format that is installed.

docs/engines/sharing.md says step by step what an adapter does. Here: no cache, no batch, one rank.

    python examples/engine.py tests/fixtures/gptqmodel-awq-gemm-g128
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_core.build import Builder
from quant_core.engines.complete import check_biases
from quant_core.engines.packed import attach, bind_embedding, bind_linear, neutral
from quant_core.engines.sharing import Account, Names, Options, Piece, open_plan
from quant_core.load import read_parameter
from quant_core.plan import member_parts

FUSED = {"qkv": ["q_proj", "k_proj", "v_proj"], "gate_up": ["gate_proj", "up_proj"]}


class Layer(nn.Module):
    """A linear layer or an embedding, packed where the checkpoint has it so."""

    def __init__(self, engine: Engine, module: str) -> None:
        super().__init__()
        members = engine.names.of(module, FUSED)
        if not members:
            raise ValueError(f"{module}: not in the checkpoint, expected every layer of a Llama.")
        engine.account.take(module, members)
        self.weight, self.packed = None, None
        if not any(m.quantized for m in members):
            self.weight = torch.cat([engine.read(f"{m.layer.name}.weight") for m in members])
        elif members[0].layer.kind == "embedding":
            part = bind_embedding(engine.builder, module, Piece.whole(members[0]))
            self.packed = attach(module, self, [part])
        else:
            check_biases(engine.plan, module, members, wanted=False)
            parts = bind_linear(engine.builder, module, [Piece.whole(m) for m in members])
            self.packed = attach(module, self, parts)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.packed is None else self.packed.call_linear(x)

    def rows(self, ids: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        if self.packed is None:
            return F.embedding(ids, self.weight)
        return self.packed.call_embedding(ids, k, dtype)


class Engine(nn.Module):
    """ids [1, T] -> logits [1, T, vocabulary]; q, k, v and gate, up are one layer each."""

    def __init__(self, path: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with neutral():
            self.plan = open_plan(path, Options())
            self.names, self.account = Names(self.plan), Account(self.plan)
            self.builder = Builder(plan=self.plan, device="cpu", dtype=dtype)
            self.dtype, self.config = dtype, self.plan.checkpoint.config
            self.embedding = Layer(self, "model.embed_tokens")
            self.blocks = nn.ModuleList(
                nn.ModuleDict({n: Layer(self, f"model.layers.{i}.{p}.{n}") for n, p in _PLACES})
                for i in range(self.config["num_hidden_layers"])
            )
            tied = self.config.get("tie_word_embeddings") and "lm_head" not in self.plan.members
            self.head = self.embedding if tied else Layer(self, "lm_head")
            self.norms = {n: self.read(n) for n in self.plan.dense if n.endswith("norm.weight")}
            for member in self.plan.attention.values():  # scales of a quantized cache
                for _, stored, _, _ in member_parts(member):
                    self.plan.ledger.skip(stored, "this engine has no cache")
            self.account.check()
            self.plan.ledger.check_loaded()

    def read(self, name: str) -> Tensor:
        return read_parameter(self.plan, name).to(self.dtype)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norms[name], self.config["rms_norm_eps"])

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        c, t = self.config, ids.shape[1]
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        d = c.get("head_dim") or c["hidden_size"] // heads
        base = (c.get("rope_parameters") or c)["rope_theta"]
        angle = torch.arange(t)[:, None] / base ** (torch.arange(0, d, 2) / d)
        cos, sin = (torch.cat([f(angle)] * 2, -1).to(self.dtype) for f in (torch.cos, torch.sin))

        def turn(y: Tensor) -> Tensor:
            return y * cos + torch.cat([-y[..., d // 2 :], y[..., : d // 2]], -1) * sin

        x = self.embedding.rows(ids, c["hidden_size"], self.dtype)
        for i, block in enumerate(self.blocks):
            name = f"model.layers.{i}"
            qkv = block["qkv"](self.norm(f"{name}.input_layernorm.weight", x))
            q, k, v = qkv.view(1, t, -1, d).transpose(1, 2).split([heads, kv, kv], 1)
            y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
            x = x + block["o_proj"](y.transpose(1, 2).flatten(2))
            h = block["gate_up"](self.norm(f"{name}.post_attention_layernorm.weight", x))
            gate, up = h.chunk(2, -1)
            x = x + block["down_proj"](F.silu(gate) * up)
        return self.head(self.norm("model.norm.weight", x))


_PLACES = (("qkv", "self_attn"), ("o_proj", "self_attn"), ("gate_up", "mlp"), ("down_proj", "mlp"))


if __name__ == "__main__":
    found = Engine(sys.argv[1])(torch.arange(8)[None])
    print(f"{tuple(found.shape)} logits, most likely next: {found[0].argmax(-1).tolist()}")
