"""One name resolver: which patterns of a config apply to which module, and which to none.

A config lists patterns in several dialects. Each is a ``NamePattern``; matching is bounded in time
whatever the checkpoint's author wrote, and a pattern that matches nothing is reported.

    exact      the whole module name
    prefix     the name, or a parent of it, at a dot boundary
    suffix     the end of the name, at a dot boundary
    substring  anywhere in the name
    glob       shell wildcards over the whole name
    regex      anchored at the start only, as ``re.match``
    search     a regex anywhere in the name

A config object that holds patterns offers ``name_patterns() -> Sequence[NamePattern]``; core then
reports those that match no module.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import regex

from quant_core.errors import ConfigError, printable
from quant_core.fields import Fields

__all__ = [
    "MAX_REGEX_PATTERNS",
    "NamePattern",
    "check_count",
    "first_match",
    "numberless",
    "skip_patterns",
    "unmatched",
]

MAX_REGEX_PATTERNS = 1_000
_MAX_PATTERN_LENGTH = 4_096
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")
_MATCH_SECONDS = 0.25  # for one pattern against one name; real ones take microseconds


@functools.lru_cache(maxsize=4 * MAX_REGEX_PATTERNS)
def _compile(text: str) -> Any:
    if len(text) > _MAX_PATTERN_LENGTH:
        raise ConfigError(
            f"name pattern {printable(text, 60)!r} is {len(text)} characters long, expected at "
            f"most {_MAX_PATTERN_LENGTH}. List module names instead of one long alternation.",
            code="Q-CFG-REGEX",
            tensor=printable(text, 60),
            expected=_MAX_PATTERN_LENGTH,
            actual=len(text),
        )
    try:
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError) as err:
        raise ConfigError(
            f"name pattern {printable(text)!r} is no valid regular expression: {err}. "
            "Correct it in the checkpoint's quantization config.",
            code="Q-CFG-REGEX",
            tensor=printable(text),
            actual=str(err),
        ) from err


def _timed(call: Any, text: str, name: str) -> bool:
    try:
        return call(name, timeout=_MATCH_SECONDS) is not None
    except TimeoutError as err:
        raise ConfigError(
            f"name pattern {printable(text)!r} takes more than {_MATCH_SECONDS} s to match "
            f"{printable(name, 60)!r}. Rewrite it without nested repetition.",
            code="Q-CFG-REGEX",
            tensor=printable(text),
            actual="timeout",
        ) from err


@dataclass(frozen=True, slots=True, kw_only=True)
class NamePattern:
    """One pattern of a config: its dialect, its text, and what it is for.

    ``written`` is the config's own text where ``text`` was made from it; ``label`` is for messages.

    Raises (on construction):
        ConfigError: ``Q-CFG-REGEX`` for an invalid or over-long regular expression.
    """

    kind: Literal["exact", "prefix", "suffix", "substring", "glob", "regex", "search"]
    text: str
    purpose: str = ""  # the config key it came from
    written: str = ""

    @property
    def label(self) -> str:
        return self.written or self.text

    def __post_init__(self) -> None:
        if self.kind in ("regex", "search"):
            _compile(self.text)

    def matches(self, name: str) -> bool:
        """Whether ``name`` (a module path) matches.

        Raises:
            ConfigError: ``Q-CFG-REGEX`` if matching takes too long.
        """
        text = self.text
        match self.kind:
            case "exact":
                return name == text
            case "prefix":
                return name == text or name.startswith(text.rstrip(".") + ".")
            case "suffix":
                return name == text or name.endswith("." + text.lstrip("."))
            case "substring":
                return text in name
            case "glob":
                return fnmatch.fnmatchcase(name, text)
            case "regex":
                return _timed(_compile(text).match, text, name)
            case _:
                return _timed(_compile(text).search, text, name)


def check_count(patterns: Sequence[NamePattern], where: str) -> None:
    """Refuse more wildcard patterns than can be matched in bounded time.

    Raises:
        ConfigError: ``Q-CFG-REGEX`` above ``MAX_REGEX_PATTERNS``. Names in full have no limit.
    """
    count = sum(p.kind in ("regex", "search", "glob") for p in patterns)
    if count > MAX_REGEX_PATTERNS:
        raise ConfigError(
            f"{where}: {count} wildcard patterns, expected at most {MAX_REGEX_PATTERNS}. "
            "List module names in full instead.",
            code="Q-CFG-REGEX",
            tensor=where,
            expected=MAX_REGEX_PATTERNS,
            actual=count,
        )


def skip_patterns(fields: Fields, keys: Sequence[str]) -> tuple[NamePattern, ...]:
    """Names of modules that stay floats, from lists whose entries are parts of a name.

    ``re:`` starts a regular expression, and an entry with ``*`` is a glob.

    Args:
        keys: of the lists, all of which count.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for an entry that matches every module, or too many entries.
    """
    out: dict[str, NamePattern] = {}
    for key in keys:
        for text in fields.names(key):
            if not text.strip(".*"):
                fix = "List parts of module names, such as 'lm_head'."
                raise fields.fail(key, "no entry that matches every module", fix)
            kind: Literal["regex", "glob", "substring"] = (
                "regex" if text.startswith("re:") else "glob" if "*" in text else "substring"
            )
            body = text[3:] if kind == "regex" else text
            out.setdefault(text, NamePattern(kind=kind, text=body, purpose=key))
    check_count(tuple(out.values()), f"{fields.source}: {' and '.join(keys)}")
    return tuple(out.values())


def first_match(patterns: Iterable[NamePattern], name: str) -> NamePattern | None:
    """The first pattern that matches ``name``, in the order given."""
    return next((p for p in patterns if p.matches(name)), None)


def unmatched(patterns: Sequence[NamePattern], names: Iterable[str]) -> list[NamePattern]:
    """Patterns that match none of ``names``.

    A text that is a whole name costs one look-up. Of the other patterns at most
    ``MAX_REGEX_PATTERNS`` are tried; a list that long is reported by its first entries alone.
    """
    names = list(names)
    known = set(names)
    left: list[NamePattern] = []
    tried = 0
    for p in patterns:
        if p.text in known and p.kind in ("exact", "prefix", "suffix", "substring", "glob"):
            continue
        if p.kind != "exact":
            tried += 1
            if tried > MAX_REGEX_PATTERNS or any(p.matches(n) for n in names):
                continue
        left.append(p)
    return left


def numberless(module: str) -> str:
    """``module`` with layer and expert numbers replaced by ``*``: equal for siblings."""
    return _NUMBER.sub("*", module)
