"""Section E of the fault list in whole processes: E02, E07, E08, E09, E11, E14, E15.

Plugins of all kinds are made as installed distributions in folders of their own. The registry's
own cases (wrong API, misspelt hooks, conflicts) are in core/tests/test_registry.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toy
from checkpoint_sets import FIXTURES
from quant_core.errors import FormatError, QuantError
from quant_core.hookspecs import hookimpl
from quant_core.load import read_matrix
from quant_core.plan import plan
from quant_core.registry import load_registry, registry

AWQ = FIXTURES / "gptqmodel-awq-gemm-g128"


def _dist(
    site: Path, name: str, entry: str, *, module: str | None = None, metadata: bool = True
) -> None:
    """An installed distribution with one plugin entry point."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text(f"[quant_core]\n{entry}\n")
    if metadata:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if module is not None:
        (site / f"{entry.partition(' = ')[2].partition(':')[0]}.py").write_text(module)


def _plugin(name: str) -> str:
    return (
        "from quant_core import hookimpl\n"
        "from quant_core.spec import PluginInfo\n"
        "@hookimpl\n"
        f"def plugin_info():\n    return PluginInfo(id={name!r}, api=(0, 1))\n"
    )


def _run(code: str, *, site: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("QUANT_")} | env
    if site is not None:
        keep["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=keep
    )


PLUGINS = (
    "import json, sys\n"
    "from quant_core.cli.main import main\n"
    "code = main(['plugins', '--json'])\n"
    "assert 'torch' not in sys.modules\n"
    "sys.exit(code)\n"
)


def test_e02_help_imports_no_plugin_and_the_table_says_what_an_import_took(tmp_path):
    canary = tmp_path / "imported"
    slow = f"import time\nopen({str(canary)!r}, 'w').close()\ntime.sleep(0.3)\n"
    _dist(tmp_path, "slow", "slow = slow_plugin", module=slow + _plugin("slow"))
    helped = _run(
        "from quant_core.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n",
        site=tmp_path,
    )
    assert "COMMAND" in helped.stdout
    assert not canary.exists()
    data = json.loads(_run(PLUGINS, site=tmp_path).stdout)
    took = {p["id"]: p["import_ms"] for p in data["plugins"]}
    assert canary.exists()
    assert took["slow"] >= 300
    assert not data["set_aside"]


def test_e07_scheme_that_raises_midway_is_named_with_its_layer():
    def create_weights(scheme, layer):
        raise RuntimeError("midway")

    module = toy.toy_module(create_weights=hookimpl(create_weights))
    broken = load_registry([toy.candidate(module)])
    tensors = {"m.q": torch.zeros(2, 4, dtype=torch.int8), "m.s": torch.ones(2).half()}
    checkpoint = toy.MemoryCheckpoint(tensors, {"quantization_config": {"quant_method": "toy"}})
    with pytest.raises(QuantError) as caught:
        plan(checkpoint, registry=broken)
    assert caught.value.plugin == "toy"
    assert "create_weights" in str(caught.value)
    assert "midway" in str(caught.value)
    good = plan(checkpoint, registry=load_registry([toy.candidate(toy.toy_module())]))
    assert read_matrix(good, good.members["m"]) is not None


def test_e08_installed_plugins_leave_the_process_as_they_find_it():
    done = _run(
        "import os, random, sys, warnings\n"
        "import torch\n"
        "import quant_core\n"
        "def state():\n"
        "    return (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(),\n"
        "            torch.random.get_rng_state().tolist(), random.getstate(), os.getcwd(),\n"
        "            list(warnings.filters), {n: id(v) for n, v in vars(torch).items()\n"
        "            if callable(v)}, {n: id(v) for n, v in vars(torch.nn.functional).items()\n"
        "            if callable(v)}, list(sys.path))\n"
        "before = state()\n"
        "import quant_core.registry\n"
        "found = __import__('quant_core.registry', fromlist=['x']).registry()\n"
        "assert len(found.plugins) > 10\n"
        "assert not found.set_aside, found.set_aside\n"
        "after = state()\n"
        "names = 'environ dtype threads rng random cwd filters torch functional path'.split()\n"
        "changed = [n for n, a, b in zip(names, before, after) if a != b]\n"
        "assert not changed, changed\n"
    )
    assert done.returncode == 0, done.stderr


def test_e09_stale_and_half_removed_distributions_are_named_and_others_work(tmp_path):
    _dist(tmp_path, "stale", "stale = module_that_is_gone")
    _dist(tmp_path, "half", "half = half_plugin", module=_plugin("half"), metadata=False)
    _dist(tmp_path, "whole", "whole = whole_plugin", module=_plugin("whole"))
    done = _run(PLUGINS, site=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    ids = {p["id"] for p in data["plugins"]}
    assert {"whole", "awq"} <= ids
    aside = {s["id"]: s for s in data["set_aside"]}
    assert aside["stale"]["dist"] == "stale"
    assert "module_that_is_gone" in aside["stale"]["cause"]
    half = next(p for p in data["plugins"] if p["id"] == "half")  # used, and its place named
    assert "half-1.0.dist-info" in half["dist"]


def _ids(_: int) -> list[str]:
    return sorted(registry().plugins)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_e11_workers_have_the_same_plugins(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map(_ids, range(4))
    assert all(ids == _ids(0) for ids in found)


def test_e14_a_hundred_plugins_in_any_order_give_the_same_table(tmp_path):
    names = [f"p{i:03}" for i in range(100)]
    tables = set()
    for seed in range(2):
        site = tmp_path / str(seed)
        random.Random(seed).shuffle(names)
        for name in names:
            _dist(site, f"dist_{name}", f"{name} = plugin_{name}", module=_plugin(name))
        done = _run(PLUGINS, site=site)
        assert done.returncode == 0, done.stderr
        plugins = json.loads(done.stdout)["plugins"]
        tables.add(tuple((p["id"], p["dist"]) for p in plugins))
    (table,) = tables
    assert len([i for i, _ in table if i.startswith("p0")]) == 100


@pytest.mark.parametrize("name", ["evil", "awq; pip install evil", "../../evil"])
def test_e15_names_outside_the_shipped_table_get_no_hint_to_install(name):
    checkpoint = toy.MemoryCheckpoint(
        {"w": torch.zeros(2)}, {"quantization_config": {"quant_method": name}}
    )
    with pytest.raises(FormatError) as caught:
        plan(checkpoint)
    assert caught.value.code == "Q-FMT-UNKNOWN"
    assert "pip install" not in str(caught.value).replace(repr(name), "")
    known = toy.MemoryCheckpoint(
        {"w": torch.zeros(2)}, {"quantization_config": {"quant_method": "awq"}}
    )
    with pytest.raises(FormatError, match="pip install quant-plugin-awq"):
        plan(known, registry=load_registry([]))
