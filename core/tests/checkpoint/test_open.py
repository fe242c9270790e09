from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from quant_core.checkpoint import SafetensorsCheckpoint, open_checkpoint
from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, FormatError, PluginError
from quant_core.registry import load_registry
from toy import candidate, toy_module


class Other(Checkpoint):
    """A checkpoint of a made-up container."""

    def __init__(self, path):
        self.path = self.folder = path
        self.container = "boxed"
        self.tensors, self.config, self.metadata, self.warnings = {}, {}, {}, []
        self.closed = False

    def read(self, name, index=()):
        raise KeyError(name)

    def close(self):
        self.closed = True


@pytest.fixture
def plugins(monkeypatch):
    """Make the registry hold the given openers; returns the function that sets them."""

    def install(**openers):
        def call_all(hook, *, path):
            assert hook == "open_checkpoint"
            answers = [(name, opener(path)) for name, opener in sorted(openers.items())]
            return [(name, answer) for name, answer in answers if answer is not None]

        info = {
            n: SimpleNamespace(id=n, dist=f"dist-{n}", info=SimpleNamespace(containers=(".box",)))
            for n in openers
        }
        fake = SimpleNamespace(call_all=call_all, plugins=info)
        monkeypatch.setattr("quant_core.checkpoint.open.registry", lambda: fake)

    install()
    return install


def boxed(path):
    files = [path] if path.is_file() else list(path.iterdir())
    return Other(path) if any(f.suffix == ".box" for f in files) else None


def put(folder, *names: str) -> None:
    for name in names:
        if name.endswith(".safetensors"):
            save_file({name: torch.ones(1)}, folder / name)
        else:
            (folder / name).write_bytes(b"x")


def test_open_file_and_folder_are_read_by_core(tmp_path, plugins):
    put(tmp_path, "model.safetensors", "expected.safetensors")
    for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        checkpoint = open_checkpoint(path)
        assert isinstance(checkpoint, SafetensorsCheckpoint)
        assert list(checkpoint.tensors) == ["model.safetensors"]


def test_open_lone_file_of_any_name_is_read(tmp_path, plugins):
    put(tmp_path, "weights.safetensors", "config.jsonl")
    assert list(open_checkpoint(tmp_path).tensors) == ["weights.safetensors"]


def test_open_complete_family_without_index_is_read_with_a_warning(tmp_path, plugins):
    put(tmp_path, "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.tensors) == 2
    [warning] = checkpoint.warnings
    assert "no index" in warning


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "model-00001-of-00001.safetensors"],
        ["a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"],
        ["a.safetensors", "b.safetensors"],
        ["a.safetensors.index.json", "b.safetensors.index.json"],
    ],
)
def test_open_two_sets_is_ambiguous_and_names_both(tmp_path, plugins, names):
    put(tmp_path, *names)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "Q-CKPT-AMBIGUOUS"
    assert all(n in str(caught.value) for n in names)


def test_open_container_of_a_plugin(tmp_path, plugins):
    plugins(box=boxed)
    put(tmp_path, "m.box")
    assert open_checkpoint(tmp_path).container == "boxed"
    assert open_checkpoint(tmp_path / "m.box").container == "boxed"


def test_open_safetensors_beside_other_container_is_ambiguous(tmp_path, plugins):
    opened = []
    plugins(box=lambda p: opened.append(boxed(p)) or opened[-1])
    put(tmp_path, "m.box", "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "Q-CKPT-AMBIGUOUS"
    assert "'model.safetensors'" in str(caught.value)
    assert "boxed" in str(caught.value)
    assert opened[0].closed
    assert open_checkpoint(tmp_path / "model.safetensors").container == "safetensors"


def test_open_lone_table_beside_other_container_yields_with_a_warning(tmp_path, plugins):
    plugins(box=boxed)
    put(tmp_path, "m.box", "expected.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.container == "boxed"
    assert "expected.safetensors" in checkpoint.warnings[0]


def test_open_claimed_by_two_plugins_is_ambiguous(tmp_path, plugins):
    plugins(one=Other, two=Other)
    put(tmp_path, "m.box")
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "Q-FMT-AMBIGUOUS"
    assert "'one', 'two'" in str(caught.value)


def test_open_plugin_answer_of_wrong_type_names_plugin(tmp_path, monkeypatch):
    module = toy_module("bad", open_checkpoint=lambda path: {"tensors": 1})
    found = load_registry([candidate(module, "bad")])
    monkeypatch.setattr("quant_core.checkpoint.open.registry", lambda: found)
    put(tmp_path, "m.box")
    with pytest.raises(PluginError, match="expected a Checkpoint or None") as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.code, caught.value.plugin) == ("Q-PLUGIN-RESULT", "bad")


def test_open_broken_plugin_does_not_block_safetensors(tmp_path, plugins):
    def broken(path):
        raise PluginError("plugin 'bad': raised KeyError", code="Q-PLUGIN-RESULT", plugin="bad")

    plugins(bad=broken)
    put(tmp_path, "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["model.safetensors"]
    assert "plugin 'bad'" in checkpoint.warnings[0]
    put(tmp_path, "x.box")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PluginError):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("names", [[], ["README.md"], ["m.box", "tokenizer.json"]])
def test_open_unclaimed_folder_lists_what_can_be_read(tmp_path, plugins, names):
    plugins(other=lambda path: None)
    put(tmp_path, *names)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "Q-FMT-UNKNOWN"
    assert "safetensors (core); .box (other)" in str(caught.value)
    assert all(n in str(caught.value) for n in names)


def test_open_unclaimed_file_raises(tmp_path, plugins):
    put(tmp_path, "m.box")
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path / "m.box")
    assert caught.value.code == "Q-FMT-UNKNOWN"


def test_open_only_a_partial_download_says_so(tmp_path, plugins):
    put(tmp_path, "config.txt", "model.safetensors.incomplete")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.incomplete") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.code == "Q-CKPT-MISSING-SHARD"
