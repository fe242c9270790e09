"""The shipped cost table and what is made of it."""

from __future__ import annotations

import pytest

from quant_core.kernels.base import ANY_ROWS
from quant_kernels_triton.costs import BUCKETS, costs
from quant_kernels_triton.recipe import Recipe, describe
from triton_made import SPECS, make_op

HOPPER = ("cuda", "9.0")


def recipe(name: str = "uint4 g128 bf16", n: int = 4096, k: int = 4096, **kw: object) -> Recipe:
    made = describe(
        make_op(SPECS[name], n, k, act="bfloat16", device=HOPPER, **kw),
        ops=("linear", "grouped_linear"),
    )
    assert isinstance(made, Recipe)
    return made


def test_measured_layer_costs_about_what_was_measured():
    table, measured = costs("gluon_wna16", recipe(), HOPPER)
    assert measured
    at = dict(table)
    assert 8 < at[64] < 20  # microseconds, 13.6 measured
    assert 100 < at[4096] < 260  # 183 measured
    assert [b for b, _ in table] == list(BUCKETS)
    assert table[-1][0] == ANY_ROWS


@pytest.mark.parametrize("name", ["uint4 g32 bf16 code", "uint3 g128", "nvfp4", "table of 16"])
def test_every_class_has_costs_and_larger_layers_cost_more(name):
    small, _ = costs("triton_wna16", recipe(name, 1024, 1024), HOPPER)
    large, _ = costs("triton_wna16", recipe(name, 28672, 8192), HOPPER)
    assert all(a < b for (_, a), (_, b) in zip(small, large, strict=True))


def test_unknown_device_gets_a_heuristic_and_says_so():
    table, measured = costs("triton_wna16", recipe(), ("cuda", "8.0"))
    assert not measured
    assert [c for _, c in table] == sorted(c for _, c in table)


def test_stack_costs_grow_with_the_experts_in_use():
    table = dict(costs("gluon_wna16", recipe(op="grouped_linear", experts=64), HOPPER)[0])
    assert table[1] < table[16] < table[64]
    assert table[64] > 20 * (table[1] - 15)


@pytest.mark.parametrize(
    ("experts", "k", "n", "measured"),
    [
        (8, 4096, 14336, {32: 106, 128: 113, 512: 175, 2048: 387, 8192: 1536}),
        (128, 2048, 1536, {128: 68.2, 512: 99.4, 2048: 110, 8192: 172}),
    ],
)
def test_stack_costs_about_what_was_measured(experts, k, n, measured):
    """Microseconds on an H100, by rows; within 1.2 times."""
    made = recipe(n=n, k=k, op="grouped_linear", experts=experts)
    table = costs("gluon_wna16", made, HOPPER)[0]
    for rows, us in measured.items():
        cost = next(c for bound, c in table if rows <= bound)
        assert us / 1.2 < cost < us * 1.2, (rows, cost, us)
