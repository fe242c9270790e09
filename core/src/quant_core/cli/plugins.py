"""``quant plugins``: who provides what, from which dist, and what was set aside and why."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from quant_core.cli.output import emit, escaped, table

__all__ = ["HELP", "add_arguments", "run"]

HELP = "list installed plugins, and those set aside with the reason"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hooks", action="store_true", help="list the hooks of each in place of what it is"
    )


def _collect() -> dict[str, Any]:
    from quant_core.hookspecs import hook_names
    from quant_core.registry import registry
    from quant_core.spec import PLUGIN_API

    reg = registry()
    return {
        "api": ".".join(map(str, PLUGIN_API)),
        "plugins": [
            {
                "id": p.id,
                "dist": p.dist,
                "version": p.version,
                "api": ".".join(map(str, p.info.api)),
                "summary": p.info.summary,
                "target": p.target,
                "import_ms": round(p.import_ms, 2),
                "hooks": [h for h in hook_names() if reg.implements(p.id, h)],
            }
            for _, p in sorted(reg.plugins.items())
        ],
        "set_aside": [
            {
                "id": s.id,
                "dist": s.dist,
                "version": s.version,
                "target": s.target,
                "code": s.code,
                "cause": s.cause,
            }
            for s in reg.set_aside
        ],
    }


def _render(data: dict[str, Any], hooks: bool) -> Iterator[str]:
    rows = [
        (p["id"], p["dist"], p["version"], p["api"], f"{p['import_ms']:.1f}",
         " ".join(h for h in p["hooks"] if h != "plugin_info") if hooks else p["summary"])
        for p in data["plugins"]
    ]  # fmt: skip
    header = ("plugin", "dist", "version", "api", "import ms", "hooks" if hooks else "what")
    yield from table(header, rows, indent="")
    if not rows:
        yield "no plugins in use: install one, for example `pip install quant-plugin-<format>`"
    for s in data["set_aside"]:
        yield f"set aside: {escaped(s['id'])} of {escaped(s['dist'])} {escaped(s['version'])}"
        yield f"  {s['code']}: {escaped(s['cause'])}"


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    data = _collect()
    emit(args, data, _render(data, args.hooks))
    return 0
