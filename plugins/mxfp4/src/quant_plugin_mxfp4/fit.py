"""Whether MXFP4 experts hold a canonical matrix: fp4 codes under powers of two, experts alone.

The format stores nothing but the gate, up and down matrices of experts; they become slices of two
stacks, gate and up row by row in turn. There are no options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import nearest_fit, sizes_of
from quant_core.convert.fit import Fit, check_options
from quant_plugin_mxfp4.scheme import BLOCK, ROLES, Mxfp4Scheme

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit"]

_HOLDS = "gate, up and down of experts in fp4 under powers of two, in blocks of 32"


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, {}, "mxfp4")
    role = layer.name.rpartition(".")[2].removesuffix("_proj")
    n, k = sizes_of(layer, tensors)
    schemes: tuple[Mxfp4Scheme, ...] = ()
    if layer.experts and role in ROLES and k % BLOCK == 0:
        schemes = (Mxfp4Scheme.of(n, k, role=role, flat=False),)
    return nearest_fit(layer, tensors, operands, schemes, allow_inexact, holds=_HOLDS)
