"""Which ModelOpt algorithm holds a canonical matrix; each layer has its own.

    option      values                      default
    algo        a name of ``ALGOS``         the nearest to the source
    group_size  of int4: a divisor          the layer's own

``pre_quant_scale`` goes where the algorithm has it; scales keep their float type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import nearest_fit, sizes_of, wide_dtype
from quant_core.convert.fit import Allowed, Fit, check_options
from quant_plugin_nvfp4.algos import ALGOS
from quant_plugin_nvfp4.scheme import SMOOTH, ModelOptScheme, scheme_of

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit"]

_OPTIONS: Mapping[str, Allowed] = {"algo": tuple(ALGOS), "group_size": int}
_HOLDS = "fp8, NVFP4, MXFP8, MXFP4, int4 in groups or int8 per row, symmetric"


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, _OPTIONS, "nvfp4")
    schemes = tuple(_candidates(layer, tensors, operands, options))
    return nearest_fit(layer, tensors, operands, schemes, allow_inexact, holds=_HOLDS)


def _candidates(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
) -> Iterator[ModelOptScheme]:
    n, k = sizes_of(layer, tensors)
    spec = tensors.weight.spec
    smoothed = tuple(t for t, _ in tensors.transforms) == (SMOOTH,)
    own = spec.scales[0].grain[1] if spec.scales else 0
    for algo in ALGOS.values():
        if options.get("algo", algo.name) != algo.name or (smoothed and not algo.smooth):
            continue
        size = algo.group_size or (algo.weight == "int4" and (own or k))
        if algo.weight == "int4":
            size = int(options.get("group_size", size))
            if n % 2:  # two rows a byte
                continue
        if (algo.element.kind == "float") != (spec.element.kind == "float"):
            continue
        if size and algo.weight != "fp8_block" and k % size:
            continue
        yield scheme_of(
            algo,
            (n, k),
            group_size=size,
            scale_dtype=wide_dtype(spec),
            input_dtype=wide_dtype(operands.get("input")),
            smoothed=smoothed,
        )
