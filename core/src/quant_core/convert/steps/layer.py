"""What may be there at all: nothing but a weight and a bias, integer codes, columns in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.convert.fit import Losses, cannot_hold
from quant_core.rewrites import drop_gather, from_gather
from quant_core.rewrites.grains import map_levels
from quant_core.spec import Grain, QuantSpec, Scale, Transform
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["ANOTHER", "in_order", "plain_codes", "plain_layer", "weight_only"]

ANOTHER = "Choose a target that holds it, or quantize the original model for this one."


def weight_only(
    lt: LayerTensors,
    operands: Mapping[str, QuantSpec],
    losses: Losses,
    *,
    keep_input: bool = False,
) -> LayerTensors:
    """A weight and a bias alone. Quantized activations are a loss; the rest is refused.

    With ``keep_input`` the target holds the quantized activations as they are.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``.
    """
    kept = [n for n in ("acc_bias", "out_scale") if getattr(lt, n) is not None]
    kept += ["transforms"] if lt.transforms else []
    kept += sorted(set(lt.operands) - {"weight"})
    if kept:
        raise cannot_hold(losses.where, f"has {', '.join(kept)}", "a weight and a bias", ANOTHER)
    if keep_input:
        return lt
    if "input" in operands or lt.input_scale is not None or lt.input_zero is not None:
        label = operands["input"].label if "input" in operands else "a static scale"
        losses.lose(
            f"quantizes its activations ({label})",
            "float activations",
            "activations are no longer quantized",
        )
        lt = replace(lt, input_scale=None, input_zero=None)
    return lt


def plain_layer(lt: LayerTensors, transforms: tuple[Transform, ...], where: str) -> LayerTensors:
    """A weight, a bias and stored input scales, under the maps of ``transforms`` and no others.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``.
    """
    kept = [n for n in ("acc_bias", "out_scale") if getattr(lt, n) is not None]
    kept += sorted(set(lt.operands) - {"weight"})
    if kept:
        expected = "a weight and a bias"
        raise cannot_hold(where, f"has {', '.join(kept)}", expected, ANOTHER)
    have = tuple(t for t, _ in lt.transforms)
    if have != transforms:
        found = f"has transforms ({', '.join(t.kind for t in have)})" if have else "has none"
        expected = f"transforms ({', '.join(t.kind for t in transforms)})"
        raise cannot_hold(where, found, expected if transforms else "no transforms", ANOTHER)
    return lt


def plain_codes(qt: QuantizedTensor, where: str) -> None:
    """Refuse opaque blocks, tables, small floats and vector codes."""
    if qt.spec.blocks or qt.spec.element.kind not in ("uint", "int"):
        raise cannot_hold(where, f"weights are {qt.spec.label}", "integer codes", ANOTHER)


def in_order(qt: QuantizedTensor, in_features: int, where: str) -> QuantizedTensor:
    """Without a gather, where columns of one group lie together in input order. Exact.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if groups are scattered (activation order).
    """
    qt = drop_gather(qt)
    if qt.gather is None:
        return qt
    size = max((c for _, c in _grains(qt)), default=0)
    plain, group = from_gather(qt, in_features)
    if size == 0:
        return plain
    runs = group.split(size)
    order = torch.stack([run[0] for run in runs])
    if any(bool((run != run[0]).any()) for run in runs) or len(order.unique()) != len(order):
        raise cannot_hold(
            where,
            f"groups of {size} columns are scattered over the input (activation order)",
            "columns in order",
            "Choose a target that stores the group of each column.",
        )
    index = order.long()

    def pick(t: Tensor, s: Scale) -> Tensor:
        return t.index_select(-1, index) if s.grain[1] else t

    return replace(plain, **map_levels(plain, pick))  # type: ignore[arg-type]


def _grains(qt: QuantizedTensor) -> list[Grain]:
    zero = qt.spec.zero
    return [s.grain for s in (*qt.spec.scales, *(zero.levels if zero is not None else ()))]
