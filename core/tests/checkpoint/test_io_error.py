"""What the operating system refuses is said with what helps against it."""

from __future__ import annotations

import errno

import pytest

from quant_core.checkpoint.files import io_error


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EACCES, "expected the permission"),
        (errno.EROFS, "expected a file system that can be written"),
        (errno.ENOENT, "Check the path"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOTDIR, "Check that the path exists"),
        (None, "Check that the path exists"),
    ],
)
def test_reason_and_remedy_are_in_the_message(number, remedy):
    err = OSError("it broke") if number is None else OSError(number, f"reason {number}")
    told = io_error("a/b", err, "cannot be written")
    assert told.code == "Q-CKPT-IO"
    assert str(told).startswith("a/b: cannot be written: ")
    assert ("it broke" if number is None else f"reason {number}") in str(told)
    assert remedy in str(told)
