"""Is this a ModelSlim checkpoint? Its description file beside the weights says so, nothing else.

config.json carries no flag: the producer removes ``quantization_config``. The file is called
``quant_model_description.json``; older tools put the type in its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, ConfigError, printable, summarize
from quant_core.spec import FormatMatch
from quant_plugin_modelslim_npu.cache import schemes
from quant_plugin_modelslim_npu.config import parse_description, tensor_types

__all__ = ["KV_LEAVES", "KV_RULE", "ONLINE_LEAVES", "PATTERN", "detect"]

PATTERN = "quant_model_description*.json"
KV_LEAVES = frozenset({"kv_cache_scale", "kv_cache_offset"})
KV_RULE = "KV-cache scales present, not applied"
ATTENTION = frozenset({"fa_q", "fa_k", "fa_v"})
"""Modules that hold nothing but the scales of quantized attention."""

ONLINE_LEAVES: Mapping[str, str] = {
    "heads_rotation": "a rotation of heads at run time (QuaRot)",
    "kronecker_rotation_m": "a rotation at run time (QuaRot)",
    "kronecker_rotation_n": "a rotation at run time (QuaRot)",
    "mul_scale": "smoothing at run time",
    "svd_lowrank_l1": "a low-rank side branch",
    "svd_lowrank_l2": "a low-rank side branch",
}
"""Last name component -> what must happen at run time where such a tensor is stored."""


def _description(checkpoint: Checkpoint) -> tuple[str, Mapping[str, Any]] | None:
    names = sorted(f.name for f in checkpoint.folder.glob(PATTERN) if f.is_file())
    if not names:
        return None
    if len(names) > 1:
        raise ConfigError(
            f"{printable(checkpoint.folder)}: holds {len(names)} descriptions "
            f"({summarize(names, 4)}), expected one. Keep the one that belongs to these weights.",
            code="Q-CFG-CONFLICT",
            path=checkpoint.folder,
            tensor=names[0],
            actual=tuple(names),
            plugin="modelslim_npu",
        )
    raw = checkpoint.side_file(names[0])
    return None if raw is None else (names[0], raw)


def _check_online(checkpoint: Checkpoint, file: str) -> None:
    found = [n for n in checkpoint.tensors if n.rpartition(".")[2] in ONLINE_LEAVES]
    if found:
        what = ONLINE_LEAVES[found[0].rpartition(".")[2]]
        raise ConfigError(
            f"{file}: {len(found)} tensor(s) call for {what}: {summarize(found, 4)}; expected none "
            "of that kind. Running without it would give wrong results; export without it.",
            code="Q-CFG-TRANSFORM",
            path=file,
            tensor=found[0],
            actual=tuple(found[:100]),
            plugin="modelslim_npu",
        )


def _check_stored(checkpoint: Checkpoint, file: str, described: Mapping[str, str]) -> None:
    """A described tensor of a module that is stored must be stored; whole modules may be absent
    (other pipeline stages), which is for the engine to judge."""
    tensors, modules = checkpoint.tensors, checkpoint.modules
    lost = [n for n in described if n not in tensors and n.rpartition(".")[0] in modules]
    if lost:
        raise CheckpointError(
            f"{printable(checkpoint.path)}: {len(lost)} tensor(s) missing: {summarize(lost)}; "
            f"expected by {file}. The checkpoint is incomplete; download or export it again.",
            code="Q-TENSOR-MISSING",
            path=checkpoint.path,
            tensor=lost[0],
            expected=lost,
            plugin="modelslim_npu",
        )


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim of this plugin; reads headers and JSON only.

    Raises:
        ConfigError: the description is malformed or asks for what is not supported.
        CheckpointError: ``Q-TENSOR-MISSING`` for tensors it lists that are not stored.
    """
    found = _description(checkpoint)
    if found is None:
        return None
    file, raw = found
    described = tensor_types(raw)
    if checkpoint.container != "safetensors":
        return None
    if described and described.keys().isdisjoint(checkpoint.tensors):
        return None  # it describes other weights of this folder
    config = parse_description(raw, file)
    _check_online(checkpoint, file)
    _check_stored(checkpoint, file, described)
    offered = schemes(checkpoint)
    holders = [
        m
        for m, leaves in checkpoint.modules.items()
        if (KV_LEAVES & leaves.keys() and not offered) or m.rpartition(".")[2] in ATTENTION
    ]
    if holders:
        count = len({m.rpartition(".")[0] for m in holders})
        note = f"{KV_RULE} ({count} attention modules)"
        config = replace(config, warnings=(*config.warnings, note))
    return FormatMatch(plugin="modelslim_npu", level="declared", evidence=file, config=config)
