"""Quantization arguments of one operand: a JSON object, or a preset, to a frozen dataclass.

    {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128,
     "block_structure": null, "dynamic": false, "actorder": null, "scale_dtype": null, ...}

A strategy that is not given follows from ``group_size``: absent "tensor", -1 "channel", else
"group". ``actorder`` "static" and "weight" only steer the quantizer; "group" (older files also
"dynamic" and true) means that ``weight_g_idx`` gives the group of each column.

Source: compressed-tensors 0.19.0 ``quantization/quant_args.py``, ``quantization/quant_scheme.py``;
0.9.4 for ``actorder``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quant_core.errors import ConfigError, printable
from quant_core.fields import Fields
from quant_core.floatspec import FLOAT_SCALES
from quant_core.intspec import SCALE_ELEMENTS

__all__ = ["FLOATS", "FLOAT_SCALES", "PRESETS", "QuantArgs", "bad_value", "parse_args"]

INT_BITS = (2, 3, 4, 5, 6, 7, 8)
FLOATS: Mapping[int, str] = {8: "fp8_e4m3", 6: "fp6_e2m3", 4: "fp4_e2m1"}
"""Bits -> the float element of that width."""
STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_GROUPED = ("group", "tensor_group")
_KEYS = frozenset(
    "num_bits type symmetric strategy group_size block_structure dynamic actorder scale_dtype "
    "zp_dtype observer observer_kwargs".split()
)


def bad_value(
    file: str, key: str, found: Any, expected: str, fix: str, code: str = "Q-CFG-VALUE"
) -> ConfigError:
    """The error of a config value; ``key`` is the path inside ``quantization_config``."""
    return ConfigError(
        f"{file}: {printable(key)} is {printable(repr(found), 60)}, expected {expected}. {fix}",
        code=code,
        path=file,
        tensor=key,
        expected=expected,
        actual=found,
        plugin="compressed_tensors",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantArgs:
    """How one operand (weights, input activations, keys and values) is quantized."""

    bits: int
    kind: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int = 0  # of "group" and "tensor_group"
    block: tuple[int, int] = (0, 0)  # of "block": rows, columns
    dynamic: bool | Literal["local"] = False
    actorder: Literal["", "weight", "group"] = ""
    scale_dtype: str = ""  # "" = the model's dtype
    zp_dtype: str = ""  # of zero points that are floats; "" = integers

    @property
    def label(self) -> str:
        """Short text for messages: ``int4 group(128) asymmetric``."""
        size = f"({self.group_size})" if self.group_size else ""
        size = f"{list(self.block)}" if self.strategy == "block" else size
        parts = [f"{self.kind}{self.bits}", f"{self.strategy}{size}"]
        parts += [] if self.symmetric else ["asymmetric"]
        parts += [f"dynamic={self.dynamic}".lower()] if self.dynamic else []
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The object that ``parse_args`` reads back."""
        return {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group_size or None,
            "block_structure": list(self.block) if self.strategy == "block" else None,
            "dynamic": self.dynamic,
            "actorder": self.actorder or None,
            "scale_dtype": f"torch.{self.scale_dtype}" if self.scale_dtype else None,
            "zp_dtype": None if self.symmetric else f"torch.{self.zp_dtype or 'int8'}",
            "observer": None,
            "observer_kwargs": {},
        }


def _choice(read: Fields, key: str, allowed: tuple[str, ...]) -> str | None:
    value = read.text(key)
    if value is not None and value not in allowed:
        raise read.fail(key, f"one of {', '.join(allowed)}", "Correct it.")
    return value


def _bits(read: Fields, kind: str) -> int:
    value = read.raw.get("num_bits", 8)
    allowed = INT_BITS if kind == "int" else tuple(sorted(FLOATS))
    if type(value) is not int or value not in allowed:
        fix = "Correct it to the width the tensors were made with."
        raise read.fail("num_bits", f"one of {allowed} for type {kind!r}", fix)
    return value


def _block(read: Fields) -> tuple[int, int]:
    value: Any = read.raw.get("block_structure")
    if value is None:
        return (0, 0)
    if isinstance(value, str):  # older files: "128x128"
        parts = value.split("x")
        value = [int(p) for p in parts if p.isascii() and p.isdigit() and len(p) < 8]
        value = value if len(value) == len(parts) else None
    good = isinstance(value, list | tuple) and len(value) == 2
    if not good or not all(type(v) is int and v > 0 for v in value):
        raise read.fail("block_structure", "two positive integers", "List rows, columns.")
    return (value[0], value[1])


def _dynamic(read: Fields) -> bool | Literal["local"]:
    value = read.raw.get("dynamic")
    if isinstance(value, str) and value.lower() == "local":
        return "local"
    return bool(read.flag("dynamic"))


def _actorder(read: Fields) -> Literal["", "weight", "group"]:
    if isinstance(read.raw.get("actorder"), bool):
        return "group" if read.flag("actorder") else ""
    name = _choice(read, "actorder", ("weight", "static", "group", "dynamic"))
    if name is None:
        return ""
    return "group" if name in ("group", "dynamic") else "weight"


def _zp_dtype(read: Fields) -> str:
    name = (read.text("zp_dtype") or "").removeprefix("torch.")
    return name if name in SCALE_ELEMENTS else ""


def parse_args(
    raw: Mapping[str, Any], file: str, where: str, unknown: list[str] | None = None
) -> QuantArgs:
    """Checked arguments.

    Args:
        raw: parsed JSON, not changed.
        where: path inside the config, for messages.
        unknown: gets the keys that are not known.

    Raises:
        ConfigError: ``Q-CFG-TYPE``, ``Q-CFG-VALUE``, ``Q-CFG-CONFLICT``.
    """
    if not isinstance(raw, Mapping):
        fix = "Restore the config the tool wrote."
        raise bad_value(file, where, raw, "an object of arguments", fix, "Q-CFG-TYPE")
    if unknown is not None:
        unknown += [f"{where}.{k}" for k in raw if k not in _KEYS]
    read = Fields(raw, file, f"{where}.", "compressed_tensors")
    kind = _choice(read, "type", ("int", "float")) or "int"
    size = None if raw.get("group_size") is None else read.group_size()
    block = _block(read)
    strategy = _choice(read, "strategy", STRATEGIES)
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    grouped = strategy in _GROUPED
    if grouped != (size is not None and size > 0):
        fix = "Strategy and group_size must be those the tensors were made with."
        expected = f"{'a positive size' if grouped else 'none'} with strategy {strategy!r}"
        raise read.fail("group_size", expected, fix, "Q-CFG-CONFLICT")
    if (strategy == "block") != (block != (0, 0)):
        fix = "Give rows and columns with strategy 'block', and only there."
        raise read.fail("block_structure", f"to fit strategy {strategy!r}", fix, "Q-CFG-CONFLICT")
    symmetric = read.flag("symmetric")
    return QuantArgs(
        bits=_bits(read, kind),
        kind=kind,  # type: ignore[arg-type]
        symmetric=symmetric is not False,
        strategy=strategy,
        group_size=size if grouped and size else 0,
        block=block,
        dynamic=_dynamic(read),
        actorder=_actorder(read),
        scale_dtype=(read.text("scale_dtype") or "").removeprefix("torch."),
        zp_dtype="" if symmetric is not False else _zp_dtype(read),
    )


# -------------------------------------------------------------------------------------- presets

_Preset = dict[str, dict[str, Any]]
_TOKEN = {"strategy": "token", "dynamic": True}


def _int(bits: int, act_bits: int = 16, **weights: Any) -> _Preset:
    scheme: _Preset = {"weights": {"num_bits": bits, "strategy": "group", "group_size": 128}}
    scheme["weights"] |= weights
    if act_bits < 16:
        scheme["input_activations"] = {"num_bits": act_bits, **_TOKEN}
    return scheme


def _float(bits: int, strategy: str, **keys: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "strategy": strategy, **keys}


def _mx(bits: int, **keys: Any) -> dict[str, Any]:
    return _float(bits, "group", group_size=32, scale_dtype="torch.uint8", **keys)


_NV = _float(4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
_CHANNEL = {"num_bits": 8, "strategy": "channel"}

PRESETS: Mapping[str, _Preset] = {
    **{f"W{b}A16": _int(b) for b in INT_BITS},
    **{f"W{b}A8": _int(b, 8) for b in INT_BITS if b < 8},
    **{f"W{b}A4": _int(b, 4) for b in (2, 3, 4)},
    "UNQUANTIZED": {},
    "W4A16_ASYM": _int(4, symmetric=False),
    "W8A8": {"weights": _CHANNEL, "input_activations": {"num_bits": 8, **_TOKEN}},
    "INT8": {"weights": _CHANNEL, "input_activations": {"num_bits": 8, **_TOKEN}},
    "W4AFP8": _int(4) | {"input_activations": _float(8, "token", dynamic=True)},
    "FP8": {"weights": _float(8, "tensor"), "input_activations": _float(8, "tensor")},
    "FP8_DYNAMIC": {
        "weights": _float(8, "channel"),
        "input_activations": _float(8, "token", dynamic=True),
    },
    "FP8_BLOCK": {
        "weights": _float(8, "block", block_structure=[128, 128]),
        "input_activations": _float(8, "group", group_size=128, dynamic=True),
    },
    "NVFP4A16": {"weights": _NV},
    "NVFP4": {"weights": _NV, "input_activations": {**_NV, "dynamic": "local"}},
    "MXFP4A16": {"weights": _mx(4)},
    "MXFP4": {"weights": _mx(4), "input_activations": _mx(4, dynamic=True)},
    "MXFP8A16": {"weights": _mx(8)},
    "MXFP8": {"weights": _mx(8), "input_activations": _mx(8, dynamic=True)},
}
"""Preset name -> the keys it stands for, in the words of a config group."""
