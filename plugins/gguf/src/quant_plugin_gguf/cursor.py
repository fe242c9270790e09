"""A bounded cursor over the header of a GGUF file, and arrays that are decoded when asked for.

Bytes are read with ``pread`` in growing steps, so that memory follows the header and not the
file. Every count is compared with the bytes that are left before anything loops over it.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from typing import Any, overload

from quant_core.checkpoint.files import OpenFile
from quant_core.errors import CheckpointError, LimitError, QuantError, printable

__all__ = ["DAMAGED", "Cursor", "LazyArray", "type_name"]

DAMAGED = "The file is damaged or was not written by a GGUF tool; download it again."
MAX_HEADER_BYTES = 1 << 30  # real headers are a few MB, most of it the vocabulary
_FIRST_READ = 64 << 10
_WINDOW = 256 << 10  # bytes in which strings are told at once
_SINGLE = 64  # strings that are read one by one where they cannot be
_ARRAY, _STRING = 9, 8

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64")
_U32, _U64 = _SCALARS[4], _SCALARS[10]


def type_name(kind: int) -> str:
    """Name of a metadata value type, for messages."""
    names = (*_NAMES, "f64")
    return names[kind] if kind < len(names) else str(kind)


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="backslashreplace")


class LazyArray(Sequence[Any]):
    """A metadata array that keeps its stored bytes and decodes them on first use.

    A tokenizer's vocabulary has some 100 k strings, which quant-core never reads.
    """

    __slots__ = ("_count", "_data", "_items", "kind")

    def __init__(self, kind: int, count: int, data: bytes) -> None:
        self.kind, self._count, self._data = kind, count, data
        self._items: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.items()[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.items() == tuple(other)

    def __hash__(self) -> int:
        return hash((self.kind, self._count, self._data))

    def __repr__(self) -> str:
        return f"<{self._count} x {type_name(self.kind)}>"

    def items(self) -> tuple[Any, ...]:
        """All values; strings that are no UTF-8 show their bytes as backslash escapes."""
        if self._items is None:
            if self.kind == _STRING:
                out, at, data = [], 0, self._data
                for _ in range(self._count):
                    end = at + 8 + _U64.unpack_from(data, at)[0]
                    out.append(_text(data[at + 8 : end]))
                    at = end
                self._items = tuple(out)
            else:
                self._items = tuple(v for (v,) in _SCALARS[self.kind].iter_unpack(self._data))
        return self._items


def _leap(buffer: bytearray, at: int, count: int) -> tuple[int, int]:
    """Past as many of ``count`` strings as can be told at once; (offset, strings that are left).

    Lengths below 256 show by their seven zero bytes. Where every place that looks like a length is
    the one that the length before it leads to, those are the lengths; what else there may be
    (longer or empty strings, zeros inside of one) is left to the caller. Needs numpy, and does
    nothing where nobody has loaded it: a header is opened without.
    """
    np = sys.modules.get("numpy")
    data = buffer[at : at + _WINDOW]
    if np is None or len(data) < 8:
        return at, count
    values = np.frombuffer(data, dtype=np.uint8)
    zero = values == 0
    known = zero[1:-6].copy()
    for i in range(2, 8):
        known &= zero[i : len(zero) - 7 + i]
    places = np.flatnonzero(known)
    if not len(places) or places[0]:
        return at, count
    ends = places + 8 + values[places]
    broken = np.flatnonzero(ends[:-1] != places[1:])
    told = int(broken[0]) + 1 if len(broken) else len(places)
    told = min(told, count) - int(ends[min(told, count) - 1] > len(data))
    return (at + int(ends[told - 1]), count - told) if told else (at, count)


class Cursor:
    """Reads values one after another. ``what`` names the current item in messages."""

    def __init__(self, file: OpenFile) -> None:
        self.file, self.size, self.path = file, file.state.size, file.path
        self.at = 0
        self.what = "header"
        self._buffer = bytearray()

    # ------------------------------------------------------------------------------- errors

    def fault(
        self, code: str, found: str, wanted: str, fix: str = DAMAGED, /, **parts: Any
    ) -> QuantError:
        """An error at the current item and offset; ``parts`` are attributes of the error."""
        kind = LimitError if code.startswith("Q-LIMIT") else CheckpointError
        return kind(
            f"{printable(self.path)}: {self.what} at byte {self.at}: {found}, expected {wanted}. "
            f"{fix}",
            code=code,
            path=self.path,
            tensor=self.what,
            **parts,
        )

    def bad_value(self, found: str, wanted: str, /, **parts: Any) -> QuantError:
        return self.fault("Q-GGUF-KV", found, wanted, DAMAGED, **parts)

    def _short(self, need: int) -> QuantError:
        return self.fault(
            "Q-CKPT-TRUNCATED",
            f"the header needs {need} more bytes, the file of {self.size} bytes has "
            f"{self.size - self.at} left",
            "a whole header",
            "The file was cut short; download it again.",
            expected=self.at + need,
            actual=self.size,
        )

    # -------------------------------------------------------------------------------- bytes

    @property
    def left(self) -> int:
        return self.size - self.at

    def _need(self, count: int) -> None:
        """Have ``count`` bytes from the current place in the buffer."""
        end = self.at + count
        if end <= len(self._buffer):
            return
        if end > self.size:
            raise self._short(count)
        if end > MAX_HEADER_BYTES:
            raise self.fault(
                "Q-LIMIT-HEADER",
                f"the header reaches byte {end}",
                f"at most {MAX_HEADER_BYTES}",
                "No known model needs this; the file is damaged.",
                expected=MAX_HEADER_BYTES,
                actual=end,
            )
        have = len(self._buffer)
        more = 8 if have == _FIRST_READ else 2  # a vocabulary begins
        target = min(self.size, max(end, more * have, _FIRST_READ))
        grown = bytearray(target)
        grown[:have] = self._buffer
        if self.file.read_into(memoryview(grown)[have:], have) < target - have:
            raise self._short(count)
        self._buffer = grown

    def buffered(self, count: int) -> tuple[bytearray | None, int]:
        """What has been read, and the current place in it; None with less than ``count`` left."""
        return (self._buffer if self.at + count <= len(self._buffer) else None), self.at

    def take(self, count: int) -> bytes:
        self._need(count)
        self.at += count
        return self._bytes(self.at - count)

    def _bytes(self, start: int) -> bytes:
        """From ``start`` to the current place; copied once."""
        with memoryview(self._buffer) as whole, whole[start : self.at] as part:
            return bytes(part)

    def u32(self) -> int:
        return self._scalar(_U32)

    def u64(self) -> int:
        return self._scalar(_U64)

    def _scalar(self, form: struct.Struct) -> Any:
        self._need(form.size)
        (value,) = form.unpack_from(self._buffer, self.at)
        self.at += form.size
        return value

    # ------------------------------------------------------------------------------- values

    def string(self, limit: int) -> str:
        """A length-prefixed string of at most ``limit`` bytes."""
        return _text(self._string_bytes(limit))

    def _string_bytes(self, limit: int) -> bytes:
        length = self.u64()
        if length > min(limit, self.size):
            raise self.bad_value(
                f"a string of {length} bytes",
                f"at most {min(limit, self.size)}",
                expected=limit,
                actual=length,
            )
        return self.take(length)

    def value(self, kind: int) -> Any:
        """A metadata value: a scalar, a string, or an array."""
        if kind == _STRING:
            return self.string(self.size)
        if kind == _ARRAY:
            return self._array()
        form = _SCALARS.get(kind)
        if form is None:
            raise self.bad_value(f"value type {kind}", "a type from 0 to 12", actual=kind)
        return self._scalar(form)

    def _array(self) -> LazyArray:
        kind, count = self.u32(), self.u64()
        form = _SCALARS.get(kind)
        if form is None and kind != _STRING:
            raise self.bad_value(
                f"an array of {printable(type_name(kind))}", "an array of scalars or strings"
            )
        smallest = count * (form.size if form else 8)
        if smallest > self.size:
            raise self.bad_value(
                f"an array of {count} {type_name(kind)}",
                f"no more than fit into the {self.left} bytes that are left",
                expected=self.left,
                actual=smallest,
            )
        if form:
            return LazyArray(kind, count, self.take(smallest))
        return LazyArray(kind, count, self._strings(count))

    def _strings(self, count: int) -> bytes:
        """The stored bytes of ``count`` strings: only their lengths are looked at."""
        start, unpack = self.at, _U64.unpack_from
        at, buffer, have = start, self._buffer, len(self._buffer)
        left, pause = count, _SINGLE
        next_leap = count if count > pause else 0
        while left:
            if left <= next_leap:
                before = left
                at, left = _leap(buffer, at, left)
                pause = _SINGLE if before - left > pause else 2 * pause
                next_leap = left - pause
                continue
            left -= 1
            end = at + 8
            if end <= have:
                end += unpack(buffer, at)[0]
            if end > have:  # the rare case: what is here ends within this string
                self.at = at
                self._need(8)
                (length,) = unpack(self._buffer, at)
                if length > self.size:
                    raise self.bad_value(
                        f"an item of {length} bytes",
                        f"at most the {self.left} bytes that are left",
                        expected=self.left,
                        actual=length,
                    )
                self._need(8 + length)
                buffer, have, end = self._buffer, len(self._buffer), at + 8 + length
            at = end
        self.at = at
        return self._bytes(start)
