"""Measured costs on disk: what ``quant bench --save`` found on this machine's device.

A kernel's shipped table or heuristic is replaced by what was measured here, per operation and
number of rows, unless the kernel is inexact: those run where they are named. Nothing is measured
in a request: the file is written by ``quant bench --save`` only, and read once per process.

    <cache>/kernels/<device>-<fingerprint>.json
    {"device": ..., "versions": {...}, "costs": {<operation>: {<kernel>: [[rows, us], ...]}}}

The fingerprint covers torch and every installed package that offers kernels, so a new version
starts anew. ``QUANT_CACHE`` names another folder (``quant_core.cache``); ``QUANT_MEASURED=off``
ignores the file. A file that cannot be read is ignored with one warning.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quant_core.cache import cache_folder, cache_there
from quant_core.errors import QuantError, printable
from quant_core.kernels.base import ANY_ROWS, Accepted, Kernel, Rejected
from quant_core.spec import CANONICAL, OpSpec
from quant_core.spec_json import to_text

__all__ = ["answer", "op_key", "save", "table_path"]

log = logging.getLogger("quant_core")

Costs = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


def op_key(op: OpSpec) -> str:
    """What a cost depends on: the operation without the packing of the file and the device."""
    features = frozenset(f for f in op.features if not f.startswith("tied"))
    plain = replace(op, packing=CANONICAL, device=(op.device[0], ""), features=features)
    return hashlib.sha256(to_text(plain).encode()).hexdigest()[:20]


def _device_name(device: tuple[str, str]) -> str:
    if device[0] == "cuda":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    if device[0] == "cpu":
        import platform

        return f"cpu-{platform.machine()}-{os.cpu_count()}"
    return device[0]


def _versions() -> dict[str, str]:
    from importlib import metadata

    from quant_core.registry import registry

    found = {
        i: p.version for i, p in registry().plugins.items() if registry().implements(i, "apply")
    }
    return {"torch": metadata.version("torch"), **dict(sorted(found.items()))}


@functools.lru_cache(maxsize=8)
def table_path(device: tuple[str, str]) -> Path:
    """Where the costs of a device are kept."""
    text = json.dumps(_versions(), sort_keys=True)
    mark = hashlib.sha256(text.encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", _device_name(device)).strip("-").lower()
    return cache_folder("kernels") / f"{slug}-{mark}.json"


@functools.lru_cache(maxsize=8)
def _read(path: Path) -> Costs:
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text("utf-8"))["costs"]
        for kernels in held.values():
            for pairs in kernels.values():
                if not all(m >= 1 and us > 0 for m, us in pairs):
                    raise ValueError("a cost is not positive")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        log.warning(
            "measured costs in %s cannot be read (%s); ignored. Delete the file.", path, err
        )
        return {}
    return held  # type: ignore[no-any-return]


def save(device: tuple[str, str], costs: Costs) -> Path:
    """Add costs (operation key -> kernel -> [[rows, us], ...]) to the device's file; atomic."""
    path = table_path(device)
    _read.cache_clear()
    merged: dict[str, dict[str, object]] = {k: dict(v) for k, v in _read(path).items()}
    for key, kernels in costs.items():
        merged.setdefault(key, {}).update(kernels)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"device": _device_name(device), "versions": _versions(), "costs": merged}
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as f:
        json.dump(data, f, indent=1)
    os.replace(f.name, path)
    _read.cache_clear()
    return path


def _measured(given: Accepted, pairs: Sequence[Sequence[float]]) -> Accepted:
    """``given`` with its costs replaced where they were measured; its limits stay."""
    known = sorted((int(m), float(us)) for m, us in pairs)
    bounds = sorted({m for m, _ in known} | {m for m, _ in given.costs} | {ANY_ROWS})
    out: list[tuple[int, float]] = []
    for bound in bounds:
        if given.cost_at(bound) == math.inf:
            out.append((bound, math.inf))
            continue
        out.append((bound, next((us for m, us in known if m >= bound), known[-1][1])))
    while out and out[-1][1] == math.inf:
        out.pop()
    note = f"{given.note}; measured here" if given.note else "measured here"
    return replace(given, costs=tuple(out), cost=out[0][1], note=note)


@functools.lru_cache(maxsize=256)
def _warn_of(kernel: str, found: str) -> None:
    log.warning(
        "kernel %r is left out: %s, expected Accepted or Rejected. This is a bug of the package "
        "that has it (`quant explain` names it); report it there.",
        kernel,
        found,
    )


def _said(kernel: Kernel, op: OpSpec) -> Accepted | Rejected:
    """A kernel that fails to answer is left out, with one warning; it hides no other."""
    try:
        said = kernel.accepts(op)
    except QuantError:
        raise
    except Exception as err:
        found = f"accepts raised {type(err).__name__}: {printable(err)}"
    else:
        if isinstance(said, Accepted | Rejected):
            return said
        found = f"accepts returned {type(said).__name__}"
    _warn_of(kernel.name, found)
    return Rejected(axis="kernel", have=found, need="an answer")


def answer(kernel: Kernel, op: OpSpec) -> Accepted | Rejected:
    """What the kernel says, with measured costs where there are any."""
    said = _said(kernel, op)
    if isinstance(said, Rejected) or os.environ.get("QUANT_MEASURED") == "off":
        return said
    if not cache_there("kernels"):  # the usual case, and cheap
        return said
    if not said.exact:  # it is opted in to by name, however fast it is
        return said
    costs = _read(table_path(op.device))
    pairs = costs.get(op_key(op), {}).get(kernel.name)
    return _measured(said, pairs) if pairs else said
