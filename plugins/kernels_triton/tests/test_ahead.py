"""Other processes fill the cache; whether they do, fail or end changes nothing that a call gets."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from quant_core.kernels.ahead import standby
from quant_kernels_triton import ahead, compiler, kernel, machine_code
from quant_kernels_triton.compiler import code_of, source_of
from quant_kernels_triton.jitted import Jitted

CLEAR = Jitted("schedule", "clear")
ARGS = (torch.zeros(8, dtype=torch.int64), torch.zeros(8, 512, dtype=torch.bfloat16), 8, 512, 4)
HOW = {"constants": {"BT": 16, "BN": 512}, "options": {"num_warps": 4}, "capability": 90}
BAD = HOW | {"constants": {"BT": 16, "BN": "wide"}}


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A pool of one worker at most, and a cache of its own."""
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(compiler, "_held", {})
    monkeypatch.setattr(ahead, "_wanted", lambda: 1)
    made = ahead._Pool()
    monkeypatch.setattr(ahead, "_pool", made)
    ahead._warn_once.cache_clear()
    yield made
    made.stop()


def source(**changes):
    made = source_of(CLEAR, ARGS, **(HOW | changes))
    assert made is not None
    return made


def test_what_a_worker_compiles_is_what_this_process_would(pool, monkeypatch, tmp_path):
    made = source()
    want = machine_code.lowered(made, tmp_path / "here.code")
    ahead.ahead(made)
    ahead.ahead(made)
    ahead.settled()
    assert machine_code.stored(made.file) == want
    assert len(pool.running) <= 1
    monkeypatch.setattr(machine_code, "_lowered", None)  # must not be asked
    assert code_of(CLEAR, ARGS, **HOW) == want


def test_a_call_waits_for_a_worker_that_is_at_it(pool, monkeypatch):
    made = source()
    ahead.ahead(made)
    while made.file not in pool.at_work:
        assert pool.queue
        time.sleep(0.001)
    monkeypatch.setattr(compiler, "lowered", None)  # must not be asked
    assert code_of(CLEAR, ARGS, **HOW) is not None


def test_a_call_does_not_wait_for_what_no_worker_has_begun(pool, monkeypatch):
    monkeypatch.setattr(pool, "_start", lambda: None)
    made = source()
    ahead.ahead(made)
    assert list(pool.queue) == [made.file]
    assert code_of(CLEAR, ARGS, **HOW) is not None
    assert not pool.queue


def test_an_error_is_warned_about_and_raised_where_the_code_is_needed(pool, caplog):
    with caplog.at_level(logging.WARNING, logger="quant_core"):
        ahead.ahead(source(**BAD))
        ahead.settled()
    assert caplog.text.count("compiling ahead: ") == 1
    assert "CompilationError" in caplog.text
    with pytest.raises(Exception, match="at"):
        code_of(CLEAR, ARGS, **BAD)
    assert code_of(CLEAR, ARGS, **HOW) is not None


def test_a_worker_that_ends_is_warned_about_and_replaced(pool, caplog):
    with caplog.at_level(logging.WARNING, logger="quant_core"):
        ahead.ahead(source())
        next(iter(pool.running)).kill()
        ahead.settled()
        with pool.changed:
            assert pool.changed.wait_for(lambda: not pool.running, 10)
    assert "the process ended" in caplog.text
    assert code_of(CLEAR, ARGS, **HOW) is not None
    other = source(options={"num_warps": 2})
    ahead.ahead(other)
    ahead.settled()
    assert other.file.exists()


def test_nothing_is_started_where_it_is_switched_off(pool, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("QUANT_AHEAD", "off")
    assert ahead._wanted() == 0
    monkeypatch.setattr(ahead, "_pool", pool)
    ahead.ahead(source())
    assert not pool.queue
    assert not pool.running


PROGRAM = """
import os, sys, time
import torch
from quant_kernels_triton import ahead
from quant_kernels_triton.compiler import code_of, source_of
from quant_kernels_triton.jitted import Jitted

ahead._wanted = lambda: 1
clear = Jitted("schedule", "clear")
x, y = torch.zeros(8, dtype=torch.int64), torch.zeros(8, 512, dtype=torch.bfloat16)
def how(warps):
    return {"BT": 16, "BN": 512}, {"num_warps": warps}, 90
for warps in (1, 2, 4, 8):
    ahead.ahead(source_of(clear, (x, y, 8, 512, 4), *how(warps)))
"""
LEAVES = "print(*(p.pid for p in ahead._pool.running))"
FORKS = """
time.sleep(0.3)
child = os.fork()
if not child:
    assert not ahead._pool.running
    for warps in (1, 2, 4, 8):
        assert code_of(clear, (x, y, 8, 512, 4), *how(warps)) is not None
    ahead.settled()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
ahead.settled()
print(*(p.pid for p in ahead._pool.running))
"""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("rest", [LEAVES, FORKS], ids=["exit", "fork"])
def test_a_process_leaves_at_once_and_takes_its_workers_along(rest, tmp_path):
    env = os.environ | {"QUANT_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + rest], env=env, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for pid in map(int, done.stdout.split()):
        end = time.monotonic() + 10
        while not gone(pid):
            assert time.monotonic() < end, "a worker is still there"
            time.sleep(0.05)


def test_a_compilation_says_in_the_log_what_its_stages_took(pool, caplog):
    made = source()
    begun = time.perf_counter()
    with caplog.at_level(logging.DEBUG, "quant_core"):
        machine_code.lowered(made, made.file)
    took = time.perf_counter() - begun
    (said,) = [r for r in caplog.records if hasattr(r, "stages")]
    assert list(said.stages) == ["import", "front end", "ttir", "ttgir", "llir", "ptx", "cubin"]
    assert 0 < sum(said.stages.values()) <= took
    assert "clear" in said.getMessage()


def test_a_call_hands_over_to_a_worker_that_was_made_ready(pool, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    ahead.ready()
    assert len(pool.running) == 1
    monkeypatch.setattr(compiler, "lowered", None)  # must not be asked
    with caplog.at_level(logging.DEBUG, "quant_core"):
        assert code_of(CLEAR, ARGS, **HOW) is not None
    (said,) = [r for r in caplog.records if hasattr(r, "stages")]
    assert "another process" in said.getMessage()
    assert said.stages["cubin"] > 0


def test_no_worker_is_made_ready_without_a_gpu_or_where_something_is_stored(pool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    ahead.ready()
    assert not pool.running
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert code_of(CLEAR, ARGS, **HOW) is not None
    ahead.ready()
    assert not pool.running
    monkeypatch.setattr(machine_code, "_sources", lambda: "another build")
    ahead.ready()
    assert len(pool.running) == 1


def test_a_call_compiles_itself_where_all_workers_are_busy(pool, monkeypatch):
    made = source()
    monkeypatch.setattr(pool, "running", {object(): None})
    monkeypatch.setattr(pool, "at_work", {made.file.with_name("other")})
    assert code_of(CLEAR, ARGS, **HOW) is not None
    assert not pool.queue
    monkeypatch.setattr(pool, "running", {})  # nothing to end


def test_a_cache_that_cannot_be_written_ends_the_handing_over(pool, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "file"))
    pool.ready()
    with caplog.at_level(logging.WARNING, logger="quant_core"):
        assert code_of(CLEAR, ARGS, **HOW) is not None
    assert "cannot be written" in caplog.text
    assert pool.failed
    monkeypatch.setattr(pool, "_next", None)  # must not be asked
    assert code_of(CLEAR, ARGS, **(HOW | {"options": {"num_warps": 2}})) is not None
    assert not pool.queue


def test_calls_are_planned_while_workers_stand_idle(pool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(ahead, "_wanted", lambda: 8)
    monkeypatch.setattr(ahead, "_IDLE_S", 0.5)
    ahead.ready()
    assert standby.idle
    assert len(pool.running) == 2
    with pool.changed:
        assert pool.changed.wait_for(lambda: not pool.running, 10)
    assert not standby.idle


def test_what_an_idle_worker_gets_is_not_of_low_priority(pool, monkeypatch):
    monkeypatch.setattr(pool, "_start", lambda: None)
    monkeypatch.setattr(pool, "running", {object(): None})
    for warps in (1, 2):
        ahead.ahead(source(options={"num_warps": warps}))
    assert [waited_for for _, waited_for in pool.queue.values()] == [True, False]
    monkeypatch.setattr(pool, "running", {})  # nothing to end


def test_workers_are_made_ready_where_kernels_are_chosen_for_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(kernel, "ready", lambda: asked.append(True))
    assert kernel.kernels_for(SimpleNamespace(device=("cpu", ""))) is kernel.KERNELS
    assert not asked
    assert kernel.kernels_for(SimpleNamespace(device=("cuda", "9.0"))) is kernel.KERNELS
    assert asked
