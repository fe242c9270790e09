"""Load format ``private`` in SGLang: weights from the checkpoint's plan, whatever their container.

    --load-format private    float tensors under the names of the checkpoint's own model; packed
                             layers read theirs from the file; needed for containers that SGLang
                             cannot read
    (SGLang's own)           safetensors

SGLang asks a module ``sglang.private.private_model_loader`` for the loader of that format. It ships
none; ``register`` in ``sglang.py`` puts one in its place that leads here.

Source: SGLang 0.5.23, srt/model_loader/loader.py (get_model_loader, DefaultModelLoader),
srt/model_executor/model_runner_components/weight_updater.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sglang.srt.model_loader.loader import DefaultModelLoader
from torch import Tensor, nn

from quant_core.engines.sglang_config import FED, LOAD_FORMAT, METHOD, QuantCoreConfig
from quant_core.errors import ConfigError, LayoutError

if TYPE_CHECKING:
    from quant_core.plan import Plan

__all__ = ["PrivateModelLoader"]

_loaded: WeakKeyDictionary[Any, QuantCoreConfig] = WeakKeyDictionary()
"""SGLang's config of a model -> ours, by which its weights were loaded."""


class PrivateModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Feeds a model from the plan that its quantization config made."""

    def __init__(self, load_config: Any) -> None:
        if load_config.model_loader_extra_config not in (None, {}, "{}"):
            raise ConfigError(
                f"model_loader_extra_config: is {load_config.model_loader_extra_config!r}, "
                f"expected none with --load-format {LOAD_FORMAT}. Remove it.",
                code="Q-CFG-KEY",
                tensor="model_loader_extra_config",
                actual=load_config.model_loader_extra_config,
            )
        super().__init__(load_config)

    def load_model(self, *, model_config: Any, device_config: Any) -> nn.Module:
        token = FED.set(True)
        try:
            model: nn.Module = super().load_model(
                model_config=model_config, device_config=device_config
            )
        finally:
            FED.reset(token)
        return model

    def _get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        config = _config_of(model)
        _loaded[model_config] = config
        config.check_taken()
        return _floats(config)

    def _get_weights_iterator(self, source: Any, **kw: Any) -> Iterator[tuple[str, Tensor]]:
        """Called by SGLang to load again, in place."""
        config = _loaded.get(source.model_config)
        if config is None:
            config = _ours(None)
        config.reopen(source.model_or_path)
        return _again(config)

    def download_model(self, model_config: Any) -> None:
        """Nothing: the plan finds the model's folder."""


def _config_of(model: nn.Module) -> QuantCoreConfig:
    for module in model.modules():
        config = getattr(getattr(module, "quant_method", None), "config", None)
        if isinstance(config, QuantCoreConfig):
            return config
    return _ours(None)


def _ours(config: object) -> QuantCoreConfig:
    if not isinstance(config, QuantCoreConfig):
        raise ConfigError(
            f"load_format={LOAD_FORMAT!r}: no layer of the model is quantized by {METHOD!r}, which "
            f"this format loads for. Pass --quantization {METHOD} as well, or another load format.",
            code="Q-CFG-CONFLICT",
            tensor="load_format",
            expected=METHOD,
            actual=type(config).__name__,
        )
    return config


def _again(config: QuantCoreConfig) -> Iterator[tuple[str, Tensor]]:
    config.round.reread(config.plan)  # SGLang has announced new weights to every layer by now
    yield from _floats(config)


def _floats(config: QuantCoreConfig) -> Iterator[tuple[str, Tensor]]:
    """What packed layers do not read themselves, under the names of the checkpoint's own model."""
    from quant_core.engines.packed import neutral
    from quant_core.engines.sharing import read_bias
    from quant_core.load import read_parameter

    plan, account = config.plan, config.account
    assert account is not None
    for name in plan.dense:
        with neutral():
            value = read_parameter(plan, name)
        yield name, value
    for name, member in plan.members.items():
        if name not in account.taken or not member.quantized or member.layer.experts:
            continue
        bias = read_bias(plan, member)
        if bias is not None:
            yield f"{name}.bias", bias
        if name in config.absorbed:
            with neutral():
                value = _dense(plan, name)
            yield f"{name}.weight", value


def _dense(plan: Plan, name: str) -> Tensor:
    """float32 weight [N, K] of a layer that is nothing but its weight.

    Raises:
        LayoutError: ``Q-ENGINE-MODULE`` for one that does more.
    """
    from quant_core.load import load_tensor

    loaded = load_tensor(plan, name)
    lt = loaded.matrices[0]
    if lt.transforms or lt.out_scale is not None or lt.acc_bias is not None:
        raise LayoutError(
            f"{name}: transforms its input or corrects its sums, expected a weight alone: SGLang "
            "splits it into two matrices. Serve the checkpoint with another engine.",
            code="Q-ENGINE-MODULE",
            path=plan.checkpoint.path,
            tensor=name,
        )
    return loaded.dequantize()
