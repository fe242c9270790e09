"""Hadamard matrices from the textbook: Sylvester's, Paley's of 12, 20 and 28."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ORDERS", "hadamard_matrix"]

ORDERS = (1, 12, 20, 28)


def sylvester(size: int) -> Tensor:
    """S[i, j] = (-1)^(number of common bits of i and j)."""
    h = torch.ones(1, 1, dtype=torch.int8)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def paley(q: int) -> Tensor:
    """Order q + 1 for a prime q = 3 mod 4."""
    squares = {i * i % q for i in range(1, q)}
    first = torch.tensor([1] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.int8)
    h = torch.ones(q + 1, q + 1, dtype=torch.int8)
    for i in range(q):
        h[1 + i, 0] = -1
        h[1 + i, 1:] = first.roll(i)
    return h


def _order_28() -> Tensor:
    """Paley's second construction over 13 elements: 2 (13 + 1)."""
    q = 13
    squares = {i * i % q for i in range(1, q)}
    c = torch.ones(q + 1, q + 1, dtype=torch.int8)
    c[0, 0] = 0
    for i in range(q):
        for j in range(q):
            c[1 + i, 1 + j] = 0 if i == j else 1 if (i - j) % q in squares else -1
    one, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return (torch.kron(c, one) + torch.kron(torch.eye(q + 1, dtype=torch.int64), minus)).to(
        torch.int8
    )


def hadamard_matrix(core: int, size: int, *, signs: bool = False) -> Tensor:
    """int8, order core * size; ``signs``: rows and columns with random signs."""
    c = (
        torch.ones(1, 1, dtype=torch.int8)
        if core == 1
        else _order_28()
        if core == 28
        else paley(core - 1)
    )
    full = c.float() @ c.float().T
    assert torch.equal(full, core * torch.eye(core)), "not a Hadamard matrix"
    h = torch.kron(c, sylvester(size))
    if signs:
        g = torch.Generator().manual_seed(3)
        rows, cols = (torch.randint(0, 2, (len(h),), generator=g) * 2 - 1 for _ in range(2))
        h = (h * rows[:, None] * cols).to(torch.int8)
    return h
