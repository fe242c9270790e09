"""The config block of a plan; for saving a checkpoint in the format it was read from.

What TorchAO's weights are stands in the header of their file, which saving keeps. A plan that was
not read from such a file has no header to keep, so it cannot be written.
"""

from __future__ import annotations

import json
from typing import Any

from quant_core.errors import LayoutError
from quant_plugin_torchao.config import TorchaoConfig

__all__ = ["config_for"]


def config_for(plan: Any) -> dict[str, Any]:
    """The ``quantization_config`` block that ``plan`` was read from.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for a plan without one.
    """
    config = plan.match.config if plan.match is not None else None
    if isinstance(config, TorchaoConfig) and config.stored:
        stored: dict[str, Any] = json.loads(config.stored)
        return stored
    raise LayoutError(
        "plan: has no TorchAO config, expected one read from a checkpoint. TorchAO weights are "
        "described by their recipe; write another format.",
        code="Q-LAYOUT-REPRESENT",
        tensor="quantization_config",
        plugin="torchao",
    )
