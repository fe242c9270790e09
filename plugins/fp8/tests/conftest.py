"""FP8 written and computed from the OCP definition in numpy, sharing nothing with the plugin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)


def value(code: int) -> float:
    """OCP OFP8, e4m3: bias 7, no infinity, S.1111.111 is NaN."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


VALUES = np.array([value(c) for c in range(256)])
POSITIVE = VALUES[:127]  # ascending; the position is the code


def rounded(x: np.ndarray) -> np.ndarray:
    """Nearest e4m3 value, ties to the even code, saturating; one number at a time."""
    out = np.zeros_like(x)
    for i, v in np.ndenumerate(x):
        distance = np.abs(POSITIVE - abs(v))
        best = np.flatnonzero(distance == distance.min())
        code = next(c for c in best if len(best) == 1 or c % 2 == 0)
        out[i] = np.copysign(POSITIVE[code], v)
    return out


def random_codes(n: int, k: int, seed: int = 0) -> np.ndarray:
    """All bytes but the NaN ones."""
    codes = np.random.default_rng(seed).integers(0, 256, (n, k)).astype(np.uint8)
    codes[codes & 127 == 127] = 0
    return codes


def stored(codes: np.ndarray) -> Tensor:
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)


def spread(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """One scale per block, repeated over the weights."""
    wide = np.repeat(np.repeat(scale, block[0], axis=0), block[1], axis=1)
    return wide[: shape[0], : shape[1]]


@pytest.fixture(scope="session")
def ref() -> SimpleNamespace:
    return SimpleNamespace(
        values=VALUES, rounded=rounded, random_codes=random_codes, stored=stored, spread=spread
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "static": {"quant_method": "fp8", "activation_scheme": "static"},
    "tensor": {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": None},
    "block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [16, 32],
    },
    "ue8m0": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [16, 32],
    },
    "fbgemm": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 4.0},
}


def layer(family: str, n: int = 40, k: int = 80, seed: int = 0) -> tuple[dict[str, Tensor], Any]:
    """Stored tensors of one layer, and its weight in float64."""
    rng = np.random.default_rng(seed + 100)
    codes = random_codes(n, k, seed)
    out = {"weight": stored(codes)}
    if family == "fbgemm":
        scale = rng.uniform(0.001, 0.1, (n, 1)).astype(np.float32)
        out["weight_scale"] = torch.from_numpy(scale)
    elif family in ("static", "tensor"):
        scale = np.float32(0.0371).reshape(1, 1)
        out["weight_scale"] = torch.tensor(scale.item())
        if family == "static":
            out["input_scale"] = torch.tensor(0.011)
    else:
        shape = (-(-n // 16), -(-k // 32))
        if family == "ue8m0":
            exponents = rng.integers(118, 130, shape).astype(np.uint8)
            stored_scale = torch.from_numpy(exponents).view(torch.float8_e8m0fnu)
            grid = 2.0 ** (exponents.astype(np.float64) - 127)
        else:
            grid = rng.uniform(0.001, 0.1, shape).astype(np.float32)
            stored_scale = torch.from_numpy(grid)
        out["weight_scale_inv"] = stored_scale
        scale = spread(grid, (16, 32), (n, k))
    # the product is rounded to float32 once
    return out, (VALUES[codes] * scale.astype(np.float64)).astype(np.float32).astype(np.float64)


def model(family: str, layers: int = 2) -> dict[str, Tensor]:
    """A two-layer model: up_proj quantized, lm_head plain."""
    out = {"lm_head.weight": torch.zeros(8, 40), "model.norm.weight": torch.ones(40)}
    for i in range(layers):
        tensors, _ = layer(family, seed=i)
        out |= {f"model.layers.{i}.mlp.up_proj.{leaf}": t for leaf, t in tensors.items()}
    return out


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """``configs``, ``layer(family)`` and ``model(family)``."""
    return SimpleNamespace(configs=CONFIGS, layer=layer, model=model)
