"""Float weights to canonical codes and scales: round to nearest, one way for every spec.

    s = max|W| / peak              of each tensor, row, group or block; 1 where that is 0
    s = 2 ** e                     e8m0: the exponent by a rule of ``numerics.mx_scale``
    s_block, s_tensor              two levels: ``numerics.tensor_scale``, ``numerics.block_scale``
    code = encode(W / S + zero)    S = all factors, as ``dequantize`` combines them

In row blocks, so that beside the result only some MiB of float32 are held. A scheme whose
producer rounds otherwise does it in its own ``quantize``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_core.dequantize import combine_factors
from quant_core.errors import LayoutError
from quant_core.numerics import (
    block_scale,
    decode_scale,
    element_range,
    encode,
    encode_scale,
    mx_scale,
    over,
    tensor_scale,
)
from quant_core.packing import pack
from quant_core.spec import CANONICAL, Element, Grain, QuantSpec, Scale
from quant_core.tensors import QuantizedTensor

__all__ = ["amax_grid", "check_finite", "encode_weight", "quantize_weight"]

_BLOCK_ELEMENTS = 1 << 18  # weights in work at once: 1 MiB of float32, and some such copies
_LEAST_AMAX = 2.0**-100  # below, a tensor's factor or its inverse leaves float32


def _row_blocks(rows: int, columns: int, align: int = 1) -> Iterator[tuple[int, int]]:
    step = max(align, _BLOCK_ELEMENTS // max(columns, 1) // align * align)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def check_finite(name: str, dense: Tensor) -> None:
    """Refuse NaN and infinity.

    Args:
        name: of the tensor, for the message.

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` with their number and the first position.
    """
    bad, first = 0, None
    for start, stop in _row_blocks(*dense.shape):
        wrong = ~torch.isfinite(dense[start:stop])
        count = int(wrong.sum())
        if count and first is None:
            row, column = (int(i) for i in wrong.nonzero()[0])
            first = (start + row, column)
        bad += count
    if bad:
        raise LayoutError(
            f"{name}: {bad} of {dense.numel()} weights are NaN or infinite (first at {first}), "
            "expected finite numbers. Repair the source checkpoint, or skip this layer.",
            code="Q-VALUE-WEIGHT",
            tensor=name,
            expected="finite",
            actual=bad,
        )


def amax_grid(dense: Tensor, grain: Grain) -> Tensor:
    """Largest magnitude under each value of a scale.

    Shapes:  dense (N, K) float  ->  float32 (ceil(N / rows), ceil(K / columns)) of the grain
    """
    n, k = dense.shape
    rows, cols = grain[0] or n, grain[1] or k
    parts = []
    for start, stop in _row_blocks(n, k, align=grain[0] or 1):
        block = dense[start:stop].float().abs()
        tall = min(rows, stop - start)
        block = F.pad(block, (0, -k % cols, 0, -(stop - start) % tall))
        parts.append(block.unflatten(1, (-1, cols)).unflatten(0, (-1, tall)).amax(dim=(1, 3)))
    grid = torch.cat(parts)
    return grid if grain[0] else grid.amax(dim=0, keepdim=True)


def _encode(values: Tensor, spec: QuantSpec, ties: str) -> Tensor:
    element, zero = spec.element, 0 if spec.zero is None else spec.zero.value
    if element.kind == "uint" and zero == 1 << (element.bits - 1):
        # exact: adding the zero to a float would round it once more
        return encode(values, Element.int(element.bits), ties) ^ zero
    return encode(values + zero, element, ties)


def encode_weight(
    dense: Tensor, spec: QuantSpec, scales: tuple[Tensor, ...], ties: str = ""
) -> Tensor:
    """Codes of a weight under given scales: encode(W / S), constant zero added.

    Shapes:  dense (N, K) float, scales on their grids  ->  codes in the canonical packing

    Args:
        ties: where a value halfway between two codes goes; "" = as ``spec.ties`` says.
    """
    n, k = dense.shape
    words = []
    for start, stop in _row_blocks(n, k, align=max(s.grain[0] for s in spec.scales) or 1):
        cut = tuple(
            t[start // s.grain[0] : -(-stop // s.grain[0])] if s.grain[0] else t
            for t, s in zip(scales, spec.scales)
        )
        spread = combine_factors(cut, spec.scales, (stop - start, k))
        codes = _encode(dense[start:stop].float() / spread, spec, ties or spec.ties)
        words.append(pack(codes, spec.element.bits, CANONICAL))
    return torch.cat(words)


def _one_scale(amax: Tensor, spec: QuantSpec, scale: Scale, rule: str, peak: float) -> Tensor:
    if scale.element == "e8m0":
        return mx_scale(amax, spec.element, rule)
    stored = encode_scale(over(amax, peak), scale.element)
    one = encode_scale(torch.ones_like(amax), scale.element)
    return torch.where(decode_scale(stored, scale.element) == 0, one, stored)


def _scales(
    dense: Tensor, spec: QuantSpec, rule: str, peak: float, least: float
) -> tuple[Tensor, ...]:
    fine, *coarse = spec.scales
    amax = amax_grid(dense, fine.grain)
    if not coarse:
        return (_one_scale(amax, spec, fine, rule, peak),)
    factor, whole = coarse[0], amax.amax().reshape(1, 1)
    whole = torch.where(whole == 0, whole, whole.clamp(min=_LEAST_AMAX))
    top = tensor_scale(whole, element=spec.element, scale=fine.element, inverse=factor.inverse)
    small = block_scale(
        amax,
        top,
        element=spec.element,
        scale=fine.element,
        inverse=factor.inverse,
        qmax=peak,
        least=least,
        most=element_range(Element(name=fine.element, bits=8, kind="float"))[1],
    )
    return (small, top)


def _check_spec(name: str, spec: QuantSpec) -> None:
    levels, zero = spec.scales, spec.zero
    good = (
        not spec.blocks
        and not spec.gather
        and spec.element.kind in ("int", "uint", "float")
        and len(levels) in (1, 2)
        and not levels[0].inverse
        and not any(s.add for s in levels)
        and (len(levels) == 1 or (levels[1].element, levels[1].grain) == ("f32", (0, 0)))
        and (zero is None or zero.kind == "const")
    )
    if not good:
        raise LayoutError(
            f"{name}: weights cannot be rounded to {spec.label}, expected symmetric codes under "
            "one scale, or under two of which the second is float32 and of the whole tensor. "
            "Choose another scheme.",
            code="Q-LAYOUT-REPRESENT",
            tensor=name,
            actual=spec.label,
        )


def quantize_weight(
    name: str,
    dense: Tensor,
    spec: QuantSpec,
    *,
    rule: str = "rceil",
    peak: float = 0.0,
    least: float = 2.0**-9,
) -> QuantizedTensor:
    """Round a float weight to what ``spec`` means.

    A group of zeros gets codes of zero and a finite scale. A value beyond the last code
    saturates; ties go where ``spec.ties`` says.

    Shapes:  dense (N, K) float  ->  codes in the canonical packing, scales on their grids

    Args:
        name: of the tensor, for messages.
        spec: symmetric; one scale, or a small float one under a float32 one of the tensor.
        rule: how e8m0 exponents are chosen (``numerics.MX_RULES``).
        peak: the code value that max|W| becomes; 0 = the element's largest. Producers of
            integers often take half the range of the codes, 7.5 for 4 bits.
        least: of the finer of two scales before it is rounded, so that it never becomes 0.

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` for NaN or infinity, ``Q-LAYOUT-REPRESENT`` for a spec
            with other scales or zeros.
    """
    _check_spec(name, spec)
    check_finite(name, dense)
    n, k = dense.shape
    zero = 0 if spec.zero is None else spec.zero.value
    peak = peak or element_range(spec.element)[1] - zero
    scales = _scales(dense, spec, rule, peak, least)
    codes = encode_weight(dense, spec, scales)
    return QuantizedTensor(spec=spec, shape=(n, k), codes=codes, packing=CANONICAL, scales=scales)
