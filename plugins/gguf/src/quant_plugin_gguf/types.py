"""The GGUF type table: id, name, weights per block, bytes per block. Imports no torch.

Source: gguf 0.19.0, constants.py (GGMLQuantizationType, GGML_QUANT_SIZES).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quant_core.spec import BlockType

__all__ = [
    "BY_ID",
    "BY_NAME",
    "GgmlType",
    "opaque_block_types",
    "supported_names",
]


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One storage type.

    ``kind``: "plain" has a torch dtype of its own; "scaled" is codes with scales and becomes
    canonical; "opaque" stays bytes and is read by a reference function.
    """

    id: int
    name: str
    weights: int
    bytes: int
    kind: Literal["plain", "scaled", "opaque"]
    dtype: str  # as in TensorInfo: a torch dtype name, or the lower-case type name

    @property
    def is_float(self) -> bool:
        return self.dtype in ("float32", "float16", "bfloat16", "float64")

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; ``columns`` is a multiple of ``weights``."""
        return columns // self.weights * self.bytes


def _plain(id: int, name: str, size: int, dtype: str) -> GgmlType:
    return GgmlType(id, name, 1, size, "plain", dtype)


def _scaled(id: int, name: str, weights: int, size: int) -> GgmlType:
    return GgmlType(id, name, weights, size, "scaled", name.lower())


def _opaque(id: int, name: str, size: int) -> GgmlType:
    return GgmlType(id, name, 256, size, "opaque", name.lower())


_TYPES = (
    _plain(0, "F32", 4, "float32"),
    _plain(1, "F16", 2, "float16"),
    _scaled(2, "Q4_0", 32, 18),
    _scaled(3, "Q4_1", 32, 20),
    _scaled(6, "Q5_0", 32, 22),
    _scaled(7, "Q5_1", 32, 24),
    _scaled(8, "Q8_0", 32, 34),
    _scaled(10, "Q2_K", 256, 84),
    _scaled(11, "Q3_K", 256, 110),
    _scaled(12, "Q4_K", 256, 144),
    _scaled(13, "Q5_K", 256, 176),
    _scaled(14, "Q6_K", 256, 210),
    _opaque(16, "IQ2_XXS", 66),
    _opaque(17, "IQ2_XS", 74),
    _opaque(18, "IQ3_XXS", 98),
    _opaque(19, "IQ1_S", 50),
    _scaled(20, "IQ4_NL", 32, 18),
    _opaque(21, "IQ3_S", 110),
    _opaque(22, "IQ2_S", 82),
    _scaled(23, "IQ4_XS", 256, 136),
    _plain(24, "I8", 1, "int8"),
    _plain(25, "I16", 2, "int16"),
    _plain(26, "I32", 4, "int32"),
    _plain(27, "I64", 8, "int64"),
    _plain(28, "F64", 8, "float64"),
    _opaque(29, "IQ1_M", 56),
    _plain(30, "BF16", 2, "bfloat16"),
    _opaque(34, "TQ1_0", 54),
    _opaque(35, "TQ2_0", 66),
    _scaled(39, "MXFP4", 32, 17),
    _scaled(40, "NVFP4", 64, 36),
)

BY_ID: Mapping[int, GgmlType] = {t.id: t for t in _TYPES}
BY_NAME: Mapping[str, GgmlType] = {t.dtype: t for t in _TYPES}
"""By ``TensorInfo.dtype``: "q4_k", "float32", ..."""

KNOWN_UNSUPPORTED: Mapping[int, str] = {
    4: "Q4_2, removed from the format",
    5: "Q4_3, removed from the format",
    9: "Q8_1, an activation type",
    15: "Q8_K, an activation type",
    31: "Q4_0_4_4, removed from the format",
    32: "Q4_0_4_8, removed from the format",
    33: "Q4_0_8_8, removed from the format",
    36: "IQ4_NL_4_4, removed from the format",
    37: "IQ4_NL_4_8, removed from the format",
    38: "IQ4_NL_8_8, removed from the format",
    41: "Q1_0, which has no published reference decoder",
}


def supported_names() -> str:
    """All readable types for error messages."""
    return ", ".join(t.name for t in _TYPES)


def opaque_block_types() -> Mapping[str, BlockType]:
    """Block types without a scale/zero description: ``gguf_iq3_s`` -> its reference."""
    return {
        f"gguf_{t.dtype}": BlockType(
            name=f"gguf_{t.dtype}",
            weights=t.weights,
            bytes=t.bytes,
            target=f"quant_plugin_gguf.opaque:{t.dtype}",
            codes="" if t.name == "TQ1_0" else f"quant_plugin_gguf.grids:{t.dtype}",
        )
        for t in _TYPES
        if t.kind == "opaque"
    }
