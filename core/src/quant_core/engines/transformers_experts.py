"""Experts of transformers models: which of them packed experts can replace, and how they gate.

    out = down(gating(gate(x), up(x)))        gating: act(gate) * up, or one of ``GATINGS``

A module's weights may lie transposed, gate and up interleaved: that is the engine's own matter, as
packed members come one by one as [experts, out, in].

Source: transformers 5.23.0, integrations/moe.py and models/gpt_oss/modeling_gpt_oss.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from quant_core.nn import ClampedSwiglu

__all__ = ["expert_sizes", "gating_of", "has_expert_bias", "is_replaceable", "weight_leaf"]

Gating = Callable[[Tensor, Tensor], Tensor]
_PACKAGE = "transformers.models."


def _gpt_oss(module: Any) -> Gating | None:
    if not (module.is_transposed and module.has_bias) or module.is_concatenated:
        return None
    return ClampedSwiglu(limit=float(module.limit), alpha=float(module.alpha))


GATINGS: Mapping[str, Callable[[Any], Gating | None]] = {
    "gpt_oss.modeling_gpt_oss.GptOssExperts": _gpt_oss,
}
"""Class below transformers.models -> its gating; None if the module is not the one known here."""


def gating_of(module: nn.Module) -> Gating | None:
    """The gating of a module that does not simply compute act(gate) * up; None if it does."""
    cls = type(module)
    make = GATINGS.get(f"{cls.__module__}.{cls.__qualname__}".removeprefix(_PACKAGE))
    return None if make is None else make(module)


def is_replaceable(module: Any) -> bool:
    """Whether packed experts compute what this module does."""
    from transformers.integrations.moe import _default_apply_gate

    if gating_of(module) is not None:
        return True
    extras = ("is_transposed", "has_bias", "has_post_expert_norm")
    return (
        isinstance(getattr(module, "act_fn", None), nn.Module)
        and getattr(type(module), "_apply_gate", None) is _default_apply_gate
        and getattr(module, "is_concatenated", False)
        and getattr(module, "has_gate", False)
        and not any(getattr(module, name, False) for name in extras)
    )


def has_expert_bias(module: nn.Module) -> bool:
    """Whether gate, up and down of a module of experts have biases."""
    return getattr(module, "gate_up_proj_bias", None) is not None


def weight_leaf(role: str) -> str:
    """The parameter that holds the experts of a role."""
    return "down_proj" if role == "down" else "gate_up_proj"


def expert_sizes(module: Any) -> dict[str, tuple[int, int, int]]:
    """Role -> (experts, out, in) of its matrices."""

    def shape(name: str) -> tuple[int, int, int]:
        experts, rows, cols = getattr(module, name).shape
        return (experts, cols, rows) if getattr(module, "is_transposed", False) else (
            experts, rows, cols
        )  # fmt: skip

    experts, rows, hidden = shape("gate_up_proj")
    half = (experts, rows // 2, hidden)
    return {"gate": half, "up": half, "down": shape("down_proj")}
