"""Tiny random checkpoints of model shapes that no fixture has, with a dense twin to compare.

The packer here is written for the tests from the published layout (words of eight 4-bit codes,
low bits first; zero points stored minus one) and shares no code with the plugin it tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

__all__ = ["GROUP", "LLAMA_SIZES", "Tiny", "make_tiny", "pack_gptq", "stored_names"]

GROUP = 32
LLAMA_SIZES: Mapping[str, Any] = MappingProxyType({
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.15, "tie_word_embeddings": False, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
})  # fmt: skip
_BLOCK = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}


def _words(codes: torch.Tensor) -> torch.Tensor:
    """codes (R, C) along the rows -> int32 (R / 8, C), code i of a word in bits 4i..4i+3."""
    c = codes.reshape(-1, 8, codes.shape[1]).to(torch.int64)
    word = sum(c[:, i] << (4 * i) for i in range(8))
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def pack_gptq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """float32 weight (N, K) -> stored tensors, and the float32 weight they stand for."""
    n, k = weight.shape
    w = weight.float().view(n, k // GROUP, GROUP)
    low, high = w.amin(-1), w.amax(-1)
    scales = ((high - low) / 14).half()
    zeros = torch.round(-low / scales.float()).clamp(1, 15)
    codes = torch.round(w / scales.float()[..., None] + zeros[..., None]).clamp(0, 15)
    dense = (codes - zeros[..., None]) * scales.float()[..., None]
    stored = {
        "qweight": _words(codes.view(n, k).T.contiguous()),
        "qzeros": _words((zeros - 1).contiguous()).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(k) // GROUP).int(),
    }
    return stored, dense.view(n, k)


@dataclass
class Tiny:
    """A checkpoint folder and the float32 model of the same weights."""

    folder: Path
    dense: PreTrainedModel
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path | None = None, **changes: Any) -> Path:
        """Write the checkpoint, with config keys changed; to another folder if asked."""
        folder = folder or self.folder
        folder.mkdir(exist_ok=True)
        tensors = {n: t.contiguous().clone() for n, t in self.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config | changes))
        return folder


def stored_names(model: PreTrainedModel) -> Iterable[tuple[str, torch.Tensor, str]]:
    """(name in a checkpoint, view of the model's weight, kind) of everything to store."""
    for name, p in model.state_dict().items():
        if re.search(r"experts\.gate_up_proj$", name):
            half = p.shape[1] // 2
            for e in range(p.shape[0]):
                prefix = name.removesuffix("gate_up_proj") + str(e)
                yield f"{prefix}.gate_proj.weight", p[e, :half], "expert"
                yield f"{prefix}.up_proj.weight", p[e, half:], "expert"
        elif re.search(r"experts\.down_proj$", name):
            for e in range(p.shape[0]):
                yield f"{name.removesuffix('down_proj')}{e}.down_proj.weight", p[e], "expert"
        else:
            module = model.get_submodule(name.rpartition(".")[0])
            linear = isinstance(module, torch.nn.Linear) and name.endswith(".weight")
            yield name, p, "linear" if linear else "other"


def _split(
    one: tuple[str, torch.Tensor, str], split: Mapping[str, Mapping[str, int]]
) -> Iterable[tuple[str, torch.Tensor, str]]:
    name, weight, kind = one
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    if leaf not in split:
        return [one]
    parts = weight.split(list(split[leaf].values()))
    return [(f"{parent}.{m}_proj.weight", p, kind) for m, p in zip(split[leaf], parts, strict=True)]


def make_tiny(
    folder: Path,
    config: PreTrainedConfig,
    *,
    quantized: Callable[[str, str], bool] = lambda name, kind: kind != "other",
    split: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    seed: int = 0,
    **block: Any,
) -> Tiny:
    """Random weights for ``config``; those that ``quantized(name, kind)`` chooses are packed.

    ``split``: fused module -> {member: rows}, stored as ``<member>_proj`` each.
    """
    torch.manual_seed(seed)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors: dict[str, torch.Tensor] = {}
    tied = set(model.all_tied_weights_keys)
    with torch.no_grad():
        for name, p, kind in [s for one in stored_names(model) for s in _split(one, split)]:
            if name.endswith(("bias", "layernorm.weight", "q_norm.weight", "k_norm.weight")):
                p.add_(torch.randn_like(p) * 0.1).copy_(p.half().float())
            if name in tied:
                continue
            if name != "lm_head.weight" and quantized(name, kind) and kind != "other":
                stored, dense = pack_gptq(p)
                p.copy_(dense)
                module = name.removesuffix(".weight")
                tensors |= {f"{module}.{leaf}": t for leaf, t in stored.items()}
            else:
                tensors[name] = p.clone()
    raw = json.loads(config.to_json_string(use_diff=False))
    raw["quantization_config"] = _BLOCK | block
    raw["architectures"] = [type(model).__name__]
    tiny = Tiny(folder, model, tensors, raw)
    tiny.write()
    return tiny
