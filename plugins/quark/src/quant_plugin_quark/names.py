"""Which patterns of a Quark config mean which stored module.

Quark matches shell wildcards against module names of the model it quantized. The names in the file
can differ from those by the place of a wrapper:

    quantized as   model.language_model.layers.0.mlp.gate
    stored as      language_model.model.layers.0.mlp.gate   or   model.layers.0.mlp.gate

so a pattern is tried on each of these spellings. One without wildcards also means the end of a
name at a dot ("lm_head" means "language_model.lm_head"); "re:" starts a regular expression.

Sources: amd-quark 0.13 ``torch/export/main_export/quant_config_parser.py``; vLLM 0.32
``quantization/quark/quark.py`` ("re:", names without wildcards).
"""

from __future__ import annotations

from collections.abc import Sequence

from quant_core.resolve import NamePattern

__all__ = ["first_of", "pattern", "spellings"]

_WRAPPED = ("model.language_model.", "language_model.model.", "model.")


def pattern(text: str, purpose: str) -> NamePattern:
    """``text`` of the config in its dialect."""
    if text.startswith("re:"):
        return NamePattern(kind="regex", text=text[3:], purpose=purpose)
    kind = "glob" if any(c in text for c in "*?[") else "suffix"
    return NamePattern(kind=kind, text=text, purpose=purpose)  # type: ignore[arg-type]


def spellings(name: str) -> tuple[str, ...]:
    """``name``, and what it is called with the wrapper elsewhere; ``name`` first."""
    for prefix in _WRAPPED:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            others = (f"{p}{rest}" for p in _WRAPPED if p != prefix)
            return (name, *others)
    return (name,)


def first_of(patterns: Sequence[NamePattern], *names: str) -> NamePattern | None:
    """The first pattern that matches any spelling of any of ``names``."""
    tried = list(dict.fromkeys(s for name in names for s in spellings(name)))
    return next((p for p in patterns if any(p.matches(s) for s in tried)), None)
