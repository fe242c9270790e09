"""What a hook may answer. The registry asks here, so that a wrong answer names its plugin.

Iterables are walked here as well: what a generator raises is then the hook's own failure. Whether
None is an answer is for each hook's caller to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from quant_core.spec import BlockType, FormatMatch, LayerDesc, ParamSpec

__all__ = ["WrongAnswerError", "checked"]

Check = Callable[[Any], Any]
"""Gives the answer as core uses it; None if it is of another type."""


class WrongAnswerError(TypeError):
    """Found and expected, in words."""


def _one(cls: type | str) -> Check:
    """One object of a class; "module:name" of quant_core is imported when somebody answers."""

    def check(answer: Any) -> Any:
        if isinstance(cls, type):
            return answer if isinstance(answer, cls) else None
        module, _, name = cls.partition(":")
        found = getattr(import_module(f"quant_core.{module}"), name)
        return answer if isinstance(answer, found) else None

    return check


def _kernel(answer: Any) -> Any:
    named = isinstance(getattr(answer, "name", None), str) and not isinstance(answer, type)
    return answer if named and callable(getattr(answer, "accepts", None)) else None


def _several(each: Check) -> Check:
    """Any iterable of such items, but no text and no mapping."""

    def check(answer: Any) -> Any:
        if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | Mapping):
            return None
        items = tuple(each(item) for item in answer)
        return None if None in items else items

    return check


def _named(each: Check) -> Check:
    """Names with such a value each."""

    def check(answer: Any) -> Any:
        if not isinstance(answer, Mapping) or not all(isinstance(name, str) for name in answer):
            return None
        items = {name: each(value) for name, value in answer.items()}
        return None if None in items.values() else items

    return check


def _settings(answer: Any) -> Any:
    good = isinstance(answer, Mapping) and all(isinstance(name, str) for name in answer)
    return answer if good else None


_CHECKS: Mapping[str, tuple[str, Check]] = {
    "open_checkpoint": ("a Checkpoint or None", _one("checkpoint.base:Checkpoint")),
    "detect_format": ("a FormatMatch or None", _one(FormatMatch)),
    "split_modules": ("module paths with LayerDescs each", _named(_several(_one(LayerDesc)))),
    "attention_schemes": (
        "module paths with a CacheScheme each",
        _named(_one("kv_cache:CacheScheme")),
    ),
    "create_weights": ("a sequence of ParamSpec", _several(_one(ParamSpec))),
    "apply": ("an iterable of kernels, which have a name and accepts()", _several(_kernel)),
    "block_types": ("names with a BlockType each", _named(_one(BlockType))),
    "make_config": ("the block, a mapping with string keys", _settings),
    "make_extras": ("Extras or None", _one("describe:Extras")),
    "cache_form": ("a CacheForm or None", _one("kv_cache:CacheForm")),
    "settle_options": ("options, a mapping with string keys", _settings),
    "write_checkpoint": ("the paths of the files written", _several(_one(Path))),
    "online_schemes": ("names with an OnlineScheme each", _named(_one("online:OnlineScheme"))),
}


def checked(hook: str, answer: Any) -> Any:
    """``answer``; where the hook may answer with any iterable, as a tuple.

    Raises:
        WrongAnswerError: it is of another type. What an iterable raises passes through.
    """
    if answer is None or hook not in _CHECKS:
        return answer
    expected, check = _CHECKS[hook]
    good = check(answer)
    if good is None:
        raise WrongAnswerError(f"{answer!r:.120}, expected {expected}")
    return good
