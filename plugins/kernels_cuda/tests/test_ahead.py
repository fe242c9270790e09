"""Compiling ahead: once, in threads, joined before a fork, and an error is not lost."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest
import torch

from cuda_cases import SPECS, make_layer, make_op
from quant_core.errors import KernelError
from quant_core.kernels.calls import planned
from quant_kernels_cuda import ahead as module
from quant_kernels_cuda import ops
from quant_kernels_cuda.ahead import ahead, settled
from quant_kernels_cuda.variant import Variant, describe

DEFINES = (("NT", "1"),)
H100 = (132, 232448, (66, 42, 31, 24, 19, 15, 14), "90")


@pytest.fixture
def compiled(monkeypatch):
    """Keys that were compiled, and in which thread."""
    told = []

    def compile_cached(kernel, defines, arch):
        told.append(
            ((kernel, defines, arch), threading.current_thread() is threading.main_thread())
        )
        if kernel == "bad":
            raise KernelError("NVRTC refused it", code="Q-KERNEL-COMPILE")
        return b"cubin"

    monkeypatch.setattr(module, "compile_cached", compile_cached)
    monkeypatch.setattr(module, "_begun", {})
    return told


def test_each_is_compiled_once_and_in_another_thread(compiled):
    for _ in range(3):
        ahead("decode", DEFINES, "90")
        ahead("resident", DEFINES, "90")
    settled()
    want = [((kernel, DEFINES, "90"), False) for kernel in ("decode", "resident")]
    assert sorted(compiled) == want


def test_what_fails_is_warned_about(compiled, caplog):
    with caplog.at_level(logging.WARNING, logger="quant_core"):
        ahead("bad", DEFINES, "90")
        settled()
    assert "compiling bad ahead: NVRTC refused it" in caplog.text


PROGRAM = """
import os, time
from quant_kernels_cuda import ahead
done = []
def compile_cached(*key):
    time.sleep(0.3)
    done.append(key)
ahead.compile_cached = compile_cached
for i in range(3):
    ahead.ahead("decode", (("NT", str(i)),), "90")
child = os.fork()
if not child:
    assert len(done) == 3, done  # what had begun was waited for
    assert not ahead._begun
    ahead.ahead("decode", (("NT", "0"),), "90")
    ahead.settled()
    os._exit(7 if len(done) == 4 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
ahead.ahead("decode", (("NT", "9"),), "90")
"""


def test_a_fork_waits_for_what_has_begun_and_an_exit_is_clean():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_planned_calls_name_what_calls_compile(rows, compiled, monkeypatch):
    """The same kernels and constants as launches of so many rows ask for."""
    monkeypatch.setattr(ops, "device_limits", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    layer = make_layer(next(iter(SPECS.values())), 256, 512)
    v = describe(make_op(layer, 512))
    assert isinstance(v, Variant)
    x = torch.empty(rows, 512, dtype=getattr(torch, v.act), device="meta")
    planned.jobs, planned.capability = [], 90
    try:
        y = ops.run_linear(v.text(), 512, x.dtype, [], x)
        jobs = planned.jobs
    finally:
        planned.jobs = None
    assert y.shape == (rows, 256)
    for job in jobs:
        job()
    settled()
    want = set()
    for m in [rows] if rows <= 16 else [16, rows % 16]:
        s = ops._schedule(v, m, 0)
        want.add((s.kernel, ops._defines(v, s), "90"))
    assert {key for key, _ in compiled} == want


def test_another_device_than_planned_for_is_left_alone(compiled, monkeypatch):
    monkeypatch.setattr(ops, "device_limits", lambda device: (*H100[:3], "80"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    layer = make_layer(next(iter(SPECS.values())), 256, 512)
    v = describe(make_op(layer, 512))
    assert isinstance(v, Variant)
    planned.jobs, planned.capability = [], 90
    try:
        ops.run_linear(v.text(), 512, getattr(torch, v.act), [],
                       torch.empty(1, 512, dtype=getattr(torch, v.act), device="meta"))  # fmt: skip
        assert planned.jobs == []
    finally:
        planned.jobs = None
