"""Modules that a config leaves out, matched fast enough for tens of thousands of experts.

    "lm_head"                  the module of that name
    "model.layers.0*"          a shell pattern over the whole name; a prefix, mostly
    "model.layers.1.mlp.*"

Producers before 0.39 wrote parts of names, which match anywhere in one; such an entry may explain
why a module is stored as floats, but proves nothing against one that is quantized.

Source: ModelOpt 0.47.0 ``export/quant_utils.py`` (_prefix_wildcard_summarize_exclude_modules);
vLLM 0.32 ``quantization/modelopt.py`` (is_layer_excluded).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from quant_core.resolve import NamePattern, first_match

__all__ = ["Exclusions", "exclusions"]

_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusions:
    """Entries of one list. ``patterns``: all of them, in the dialect of their producer."""

    patterns: tuple[NamePattern, ...]
    names: frozenset[str]
    prefixes: tuple[str, ...]
    globs: tuple[NamePattern, ...]

    def strict(self, path: str) -> str:
        """The entry that names ``path`` in whole; "" if none does."""
        if path in self.names:
            return path
        if path.startswith(self.prefixes):
            return next(p for p in self.prefixes if path.startswith(p)) + "*"
        found = first_match(self.globs, path)
        return "" if found is None else found.text


@functools.lru_cache(maxsize=8)
def exclusions(entries: tuple[str, ...], purpose: str, loose: bool) -> Exclusions:
    """The entries of a list, ready to match.

    Args:
        purpose: the config key, for messages.
        loose: entries without wildcards match anywhere in a name.
    """
    plain = [e for e in entries if not _WILD.search(e)]
    wild = [e for e in entries if _WILD.search(e)]
    prefixes = [e[:-1] for e in wild if e.endswith("*") and not _WILD.search(e[:-1])]
    others = [e for e in wild if e[:-1] not in prefixes]
    kind = "substring" if loose else "exact"
    return Exclusions(
        patterns=(
            *(NamePattern(kind=kind, text=e, purpose=purpose) for e in plain),  # type: ignore[arg-type]
            *(NamePattern(kind="glob", text=e, purpose=purpose) for e in wild),
        ),
        names=frozenset(plain),
        prefixes=tuple(prefixes),
        globs=tuple(NamePattern(kind="glob", text=e, purpose=purpose) for e in others),
    )
