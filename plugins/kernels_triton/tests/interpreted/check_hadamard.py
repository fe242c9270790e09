"""The Hadamard kernel in Triton's interpreter: the product with the stored matrix."""

from __future__ import annotations

import pytest
import torch

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.hadamard import TorchHadamard, factors, matrix
from quant_core.spec import OpSpec
from quant_kernels_triton.hadamard_kernel import Hadamard, tile
from triton_hadamard import ORDERS, hadamard_matrix


def op_of(n: int, m: int, k: int, act: str = "float32") -> OpSpec:
    return OpSpec(op="hadamard", operands=(), sizes=(("k", k), ("n", n), ("m", m)), act_dtype=act)


def made(core: int, size: int):
    f = factors(hadamard_matrix(core, size, signs=True))
    assert f is not None
    return f


@pytest.mark.parametrize(
    ("core", "size"),
    [(1, 16), (1, 64), (1, 128), (1, 256), (1, 2048), (12, 16), (12, 64), (20, 32), (28, 256)],
)
@pytest.mark.parametrize("root", [False, True])
def test_product_equals_that_with_the_matrix(core, size, root):
    f, n = made(core, size), core * size
    k = 2 * n if n < 4096 else n
    op = op_of(n, f.core.shape[0], k)
    assert isinstance(Hadamard().accepts(op), Accepted), Hadamard().accepts(op)
    divisor = torch.tensor([n**0.5]) if root else None
    for rows in (1, 5):
        x = torch.randn(rows, k)
        got = Hadamard().bind(op)([], x, f.rows, f.core, f.cols, divisor)
        want = (x.double().view(rows, -1, n) @ matrix(f).double()).view(rows, k)
        want = want / n**0.5 if root else want
        assert ((got - want).norm() / want.norm()).item() < 1e-6  # float32 sums of n terms
        other = Hadamard().bind(op)([], x, f.rows.roll(1), f.core, f.cols, divisor)
        assert ((other - want).norm() / want.norm()).item() > 0.1


def test_random_signs_types_axes_and_no_rows():
    f = made(12, 32)
    n = f.rows.numel()
    op, x = op_of(n, 12, n, "float16"), torch.randn(2, 3, n)
    run, plain = Hadamard().bind(op), TorchHadamard().bind(op)
    for y in (x, x.half()):
        got, want = run([], y, f.rows, f.core, f.cols), plain([], y, f.rows, f.core, f.cols)
        assert got.dtype == y.dtype
        assert got.shape == y.shape
        limit = 1e-6 if y.dtype == torch.float32 else 1e-3  # float16 rounds once
        assert ((got - want).float().norm() / want.float().norm()).item() < limit
    assert run([], x[:, :0], f.rows, f.core, f.cols).shape == (2, 0, n)
    wide = torch.cat([x, x], -1)[..., n:]
    assert torch.equal(run([], wide, f.rows, f.core, f.cols), run([], x, f.rows, f.core, f.cols))


def test_nan_reaches_its_own_run_of_features_only():
    f = made(1, 64)
    x = torch.randn(2, 128)
    x[0, 70] = float("nan")
    y = Hadamard().bind(op_of(64, 1, 128))([], x, f.rows, f.core, f.cols)
    assert y[0, 64:].isnan().all()
    assert y[1].isfinite().all()
    assert y[0, :64].isfinite().all()


def test_sizes_without_a_tile_are_rejected():
    for n, m in ((8, 1), (65536, 1), (40 * 2048, 40), (128 * 64, 128), (96, 5)):
        answer = Hadamard().accepts(op_of(n, m, n))
        assert isinstance(answer, Rejected), (n, m)
        assert answer.axis == "sizes"
    for core in ORDERS:
        assert tile(core * 256, core) is not None
    assert tile(16384, 1) == (1, 1, 128, 128)
