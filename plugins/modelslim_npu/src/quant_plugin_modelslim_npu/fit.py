"""Which ModelSlim type holds a canonical matrix; each layer has its own.

    W8A16, W8A8_DYNAMIC         int8 per row, or in groups
    W4A8_DYNAMIC                int4 per row; two rows a byte
    W4A4_DYNAMIC                int4 per row; one a byte
    WFP8AFP8_DYNAMIC            fp8 per row
    W8A8_MXFP8, W4A8_MXFP,      fp8, fp4 in blocks of 32 under powers of two
    W4A4_MXFP4
    W8A8, W4A4_FLATQUANT_..     from ModelSlim alone: they hold integer sums, matrices

Not written: W4A16, which other tools store under that name, and W8A8_MIX, whose static scales are
not kept. There are no options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import fit_linear, nearest_fit, sizes_of, wide_dtype
from quant_core.convert.fit import Fit, check_options
from quant_core.spec import CHANNEL, Grain, group
from quant_plugin_modelslim_npu.kinds import KINDS, Kind
from quant_plugin_modelslim_npu.scheme import BLOCK, FLAT, MsScheme, input_spec, weight_spec

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit"]

_UNWRITTEN = ("W4A16", "W8A8_MIX")
_HOLDS = "int8, int4 or fp8 per row, or fp8 and fp4 under powers of two"
_ROW_PARALLEL = ("down_proj", "o_proj")  # scale_bias is kept in parts there
_PARTS = 16


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, {}, "modelslim_npu")
    if tensors.acc_bias is not None:
        return fit_linear(layer, tensors, allow_inexact, lambda _: _static(layer, tensors))
    schemes = tuple(_candidates(layer, tensors, operands))
    return nearest_fit(layer, tensors, operands, schemes, allow_inexact, holds=_HOLDS)


def _dtypes(tensors: LayerTensors, **leaves: str) -> tuple[tuple[str, str], ...]:
    if tensors.bias is not None:
        leaves["bias"] = str(tensors.bias.dtype).removeprefix("torch.")
    return tuple(sorted(leaves.items()))


def _static(layer: LayerDesc, tensors: LayerTensors) -> Fit:
    """Integer sums, a bias before scaling and one combined scale: as they are."""
    kind = KINDS["W8A8"]
    found = tensors.input_scale
    dtype = "float32" if found is None else str(found.dtype).removeprefix("torch.")
    scheme = _scheme(
        kind, sizes_of(layer, tensors), [("float32", CHANNEL)],
        input_dtype=dtype,
        dtypes=_dtypes(
            tensors,
            input_scale=dtype,
            input_offset=dtype,
        ),
    )  # fmt: skip
    return Fit(scheme=scheme, tensors=tensors)


def _scheme(
    kind: Kind,
    shape: tuple[int, int],
    scales: list[tuple[str, Grain]],
    *,
    input_dtype: str,
    dtypes: tuple[tuple[str, str], ...],
    **more: Any,
) -> MsScheme:
    acts = input_spec(kind, input_dtype)
    return MsScheme(
        name=kind.name,
        shape=shape,
        operands={
            "weight": weight_spec(kind, scales),
            **({} if acts is None else {"input": acts}),
        },
        kind=kind,
        dtypes=dtypes,
        anew=True,
        **more,
    )


def _candidates(
    layer: LayerDesc, tensors: LayerTensors, operands: Mapping[str, QuantSpec]
) -> Iterator[MsScheme]:
    spec, shape = tensors.weight.spec, sizes_of(layer, tensors)
    if not spec.scales:
        return
    flat = tuple(t for t, _ in tensors.transforms) == (FLAT,)
    for name, kind in KINDS.items():
        floats = kind.store in ("fp8", "fp4")
        if (
            name in _UNWRITTEN
            or kind.acts == "static"
            or kind.flat != flat
            or floats != (spec.element.kind == "float")
            or (kind.store == "fp4" and shape[1] % 2)
            or (kind.store == "fp8" and not kind.mx and spec.element.bits < 8)
        ):
            continue
        yield from _of_kind(kind, shape, layer, tensors, operands)


def _of_kind(
    kind: Kind,
    shape: tuple[int, int],
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
) -> Iterator[MsScheme]:
    spec = tensors.weight.spec
    wide = "uint8" if kind.mx else wide_dtype(spec) if len(spec.scales) == 1 else "float32"
    leaves = {"weight_scale": wide}
    if not kind.mx:
        leaves["weight_offset"] = wide
    sizes = {BLOCK} if kind.mx else {0, spec.scales[0].grain[1]}
    more: dict[str, Any] = {}
    input_dtype = wide_dtype(operands.get("input"))
    if kind.flat:
        [(_, matrices)] = tensors.transforms
        names = ("left_trans", "right_trans")
        leaves |= {n: str(m.dtype).removeprefix("torch.") for n, m in zip(names, matrices)}
        leaves["clip_ratio"] = input_dtype
        more = {"flat": tuple(m.shape[0] for m in matrices), "transforms": (FLAT,)}
    if kind.name == "w4a8":
        if shape[0] % 2:
            return
        wanted = layer.name.rpartition(".")[2] in _ROW_PARALLEL and shape[1] % _PARTS == 0
        leaves["scale_bias"] = "float32"
        more = {"row_pairs": True, "parts": _PARTS if wanted else 1}
    for size in sorted(sizes):
        if size and not kind.mx and (shape[1] % size or shape[1] == size):
            continue
        fine: Grain = group(size) if size else CHANNEL
        scheme = _scheme(
            kind, shape, [(wide, fine)],
            input_dtype=input_dtype, dtypes=_dtypes(tensors, **leaves), group=size, **more,
        )  # fmt: skip
        yield scheme
        if size and kind.name == "w4a8":
            yield _second(scheme, fine, leaves, tensors)


def _second(
    scheme: MsScheme, fine: Grain, leaves: Mapping[str, str], tensors: LayerTensors
) -> MsScheme:
    """The same with two factors, of the group and of the row."""
    wide = leaves["weight_scale"]
    two = {"weight_scale_second": wide, "weight_offset_second": wide}
    weight = weight_spec(scheme.kind, [(wide, fine), (wide, CHANNEL)])
    return replace(
        scheme,
        operands={**scheme.operands, "weight": weight},
        second=True,
        dtypes=_dtypes(tensors, **leaves, **two),
    )
