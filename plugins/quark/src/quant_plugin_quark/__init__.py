"""AMD Quark checkpoints for quant-core: hook implementations only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant_core import hookimpl
from quant_core.spec import PluginInfo

if TYPE_CHECKING:
    from quant_core.checkpoint.base import Checkpoint
    from quant_core.convert.fit import Fit
    from quant_core.kv_cache import CacheForm
    from quant_core.scheme import Scheme
    from quant_core.spec import FormatMatch, LayerDesc, ParamSpec, QuantSpec, Unquantized
    from quant_core.tensors import LayerTensors


@hookimpl
def plugin_info() -> PluginInfo:
    return PluginInfo(
        id="quark",
        api=(0, 2),
        summary="AMD Quark: int8, int4, fp8, MX and NVFP4, mixed per layer",
        quant_methods=("quark",),
    )


@hookimpl
def detect_format(checkpoint: Checkpoint) -> FormatMatch | None:
    from quant_plugin_quark.detect import detect

    return detect(checkpoint)


@hookimpl
def attention_schemes(match: FormatMatch, checkpoint: Checkpoint) -> Mapping[str, Scheme]:
    from quant_plugin_quark.cache import schemes

    return schemes(match.config, checkpoint)


@hookimpl
def cache_form() -> CacheForm:
    from quant_plugin_quark.cache import FORM

    return FORM


@hookimpl
def make_scheme(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Scheme | Unquantized:
    from quant_plugin_quark.layers import scheme_for

    return scheme_for(match, layer, checkpoint)


@hookimpl
def create_weights(scheme: Scheme, layer: LayerDesc) -> Sequence[ParamSpec]:
    return scheme.params(layer)


@hookimpl
def make_config(plan: Any) -> Mapping[str, Any]:
    from quant_plugin_quark.writer import config_for

    return config_for(plan)


@hookimpl
def fit_scheme(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    from quant_plugin_quark.fit import fit

    return fit(layer, tensors, operands, options, allow_inexact)


@hookimpl
def settle_options(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    from quant_plugin_quark.fit import settle

    return settle(schemes, options)
