"""Decoder layers one after another as one operator of a compiled graph.

    quant_cpu::decoder_layers(x, tables, norms, layouts, cos, sin, keys, values, mask, at, scale,
                              eps) -> y

        as ``quant_cpu::decoder_layer`` (layer.py) with lists in place of what each layer has of
        its own; norms and eps of all layers lie behind each other; 1 to 64 layers that differ in
        nothing but their weights

join.py says how a compiled graph comes to have it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quant_kernels_cpu.layer import BlockLayout, run_layer

__all__ = ["LAYERS_SCHEMA", "fake_layers", "run_layers"]

LAYERS_SCHEMA = (
    "(Tensor x, Tensor[] tables, Tensor[] norms, str[] layouts, Tensor cos, Tensor sin, "
    "Tensor(a!)[] keys, Tensor(b!)[] values, Tensor mask, Tensor[] at, float scale, float[] eps) "
    "-> Tensor"
)


def run_layers(
    x: Tensor, tables: Sequence[Tensor], norms: Sequence[Tensor], layouts: Sequence[str],
    cos: Tensor, sin: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor,
    at: Sequence[Tensor], scale: float, eps: Sequence[float],
) -> Tensor:  # fmt: skip
    """The operator, for a torch without the stable ABI."""
    first = 0
    for table, text, k, v, position in zip(tables, layouts, keys, values, at, strict=True):
        mine = slice(first, first + len(BlockLayout.of(text).forms))
        first = mine.stop
        x = run_layer(x, table, norms[mine], text, cos, sin, k, v, mask, position, scale, eps[mine])
    return x


def fake_layers(
    x: Tensor, tables: Sequence[Tensor], norms: Sequence[Tensor], layouts: Sequence[str],
    cos: Tensor, sin: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor,
    at: Sequence[Tensor], scale: float, eps: Sequence[float],
) -> Tensor:  # fmt: skip
    """What the operator returns, for whoever traces."""
    return x.new_empty(x.shape)
