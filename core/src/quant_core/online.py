"""Online quantization: what plugins offer to make from float weights, and what a user asks for.

    "NAME"          the scheme NAME of the plugin with the id NAME; if that plugin offers none of
                    that name, or is not installed, the one scheme that claims the bare name
    "PLUGIN:NAME"   the scheme NAME of that plugin

Two plugins that claim one bare name conflict; the full spelling always works. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quant_core.errors import ConfigError, PluginError, printable, summarize
from quant_core.registry import Registry
from quant_core.resolve import NamePattern, check_count
from quant_core.scheme import Scheme
from quant_core.spec import LayerDesc, Unquantized

__all__ = [
    "DEFAULT_SKIP",
    "OnlineRequest",
    "OnlineScheme",
    "SkipRules",
    "find_online",
    "offers",
    "settled_options",
    "short_name",
]

DEFAULT_SKIP = ("lm_head", "embed_out", "gate", "shared_expert_gate", "router")
"""Modules that stay floats unless ``skip`` says otherwise: output embeddings and routers. Input
embeddings, norms and everything else that is no linear layer stay floats in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineScheme:
    """One thing a plugin makes from float weights.

    Attributes:
        summary: one line for tables.
        make: the scheme of one layer: (layer, options) -> Scheme, or Unquantized with the rule
            by which this layer cannot be held. ``layer`` has its sizes, and ``dtype`` is that of
            the stored weights; of a stack of experts it is called once. Imports no torch. The
            scheme's ``quantize`` is called for each matrix, without statistics.
        options: name -> default of what ``make`` takes; it checks the values.
        bare: claim the name without the plugin's id.
    """

    summary: str
    make: Callable[[LayerDesc, Mapping[str, Any]], Scheme | Unquantized]
    options: Mapping[str, Any] = field(default_factory=dict)
    bare: bool = False


def offers(registry: Registry) -> dict[str, dict[str, OnlineScheme]]:
    """Plugin id -> its online schemes."""
    return {plugin: dict(answer) for plugin, answer in registry.call_all("online_schemes")}


def _unknown(name: str, known: Mapping[str, Mapping[str, OnlineScheme]]) -> ConfigError:
    names = {
        scheme_name if scheme.bare or plugin == scheme_name else f"{plugin}:{scheme_name}"
        for plugin, schemes in known.items()
        for scheme_name, scheme in schemes.items()
    }
    return ConfigError(
        f"online: {printable(name)!r} is made by no installed plugin, expected one of "
        f"{summarize(sorted(names), 20) or 'none (no plugin offers any)'}. Correct the name, or "
        "install the plugin.",
        code="Q-CFG-VALUE",
        tensor="online",
        expected=sorted(names),
        actual=name,
    )


def find_online(registry: Registry, name: str) -> tuple[str, OnlineScheme]:
    """(plugin id, scheme) of a name, by the rule of the module's docstring.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` listing the names there are.
        PluginError: ``Q-PLUGIN-CONFLICT`` if several plugins claim it.
    """
    known = offers(registry)
    plugin, colon, short = name.partition(":") if isinstance(name, str) else ("", "", "")
    if colon:
        if short not in known.get(plugin, {}):
            raise _unknown(name, known)
        return plugin, known[plugin][short]
    if plugin in known.get(plugin, {}):
        return plugin, known[plugin][plugin]
    claims = [p for p, schemes in known.items() if plugin in schemes and schemes[plugin].bare]
    if len(claims) > 1:
        full = " or ".join(f"{p}:{plugin}" for p in claims)
        raise PluginError(
            f"online: {name!r} is claimed by plugins {summarize(claims)}, expected one. "
            f"Say {full}.",
            code="Q-PLUGIN-CONFLICT",
            expected=1,
            actual=claims,
        )
    if not claims:
        raise _unknown(str(name), known)
    return claims[0], known[claims[0]][plugin]


def short_name(registry: Registry, plugin: str, name: str) -> str:
    """The shortest spelling that means this scheme: ``name``, or ``plugin:name``."""
    try:
        owner, _ = find_online(registry, name)
    except (ConfigError, PluginError):
        owner = ""
    return name if owner == plugin else f"{plugin}:{name}"


# ------------------------------------------------------------------------------ what is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRequest:
    """What a user asks for.

    Attributes:
        name: of the online scheme.
        skip: patterns after ``DEFAULT_SKIP``, see ``SkipRules``.
        options: of the scheme.
        requantize: take quantized layers too, from their dequantized weights.
    """

    name: str
    skip: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    requantize: bool = False


class SkipRules:
    """Which modules stay floats; of all patterns that match a module the LAST decides.

        "q_proj"  "layers.0"    whole parts of the module's name, anywhere in it
        "*.mlp.*"               shell wildcards over the whole name
        "re:TEXT"               a regular expression, anchored at the start of the name
        "!PATTERN"              the modules of PATTERN are quantized after all

    Raises:
        ConfigError: ``Q-CFG-REGEX`` for an invalid expression or too many patterns,
            ``Q-CFG-TYPE`` for something that is no list of texts.
    """

    def __init__(self, skip: tuple[str, ...]) -> None:
        if not all(isinstance(text, str) and text.strip("!") for text in skip):
            raise ConfigError(
                f"skip: is {printable(repr(skip))}, expected a list of name patterns. "
                "Pass skip=['q_proj', 're:.*layers\\.0\\..*'], for example.",
                code="Q-CFG-TYPE",
                tensor="skip",
                actual=skip,
            )
        self.rules = [(text, _pattern(text)) for text in (*DEFAULT_SKIP, *skip)]
        check_count([p for _, p in self.rules], "skip")
        self._unused = set(skip)

    def __call__(self, name: str) -> str:
        """The pattern that keeps the module ``name`` float; "" if it is to be quantized."""
        decided = ""
        for text, pattern in self.rules:
            if pattern.matches(name):
                self._unused.discard(text)
                decided = "" if text.startswith("!") else text
        return decided

    @property
    def unused(self) -> list[str]:
        """Patterns of the user that matched nothing that was asked about."""
        return [text for text, _ in self.rules if text in self._unused]


def _pattern(text: str) -> NamePattern:
    body = text.removeprefix("!")
    if body.startswith("re:"):
        return NamePattern(kind="regex", text=body[3:], purpose="skip")
    if any(c in body for c in "*?["):
        return NamePattern(kind="glob", text=body, purpose="skip")
    return NamePattern(kind="search", text=rf"(?:^|\.){re.escape(body)}(?:\.|$)", purpose="skip")


def settled_options(name: str, scheme: OnlineScheme, options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options for the scheme called ``name``, on top of its defaults.

    Raises:
        ConfigError: ``Q-CFG-KEY`` for one that it does not have.
    """
    unknown = sorted(set(options) - set(scheme.options))
    if unknown:
        known = summarize(scheme.options) or "none"
        raise ConfigError(
            f"online_options: {summarize(unknown)} is no option of {name!r}, expected "
            f"{known}. Correct the name.",
            code="Q-CFG-KEY",
            tensor=unknown[0],
            expected=sorted(scheme.options),
            actual=unknown,
        )
    return {**scheme.options, **options}
