"""Text and JSON on the terminal. Names out of a checkpoint never reach it unescaped."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quant_core.errors import printable

__all__ = ["Progress", "emit", "escaped", "in_range", "size", "table"]

_LINE = 100_000  # longest line printed; messages are cut where they are made


def escaped(text: object) -> str:
    """``text`` with control characters spelled out, its own line breaks kept."""
    return "\n".join(printable(line, _LINE) for line in str(text).split("\n"))


def size(nbytes: float) -> str:
    """Bytes for people: ``934 B``, ``1.2 MiB``, ``372.5 GiB``."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.1f} GiB"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], indent: str = "  ") -> list[str]:
    """Left-aligned columns; columns of numbers are right-aligned. Cells are escaped."""
    cells = [[printable(c) for c in row] for row in rows]
    if not cells:
        return []
    number = [all(_is_number(row[i]) for row in cells) for i in range(len(header))]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(row, widths, number, strict=True)
        )
        return (indent + "  ".join(padded)).rstrip()

    return [line(header), *(line(row) for row in cells)]


def _is_number(cell: str) -> bool:
    head = cell.split(" ", 1)[0].replace(",", "")
    return cell == "" or head.replace(".", "", 1).replace("e-", "").lstrip("-").isdigit()


def emit(args: argparse.Namespace, data: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Print ``data`` as JSON if asked to, else ``lines``, which are evaluated only then."""
    if args.json:
        print(json.dumps(_strict(data), indent=1, allow_nan=False))
        return
    for line in lines:
        print(line)


def _strict(value: Any) -> Any:
    """As JSON can hold it: numbers that are not finite are null."""
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_range(low: int, high: int, what: str) -> Callable[[str], int]:
    """The type of an option that takes a whole number from ``low`` to ``high``."""

    def number(text: str) -> int:
        digits = text.strip().removeprefix("-").isdecimal() and len(text) < 20
        if not digits or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} {what}, expected {low} to {high}")
        return int(text)

    return number


class Progress:
    """How far a long command is: one line on stderr, rewritten on a terminal, else now and then."""

    def __init__(self, total: int, every_s: float = 5.0) -> None:
        self.total, self.every_s = total, every_s
        self.done = 0
        self._tty = sys.stderr.isatty()
        self._next = time.monotonic() + (0.0 if self._tty else every_s)

    def step(self, what: str) -> None:
        """Count one more and maybe say so."""
        self.done += 1
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.1 if self._tty else self.every_s)
        line = f"[{self.done}/{self.total}] {printable(what, 60)}"
        print(
            f"\r{line:<78}" if self._tty else line,
            end="" if self._tty else "\n",
            file=sys.stderr,
            flush=True,
        )

    def finish(self) -> None:
        """Leave the line clean."""
        if self._tty:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
