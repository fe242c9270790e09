"""Scales of quantized keys and values for vLLM's own quantized cache.

vLLM quantizes the cache if it is told to (``--kv-cache-dtype fp8``); which scales the checkpoint
has for that is the plan's answer. Its cache takes one scale for all keys and one for all values.

Source: vLLM 0.32.0, model_executor/layers/quantization/kv_cache.py.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.utils.torch_utils import is_quantized_kv_cache

from quant_core.engines.packed import neutral
from quant_core.errors import ConfigError
from quant_core.load import read_matrix
from quant_core.plan import member_parts

if TYPE_CHECKING:
    from quant_core.engines.vllm_config import QuantCoreConfig

__all__ = ["CacheMethod", "cache_method"]

log = logging.getLogger("quant_core")


def cache_method(config: QuantCoreConfig, layer: nn.Module, prefix: str) -> CacheMethod | None:
    """None if the checkpoint holds no scales for this attention layer."""
    if not isinstance(layer, Attention | MLAAttention):
        return None
    if config.names.attention(prefix) is None:
        return None
    return CacheMethod(config, prefix)


class CacheMethod(BaseKVCacheMethod):  # type: ignore[misc]
    """Hands the checkpoint's scales to vLLM."""

    requires_device_loading = False

    def __init__(self, config: QuantCoreConfig, prefix: str) -> None:
        super().__init__(config)
        self.prefix = prefix

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if hasattr(layer, "k_scale"):  # gone after the first call
            if is_quantized_kv_cache(layer.kv_cache_dtype):
                for role, scale in self._scales().items():
                    getattr(layer, f"{role}_scale").data.fill_(scale)
            else:
                self._skip(f"vLLM's cache is {layer.kv_cache_dtype}")
                log.info(
                    "%s: the checkpoint has scales for a quantized cache, and the cache is %s",
                    self.prefix,
                    layer.kv_cache_dtype,
                )
        super().process_weights_after_loading(layer)

    def _skip(self, rule: str) -> None:
        plan = self.quant_config.plan
        member = self.quant_config.names.attention(self.prefix)
        for _, name, _, _ in () if member is None else member_parts(member):
            plan.ledger.skip(name, rule)

    def _scales(self) -> dict[str, float]:
        plan = self.quant_config.plan
        member = self.quant_config.names.attention(self.prefix)
        assert member is not None
        with neutral():
            found = read_matrix(plan, member).operands
        return {role: self._one(role, t.scales[0], t.zeros) for role, t in found.items()}

    def _one(self, role: str, scale: Tensor, zeros: Tensor | None) -> float:
        if scale.numel() != 1 or (zeros is not None and bool(zeros.any())):
            what = f"{scale.numel()} scales" + ("" if zeros is None else " with zero points")
            raise ConfigError(
                f"{self.prefix}: {what} for {role}, expected one scale: vLLM's quantized cache "
                "takes no others. Start without --kv-cache-dtype.",
                code="Q-ENGINE-CACHE",
                tensor=f"{self.prefix}.{role}_scale",
                expected=1,
                actual=scale.numel(),
            )
        return float(scale.item())
