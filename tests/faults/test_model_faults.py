"""Weights and a config that describe different models: said by name, by load and by verify.

Config values that transformers itself trips over must not come out as its own exceptions, nor keep
the process busy.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_sets import FIXTURES
from quant_core import convert, load_model
from quant_core.checkpoint.open import open_checkpoint
from quant_core.cli.main import main
from quant_core.cli.verify import verify
from quant_core.errors import FormatError, QuantError
from quant_core.plan import plan

AWQ = "gptqmodel-awq-gemm-g128"
GGUF = "gguf-llama-q4_k_m"
DOWN = "model.layers.0.mlp.down_proj"

Edit = Callable[[Path], None]


def _copy(name: str, to: Path) -> Path:
    shutil.copytree(FIXTURES / name, to, ignore=shutil.ignore_patterns("expected*"))
    return to


def _config(**values: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values))

    return edit


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    from safetensors.torch import load_file, save_file

    def edit(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _without(*names: str) -> Edit:
    return _tensors(lambda held: [held.pop(n) for n in list(held) if n.startswith(names)])


def _problems(folder: Path) -> dict[str, str]:
    """Code -> message of what verify finds."""
    with open_checkpoint(folder) as checkpoint:
        return {p["code"]: p["message"] for p in verify(plan(checkpoint))["problems"]}


CASES: dict[str, tuple[Edit, str, str]] = {
    "a packed layer is gone": (_without(DOWN), "Q-TENSOR-MISSING", f"{DOWN}.weight"),
    "the last norm is gone": (_without("model.norm"), "Q-TENSOR-MISSING", "model.norm.weight"),
    "an untied head is gone": (_without("lm_head"), "Q-TENSOR-MISSING", "lm_head.weight"),
    "nothing is stored": (_without(""), "Q-TENSOR-MISSING", "model.norm.weight"),
    "a layer too many": (_config(num_hidden_layers=1), "Q-TENSOR-UNEXPECTED", "model.layers.1."),
    "a layer too few": (_config(num_hidden_layers=3), "Q-TENSOR-MISSING", "model.layers.2."),
    "another width": (_config(hidden_size=512), "Q-LAYOUT-SHAPE", "(256, 256) and not (256, 512)"),
    "a vocabulary of 10^12": (_config(vocab_size=10**12), "Q-LAYOUT-SHAPE", "1000000000000"),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_of_another_model_are_named_by_load_and_by_verify(name, tmp_path):
    edit, code, named = CASES[name]
    folder = _copy(AWQ, tmp_path / "m")
    assert _problems(folder) == {}
    edit(folder)
    with pytest.raises(QuantError) as e:
        load_model(folder)
    assert e.value.code == code
    assert named in f"{e.value} {e.value.actual}" or code == "Q-TENSOR-MISSING"
    found = _problems(folder)
    assert found.keys() == {code}
    assert str(folder) in found[code]


def test_verify_says_what_was_compared_and_what_could_not_be(tmp_path, capsys):
    folder = _copy(AWQ, tmp_path / "m")
    assert main(["verify", str(folder)]) == 0
    assert "; fits LlamaForCausalLM" in capsys.readouterr().out
    _config(model_type="nobodys", architectures=["Nobodys"])(folder)
    assert main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "warning: not compared with its model: " in out
    assert "nobodys" in out
    assert "fits" not in out
    assert main(["verify", str(folder), "--strict"]) == 1


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "architectures is a number": ({"architectures": 5}, "Q-CFG-TYPE"),
    "layers without number": ({"num_hidden_layers": 1 << 31}, "Q-ENGINE-CONFIG"),
    "no heads": ({"num_attention_heads": 0}, "Q-ENGINE-CONFIG"),
    "no vocabulary": ({"vocab_size": 0, "pad_token_id": 2}, "Q-ENGINE-CONFIG"),
    "a width in words": ({"hidden_size": "256"}, "Q-ENGINE-CONFIG"),
    # the format's own word comes before transformers' one
    "a block of text": ({"quantization_config": "awq"}, "Q-CFG-TYPE"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_config_that_cannot_be_built_is_an_error_of_ours(name, tmp_path):
    values, code = BAD_CONFIGS[name]
    folder = _copy(AWQ, tmp_path / "m")
    _config(**values)(folder)
    with pytest.raises(QuantError) as e:
        load_model(folder)
    assert e.value.code == code
    assert str(folder) in str(e.value)


def _heads(folder: Path, key: str, value: int) -> None:
    """Overwrite a u32 of a GGUF header, and leave no config.json to say otherwise."""
    (folder / "config.json").unlink()
    (file,) = folder.glob("*.gguf")
    data = bytearray(file.read_bytes())
    at = data.index(key.encode() + struct.pack("<I", 4)) + len(key) + 4
    data[at : at + 4] = struct.pack("<I", value)
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("llama.attention.head_count_kv", 0, "Q-GGUF-KV"),
        ("llama.vocab_size", 0, "Q-ENGINE-CONFIG"),
        ("llama.block_count", 1 << 31, "Q-ENGINE-CONFIG"),
        ("llama.attention.head_count", 1 << 31, "Q-ENGINE-CONFIG"),
    ],
)
def test_numbers_of_a_container_that_no_model_has(key, value, code, tmp_path):
    folder = _copy(GGUF, tmp_path / "m")
    _heads(folder, key, value)
    with pytest.raises(QuantError) as e:
        load_model(folder)
    assert e.value.code == code
    if code == "Q-GGUF-KV":
        assert repr(key) in str(e.value)
    if key.endswith("head_count"):  # convert makes a config of the same numbers
        with pytest.raises(QuantError) as e:
            convert(folder, tmp_path / "out", to="gptq", allow_inexact=True)
        assert e.value.code == "Q-CFG-MISSING"
        assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("values", "code", "named"),
    [
        ({"vocab_size": 10**12}, "Q-LAYOUT-SHAPE", "and not (1000000000000, 256)"),
        ({"head_dim": "64"}, "Q-LAYOUT-REPRESENT", "head_dim is '64'"),
        (
            {"rope_parameters": {"rope_theta": 1e300, "rope_type": "default"}},
            "Q-LAYOUT-REPRESENT",
            "rope_theta is 1e+300",
        ),
    ],
)
def test_number_that_a_gguf_file_cannot_hold_is_refused(values, code, named, tmp_path):
    folder = _copy(AWQ, tmp_path / "m")
    _config(**values)(folder)
    with pytest.raises(QuantError) as e:
        convert(folder, tmp_path / "out", to="gguf")
    assert e.value.code == code
    assert named in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def _put(value: float, *names: str) -> Edit:
    """The fourth number of these tensors is ``value``."""

    def put(held: dict[str, torch.Tensor]) -> None:
        for name in names:
            held[name].view(-1)[3] = value

    return _tensors(put)


NORMS = ("model.norm.weight", "model.layers.0.input_layernorm.weight")


@pytest.mark.parametrize("mmap", [None, False])
@pytest.mark.parametrize(
    ("edit", "dtype", "code", "named"),
    [
        (_put(float("nan"), NORMS[0]), "bfloat16", "Q-VALUE-WEIGHT", NORMS[:1]),
        (_put(float("nan"), *NORMS), "float32", "Q-VALUE-WEIGHT", NORMS),
        (
            _put(float("-inf"), "model.embed_tokens.weight"),
            "bfloat16",
            "Q-VALUE-WEIGHT",
            ("model.safetensors", "model.embed_tokens.weight", "1 of 73728", "(0, 3)"),
        ),
        (_put(1e6, NORMS[0]), "float16", "Q-ENGINE-DTYPE", (NORMS[0], "65504", "float16")),
    ],
)
def test_float_parameters_that_are_not_finite_are_named_by_load(
    edit, dtype, code, named, mmap, tmp_path
):
    folder = _copy(AWQ, tmp_path / "m")
    edit(folder)
    with pytest.raises(QuantError) as e:
        load_model(folder, dtype=dtype, mmap=mmap)
    assert e.value.code == code
    assert all(n in str(e.value) for n in named)
    if code == "Q-ENGINE-DTYPE":
        load_model(folder, dtype="bfloat16", mmap=mmap)
        assert _problems(folder) == {}
    else:
        assert _problems(folder).keys() == {code}


def test_largest_bfloat16_that_float16_holds_loads(tmp_path):
    folder = _copy(AWQ, tmp_path / "m")
    _put(-65280.0, *NORMS)(folder)
    for dtype in ("float16", "float32"):
        load_model(folder, dtype=dtype)


def test_large_parameters_are_left_to_verify(tmp_path, monkeypatch):
    folder = _copy(AWQ, tmp_path / "m")
    _put(float("nan"), "model.embed_tokens.weight")(folder)
    monkeypatch.setattr("quant_core.engines.transformers_finite.MOST", 73728 * 2 - 1)
    load_model(folder, dtype="bfloat16")
    assert _problems(folder).keys() == {"Q-VALUE-WEIGHT"}


@pytest.mark.parametrize(
    ("edit", "code", "named"),
    [
        (_without("model.layers.1.input_layernorm.weight"), "Q-TENSOR-MISSING", "layers.1.input_"),
        (_without("model.norm.weight"), "Q-TENSOR-MISSING", "model.norm.weight"),
        (
            _without(*(f"model.layers.1.mlp.up_proj.{s}" for s in ("qweight", "qzeros", "scales"))),
            "Q-TENSOR-MISSING",
            "layers.1.mlp.up_proj",
        ),
        (_config(num_hidden_layers=3), "Q-TENSOR-MISSING", "model.layers.2."),
        (_config(intermediate_size=384), "Q-LAYOUT-SHAPE", "model.layers.0.mlp"),
    ],
)
def test_convert_refuses_a_source_that_is_no_whole_model(edit, code, named, tmp_path):
    folder = _copy(AWQ, tmp_path / "m")
    edit(folder)
    with pytest.raises(QuantError) as e:
        convert(folder, tmp_path / "out", to="gptq", allow_inexact=True)
    assert e.value.code == code
    assert named in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("edit", "warned"),
    [
        (_tensors(lambda t: t.update({"model.extra": torch.zeros(3)})), "'model.extra'"),
        (_config(model_type="none_such"), "not compared with its model"),
    ],
)
def test_convert_says_what_it_could_not_compare(edit, warned, tmp_path):
    folder = _copy(AWQ, tmp_path / "m")
    edit(folder)
    result = convert(folder, tmp_path / "out", to="gptq")
    assert [w for w in result.warnings if warned in w]
    assert not convert(FIXTURES / AWQ, tmp_path / "good", to="gptq").warnings


def test_declared_format_with_floats_only_is_a_warning_and_nothing_to_convert(tmp_path):
    folder = _copy(AWQ, tmp_path / "m")

    def floats(held: dict[str, torch.Tensor]) -> None:
        for name in [n for n in held if n.endswith(".qweight")]:
            module = name.removesuffix(".qweight")
            k, words = held[name].shape
            for leaf in ("qweight", "qzeros", "scales"):
                del held[f"{module}.{leaf}"]
            held[f"{module}.weight"] = torch.zeros(words * 8, k, dtype=torch.bfloat16)

    _tensors(floats)(folder)
    with open_checkpoint(folder) as checkpoint:
        assert any("every module is stored as floats" in w for w in plan(checkpoint).warnings)
    with pytest.raises(FormatError) as e:
        convert(folder, tmp_path / "out", to="gptq")
    assert e.value.code == "Q-FMT-TARGET"
