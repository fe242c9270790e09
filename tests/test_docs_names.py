"""What the pages name exists: Python names, files, kernels, variables, headings of links."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import pytest

from checkpoint_sets import REPO

PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```.*?^```", re.M | re.S)
_CODE = re.compile(r"`([^`\n]+)`")
_NAME = re.compile(r"quant_core(?:\.\w+)+")
_FILE = re.compile(r"(?:benchmarks|tests|tools|docs|core|plugins|examples)/[\w./-]+\.\w+")
_LINK = re.compile(r"\]\(([^)\s]*)#([^)\s]+)\)")
ENGINES = ("vllm", "sglang")  # in environments of their own


def _in_code(page: Path) -> list[str]:
    return _CODE.findall(_FENCE.sub("", page.read_text("utf-8")))


def _resolves(name: str) -> bool:
    """A module, or what follows one by attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as err:
            if str(err.name).partition(".")[0] in ENGINES:
                return True
            continue
        for attribute in parts[cut:]:
            fields = getattr(found, "__annotations__", {})
            if not hasattr(found, attribute) and attribute not in fields:
                return False
            found = getattr(found, attribute, None)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_python_names_in_code_exist(page):
    named = {name for text in _in_code(page) for name in _NAME.findall(text)}
    assert [n for n in sorted(named) if not _resolves(n)] == []


OURS = [p for p in PAGES if p.parent.name != "formats"]  # those name files of other projects


@pytest.mark.parametrize("page", OURS, ids=lambda p: str(p.relative_to(REPO)))
def test_files_in_code_exist(page):
    named = {name for text in _in_code(page) for name in _FILE.findall(text)}
    assert [n for n in sorted(named) if not (REPO / n).exists()] == []


@functools.cache
def _sources() -> str:
    files = [f for where in ("core", "plugins") for f in (REPO / where).glob("**/src/**/*.py")]
    files += [*REPO.glob("core/src/**/*.py"), *REPO.glob("benchmarks/*.py")]
    return "\n".join(f.read_text("utf-8") for f in sorted(set(files)))


def _words(pattern: str) -> set[str]:
    return {w for page in PAGES for w in re.findall(pattern, page.read_text("utf-8"))}


def test_environment_variables_are_those_of_the_code():
    """Named in the pages if and only if somebody reads them."""
    pattern = r"\bQUANT_[A-Z]+(?:_[A-Z]+)*\b"
    read = set(re.findall(rf'"({pattern})"', _sources()))
    assert read
    assert _words(pattern) - read == set()
    assert read - _words(pattern) == set()


def test_kernels_named_in_pages_exist():
    pattern = r"`((?:cpu|cuda|gluon|triton|torch|humming)_[a-z0-9_]+)(?:@\w+)?`"
    known = set(re.findall(r"\b[a-z][a-z0-9_]+\b", _sources()))
    assert _words(pattern) - known == set()


def _anchors(page: Path) -> set[str]:
    """Of headings, as the usual renderers make them."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    heads = re.findall(r"^#+ +(.*)$", text, re.M)
    plain = (re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads)
    return set(plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_to_headings_lead_there(page):
    lost = []
    for target, anchor in _LINK.findall(page.read_text("utf-8")):
        other = page.parent / target if target else page
        if "://" not in target and anchor not in _anchors(other):
            lost.append(f"{target}#{anchor}")
    assert lost == []


def test_names_that_do_not_exist_are_noticed():
    assert _resolves("quant_core.kernels.base.Accepted.costs")
    assert not _resolves("quant_core.nobody")
    assert not _resolves("quant_core.nn.Nobody")
    assert "what-you-get" in _anchors(REPO / "docs" / "plugins.md")
