"""The two dialects of a ModelOpt config, to one frozen dataclass, every value checked.

    hf_quant_config.json                              quantization_config of config.json
    {"producer": {"name": "modelopt", "version": ..}, {"quant_method": "modelopt",
     "quantization": {                                 "producer": {...},
       "quant_algo": "NVFP4",                          "quant_algo": "NVFP4",
       "kv_cache_quant_algo": "FP8",                   "kv_cache_scheme": {"num_bits": 8, ...},
       "group_size": 16,                               "config_groups": {"group_0": {"weights":
       "exclude_modules": ["lm_head"],                     {"group_size": 16}, ...}},
       "quantized_layers": {"a.b": {"quant_algo":..}}  "ignore": ["lm_head"],
     }}                                                "quantized_layers": {...}}

The first may also stand inside the second. Of ``config_groups`` only the group size counts: the
rest repeats ``quant_algo`` in other words. Excluded modules are shell patterns over whole names;
with MIXED_PRECISION ``quantized_layers`` lists what is quantized, and nothing else is.

Source: ModelOpt 0.47.0 ``export/quant_utils.py`` (get_quant_config), ``export/
convert_hf_config.py``; vLLM 0.32 ``quantization/modelopt.py`` for older dialects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quant_core.errors import ConfigError, printable, summarize
from quant_core.fields import Fields, thaw
from quant_core.resolve import NamePattern, check_count
from quant_plugin_nvfp4.algos import ALGOS, REFUSED, Algo, find_algo
from quant_plugin_nvfp4.exclude import Exclusions, exclusions

__all__ = ["KV_ALGOS", "LayerAlgo", "ModelOptConfig", "check_agreement", "parse_config"]

KV_ALGOS = ("FP8", "INT8", "NVFP4", "NVFP4_AFFINE")
_MIXED = "MIXED_PRECISION"
_SUBSTRINGS_BEFORE = (0, 39)  # producers up to here match excluded names anywhere in a name
_KNOWN = frozenset(
    "quant_method quant_algo ignore exclude_modules kv_cache_scheme kv_cache_quant_algo group_size "
    "config_groups producer quantized_layers quantization has_zero_point pre_quant_scale".split()
)
_LAYER_KEYS = frozenset("quant_algo group_size has_zero_point pre_quant_scale".split())
_RESTORE = "Restore the config the tool wrote."


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAlgo:
    """How one module is quantized; ``group_size`` 0: not stated."""

    algo: Algo
    group_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptConfig:
    """A checked config.

    Attributes:
        uniform: how every module is quantized; None with ``mixed``, or if only the cache is.
        mixed: module -> how it is quantized; None unless MIXED_PRECISION.
        exclude: modules left out.
        kv: how keys and values of the cache are quantized; "" = not.
        version: of the producer, (0, 0) if not given.
        file: for messages.
        stored: the block as JSON text, in the dialect of config.json, for writing it back.
        quantized, smoothed: names without numbers of the modules that are stored quantized, and
            of those with a ``pre_quant_scale``; filled in by ``detect``.
    """

    uniform: LayerAlgo | None = None
    mixed: Mapping[str, LayerAlgo] | None = None
    exclude: tuple[str, ...] = ()
    kv: str = ""
    version: tuple[int, int] = (0, 0)
    file: str = ""
    warnings: tuple[str, ...] = ()
    stored: str = "{}"
    quantized: frozenset[str] = frozenset()
    smoothed: frozenset[str] = frozenset()

    @property
    def purpose(self) -> str:
        return "ignore" if self.file == "config.json" else "exclude_modules"

    @property
    def skip(self) -> Exclusions:
        """Modules left out."""
        return exclusions(self.exclude, self.purpose, (0, 0) < self.version < _SUBSTRINGS_BEFORE)

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """What should name some module; core reports what does not."""
        listed = tuple(
            NamePattern(kind="prefix", text=name, purpose="quantized_layers")
            for name in self.mixed or ()
        )
        return self.skip.patterns + listed

    def layer(self, path: str) -> LayerAlgo | None:
        """How a module is quantized by ``quantized_layers``, or by what holds for all.

        A parent's entry counts for its modules: experts are listed once and stored one by one.
        """
        if self.mixed is None:
            return self.uniform
        for name in (path, _other_order(path)):
            while name:
                if name in self.mixed:
                    return self.mixed[name]
                name = name.rpartition(".")[0]
        return None


def _other_order(path: str) -> str:
    """``language_model.model.x`` <-> ``model.language_model.x``: one module, two spellings."""
    for a, b in (("language_model.model.", "model.language_model."),):
        if path.startswith(a):
            return b + path[len(a) :]
        if path.startswith(b):
            return a + path[len(b) :]
    return ""


# --------------------------------------------------------------------------------------- parsing


def _algo(read: Fields) -> Algo:
    """The algorithm named by ``quant_algo``.

    Raises:
        ConfigError: ``Q-CFG-VALUE``, ``Q-CFG-TYPE``, ``Q-CFG-TRANSFORM``.
    """
    name = read.text("quant_algo") or ""
    found = find_algo(name)
    if found is None:
        known = f"one of {', '.join(ALGOS)} or {_MIXED}"
        code, why = REFUSED.get(name.upper(), ("Q-CFG-VALUE", "Quantize with one of these."))
        raise read.fail("quant_algo", known, why, code)
    if read.flag("has_zero_point"):
        raise read.fail("has_zero_point", "false", "Zero points are not known in this format.")
    return found


def _sized(read: Fields, algo: Algo) -> LayerAlgo:
    """The algorithm with its group size.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for a size that the algorithm does not have.
    """
    size = read.group_size() if read.raw.get("group_size") is not None else None
    fixed = algo.group_size
    if size is None or algo.weight in ("fp8", "fp8_channel", "int8"):
        return LayerAlgo(algo=algo, group_size=fixed)
    if size <= 0 or (fixed and size != fixed):
        expected = f"{fixed} with {algo.name}" if fixed else "a positive size"
        raise read.fail("group_size", expected, _RESTORE)
    return LayerAlgo(algo=algo, group_size=size)


def _mixed(read: Fields, unknown: list[str]) -> dict[str, LayerAlgo]:
    layers = read.objects("quantized_layers")
    if not layers:
        raise read.fail("quantized_layers", f"the layers of {_MIXED}", _RESTORE)
    out: dict[str, LayerAlgo] = {}
    for name, entry in layers.items():
        unknown += sorted({k for k in entry.raw if k not in _LAYER_KEYS} - set(unknown))
        out[name] = _sized(entry, _algo(entry))
    return out


def _kv_algo(read: Fields) -> str:
    """``kv_cache_quant_algo``, or what ``kv_cache_scheme`` says in other words.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for a cache of another kind.
    """
    key = "kv_cache_quant_algo"
    value = read.raw.get(key)
    if value is None:
        key = "kv_cache_scheme"
        value = read.raw.get(key)
    if isinstance(value, Mapping):
        said = f"{value.get('type', 'int')} {value.get('num_bits')}"
        value = {"float 8": "FP8", "int 8": "INT8", "float 4": "NVFP4"}.get(said, "")
    elif isinstance(value, str):
        value = value.upper()
    if value is None or (isinstance(value, str) and value in ("NONE", *KV_ALGOS)):
        return "" if value in (None, "NONE") else str(value)
    raise read.fail(key, f"one of {', '.join(KV_ALGOS)} or null", _RESTORE)


def _producer_version(block: Mapping[str, Any]) -> tuple[int, int]:
    producer = block.get("producer")
    version = producer.get("version") if isinstance(producer, Mapping) else None
    found = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _with_group_size(inner: Mapping[str, Any]) -> Mapping[str, Any]:
    """``group_size`` moved up from the one config group."""
    groups = inner.get("config_groups")
    if "group_size" in inner or not isinstance(groups, Mapping) or len(groups) != 1:
        return inner
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    size = weights.get("group_size") if isinstance(weights, Mapping) else None
    return inner if size is None else {**inner, "group_size": size}


def _for_config_json(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block in the dialect of config.json."""
    plain: dict[str, Any] = thaw(block)
    inner = plain.get("quantization")
    if "quant_method" in plain or not isinstance(inner, dict):
        return plain
    out: dict[str, Any] = {k: v for k, v in inner.items() if v is not None}
    out["ignore"] = out.pop("exclude_modules", [])
    if "kv_cache_quant_algo" in out:
        out["kv_cache_scheme"] = out.pop("kv_cache_quant_algo")
    producer = {"producer": plain["producer"]} if "producer" in plain else {}
    return {**out, **producer, "quant_method": "modelopt"}


def parse_config(block: Mapping[str, Any], file: str) -> ModelOptConfig:
    """A checked config, of either dialect.

    Args:
        block: parsed JSON, not changed.
        file: named in errors and warnings.

    Raises:
        ConfigError: ``Q-CFG-VALUE``, ``Q-CFG-TYPE``, ``Q-CFG-REGEX``, ``Q-CFG-TRANSFORM`` for an
            algorithm with a branch that is not supported.
    """
    outer = Fields(block, file, "", "nvfp4")
    inner = block.get("quantization")
    if inner is not None and not isinstance(inner, Mapping):
        raise outer.fail("quantization", "an object", _RESTORE, "Q-CFG-TYPE")
    unknown = [k for k in block if k not in _KNOWN]
    unknown += [] if inner is None else [k for k in inner if k not in _KNOWN]
    prefix = "" if inner is None else "quantization."
    read = Fields(_with_group_size(inner or block), file, prefix, "nvfp4")
    kv = _kv_algo(read)
    name = read.text("quant_algo")
    uniform, mixed = None, None
    if name is not None and name.upper() == _MIXED:
        mixed = _mixed(read, unknown)
    elif name is not None or not kv:
        uniform = _sized(read, _algo(read))
    exclude = read.names("exclude_modules") or read.names("ignore")
    config = ModelOptConfig(
        uniform=uniform,
        mixed=mixed,
        exclude=exclude,
        kv=kv,
        version=_producer_version(block),
        file=file,
        warnings=(
            (f"{file}: {len(unknown)} unknown key(s) ignored: {summarize(unknown)}",)
            if unknown
            else ()
        ),
        stored=json.dumps(_for_config_json(block)),
    )
    check_count(config.skip.patterns, f"{file}: {config.purpose}")
    return config


def check_agreement(a: ModelOptConfig, b: ModelOptConfig) -> ModelOptConfig:
    """One config of two files that describe the same checkpoint: ``a``, with what only b says.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT`` naming both files and values.
    """

    def said(c: ModelOptConfig) -> dict[str, Any]:
        return {
            "quant_algo": _MIXED if c.mixed is not None else c.uniform and c.uniform.algo.name,
            "the excluded modules": sorted(c.exclude),
            "the quantized layers": {n: e.algo.name for n, e in (c.mixed or {}).items()},
            "the KV cache": c.kv or None,
        }

    mine, other = said(a), said(b)
    sizes = [c.uniform.group_size if c.uniform is not None else 0 for c in (a, b)]
    if all(sizes):
        mine["group_size"], other["group_size"] = sizes
    key = next((k for k in mine if mine[k] != other[k]), None)
    if key is not None:
        raise ConfigError(
            f"{a.file}: {key} is {printable(repr(mine[key]), 60)}, but {b.file} says "
            f"{printable(repr(other[key]), 60)}; expected both files to agree. "
            "Delete the one that does not belong to these weights.",
            code="Q-CFG-CONFLICT",
            path=a.file,
            tensor=key,
            expected=mine[key],
            actual=other[key],
            plugin="nvfp4",
        )
    known = a.uniform if sizes[0] or not sizes[1] else b.uniform
    return replace(a, uniform=known, warnings=a.warnings + b.warnings)
