"""Any weight as a wanted description: its codes, zeros and scales, exactly or with named losses.

    codes    integers move around another zero and into wider codes; small floats into wider ones
    scales   the same factors on other grids; a factor as its divisor; all folded into one float32
             (by the oracle's own order, so that weights keep their bits) and stored in another
             type; a power of two taken out for the coarser of two factors

What would round weights is a loss; what would have to round codes is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.convert.fit import Losses, cannot_hold
from quant_core.convert.steps.codes import code_zeros, map_codes, recenter, row_blocks, spread
from quant_core.convert.steps.layer import ANOTHER, in_order
from quant_core.convert.steps.offsets import integer_zero
from quant_core.convert.steps.scales import divisor_of, one_scale
from quant_core.dequantize import unpack_codes
from quant_core.errors import LayoutError
from quant_core.flat import shrink_grid
from quant_core.numerics import decode_scale, element_table, encode_scale, scale_dtype
from quant_core.packing import pack, repack
from quant_core.rewrites import fold_scales
from quant_core.rewrites.cut import slice_rows_of
from quant_core.rewrites.grains import common_grain, repeat_grid
from quant_core.spec import CANONICAL, Element, Grain, QuantSpec, Scale, Zero
from quant_core.tensors import QuantizedTensor

__all__ = ["meet"]

_WIDE = ("f16", "bf16", "f32")
_NONE = 255  # in a table of codes: the target has no such value


def meet(qt: QuantizedTensor, want: QuantSpec, in_features: int, losses: Losses) -> QuantizedTensor:
    """The same weights described by ``want``.

    Args:
        qt: a matrix.
        in_features: of the layer; columns are put in this order unless ``want`` has a gather.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``.
    """
    if replace(qt.spec, ties=want.ties) == want:
        return replace(qt, spec=want)
    where = losses.where
    kinds = (qt.spec.element.kind, want.element.kind)
    tables = {"lut", "vector"} & set(kinds)
    if qt.spec.blocks or want.blocks or tables or (kinds[0] == "float") != (kinds[1] == "float"):
        found, expected = f"weights are {qt.spec.label}", want.label
        raise cannot_hold(where, found, expected, ANOTHER)
    if not want.gather:
        qt = in_order(qt, in_features, where)
    zero = qt.spec.zero
    if zero is None or (zero.kind != "offset" and zero.element not in _WIDE):
        _scales(qt, want, Losses(where, True))  # cheap, and refuses before all codes are touched
    if kinds[1] == "float":
        qt = _float_codes(qt, want.element, where)
        if qt.spec.zero is not None or want.zero is not None:
            raise cannot_hold(where, f"zeros of {qt.spec.label}", want.label, ANOTHER)
    else:
        qt = _integer_codes(qt, want, losses)
    qt = _scales(qt, want, losses)
    if replace(qt.spec, ties=want.ties) != want:
        raise cannot_hold(where, f"weights are {qt.spec.label}", want.label, ANOTHER)
    return replace(qt, spec=want)


# ------------------------------------------------------------------------------------------ codes


def _float_codes(qt: QuantizedTensor, element: Element, where: str) -> QuantizedTensor:
    """Small floats as those of another type that has every value in use. Exact."""
    old = qt.spec.element
    if old == element:
        return qt
    values, wanted = element_table(old.name), element_table(element.name)
    table = torch.full((256,), _NONE, dtype=torch.uint8)
    for code, value in enumerate(values.tolist()):
        same = (wanted == value) & (torch.signbit(wanted) == torch.signbit(values[code]))
        if bool(same.any()):
            table[code] = int(same.nonzero()[0])
    rows = []
    for start, stop in row_blocks(qt.shape[0], qt.shape[1]):
        codes = unpack_codes(slice_rows_of(qt, start, stop)).long()
        new = table[codes]
        if bool((new == _NONE).any()):
            found = f"{old.name} codes with values that {element.name} lacks"
            raise cannot_hold(where, found, f"{element.name} codes", ANOTHER)
        rows.append(pack(new, element.bits, CANONICAL))
    spec = replace(qt.spec, element=element)
    return replace(qt, spec=spec, codes=torch.cat(rows), packing=CANONICAL)


def _integer_codes(qt: QuantizedTensor, want: QuantSpec, losses: Losses) -> QuantizedTensor:
    """Codes and zeros as ``want`` has them."""
    zero, bits = want.zero, want.element.bits
    have = qt.spec.zero
    if (qt.spec.element, have) == (want.element, zero):
        return qt
    if zero is not None and zero.kind == "code" and zero.element in _WIDE:
        return _float_zeros(qt, bits, zero.element, losses)
    if have is not None and (have.kind == "offset" or have.element in _WIDE):
        qt = integer_zero(one_scale(qt, _WIDE, losses), losses, wide=bits == 8)
    signed = want.element.kind == "int"
    center = 1 << (bits - 1)
    out: QuantizedTensor | None = None
    if zero is None and signed:
        out = recenter(qt, bits, center)
    elif zero is not None and zero.kind == "const" and not signed:
        out = recenter(qt, bits, zero.value)
    elif zero is not None and zero.kind == "code":
        out = code_zeros(qt, bits)
    if out is None or (signed and bits != 8):
        found = f"codes or zero points of {qt.spec.label}"
        raise cannot_hold(losses.where, found, want.label, ANOTHER)
    return _signed(out) if signed else out


def _signed(qt: QuantizedTensor) -> QuantizedTensor:
    """uint8 codes around 128, or with uint8 zeros, as int8 values: the top bit flips."""
    codes = repack(qt.codes, 8, (qt.shape[0], qt.shape[1]), qt.packing, CANONICAL)
    zero, zeros = None, None
    if qt.zeros is not None:
        zero, zeros = Zero(kind="code", element="int8"), qt.zeros ^ 0x80
    spec = replace(qt.spec, element=Element.int(8), zero=zero)
    return replace(qt, spec=spec, codes=codes ^ 0x80, packing=CANONICAL, zeros=zeros)


def _float_zeros(qt: QuantizedTensor, bits: int, element: str, losses: Losses) -> QuantizedTensor:
    """Unsigned codes of ``bits`` bits with zero points that are floats of ``element``."""
    zero = qt.spec.zero
    if zero is not None and zero.kind == "offset":
        qt = _wider(_offset_as_zeros(qt, losses), bits, losses.where)
    elif zero is None or zero.element not in _WIDE:
        exact = code_zeros(qt, bits)
        if exact is None:
            centred = recenter(qt, bits, 1 << (bits - 1))
            exact = None if centred is None else code_zeros(centred, bits)
        if exact is None:
            found = f"codes or zero points of {qt.spec.label}"
            raise cannot_hold(losses.where, found, f"codes of {bits} bits", ANOTHER)
        qt = exact
    else:
        qt = _wider(qt, bits, losses.where)
    assert qt.zeros is not None
    assert qt.spec.zero is not None
    values = decode_scale(qt.zeros, qt.spec.zero.element)
    zeros = values.to(scale_dtype(element))
    if not torch.equal(zeros.float(), values):
        losses.lose(
            f"zero points are not {element} exactly",
            f"zero points of {element}",
            f"zero points rounded to {element}",
        )
    spec = replace(qt.spec, zero=Zero(kind="code", element=element))
    return replace(qt, spec=spec, zeros=zeros)


def _wider(qt: QuantizedTensor, bits: int, where: str) -> QuantizedTensor:
    """Unsigned codes with float zeros in wider codes: the numbers stay what they are."""
    if qt.spec.element == Element.uint(bits):
        return qt
    if qt.spec.element.kind != "uint" or qt.spec.element.bits > bits:
        found = f"{qt.spec.element.name} codes with float zero points"
        raise cannot_hold(where, found, f"unsigned codes of {bits} bits", ANOTHER)
    codes = map_codes(qt, bits, lambda _, rows, values: values)
    assert codes is not None
    spec = replace(qt.spec, element=Element.uint(bits))
    return replace(qt, spec=spec, codes=codes, packing=CANONICAL)


def _offset_as_zeros(qt: QuantizedTensor, losses: Losses) -> QuantizedTensor:
    """``c*s + o`` as ``(c - z)*s`` with a float32 z = -o/s: equal up to its rounding."""
    zero = qt.spec.zero
    assert zero is not None
    shape = (qt.shape[0], qt.shape[1])
    if len(qt.scales) != 1:
        qt = fold_scales(qt, allow_inexact=True)
    offset = fold_scales(
        replace(
            qt, spec=QuantSpec(element=qt.spec.element, scales=zero.levels), scales=qt.offset,
            offset=(), zeros=None,
        ),
        allow_inexact=True,
    )  # fmt: skip
    level = qt.spec.scales[0]
    grain = common_grain(level.grain, offset.spec.scales[0].grain)
    scale = repeat_grid(qt.scales[0], level.grain, grain, shape)
    raw = repeat_grid(offset.scales[0], offset.spec.scales[0].grain, grain, shape)
    low = decode_scale(raw, offset.spec.scales[0].element).double()
    step = decode_scale(scale, level.element).double()
    qt = replace(qt, spec=replace(qt.spec, scales=(replace(level, grain=grain),)), scales=(scale,))
    if bool((flat := (step == 0) & (low != 0)).any()):
        qt, step = _steps_of_one_value(qt, flat, low)
    exact = torch.where(step == 0, 0.0, -low / step)
    zeros = exact.float()
    if not torch.equal(zeros.double() * step, -low):
        losses.lose(
            "offsets are no float32 multiple of their scale",
            "zero points times scales",
            "zero points rounded to f32 quotients",
        )
    spec = replace(qt.spec, zero=Zero(kind="code", element="f32"))
    return replace(qt, spec=spec, zeros=zeros, offset=())


def _steps_of_one_value(
    qt: QuantizedTensor, flat: Tensor, low: Tensor
) -> tuple[QuantizedTensor, Tensor]:
    """Groups of a scale of 0 and an offset as code 0 one step above a zero of -1; and all steps."""
    step = torch.where(flat, low, decode_scale(qt.scales[0], qt.spec.scales[0].element).double())
    keep = (~flat).float()

    def clear(at: slice, rows: QuantizedTensor, values: Tensor) -> Tensor:
        return values * spread(keep[at], rows)

    codes = map_codes(qt, qt.spec.element.bits, clear)
    assert codes is not None  # none grew
    level = replace(qt.spec.scales[0], element="f32")
    qt = replace(qt, spec=replace(qt.spec, scales=(level,)), codes=codes, packing=CANONICAL)
    return replace(qt, scales=(step.float(),)), step


# ----------------------------------------------------------------------------------------- scales


def _scales(qt: QuantizedTensor, want: QuantSpec, losses: Losses) -> QuantizedTensor:
    """Factors as ``want`` has them."""
    have, wanted = qt.spec.scales, want.scales
    if not have or not wanted:
        found = f"weights of {qt.spec.label} without scales"
        raise cannot_hold(losses.where, found, want.label, ANOTHER)
    if [_kind(s) for s in have] == [_kind(s) for s in wanted]:
        pairs = [(t, s, s.inverse) for t, s in zip(qt.scales, have, strict=True)]
    elif _same_but_divisors(have, wanted):
        pairs = [
            (_turned(t, s, w, losses), s, w.inverse)
            for t, s, w in zip(qt.scales, have, wanted, strict=True)
        ]
    else:
        qt = fold_scales(qt, allow_inexact=True)
        return _unfolded(qt, want, losses)
    values = tuple(
        _on_grid(t, s.grain, w.grain, qt, losses.where)
        for (t, s, _), w in zip(pairs, wanted, strict=True)
    )
    return _with(qt, want, values, losses)


def _kind(scale: Scale) -> tuple[str, bool, bool]:
    return (scale.element, scale.inverse, scale.add)


def _same_but_divisors(have: tuple[Scale, ...], want: tuple[Scale, ...]) -> bool:
    """The same factors, of which a float32 one may divide instead of multiply."""
    plain = [(s.element, s.add) for s in have] == [(s.element, s.add) for s in want]
    return plain and all(
        s.inverse == w.inverse or (s.element == "f32" and i > 0)
        for i, (s, w) in enumerate(zip(have, want, strict=True))
    )


def _turned(values: Tensor, have: Scale, want: Scale, losses: Losses) -> Tensor:
    """A factor that divides as one that multiplies (weights keep their bits), or the reverse."""
    if have.inverse == want.inverse:
        return values
    if have.inverse:
        return 1 / values
    divisor, exact = divisor_of(values)
    if not exact:
        losses.lose(
            "a factor of the tensor is not 1/x of any float32 x",
            "a factor that divides",
            "factor of the tensor replaced by its nearest divisor",
        )
    return divisor


def _on_grid(values: Tensor, old: Grain, new: Grain, qt: QuantizedTensor, where: str) -> Tensor:
    """Values on another grid: repeated, or one for all that are equal. Exact."""
    shape = (qt.shape[0], qt.shape[1])
    old, new = (_whole(g, shape) for g in (old, new))
    fine = common_grain(old, new)
    return shrink_grid(repeat_grid(values, old, fine, shape), fine, new, shape, where)


def _whole(grain: Grain, shape: tuple[int, int]) -> Grain:
    """The grain with 0 for an axis that one value covers."""
    r, c = (0 if g >= size else g for g, size in zip(grain, shape, strict=True))
    return (r, c)


def _with(
    qt: QuantizedTensor, want: QuantSpec, values: tuple[Tensor, ...], losses: Losses
) -> QuantizedTensor:
    zeros = qt.zeros
    if zeros is not None:
        old, new = qt.spec.scales[0].grain, want.scales[0].grain
        zeros = _on_grid(zeros, old, new, qt, losses.where)
    return replace(qt, spec=replace(qt.spec, scales=want.scales), scales=values, zeros=zeros)


def _unfolded(qt: QuantizedTensor, want: QuantSpec, losses: Losses) -> QuantizedTensor:
    """One factor as the factors of ``want``: the coarse ones are 1, or a power of two."""
    level, (fine, *coarse) = qt.spec.scales[0], want.scales
    odd = [s for s in coarse if s.element not in _WIDE or s.add]
    if odd or fine.inverse or fine.add:
        raise cannot_hold(losses.where, f"scales of {qt.spec.label}", want.label, ANOTHER)
    scale = decode_scale(qt.scales[0], level.element)
    if level.inverse:
        if bool((torch.frexp(scale).mantissa != 0.5).any()):
            losses.lose(
                "weights are divided by their scales",
                "scales that multiply",
                "scales replaced by their rounded inverses",
            )
        scale = 1 / scale
    scale = _on_grid(scale, level.grain, fine.grain, qt, losses.where)
    ones = [torch.ones(_grid(s.grain, qt), dtype=scale_dtype(s.element)) for s in coarse]
    if coarse and fine.element not in (*_WIDE, "e8m0"):
        power = _power(scale, fine.element)
        ones[0] = ones[0] / power if coarse[0].inverse else ones[0] * power
        scale = scale / power
    stored = _stored(scale, fine.element, losses)
    return _with(qt, want, (stored, *ones), losses)


def _grid(grain: Grain, qt: QuantizedTensor) -> tuple[int, int]:
    (n, k), (r, c) = qt.shape, grain
    return (-(-n // r) if r else 1, -(-k // c) if c else 1)


def _power(scale: Tensor, element: str) -> float:
    """The power of two that brings the largest scale to the top of ``element``."""
    top = float(scale.max()) if scale.numel() else 0.0
    if top <= 0:
        return 1.0
    table = element_table(element)
    peak = float(table[torch.isfinite(table)].max())
    return float(2.0 ** math.ceil(math.log2(top / peak)))


def _stored(scale: Tensor, element: str, losses: Losses) -> Tensor:
    """float32 scales in the type they are stored in.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for powers of two that are none, and overflow.
    """
    try:
        stored = encode_scale(scale, element)
    except LayoutError as err:
        found = "scales are no powers of two"
        raise cannot_hold(losses.where, found, f"scales of {element}", ANOTHER) from err
    back = decode_scale(stored, element)
    if not bool(torch.isfinite(back).all()):
        raise cannot_hold(losses.where, "scales overflow", f"scales of {element}", ANOTHER)
    if not torch.equal(back, scale):
        if bool(((back == 0) & (scale != 0)).any()):
            raise cannot_hold(losses.where, "scales underflow", f"scales of {element}", ANOTHER)
        losses.lose(
            f"scales are not {element} exactly",
            f"scales of {element}",
            f"scales rounded to {element}",
        )
    return stored
