"""Float weights to the codes and scales that ModelOpt would store, by its own rounding.

    fp8, int8    s = max|W| / 448 or 127, of the tensor, a row, or a block
    nvfp4        g = max|W| / (6 * 448);   s = fp8(clamp(max|W of 16| / (6 g), 2^-9, 448))
                 code = e2m1(W / (s g)), ties to even;   a block of zeros has s = 1
    mxfp8        s = 2^ceil(log2(max|W of 32| / 448)), by a float32 logarithm
    mxfp4        s = 2^ceil(log2(max|W of 32| / 6));   ties towards zero
    int4         s = max|W of a group| / 7;   v = round(W / s) clamped to -8..7

W4A8_NVFP4_FP8 takes g = max|W| / 448, so that code * s stays within fp8. All in float32.

Source: ModelOpt 0.47.0 ``quantization/qtensor``, ``export/quant_utils.py`` (to_quantized_weight,
get_weight_scaling_factor).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.numerics import block_scale, element_range, encode_scale, mx_scale
from quant_core.packing import repack
from quant_core.quantize import amax_grid, encode_weight
from quant_core.rewrites.transforms import Transforms
from quant_core.spec import CANONICAL, LayerDesc
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_nvfp4.scheme import SMOOTH

if TYPE_CHECKING:
    from quant_plugin_nvfp4.scheme import ModelOptScheme

__all__ = ["quantize"]

_LEAST = 2.0**-9  # smallest positive fp8_e4m3
_FP8_MAX = 448.0  # largest finite fp8_e4m3


def _needed(stats: Mapping[str, Tensor] | None, name: str, where: str, algo: str) -> Tensor:
    if stats is None or name not in stats:
        raise LayoutError(
            f"{where}: {algo} needs measured {name!r}, expected it among the statistics. "
            "Calibrate first, or choose an algorithm without it.",
            code="Q-LAYOUT-REPRESENT",
            tensor=where,
            expected=name,
            actual=sorted(stats or ()),
            plugin="nvfp4",
        )
    return stats[name]


def _scales(scheme: ModelOptScheme, dense: Tensor) -> tuple[Tensor, ...]:
    """The factors of the weight, finest first, as they are stored."""
    algo, specs = scheme.algo, scheme.weight.scales
    amax = amax_grid(dense, specs[0].grain)
    if specs[0].element == "e8m0":
        return (mx_scale(amax, algo.element, "rceil_log2"),)
    if algo.weight == "nvfp4":
        top = _FP8_MAX * (6.0 if algo.input != "fp8" else 1.0)
        g = amax.amax().reshape(1, 1) / top
        g = torch.where(g == 0, 1.0, g)
        fine = block_scale(amax, g, least=_LEAST, most=_FP8_MAX)
        one = encode_scale(torch.ones(()), "fp8_e4m3")
        return (torch.where(amax == 0, one, fine), g)
    peak = 7.0 if algo.weight == "int4" else element_range(algo.element)[1]
    fine = amax / peak
    fine = encode_scale(torch.where(fine == 0, 1.0, fine), specs[0].element)
    second = amax.amax().reshape(1, 1) / _FP8_MAX
    second = torch.where(second == 0, 1.0, second)
    return (fine, *(second for _ in specs[1:]))


def _codes(scheme: ModelOptScheme, dense: Tensor, scales: tuple[Tensor, ...]) -> Tensor:
    algo = scheme.algo
    ties = "down" if algo.weight == "mxfp4" else "even"
    codes = encode_weight(dense, scheme.weight, scales, ties)
    return repack(codes, algo.element.bits, scheme.shape, CANONICAL, algo.packing)


def quantize(
    scheme: ModelOptScheme, layer: LayerDesc, dense: Tensor, stats: Mapping[str, Tensor] | None
) -> LayerTensors:
    """Float weight [N, K] to canonical tensors.

    Args:
        stats: ``input_amax``, the largest magnitude of the layer's input (after
            ``pre_quant_scale``), where the algorithm stores an input scale; ``pre_quant_scale``
            [K] where the scheme has one: the weight is divided by it.

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` for NaN or infinity, ``Q-LAYOUT-REPRESENT`` if a statistic
            is not given.
    """
    algo, where = scheme.algo, layer.name
    work = dense.float()
    transforms: Transforms = ()
    bad = int((~torch.isfinite(work)).sum())
    if bad:
        raise LayoutError(
            f"{where}: {bad} of {work.numel()} weights are NaN or infinite, expected finite "
            "numbers. Repair the source checkpoint.",
            code="Q-VALUE-WEIGHT",
            tensor=where,
            actual=bad,
            plugin="nvfp4",
        )
    if scheme.smoothed:
        smooth = _needed(stats, "pre_quant_scale", where, algo.name)
        work, transforms = work.float() / smooth.float(), ((SMOOTH, (smooth,)),)
    input_scale = None
    spec = scheme.operands.get("input")
    if algo.static_input and spec is not None:
        top = element_range(spec.element)[1] * (_FP8_MAX if algo.input == "nvfp4" else 1.0)
        input_scale = _needed(stats, "input_amax", where, algo.name).float().reshape(1) / top
        input_scale = encode_scale(input_scale.clamp(min=2.0**-126), spec.scales[-1].element)
    scales = _scales(scheme, work)
    weight = QuantizedTensor(
        spec=scheme.weight,
        shape=scheme.shape,
        codes=_codes(scheme, work, scales),
        packing=algo.packing,
        scales=scales,
    )
    return LayerTensors(operands={"weight": weight}, input_scale=input_scale, transforms=transforms)
