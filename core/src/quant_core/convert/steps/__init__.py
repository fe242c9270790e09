"""Rewrites that target formats are made of: each exact, or recorded as a loss, or a refusal.

A target's ``fit_scheme`` chains these until the matrix has the spec of one of its schemes:

    weight_only     nothing but a weight and a bias is left
    plain_codes     codes are integers
    in_order        columns lie in the order of the input
    one_scale       one multiplying factor, of a type the target stores
    integer_zero    an offset (c*s + o) becomes zero codes (c - z)*s
    recenter        unsigned codes around a constant zero: int8 -> uint8, narrow -> wide
    code_zeros      unsigned codes with zeros as codes
    narrowest       one of these two, in the fewest bits that the target has
    group_columns   one value per row and ``size`` columns

or takes them all together, for a scheme whose description is known (``quant_core.convert.choose``):

    plain_layer     nothing but weight, bias, stored input scales and the scheme's own transforms
    meet_input      activations as the scheme quantizes them
    meet            the weight described as the scheme means it

All of them return new objects and take matrices, not stacks.
"""

from __future__ import annotations

from quant_core.convert.steps.codes import code_zeros, narrowest, recenter, row_blocks
from quant_core.convert.steps.inputs import input_distance, meet_input, same_input
from quant_core.convert.steps.layer import (
    ANOTHER,
    in_order,
    plain_codes,
    plain_layer,
    weight_only,
)
from quant_core.convert.steps.meet import meet
from quant_core.convert.steps.offsets import has_float_zeros, integer_zero, zeros_as_offset
from quant_core.convert.steps.scales import group_columns, one_scale

__all__ = [
    "ANOTHER",
    "code_zeros",
    "group_columns",
    "has_float_zeros",
    "in_order",
    "input_distance",
    "integer_zero",
    "meet",
    "meet_input",
    "narrowest",
    "one_scale",
    "plain_codes",
    "plain_layer",
    "recenter",
    "row_blocks",
    "same_input",
    "weight_only",
    "zeros_as_offset",
]
