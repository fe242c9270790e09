"""Which scheme one module has: stored names decide together with the config, both must agree.

    codes or scales stored       -> the scheme of the group's format; ignored or untargeted = error
    only scales of attention     -> not loaded, by a named rule
    plain float weight stored    -> Unquantized, unless the config wants it quantized

A format is one module with ``build(Header) -> Scheme``; ``BUILDERS`` lists those there are.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import FLOAT_DTYPES
from quant_core.errors import CheckpointError, ConfigError, printable
from quant_core.presence import stored_modules
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_compressed_tensors.cache import KV_LEAVES
from quant_plugin_compressed_tensors.config import CtConfig, Group
from quant_plugin_compressed_tensors.header import Header
from quant_plugin_compressed_tensors.scheme import KV_RULE, CtScheme
from quant_plugin_compressed_tensors.transforms import TRANSFORM_RULE

__all__ = ["BUILDERS", "scheme_for"]

BUILDERS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("pack-quantized", "int"): ("packed", "weight_packed"),
    ("int-quantized", "int"): ("plain", "weight"),
    ("naive-quantized", "int"): ("plain", "weight"),
    ("naive-quantized", "float"): ("floats", "weight"),
    ("float-quantized", "float"): ("floats", "weight"),
    ("mxfp8-quantized", "float"): ("floats", "weight"),
    ("mxfp6-pack-quantized", "float"): ("floats", "weight_packed"),
    ("mxfp4-pack-quantized", "float"): ("floats", "weight_packed"),
    ("nvfp4-pack-quantized", "float"): ("floats", "weight_packed"),
}
"""(format, kind of the weights) -> module of this package that builds its schemes, codes' name."""

_QUANTIZED = frozenset(
    "weight_packed weight_scale weight_zero_point weight_g_idx weight_shape "
    "weight_global_scale".split()
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
Leaves = Mapping[str, TensorInfo]


def _is_quantized(leaves: Leaves) -> bool:
    """Any tensor of a quantized module counts, so that a lost one is reported as missing."""
    weight = leaves.get("weight")
    odd = weight is not None and len(weight.shape) > 1 and weight.dtype not in FLOAT_DTYPES
    return odd or bool(_QUANTIZED & leaves.keys())


def _mismatch(checkpoint: Checkpoint, tensor: str, found: str, fix: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {printable(tensor)!r} {found}, expected config and stored tensors to "
        f"agree. {fix}",
        code="Q-CKPT-MISMATCH",
        path=checkpoint.path,
        tensor=tensor,
        actual=found,
        plugin="compressed_tensors",
    )


def _neighbour(path: str, checkpoint: Checkpoint) -> str:
    """The same module of a layer (or expert) nearby, if that one is quantized; else ""."""
    for number in _NUMBER.finditer(path):
        if len(number[0]) > 8:
            continue
        for near in (int(number[0]) - 1, int(number[0]) + 1):
            other = f"{path[: number.start()]}{near}{path[number.end() :]}"
            if _is_quantized(checkpoint.modules.get(other, {})):
                return other
    return ""


def _unquantized(
    config: CtConfig, layer: LayerDesc, modules: Mapping[str, Leaves], checkpoint: Checkpoint
) -> Unquantized:
    """The rule by which nothing is quantized here; an error if the config says otherwise."""
    path, leaves = next(iter(modules.items()))
    parent, _, leaf = path.rpartition(".")
    if any(t.leaf == leaf and t.applies(parent, "linear") for t in config.transforms):
        return Unquantized(rule=TRANSFORM_RULE, evidence=parent)
    kv = KV_LEAVES & leaves.keys()
    if kv and "weight" not in leaves:
        return Unquantized(rule=KV_RULE, evidence=", ".join(sorted(kv)), ignored=frozenset(kv))
    weight = leaves.get("weight")
    if weight is not None and any(t.applies(path, layer.kind) for t in config.transforms):
        raise ConfigError(
            f"{config.file}: transform_config targets {printable(path)!r}, whose weight is not "
            "quantized; expected quantized layers only. Export with the transform fused.",
            code="Q-CFG-TRANSFORM",
            path=config.file,
            tensor=path,
            plugin="compressed_tensors",
        )
    if entry := config.matcher.ignored(path, layer.kind):
        return Unquantized(rule="ignore", evidence=f"entry {entry!r}")
    if weight is None or len(weight.shape) != 2:
        return Unquantized(rule="no quantized tensor stored", evidence=path)
    found = config.group_of(path, layer.kind)
    if found is None:
        return Unquantized(rule="no config group targets it", evidence=path)
    group, target = found
    if group.weights is None and group.inputs is not None:
        raise ConfigError(
            f"{config.file}: config group {group.name!r} quantizes only activations of "
            f"{printable(path)!r}, expected weights too. Not supported yet; export without it.",
            code="Q-CFG-VALUE",
            path=config.file,
            tensor=path,
            actual=group.inputs.label,
            plugin="compressed_tensors",
        )
    if group.weights is None or group.format == "dense":
        return Unquantized(rule="dense config group", evidence=group.name)
    other = _neighbour(path, checkpoint)
    if other or target == path or target.startswith("re:"):
        why = f"{other!r} is quantized" if other else f"target {target!r} names it"
        raise _mismatch(
            checkpoint,
            weight.name,
            f"is a plain {weight.dtype} weight, but {why} and no ignore entry excludes it",
            f"Add the module to ignore in {config.file}, or export the checkpoint again.",
        )
    return Unquantized(
        rule="no quantized tensor stored", evidence=f"{weight.name} is {weight.dtype}"
    )


def _group(
    config: CtConfig, layer: LayerDesc, modules: Mapping[str, Leaves], checkpoint: Checkpoint
) -> Group:
    """The one group of all matrices of a quantized layer."""
    groups: dict[str, str] = {}
    for path, leaves in modules.items():
        stored = next((n for n in ("weight_packed", "weight") if n in leaves), "weight_packed")
        if entry := config.matcher.ignored(path, layer.kind):
            raise _mismatch(
                checkpoint,
                f"{path}.{stored}",
                f"is quantized, but {config.file} ignores the module (entry {entry!r})",
                "Correct ignore, or export the checkpoint again.",
            )
        found = config.group_of(path, layer.kind)
        if found is None:
            raise _mismatch(
                checkpoint,
                f"{path}.{stored}",
                f"is quantized, but no config group of {config.file} targets the module",
                "Add it to the targets of its group; of class names only Linear and Embedding "
                "can be told from a file.",
            )
        groups.setdefault(found[0].name, path)
    if len(groups) > 1:
        raise ConfigError(
            f"{config.file}: experts of {printable(layer.name)!r} belong to config groups "
            f"{', '.join(map(repr, groups))} ({', '.join(map(printable, groups.values()))}), "
            "expected one for a whole stack. Quantize all experts alike.",
            code="Q-CFG-CONFLICT",
            path=config.file,
            tensor=layer.name,
            actual=sorted(groups),
            plugin="compressed_tensors",
        )
    return config.groups[next(iter(groups))]


def _builder(config: CtConfig, group: Group, path: str, leaves: Leaves) -> str:
    """Module that builds this group's schemes.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` naming a format that is not supported yet, ``Q-CFG-CONFLICT``
            if the stored codes are those of another format.
    """
    if group.weights is None:
        raise ConfigError(
            f"{config.file}: config group {group.name!r} has no weights, but {printable(path)!r} "
            "stores quantized ones; expected both to agree. Restore the config.",
            code="Q-CFG-CONFLICT",
            path=config.file,
            tensor=path,
            plugin="compressed_tensors",
        )
    found = BUILDERS.get((group.format, group.weights.kind))
    if found is None:
        known = ", ".join(f"{f} ({k})" for f, k in BUILDERS)
        raise ConfigError(
            f"{config.file}: {printable(path)!r} is stored as {group.format!r} with weights "
            f"{group.weights.label}, which is not supported; expected one of {known}. "
            "Export the checkpoint in one of these formats.",
            code="Q-CFG-VALUE",
            path=config.file,
            tensor=path,
            expected=known,
            actual=group.format,
            plugin="compressed_tensors",
        )
    module, wanted = found
    wrong = "weight" if wanted == "weight_packed" else "weight_packed"
    if wrong in leaves and wanted not in leaves:
        raise ConfigError(
            f"{config.file}: format of {printable(path)!r} is {group.format!r} (config group "
            f"{group.name!r}), but its {wrong} is stored and no {wanted}; expected both to agree. "
            "Restore the config that belongs to these weights.",
            code="Q-CFG-CONFLICT",
            path=config.file,
            tensor=f"{path}.{wrong}",
            expected=wanted,
            actual=wrong,
            plugin="compressed_tensors",
        )
    return module


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> CtScheme | Unquantized:
    """The scheme of one member.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` (config and stored names disagree),
            ``Q-TENSOR-MISSING`` (too little stored to tell the sizes).
        ConfigError: ``Q-CFG-VALUE`` (not supported), ``Q-CFG-CONFLICT``.
        LayoutError: ``Q-LAYOUT-GROUP``, ``Q-LAYOUT-SHAPE``.
    """
    config: CtConfig = match.config
    modules = stored_modules(layer, checkpoint)
    quantized = {p: leaves for p, leaves in modules.items() if _is_quantized(leaves)}
    if not quantized:
        return _unquantized(config, layer, modules, checkpoint)
    floats = [p for p, leaves in modules.items() if p not in quantized and "weight" in leaves]
    if floats:
        raise _mismatch(
            checkpoint,
            f"{floats[0]}.weight",
            f"is a plain weight, but {next(iter(quantized))!r} of the same stack is quantized",
            "Quantize all experts alike.",
        )
    group = _group(config, layer, modules, checkpoint)
    path, leaves = next(iter(quantized.items()))
    name = _builder(config, group, path, leaves)
    weights = group.weights
    assert weights is not None  # checked by _builder
    header = Header(
        config=config, group=group, weights=weights, layer=layer, checkpoint=checkpoint,
        path=path, leaves=leaves,
    )  # fmt: skip
    builder: Any = importlib.import_module(f"{__package__}.{name}")
    scheme: CtScheme = builder.build(header)
    return scheme
