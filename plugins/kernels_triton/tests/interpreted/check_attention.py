"""Attention of one token in Triton's interpreter against the formula in float64.

Run by test_interpreted.py in a process of its own; float16, see check_plain.py.
"""

from __future__ import annotations

import pytest
import torch

from quant_core.errors import LayoutError
from quant_kernels_triton.attention_run import decode_step, run_decode, run_step

BOUND = 4e-4  # the result is rounded to float16 (2^-11)
SHAPES = (  # B, H, Hkv, L, D, Dv
    (1, 9, 3, 140, 64, 64),
    (2, 8, 8, 1, 32, 48),
    (3, 6, 2, 33, 80, 80),
    (1, 32, 8, 300, 128, 128),
    (1, 20, 1, 70, 96, 96),
    (40, 2, 1, 70, 16, 16),  # no splits
)


def make(shape):
    b, h, hk, length, d, wide = shape
    torch.manual_seed(0)
    return (
        torch.randn(b, h, 1, d).half(),
        torch.randn(b, hk, length, d).half(),
        torch.randn(b, hk, length, wide).half(),
    )


def exact(q, k, v, mask, scale):
    h = q.shape[1]
    k, v = (t.double().repeat_interleave(h // t.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ v).transpose(1, 2)


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_step_equals_the_formula(shape):
    q, k, v = make(shape)
    got = run_step([], q, k, v, None, 0.2)
    assert got.shape == (q.shape[0], 1, q.shape[1], v.shape[3])
    assert error(got, exact(q, k, v, None, 0.2)) < BOUND
    assert error(got, exact(q, k.roll(1, -1), v, None, 0.2)) > 0.1 or k.shape[2] == 1  # control


def test_masks_of_every_kind():
    q, k, v = make((2, 6, 2, 75, 64, 64))
    seen = torch.rand(2, 1, 1, 75) > 0.4
    masks = {
        "a sequence": seen,
        "a head": torch.rand(2, 6, 1, 75) > 0.4,
        "expanded": seen.expand(2, 6, 1, 75),
        "added": torch.zeros(2, 1, 1, 75).masked_fill(~seen, -torch.inf),
        "added, 16 bits": torch.zeros(2, 1, 1, 75).masked_fill(~seen, -torch.inf).half(),
        "bias of a head": torch.randn(1, 6, 1, 75),
    }
    got = {name: run_step([], q, k, v, mask, 0.2) for name, mask in masks.items()}
    for name, mask in masks.items():
        assert error(got[name], exact(q, k, v, mask, 0.2)) < BOUND, name
    assert torch.equal(got["added"], got["a sequence"])
    assert not torch.equal(got["bias of a head"], run_step([], q, k, v, None, 0.2))


def test_positions_left_out_are_not_read_and_rows_left_out_are_zero():
    q, k, v = make((1, 4, 2, 80, 32, 32))
    seen = (torch.arange(80) < 50)[None, None, None]
    want = run_step([], q, k, v, seen, 0.2)
    k[:, :, 50:], v[:, :, 50:] = torch.nan, torch.inf
    assert torch.equal(run_step([], q, k, v, seen, 0.2), want)
    assert (run_step([], q, k, v, torch.zeros_like(seen), 0.2) == 0).all()


def test_nan_in_sight_shows():
    q, k, v = make((1, 2, 2, 80, 32, 32))
    k[0, 0, 3, 0] = torch.nan
    got = run_step([], q, k, v, None, 0.2)
    assert got[0, 0, 0].isnan().all()
    assert not got[0, 0, 1].isnan().any()


def test_strided_keys_and_transposed_queries():
    q, k, v = make((2, 6, 2, 20, 64, 64))
    want = run_step([], q, k, v, None, 0.125)
    cache = torch.full((2, 2, 64, 64), torch.nan, dtype=torch.float16)
    cache[:, :, :20] = k
    rows = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run_step([], q, cache[:, :, :20], rows, None, 0.125), want)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.float(), k.float(), v.float()),
        lambda q, k, v: (q.expand(-1, -1, 2, -1), k, v),
        lambda q, k, v: (q, k.bfloat16(), v),
        lambda q, k, v: (q[:, :5], k, v),
        lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v),
        lambda q, k, v: (q[..., :40], k[..., :40], v),
        lambda q, k, v: (torch.cat([q] * 5, -1), torch.cat([k] * 5, -1), v),
    ],
    ids=["float32", "two tokens", "dtypes", "heads", "columns", "odd", "wide"],
)
def test_what_does_not_fit_is_declined(change):
    assert run_step([], *change(*make((1, 6, 2, 9, 64, 64))), None, 0.1) is None


def rotated(x, cos, sin):
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def step_inputs(b, h, hk, length, d, turns=None):
    torch.manual_seed(1)
    qkv = torch.randn(b, (h + 2 * hk) * d).half()
    angle = torch.cat([torch.randn(1, (turns or d) // 2)] * 2, -1)
    caches = [torch.randn(b, hk, length, d).half() for _ in "kv"]
    return qkv, angle.cos().half(), angle.sin().half(), *caches


def first_features(x, cos, sin):
    r = cos.shape[-1]
    return torch.cat((rotated(x[..., :r], cos, sin), x[..., r:]), -1)


@pytest.mark.parametrize(
    ("shape", "at", "turns"),
    [
        ((1, 8, 2, 300, 128), 130, 128),
        ((2, 6, 6, 64, 64), 0, 32),
        ((3, 6, 2, 100, 80), 99, 80),
        ((1, 4, 1, 70, 64), None, 64),  # the last position
    ],
)
def test_decode_step_rotates_writes_and_attends(shape, at, turns):
    b, h, hk, length, d = shape
    qkv, cos, sin, keys, values = step_inputs(*shape, turns)
    before = keys.clone(), values.clone()
    where = None if at is None else torch.tensor([at])
    at = length - 1 if at is None else at
    keys[:, :, at:], values[:, :, at:] = torch.nan, torch.inf
    got = decode_step(qkv, cos, sin, where, keys, values, None, d**-0.5)
    raw = qkv.view(b, -1, 1, d).split([h, hk, hk], 1)
    q, k, v = *(first_features(t, cos, sin) for t in raw[:2]), raw[2]  # as torch rounds it
    seen = [torch.cat([t[:, :, :at], new], 2).double() for t, new in zip(before, (k, v))]
    assert error(got, exact(q, *seen, None, d**-0.5).reshape(b, -1)) < BOUND
    assert torch.equal(keys[:, :, at : at + 1], k)
    assert torch.equal(values[:, :, at : at + 1], v)
    for cache, old in zip((keys, values), before):
        assert torch.equal(cache[:, :, :at], old[:, :, :at])
        assert not cache[:, :, at + 1 :].isfinite().any()
    wrong = [torch.cat([t[:, :, :at], new], 2).double() for t, new in zip(before, raw[1:])]
    if at:  # negative control: keys that were not rotated
        assert error(got, exact(q, *wrong, None, d**-0.5).reshape(b, -1)) > BOUND


@pytest.mark.parametrize("kind", ["bool", "added", "heads"])
def test_decode_step_under_a_mask(kind):
    b, h, hk, length, d = 2, 4, 2, 70, 64
    qkv, cos, sin, keys, values = step_inputs(b, h, hk, length, d)
    seen = torch.rand(b, 1, 1, length) > 0.4
    seen[0, ..., -1], seen[1, ..., -1] = True, False  # the new token is hidden once
    mask = {
        "bool": seen,
        "added": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
        "heads": torch.randn(1, h, 1, length),
    }[kind]
    got = decode_step(qkv, cos, sin, None, keys, values, mask, 0.2)
    q = rotated(qkv.view(b, -1, 1, d)[:, :h], cos, sin)
    want = exact(q, keys, values, mask, 0.2)  # the cache holds the new token now
    assert error(got, want.reshape(b, -1)) < BOUND
    assert error(got, exact(q, keys, values, None, 0.2).reshape(b, -1)) > 0.1  # control


def test_no_sequences_and_no_positions():
    q, k, v = make((2, 4, 2, 9, 32, 32))
    assert run_step([], q[:0], k[:0], v[:0], None, 0.1).shape == (0, 1, 4, 32)
    assert (run_step([], q, k[:, :, :0], v[:, :, :0], None, 0.1) == 0).all()
    qkv, cos, sin, keys, values = step_inputs(1, 4, 2, 16, 64)
    nothing = keys[:, :, :0], values[:, :, :0]
    assert run_decode([], qkv[:, None], cos[:, None], sin[:, None], *nothing, None, 0.1) is None


def test_update_declines_what_it_does_not_take():
    b, h, hk, length, d = 2, 4, 2, 20, 64
    flat, cos, sin, keys, values = step_inputs(b, h, hk, length, d)
    qkv, cos, sin = flat[:, None], cos[:, None], sin[:, None]
    before = keys.clone()
    assert run_decode([], qkv, cos.float(), sin.float(), keys, values, None, 0.1) is None
    assert run_decode([], qkv[..., :-64], cos, sin, keys, values, None, 0.1) is None
    assert run_decode([], qkv, cos, sin, keys.float(), values.float(), None, 0.1) is None
    assert torch.equal(keys, before)
    got = run_decode([], qkv, cos, sin, keys, values, None, 0.1)
    assert got.shape == (b, 1, h * d)
    assert not torch.equal(keys, before)


def test_decode_step_of_wrong_shapes_raises():
    qkv, cos, sin, keys, values = step_inputs(1, 4, 2, 16, 64)
    with pytest.raises(LayoutError, match="expected 16-bit"):
        decode_step(qkv[:, :-64], cos[:, :32], sin, torch.tensor([3]), keys, values, None, 0.1)


def test_ops_pass_opcheck():
    q, k, v = make((1, 6, 2, 9, 64, 64))
    checks = ("test_schema", "test_faketensor")
    op = torch.ops.quant_triton.attention_step.default
    for mask in (None, torch.ones(1, 1, 1, 9, dtype=torch.bool)):
        torch.library.opcheck(op, (q, k, v, mask, 0.1), test_utils=checks)
    args = (*step_inputs(1, 4, 2, 16, 64)[:3], torch.tensor([3]), *step_inputs(1, 4, 2, 16, 64)[3:])
    torch.library.opcheck(decode_step, (*args, None, 0.1), test_utils=checks)
