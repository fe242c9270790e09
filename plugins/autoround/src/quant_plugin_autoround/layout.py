"""Stored AutoRound tensors to the canonical form and back, bit for bit.

    along K (minus_one, raw)                     interleaved
    qweight  int32 [K*b/32, N]                   int32 [K, N*b/32]
             column n is one stream of b-bit     row k is one stream along N whose runs of eight
             codes along K, LSB first            channels lie in the slots 0 4 1 5 2 6 3 7
    qzeros   int32 [G, N*b/32], packed along N in the same manner; minus_one stores z - 1
    scales   float [G, N]
    g_idx    int32 [K], auto_round:gptqmodel only; always k // group_size

All widths are dense streams, 5 to 7 bits too: three and more words hold 32 codes without gaps.
Codes stay in the stored words. How z - 1 is shifted: see ``quant_core.intpack``; with 5, 6 and 7
bits the tool stores (z - 1) modulo 2**bits, so adding 1 has to wrap as well, which its own reader
does not do for a zero of 0. With 2, 3, 4 and 8 bits it saves a zero of 0 as 1, which cannot be
told from a real 1.

Source: AutoRound 0.16.1 ``auto_round_extension/torch/qlinear_torch{,_zp}.py``,
``export/export_to_awq/utils.py``, ``utils/bit_packing.py``; facts only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.intpack import (
    check_symmetric,
    from_groups,
    read_zeros,
    stored_zeros,
    write_zeros,
)
from quant_core.intspec import cannot_hold, check_plain
from quant_core.packing import repack
from quant_core.tensors import LayerTensors
from quant_plugin_autoround.scheme import AutoRoundScheme

__all__ = ["canonicalize", "serialize"]


def _plain_g_idx(scheme: AutoRoundScheme) -> Tensor:
    return torch.arange(scheme.shape[1], dtype=torch.int32) // scheme.group_size


def _check_g_idx(scheme: AutoRoundScheme, where: str, g_idx: Tensor) -> None:
    wrong = (g_idx != _plain_g_idx(scheme)).nonzero().flatten()
    if wrong.numel():
        at = int(wrong[0])
        raise LayoutError(
            f"{where}: g_idx puts column {at} in group {int(g_idx[at])}, expected "
            f"{at // scheme.group_size} (k // {scheme.group_size}) because this format keeps "
            "columns in order. Check group_size, or export with activation order as GPTQ.",
            code="Q-VALUE-GIDX",
            tensor=f"{where}.g_idx",
            expected=at // scheme.group_size,
            actual=int(g_idx[at]),
            plugin="autoround",
        )


def canonicalize(
    scheme: AutoRoundScheme, where: str, tensors: Mapping[str, Tensor]
) -> LayerTensors:
    """Stored tensors of one layer to canonical form; shapes and dtypes were checked.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT`` if zeros contradict ``sym``.
        LayoutError: ``Q-VALUE-GIDX`` if columns are not in order.
    """
    qzeros, n, packing = tensors["qzeros"], scheme.shape[0], scheme.zeros_packing
    zeros = None
    if scheme.sym:
        check_symmetric(
            qzeros,
            scheme.bits,
            n,
            packing,
            minus_one=scheme.minus_one,
            where=where,
            source=scheme.source,
            plugin="autoround",
            flagged=scheme.stated,
        )
    else:
        zeros = read_zeros(qzeros, scheme.bits, n, packing, minus_one=scheme.minus_one)
    if "g_idx" in tensors:
        _check_g_idx(scheme, where, tensors["g_idx"])
    weight = from_groups(
        scheme.weight,
        scheme.shape,
        scheme.packing,
        tensors["qweight"],
        tensors["scales"],
        zeros,
    )
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def serialize(scheme: AutoRoundScheme, where: str, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``; codes may come in any packing.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what this layout cannot hold.
    """
    check_plain(where, tensors, scheme.weight, scheme.shape, holder="AutoRound", plugin="autoround")
    qt, half = tensors.weight, 1 << (scheme.bits - 1)
    if qt.gather is not None:
        expected = "columns in order"
        raise cannot_hold(where, "a column order", "AutoRound", expected, plugin="autoround")
    zeros = stored_zeros(qt)
    if scheme.sym and bool((zeros != half).any()):
        expected = f"{half} everywhere (sym)"
        raise cannot_hold(where, "zero points", "AutoRound", expected, plugin="autoround")
    zeros = zeros.t().contiguous()
    packing, minus_one = scheme.zeros_packing, scheme.minus_one
    out = {
        "qweight": repack(qt.codes, scheme.bits, scheme.shape, qt.packing, scheme.packing),
        "qzeros": write_zeros(zeros, scheme.bits, packing, minus_one=minus_one),
        "scales": qt.scales[0].t().contiguous(),
    }
    if scheme.has_g_idx:
        out["g_idx"] = _plain_g_idx(scheme)
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out
