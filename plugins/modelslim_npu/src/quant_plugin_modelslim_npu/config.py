"""``quant_model_description*.json`` as frozen data: the type of every module.

    "model.layers.0.self_attn.q_proj.weight": "W8A8"       one entry for each stored tensor
    "model_quant_type": "W8A8", "group_size": 0, ...       a few keys about the whole

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import ConfigError, printable, summarize
from quant_core.fields import Fields
from quant_plugin_modelslim_npu.kinds import FLOAT_TYPES, KINDS, refusal

__all__ = ["WEIGHTS", "MsConfig", "parse_description", "tensor_types"]

WEIGHTS = ("weight", "weight_packed")
"""Last name components of the tensors whose entry gives a module's type."""

_KNOWN = frozenset(
    "version model_quant_type metadata group_size optional kv_cache_type kv_quant_type "
    "fa_quant_type indexer_quant_type max_supported_tp".split()
)
_MAX_GROUP = 1 << 20
_PLUGIN = "modelslim_npu"


@dataclass(frozen=True, slots=True, kw_only=True)
class MsConfig:
    """A description.

    Attributes:
        file: its name, for messages.
        types: module path -> type string, quantized modules only.
        floats: paths of modules whose weight is said to be float.
        group_size: input features per scale as stated; 0 = nothing stated.
        warnings: one sentence each.
    """

    file: str
    types: Mapping[str, str]
    floats: frozenset[str]
    group_size: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def one_group_size(self) -> bool:
        """Whether ``group_size`` holds for every grouped layer. The producer overwrites it with
        each layer it writes, so beside block formats it may be that of another layer."""
        return self.group_size > 0 and not any(KINDS[t].mx for t in set(self.types.values()))


def tensor_types(raw: Mapping[str, Any]) -> dict[str, str]:
    """Entries that stand for a stored tensor: its name -> its type."""
    return {
        k: v
        for k, v in raw.items()
        if "." in k and isinstance(v, str) and not k.endswith(".quant_type")
    }


def _fail(file: str, key: str, value: object, expected: str, fix: str, code: str) -> ConfigError:
    return ConfigError(
        f"{file}: {printable(key)!r} is {printable(repr(value), 60)}, expected {expected}. {fix}",
        code=code,
        path=file,
        tensor=key,
        expected=expected,
        actual=value,
        plugin=_PLUGIN,
    )


def _check_version(fields: Fields, file: str) -> None:
    text = fields.text("version")
    if text is not None and text.partition(".")[0] not in ("0", "1"):
        fix = "Update quant-plugin-modelslim-npu."
        raise _fail(file, "version", text, "0.x or 1.x", fix, "Q-CFG-VERSION")


def _check_rotations(fields: Fields, file: str) -> None:
    """Rotations that must run between the layers are refused; those merged in weights are not."""
    quarot = fields.objects("metadata").get("quarot")
    online = [k for k, v in (quarot.raw if quarot else {}).items() if k != "max_tp_size" and v]
    if online:
        raise ConfigError(
            f"{file}: metadata.quarot names rotations at run time ({summarize(sorted(online))}), "
            "expected rotations merged into the weights. Running without them would give wrong "
            "results; export without online rotations.",
            code="Q-CFG-TRANSFORM",
            path=file,
            tensor="metadata.quarot",
            actual=sorted(online),
            plugin=_PLUGIN,
        )


def parse_description(raw: Mapping[str, Any], file: str) -> MsConfig:
    """A description from its JSON object.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for a type that is not supported or a bad value,
            ``Q-CFG-TYPE``, ``Q-CFG-VERSION``, ``Q-CFG-TRANSFORM`` (online rotations).
    """
    fields = Fields(raw, file, plugin=_PLUGIN)
    _check_version(fields, file)
    _check_rotations(fields, file)
    entries = tensor_types(raw)
    types: dict[str, str] = {}
    floats: set[str] = set()
    for name, text in entries.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in WEIGHTS:
            continue
        if text in FLOAT_TYPES:
            floats.add(module)
        elif text in KINDS:
            types[module] = text
        else:
            expected = f"FLOAT or one of {', '.join(KINDS)}"
            fix = f"Not supported: {refusal(text)}; quantize with another type."
            raise _fail(file, name, text, expected, fix, "Q-CFG-VALUE")
    if not entries:
        fix = "Restore the description that the quantization tool wrote."
        raise _fail(file, "*.weight", None, "an entry for each tensor", fix, "Q-CFG-VALUE")
    odd = [k for k, v in raw.items() if k not in _KNOWN and not _is_entry(k, v)]
    warnings = [f"{file}: unknown keys ignored: {summarize(sorted(odd))}"] if odd else []
    if fields.text("fa_quant_type") or any(k.endswith(".quant_type") for k in raw):
        warnings.append(f"{file}: quantized attention is not applied; it stays unquantized")
    return MsConfig(
        file=file,
        types=types,
        floats=frozenset(floats),
        group_size=max(fields.integer("group_size", -1, _MAX_GROUP) or 0, 0),
        warnings=tuple(warnings),
    )


def _is_entry(key: str, value: object) -> bool:
    return "." in key and isinstance(value, str)
