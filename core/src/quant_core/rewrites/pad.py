"""Output rows that are exactly zero, for engines that want a padded vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_core.numerics import FLOAT_ELEMENTS, element_table, scale_dtype
from quant_core.packing import pack
from quant_core.rewrites.codes import concat_rows
from quant_core.rewrites.grains import cut_grain, levels, map_levels, regrain_axis
from quant_core.rewrites.refuse import check_scalar, only_weight, refuse
from quant_core.spec import Scale
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["pad_out"]


def _one(element: str) -> int | float:
    """The stored value that reads as 1 in a scale of ``element``."""
    if element in FLOAT_ELEMENTS:
        return int((element_table(element) == 1).nonzero()[0])
    return 1.0 if scale_dtype(element).is_floating_point else 1


def _zero_code(qt: QuantizedTensor) -> int:
    """A code whose weight is exactly 0 when the scale is 1 and a zero code or offset is 0."""
    spec = qt.spec
    target = spec.zero.value if spec.zero is not None and spec.zero.kind == "const" else 0
    if spec.element.kind == "uint" and target < 1 << spec.element.bits:
        return target
    if spec.element.kind == "lut" and target == 0:
        hits = (qt.codebook[0] == 0).nonzero().flatten()
        if len(hits):
            return int(hits[0])
    elif target == 0:
        return 0
    raise refuse(
        "REPRESENT",
        f"pad_out: no code of {spec.label!r} is a weight of exactly 0. "
        "Pad the output of the layer instead.",
        actual=spec.label,
    )


def _padded_blocks(qt: QuantizedTensor, rows: int) -> QuantizedTensor:
    from quant_core.dequantize import block_reference

    width, k = qt.codes.shape[-1], qt.shape[-1]
    blank = torch.zeros(1, width, dtype=torch.uint8)
    if bool(block_reference(qt.spec.blocks)(blank, k).any()):
        raise refuse(
            "REPRESENT",
            f"pad_out: zero bytes are not zero weights in blocks {qt.spec.blocks!r}. "
            "Pad the output of the layer instead.",
            actual=qt.spec.blocks,
        )
    codes = torch.nn.functional.pad(qt.codes, (0, 0, 0, rows))
    return replace(qt, codes=codes, shape=(*qt.shape[:-2], qt.shape[-2] + rows, k))


def _padded(qt: QuantizedTensor, rows: int) -> QuantizedTensor:
    if qt.spec.blocks:
        return _padded_blocks(qt, rows)
    check_scalar(qt, "pad_out")
    *stack, n, k = qt.shape
    per_tensor_zero = qt.zeros is not None and qt.spec.scales[0].grain[0] == 0
    offsets = [s for name, _, s in levels(qt.spec) if name == "offset"]
    if per_tensor_zero or (offsets and offsets[0].grain[0] == 0):
        qt = regrain_axis(qt, 0, lambda r: 1 if r == 0 else r)  # rows need a zero of their own
    qt = regrain_axis(qt, 0, lambda r: cut_grain(r, n))

    def blank(t: Tensor, s: Scale, value: float) -> Tensor:
        r = s.grain[0]
        if r == 0:
            return t
        count = -(-(n + rows) // r) - t.shape[-2]
        return torch.cat([t, t.new_full((*t.shape[:-2], count, t.shape[-1]), value)], dim=-2)

    tensors = map_levels(qt, lambda t, s: blank(t, s, _one(s.element)))
    if qt.zeros is not None:
        tensors["zeros"] = blank(qt.zeros, qt.spec.scales[0], 0)
    if qt.spec.zero is not None and qt.spec.zero.kind == "offset":
        finest = qt.spec.zero.levels[0]
        if finest.element == "e8m0" or finest.inverse:
            raise refuse(
                "REPRESENT",
                f"pad_out: an offset of element {finest.element!r} cannot be 0. "
                "Pad the output of the layer instead.",
                actual=finest.element,
            )
        values = [blank(t, s, _one(s.element)) for t, s in zip(qt.offset, qt.spec.zero.levels)]
        values[0] = blank(qt.offset[0], finest, 0)
        tensors["offset"] = tuple(values)
    codes = torch.full((rows, k), _zero_code(qt), dtype=torch.uint8, device=qt.codes.device)
    words = pack(codes, qt.spec.element.bits, qt.packing)
    below = replace(qt, shape=(*stack, rows, k), codes=words.expand(*stack, *words.shape))
    return replace(
        qt,
        shape=(*stack, n + rows, k),
        codes=concat_rows([qt, below]),
        **tensors,  # type: ignore[arg-type]
    )


def pad_out(lt: LayerTensors, out_features: int) -> LayerTensors:
    """Rows of exact zeros up to ``out_features``; the given rows do not change. Exact.

    Bias and acc_bias of the new rows are 0, their out_scale is 1.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if no code is a zero weight, ``Q-LAYOUT-TP`` if
            ``out_features`` is smaller than the layer.
    """
    weight = only_weight(lt, "pad_out")
    n = weight.shape[-2]
    if out_features < n:
        raise refuse(
            "TP",
            f"pad_out: {out_features} rows are fewer than the layer's {n}. "
            "Use slice_out to make a layer smaller.",
            expected=n,
            actual=out_features,
        )
    rows = out_features - n
    if rows == 0:
        return lt

    def longer(t: Tensor | None, value: float) -> Tensor | None:
        return None if t is None else torch.nn.functional.pad(t, (0, rows), value=value)

    out_scale = lt.out_scale
    if out_scale is not None and out_scale.numel() > 1:
        out_scale = longer(out_scale, 1.0)
    return replace(
        lt,
        operands={"weight": _padded(weight, rows)},
        bias=longer(lt.bias, 0),
        acc_bias=longer(lt.acc_bias, 0),
        out_scale=out_scale,
    )
