"""Is everything there? Checks that serving engines do not make themselves.

biases     stored exactly where the engine's layer has one
floats     every float parameter of the model is stored
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

from quant_core.engines.sharing import stored_bias
from quant_core.errors import CheckpointError, LayoutError, printable
from quant_core.ledger import missing_error, unexpected_error
from quant_core.plan import Member, Plan

__all__ = ["check_biases", "check_floats"]

log = logging.getLogger("quant_core")


def check_biases(plan: Plan, module: str, members: Iterable[Member], *, wanted: bool) -> None:
    """A bias is the engine's own parameter: stored where the layer has one, and only there.

    Args:
        wanted: the engine's layer has a bias.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``, ``Q-TENSOR-UNEXPECTED`` for one that is not zeros.
    """
    lacking, extra = [], []
    for member in members:
        if not member.quantized:
            continue
        name = stored_bias(plan, member)
        in_sums = any(p.role == "acc_bias" for p in member.params)
        if wanted and name is None and not in_sums:
            lacking.append(f"{member.layer.name}.bias")
        elif not wanted and name is not None and bool(plan.checkpoint.read(name).any()):
            extra.append(name)
    if lacking:
        raise missing_error(plan.checkpoint, lacking, f"{module}, which has a bias")
    if extra:
        raise unexpected_error(plan.checkpoint, extra, f"no bias, as {module} has none")


def check_floats(plan: Plan, hf_config: Any, *, who: str = "") -> None:
    """Before an engine reads float parameters itself, for it does not notice one that is missing.

    The checkpoint is compared with transformers' skeleton of the same model. A model that
    transformers does not have, or converts in its own way, is not checked, with a warning.

    Args:
        who: a setting of the engine that checks any model, for the warning.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from quant_core.engines.transformers_check import missing_parameters

    config = copy.deepcopy(hf_config)
    config.quantization_config = None
    _restore_rope(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        lacking = missing_parameters(plan, model)
    except CheckpointError:
        raise
    except (ValueError, ImportError, LayoutError) as err:  # of transformers, or a refused model
        log.warning(
            "%s: it is not checked that all float parameters are stored (%s)%s",
            plan.checkpoint.path,
            printable(err, 200),
            f"; {who} does" if who else "",
        )
        return
    if lacking:
        raise missing_error(plan.checkpoint, lacking, f"{type(model).__name__} of config.json")


def _restore_rope(config: Any) -> None:
    """Serving engines write kinds of rotary embeddings of their own into a model's config.

    transformers cannot build those, and no parameter depends on the kind.
    Source: vLLM 0.32.0, model_executor/models/{deepseek_v2,openpangu}.py; SGLang 0.5.23,
    srt/models/deepseek_v2.py.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = {"default", *ROPE_INIT_FUNCTIONS}
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if isinstance(rope, dict) and rope.get("rope_type", "default") not in known:
            rope["rope_type"] = "default"
