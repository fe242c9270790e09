"""Exact rewrites of the canonical form: the same weights, cut, joined, reordered or re-described.

Every rewrite is a pure function that returns a new object (which may share memory with its input),
changes nothing, and raises ``LayoutError`` where it would not be exact:

    Q-LAYOUT-TP         a cut that no rank layout allows
    Q-LAYOUT-GROUP      grains or groups that do not fit each other
    Q-LAYOUT-FUSED      members too unlike to be one matrix
    Q-LAYOUT-REPRESENT  values the target description cannot hold
"""

from __future__ import annotations

from quant_core.rewrites.codes import repack
from quant_core.rewrites.columns import drop_gather, from_gather, to_gather
from quant_core.rewrites.cut import slice_in, slice_out
from quant_core.rewrites.grains import regrain
from quant_core.rewrites.join import concat_out, disagreement
from quant_core.rewrites.pad import pad_out
from quant_core.rewrites.values import code_to_offset, const_to_code, fold_scales

__all__ = [
    "code_to_offset",
    "concat_out",
    "const_to_code",
    "disagreement",
    "drop_gather",
    "fold_scales",
    "from_gather",
    "pad_out",
    "regrain",
    "repack",
    "slice_in",
    "slice_out",
    "to_gather",
]
