"""An operation with quantized activations."""

from __future__ import annotations

from dataclasses import replace


def with_input(op, spec, *features):
    """``op`` with ``spec`` as its "input" operand and further features."""
    return replace(
        op, operands=(*op.operands, ("input", spec)), features=op.features | set(features)
    )
