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
