"""The safetensors header: from bytes to validated ``TensorInfo``, and nothing believed unchecked.

    0        8                8+n                                   size
    | n u64  | JSON, n bytes  | tensor data, no holes, no overlap   |
             {"__metadata__": {...}, "name": {"dtype", "shape", "data_offsets": [begin, end]}}

Offsets count from 8+n. The format allows one reading only: every byte after the header belongs to
exactly one tensor, every range has the size its shape and dtype need, no name appears twice.

The JSON is walked entry by entry rather than parsed whole: a hostile header is refused at the
first bad entry, at the entry limit, or by its shape, before it has cost more than its own size.
Format: safetensors 0.8 (README "Format", safetensors/src/tensor.rs).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from quant_core.errors import CheckpointError, LimitError, printable, summarize
from quant_core.spec import TensorInfo

__all__ = ["BITS", "DTYPES", "MAX_HEADER_BYTES", "MAX_TENSORS", "Header", "parse_header"]

MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSORS = 1_000_000
_MAX_ENTRY = 4096  # characters of one tensor's entry; 64 dims of 20 digits need 1,400
_MAX_DIMS = 64  # torch's own limit
_PLAIN_ELEMENTS = 1 << 56
_INT64 = 2**63 - 1

DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
    # no torch dtype holds these: named as elements, read as uint8 [..., bytes per row]
    "F4": ("fp4_e2m1", 4),
    "F6_E2M3": ("fp6_e2m3", 6),
    "F6_E3M2": ("fp6_e3m2", 6),
}
"""Name in the header -> (``TensorInfo.dtype``, bits per element)."""

BITS = dict(DTYPES.values())
"""``TensorInfo.dtype`` -> bits per element."""

_WS = r"[ \t\n\r]*"
_KEY = re.compile(rf'{_WS}("[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"){_WS}:{_WS}')
_NEXT = re.compile(rf"{_WS}([,}}])")
_OPEN = re.compile(rf"\{{{_WS}(\}}?)")
_END = re.compile(rf"{_WS}\Z")
_SIZE = r"(?:0|[1-9]\d{0,15})"
_PLAIN = re.compile(
    r'"([^"\\\x00-\x1f]{1,1024})":\{"dtype":"([A-Z0-9_]{1,16})",'
    rf'"shape":\[((?:{_SIZE}(?:,{_SIZE}){{0,7}})?)\],"data_offsets":\[({_SIZE}),({_SIZE})\]\}},',
    re.ASCII,
)
"""An entry as writers write it, and the comma before another one."""
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_FIX_BROKEN = "Download the file again, or have its producer write it anew"


@dataclass(frozen=True, slots=True)
class Header:
    """Validated contents of one file's header; ``tensors`` in order of their offsets."""

    tensors: list[TensorInfo]
    metadata: dict[str, str]


class _Twice(Exception):
    """An object of the header has one key twice."""


def parse_header(
    raw: bytes,
    *,
    file: str,
    data_bytes: int,
    max_tensors: int = MAX_TENSORS,
    path: object = None,
) -> Header:
    """Check the header ``raw`` of a file whose data part has ``data_bytes`` bytes.

    Args:
        raw: the JSON part, without the length in front.
        file: name for messages and ``TensorInfo.file``.
        path: whole path for the errors' attribute; default ``file``.

    Raises:
        CheckpointError: ``Q-CKPT-HEADER``, ``-DUPLICATE``, ``-NAME``, ``-DTYPE``, ``-SHAPE``,
            ``-SIZE``, ``-OFFSET``, ``-TRUNCATED`` or ``-TRAILING``.
        LimitError: ``Q-LIMIT-HEADER`` for more than ``max_tensors`` tensors.
    """
    return _Parser(file, path or file, len(raw) + 8, data_bytes, max_tensors).parse(raw)


class _Parser:
    def __init__(
        self, file: str, path: object, base: int, data_bytes: int, max_tensors: int
    ) -> None:
        self.file = file
        self.path = path
        self.base = base  # file offset of the data part
        self.data_bytes = data_bytes
        self.max_tensors = max_tensors
        self.decode = json.JSONDecoder(object_pairs_hook=_unique).raw_decode
        self.shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal shapes are one object
        self.dims: dict[str, tuple[int, ...]] = {}  # by their text
        self.problems: dict[str, list[tuple[str, str, str]]] = {}  # code: tensor, found, expected

    def parse(self, raw: bytes) -> Header:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as err:
            self.fail(f"header is not UTF-8 at byte {8 + err.start}", "UTF-8 JSON", err)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] | None = None
        for name, value in self.entries(text, tensors):
            if name == "__metadata__":
                if metadata is not None:
                    self.duplicate(name)
                metadata = value
                continue
            if name in tensors:
                self.duplicate(name)
            if len(tensors) >= self.max_tensors:
                raise LimitError(
                    f"{printable(self.file)}: header lists more than {self.max_tensors} tensors, "
                    "expected at most that. Raise the limit max_tensors if the file is trusted.",
                    code="Q-LIMIT-HEADER",
                    path=self.path,
                    expected=self.max_tensors,
                )
            tensors[name] = self.entry(name, value)
        self.raise_problems()
        return Header(self.check_ranges(list(tensors.values())), metadata or {})

    # --------------------------------------------------------------------------------- the JSON

    def plain(self, text: str, pos: int, tensors: dict[str, TensorInfo]) -> int:
        """Take entries that have nothing unusual, in a third of the time; where the next begins.

        The first one that is not exactly as writers write it, or wrong, is left to the caller.
        """
        while len(tensors) < self.max_tensors and (m := _PLAIN.match(text, pos)) is not None:
            name, dtype, sizes, first, last = m.groups()
            known, begin, end = DTYPES.get(dtype), int(first), int(last)
            dims = self.dims.get(sizes)
            if dims is None:
                dims = tuple(map(int, sizes.split(","))) if sizes else ()
                self.dims[sizes] = dims = self.shapes.setdefault(dims, dims)
            count = math.prod(dims)
            if (
                known is None
                or known[1] < 8
                or not 0 < count < _PLAIN_ELEMENTS
                or end - begin != count * known[1] // 8
                or name in tensors
                or name == "__metadata__"
                or not name.isascii()
            ):
                break
            tensors[name] = TensorInfo(
                name=name,
                dtype=known[0],
                shape=dims,
                file=self.file,
                offset=self.base + begin,
                nbytes=end - begin,
            )
            pos = m.end()
        return pos

    def entries(self, text: str, tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, Any]]:
        """(name, parsed entry) of each member of the top-level object that ``plain`` leaves."""
        m = _OPEN.match(text)
        if m is None:
            self.fail("header does not start with '{'", "a JSON object")
        pos, done = m.end(), bool(m.group(1))
        while not done:
            pos = self.plain(text, pos, tensors)
            m = _KEY.match(text, pos)
            if m is None:
                self.fail(f"header is not JSON at byte {8 + pos}", "a tensor's name")
            name, pos = self.string(m.group(1)), m.end()
            try:
                if name == "__metadata__":
                    value, pos = self.decode(text, pos)
                    self.check_metadata(value)
                else:
                    # a flat object ends at the next brace: nothing nested is ever parsed
                    end = text.find("}", pos, pos + _MAX_ENTRY) + 1
                    value, used = self.decode(text[pos:end])
                    if not isinstance(value, dict) or pos + used != end:
                        raise ValueError
                    pos = end
            except _Twice as err:
                self.fail(
                    f"entry {printable(name)!r} has the key {printable(err)!r} twice",
                    "each key once",
                    code="Q-CKPT-DUPLICATE",
                    tensor=name,
                )
            except (ValueError, RecursionError) as err:  # JSONDecodeError is a ValueError
                self.fail(
                    f"header entry {printable(name)!r} is malformed",
                    "a flat JSON object with dtype, shape and data_offsets",
                    err,
                    tensor=name,
                )
            yield name, value
            m = _NEXT.match(text, pos)
            if m is None:
                self.fail(f"header is not JSON at byte {8 + pos}", "',' or '}'")
            pos, done = m.end(), m.group(1) == "}"
        if _END.match(text, pos) is None:
            self.fail(f"header goes on after its JSON object, at byte {8 + pos}", "spaces only")

    def string(self, literal: str) -> str:
        if "\\" not in literal and literal.isascii():
            return literal[1:-1]
        try:
            name = str(self.decode(literal)[0])
        except ValueError as err:
            self.fail(f"header has the malformed name {printable(literal)}", "a JSON string", err)
        try:
            name.encode()
        except UnicodeEncodeError as err:
            self.fail(
                f"tensor name {printable(name)!r} is not valid Unicode",
                "text that UTF-8 can hold",
                err,
                code="Q-CKPT-NAME",
                tensor=name,
            )
        return name

    def check_metadata(self, value: Any) -> None:
        if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
            try:
                for text in (*value, *value.values()):
                    text.encode()
                return
            except UnicodeEncodeError:  # half a surrogate pair
                pass
        self.fail("__metadata__ is malformed", "an object of strings", tensor="__metadata__")

    # ------------------------------------------------------------------------------- one tensor

    def entry(self, name: str, value: dict[str, Any]) -> TensorInfo:
        """The tensor of one entry; what is wrong with it is noted in ``problems``."""
        if value.keys() != _ENTRY_KEYS:
            keys = f"the keys {summarize(sorted(value))}" if value else "no keys"
            self.fail(
                f"tensor {printable(name)!r} has {keys}",
                "dtype, shape and data_offsets",
                tensor=name,
            )
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        known = DTYPES.get(dtype) if isinstance(dtype, str) else None
        if known is None:
            self.note("Q-CKPT-DTYPE", name, f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
            known = ("uint8", 8)
        count = self.count(name, shape)
        size = -1
        if count >= 0:
            bits = count * known[1]
            if known[1] < 8 and (not shape or shape[-1] * known[1] % 8):
                expected = "a last axis that fills whole bytes"
                self.note("Q-CKPT-DTYPE", name, f"{dtype} with shape {shape}", expected)
            size = -(-bits // 8)
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(type(o) is int for o in offsets)
            or not 0 <= offsets[0] <= offsets[1] <= _INT64
        ):
            expected = "[begin, end] with 0 <= begin <= end"
            self.note("Q-CKPT-OFFSET", name, f"data_offsets {printable(offsets)}", expected)
            offsets = [0, 0]
        elif size >= 0 and offsets[1] - offsets[0] != size:
            self.note(
                "Q-CKPT-SIZE",
                name,
                f"{offsets[1] - offsets[0]} bytes",
                f"{size} for shape {shape} of {dtype}",
            )
        dims = tuple(shape) if count >= 0 else ()
        return TensorInfo(
            name=name,
            dtype=known[0],
            shape=self.shapes.setdefault(dims, dims),
            file=self.file,
            offset=self.base + offsets[0],
            nbytes=offsets[1] - offsets[0],
        )

    def count(self, name: str, shape: Any) -> int:
        """Number of elements, or -1 if the shape is wrong."""
        if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
            expected = f"an array of at most {_MAX_DIMS} sizes"
            self.note("Q-CKPT-SHAPE", name, f"shape {printable(shape)}", expected)
            return -1
        total = bound = 1  # bound leaves zeros out: strides of an empty tensor must fit as well
        for dim in shape:
            if type(dim) is not int or dim < 0:
                expected = "integers from 0"
                self.note("Q-CKPT-SHAPE", name, f"shape {printable(shape)}", expected)
                return -1
            total *= dim
            bound *= dim or 1
        if bound * 8 > _INT64:
            expected = "fewer than 2**60 elements"
            self.note("Q-CKPT-SHAPE", name, f"shape {printable(shape)}", expected)
            return -1
        return total

    def check_ranges(self, tensors: list[TensorInfo]) -> list[TensorInfo]:
        """``tensors`` by offset, once it is sure that they tile the data part."""
        tensors.sort(key=lambda t: (t.offset, t.nbytes))
        end = self.base  # where the tensor before ends
        before: TensorInfo | None = None
        last = self.base + self.data_bytes
        cut = None
        for t in tensors:
            if t.offset != end:
                kind = "overlaps" if t.offset < end else "leaves a hole after"
                other = f"tensor {printable(before.name)!r}" if before else "the header"
                self.fail(
                    f"tensor {printable(t.name)!r} begins at byte {t.offset} and {kind} {other}",
                    f"it to begin where that ends, at byte {end}",
                    code="Q-CKPT-OFFSET",
                    tensor=t.name,
                )
            end, before = t.offset + t.nbytes, t
            if cut is None and end > last:
                cut = t.name
        if cut is not None:
            self.fail(
                f"file has {last} bytes, {end - last} are missing; the first tensor affected is "
                f"{printable(cut)!r}",
                f"{end} bytes",
                code="Q-CKPT-TRUNCATED",
                tensor=cut,
            )
        if end < last:
            self.fail(
                f"{last - end} bytes follow the last tensor",
                f"the file to end at byte {end}",
                code="Q-CKPT-TRAILING",
            )
        return tensors

    # --------------------------------------------------------------------------------- problems

    def note(self, code: str, tensor: str, found: str, expected: str) -> None:
        self.problems.setdefault(code, []).append((tensor, found, expected))

    def raise_problems(self) -> None:
        """Raise for all problems of the first kind noted."""
        for code, noted in self.problems.items():
            tensor, found, expected = noted[0]
            more = ""
            if len(noted) > 1:
                more = f" The same is wrong with {summarize(t for t, *_ in noted[1:])}."
            raise CheckpointError(
                f"{printable(self.file)}: tensor {printable(tensor)!r} has {printable(found)}, "
                f"expected {expected}.{more} {_FIX_BROKEN}.",
                code=code,
                path=self.path,
                tensor=tensor,
                expected=expected,
                actual=found,
            )

    def duplicate(self, name: str) -> NoReturn:
        self.fail(
            f"header lists {printable(name)!r} twice",
            "each name once",
            code="Q-CKPT-DUPLICATE",
            tensor=name,
        )

    def fail(
        self,
        found: str,
        expected: str,
        cause: BaseException | None = None,
        *,
        code: str = "Q-CKPT-HEADER",
        tensor: str | None = None,
    ) -> NoReturn:
        raise CheckpointError(
            f"{printable(self.file)}: {found}, expected {expected}. {_FIX_BROKEN}.",
            code=code,
            path=self.path,
            tensor=tensor,
            expected=expected,
            actual=found,
        ) from cause


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Twice(key)
            seen.add(key)
    return out
