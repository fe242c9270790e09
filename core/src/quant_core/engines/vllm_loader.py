"""Load format ``quant_core`` in vLLM, and the names that its own loader skips.

    --load-format quant_core     float tensors under the model's own names, and a ticket for every
                                 packed member, so that vLLM's naming leads to every layer; every
                                 parameter must be filled; needed for containers that vLLM cannot
                                 read, for what is stored under no name of the model, to reload
    (vLLM's own load formats)    safetensors; packed tensors are left out of the stream

Source: vLLM 0.32.0, model_executor/model_loader/{base_loader,reload/}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from quant_core.engines.vllm_config import METHOD, QuantCoreConfig, local_path
from quant_core.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

    from quant_core.plan import Member, Plan

__all__ = ["PackedNames", "QuantCoreLoader"]

_registered: list[bool] = []


class QuantCoreLoader(BaseModelLoader):  # type: ignore[misc]
    """Feeds a model from the plan that its quantization config made."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        if load_config.model_loader_extra_config:
            raise ConfigError(
                "model_loader_extra_config: is "
                f"{load_config.model_loader_extra_config!r}, expected none with "
                f"load_format={METHOD!r}. Remove it.",
                code="Q-CFG-KEY",
                tensor="model_loader_extra_config",
                actual=load_config.model_loader_extra_config,
            )
        self._config: QuantCoreConfig | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        local_path(model_config.model, model_config.revision)

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        self._config = _ours(vllm_config.quant_config)
        model: Any = super().load_model(
            vllm_config=vllm_config, model_config=model_config, prefix=prefix
        )
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size == 1 and not parallel.enable_expert_parallel:
            self._config.plan.ledger.check_loaded()
        return model

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        config = self._config or _config_of(model)
        config.check_taken()
        config.feeding = True  # before the first name is asked for
        loaded = model.load_weights(_stream(config))
        if loaded is not None:
            _check_filled(config.plan, model, loaded)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, Tensor]]:
        """Called by vLLM to load again, in place."""
        config = _config_of(model)
        config.reopen(model_config.model)
        config.feeding = True
        return _stream(config, again=True)


def register_loader() -> None:
    """Once in each process that our method reaches: importing vLLM's loaders takes a while."""
    from vllm.model_executor.model_loader import register_model_loader

    if not _registered:
        register_model_loader(METHOD)(QuantCoreLoader)
        _registered.append(True)


def _ours(config: object) -> QuantCoreConfig:
    if not isinstance(config, QuantCoreConfig):
        raise ConfigError(
            f"load_format={METHOD!r}: the quantization method is {type(config).__name__}, expected "
            f"{METHOD!r}. Pass quantization={METHOD!r} as well.",
            code="Q-CFG-CONFLICT",
            tensor="load_format",
            expected=METHOD,
            actual=type(config).__name__,
        )
    return config


def _config_of(model: nn.Module) -> QuantCoreConfig:
    for module in model.modules():
        config = getattr(getattr(module, "quant_method", None), "config", None)
        if isinstance(config, QuantCoreConfig):
            return config
    return _ours(None)


def _stream(config: QuantCoreConfig, *, again: bool = False) -> Iterator[tuple[str, Tensor]]:
    config.feeding = True
    try:
        yield from _weights(config, again)
    finally:
        config.feeding = False


def _weights(config: QuantCoreConfig, again: bool) -> Iterator[tuple[str, Tensor]]:
    """Names of the checkpoint's own model, in file order of the plan."""
    from quant_core.engines.packed import neutral
    from quant_core.engines.sharing import read_bias
    from quant_core.engines.vllm_layers import ticket
    from quant_core.engines.vllm_refit import tickets
    from quant_core.load import read_parameter

    plan, account = config.plan, config.account
    assert account is not None
    for name in plan.dense:
        if name not in config.held:
            with neutral():
                value = read_parameter(plan, name)
            yield name, value
    for name, member in plan.members.items():
        if name not in account.taken or not member.quantized:
            continue
        if not member.layer.experts:
            bias = read_bias(plan, member)
            if bias is not None:
                yield f"{name}.bias", bias
        elif member.layer.role and not again:
            continue  # vLLM processes their layer without
        yield from ((n, ticket()) for n in tickets(member))


def _check_filled(plan: Plan, model: nn.Module, loaded: set[str]) -> None:
    """Every parameter that a checkpoint fills was filled.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``.
    """
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    from quant_core.engines.vllm_experts import ExpertsMethod
    from quant_core.ledger import missing_error

    optional = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod | ExpertsMethod)
    )
    lacking = [
        name
        for name, param in model.named_parameters()
        if name not in loaded and param.numel() and not name.startswith(optional)
    ]
    if lacking:
        raise missing_error(plan.checkpoint, lacking, f"{type(model).__name__} of vLLM")


class PackedNames:
    """Which names of vLLM's own stream are parts of packed layers: stands for a regex there."""

    def __init__(self, config: QuantCoreConfig) -> None:
        self.config, plan = config, config.plan
        members = [m for m in plan.members.values() if m.quantized]
        self.names = {
            name
            for member in (*members, *plan.attention.values())
            for name in _packed_tensors(member)
        }
        self.names |= {plan.dense[public] for public in config.held}
        self.names |= set(plan.ledger.skipped)

    def search(self, name: str) -> bool:
        return name in self.names


def _packed_tensors(member: Member) -> Iterator[str]:
    """Stored names; without the bias of a layer, which is vLLM's own parameter."""
    from quant_core.plan import member_parts

    for param, name, _, _ in member_parts(member):
        if param.name != "bias" or member.layer.experts:
            yield name
