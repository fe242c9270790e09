"""Hadamard matrices as what they are made of, and the product with one as an operation.

    M = diag(rows) (C x S) diag(cols)      S = Sylvester's matrix of 2^p: S[i, j] = (-1)^|i & j|
                                           C [m, m], rows and cols: entries 1 and -1

``factors`` finds this form in a stored matrix, or that there is none; ``matrix`` gives the stored
one back, bit for bit. Matrices of the orders 2^p, 12 * 2^p, 20 * 2^p ... that tools write have it,
with random signs or without: once the first row and column are made 1, C x S can be read off. x M
then takes n (m + p) additions instead of n^2, and the layer holds m^2 + 2n bytes.

    op "hadamard"    size k; n = m * 2^p divides k; features "root"
    bind(op)         run([], x [..., K], rows, core, cols, root | None) -> y

Every n features of x, times M, over ``root`` [1]: float32 sums, rounded once to the dtype of x.
``torch_hadamard``, the reference, is always there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.quantizer import Weightless
from quant_core.spec import OpSpec

__all__ = ["MOST_CORE", "Factors", "TorchHadamard", "factors", "hadamard_op", "matrix"]

MOST_CORE = 64  # order of C; beyond, a product with the matrix itself is meant
_LEAST = 16  # order of S
_SMALL = 128  # order up to which torch multiplies by the matrix itself fastest


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """int8: rows [n], core [m, m], cols [n], n = m * 2^p."""

    rows: Tensor
    core: Tensor
    cols: Tensor


@functools.cache
def _sylvester(size: int, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h.to(device)


def factors(signs: Tensor) -> Factors | None:
    """The factors of a matrix [n, n] of 1 and -1 in int8, with the smallest C; None without."""
    n = signs.shape[-1]
    size = n & -n  # the largest power of two in n; a C of order 12 takes 4 of it
    if signs.dim() != 2 or signs.shape[0] != n or signs.dtype != torch.int8:
        return None
    if size < _LEAST or n // size > MOST_CORE or not bool((signs.abs() == 1).all()):
        return None
    rows, cols = signs[:, 0].clone(), signs[0] * signs[0, 0]
    while size >= _LEAST and n // size <= MOST_CORE:
        core = ((signs[::size, ::size] * rows[::size, None]) * cols[::size]).contiguous()
        found = Factors(rows=rows, core=core, cols=cols.contiguous())
        if torch.equal(matrix(found), signs):
            return found
        size //= 2
    return None


def matrix(f: Factors) -> Tensor:
    """int8 [n, n] of the factors: inverse of ``factors``."""
    n, m = f.rows.numel(), f.core.shape[0]
    s = _sylvester(n // m, f.rows.device).to(torch.int8)
    return (torch.kron(f.core, s) * f.rows[:, None]) * f.cols


def hadamard_op(op: OpSpec, site: str, n: int, m: int, root: bool) -> OpSpec:
    """What is asked for a Hadamard transform at ``site`` of ``op``."""
    return OpSpec(
        op="hadamard",
        operands=(),
        sizes=(("k", op.size("n" if site == "output" else "k")), ("n", n), ("m", m)),
        act_dtype=op.act_dtype,
        device=op.device,
        features=frozenset({"root"} if root else ()),
    )


# ---------------------------------------------------------------------------------- the reference

_lib = torch.library.Library("quant_core", "FRAGMENT")
_lib.define("hadamard(Tensor x, Tensor rows, Tensor core, Tensor cols, Tensor? root) -> Tensor")


def _hadamard(x: Tensor, rows: Tensor, core: Tensor, cols: Tensor, root: Tensor | None) -> Tensor:
    n, m = rows.numel(), core.shape[0]
    work = x if x.dtype == torch.float64 else x.float()
    if m == 1 and n <= _SMALL:
        whole = _sylvester(n, x.device).to(work.dtype) * rows[:, None] * cols
        y = work.reshape(-1, n) @ whole
        return (y if root is None else y / root.to(work.dtype)).view(x.shape).to(x.dtype)
    right = 1 << ((n // m).bit_length() // 2)
    left = n // m // right
    grid = (work.reshape(-1, n) * rows).view(-1, m * left, right)
    grid = grid @ _sylvester(right, x.device).to(work.dtype)
    grid = _sylvester(left, x.device).to(work.dtype) @ grid.view(-1, left, right)
    if m > 1:
        grid = core.to(work.dtype).T @ grid.view(-1, m, left * right)
    y = grid.reshape(-1, n)
    y = y * cols if root is None else y / (cols * root.to(work.dtype))
    return y.view(x.shape).to(x.dtype)


def _fake(x: Tensor, rows: Tensor, core: Tensor, cols: Tensor, root: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


_lib.impl("hadamard", _hadamard, "CompositeExplicitAutograd")
torch.library.register_fake("quant_core::hadamard", _fake, lib=_lib)


class TorchHadamard(Weightless):
    """Two products with small matrices of Sylvester's and one with C."""

    name = "torch_hadamard"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.op != "hadamard":
            return Rejected(axis="op", have=op.op, need="hadamard")
        return Accepted(cost=30.0, note="half a dozen torch operations")

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        return _run


def _run(
    buffers: list[Tensor], x: Tensor, rows: Tensor, core: Tensor, cols: Tensor,
    root: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.ops.quant_core.hadamard(x, rows, core, cols, root)  # type: ignore[no-any-return]
