"""What prepared buffers depend on. Equal keys mean equal buffers; anything in doubt is in the key.

checkpoint   real path, device, inode, size, mtime and ctime of every file, and the header's
             table of tensors. ctime moves with any change of a file, also one that restores
             the other numbers.
members      every member's description and scheme, as planned
software     versions of all plugins, of torch, and of the sources of core and plugins on disk
machine      architecture, processor features, device
request      what is built, dtype, kernels allowed, and QUANT_* variables but this cache's own
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from quant_core.plan import Plan

__all__ = ["Key", "key_of"]

FORMAT = 2  # of entries; another number never matches
_SOURCES = (".py", ".so", ".json", ".cu")
_ADDRESS = " at 0x"  # a repr that names an object, not its value


@dataclass(frozen=True, slots=True)
class Key:
    """``fields`` is JSON-able; ``digest`` names the entry."""

    fields: Mapping[str, Any]

    @property
    def text(self) -> str:
        return json.dumps(self.fields, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:40]


def _digest(parts: Iterable[str]) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode("utf-8", "surrogatepass"))
        h.update(b"\0")
    return h.hexdigest()


def _files(plan: Plan) -> list[list[object]]:
    checkpoint, out = plan.checkpoint, []
    for name in sorted({t.file for t in checkpoint.tensors.values()}):
        real = Path(os.path.realpath(checkpoint.folder / name))
        s = real.stat()
        out.append([name, str(real), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns])
    return out


def _header(plan: Plan) -> str:
    tensors = plan.checkpoint.tensors.values()
    return _digest(f"{t.name}|{t.dtype}|{t.shape}|{t.file}|{t.offset}|{t.nbytes}" for t in tensors)


def _members(plan: Plan) -> str | None:
    shown: dict[int, str] = {}  # schemes of equal layers are often one object
    parts = []
    for name, member in plan.members.items():
        if id(member.scheme) not in shown:
            shown[id(member.scheme)] = repr(member.scheme)
        parts.append(f"{name}|{member.layer!r}|{shown[id(member.scheme)]}")
    return None if any(_ADDRESS in part for part in parts) else _digest(parts)


@functools.cache
def _sources(folders: tuple[str, ...]) -> str:
    """Names, sizes and times of all sources below ``folders``: another build is another key."""
    found = []
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                if name.endswith(_SOURCES):
                    s = os.stat(os.path.join(parent, name))
                    found.append(f"{parent}/{name}|{s.st_size}|{s.st_mtime_ns}")
    return _digest(sorted(found))


def _software(plan: Plan) -> dict[str, object]:
    import torch

    import quant_core

    plugins = plan.registry.plugins
    targets = sorted({p.target.partition(":")[0] for p in plugins.values()})
    modules = [quant_core, *(m for t in targets if (m := sys.modules.get(t)) is not None)]
    folders = {str(Path(f).parent) for m in modules if (f := getattr(m, "__file__", None))}
    return {
        "torch": torch.__version__,
        "quant_core": quant_core.__version__,
        "plugins": {name: f"{p.dist} {p.version}" for name, p in sorted(plugins.items())},
        "sources": _sources(tuple(sorted(folders))),
    }


@functools.cache
def _processor() -> str:
    """Features of the first processor, as Linux lists them; "" elsewhere."""
    try:
        with open("/proc/cpuinfo", "rb") as file:
            text = file.read(1 << 14).decode("latin-1")
    except OSError:
        return ""
    lines = [x for x in text.split("\n") if x.startswith(("flags", "Features", "model name"))]
    return _digest(lines[:2])


def _machine(device: str) -> list[object]:
    import torch

    kind = torch.device(device)
    out: list[object] = [platform.machine(), sys.byteorder, _processor(), kind.type]
    if kind.type == "cuda":
        out += [torch.cuda.get_device_name(kind), torch.cuda.get_device_capability(kind)]
    return out


def key_of(
    plan: Plan,
    *,
    target: str,
    device: str,
    dtype: torch.dtype,
    kernels: str | Sequence[str] | None,
) -> Key | None:
    """The key of everything that a load of ``plan`` will build.

    Returns:
        None if a member's scheme cannot be told from another by its text.
    """
    members = _members(plan)
    if members is None:
        return None
    allowed = sorted(kernels.split(",") if isinstance(kernels, str) else kernels or ())
    environment = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("QUANT_") and not name.startswith("QUANT_PREPARED")
    }
    fields = {
        "format": FORMAT,
        "checkpoint": _files(plan),
        "header": _header(plan),
        "members": members,
        "software": _software(plan),
        "machine": _machine(device),
        "request": [target, str(dtype), allowed, environment],
    }
    return Key(json.loads(json.dumps(fields)))  # as it comes back from a file
