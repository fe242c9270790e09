"""The compressed-tensors config: a JSON object to a frozen dataclass, every value checked.

    {"quant_method": "compressed-tensors", "version": "0.19.0", "format": "pack-quantized",
     "quantization_status": "compressed",
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {...},
                                   "input_activations": null, "format": "pack-quantized"}},
     "ignore": ["lm_head"], "kv_cache_scheme": null, "transform_config": {}, "sparsity_config": {}}

A group may also be a preset: ``{"W4A16": ["Linear"]}``. A group's own ``format`` beats the global
one, which may be "mixed-precision"; without any, it follows from the arguments.

Sources: compressed-tensors 0.19.0 ``quantization/quant_config.py``, ``quant_scheme.py``,
``compressors/format.py``; 0.9.4 for older keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quant_core.errors import summarize
from quant_core.fields import thaw
from quant_core.resolve import NamePattern
from quant_plugin_compressed_tensors.args import PRESETS, QuantArgs, bad_value, parse_args
from quant_plugin_compressed_tensors.matching import Matcher, check_names, is_attention_class
from quant_plugin_compressed_tensors.transforms import OnlineTransform, parse_transforms

__all__ = ["FORMATS", "CtConfig", "Group", "parse_config"]

FORMATS = (
    "dense",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
)
_UNSET = ("mixed-precision", "fakequant")  # global only: each group says or implies its own
_REMOVED = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask")
_INPUTS = ("token", "tensor", "group", "tensor_group", "attn_head")

_KNOWN = frozenset(
    "quant_method version format quantization_status config_groups ignore kv_cache_scheme "
    "sparsity_config transform_config global_compression_ratio moe_sparsity_config "
    "run_compressed dequantize".split()
)
_GROUP_KEYS = frozenset("targets weights input_activations output_activations format".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One config group. ``weights`` None: only activations of its targets are quantized."""

    name: str
    targets: tuple[str, ...]
    weights: QuantArgs | None
    inputs: QuantArgs | None
    format: str  # one of FORMATS

    @property
    def is_attention(self) -> bool:
        """Queries, keys and values of attention modules, no weights."""
        return self.weights is None and all(is_attention_class(t) for t in self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class CtConfig:
    """A checked config.

    Attributes:
        version: of the writer, (0, 0, 0) if not given; decides packings that shapes cannot.
        kv_cache: how keys and values of the cache are quantized.
        transforms: those that run with the model.
        stored: the block as JSON text, for writing it back.
    """

    groups: Mapping[str, Group]
    ignore: tuple[str, ...] = ()
    version: tuple[int, int, int] = (0, 0, 0)
    kv_cache: QuantArgs | None = None
    transforms: tuple[OnlineTransform, ...] = ()
    file: str = ""
    warnings: tuple[str, ...] = ()
    stored: str = "{}"
    _matcher: list[Matcher] = field(default_factory=list, repr=False, compare=False)
    _schemes: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def matcher(self) -> Matcher:
        if not self._matcher:
            targets = {g.name: g.targets for g in self.groups.values()}
            self._matcher.append(Matcher(targets, self.ignore, self.file))
        return self._matcher[0]

    @property
    def schemes(self) -> dict[Hashable, Any]:
        """Schemes made so far, by all that they depend on: layers of one kind share one."""
        return self._schemes

    def group_of(self, name: str, kind: str) -> tuple[Group, str] | None:
        """The group of a module and the target that hit; None if none does."""
        found = self.matcher.group(name, kind)
        return None if found is None else (self.groups[found[0]], found[1])

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """Targets and ignore entries; core reports those that match no module."""
        return self.matcher.patterns()

    def __reduce__(self) -> tuple[Any, ...]:
        """As text, so that a match pickles small and holds no compiled pattern."""
        return _from_text, (self.stored, self.file, self.warnings)


def _from_text(stored: str, file: str, warnings: tuple[str, ...]) -> CtConfig:
    return replace(parse_config(json.loads(stored), file), warnings=warnings)


def _version(block: Mapping[str, Any], file: str) -> tuple[int, int, int]:
    value = block.get("version")
    if value is None:
        return (0, 0, 0)
    found = (
        re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", value) if isinstance(value, str) else None
    )
    if not found:
        fix = "Restore the version the tool wrote, or remove the key."
        raise bad_value(file, "version", value, "a version like '0.19.0'", fix, "Q-CFG-TYPE")
    return (int(found[1]), int(found[2]), int(found[3] or 0))


def _format(value: Any, file: str, key: str) -> str | None:
    """A checked format; None where each group has to say."""
    if value is None:
        return None
    known = f"one of {', '.join(FORMATS)}"
    if not isinstance(value, str):
        raise bad_value(file, key, value, known, "Restore the config.", "Q-CFG-TYPE")
    if value in _UNSET and key == "format":
        return None
    if value in _REMOVED:
        fix = "Sparse and Marlin-ordered weights are not read; export without sparsity."
        raise bad_value(file, key, value, known, fix)
    if value not in FORMATS:
        fix = "Update quant-plugin-compressed-tensors, or check the config."
        raise bad_value(file, key, value, known, fix, "Q-CFG-VERSION")
    return value


def _implied_format(weights: QuantArgs | None, inputs: QuantArgs | None) -> str:
    """The format a writer chooses for these arguments when none is forced."""
    if weights is None:
        return "dense"
    if weights.kind == "int":
        return "pack-quantized" if inputs is None else "int-quantized"
    if weights.bits == 4:
        return "nvfp4-pack-quantized" if weights.group_size == 16 else "mxfp4-pack-quantized"
    if weights.bits == 6:
        return "mxfp6-pack-quantized"
    if weights.group_size == 32 and weights.scale_dtype == "uint8":
        return "mxfp8-quantized"
    return "naive-quantized" if inputs is None else "float-quantized"


class _Parser:
    def __init__(self, block: Mapping[str, Any], file: str) -> None:
        self.block, self.file = block, file
        self.unknown: list[str] = [k for k in block if k not in _KNOWN]
        self.format = _format(block.get("format"), file, "format")

    def args(self, raw: Any, where: str) -> QuantArgs | None:
        return None if raw is None else parse_args(raw, self.file, where, self.unknown)

    def group(self, name: str, raw: Any) -> Group:
        where = f"config_groups.{name}"
        if isinstance(raw, list | tuple):
            preset = PRESETS.get(name.upper())
            if preset is None:
                fix = "Write the group's arguments out."
                known = f"one of {', '.join(PRESETS)}"
                raise bad_value(self.file, f"preset {where}", name, known, fix)
            raw = {"targets": raw, **preset}
        if not isinstance(raw, Mapping):
            fix = "Restore the config the tool wrote."
            raise bad_value(self.file, where, raw, "an object or a list", fix, "Q-CFG-TYPE")
        self.unknown += [f"{where}.{k}" for k in raw if k not in _GROUP_KEYS]
        weights = self.args(raw.get("weights"), f"{where}.weights")
        inputs = self.args(raw.get("input_activations"), f"{where}.input_activations")
        if raw.get("output_activations") is not None:
            found = raw["output_activations"]
            fix = "Quantized outputs of layers are not supported; export without them."
            raise bad_value(self.file, f"{where}.output_activations", found, "null", fix)
        if inputs is not None and inputs.strategy not in _INPUTS:
            key = f"{where}.input_activations.strategy"
            raise bad_value(
                self.file, key, inputs.strategy, f"one of {', '.join(_INPUTS)}", "Correct it."
            )
        own = _format(raw.get("format"), self.file, f"{where}.format")
        return Group(
            name=name,
            targets=check_names(raw.get("targets", ()), self.file, f"{where}.targets"),
            weights=weights,
            inputs=inputs,
            format=own or self.format or _implied_format(weights, inputs),
        )

    def groups(self) -> dict[str, Group]:
        raw = self.block.get("config_groups")
        if not isinstance(raw, Mapping):
            fix = "Restore the config the tool wrote."
            raise bad_value(self.file, "config_groups", raw, "an object", fix, "Q-CFG-TYPE")
        return {name: self.group(name, value) for name, value in raw.items()}

    def check_status(self) -> None:
        status = self.block.get("quantization_status", "compressed")
        if status != "compressed":
            fix = "Weights that are not compressed yet are not read; save the model compressed."
            raise bad_value(self.file, "quantization_status", status, "'compressed'", fix)
        sparsity = self.block.get("sparsity_config")
        if sparsity and (
            not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense"
        ):
            fix = "Export the model without sparse compression."
            raise bad_value(self.file, "sparsity_config", thaw(sparsity), "{} or null", fix)


def parse_config(block: Mapping[str, Any], file: str) -> CtConfig:
    """A checked config.

    Args:
        block: parsed JSON, not changed.
        file: named in errors and warnings.

    Raises:
        ConfigError: ``Q-CFG-VALUE``, ``Q-CFG-TYPE``, ``Q-CFG-CONFLICT``, ``Q-CFG-REGEX``,
            ``Q-CFG-VERSION``, ``Q-CFG-TRANSFORM`` for a transform that cannot be applied.
    """
    inner = block.get("quantization_config")
    if isinstance(inner, Mapping):  # older files nest it beside sparsity_config
        block = {**block, **inner}
        block.pop("quantization_config")
    parser = _Parser(block, file)
    parser.check_status()
    groups = parser.groups()
    transforms = parse_transforms(block.get("transform_config"), file, parser.unknown)
    kv_cache = parser.args(block.get("kv_cache_scheme"), "kv_cache_scheme")
    unknown = parser.unknown
    warnings = (
        (f"{file}: {len(unknown)} unknown key(s) ignored: {summarize(unknown)}",) if unknown else ()
    )
    config = CtConfig(
        groups=groups,
        ignore=check_names(block.get("ignore") or (), file, "ignore"),
        version=_version(block, file),
        kv_cache=kv_cache,
        transforms=transforms,
        file=file,
        warnings=warnings,
        stored=json.dumps(thaw(block)),
    )
    config.name_patterns()  # an invalid expression is reported now, not at the first layer
    return config
