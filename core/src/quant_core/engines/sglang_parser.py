"""Config parser ``quant_core`` in SGLang: a model's config from the container of its weights.

Source: SGLang 0.5.23, srt/configs/model_config_parser_registry.py,
srt/utils/hf_transformers/config.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang.srt.configs.model_config_parser_registry import (
    ModelConfigParserBase,
    get_model_config_parser,
)

__all__ = ["QuantCoreConfigParser"]


class QuantCoreConfigParser(ModelConfigParserBase):  # type: ignore[misc]
    """The model's config: from config.json, or from the container that holds the weights."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        from quant_core.engines.containers import config_of_container
        from quant_core.engines.sglang_config import METHOD, local_path

        folder, config = config_of_container(local_path(str(model)), METHOD)
        if config is None:
            return get_model_config_parser("hf").parse(
                folder, trust_remote_code=trust_remote_code, revision=revision, **kwargs
            )
        config._name_or_path = folder
        return config
