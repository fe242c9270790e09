"""Stored blocks of MXFP4 experts to canonical tensors and back, exactly.

    blocks [N, K/32, 16]   byte j of a block: code 2j in the low nibble, 2j + 1 in the high one
    codes  [N, K/2]        the same bytes: the canonical stream of 4-bit codes along K

Engines keep these experts transposed, [K, N]; a file does not, and neither does this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from quant_core.intspec import cannot_hold
from quant_core.packing import repack
from quant_core.spec import CANONICAL
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_mxfp4.scheme import BLOCK, BLOCK_BYTES

if TYPE_CHECKING:
    from quant_plugin_mxfp4.scheme import Mxfp4Scheme

__all__ = ["canonicalize", "serialize"]


def canonicalize(scheme: Mxfp4Scheme, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors of one expert's matrix to canonical form; shapes and dtypes were checked."""
    n, k = scheme.shape
    weight = QuantizedTensor(
        spec=scheme.weight,
        shape=(n, k),
        codes=tensors["blocks"].reshape(n, k // 2),
        packing=CANONICAL,
        scales=(tensors["scales"],),
    )
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def serialize(scheme: Mxfp4Scheme, where: str, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``; codes may come in any packing.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what blocks cannot hold.
    """
    qt, (n, k) = tensors.weight, scheme.shape
    names = ("acc_bias", "out_scale", "input_scale", "input_zero")
    extras = [name for name in names if getattr(tensors, name) is not None]
    extras += ["transforms"] if tensors.transforms else []
    if extras or qt.spec != scheme.weight or tuple(qt.shape) != (n, k) or qt.gather is not None:
        found = ", ".join(extras) or f"{qt.spec.label} {tuple(qt.shape)}"
        expected = f"{scheme.weight.label} {(n, k)}"
        raise cannot_hold(where, found, "MXFP4 blocks", expected, plugin="mxfp4")
    codes = repack(qt.codes, 4, (n, k), qt.packing, CANONICAL)
    out = {
        "blocks": codes if scheme.flat else codes.reshape(n, k // BLOCK, BLOCK_BYTES),
        "scales": qt.scales[0],
    }
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out
