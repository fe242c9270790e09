"""How many bytes each rank of a tensor-parallel group keeps: an estimate from the header.

The cut is the usual one: attention and MLP inputs are cut along their outputs, their output
projections along their inputs, embedding and head along the vocabulary; routers, low-rank
projections in front of attention, norms and everything unknown stay whole on every rank. The
largest rank counts: an axis that does not divide evenly is rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from quant_core.plan import Member, member_parts, part_nbytes
from quant_core.scheme import Scheme
from quant_core.spec import ParamSpec, TensorInfo

__all__ = ["cut_axis", "rank_bytes"]

_ALONG_OUT = frozenset(
    "q_proj k_proj v_proj qkv_proj gate_proj up_proj gate_up_proj q_b_proj kv_b_proj lm_head "
    "embed_tokens wte wq wk wv w1 w3 c_attn c_fc fc1 query_key_value dense_h_to_4h".split()
)
_COARSEST = 1024  # weights per value, above which a tensor does not grow with both axes
_ALONG_IN = frozenset("o_proj down_proj out_proj c_proj wo w2 fc2 dense_4h_to_h".split())


def cut_axis(name: str) -> Literal["out", "in"] | None:
    """The axis along which the module ``name`` is cut; None = every rank keeps all of it."""
    leaf = name.rpartition(".")[2]
    return "out" if leaf in _ALONG_OUT else "in" if leaf in _ALONG_IN else None


def _fraction(sizes: Iterable[tuple[str, int]], cut: str | None, ranks: int) -> float:
    along = {"in": ("in", "group"), "out": ("out",)}.get(cut or "", ())
    for tag, size in sizes:
        if tag in along and size > 1:
            return -(-size // ranks) / size
    return 1.0


def _param_fraction(
    param: ParamSpec, matrix: tuple[int, int], cut: str | None, ranks: int
) -> float:
    directed = any(axis.tag in ("in", "out", "group") for axis in param.axes)
    if not directed and math.prod(param.shape) * _COARSEST >= math.prod(matrix):
        # stored flattened, so no stored axis is cut, but the canonical form is
        return _fraction(zip(("out", "in"), matrix), cut, ranks)
    cuttable = [
        (axis.tag, size)
        for axis, size in zip(param.axes, param.shape)
        if axis.cut == "slice"
    ]  # fmt: skip
    return _fraction(cuttable, cut, ranks)


def _float_fraction(info: TensorInfo, cut: str | None, ranks: int) -> float:
    tags = ("out", "in") if len(info.shape) == 2 else ("out",) if len(info.shape) == 1 else ()
    return _fraction(zip(tags, info.shape), cut, ranks)


def rank_bytes(member: Member, tensors: Mapping[str, TensorInfo], ranks: int) -> float:
    """Stored bytes of ``member`` on the fullest rank of ``ranks``."""
    cut = cut_axis(member.layer.name)
    if not isinstance(member.scheme, Scheme):
        return sum(
            tensors[n].nbytes * _float_fraction(tensors[n], cut, ranks) for n in member.stored
        )
    return sum(
        part_nbytes(tensors[name], index) * _param_fraction(param, member.scheme.shape, cut, ranks)
        for param, name, index, _ in member_parts(member)
        if name in tensors and param.need != "ignored"
    )
