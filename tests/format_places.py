"""Small checkpoints for test_format_table.py: one module's stored tensors under another name.

Headers and JSON are edited here apart from the code under test; no number is changed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["NAMES", "made", "place", "placed_names"]

NAMES = {
    "linear": "model.layers.0.mlp.up_proj",
    "lm_head": "lm_head",
    "embedding": "model.embed_tokens",
    "experts": "model.layers.0.mlp.experts.{expert}.up_proj",
    "stacked experts": "model.layers.0.mlp.experts.up_proj",
}
EXPERTS = 2


def placed_names(kind: str) -> list[str]:
    """Stored module names of a kind."""
    name = NAMES[kind]
    return [name.format(expert=e) for e in range(EXPERTS)] if "{" in name else [name]


def _weights_file(folder: Path) -> Path:
    files = [f for f in sorted(folder.glob("*.safetensors")) if not f.name.startswith("expected")]
    (file,) = files
    return file


def _unnamed(value: Any) -> Any:
    """JSON without the list entries that keep heads and embeddings floats."""
    if isinstance(value, dict):
        return {k: _unnamed(v) for k, v in value.items()}
    if isinstance(value, list):
        told = ("lm_head", "embed_tokens")
        return [_unnamed(v) for v in value if not (isinstance(v, str) and v.endswith(told))]
    return value


def _renamed(value: Mapping[str, Any], module: str, names: list[str]) -> dict[str, Any]:
    """Entries of ``module``'s tensors under the new names; those of others are left out."""
    out: dict[str, Any] = {}
    for key, held in value.items():
        if key.startswith(f"{module}."):
            out |= {key.replace(module, name): held for name in names}
        elif not key.startswith(("model.", "lm_head.")):
            out[key] = held
    return out


def _set(config: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    for key in parents:
        config = config[key]
    config[last] = value


def place(
    source: Path, module: str, kind: str, target: Path, changes: Mapping[str, object]
) -> None:
    """Write ``target``: the tensors of ``module`` as a module of ``kind``, twice for experts."""
    names = placed_names(kind)
    tensors: dict[str, Tensor] = {}
    with safe_open(_weights_file(source), "pt") as file:
        metadata = _renamed(file.metadata() or {}, module, names)
        for key in file.keys():  # noqa: SIM118
            if not key.startswith(f"{module}."):
                continue
            value = file.get_tensor(key)
            if kind == "stacked experts":
                value = torch.stack([value, value])
            tensors |= {key.replace(module, name): value.clone() for name in names}
    assert tensors, f"{source.name} stores nothing of {module}"
    if "tensor_names" in metadata:  # of subclasses stored in parts
        kept = [k for k in json.loads(metadata["tensor_names"]) if k.startswith(f"{module}.")]
        kept = [k.replace(module, name) for k in kept for name in names]
        metadata["tensor_names"] = json.dumps(kept)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata=metadata)
    for file_ in source.glob("*.json"):
        if file_.name.startswith(("expected", "tokenizer")) or "index" in file_.name:
            continue
        config = _unnamed(json.loads(file_.read_text()))
        if "description" in file_.name:
            config = _renamed(config, module, names)
        if file_.name == "config.json":
            for path, value in changes.items():
                _set(config["quantization_config"], path, value)
        (target / file_.name).write_text(json.dumps(config))


def _e4m3() -> list[float]:
    """The 126 finite positive magnitudes and 0, by their bits."""
    out = []
    for code in range(127):
        e, m = code >> 3, code & 7
        out.append(m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
    return out


def made(name: str, module: str, folder: Path) -> Tensor | None:
    """A checkpoint of a format whose tool gave us no such file; returns its weights, float32.

    ``mxfp8``: bytes of e4m3 and of exponents at random, decoded here by their bits.
    ``mxfp8-kv``, ``fp8-kv``: the scales of an fp8 cache beside such a layer; no weights returned.
    """
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 127, (64, 96), generator=rng)
    signs = torch.randint(0, 2, (64, 96), generator=rng)
    scales = torch.randint(120, 132, (64, 3), generator=rng)
    dense = torch.tensor(_e4m3())[codes] * (1 - 2 * signs)
    dense = dense * torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
    weight = (codes + 128 * signs).to(torch.uint8).view(torch.float8_e4m3fn)
    layer = f"{module}.k_proj" if name.endswith("-kv") else module
    block: dict[str, Any] = {"quant_method": name.removesuffix("-kv")}
    block["activation_scheme"] = "dynamic"
    if name.startswith("mxfp8"):
        stored = {f"{layer}.weight": weight, f"{layer}.weight_scale_inv": scales.to(torch.uint8)}
        block["weight_block_size"] = [1, 32]
    else:
        stored = {f"{layer}.weight": weight, f"{layer}.weight_scale": torch.tensor(0.01)}
    if name.endswith("-kv"):
        cache = {"k_scale": torch.tensor(0.02), "v_scale": torch.tensor(0.0125)}
        stored |= {f"{module}.{leaf}": value for leaf, value in cache.items()}
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    return None if name.endswith("-kv") else dense


def rename_tensor(source: Path, target: Path, old: str, new: str) -> None:
    """``source`` with one tensor of a safetensors file stored under another name."""
    target.mkdir()
    for file in source.iterdir():
        raw = file.read_bytes()
        if file.suffix == ".safetensors":
            (size,) = struct.unpack("<Q", raw[:8])
            header = json.loads(raw[8 : 8 + size])
            header = {new if k == old else k: v for k, v in header.items()}
            text = json.dumps(header).encode()
            raw = struct.pack("<Q", len(text)) + text + raw[8 + size :]
        (target / file.name).write_bytes(raw)
