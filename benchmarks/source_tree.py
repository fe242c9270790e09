"""Run the packages of this repository from their sources, on a machine that has none installed.

    from source_tree import use; use()          # before anything of quant_core is imported

Puts ``core/src`` and ``plugins/*/src`` on the path and writes the metadata that entry points are
found by into a temporary folder. Where the packages are installed, the sources still come first.
"""

from __future__ import annotations

import os
import sys
import tempfile
import tomllib
from pathlib import Path

__all__ = ["REPO", "use"]

REPO = Path(__file__).resolve().parent.parent


def use() -> list[str]:
    """Names of the packages that can be imported from now on, here and in child processes."""
    site = Path(tempfile.mkdtemp(prefix="quant-sources-"))
    names, paths = [], [str(site)]
    for file in (REPO / "core/pyproject.toml", *sorted(REPO.glob("plugins/*/pyproject.toml"))):
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = project.get("entry-points", {})
        lines = [
            line
            for group, entries in groups.items()
            for line in (f"[{group}]", *(f"{k} = {v}" for k, v in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join([*lines, ""]))
        paths.append(str(file.parent / "src"))
        names.append(project["name"])
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    return names
