"""References of the block types that stay bytes: IQ1, IQ2, IQ3 and TQ.

Their codebook grids and base-3 packing are the ``gguf`` package's own; it decodes them here in
NumPy on the CPU. Each function has the signature that ``BlockType.target`` asks for.

    iq3_s(blocks: uint8 [rows, row_bytes], k: int) -> float32 [rows, k]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_plugin_gguf.types import BY_NAME

__all__ = [
    "iq1_m",
    "iq1_s",
    "iq2_s",
    "iq2_xs",
    "iq2_xxs",
    "iq3_s",
    "iq3_xxs",
    "tq1_0",
    "tq2_0",
]


def _reference(name: str) -> Callable[[Tensor, int], Tensor]:
    ggml = BY_NAME[name]

    def dequantize(blocks: Tensor, k: int) -> Tensor:
        from gguf import GGMLQuantizationType, quants

        expected = ggml.row_bytes(k)
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] != expected:
            raise LayoutError(
                f"{ggml.name} blocks have shape {tuple(blocks.shape)} {blocks.dtype}, expected "
                f"uint8 (rows, {expected}) for {k} columns. Pass whole rows of whole blocks.",
                code="Q-LAYOUT-SHAPE",
                expected=expected,
                actual=tuple(blocks.shape),
            )
        data = blocks.contiguous().cpu().numpy()
        values = quants.dequantize(data, GGMLQuantizationType(ggml.id))
        return torch.from_numpy(values).to(blocks.device)

    dequantize.__name__ = dequantize.__qualname__ = name
    dequantize.__doc__ = f"float32 values of {ggml.name} blocks, by the gguf package."
    return dequantize


iq1_s = _reference("iq1_s")
iq1_m = _reference("iq1_m")
iq2_xxs = _reference("iq2_xxs")
iq2_xs = _reference("iq2_xs")
iq2_s = _reference("iq2_s")
iq3_xxs = _reference("iq3_xxs")
iq3_s = _reference("iq3_s")
tq1_0 = _reference("tq1_0")
tq2_0 = _reference("tq2_0")
