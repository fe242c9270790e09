"""The commands over every shipped checkpoint, against what its producer says it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from checkpoint_sets import FIXTURES, REPO
from quant_core.cli.main import main

DIRS = sorted(d for d in FIXTURES.iterdir() if d.is_dir())
BY_NAME = {d.name: d for d in DIRS}
GGUF = [d for d in DIRS if d.name.startswith("gguf-")]
all_dirs = pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)


def run_json(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> Any:
    assert main([*map(str, argv), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("folder", GGUF, ids=lambda d: d.name)
def test_inspect_counts_tensor_types_as_llama_cpp_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stated = Counter(json.loads((folder / "expected.json").read_text())["tensor_types"])
    del stated["F32"]
    data = run_json(capsys, "inspect", folder)
    assert {s["scheme"].upper(): s["modules"] for s in data["schemes"]} == stated


@pytest.mark.parametrize(
    ("name", "scheme", "label", "bits"),
    [
        # 4 bit + (16 bit scale + 4 bit zero) / 128 (+ 32 bit g_idx per column)
        ("gptqmodel-awq-gemm-g128", "w4a16", "uint4 group(128):bf16 code-zero", 4 + 20 / 128),
        (
            "gptqmodel-4bit-g128-asym-descact",
            "w4a16",
            "uint4 group(128):f16 code-zero gather",
            4 + 20 / 128 + 2 * (4 * 256 * 6 + 4 * 512) * 8 / (2 * 589824),
        ),
    ],
)
def test_inspect_bits_per_weight_are_those_of_the_layout(
    name: str, scheme: str, label: str, bits: float, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = run_json(capsys, "inspect", BY_NAME[name])["schemes"]
    assert (found["scheme"], found["operands"]) == (scheme, {"weight": label})
    assert found["weights"] == 2 * 589824  # q, k, v, o, gate, up, down of two layers
    assert found["bits_per_weight"] == pytest.approx(bits, abs=1e-3)


def test_inspect_dynamic_rules_give_each_width_and_report_the_unused_pattern(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = run_json(capsys, "inspect", BY_NAME["gptqmodel-dynamic-4-8bit-skip"], "--layers")
    down = data["layers"]["model.layers.0.mlp.down_proj"]
    assert (down["scheme"], down["operands"]["weight"]) == ("w8a16", "uint8 group(64):f16 zero=128")
    assert {s["scheme"] for s in data["schemes"]} == {"w4a16", "w8a16"}
    assert any("layers" in w and "match no module" in w for w in data["warnings"])


@all_dirs
def test_inspect_ranks_share_the_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run_json(capsys, "inspect", folder)["stored_bytes"]
    two = run_json(capsys, "inspect", folder, "--tp", "2")["tensor_parallel"]
    assert one / 2 <= two["bytes_per_rank"] < one * 0.6
    assert two["replicated_bytes"] < one * 0.1


@pytest.mark.parametrize(
    "argv",
    [["formats"], ["plugins"], *(["inspect", str(d), "--layers", "--tp", "2"] for d in DIRS)],
    ids=lambda argv: Path(argv[-4] if len(argv) > 1 else argv[0]).name,
)
def test_command_imports_no_torch(argv: list[str]) -> None:
    probe = (
        "import sys; from quant_core.cli.main import main; main(sys.argv[1:]);"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", probe, *argv]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0


@all_dirs
def test_verify_real_checkpoint_has_no_problem(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run_json(capsys, "verify", folder)
    assert data["problems"] == []
    assert data["checked"] > 20


@all_dirs
def test_explain_every_module_names_a_kernel_or_a_rule(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = run_json(capsys, "inspect", folder, "--layers")["layers"]
    for name in list(layers)[:8] + list(layers)[-4:]:
        data = run_json(capsys, "explain", folder, name)
        if data["scheme"] is None:
            assert data["rule"]
        else:
            assert data["kernel"]["kernel"]
            assert "torch_ref" in [d["kernel"] for d in data["kernel"]["trace"]]


def test_explain_shows_the_rule_that_decided(capsys: pytest.CaptureFixture[str]) -> None:
    folder = BY_NAME["gptqmodel-dynamic-4-8bit-skip"]
    data = run_json(capsys, "explain", folder, "model.layers.0.mlp.down_proj")
    assert [(p["key"], p["kind"]) for p in data["patterns"]] == [("dynamic", "regex")]


def test_run_generates_with_packed_weights(capsys: pytest.CaptureFixture[str]) -> None:
    folder = BY_NAME["gptqmodel-4bit-g128-asym-descact"]
    argv = ("run", folder, "--prompt", "Return the ", "--max-new-tokens", "8", "--dtype", "float32")
    data = run_json(capsys, *argv)
    assert (data["prompt_tokens"], data["new_tokens"]) == (11, 8)  # one token a byte
    assert len(data["text"].encode()) == 8
    assert 0 < data["decode_tok_s"] < 1e6  # seven steps between the first token and the last
    assert data["memory"]["packed_bytes"] < data["memory"]["dense_bytes"] / 6
    assert data["memory"]["dense_bytes"] == 4 * 2 * 589824


@pytest.mark.parametrize("tokens", [1, 2])
def test_run_has_a_rate_from_two_tokens_on(tokens, capsys: pytest.CaptureFixture[str]) -> None:
    folder = BY_NAME["gptqmodel-4bit-g128-asym-descact"]
    data = run_json(capsys, "run", folder, "--prompt", "a", "--max-new-tokens", str(tokens))
    assert data["new_tokens"] == tokens
    assert (data["decode_tok_s"] is not None) == (tokens > 1)
    assert data["first_token_s"] > 0


def test_run_without_a_usable_tokenizer_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    # a byte-level vocabulary under the merges of another model: nothing can be built from that
    assert main(["run", str(BY_NAME["gguf-llama-q4_k_m"]), "--prompt", "x"]) == 1
    assert "Q-ENGINE-TOKENIZER" in capsys.readouterr().err


def test_known_formats_are_those_of_the_plugins() -> None:
    tool = REPO / "tools" / "gen_known_formats.py"
    done = subprocess.run(
        [sys.executable, tool, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_known_formats_check_notices_a_change(tmp_path: Path) -> None:
    sys.path.insert(0, str(REPO / "tools"))
    try:
        from gen_known_formats import known_formats
    finally:
        sys.path.pop(0)
    plugin = tmp_path / "plugins" / "x"
    (plugin / "src" / "plugin_x").mkdir(parents=True)
    (plugin / "pyproject.toml").write_text(
        '[project]\nname = "dist-x"\n[project.entry-points.quant_core]\nx = "plugin_x"\n'
    )
    (plugin / "src" / "plugin_x" / "__init__.py").write_text(
        "from quant_core.spec import PluginInfo\n"
        "def plugin_info():\n"
        "    return PluginInfo(id='x', api=(0, 1), quant_methods=('X-Method',),\n"
        "                      containers=('.xw',), side_files=('x.json',))\n"
    )
    known = {"x-method": "dist-x", "*.xw": "dist-x", "/x.json": "dist-x"}
    assert known_formats(tmp_path) == known


@pytest.mark.parametrize(
    ("name", "dist", "found"),
    [
        ("gguf-llama-q4_k_m", "quant-plugin-gguf", "model-q4_k_m.gguf"),
        ("msmodelslim-w8a8", "quant-plugin-modelslim-npu", "are not plain floats"),
    ],
)
def test_checkpoint_that_only_its_files_name_gets_the_pip_line(
    name: str, dist: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GGUF file beside other safetensors is no float checkpoint; ModelSlim has a side file."""
    env = {**os.environ, "QUANT_PLUGINS": "awq"}
    argv = [sys.executable, "-m", "quant_core.cli.main", "inspect", str(BY_NAME[name])]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1, done.stdout
    assert "Q-FMT-UNKNOWN" in done.stderr
    assert found in done.stderr
    assert f"Run `pip install {dist}`." in done.stderr
