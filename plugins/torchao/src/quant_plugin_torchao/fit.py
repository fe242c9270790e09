"""Which TorchAO class holds a canonical matrix.

    Int8Tensor                 int8, symmetric, one scale a row; activations float or int8 per token
    IntxUnpackedToInt8Tensor   2 to 8 bits in groups, perhaps with zero points; activations float or
                               int8 per token with a zero
    Float8Tensor               fp8, one scale a row; activations float or fp8 per token

    option      values                                      default
    group_size  of IntxUnpackedToInt8Tensor, a divisor      the layer's own
    kind        one of the classes                          the nearest; one for all in the end
    bits        of IntxUnpackedToInt8Tensor, 2 to 8         the layer's own; the widest in the end

The header of the file describes every weight; config.json holds one recipe for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import nearest_fit, sizes_of, wide_dtype
from quant_core.convert.fit import Allowed, Fit, check_options
from quant_core.scheme import Scheme
from quant_core.spec import Zero
from quant_plugin_torchao.entry import SUPPORTED, Entry, float8_inputs, int8_inputs
from quant_plugin_torchao.scheme import FP8, TorchaoScheme, build_scheme

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit", "settle"]

_OPTIONS: Mapping[str, Allowed] = {
    "group_size": int,
    "kind": SUPPORTED,
    "bits": tuple(range(2, 9)),
}
_HOLDS = "int8 or fp8 per row, or integers of 2 to 8 bits in groups"


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, _OPTIONS, "torchao")
    schemes = tuple(_candidates(layer, tensors, options))
    return nearest_fit(layer, tensors, operands, schemes, allow_inexact, holds=_HOLDS)


def _candidates(
    layer: LayerDesc, tensors: LayerTensors, options: Mapping[str, Any]
) -> Iterator[TorchaoScheme]:
    spec, shape = tensors.weight.spec, sizes_of(layer, tensors)
    if not spec.scales:
        return
    found = _floats if spec.element.kind == "float" else _integers
    for scheme in found(spec, shape, options):
        if options.get("kind", scheme.entry.kind) == scheme.entry.kind:
            yield scheme


def _build(entry: Entry, shape: tuple[int, int], spec: QuantSpec, code: str) -> TorchaoScheme:
    n, k = shape
    rows, columns = entry.block
    return build_scheme(
        entry,
        shape,
        code_dtype=code,
        scale_dtype=wide_dtype(spec) if len(spec.scales) == 1 else "float32",
        scale_shape=(n // rows, k // columns),
        zero_dtype="int8" if "zero_point" in entry.parts else "",
        source="config.json",
    )


def _floats(
    spec: QuantSpec, shape: tuple[int, int], options: Mapping[str, Any]
) -> Iterator[TorchaoScheme]:
    for code, element in FP8.items():
        for inputs in (None, float8_inputs(element, per_row=True)):
            entry = Entry(
                kind="Float8Tensor", block=(1, shape[1]), parts=("qdata", "scale"), inputs=inputs
            )
            yield _build(entry, shape, spec, code)


def _integers(
    spec: QuantSpec, shape: tuple[int, int], options: Mapping[str, Any]
) -> Iterator[TorchaoScheme]:
    parts = ("qdata", "scale", "zero_point")
    for inputs in (None, int8_inputs(True, symmetric=True), int8_inputs(True, symmetric=False)):
        entry = Entry(
            kind="Int8Tensor", block=(1, shape[1]), parts=("zero_point", "qdata", "scale"),
            inputs=inputs,
        )  # fmt: skip
        yield _build(entry, shape, spec, "int8")
    size = int(options.get("group_size", spec.scales[0].grain[1] or shape[1]))
    if shape[1] % size:
        return
    least = max(spec.element.bits, int(options.get("bits", 2)))
    for bits in range(least, 9):
        for inputs in (None, int8_inputs(True, symmetric=False)):
            entry = Entry(
                kind="IntxUnpackedToInt8Tensor", bits=bits, block=(1, size), parts=parts,
                inputs=inputs,
            )  # fmt: skip
            scheme = _build(entry, shape, spec, "int8")
            yield scheme
            zero = Zero(kind="code", element=scheme.weight.element.name)
            asymmetric = replace(scheme.weight, zero=zero)
            yield replace(scheme, operands={**scheme.operands, "weight": asymmetric})


def settle(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """See the hook ``settle_options``: one class for all layers, one width for those in groups."""
    flat = [s for many in schemes.values() for s in many if isinstance(s, TorchaoScheme)]
    kinds = {s.entry.kind for s in flat}
    grouped = "IntxUnpackedToInt8Tensor"
    bits = {s.entry.bits for s in flat if s.entry.kind == grouped}
    out = dict(options)
    if len(kinds) > 1 and grouped in kinds:
        out["kind"] = grouped
    if len(bits) > 1:
        out["bits"] = max(bits)
    return out
