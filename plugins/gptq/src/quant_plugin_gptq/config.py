"""The GPTQ config: a JSON object to a frozen dataclass, every value checked.

    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true,
     "checkpoint_format": "gptq",
     "dynamic": {"-:.*layers\\.3\\..*": {}, "+:.*down_proj": {"bits": 8}}}

``dynamic`` maps a regular expression, matched at the start of a module's name, to overrides; the
prefix ``-:`` means "not quantized". GPTQModel tries all ``-:`` entries first, other readers go in
the order of the file; ``GptqConfig.rules_for`` gives both answers and the stored tensors decide.

Sources: AutoGPTQ 0.7.1 and GPTQModel 7.7.0 ``quantization/config.py``, AutoRound 0.16.1
``export/export_to_autogptq``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quant_core.errors import ConfigError, printable, summarize
from quant_core.fields import thaw
from quant_core.resolve import NamePattern, check_count
from quant_plugin_gptq.reader import ALL_BITS, COMMON_BITS, Reader

__all__ = ["FORMATS", "DynamicRule", "GptqConfig", "LayerSettings", "parse_config"]

FORMATS = ("gptq", "gptq_v2", "gptq_p")

_LAYER_KEYS = frozenset({"bits", "group_size", "sym", "desc_act"})
_OWN_KEYS = _LAYER_KEYS | {
    "quant_method",
    "method",
    "checkpoint_format",
    "format",
    "pack_dtype",
    "provider",
    "lm_head",
    "dynamic",
    "modules_in_block_to_quantize",
    "is_marlin_format",
    "data_type",
    "act_bits",
    "super_bits",
    "rotation_config",
}
# written by the tools; they steer quantization and say nothing about the stored bytes
_TUNING_KEYS = frozenset(
    [
        "act_group_aware",
        "autoround_version",
        "backend",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "cache_examples_on_gpu",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "disable_exllama",
        "enable_minmax_tuning",
        "enable_quanted_input",
        "exllama_config",
        "fallback",
        "foem",
        "gptaq",
        "gradient_accumulate_steps",
        "hyb_act",
        "iters",
        "low_cpu_mem_usage",
        "low_gpu_mem_usage",
        "lr",
        "max_input_length",
        "meta",
        "minmax_lr",
        "mock_quantization",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "mse",
        "nsamples",
        "offload_to_disk",
        "pad_token_id",
        "parallel_packing",
        "quant_block_list",
        "quant_lm_head",
        "rotation",
        "scale_dtype",
        "seqlen",
        "static_groups",
        "tokenizer",
        "to_quant_block_names",
        "true_sequential",
        "use_cuda_fp16",
        "use_exllama",
        "v2",
        "v2_alpha",
        "v2_memory_device",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRule:
    """One entry of ``dynamic``. None = not overridden."""

    key: str  # as stored, with its prefix
    pattern: NamePattern
    skip: bool
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSettings:
    """What the config says of one module."""

    bits: int | None
    group_size: int | None
    sym: bool | None
    desc_act: bool | None
    skip: str = ""  # the ``-:`` entry that excludes the module in every reader's order
    rule: str = ""  # the entry that overrides


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqConfig:
    """A checked GPTQ config. None = the file does not say; the tensors decide.

    ``checkpoint_format`` None means no key was given: v1 zeros unless the values show otherwise.
    ``bits``, ``group_size`` and ``sym`` are None only when there is no config at all.
    """

    bits: int | None
    group_size: int | None  # -1 = one group per row
    sym: bool | None
    desc_act: bool | None
    checkpoint_format: Literal["gptq", "gptq_v2", "gptq_p"] | None
    autoround: bool = False  # 5, 6 and 7 bits are dense streams
    lm_head: bool = False
    dynamic: tuple[DynamicRule, ...] = ()
    modules: tuple[str, ...] = ()  # modules_in_block_to_quantize
    source: str = ""  # file, for messages
    warnings: tuple[str, ...] = ()
    stored: str = "{}"  # the block as JSON text, for writing it back

    def name_patterns(self) -> Sequence[NamePattern]:
        """The patterns of ``dynamic``; core reports those that match no module."""
        return tuple(r.pattern for r in self.dynamic)

    def settings(self, name: str) -> LayerSettings:
        """Settings of the module ``name``; the first matching entry of each kind counts.

        ``skip`` is set only where no override comes before the ``-:`` entry in the file, so that
        a file made by either order of evaluation is read as it was written.
        """
        override = None
        skip = ""
        for rule in self.dynamic:
            if not rule.pattern.matches(name):
                continue
            if rule.skip:
                skip = skip or ("" if override else rule.key)
            elif override is None:
                override = rule
        if override is None:
            return LayerSettings(
                bits=self.bits,
                group_size=self.group_size,
                sym=self.sym,
                desc_act=self.desc_act,
                skip=skip,
            )
        return LayerSettings(
            bits=_or(override.bits, self.bits),
            group_size=_or(override.group_size, self.group_size),
            sym=_or(override.sym, self.sym),
            desc_act=_or(override.desc_act, self.desc_act),
            skip=skip,
            rule=override.key,
        )

    def skips(self, name: str) -> str:
        """The ``-:`` entry that matches ``name``, wherever it stands; empty if none."""
        return next((r.key for r in self.dynamic if r.skip and r.pattern.matches(name)), "")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _checkpoint_format(reader: Reader) -> Literal["gptq", "gptq_v2", "gptq_p"] | None:
    names = {key: reader.text(key) for key in ("checkpoint_format", "format")}
    given = {key: name for key, name in names.items() if name is not None}
    if len(set(given.values())) > 1:
        raise ConfigError(
            f"{reader.source}: checkpoint_format is {names['checkpoint_format']!r} and format is "
            f"{names['format']!r}, expected one value. Remove the wrong one.",
            code="Q-CFG-CONFLICT",
            path=reader.source,
            tensor="checkpoint_format",
            expected=names["checkpoint_format"],
            actual=names["format"],
            plugin="gptq",
        )
    if reader.flag("is_marlin_format"):
        fix = "Export the checkpoint again without the Marlin repacking."
        raise reader.fail("is_marlin_format", "false", fix)
    if not given:
        return None
    key, name = next(iter(given.items()))
    if name in FORMATS:
        return name  # type: ignore[return-value]
    newer = re.fullmatch(r"gptq_v(\d{1,4})", str(name))
    if newer and int(newer[1]) > 2:
        fix = "Update quant-plugin-gptq or export as gptq_v2."
        raise reader.fail(key, f"one of {FORMATS}", fix, "Q-CFG-VERSION")
    fix = "Other layouts are bound to one kernel or machine; export the checkpoint again."
    raise reader.fail(key, f"one of {FORMATS}", fix)


def _check_unsupported(reader: Reader) -> None:
    raw = reader.raw
    dtype = raw.get("pack_dtype")
    if dtype is not None and str(dtype).lower().removeprefix("torch.") != "int32":
        raise reader.fail("pack_dtype", "'int32'", "Export the checkpoint again with int32 words.")
    if raw.get("data_type") not in (None, "int"):
        raise reader.fail("data_type", "'int'", "Only integer weights are stored this way.")
    act_bits = raw.get("act_bits")
    if act_bits is not None and not (type(act_bits) is int and act_bits >= 16):
        raise reader.fail("act_bits", "16 or more", "GPTQ stores weights; activations stay float.")
    for key in ("super_bits", "rotation_config"):
        if raw.get(key):
            fix = "Weights stored this way need more than scale and zero; export without it."
            raise reader.fail(key, "no value", fix)


def _dynamic(
    reader: Reader, allowed: tuple[int, ...], unknown: list[str]
) -> tuple[DynamicRule, ...]:
    raw = reader.raw.get("dynamic")
    if raw is None:
        return ()
    if not isinstance(raw, Mapping):
        fix = "Restore the value the tool wrote."
        raise reader.fail("dynamic", "an object of patterns", fix, "Q-CFG-TYPE")
    rules = []
    for key, value in raw.items():
        entry = Reader(value or {}, reader.source, f"dynamic[{printable(key)!r}].")
        if not isinstance(value or {}, Mapping):
            raise Reader(raw, reader.source, "dynamic.").fail(
                key, "an object of overrides", "Use {} after '-:' patterns.", "Q-CFG-TYPE"
            )
        skip = key.startswith("-:")
        text = key[2:] if key.startswith(("-:", "+:")) else key
        unknown += [f"{entry.prefix}{k}" for k in entry.raw if k not in _LAYER_KEYS | _TUNING_KEYS]
        rules.append(
            DynamicRule(
                key=key,
                pattern=NamePattern(kind="regex", text=text, purpose="dynamic"),
                skip=skip,
                bits=None if skip else entry.bits(allowed),
                group_size=None if skip else entry.group_size(),
                sym=entry.flag("sym"),
                desc_act=entry.flag("desc_act"),
            )
        )
    check_count([r.pattern for r in rules], f"{reader.source}: dynamic")
    return tuple(rules)


def _producers(raw: Mapping[str, Any]) -> str:
    meta = raw.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = quantizer if isinstance(quantizer, list | tuple) else [quantizer]
    return " ".join(str(n).lower() for n in names if n)


def parse_config(raw: Mapping[str, Any], source: str) -> GptqConfig:
    """A checked config.

    Args:
        raw: the block; side-file keys are the same.
        source: file name for messages.

    Raises:
        ConfigError: ``Q-CFG-VALUE``, ``Q-CFG-TYPE``, ``Q-CFG-CONFLICT``, ``Q-CFG-REGEX``,
            ``Q-CFG-VERSION``.
    """
    reader = Reader(raw, source)
    checkpoint_format = _checkpoint_format(reader)
    _check_unsupported(reader)
    autoround = reader.text("provider") == "auto-round" or "autoround_version" in raw
    allowed = ALL_BITS if autoround or checkpoint_format == "gptq_p" else COMMON_BITS
    bits, group_size = reader.bits(allowed), reader.group_size()
    for key, value in (("bits", bits), ("group_size", group_size)):
        if value is None:
            raise reader.fail(key, "an integer", "Restore the config that the tool wrote.")
    sym = reader.flag("sym")
    warnings = []
    if sym is None:
        warnings.append(f"{source}: sym is not given, taken as true (checked against the zeros)")
    unknown = [k for k in raw if k not in _OWN_KEYS | _TUNING_KEYS]
    dynamic = _dynamic(reader, allowed, unknown)
    if unknown:
        warnings.append(f"{source}: {len(unknown)} unknown key(s) ignored: {summarize(unknown)}")
    v1 = checkpoint_format in (None, "gptq")
    if sym is False and v1 and not autoround and "gptqmodel" not in _producers(raw):
        warnings.append(
            f"{source}: asymmetric with v1 zeros and not written by GPTQModel; AutoGPTQ damaged "
            "zero points of 0 when writing, such channels cannot be repaired"
        )
    return GptqConfig(
        bits=bits,
        group_size=group_size,
        sym=True if sym is None else sym,
        desc_act=reader.flag("desc_act"),
        checkpoint_format=checkpoint_format,
        autoround=autoround,
        lm_head=bool(reader.flag("lm_head")),
        dynamic=dynamic,
        modules=reader.names("modules_in_block_to_quantize"),
        source=source,
        warnings=tuple(warnings),
        stored=json.dumps(thaw(raw)),
    )
