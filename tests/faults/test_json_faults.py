"""Section B of the fault list, as far as it is about JSON itself: B02, B03, B07, B08, B18.

What a value means is a format's business and is tested with the formats.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant_core.checkpoint import open_checkpoint, read_json_object, write_safetensors
from quant_core.errors import CheckpointError, ConfigError, LimitError

GOOD = b'{"model_type": "llama", "quantization_config": {"bits": 4}}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint folder without a config."""
    write_safetensors(tmp_path, {"w": torch.ones(2)})
    return tmp_path


CASES = {
    "B03-string": (b'"llama"', "Q-CFG-TYPE", "a string"),
    "B03-list": (b"[{}]", "Q-CFG-TYPE", "an array"),
    "B03-number": (b"4", "Q-CFG-TYPE", "a number"),
    "B03-null": (b"null", "Q-CFG-TYPE", "null"),
    "B07-top": (b'{"bits":4,"bits":8}', "Q-CFG-DUPLICATE", "'bits'"),
    "B07-nested": (b'{"q":[{"bits":4,"bits":4}]}', "Q-CFG-DUPLICATE", "'bits'"),
    "B07-escaped": (b'{"bits":4,"b\\u0069ts":8}', "Q-CFG-DUPLICATE", "'bits'"),
    "B08-nan": (b'{"x":NaN}', "Q-CFG-VALUE", "NaN"),
    "B08-infinity": (b'{"x":Infinity}', "Q-CFG-VALUE", "Infinity"),
    "B08-minus-infinity": (b'{"x":-Infinity}', "Q-CFG-VALUE", "-Infinity"),
    "B08-overflow": (b'{"x":1e400}', "Q-CFG-VALUE", "1e400"),
    "B08-huge-integer": (b'{"x":' + b"7" * 5000 + b"}", "Q-CFG-VALUE", "5000 digits"),
    "B18-empty": (b"", "Q-CFG-PARSE", "empty"),
    "B18-blank": (b"\n\n", "Q-CFG-PARSE", "empty"),
    "B18-bom-only": (b"\xef\xbb\xbf", "Q-CFG-PARSE", "empty"),
    "B18-utf16": (GOOD.decode().encode("utf-16"), "Q-CFG-PARSE", "UTF-16"),
    "B18-utf16-no-bom": (GOOD.decode().encode("utf-16-be"), "Q-CFG-PARSE", "UTF-16"),
    "B18-latin1": ('{"ä":1}'.encode("latin-1"), "Q-CFG-PARSE", "not UTF-8 at byte 2"),
    "B18-cut": (GOOD[:30], "Q-CFG-PARSE", "line 1"),
    "B18-trailing": (GOOD + b"}", "Q-CFG-PARSE", "Extra data"),
    "B18-deep": (b'{"a":' * 50_000, "Q-CFG-PARSE", ""),
    "B18-deep-closed": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "Q-CFG-PARSE", "too many"),
}


@pytest.mark.parametrize("case", CASES)
def test_faulty_config_json_fails_by_name_and_a_good_load_follows(folder: Path, case: str):
    raw, code, part = CASES[case]
    config = folder / "config.json"
    config.write_bytes(raw)
    before = sorted(os.listdir(folder))
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(folder)
    error, message = caught.value, str(caught.value)
    assert error.code == code
    assert error.path == str(config)
    assert "config.json" in message
    assert part in message
    assert "expected" in message
    assert "\n" not in message
    assert len(message) < 500
    assert isinstance(error, ValueError)
    assert sorted(os.listdir(folder)) == before
    config.write_bytes(GOOD)
    assert open_checkpoint(folder).config["quantization_config"]["bits"] == 4


def test_b18_bom_is_accepted(folder: Path):
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert open_checkpoint(folder).config["model_type"] == "llama"


def test_b18_missing_config_is_no_error_of_the_container_but_of_its_reader(folder: Path):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {}
    assert checkpoint.side_file("quantize_config.json") is None
    with pytest.raises(ConfigError) as caught:
        read_json_object(folder / "config.json")
    assert caught.value.code == "Q-CFG-PARSE"


def test_b18_config_of_100_mb_is_refused_unread(folder: Path):
    with (folder / "config.json").open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(LimitError) as caught:
        open_checkpoint(folder)
    assert caught.value.code == "Q-LIMIT-CONFIG"
    assert caught.value.actual == 100_000_000
    assert caught.value.expected == 16 * 2**20
    assert "config.json" in str(caught.value)


def test_b02_string_of_10_mb_does_not_reach_the_message(folder: Path):
    (folder / "config.json").write_bytes(b'{"a":"' + b"x" * 10_000_000 + b'","a":1}')
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(folder)
    assert caught.value.code == "Q-CFG-DUPLICATE"
    assert len(str(caught.value)) < 500


def test_b07_side_file_is_read_as_strictly(folder: Path):
    (folder / "quantize_config.json").write_bytes(b'{"bits":4,"bits":8}')
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(folder).side_file("quantize_config.json")
    assert caught.value.code == "Q-CFG-DUPLICATE"
    assert "quantize_config.json" in str(caught.value)


def test_config_is_read_only(folder: Path):
    (folder / "config.json").write_bytes(GOOD)
    config = open_checkpoint(folder).config
    with pytest.raises(TypeError):
        config["quantization_config"]["bits"] = 8  # type: ignore[index]


def test_config_fifo_does_not_hang(folder: Path):
    os.mkfifo(folder / "config.json")
    code = "import sys; from quant_core import open_checkpoint; open_checkpoint(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 1
    assert "not a regular file" in done.stderr


def test_config_without_permission_gives_the_reason_in_words(folder: Path, monkeypatch):
    (folder / "config.json").write_bytes(GOOD)
    real_open = Path.open

    def refuse(self, *args, **kw):
        if self.name == "config.json":
            raise PermissionError(13, os.strerror(13))
        return real_open(self, *args, **kw)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        open_checkpoint(folder)
    assert caught.value.code == "Q-CKPT-IO"
