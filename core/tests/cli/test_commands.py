"""The commands over a toy format: what they print, what they return, what they escape."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quant_core.cli.main import main
from quant_core.registry import load_registry
from quant_core.spec import PLUGIN_API, PluginInfo
from toy import candidate, toy_layer, toy_module, toy_registry

REGISTRY = sys.modules["quant_core.registry"]
LAYERS = {
    "model.layers.0.mlp.up_proj": (48, 32),
    "model.layers.0.mlp.down_proj": (32, 48),
}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "_registry", toy_registry())


def write(folder: Path, extra: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{name}.{leaf}": t
        for name, (n, k) in LAYERS.items()
        for leaf, t in toy_layer(n, k).items()
    }
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
    save_file(tensors | dict(extra or {}), folder / "model.safetensors")
    block = {"quantization_config": {"quant_method": "toy"}} | config
    (folder / "config.json").write_text(json.dumps(block))
    return folder


def run_json(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Any:
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("toy")
def test_inspect_counts_bits_and_bytes_from_the_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run_json(capsys, "inspect", str(write(tmp_path / "m")), "--layers")
    # 48*32 + 32*48 int8 codes, one float16 scale a row
    assert data["schemes"] == [
        {
            "scheme": "w8a16",
            "operands": {"weight": "int8 channel:f16"},
            "modules": 2,
            "matrices": 2,
            "weights": 3072,
            "stored_bytes": 3072 + 2 * (48 + 32),
            "bits_per_weight": 8.417,
        }
    ]
    assert data["stored_bytes"] == 3072 + 160 + 64
    assert data["format"]["id"] == "toy"
    assert data["unquantized"][0]["rule"] == "no packed tensor stored"
    assert set(data["layers"]) == {*LAYERS, "model.norm"}


@pytest.mark.usefixtures("toy")
def test_verify_ok_returns_0_and_says_what_was_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run_json(capsys, "verify", str(write(tmp_path / "m")))
    assert data["ok"] is True
    assert (data["checked"], data["tensors"]) == (3, 5)


@pytest.mark.usefixtures("toy")
def test_verify_nan_scale_and_infinite_norm_returns_1_and_lists_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_scale = torch.full((48,), 0.5, dtype=torch.float16)
    bad_scale[7] = float("nan")
    bad_norm = torch.full((32,), float("inf"), dtype=torch.bfloat16)
    folder = write(
        tmp_path / "m",
        {"model.layers.0.mlp.up_proj.s": bad_scale, "model.norm.weight": bad_norm},
    )
    data = run_json(capsys, "verify", str(folder), code=1)
    found = {p["where"]: p["code"] for p in data["problems"]}
    assert found == {
        "model.layers.0.mlp.up_proj": "Q-VALUE-SCALE",
        "model.norm.weight": "Q-VALUE-WEIGHT",
    }


@pytest.mark.usefixtures("toy")
def test_verify_missing_tensor_returns_1_with_code_and_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "m", {"model.extra.q": torch.zeros(8, 8, dtype=torch.int8)})
    assert main(["verify", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "Q-TENSOR-MISSING" in err
    assert "model.extra.s" in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("toy")
def test_explain_names_scheme_params_and_kernel_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.mlp.down_proj"
    data = run_json(capsys, "explain", str(write(tmp_path / "m")), name)
    assert (data["scheme"], data["shape"]) == ("w8a16", [32, 48])
    assert [s["name"] for p in data["params"] for s in p["stored"]] == [
        f"{name}.q",
        f"{name}.s",
        f"{name}.b",
    ]
    assert data["params"][2]["stored"][0]["shape"] is None  # an absent cohort member
    assert data["kernel"]["op"] == "linear"
    assert data["kernel"]["kernel"] in [
        d["kernel"] for d in data["kernel"]["trace"] if d["accepted"]
    ]


@pytest.mark.usefixtures("toy")
def test_explain_float_module_says_which_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run_json(capsys, "explain", str(write(tmp_path / "m")), "model.norm")
    assert data["scheme"] is None
    assert data["rule"] == "no packed tensor stored"
    assert data["tensors"] == [{"name": "model.norm.weight", "shape": [32], "dtype": "bfloat16"}]


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("model.norm.weight", "model.norm"),
        ("model.layers.0.mlp.down_proj.q", "model.layers.0.mlp.down_proj"),
    ],
)
def test_explain_takes_a_tensor_for_its_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str, module: str
) -> None:
    folder = str(write(tmp_path / "m"))
    data = run_json(capsys, "explain", folder, tensor)
    assert data == run_json(capsys, "explain", folder, module)
    assert data["name"] == module


@pytest.mark.usefixtures("toy")
def test_explain_unknown_name_returns_1_with_near_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(write(tmp_path / "m")), "model.layers.0.mlp.down_prj"]) == 1
    err = capsys.readouterr().err
    assert "Q-FMT-NAME" in err
    assert "model.layers.0.mlp.down_proj" in err


@pytest.mark.usefixtures("toy")
def test_escape_sequences_in_names_never_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "model.\x1b[31mred\x07\rgone.weight"
    folder = write(tmp_path / "m", {evil: torch.ones(4, dtype=torch.bfloat16)})
    for argv in (["inspect", str(folder), "--layers"], ["explain", str(folder), evil[:-7]]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert "red" in out
        assert not {"\x1b", "\x07", "\r"} & set(out)
    assert main(["explain", str(folder), "model.\x1b[2Jnone"]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_unknown_quant_method_is_bad_input_and_never_float(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REGISTRY, "_registry", toy_registry())
    folder = write(tmp_path / "m", quantization_config={"quant_method": "no-such-thing"})
    for command in (["inspect"], ["verify"]):
        assert main([*command, str(folder)]) == 1
        captured = capsys.readouterr()
        assert "Q-FMT-UNKNOWN" in captured.err
        assert captured.out == ""


@pytest.mark.usefixtures("toy")
def test_format_override_that_contradicts_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(write(tmp_path / "m")), "--format", "other"]) == 1
    assert "Q-FMT-OVERRIDE" in capsys.readouterr().err


def test_formats_and_plugins_without_plugins_say_how_to_add_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REGISTRY, "_registry", load_registry([]))
    assert run_json(capsys, "formats")["formats"] == []
    assert main(["formats"]) == 0
    assert "pip install quant-plugin-" in capsys.readouterr().out
    assert main(["plugins"]) == 0
    assert "pip install quant-plugin-" in capsys.readouterr().out


def test_plugins_says_what_each_is_or_which_hooks_it_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = PluginInfo(id="toy", api=PLUGIN_API, summary="rows of int8")
    module = toy_module(plugin_info=lambda: info)
    monkeypatch.setattr(REGISTRY, "_registry", load_registry([candidate(module)]))
    assert main(["plugins"]) == 0
    said = capsys.readouterr().out
    assert "rows of int8" in said
    assert "make_scheme" not in said
    assert main(["plugins", "--hooks"]) == 0
    said = capsys.readouterr().out
    assert "detect_format make_scheme" in said
    assert "rows of int8" not in said


def test_plugins_shows_what_was_set_aside_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = candidate(ImportError("no libfoo"), "broken")
    registry = load_registry([candidate(toy_module()), broken])
    monkeypatch.setattr(REGISTRY, "_registry", registry)
    data = run_json(capsys, "plugins")
    assert [p["id"] for p in data["plugins"]] == ["toy"]
    assert data["plugins"][0]["hooks"] == ["plugin_info", "detect_format", "make_scheme"]
    aside = data["set_aside"][0]
    assert (aside["id"], aside["code"]) == ("broken", "Q-PLUGIN-IMPORT")
    assert "no libfoo" in aside["cause"]
    assert main(["plugins"]) == 0
    assert "no libfoo" in capsys.readouterr().out
