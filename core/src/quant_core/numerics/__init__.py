"""Number formats, once for everybody: raw bits to float32 and back, and the rules for scales.

    elements    what a code means: tables, ``decode``, ``decode_scale``
    casts       float to code: rounding, ties, clamping; the two variants of fp8
    mx          the shared exponent of a block (e8m0), by every rule in use
    two_level   block scales in fp8 under one float32 factor
    swizzle     the 128 x 4 order that matmul hardware wants block scales in

Plain torch, vectorised, no data-dependent control flow unless a docstring says so.
"""

from __future__ import annotations

from quant_core.numerics.casts import (
    TIES,
    element_range,
    encode,
    fn_to_fnuz,
    fnuz_to_fn,
    over,
    round_to,
)
from quant_core.numerics.elements import (
    FLOAT_ELEMENTS,
    decode,
    decode_scale,
    element_table,
    scale_dtype,
)
from quant_core.numerics.mx import (
    MX_RULES,
    decode_e8m0,
    encode_e8m0,
    mx_scale,
    round_up_power_of_two,
)
from quant_core.numerics.swizzle import swizzle_scales, swizzled_offset, unswizzle_scales
from quant_core.numerics.two_level import block_scale, encode_scale, tensor_scale

__all__ = [
    "FLOAT_ELEMENTS",
    "MX_RULES",
    "TIES",
    "block_scale",
    "decode",
    "decode_e8m0",
    "decode_scale",
    "element_range",
    "element_table",
    "encode",
    "encode_e8m0",
    "encode_scale",
    "fn_to_fnuz",
    "fnuz_to_fn",
    "mx_scale",
    "over",
    "round_to",
    "round_up_power_of_two",
    "scale_dtype",
    "swizzle_scales",
    "swizzled_offset",
    "tensor_scale",
    "unswizzle_scales",
]
