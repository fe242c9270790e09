"""``quant convert`` and ``quant diff``: output, exit codes, interruption."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from safetensors.torch import save_file

from quant_core.cli.main import main

AWQ = "gptqmodel-awq-gemm-g128"
ACT_ORDER = "gptqmodel-4bit-g128-asym-descact"
K_QUANTS = "gguf-llama-q4_k_m"


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: waiting for threads of a busy machine would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_json(capsys, *argv, code=0):
    assert main([*map(str, argv), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_convert_reports_every_module(fixtures, tmp_path, capsys):
    out = tmp_path / "out"
    data = run_json(capsys, "convert", fixtures / AWQ, out, "--to", "gptq")
    assert (data["exact"], data["format"], data["path"]) == (True, "gptq", str(out))
    assert len(data["layers"]) == 14
    assert data["layers"][0]["losses"] == []
    assert (out / "model.safetensors").is_file()


def test_convert_names_and_measures_losses(fixtures, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["convert", str(fixtures / K_QUANTS), str(out), "--to", "gptq", "--allow-inexact"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "weights rounded to 8-bit codes" in text
    assert "scales rounded to f16" in text
    assert "gptq, 16 modules, inexact" in text


def test_refusal_is_exit_code_1_and_says_how_to_go_on(fixtures, tmp_path, capsys):
    assert main(["convert", str(fixtures / K_QUANTS), str(tmp_path / "o"), "--to", "gptq"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Q-LAYOUT-REPRESENT" in captured.err
    assert "--allow-inexact" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_format(fixtures, tmp_path, capsys):
    argv = ["--to", "awq", "--option", "version=gemv", "--option", "group_size=64"]
    data = run_json(capsys, "convert", fixtures / AWQ, tmp_path / "out", *argv)
    assert data["options"] == {"version": "gemv", "group_size": 64}
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (block["version"], block["group_size"]) == ("gemv", 64)


def test_options_of_a_block_and_a_flag(fixtures, tmp_path, capsys):
    argv = ["--to", "fp8", "--option", "block=64x128", "--option", "granularity=block"]
    run_json(capsys, "convert", fixtures / "hf-fp8-block128", tmp_path / "a", *argv)
    block = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert block["weight_block_size"] == [64, 128]
    argv = ["--to", "quark", "--option", "zero_points=true"]
    run_json(capsys, "convert", fixtures / "torchao-int8wo", tmp_path / "b", *argv)
    block = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert block["global_quant_config"]["weight"]["dtype"] == "uint8"


def test_a_wrong_block_is_a_config_error(fixtures, tmp_path, capsys):
    argv = ["convert", str(fixtures / "hf-fp8-block128"), str(tmp_path / "out"), "--to", "fp8"]
    assert main([*argv, "--option", "block=128"]) == 1
    assert "expected rows x columns" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False], ids=["empty folder", "nothing"])
def test_destination_that_is_a_link_is_written_where_it_points(there, fixtures, tmp_path, capsys):
    (tmp_path / "link").symlink_to("real")
    if there:
        (tmp_path / "real").mkdir()
    data = run_json(capsys, "convert", fixtures / AWQ, tmp_path / "link", "--to", "gptq")
    assert data["path"] == str(tmp_path / "real")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]
    assert (tmp_path / "link" / "model.safetensors").is_file()
    assert main(["convert", str(fixtures / AWQ), str(tmp_path / "link"), "--to", "gptq"]) == 1
    assert "Q-CKPT-EXISTS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--option", "nonsense"], ["--max-shard-size", "0"], ["--max-shard-size", "5XB"], []]
)
def test_wrong_usage_is_exit_code_2(fixtures, tmp_path, argv):
    to = ["--to", "gptq"] if argv else []
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(fixtures / AWQ), str(tmp_path / "out"), *to, *argv])
    assert caught.value.code == 2


def test_interrupted_convert_returns_130_and_leaves_nothing(fixtures, tmp_path, monkeypatch):
    write = importlib.import_module("quant_core.convert.write")

    def stop(target, path):
        assert list(tmp_path.iterdir())  # the temporary folder is there
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_check_result", stop)
    assert main(["convert", str(fixtures / AWQ), str(tmp_path / "out"), "--to", "gptq"]) == 130
    assert list(tmp_path.iterdir()) == []


def test_diff_of_a_checkpoint_with_itself_is_zero(fixtures, capsys):
    data = run_json(capsys, "diff", fixtures / AWQ, fixtures / AWQ)
    assert data["equal"] is True
    assert {d["error"] for d in data["layers"]} == {0.0}


def test_diff_lists_largest_errors_first_with_bits(fixtures, tmp_path, capsys):
    out = tmp_path / "out"
    run_json(capsys, "convert", fixtures / K_QUANTS, out, "--to", "gptq", "--allow-inexact")
    data = run_json(capsys, "diff", fixtures / K_QUANTS, out)
    errors = [d["error"] for d in data["layers"]]
    assert errors == sorted(errors, reverse=True)
    assert 1e-3 < errors[0] < 0.01
    worst = data["layers"][0]
    # Q4_K: 144 bytes of 256 weights; 8-bit codes and float16 scales of 32, zeros and g_idx
    assert worst["bits_a"] == 4.5
    assert 8.5 < worst["bits_b"] < 9
    assert main(["diff", str(fixtures / K_QUANTS), str(out), "--top", "2"]) == 0
    assert "and 19 more" in capsys.readouterr().out


def test_diff_logits_measures_divergence(fixtures, tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    run_json(capsys, "convert", fixtures / AWQ, out, "--to", "gptq")
    text = "def main(argv): return the exit code"
    same = run_json(capsys, "diff", fixtures / AWQ, out, "--logits", "--text", text)["logits"]
    assert same["positions"] == len(text)
    assert abs(same["kl"]) < 1e-6
    assert same["top1"] == 1.0
    other = run_json(
        capsys, "diff", fixtures / AWQ, fixtures / ACT_ORDER, "--logits", "--text", text
    )["logits"]
    assert other["kl"] > 1e-3


def test_diff_of_two_models_names_the_sizes(fixtures, tmp_path, capsys):
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    assert main(["diff", str(fixtures / AWQ), str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "Q-LAYOUT-SHAPE" in err
    assert "model.norm.weight: is (256,)" in err
