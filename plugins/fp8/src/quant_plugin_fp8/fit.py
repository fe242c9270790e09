"""Which FP8 scheme holds a canonical matrix: one granularity and one rule for all layers.

    option       values                      default
    granularity  tensor, channel, block      the layer's own; what holds all layers in the end
    block        rows x columns: 128x128     the layer's own, else 128x128

"channel" writes quant_method fbgemm_fp8. Activations are fp8 in any case; they have a stored scale
if the source has one for each tensor. Scales keep their float type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import nearest_fit, sizes_of, wide_dtype
from quant_core.convert.fit import Allowed, Fit, check_options
from quant_core.errors import ConfigError, printable
from quant_core.scheme import Scheme
from quant_core.spec import CHANNEL, TENSOR
from quant_plugin_fp8.config import Fp8Config, parse_config
from quant_plugin_fp8.scheme import Fp8Scheme, build_scheme

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit", "settle"]

_OPTIONS: Mapping[str, Allowed] = {
    "granularity": ("tensor", "channel", "block"),
    "block": (),
}
_HOLDS = "fp8 codes with a scale per tensor, row or block"


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, _OPTIONS, "fp8")
    schemes = tuple(_candidates(layer, tensors, operands, options))
    return nearest_fit(layer, tensors, operands, schemes, allow_inexact, holds=_HOLDS)


def _config(**block: Any) -> Fp8Config:
    """A config checked as one that was read."""
    return parse_config({"quant_method": "fp8", **block}, "options")


def _block(text: object) -> tuple[int, int]:
    """Rows and columns of "128x128".

    Raises:
        ConfigError: ``Q-CFG-VALUE``.
    """
    parts = str(text).split("x")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and 0 < len(p) < 8 for p in parts):
        raise ConfigError(
            f"convert to 'fp8': option 'block': {printable(text)!r}, expected rows x columns, "
            "such as 128x128. Correct or drop the option.",
            code="Q-CFG-VALUE",
            tensor="block",
            expected="128x128",
            actual=text,
            plugin="fp8",
        )
    return int(parts[0]), int(parts[1])


def _candidates(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
) -> Iterator[Fp8Scheme]:
    n, k = sizes_of(layer, tensors)
    spec, inputs = tensors.weight.spec, operands.get("input")
    if spec.element.kind != "float":
        return
    wanted = options.get("granularity")
    common: dict[str, Any] = {"shape": (n, k), "scale_dtype": wide_dtype(spec)}
    if wanted in (None, "tensor"):
        for static in (True, False):
            stored: dict[str, Any] = {"scale_name": "weight_scale", "scale_shape": ()}
            if static:
                stored |= {"input_name": "input_scale", "input_dtype": wide_dtype(inputs)}
            config = _config(activation_scheme="static" if static else "dynamic")
            yield build_scheme(config, **common, **stored)
    if wanted in (None, "channel"):
        config = _config(quant_method="fbgemm_fp8")
        yield build_scheme(config, **common, scale_name="weight_scale", scale_shape=(n, 1))
    if wanted in (None, "block"):
        own = spec.scales[0].grain if spec.scales else TENSOR
        blocks = own[0] > 1 and own[1] > 0 and own not in (TENSOR, CHANNEL)
        size = _block(options["block"]) if "block" in options else own if blocks else (128, 128)
        config = _config(weight_block_size=list(size))
        assert config.block is not None
        grid = (-(-n // config.block[0]), -(-k // config.block[1]))
        yield build_scheme(config, **common, scale_name="weight_scale_inv", scale_shape=grid)
        if inputs is not None and inputs.scales[0].element == "e8m0":
            config = _config(weight_block_size=list(size), scale_fmt="ue8m0")
            yield build_scheme(config, **common, scale_name="weight_scale_inv", scale_shape=grid)


def settle(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """See the hook ``settle_options``: the finest granularity in use is right for all layers."""
    flat = [s for many in schemes.values() for s in many if isinstance(s, Fp8Scheme)]
    names = {_name(s) for s in flat}
    if len(names) < 2:
        return options
    return {**options, "granularity": "block" if "block" in names else "channel"}


def _name(scheme: Fp8Scheme) -> str:
    return {TENSOR: "tensor", CHANNEL: "channel"}.get(scheme.grain, "block")
