"""A model's config from the container of its weights, for serving engines."""

from __future__ import annotations

import os
from typing import Any

from quant_core.errors import ConfigError

__all__ = ["config_of_container"]


def config_of_container(path: str | os.PathLike[str], method: str) -> tuple[str, Any]:
    """The folder of a checkpoint, and its config if no config.json tells it.

    Args:
        method: the engine's name of our method, put into that config.

    Raises:
        CheckpointError: it cannot be opened.
        ConfigError: ``Q-ENGINE-MODEL`` for a model that transformers does not know.
    """
    from quant_core.checkpoint.open import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        has_config, folder = "model_type" in checkpoint.config, str(checkpoint.folder)
    if has_config:
        return folder, None
    from quant_core.engines.transformers import as_config

    config = as_config(path)
    config.quantization_config = {"quant_method": method}
    if not config.architectures:
        config.architectures = [_architecture(config)]
    return folder, config


def _architecture(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    if config.model_type not in NAMES:
        raise ConfigError(
            f"model_type {config.model_type!r} has no language model in transformers, expected one "
            "it knows. Put the model's config.json beside the weights.",
            code="Q-ENGINE-MODEL",
            tensor="model_type",
            actual=config.model_type,
        )
    return str(NAMES[config.model_type])
