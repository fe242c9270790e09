"""MXFP8 checkpoints for quant-core: hook implementations only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant_core import hookimpl
from quant_core.spec import PluginInfo

if TYPE_CHECKING:
    from quant_core.checkpoint.base import Checkpoint
    from quant_core.convert.fit import Fit
    from quant_core.kv_cache import CacheForm
    from quant_core.online import OnlineScheme
    from quant_core.scheme import Scheme
    from quant_core.spec import FormatMatch, LayerDesc, ParamSpec, QuantSpec, Unquantized
    from quant_core.tensors import LayerTensors


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        id="mxfp8",
        api=(0, 2),
        summary="MXFP8: fp8 in blocks of 32 with one power of two each",
        quant_methods=("mxfp8",),
    )


@hookimpl
def detect_format(checkpoint: Checkpoint) -> FormatMatch | None:
    from quant_plugin_mxfp8.detect import detect

    return detect(checkpoint)


@hookimpl
def attention_schemes(match: FormatMatch, checkpoint: Checkpoint) -> Mapping[str, Scheme]:
    from quant_plugin_mxfp8.detect import cache_schemes

    return cache_schemes(checkpoint)


@hookimpl
def cache_form() -> CacheForm:
    from quant_plugin_mxfp8.detect import FORM

    return FORM


@hookimpl
def make_scheme(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Scheme | Unquantized:
    from quant_plugin_mxfp8.layers import scheme_for

    return scheme_for(match, layer, checkpoint)


@hookimpl
def create_weights(scheme: Scheme, layer: LayerDesc) -> Sequence[ParamSpec]:
    return scheme.params(layer)


@hookimpl
def make_config(plan: Any) -> Mapping[str, Any]:
    from quant_plugin_mxfp8.config import config_for

    return config_for(plan)


@hookimpl
def fit_scheme(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    from quant_plugin_mxfp8.fit import fit

    return fit(layer, tensors, operands, options, allow_inexact)


@hookimpl
def online_schemes() -> Mapping[str, OnlineScheme]:
    from quant_plugin_mxfp8.online import ONLINE

    return ONLINE
