"""scaled_ring and the quantizers for Hopper: they compile, round exactly, and say who may run.

The kernels themselves need a GPU: benchmarks/gpu_mixed.py compares them with the portable ones.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest

from quant_core.kernels.base import ANY_ROWS, Accepted, Rejected
from quant_core.kernels.family import layout_of
from quant_core.spec import CHANNEL, Element, OpSpec, QuantSpec, Scale
from quant_kernels_triton.scaled_kernel import Scaled, ScaledRing
from quant_kernels_triton.scaled_ring_plan import MOST
from triton_made import SPECS, make_op

FP8, INT8 = Element(name="fp8_e4m3", bits=8, kind="float"), Element.int(8)


def _said(tmp_path, *command: str) -> str:
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    here = os.path.join(os.path.dirname(__file__), "support")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "eight_bit_compiled", *command], env=env, capture_output=True,
        text=True, cwd=here,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("kind", "rows"), [("fp8", "16"), ("block", "64"), ("int8", "128"), ("int8", "4096")]
)
def test_ring_compiles_without_spills(kind, rows, tmp_path):
    assert _said(tmp_path, "ring", kind, rows) == "ok"


@pytest.mark.parametrize(("order", "k"), [("0", "4096"), ("4", "16384"), ("8", "4096")])
def test_quantizers_compile_without_spills(order, k, tmp_path):
    assert _said(tmp_path, "codes", order, k) == "ok"


# ------------------------------------------------------------------------------------- arithmetic


def _f32(v: Fraction) -> Fraction:
    """v rounded to float32, ties to even; normal numbers only."""
    if v == 0:
        return v
    e = 0
    while abs(v) >= Fraction(2) ** (e + 1):
        e += 1
    while abs(v) < Fraction(2) ** e:
        e -= 1
    step = Fraction(2) ** (e - 23)
    return round(v / step) * step


def _quotient(x: Fraction, s: Fraction, steps: int) -> Fraction:
    """``codes_gluon._quotient`` with each operation rounded once."""
    y = _f32(1 / s)
    q = _f32(x * y)
    for _ in range(steps):
        q = _f32(q + _f32(x - q * s) * y)
    return q


def test_corrected_quotients_are_rounded_as_divisions():
    rng, uncorrected = random.Random(0), 0
    for _ in range(3000):
        x = Fraction(struct.unpack("f", struct.pack("f", rng.uniform(-900, 900)))[0])
        s = Fraction(struct.unpack("f", struct.pack("f", rng.uniform(0.5, 4.0)))[0])
        want = _f32(x / s)
        assert _quotient(x, s, 2) == want
        uncorrected += _quotient(x, s, 0) != want
    assert uncorrected > 100  # which shows that the corrections matter


# ------------------------------------------------------------------------------------ who may run


def _op(name: str, element: Element, grain: tuple[int, int], device: str = "9.0") -> OpSpec:
    op = make_op(SPECS[name], 4096, 4096, act="bfloat16", device=("cuda", device))
    acts = QuantSpec(element=element, scales=(Scale(element="f32", grain=grain, static=False),))
    return replace(op, operands=(("weight", SPECS[name]), ("input", acts)))


def test_ring_takes_few_rows_of_what_the_portable_kernel_takes():
    op = _op("fp8 channel", FP8, CHANNEL)
    answer = ScaledRing().accepts(op)
    assert isinstance(answer, Accepted)
    assert isinstance(Scaled().accepts(op), Accepted)
    assert layout_of(ScaledRing()) == layout_of(Scaled()) == "rows"
    most = MOST["fp8"]
    assert answer.costs[-1][0] == most
    assert answer.cost_at(most + 1) == float("inf")
    assert answer.cost_at(1) < answer.cost_at(most)


def test_int8_has_every_number_of_rows():
    answer = ScaledRing().accepts(_op("int8 channel", INT8, CHANNEL))
    assert isinstance(answer, Accepted)
    assert answer.costs[-1][0] == ANY_ROWS
    assert list(answer.costs) == sorted(answer.costs, key=lambda c: c[1])  # more rows, more time


@pytest.mark.parametrize(
    ("op", "axis"),
    [
        (_op("fp8 channel", FP8, CHANNEL, "8.9"), "compute capability"),
        (_op("fp8 channel", FP8, CHANNEL, "10.0"), "compute capability"),
        (_op("uint4 channel", FP8, CHANNEL), "element"),
        (_op("fp8 channel", FP8, (1, 128)), "scales"),
        (make_op(SPECS["fp8 channel"], 64, 64, act="bfloat16", device=("cuda", "9.0")), "operands"),
    ],
)
def test_ring_names_what_it_does_not_take(op, axis):
    answer = ScaledRing().accepts(op)
    assert isinstance(answer, Rejected)
    assert answer.axis == axis
