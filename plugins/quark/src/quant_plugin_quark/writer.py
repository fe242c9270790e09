"""The ``quantization_config`` block of a plan: the one that the checkpoint came with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quant_core.errors import LayoutError
from quant_plugin_quark.config import QuarkConfig

__all__ = ["config_for"]


def config_for(plan: Any) -> Mapping[str, Any]:
    """The block for a ``quant_core.plan.Plan`` that was read from this format.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for any other plan; this format is not a target of
            conversion.
    """
    match = plan.match
    if match is not None and isinstance(match.config, QuarkConfig):
        stored: dict[str, Any] = json.loads(match.config.stored)
        return stored
    raise LayoutError(
        "the plan was not read from a Quark checkpoint, expected one; other checkpoints are not "
        "converted to this format. Choose another target.",
        code="Q-LAYOUT-REPRESENT",
        expected="quark",
        actual=None if match is None else match.plugin,
        plugin="quark",
    )
