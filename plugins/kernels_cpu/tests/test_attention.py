"""One new token against a cache: compared with the formula in float64."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from quant_core.errors import KernelError
from quant_core.kernels.base import Accepted, Kernel
from quant_core.kernels.choose import choose
from quant_core.registry import registry
from quant_core.spec import CHANNEL, Element, OpSpec, QuantSpec, Scale
from quant_kernels_cpu.attention import AttentionStep, run_step

OP = OpSpec(op="attention", operands=(), features=frozenset({"one_token"}))
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit of the result's type
SHAPES = ((1, 9, 3, 140, 64, 64), (2, 8, 8, 1, 32, 48), (3, 6, 2, 33, 80, 80), (1, 16, 1, 7, 20, 5))


def make(shape, dtype, seed=0):
    b, h, hk, length, d, wide = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((b, h, 1, d), (b, hk, length, d), (b, hk, length, wide))
    return tuple(torch.randn(s, generator=g).to(dtype) for s in sizes)


def exact(q, k, v, mask, scale):
    h = q.shape[1]
    k, v = (t.double().repeat_interleave(h // t.shape[1], 1) for t in (k, v))
    scores = (q.double() @ k.transpose(2, 3)) * scale
    if mask is not None:
        add = mask.double() if mask.dtype != torch.bool else torch.zeros(mask.shape).double()
        scores = scores + (add.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else add)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2), (weights @ v.abs()).transpose(1, 2)


def check(q, k, v, mask=None, scale=0.2):
    got = run_step([], q, k, v, mask, scale)
    want, size = exact(q, k, v, mask, scale)
    assert got.dtype == q.dtype
    assert got.shape == want.shape
    # float32 scores of size s carry s * 2^-22 into the weights, and the result is rounded once
    allowed = ULP[q.dtype] * want.abs() * 1.001 + 2.0**-18 * size + 2.0**-25
    assert ((got.double() - want).abs() <= allowed).all()
    return got


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("shape", SHAPES)
def test_step_equals_the_formula(isa, threads, shape, dtype, count):
    threads(count)
    check(*make(shape, dtype))


def test_masks_of_every_kind(isa):
    q, k, v = make((2, 6, 2, 33, 64, 64), torch.bfloat16)
    seen = torch.rand(2, 1, 1, 33, generator=torch.Generator().manual_seed(1)) > 0.4
    check(q, k, v, seen)
    check(q, k, v, seen.expand(2, 6, 1, 33).clone())
    added = torch.zeros(2, 1, 1, 33).masked_fill(~seen, -torch.inf)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(check(q, k, v, added.to(dtype)), check(q, k, v, seen))
    bias = torch.randn(1, 6, 1, 33, generator=torch.Generator().manual_seed(2))
    got = check(q, k, v, bias)
    assert not torch.equal(got, check(q, k, v))


def test_positions_left_out_are_not_read_and_rows_left_out_are_zero(isa):
    q, k, v = make((1, 4, 2, 8, 32, 32), torch.bfloat16)
    seen = torch.tensor([True] * 5 + [False] * 3)[None, None, None]
    want = run_step([], q, k, v, seen, 0.2)
    k[:, :, 5:], v[:, :, 5:] = torch.nan, torch.inf
    assert torch.equal(run_step([], q, k, v, seen, 0.2), want)
    assert (run_step([], q, k, v, torch.zeros_like(seen), 0.2) == 0).all()


def test_nan_in_sight_shows(isa):
    q, k, v = make((1, 2, 2, 8, 32, 32), torch.bfloat16)
    k[0, 0, 3, 0] = torch.nan
    got = run_step([], q, k, v, None, 0.2)
    assert got[0, 0, 0].isnan().all()
    assert not got[0, 0, 1].isnan().any()


def test_scores_beyond_what_exp_reaches(isa):
    q, k, v = make((1, 3, 1, 40, 64, 64), torch.bfloat16)
    check(q * 30, k, v, scale=1.0)


def test_strided_keys_and_transposed_queries(isa):
    q, k, v = make((2, 6, 2, 20, 64, 64), torch.bfloat16)
    want = run_step([], q, k, v, None, 0.125)
    cache = torch.full((2, 2, 64, 64), torch.nan, dtype=torch.bfloat16)
    cache[:, :, :20] = k
    heads = q.transpose(1, 2).contiguous().transpose(1, 2)
    rows = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run_step([], heads, cache[:, :, :20], rows, None, 0.125), want)


def test_torchs_own_op_agrees(isa):
    q, k, v = make(SHAPES[0], torch.bfloat16)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.125).transpose(1, 2)
    got = run_step([], q, k, v, None, 0.125)
    assert (got.float() - want.float()).abs().max() <= 2**-7


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.float(), k.float(), v.float()),
        lambda q, k, v: (q.expand(-1, -1, 2, -1), k, v),
        lambda q, k, v: (q, k.half(), v),
        lambda q, k, v: (q[:, :5], k, v),
        lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v),
        lambda q, k, v: (F.pad(q, (0, 600)), F.pad(k, (0, 600)), v),
    ],
    ids=["float32", "two tokens", "dtypes", "heads", "columns", "wide"],
)
def test_what_does_not_fit_is_declined(isa, change):
    assert run_step([], *change(*make((1, 6, 2, 9, 64, 64), torch.bfloat16)), None, 0.1) is None


def test_op_passes_opcheck_compiles_and_pickles(isa):
    q, k, v = make((1, 6, 2, 9, 64, 64), torch.bfloat16)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.quant_cpu.attention_step.default
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    for m in (None, mask):
        torch.library.opcheck(op, (q, k, v, m, 0.1), test_utils=checks)
    run = pickle.loads(pickle.dumps(AttentionStep().bind(OP)))
    compiled = torch.compile(
        lambda *a: run([], *a, None, 0.1) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), run([], q, k, v, None, 0.1) * 2)


def test_kernel_of_the_contract_says_what_it_runs(isa):
    kernel = AttentionStep()
    assert isinstance(kernel, Kernel)
    assert isinstance(kernel.accepts(OP), Accepted)
    assert choose(OP, registry()).kernel.name == "cpu_attention"
    rounded = QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),))
    refused = {
        "op": replace(OP, op="linear"),
        "device": replace(OP, device=("cuda", "9.0")),
        "operands": replace(OP, operands=(("k", rounded),)),
        "features": replace(OP, features=frozenset()),
        "act_dtype": replace(OP, act_dtype="float32"),
    }
    assert {n: kernel.accepts(op).axis for n, op in refused.items()} == {n: n for n in refused}
    for ask in (lambda: kernel.restore({}, OP), lambda: kernel.load_({}, OP, None, {})):
        with pytest.raises(KernelError):
            ask()
