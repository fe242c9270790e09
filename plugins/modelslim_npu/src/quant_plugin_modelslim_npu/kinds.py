"""The type strings of a ModelSlim description: how each stores weights and treats activations.

    W8A8_DYNAMIC    weights of 8 bits, activations of 8 bits with run-time scales
    W8A8            the same with stored activation scales (and W8A8_MIX: both)

One table; a string that is not in it is refused by name. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["FLOAT_TYPES", "KINDS", "REFUSED", "Kind", "refusal"]

FLOAT_TYPES = frozenset({"FLOAT", "W16A16S"})
"""Types whose tensors are plain floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What one type string says.

    Attributes:
        name: scheme name, w<weights>a<activations>.
        store: how codes are stored: "int8", "int4" (one per int8, or two rows a byte), "int4_words"
            (int32), "fp8", "fp4".
        acts: how activations are quantized: "" (not), "static" (int8, stored scale), or at run
            time "int8", "int4", "fp8" per token, "mxfp8", "mxfp4" per block of 32.
        both: static tensors are stored too, for the decode phase, and not used.
        flat: stored matrices transform the activations (FlatQuant).
    """

    name: str
    store: Literal["int8", "int4", "int4_words", "fp8", "fp4"]
    acts: Literal["", "static", "int8", "int4", "fp8", "mxfp8", "mxfp4"] = ""
    both: bool = False
    flat: bool = False

    @property
    def mx(self) -> bool:
        """Block scales in e8m0."""
        return self.acts in ("mxfp8", "mxfp4")


KINDS: Mapping[str, Kind] = {
    "W8A8": Kind(name="w8a8_static", store="int8", acts="static"),
    "W8A8_DYNAMIC": Kind(name="w8a8", store="int8", acts="int8"),
    "W8A8_MIX": Kind(name="w8a8_mix", store="int8", acts="int8", both=True),
    "W8A16": Kind(name="w8a16", store="int8"),
    "W4A16": Kind(name="w4a16", store="int4_words"),
    "W4A8_DYNAMIC": Kind(name="w4a8", store="int4", acts="int8"),
    "W4A4_DYNAMIC": Kind(name="w4a4", store="int4", acts="int4"),
    "W4A4_FLATQUANT_DYNAMIC": Kind(name="w4a4_flat", store="int4", acts="int4", flat=True),
    "WFP8AFP8_DYNAMIC": Kind(name="w8a8_fp8", store="fp8", acts="fp8"),
    "W8A8_MXFP8": Kind(name="mxfp8", store="fp8", acts="mxfp8"),
    "W4A8_MXFP": Kind(name="w4a8_mx", store="fp4", acts="mxfp8"),
    "W4A4_MXFP4": Kind(name="mxfp4", store="fp4", acts="mxfp4"),
}

REFUSED: Mapping[str, str] = {
    "_DUALSCALE": "its second scale (weight_dual_scale) has no published meaning",
    "_SVD": "its low-rank side branch (svd_lowrank_l1, svd_lowrank_l2) is not supported",
    "_FLATQUANT": "its online transforms are supported for W4A4_FLATQUANT_DYNAMIC only",
}
"""Part of a type string -> why such a type is refused."""


def refusal(text: str) -> str:
    """Why an unknown type string is refused."""
    for part, why in REFUSED.items():
        if part in text:
            return why
    return "it is no known type"
