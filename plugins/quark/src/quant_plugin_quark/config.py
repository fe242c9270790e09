"""The Quark config: a JSON object to a frozen dataclass, every value checked.

    {"quant_method": "quark", "version": "0.13", "quant_mode": "eager_mode",
     "global_quant_config": {"weight": {...}, "input_tensors": {...}, ...},
     "layer_quant_config": {"*self_attn*": {...}}, "layer_type_quant_config": {"Linear": {...}},
     "exclude": ["lm_head"], "algo_config": null, "kv_cache_quant_config": {},
     "export": {"pack_method": "reorder", "weight_format": "real_quantized", "kv_cache_group": []}}

A layer's arguments: the first entry of ``layer_quant_config`` whose pattern matches its name, else
``layer_type_quant_config["Linear"]``, else the global ones; ``exclude`` beats them all.

Sources: amd-quark 0.13 ``torch/export/main_export/quant_config_parser.py``
(get_layer_quant_config), ``torch/quantization/config/{config,algo_configs}.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quant_core.errors import summarize
from quant_core.fields import Fields, thaw
from quant_core.resolve import NamePattern, check_count
from quant_plugin_quark.args import LayerArgs, bad_value, parse_layer
from quant_plugin_quark.names import first_of, pattern

__all__ = ["QuarkConfig", "parse_config"]

_KNOWN = frozenset(
    "quant_method version quant_mode global_quant_config layer_quant_config "
    "layer_type_quant_config exclude algo_config kv_cache_quant_config kv_cache_post_rope "
    "softmax_quant_spec export log_severity_level min_kv_scale weight_format pack_method "
    "keep_prequantized_layers".split()
)
_RESTORE = "Restore the config the tool wrote."


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarkConfig:
    """A checked config.

    Attributes:
        layers: (pattern, arguments) in the order of the file.
        linear: arguments of the layer type Linear, None if it has none of its own.
        reorder: words of eight 4-bit codes hold them in the order 0 2 4 6 1 3 5 7.
        kv_cache: patterns of modules whose outputs are keys and values of the cache.
        post_rope: keys are quantized after the rotary embedding, not as they leave k_proj.
        online: a rotation runs with the model.
        siblings: names without numbers of all quantized modules.
        stored: the block as JSON text, for writing it back.
    """

    default: LayerArgs
    layers: tuple[tuple[NamePattern, LayerArgs], ...] = ()
    linear: LayerArgs | None = None
    exclude: tuple[NamePattern, ...] = ()
    reorder: bool = True
    kv_cache: tuple[NamePattern, ...] = ()
    post_rope: bool = False
    online: bool = False
    siblings: frozenset[str] = frozenset()
    file: str = ""
    warnings: tuple[str, ...] = ()
    stored: str = "{}"

    def args_of(self, *names: str) -> LayerArgs:
        """Arguments of a linear layer, whatever ``exclude`` says."""
        found = first_of([p for p, _ in self.layers], *names)
        if found is not None:
            return next(args for p, args in self.layers if p is found)
        return self.default if self.linear is None else self.linear

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """Core reports those that match no module."""
        return (*self.exclude, *(p for p, _ in self.layers))

    def __reduce__(self) -> tuple[Any, ...]:
        """As text, so that a match pickles small and holds no compiled pattern."""
        return _from_text, (self.stored, self.file, self.siblings, self.warnings)


def _from_text(
    stored: str, file: str, siblings: frozenset[str], warnings: tuple[str, ...]
) -> QuarkConfig:
    config = parse_config(json.loads(stored), file)
    return replace(config, siblings=siblings, warnings=warnings)


def _object(block: Mapping[str, Any], key: str, file: str) -> Mapping[str, Any]:
    value = block.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise bad_value(file, key, value, "an object", _RESTORE, "Q-CFG-TYPE")
    return value or {}


def _online(block: Mapping[str, Any], file: str) -> bool:
    """Whether a rotation of ``algo_config`` runs with the model.

    Raises:
        ConfigError: ``Q-CFG-TRANSFORM`` for a rotation of queries and keys (r3), which is stored
            nowhere.
    """
    algorithms = block.get("algo_config") or ()
    if isinstance(algorithms, Mapping):
        algorithms = (algorithms,)
    if not isinstance(algorithms, list | tuple) or not all(
        isinstance(a, Mapping) for a in algorithms
    ):
        raise bad_value(file, "algo_config", algorithms, "a list", _RESTORE, "Q-CFG-TYPE")
    online = False
    for i, algorithm in enumerate(algorithms):
        if algorithm.get("name") not in ("rotation", "quarot"):
            continue
        read = Fields(algorithm, file, f"algo_config[{i}].", "quark")
        if read.flag("r3"):
            fix = "Rotations of queries and keys are not applied; export without r3."
            raise read.fail("r3", "false", fix, "Q-CFG-TRANSFORM")
        online |= bool(read.flag("online_r1_rotation")) or bool(read.flag("r4"))
    return online


def _check_export(export: Fields) -> None:
    form = export.text("weight_format")
    if form not in (None, "real_quantized"):
        fix = "Weights that are not quantized yet are not read; export them real_quantized."
        raise export.fail("weight_format", "'real_quantized'", fix)
    pack = export.text("pack_method")
    if pack not in (None, "reorder", "order"):
        raise export.fail("pack_method", "'reorder' or 'order'", _RESTORE)


def parse_config(block: Mapping[str, Any], file: str) -> QuarkConfig:
    """A checked config.

    Args:
        block: parsed JSON, not changed.
        file: named in errors and warnings.

    Raises:
        ConfigError: ``Q-CFG-VALUE``, ``Q-CFG-TYPE``, ``Q-CFG-CONFLICT``, ``Q-CFG-REGEX``,
            ``Q-CFG-TRANSFORM``.
    """
    unknown = [k for k in block if k not in _KNOWN]
    export = Fields(_object(block, "export", file), file, "export.", "quark")
    _check_export(export)
    layers = tuple(
        (
            pattern(name, "layer_quant_config"),
            parse_layer(raw, file, f"layer_quant_config[{name!r}]", unknown),
        )
        for name, raw in _object(block, "layer_quant_config", file).items()
    )
    types = {
        name: parse_layer(raw, file, f"layer_type_quant_config[{name!r}]", unknown)
        for name, raw in _object(block, "layer_type_quant_config", file).items()
    }
    names = Fields(block, file, "", "quark").names("exclude")
    exclude = tuple(pattern(n, "exclude") for n in names)
    check_count((*exclude, *(p for p, _ in layers)), file)
    default = parse_layer(block.get("global_quant_config"), file, "global_quant_config", unknown)
    warnings = []
    if unknown:
        warnings.append(f"{file}: {len(unknown)} unknown key(s) ignored: {summarize(unknown)}")
    if block.get("softmax_quant_spec") is not None:
        warnings.append(f"{file}: softmax_quant_spec is not applied; softmax stays unquantized")
    return QuarkConfig(
        default=default,
        layers=layers,
        linear=next((a for n, a in types.items() if n.rpartition(".")[2] == "Linear"), None),
        exclude=exclude,
        reorder=export.text("pack_method") != "order",
        kv_cache=tuple(pattern(n, "kv_cache_group") for n in export.names("kv_cache_group")),
        post_rope=bool(Fields(block, file, "", "quark").flag("kv_cache_post_rope")),
        online=_online(block, file),
        file=file,
        warnings=tuple(warnings),
        stored=json.dumps(thaw(block)),
    )
