"""What the header of the file says of one weight: its class, its blocks, its activations.

    "model.layers.0.mlp.up_proj.weight":
      {"_type": "IntxUnpackedToInt8Tensor",
       "_data": {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "block_size": [1, 32],
                 "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
                 "activation_quantization": null},
       "_tensor_data_names": ["qdata", "scale", "zero_point"]}

Objects are read as data; names in them select from fixed lists and never a class to import.

Source: torchao 0.18.0 ``prototype/safetensors/safetensors_utils.py``, ``safetensors_support.py``,
``quantization/quantize_/workflows/{int8,intx,float8}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, ConfigError, printable
from quant_core.spec import CHANNEL, TENSOR, Element, Grain, QuantSpec, Scale, Zero

__all__ = ["SUPPORTED", "Entry", "float8_inputs", "int8_inputs", "read_entry"]

SUPPORTED = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_EPS = 2.0**-23  # least scale of an activation: torch.finfo(torch.float32).eps
_FLOATS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
_INTS = {f"int{bits}": bits for bits in range(1, 9)}
_MAX_TEXT = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One checked entry.

    Attributes:
        kind: class of the weight, one of ``SUPPORTED``.
        bits: of an integer weight; 8 for floats.
        block: (rows, columns) that share a scale; () where the scale's shape tells.
        parts: names of the stored tensors: "qdata", "scale", "zero_point".
        inputs: what quantized activations mean; None if they stay floats.
    """

    kind: str
    bits: int = 8
    block: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()
    inputs: QuantSpec | None = None

    def grain(self, shape: tuple[int, int], scale: tuple[int, ...]) -> Grain:
        """Grain of the scales.

        Args:
            shape: (N, K) of the weight.
            scale: stored shape of the scale.
        """
        n, k = shape
        sizes = self.block
        if not sizes and len(scale) == 2 and all(scale):
            sizes = (n // scale[0], k // scale[1])
        r, c = sizes if sizes else (n, k)
        if (r, c) == (n, k) and not (r == 1 and n == 1):
            return TENSOR
        return CHANNEL if (r, c) == (1, k) else (r, c)


class _Data:
    """Values of one entry, each checked."""

    def __init__(self, name: str, file: str, raw: Mapping[str, Any]) -> None:
        self.name, self.file, self.raw = name, file, raw

    def fail(self, key: str, expected: str, code: str = "Q-CFG-VALUE") -> ConfigError:
        found = self.raw.get(key)
        return ConfigError(
            f"{self.file}: {key} of {printable(self.name)!r} is {printable(repr(found), 60)}, "
            f"expected {expected}. Export with a supported recipe.",
            code=code,
            path=self.file,
            tensor=self.name,
            expected=expected,
            actual=found,
            plugin="torchao",
        )

    def tagged(self, key: str) -> tuple[str, Any]:
        """An object {"_type", "_data"}; ("", None) for null."""
        value = self.raw.get(key)
        if value is None:
            return "", None
        if not isinstance(value, Mapping) or not isinstance(value.get("_type"), str):
            raise self.fail(key, "an object of _type and _data")
        return value["_type"], value.get("_data")

    def block(self) -> tuple[int, ...]:
        value = self.raw.get("block_size")
        if value is None or value == []:
            return ()
        good = isinstance(value, list) and all(type(v) is int and 0 < v < 1 << 40 for v in value)
        if not good or len(value) != 2:
            raise self.fail("block_size", "two sizes (a matrix)")
        return (value[0], value[1])


def _per_row(data: _Data, key: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether an activation's granularity is one scale a token (else one for all)."""
    granularity = kwargs.get("granularity")
    kind = granularity.get("_type") if isinstance(granularity, Mapping) else None
    options = granularity.get("_data") if isinstance(granularity, Mapping) else None
    dim = options.get("dim", -1) if isinstance(options, Mapping) else -1
    if kind not in ("PerRow", "PerTensor") or dim != -1:
        raise data.fail(key, "a granularity of PerRow or PerTensor")
    return bool(kind == "PerRow")


def _int8_inputs(data: _Data) -> QuantSpec | None:
    key = "act_quant_kwargs"
    kind, kwargs = data.tagged(key)
    if not kind:
        return None
    if kind != "QuantizeTensorToInt8Kwargs" or not isinstance(kwargs, Mapping):
        raise data.fail(key, "QuantizeTensorToInt8Kwargs or null")
    mapping = kwargs.get("mapping_type")
    name = mapping.get("_data") if isinstance(mapping, Mapping) else "SYMMETRIC"
    if name not in ("SYMMETRIC", "ASYMMETRIC") or kwargs.get("reduce_range"):
        raise data.fail(key, "a full range and mapping_type SYMMETRIC or ASYMMETRIC")
    return int8_inputs(_per_row(data, key, kwargs), symmetric=name == "SYMMETRIC")


def int8_inputs(per_row: bool, *, symmetric: bool) -> QuantSpec:
    """int8 activations; symmetric: max|x| is 127.5, half the range."""
    grain = CHANNEL if per_row else TENSOR
    peak = 127.5 if symmetric else 0.0
    scale = Scale(element="f32", grain=grain, static=False, peak=peak, least=_EPS)
    zero = None if symmetric else Zero(kind="code", element="int8")
    return QuantSpec(element=Element.int(8), scales=(scale,), zero=zero)


def _intx_inputs(data: _Data) -> QuantSpec | None:
    key = "activation_quantization"
    value = data.raw.get(key, data.raw.get("apply_int8_act_asym_per_token_quant"))
    if isinstance(value, Mapping):
        value = value.get("_data")
    if value in (None, False):
        return None
    if value is not True and str(value).lower() != "int8_asym_per_token":
        raise data.fail(key, "int8_asym_per_token or null")
    return int8_inputs(True, symmetric=False)


def _float8_inputs(data: _Data) -> QuantSpec | None:
    key = "act_quant_kwargs"
    kind, kwargs = data.tagged(key)
    if not kind:
        return None
    if kind != "QuantizeTensorToFloat8Kwargs" or not isinstance(kwargs, Mapping):
        raise data.fail(key, "QuantizeTensorToFloat8Kwargs or null")
    dtype = kwargs.get("float8_dtype")
    name = dtype.get("_data") if isinstance(dtype, Mapping) else "float8_e4m3fn"
    bounds = [kwargs.get(b) for b in ("hp_value_lb", "hp_value_ub")]
    if name not in _FLOATS or bounds != [None, None]:
        raise data.fail(key, f"a type of {tuple(_FLOATS)} without bounds")
    return float8_inputs(_FLOATS[name], per_row=_per_row(data, key, kwargs))


def float8_inputs(element: str, *, per_row: bool) -> QuantSpec:
    """fp8 activations, one scale a token or one for all."""
    return QuantSpec(
        element=Element(name=element, bits=8, kind="float"),
        scales=(Scale(element="f32", grain=CHANNEL if per_row else TENSOR, static=False),),
    )


def _parse(name: str, file: str, text: object) -> Mapping[str, Any]:
    try:
        if not isinstance(text, str) or len(text) > _MAX_TEXT:
            raise ValueError("no entry" if text is None else "not a short text")
        value = json.loads(text)
        if not isinstance(value, Mapping) or not isinstance(value.get("_type"), str):
            raise ValueError("no object with _type")
    except (ValueError, RecursionError) as err:
        raise CheckpointError(
            f"{file}: the header's metadata for {printable(name)!r} is unreadable "
            f"({printable(err)}), expected a JSON object that names its class. The file was "
            "rewritten by another tool; export it again.",
            code="Q-CKPT-HEADER",
            path=file,
            tensor=name,
            expected="JSON object",
            actual=printable(text, 40),
            plugin="torchao",
        ) from err
    return value


def read_entry(name: str, checkpoint: Checkpoint, file: str) -> Entry:
    """The checked entry of the parameter ``name``.

    Raises:
        CheckpointError: ``Q-CKPT-HEADER`` if there is none or it is malformed.
        ConfigError: ``Q-CFG-VALUE`` for what is not supported, ``Q-CFG-TRANSFORM`` for a scale of
            the activations.
    """
    entry = _parse(name, file, checkpoint.metadata.get(name))
    kind, inner = entry["_type"], entry.get("_data")
    data = _Data(name, file, inner if isinstance(inner, Mapping) else {})
    if kind not in SUPPORTED:
        raise ConfigError(
            f"{file}: {printable(name)!r} is a {printable(kind)}, expected one of {SUPPORTED}. "
            "Its layout belongs to a kernel or is not read yet; export with another recipe.",
            code="Q-CFG-VALUE",
            path=file,
            tensor=name,
            expected=SUPPORTED,
            actual=kind,
            plugin="torchao",
        )
    parts = entry.get("_tensor_data_names")
    if not isinstance(parts, list) or not all(isinstance(p, str) for p in parts):
        data = _Data(name, file, entry)
        raise data.fail("_tensor_data_names", "a list of names")
    if "act_pre_scale" in parts:
        raise ConfigError(
            f"{file}: {printable(name)!r} carries act_pre_scale, a scale of the activations, "
            "expected none. It is not applied yet, and without it results are wrong; export "
            "without it.",
            code="Q-CFG-TRANSFORM",
            path=file,
            tensor=name,
            actual="act_pre_scale",
            plugin="torchao",
        )
    known = {"qdata", "scale"} | ({"zero_point"} if kind != "Float8Tensor" else set())
    if not {"qdata", "scale"} <= set(parts) <= known:
        data = _Data(name, file, entry)
        raise data.fail("_tensor_data_names", f"qdata, scale, and none beyond {sorted(known)}")
    bits, inputs = 8, None
    if kind == "Int8Tensor":
        inputs = _int8_inputs(data)
    elif kind == "Float8Tensor":
        inputs = _float8_inputs(data)
    else:
        dtype = data.tagged("target_dtype")[1]
        if dtype not in _INTS:
            raise data.fail("target_dtype", "int1 to int8")
        bits, inputs = _INTS[dtype], _intx_inputs(data)
    return Entry(kind=kind, bits=bits, block=data.block(), parts=tuple(parts), inputs=inputs)
