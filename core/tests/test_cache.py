"""One cache folder, wherever the environment says."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from quant_core.cache import cache_folder, keep, kept
from quant_core.prepared.folder import default_folder


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    for name in ("QUANT_CACHE", "QUANT_PREPARED_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder("cuda") == Path.home() / ".cache" / "quant-core" / "cuda"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("cuda") == tmp_path / "quant-core" / "cuda"
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "own"))
    assert cache_folder("cuda") == tmp_path / "own" / "cuda"


def test_prepared_weights_lie_in_the_cache_folder_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("QUANT_PREPARED_DIR", raising=False)
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "prepared"
    monkeypatch.setenv("QUANT_PREPARED_DIR", str(tmp_path / "other"))
    assert default_folder() == tmp_path / "other"


def test_what_is_kept_comes_back_and_is_its_sum_and_itself(tmp_path):
    file = tmp_path / "new" / "a.bin"
    assert kept(file) is None
    keep(file, b"content")
    assert file.read_bytes() == hashlib.sha256(b"content").digest() + b"content"
    assert kept(file) == b"content"
    keep(file, b"other")
    assert kept(file) == b"other"
    assert [f.name for f in file.parent.iterdir()] == ["a.bin"]


def test_a_damaged_file_is_as_good_as_none_and_said(tmp_path, caplog):
    file = tmp_path / "a.bin"
    keep(file, b"content")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:40] + b"x" + whole[41:], whole[:5], b""):
        file.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="quant_core"):
            assert kept(file) is None
        assert "a.bin is damaged" in caplog.text


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="quant_core"):
        keep(tmp_path / "file" / "a.bin", b"content")
        keep(tmp_path / "file" / "b.bin", b"content")
    assert caplog.text.count("is not kept") == 1
