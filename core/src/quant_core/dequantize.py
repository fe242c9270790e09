"""The oracle: canonical tensors to float32, in plain torch, written to be read.

The evaluation order is fixed, so that every kernel and peer can be compared bit for bit where
the arithmetic allows it. All in float32:

    S = 1 (* or /) s_last ... (* or /) s_1 (* or /) s_0    coarsest first; inverse factors divide
    a single inverse factor: x * S means x / s_0, one rounding instead of two
    a level marked ``add`` is added to the product so far

    const / code zero:     W = (c - z) * S
    offset:                W = c * S + O,   O from the offset's own factors, like S

Opaque blocks are handed to the reference their plugin registered.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.numerics import decode, decode_scale
from quant_core.packing import unpack
from quant_core.spec import Scale
from quant_core.tensors import QuantizedTensor

__all__ = [
    "combine_factors",
    "dense_weight",
    "dequantize",
    "dequantize_codes",
    "level_values",
    "scatter_columns",
    "unpack_codes",
]


def _expand(t: Tensor, scale: Scale, shape: tuple[int, int]) -> Tensor:
    """Broadcast a grid of values over [N, K]: shape [ceil(N/r), ceil(K/c)] -> [N|1, K|1]."""
    n, k = shape
    r, c = scale.grain
    if r > 1:
        t = t.repeat_interleave(r, dim=-2)[..., :n, :]
    if c > 1:
        t = t.repeat_interleave(c, dim=-1)[..., :k]
    return t


def level_values(values: Tensor, scale: Scale, codebook: tuple[Tensor, ...] = ()) -> Tensor:
    """float32 values of one level, read from the last codebook if its element is ``lut8``."""
    if scale.element == "lut8" and codebook and values.dtype == torch.uint8:
        return codebook[-1].float()[values.long()]
    return decode_scale(values, scale.element)


def combine_factors(
    tensors: tuple[Tensor, ...],
    scales: tuple[Scale, ...],
    shape: tuple[int, int],
    codebook: tuple[Tensor, ...] = (),
) -> Tensor:
    """S of the module's docstring: float32, broadcastable over ``shape``.

    Factors are expanded only as far as needed: a [N, 1] factor stays [N, 1].
    """
    total = torch.ones((), dtype=torch.float32, device=tensors[0].device if tensors else "cpu")
    for values, scale in reversed(list(zip(tensors, scales, strict=True))):
        factor = _expand(level_values(values, scale, codebook), scale, shape)
        if scale.add:
            total = total + factor
        else:
            total = total / factor if scale.inverse else total * factor
    return total


def unpack_codes(qt: QuantizedTensor) -> Tensor:
    """Raw codes, one per byte: uint8 [..., N, K] of ``qt.shape``."""
    bits = qt.spec.element.bits
    n, k = qt.shape[-2:]
    if len(qt.shape) == 2:
        return unpack(qt.codes, bits, (n, k), qt.packing)
    return torch.stack([unpack(c, bits, (n, k), qt.packing) for c in qt.codes])


def _present(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise LayoutError(
            f"quantized tensor has no {name!r}, which its spec calls for. "
            "Give the tensor, or describe the weights without it.",
            code="Q-LAYOUT-SHAPE",
            tensor=name,
        )
    return tensor


def _apply_scales(values: Tensor, qt: QuantizedTensor) -> Tensor:
    spec, shape = qt.spec, (qt.shape[-2], qt.shape[-1])
    zero = spec.zero
    if zero is not None and zero.kind == "const":
        values = values - zero.value
    elif zero is not None and zero.kind == "code":
        z = decode_scale(_present(qt.zeros, "zeros"), zero.element)
        values = values - _expand(z, spec.scales[0], shape)
    if len(spec.scales) == 1 and spec.scales[0].inverse:
        s = spec.scales[0]
        values = values / _expand(decode_scale(qt.scales[0], s.element), s, shape)
    elif spec.scales:
        values = values * combine_factors(qt.scales, spec.scales, shape, qt.codebook)
    if zero is not None and zero.kind == "offset":
        values = values + combine_factors(qt.offset, zero.levels, shape)
    return values


def block_reference(name: str) -> Callable[[Tensor, int], Tensor]:
    """The reference function of an opaque block type, from the plugin that registered it."""
    from quant_core.registry import registry

    module, _, attr = registry().block_type(name).target.partition(":")
    fn: Callable[[Tensor, int], Tensor] = getattr(importlib.import_module(module), attr)
    return fn


def dequantize(qt: QuantizedTensor) -> Tensor:
    """float32 values in STORED column order.

    Shapes: codes of (N, K) or (E, N, K) -> float32 of ``qt.shape``
    """
    if qt.spec.blocks:
        fn, k = block_reference(qt.spec.blocks), qt.shape[-1]
        return fn(qt.codes.reshape(-1, qt.codes.shape[-1]), k).view(qt.shape)
    return _apply_scales(decode(unpack_codes(qt), qt.spec.element, qt.codebook), qt)


def dequantize_codes(codes: Tensor, qt: QuantizedTensor) -> Tensor:
    """The same for codes already unpacked, uint8 of ``qt.shape``; ``qt.codes`` is not read."""
    return _apply_scales(decode(codes, qt.spec.element, qt.codebook), qt)


def scatter_columns(values: Tensor, gather: Tensor, in_features: int) -> Tensor:
    """Undo ``gather``: [..., K_stored] in stored order -> [..., in_features] in input order."""
    keep = gather >= 0
    out = torch.zeros(*values.shape[:-1], in_features, dtype=values.dtype, device=values.device)
    out[..., gather[keep].long()] = values[..., keep]
    return out


def dense_weight(qt: QuantizedTensor, in_features: int | None = None) -> Tensor:
    """float32 weight with columns in the order of the layer's input.

    ``in_features`` is needed only when trailing input features have no stored column.
    """
    w = dequantize(qt)
    if qt.gather is None:
        return w
    if qt.gather.dim() == 1:
        k = in_features or int(qt.gather.max()) + 1
        return scatter_columns(w, qt.gather, k)
    k = in_features or int(qt.gather.max()) + 1
    return torch.stack([scatter_columns(a, g, k) for a, g in zip(w, qt.gather, strict=True)])
