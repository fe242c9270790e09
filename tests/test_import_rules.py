"""Who may import whom, and where format names may stand: held by reading the sources.

``violations`` is pure and tested against broken examples first, so that a rule that stopped
seeing anything would be noticed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint_sets import REPO

CORE = REPO / "core" / "src" / "quant_core"
PLUGINS = sorted(p.parent for p in REPO.glob("plugins/*/pyproject.toml"))
MAX_LINES = 500

# Formats and method names of the field; core may know none of them.
FORMAT_IDS = {
    "awq", "gptq", "autoround", "auto_round", "auto-round", "gguf", "compressed_tensors",
    "compressed-tensors", "quark", "modelslim", "modelopt", "nvfp4", "mxfp4", "mxfp8",
    "bitsandbytes", "hqq", "aqlm", "vptq", "quip", "torchao",
} | {p.name for p in PLUGINS if not p.name.startswith("kernels_")}  # fmt: skip
_WORD = re.compile(
    r"(?<![a-z0-9])("
    + "|".join(sorted(map(re.escape, FORMAT_IDS), key=len)[::-1])
    + r")(?![a-z0-9]|_e\dm\d)"  # element types such as fp8_e4m3 are no formats
)


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Nodes that are docstrings, of modules, classes, functions and attributes."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                found.add(statement.value)
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def format_ids(source: str) -> list[str]:
    """Format ids in string constants (docstrings excluded) and imports of ``source``."""
    tree = ast.parse(source)
    skip = docstrings(tree)
    found = [
        f"line {node.lineno}: string {node.value[:60]!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node not in skip
        and _WORD.search(node.value.lower())
    ]
    found += [
        f"line {line}: import of {name}"
        for name, line in imports(tree)
        if _WORD.search(name.lower()) or name.startswith("quant_plugin_")
    ]
    return found


def imported(source: str, prefixes: tuple[str, ...]) -> list[str]:
    """Imports of ``source`` that start with one of ``prefixes`` at a dot boundary."""
    return [
        f"line {line}: {name}"
        for name, line in imports(ast.parse(source))
        if any(name == p or name.startswith(p + ".") for p in prefixes)
    ]


def python_files(*folders: Path) -> list[Path]:
    return sorted(f for folder in folders for f in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


# -------------------------------------------------------------------- the rules see what they must


@pytest.mark.parametrize(
    "broken",
    [
        'if fmt == "awq": pass',
        'x = f"needs the gguf package {v}"',
        "import gguf.quants",
        "from quant_plugin_gptq import layout",
        "def f():\n    import quant_plugin_other\n",
        'x = "Q4 in NVFP4 blocks"',
        'x = {"compressed-tensors": 1}',
        'x = "fp8 or fp8_e4m3"',
    ],
)
def test_format_ids_sees_a_format_name(broken: str) -> None:
    assert format_ids(broken)


@pytest.mark.parametrize(
    "fine",
    [
        '"""AWQ is a format."""',
        "x = 'awquard'",
        "# gguf",
        'x = "fp8_e4m3"',
        'def f():\n    """GPTQ."""\n',
        "import os",
    ],
)
def test_format_ids_ignores_docstrings_comments_and_parts_of_words(fine: str) -> None:
    assert format_ids(fine) == []


def test_imported_sees_imports_inside_functions() -> None:
    source = "def f():\n    from quant_core.plan import Plan\n"
    assert imported(source, ("quant_core.plan",))
    assert not imported("import quant_core.planner", ("quant_core.plan",))


# ------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("path", python_files(CORE), ids=name_of)
def test_core_and_engines_hold_no_format_id(path: Path) -> None:
    assert format_ids(path.read_text("utf-8")) == []


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_plugin_imports_no_other_plugin(plugin: Path) -> None:
    own = {f.name for f in (plugin / "src").iterdir() if f.is_dir()}
    found = [
        f"{name_of(f)}: line {line}: {name}"
        for f in python_files(plugin / "src")
        for name, line in imports(ast.parse(f.read_text("utf-8")))
        if name.startswith(("quant_plugin_", "quant_kernels_")) and name.split(".")[0] not in own
    ]
    assert found == []


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_plugin_uses_public_names_of_core_only(plugin: Path) -> None:
    found = [
        f"{name_of(f)}: line {line}: {name}"
        for f in python_files(plugin / "src")
        for name, line in imports(ast.parse(f.read_text("utf-8")))
        if name.startswith("quant_core") and any(p.startswith("_") for p in name.split("."))
    ]
    assert found == []


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_plugin_init_holds_hookimpls_only(plugin: Path) -> None:
    for init in (plugin / "src").glob("*/__init__.py"):
        tree = ast.parse(init.read_text("utf-8"))
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
        assert functions, f"{name_of(init)} implements no hook"
        plain = [f.name for f in functions if not f.decorator_list]
        assert plain == [], "helpers belong into another module"
        heavy = ("torch", "triton", "numpy", "transformers", "gguf")
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert imported("\n".join(map(ast.unparse, top)), heavy) == []


KERNEL_SOURCES = python_files(
    CORE / "kernels", *(p / "src" for p in PLUGINS if p.name.startswith("kernels_"))
)
ABOVE_KERNELS = (
    "checkpoint", "plan", "load", "build", "detect", "engines", "ledger", "resolve", "cli",
    "scheme", "convert", "online", "live", "prepared",
)  # fmt: skip


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=name_of)
def test_kernels_never_learn_where_a_tensor_came_from(path: Path) -> None:
    forbidden = tuple(f"quant_core.{room}" for room in ABOVE_KERNELS)
    assert imported(path.read_text("utf-8"), forbidden) == []


def light_modules() -> list[str]:
    out = ["quant_core", "quant_core.hookspecs", "quant_core.registry", "quant_core.plan",
           "quant_core.checkpoint.open", "quant_core.cli.main"]  # fmt: skip
    for plugin in PLUGINS:
        project = tomllib.loads((plugin / "pyproject.toml").read_text("utf-8"))["project"]
        out += project["entry-points"]["quant_core"].values()
    return out + engine_modules()


def engine_modules() -> list[str]:
    """What serving engines import at every start, whether quant-core is used or not."""
    project = tomllib.loads((REPO / "core" / "pyproject.toml").read_text("utf-8"))["project"]
    groups = project["entry-points"].values()
    return [target.partition(":")[0] for group in groups for target in group.values()]


def test_engines_are_entered_by_light_modules() -> None:
    assert "quant_core.engines.vllm" in engine_modules()


@pytest.mark.parametrize("module", light_modules())
def test_import_loads_neither_torch_nor_triton(module: str) -> None:
    probe = (
        f"import sys, importlib; m = importlib.import_module({module!r})\n"
        "getattr(m, 'plugin_info', lambda: None)()\n"
        "print([m for m in ('torch', 'triton', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TRACKED = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=REPO, capture_output=True, text=True, check=False,
).stdout.split("\0")  # fmt: skip
TEXT = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg", ".sh", ""}


def own_text_files() -> list[Path]:
    files = [REPO / name for name in TRACKED if name] or python_files(REPO / "core", REPO / "tests")
    return [
        f
        for f in files
        if f.suffix in TEXT and f.is_file() and not f.is_relative_to(REPO / "tests" / "fixtures")
    ]


def test_no_source_file_is_longer_than_one_reading() -> None:
    lengths = {
        name_of(f): len(f.read_text("utf-8").splitlines())
        for f in own_text_files()
        if f.suffix == ".py"
    }
    assert lengths, "no sources found"
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_no_machine_paths_in_any_file() -> None:
    marks = ["/" + "work/", "/" + "root/", "/" + "home/"]  # split: this file is read too
    found = [
        f"{name_of(f)}:{number}: {line.strip()[:80]}"
        for f in own_text_files()
        for number, line in enumerate(f.read_text("utf-8").splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert found == []
