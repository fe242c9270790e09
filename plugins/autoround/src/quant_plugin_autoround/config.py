"""The AutoRound config: a JSON object to a frozen dataclass, every value checked.

    {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq",
     "bits": 4, "group_size": 128, "sym": true, "data_type": "int",
     "block_name_to_quantize": "model.layers",
     "extra_config": {"model.layers.0.mlp.down_proj": {"bits": 8},
                      ".*model\\.layers\\.0\\.mlp\\.gate.*": {"bits": 16, "data_type": "float"}}}

``packing_format`` names the layout of all integer layers:

    dialect       packing_format                          codes           zeros
    minus_one     auto_round:auto_gptq (also if absent)   along K         z - 1
    raw           auto_round, auto_round:gptqmodel        along K         z
    interleaved   auto_round:auto_awq                     along N, 8s     z
    float         auto_round:llm_compressor, :fp8, ...    small floats, see ``floats``

Files of AutoRound before 0.4 name the layout in ``backend`` instead; that key is read only where it
is one of the names above, because later it chooses a kernel.

Sources: AutoRound 0.16.1 ``export/export_to_autoround/export.py`` (pack_layer, what is stored per
layer), ``inference/convert_model.py`` (get_layer_config, convert_hf_model), ``schemes.py``;
vLLM 0.32 ``quantization/inc``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from quant_core.errors import summarize
from quant_core.fields import Fields, thaw
from quant_core.resolve import NamePattern, check_count

__all__ = ["AutoRoundConfig", "Dialect", "LayerSettings", "Rule", "parse_config"]

Dialect = Literal["minus_one", "raw", "interleaved", "float"]

_DIALECTS: Mapping[str, Dialect] = {
    "auto_round:auto_gptq": "minus_one",
    "auto_round:gptq": "minus_one",
    "auto_round": "raw",
    "auto_round:gptqmodel": "raw",
    "auto_round:auto_awq": "interleaved",
    "auto_round:awq": "interleaved",
}
_KERNELS = {"exllama", "exllamav2", "triton", "tritonv2", "marlin"}  # a hint, not a layout
_FLOAT_FORMAT = re.compile(r"auto_round:(llm_compressor|fp8|mx|nv)\w*")
_INT_TYPES = {"int", "int_sym", "int_asym", "int_sym_gptq", "rtn_int_sym"}
_REGEX_MARKS = frozenset("*+?^$()[]{}|\\")
_NUMBERED_EXPERT = re.compile(r"\bexperts\\?\.\d")

_LAYER_KEYS = """
bits group_size sym data_type act_bits act_group_size act_sym act_data_type act_dynamic
super_bits super_group_size rotation_config
"""
_READ = f"""
{_LAYER_KEYS} quant_method packing_format backend block_name_to_quantize to_quant_block_names
extra_config
"""
# Recipe and hints: they do not change what the stored tensors mean.
_INERT = """
amp autoround_version batch_size cache_block_outputs dataset disable_opt_rtn enable_alg_ext
enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input gradient_accumulate_steps iters
low_cpu_mem_usage low_gpu_mem_usage lr minmax_lr model_free momentum nsamples provider
quant_block_list quant_lm_head quant_nontext_module sampler scale_dtype scheme seed seqlen
static_attention_granularity static_kv_granularity to_quant_block tokenizer transformers_version
"""
_KNOWN = frozenset((_READ + _INERT).split())


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSettings:
    """What the config says of one module.

    Attributes:
        group_size: None where there are no groups: small floats of other grains.
        block: rows and columns of a block of small floats.
        act_bits: of quantized activations; 16 and more: they stay floats.
        act_group_size: as the file says: None, 0 (tensor), -1 (token) or a size.
        super_groups: scales are quantized themselves.
        rotated: activations are rotated at run time.
        rule: the key of extra_config that decided, "" for the defaults.
    """

    bits: int
    group_size: int | None
    sym: bool = True
    data_type: str = "int"
    block: tuple[int, int] | None = None
    act_bits: int = 16
    act_data_type: str = "int"
    act_group_size: int | None = None
    act_sym: bool = True
    act_dynamic: bool = True
    super_groups: bool = False
    rotated: bool = False
    rule: str = ""

    @property
    def activations(self) -> str:
        """How activations are quantized, in words; "" if they stay floats."""
        if self.act_bits >= 16:
            return ""
        return f"{self.act_bits}-bit {self.act_data_type} activations"

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def is_int(self) -> bool:
        return self.data_type in _INT_TYPES

    @property
    def unread(self) -> list[str]:
        """What of these settings has no reader among the integer layers."""
        weights = f"{self.bits}-bit {self.data_type} weights"
        return [
            what
            for what, needed in (
                (weights, not self.is_int),
                (self.activations, self.activations),
                ("scales in super-groups (super_bits)", self.super_groups),
                ("rotated activations (rotation_config)", self.rotated),
            )
            if needed
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One entry of ``extra_config``, merged over the defaults."""

    key: str
    pattern: NamePattern
    settings: LayerSettings

    @property
    def explicit(self) -> bool:
        """The key names modules in full; a regular expression may hit more than was meant."""
        return self.pattern.kind != "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRoundConfig:
    """A checked AutoRound config, plus what the header says about the whole checkpoint.

    Attributes:
        default: settings of a module that no rule names.
        blocks: patterns of ``block_name_to_quantize``; () = every block.
        rules: entries of ``extra_config``, names in full before regular expressions.
        stated: packing_format is given, so a contradiction deserves a warning.
        quantized: module paths that store packed tensors, numbers replaced by ``*``.
        stored: the block as JSON text, for writing it back.
    """

    default: LayerSettings
    dialect: Dialect
    packing_format: str
    blocks: tuple[NamePattern, ...] = ()
    rules: tuple[Rule, ...] = ()
    stated: bool = True
    source: str = ""
    warnings: tuple[str, ...] = ()
    stored: str = "{}"
    quantized: frozenset[str] = frozenset()

    def name_patterns(self) -> Sequence[NamePattern]:
        """All patterns, for the report of those that match no module.

        Names of single experts are left out: a stack of experts is one module there.
        """
        keys = (r.pattern for r in self.rules if not _NUMBERED_EXPERT.search(r.key))
        return (*self.blocks, *keys)

    def in_blocks(self, name: str) -> bool:
        """Whether modules of this name are quantized without being listed."""
        if self.blocks:
            return any(p.matches(name) for p in self.blocks)
        return name.rpartition(".")[2] != "lm_head"

    def rules_for(self, name: str) -> Iterator[Rule]:
        """Rules that match ``name``, the one that counts first."""
        for exact in (True, False):
            for rule in self.rules:
                if (rule.key == name) is exact and rule.pattern.matches(name):
                    yield rule

    def settings(self, name: str) -> LayerSettings:
        """Settings by the config alone; a module that is neither listed nor in a block has 16."""
        if rule := next(self.rules_for(name), None):
            return rule.settings
        return self.default if self.in_blocks(name) else replace(self.default, bits=16)

    def packed_settings(self, name: str) -> LayerSettings:
        """Settings of a module that stores packed tensors.

        A regular expression that says "not quantized" then hit more than was meant (the tool
        itself writes ``.*mlp\\.gate.*`` for a router, which matches ``mlp.gate_proj`` too), and a
        module outside the blocks was quantized all the same: both are passed over.
        """
        for rule in self.rules_for(name):
            if rule.explicit or rule.settings.quantized:
                return rule.settings
        return self.default


def _dialect(fields: Fields) -> tuple[Dialect, str, bool]:
    """Dialect, packing_format, and whether the file states it."""

    def known(text: str | None) -> str:
        parts = (text or "").replace("autoround", "auto_round").replace("auto-round", "auto_round")
        return ":".join(p for p in parts.split(":") if p not in _KERNELS)

    stated = fields.text("packing_format")
    if stated is None:
        backend = fields.raw.get("backend")
        old = known(backend.lower()) if isinstance(backend, str) else ""
        name = old if old in _DIALECTS else "auto_round:auto_gptq"
        return _DIALECTS[name], name, name == old
    name = known(stated)
    if name == "auto":
        name = "auto_round:auto_gptq"
    if name in _DIALECTS:
        return _DIALECTS[name], name, True
    if _FLOAT_FORMAT.fullmatch(name):
        return "float", name, True
    fix = "Export the checkpoint again with one of these."
    raise fields.fail("packing_format", f"one of {tuple(_DIALECTS)}", fix)


def _bits(fields: Fields) -> int | None:
    bits = fields.raw.get("bits")
    if bits is None:
        return None
    if type(bits) is not int or not (2 <= bits <= 8 or 16 <= bits <= 32):
        fix = "Correct it to the width the tensors were packed with."
        raise fields.fail("bits", "2 to 8, or 16 and more (not quantized)", fix)
    return bits


def _block(fields: Fields) -> tuple[int, int] | None:
    """``group_size`` of small floats in blocks: rows, columns."""
    value = fields.raw.get("group_size")
    if not isinstance(value, list | tuple):
        return None
    if len(value) != 2 or not all(type(v) is int and 0 < v <= 1 << 20 for v in value):
        fix = "Restore the config that the tool wrote."
        raise fields.fail("group_size", "two positive integers, or one size", fix)
    return (value[0], value[1])


def _changes(fields: Fields, data_type: str) -> dict[str, Any]:
    """The settings that one object states; ``data_type`` is that of the defaults."""
    raw = fields.raw
    out: dict[str, Any] = {
        "bits": _bits(fields),
        "data_type": fields.text("data_type"),
        "sym": fields.flag("sym"),
    }
    if "group_size" in raw:
        # other types have sizes of other forms too: 0, or a list of two for blocks
        is_int = (out["data_type"] or data_type) in _INT_TYPES
        out["block"] = None if is_int else _block(fields)
        plain = is_int or (out["block"] is None and raw["group_size"] not in (0, None))
        out["group_size"] = fields.group_size() if plain else None
    changes = {k: v for k, v in out.items() if v is not None}
    acts = {
        "act_bits": fields.integer("act_bits", 1, 32),
        "act_data_type": fields.text("act_data_type"),
        "act_group_size": fields.integer("act_group_size", -1, 1 << 20),
        "act_sym": fields.flag("act_sym"),
        "act_dynamic": fields.flag("act_dynamic"),
    }
    changes |= {k: v for k, v in acts.items() if v is not None}
    if "super_bits" in raw:
        changes["super_groups"] = raw["super_bits"] is not None
    if "rotation_config" in raw:
        changes["rotated"] = bool(raw["rotation_config"])
    return changes


def _default(fields: Fields) -> LayerSettings:
    changes = _changes(fields, "int")
    settings = LayerSettings(**({"bits": 0, "group_size": None} | changes))
    for key, absent in (("bits", not settings.bits), ("group_size", settings.group_size is None)):
        if absent and (key == "bits" or (settings.is_int and settings.quantized)):
            raise fields.fail(key, "an integer", "Restore the config that the tool wrote.")
    return settings


def _rules(fields: Fields, default: LayerSettings, unknown: list[str]) -> tuple[Rule, ...]:
    rules = []
    layer_keys = frozenset(_LAYER_KEYS.split())
    for key, entry in fields.objects("extra_config").items():
        kind: Any = "search" if _REGEX_MARKS & set(key) else "suffix"
        unknown += [f"{entry.prefix}{k}" for k in entry.raw if k not in layer_keys]
        settings = replace(default, **_changes(entry, default.data_type), rule=key)
        pattern = NamePattern(kind=kind, text=key, purpose="extra_config")
        rules.append(Rule(key=key, pattern=pattern, settings=settings))
    check_count([r.pattern for r in rules], f"{fields.source}: extra_config")
    return tuple(sorted(rules, key=lambda r: not r.explicit))


def _blocks(fields: Fields) -> tuple[NamePattern, ...]:
    """``block_name_to_quantize``: a comma list, a list, or a list of lists."""
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        value = fields.raw.get(key)
        if value is None:
            continue
        names = value.split(",") if isinstance(value, str) else fields.names(key)
        texts = dict.fromkeys(n.strip().rstrip(".") for n in names)
        return tuple(NamePattern(kind="prefix", text=t, purpose=key) for t in texts if t)
    return ()


def parse_config(raw: Mapping[str, Any], source: str) -> AutoRoundConfig:
    """A checked config.

    Args:
        raw: the block, not changed.
        source: file name for messages.

    Raises:
        ConfigError: ``Q-CFG-VALUE``, ``Q-CFG-TYPE`` or ``Q-CFG-REGEX`` naming file and key.
    """
    fields = Fields(raw, source, plugin="autoround")
    dialect, packing_format, stated = _dialect(fields)
    default = _default(fields)
    unknown = [k for k in raw if k not in _KNOWN]
    rules = _rules(fields, default, unknown)
    warnings = []
    if unknown:
        warnings.append(f"{source}: {len(unknown)} unknown key(s) ignored: {summarize(unknown)}")
    return AutoRoundConfig(
        default=default,
        dialect=dialect,
        packing_format=packing_format,
        blocks=_blocks(fields),
        rules=rules,
        stated=stated,
        source=source,
        warnings=tuple(warnings),
        stored=json.dumps(thaw(raw)),
    )
