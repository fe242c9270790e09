"""Whether MXFP8 holds a canonical matrix: fp8 codes, or narrower ones, under powers of two.

Activations are MXFP8 too, by this format's own rule; there are no options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import nearest_fit, sizes_of
from quant_core.convert.fit import Fit, check_options
from quant_plugin_mxfp8.scheme import Mxfp8Scheme

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit"]


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, {}, "mxfp8")
    scheme = Mxfp8Scheme.of(sizes_of(layer, tensors))
    holds = "fp8 or fp4 codes in blocks of 32 under powers of two"
    return nearest_fit(layer, tensors, operands, (scheme,), allow_inexact, holds=holds)
