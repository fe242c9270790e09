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
from quant_kernels_triton.scaled_plan import ScaledPlan
from quant_kernels_triton.scaled_ring_plan import MOST, WideSizes, ring_sizes, ring_us
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
    ("kind", "rows"),
    [("fp8", "16"), ("fp8", "64"), ("fp8", "128"), ("fp8", "256"), ("fp8", "512"), ("fp8", "4096"),
     ("block", "64"), ("block", "128"), ("int8", "128"), ("int8", "4096")],
)  # fmt: skip
def test_ring_compiles_without_spills(kind, rows, tmp_path):
    assert _said(tmp_path, "ring", kind, rows) == "ok"


@pytest.mark.parametrize(("order", "k"), [("0", "4096"), ("4", "16384"), ("8", "4096")])
def test_quantizers_compile_without_spills(order, k, tmp_path):
    assert _said(tmp_path, "codes", order, k) == "ok"


# ------------------------------------------------------------------------------------ block sizes

_LAYERS = [(4096, 4096), (14336, 4096), (4096, 28672), (3584, 18944), (5120, 13824), (4096, 1024),
           (16, 8), (32768, 128)]  # fmt: skip


@pytest.mark.parametrize("kind", ["fp8", "int8", "block"])
def test_block_sizes_are_what_the_kernels_hold(kind):
    for k, n in _LAYERS:
        p = ScaledPlan(
            kind=kind, n=n, k=k, single=False, static=False, peak=448.0, least=0.0, most=0.0,
            bias=False, act_dtype="bfloat16", buffers=(), types=("bf16", "f32"),
        )  # fmt: skip
        for rows in (1, 16, 17, 33, 64, 65, 128, 200, 512, 1024, 9000):
            c = ring_sizes(p, rows)
            if isinstance(c, WideSizes):
                assert c.stages % (4 if c.pair else 2) == 0
                assert c.bm <= {"fp8": 256, "int8": 256, "block": 64}[kind]  # what registers hold
                sums = 64 * c.bm * 4 if c.pair else 0
                used = c.stages * (c.outputs + c.bm) * 128 + sums
            else:
                used = c.stages * c.groups * (16 * c.warps + c.bm) * 128
            assert used <= 227 * 1024 - 512, (k, n, rows, c)  # and barriers


# Microseconds on an H100 (2026-11-22), bfloat16, CUDA graph, weights from memory.
_MEASURED = {
    ("fp8", 4096, 4096): {64: 10.9, 128: 12.7, 256: 14.9, 512: 21.2, 1024: 34.3},
    ("fp8", 14336, 4096): {64: 28.5, 128: 34.2, 256: 45.5, 512: 70.5, 1024: 112.5},
    ("fp8", 4096, 28672): {64: 47.7, 128: 53.7, 256: 65.4, 512: 114.5, 1024: 201.6},
    ("fp8", 5120, 13824): {64: 30.8, 128: 34.3, 256: 40.5, 512: 70.8, 1024: 143.2},
    ("int8", 4096, 4096): {64: 10.9, 128: 12.7, 256: 15.2, 512: 21.9, 1024: 32.0},
    ("int8", 14336, 4096): {64: 28.5, 128: 33.8, 256: 44.7, 512: 67.2, 1024: 94.5},
    ("block", 14336, 4096): {64: 31.1, 128: 35.8},
}


def test_estimates_are_near_what_was_measured():
    for (kind, k, n), points in _MEASURED.items():
        p = ScaledPlan(
            kind=kind, n=n, k=k, single=False, static=False, peak=448.0, least=0.0, most=0.0,
            bias=False, act_dtype="bfloat16", buffers=(), types=("bf16", "f32"),
        )  # fmt: skip
        for rows, us in points.items():
            assert 0.85 < ring_us(p, rows) / us < 1.2, (kind, k, n, rows, us, ring_us(p, rows))


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
    op = _op("fp8 block", FP8, (1, 128))
    answer = ScaledRing().accepts(op)
    assert isinstance(answer, Accepted)
    assert isinstance(Scaled().accepts(op), Accepted)
    assert layout_of(ScaledRing()) == layout_of(Scaled()) == "rows"
    most = MOST["block"]
    assert answer.costs[-1][0] == most
    assert answer.cost_at(most + 1) == float("inf")
    assert answer.cost_at(1) < answer.cost_at(most)


@pytest.mark.parametrize(("name", "element"), [("fp8 channel", FP8), ("int8 channel", INT8)])
def test_scales_of_rows_take_every_number_of_tokens(name, element):
    answer = ScaledRing().accepts(_op(name, element, CHANNEL))
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
