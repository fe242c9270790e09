"""The torch ops of this package, and what stands between them and a launch.

    quant_cuda::linear(x [..., K], tensors, variant) -> [..., N]
    quant_cuda::grouped_linear(x [T, K], experts [T], tensors, variant) -> [T, N]

``variant`` is the text of a ``Variant``, a constant of a graph. A launch is prepared once for each
(variant, rows, device) and kept; a call writes pointers and the stream into it. More than
``MAX_ROWS`` rows are run in slices, so that the result is right where no other kernel is installed.
Nothing waits for the device, so the ops can be captured in CUDA graphs; compile first
(``prepare``) or run once before capturing.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.kernels.calls import check_input, planned, unobserved
from quant_kernels_cuda.ahead import ahead
from quant_kernels_cuda.compiler import compile_cached
from quant_kernels_cuda.cut import Schedule, with_rows
from quant_kernels_cuda.driver import Launch, device_limits, load_function
from quant_kernels_cuda.schedule import BUCKETS, MAX_ROWS, schedule
from quant_kernels_cuda.variant import BIAS_TYPES, Variant, variant_from_text

__all__ = ["buffer_names", "prepare", "run_grouped", "run_linear"]

_POINTERS = struct.Struct("<15Q")  # x codes high s0 s1 z o0 o1 row*3 bias gather experts y
_ARGS = struct.Struct("<15Q13Q33i4I4x")  # Args of csrc/group.cuh
_MAX_GRID_Y = 65535
_lock = threading.Lock()


def buffer_names(v: Variant) -> list[str]:
    """Names of the buffers in the order of ``tiles.allocate``."""
    held = [g.buffer for _, g in v.ring] + [g.buffer for g in v.rows]
    names = ["codes"] + ["codes_high"] * (v.bits == 3)
    names += sorted(n for n in held if n.startswith("scales"))
    names += ["zeros"] * ("zeros" in held)
    names += sorted(n for n in held if n.startswith("offset"))
    return names + ["gather"] * v.gather + ["bias"] * bool(v.bias)


class _Entry:
    """What calls of one variant share."""

    __slots__ = ("k_in", "n", "plans", "slots", "text", "v")

    def __init__(self, text: str) -> None:
        v = variant_from_text(text)
        names = buffer_names(v)
        ring = {name: g.buffer for name, g in v.ring}
        wanted = ["codes", "codes_high", *(ring.get(s) for s in ("S0", "S1", "Z", "O0", "O1"))]
        wanted += [g.buffer for g in v.rows] + [None] * (3 - len(v.rows)) + ["bias", "gather"]
        self.v, self.text, self.n, self.k_in = v, text, v.n, v.k_in
        # for each of the 12 weight pointers of a launch the position of its buffer, if it has one
        self.slots = tuple(names.index(w) if w in names else None for w in wanted)
        self.plans: dict[tuple[int, int], _Plan] = {}  # (rows, device)


_entries: dict[str, _Entry] = {}


def _entry(text: str) -> _Entry:
    found = _entries.get(text)
    if found is None:
        found = _entries[text] = _Entry(text)
    return found


@functools.lru_cache(maxsize=1024)
def _function(kernel: str, defines: tuple[tuple[str, str], ...], device: int) -> int:
    _, shared, _, arch = device_limits(device)
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # the primary context exists
        return load_function(compile_cached(kernel, defines, arch), f"{kernel}_kernel", shared)


def _defines(v: Variant, s: Schedule) -> tuple[tuple[str, str], ...]:
    return (*v.defines, ("NT", str(s.nt)), ("RT", str(s.rt)), ("GPC", str(s.gpc)),
            ("ST", str(s.stages)), ("WARPS", str(s.warps)))  # fmt: skip


def _schedule(v: Variant, rows: int, device: int) -> Schedule:
    sms, shared, clusters, _ = device_limits(device)
    if v.op == "grouped_linear":  # rows share the device
        return schedule(v, 1, max(1, sms // rows), shared, clusters)
    # the cut of the bucket: what runs is then compiled once ``BUCKETS`` have run
    s = schedule(v, next(b for b in BUCKETS if rows <= b), sms, shared, clusters)
    return with_rows(v, s, rows) if rows < s.m else s


def _inverse(divisor: int) -> int:
    """2^32 / divisor, rounded up; 0 stands for 2^32: ``divided`` of csrc/primitives.cuh."""
    return -(-(1 << 32) // divisor) % (1 << 32)


class _Plan:
    """A launch for a number of rows, and how many of them it does."""

    __slots__ = ("launch", "rows")

    def __init__(self, entry: _Entry, rows: int, device: int, tensors: list[Tensor]) -> None:
        v = entry.v
        s = _schedule(v, rows, device)
        grouped = v.op == "grouped_linear"
        steps = [0] * 13
        if grouped:
            for i, at in enumerate(entry.slots):
                if at is not None:
                    t = tensors[at]
                    steps[i] = t.stride(0) * t.element_size()
        coarse = v.coarse // 128
        block = v.block if v.block[0] else (16, 128)
        side = [[g.type for g in v.rows], [int(g.single) for g in v.rows],
                [int(g.inverse) for g in v.rows]]  # fmt: skip
        values = [part + [0] * (3 - len(part)) for part in side]
        args = _ARGS.pack(
            *[0] * 15, *steps,
            s.m, -(-(1 << 20) // s.m), v.n, v.k_in, v.groups,
            s.tiles // s.walkers, s.tiles % s.walkers, s.cluster, s.slice,
            s.span, s.run, s.batch, s.slots,
            -(-v.groups // coarse), coarse.bit_length() - 1,
            block[0] // 16, block[1] // 128, -(-v.k // block[1]), s.span * 256 + 16,
            *values[0], *values[1], *values[2], BIAS_TYPES.get(v.bias, 0), v.experts, s.buffers,
            s.sets, s.walkers, *(_inverse(d) for d in (s.slots, s.sets, s.cluster, s.batch)),
        )  # fmt: skip
        grid = (s.walkers * s.cluster, rows if grouped else 1)
        self.rows = rows if grouped else s.m
        function = _function(s.kernel, _defines(v, s), device)
        self.launch = Launch(function, grid, 32 * s.warps, s.shared, args, s.cluster,
                             dependent=bool(device_limits(device)[2]))  # fmt: skip


def prepare(text: str, device: int, rows: tuple[int, ...] = BUCKETS) -> None:
    """Compile (or read from the cache) what calls with ``rows`` rows will run."""
    v = variant_from_text(text)
    for m in rows:
        s = _schedule(v, m, device)
        _function(s.kernel, _defines(v, s), device)


def _run_rows(x: Tensor, y: Tensor, tensors: list[Tensor], entry: _Entry, experts: int) -> None:
    """Launch for all rows of x; ``experts`` is the address of their experts, or 0."""
    device = x.device.index
    rows, done = x.numel() // entry.k_in, 0
    weights = [0 if at is None else tensors[at].data_ptr() for at in entry.slots]
    at_x, at_y = x.data_ptr(), y.data_ptr()
    stream = torch._C._cuda_getCurrentRawStream(device)
    most = _MAX_GRID_Y if experts else MAX_ROWS
    while done < rows:
        key = (min(rows - done, most), device)
        plan = entry.plans.get(key)
        if plan is None:
            plan = entry.plans[key] = _Plan(entry, key[0], device, tensors)
        launch = plan.launch
        with _lock:
            _POINTERS.pack_into(
                launch.args, 0, at_x + done * entry.k_in * 2, *weights,
                experts + done * 8 if experts else 0, at_y + done * entry.n * 2,
            )  # fmt: skip
            launch(stream)
        done += plan.rows


def _plan(entry: _Entry, rows: int) -> None:
    """Jobs that compile what ``rows`` rows of x will run on the current device."""
    assert planned.jobs is not None
    device = torch.cuda.current_device()
    arch = device_limits(device)[3]
    if int(arch) != planned.capability:
        return
    grouped = entry.v.op == "grouped_linear"
    most = _MAX_GRID_Y if grouped else MAX_ROWS
    for m in sorted({min(rows, most), rows % most} - {0}):
        s = _schedule(entry.v, m, device)
        planned.jobs.append(functools.partial(ahead, s.kernel, _defines(entry.v, s), arch))


def _call(x: Tensor, tensors: list[Tensor], text: str, experts: Tensor | None) -> Tensor:
    entry = _entry(text)
    if planned.jobs is not None:
        _plan(entry, x.numel() // entry.k_in)
        return x.new_empty((*x.shape[:-1], entry.n))
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], entry.n))
    if y.numel() == 0:
        return y
    if x.data_ptr() % 16:
        x = x.clone()
    at = 0 if experts is None else experts.data_ptr()
    if x.device.index == torch._C._cuda_getDevice():
        _run_rows(x, y, tensors, entry, at)
    else:
        with torch.cuda.device(x.device):
            _run_rows(x, y, tensors, entry, at)
    return y


def _linear(x: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    return _call(x, tensors, text, None)


def _grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    index = experts.to(torch.int64).contiguous()
    return _call(x, tensors, text, index)


def _fake_linear(x: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], variant_from_text(text).n))


def _fake_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    return x.new_empty((x.shape[0], variant_from_text(text).n))


_OPS: tuple[tuple[str, str, Callable[..., Tensor], Callable[..., Tensor]], ...] = (
    ("linear", "(Tensor x, Tensor[] tensors, str variant) -> Tensor", _linear, _fake_linear),
    ("grouped_linear", "(Tensor x, Tensor experts, Tensor[] tensors, str variant) -> Tensor",
     _grouped, _fake_grouped),
)  # fmt: skip
_lib = torch.library.Library("quant_cuda", "DEF")
for _name, _schema, _impl, _fake in _OPS:
    _lib.define(_name + _schema)
    _lib.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"quant_cuda::{_name}", _fake, lib=_lib)
_linear_op = torch.ops.quant_cuda.linear.default
_grouped_op = torch.ops.quant_cuda.grouped_linear.default


def _checked(x: Tensor, k: int, act: torch.dtype) -> Tensor:
    check_input(x, k)
    return x if x.dtype == act else x.to(act)


def run_linear(text: str, k: int, act: torch.dtype, tensors: list[Tensor], x: Tensor) -> Tensor:
    """The bound function of ``linear``; x of another float type is converted, and y back."""
    held = _checked(x, k, act)
    y = _linear(held, tensors, text) if unobserved(held) else _linear_op(held, tensors, text)
    return y if x.dtype == act else y.to(x.dtype)


def run_grouped(
    text: str, k: int, act: torch.dtype, tensors: list[Tensor], x: Tensor, experts: Tensor
) -> Tensor:
    """The bound function of ``grouped_linear``."""
    if planned.jobs is not None:
        return _grouped(x, experts, tensors, text)
    y = _grouped_op(_checked(x, k, act), experts, tensors, text)
    return y if x.dtype == act else y.to(x.dtype)
