"""FP8 from float weights while they are loaded; activations are rounded at run time.

    fp8         one scale per tensor, activations per token; ``granularity`` "channel" writes
                quant_method fbgemm_fp8, a scale per row
    fp8_block   a scale per ``block`` of rows and columns, activations per token and block of
                columns; ``ue8m0``: powers of two

Imports no torch; the rounding is ``Fp8Scheme.quantize``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_core.errors import ConfigError
from quant_core.online import OnlineScheme
from quant_core.spec import LayerDesc
from quant_plugin_fp8.config import Fp8Config, parse_config
from quant_plugin_fp8.scheme import Fp8Scheme, build_scheme

__all__ = ["ONLINE"]


def _sizes(layer: LayerDesc) -> tuple[int, int]:
    assert layer.out_features is not None
    assert layer.in_features is not None
    return layer.out_features, layer.in_features


def _config(block: Mapping[str, Any]) -> Fp8Config:
    """A config checked as one that was read."""
    return parse_config({"activation_scheme": "dynamic", **block}, "online_options")


def _plain(layer: LayerDesc, options: Mapping[str, Any]) -> Fp8Scheme:
    n, k = _sizes(layer)
    granularity = options["granularity"]
    if granularity == "tensor":
        config = _config({"quant_method": "fp8"})
        return build_scheme(config, (n, k), scale_name="weight_scale", scale_shape=())
    if granularity == "channel":
        config = _config({"quant_method": "fbgemm_fp8"})
        return build_scheme(config, (n, k), scale_name="weight_scale", scale_shape=(n, 1))
    raise ConfigError(
        f"online_options: granularity is {granularity!r}, expected 'tensor' or 'channel'. "
        "Correct it, or take the scheme 'fp8_block'.",
        code="Q-CFG-VALUE",
        tensor="granularity",
        expected=("tensor", "channel"),
        actual=granularity,
        plugin="fp8",
    )


def _blocks(layer: LayerDesc, options: Mapping[str, Any]) -> Fp8Scheme:
    n, k = _sizes(layer)
    fmt = "ue8m0" if options["ue8m0"] else "float"
    config = _config(
        {"quant_method": "fp8", "weight_block_size": options["block"], "scale_fmt": fmt}
    )
    rows, cols = config.block or (n, k)
    shape = (-(-n // rows), -(-k // cols))
    return build_scheme(config, (n, k), scale_name="weight_scale_inv", scale_shape=shape)


ONLINE: Mapping[str, OnlineScheme] = {
    "fp8": OnlineScheme(
        summary="fp8, a scale per tensor; activations fp8 per token",
        make=_plain,
        options={"granularity": "tensor"},
    ),
    "fp8_block": OnlineScheme(
        summary="fp8, a scale per 128 x 128 block; activations fp8 per token and 128 columns",
        make=_blocks,
        options={"block": (128, 128), "ue8m0": False},
        bare=True,
    ),
}
