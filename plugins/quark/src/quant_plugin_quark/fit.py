"""Which Quark arguments hold a canonical matrix; each layer has its own.

    fp8                     one scale per tensor, row or block, or e8m0 in 32s
    fp6, fp4                e8m0 in 32s; fp4 also in 16s under fp8 scales and one factor (NVFP4)
    int8, int4              symmetric; per tensor, row or group
    uint8, uint4            with zero points, likewise

    option      values                    default
    group_size  a divisor of the groups   the layer's own
    zero_points whether integers have     as each layer needs; with them in all if any needs them,
                them stored               because readers miss them otherwise

A scheme is made as if a header had been read, so it is the one that the result is read with.
Scales keep their float type; words of 4-bit codes are written in the order of "reorder".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import nearest_fit, sizes_of, wide_dtype
from quant_core.convert.fit import Allowed, Fit, check_options
from quant_core.convert.target import Outline
from quant_core.scheme import Scheme
from quant_core.spec import CHANNEL, TENSOR, Span, TensorInfo
from quant_plugin_quark.args import ELEMENTS, LayerArgs, TensorArgs
from quant_plugin_quark.config import QuarkConfig
from quant_plugin_quark.header import Header
from quant_plugin_quark.scheme import QuarkScheme
from quant_plugin_quark.weights import build

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit", "settle"]

_OPTIONS: Mapping[str, Allowed] = {"group_size": int, "zero_points": (True, False)}
_HOLDS = "fp8, fp6, fp4, int8, int4, uint8 or uint4 as Quark stores them"
_CONFIG = QuarkConfig(default=LayerArgs(where="options"), file="config.json")
_NAMES = {element.name: dtype for dtype, element in ELEMENTS.items()}
_FACTOR = TensorArgs(dtype="fp8_e4m3", qscheme="per_tensor", of_scales=True)
Operand = tuple[TensorArgs, ...]


def _one(dtype: str, grain: tuple[int, int], *, channel: int, **more: Any) -> TensorArgs:
    """Arguments of one scale. ``channel``: the axis of a scale per channel (1 = per token)."""
    r, c = grain
    if grain == TENSOR:
        return TensorArgs(dtype=dtype, qscheme="per_tensor", **more)
    if grain == CHANNEL:
        return TensorArgs(dtype=dtype, qscheme="per_channel", axis=channel, **more)
    if r == 1:
        return TensorArgs(dtype=dtype, qscheme="per_group", group_size=c, axis=-1, **more)
    return TensorArgs(dtype=dtype, qscheme="per_block", block=grain, **more)


def _floats(spec: QuantSpec) -> Iterator[Operand]:
    yield (TensorArgs(dtype="fp4", qscheme="per_group", group_size=16, axis=-1), _FACTOR)
    for dtype in ("fp4", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3"):
        yield (_one(dtype, (1, 32), channel=0, e8m0=True),)
    if spec.element.bits == 8:
        own = spec.scales[0].grain if spec.scales else TENSOR
        for grain in dict.fromkeys((own, TENSOR, CHANNEL)):
            yield (_one(_NAMES[spec.element.name], grain, channel=0),)


def _integers(spec: QuantSpec, size: int, zeros: bool | None) -> Iterator[Operand]:
    own = spec.scales[0].grain if spec.scales else CHANNEL
    grains = ((1, size),) if size else tuple(dict.fromkeys((own, CHANNEL)))
    for grain in grains:
        for dtype in ("int4", "uint4", "int8", "uint8"):
            symmetric = dtype.startswith("int")
            if zeros is None or symmetric != zeros:
                yield (_one(dtype, grain, channel=0, symmetric=symmetric),)
    if len(spec.scales) == 2 and spec.zero is not None and not zeros:
        inner = _one("int4", CHANNEL, channel=0)
        yield (TensorArgs(dtype="fp8_e4m3", qscheme="per_tensor"), inner)


def _inputs(spec: QuantSpec | None) -> Iterator[Operand]:
    """Arguments that may mean ``spec``, and those that leave activations as they are."""
    yield ()
    if spec is None or spec.element.name not in _NAMES:
        return
    fine, dtype = spec.scales[0], _NAMES[spec.element.name]
    common: dict[str, Any] = {"dynamic": not fine.static, "symmetric": spec.zero is None}
    if len(spec.scales) == 2:
        yield (_one(dtype, (1, 16), channel=1, dynamic=True), _FACTOR)
    elif fine.element == "e8m0":
        modes = dict.fromkeys((fine.rule, "even"))
        for mode in (m for m in modes if m in ("even", "floor", "ceil")):
            yield (_one(dtype, fine.grain, channel=1, **common, e8m0=True, mode=mode),)
    elif fine.grain[0] <= 1:
        yield (_one(dtype, fine.grain, channel=1, **common),)


def _header(layer: LayerDesc, args: LayerArgs, sizes: tuple[int, int], dtypes: Mapping[str, str],
            ) -> Header:  # fmt: skip
    """What reading the result will see: sizes, and the dtypes of scales."""
    n, k = sizes
    leaves = {
        name: TensorInfo(name=name, dtype=dtype, shape=(), file="", offset=0, nbytes=0)
        for name, dtype in dtypes.items()
    }
    return Header(
        config=_CONFIG,
        args=args,
        layer=replace(layer, inp=Span.whole(k), out=Span.whole(n)),
        checkpoint=Outline(Path("config.json"), {}, {}),
        path=layer.name,
        leaves=leaves,
    )


def _candidates(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
) -> Iterator[QuarkScheme]:
    spec, have = tensors.weight.spec, operands.get("input")
    n, k = sizes_of(layer, tensors)
    size = int(options.get("group_size", 0))
    if spec.element.kind == "float":
        kinds = _floats(spec)
    else:
        kinds = _integers(spec, size, options.get("zero_points"))
    dtypes = {"weight_scale": wide_dtype(spec), "input_scale": wide_dtype(have)}
    for weight in kinds:
        first = weight[-1] if weight[-1].element.bits < 8 else weight[0]
        words = first.element.kind != "float" and first.element.bits < 8
        if (first.group_size and k % first.group_size) or (words and (n % 8 or k % 8)):
            continue
        stored = dtypes
        if len(weight) == 2 and not weight[1].of_scales:
            stored = {**dtypes, "weight_scale_2": wide_dtype(spec)}
        elif first.e8m0 or len(weight) == 2:
            stored = {"input_scale": dtypes["input_scale"]}
        for inputs in _inputs(have):
            args = LayerArgs(where="config.json", weight=weight, inputs=inputs)
            yield build(_header(layer, args, (n, k), stored))


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, _OPTIONS, "quark")
    schemes: tuple[QuarkScheme, ...] = ()
    if tensors.weight.spec.element.kind in ("float", "int", "uint"):
        schemes = tuple(_candidates(layer, tensors, operands, options))
    return nearest_fit(layer, tensors, operands, schemes, allow_inexact, holds=_HOLDS)


def settle(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """See the hook ``settle_options``: zero points in all layers of integers, or in none."""
    flat = [s for many in schemes.values() for s in many if isinstance(s, QuarkScheme)]
    found = {bool(s.zero_name) for s in flat if s.weight.element.kind != "float"}
    return {**options, "zero_points": True} if len(found) > 1 else options
