"""Planned calls name the kernels that calls launch, and need neither Triton nor values."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

from quant_core.kernels import tiles
from quant_core.kernels.ahead import jobs_of
from quant_core.kernels.base import Rejected
from quant_core.kernels.rounded import RoundedInput
from quant_core.spec import CHANNEL, Element, OpSpec, QuantSpec, Scale, group
from quant_kernels_triton import compiler, gluon_counters, gluon_run
from quant_kernels_triton.kernel import KERNELS
from quant_kernels_triton.recipe import describe
from quant_kernels_triton.rounding_kernel import Round
from triton_made import SPECS, make_op

HOPPER = ("cuda", "9.0")
FP8 = QuantSpec(
    element=Element(name="fp8_e4m3", bits=8, kind="float"),
    scales=(Scale(element="f32", grain=CHANNEL, static=False),),
)
MX = QuantSpec(
    element=Element(name="fp8_e4m3", bits=8, kind="float"),
    scales=(Scale(element="e8m0", grain=group(32), static=False, rule="floor"),),
)


def quantized(op: OpSpec, acts: QuantSpec) -> OpSpec:
    return replace(op, operands=(*op.operands, ("input", acts)))


def offered():
    """Kernels and the operations that they accept."""
    for name in ("uint4 g128 bf16", "nvfp4", "int8 channel", "fp8 channel", "uint4 g128 gather"):
        plain = make_op(SPECS[name], 512, 1024, act="bfloat16", device=HOPPER)
        for op in (plain, quantized(plain, FP8), quantized(plain, MX)):
            rounds = [RoundedInput(k, stored=False, quantizer=Round()) for k in KERNELS]
            for kernel in (*KERNELS, *rounds):
                if op is plain and isinstance(kernel, RoundedInput):
                    continue
                answer = kernel.accepts(op)
                if not isinstance(answer, Rejected):
                    yield kernel, op
    stack = make_op(SPECS["uint4 g128 bf16"], 512, 1024, act="bfloat16", device=HOPPER,
                    op="grouped_linear", experts=4)  # fmt: skip
    for op in (stack, quantized(stack, FP8)):
        for kernel in KERNELS:
            if kernel.name.startswith("gluon") and not isinstance(kernel.accepts(op), Rejected):
                yield kernel, op


def names_of(jobs) -> list[tuple]:
    return [(s.module, s.name, s.typed, s.constants, s.options) for s in (j.args[0] for j in jobs)]


@pytest.mark.parametrize("rows", [1, 40, 600])
def test_every_kernel_can_be_planned(rows, caplog):
    count = 0
    with caplog.at_level("DEBUG", logger="quant_core"):
        for kernel, op in offered():
            assert jobs_of(kernel, op, (rows,)), kernel.name
            count += 1
    assert "is not compiled ahead" not in caplog.text
    assert count > 30


@pytest.mark.parametrize("rows", [1, 16, 64, 300, 2000])
@pytest.mark.parametrize("name", ["uint4 g128 bf16", "nvfp4", "int8 channel"])
def test_what_is_planned_is_what_a_call_launches(name, rows, monkeypatch):
    op = make_op(SPECS[name], 512, 1024, act="bfloat16", device=HOPPER)
    kernel = next(k for k in KERNELS if k.name == "gluon_wna16")
    planned = names_of(jobs_of(kernel, op, (rows,)))
    launched = []

    def told(fn, key, grid, args, device, build):
        b = build()
        seen = [a.view(-1).view(b.views[i]) if i in b.views else a for i, a in enumerate(args)]
        source = compiler.source_of(fn, seen, b.constants, b.options, 90)
        assert source is not None
        made = (source.module, source.name, source.typed, source.constants, source.options)
        launched.append(made)

    monkeypatch.setattr(gluon_run, "launch", told)
    counter = torch.zeros(1 << 16, dtype=torch.int32)
    monkeypatch.setattr(gluon_counters, "_counters", lambda device, count: counter)
    x = torch.zeros(rows, 1024, dtype=torch.bfloat16)
    tensors = list(tiles.allocate(op, "cpu").values())
    gluon_run.run_gluon(describe(op, ops=("linear",)), x, tensors)
    assert planned == launched


PROGRAM = """
import sys, time
import torch
import test_planned
for kernel, op in test_planned.offered():
    test_planned.jobs_of(kernel, op, (1, 40, 600))
print(sorted({"sympy", "torch._dynamo", "triton"} & set(sys.modules)))
"""


def test_planning_imports_neither_triton_nor_what_traces_models(monkeypatch, tmp_path):
    """They take seconds, in which weights would have been read."""
    folder = __file__.rpartition("/")[0]
    text = PROGRAM.replace("import test_planned", f"""
sys.path[:0] = [{folder!r}, {folder + "/support"!r}]
import pytest
pytest.importorskip = lambda *a, **k: None
import test_planned""", 1)  # fmt: skip
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=90)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
