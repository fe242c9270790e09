"""``quant formats``: which formats this installation reads, and quantizes to. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from quant_core.cli.output import emit, table

__all__ = ["HELP", "add_arguments", "run"]

HELP = "list the checkpoint formats that can be read"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def _collect() -> dict[str, Any]:
    from quant_core.known import known_formats
    from quant_core.online import offers, short_name
    from quant_core.registry import registry

    reg = registry()
    made = offers(reg)
    formats = [
        {
            "id": p.id,
            "summary": p.info.summary,
            "quant_methods": list(p.info.quant_methods),
            "containers": list(p.info.containers),
            "side_files": list(p.info.side_files),
            "dist": p.dist,
            "version": p.version,
            "online": {
                short_name(reg, p.id, name): scheme.summary
                for name, scheme in made.get(p.id, {}).items()
            },
        }
        for _, p in sorted(reg.plugins.items())
        if reg.implements(p.id, "detect_format")
    ]
    installed = {p.dist for p in reg.plugins.values()}
    available = sorted(set(known_formats().values()) - installed)
    return {"formats": formats, "available": available, "set_aside": len(reg.set_aside)}


def _render(data: dict[str, Any]) -> Iterator[str]:
    rows = [
        (f["id"], ", ".join(f["containers"]) or "safetensors", f["dist"], f["version"],
         f["summary"])
        for f in data["formats"]
    ]  # fmt: skip
    yield from table(("format", "files", "from", "version", "what"), rows, indent="")
    if not rows:
        yield "no formats: quant-core reads none by itself."
    online = [pair for f in data["formats"] for pair in f["online"].items()]
    if online:
        yield ""
        yield from table(("online=", "what it makes of float weights"), online, indent="")
    if data["available"]:
        yield "more: " + "; ".join(f"pip install {d}" for d in data["available"])
    if data["set_aside"]:
        yield f"{data['set_aside']} plugin(s) set aside: see `quant plugins`"


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    data = _collect()
    emit(args, data, _render(data))
    return 0
