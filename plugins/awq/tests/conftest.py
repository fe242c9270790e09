"""Straightforward packers written from the published layouts, and small checkpoints on disk.

The packers set one code at a time, share nothing with the plugin, and are only as fast as small
tests need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_core.spec import LayerDesc

torch.set_num_threads(1)

SLOT = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of output channel j inside a run of eight
HALF = [0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27]
HALF += [4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31]


def _words(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.uint32).view(np.int32))


def gemm_words(codes: Tensor, slot: list[int] = SLOT) -> Tensor:
    """Codes (N, rows) of 4 bits to int32 (rows, N / 8)."""
    n, rows = codes.shape
    out = np.zeros((rows, n // 8), dtype=np.int64)
    for i in range(n):
        for r in range(rows):
            out[r, i // 8] |= int(codes[i, r]) << (4 * slot[i % 8])
    return _words(out)


def stream_words(codes: Tensor, bits: int, slot: list[int] | None) -> Tensor:
    """Codes (N, rows) to a bit stream along N, int32 (rows, N * bits / 32), one bit at a time."""
    n, rows = codes.shape
    out = np.zeros((rows, -(-n * bits // 32)), dtype=np.int64)
    for i in range(n):
        at = i if slot is None else i // 8 * 8 + slot[i % 8]
        for r in range(rows):
            for t in range(bits):
                bit = at * bits + t
                out[r, bit // 32] |= (int(codes[i, r]) >> t & 1) << (bit % 32)
    return _words(out)


def padded_width(k: int, g: int) -> int:
    """Groups padded to 8 (g >= 128), 16 (g = 64) or 32 (g = 32)."""
    words = (k // g + 7) // 8
    many = {64: 2, 32: 4}.get(g, 1)
    return 8 * ((words + many - 1) // many * many)


def gemv_words(codes: Tensor, width: int) -> Tensor:
    """Codes (N, count) to int32 (N, width / 8), natural order, zero padded."""
    out = np.zeros((codes.shape[0], width // 8), dtype=np.int64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j // 8] |= int(codes[i, j]) << (4 * (j % 8))
    return _words(out)


def tile_words(codes: Tensor) -> Tensor:
    """Codes (N, K) to int16 (N / 4, K) in tiles of 4 x 64."""
    n, k = codes.shape
    out = np.zeros((n // 4, k), dtype=np.uint16)
    for i in range(n):
        for j in range(k):
            block, inside = divmod(j, 64)
            half, at = divmod(inside, 32)
            flat = 64 * (i % 4) + 32 * half + HALF.index(at)
            out[i // 4, 64 * block + flat // 4] |= int(codes[i, j]) << (4 * (flat % 4))
    return torch.from_numpy(out.view(np.int16))


def pad_right(values: Tensor, width: int) -> Tensor:
    out = torch.zeros(values.shape[0], width, dtype=values.dtype)
    out[:, : values.shape[1]] = values
    return out


def stored_layer(
    layout: str, codes: Tensor, zeros: Tensor, scales: Tensor, g: int
) -> dict[str, Tensor]:
    """Stored tensors of one 4-bit layer: codes (N, K), zeros and scales (N, K / g)."""
    width = padded_width(codes.shape[1], g)
    if layout == "gemm":
        return {
            "qweight": gemm_words(codes),
            "qzeros": gemm_words(zeros),
            "scales": scales.t().contiguous(),
        }
    padded = pad_right(scales, width)
    if layout == "gemv":
        packed = gemv_words(codes, codes.shape[1])
        return {"qweight": packed, "qzeros": gemv_words(zeros, width), "scales": padded}
    offset = -(scales.float() * zeros.float()).to(scales.dtype)
    return {
        "qweight": tile_words(codes),
        "scaled_zeros" if layout == "llm-awq" else "qzeros": pad_right(offset, width)
        .t()
        .contiguous(),
        "scales": padded.t().contiguous(),
    }


def random_layer(n: int, k: int, g: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zeros and float16 scales with all values in use, zero 0 among them."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (n, k // g), generator=rng, dtype=torch.uint8)
    zeros[0, 0] = 0
    scales = (torch.rand(n, k // g, generator=rng) * 0.1 + 0.01).half()
    return codes, zeros, scales


def worked_layer() -> tuple[Tensor, Tensor, Tensor]:
    """The common worked example: N=8, K=32, g=16."""
    n, k = torch.arange(8)[:, None], torch.arange(32)[None]
    group = torch.arange(2)[None]
    codes = ((3 * n + k) % 16).to(torch.uint8)
    zeros = ((n + 1 + group) % 16).to(torch.uint8)
    scales = ((1 + n + 8 * group) / 16).half()
    return codes, zeros, scales


@pytest.fixture(scope="session")
def ref() -> SimpleNamespace:
    """The packers above."""
    return SimpleNamespace(
        gemm_words=gemm_words,
        stream_words=stream_words,
        gemv_words=gemv_words,
        tile_words=tile_words,
        stored_layer=stored_layer,
        random_layer=random_layer,
        worked_layer=worked_layer,
        slot=SLOT,
    )


@pytest.fixture(scope="session")
def linear() -> Callable[..., LayerDesc]:
    def make(stored: str = "model.layers.0.mlp.up_proj", **kw: Any) -> LayerDesc:
        return LayerDesc(kind=kw.pop("kind", "linear"), name=stored, stored=stored, **kw)

    return make


@pytest.fixture
def write(write: Callable[..., Any]) -> Callable[..., Any]:
    """``write(tensors, config, side)``: ``side`` holds further JSON files by name."""

    def make(
        tensors: Mapping[str, Tensor],
        config: Any = None,
        side: Mapping[str, Any] | None = None,
    ) -> Any:
        return write(tensors, config, files=side)

    return make


@pytest.fixture
def small(ref: SimpleNamespace) -> Callable[..., dict[str, Tensor]]:
    """Tensors of a two-layer model: every layer packed, lm_head plain."""

    def make(layout: str = "gemm", k: int = 128, n: int = 16, g: int = 64) -> dict[str, Tensor]:
        out = {"lm_head.weight": torch.zeros(8, 16), "model.norm.weight": torch.ones(16)}
        for i in range(2):
            stored = ref.stored_layer(layout, *ref.random_layer(n, k, g, seed=i), g)
            out |= {f"model.layers.{i}.mlp.up_proj.{leaf}": t for leaf, t in stored.items()}
        return out

    return make
