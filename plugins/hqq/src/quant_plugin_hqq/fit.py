"""Which HQQ scheme holds a canonical matrix: 1 to 4 or 8 bits, groups along the input, float zeros.

    option      values                   default
    nbits       1, 2, 3, 4, 8            the layer's own; the widest of all layers in the end
    group_size  a divisor of the groups  the layer's own; one for all layers in the end

Every integer zero is a float here, so all integer weights fit exactly; an offset becomes the float
zero -o/s, which is rounded. Scales keep their float type, zeros take it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import nearest_fit, sizes_of, wide_dtype
from quant_core.convert.fit import Allowed, Fit, check_options
from quant_core.scheme import Scheme
from quant_plugin_hqq.meta import PACKINGS, Meta
from quant_plugin_hqq.scheme import HqqScheme, build_scheme

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit", "settle"]

_PACKING = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 8: "8bit_u8"}
_OPTIONS: Mapping[str, Allowed] = {"nbits": tuple(_PACKING), "group_size": int}
_FLAGS = {"channel_wise": 1, "encoded_state_dict": 1, "offload_meta": 0, "optimize": 1,
          "quant_scale": 0, "quant_zero": 0, "round_zero": 0, "stores_quant_config": 1,
          "view_as_float": 0}  # fmt: skip
_TEXTS = {"compute_dtype": "torch.float32", "unpack_view_dtype": ""}


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, _OPTIONS, "hqq")
    schemes = tuple(_candidates(layer, tensors, options))
    holds = "integers of up to 8 bits in groups along the input"
    return nearest_fit(layer, tensors, operands, schemes, allow_inexact, holds=holds)


def _meta(bits: int, size: int, shape: tuple[int, int]) -> Meta:
    """The small tensors as HQQ 0.2.8 writes them."""
    packing = _PACKING[bits]
    texts = {**_TEXTS, "packing": packing}
    texts["unpack_view_dtype"] = f"torch.{PACKINGS[packing].word}"
    flags = {**_FLAGS, "round_zero": int(bits == 4)}
    numbers = {"axis": 1, "group_size": size, "nbits": bits}
    stored = [("shape", "int64", (2,), struct.pack("<qq", *shape))]
    stored += [(n, "int32", (), struct.pack("<i", v)) for n, v in numbers.items()]
    stored += [(n, "uint8", (), bytes([v])) for n, v in flags.items()]
    stored += [(n, "uint8", (len(t),), t.encode()) for n, t in texts.items()]
    return Meta(bits=bits, group_size=size, shape=shape, packing=packing, stored=tuple(stored))


def _candidates(
    layer: LayerDesc, tensors: LayerTensors, options: Mapping[str, Any]
) -> Iterator[HqqScheme]:
    spec, shape = tensors.weight.spec, sizes_of(layer, tensors)
    if spec.element.kind not in ("int", "uint") or not spec.scales:
        return
    zero = spec.zero.levels if spec.zero is not None else ()
    grains = [s.grain[1] or shape[1] for s in (*spec.scales, *zero)]
    size = int(options.get("group_size", math.gcd(*grains)))
    if shape[1] % size:
        return
    for bits in _PACKING:
        if bits < spec.element.bits or options.get("nbits", bits) != bits:
            continue
        meta = _meta(bits, size, shape)
        dtype = wide_dtype(spec) if len(spec.scales) == 1 else "float32"
        zeros = _zero_dtype(spec, dtype)
        yield build_scheme(
            meta,
            word_dtype=meta.order.word,
            word_shape=(meta.word_rows, size),
            scale_dtype=dtype,
            zero_dtype=zeros,
            source="config.json",
        )


def _zero_dtype(spec: QuantSpec, scale: str) -> str:
    """Stored dtype of the zeros: their own, float32 for quotients, else that of the scales."""
    zero = spec.zero
    if zero is None or zero.kind == "const":
        return scale
    own = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}.get(zero.element, scale)
    return "float32" if zero.kind == "offset" else own


def settle(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """See the hook ``settle_options``: one width and one group size for all layers."""
    metas = [s.meta for many in schemes.values() for s in many if isinstance(s, HqqScheme)]
    if len({(m.bits, m.group_size) for m in metas}) < 2:
        return options
    size = math.gcd(*(m.group_size for m in metas))
    return {**options, "nbits": max(m.bits for m in metas), "group_size": size}
