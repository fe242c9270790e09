"""Settings of prepared weights: where they are mapped, and how much room they may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant_core.errors import ConfigError
from quant_core.prepared import folder, pages


@pytest.mark.parametrize(
    ("setting", "kind", "expected"),
    [
        ("", "ext4", True), ("", "nfs4", False), ("", "fuse.sshfs", False), ("", "", False),
        ("1", "nfs4", True), ("0", "ext4", False),
    ],
)  # fmt: skip
def test_entries_are_mapped_where_deleting_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, kind: str, expected: bool
) -> None:
    monkeypatch.setenv("QUANT_PREPARED_MAP", setting)
    monkeypatch.setattr(pages, "_file_system", lambda folder: kind)
    assert pages.mapping_wanted(tmp_path) is expected


def test_setting_that_is_neither_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_PREPARED_MAP", "yes")
    with pytest.raises(ConfigError, match="expected 0 or 1") as caught:
        pages.mapping_wanted(tmp_path)
    assert caught.value.code == "Q-CFG-VALUE"


def test_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    rows = ["/ rw - ext4 /dev/a rw", "/data rw shared:1 - nfs4 host:/x rw"]
    rows += ["/data/a\\040b rw - tmpfs none rw", "/data/x rw - xfs /dev/b rw"]
    rows += ["/data/x rw - fuse.sshfs host rw"]
    table.write_text("".join(f"2{i} 1 0:{i} / {row}\n" for i, row in enumerate(rows)))
    found = [
        pages._file_system(Path(p), str(table))
        for p in ("/etc", "/data/c", "/data/a b/c", "/data/x", "/database")
    ]
    assert found == ["ext4", "nfs4", "tmpfs", "fuse.sshfs", "ext4"]
    assert pages._file_system(Path("/etc"), str(tmp_path / "none")) == ""


def test_limit_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_PREPARED_BYTES", "12GB")
    with pytest.raises(ConfigError) as caught:
        folder.limit_bytes()
    assert caught.value.code == "Q-CFG-VALUE"
    assert "expected a number of bytes" in str(caught.value)
