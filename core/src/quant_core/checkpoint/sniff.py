"""The first bytes of a file: its safetensors header, or what the file is instead.

A file is told apart before its header length is believed: pickles and Git LFS pointers are named,
anything else is quoted. Nothing larger than the declared limits is ever read.
"""

from __future__ import annotations

import re
from pathlib import Path

from quant_core.checkpoint.discover import pickle_error
from quant_core.checkpoint.files import OpenFile
from quant_core.checkpoint.header import Header, parse_header
from quant_core.errors import CheckpointError, LimitError, printable

__all__ = ["changed_error", "read_header"]

_HEAD_BYTES = 512  # a Git LFS pointer has about 130
_SHOWN = 60  # first characters quoted in a message

_PICKLE = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|PK\x05\x06")  # torch.save writes both
_LFS = re.compile(rb"version https://git-lfs")
_LFS_SIZE = re.compile(rb"^size (\d{1,20})\s*$", re.MULTILINE)


def read_header(file: OpenFile, name: str, max_header_bytes: int, max_tensors: int) -> Header:
    """The validated header of an open file.

    Args:
        name: what messages and ``TensorInfo.file`` call the file.

    Raises:
        CheckpointError: ``Q-CKPT-TRUNCATED``, ``-HEADER``, ``-PICKLE``, ``-LFS``, ``-CHANGED``, or
            as ``parse_header``.
        LimitError: ``Q-LIMIT-HEADER``.
    """
    size = file.state.size
    head = file.read(min(size, _HEAD_BYTES), 0)
    length = int.from_bytes(head[:8], "little")
    body = size - 8

    def truncated(found: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{printable(name)}: {found}, expected {expected}. The file is cut short; download it "
            "again.",
            code="Q-CKPT-TRUNCATED",
            path=file.path,
            expected=expected,
            actual=size,
        )

    if body < 0:
        raise truncated(f"file has {size} bytes", "at least 8 and a header")
    if body and head[8:9] != b"{" and length:
        raise _wrong_content(file.path, name, head, "header does not start with '{'")
    if length == 0 or (length > max_header_bytes and length > body):
        raise _wrong_content(file.path, name, head, f"header has length {length}")
    if length > max_header_bytes:
        raise LimitError(
            f"{printable(name)}: header has {length} bytes, expected at most {max_header_bytes}. "
            "Raise the limit max_header_bytes if the file is trusted.",
            code="Q-LIMIT-HEADER",
            path=file.path,
            expected=max_header_bytes,
            actual=length,
        )
    if length > body:
        raise truncated(f"header has {length} bytes, the file {size}", f"at least {length + 8}")
    raw = file.read(length, 8)
    if len(raw) != length:
        raise changed_error(file.path, name, f"{size} bytes", 8 + len(raw))
    return parse_header(
        raw, file=name, data_bytes=body - length, max_tensors=max_tensors, path=file.path
    )


def changed_error(
    path: Path, name: str, expected: str, size: int, tensor: str | None = None
) -> CheckpointError:
    """``Q-CKPT-CHANGED``: the file is not what it was when it was opened."""
    where = f"tensor {printable(tensor)!r} was read" if tensor else "its header was read"
    return CheckpointError(
        f"{printable(name)}: changed on disk when {where}: now {size} bytes or newer contents, "
        f"expected the file as it was opened, {expected}. Wait until it is complete and open it "
        "again.",
        code="Q-CKPT-CHANGED",
        path=path,
        tensor=tensor,
        expected=expected,
        actual=size,
    )


def _wrong_content(path: Path, name: str, head: bytes, found: str) -> CheckpointError:
    """The error for a file whose first bytes ``head`` are not a safetensors header.

    Args:
        found: what is wrong with it as a header, when it is nothing we know.

    Returns:
        ``Q-CKPT-PICKLE``, ``Q-CKPT-LFS``, or ``Q-CKPT-HEADER`` that quotes the first bytes.
    """
    if _PICKLE.match(head):
        return pickle_error(path, [name])
    if _LFS.match(head):
        size = _LFS_SIZE.search(head)
        expected = f"{int(size.group(1))} bytes of weights" if size else "the weights themselves"
        return CheckpointError(
            f"{printable(name)}: is a Git LFS pointer, expected {expected}. "
            "Run `git lfs pull` in the folder, or download the file.",
            code="Q-CKPT-LFS",
            path=path,
            expected=int(size.group(1)) if size else None,
            actual="Git LFS pointer",
        )
    shown = ascii(head[:_SHOWN].decode("latin-1"))
    kind = ""
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        kind = " (a web page)"
    elif re.match(rb"\s*[{\[]", head):
        kind = " (a JSON text)"
    return CheckpointError(
        f"{printable(name)}: {found}; the file begins with {shown}{kind}, expected a safetensors "
        "header. The download may have failed with an error page; download the file again.",
        code="Q-CKPT-HEADER",
        path=path,
        expected="a safetensors header",
        actual=found,
    )
