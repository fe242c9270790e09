"""Config format ``quant_core`` in vLLM: a model's config from the container of its weights.

Source: vLLM 0.32.0, transformers_utils/{config,config_parser_base}.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.transformers_utils.config_parser_base import ConfigParserBase

from quant_core.engines.vllm_config import METHOD, local_path
from quant_core.errors import ConfigError

__all__ = ["QuantCoreConfigParser"]


class QuantCoreConfigParser(ConfigParserBase):  # type: ignore[misc]
    """The model's config: from config.json, or from the container that holds the weights."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], Any]:
        from vllm.transformers_utils.config import HFConfigParser

        from quant_core.checkpoint.open import open_checkpoint

        path = local_path(str(model), revision)
        with open_checkpoint(path) as checkpoint:
            has_config, folder = "model_type" in checkpoint.config, str(checkpoint.folder)
        if has_config:
            return HFConfigParser().parse(folder, trust_remote_code, **kwargs)  # type: ignore[no-any-return]
        from quant_core.engines.transformers import as_config

        config = as_config(path)
        config.quantization_config = {"quant_method": METHOD}
        if not config.architectures:
            config.architectures = [_architecture(config)]
        return config.to_dict(), config


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
