"""``quant bench``: what it prints and keeps; the times themselves are not judged."""

from __future__ import annotations

import json

import pytest

from quant_core.cli import bench
from quant_core.cli.main import main
from quant_core.kernels import measured


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "cache"))
    measured.table_path.cache_clear()
    yield
    measured.table_path.cache_clear()


def test_bench_of_sizes_tells_per_rows_who_was_chosen(capsys):
    assert main(["bench", "32x64,64x32", "--online", "int8", "--rows", "1,5", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in data["layers"]] == ["32x64 int8", "64x32 int8"]
    for layer in data["layers"]:
        assert [r["rows"] for r in layer["rows"]] == [1, 5]
        for r in layer["rows"]:
            assert r["times"]["F.linear"] > 0
            assert r["chosen"]
    assert data["saved"] is None


def test_bench_saves_times_where_the_choice_finds_them(capsys):
    args = ["bench", "32x64", "--online", "int8", "--rows", "1", "--save", "--json"]
    assert main(args) == 0
    data = json.loads(capsys.readouterr().out)
    kept = json.loads(measured.table_path(("cpu", "")).read_text())
    names = set(data["layers"][0]["rows"][0]["times"]) - {"F.linear"}
    assert {n for kernels in kept["costs"].values() for n in kernels} == names


@pytest.mark.parametrize(
    "args", [["--rows", "1,x"], ["--rows", ""], ["--dtype", "int8x"], ["--online", "nobody"]]
)
def test_bench_with_wrong_settings_is_refused(args, capsys):
    assert main(["bench", "32x64", *args]) == 1
    assert "Q-CFG-VALUE" in capsys.readouterr().err


def test_explain_asks_the_kernels_of_the_device(capsys, tmp_path):
    from checkpoint_sets import checkpoint_dirs

    folder = str(checkpoint_dirs(("torchao-int8wo",))[0])
    name = "model.layers.0.self_attn.q_proj"
    assert main(["explain", folder, name, "--device", "cuda", "--json"]) == 0
    kernel = json.loads(capsys.readouterr().out)["kernel"]
    assert kernel["device"] == "cuda"
    assert any("needs cpu, found cuda" in d["decision"] for d in kernel["trace"])


def test_faster_kernel_that_rounds_more_is_told_apart():
    """It is not the choice that is wrong."""
    record = {"chosen": "a", "best": "b", "best_exact": False}
    assert bench._faster(record) == "faster: b, which rounds more: only where it is named"
    assert bench._faster(record | {"best_exact": True}) == "faster: b"
    assert bench._faster(record | {"best": "a"}) == ""
