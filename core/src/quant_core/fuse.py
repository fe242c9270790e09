"""Fuse or compose: members of one fused layer as one matrix, or as the few that agree.

Engines fuse q, k, v (gate, up) into one matmul; checkpoints quantize the members one by one and
may mix types between them. Members that agree are joined exactly; the others stay apart, each
bound to a kernel of its own, and their outputs lie side by side.

    q int4 | k int4 | v int8      ->   Composite: rows [0, Nq+Nk) int4, rows [Nq+Nk, ...) int8
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant_core.errors import LayoutError
from quant_core.rewrites.join import concat_out, disagreement, same_bytes
from quant_core.spec import QuantSpec
from quant_core.tensors import LayerTensors

__all__ = ["Composite", "distinct_inputs", "fuse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """Members that could not become one matrix.

    Attributes:
        parts: (first output row, part), in order; neighbours that agree are already one part.
        reason: which members disagreed, and on what.
        inputs: for every part the index of its input quantization: parts with one index share
            one quantized activation.
    """

    parts: tuple[tuple[int, LayerTensors], ...]
    reason: str
    inputs: tuple[int, ...]

    @property
    def distinct_inputs(self) -> int:
        """How often the activation must be quantized (or transformed)."""
        return len(set(self.inputs))

    @property
    def out_features(self) -> int:
        start, last = self.parts[-1]
        return start + last.weight.shape[-2]


def _same_input(a: LayerTensors, b: LayerTensors) -> bool:
    if not (same_bytes(a.input_scale, b.input_scale) and same_bytes(a.input_zero, b.input_zero)):
        return False
    x = [(t, v) for t, v in a.transforms if t.site == "input"]
    y = [(t, v) for t, v in b.transforms if t.site == "input"]
    return [t for t, _ in x] == [t for t, _ in y] and all(
        len(v) == len(w) and all(map(same_bytes, v, w)) for (_, v), (_, w) in zip(x, y)
    )


def distinct_inputs(
    members: Sequence[LayerTensors], inputs: Sequence[QuantSpec | None] = ()
) -> tuple[int, ...]:
    """For every member the index of its input quantization, numbered in order of appearance.

    Two members share one when their input specs, static input scales and zeros, and input
    transforms are equal.
    """
    specs: Sequence[QuantSpec | None] = inputs or [None] * len(members)
    first: list[int] = []
    out = []
    for i, member in enumerate(members):
        at = next(
            (
                j
                for j, k in enumerate(first)
                if specs[k] == specs[i] and _same_input(members[k], member)
            ),
            len(first),
        )
        if at == len(first):
            first.append(i)
        out.append(at)
    return tuple(out)


def fuse(
    members: Sequence[LayerTensors], inputs: Sequence[QuantSpec | None] = ()
) -> LayerTensors | Composite:
    """Members in output order, as one layer if they agree, else as a ``Composite``. Exact.

    Args:
        members: canonical members with one weight each, of one in_features.
        inputs: the spec each member's scheme has for its activations; () = not quantized.

    Raises:
        LayoutError: ``Q-LAYOUT-FUSED`` for no members, or as many ``inputs`` as members not given.
    """
    if not members or (inputs and len(inputs) != len(members)):
        raise LayoutError(
            f"fuse: {len(members)} members with {len(inputs)} input specs, expected at least one "
            "member and one input spec for each. Pass one per member, or none.",
            code="Q-LAYOUT-FUSED",
            expected=len(members),
            actual=len(inputs),
        )
    at = distinct_inputs(members, inputs)
    runs: list[list[int]] = [[0]]
    reasons = []
    for i in range(1, len(members)):
        why = disagreement(members[i - 1], members[i])
        if why is None and at[i - 1] != at[i]:
            why = "input specs"
        if why is None:
            runs[-1].append(i)
        else:
            reasons.append(f"members {i - 1} and {i} have unlike {why}")
            runs.append([i])
    if len(runs) == 1:
        return concat_out(members)
    parts, start = [], 0
    for run in runs:
        part = concat_out([members[i] for i in run])
        parts.append((start, part))
        start += part.weight.shape[-2]
    return Composite(
        parts=tuple(parts),
        reason="; ".join(reasons),
        inputs=tuple(at[run[0]] for run in runs),
    )
