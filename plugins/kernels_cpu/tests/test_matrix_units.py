"""Matrix units: on processors that have none, the same kernels with tiles that are memory.

On those that have them every test with an instruction set (``isa``) runs on the real ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import matrix_units
from quant_kernels_cpu.library import ISAS, library, unavailable

HERE = Path(__file__).parent
FILES = ("test_linear.py", "test_floats.py", "test_w8a8.py", "test_w8a8_shared.py",
         "test_stored.py", "test_stored_int8.py", "test_native.py")  # fmt: skip

pytestmark = [
    pytest.mark.skipif(
        bool(unavailable()) or library().isa < ISAS.index("bf16"),
        reason="needs AVX512-BF16",
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


def run(library: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    env |= {"QUANT_CPU_TEST_LIBRARY": str(library)} if library is not None else {}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    return subprocess.run(
        [*command, *arguments],
        env=env,
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    return matrix_units.build(tmp_path_factory.mktemp("emulated"))


def test_kernels_on_emulated_tiles_pass_every_test_of_an_instruction_set(
    emulated: Path,
) -> None:
    done = run(emulated, "-k", "amx", *FILES)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 500, done.stdout[-500:]


@pytest.mark.parametrize(
    ("unit", "right", "wrong", "file"),
    [
        ("amx.h", "made.rows[t] = rows,", "made.rows[t] = rows / 2,", "test_w8a8.py"),
        ("kernel.h", "TILE_BF16(3, 5, 7);", "TILE_BF16(3, 5, 6);", "test_linear.py"),
        (
            "kernel_int8_vnni.c",
            "TILE_INT8(1, 4, 7);",
            "TILE_INT8(1, 4, 6);",
            "test_w8a8.py",
        ),
    ],
)
def test_those_tests_notice_a_wrong_tile(
    unit: str,
    right: str,
    wrong: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("hatchling")
    shutil.copytree(HERE.parent / "csrc", tmp_path / "csrc")
    shutil.copy(HERE.parent / "hatch_build.py", tmp_path)
    text = (tmp_path / "csrc" / unit).read_text()
    assert text.count(right) == 1
    (tmp_path / "csrc" / unit).write_text(text.replace(right, wrong))
    monkeypatch.setattr(matrix_units, "ROOT", tmp_path)
    done = run(matrix_units.build(tmp_path), "-x", "-k", "amx", file)
    assert done.returncode == 1, done.stdout[-3000:]
