"""Each package installs and uninstalls alone: wheels, fresh environments, formats that come and go.

The environments borrow torch and the other dependencies of the running one through a folder of
links, which leaves out our own packages: their metadata would announce plugins nobody installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoint_sets import FIXTURES, REPO

pytestmark = pytest.mark.slow

AWQ = FIXTURES / "gptqmodel-awq-gemm-g128"
GPTQ = FIXTURES / "gptqmodel-4bit-g128-asym-descact"
MODULE = "model.layers.0.self_attn.q_proj"

# Largest difference from the producer's own dequantized weight, over the rows it shipped.
COMPARE = """
import sys
from safetensors import safe_open
from quant_core import load_tensor
path, name = sys.argv[1:]
with safe_open(f"{path}/expected.safetensors", "pt") as f:
    key = next(k for k in f.keys() if k.startswith(f"weight.{name}#"))
    expected = f.get_tensor(key)
ours = load_tensor(path, name).dequantize()[: len(expected)]
print(float((ours - expected).abs().max()), float(expected.abs().max()))
"""


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QUANT_"))}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, env=env, cwd="/"
    )
    if check:
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment, driven from outside: it has no pip of its own."""

    folder: Path
    wheels: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def pip(self, *args: str) -> None:
        run(
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--python",
            self.python,
            *args,
        )

    def install(self, dist: str) -> None:
        wheel = next(self.wheels.glob(f"{dist.replace('-', '_')}-*.whl"))
        self.pip("install", "-q", "--no-deps", "--no-index", str(wheel))

    def quant(self, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(self.folder / "bin" / "quant", *args, check=check)

    def formats(self) -> list[str]:
        return [f["id"] for f in json.loads(self.quant("formats", "--json").stdout)["formats"]]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheels")
    packages = [REPO / "core", REPO / "plugins" / "awq", REPO / "plugins" / "gptq"]
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q")
    run(*pip, "--no-deps", "--no-build-isolation", "-w", out, *packages)
    return out


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to everything installed here but our own packages and start-up files."""
    out = tmp_path_factory.mktemp("dependencies")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("quant_", "_editable_impl_quant")) and entry.suffix != ".pth":
            (out / entry.name).symlink_to(entry)
    return out


def make_environment(folder: Path, wheels: Path, dependencies: Path) -> Environment:
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return Environment(folder, wheels)


@pytest.fixture(scope="module")
def awq_only(
    tmp_path_factory: pytest.TempPathFactory, wheels: Path, dependencies: Path
) -> Environment:
    env = make_environment(tmp_path_factory.mktemp("env") / "venv", wheels, dependencies)
    env.install("quant-core")
    env.install("quant-plugin-awq")
    return env


def weight_error(env: Environment, path: Path) -> tuple[float, float]:
    error, largest = run(env.python, "-c", COMPARE, path, MODULE).stdout.split()
    return float(error), float(largest)


def test_wheels_hold_what_an_installation_needs(wheels: Path) -> None:
    with zipfile.ZipFile(next(wheels.glob("quant_core-*.whl"))) as core:
        names = set(core.namelist())
    assert {"quant_core/known_formats.json", "quant_core/py.typed"} <= names
    ours = {"quant_core/testing.py"}  # for the tests of plugins
    assert not [n for n in names - ours if "test" in n.lower()]


def test_environment_sees_no_package_of_the_workspace(awq_only: Environment) -> None:
    probe = (
        "import importlib.metadata as m, json, quant_core, torch;"
        "names = sorted({d.name for d in m.distributions() if d.name.startswith('quant-')});"
        "print(json.dumps([names, quant_core.__file__, quant_core.__version__]))"
    )
    names, file, _ = json.loads(run(awq_only.python, "-c", probe).stdout)
    assert names == ["quant-core", "quant-plugin-awq"]
    assert Path(file).is_relative_to(awq_only.folder)


def test_core_with_awq_reads_awq_and_claims_nothing_else(awq_only: Environment) -> None:
    assert awq_only.formats() == ["awq"]
    plugins = json.loads(awq_only.quant("plugins", "--json").stdout)
    assert plugins["set_aside"] == []
    error, largest = weight_error(awq_only, AWQ)
    assert error <= largest * 2**-23  # one ulp of the largest weight: float32 evaluation


def test_unknown_format_names_the_dist_that_adds_it(awq_only: Environment) -> None:
    done = awq_only.quant("inspect", GPTQ, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Q-FMT-UNKNOWN" in done.stderr
    assert "pip install quant-plugin-gptq" in done.stderr


def test_format_comes_with_its_package_and_goes_with_it(awq_only: Environment) -> None:
    awq_only.install("quant-plugin-gptq")
    assert awq_only.formats() == ["awq", "gptq"]
    assert awq_only.quant("verify", GPTQ).returncode == 0
    error, largest = weight_error(awq_only, GPTQ)
    assert error <= largest * 2**-23
    awq_only.pip("uninstall", "-q", "-y", "quant-plugin-gptq")
    assert awq_only.formats() == ["awq"]
    assert awq_only.quant("verify", AWQ).returncode == 0
    done = awq_only.quant("verify", GPTQ, check=False)
    assert (done.returncode, "Q-FMT-UNKNOWN" in done.stderr) == (1, True)


def test_core_alone_works_and_says_how_to_add_a_format(
    tmp_path: Path, wheels: Path, dependencies: Path
) -> None:
    env = make_environment(tmp_path / "venv", wheels, dependencies)
    env.install("quant-core")
    assert env.formats() == []
    assert "pip install quant-plugin-awq" in env.quant("formats").stdout
    done = env.quant("inspect", AWQ, check=False)
    assert (done.returncode, "Q-FMT-UNKNOWN" in done.stderr) == (1, True)
