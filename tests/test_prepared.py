"""Prepared weights: the same model from the cache, and never another one.

The warm model is held to the producers' logits, like any load. What may go wrong with a cache is
done to it here: another checkpoint under the same name, other software, files cut short, a folder
that cannot be written, two writers, no room.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from checkpoint_sets import FIXTURES
from producers import within
from quant_core import load as load_functions
from quant_core import load_model
from quant_core.cli.main import main
from quant_core.errors import CheckpointError, ConfigError
from quant_core.prepared import build, entry, folder, key
from quant_core.prepared import pages as pages_of
from quant_core.spec import TensorInfo

CHECKPOINTS = sorted(d for d in FIXTURES.iterdir() if (d / "expected.json").is_file())
ONE = FIXTURES / "gptqmodel-awq-gemm-g128"
MIXED = FIXTURES / "ar-mixed-bits"
EXPERTS = FIXTURES / "gguf-moe-q4_k_m"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder, "_SPARE", 0)
    monkeypatch.delenv("QUANT_PREPARED", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, no weight may come from a checkpoint any more."""

    def forbid(*args: object) -> None:
        raise AssertionError("a matrix was read from the checkpoint")

    return lambda: monkeypatch.setattr("quant_core.build.read_matrix", forbid)


def load(path: Path, cache: Path | str | None) -> PreTrainedModel:
    return load_model(path, dtype=torch.float32, prepared=cache)


def stored(model: PreTrainedModel) -> dict[str, tuple[torch.dtype, bytes]]:
    tensors = {n: t.detach().reshape(-1) for n, t in (*model.named_buffers(),
                                                      *model.named_parameters())}  # fmt: skip
    return {n: (t.dtype, t.view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}


def only_entry(cache: Path) -> Path:
    (found,) = folder.entries(cache)
    return found.path / folder.BUFFERS


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: p.name)
def test_warm_model_is_the_cold_one_and_gives_the_producers_logits(
    path: Path, cache: Path, sealed: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    plain = stored(load(path, "off"))
    assert stored(load(path, cache)) == plain
    sealed()
    warm = load(path, cache)
    assert stored(warm) == plain
    assert within(warm, path)
    assert [m for m in warnings(caplog) if "prepared" in m] == []


def test_warm_model_saves_what_the_checkpoint_holds(cache: Path, tmp_path: Path) -> None:
    load(ONE, cache)
    load(ONE, cache).save_pretrained(tmp_path / "saved")
    want = load_file(next(ONE.glob("model*.safetensors")))
    got = load_file(next((tmp_path / "saved").glob("model*.safetensors")))
    assert {n for n in want if n.endswith("qweight")} <= set(got)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_warm_experts_and_members_of_several_widths(
    cache: Path, sealed: Callable[[], None]
) -> None:
    for path in (MIXED, EXPERTS):
        load(path, cache)
    sealed()
    assert all(within(load(path, cache), path) for path in (MIXED, EXPERTS))
    assert len(folder.entries(cache)) == 2


def test_nothing_is_kept_unless_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_PREPARED_DIR", str(cache))
    load(ONE, None)
    assert not cache.exists()
    monkeypatch.setenv("QUANT_PREPARED", "auto")
    load(ONE, None)
    assert len(folder.entries(cache)) == 1
    load(MIXED, "off")
    assert len(folder.entries(cache)) == 1


def test_warm_load_accounts_for_every_tensor(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(ONE, cache)
    monkeypatch.setattr(build, "member_parts", lambda member: iter(()))
    with pytest.raises(CheckpointError) as err:
        load(ONE, cache)
    assert err.value.code == "Q-TENSOR-UNREAD"


# ------------------------------------------------------------------------------- never another one


def test_changed_checkpoint_of_equal_size_and_mtime_is_another(cache: Path, tmp_path: Path) -> None:
    path = shutil.copytree(ONE, tmp_path / "model")
    load(path, cache)
    (file,) = path.glob("model*.safetensors")
    before, raw = file.stat(), bytearray(file.read_bytes())
    name = next(n for n in safe_open(file, "pt").keys() if n.endswith("qweight"))  # noqa: SIM118
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    at = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
    raw[at] ^= 0x11
    with file.open("r+b") as f:
        f.write(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    same = ("st_size", "st_mtime_ns", "st_ino")
    assert all(getattr(before, n) == getattr(after, n) for n in same)
    assert stored(load(path, cache)) == stored(load(path, "off"))
    assert stored(load(path, cache)) != stored(load(ONE, "off"))


@pytest.mark.parametrize(
    "change",
    [
        ("setenv", "QUANT_KERNELS", "torch_ref"),
        ("_sources", "of another build"),
        ("_processor", "another processor"),
    ],
    ids=lambda c: c[0] if c[0] != "setenv" else c[1],
)
def test_other_software_or_machine_builds_its_own(
    change: tuple[str, ...], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(ONE, cache)
    if change[0] == "setenv":
        monkeypatch.setenv(*change[1:])
    else:
        monkeypatch.setattr(key, change[0], lambda *args: change[1])
    assert stored(load(ONE, cache)) == stored(load(ONE, "off"))
    assert len(folder.entries(cache)) == 2


def test_dtype_is_part_of_the_key(cache: Path) -> None:
    load(EXPERTS, cache)
    model = load_model(EXPERTS, dtype=torch.bfloat16, prepared=cache)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert len(folder.entries(cache)) == 2


def test_kernel_that_is_no_longer_chosen_is_not_bound(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(ONE, cache)
    plain, mark = stored(load(ONE, "off")), only_entry(cache).stat().st_ctime_ns
    read = entry.Entry.module

    def renamed(self: entry.Entry, name: str) -> entry.Module:
        found = read(self, name)
        parts = tuple(
            entry.Part(kernel="gone", op=p.op, members=p.members, buffers=p.buffers)
            for p in found.parts
        )
        return entry.Module(reason=found.reason, parts=parts)

    monkeypatch.setattr(entry.Entry, "module", renamed)
    assert stored(load(ONE, cache)) == plain
    assert sum("kernel 'gone'" in m for m in warnings(caplog)) == 1
    assert only_entry(cache).stat().st_ctime_ns != mark


@pytest.mark.parametrize("keep", [0, 7, 300, 0.5, -1], ids=str)
def test_truncated_entry_is_rebuilt(
    keep: float, cache: Path, caplog: pytest.LogCaptureFixture, sealed: Callable[[], None]
) -> None:
    load(ONE, cache)
    file = only_entry(cache)
    size = file.stat().st_size
    left = int(size * keep) if keep == 0.5 else int(keep) % size
    os.truncate(file, left)
    assert within(load(ONE, cache), ONE)
    (told,) = [m for m in warnings(caplog) if "prepared weights are built again" in m]
    assert str(file) in told  # not one of the checkpoint's files, so nothing to download
    assert "ownload" not in told
    assert only_entry(cache).stat().st_size == size
    sealed()
    assert within(load(ONE, cache), ONE)


def test_entry_that_cannot_be_mapped_is_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    sealed: Callable[[], None],
) -> None:  # fmt: skip
    load(ONE, cache)

    def refuse(*args: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(entry, "map_file", refuse)
    sealed()
    for _ in range(2):
        caplog.clear()
        assert within(load(ONE, cache), ONE)
        (told,) = warnings(caplog)
        assert "No such device" in told
        assert "QUANT_PREPARED_MAP=0" in told


def test_entry_cut_while_it_is_read_is_rebuilt(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUANT_PREPARED_MAP", "0")
    load(ONE, cache)
    file, found = only_entry(cache), entry.Entry.found

    def cut(self: entry.Entry, *args: object) -> TensorInfo:
        info = found(self, *args)  # type: ignore[arg-type]
        os.truncate(file, 100_000)
        return info

    monkeypatch.setattr(entry.Entry, "found", cut)
    assert within(load(ONE, cache), ONE)
    assert sum("ends early" in m for m in warnings(caplog)) == 1


@pytest.mark.parametrize("what", ["cpu_wna16", "out_features", "key", "sum"])
def test_header_that_was_touched_is_not_believed(
    what: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(FIXTURES / "gguf-llama-q4_k_m", cache)
    file = only_entry(cache)
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    text = bytes(raw[8 : 8 + length])
    swaps = {
        "cpu_wna16": (b"_proj|0|", b"_prjo|0|"),
        "out_features": (b'\\\\\\"n\\\\\\",', b'\\\\\\"m\\\\\\",'),
        "key": (b"torch.float32", b"torch.float64"),
        "sum": (b'"sum":"', b'"sum":"0'),
    }
    old, new = swaps[what]
    assert old in text
    touched = text.replace(old, new, 1)
    if len(touched) > length:
        end = touched.index(b'"', touched.index(new) + len(new))
        touched = touched[: end - 1] + touched[end:]
    raw[8 : 8 + length] = touched
    file.write_bytes(raw)
    assert within(load(FIXTURES / "gguf-llama-q4_k_m", cache),
                        FIXTURES / "gguf-llama-q4_k_m")  # fmt: skip
    assert sum("prepared weights are built again" in m for m in warnings(caplog)) == 1


def test_entry_under_another_name_is_not_used(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(ONE, cache)
    load(MIXED, cache)
    last, first = (f.path for f in folder.entries(cache))
    shutil.copy(last / folder.BUFFERS, first / folder.BUFFERS)
    assert stored(load(ONE, cache)) == stored(load(ONE, "off"))
    assert sum("the key of another load" in m for m in warnings(caplog)) == 1


# ----------------------------------------------------------------------------- folders and writers


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write")
def test_folder_that_cannot_be_written_only_warns(caplog: pytest.LogCaptureFixture) -> None:
    assert within(load(ONE, "/proc/self/prepared"), ONE)
    assert sum("not kept" in m for m in warnings(caplog)) == 1


def test_cache_that_may_only_be_read_is_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, sealed: Callable[[], None]
) -> None:
    load(ONE, cache)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(entry.os, "utime", refuse)
    sealed()
    assert within(load(ONE, cache), ONE)


def test_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as err:
        load(ONE, tmp_path / "file")
    assert err.value.code == "Q-CFG-VALUE"


def test_second_writer_leaves_the_first_alone(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(ONE, cache)
    file = only_entry(cache)
    first, real = file.read_bytes(), build.write_entry

    def late(path: Path, *args: object) -> None:
        file.write_bytes(first)  # the other process was faster
        real(path, *args)  # type: ignore[arg-type]

    file.unlink()
    monkeypatch.setattr(build, "write_entry", late)
    assert within(load(ONE, cache), ONE)
    assert file.read_bytes() == first
    assert warnings(caplog) == []


AT_ONCE = """
import os, sys, torch, quant_core
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
go, start = os.pipe()
children = []
for _ in range(3):
    if pid := os.fork():
        children.append(pid)
        continue
    os.close(start)
    os.read(go, 1)  # until all are there
    model = quant_core.load_model(sys.argv[1], dtype=torch.float32, prepared=sys.argv[2])
    print(sum(b.float().nansum().item() for b in model.buffers()), flush=True)
    os._exit(0)
os.close(start)
sys.exit(max(os.waitpid(pid, 0)[1] for pid in children) != 0)
"""


@pytest.mark.slow
def test_processes_that_load_at_once_all_succeed(cache: Path) -> None:
    command = [sys.executable, "-c", AT_ONCE, str(ONE), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sums = done.stdout.split()
    assert len(sums) == 3
    assert len(set(sums)) == 1
    assert len(folder.entries(cache)) == 1
    names = sorted(p.name for p in only_entry(cache).parent.iterdir())
    assert names == [folder.BUFFERS]


def test_oldest_entry_makes_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(ONE, cache)
    first = only_entry(cache)
    os.utime(first, (1, 1))
    room = first.stat().st_size
    monkeypatch.setenv("QUANT_PREPARED_BYTES", str(room + room // 2))
    load(MIXED, cache)
    assert not first.exists()
    assert len(folder.entries(cache)) == 1


def test_used_entry_outlives_an_older_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(ONE, cache)
    first = only_entry(cache)
    load(MIXED, cache)
    for found in folder.entries(cache):
        os.utime(found.path / folder.BUFFERS, (1, 1))
    load(ONE, cache)  # used again
    load(EXPERTS, elsewhere := cache.with_name("elsewhere"))
    room = first.stat().st_size + only_entry(elsewhere).stat().st_size
    monkeypatch.setenv("QUANT_PREPARED_BYTES", str(room + 4096))
    load(EXPERTS, cache)
    assert first.exists()
    assert len(folder.entries(cache)) == 2


def test_entry_larger_than_the_limit_is_not_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUANT_PREPARED_BYTES", "1000")
    assert within(load(ONE, cache), ONE)
    assert folder.entries(cache) == []
    assert sum("not kept" in m for m in warnings(caplog)) == 1


# ---------------------------------------------------------------------------------- mapped pages


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_PREPARED_MAP", "1")


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: p.name)
def test_mapped_model_is_the_cold_one(
    path: Path, cache: Path, sealed: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, pages = stored(load(path, "off")), []
    load(path, cache)
    real = entry.Entry.mapped

    def counted(self: entry.Entry, *args: object) -> torch.Tensor | None:
        found = real(self, *args)  # type: ignore[arg-type]
        pages.append(found is not None)
        assert found is None or found.data_ptr() % pages_of.ALIGN == 0
        return found

    monkeypatch.setattr(entry.Entry, "mapped", counted)
    sealed()
    model = load(path, cache)
    assert stored(model) == plain
    assert within(model, path)
    assert any(pages)


@pytest.mark.usefixtures("mapped")
def test_writing_into_a_mapped_buffer_changes_no_file(cache: Path) -> None:
    load(ONE, cache)
    model, before = load(ONE, cache), only_entry(cache).read_bytes()
    for value in model.buffers():
        value.zero_()
    assert only_entry(cache).read_bytes() == before
    assert within(load(ONE, cache), ONE)


@pytest.mark.usefixtures("mapped")
def test_mapped_model_outlives_its_entry(cache: Path) -> None:
    load(ONE, cache)
    model = load(ONE, cache)
    assert main(["cache", "clear", "--folder", str(cache)]) == 0
    assert folder.entries(cache) == []
    assert within(model, ONE)


@pytest.mark.usefixtures("mapped")
def test_large_floats_are_pages_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding and the norms come from the entry; the checkpoint's own are not read."""
    cold = load(ONE, cache)
    assert any(n.endswith("|float") for n in load_file(only_entry(cache)))
    read: list[str] = []
    real = load_functions.read_parameter
    monkeypatch.setattr(
        "quant_core.build.read_parameter",
        lambda plan, name: read.append(name) or real(plan, name),
    )
    warm = load(ONE, cache)
    assert stored(warm) == stored(cold)
    assert warm.get_input_embeddings().weight.nbytes >= 1024
    assert not [n for n in read if "embed" in n]
    assert within(warm, ONE)
