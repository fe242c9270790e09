"""The CUDA driver through ctypes: loads compiled code into torch's context and launches it.

A launch is one foreign call on memory prepared beforehand: only pointers and the stream are
written. Structures mirror cuda.h (CUlaunchConfig, CUlaunchAttribute).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from quant_core.errors import KernelError

__all__ = ["Launch", "device_limits", "load_function", "unavailable"]

_ATTR_CLUSTER, _ATTR_DEPENDENT = 4, 6  # CU_LAUNCH_ATTRIBUTE_*
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


@functools.cache
def _driver() -> ctypes.CDLL | str:
    try:
        # PyDLL keeps the interpreter lock: a launch takes two microseconds, giving the lock away
        # and taking it back takes longer, and the argument block stays this thread's
        return ctypes.PyDLL("libcuda.so.1")
    except OSError as err:
        return str(err)


def unavailable() -> str:
    """Why nothing can be launched here; "" if it can."""
    found = _driver()
    return found if isinstance(found, str) else ""


def _check(result: int, what: str) -> None:
    if result:
        cu, text = _driver(), ctypes.c_char_p()
        assert not isinstance(cu, str)
        cu.cuGetErrorString(result, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise KernelError(
            f"{what} gave CUDA error {result} ({reason}), expected success. An earlier kernel may "
            "have failed; run with CUDA_LAUNCH_BLOCKING=1 to find it.",
            code="Q-KERNEL-LAUNCH",
            actual=reason,
        )


@functools.cache
def device_limits(index: int) -> tuple[int, int, tuple[int, ...], str]:
    """(multiprocessors, bytes of shared memory per block, clusters, arch).

    ``clusters``: how many clusters of 2, 3, ... 8 blocks that fill a multiprocessor run at once;
    empty where the device has none.
    """
    import torch

    p = torch.cuda.get_device_properties(index)
    arch = f"{p.major}{p.minor}"
    shared = getattr(p, "shared_memory_per_block_optin", 0)
    if not shared:  # older torch: the tables of the CUDA programming guide
        shared = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227}.get((p.major, p.minor), 99)
        shared *= 1024
    clusters: tuple[int, ...] = ()
    if p.major >= 9:
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # the primary context exists
            clusters = _clusters(shared)
    return p.multi_processor_count, shared, clusters, arch


_EMPTY = b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry empty() { ret; }\0"


def _clusters(shared: int) -> tuple[int, ...]:
    """Multiprocessors of a cluster lie together, so that not all can be used by larger ones."""
    cu, function = _driver(), load_function(_EMPTY, "empty", shared)
    assert not isinstance(cu, str)
    out = []
    for size in range(2, 9):
        found, attribute = ctypes.c_int(), _Attribute(id=_ATTR_CLUSTER)
        attribute.value[0:3] = (size, 1, 1)
        config = _Config(gx=size, gy=1, gz=1, bx=512, by=1, bz=1, shared=shared,
                         attributes=ctypes.addressof(attribute), count=1)  # fmt: skip
        _check(
            cu.cuOccupancyMaxActiveClusters(
                ctypes.byref(found), ctypes.c_void_p(function), ctypes.byref(config)
            ),
            "counting clusters",
        )
        out.append(found.value)
    return tuple(out)


def load_function(cubin: bytes, name: str, shared: int) -> int:
    """Handle of a kernel in the current context, allowed to use ``shared`` bytes per block.

    Raises:
        KernelError: ``Q-KERNEL-LAUNCH``.
    """
    cu = _driver()
    if isinstance(cu, str):
        raise KernelError(
            f"the CUDA driver was not found: {cu}. Install it.", code="Q-KERNEL-LAUNCH"
        )
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(cu.cuModuleLoadData(ctypes.byref(module), cubin), "loading a kernel")
    found = cu.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
    _check(found, f"looking for {name}")
    _check(cu.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared), "setting shared memory")
    assert function.value is not None
    return function.value


class Launch:
    """A prepared launch: geometry and all arguments but what ``__call__`` writes.

    Args:
        args: the kernel's one argument; its first bytes are 64-bit pointers.
        dependent: launch while the kernel before still runs (it waits where it must).
    """

    def __init__(
        self, function: int, grid: tuple[int, int], threads: int, shared: int, args: bytes,
        cluster: int, dependent: bool,
    ) -> None:  # fmt: skip
        cu = _driver()
        assert not isinstance(cu, str)
        self.args = ctypes.create_string_buffer(args, len(args))
        attributes = (_Attribute * 2)()
        count = 0
        if cluster > 1:
            attributes[count].id = _ATTR_CLUSTER
            attributes[count].value[0:3] = (cluster, 1, 1)
            count += 1
        if dependent:
            attributes[count].id, attributes[count].value[0] = _ATTR_DEPENDENT, 1
            count += 1
        self._config = _Config(
            gx=grid[0], gy=grid[1], gz=1, bx=threads, by=1, bz=1, shared=shared,
            attributes=ctypes.addressof(attributes), count=count,
        )  # fmt: skip
        params = (ctypes.c_void_p * 1)(ctypes.addressof(self.args))
        self._kept: tuple[Any, ...] = (attributes, params)
        launch = ctypes.PYFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
        )(("cuLaunchKernelEx", cu))
        self._call = functools.partial(
            launch, ctypes.addressof(self._config), function, ctypes.addressof(params), None
        )

    def __call__(self, stream: int) -> None:
        self._config.stream = stream
        if result := self._call():
            _check(result, "launching a kernel")
