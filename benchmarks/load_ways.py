"""What benchmarks/load.py times, and describes: ways to bring a checkpoint's bytes to a model."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import quant_core
from quant_core.memory import empty

__all__ = ["WAYS", "drop", "share_there", "stored_tensors", "ways_of"]

WAYS = (
    *("touch", "copy", "load", "copied", "read", "warm", "opened"),
    *("mapped", "placed", "resident", "skeleton", "peer"),
)
_PIECE = 16 << 20  # bytes that a thread takes at once


def stored_tensors(path: Path) -> Iterator[torch.Tensor]:
    """Every stored tensor, mapped; of GGUF the file's bytes as one."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(
        path.glob("*.gguf")
    )  # fmt: skip
    for file in files:
        if file.suffix == ".gguf":
            yield torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
            continue
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield opened.get_tensor(name)


def _int64(t: torch.Tensor) -> torch.Tensor:
    raw = t.reshape(-1).view(torch.uint8)
    return raw[: raw.numel() // 8 * 8].view(torch.int64)


def _summed(tensors: Iterable[torch.Tensor]) -> int:
    """The sum of all their bytes as int64; threads take pieces as they come.

    torch's own threads meet at the end of every tensor: on a busy machine each then waits for the
    one that others keep from running, which took up to eight times as long.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return sum(int(_int64(t).sum()) for t in tensors if t.nbytes >= 8)
    pieces = (p for t in tensors if t.nbytes >= 8 for p in _int64(t).split(_PIECE // 8))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return sum(pool.map(lambda p: int(p.sum()), pieces))
    finally:
        torch.set_num_threads(threads)


def touch(path: Path) -> int:
    return _summed(stored_tensors(path))


def copy(path: Path) -> list[torch.Tensor]:
    return [empty(tuple(t.shape), t.dtype).copy_(t) for t in stored_tensors(path)]


@contextmanager
def _mapping(setting: str) -> Iterator[None]:
    os.environ["QUANT_PREPARED_MAP"] = setting
    try:
        yield
    finally:
        del os.environ["QUANT_PREPARED_MAP"]


def read(path: Path, cache: Path) -> Any:
    with _mapping("0"):
        return quant_core.load_model(path, prepared=cache)


def warm(path: Path, cache: Path) -> Any:
    with _mapping("1"):
        model = quant_core.load_model(path, prepared=cache)
    return model, _touched(model)


def _touched(model: Any) -> int:
    held = {t.data_ptr(): t.data for t in (*model.buffers(), *model.parameters())}
    return _summed(held.values())


def mapped(path: Path) -> Any:
    model = quant_core.load_model(path, prepared="off", mmap=True)
    return model, _touched(model)


def placed(path: Path) -> Any:
    return quant_core.load_model(path, prepared="off", mmap=True)


def _pages(model: Any) -> list[tuple[int, int]]:
    """(first address, bytes) of whole pages, of all that the model holds; each once."""
    page, taken = mmap.PAGESIZE, 0
    held = sorted({(t.data_ptr(), t.nbytes) for t in (*model.buffers(), *model.parameters())})
    out = []
    for at, nbytes in held:
        first, end = max(at // page * page, taken), -(-(at + nbytes) // page) * page
        if nbytes and end > first:
            out.append((first, end - first))
            taken = end
    return out


def _there(at: int, nbytes: int) -> int:
    """How many of these pages are mapped into this process."""
    with open("/proc/self/pagemap", "rb", buffering=0) as table:
        table.seek(at // mmap.PAGESIZE * 8)
        entries = bytearray(table.read(nbytes // mmap.PAGESIZE * 8))
    return int((torch.frombuffer(entries, dtype=torch.int64) < 0).sum())  # bit 63


def share_there(model: Any) -> float:
    """How much of the model's weights lies in pages that are mapped into this process."""
    pages = _pages(model)
    there = sum(_there(at, nbytes) for at, nbytes in pages) * mmap.PAGESIZE
    return there / max(sum(nbytes for _, nbytes in pages), 1)


_POPULATE_READ = 22  # linux/mman.h, since Linux 5.14


def _populate(piece: tuple[int, int]) -> None:
    at, nbytes = piece
    if _there(at, nbytes) * mmap.PAGESIZE == nbytes:
        return
    if _LIBC.madvise(ctypes.c_void_p(at), ctypes.c_size_t(nbytes), _POPULATE_READ):
        raise SystemExit(f"MADV_POPULATE_READ: {os.strerror(ctypes.get_errno())}")


_LIBC = ctypes.CDLL(None, use_errno=True)


def resident(path: Path) -> Any:
    """Loaded, checked, and every page of the weights mapped.

    Pieces whose pages are all there are left alone.
    """
    model = quant_core.load_model(path, prepared="off", mmap=True)
    pieces = [
        (at + i, min(_PIECE, nbytes - i))
        for at, nbytes in _pages(model)
        for i in range(0, nbytes, _PIECE)
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(_populate, pieces))
    return model


def skeleton(config: Any) -> Any:
    """transformers' own modules of a config, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def opened(path: Path, cache: Path) -> Any:
    with _mapping("1"):
        return quant_core.load_model(path, prepared=cache)


def drop(*roots: Path) -> None:
    """Have the files' pages forgotten; what is mapped or not written yet stays."""
    files = [f for r in roots for f in ([r] if r.is_file() else r.rglob("*")) if f.is_file()]
    for file in files:
        with file.open("rb") as opened_file:
            os.fsync(opened_file.fileno())
            os.posix_fadvise(opened_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ways_of(path: Path, cache: Path, config: Any, dense: Path) -> dict[str, Callable[[], Any]]:
    """All of them, by name, in the order of a round.

    Args:
        cache: where prepared entries lie.
        config: of the model, without quantization.
        dense: the same model as bfloat16 safetensors.
    """
    return {
        "touch": lambda: touch(path),
        "copy": lambda: copy(path),
        "load": lambda: quant_core.load_model(path, prepared="off"),
        "copied": lambda: quant_core.load_model(path, prepared="off", mmap=False),
        "read": lambda: read(path, cache),
        "warm": lambda: warm(path, cache),
        "opened": lambda: opened(path, cache),
        "mapped": lambda: mapped(path),
        "placed": lambda: placed(path),
        "resident": lambda: resident(path),
        "skeleton": lambda: skeleton(config),
        "peer": lambda: AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16),
    }
