"""Which GPTQ scheme holds a canonical matrix: 2, 3, 4 or 8 bits, any order of columns.

    option             values                    default
    checkpoint_format  gptq, gptq_v2, gptq_p     gptq (v1) if all layers are symmetric, else v2
    group_size         a divisor of the groups   the layer's own

v1 stores z - 1, which some readers get wrong for zero points of 0; so asymmetric layers make the
whole checkpoint v2. Planes (gptq_p) are written only on request: few tools read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import fit_linear
from quant_core.convert.fit import Allowed, Fit, Losses, cannot_hold, check_options
from quant_core.scheme import Scheme
from quant_plugin_gptq.config import FORMATS
from quant_plugin_gptq.reader import ALL_BITS, COMMON_BITS
from quant_plugin_gptq.scheme import GptqScheme, weight_spec

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit", "settle"]

_OPTIONS: Mapping[str, Allowed] = {"checkpoint_format": FORMATS, "group_size": int}
_DTYPES = {"f16": "float16", "bf16": "bfloat16"}


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, _OPTIONS, "gptq")
    return fit_linear(
        layer, tensors, allow_inexact, lambda ok: _fit(layer, tensors, operands, options, ok)
    )


def _fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    from quant_core.convert import steps

    where, losses = layer.name, Losses(layer.name, allow_inexact)
    lt = steps.weight_only(tensors, operands, losses)
    qt = lt.weight
    steps.plain_codes(qt, where)
    qt = steps.one_scale(qt, tuple(_DTYPES), losses)
    qt = steps.integer_zero(qt, losses, wide=True)
    format = options.get("checkpoint_format")
    qt, sym = steps.narrowest(qt, ALL_BITS if format == "gptq_p" else COMMON_BITS, where)
    assert layer.inp is not None
    n, k = qt.shape[0], layer.inp.total
    size = min(int(options.get("group_size", qt.spec.scales[0].grain[1] or k)), k)
    if qt.gather is not None and size == k:
        qt = steps.in_order(qt, k, where)  # one group: the order has no meaning
    qt = steps.group_columns(qt, size, where)
    bits = qt.spec.element.bits
    _check_sizes(n, k, bits, format == "gptq_p", where)
    dtype = _DTYPES[qt.spec.scales[0].element]
    gather = qt.gather is not None
    scheme = GptqScheme(
        name=f"w{bits}a16",
        shape=(n, k),
        operands={"weight": weight_spec(bits, k, size, sym=sym, scale_dtype=dtype, gather=gather)},
        bits=bits,
        group_size=size,
        sym=sym,
        v1=format == "gptq" or (format is None and sym),
        planar=format == "gptq_p",
        desc_act=gather,
        scale_dtype=dtype,
        source="config.json",
    )
    return Fit(scheme=scheme, tensors=replace(lt, operands={"weight": qt}), losses=losses.taken())


def _check_sizes(n: int, k: int, bits: int, planar: bool, where: str) -> None:
    """Words are whole along both axes; readers compute sizes from them."""
    if (n * bits) % 32 or (k * bits) % 32 or (planar and (n % 32 or k % 32)):
        raise cannot_hold(
            where,
            f"a weight of {n} x {k} with {bits} bits does not fill 32-bit words",
            "rows and columns that fill whole words",
            "Choose another target format.",
        )


def settle(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """See the hook ``settle_options``: one version of the zeros for all layers."""
    flat = [s for many in schemes.values() for s in many if isinstance(s, GptqScheme)]
    if len({s.v1 for s in flat}) < 2:
        return options
    return {**options, "checkpoint_format": "gptq_v2"}
