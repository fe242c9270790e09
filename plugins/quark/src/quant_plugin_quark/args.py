"""How one operand is quantized: a JSON object of the config to a frozen dataclass.

    {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "is_dynamic": true,
     "scale_format": "e8m0", "scale_calculation_mode": "even", "symmetric": null, ...}

An operand holds one such object, or a list of two: codes whose scales are quantized once more
(NVFP4), or values quantized twice (int4 under fp8). A layer holds four operands: ``weight``,
``input_tensors``, ``output_tensors``, ``bias``.

Source: amd-quark 0.13 ``torch/quantization/config/{config,type}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import ConfigError, printable
from quant_core.fields import Fields
from quant_core.spec import CHANNEL, TENSOR, Element, Grain, group

__all__ = ["ELEMENTS", "PLAIN", "LayerArgs", "TensorArgs", "bad_value", "parse_layer"]


def _float(name: str, bits: int) -> Element:
    return Element(name=name, bits=bits, kind="float")


ELEMENTS: Mapping[str, Element] = {
    "int8": Element.int(8),
    "uint8": Element.uint(8),
    "int4": Element.int(4),
    "uint4": Element.uint(4),
    "uint2": Element.uint(2),
    "fp8_e4m3": _float("fp8_e4m3", 8),
    "fp8_e5m2": _float("fp8_e5m2", 8),
    "fp6_e2m3": _float("fp6_e2m3", 6),
    "fp6_e3m2": _float("fp6_e3m2", 6),
    "fp4": _float("fp4_e2m1", 4),
}
"""dtype of the config -> the element it stands for."""
PLAIN = ("float32", "float16", "bfloat16")
"""dtypes that leave an operand as it is."""
_QSCHEMES = ("per_tensor", "per_channel", "per_group", "per_block")
_MODES = ("even", "floor", "ceil")
_KEYS = frozenset(
    "dtype observer_cls is_dynamic qscheme ch_axis group_size block_size symmetric round_method "
    "scale_type scale_format scale_calculation_mode zero_point_type mx_element_dtype "
    "is_scale_quant enable_buffer_reuse max_input_numel qat_spec".split()
)
_LAYER_KEYS = frozenset("weight bias input_tensors output_tensors target_device".split())
_MAX_BLOCK = 1 << 20


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
        plugin="quark",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorArgs:
    """One quantization of one operand."""

    dtype: str  # a key of ELEMENTS
    qscheme: str
    group_size: int = 0  # of per_group
    block: tuple[int, int] = (0, 0)  # of per_block: rows, columns
    axis: int | None = None  # of per_channel and per_group
    dynamic: bool = False
    symmetric: bool = True
    e8m0: bool = False  # scales are powers of two, stored as bytes
    mode: str = "even"  # how a power of two is chosen at run time
    float_zero: bool = False  # zero points are floats
    of_scales: bool = False  # quantizes the scales of the entry before

    @property
    def element(self) -> Element:
        return ELEMENTS[self.dtype]

    @property
    def grain(self) -> Grain:
        """Of a weight's scale, or an activation's: per channel is per token there."""
        if self.qscheme == "per_tensor":
            return TENSOR
        if self.qscheme == "per_channel":
            return CHANNEL
        return self.block if self.qscheme == "per_block" else group(self.group_size)

    @property
    def label(self) -> str:
        """Short text for messages: ``uint4 per_group(128) asymmetric``."""
        size = f"({self.group_size})" if self.group_size else ""
        size = f"{list(self.block)}" if self.qscheme == "per_block" else size
        parts = [self.dtype, f"{self.qscheme}{size}"]
        parts += ["e8m0"] if self.e8m0 else []
        parts += [] if self.symmetric else ["asymmetric"]
        parts += ["run-time"] if self.dynamic else []
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The object that ``parse_layer`` reads back."""
        return {
            "dtype": self.dtype,
            "qscheme": self.qscheme,
            "group_size": self.group_size or None,
            "block_size": list(self.block) if self.qscheme == "per_block" else None,
            "ch_axis": self.axis,
            "is_dynamic": self.dynamic,
            "symmetric": self.symmetric,
            "round_method": "half_even",
            "scale_type": "float",
            "scale_format": "e8m0" if self.e8m0 else None,
            "scale_calculation_mode": self.mode if self.e8m0 else None,
            "zero_point_type": "float32" if self.float_zero else "int32",
            "is_scale_quant": self.of_scales,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerArgs:
    """What the config says of one layer. Empty weights: stored as floats."""

    where: str  # path inside the config
    weight: tuple[TensorArgs, ...] = ()
    inputs: tuple[TensorArgs, ...] = ()
    outputs: tuple[TensorArgs, ...] = ()  # right for keys and values only
    bias: bool = False

    def to_json(self) -> dict[str, Any]:
        """The object that ``parse_layer`` reads back."""

        def operand(args: tuple[TensorArgs, ...]) -> Any:
            listed = [a.to_json() for a in args]
            return listed if len(listed) > 1 else listed[0] if listed else None

        return {
            "weight": operand(self.weight),
            "input_tensors": operand(self.inputs),
            "output_tensors": operand(self.outputs),
            "bias": None,
            "target_device": None,
        }

    @property
    def label(self) -> str:
        """Short text for messages."""
        weight = " + ".join(a.label for a in self.weight) or "float"
        return f"{weight} with inputs {' + '.join(a.label for a in self.inputs) or 'float'}"


def _choice(read: Fields, key: str, allowed: tuple[str, ...], fix: str) -> str | None:
    value = read.text(key)
    if value is not None and value not in allowed:
        raise read.fail(key, f"one of {', '.join(allowed)}", fix)
    return value


def _group_size(read: Fields, qscheme: str) -> int:
    size = read.integer("group_size", 1, _MAX_BLOCK)
    if qscheme == "per_group" and size is None:
        raise read.fail("group_size", "a size with per_group", "Restore it.", "Q-CFG-CONFLICT")
    return size if qscheme == "per_group" and size else 0


def _block(read: Fields, qscheme: str) -> tuple[int, int]:
    value: Any = read.raw.get("block_size")
    if qscheme != "per_block":
        return (0, 0)
    good = isinstance(value, list | tuple) and len(value) == 2
    if not good or not all(type(v) is int and 0 < v <= _MAX_BLOCK for v in value):
        raise read.fail("block_size", "two positive integers with per_block", "Restore it.")
    return (value[0], value[1])


def _tensor(raw: Any, file: str, where: str, unknown: list[str]) -> TensorArgs | None:
    """One entry; None for a float dtype."""
    if not isinstance(raw, Mapping):
        fix = "Restore the config the tool wrote."
        raise bad_value(file, where, raw, "an object", fix, "Q-CFG-TYPE")
    unknown += [f"{where}.{k}" for k in raw if k not in _KEYS]
    read = Fields(raw, file, f"{where}.", "quark")
    dtype = read.text("dtype")
    if dtype in PLAIN:
        return None
    if dtype is None or dtype not in ELEMENTS:
        fix = "Export the model with a dtype that is supported."
        if dtype == "mx":
            fix = "Exponents between the codes (the older mx export) are not read; export as fp4."
        raise read.fail("dtype", f"one of {', '.join((*ELEMENTS, *PLAIN))}", fix)
    restore = "Restore the value the tool wrote."
    qscheme = _choice(read, "qscheme", _QSCHEMES, restore)
    if qscheme is None:
        raise read.fail("qscheme", f"one of {', '.join(_QSCHEMES)}", restore)
    known = ("float", "float32", "float16", "bfloat16", "float64", "float8_e8m0fnu")
    kind = _choice(read, "scale_type", known, "Export with float or power-of-two scales.")
    form = _choice(read, "scale_format", ("float32", "e8m0"), "Export with float or e8m0 scales.")
    mode = _choice(read, "scale_calculation_mode", _MODES, restore)
    zero = read.text("zero_point_type")
    dynamic, symmetric = bool(read.flag("is_dynamic")), read.flag("symmetric")
    rounding = read.text("round_method")
    if rounding not in (None, "half_even") and dtype.removeprefix("u").startswith("int"):
        raise read.fail("round_method", "'half_even'", "Other rounding is not supported.")
    return TensorArgs(
        dtype=dtype,
        qscheme=qscheme,
        group_size=_group_size(read, qscheme),
        block=_block(read, qscheme),
        axis=read.integer("ch_axis", -4, 4),
        dynamic=dynamic,
        symmetric=symmetric is not False,
        e8m0=form == "e8m0" or kind == "float8_e8m0fnu",
        mode=mode or "even",
        float_zero=zero == "float32",
        of_scales=bool(read.flag("is_scale_quant")),
    )


def _operand(raw: Any, file: str, where: str, unknown: list[str]) -> tuple[TensorArgs, ...]:
    if raw is None:
        return ()
    many = raw if isinstance(raw, list | tuple) else (raw,)
    names = [where] if many is not raw else [f"{where}[{i}]" for i in range(len(many))]
    parsed = [_tensor(one, file, n, unknown) for one, n in zip(many, names, strict=True)]
    out = tuple(args for args in parsed if args is not None)
    if (len(out) != len(parsed) and out) or len(out) > 2:
        fix = "Export with one quantization, or with two."
        raise bad_value(file, where, f"a list of {len(many)}", "one or two quantizations", fix)
    return out


def parse_layer(raw: Any, file: str, where: str, unknown: list[str]) -> LayerArgs:
    """Checked arguments of one layer.

    Args:
        raw: parsed JSON, not changed; None = nothing is quantized.
        where: path inside the config, for messages.
        unknown: gets the keys that are not known.

    Raises:
        ConfigError: ``Q-CFG-TYPE``, ``Q-CFG-VALUE``, ``Q-CFG-CONFLICT``.
    """
    if raw is None:
        return LayerArgs(where=where)
    if not isinstance(raw, Mapping):
        fix = "Restore the config the tool wrote."
        raise bad_value(file, where, raw, "an object", fix, "Q-CFG-TYPE")
    unknown += [f"{where}.{k}" for k in raw if k not in _LAYER_KEYS]
    operand = {
        key: _operand(raw.get(key), file, f"{where}.{key}", unknown)
        for key in ("weight", "input_tensors", "output_tensors", "bias")
    }
    return LayerArgs(
        where=where,
        weight=operand["weight"],
        inputs=operand["input_tensors"],
        outputs=operand["output_tensors"],
        bias=bool(operand["bias"]),
    )
