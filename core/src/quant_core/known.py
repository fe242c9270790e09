"""Which dist adds what, of those published with quant-core: for the advice to install one.

Generated data (``known_formats.json``, by tools/gen_known_formats.py); the one place where core
knows formats. Names outside of it get no advice: it could be anybody's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from importlib import resources

from quant_core.registry import Registry

__all__ = ["install_advice", "known_formats", "unread_files"]


@functools.cache
def known_formats() -> Mapping[str, str]:
    """What a checkpoint may say or hold -> dist that reads it.

    Keys: a ``quant_method``; a suffix of a container's files, ``*.x``; the name of a file beside
    the weights, ``/x.json``, that one dist alone reads.
    """
    text = resources.files("quant_core").joinpath("known_formats.json").read_text("utf-8")
    known: Mapping[str, str] = json.loads(text)
    return known


def unread_files(
    names: Iterable[str], registry: Registry, *, containers: bool = False
) -> Mapping[str, str]:
    """Of these files, those that only a dist reads that is not installed: name -> that dist.

    Args:
        containers: of weights only, not of descriptions beside them.
    """
    installed, known, found = {p.dist for p in registry.plugins.values()}, known_formats(), {}
    for name in names:
        dist = known.get(f"*.{name.rpartition('.')[2]}")
        if dist is None and not containers:
            dist = known.get(f"/{name}")
        if dist is not None and dist not in installed:
            found[name] = dist
    return found


def install_advice(dists: Iterable[str]) -> str:
    """The pip line for dists; "" for none."""
    names = " ".join(sorted(set(dists)))
    return f"Run `pip install {names}`." if names else ""
