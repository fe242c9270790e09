"""Which block type holds a canonical matrix: by meaning, not by where it comes from.

    the spec of a block type             that type (Q4_K, IQ3_S, Q8_0, ... keep their bytes)
    c*s + o, groups of 32 n, f16         Q4_1, Q5_1
    (c - z)*s, groups of 32 n, f16       the smallest of Q4_0, Q4_1, Q5_0, Q8_0 that is exact

Zero codes are subtracted into the codes where that fits: 4-bit codes with 4-bit zero points lie
in -15 .. 15, which is Q5_0. Q4_1 needs -z*s as a float16, which is exact for few scales.

    option  values                      default
    type    q4_0, q4_1, q5_0, q8_0      the smallest that is exact
    types   module -> type, as above    for single modules
    pre     name of a pre-tokenizer     recognized from tokenizer.json, see ``vocab``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_core.convert.fit import Fit, Losses, cannot_hold, check_options
from quant_core.scheme import Scheme
from quant_plugin_gguf.layouts import LAYOUTS, spec_of
from quant_plugin_gguf.scheme import TENSOR_SCALE, GgufScheme
from quant_plugin_gguf.types import BY_NAME

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["TYPES", "fit", "settle"]

TYPES = ("q4_0", "q4_1", "q5_0", "q8_0")  # by size; a later one holds all that an earlier one does
_BLOCK = 32
_CENTER = {"q4_0": 8, "q5_0": 16, "q8_0": 128}
_OPTIONS: Mapping[str, tuple[Any, ...]] = {"type": TYPES, "types": (), "pre": ()}
_SMALLER = "Quantize the original model to a block type, or choose another target."


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    from quant_core.convert import steps

    check_options(options, _OPTIONS, "gguf")
    losses = Losses(layer.name, allow_inexact)
    lt = steps.weight_only(tensors, operands, losses)
    wanted = options.get("types", {}).get(layer.name, options.get("type", ""))
    name, qt = _same_type(lt.weight), lt.weight
    if not name or wanted not in ("", name):
        assert layer.inp is not None
        name, qt = _integers(qt, layer.inp.total, wanted, losses)
    beside: tuple[tuple[str, str], ...] = ()
    if lt.bias is not None:
        lt = replace(lt, bias=lt.bias.float())
        beside = (("bias", "float32"),)
    spec = spec_of(name)
    if qt.spec != spec:  # NVFP4 with a scale for the whole tensor
        spec, beside = qt.spec, (*beside, ("scale", "float32"))
    scheme = GgufScheme(
        name=name,
        shape=(qt.shape[0], qt.shape[1]),
        operands={"weight": spec},
        module=layer.stored,
        beside=beside,
    )
    return Fit(scheme=scheme, tensors=replace(lt, operands={"weight": qt}), losses=losses.taken())


def _same_type(qt: QuantizedTensor) -> str:
    """The block type whose meaning ``qt`` has already; "" if there is none."""
    spec = qt.spec
    if spec.blocks:
        name = spec.blocks.removeprefix("gguf_")
        return name if name in BY_NAME and f"gguf_{name}" == spec.blocks else ""
    if len(spec.scales) == 2 and spec.scales[-1] == TENSOR_SCALE:
        spec = replace(spec, scales=spec.scales[:-1])
        return "nvfp4" if spec == spec_of("nvfp4") and qt.shape[1] % 64 == 0 else ""
    table = tuple(v for book in qt.codebook for v in book.tolist())
    for name, layout in LAYOUTS.items():
        if spec == layout.spec() and table == layout.codebook and not qt.shape[1] % layout.weights:
            return name
    return ""


def _integers(
    qt: QuantizedTensor, in_features: int, wanted: str, losses: Losses
) -> tuple[str, QuantizedTensor]:
    """(block type, the same weights as it means them).

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``.
    """
    from quant_core.convert import steps

    where = losses.where
    steps.plain_codes(qt, where)
    qt = steps.in_order(qt, in_features, where)
    if in_features % _BLOCK:
        found = f"has {in_features} input features"
        raise cannot_hold(where, found, f"a multiple of {_BLOCK}", _SMALLER)
    qt = steps.one_scale(qt, ("f16",), losses)
    qt = steps.group_columns(qt, _BLOCK, where)
    if steps.has_float_zeros(qt) and losses.allowed and wanted in ("", "q4_1"):
        losses.lose("zero points are floats", "minima", "zero points stored as float16 minima")
        qt = steps.zeros_as_offset(qt)
    if qt.spec.zero is not None and qt.spec.zero.kind == "offset" and wanted in ("", "q4_1"):
        force = bool(wanted) or losses.allowed
        if (offset := _with_offset(qt, losses, force=force)) is not None:
            return offset
    qt = steps.integer_zero(qt, losses, wide=True)
    for name in (wanted,) if wanted else TYPES:
        out = _minima(qt, losses, force=bool(wanted)) if name == "q4_1" else _centered(qt, name)
        if out is not None:
            return name, out
    raise cannot_hold(
        where,
        f"codes less zero points of {qt.spec.label}",
        f"what fits the {wanted or '8-bit codes of q8_0'}",
        _SMALLER,
    )


def _centered(qt: QuantizedTensor, name: str) -> QuantizedTensor | None:
    """Codes around the constant zero of a block type; None if some do not fit."""
    from quant_core.convert import steps
    from quant_core.rewrites import repack
    from quant_core.spec import CANONICAL

    bits = spec_of(name).element.bits
    out = steps.recenter(qt, bits, _CENTER[name])
    if out is None or name != "q8_0":
        return out
    out = repack(out, CANONICAL)
    return replace(out, spec=spec_of(name), codes=out.codes ^ 0x80)  # two's complement


def _minima(qt: QuantizedTensor, losses: Losses, *, force: bool) -> QuantizedTensor | None:
    """Q4_1: zero points as float16 minima -z*s; None if that is not exact (unless forced)."""
    import torch

    from quant_core.convert import steps
    from quant_core.numerics import decode_scale

    out = steps.code_zeros(qt, 4)
    if out is None:
        return None
    assert out.zeros is not None
    exact = -out.zeros.double() * decode_scale(out.scales[0], "f16").double()
    minima = exact.to(torch.float16)
    if not torch.equal(minima.double(), exact):
        if not force:
            return None
        losses.lose(
            "zero points times scales are no float16",
            "float16 minima",
            "zero points stored as float16 minima",
        )
    return _as_minima(out, minima)


def _as_minima(qt: QuantizedTensor, minima: Tensor) -> QuantizedTensor:
    return replace(qt, spec=spec_of("q4_1"), zeros=None, offset=(minima,))


def _with_offset(
    qt: QuantizedTensor, losses: Losses, *, force: bool
) -> tuple[str, QuantizedTensor] | None:
    """An offset as the float16 minima of Q4_1 or Q5_1; None if it is not one."""
    import torch

    from quant_core.convert import steps

    zero = qt.spec.zero
    bits = qt.spec.element.bits
    if zero is None or qt.spec.element.kind != "uint" or bits > 5:
        return None
    bare = replace(qt, spec=replace(qt.spec, scales=zero.levels, zero=None), offset=())
    bare = replace(bare, scales=qt.offset)
    inner = Losses(losses.where, allowed=True)
    minima = steps.group_columns(steps.one_scale(bare, ("f16",), inner), _BLOCK, losses.where)
    if inner.taken():
        if not force:
            return None
        losses.lose("offsets are no float16", "float16 minima", "offsets rounded to float16")
    name = "q4_1" if bits <= 4 else "q5_1"
    plain = replace(qt, spec=replace(qt.spec, zero=None), offset=())
    codes = steps.code_zeros(plain, spec_of(name).element.bits)
    if codes is None or not torch.isfinite(minima.scales[0]).all():
        return None
    return name, replace(codes, spec=spec_of(name), zeros=None, offset=minima.scales)


def settle(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """See the hook ``settle_options``: the experts of a stack are of one block type."""
    types = dict(options.get("types", {}))
    for member, found in schemes.items():
        names = {s.name for s in found}
        if len(names) > 1 and names <= set(TYPES):
            types[member] = max(names, key=TYPES.index)
    return {**options, "types": types} if types else options
