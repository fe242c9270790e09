"""Codes of activations in the order of the mixed kernels equal the reference's, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quant_core.kernels.activations import fake_quantize
from quant_core.spec import CHANNEL, TENSOR, Element, QuantSpec, Scale
from quant_kernels_triton.mixed_quantize import quantize_exchanged

ELEMENTS = {"fp8": Element(name="fp8_e4m3", bits=8, kind="float"), "int8": Element.int(8)}
PEAK = {"fp8": 448.0, "int8": 127.0}
STORED = {  # columns of 16 in the order of their storage, for weights of 4 and of 8 bits
    False: [kh * 8 + t * 2 + p for t in range(4) for p in range(2) for kh in range(2)],
    True: [kh * 8 + t * 2 + p for t in range(4) for kh in range(2) for p in range(2)],
}


def codes(
    x: Tensor, kind: str, stored: float | None = None, wide: bool = False,
    gather: Tensor | None = None, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes as float32 in natural order, and scales."""
    t, k_in = x.shape
    k = k_in if gather is None else gather.shape[0]
    q = torch.full((t, k), 77, dtype=torch.uint8 if kind == "fp8" else torch.int8)
    s = torch.full((t,), -1.0)
    scale = s if stored is None else torch.tensor([stored])
    quantize_exchanged[(t,)](
        x, s if rows is None else rows, scale, s if gather is None else gather, q, s, k, k_in,
        PEAK[kind], 0.0, 0.0, FP8=kind == "fp8", BOUNDED=False, STATIC=stored is not None,
        HAS_ROWS=rows is not None, HAS_GATHER=gather is not None, PDL=False, BYTES=wide,
        BK=max(128, 1 << (k - 1).bit_length()), BI=max(128, 1 << (k_in - 1).bit_length()),
    )  # fmt: skip
    real = (q.view(torch.float8_e4m3fn) if kind == "fp8" else q).float()
    return real.view(t, -1, 16)[:, :, torch.tensor(STORED[wide]).argsort()].reshape(t, k), s


def reference(x: Tensor, kind: str, stored: float | None = None) -> Tensor:
    grain = CHANNEL if stored is None else TENSOR
    scale = Scale(element="f32", grain=grain, static=stored is not None)
    spec = QuantSpec(element=ELEMENTS[kind], scales=(scale,))
    return fake_quantize(x.float(), spec, None if stored is None else torch.tensor([stored]))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("stored", [None, 0.02])
@pytest.mark.parametrize(("k", "wide"), [(32, False), (144, True), (256, False)])
def test_codes_equal_the_reference(kind, stored, k, wide):
    gen = torch.Generator().manual_seed(k)
    x = torch.randn(4, k, generator=gen) * torch.logspace(-4, 2, k)
    x[2] = 0
    got, s = codes(x, kind, stored, wide)
    assert torch.equal(got * s[:, None], reference(x, kind, stored))


def test_gathered_columns_keep_the_scale_of_the_whole_token():
    x = torch.randn(3, 64)
    x[1, 5] = 40.0  # the largest, in no stored column
    gather = torch.randperm(64)[:48].int()
    gather[gather == 5] = 7
    gather[3] = -1
    got, s = codes(x, "fp8", gather=gather)
    want = reference(x, "fp8")[:, gather.clamp(min=0)]
    want[:, 3] = 0
    assert torch.equal(got * s[:, None], want)


def test_rows_are_taken_in_their_order():
    x, rows = torch.randn(4, 64), torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    for got, want in zip(codes(x, "int8", rows=rows), codes(x[rows], "int8"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("wide", [False, True])
def test_columns_are_exchanged(wide):
    x = torch.arange(1.0, 17.0).repeat(1, 2)
    q = torch.zeros(1, 32, dtype=torch.int8)
    s = torch.zeros(1)
    quantize_exchanged[(1,)](
        x, s, torch.ones(1), s, q, s, 32, 32, 127.0, 0.0, 0.0, FP8=False, BOUNDED=False,
        STATIC=True, HAS_ROWS=False, HAS_GATHER=False, PDL=False, BYTES=wide, BK=128, BI=128,
    )  # fmt: skip
    assert q[0, :16].tolist() == [1 + i for i in STORED[wide]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_make_the_scale_nan(bad):
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    x[1, 7] = bad
    for stored in (None, 0.5):
        s = codes(x, "fp8", stored)[1]
        assert s[0].isfinite()
        assert s[1].isnan()
