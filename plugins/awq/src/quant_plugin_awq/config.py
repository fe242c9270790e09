"""The AWQ config: a dict from JSON to a checked, frozen ``AwqConfig``.

    key                      default   written by
    bits | w_bit             4         AutoAWQ, GPTQModel, AutoRound | old AutoAWQ quant_config.json
    group_size|q_group_size  128       -1 = one group per row
    zero_point               true      false: zeros are 2**(bits-1)
    sym                      -         AutoRound; must be the opposite of zero_point
    version, format,         "gemm"    first one present decides, in this order
      checkpoint_format
    backend                  -         "llm-awq" selects that layout; anything else is inert
    modules_to_not_convert   null      substrings of module names
    dynamic                  null      GPTQModel; only "-:" (skip) rules are read
    lm_head                  false     GPTQModel

Sources: AutoAWQ 0.2.9 ``models/_config.py``; transformers 5.23 ``utils/quantization_config.py``
(AwqConfig); GPTQModel 7.7.0 ``quantization/config.py``; AutoRound 0.16.1 ``export_to_awq``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from quant_core.errors import ConfigError, printable, summarize
from quant_core.resolve import NamePattern, first_match

__all__ = ["LAYOUTS", "AwqConfig", "parse_config", "stated"]

LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq")

_BITS = {"gptqmodel": range(2, 9), "auto-round": range(4, 8)}  # other tools: 4 only
_SAME_AS_GEMM = ("exllama", "exllamav1", "exllamav2", "exllama_v1", "exllama_v2", "ipex")
_KERNEL_ORDER = ("marlin", "bitblas", "machete")
_PACK_DTYPES = {"gemm": "int32", "gemv": "int32", "gemv_fast": "int16", "llm-awq": "int16"}

_READ = """
quant_method method bits w_bit group_size q_group_size zero_point sym version format
checkpoint_format backend modules_to_not_convert lm_head dynamic desc_act pack_dtype meta provider
autoround_version
"""
# Recipe and engine hints: they do not change what the stored tensors mean.
_INERT = """
act_bits act_data_type act_dynamic act_group_aware act_group_size act_sym amp batch_size
block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent data_type dataset
do_fuse enable_minmax_tuning enable_quanted_input exllama_config fuse_max_seq_len
gradient_accumulate_steps is_marlin_format iters low_gpu_mem_usage lr max_input_length minmax_lr
model_file_base_name model_name_or_path model_seqlen module_name_preceding_first_block
modules_in_block_to_quantize modules_to_fuse mse nsamples pad_token_id scale_dtype seed seqlen
static_groups to_quant_block_names tokenizer true_sequential use_cuda_fp16 use_exllama
"""
_KNOWN = frozenset(_READ.split()) | frozenset(_INERT.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqConfig:
    """A checked AWQ config, plus what the header says about the whole checkpoint.

    Attributes:
        layout: one of ``LAYOUTS``.
        producer: "gptqmodel", "auto-round" or "" (AutoAWQ and unknown): decides the dialect of
            bits other than 4.
        quantized: module paths that store packed tensors, numbers replaced by ``*``.
        scaled_activation: first stored tensor of a scaled activation, "" if there is none.
        file: where the config was read.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    layout: str = "gemm"
    producer: str = ""
    modules_to_not_convert: tuple[str, ...] = ()
    skip: tuple[NamePattern, ...] = ()
    lm_head: bool = False
    file: str = ""
    warnings: tuple[str, ...] = ()
    quantized: frozenset[str] = frozenset()
    scaled_activation: str = ""
    _names: frozenset[str] = field(init=False, repr=False, compare=False, default=frozenset())

    def __post_init__(self) -> None:
        names = frozenset(p.strip(".") for p in self.modules_to_not_convert)
        object.__setattr__(self, "_names", names)

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """All patterns, for the report of those that match no module."""
        listed = (
            NamePattern(kind="substring", text=p, purpose="modules_to_not_convert")
            for p in self.modules_to_not_convert
        )
        return (*listed, *self.skip)

    def excluded_exactly(self, module: str) -> str:
        """The pattern that names ``module`` or a run of its dotted parts; "" if none does."""
        parts = module.split(".")
        for start in range(len(parts)):
            for stop in range(len(parts), start, -1):
                run = ".".join(parts[start:stop])
                if run in self._names:
                    return run
        hit = first_match(self.skip, module)
        return f"-:{hit.text}" if hit else ""

    def excluded(self, module: str) -> str:
        """The pattern that excludes ``module``: a whole-name match first, else any substring."""
        return self.excluded_exactly(module) or next(
            (p for p in self.modules_to_not_convert if p in module), ""
        )


def _fail(file: str, key: str, found: Any, expected: str, fix: str, code: str) -> NoReturn:
    raise ConfigError(
        f"{file}: {key} is {printable(repr(found), 60)}, expected {expected}. {fix}",
        code=code,
        path=file,
        tensor=key,
        expected=expected,
        actual=found,
        plugin="awq",
    )


def _alias(block: Mapping[str, Any], file: str, *keys: str) -> tuple[str, Any]:
    """(key, value) of the first of ``keys`` that is present; the others must agree."""
    present = [k for k in keys if block.get(k) is not None]
    if not present:
        return keys[0], None
    first = present[0]
    for other in present[1:]:
        if block[other] != block[first]:
            fix = "Keep the value that the tensors were made with."
            expected = f"{block[first]!r} as in {first!r}"
            _fail(file, other, block[other], expected, fix, "Q-CFG-CONFLICT")
    return first, block[first]


def _producer(block: Mapping[str, Any]) -> str:
    if block.get("provider") == "auto-round" or block.get("autoround_version"):
        return "auto-round"
    meta = block.get("meta")
    made_by = meta.get("quantizer") if isinstance(meta, Mapping) else None
    tools = made_by if isinstance(made_by, list | tuple) else (made_by,)
    if any(isinstance(t, str) and t.lower().startswith("gptqmodel") for t in tools):
        return "gptqmodel"
    return ""


def _layout(block: Mapping[str, Any], file: str) -> str:
    if str(block.get("backend")).lower() == "llm-awq":
        return "llm-awq"
    key = next(
        (k for k in ("version", "format", "checkpoint_format") if block.get(k) is not None), ""
    )
    value = block[key] if key else "gemm"
    known = f"one of {', '.join(LAYOUTS)}"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        _fail(file, key, value, known, "Restore the config the tool wrote.", "Q-CFG-TYPE")
    name = str(value).lower()
    if name in _SAME_AS_GEMM:
        return "gemm"
    if name in _KERNEL_ORDER:
        fix = (
            f"Weights in {name} kernel order are not read; export the checkpoint again with "
            "version 'gemm' (AutoAWQ, GPTQModel)."
        )
        _fail(file, key, value, known, fix, "Q-CFG-VALUE")
    if name not in LAYOUTS:
        fix = "Update quant-plugin-awq or export the checkpoint as 'gemm'."
        _fail(file, key, value, known, fix, "Q-CFG-VERSION")
    return name


def _bits(block: Mapping[str, Any], file: str, layout: str, producer: str) -> int:
    key, value = _alias(block, file, "bits", "w_bit")
    if value is None:
        return 4
    allowed = tuple(_BITS.get(producer, ())) if layout == "gemm" else ()
    allowed = allowed or (4,)
    if type(value) is not int or value not in allowed:
        fix = "Other widths are read only from tools whose bit order is known."
        if type(value) is not int:
            fix = "Write a JSON integer."
        who = f" for a {layout!r} checkpoint by {producer or 'an unnamed tool'}"
        shown = ", ".join(map(str, allowed))
        _fail(file, key, value, f"{shown}{who}", fix, "Q-CFG-VALUE")
    return value


def _group_size(block: Mapping[str, Any], file: str) -> int:
    key, value = _alias(block, file, "group_size", "q_group_size")
    if value is None:
        return 128
    if type(value) is not int or (value != -1 and value < 1):
        fix = "Restore the group size that the tensors were made with."
        _fail(file, key, value, "a positive integer or -1 (whole rows)", fix, "Q-CFG-VALUE")
    return value


def _flag(block: Mapping[str, Any], file: str, key: str) -> bool | None:
    value = block.get(key)
    if value is not None and type(value) is not bool:
        _fail(file, key, value, "true or false", "Write a JSON boolean.", "Q-CFG-VALUE")
    return value


def _zero_point(block: Mapping[str, Any], file: str) -> bool:
    zero_point, sym = _flag(block, file, "zero_point"), _flag(block, file, "sym")
    if zero_point is not None and sym is not None and zero_point == sym:
        expected = f"{not sym} because sym is {sym}"
        fix = "Keep the one that the tensors were made with."
        _fail(file, "zero_point", zero_point, expected, fix, "Q-CFG-CONFLICT")
    if zero_point is None and sym is not None:
        return not sym
    return True if zero_point is None else zero_point


def _not_converted(block: Mapping[str, Any], file: str) -> tuple[str, ...]:
    key = "modules_to_not_convert"
    value = block.get(key)
    if value is None:
        return ()
    fix = "List parts of module names, such as 'lm_head'."
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        _fail(file, key, value, "a list of strings or null", fix, "Q-CFG-TYPE")
    if any(not v.strip(".") for v in value):
        _fail(file, key, value, "no empty entry (it would match all modules)", fix, "Q-CFG-VALUE")
    return tuple(value)


def _skip_rules(block: Mapping[str, Any], file: str) -> tuple[NamePattern, ...]:
    rules = block.get("dynamic")
    if not rules:
        return ()
    if not isinstance(rules, Mapping):
        fix = "Restore the config the tool wrote."
        _fail(file, "dynamic", rules, "an object of patterns", fix, "Q-CFG-TYPE")
    out = []
    for pattern, override in rules.items():
        if not pattern.startswith("-:"):
            fix = "Quantize with one set of bits and group_size for all layers."
            shown = {pattern: override}
            _fail(file, "dynamic", shown, "only '-:' (skip) rules", fix, "Q-CFG-VALUE")
        out.append(NamePattern(kind="regex", text=pattern[2:], purpose="dynamic"))
    return tuple(out)


def parse_config(block: Mapping[str, Any], file: str) -> AwqConfig:
    """Check one config block.

    Args:
        block: parsed JSON, not changed.
        file: named in errors and warnings.

    Raises:
        ConfigError: ``Q-CFG-TYPE``, ``Q-CFG-VALUE``, ``Q-CFG-VERSION``, ``Q-CFG-CONFLICT`` or
            ``Q-CFG-REGEX``, naming ``file`` and the key.
    """
    layout, producer = _layout(block, file), _producer(block)
    if _flag(block, file, "desc_act"):
        fix = "AWQ stores no g_idx, so columns cannot be reordered; set it to false."
        _fail(file, "desc_act", True, "false", fix, "Q-CFG-CONFLICT")
    pack_dtype = block.get("pack_dtype")
    if pack_dtype is not None and pack_dtype != _PACK_DTYPES[layout]:
        fix = f"Export the checkpoint again with {_PACK_DTYPES[layout]} words."
        expected = f"{_PACK_DTYPES[layout]!r} for layout {layout!r}"
        _fail(file, "pack_dtype", pack_dtype, expected, fix, "Q-CFG-VALUE")
    unknown = sorted(set(block) - _KNOWN)
    warnings = (f"{file}: unknown config keys ignored: {summarize(unknown)}",) if unknown else ()
    return AwqConfig(
        bits=_bits(block, file, layout, producer),
        group_size=_group_size(block, file),
        zero_point=_zero_point(block, file),
        layout=layout,
        producer=producer,
        modules_to_not_convert=_not_converted(block, file),
        skip=_skip_rules(block, file),
        lm_head=bool(_flag(block, file, "lm_head")),
        file=file,
        warnings=warnings,
    )


def stated(block: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What a block states explicitly, under one name per meaning."""
    out = {
        "bits": _alias(block, file, "bits", "w_bit")[1],
        "group_size": _alias(block, file, "group_size", "q_group_size")[1],
        "zero_point": block.get("zero_point"),
        "quant_method": block.get("quant_method", block.get("method")),
        "lm_head": block.get("lm_head"),
    }
    if any(block.get(k) is not None for k in ("version", "format", "checkpoint_format", "backend")):
        out["version"] = _layout(block, file)
    names = block.get("modules_to_not_convert")
    if names:
        out["modules_to_not_convert"] = sorted(map(str, names))
    if isinstance(out["quant_method"], str):
        out["quant_method"] = out["quant_method"].lower()
    return {k: v for k, v in out.items() if v is not None}
