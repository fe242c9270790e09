"""Config format ``quant_core`` in vLLM: a model's config from the container of its weights.

Source: vLLM 0.32.0, transformers_utils/{config,config_parser_base}.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.transformers_utils.config_parser_base import ConfigParserBase

from quant_core.engines.containers import config_of_container
from quant_core.engines.vllm_config import METHOD, local_path

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

        folder, config = config_of_container(local_path(str(model), revision), METHOD)
        if config is None:
            return HFConfigParser().parse(folder, trust_remote_code, **kwargs)  # type: ignore[no-any-return]
        return config.to_dict(), config
