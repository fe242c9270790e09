"""The data of docs/engines/table.md is true: of the checkpoints, and of the tests it names."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import engine_table
from checkpoint_sets import FIXTURES, REPO, SHARED, has_shared
from format_table import TABLE
from quant_core.checkpoint.open import open_checkpoint
from quant_core.plan import Plan, plan

HERE = [n for n in engine_table.CHECKPOINTS if (FIXTURES / n).is_dir()]
FAR = [n for n in engine_table.CHECKPOINTS if n not in HERE]
ALL = [*HERE, *(pytest.param(n, marks=pytest.mark.shared) for n in FAR)]


def folder_of(name: str) -> Path:
    return FIXTURES / name if (FIXTURES / name).is_dir() else SHARED / name


def kinds_of(found: Plan) -> set[str]:
    """Kinds of what is quantized, from the plan of the header."""
    out = {"attention"} if found.attention else set()
    for member in found.quantized.values():
        layer = member.layer
        if layer.experts:
            names = [layer.stored, *(s.name for p in member.params for s in p.sources)]
            out.add("experts" if any("{expert}" in n for n in names) else "stacked experts")
        elif layer.kind == "embedding":
            out.add("embedding")
        else:
            out.add("lm_head" if layer.name.endswith("lm_head") else "linear")
    return out


@pytest.mark.parametrize("name", ALL)
def test_checkpoint_holds_what_the_table_says(name: str) -> None:
    with open_checkpoint(folder_of(name)) as checkpoint:
        found = plan(checkpoint)
    assert found.match is not None
    told = engine_table.CHECKPOINTS[name]
    assert (found.match.plugin, kinds_of(found)) == (told.format, set(told.kinds))


@pytest.mark.parametrize("name", ALL)
def test_transformers_keeps_every_member_packed(name: str) -> None:
    import torch

    from quant_core import load_model
    from quant_core.nn import QuantModule

    with open_checkpoint(folder_of(name)) as checkpoint:
        members = len(plan(checkpoint).quantized)
    model = load_model(folder_of(name), dtype=torch.float32)
    packed = [m for m in model.modules() if isinstance(m, QuantModule)]
    assert packed
    assert len(packed) <= members
    with torch.no_grad():
        logits = model(torch.arange(12)[None], use_cache=False).logits
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0


def test_every_shipped_checkpoint_is_in_the_table_and_run_by_every_engine() -> None:
    shipped = {d.name for d in FIXTURES.iterdir() if d.is_dir()}
    assert set(HERE) == shipped
    for engine, runs in engine_table.RUNS.items():
        run = {name for names in runs.values() for name in names}
        refused = set(engine_table.refused(engine))
        assert shipped <= run | refused, engine
        assert not run & refused, engine
        assert run | refused <= set(engine_table.CHECKPOINTS), engine


@pytest.mark.skipif(not has_shared(), reason="needs the full set of checkpoints")
def test_named_checkpoints_exist() -> None:
    assert [n for n in FAR if not (SHARED / n).is_dir()] == []


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def absent(tests: list[str]) -> list[str]:
    """Of tests named ``file::function``, those that do not exist."""
    found: dict[str, set[str]] = {}
    out = []
    for test in tests:
        file, _, function = test.partition("::")
        if (REPO / file).is_file():
            found.setdefault(file, names_in(REPO / file))
        if function not in found.get(file, set()):
            out.append(test)
    return out


def test_every_named_test_exists() -> None:
    tables = (*engine_table.RUNS.values(), *engine_table.REFUSED.values())
    named = [test for tests in tables for test in tests]
    answers = [a for cells in engine_table.FEATURES.values() for a in cells.values()]
    assert absent([*named, *(a.test for a in answers if a.test)]) == []


def test_test_that_is_gone_is_noticed() -> None:
    gone = ["tests/test_engine_table.py::test_no_such", "tests/no_such.py::test_any"]
    assert absent(gone) == gone


def test_every_engine_answers_for_every_feature() -> None:
    engines = set(engine_table.ENGINES)
    assert set(engine_table.RUNS) == engines
    assert {n for n, cells in engine_table.FEATURES.items() if set(cells) != engines} == set()
    supported = [
        a for c in engine_table.FEATURES.values() for a in c.values()
        if isinstance(a, engine_table.Yes)
    ]  # fmt: skip
    assert all(a.test for a in supported)


def test_formats_are_those_of_the_format_table() -> None:
    assert {h.format for h in engine_table.CHECKPOINTS.values()} <= set(TABLE)


def generator() -> ModuleType:
    file = REPO / "tools" / "gen_engine_table.py"
    spec = importlib.util.spec_from_file_location("gen_engine_table", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_page_is_current() -> None:
    assert generator().render() == (REPO / "docs/engines/table.md").read_text("utf-8")
