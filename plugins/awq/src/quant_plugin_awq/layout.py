"""Stored AWQ tensors to canonical ones and back, exactly.

4-bit words of ``gemm`` run along the output channels, eight to an int32; bits of one word, high
to low, hold the channels

    7 5 3 1 6 4 2 0      (channel j lies in slot 0 4 1 5 2 6 3 7 [j])

``gemv`` words run along the inputs in natural order. Both are handed over as stored, described by
a ``Packing``. Their zeros are raw: nothing is added or subtracted.

``gemv_fast`` / ``llm-awq`` keep tiles of 4 rows x 64 columns in 64 int16 words. Within a tile the
codes follow each other as (row r, half h, position p), four to a word, low nibble first, where
position p of a half of 32 columns holds column PI[p]:

    PI = 0 8 16 24  1 9 17 25  2 10 18 26 ... 7 15 23 31

No ``Packing`` describes that, so these codes are repacked to canonical bytes. Their zeros are
floats o, W = c*s + o.

Zeros and scales of ``gemv``, ``gemv_fast`` and ``llm-awq`` are padded along the groups with zeros;
anything else there means that group_size is wrong, and is refused.

Source: AutoAWQ 0.2.9 ``awq/modules/linear/{gemm,gemv,gemv_fast}.py``, facts only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.errors import ConfigError, LayoutError
from quant_core.intpack import stored_zeros
from quant_core.intspec import check_tensors
from quant_core.packing import Packed, pack, repack, unpack
from quant_core.spec import CANONICAL, LayerDesc, Packing
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_awq.geometry import TILED, padded_groups

if TYPE_CHECKING:
    from quant_plugin_awq.scheme import AwqScheme

__all__ = ["canonicalize", "pack_tiles", "pad_groups", "serialize", "unpack_tiles", "unpad_groups"]

_PI = torch.arange(32).view(4, 8).t().reshape(32)  # column at each position of half a tile
_ROW_CODES = 8 << 20  # codes held unpacked at once; a step takes up to eight bytes for each


def unpack_tiles(qweight: Tensor) -> Tensor:
    """int16 tiles (N / 4, K) to canonical 4-bit codes: uint8 (N, K / 2), low nibble first."""
    quads, k = qweight.shape
    out = torch.empty(quads * 4, k // 2, dtype=torch.uint8, device=qweight.device)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=qweight.device)
    step = max(1, _ROW_CODES // (4 * k))
    for start in range(0, quads, step):
        words = qweight[start : start + step].reshape(-1, k // 64, 64, 1)
        flat = ((words >> shifts) & 15).to(torch.uint8).view(-1, k // 64, 4, 2, 32)
        codes = torch.empty_like(flat)
        codes[..., _PI.to(flat.device)] = flat
        rows = codes.permute(0, 2, 1, 3, 4).reshape(-1, k)
        out[4 * start : 4 * start + rows.shape[0]] = rows[:, ::2] | (rows[:, 1::2] << 4)
    return out


def pack_tiles(codes: Tensor) -> Tensor:
    """Inverse of ``unpack_tiles``: uint8 (N, K / 2) to int16 (N / 4, K)."""
    n, half = codes.shape
    k = 2 * half
    out = torch.empty(n // 4, k, dtype=torch.int16, device=codes.device)
    step = max(1, _ROW_CODES // (4 * k))
    for start in range(0, n // 4, step):
        part = codes[4 * start : 4 * (start + step)]
        rows = torch.stack((part & 15, part >> 4), dim=-1).view(-1, 4, k // 64, 2, 32)
        flat = rows[..., _PI.to(codes.device)].transpose(1, 2)
        nibbles = flat.reshape(-1, k, 4).to(torch.int16)
        words = nibbles[..., 0] | (nibbles[..., 1] << 4) | (nibbles[..., 2] << 8)
        out[start : start + words.shape[0]] = words | (nibbles[..., 3] << 12)
    return out


def unpad_groups(values: Tensor, groups: int, tensor: str) -> Tensor:
    """The first ``groups`` columns of (N, padded), a view; the rest must be zero.

    Raises:
        LayoutError: ``Q-LAYOUT-GROUP`` if padding holds values.
    """
    if values.shape[1] == groups:
        return values
    used = values[:, groups:].ne(0).any(dim=0).nonzero()
    if len(used):
        found = groups + 1 + int(used[-1])
        raise LayoutError(
            f"{tensor}: values in {found} group columns, expected {groups} and zeros after them. "
            "group_size in the config is larger than the one the tensors were made with.",
            code="Q-LAYOUT-GROUP",
            tensor=tensor,
            expected=groups,
            actual=found,
            plugin="awq",
        )
    return values[:, :groups]


def pad_groups(values: Tensor, width: int) -> Tensor:
    """Inverse of ``unpad_groups``: (N, groups) to (N, width), zeros at the end."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


def _check_used_groups(scales: Tensor, padded: bool, tensor: str) -> None:
    """A padded layout whose last groups are zero in all rows was made with a larger group_size."""
    if padded and scales.numel() and not scales[:, -1].any():
        raise LayoutError(
            f"{tensor}: the scales of the last of {scales.shape[1]} groups are all zero, expected "
            "values. group_size in the config is smaller than the one the tensors were made with.",
            code="Q-LAYOUT-GROUP",
            tensor=tensor,
            actual=0,
            plugin="awq",
        )


def _check_symmetric(scheme: AwqScheme, ok: bool, tensor: str) -> None:
    if not ok:
        raise ConfigError(
            f"{tensor}: zeros other than {1 << (scheme.bits - 1)} are stored, expected only that "
            "one because the config says zero_point false. Set zero_point true if these weights "
            "are asymmetric.",
            code="Q-CFG-CONFLICT",
            tensor=tensor,
            expected=1 << (scheme.bits - 1),
            plugin="awq",
        )


def _codes(scheme: AwqScheme, qweight: Tensor) -> Tensor:
    return unpack_tiles(qweight) if scheme.layout in TILED else qweight


def zeros_by_group(scheme: AwqScheme, tensors: Mapping[str, Tensor]) -> Packed:
    """Zero codes of gemm, which are packed along N: (K/g, N)."""
    return Packed(
        words=tensors[scheme.zeros],
        bits=scheme.bits,
        shape=(scheme.groups, scheme.shape[0]),
        packing=Packing(word="int32", order=scheme.packing.order),
    )


def canonicalize(
    scheme: AwqScheme, layer: LayerDesc, tensors: Mapping[str, Tensor]
) -> LayerTensors:
    """Stored tensors to canonical form.

    Shapes:  see ``geometry``  ->  codes as ``scheme.packing``, scales (N, K/g), zeros uint8
             (N, K/g) or offset (N, K/g)
    Raises:  LayoutError for shapes, dtypes or padding that do not fit; CheckpointError for what is
             missing; ConfigError ``Q-CFG-CONFLICT`` if zero_point is false but the zeros are not
             2**(bits-1)
    """
    check_tensors(layer, scheme.params(layer), tensors, plugin="awq")
    n, _ = scheme.shape
    groups, padded = scheme.groups, scheme.layout != "gemm"
    zeros_name, scales_name = f"{layer.stored}.{scheme.zeros}", f"{layer.stored}.scales"
    scales = tensors["scales"]
    if scheme.layout != "gemv":
        scales = scales.t()
    scales = unpad_groups(scales, groups, scales_name)
    _check_used_groups(scales, padded, scales_name)
    zeros: Tensor | None = None
    offset: tuple[Tensor, ...] = ()
    half = 1 << (scheme.bits - 1)
    if scheme.zeros and scheme.layout in TILED:
        offset = (unpad_groups(tensors[scheme.zeros].t(), groups, zeros_name),)
        symmetric = scheme.zero_point or torch.equal(offset[0].float(), -half * scales.float())
        _check_symmetric(scheme, symmetric, zeros_name)
    elif scheme.zeros:
        stored = tensors[scheme.zeros]
        if scheme.layout == "gemm":
            zeros = zeros_by_group(scheme, tensors).codes().t()
        else:
            packed = unpack(stored, 4, (n, 8 * stored.shape[1]), Packing(word="int32"))
            zeros = unpad_groups(packed, groups, zeros_name)
        _check_symmetric(scheme, scheme.zero_point or bool((zeros == half).all()), zeros_name)
    weight = QuantizedTensor(
        spec=scheme.weight,
        shape=scheme.shape,
        codes=_codes(scheme, tensors["qweight"]),
        packing=scheme.packing,
        scales=(scales,),
        zeros=zeros,
        offset=offset,
    )
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def _check_representable(scheme: AwqScheme, layer: LayerDesc, tensors: LayerTensors) -> None:
    qt, want = tensors.weight, scheme.weight
    constant = qt.spec.zero is not None and qt.spec.zero.kind == "const"
    same_zero = qt.spec.zero == want.zero or (
        constant and want.zero is not None and want.zero.kind == "code"
    )
    extras = [
        name
        for name in ("acc_bias", "out_scale", "input_scale", "input_zero")
        if getattr(tensors, name) is not None
    ]
    if tensors.transforms:
        extras.append("transforms")
    if qt.gather is not None:
        extras.append("gather")
    same = qt.spec.element == want.element and qt.spec.scales == want.scales and same_zero
    if extras or not same or tuple(qt.shape) != scheme.shape:
        what = f"with {', '.join(extras)}" if extras else f"{qt.spec.label} {tuple(qt.shape)}"
        raise LayoutError(
            f"{layer.name}: weight {what} cannot be held by AWQ {scheme.layout}, expected "
            f"{want.label} {scheme.shape} alone. Choose another target format or scheme.",
            code="Q-LAYOUT-REPRESENT",
            tensor=layer.name,
            expected=want.label,
            actual=qt.spec.label,
            plugin="awq",
        )


def serialize(scheme: AwqScheme, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``, padding included.

    Codes may come in any packing. A constant zero is written as stored zeros where the scheme
    has them.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if this layout cannot hold ``tensors``.
    """
    _check_representable(scheme, layer, tensors)
    qt = tensors.weight
    n, k = scheme.shape
    width = padded_groups(k, scheme.group_size)
    gemv, tiled = scheme.layout == "gemv", scheme.layout in TILED
    codes = repack(
        qt.codes, scheme.bits, (n, k), qt.packing, CANONICAL if tiled else scheme.packing
    )
    out = {"qweight": pack_tiles(codes) if tiled else codes}
    scales = qt.scales[0]
    if scheme.layout != "gemm":
        scales = pad_groups(scales, width)
    if scheme.zeros and tiled:
        out[scheme.zeros] = pad_groups(qt.offset[0], width).t().contiguous()
    elif scheme.zeros:
        zeros = stored_zeros(qt)
        if gemv:
            out[scheme.zeros] = pack(pad_groups(zeros, width), 4, Packing(word="int32"))
        else:
            out[scheme.zeros] = pack(zeros, scheme.bits, scheme.packing)
    out["scales"] = scales.contiguous() if gemv else scales.t().contiguous()
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out
