"""Which AutoRound scheme holds a matrix of small floats: settings to a scheme, and back.

    data_type   codes, scales                          activations
    nv_fp       fp4, fp8 in 16s under a divisor        none, or the same
    mx_fp       fp4 or fp8, e8m0 in 32s                none, or the same by rule floor or rceil
    fp          fp8, one scale a tensor, row, block    none, stored, or at run time

All are written in packing_format "auto_round:llm_compressor".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import sizes_of, wide_dtype
from quant_core.convert.target import Outline
from quant_core.floatspec import FloatScheme, scale_grid
from quant_core.spec import CHANNEL, TENSOR, Grain, LayerDesc, QuantSpec, TensorInfo, block
from quant_plugin_autoround.config import AutoRoundConfig, LayerSettings
from quant_plugin_autoround.floats import float_scheme

if TYPE_CHECKING:
    from quant_core.tensors import LayerTensors

__all__ = ["FLOAT_FORMAT", "candidates", "settings_of"]

FLOAT_FORMAT = "auto_round:llm_compressor"
_CONFIG = AutoRoundConfig(
    default=LayerSettings(bits=16, group_size=None),
    dialect="float",
    packing_format=FLOAT_FORMAT,
    source="config.json",
)
_NV_INPUT = "nv_fp4_with_static_gs"
_RULES = {"floor": "mx_fp", "rceil": "mx_fp_rceil"}
Settings = dict[str, Any]


def settings_of(scheme: FloatScheme) -> Settings:
    """The keys of the config that mean ``scheme``."""
    fine, bits = scheme.weight.scales[0], scheme.weight.element.bits
    family = "nv_fp" if len(scheme.weight.scales) == 2 else "mx_fp"
    size: Any = fine.grain[1]
    if family == "mx_fp" and fine.element != "e8m0":
        family = "fp"
        size = {TENSOR: 0, CHANNEL: -1}.get(fine.grain, list(fine.grain))
    out: Settings = {"bits": bits, "data_type": family, "group_size": size, "sym": True}
    inputs = scheme.operands.get("input")
    return out if inputs is None else out | _acts(inputs)


def _acts(spec: QuantSpec) -> Settings:
    fine = spec.scales[0]
    kind, size = "fp", {TENSOR: 0, CHANNEL: -1}.get(fine.grain, fine.grain[1])
    if len(spec.scales) == 2:
        kind = _NV_INPUT
    elif fine.element == "e8m0":
        kind = _RULES[fine.rule]
    return {
        "act_bits": spec.element.bits,
        "act_data_type": kind,
        "act_group_size": size,
        "act_sym": True,
        "act_dynamic": not fine.static,
    }


def _weights(spec: QuantSpec) -> Iterator[tuple[Settings, Grain]]:
    yield {"bits": 4, "data_type": "nv_fp", "group_size": 16}, (1, 16)
    for bits in (4, 8):
        yield {"bits": bits, "data_type": "mx_fp", "group_size": 32}, (1, 32)
    fp8: Settings = {"bits": 8, "data_type": "fp", "group_size": None}
    for grain in (TENSOR, CHANNEL):
        yield fp8, grain
    own = spec.scales[0].grain if spec.scales else TENSOR
    size = own if own[0] > 1 and own[1] > 0 else (128, 128)
    yield fp8 | {"block": size}, block(*size)


def _inputs(weights: Settings) -> Iterator[Settings]:
    yield {}
    bits, family = weights["bits"], weights["data_type"]
    acts: Settings = {"act_bits": bits, "act_sym": True, "act_dynamic": True}
    if family == "nv_fp":
        yield acts | {"act_data_type": _NV_INPUT, "act_group_size": 16}
    elif family == "mx_fp":
        for name in _RULES.values():
            yield acts | {"act_data_type": name, "act_group_size": 32}
    else:
        for size in (-1, 0, 128):
            yield acts | {"act_data_type": "fp", "act_group_size": size}
        yield acts | {"act_data_type": "fp", "act_group_size": 0, "act_dynamic": False}


def candidates(
    layer: LayerDesc, tensors: LayerTensors, operands: Mapping[str, QuantSpec]
) -> Iterator[FloatScheme]:
    """Schemes that come into question for a weight of small floats."""
    spec, inputs = tensors.weight.spec, operands.get("input")
    shape = (n, k) = sizes_of(layer, tensors)
    nowhere = Outline(Path("config.json"), {}, {})

    def info(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        return TensorInfo(name=name, dtype=dtype, shape=shape, file="", offset=0, nbytes=0)

    for weights, grain in _weights(spec):
        if weights["group_size"] and k % weights["group_size"]:
            continue
        codes = "weight" if weights["bits"] == 8 else "weight_packed"
        leaves = {codes: info(codes, "uint8", (n, k * weights["bits"] // 8))}
        if weights["data_type"] == "fp":
            name = "weight_scale_inv" if "block" in weights else "weight_scale"
            grid = () if grain == TENSOR else scale_grid(shape, grain)
            leaves[name] = info(name, wide_dtype(spec), grid)
            leaves["input_scale"] = info("input_scale", wide_dtype(inputs), (1,))
        for acts in _inputs(weights):
            settings = LayerSettings(**weights, **acts)
            yield float_scheme(_CONFIG, settings, layer, layer.name, leaves, nowhere)
