"""A writer of MXFP8 that shares nothing with the plugin, and small checkpoints on disk.

Numbers are made with numpy and ``frexp`` from the definition of the format: byte = 127 +
ceil(log2(max|x| / 448)); values rounded to the nearest e4m3 number, halves to even.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant_core.checkpoint.open import open_checkpoint
from quant_core.plan import plan
from quant_core.registry import load_registry

torch.set_num_threads(1)

NAME = "model.layers.0.mlp.up_proj"


def e4m3_values() -> np.ndarray:
    """The 127 magnitudes, by their bits: 4 of exponent (bias 7), 3 of mantissa."""
    out = []
    for code in range(127):
        e, m = code >> 3, code & 7
        out.append(m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
    return np.array(out)


VALUES = e4m3_values()


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """Codes of the nearest values, halves to the even code."""
    magnitude = np.minimum(np.abs(x), 448.0)
    above = np.searchsorted(VALUES, magnitude).clip(1, 126)
    low, high = VALUES[above - 1], VALUES[above]
    up = magnitude - low > high - magnitude
    tie = magnitude - low == high - magnitude
    code = np.where(up | (tie & (above % 2 == 0)), above, above - 1)
    return (code + 128 * np.signbit(x)).astype(np.uint8)


def block_bytes(x: np.ndarray) -> np.ndarray:
    """x [..., K] float64 -> the bytes of its blocks of 32."""
    ratio = np.abs(x.reshape(*x.shape[:-1], -1, 32)).max(-1) / 448.0
    mantissa, exponent = np.frexp(ratio)  # ratio = mantissa * 2**exponent, mantissa >= 0.5
    exponent = exponent - (mantissa == 0.5)
    return np.where(ratio == 0, 0, (exponent + 127).clip(0, 254)).astype(np.uint8)


def write_mx(w: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [N, K] -> weight, scale as stored."""
    x = w.double().numpy()
    scale = block_bytes(x)
    codes = round_e4m3(x / np.exp2(scale.astype(float) - 127).repeat(32, -1))
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scale)


def read_mx(weight: Tensor, scale: Tensor) -> Tensor:
    """What they stand for, float32."""
    codes = weight.view(torch.uint8).numpy()
    values = VALUES[codes & 127] * np.where(codes > 127, -1.0, 1.0)
    return torch.from_numpy(values * np.exp2(scale.numpy() - 127.0).repeat(32, -1)).float()


def rounded(x: Tensor) -> Tensor:
    """x [..., K] rounded to MXFP8 and back, float32."""
    wide = x.double().numpy()
    scale = np.exp2(block_bytes(wide).astype(float) - 127).repeat(32, -1)
    codes = round_e4m3(wide / scale)
    values = VALUES[codes & 127] * np.where(codes > 127, -1.0, 1.0) * scale
    return torch.from_numpy(values).float()


def stored(w: Tensor, name: str = "weight_scale_inv") -> dict[str, Tensor]:
    weight, scale = write_mx(w)
    return {"weight": weight, name: scale}


def named(tensors: Mapping[str, Tensor], module: str = NAME) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": t for leaf, t in tensors.items()}


CONFIG = {
    "quant_method": "mxfp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
    "weight_block_size": [1, 32], "modules_to_not_convert": ["lm_head"],
}  # fmt: skip

_registry: list[Any] = []


def plan_of(checkpoint: Any) -> Any:
    """Planned with this plugin alone."""
    if not _registry:
        _registry.append(load_registry(only=["mxfp8"]))
    return plan(checkpoint, registry=_registry[0])


def save(folder: Path, tensors: Mapping[str, Tensor], config: Any, **model: Any) -> Any:
    flat = {k: v.clone().contiguous() for k, v in tensors.items()}
    save_file(flat, folder / "model.safetensors")
    text = json.dumps({"model_type": "llama", **model, "quantization_config": config})
    (folder / "config.json").write_text(text)
    return open_checkpoint(folder)


@pytest.fixture(scope="session")
def mx() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        CONFIG=CONFIG, NAME=NAME, named=named, plan=plan_of, read=read_mx, rounded=rounded,
        save=save, stored=stored, write=write_mx,
    )  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Any]:
    """Write a checkpoint folder and open it."""

    def make(tensors: Mapping[str, Tensor], config: Any = CONFIG) -> Any:
        return save(tmp_path, tensors, config)

    return make
