"""Measured costs: kept per device and versions, and used instead of a kernel's own estimate."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pytest

from made_layers import SPECS, make_layer, make_op
from quant_core.kernels import measured
from quant_core.kernels.base import ANY_ROWS, Accepted, Rejected
from quant_core.spec import Packing

OP = make_op("linear", make_layer(SPECS["uint4_code"]))


class Fake:
    def __init__(self, answer, name="fake"):
        self.name, self.answer = name, answer

    def accepts(self, op):
        return self.answer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path))
    measured.table_path.cache_clear()
    measured._read.cache_clear()
    yield
    measured.table_path.cache_clear()
    measured._read.cache_clear()


def saved(**kernels):
    return measured.save(OP.device, {measured.op_key(OP): kernels})


def test_measured_times_replace_the_estimate():
    saved(fake=[[1, 3.0], [64, 20.0]])
    answer = measured.answer(Fake(Accepted(cost=1e3, note="guess")), OP)
    assert [answer.cost_at(m) for m in (1, 2, 64, 65, 10_000)] == [3.0, 20.0, 20.0, 20.0, 20.0]
    assert answer.note == "guess; measured here"


def test_limits_of_a_kernel_stay_where_nothing_was_measured():
    saved(fake=[[1, 3.0], [64, 20.0], [1000, 90.0]])
    given = Accepted(costs=((16, 5.0), (256, math.inf), (ANY_ROWS, 70.0)))
    answer = measured.answer(Fake(given), OP)
    assert [answer.cost_at(m) for m in (1, 16, 17, 256, 257, 5000)] == [
        3.0, 20.0, math.inf, math.inf, 90.0, 90.0,
    ]  # fmt: skip
    short = measured.answer(Fake(Accepted(costs=((16, 5.0),))), OP)
    assert short.cost_at(17) == math.inf


def test_what_is_inexact_rejected_or_switched_off_is_left_alone(monkeypatch):
    saved(fake=[[1, 3.0]])
    inexact = Accepted(exact=False, cost=1e5)
    assert measured.answer(Fake(inexact), OP) == inexact
    no = Rejected(axis="device", have="cpu", need="cuda")
    assert measured.answer(Fake(no), OP) == no
    monkeypatch.setenv("QUANT_MEASURED", "off")
    assert measured.answer(Fake(Accepted(cost=9.0)), OP).cost == 9.0


def test_file_adds_up_and_names_device_and_versions():
    first = saved(one=[[1, 3.0]])
    assert saved(two=[[1, 4.0]]) == first
    data = json.loads(first.read_text())
    assert set(data["costs"][measured.op_key(OP)]) == {"one", "two"}
    assert "torch" in data["versions"]
    assert list(first.parent.iterdir()) == [first]  # nothing temporary stays


@pytest.mark.parametrize(
    "text", ["{", '{"costs": {"x": {"fake": [[0, 1]]}}}', '{"costs": 5}', "[]"]
)
def test_damaged_file_is_ignored_with_a_warning(text, caplog):
    path = saved(fake=[[1, 3.0]])
    path.write_text(text)
    measured._read.cache_clear()
    with caplog.at_level(logging.WARNING, "quant_core"):
        assert measured.answer(Fake(Accepted(cost=9.0)), OP).cost == 9.0
    assert "Delete the file" in caplog.text


def test_other_versions_start_anew(monkeypatch):
    path = saved(fake=[[1, 3.0]])
    monkeypatch.setattr(measured, "_versions", lambda: {"torch": "0"})
    measured.table_path.cache_clear()
    assert measured.table_path(OP.device) != path
    assert measured.answer(Fake(Accepted(cost=9.0)), OP).cost == 9.0


def test_key_is_that_of_the_operation_not_of_the_files_packing():
    other = replace(OP, packing=Packing(word="int32", k_major=True))
    assert measured.op_key(other) == measured.op_key(OP)
    assert measured.op_key(replace(OP, act_dtype="float16")) != measured.op_key(OP)
