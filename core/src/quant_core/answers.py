"""What hooks and schemes may answer, so that a wrong answer names the plugin that gave it.

Iterables are walked here as well: what a generator raises is then the hook's own failure. Whether
None is an answer is for each hook's caller to judge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from quant_core.errors import PluginError, QuantError, printable
from quant_core.spec import BlockType, FormatMatch, LayerDesc, ParamSpec, Unquantized

__all__ = ["WrongAnswerError", "ask_offer", "ask_scheme", "checked", "no_memory"]

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


def _layer_tensors(answer: Any) -> Any:
    """Every operand has the scales and offsets that its spec names."""
    good = _one("tensors:LayerTensors")(answer)
    for qt in good.operands.values() if good is not None else ():
        minima = qt.spec.zero.levels if qt.spec.zero is not None else ()
        if (len(qt.scales), len(qt.offset)) != (len(qt.spec.scales), len(minima)):
            return None
    return good


def _json(answer: Any) -> Any:
    try:
        json.dumps(answer)
    except (TypeError, ValueError):
        return None
    return _settings(answer)


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
    "make_config": ("the block, JSON with string keys", _json),
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


_METHODS: Mapping[str, tuple[str, Check]] = {
    "params": ("a sequence of ParamSpec", _several(_one(ParamSpec))),
    "canonicalize": ("LayerTensors with all scales of the spec", _layer_tensors),
    "canonicalize_in_place": ("LayerTensors with all scales of the spec", _layer_tensors),
    "serialize": ("tensors by the names of params", _named(lambda value: value)),
    "quantize": ("LayerTensors with all scales of the spec", _layer_tensors),
}


def ask_scheme(scheme: Any, method: str, layer: LayerDesc, *args: Any) -> Any:
    """What a scheme's method gives for a layer.

    Raises:
        PluginError: ``Q-PLUGIN-RESULT`` if it raises anything but a ``QuantError`` or a lack of
            memory, or gives something of another type.
    """
    expected, check = _METHODS[method]
    try:
        answer = getattr(scheme, method)(layer, *args)
        good = check(answer)
    except (QuantError, MemoryError):
        raise
    except Exception as err:
        if no_memory(err):
            raise
        found = f"raised {type(err).__name__}: {printable(err)}"
        raise _scheme_error(scheme, method, layer, found) from err
    if good is None:
        found = f"returned {printable(repr(answer), 120)}, expected {expected}"
        raise _scheme_error(scheme, method, layer, found)
    return good


def ask_offer(plugin: str, offer: Any, layer: LayerDesc, options: Mapping[str, Any]) -> Any:
    """What an ``OnlineScheme`` makes of a layer: a scheme of its size, or ``Unquantized``.

    Raises:
        PluginError: ``Q-PLUGIN-RESULT`` as ``ask_scheme``.
    """
    from quant_core.scheme import Scheme

    size = (layer.out_features, layer.in_features)
    try:
        made = offer.make(layer, options)
        fits = isinstance(made, Scheme) and tuple(made.shape) == size
        if fits or isinstance(made, Unquantized):
            return made
        found = f"returned {printable(repr(made))}, expected a Scheme of {size} or Unquantized"
        cause = None
    except (QuantError, MemoryError):
        raise
    except Exception as err:
        found, cause = f"raised {type(err).__name__}: {printable(err)}", err
    raise PluginError(
        f"{printable(layer.name)}: plugin {plugin!r}: make of an online scheme {found}. "
        "This is a bug of the plugin; report it there.",
        code="Q-PLUGIN-RESULT",
        plugin=plugin,
        tensor=layer.name,
        actual=found,
    ) from cause


def no_memory(err: Exception) -> bool:
    """Whether memory does not suffice: torch's allocator raises a plain RuntimeError on the CPU."""
    return type(err).__name__ == "OutOfMemoryError" or "allocate memory" in str(err)


def _scheme_error(scheme: Any, method: str, layer: LayerDesc, found: str) -> PluginError:
    owner = type(scheme).__module__.partition(".")[0]
    name = getattr(scheme, "name", type(scheme).__name__)
    return PluginError(
        f"{printable(layer.stored)}: {method} of scheme {name!r} ({owner}) {found}. "
        "This is a bug of the plugin; report it there.",
        code="Q-PLUGIN-RESULT",
        plugin=owner,
        tensor=layer.stored,
        actual=found,
    )
