"""Documentation is complete: every error code, hook and format has its entry."""

from __future__ import annotations

import re
import subprocess
import sys

from checkpoint_sets import REPO

SOURCES = [*REPO.glob("core/src/**/*.py"), *REPO.glob("plugins/*/src/**/*.py")]
_CODE = re.compile(r'"(Q-[A-Z0-9]+(?:-[A-Z0-9]+)+)"')


def _raised() -> set[str]:
    return {code for f in SOURCES for code in _CODE.findall(f.read_text("utf-8"))}


def _documented() -> set[str]:
    return set(re.findall(r"^\| `(Q-[A-Z0-9-]+)`", (REPO / "docs/errors.md").read_text(), re.M))


def test_every_error_code_is_documented():
    assert _raised() - _documented() == set()


def test_hooks_page_is_current():
    script = REPO / "tools" / "gen_hooks_doc.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_format_plugin_has_a_page():
    formats = {p.parent.name for p in REPO.glob("plugins/*/pyproject.toml")}
    formats = {f for f in formats if not f.startswith("kernels_")}
    pages = {p.stem for p in (REPO / "docs/formats").glob("*.md")}
    assert formats <= pages


def test_readme_names_every_package_and_marks_what_is_made_online():
    """One row for each format plugin; "made online" as its hook says."""
    import tomllib

    text = (REPO / "README.md").read_text("utf-8")
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    rows = {cells[1].strip().strip("`"): [c.strip() for c in cells] for cells in lines[2:]}
    for file in REPO.glob("plugins/*/pyproject.toml"):
        name = tomllib.loads(file.read_text("utf-8"))["project"]["name"]
        if not name.startswith("quant-plugin-"):
            continue
        hooks = next((file.parent / "src").glob("*/__init__.py")).read_text("utf-8")
        assert rows[name][4] == ("✓" if "def online_schemes(" in hooks else ""), name
        assert rows[name][2], name
