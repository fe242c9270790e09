"""Routed experts of SGLang, packed: three stacks, gate, up and down, of any types.

SGLang routes tokens, maps expert ids to those of this rank (-1: not here) and adds shared experts.
Tensor parallel ranks hold a part of the intermediate features each, expert parallel ranks whole
experts.

Source: SGLang 0.5.23, srt/layers/moe/fused_moe_triton/layer.py, srt/layers/moe/token_dispatcher/
standard.py, srt/layers/moe/fused_moe_native.py (the arithmetic).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.layers.moe import get_moe_a2a_backend
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils import is_cuda
from torch import Tensor, nn

from quant_core.engines.packed import Packed, attach, bind_stack, gating_of, neutral, run_experts
from quant_core.engines.parallel import even
from quant_core.engines.sglang_slots import Slots
from quant_core.engines.sharing import Piece, roles_of
from quant_core.errors import LayoutError
from quant_core.nn import ClampedSwiglu
from quant_core.plan import Member, param_sources
from quant_core.spec import Span

if TYPE_CHECKING:
    from quant_core.engines.sglang_config import QuantCoreConfig

__all__ = ["ExpertsMethod", "experts_method"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}
_NAMES = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
_SHARDS = {"gate": "w1", "down": "w2", "up": "w3"}


def experts_method(config: QuantCoreConfig, layer: FusedMoE, prefix: str) -> ExpertsMethod | None:
    """None if the checkpoint stores these experts as floats.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``, ``Q-CKPT-MISMATCH``.
        LayoutError: ``Q-ENGINE-MODULE`` for what packed experts do not compute.
    """
    stacks = config.names.below(prefix)
    if not any(m.quantized for m in stacks.values()):
        return None
    roles = roles_of(config.plan, prefix, stacks, _NAMES)
    assert config.account is not None
    config.account.take(prefix, roles.values())
    return ExpertsMethod(config, layer, prefix, roles)


def _refuse(prefix: str, found: str, expected: str, fix: str) -> NoReturn:
    raise LayoutError(
        f"{prefix}: {found}, expected {expected}. {fix}",
        code="Q-ENGINE-MODULE",
        tensor=prefix,
        expected=expected,
        actual=found,
    )


def _gating(layer: FusedMoE, prefix: str) -> Callable[[Tensor, Tensor], Tensor]:
    settings = layer.moe_runner_config
    kind, fix = settings.activation, "Exclude these experts from quantization."
    if settings.swiglu_limit is not None or not settings.is_gated:
        found = f"experts with swiglu_limit={settings.swiglu_limit}, gated={settings.is_gated}"
        _refuse(prefix, found, "gated experts without swiglu_limit", fix)
    if settings.gemm1_alpha is not None:
        if settings.gemm1_clamp_limit is None or kind != "silu":
            _refuse(prefix, f"experts with activation {kind!r} and alpha", "a clamped silu", fix)
        return ClampedSwiglu(limit=settings.gemm1_clamp_limit, alpha=settings.gemm1_alpha)
    if kind not in _ACTIVATIONS:
        _refuse(prefix, f"experts with activation {kind!r}", f"one of {sorted(_ACTIVATIONS)}", fix)
    return gating_of(_ACTIVATIONS[kind])


class ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one layer that this rank holds."""

    def __init__(
        self, config: QuantCoreConfig, layer: FusedMoE, prefix: str, roles: dict[str, Member]
    ) -> None:
        self.config, self.prefix, self.roles = config, prefix, roles
        self.gating = _gating(layer, prefix)
        self.slots: Slots | None = None
        self.moe_runner_config: Any = None
        count = len(roles["gate"].layer.experts)
        if layer.num_fused_shared_experts:
            _refuse(prefix, "shared experts fused into the routed ones", "separate ones",
                    "Start with --disable-shared-experts-fusion.")  # fmt: skip
        if layer.num_experts != count:
            _refuse(prefix, f"{layer.num_experts} experts", f"{count}, as the checkpoint has",
                    "Start without redundant experts.")  # fmt: skip
        if get_exec().moe.enable_eplb:
            _refuse(prefix, "experts that move between ranks", "ones that stay",
                    "Start without --enable-eplb.")  # fmt: skip
        if not get_moe_a2a_backend().is_none():
            _refuse(prefix, "tokens sent between ranks by a backend of its own", "none",
                    "Start with --moe-a2a-backend none.")  # fmt: skip

    def create_weights(
        self,
        layer: FusedMoE,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        sources = self._sources()
        self.slots = Slots(layer, sources, self.config.round)
        for name in ("w13_weight", "w2_weight"):
            keys = sources.get(name, {})
            layer.packed_device = self.slots.add_weight(layer, name, params_dtype, keys)
        layer.packed_dtype = params_dtype
        ranks = layer.moe_tp_size
        inner = even(extra["moe_intermediate_size"], layer.moe_tp_rank if ranks > 1 else 0, ranks)
        hidden = Span.whole(hidden_size)
        layer.packed_spans = {"gate": (inner, hidden), "up": (inner, hidden)}
        layer.packed_spans["down"] = (hidden, inner)
        local = layer._map_global_expert_id_to_local_expert_id
        slots = {slot: e for e in range(layer.num_experts) if (slot := local(e)) >= 0}
        layer.packed_experts = [slots[s] for s in sorted(slots)]

    def _sources(self) -> dict[str, dict[Any, str]]:
        """Parameter name -> {(shard, expert): stored name}, as SGLang's models rename them."""
        tensors, out = self.config.plan.checkpoint.tensors, dict[str, dict[Any, str]]()
        for role, member in self.roles.items():
            start = "w2_" if role == "down" else "w13_"
            for expert in member.layer.experts:
                for param in member.params:
                    for name, _ in param_sources(member.layer, param, expert):
                        if name not in tensors or param.need == "ignored":
                            continue
                        leaf = name.rpartition(".")[2]
                        if f".{expert}." in name:
                            key = (_SHARDS[role], expert)
                            out.setdefault(start + leaf, {})[key] = name
                        else:  # one tensor for all experts
                            out.setdefault(leaf, {})[role] = name
        return out

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        self.moe_runner_config = moe_runner_config

    def process_weights_after_loading(self, layer: Any) -> None:
        self.config.check_taken()
        _check_places(layer, self.prefix)
        assert self.slots is not None
        plan = self.slots.take(self.config.plan)
        if plan is None:
            return
        builder = self.config.builder(plan, layer.packed_device, layer.packed_dtype)
        parts = {}
        with neutral():
            for role, (out, inp) in layer.packed_spans.items():
                member = plan.members[self.roles[role].layer.name]
                piece = Piece(member=member, out=out, inp=inp)
                name = f"{self.prefix}.{role}"
                parts[role] = bind_stack(builder, name, piece, layer.packed_experts)
        packed: dict[str, Packed] | None = getattr(layer, "packed", None)
        if packed is not None:
            for role, part in parts.items():
                packed[role].refill([part])
            return
        layer.packed = {
            role: attach(f"{self.prefix}.{role}", layer, [part], f"packed_{role}")
            for role, part in parts.items()
        }

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        assert self.slots is not None
        self.slots.restore()

    def apply(self, layer: Any, dispatch_output: Any) -> StandardCombineInput:
        x = dispatch_output.hidden_states
        weights, slots = dispatch_output.topk_output[:2]
        if self.moe_runner_config.apply_router_weight_on_input:
            x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
        packed = layer.packed
        y = run_experts(
            packed["gate"], packed["up"], packed["down"], self.gating, x, slots, weights
        )
        factor = self.moe_runner_config.routed_scaling_factor
        if factor is not None and is_cuda():  # elsewhere SGLang's models multiply
            y = y * factor
        return StandardCombineInput(hidden_states=y)

    def get_triton_quant_info(self, layer: nn.Module) -> Any:
        _refuse(self.prefix, "an adapter (LoRA) on packed experts", "one on linear layers only",
                "Leave the experts out of --lora-target-modules.")  # fmt: skip

    def get_moe_quant_info(self, layer: nn.Module, runner_backend: Any) -> Any:
        return self.get_triton_quant_info(layer)


def _check_places(layer: FusedMoE, prefix: str) -> None:
    """Experts lie where their numbers say: none is moved or doubled for balance."""
    found = get_global_expert_location_metadata() if layer.uses_expert_location else None
    if found is None:
        return
    places = found.physical_to_logical_map_cpu[layer.layer_id].tolist()
    if places != list(range(layer.num_experts)):
        _refuse(prefix, "experts in places of their own", "the order of the checkpoint",
                "Start without --init-expert-location and --enable-eplb.")  # fmt: skip
