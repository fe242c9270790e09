"""Typed access to a parsed JSON object; every error names file, key, value and what is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import ConfigError, printable

__all__ = ["ALL_BITS", "COMMON_BITS", "Reader", "thaw"]

COMMON_BITS = (2, 3, 4, 8)
ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
_MAX_GROUP = 1 << 20  # no layer has more input features


def thaw(value: Any) -> Any:
    """Read-only JSON (mapping proxies, tuples) as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {k: thaw(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(v) for v in value]
    return value


@dataclass(frozen=True, slots=True)
class Reader:
    """Typed access to one JSON object, with errors that name file and key."""

    raw: Mapping[str, Any]
    source: str
    prefix: str = ""

    def fail(self, key: str, expected: str, fix: str, code: str = "Q-CFG-VALUE") -> ConfigError:
        found = printable(repr(self.raw.get(key)), 60)
        full = f"{self.prefix}{key}"
        return ConfigError(
            f"{self.source}: {full} is {found}, expected {expected}. {fix}",
            code=code,
            path=self.source,
            tensor=full,
            expected=expected,
            actual=self.raw.get(key),
            plugin="gptq",
        )

    def flag(self, key: str) -> bool | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "true or false", "Restore the value the tool wrote.")
        return value

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not 0 < len(value) <= 64:
            raise self.fail(
                key, "a short string", "Restore the value the tool wrote.", "Q-CFG-TYPE"
            )
        return value.strip().lower()

    def bits(self, allowed: tuple[int, ...]) -> int | None:
        value = self.raw.get("bits")
        if "bits" not in self.raw:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
            fix = "Correct it to the width the tensors were packed with."
            if value in ALL_BITS and not isinstance(value, bool):
                fix = (
                    "These widths exist in two layouts; they are read with "
                    "checkpoint_format 'gptq_p' or provider 'auto-round' only."
                )
            raise self.fail("bits", f"one of {allowed}", fix)
        return value

    def group_size(self) -> int | None:
        value = self.raw.get("group_size")
        if "group_size" not in self.raw:
            return None
        good = isinstance(value, int) and not isinstance(value, bool)
        if good and (value == -1 or 0 < int(value or 0) <= _MAX_GROUP):
            return int(value or 0)
        raise self.fail(
            "group_size",
            f"-1 or an integer from 1 to {_MAX_GROUP}",
            "Use -1 for one group per row.",
        )

    def text_list(self, key: str) -> tuple[str, ...]:
        """A list of strings, or a list of such lists, flattened."""
        value = self.raw.get(key)
        if value is None:
            return ()
        flat: list[Any] = []
        for item in value if isinstance(value, list | tuple) else [None]:
            flat += item if isinstance(item, list | tuple) else [item]
        if not all(isinstance(item, str) for item in flat):
            raise self.fail(
                key, "a list of names", "Restore the value the tool wrote.", "Q-CFG-TYPE"
            )
        return tuple(flat)
