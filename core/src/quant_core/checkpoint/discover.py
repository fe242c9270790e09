"""Which files of a folder form one safetensors checkpoint, decided from names alone.

In this order; the first that is there is taken:

1. ``*.safetensors.index.json`` names its shards; of several, ``model.safetensors.index.json``.
2. ``model.safetensors``
3. one complete family ``<stem>-00001-of-0000N.safetensors`` without an index
4. a lone file of another name. This claim is weak: it may be an adapter or a table beside weights
   in another container, and then those win.

What contradicts itself (1 and 2 both, two families, several lone files) is ambiguous and never
guessed. Files that would have to be unpickled are named in the error and never opened.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from quant_core.checkpoint.files import io_error
from quant_core.errors import CheckpointError, printable, summarize

__all__ = [
    "INDEX_SUFFIX",
    "SUFFIX",
    "FileSet",
    "check_lone",
    "check_single_beside_index",
    "find_set",
    "is_pickle_name",
    "list_names",
    "missing_shards",
    "partial_files",
    "pickle_error",
]

INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
_SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PARTIAL = (".incomplete", ".part", ".partial", ".tmp", ".crdownload", ".aria2", ".download")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSet:
    """The files of one checkpoint: an index, or the data files themselves."""

    index: str = ""
    files: tuple[str, ...] = ()
    weak: bool = False  # yields to another container in the folder
    warnings: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.index or summarize(self.files, 3)


def list_names(folder: Path) -> list[str]:
    """Names in ``folder``, sorted; raises ``Q-CKPT-IO``."""
    try:
        return sorted(os.listdir(folder))
    except OSError as err:
        raise io_error(folder, err) from err


def is_pickle_name(name: str) -> bool:
    """Whether a file of this name is one that only unpickling could read."""
    return name.lower().endswith(_PICKLES)


def find_set(folder: Path, names: list[str]) -> FileSet | None:
    """The safetensors set among ``names``, or None if there is none.

    Raises:
        CheckpointError: ``Q-CKPT-AMBIGUOUS`` or ``Q-CKPT-MISSING-SHARD``.
    """
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX)]
    files = [n for n in names if n.endswith(SUFFIX)]
    families: dict[tuple[str, int], list[str]] = {}
    for name in files:
        if m := _SHARD.fullmatch(name):
            families.setdefault((m.group(1), int(m.group(3))), []).append(name)
    if indexes:
        index = f"model{INDEX_SUFFIX}"
        if index not in indexes:
            if len(indexes) > 1:
                raise _ambiguous(folder, indexes)
            index = indexes[0]
        return FileSet(index=index)
    if "model.safetensors" in files:
        if families:
            raise _ambiguous(folder, ["model.safetensors", *next(iter(families.values()))])
        return FileSet(files=("model.safetensors",))
    if families:
        if len(families) > 1:
            raise _ambiguous(folder, [shards[0] for shards in families.values()])
        [((stem, total), shards)] = families.items()
        if len(shards) != total:
            have = {int(m.group(2)) for s in shards if (m := _SHARD.fullmatch(s))}
            width = len(shards[0].removesuffix(SUFFIX).rpartition("-")[2])
            # the total is a number from a file name: do not build a list of its length
            lost = (
                f"{stem}-{i:0{width}d}-of-{total:0{width}d}{SUFFIX}"
                for i in range(1, min(total, len(shards) + 20) + 1)
                if i not in have
            )
            raise missing_shards(folder, list(lost), total - len(shards))
        note = f"{printable(folder)}: has no index file; all {total} shards of {stem!r} are read"
        return FileSet(files=tuple(shards), warnings=(note,))
    if not files:
        return None
    return FileSet(files=tuple(files), weak=True)


def check_lone(folder: Path, found: FileSet) -> None:
    """Refuse a weak set of several files, once no other container claims the folder."""
    if found.weak and len(found.files) > 1:
        raise _ambiguous(folder, list(found.files))


def check_single_beside_index(folder: Path, index: str, shards: set[str]) -> None:
    """Refuse a ``model.safetensors`` that the index beside it does not mention."""
    single = index.removesuffix(INDEX_SUFFIX) + SUFFIX
    if single not in shards and (folder / single).exists():
        raise _ambiguous(folder, [single, index])


def _ambiguous(folder: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{printable(folder)}: holds {summarize(names, 4)}, expected one set of weights. "
        "Remove the others, or give the path of the file or index to open.",
        code="Q-CKPT-AMBIGUOUS",
        path=folder,
        expected="one set of weights",
        actual=tuple(names),
    )


def missing_shards(
    folder: Path, lost: list[str], count: int, named_by: str = ""
) -> CheckpointError:
    """``Q-CKPT-MISSING-SHARD`` for ``count`` files; mentions partial downloads beside them.

    Args:
        lost: names of the first of them; empty if only a partial download is there.
        named_by: the index that lists them.
    """
    partial = partial_files(folder, lost or None)
    hint = f" Found the partial download {summarize(partial, 3)}." if partial else ""
    shown = f": {summarize(lost)}" if lost else ""
    more = f" and {count - len(lost)} more" if lost and count > len(lost) else ""
    what = f"{count} weight file(s) are missing" if count else "the weights are missing"
    return CheckpointError(
        f"{printable(folder / named_by)}: {what}{shown}{more}, "
        f"expected all of them in the folder.{hint} Download them again.",
        code="Q-CKPT-MISSING-SHARD",
        path=folder / named_by,
        expected=tuple(lost),
        actual=tuple(partial),
    )


def partial_files(folder: Path, lost: list[str] | None = None) -> list[str]:
    """Partial downloads in ``folder``: of the files ``lost``, or of any weights if None.

    Looks beside the files, into the downloader's folder of a local directory, and into the blobs
    of a hub-cache snapshot (named by hash, so counted for any file).
    """
    found = []
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    for place in places:
        for name in os.listdir(place) if place.is_dir() else ():
            if not name.endswith(_PARTIAL):
                continue
            if SUFFIX in name if lost is None else name.startswith(tuple(lost)):
                found.append((place / name).relative_to(folder).as_posix())
    blobs = folder.parent.parent / "blobs"
    if folder.parent.name == "snapshots" and blobs.is_dir():
        found += [f"blobs/{n}" for n in os.listdir(blobs) if n.endswith(_PARTIAL)]
    return sorted(found)


def pickle_error(path: Path, names: list[str]) -> CheckpointError:
    """``Q-CKPT-PICKLE``: weights that only unpickling could read."""
    return CheckpointError(
        f"{printable(path)}: {summarize(names, 3)} is a pickle, which can run code when it is "
        "opened; expected safetensors. It was not opened. Convert it to safetensors where you "
        "trust its origin.",
        code="Q-CKPT-PICKLE",
        path=path,
        expected="safetensors",
        actual=tuple(names),
    )
