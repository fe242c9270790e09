"""Write safetensors: whole or not at all.

All files are written under temporary names in the target folder, flushed to the disk, and renamed
once everything is there; the index, which makes shards a set, comes last. Whatever stops the
write, no partial file stays. A lock (``lock``) makes a second writer of one folder fail at once;
weights that are there are not replaced unless asked.

A file's tensors are ordered by element size, then name, so that each begins aligned; a shard is
therefore collected before it is written: memory is one shard (``max_shard_bytes``) at most.
Format: see ``header``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quant_core.checkpoint.files import io_error
from quant_core.checkpoint.header import DTYPES
from quant_core.checkpoint.lock import take_lock
from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable, summarize

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["write_safetensors"]

LOCK = ".quant-write.lock"
_NAMES = {torch_name: name for name, (torch_name, bits) in DTYPES.items() if bits >= 8}


def write_safetensors(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
    overwrite: bool = False,
    align: int = 8,
) -> tuple[Path, ...]:
    """Write ``<stem>.safetensors``, or numbered shards and an index, into ``folder``.

    Args:
        tensors: name -> tensor; an iterable is consumed as it comes, one shard held at a time.
        max_shard_bytes: a shard is closed before it would grow beyond; a larger tensor gets one
            of its own.
        metadata: free-form strings for every file's header.
        overwrite: replace weights of the same stem that are already there.
        align: bytes at which the data begin; tensors of whole multiples come first, so that each
            of them begins at one, too.

    Returns:
        The data files, then the index if there is one.

    Raises:
        CheckpointError: ``Q-CKPT-EXISTS`` weights are there already, ``Q-CKPT-LOCKED`` another
            process writes here, ``Q-CKPT-DUPLICATE`` a name twice, ``Q-CKPT-NAME`` an impossible
            name, ``Q-CKPT-IO`` the system refused (disk full, permissions).
        LayoutError: ``Q-LAYOUT-DTYPE`` a tensor that the format cannot hold.
        ConfigError: ``Q-CFG-VALUE`` a wrong argument.
    """
    folder = Path(os.path.abspath(folder))
    metadata = dict(metadata or {})
    if max_shard_bytes < 1 or not re.fullmatch(r"[\w.-]+", stem):
        raise ConfigError(
            f"{printable(folder)}: max_shard_bytes={max_shard_bytes}, stem={stem!r}; expected a "
            "positive size and a plain file name. Correct the arguments.",
            code="Q-CFG-VALUE",
        )
    if not all(isinstance(s, str) for pair in metadata.items() for s in pair):
        raise ConfigError(
            f"{printable(folder)}: metadata holds values that are not strings, expected strings "
            "only. Convert them.",
            code="Q-CFG-VALUE",
            actual=metadata,
        )
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    with _claim(folder):
        old = _existing(folder, stem)
        if old and not overwrite:
            raise CheckpointError(
                f"{printable(folder)}: already holds {summarize(old, 3)}, expected no weights "
                f"named {stem!r}. Choose another folder or pass overwrite=True.",
                code="Q-CKPT-EXISTS",
                path=folder,
                actual=tuple(old),
            )
        return _write_set(folder, items, max_shard_bytes, metadata, stem, old, align)


def _write_set(
    folder: Path,
    items: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
    metadata: Mapping[str, str],
    stem: str,
    old: list[str],
    align: int,
) -> tuple[Path, ...]:
    staged: list[Path] = []
    placed: list[Path] = []

    def stage(parts: Iterable[bytes | memoryview]) -> None:
        path = folder / f".{stem}-{len(staged) + 1:05d}.{os.getpid()}.tmp"
        staged.append(path)
        _write_file(path, parts)

    try:
        shards: list[list[str]] = []
        total = 0
        for shard in _shards(items, max_shard_bytes, str(folder)):
            total += sum(_nbytes(t) for t in shard.values())
            stage(_file_parts(shard, metadata, align))
            shards.append(sorted(shard))
        count = len(shards)
        finals = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            finals = [f"{stem}.safetensors"]
        else:
            weight_map = {n: f for f, names in zip(finals, shards) for n in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            stage([json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"])
            finals.append(f"{stem}.safetensors.index.json")
        try:
            for name in old:
                if name not in finals:
                    (folder / name).unlink()
            for path, final in zip(staged, finals):
                os.replace(path, folder / final)
                placed.append(folder / final)
            _sync_folder(folder)
        except OSError as err:
            raise io_error(folder, err, "cannot be written") from err
    except BaseException:
        for path in (*staged, *placed):
            path.unlink(missing_ok=True)
        raise
    return tuple(placed)


def _shards(
    items: Iterable[tuple[str, Tensor]], max_bytes: int, where: str
) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors of at most ``max_bytes``; at least one group, perhaps empty.

    A group is emptied once its user asks for the next one, so that only one is ever held.
    """
    shard: dict[str, Tensor] = {}
    size, seen, yielded = 0, set[str](), False
    for name, tensor in items:
        _check(name, tensor, where)
        if name in seen:
            raise CheckpointError(
                f"{printable(where)}: tensor {printable(name)!r} is given twice, expected once. "
                "Give each tensor its own name.",
                code="Q-CKPT-DUPLICATE",
                path=where,
                tensor=name,
            )
        seen.add(name)
        if shard and size + _nbytes(tensor) > max_bytes:
            yield shard
            shard.clear()
            size, yielded = 0, True
        shard[name] = tensor
        size += _nbytes(tensor)
    if shard or not yielded:
        yield shard


def _check(name: object, tensor: Tensor, where: str) -> None:
    import torch

    valid = isinstance(name, str) and name != "__metadata__"
    if valid:
        try:
            str(name).encode()
        except UnicodeEncodeError:
            valid = False
    if not valid:
        raise CheckpointError(
            f"{printable(where)}: tensor name {printable(name)!r} cannot be stored, expected "
            "Unicode text other than '__metadata__'. Rename the tensor.",
            code="Q-CKPT-NAME",
            path=where,
            tensor=printable(name),
        )
    ok = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    if not ok or tensor.device.type == "meta" or _dtype(tensor) not in _NAMES:
        found = type(tensor).__name__
        if isinstance(tensor, torch.Tensor):
            found = f"{_dtype(tensor)} {tensor.layout} on {tensor.device.type}"
        raise LayoutError(
            f"{printable(where)}: tensor {printable(name)!r} is {found}, expected a dense tensor "
            f"with values, of {', '.join(_NAMES)}. Convert it first.",
            code="Q-LAYOUT-DTYPE",
            tensor=str(name),
            actual=found,
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _file_parts(
    shard: Mapping[str, Tensor], metadata: Mapping[str, str], align: int
) -> Iterator[bytes | memoryview]:
    """Length, header and data of one file."""
    import torch

    def place(name: str) -> tuple[bool, int, str]:
        odd = align > 8 and bool(_nbytes(shard[name]) % align)
        return odd, -shard[name].element_size(), name

    order = sorted(shard, key=place)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        t, begin = shard[name], end
        end += _nbytes(t)
        header[name] = {
            "dtype": _NAMES[_dtype(t)],
            "shape": list(t.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if shard[name].numel():
            t = shard[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            yield t.reshape(-1).view(torch.uint8).numpy().data


def _write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    try:
        with path.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as err:
        raise io_error(path.parent, err, "cannot be written") from err


def _existing(folder: Path, stem: str) -> list[str]:
    mine = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    return sorted(n for n in os.listdir(folder) if mine.fullmatch(n))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Make ``folder`` if needed and hold its lock; on error leave nothing behind."""
    made: list[Path] = []
    lock = folder / LOCK
    try:
        for parent in (folder, *folder.parents):
            if parent.exists():
                break
            made.append(parent)
        folder.mkdir(parents=True, exist_ok=True)
        fd = take_lock(lock)
    except FileExistsError as err:
        raise io_error(folder, err, "cannot be made a folder") from err
    except OSError as err:
        raise io_error(folder, err, "cannot be written") from err
    if fd is None:
        raise CheckpointError(
            f"{printable(folder)}: is being written by another process ({LOCK} is held), expected "
            "no other writer. Wait for it; if none runs any more, delete that file.",
            code="Q-CKPT-LOCKED",
            path=lock,
        )
    try:
        yield
    except BaseException:
        lock.unlink(missing_ok=True)
        for parent in made:
            try:
                parent.rmdir()
            except OSError:  # someone else put something there meanwhile
                break
        raise
    else:
        lock.unlink(missing_ok=True)
    finally:
        os.close(fd)
