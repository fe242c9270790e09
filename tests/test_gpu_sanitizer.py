"""How benchmarks/gpu_sanitizer.py reads the tools' logs: nothing that they name is passed over."""

from __future__ import annotations

import sys

import pytest

from checkpoint_sets import REPO

KERNEL = "mixed_pair.py"


@pytest.fixture(scope="module")
def sanitizer():
    sys.path.insert(0, str(REPO / "benchmarks"))
    try:
        import gpu_sanitizer
    finally:
        sys.path.remove(str(REPO / "benchmarks"))
    return gpu_sanitizer


def line_of(text: str) -> int:
    source = REPO / "plugins/kernels_triton/src/quant_kernels_triton" / KERNEL
    lines = source.read_text("utf-8").splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


def race(write: int, read: int) -> str:
    return (
        f"========= Error: Race reported between Write access at mixed_pair+0x1c70 in {KERNEL}:"
        f"{write}\n=========     and Read access at mixed_pair+0x4500 in {KERNEL}:{read} "
        "[4304 hazards]\n========= \n"
    )


def log(*reports: str) -> str:
    end = f"========= RACECHECK SUMMARY: {len(reports)} hazards displayed ({len(reports)} errors)\n"
    return "========= COMPUTE-SANITIZER\n" + "".join(reports) + end


def result(sanitizer, text: str, control: str = "") -> str:
    return sanitizer.Runner.judged(sanitizer.read_log(text), control)["result"]


def test_a_log_without_reports_is_clean(sanitizer):
    assert result(sanitizer, log()) == "clean"
    memcheck = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert result(sanitizer, memcheck) == "clean"


def test_dispatch_of_warp_groups_is_told_apart_by_the_lines_that_a_report_names(sanitizer):
    first, specialize = line_of("def mixed_pair("), line_of("gl.warp_specialize(")
    assert result(sanitizer, log(race(specialize, first))) == "dispatch"


def test_sums_handed_over_are_told_apart_and_are_seen_in_a_control(sanitizer):
    text = log(race(line_of("sums.store(acc"), line_of("sums.load(mma)")))
    assert result(sanitizer, text) == "handed"
    assert result(sanitizer, text, "error") == "named, as it should"
    assert result(sanitizer, text, "limit") == "limit shown"


def test_other_races_within_a_kernel_are_named_also_beside_dispatch(sanitizer):
    first, specialize = line_of("def mixed_pair("), line_of("gl.warp_specialize(")
    store, load = line_of("sums.store(acc"), line_of("sums.load(mma)")
    piece = line_of("piece(words, 4, 0")
    text = log(race(specialize, first), race(store, piece))
    assert result(sanitizer, text) == "NAMED"
    named = sanitizer.read_log(text)["named"]
    assert [f":{store} " in f"{n} " and f":{piece}" in n for n in named] == [True]
    assert result(sanitizer, log(race(store, first))) == "NAMED", "one place of two is not enough"
    assert result(sanitizer, log(race(load, store))) == "NAMED", "a load is no store"


def test_a_log_that_ends_early_or_is_missing_passes_for_nothing(sanitizer):
    cut = log(race(1, 1)).rpartition("========= RACECHECK")[0]
    assert result(sanitizer, cut) == "no summary"
    assert sanitizer.Runner.judged(None, "")["result"] == "no summary"


def test_errors_of_memcheck_and_warnings_of_the_tool_are_named(sanitizer):
    invalid = (
        "========= Invalid __global__ write of size 4 bytes\n=========     at beyond+0x1f0 in "
        "gpu_sanitizer_controls.py:150\n=========     by thread (64,0,0) in block (0,0,0)\n"
        "========= \n========= ERROR SUMMARY: 1 error\n"
    )
    assert result(sanitizer, "========= COMPUTE-SANITIZER\n" + invalid) == "NAMED"
    overflow = (
        "========= Warning: Detected overflow of tracked cuda::barrier structures.\n========= \n"
    )
    assert result(sanitizer, log().replace("SANITIZER\n", f"SANITIZER\n{overflow}")) == "NAMED"


def test_a_control_that_is_not_named_is_missed(sanitizer):
    assert result(sanitizer, log(), "error") == "MISSED"
    assert result(sanitizer, log(race(2, 3)), "error") == "named, as it should"
