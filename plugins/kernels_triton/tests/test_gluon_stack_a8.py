"""Stacks of experts by 8-bit activations: the kernel compiles for sm_90, its block sizes fit.

What the numbers are is checked on a device by benchmarks/gpu_mixed.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import pytest

from quant_core.kernels.base import Accepted
from quant_core.spec import CHANNEL, Element, OpSpec, QuantSpec, Scale
from quant_core.spec_json import to_text
from quant_kernels_triton import gluon_stack_a8 as module
from quant_kernels_triton.gluon_stack_a8 import WAYS, stack_a8_config, stack_a8_us, ways
from quant_kernels_triton.mixed_kernel import Mixed
from quant_kernels_triton.mixed_plan import MixedPlan, describe_mixed
from triton_made import SPECS, make_op

FP8, INT8 = Element(name="fp8_e4m3", bits=8, kind="float"), Element.int(8)
PROGRAM = """
import sys
from stack_a8_compiled import compile_stack_a8
compile_stack_a8(sys.argv[1], *map(int, sys.argv[2:]))
"""


def stack_op(
    name: str, element: Element, k: int = 2048, n: int = 1536, experts: int = 128
) -> OpSpec:
    acts = QuantSpec(element=element, scales=(Scale(element="f32", grain=CHANNEL, static=False),))
    op = make_op(SPECS[name], n, k, op="grouped_linear", act="bfloat16", experts=experts,
                 device=("cuda", "9.0"))  # fmt: skip
    return replace(op, operands=(("weight", SPECS[name]), ("input", acts)))


def planned(name: str, element: Element, **sizes: int) -> MixedPlan:
    p = describe_mixed(stack_op(name, element, **sizes))
    assert isinstance(p, MixedPlan), p
    return p


@pytest.mark.parametrize(
    ("name", "element", "ways"),
    [
        ("fp8 channel", FP8, (0, -1)),
        ("uint4 g128 bf16", FP8, (3,)),
        ("int8 channel", INT8, (1, -1)),
    ],
)
def test_kernels_compile_without_spilled_sums(name, element, ways, tmp_path):
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    here = os.path.join(os.path.dirname(__file__), "support")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROGRAM, to_text(stack_op(name, element)), *map(str, ways)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.split() == ["ok"] * len(ways)


@pytest.mark.parametrize(("name", "element"), [("fp8 channel", FP8), ("uint4 g128 bf16", FP8)])
def test_stages_fit_into_shared_memory(name, element):
    p = planned(name, element)
    for way, _ in WAYS:
        c = way.fitted(p)
        codes = c.consumers * (8192 if p.bytes else 4096)  # of 64 outputs and 128 columns each
        assert c.stages >= 3
        assert c.stages * (c.bm * 128 + codes) <= 216 * 1024
        assert c.rows & (c.rows - 1) == 0 == c.rest & (c.rest - 1)  # Triton's tiles: powers of 2


@pytest.fixture
def triton_version(monkeypatch):
    """Makes the installed Triton another one for the choice of block sizes."""

    def pretend(version: str) -> None:
        monkeypatch.setattr(metadata, "version", lambda name: version)
        ways.cache_clear()
        module._quickest.cache_clear()

    yield pretend
    monkeypatch.undo()
    ways.cache_clear()
    module._quickest.cache_clear()


def test_blocks_hold_about_as_many_rows_as_an_expert_gets(triton_version):
    triton_version("3.6.0")
    p = planned("fp8 channel", FP8)
    sizes = [stack_a8_config(p, 128 * each).bm for each in (1, 30, 250)]
    assert sizes == sorted(sizes)
    assert sizes[0] <= 32
    assert sizes[2] >= 256  # one block, though some experts get more than the mean


def test_four_pieces_are_left_to_a_triton_whose_registers_hold_them(triton_version):
    p = planned("fp8 channel", FP8)
    most = []
    for version in ("3.6.0", "3.8.0"):
        triton_version(version)
        most.append(max(stack_a8_config(p, 128 * each).pieces for each in (250, 1000)))
    assert most[0] == 4 > most[1]


def test_costs_grow_with_rows_and_are_those_of_the_model():
    op = stack_op("fp8 channel", FP8)
    answer, p = Mixed().accepts(op), planned("fp8 channel", FP8)
    assert isinstance(answer, Accepted)
    for rows in (1, 64, 4096):
        assert answer.cost_at(rows) == pytest.approx(stack_a8_us(p, rows), rel=1e-2)
    times = [us for _, us in answer.costs]
    assert times == sorted(times)
