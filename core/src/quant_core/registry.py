"""Plugins: found through entry points, loaded in isolation, frozen once loaded.

One broken plugin never takes the rest down: whatever goes wrong is recorded as a ``SetAside`` with
its dist, version and cause, warned about once, and shown by ``quant plugins``.

    entry points of group "quant_core"  (name = plugin id)
      -> import, in sorted order         ImportError, SyntaxError, SystemExit: set aside
      -> plugin_info()                   wrong API, wrong id: set aside
      -> pluggy registration             misspelt hook, unknown argument, wrapper: set aside
      -> frozen registry                 two providers of one id or block type: neither is used

pluggy stops a hook call at the first exception and calls in reverse order of registration, so
``call_all`` walks the implementations itself, sorted by plugin id, each in its own try.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Any

import pluggy

from quant_core import hookspecs
from quant_core.errors import PluginError, QuantError, printable, summarize
from quant_core.spec import PLUGIN_API, BlockType, PluginInfo

__all__ = ["Plugin", "Registry", "SetAside", "load_registry", "registry"]

log = logging.getLogger("quant_core")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A plugin in use, and where it came from."""

    info: PluginInfo
    dist: str
    version: str
    target: str  # "module" or "module:attr" of the entry point
    module: Any
    import_ms: float

    @property
    def id(self) -> str:
        return self.info.id


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A plugin that is installed but not used, and why."""

    id: str
    dist: str
    version: str
    target: str
    code: str
    cause: str

    def __str__(self) -> str:
        return f"plugin {self.id!r} of {self.dist} {self.version} ({self.target}): {self.cause}"


class Registry:
    """The plugins of this process. Read-only after construction."""

    def __init__(
        self, plugins: Iterable[Plugin], set_aside: Iterable[SetAside], pm: pluggy.PluginManager
    ) -> None:
        self._pm = pm
        self.plugins: Mapping[str, Plugin] = MappingProxyType({p.id: p for p in plugins})
        self.set_aside = tuple(set_aside)
        self._block_types = self._collect_block_types()

    def implementations(self, hook: str) -> list[tuple[str, Any]]:
        """(plugin id, implementation) of a hook, sorted by plugin id."""
        impls = getattr(self._pm.hook, hook).get_hookimpls()
        return sorted(((i.plugin_name, i) for i in impls), key=lambda pair: pair[0])

    def implements(self, plugin_id: str, hook: str) -> bool:
        """Whether the plugin has that hook."""
        return any(name == plugin_id for name, _ in self.implementations(hook))

    @staticmethod
    def _invoke(impl: Any, kwargs: Mapping[str, Any]) -> Any:
        return impl.function(*[kwargs[a] for a in impl.argnames])

    def call_all(self, hook: str, **kwargs: Any) -> list[tuple[str, Any]]:
        """Answers of all plugins, sorted by id, None dropped.

        A ``QuantError`` is the plugin's considered answer and passes through; any other
        exception is wrapped in ``PluginError`` ``Q-PLUGIN-RESULT`` after all others were asked.
        """
        answers, broken = [], []
        for plugin_id, impl in self.implementations(hook):
            try:
                answer = self._invoke(impl, kwargs)
            except QuantError:
                raise
            except Exception as err:
                broken.append((plugin_id, err))
                continue
            if answer is not None:
                answers.append((plugin_id, answer))
        for plugin_id, error in broken:
            if not answers:
                raise self._result_error(plugin_id, hook, error) from error
            log.warning(
                "plugin %r: hook %s raised %r; ignored, others answered", plugin_id, hook, error
            )
        return answers

    def call_one(self, plugin_id: str, hook: str, **kwargs: Any) -> Any:
        """The answer of one plugin; None if it does not implement the hook."""
        for name, impl in self.implementations(hook):
            if name == plugin_id:
                try:
                    return self._invoke(impl, kwargs)
                except QuantError:
                    raise
                except Exception as err:
                    raise self._result_error(plugin_id, hook, err) from err
        return None

    def _result_error(self, plugin_id: str, hook: str, err: Exception) -> PluginError:
        p = self.plugins[plugin_id]
        return PluginError(
            f"plugin {plugin_id!r} ({p.dist} {p.version}): hook {hook} raised "
            f"{type(err).__name__}: {printable(err)}. "
            "This is a bug of the plugin; report it there.",
            code="Q-PLUGIN-RESULT",
            plugin=plugin_id,
            actual=repr(err),
        )

    def open_checkpoint(self, path: Any) -> list[tuple[str, Any]]:
        """All plugins' answers to ``open_checkpoint`` for ``path``."""
        return self.call_all("open_checkpoint", path=path)

    def block_type(self, name: str) -> BlockType:
        """The opaque block type ``name``.

        Raises:
            PluginError: ``Q-PLUGIN-MISSING`` if no installed plugin knows it.
        """
        try:
            return self._block_types[name]
        except KeyError:
            raise PluginError(
                f"opaque block type {name!r} is not known to any installed plugin, expected one of "
                f"{summarize(sorted(self._block_types)) or 'none'}. Install the plugin of the "
                "format that it belongs to.",
                code="Q-PLUGIN-MISSING",
                actual=name,
            ) from None

    def _collect_block_types(self) -> Mapping[str, BlockType]:
        out: dict[str, BlockType] = {}
        owner: dict[str, str] = {}
        for plugin_id, types in self.call_all("block_types"):
            for name, block_type in types.items():
                if name in out:
                    raise PluginError(
                        f"block type {name!r} is registered by plugins {owner[name]!r} and "
                        f"{plugin_id!r}, expected one. Uninstall one of them.",
                        code="Q-PLUGIN-CONFLICT",
                        plugin=plugin_id,
                        actual=name,
                    )
                out[name], owner[name] = block_type, plugin_id
        return MappingProxyType(out)


# ------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, slots=True)
class _Candidate:
    id: str
    dist: str
    version: str
    target: str
    load: Any  # () -> module

    def aside(self, code: str, cause: str) -> SetAside:
        return SetAside(
            id=self.id,
            dist=self.dist,
            version=self.version,
            target=self.target,
            code=code,
            cause=cause,
        )


def _candidates() -> list[_Candidate]:
    found: dict[tuple[str, str, str], _Candidate] = {}
    for ep in metadata.entry_points(group=hookspecs.GROUP):
        dist, version = _dist_of(ep)
        # one dist seen twice on sys.path (a stale .egg-info beside the real one) counts once
        found.setdefault(
            (ep.name, dist.lower(), ep.value), _Candidate(ep.name, dist, version, ep.value, ep.load)
        )
    return sorted(found.values(), key=lambda c: (c.id, c.dist))


def _dist_of(ep: metadata.EntryPoint) -> tuple[str, str]:
    """Name and version; of a half-removed dist without METADATA, the folder that is left of it."""
    if ep.dist is None:
        return "unknown", "0"
    name, version = ep.dist.metadata["Name"], ep.dist.metadata["Version"]
    if name is None:
        return f"what is left at {getattr(ep.dist, '_path', ep.dist.locate_file(''))}", "0"
    return name, version or "0"


def _check_info(c: _Candidate, module: Any) -> PluginInfo | SetAside:
    if not hasattr(module, "plugin_info"):
        return c.aside("Q-PLUGIN-RESULT", "has no plugin_info hook; add one")
    try:
        info = module.plugin_info()
    except Exception as err:
        return c.aside("Q-PLUGIN-RESULT", f"plugin_info raised {err!r}")
    if not isinstance(info, PluginInfo):
        return c.aside("Q-PLUGIN-RESULT", f"plugin_info returned {type(info).__name__}")
    if info.id != c.id:
        return c.aside("Q-PLUGIN-RESULT", f"calls itself {info.id!r}; the names must be equal")
    if info.api[0] != PLUGIN_API[0] or info.api[1] > PLUGIN_API[1]:
        want, have = ".".join(map(str, info.api)), ".".join(map(str, PLUGIN_API))
        newer = tuple(info.api) > PLUGIN_API
        fix = "pip install -U quant-core" if newer else f"pip install -U {c.dist}"
        return c.aside("Q-PLUGIN-API", f"needs plugin API {want}, core has {have}; run `{fix}`")
    return info


def _register(pm: pluggy.PluginManager, c: _Candidate, module: Any) -> SetAside | None:
    try:
        pm.register(module, name=c.id)
        mine = [
            i
            for caller in (pm.get_hookcallers(module) or [])
            for i in caller.get_hookimpls()
            if i.plugin is module
        ]
        if any(i.hookwrapper or i.wrapper for i in mine):
            raise ValueError("hook wrappers are not allowed on these hooks")
        pm.check_pending()
    except Exception as err:  # pluggy leaves a half-registered plugin behind
        pm.unregister(name=c.id)
        return c.aside("Q-PLUGIN-RESULT", f"registration failed: {err}")
    return None


def load_registry(
    candidates: Iterable[_Candidate] | None = None, *, only: Iterable[str] | None = None
) -> Registry:
    """Import and register plugins. The order of ``candidates`` does not matter.

    Args:
        only: ids to load; default from the environment variable ``QUANT_PLUGINS`` (comma list).

    Raises:
        PluginError: ``Q-PLUGIN-MISSING`` if ``only`` names a plugin that is not installed.
    """
    cands = sorted(
        _candidates() if candidates is None else candidates, key=lambda c: (c.id, c.dist)
    )
    if only is None and os.environ.get("QUANT_PLUGINS"):
        only = [p.strip() for p in os.environ["QUANT_PLUGINS"].split(",") if p.strip()]
    if only is not None:
        wanted = set(only)
        if missing := wanted - {c.id for c in cands}:
            raise PluginError(
                f"QUANT_PLUGINS names {summarize(sorted(missing))}, installed are "
                f"{summarize(sorted({c.id for c in cands})) or 'none'}. "
                "Install the plugin or correct the list.",
                code="Q-PLUGIN-MISSING",
                expected=sorted(missing),
            )
        cands = [c for c in cands if c.id in wanted]
    pm = pluggy.PluginManager(hookspecs.GROUP)
    pm.add_hookspecs(hookspecs)
    plugins: list[Plugin] = []
    aside: list[SetAside] = []
    by_id: dict[str, list[_Candidate]] = {}
    for c in cands:
        by_id.setdefault(c.id, []).append(c)
    for same in by_id.values():
        if len(same) > 1:
            names = " and ".join(f"{c.dist} {c.version}" for c in same)
            cause = f"id is provided by {names}; uninstall one"
            aside += [c.aside("Q-PLUGIN-CONFLICT", cause) for c in same]
            continue
        c = same[0]
        start = time.perf_counter()
        try:
            module = c.load()
        except (Exception, SystemExit) as err:
            aside.append(c.aside("Q-PLUGIN-IMPORT", f"import raised {err!r}"))
            continue
        ms = (time.perf_counter() - start) * 1e3
        info = _check_info(c, module)
        if isinstance(info, SetAside):
            aside.append(info)
            continue
        if problem := _register(pm, c, module):
            aside.append(problem)
            continue
        plugins.append(
            Plugin(
                info=info,
                dist=c.dist,
                version=c.version,
                target=c.target,
                module=module,
                import_ms=ms,
            )
        )
    for problem in aside:
        log.warning("set aside: %s", problem)
    return Registry(plugins, aside, pm)


_lock = threading.Lock()
_registry: Registry | None = None


def registry() -> Registry:
    """The process-wide registry, loaded on first use and then frozen. Thread-safe, idempotent."""
    global _registry
    if _registry is None:
        with _lock:
            if _registry is None:
                _registry = load_registry()
    return _registry
