"""The one error tree. Every message reads: where: what was found, what was expected. How to fix.

    QuantError(Exception)
      ConfigError(ValueError)        bad or contradictory quantization config
      FormatError(ValueError)        unknown or ambiguous format
      CheckpointError(ValueError)    file-level: truncated, index, missing shard
      LayoutError(ValueError)        tensor-level: shape, dtype, range
      PluginError(RuntimeError)      load, API version, conflict, hook raised
      KernelError(RuntimeError)      no kernel fits; carries the decision trace
      LimitError(MemoryError)        a declared size exceeds a limit

Each error carries its parts as attributes, so that programs need not parse text. ``code`` is
stable, starts with ``Q-`` and has an entry in docs/errors.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

__all__ = [
    "CheckpointError",
    "ConfigError",
    "FormatError",
    "KernelError",
    "LayoutError",
    "LimitError",
    "PluginError",
    "QuantError",
    "QuantWarning",
    "printable",
    "summarize",
]


class QuantError(Exception):
    """Base of every error raised on purpose by quant-core and its plugins.

    Args:
        message: where, what was found, what was expected, how to fix.
        code: stable identifier, e.g. ``"Q-CKPT-TRUNCATED"``.
        path: file the error is about.
        tensor: stored tensor, parameter or config key.
        expected: what would have been right.
        actual: what was found.
        plugin: id of the plugin that noticed or caused it.
    """

    code: str

    def __init__(
        self,
        message: str,
        *,
        code: str,
        path: object = None,
        tensor: str | None = None,
        expected: Any = None,
        actual: Any = None,
        plugin: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.path = None if path is None else str(path)
        self.tensor = tensor
        self.expected = expected
        self.actual = actual
        self.plugin = plugin


class ConfigError(QuantError, ValueError):
    """A quantization config that is malformed, out of range or contradicts itself."""


class FormatError(QuantError, ValueError):
    """No installed plugin, or more than one, claims the checkpoint."""


class CheckpointError(QuantError, ValueError):
    """A file of the checkpoint is truncated, malformed, missing or inconsistent."""


class LayoutError(QuantError, ValueError):
    """A tensor has the wrong shape, dtype or values, or cannot be represented."""


class PluginError(QuantError, RuntimeError):
    """A plugin failed to load, is incompatible, conflicts or returned a wrong result."""


class KernelError(QuantError, RuntimeError):
    """No kernel fits an operation. ``trace`` lists each candidate with its reason."""

    def __init__(self, message: str, *, trace: Iterable[Any] = (), **kw: Any) -> None:
        super().__init__(message, **kw)
        self.trace = tuple(trace)


class LimitError(QuantError, MemoryError):
    """A declared size exceeds a limit, or memory does not suffice."""


class QuantWarning(UserWarning):
    """Something was ignored or assumed; the message names it."""


def printable(text: object, limit: int = 120) -> str:
    """``text`` safe for one line of a terminal: no control characters, at most ``limit`` long.

    Paths stay whole, as the system limits them: what tells files apart is at their end.
    """
    if isinstance(text, PurePath):
        limit = 4096
    s = str(text)[: 4 * limit]
    if not s.isprintable():
        s = "".join(c if c.isprintable() else repr(c)[1:-1] for c in s)
    return s if len(s) <= limit else s[: limit - 1] + "…"


def summarize(items: Iterable[object], limit: int = 10) -> str:
    """First ``limit`` items, comma separated, then a count of the rest."""
    all_items = [printable(i) for i in items]
    shown = ", ".join(repr(i) for i in all_items[:limit])
    rest = len(all_items) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
