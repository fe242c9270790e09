"""Which files form one GGUF model: one file, a folder with one, or a split set.

model-00001-of-00003.gguf, model-00002-of-00003.gguf, ...    split.no = 0, 1, ...
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from quant_core.errors import CheckpointError, printable, summarize
from quant_plugin_gguf.reader import Header

__all__ = ["check_split", "files_of"]

_PART = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


def files_of(path: Path) -> list[Path]:
    """The files of the model at ``path``, in order; none if it is no GGUF model.

    Raises:
        CheckpointError: ``Q-CKPT-AMBIGUOUS`` for a folder with several models,
            ``Q-CKPT-MISSING-SHARD`` for an incomplete split set.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix == ".gguf")
        if not files:
            return []
        if len(files) > 1 and len({_set_name(p) for p in files}) > 1:
            raise CheckpointError(
                f"{printable(path)}: holds {len(files)} GGUF files: "
                f"{summarize(p.name for p in files)}, expected one model. "
                "Pass the path of the file itself.",
                code="Q-CKPT-AMBIGUOUS",
                path=path,
                expected=1,
                actual=[p.name for p in files],
            )
        return _parts(files[0])
    return _parts(path) if path.suffix == ".gguf" or _has_magic(path) else []


def _has_magic(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as f:
        return f.read(4) == b"GGUF"


def _set_name(path: Path) -> str:
    part = _PART.match(path.name)
    return f"{part[1]}-of-{part[3]}" if part else path.name


def _parts(path: Path) -> list[Path]:
    """All files of the set that ``path`` belongs to, in order."""
    part = _PART.match(path.name)
    if part is None:
        return [path]
    count = int(part[3])
    names = [f"{part[1]}-{i:05d}-of-{part[3]}.gguf" for i in range(1, count + 1)]
    missing = [n for n in names if not (path.parent / n).is_file()]
    if missing or not names:
        raise _set_error(path, f"files missing: {summarize(missing)}", f"all {count} files", names)
    return [path.parent / n for n in names]


def _set_error(path: Path, found: str, expected: str, parts: Any = None) -> CheckpointError:
    return CheckpointError(
        f"{printable(path)}: split set: {found}, expected {expected}. "
        "Download all files of the set again.",
        code="Q-CKPT-MISSING-SHARD",
        path=path,
        expected=parts or expected,
        actual=found,
    )


def check_split(parts: list[Path], headers: list[Header]) -> None:
    """Every file says it is the part that its name says, and together they hold all tensors."""
    for i, (path, header) in enumerate(zip(parts, headers, strict=True)):
        count, number = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
        if count in (0, 1) and len(parts) == 1:
            continue
        if (count, number) != (len(parts), i):
            raise _set_error(
                path,
                f"split.no {number} of split.count {count}",
                f"part {i} of {len(parts)}, as the file name says",
            )
    total = headers[0].metadata.get("split.tensors.count")
    have = sum(len(h.tensors) for h in headers)
    if total is not None and total != have:
        raise _set_error(parts[0], f"{have} tensors", f"{total} (split.tensors.count)")
