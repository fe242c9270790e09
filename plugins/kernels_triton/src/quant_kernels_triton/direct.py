"""Launching a compiled kernel by one call of the CUDA driver.

    slots    8 bytes for every run-time argument, in the order of the kernel's parameters
    params   the addresses of the slots; of a tensor map, of its 128 bytes instead

A call writes the slots in one go, and keeps the tensor maps by address and sizes, which Triton's
launcher makes on every call: 3 of 34 us of the host's time, measured with one H100's machine.
What the kernel takes (``Code``) is compared with what the driver says of the machine code; where
they disagree, or the driver is too old to say, ``prepare`` answers None and Triton's own launcher
runs.

Source: Triton 3.6.0 and 3.8.0 backends/nvidia/driver.py and driver.c (order of parameters: the
signature without constants, a descriptor as map, sizes in 32 and strides in 64 bits, two scratch
pointers last); cuda.h (CUlaunchConfig, cuTensorMapEncodeTiled).
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

from quant_core.errors import KernelError
from quant_kernels_triton.machine_code import Code

__all__ = ["Direct", "available", "here", "prepare"]

_CONFIG = struct.Struct(
    "@7IQQI4x"
)  # CUlaunchConfig: grid, block, shared, stream, attributes, count
_DEPENDENT = struct.Struct("@iii60x")  # CUlaunchAttribute: programmatic stream serialization
_SLOTS = {"i1": "b7x", "i8": "b7x", "i16": "h6x", "i32": "i4x", "i64": "q", "fp32": "f4x",
          "u1": "B7x", "u8": "B7x", "u16": "H6x", "u32": "I4x", "u64": "Q"}  # fmt: skip
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4,
          "u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8}  # fmt: skip
_MAP_BYTES = 128
_MAP_TYPES = {
    "bf16": 9,
    "fp16": 6,
    "fp32": 7,
    "u8": 0,
    "i8": 0,
    "i32": 3,
    "fp8e4nv": 0,
}  # CUtensorMapDataType
_MAP_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "i32": 4, "u8": 1, "i8": 1, "fp8e4nv": 1}
_PROMOTION = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton encodes
_KEPT = 256  # tensor maps of one kernel: as many addresses and sizes of x
_PLAIN_SHARED = 48 << 10  # bytes that a block may have without being allowed more
_PREFER_SHARED = 1  # CU_FUNC_CACHE_PREFER_SHARED
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@functools.cache
def _driver() -> Any:
    """libcuda, or None. The interpreter lock is kept: a launch takes two microseconds."""
    try:
        cu = ctypes.PyDLL("libcuda.so.1")
        for name in ("cuLaunchKernelEx", "cuTensorMapEncodeTiled", "cuFuncGetParamInfo"):
            getattr(cu, name)
    except (OSError, AttributeError):
        return None
    return cu


def available() -> bool:
    """Whether there is a driver that can say what a kernel's parameters are (12.4 or newer)."""
    return _driver() is not None


def _check(cu: Any, result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        cu.cuGetErrorString(result, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise KernelError(
            f"{what} gave CUDA error {result} ({reason}), expected success. An earlier kernel may "
            "have failed; run with CUDA_LAUNCH_BLOCKING=1 to find it.",
            code="Q-KERNEL-LAUNCH",
            actual=reason,
        )


class _Maps:
    """The tensor maps of one descriptor argument, by address and sizes."""

    def __init__(self, cu: Any, kind: str, box: Sequence[int], swizzle: int) -> None:
        self.cu, self.kind, self.swizzle = cu, kind, swizzle
        rank = len(box)
        self.box = (ctypes.c_uint32 * rank)(*reversed(box))
        self.steps = (ctypes.c_uint32 * rank)(*([1] * rank))
        self.held: dict[tuple[int, ...], tuple[Any, int]] = {}

    def at(self, address: int, shape: Sequence[int], strides: Sequence[int]) -> int:
        """Where the map of a tensor lies."""
        key = (address, *shape, *strides)
        found = self.held.get(key)
        if found is None:
            if len(self.held) >= _KEPT:
                self.held.clear()
            found = self.held[key] = self._made(address, shape, strides)
        return found[1]

    def _made(self, address: int, shape: Sequence[int], strides: Sequence[int]) -> tuple[Any, int]:
        rank, size = len(shape), _MAP_SIZES[self.kind]
        memory = ctypes.create_string_buffer(_MAP_BYTES + 63)
        at = (ctypes.addressof(memory) + 63) & -64
        sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
        pitches = (ctypes.c_uint64 * rank)(*(s * size for s in reversed(strides[:-1])), 0)
        result = self.cu.cuTensorMapEncodeTiled(
            ctypes.c_void_p(at), _MAP_TYPES[self.kind], rank, ctypes.c_void_p(address), sizes,
            pitches, self.box, self.steps, 0, self.swizzle, _PROMOTION, 0,
        )  # fmt: skip
        _check(self.cu, result, "describing a tensor")
        return memory, at


class _Here(threading.local):
    """Of this thread: what watches its launches, see ``replay``."""

    watch: Any = None


here = _Here()


class Direct:
    """A compiled kernel with its argument block.

    Args:
        kinds: Triton's type of every run-time argument, None for a constant.
        maps: for each descriptor among them, how it is made.
        start: cuLaunchKernelEx with (config, function, params, None).
    """

    def __init__(
        self, kinds: Sequence[str | None], maps: Sequence[_Maps], function: int, threads: int,
        shared: int, dependent: bool, start: Callable[..., int], check: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.kinds = tuple(kinds)
        runtime = [kind for kind in kinds if kind is not None]
        self._plain = tuple(i for i, kind in enumerate(kinds) if kind is not None)
        self._skip = len(runtime) != len(kinds)
        self._maps: list[tuple[int, int, _Maps]] = []  # argument, parameter, how it is made
        text, left, slot, params = "@", list(maps), 0, []
        for i, kind in enumerate(runtime):
            if kind.startswith("tensordesc"):
                rank = len(left[0].box)
                self._maps.append((i, len(params), left.pop(0)))
                text += "i4x" * rank + "q" * rank
                params += [-1, *range(slot, slot + 2 * rank)]
                slot += 2 * rank
                continue
            text += "Q" if kind.startswith("*") else _SLOTS[kind]
            params.append(slot)
            slot += 1
        params += [slot, slot + 1]  # scratch memory: none
        self._format = struct.Struct(text + "QQ")
        self._slots = ctypes.create_string_buffer(self._format.size)
        first = ctypes.addressof(self._slots)
        self._params = (ctypes.c_void_p * len(params))(
            *(None if s < 0 else first + 8 * s for s in params)
        )
        self._attribute = ctypes.create_string_buffer(_DEPENDENT.pack(6, 0, 1), _DEPENDENT.size)
        self._attributes = ctypes.addressof(self._attribute), int(dependent)
        self._config = ctypes.create_string_buffer(_CONFIG.size)
        self._fixed = threads, 1, 1, shared
        self._start = functools.partial(
            start, ctypes.addressof(self._config), function, ctypes.addressof(self._params), None
        )
        self._check, self._lock = check, threading.Lock()

    def __call__(self, grid: tuple[int, int], stream: int, args: Sequence[Any]) -> None:
        """Launch. ``args``: addresses and numbers, descriptors with base, shape and strides."""
        if here.watch is not None:
            here.watch.started += 1
        with self._lock:
            if self._skip:
                args = [args[i] for i in self._plain]
            if self._maps:
                args = self._described(args)
            self._format.pack_into(self._slots, 0, *args, 0, 0)
            _CONFIG.pack_into(
                self._config, 0, grid[0], grid[1], 1, *self._fixed, stream, *self._attributes
            )
            result = self._start()
        if result:
            self._check(result)

    def flat(
        self, grid: tuple[int, int], stream: int, values: Sequence[Any],
        maps: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]], bases: Sequence[int],
    ) -> None:  # fmt: skip
        """Launch with sizes and strides of descriptors given in place of them.

        Args:
            values: addresses and numbers in the order of the kernel's parameters but the maps.
            maps: of each descriptor its base's place in ``bases``, its shape and strides.
        """
        with self._lock:
            for (_, param, held), (base, shape, strides) in zip(self._maps, maps, strict=True):
                self._params[param] = held.at(bases[base], shape, strides)
            self._format.pack_into(self._slots, 0, *values, 0, 0)
            _CONFIG.pack_into(
                self._config, 0, grid[0], grid[1], 1, *self._fixed, stream, *self._attributes
            )
            result = self._start()
        if result:
            self._check(result)

    def _described(self, args: Sequence[Any]) -> list[Any]:
        out = list(args)
        for i, param, maps in reversed(self._maps):
            d = args[i]
            self._params[param] = maps.at(d.base.data_ptr(), d.shape, d.strides)
            out[i : i + 1] = (*d.shape, *d.strides)
        return out


def _parameter_sizes(cu: Any, function: int) -> list[int]:
    sizes: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while len(sizes) < 256 and not cu.cuFuncGetParamInfo(
        ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), ctypes.byref(offset),
        ctypes.byref(size),
    ):  # fmt: skip
        sizes.append(size.value)
    return sizes


def _expected_sizes(code: Code) -> list[int]:
    sizes, left = [], list(code.maps)
    for kind in code.kinds:
        if kind is None:
            continue
        if kind.startswith("tensordesc"):
            rank = len(left.pop(0).box)
            sizes += [_MAP_BYTES, *([4] * rank), *([8] * rank)]
        else:
            sizes.append(8 if kind.startswith("*") else _BYTES[kind])
    return [*sizes, 8, 8]


def _known(code: Code) -> bool:
    """Whether all types of its arguments are."""
    plain = all(
        kind is None or kind in _SLOTS or kind.startswith(("*", "tensordesc"))
        for kind in code.kinds
    )
    return plain and all(m.kind in _MAP_TYPES for m in code.maps)


def _bind_context(cu: Any, device: int) -> None:
    """Make torch's context the one of this thread, where it has none."""
    held = ctypes.c_void_p()
    _check(cu, cu.cuCtxGetCurrent(ctypes.byref(held)), "looking for the CUDA context")
    if not held.value:
        found = cu.cuDevicePrimaryCtxRetain(ctypes.byref(held), ctypes.c_int(device))
        _check(cu, found, "taking the CUDA context")
        _check(cu, cu.cuCtxSetCurrent(held), "taking the CUDA context")


def _load(cu: Any, code: Code) -> int:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(cu, cu.cuModuleLoadData(ctypes.byref(module), code.cubin), "loading a kernel")
    found = cu.cuModuleGetFunction(ctypes.byref(function), module, code.name.encode())
    _check(cu, found, f"looking for {code.name}")
    if code.shared > _PLAIN_SHARED:
        set_ = cu.cuFuncSetCacheConfig(function, _PREFER_SHARED)
        _check(cu, set_, "preferring shared memory")
        set_ = cu.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, code.shared)
        _check(cu, set_, f"giving {code.shared} bytes of shared memory to {code.name}")
    assert function.value is not None
    return function.value


def prepare(code: Code, device: int) -> Direct | None:
    """``code`` on a device for direct launches; None where Triton's own launcher has to do it.

    Raises:
        KernelError: ``Q-KERNEL-LAUNCH``.
    """
    cu = _driver()
    if cu is None or not _known(code):
        return None
    _bind_context(cu, device)
    function = _load(cu, code)
    if _parameter_sizes(cu, function) != _expected_sizes(code):
        return None
    start = ctypes.PYFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
    )(("cuLaunchKernelEx", cu))
    maps = [_Maps(cu, m.kind, m.box, m.swizzle) for m in code.maps]
    return Direct(
        code.kinds, maps, function, code.threads, code.shared, code.dependent, start,
        functools.partial(_check, cu, what="launching a kernel"),
    )  # fmt: skip
