"""A user's mistake is named with exit code 1 or 2, never an internal error; --json says it too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quant_core.cli.main import main
from quant_core.cli.output import emit

AWQ = "gptqmodel-awq-gemm-g128"
DOWN = "model.layers.0.mlp.down_proj"
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")

MISTAKES = {
    "run without text": (["run", "AWQ", "--prompt", ""], "Q-CFG-VALUE", "prompt"),
    "run on no device": (
        ["run", "AWQ", "--prompt", "a", "--device", "x"],
        "Q-ENGINE-DEVICE",
        "'x'",
    ),
    "diff on no text": (["diff", "AWQ", "AWQ", "--logits", "--text", ""], "Q-CFG-VALUE", "text"),
    "diff of a text without logits": (["diff", "AWQ", "AWQ", "--text", "a"], "Q-CFG-CONFLICT", ""),
    "explain on no device": (["explain", "AWQ", DOWN, "--device", "x"], "Q-ENGINE-DEVICE", "'x'"),
    "explain on meta": (["explain", "AWQ", DOWN, "--device", "meta"], "Q-ENGINE-DEVICE", "values"),
    "bench of no weights": (["bench", "0x0"], "Q-CFG-VALUE", "0 weights"),
    "bench of too many": (["bench", "99999999999x99999999999"], "Q-CFG-VALUE", "weights, expected"),
    "bench of integers": (["bench", "64x128", "--dtype", "int4"], "Q-CFG-VALUE", "'int4'"),
    "bench on no device": (["bench", "64x128", "--device", "x"], "Q-ENGINE-DEVICE", "'x'"),
}


def _argv(argv: list[str], fixtures: Path) -> list[str]:
    return [str(fixtures / AWQ) if a == "AWQ" else a for a in argv]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_exit_code_1_with_its_code_in_text_and_json(name, fixtures, capsys):
    argv, code, named = MISTAKES[name]
    assert main(_argv(argv, fixtures)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"quant: {code}: ")
    assert named in captured.err
    assert main([*_argv(argv, fixtures), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == code
    assert named in error["message"]


@NO_CUDA
@pytest.mark.parametrize("argv", [["run", "AWQ", "--prompt", "a"], ["bench", "64x128"]])
def test_device_that_is_not_there_is_no_kernels_fault(argv, fixtures, capsys):
    assert main([*_argv(argv, fixtures), "--device", "cuda"]) == 1
    assert "quant: Q-ENGINE-DEVICE: device: 'cuda' cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cuda", "npu"])
def test_explain_answers_for_devices_that_are_elsewhere(name, fixtures, capsys):
    if name == "npu" and not hasattr(torch, "npu"):
        pytest.skip("torch knows no npu")
    assert main(["explain", str(fixtures / AWQ), DOWN, "--device", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel"]["device"] == name


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["inspect", "x", "--tp", "x"], "'x' ranks, expected 1 to 4096"),
        (["run", "x", "--prompt", "a", "--max-new-tokens", "-3"], "'-3' tokens, expected 1 to"),
        (["diff", "x", "y", "--top", "-1"], "'-1' rows, expected 0 to"),
        (["bench", "x", "--layers", "0"], "'0' layers, expected 1 to"),
        (["inspect", "x", "--tp", "9" * 5000], "ranks, expected 1 to 4096"),
    ],
)
def test_number_out_of_range_is_a_usage_error(argv, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_error_in_json_has_its_parts(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "Q-CKPT-TRUNCATED"
    assert error["path"].endswith("model.safetensors")


def test_memory_that_does_not_suffice_is_no_bug(fixtures, monkeypatch, capsys):
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr("quant_core.cli.inspect.run", fail)
    assert main(["inspect", str(fixtures / AWQ)]) == 1
    err = capsys.readouterr().err
    assert "quant: Q-LIMIT-MEMORY: memory does not suffice" in err
    assert "bug" not in err


def test_json_holds_no_number_that_json_lacks(capsys):
    import argparse

    emit(argparse.Namespace(json=True), {"a": [float("inf"), 1.5, {"b": float("nan")}]}, ())
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, {"b": None}]}
