"""benchmarks/gpu_accuracy.py: its checks see what is wrong, its list is whole, it compiles ahead.

What it finds on a GPU is in benchmarks/results.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from checkpoint_sets import REPO

FAULTS = {
    "one weight": "error",
    "second": "another result later",
    "nan": "nan does not reach",
    "neighbours": "nan reaches other rows",
    "odd address": "no multiple of 16 bytes",
    "no rows": "no rows",
    "shifted": "zero codes: off by",
    "restore": "restore: codes",
}
"""A kernel's fault -> what must be said of it."""

LISTED = """
import sys
sys.path.insert(0, "benchmarks")
import gpu_accuracy
from gpu_accuracy_cases import PAIRS, WEIGHTS
from gpu_accuracy_common import LARGE, ROWS, SMALL

every = gpu_accuracy.cells(list(gpu_accuracy.PARTS), ())
assert len(every) == len(set(every)), "a cell twice"
whole = {(c.part, c.weight, c.inputs, c.act) for c in every
         if c.sizes == (SMALL, LARGE) and c.rows == ROWS and not c.kernels}
wanted = {("float", w, "", act) for w in WEIGHTS for act in ("bfloat16", "float16")}
wanted |= {("rounded", w, a, act) for w, a in PAIRS for act in ("bfloat16", "float16")}
assert whole == wanted, whole ^ wanted
"""

FOLLOWED = """
import sys
sys.path.insert(0, "benchmarks")
import gpu_accuracy_builds as builds
import gpu_accuracy_common as common
from gpu_accuracy_cases import INPUTS, WEIGHTS, make_op

made = []
builds.pretend(builds.H100)
from quant_kernels_cuda import compiler, ops
from quant_kernels_triton import launch

compiler.unavailable = lambda: ""
compiler.compiler = lambda: type("", (), {"architectures": lambda self: (90,)})()
ops.ahead = lambda kernel, defines, arch: made.append(kernel)
launch.ahead = lambda source: made.append(source.name)
names = {n for family in builds.FAMILIES.values() for n in family}
asked = set()
for part, weight, inputs in (("float", "int4 g128 bf16", ""), ("rounded", "mxfp4", "mxfp8"),
                             ("rounded", "fp8 channel", "fp8 token"),
                             ("rounded", "int4 g128 bf16", "fp8 stored"), ("experts", "nvfp4", ""),
                             ("embedding", "uint3 g64 code", "")):
    cell = common.Cell(part, weight, inputs, sizes=(common.EVEN,))
    rows = []
    for family in builds.FAMILIES:
        builds.task((cell, family), rows.append)
    assert not [r for r in rows if "problem" in r], rows
    op = make_op(WEIGHTS[weight], *common.EVEN, device=("cuda", "9.0"),
                 inputs=INPUTS[inputs] if inputs else None)
    asked |= {k.name for k, _, _ in common.candidates(op, ())}
assert {"ring", "specialized", "gemm", "dense", "embed", "grouped", "mixed_ring", "round_groups",
        "decode", "resident"} <= set(made), set(made)
assert {n for n in asked if not n.startswith("torch_")} <= names | {"humming"}, asked - names
"""


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    return json.loads(run("tests/accuracy_faults.py", "", *FAULTS))


@pytest.mark.parametrize("fault", FAULTS)
def test_checks_name_a_kernels_fault(said, fault):
    assert any(FAULTS[fault] in bad for bad in said[fault])


def test_checks_find_nothing_wrong_with_exact_products(said):
    assert said[""] == []


def test_every_kind_has_both_sizes_both_types_and_all_rows():
    run("-c", LISTED)


def test_what_calls_would_compile_is_followed_without_a_gpu():
    pytest.importorskip("triton.experimental.gluon")
    run("-c", FOLLOWED)
