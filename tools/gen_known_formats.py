"""Write core/src/quant_core/known_formats.json: which dist reads which checkpoints.

Keys are a ``quant_method``, ``*`` and a container's suffix, or ``/`` and the name of a file beside
the weights that one dist alone reads.

The one place where core knows format ids, as generated data: for the advice "install
quant-plugin-x" when a checkpoint needs a plugin that is not installed.

    python tools/gen_known_formats.py            write
    python tools/gen_known_formats.py --check    exit 1 if the file is not current
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "core" / "src" / "quant_core" / "known_formats.json"


def known_formats(root: Path = ROOT) -> dict[str, str]:
    """What a checkpoint may say or hold -> dist, over every package below ``plugins/``.

    Raises:
        SystemExit: two dists claim one quant_method, or one container.
    """
    known: dict[str, str] = {}
    files: dict[str, set[str]] = {}
    for file in sorted(root.glob("plugins/*/pyproject.toml")):
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        for target in project.get("entry-points", {}).get("quant_core", {}).values():
            source = file.parent / "src" / target / "__init__.py"
            spec = importlib.util.spec_from_file_location(target, source)
            if spec is None or spec.loader is None:
                raise SystemExit(f"{source}: is no Python module, expected the plugin's package")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            info = module.plugin_info()
            methods = [m.lower() for m in info.quant_methods]
            for key in (*methods, *(f"*{suffix}" for suffix in info.containers)):
                other = known.setdefault(key, project["name"])
                if other != project["name"]:
                    raise SystemExit(f"{key!r} is claimed by {other} and {project['name']}")
            for name in info.side_files:
                files.setdefault(f"/{name}", set()).add(project["name"])
    known |= {key: next(iter(dists)) for key, dists in files.items() if len(dists) == 1}
    return dict(sorted(known.items()))


def main(argv: list[str]) -> int:
    text = json.dumps(known_formats(), indent=1) + "\n"
    if "--check" not in argv:
        TARGET.write_text(text, "utf-8")
        return 0
    if TARGET.read_text("utf-8") != text:
        print(f"{TARGET.relative_to(ROOT)} is not current; run python tools/gen_known_formats.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
