"""Strict JSON: what Python's reader accepts in silence is an error here.

A config decides how bytes are read, so nothing in it may be ambiguous: no duplicate key (Python
keeps the last), no NaN or Infinity (not JSON), no number that overflows, no other encoding than
UTF-8. Results are read-only: dicts become mapping proxies, lists become tuples.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quant_core.errors import CheckpointError, ConfigError, LimitError, printable

__all__ = [
    "LIMIT_BYTES",
    "MAX_DEPTH",
    "MAX_DIGITS",
    "freeze_json",
    "parse_json_object",
    "read_json_object",
]

LIMIT_BYTES = 16 * 2**20  # real configs stay below 1 MiB
MAX_DEPTH = 100  # containers inside one another; real configs stay below 10
MAX_DIGITS = 64  # transformers writes int(1e30) as "no limit"; nothing real is longer


def read_json_object(
    path: str | os.PathLike[str], *, limit_bytes: int = LIMIT_BYTES
) -> Mapping[str, Any]:
    """The JSON object in the file ``path``, read-only.

    Raises:
        ConfigError: ``Q-CFG-PARSE`` if the file is missing or not UTF-8 JSON, else as
            ``parse_json_object``.
        CheckpointError: ``Q-CKPT-IO`` if the system refuses to read it.
        LimitError: ``Q-LIMIT-CONFIG`` if it is larger than ``limit_bytes``.
    """
    path = Path(path)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a FIFO would wait forever
            raise CheckpointError(
                f"{printable(path)}: is not a regular file, expected a JSON file. "
                "Replace it by the file itself.",
                code="Q-CKPT-IO",
                path=path,
            )
        with path.open("rb") as file:
            raw = file.read(limit_bytes + 1)
    except FileNotFoundError as err:
        raise ConfigError(
            f"{printable(path)}: does not exist, expected a JSON file. "
            "Download it again or check the path.",
            code="Q-CFG-PARSE",
            path=path,
        ) from err
    except OSError as err:
        raise CheckpointError(
            f"{printable(path)}: cannot be read: {err.strerror or err}. "
            "Check the file and its permissions.",
            code="Q-CKPT-IO",
            path=path,
            actual=err.strerror,
        ) from err
    if len(raw) > limit_bytes:
        raise LimitError(
            f"{printable(path)}: has {max(info.st_size, len(raw))} bytes, expected at most "
            f"{limit_bytes}. A config of this size is not a model's config.",
            code="Q-LIMIT-CONFIG",
            path=path,
            expected=limit_bytes,
            actual=max(info.st_size, len(raw)),
        )
    return _parse(_decode(raw, path), path)


def parse_json_object(text: str | bytes, where: object) -> Mapping[str, Any]:
    """The JSON object in ``text``, read-only.

    Args:
        text: str, or UTF-8 bytes with or without a byte order mark.
        where: file or other origin; starts every message.

    Raises:
        ConfigError: ``Q-CFG-PARSE`` malformed or nested deeper than ``MAX_DEPTH``,
            ``Q-CFG-DUPLICATE`` a key twice in one object, ``Q-CFG-VALUE`` NaN, Infinity, a float
            that overflows or an integer of more than ``MAX_DIGITS`` digits, ``Q-CFG-TYPE`` not an
            object at the top.
    """
    return _parse(_decode(text, where) if isinstance(text, bytes) else text, where)


def _decode(raw: bytes, where: object) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:4]:
        raise _error(where, "is UTF-16 or UTF-32", "UTF-8", "Save it as UTF-8.", "Q-CFG-PARSE")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        found = f"is not UTF-8 at byte {err.start}"
        raise _error(where, found, "UTF-8 JSON", "Save it as UTF-8.", "Q-CFG-PARSE") from err


def _parse(text: str, where: object) -> Mapping[str, Any]:
    if not text.strip():
        raise _error(where, "is empty", "a JSON object", "Download it again.", "Q-CFG-PARSE")
    fix = "Correct the file or download it again."

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            seen: set[str] = set()
            key = next(k for k, _ in items if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            values = [printable(v, 40) for k, v in items if k == key]
            raise _error(
                where,
                f"key {printable(key)!r} is given {len(values)} times ({', '.join(values[:3])})",
                "once",
                "Remove all but the intended one.",
                "Q-CFG-DUPLICATE",
                key,
            )
        return out

    def constant(literal: str) -> Any:
        raise _error(where, f"holds the literal {literal}", "a number", fix, "Q-CFG-VALUE")

    def integer(literal: str) -> int:
        if len(literal) > MAX_DIGITS:
            found = f"holds an integer of {len(literal)} digits"
            raise _error(where, found, f"at most {MAX_DIGITS}", fix, "Q-CFG-VALUE")
        return int(literal)

    def real(literal: str) -> float:
        value = float(literal)
        if math.isinf(value):
            found = f"holds the number {printable(literal, 40)}"
            raise _error(where, found, "one that fits a float64", fix, "Q-CFG-VALUE")
        return value

    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_int=integer,
            parse_float=real,
        )
    except json.JSONDecodeError as err:
        found = f"is not JSON: {err.msg} at line {err.lineno}, column {err.colno}"
        raise _error(where, found, "a JSON object", fix, "Q-CFG-PARSE") from err
    except RecursionError:
        value = None
        too_deep = True
    else:
        too_deep = _deeper_than(value, MAX_DEPTH)
    if too_deep:
        found = "nests too many objects or arrays"
        raise _error(where, found, f"at most {MAX_DEPTH} levels", fix, "Q-CFG-PARSE")
    if not isinstance(value, dict):
        found = f"holds {_json_type(value)} at the top"
        raise _error(where, found, "an object", fix, "Q-CFG-TYPE")
    frozen: Mapping[str, Any] = freeze_json(value)
    return frozen


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether containers nest deeper than ``limit``; level by level, so that it cannot recurse."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return any(isinstance(item, dict | list) for item in level)


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _error(
    where: object, found: str, expected: str, fix: str, code: str, key: str | None = None
) -> ConfigError:
    return ConfigError(
        f"{printable(where)}: {found}, expected {expected}. {fix}",
        code=code,
        path=where,
        tensor=key,
        expected=expected,
        actual=found,
    )


def freeze_json(value: Any) -> Any:
    """``value`` (parsed JSON) with dicts made read-only and lists made tuples, recursively."""
    if isinstance(value, Mapping):
        return MappingProxyType({k: freeze_json(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze_json(v) for v in value)
    return value
