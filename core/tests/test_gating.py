"""Gatings of experts other than act(gate) * up."""

from __future__ import annotations

import math

import pytest
import torch

from quant_core.nn import ClampedSwiglu


@pytest.mark.parametrize(
    ("gate", "up", "want"),
    [
        (0.0, 5.0, 0.0),
        (1.0, 0.0, 1 / (1 + math.exp(-1.702))),
        (-2.0, 1.0, 2 * -2 / (1 + math.exp(2 * 1.702))),
        (50.0, 3.0, 4 * 7 / (1 + math.exp(-7 * 1.702))),  # the gate is cut at 7
        (-50.0, 3.0, 4 * -50 / (1 + math.exp(50 * 1.702))),  # but not below
        (1.0, 9.0, 8 / (1 + math.exp(-1.702))),  # up is cut at 7
        (1.0, -9.0, -6 / (1 + math.exp(-1.702))),  # and at -7
    ],
)
def test_clamped_swiglu(gate, up, want):
    got = ClampedSwiglu(limit=7.0, alpha=1.702)(torch.tensor(gate), torch.tensor(up))
    assert got.item() == pytest.approx(want, rel=1e-6, abs=1e-30)  # float32
