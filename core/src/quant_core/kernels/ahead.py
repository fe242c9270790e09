"""Begin to compile what a layer's calls will run, while something else is done: loading weights.

A bound function is run on tensors without memory for each number of rows; where it would launch,
the kernel's package names what that needs (``kernels.calls.Planned``), and compiles it beside this
process or thread. Nothing that a call does depends on it: what is not there when it is needed is
compiled then. Packages without such jobs, and calls that cannot be followed without values, are
left alone.

A first call of several kernels is planned likewise while a package's compilers stand idle
(``standby``): they begin with all of them at once, not with one when the one before is launched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from quant_core.kernels.base import Kernel
from quant_core.kernels.calls import planned, unobserved
from quant_core.spec import OpSpec

__all__ = ["LIKELY", "Standby", "begin", "compile_ahead", "jobs_of", "standby"]

log = logging.getLogger("quant_core")

LIKELY = (1, 512)
"""Numbers of rows that are compiled for while a model is loaded: a step, and a prompt."""


def jobs_of(kernel: Kernel, op: OpSpec, rows: Sequence[int]) -> list[Callable[[], None]]:
    """What begins to compile calls of ``op`` with these numbers of rows; empty where no package
    says so."""
    major, _, minor = op.device[1].partition(".")
    if op.device[0] != "cuda" or not major.isdigit() or op.op not in ("linear", "grouped_linear"):
        return []
    run = kernel.bind(op)
    values = list(kernel.allocate(op, "meta").values())
    dtype: torch.dtype = getattr(torch, op.act_dtype)
    found: list[Callable[[], None]] = []
    for m in rows:
        x = torch.empty(m, op.size("k"), dtype=dtype, device="meta")
        rest = [torch.empty(m, dtype=torch.int64, device="meta")] if op.op != "linear" else []
        planned.jobs, planned.capability = [], 10 * int(major) + int(minor or 0)
        try:
            with torch.no_grad():
                run(values, x, *rest)
        except Exception as err:  # nothing depends on it: the call itself will say what is wrong
            log.debug("%s with %d rows is not compiled ahead: %r", kernel.name, m, err)
        finally:
            found += planned.jobs
            planned.jobs = None
    return found


def compile_ahead(kernel: Kernel, op: OpSpec, rows: Sequence[int] = LIKELY) -> None:
    """Begin to compile what calls of ``op`` with these numbers of rows will run; QUANT_AHEAD=off
    leaves it."""
    if os.environ.get("QUANT_AHEAD") != "off":
        for job in jobs_of(kernel, op, rows):
            job()


class Standby:
    """Whether a package has compilers with nothing to do, in a process that is likely to need them.

    Attributes:
        idle: set by that package; it costs each first call a planning while it is.
        begun: calls that were planned.
    """

    def __init__(self) -> None:
        self.idle = False
        self.begun: set[Hashable] = set()


standby = Standby()


def begin(key: Hashable, run: Callable[..., Tensor], values: Sequence[Tensor], x: Tensor) -> None:
    """Begin to compile what ``run(values, x)`` will launch; once for ``key`` and the shape of x.

    Args:
        values: a layer's buffers; only what they are matters.
    """
    key = key, x.shape, x.dtype
    if planned.jobs is not None or not unobserved(x) or key in standby.begun:
        return
    standby.begun.add(key)
    major, minor = torch.cuda.get_device_capability(x.device)
    found: list[Callable[[], None]] = []
    planned.jobs, planned.capability = found, 10 * major + minor
    try:
        with torch.no_grad():
            run([v.to("meta") for v in values], x.to("meta"))
    except Exception as err:  # nothing depends on it: the call itself will say what is wrong
        log.debug("a first call is not planned: %r", err)
    finally:
        planned.jobs = None
    for job in found:
        job()
