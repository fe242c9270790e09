"""``open_checkpoint``: from a path to a ``Checkpoint``, whatever container it is.

    file    *.safetensors or its index    core's own reader
            any other                     asked of the plugins
    folder  a safetensors set             core's own reader, unless a plugin claims the folder too
            anything else                 asked of the plugins

Plugins are asked about every folder, so that two sets of weights side by side are noticed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from quant_core.checkpoint import discover
from quant_core.checkpoint.base import Checkpoint
from quant_core.checkpoint.files import io_error
from quant_core.checkpoint.safetensors import SafetensorsCheckpoint
from quant_core.errors import (
    CheckpointError,
    FormatError,
    PluginError,
    printable,
    summarize,
)
from quant_core.known import install_advice, unread_files
from quant_core.registry import registry

__all__ = ["open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint by its headers; no tensor is read and torch is not imported.

    Args:
        path: a file, or a folder that holds one checkpoint.

    Raises:
        CheckpointError: ``Q-CKPT-*``: unreadable, broken, ambiguous, or only pickles.
        FormatError: ``Q-FMT-UNKNOWN`` if no installed plugin reads it, ``Q-FMT-AMBIGUOUS`` if two
            do.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise CheckpointError(
            f"{printable(text)}: path holds a NUL character, expected a file or folder. "
            "Correct the path.",
            code="Q-CKPT-PATH",
            path=printable(text),
        )
    # not resolved: a file of the hub cache is a link out of the folder with its config
    where = Path(os.path.abspath(text))
    try:
        mode = where.stat().st_mode
    except OSError as err:
        raise io_error(where, err, "cannot be opened") from err
    if stat.S_ISDIR(mode):
        return _open_folder(where)
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{printable(where)}: is neither a file nor a folder, expected one of them. "
            "Give the path of the checkpoint itself.",
            code="Q-CKPT-PATH",
            path=where,
        )
    return _open_file(where)


def _open_file(path: Path) -> Checkpoint:
    if path.name.endswith((discover.SUFFIX, discover.INDEX_SUFFIX)):
        return SafetensorsCheckpoint.open(path)
    if discover.is_pickle_name(path.name):
        raise discover.pickle_error(path, [path.name])
    claims = _ask(path)
    if not claims:
        raise _unknown(path, [path.name])
    return _single(path, claims)


def _open_folder(folder: Path) -> Checkpoint:
    names = discover.list_names(folder)
    found = discover.find_set(folder, names)
    try:
        claims, trouble = _ask(folder), ""
    except PluginError as err:
        if found is None:
            raise
        claims, trouble = [], str(err)  # a broken plugin must not block core's own container
    weak = found is not None and found.weak and not claims
    if weak and (unread := unread_files(names, registry(), containers=True)):
        raise _unknown(folder, list(unread))  # these are the weights
    if found is not None and not (found.weak and claims):
        if claims:
            raise _two_containers(folder, found, claims)
        checkpoint = SafetensorsCheckpoint.open_set(folder, found)
        if trouble:
            checkpoint.warnings.append(trouble)
        return checkpoint
    if claims:
        claimed = _single(folder, claims)
        if found is not None:
            claimed.warnings.append(
                f"{printable(folder)}: {found.label} is not read; the weights are those of the "
                f"{claimed.container} container beside it"
            )
        return claimed
    if pickles := [n for n in names if discover.is_pickle_name(n)]:
        raise discover.pickle_error(folder, pickles)
    if discover.partial_files(folder):
        raise discover.missing_shards(folder, [], 0)
    raise _unknown(folder, names)


def _ask(path: Path) -> list[tuple[str, Checkpoint]]:
    """Checkpoints that plugins opened for ``path``."""
    claims: list[tuple[str, Checkpoint]] = registry().call_all("open_checkpoint", path=path)
    return claims


def _single(path: Path, claims: list[tuple[str, Checkpoint]]) -> Checkpoint:
    if len(claims) > 1:
        _close(claims)
        plugins = [plugin for plugin, _ in claims]
        raise FormatError(
            f"{printable(path)}: is opened by the plugins {summarize(plugins)}, expected one. "
            "Uninstall one of them, or choose with the environment variable QUANT_PLUGINS.",
            code="Q-FMT-AMBIGUOUS",
            path=path,
            actual=tuple(plugins),
        )
    return claims[0][1]


def _two_containers(
    folder: Path, found: discover.FileSet, claims: list[tuple[str, Checkpoint]]
) -> CheckpointError:
    _close(claims)
    others = [f"{c.container} ({printable(c.path.name)})" for _, c in claims]
    return CheckpointError(
        f"{printable(folder)}: holds safetensors ({found.label}) and {', '.join(others)}, expected "
        "one set of weights. Give the path of the file to open.",
        code="Q-CKPT-AMBIGUOUS",
        path=folder,
        expected="one set of weights",
        actual=("safetensors", *(c.container for _, c in claims)),
    )


def _close(claims: list[tuple[str, Checkpoint]]) -> None:
    for _, checkpoint in claims:
        checkpoint.close()


def _unknown(path: Path, names: list[str]) -> FormatError:
    readable = ["safetensors (core)"]
    for plugin in registry().plugins.values():
        if plugin.info.containers:
            readable.append(f"{', '.join(plugin.info.containers)} ({plugin.id})")
    unread = unread_files(names, registry())
    found = f"found {summarize(unread or names, 5)}" if names else "the folder is empty"
    fix = (
        install_advice(unread.values())
        or "Check the path, or install the plugin that reads this container."
    )
    return FormatError(
        f"{printable(path)}: no weights that can be read, {found}; expected one of "
        f"{'; '.join(readable)}. {fix}",
        code="Q-FMT-UNKNOWN",
        path=path,
        expected=tuple(readable),
        actual=tuple(names[:100]),
    )
