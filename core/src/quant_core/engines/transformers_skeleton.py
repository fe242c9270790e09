"""The model that a checkpoint's config describes, without memory: do the stored tensors fit it?

Asked by ``verify`` and ``convert`` and, where transformers fails on a config, by ``load_model``.
Names and sizes decide; no tensor is read but biases that a layer has no place for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from quant_core.answers import no_memory
from quant_core.errors import ConfigError, QuantError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from quant_core.checkpoint.base import Checkpoint
    from quant_core.plan import Plan

__all__ = ["check_fits", "check_layers", "compare", "rejected"]

_LACKS = ("Q-TENSOR-MISSING", "Q-TENSOR-UNEXPECTED", "Q-TENSOR-DUPLICATE", "Q-LAYOUT-SHAPE")
"""What is wrong with a checkpoint; all else says that there is nothing to compare it with."""

_MANY_LAYERS = 1000
"""Above it a config must not announce more layers than there are tensors."""


def rejected(checkpoint: Checkpoint, err: Exception, *, format: str | None = None) -> NoReturn:
    """Raise for a config that transformers fails on; what the format finds wrong comes first.

    Raises:
        ConfigError: ``Q-ENGINE-CONFIG``, with ``err`` as its cause.
        QuantError: what planning the checkpoint raises; ``err`` itself if it names something else.
    """
    said = isinstance(err, QuantError) and err.code != "Q-ENGINE-CONFIG"
    if said or isinstance(err, MemoryError) or no_memory(err):
        raise err
    from quant_core.plan import plan

    plan(checkpoint, format=format)
    if isinstance(err, QuantError):
        raise err
    raise ConfigError(
        f"{checkpoint.path}: transformers cannot build the model of this config "
        f"({type(err).__name__}: {printable(err, 300)}), expected one it can build. Restore "
        "config.json, or correct the settings passed.",
        code="Q-ENGINE-CONFIG",
        path=checkpoint.path,
    ) from err


def check_layers(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Refuse to build billions of layers, of which a damaged config may speak.

    Raises:
        ConfigError: ``Q-ENGINE-CONFIG``.
    """
    count: Any = getattr(config.get_text_config(), "num_hidden_layers", 0)
    stored = len(checkpoint.tensors)
    if isinstance(count, int) and count > max(_MANY_LAYERS, stored):
        raise ConfigError(
            f"{checkpoint.path}: the config has num_hidden_layers {count}, expected no more than "
            f"the {stored} tensors that are stored. Restore config.json.",
            code="Q-ENGINE-CONFIG",
            path=checkpoint.path,
            tensor="num_hidden_layers",
            expected=stored,
            actual=count,
        )


def _skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    import torch

    from quant_core.engines.transformers import config_and_class

    config, cls = config_and_class(checkpoint)
    config.quantization_config = None
    try:
        with torch.device("meta"):
            model: PreTrainedModel = cls(config)
    except Exception as err:  # transformers and torch raise a dozen types here
        rejected(checkpoint, err)
    return model


def check_fits(plan: Plan) -> str:
    """Every parameter of the model is stored, every stored tensor has a place, sizes agree.

    Returns:
        The name of the model's class.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``, ``Q-TENSOR-UNEXPECTED``, ``Q-TENSOR-DUPLICATE``.
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-ENGINE-MODULE``, ``Q-ENGINE-CONVERTER``.
        ConfigError, PluginError: there is no model to compare with: no config, no transformers,
            another version of it, an unknown architecture.
    """
    model = _skeleton(plan.checkpoint)
    from quant_core.engines.transformers_check import Check
    from quant_core.engines.transformers_names import arrange
    from quant_core.engines.transformers_tied import Tied

    layout = arrange(plan, model)
    Check(plan, model, layout, Tied(model, layout)).run()
    return type(model).__name__


def compare(plan: Plan) -> tuple[str | None, str]:
    """``check_fits`` where there is a model to compare with.

    Returns:
        (class of the model, ""), or (None, why there is no model to compare with).

    Raises:
        CheckpointError, LayoutError: what is wrong with the checkpoint, as ``check_fits``.
    """
    try:
        return check_fits(plan), ""
    except QuantError as err:
        if err.code in _LACKS:
            raise
        return None, str(err)
