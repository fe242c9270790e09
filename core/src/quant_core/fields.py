"""Typed access to a parsed JSON object: every error names file, key, value and what is right.

Plugins parse their config with it once, into a frozen dataclass, and pass no dicts around after.
A missing key and a null are the same: the answer is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import ConfigError, printable

__all__ = ["Fields", "thaw"]

_MAX_GROUP = 1 << 20  # no layer has more input features
_MAX_TEXT = 64
_RESTORE = "Restore the value the tool wrote."


def thaw(value: Any) -> Any:
    """Read-only JSON (mapping proxies, tuples) as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {k: thaw(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(v) for v in value]
    return value


@dataclass(frozen=True)
class Fields:
    """One JSON object.

    Attributes:
        raw: the object, not changed.
        source: its file, for messages.
        prefix: path of the object in the file, for messages: ``dynamic['x'].``
        plugin: id of the plugin that reads it.
    """

    raw: Mapping[str, Any]
    source: str
    prefix: str = ""
    plugin: str | None = None

    def fail(self, key: str, expected: str, fix: str, code: str = "Q-CFG-VALUE") -> ConfigError:
        """The error for the value of ``key``."""
        found = printable(repr(thaw(self.raw.get(key))), 60)
        full = f"{self.prefix}{key}"
        return ConfigError(
            f"{self.source}: {full} is {found}, expected {expected}. {fix}",
            code=code,
            path=self.source,
            tensor=full,
            expected=expected,
            actual=self.raw.get(key),
            plugin=self.plugin,
        )

    def flag(self, key: str) -> bool | None:
        """A boolean."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "true or false", _RESTORE)
        return value

    def text(self, key: str) -> str | None:
        """A short string, stripped, in lower case."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
            raise self.fail(key, "a short string", _RESTORE, "Q-CFG-TYPE")
        return value.strip().lower()

    def integer(self, key: str, low: int, high: int) -> int | None:
        """An integer from ``low`` to ``high``; booleans and floats are none."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"an integer from {low} to {high}", _RESTORE)
        return value

    def group_size(self, key: str = "group_size") -> int | None:
        """Input features per scale; -1 = one group per row. A null is an error here."""
        value = self.raw.get(key)
        if key not in self.raw:
            return None
        good = isinstance(value, int) and not isinstance(value, bool)
        if good and (value == -1 or 0 < int(value or 0) <= _MAX_GROUP):
            return int(value or 0)
        fix = "Use -1 for one group per row."
        raise self.fail(key, f"-1 or an integer from 1 to {_MAX_GROUP}", fix)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings, or a list of such lists, flattened; () if there is none."""
        value = self.raw.get(key)
        if value is None:
            return ()
        flat: list[Any] = []
        for item in value if isinstance(value, list | tuple) else [None]:
            flat += item if isinstance(item, list | tuple) else [item]
        if not all(isinstance(item, str) for item in flat):
            raise self.fail(key, "a list of names", _RESTORE, "Q-CFG-TYPE")
        return tuple(flat)

    def objects(self, key: str) -> dict[str, Fields]:
        """An object of objects, each ready to be read; empty if there is none."""
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(
            isinstance(v, Mapping | None) for v in value.values()
        ):
            raise self.fail(key, "an object of objects", _RESTORE, "Q-CFG-TYPE")
        return {
            name: Fields(
                item or {}, self.source, f"{self.prefix}{key}[{printable(name)!r}].", self.plugin
            )
            for name, item in value.items()
        }
