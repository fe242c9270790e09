"""Every number of a matrix is finite: scales, offsets, bias, and codes of types that have NaN.

Checked once for all formats, where a matrix is read. Kernels count on it: several decode fp8 by
arithmetic on its bits, in which NaN and infinity would be ordinary numbers.

    fp8_e4m3               s 1111 111            NaN
    fp8_e5m2               s 11111 00, 01 .. 11  infinity, NaN
    fp8_e4m3_fnuz, e5m2    1 0000000             NaN; other codes all are numbers

fp4 and fp6 have neither. Codes are read as bytes, in whatever packing: codes of 8 bits are whole
bytes in each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.dequantize import level_values
from quant_core.errors import LayoutError
from quant_core.kernels.finite import Look, all_finite
from quant_core.spec import TENSOR, LayerDesc, Scale
from quant_core.tensors import LayerTensors, QuantizedTensor

if TYPE_CHECKING:
    from quant_core.plan import Plan

__all__ = ["Read", "check_matrices", "check_matrix", "float_error", "odd_codes"]

_PIECE = 1 << 19  # bytes, so that the copy of a piece stays in the cache
_LEAST = {"fp8_e4m3": 0x7F, "fp8_e5m2": 0x7C}  # without the sign; what is not below is no number
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_NEGATIVE_ZERO = ("fp8_e4m3_fnuz", "fp8_e5m2_fnuz")


def _known(element: str) -> bool:
    return element in _LEAST or element in _NEGATIVE_ZERO


def odd_codes(codes: Tensor, element: str) -> Tensor | None:
    """Which codes of a small float are NaN or infinite.

    Args:
        codes: uint8 of any shape, one code per byte.
        element: name of the float element.

    Returns:
        bool of the shape of ``codes``; None if there is no such code.
    """
    raw = codes.contiguous().view(-1)
    if element in _NEGATIVE_ZERO:
        least = raw.view(torch.int8).amin() if raw.numel() else 0
        return codes == 0x80 if int(least) == -128 else None
    top = _LEAST.get(element)
    if top is None or all(int((p & 0x7F).amax()) < top for p in raw.split(_PIECE) if p.numel()):
        return None
    return (codes & 0x7F) >= top


def _error(where: str, bad: Tensor, what: str, code: str) -> LayoutError:
    first, count = tuple(int(i) for i in bad.nonzero()[0]), int(bad.sum())
    return LayoutError(
        f"{where}: {count} of {bad.numel()} {what} are NaN or infinite (first at {first}), "
        "expected finite numbers. The quantization overflowed; quantize again.",
        code=code,
        tensor=where,
        expected="finite",
        actual=count,
    )


def float_error(plan: Plan, stored: str, value: Tensor) -> LayoutError | None:
    """What is wrong with a float tensor of a checkpoint: ``Q-VALUE-WEIGHT``; None if it is finite.

    Args:
        value: the stored tensor ``stored``, as it was read.
    """
    if not value.is_floating_point():
        return None
    bad = ~torch.isfinite(value)
    count = int(bad.sum())
    if not count:
        return None
    first = tuple(int(i) for i in bad.nonzero()[0])
    return LayoutError(
        f"{plan.checkpoint.tensors[stored].file}: tensor {stored!r} holds {count} of "
        f"{value.numel()} NaN or infinite values (first at {first}), expected finite numbers. "
        "The file is damaged, or training or export overflowed; get it again.",
        code="Q-VALUE-WEIGHT",
        tensor=stored,
        expected="finite",
        actual=count,
    )


def _check_codes(where: str, qt: QuantizedTensor, stored: Mapping[str, Tensor]) -> None:
    element = qt.spec.element
    if element.kind != "float" or element.bits != 8:
        return
    codes = qt.codes.view(torch.uint8)
    bad = odd_codes(codes, element.name)
    if bad is None:
        return
    size = codes.numel()
    leaf = next((n for n, t in stored.items() if t.numel() * t.element_size() == size), "")
    raise _error(f"{where}.{leaf}" if leaf else where, bad, "weights", "Q-VALUE-WEIGHT")


@functools.cache
def _odd_scales(element: str) -> tuple[int, ...]:
    """Bytes that are no finite scale."""
    codes = torch.arange(256, dtype=torch.uint8)
    return tuple(
        codes[~torch.isfinite(level_values(codes, Scale(element=element, grain=TENSOR)))].tolist()
    )


def _bytes_finite(values: Tensor, element: str) -> bool:
    """Whether no scale of a byte is infinite or NaN; False where that takes their values."""
    odd = _odd_scales(element)
    if odd == (255,):
        return all(int(p.amax()) < 255 for p in values.reshape(-1).split(_PIECE) if p.numel())
    return not odd or (_known(element) and odd_codes(values, element) is None)


def _check_level(
    where: str, name: str, values: Tensor, scale: Scale, codebook: tuple[Tensor, ...]
) -> None:
    of_bytes = values.dtype == torch.uint8 and scale.element != "lut8"
    if of_bytes and _bytes_finite(values, scale.element):
        return
    decoded = level_values(values, scale, codebook)
    if decoded.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(decoded))).all()):
        return  # a NaN anywhere makes both ends NaN
    bad = ~torch.isfinite(decoded)
    if bool(bad.any()):
        raise _error(where, bad, f"{name} values", "Q-VALUE-SCALE")


Read = tuple[LayerDesc, LayerTensors, Mapping[str, Tensor]]
"""A matrix as it was read: its layer, its tensors, and the stored ones that it was made of."""


def check_matrices(read: Sequence[Read], look: Look = all_finite) -> None:
    """Codes, scales, offsets and bias of every matrix are finite.

    Args:
        read: stored tensors are those that an error names.
        look: who looks at floats first, of all matrices at once; what it finds is looked for
            again, and named.

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` for codes and bias, ``Q-VALUE-SCALE`` for scales and
            offsets, with the number of values and the place of the first.
    """
    levels = [list(_levels(lt)) for _, lt, _ in read]
    floats = [v for found in levels for _, _, v, _ in found if v.dtype in _FLOATS]
    floats += [lt.bias for _, lt, _ in read if lt.bias is not None and lt.bias.dtype in _FLOATS]
    finite = not floats or look(floats)
    for (layer, lt, stored), found in zip(read, levels, strict=True):
        where = layer.stored
        for qt in lt.operands.values():
            if not qt.spec.blocks:
                _check_codes(where, qt, stored)
        for name, qt, values, scale in found:
            if not (finite and values.dtype in _FLOATS):
                _check_level(where, name, values, scale, qt.codebook)
        if lt.bias is not None and not (finite and lt.bias.dtype in _FLOATS):
            bad = ~torch.isfinite(lt.bias.float())
            if bool(bad.any()):
                raise _error(f"{where}.bias", bad, "values", "Q-VALUE-WEIGHT")


def _levels(lt: LayerTensors) -> Iterator[tuple[str, QuantizedTensor, Tensor, Scale]]:
    """What it is, whose, its values and their meaning: of all scales and offsets."""
    for qt in lt.operands.values():
        if qt.spec.blocks:
            continue
        for values, scale in zip(qt.scales, qt.spec.scales, strict=True):
            yield "scale", qt, values, scale
        minima = qt.spec.zero.levels if qt.spec.zero is not None else ()
        for values, scale in zip(qt.offset, minima, strict=True):
            yield "offset", qt, values, scale


def check_matrix(
    layer: LayerDesc, lt: LayerTensors, stored: Mapping[str, Tensor], look: Look = all_finite
) -> None:
    """``check_matrices`` of one."""
    check_matrices([(layer, lt, stored)], look)
