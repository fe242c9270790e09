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
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Any

import pluggy

from quant_core import hookspecs
from quant_core.answers import WrongAnswerError, checked
from quant_core.errors import PluginError, QuantError, printable, summarize
from quant_core.spec import PLUGIN_API, BlockType, PluginInfo

__all__ = ["Plugin", "Registry", "SetAside", "load_registry", "owner_of", "registry"]

log = logging.getLogger("quant_core")

_FAILURES = (Exception, SystemExit)  # a plugin that exits has failed like one that raises


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
        self,
        plugins: Iterable[Plugin],
        set_aside: Iterable[SetAside],
        pm: pluggy.PluginManager,
        block_types: Mapping[str, BlockType],
    ) -> None:
        self._pm = pm
        self._sorted: dict[str, list[tuple[str, Any]]] = {}
        self._first: dict[str, dict[str, Any]] = {}
        self.plugins: Mapping[str, Plugin] = MappingProxyType({p.id: p for p in plugins})
        self.set_aside = tuple(set_aside)
        self._block_types = MappingProxyType(dict(block_types))

    def implementations(self, hook: str) -> list[tuple[str, Any]]:
        """(plugin id, implementation) of a hook, sorted by plugin id."""
        found = self._sorted.get(hook)
        if found is None:  # asked for every layer of a model
            impls = getattr(self._pm.hook, hook).get_hookimpls()
            found = sorted(((i.plugin_name, i) for i in impls), key=lambda pair: pair[0])
            self._sorted[hook] = found
        return found

    def implements(self, plugin_id: str, hook: str) -> bool:
        """Whether the plugin has that hook."""
        return any(name == plugin_id for name, _ in self.implementations(hook))

    @staticmethod
    def _invoke(hook: str, impl: Any, kwargs: Mapping[str, Any]) -> Any:
        return checked(hook, impl.function(*[kwargs[a] for a in impl.argnames]))

    def _ask(self, hook: str, kwargs: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        """(plugin id, answer) of those that answered; (plugin id, error) of those that failed."""
        answers, broken = [], []
        for plugin_id, impl in self.implementations(hook):
            try:
                answer = self._invoke(hook, impl, kwargs)
            except QuantError:
                raise
            except _FAILURES as err:
                broken.append((plugin_id, err))
                continue
            if answer is not None:
                answers.append((plugin_id, answer))
        return answers, broken

    def call_all(self, hook: str, **kwargs: Any) -> list[tuple[str, Any]]:
        """Answers of all plugins, sorted by id, None dropped.

        A ``QuantError`` is the plugin's considered answer and passes through. Any other exception,
        or an answer of another type, is warned about if other plugins answered, and else
        ``PluginError`` ``Q-PLUGIN-RESULT``.
        """
        answers, broken = self._ask(hook, kwargs)
        for plugin_id, error in broken:
            problem = self._result_error(plugin_id, hook, error)
            if not answers:
                raise problem from error
            log.warning("%s Its answer is ignored; others answered.", problem)
        return answers

    def call_one(self, plugin_id: str, hook: str, **kwargs: Any) -> Any:
        """The answer of one plugin; None if it does not implement the hook."""
        known = self._first.get(hook)
        if known is None:
            known = self._first[hook] = dict(reversed(self.implementations(hook)))
        impl = known.get(plugin_id)
        if impl is None:
            return None
        try:
            return self._invoke(hook, impl, kwargs)
        except QuantError:
            raise
        except _FAILURES as err:
            raise self._result_error(plugin_id, hook, err) from err

    def _result_error(self, plugin_id: str, hook: str, err: BaseException) -> PluginError:
        p = self.plugins[plugin_id]
        what = f"raised {type(err).__name__}: {printable(err)}"
        if isinstance(err, WrongAnswerError):
            what = f"returned {printable(err)}"
        return PluginError(
            f"plugin {plugin_id!r} ({p.dist} {p.version}): hook {hook} {what}. "
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


# ------------------------------------------------------------------------------------- loading


_Problem = tuple[str, str]
"""Code and cause."""


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
    except _FAILURES as err:
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


def _load(pm: pluggy.PluginManager, c: _Candidate) -> Plugin | SetAside:
    start = time.perf_counter()
    try:
        module = c.load()
    except _FAILURES as err:
        return c.aside("Q-PLUGIN-IMPORT", f"import raised {err!r}")
    ms = (time.perf_counter() - start) * 1e3
    info = _check_info(c, module)
    if isinstance(info, SetAside):
        return info
    if problem := _register(pm, c, module):
        return problem
    return Plugin(
        info=info, dist=c.dist, version=c.version, target=c.target, module=module, import_ms=ms
    )


def _block_types(pm: pluggy.PluginManager) -> tuple[dict[str, BlockType], dict[str, _Problem]]:
    """All block types, and the plugins whose own cannot be used: id -> (code, cause)."""
    types: dict[str, dict[str, BlockType]] = {}
    problems: dict[str, _Problem] = {}
    for impl in sorted(pm.hook.block_types.get_hookimpls(), key=lambda i: i.plugin_name):
        try:
            types[impl.plugin_name] = checked("block_types", impl.function()) or {}
        except WrongAnswerError as err:
            problems[impl.plugin_name] = ("Q-PLUGIN-RESULT", f"block_types returned {err}")
        except _FAILURES as err:
            problems[impl.plugin_name] = ("Q-PLUGIN-RESULT", f"block_types raised {err!r}")
    owners: dict[str, list[str]] = {}
    for plugin_id, mine in types.items():
        for name in mine:
            owners.setdefault(name, []).append(plugin_id)
    for name, ids in owners.items():
        if len(ids) > 1:
            cause = f"block type {name!r} is registered by {' and '.join(ids)}; uninstall one"
            problems |= dict.fromkeys(ids, ("Q-PLUGIN-CONFLICT", cause))
    used = (mine for plugin_id, mine in types.items() if plugin_id not in problems)
    return {name: t for mine in used for name, t in mine.items()}, problems


def _wanted(candidates: Iterable[_Candidate], only: Iterable[str] | None) -> list[_Candidate]:
    """The candidates to load, sorted; ``only`` as in ``load_registry``."""
    cands = sorted(candidates, key=lambda c: (c.id, c.dist))
    if only is None and os.environ.get("QUANT_PLUGINS"):
        only = [p.strip() for p in os.environ["QUANT_PLUGINS"].split(",") if p.strip()]
    if only is None:
        return cands
    wanted = set(only)
    if missing := wanted - {c.id for c in cands}:
        raise PluginError(
            f"QUANT_PLUGINS names {summarize(sorted(missing))}, installed are "
            f"{summarize(sorted({c.id for c in cands})) or 'none'}. "
            "Install the plugin or correct the list.",
            code="Q-PLUGIN-MISSING",
            expected=sorted(missing),
        )
    return [c for c in cands if c.id in wanted]


def load_registry(
    candidates: Iterable[_Candidate] | None = None, *, only: Iterable[str] | None = None
) -> Registry:
    """Import and register plugins. The order of ``candidates`` does not matter.

    Args:
        only: ids to load; default from the environment variable ``QUANT_PLUGINS`` (comma list).

    Raises:
        PluginError: ``Q-PLUGIN-MISSING`` if ``only`` names a plugin that is not installed.
    """
    pm = pluggy.PluginManager(hookspecs.GROUP)
    pm.add_hookspecs(hookspecs)
    plugins: list[Plugin] = []
    aside: list[SetAside] = []
    by_id: dict[str, list[_Candidate]] = {}
    for c in _wanted(_candidates() if candidates is None else candidates, only):
        by_id.setdefault(c.id, []).append(c)
    for same in by_id.values():
        if len(same) > 1:
            names = " and ".join(f"{c.dist} {c.version}" for c in same)
            cause = f"id is provided by {names}; uninstall one"
            aside += [c.aside("Q-PLUGIN-CONFLICT", cause) for c in same]
            continue
        loaded = _load(pm, same[0])
        if isinstance(loaded, SetAside):
            aside.append(loaded)
        else:
            plugins.append(loaded)
    types, problems = _block_types(pm)
    for plugin_id, problem in problems.items():
        pm.unregister(name=plugin_id)
        aside.append(by_id[plugin_id][0].aside(*problem))
    for one in aside:
        log.warning("set aside: %s", one)
    return Registry((p for p in plugins if p.id not in problems), aside, pm, types)


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


def owner_of(err: BaseException) -> Plugin | None:
    """The plugin whose code was the last to run before ``err``; None if none was on the way."""
    packages = {p.target.split(":")[0].split(".")[0]: p for p in registry().plugins.values()}
    names = (str(f.f_globals.get("__name__")) for f, _ in traceback.walk_tb(err.__traceback__))
    met = [p for name in names if (p := packages.get(name.split(".")[0])) is not None]
    return met[-1] if met else None
