"""Experts that a float checkpoint stores as stacks: gate, up and down, cut out of two tensors.

    gate_up_proj [E, 2I, H]   gate rows first, then up: "halves"; or row by row in turn
    gate_up_proj [E, H, 2I]   the same transposed
    down_proj    [E, H, I] or [E, I, H];   gate_up_proj_bias [E, 2I], down_proj_bias [E, H]

Shapes do not tell these apart, so the engine says which it is (``StackLayout``). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import FLOAT_DTYPES
from quant_core.plan import Member, Plan
from quant_core.spec import EXPERT, Axis, LayerDesc, ParamSpec, Source, Span, TensorInfo

__all__ = ["StackLayout", "StackPart", "stack_parts"]

_STACKS = ("gate_up_proj", "down_proj")
_LEAVES = frozenset((*_STACKS, *(f"{s}_bias" for s in _STACKS)))
_FLOATS = tuple(sorted(FLOAT_DTYPES))
Cut = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StackLayout:
    """How an engine's module of experts lies.

    Attributes:
        transposed: matrices are [in, out].
        in_turn: outputs of gate and up alternate; else gate comes first.
    """

    transposed: bool = False
    in_turn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StackPart:
    """One role of a stack: what is read for one expert.

    Attributes:
        layer: the member, with its sizes.
        weight, bias: stored tensors; bias None if there is none.
        rows: outputs of the role within the stored ones; None = all.
        transposed: the stored matrix is [in, out].
    """

    layer: LayerDesc
    weight: TensorInfo
    bias: TensorInfo | None
    rows: Cut | None
    transposed: bool

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return (self.weight.name,) if self.bias is None else (self.weight.name, self.bias.name)

    def params(self) -> tuple[ParamSpec, ...]:
        """A float weight, as it is cut out, and a bias."""
        n, k = self.layer.out_features, self.layer.in_features
        assert n is not None
        assert k is not None
        out, inp = Axis(tag="out"), Axis(tag="in")
        outputs = () if self.rows is None else (self.rows,)
        inputs = ((0, k, 1),) if self.transposed and outputs else ()
        weight = ParamSpec(
            name="weight",
            shape=(k, n) if self.transposed else (n, k),
            dtypes=_FLOATS,
            axes=(inp, out) if self.transposed else (out, inp),
            sources=(Source(name=self.weight.name, index=(EXPERT, *inputs, *outputs)),),
        )
        if self.bias is None:
            return (weight,)
        source = Source(name=self.bias.name, index=(EXPERT, *outputs))
        bias = ParamSpec(
            name="bias", shape=(n,), dtypes=_FLOATS, axes=(out,), role="bias", sources=(source,)
        )
        return (weight, bias)


def stack_parts(plan: Plan, layouts: Mapping[str, StackLayout]) -> dict[str, tuple[StackPart, ...]]:
    """Members of stacked float experts -> gate, up and down of each.

    Args:
        layouts: public name of a module of experts -> how the engine's module lies; others are
            left alone.
    """
    out = {}
    for name, member in plan.members.items():
        layout = layouts.get(name)
        if layout is not None and not member.quantized:
            parts = _parts(plan.checkpoint, name, member, layout)
            if parts:
                out[name] = parts
    return out


def _parts(
    checkpoint: Checkpoint, name: str, member: Member, layout: StackLayout
) -> tuple[StackPart, ...]:
    """The three parts; () if the stored tensors are no such stacks."""
    leaves = {n.rpartition(".")[2]: checkpoint.tensors[n] for n in member.stored}
    stacks = [leaves.get(s) for s in _STACKS]
    if not leaves.keys() <= _LEAVES or any(s is None or len(s.shape) != 3 for s in stacks):
        return ()
    found = []
    for role in ("gate", "up", "down"):
        stack = "down_proj" if role == "down" else "gate_up_proj"
        info, bias = leaves[stack], leaves.get(f"{stack}_bias")
        experts, n, k = info.shape
        n, k = (k, n) if layout.transposed else (n, k)
        if role != "down" and n % 2:
            return ()
        rows = None if role == "down" else _rows(role, n, layout.in_turn)
        n = n if rows is None else n // 2
        layer = LayerDesc(
            kind="experts",
            name=f"{name}.{role}_proj",
            stored=member.layer.stored,
            inp=Span.whole(k),
            out=Span.whole(n),
            experts=tuple(range(experts)),
            role=role,
            bias=bias is not None,
            dtype=info.dtype,
        )
        found.append(
            StackPart(layer=layer, weight=info, bias=bias, rows=rows, transposed=layout.transposed)
        )
    return tuple(found)


def _rows(role: str, stored: int, in_turn: bool) -> Cut:
    second = int(role == "up")
    if in_turn:
        return (second, stored, 2)
    half = stored // 2
    return (second * half, (second + 1) * half, 1)
