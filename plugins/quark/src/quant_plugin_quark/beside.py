"""What lies beside a weight: static scales of its inputs, scales of keys and values.

input_scale, input_scale_2  []     input_zero_point  [], zeros for symmetric inputs
output_scale                []     of q_proj, k_proj, v_proj: for the KV cache, not loaded
"""

from __future__ import annotations

from typing import Any

from quant_core.intspec import SCALE_ELEMENTS
from quant_core.spec import ParamSpec
from quant_plugin_quark.header import FIXED, Header
from quant_plugin_quark.inputs import input_tensor
from quant_plugin_quark.scheme import KV_RULE

__all__ = ["BYTES", "KV_MODULES", "cache_params", "input_fields"]

KV_MODULES = ("q_proj", "k_proj", "v_proj")
"""Modules whose output scales belong to the attention and its cache."""
BYTES = ("int8", "uint8", "int32")  # dtypes of zero points that are not packed


def input_fields(h: Header) -> dict[str, Any]:
    """Stored scale and zero point of static activations."""
    inputs = h.args.inputs
    name = input_tensor(inputs)
    if not name:
        return {"tensors": ()}
    dtype = "float32" if len(inputs) == 2 else h.dtype(name, SCALE_ELEMENTS, "bfloat16")
    tensors = [h.tensor(name, (), dtype, (), "input_scale")]
    zero = "input_zero_point"
    has_zero = h.expects(zero) or not inputs[0].symmetric
    if has_zero:
        kind = h.dtype(zero, dict.fromkeys(BYTES), inputs[0].dtype)
        tensors.append(h.tensor(zero, (), kind, (), "input_zero"))
    return {
        "tensors": tuple(tensors),
        "input_scale": name,
        "input_zero": zero if has_zero else "",
    }


def cache_params(h: Header) -> tuple[ParamSpec, ...]:
    """Scales of keys, values and queries: accounted for, not loaded."""
    if h.path.rpartition(".")[2] not in KV_MODULES:
        return ()
    return tuple(
        ParamSpec(
            name=name,
            shape=h.leaves[name].shape,
            dtypes=(h.leaves[name].dtype,),
            axes=(FIXED,) * len(h.leaves[name].shape),
            role="output_scale",
            need="ignored",
            rule=KV_RULE,
        )
        for name in ("output_scale", "output_zero_point")
        if name in h.leaves
    )
