"""Routed experts of vLLM, packed: three stacks, gate, up and down, of any types.

vLLM routes tokens and adds shared experts; here are only the experts of this rank. Tensor parallel
ranks hold a part of the intermediate features each, expert parallel ranks whole experts.

Source: vLLM 0.32.0, model_executor/layers/fused_moe/{routed_experts,fused_moe_method_base}.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from quant_core.engines.packed import (
    attach,
    bind_stack,
    gating_of,
    neutral,
    run_experts,
)
from quant_core.engines.parallel import even
from quant_core.engines.sharing import Piece, roles_of
from quant_core.engines.vllm_layers import add_ticket, drop_ticket
from quant_core.errors import LayoutError
from quant_core.nn import ClampedSwiglu
from quant_core.plan import Member
from quant_core.scheme import Scheme
from quant_core.spec import Span

if TYPE_CHECKING:
    from quant_core.engines.vllm_config import QuantCoreConfig

__all__ = ["ExpertsMethod", "experts_method"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}
_CLAMPED = ("swigluoai", "swigluoai_uninterleave")  # the stacks here are never interleaved
_LIMIT, _ALPHA = 7.0, 1.702  # of gpt-oss, where the layer states none


def experts_method(
    config: QuantCoreConfig, layer: RoutedExperts, prefix: str
) -> ExpertsMethod | None:
    """None if the checkpoint stores these experts as floats.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``, ``Q-CKPT-MISMATCH``.
        LayoutError: ``Q-ENGINE-MODULE`` for an activation that packed experts do not compute.
    """
    stacks = config.names.below(prefix)
    if not any(m.quantized for m in stacks.values()):
        return None
    names = {
        layer.ckpt_gate_proj_name: "gate",
        layer.ckpt_up_proj_name: "up",
        layer.ckpt_down_proj_name: "down",
    }
    roles = roles_of(config.plan, prefix, stacks, names)
    assert config.account is not None
    config.account.take(prefix, roles.values())
    return ExpertsMethod(config, layer, prefix, roles)


def _gating(layer: RoutedExperts, prefix: str) -> Callable[[Tensor, Tensor], Tensor]:
    kind = layer.activation.value
    if kind in _CLAMPED:
        limit, alpha = layer.swiglu_limit, layer.swiglu_alpha
        return ClampedSwiglu(
            limit=_LIMIT if limit is None else limit, alpha=_ALPHA if alpha is None else alpha
        )
    if kind not in _ACTIVATIONS or layer.swiglu_limit is not None:
        raise LayoutError(
            f"{prefix}: experts with activation {kind!r} (limit {layer.swiglu_limit}), expected "
            f"one of {sorted(_ACTIVATIONS)} or a clamped swiglu. These experts cannot stay packed; "
            "exclude them from quantization.",
            code="Q-ENGINE-MODULE",
            tensor=prefix,
            expected=sorted(_ACTIVATIONS),
            actual=kind,
        )
    return gating_of(_ACTIVATIONS[kind])


class ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one layer that this rank holds."""

    requires_device_loading = False

    def __init__(
        self,
        config: QuantCoreConfig,
        layer: RoutedExperts,
        prefix: str,
        roles: dict[str, Member],
    ) -> None:
        super().__init__(layer.moe_config)
        self.config, self.prefix = config, prefix
        self.member_names = {role: m.layer.name for role, m in roles.items()}
        self.gating = _gating(layer, prefix)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        for name, count in (("w13_weight", 2), ("w2_weight", 1)):
            add_ticket(layer, name, count)
        ranks = 1 if layer.use_ep else self.moe.tp_size
        total = intermediate_size_per_partition * ranks
        layer.packed_cut = even(total, self.moe.tp_rank if ranks > 1 else 0, ranks)
        layer.packed_hidden = hidden_size
        layer.packed_dtype = params_dtype
        slots = {
            slot: e
            for e in range(layer.global_num_experts)
            if (slot := layer._map_global_expert_id_to_local_expert_id(e)) >= 0
        }
        layer.packed_experts = [slots[s] for s in sorted(slots)]

    def _pieces(self, layer: RoutedExperts) -> dict[str, Piece]:
        plan, inner, hidden = self.config.plan, layer.packed_cut, Span.whole(layer.packed_hidden)
        out = {}
        for role, name in self.member_names.items():
            member = plan.members[name]
            assert isinstance(member.scheme, Scheme)
            if len(member.layer.experts) != layer.global_num_experts:
                raise LayoutError(
                    f"{name}: the checkpoint holds {len(member.layer.experts)} experts, the model "
                    f"expects {layer.global_num_experts}. config.json describes another model, or "
                    "vLLM was told to add redundant experts.",
                    code="Q-LAYOUT-SHAPE",
                    tensor=name,
                    expected=layer.global_num_experts,
                    actual=len(member.layer.experts),
                )
            down = role == "down"
            out[role] = Piece(
                member=member, out=hidden if down else inner, inp=inner if down else hidden
            )
        return out

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        self.config.check_taken()
        builder = self.config.builder(layer.packed_dtype)
        stacks = getattr(layer, "packed", None)
        with neutral():
            for role, piece in self._pieces(layer).items():
                name = f"{self.prefix}.{role}"
                part = bind_stack(builder, name, piece, layer.packed_experts)
                if stacks is None:
                    new = attach(name, layer, [part], f"packed_{role}")
                    layer.__dict__.setdefault("packed_new", {})[role] = new
                else:
                    stacks[role].replace([part])
        if stacks is None:
            layer.packed = layer.__dict__.pop("packed_new")
        for name in ("w13_weight", "w2_weight"):
            drop_ticket(layer, name, layer.packed_dtype, builder.device)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        slots = topk_ids
        if layer._expert_map is not None:
            slots = layer._expert_map[topk_ids.long()]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        stacks = layer.packed
        return run_experts(
            stacks["gate"], stacks["up"], stacks["down"], self.gating, x, slots, topk_weights
        )
