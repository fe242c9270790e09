"""ModelSlim (Ascend) checkpoints for quant-core: hook implementations only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant_core import hookimpl
from quant_core.spec import PluginInfo

if TYPE_CHECKING:
    from quant_core.checkpoint.base import Checkpoint
    from quant_core.convert.fit import Fit
    from quant_core.describe import Extras
    from quant_core.kv_cache import CacheForm
    from quant_core.scheme import Scheme
    from quant_core.spec import FormatMatch, LayerDesc, ParamSpec, QuantSpec, Unquantized
    from quant_core.tensors import LayerTensors


@hookimpl
def plugin_info() -> PluginInfo:
    stem, older = (
        "quant_model_description",
        "w8a8 w8a8_dynamic w8a16 w4a16 w4a8_dynamic w4a4_dynamic",
    )
    return PluginInfo(
        id="modelslim_npu",
        api=(0, 2),
        summary="ModelSlim (Ascend): integers, fp8 and MX, static or run-time activations",
        side_files=(f"{stem}.json", *(f"{stem}_{kind}.json" for kind in older.split())),
    )


@hookimpl
def detect_format(checkpoint: Checkpoint) -> FormatMatch | None:
    from quant_plugin_modelslim_npu.detect import detect

    return detect(checkpoint)


@hookimpl
def attention_schemes(match: FormatMatch, checkpoint: Checkpoint) -> Mapping[str, Scheme]:
    from quant_plugin_modelslim_npu.cache import schemes

    return schemes(checkpoint)


@hookimpl
def cache_form() -> CacheForm:
    from quant_plugin_modelslim_npu.cache import FORM

    return FORM


@hookimpl
def make_scheme(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Scheme | Unquantized:
    from quant_plugin_modelslim_npu.layers import scheme_for

    return scheme_for(match, layer, checkpoint)


@hookimpl
def create_weights(scheme: Scheme, layer: LayerDesc) -> Sequence[ParamSpec]:
    return scheme.params(layer)


@hookimpl
def fit_scheme(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    from quant_plugin_modelslim_npu.fit import fit

    return fit(layer, tensors, operands, options, allow_inexact)


@hookimpl
def make_extras(plan: Any) -> Extras:
    from quant_plugin_modelslim_npu.writer import extras_for

    return extras_for(plan)
