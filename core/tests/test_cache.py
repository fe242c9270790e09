"""One cache folder, wherever the environment says."""

from __future__ import annotations

from pathlib import Path

from quant_core.cache import cache_folder
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
