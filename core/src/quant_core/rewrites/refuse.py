"""How a rewrite says no: one sentence each of what was found, what would do, and how to fix it."""

from __future__ import annotations

from typing import Any

from quant_core.errors import LayoutError
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["check_range", "check_scalar", "only_weight", "refuse"]


def refuse(
    kind: str,
    message: str,
    *,
    expected: Any = None,
    actual: Any = None,
    tensor: str | None = None,
) -> LayoutError:
    """The error to raise; ``kind`` is the last part of the code ("TP" -> ``Q-LAYOUT-TP``)."""
    return LayoutError(
        message, code=f"Q-LAYOUT-{kind}", expected=expected, actual=actual, tensor=tensor
    )


def check_range(what: str, start: int, stop: int, size: int | None) -> None:
    """[start, stop) is not empty and lies inside ``size`` (None: no upper end)."""
    if not 0 <= start < stop or (size is not None and stop > size):
        end = "the axis" if size is None else str(size)
        raise refuse(
            "TP",
            f"{what}({start}, {stop}): the range is empty or outside [0, {end}). "
            "Give 0 <= start < stop inside the axis.",
            expected=(0, size),
            actual=(start, stop),
        )


def check_scalar(qt: QuantizedTensor, what: str) -> None:
    """Refuse codes that cover several weights: no rewrite may cut or move part of one."""
    if not qt.spec.blocks and qt.spec.element.kind == "vector":
        raise refuse(
            "REPRESENT",
            f"{what}: one {qt.spec.element.name!r} code stands for {qt.spec.element.covers} "
            "weights, expected one weight per code. Keep this layer whole.",
            expected=(1, 1),
            actual=qt.spec.element.covers,
        )


def only_weight(lt: LayerTensors, what: str) -> QuantizedTensor:
    """The weight of a layer that has no other operand."""
    if set(lt.operands) != {"weight"}:
        raise refuse(
            "REPRESENT",
            f"{what}: layer has operands {sorted(lt.operands)}, expected only 'weight'. "
            "Rewrite the operands of attention one by one.",
            expected=["weight"],
            actual=sorted(lt.operands),
        )
    return lt.weight
