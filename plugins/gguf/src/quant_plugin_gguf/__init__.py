"""GGUF checkpoints for quant-core: the container of llama.cpp and its block types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core import hookimpl

if TYPE_CHECKING:
    from quant_core.checkpoint.base import Checkpoint
    from quant_core.convert.fit import Fit
    from quant_core.convert.target import Target
    from quant_core.scheme import Scheme
    from quant_core.spec import (
        BlockType,
        FormatMatch,
        LayerDesc,
        ParamSpec,
        PluginInfo,
        QuantSpec,
        Unquantized,
    )
    from quant_core.tensors import LayerTensors


@hookimpl
def plugin_info() -> PluginInfo:
    from quant_core.spec import PluginInfo

    return PluginInfo(
        id="gguf",
        api=(0, 2),
        summary="GGUF files of llama.cpp: Q4_0 to Q8_0, K-quants, IQ, TQ, MXFP4, NVFP4",
        containers=(".gguf",),
        quant_methods=("gguf",),
    )


@hookimpl
def open_checkpoint(path: Path) -> Checkpoint | None:
    from quant_plugin_gguf.checkpoint import open_gguf

    return open_gguf(path)


@hookimpl
def detect_format(checkpoint: Checkpoint) -> FormatMatch | None:
    from quant_plugin_gguf.scheme import detect

    return detect(checkpoint)


@hookimpl
def make_scheme(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Scheme | Unquantized:
    from quant_plugin_gguf.scheme import scheme_for

    return scheme_for(match, layer, checkpoint)


@hookimpl
def create_weights(scheme: Scheme, layer: LayerDesc) -> Sequence[ParamSpec]:
    return scheme.params(layer)


@hookimpl
def block_types() -> Mapping[str, BlockType]:
    from quant_plugin_gguf.types import opaque_block_types

    return opaque_block_types()


@hookimpl
def fit_scheme(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    from quant_plugin_gguf.fit import fit

    return fit(layer, tensors, operands, options, allow_inexact)


@hookimpl
def settle_options(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    from quant_plugin_gguf.fit import settle

    return settle(schemes, options)


@hookimpl
def write_checkpoint(target: Target, folder: Path) -> Sequence[Path]:
    from quant_plugin_gguf.writer import write

    return write(target, folder)
