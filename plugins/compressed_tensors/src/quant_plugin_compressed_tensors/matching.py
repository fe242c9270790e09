"""Which config group a module belongs to, and whether it is ignored.

An entry of ``targets`` or ``ignore`` is one of

    "model.layers.0.mlp.down_proj"   the exact module name
    "re:.*mlp.gate$"                 a regular expression, anchored at the start only
    "Linear"                         a class name

``ignore`` beats everything. Of the targets that hit, exact names come first, then expressions
(each sorted as text), then class names; a target given twice belongs to the last group naming it.

A checkpoint holds no classes: "Linear" stands for linear layers and experts, "Embedding" for
embeddings; other class names match nothing here.

Source: compressed-tensors 0.19.0 ``utils/match.py`` (match_targets), ``quantization/lifecycle/
apply.py`` (target order).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quant_core.errors import ConfigError
from quant_core.resolve import NamePattern, check_count, first_match

__all__ = ["CLASSES", "Matcher", "is_attention_class", "name_pattern"]

CLASSES: Mapping[str, tuple[str, ...]] = {
    "Linear": ("linear", "experts"),
    "Embedding": ("embedding",),
}
"""Class name -> the kinds of layer it stands for."""


def is_attention_class(target: str) -> bool:
    """Whether a target names attention modules by class: ``LlamaAttention``."""
    return target.isidentifier() and target.endswith("Attention")


def name_pattern(text: str, purpose: str) -> NamePattern:
    """One entry as a pattern. Class names become exact patterns that no module has."""
    if text.startswith("re:"):
        return NamePattern(kind="regex", text=text[3:], purpose=purpose)
    return NamePattern(kind="exact", text=text, purpose=purpose)


class Matcher:
    """Targets of all groups and the ignore list, compiled.

    Raises (on construction):
        ConfigError: ``Q-CFG-REGEX`` for an expression that is invalid, or too many of them.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[str]], ignore: Iterable[str], file: str
    ) -> None:
        owner = {target: group for group, targets in groups.items() for target in targets}
        self._exact = {t: g for t, g in owner.items() if "re:" not in t}
        self._regex = [
            (name_pattern(t, "targets"), owner[t]) for t in sorted(owner) if t.startswith("re:")
        ]
        self._ignored = frozenset(i for i in ignore if not i.startswith("re:"))
        self._ignored_regex = [name_pattern(i, "ignore") for i in ignore if i.startswith("re:")]
        check_count([p for p, _ in self._regex], f"{file}: targets")
        check_count(self._ignored_regex, f"{file}: ignore")

    def group(self, name: str, kind: str) -> tuple[str, str] | None:
        """(group, target) of a module; None if no target hits.

        Args:
            name: module path as stored, with the expert's number.
            kind: of the layer, as ``LayerDesc.kind``.
        """
        if name in self._exact:
            return self._exact[name], name
        for pattern, group in self._regex:
            if pattern.matches(name):
                return group, f"re:{pattern.text}"
        for cls in sorted(CLASSES):
            if kind in CLASSES[cls] and cls in self._exact:
                return self._exact[cls], cls
        return None

    def ignored(self, name: str, kind: str) -> str:
        """The ignore entry that hits a module; "" if none does."""
        if name in self._ignored:
            return name
        hit = first_match(self._ignored_regex, name)
        if hit is not None:
            return f"re:{hit.text}"
        classes = (c for c, kinds in CLASSES.items() if kind in kinds and c in self._ignored)
        return next(classes, "")

    def patterns(self) -> tuple[NamePattern, ...]:
        """Everything that should match some module, for the report of what does not."""
        plain = [(t, "targets") for t in self._exact] + [(i, "ignore") for i in self._ignored]
        return (
            *(p for p, _ in self._regex),
            *self._ignored_regex,
            *(
                name_pattern(text, purpose)
                for text, purpose in plain
                if text not in CLASSES and not is_attention_class(text)
            ),
        )


def check_names(names: Sequence[object], file: str, key: str) -> tuple[str, ...]:
    """``names`` as strings.

    Raises:
        ConfigError: ``Q-CFG-TYPE`` unless it is a list of non-empty strings.
    """
    good = isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names)
    if not good:
        raise ConfigError(
            f"{file}: {key} is {str(names)[:60]!r}, expected a list of module names, 're:' "
            "expressions or class names. Restore the config the tool wrote.",
            code="Q-CFG-TYPE",
            path=file,
            tensor=key,
            actual=type(names).__name__,
            plugin="compressed_tensors",
        )
    return tuple(str(n) for n in names)
