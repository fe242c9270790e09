"""Scales of quantized keys and values for SGLang's own quantized cache.

SGLang quantizes the cache if it is told to (``--kv-cache-dtype fp8_e4m3``) and takes one scale for
all keys and one for all values; which the checkpoint has is the plan's answer.

Source: SGLang 0.5.23, srt/layers/quantization/kv_cache.py.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.layers.radix_attention import RadixAttention
from torch import Tensor, nn

from quant_core.engines.packed import neutral
from quant_core.errors import ConfigError
from quant_core.load import read_matrix
from quant_core.plan import Member

if TYPE_CHECKING:
    from quant_core.engines.sglang_config import QuantCoreConfig

__all__ = ["CacheMethod", "cache_method"]

log = logging.getLogger("quant_core")


def cache_method(config: QuantCoreConfig, layer: nn.Module, prefix: str) -> CacheMethod | None:
    """None if the checkpoint holds no scales for this attention layer."""
    if not isinstance(layer, RadixAttention):
        return None
    member = config.names.attention(prefix)
    return None if member is None else CacheMethod(config, prefix, member)


class CacheMethod(BaseKVCacheMethod):  # type: ignore[misc]
    """Hands the checkpoint's scales to SGLang."""

    def __init__(self, config: QuantCoreConfig, prefix: str, member: Member) -> None:
        super().__init__(config)
        self.prefix, self.member, self.done = prefix, member, False

    def create_weights(self, layer: Any) -> None:
        super().create_weights(layer)
        for param in (layer.k_scale, layer.v_scale):
            param.weight_loader = self._accept

    def _accept(self, param: nn.Parameter, loaded: Tensor, *args: Any) -> None:
        """The scales come from the plan; those of a running engine stay."""
        if self.done and loaded.numel() == 1 and float(loaded) != float(param):
            log.warning(
                "%s: keeps its cache scale %g, and not %g: cached keys and values have it",
                self.prefix,
                float(param),
                float(loaded),
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.done:
            return
        self.done = True
        with neutral():
            found = read_matrix(self.quant_config.plan, self.member).operands
        for role in ("k", "v"):
            if role in found:
                scale = self._one(role, found[role].scales[0], found[role].zeros)
                getattr(layer, f"{role}_scale").data.fill_(scale)
        super().process_weights_after_loading(layer)

    def _one(self, role: str, scale: Tensor, zeros: Tensor | None) -> float:
        if scale.numel() != 1 or (zeros is not None and bool(zeros.any())):
            what = f"{scale.numel()} scales" + ("" if zeros is None else " with zero points")
            raise ConfigError(
                f"{self.prefix}: {what} for {role}, expected one scale: SGLang's quantized cache "
                "takes no others. Write the checkpoint with one scale a layer.",
                code="Q-ENGINE-CACHE",
                tensor=f"{self.prefix}.{role}_scale",
                expected=1,
                actual=scale.numel(),
            )
        return float(scale.item())
