"""Jitted functions and tensor maps by name: Triton is imported only where something is compiled.

A process that finds its kernels in the cache never imports it, which is most of what its first call
would take. What a key needs of a function (names of arguments, which are not specialized) is read
from its source.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Descriptor", "Jits", "Jitted", "layout_of"]


@functools.cache
def _module(name: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text("utf-8"))
    return {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}


class Jitted:
    """The jitted function ``name`` of the module ``module`` of this package."""

    __slots__ = ("loose", "module", "name", "names")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __getattr__(self, attribute: str) -> Any:
        """``names`` of all arguments, and ``loose``: which are not specialized; read once."""
        if attribute not in ("names", "loose"):
            raise AttributeError(attribute)
        found = _module(self.module)[self.name]
        self.names = tuple(a.arg for a in found.args.args)
        given = [k.value for d in found.decorator_list if isinstance(d, ast.Call)
                 for k in d.keywords if k.arg == "do_not_specialize"]  # fmt: skip
        self.loose = frozenset(ast.literal_eval(given[0])) if given else frozenset[str]()
        return getattr(self, attribute)

    def function(self) -> Any:
        """The function itself."""
        return getattr(import_module(f"quant_kernels_triton.{self.module}"), self.name)


class Jits:
    """The jitted functions of a module as attributes of their names."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Jitted:
        found = Jitted(self._module, name)
        setattr(self, name, found)
        return found


class Descriptor:
    """A matrix that a kernel takes in boxes through a tensor map.

    Args:
        base: what lies there, contiguous, at a multiple of 16 bytes.
        box: rows and columns.
        shape: of the matrix, if ``base`` has another.
        dtype: of what the kernel sees, if ``base`` has another.
        plain: whether boxes lie in shared memory in order; else swizzled, as wgmma reads them.
    """

    __slots__ = ("base", "box", "dtype", "plain", "shape", "strides")

    def __init__(
        self, base: Tensor, box: Sequence[int], *, shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None, plain: bool = False,
    ) -> None:  # fmt: skip
        self.base, self.box, self.plain = base, tuple(box), plain
        self.shape = list(base.shape if shape is None else shape)
        self.strides = [self.shape[1], 1]
        self.dtype = base.dtype if dtype is None else dtype

    def triton(self) -> Any:
        """The same for Triton's own launcher."""
        from triton._utils import canonicalize_dtype
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = layout_of(canonicalize_dtype(self.dtype), self.box, self.plain)
        base = self.base.view(self.dtype)
        return TensorDescriptor(base, self.shape, self.strides, list(self.box), layout)


_TYPES = {"bf16": "bfloat16", "fp16": "float16", "i8": "int8", "i32": "int32",
          "fp8e4nv": "float8e4nv"}  # fmt: skip


def layout_of(kind: str, box: Sequence[int], plain: bool) -> Any:
    """How a box of elements of Triton's type ``kind`` lies in shared memory."""
    from triton.experimental.gluon import language as gl

    dtype = getattr(gl, _TYPES[kind])
    if plain:
        bits = dtype.primitive_bitwidth
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=len(box))
    return gl.NVMMASharedLayout.get_default_for(list(box), dtype)
