"""``quant cache``: list, measure and delete prepared weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quant_core.cli.output import emit, escaped, size, table
from quant_core.errors import QuantError

__all__ = ["HELP", "add_arguments", "run"]

HELP = "list, measure or delete prepared weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """list|size|clear and --folder."""
    parser.add_argument(
        "action", nargs="?", choices=("list", "size", "clear"), default="list",
        help="what to do (default: list)",
    )  # fmt: skip
    parser.add_argument(
        "--folder", metavar="DIR",
        help="where the entries lie; default $QUANT_PREPARED_DIR or the user's cache",
    )  # fmt: skip


def _checkpoint(path: Path) -> tuple[str, str]:
    """(checkpoint, "") of an entry, or ("", why it cannot be used)."""
    from quant_core.prepared.entry import read_key

    try:
        files = read_key(path)["checkpoint"]
    except QuantError as err:
        return "", str(err)
    parents = {str(Path(real).parent) for _, real, *_ in files}
    return (files[0][1] if len(files) == 1 else min(parents, default="")), ""


def _collect(args: argparse.Namespace) -> dict[str, Any]:
    from quant_core.prepared.folder import clear, default_folder, entries, limit_bytes

    folder = Path(args.folder).absolute() if args.folder else default_folder()
    limit = limit_bytes()
    found = clear(folder) if args.action == "clear" else entries(folder)
    data: dict[str, Any] = {
        "folder": str(folder),
        "action": args.action,
        "limit_bytes": limit,
        "total_bytes": sum(f.nbytes for f in found),
        "count": len(found),
    }
    if args.action == "list":
        listed = []
        for f in found:
            checkpoint, problem = _checkpoint(f.path)
            listed.append(
                {
                    "entry": f.digest,
                    "bytes": f.nbytes,
                    "used": time.strftime("%Y-%m-%d %H:%M", time.localtime(f.used)),
                    "checkpoint": checkpoint,
                    "problem": problem,
                }
            )
        data["entries"] = listed
    return data


def _render(data: Mapping[str, Any]) -> Iterator[str]:
    total, count = size(data["total_bytes"]), data["count"]
    entries = "1 entry" if count == 1 else f"{count} entries"
    if data["action"] == "clear":
        yield f"{escaped(data['folder'])}: deleted {entries}, {total}"
        return
    yield f"{escaped(data['folder'])}: {entries}, {total} of at most {size(data['limit_bytes'])}"
    rows = [
        (e["entry"][:12], size(e["bytes"]), e["used"], e["checkpoint"] or "unusable")
        for e in data.get("entries", ())
    ]
    yield from table(("entry", "size", "used", "checkpoint"), rows)


def run(args: argparse.Namespace) -> int:
    """List, measure or delete."""
    data = _collect(args)
    emit(args, data, _render(data))
    return 0
