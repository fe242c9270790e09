"""Stored GPTQ tensors to the canonical form and back, bit for bit.

    qweight  int32 [K*b/32, N]   column n is one stream of b-bit codes along K, LSB first:

        word 0 of column n, 4 bits:   k7 k6 k5 k4 k3 k2 k1 k0
        3 bits run across words:      word 0 = k0 .. k9 and 2 bits of k10, ...
        planar (gptq_p), 3 bits:      two words hold the low 2 bits of k0 .. k31,
                                      the third holds the top bits

    qzeros   int32 [G, N*b/32]   the same stream along N; v1 stores z - 1, v2 and planar store z
    scales   [G, N]              factor of group g, column n
    g_idx    int32 [K]           group of input feature k; k // group_size when absent

Codes stay in the stored words. Only activation order repacks them, see ``order``.

How v1 zeros are shifted: see ``quant_core.intpack``.

Source: GPTQModel 7.7.0 ``nn_modules/qlinear/__init__.py``, ``utils/model.py``
(convert_gptq_v1_to_v2_format_module) and ``utils/planar_packing.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant_core.intpack import (
    check_symmetric,
    from_groups,
    read_zeros,
    stored_zeros,
    usual_zeros,
    write_zeros,
)
from quant_core.intspec import check_plain
from quant_core.packing import repack
from quant_core.tensors import LayerTensors
from quant_plugin_gptq.order import cannot, g_idx_of, gather_of, in_order, reorder
from quant_plugin_gptq.scheme import GptqScheme

__all__ = ["canonicalize", "is_usual", "serialize"]


def _check_symmetric(scheme: GptqScheme, where: str, qzeros: Tensor) -> None:
    claim, fix = "sym is true", "Set sym to false if the checkpoint is asymmetric."
    if not scheme.sym:
        claim = "no config says whether zeros are v1 or v2"
        fix = "Add a quantize_config.json with sym and checkpoint_format."
    check_symmetric(
        qzeros,
        scheme.bits,
        scheme.shape[0],
        scheme.zeros_packing,
        minus_one=scheme.v1,
        where=where,
        source=scheme.source,
        plugin="gptq",
        claim=claim,
        fix=fix,
        flagged=scheme.sym is not None,
    )


def is_usual(scheme: GptqScheme, tensors: Mapping[str, Tensor]) -> bool:
    """Whether zeros are what ``sym`` promises, in the dialect of the config, and columns in order.

    Then the canonical form is nothing but views of codes and scales.
    """
    n, qzeros = scheme.shape[0], tensors["qzeros"]
    if not usual_zeros(qzeros, scheme.bits, n, scheme.zeros_packing, minus_one=scheme.v1):
        return False
    g_idx = tensors.get("g_idx")
    return g_idx is None or in_order(g_idx, scheme.group_size, scheme.groups)


def canonicalize(scheme: GptqScheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors of one layer to canonical form; shapes and dtypes were checked.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT`` if zeros contradict ``sym``.
        LayoutError: ``Q-VALUE-GIDX``.
    """
    n, k = scheme.shape
    codes, scales, zeros = tensors["qweight"], tensors["scales"], None
    symmetric = scheme.sym is not False
    if symmetric:
        _check_symmetric(scheme, where, tensors["qzeros"])
    else:
        packing = scheme.zeros_packing
        zeros = read_zeros(tensors["qzeros"], scheme.bits, n, packing, minus_one=scheme.v1)
    order = None
    if "g_idx" in tensors:
        order = gather_of(
            tensors["g_idx"],
            scheme.group_size,
            scheme.groups,
            ordered=scheme.desc_act is False,
            where=where,
        )
    gather = None
    if order is not None:
        gather, owner = order
        codes = reorder(codes, scheme.bits, (n, k), scheme.packing, gather, scheme.packing)
        k = len(gather)
        scales = scales[owner]
        zeros = None if zeros is None else zeros[owner]
    weight = from_groups(scheme.weight, (n, k), scheme.packing, codes, scales, zeros, gather)
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def serialize(scheme: GptqScheme, where: str, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what GPTQ cannot hold.
    """
    check_plain(where, tensors, scheme.weight, scheme.shape, holder="GPTQ", plugin="gptq")
    qt = tensors.weight
    if qt.gather is not None and not scheme.has_g_idx:
        raise cannot(where, "a column order", "columns in order, as no g_idx is stored")
    n, k = scheme.shape
    bits, scales, zeros = scheme.bits, qt.scales[0], stored_zeros(qt)
    if scheme.sym is not False and bool((zeros != 1 << (bits - 1)).any()):
        raise cannot(where, "zero points", f"{1 << (bits - 1)} everywhere (sym)")
    same = torch.zeros(scales.shape[1], dtype=torch.bool)
    same[1:] = (scales[:, 1:] == scales[:, :-1]).all(0) & (zeros[:, 1:] == zeros[:, :-1]).all(0)
    g_idx = g_idx_of(qt.gather, scheme.group_size, same, k, scheme.groups, where)
    if qt.gather is None:
        qweight = repack(qt.codes, bits, (n, k), qt.packing, scheme.packing)
    else:
        keep = (qt.gather >= 0).nonzero().flatten()
        columns = torch.empty(k, dtype=torch.int64)
        columns[qt.gather[keep].to(torch.int64)] = keep
        shape = (n, qt.shape[1])
        qweight = reorder(qt.codes, bits, shape, qt.packing, columns, scheme.packing)
        first = torch.empty(scheme.groups, dtype=torch.int64)  # one canonical group of each
        first[g_idx[qt.gather[keep].to(torch.int64)].to(torch.int64)] = keep // scheme.group_size
        scales, zeros = scales[:, first], zeros[:, first]
    out = {
        "qweight": qweight,
        "qzeros": write_zeros(
            zeros.t().contiguous(), bits, scheme.zeros_packing, minus_one=scheme.v1
        ),
        "scales": scales.t().contiguous(),
    }
    if scheme.has_g_idx:
        out["g_idx"] = g_idx
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out
