"""The small tensors that describe one HQQ weight: numbers, flags and texts encoded as tensors.

    nbits, group_size, axis          int32 []
    shape                            int64 [2]
    packing, compute_dtype,          uint8 [length]: the text, one byte a character
    unpack_view_dtype
    quant_scale, quant_zero,         uint8 []: 0 or 1
    view_as_float, round_zero, ...

They are read while planning, kept as bytes, and written back as they are.

Source: hqq 0.2.8.post1 ``core/quantize.py`` (HQQLinear.state_dict), ``core/utils.py``
(encode_safetensor_type).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable
from quant_core.spec import TensorInfo

__all__ = ["NAMES", "PACKINGS", "Meta", "WordOrder", "read_meta"]

NAMES = frozenset(
    """
    nbits group_size shape axis packing view_as_float unpack_view_dtype compute_dtype quant_scale
    quant_zero channel_wise optimize round_zero offload_meta stores_quant_config encoded_state_dict
    """.split()
)
_FORMATS = {"int32": "<i", "int64": "<q", "uint8": "<B", "float32": "<f", "int16": "<h"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WordOrder:
    """How codes share a word: equal parts of the rows, the first part in the highest bits."""

    word: str
    shifts: tuple[int, ...]


PACKINGS = {
    "8bit_u8": WordOrder(word="uint8", shifts=(0,)),
    "4bit_u8": WordOrder(word="uint8", shifts=(4, 0)),
    "3bit_32": WordOrder(word="int32", shifts=tuple(range(27, -1, -3))),
    "2bit_u8": WordOrder(word="uint8", shifts=(6, 4, 2, 0)),
    "1bit_u8": WordOrder(word="uint8", shifts=tuple(range(7, -1, -1))),
}
_BITS = {
    "8bit_u8": (5, 6, 7, 8),
    "4bit_u8": (4,),
    "3bit_32": (3,),
    "2bit_u8": (2,),
    "1bit_u8": (1,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What the small tensors say, checked, and the tensors themselves.

    Attributes:
        shape: (N, K).
        group_size: consecutive weights of the flattened matrix that share scale and zero.
        stored: (name, dtype, shape, bytes) of each, to write them back.
    """

    bits: int
    group_size: int
    shape: tuple[int, int]
    packing: str
    stored: tuple[tuple[str, str, tuple[int, ...], bytes], ...] = ()

    @property
    def rows(self) -> int:
        """Groups of the matrix: rows of scale and zero."""
        return self.shape[0] * self.shape[1] // self.group_size

    @property
    def order(self) -> WordOrder:
        return PACKINGS[self.packing]

    @property
    def word_rows(self) -> int:
        """Rows of words: the rows of codes divided among the parts of a word."""
        return -(-self.rows // len(self.order.shifts))


class _Reader:
    """Typed values of one module's small tensors."""

    def __init__(self, path: str, leaves: Mapping[str, TensorInfo], checkpoint: Checkpoint) -> None:
        self.path, self.leaves, self.checkpoint = path, leaves, checkpoint
        self.raw = {n: checkpoint.read_bytes(f"{path}.{n}") for n in leaves if n in NAMES}

    def fail(self, name: str, found: object, expected: str, fix: str) -> ConfigError:
        where = f"{self.path}.{name}"
        return ConfigError(
            f"{where} is {printable(repr(found), 60)}, expected {expected}. {fix}",
            code="Q-CFG-VALUE",
            path=self.leaves[name].file if name in self.leaves else None,
            tensor=where,
            expected=expected,
            actual=found,
            plugin="hqq",
        )

    def numbers(self, name: str) -> tuple[int | float, ...]:
        info = self.leaves.get(name)
        if info is None:
            where = f"{self.path}.{name}"
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {printable(where)!r} is missing, expected it "
                "beside W_q. The checkpoint is incomplete; download or export it again.",
                code="Q-TENSOR-MISSING",
                path=self.checkpoint.path,
                tensor=where,
                plugin="hqq",
            )
        form = _FORMATS.get(info.dtype)
        if form is None:
            raise self.fail(name, info.dtype, "a number", "Export the checkpoint again.")
        return tuple(v[0] for v in struct.iter_unpack(form, self.raw[name]))

    def integer(self, name: str, low: int, high: int) -> int:
        found = self.numbers(name)
        if len(found) != 1 or not isinstance(found[0], int) or not low <= found[0] <= high:
            expected = f"an integer from {low} to {high}"
            raise self.fail(name, found, expected, "Export the checkpoint again.")
        return found[0]

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.integer(name, 0, 1)) if name in self.leaves else default

    def text(self, name: str) -> str:
        self.numbers(name)
        return self.raw[name].decode("ascii", "replace")


def read_meta(path: str, leaves: Mapping[str, TensorInfo], checkpoint: Checkpoint) -> Meta:
    """The checked description of the weight stored at ``path``.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``.
        ConfigError: ``Q-CFG-VALUE`` for values that are wrong or not supported.
        LayoutError: ``Q-LAYOUT-GROUP`` if the groups do not divide the matrix.
    """
    read = _Reader(path, leaves, checkpoint)
    again = "Quantize again with axis=1 and float scales and zeros."
    for name, wanted in (("quant_scale", False), ("quant_zero", False), ("channel_wise", True)):
        if read.flag(name, wanted) != wanted:
            raise read.fail(name, int(not wanted), str(int(wanted)), again)
    if read.integer("axis", 0, 1) == 0:
        raise read.fail("axis", 0, "1 (groups along the input)", again)
    bits, packing = read.integer("nbits", 1, 8), read.text("packing")
    if bits not in _BITS.get(packing, ()):
        expected = f"one of {sorted(PACKINGS)} that fits nbits={bits}"
        raise read.fail("packing", packing, expected, "Export the checkpoint again.")
    sizes = read.numbers("shape")
    if len(sizes) != 2 or any(type(s) is not int or not 0 < s < 1 << 40 for s in sizes):
        raise read.fail("shape", sizes, "two sizes", "Only matrices are read.")
    n, k = int(sizes[0]), int(sizes[1])
    group = read.integer("group_size", 1, 1 << 20) if "group_size" in leaves else k
    if n * k % group:
        raise LayoutError(
            f"{path}: {n} x {k} weights are no whole number of groups of {group}, expected "
            "group_size to divide them. The checkpoint is damaged; export it again.",
            code="Q-LAYOUT-GROUP",
            tensor=path,
            expected="a divisor",
            actual=group,
            plugin="hqq",
        )
    stored = tuple(
        (name, leaves[name].dtype, leaves[name].shape, raw) for name, raw in read.raw.items()
    )
    return Meta(bits=bits, group_size=group, shape=(n, k), packing=packing, stored=stored)
