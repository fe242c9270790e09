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

v1 with 2, 4 or 8 bits: the writer subtracted 0x11111111 (or alike) from whole words, so a zero of
0 borrows from its neighbour. Adding the constant to whole words undoes that; adding 1 per field
would not.

Source: GPTQModel 7.7.0 ``nn_modules/qlinear/__init__.py``, ``utils/model.py``
(convert_gptq_v1_to_v2_format_module) and ``utils/planar_packing.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.errors import ConfigError, QuantWarning
from quant_core.packing import pack, repack, unpack
from quant_core.spec import Packing
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_gptq.order import cannot, g_idx_of, gather_of, reorder
from quant_plugin_gptq.scheme import SCALE_ELEMENTS, GptqScheme

__all__ = ["canonicalize", "read_zeros", "serialize", "write_zeros"]

_WORD_BITS = (2, 4, 8)  # widths whose v1 shift acts on whole words


# ---------------------------------------------------------------------------------------- zeros


def _add_words(words: Tensor, constant: int) -> Tensor:
    """int32 words + constant modulo 2**32."""
    total = (words.to(torch.int64) + constant) & 0xFFFFFFFF
    return (total - ((total >> 31) << 32)).to(torch.int32)


def _ones(bits: int) -> int:
    """A word with 1 in every field: 0x11111111 for 4 bits."""
    return sum(1 << at for at in range(0, 32, bits))


def read_zeros(qzeros: Tensor, bits: int, n: int, packing: Packing, *, v1: bool) -> Tensor:
    """Stored zeros as codes.

    Shapes:  qzeros int32 (G, words of N)  ->  uint8 (G, N)
    Raises:  LayoutError if the shape disagrees with bits and N.
    """
    if v1 and bits in _WORD_BITS:
        qzeros = _add_words(qzeros, _ones(bits))
    zeros = unpack(qzeros, bits, (qzeros.shape[0], n), packing)
    if v1 and bits not in _WORD_BITS:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return zeros


def write_zeros(zeros: Tensor, bits: int, packing: Packing, *, v1: bool) -> Tensor:
    """Inverse of ``read_zeros``: uint8 (G, N) to int32 words."""
    if v1 and bits not in _WORD_BITS:
        zeros = (zeros - 1) & ((1 << bits) - 1)
    words = pack(zeros, bits, packing)
    return _add_words(words, -_ones(bits)) if v1 and bits in _WORD_BITS else words


def _check_symmetric(scheme: GptqScheme, where: str, qzeros: Tensor) -> None:
    """All zeros are 2**(bits-1) in the dialect of the config, or in the other one.

    A symmetric file with the wrong version flag is readable: its values tell. It is then written
    back with the flag's own constants.
    """
    half, n = 1 << (scheme.bits - 1), scheme.shape[0]
    zeros = read_zeros(qzeros, scheme.bits, n, scheme.zeros_packing, v1=scheme.v1)
    if bool((zeros == half).all()):
        return
    other = read_zeros(qzeros, scheme.bits, n, scheme.zeros_packing, v1=not scheme.v1)
    if bool((other == half).all()):
        said, found = ("v1", "v2") if scheme.v1 else ("v2", "v1")
        if scheme.sym is not None:
            warnings.warn(
                f"{scheme.source}: the config implies {said} zeros, the values are {found}; "
                "read by the values",
                QuantWarning,
                stacklevel=2,
            )
        return
    bad = (zeros != half).nonzero()
    g, column = (int(i) for i in bad[0])
    actual = int(zeros[g, column])
    said = "sym is true" if scheme.sym else "no config says whether zeros are v1 or v2"
    fix = (
        "Set sym to false if the checkpoint is asymmetric."
        if scheme.sym
        else "Add a quantize_config.json with sym and checkpoint_format."
    )
    raise ConfigError(
        f"{where}: {said} ({scheme.source}), but {len(bad)} zero points differ from {half} "
        f"(group {g}, output {column}: {actual}); expected {half} everywhere. {fix}",
        code="Q-CFG-CONFLICT",
        path=scheme.source or None,
        tensor=f"{where}.qzeros",
        expected=half,
        actual=actual,
        plugin="gptq",
    )


# ---------------------------------------------------------------------------------- both directions


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
        zeros = read_zeros(tensors["qzeros"], scheme.bits, n, scheme.zeros_packing, v1=scheme.v1)
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
    spec = replace(scheme.weight, gather=gather is not None)
    level = replace(spec.scales[0], element=SCALE_ELEMENTS[str(scales.dtype)[6:]])
    weight = QuantizedTensor(
        spec=replace(spec, scales=(level,)),
        shape=(n, k),
        codes=codes,
        packing=scheme.packing,
        scales=(scales.t().contiguous(),),
        zeros=None if zeros is None else zeros.t().contiguous(),
        gather=gather,
    )
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def _check_representable(scheme: GptqScheme, where: str, tensors: LayerTensors) -> None:
    qt, want = tensors.weight, scheme.weight
    extras = [
        name
        for name in ("acc_bias", "out_scale", "input_scale", "input_zero")
        if getattr(tensors, name) is not None
    ]
    extras += ["transforms"] if tensors.transforms else []
    extras += sorted(tensors.operands.keys() - {"weight"})
    if extras:
        raise cannot(where, ", ".join(extras), "a weight and a bias only")
    levels = qt.spec.scales
    plain = (
        qt.spec.element == want.element
        and not qt.spec.blocks
        and len(levels) == 1
        and levels[0].grain == want.scales[0].grain
        and levels[0].element in SCALE_ELEMENTS.values()
        and not levels[0].inverse
        and qt.spec.zero is not None
        and qt.spec.zero.kind in ("const", "code")
    )
    if not plain:
        raise cannot(where, qt.spec.label, want.label)
    if qt.shape[0] != scheme.shape[0] or (qt.gather is None and qt.shape != scheme.shape):
        raise cannot(where, f"a weight of shape {qt.shape}", f"{scheme.shape}")
    if qt.gather is not None and not scheme.has_g_idx:
        raise cannot(where, "a column order", "columns in order, as no g_idx is stored")


def serialize(scheme: GptqScheme, where: str, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what GPTQ cannot hold.
    """
    _check_representable(scheme, where, tensors)
    qt = tensors.weight
    n, k = scheme.shape
    bits, spec_zero = scheme.bits, qt.spec.zero
    scales = qt.scales[0]
    assert spec_zero is not None  # checked above
    zeros = qt.zeros
    if zeros is None:
        zeros = torch.full(scales.shape, spec_zero.value, dtype=torch.uint8)
    wrong = spec_zero.kind == "const" and not 0 <= spec_zero.value < 1 << bits
    if wrong or (scheme.sym is not False and bool((zeros != 1 << (bits - 1)).any())):
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
        "qzeros": write_zeros(zeros.t().contiguous(), bits, scheme.zeros_packing, v1=scheme.v1),
        "scales": scales.t().contiguous(),
    }
    if scheme.has_g_idx:
        out["g_idx"] = g_idx
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out
