"""Norms, rotations and gates in Triton's interpreter against torch's eager operators.

Run by test_interpreted.py in a process of its own; float16, see check_plain.py. Both round at the
same places, so results differ by one unit where float32 sums before a rounding differ, and by two
where another rounding follows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from quant_core.kernels.base import Accepted, Kernel
from quant_core.kernels.between import NORMS, gated_op, norm_op, rotary_op
from quant_kernels_triton.between_kernel import Gated, RmsNorm, Rotary

CPU = ("cpu", "")


def bound(kernel, op):
    assert isinstance(kernel, Kernel)
    answer = kernel.accepts(op)
    assert isinstance(answer, Accepted), answer
    return kernel.bind(op)


def units(got, want):
    """Largest distance in units of the last place of ``want``'s type."""
    size = torch.finfo(want.dtype).eps * want.double().abs().clamp_min(2.0**-14)
    return ((got.double() - want.double()).abs() / size).max().item()


def norm(x, weight, eps, form):
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if "round_last" in form:
        w = weight.float() + 1 if "unit_offset" in form else weight.float()
        return (w * h).to(x.dtype)
    w = 1 + weight if "unit_offset" in form else weight
    return w * h.to(x.dtype)


@pytest.mark.parametrize("form", NORMS, ids=lambda f: "+".join(sorted(f)) or "plain")
@pytest.mark.parametrize("shape", [(3, 1, 576), (7, 64), (2, 4096), (1, 2, 5, 128), (0, 64)])
def test_norm_equals_torch(form, shape):
    torch.manual_seed(0)
    run = bound(RmsNorm(), norm_op(shape[-1], form, "float16", CPU))
    x, delta = (torch.randn(shape).half() * 3 for _ in range(2))
    weight = torch.randn(shape[-1]).half()
    got = run([weight], x, 1e-5)
    total, after = run([weight], x, 1e-5, delta)
    assert got.shape == after.shape == x.shape
    assert torch.equal(total, x + delta)
    if x.numel():
        allowed = 1 if "round_last" in form else 2
        assert units(got, norm(x, weight, 1e-5, form)) <= allowed
        assert units(after, norm(x + delta, weight, 1e-5, form)) <= allowed
        other = form ^ {"unit_offset"}
        assert units(got, norm(x, weight, 1e-5, other)) > 100  # control


def test_norm_of_float32_and_eps():
    x, weight = torch.randn(4, 96) * 1e-3, torch.randn(96)
    run = bound(RmsNorm(), norm_op(96, frozenset(), "float32", CPU))
    torch.testing.assert_close(
        run([weight], x, 1e-2), norm(x, weight, 1e-2, frozenset()), rtol=1e-6, atol=1e-9
    )
    assert (run([weight], x * 0, 1e-2) == 0).all()


def test_norm_declines_what_it_does_not_take():
    x, weight = torch.randn(4, 96).half(), torch.randn(96).half()
    run = bound(RmsNorm(), norm_op(96, frozenset(), "float16", CPU))
    assert run([weight.float()], x, 1e-5) is None
    assert run([weight], torch.randn(96, 4).half().t(), 1e-5) is None
    assert run([weight[:48]], x, 1e-5) is None
    assert run([weight], x, 1e-5, x.float()) is None
    assert run([weight], F.pad(x, (1, 0)).flatten()[1 : 1 + 96], 1e-5) is None  # address


def turned(x, cos, sin):
    r = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    low, high = x[..., :r].chunk(2, -1)
    y = x[..., :r] * cos + torch.cat((-high, low), -1) * sin
    return torch.cat((y, x[..., r:]), -1)


@pytest.mark.parametrize(
    ("batch", "heads", "groups", "tokens", "dim", "rotated", "each"),
    [(1, 9, 3, 1, 64, 64, 1), (2, 32, 8, 5, 128, 128, 1), (2, 4, 4, 3, 80, 32, 2)],
)
def test_rotary_equals_torch(batch, heads, groups, tokens, dim, rotated, each):
    torch.manual_seed(0)
    run = bound(Rotary(), rotary_op(dim, rotated, "float16", CPU))
    q, k = (torch.randn(batch, tokens, h, dim).half().transpose(1, 2) for h in (heads, groups))
    angle = torch.cat([torch.randn(each, tokens, rotated // 2)] * 2, -1)
    cos, sin = angle.cos().half(), angle.sin().half()
    got = run([], q, k, cos, sin)
    for y, x in zip(got, (q, k), strict=True):
        assert torch.equal(y, turned(x, cos, sin))
        assert not torch.equal(y, turned(x, cos, -sin))  # control
        assert y.data_ptr() != x.data_ptr()


def test_rotary_declines_what_it_does_not_take():
    run = bound(Rotary(), rotary_op(64, 64, "float16", CPU))
    q, cos = torch.randn(1, 4, 2, 64).half(), torch.randn(1, 2, 64).half()
    assert run([], q, q, cos, cos) is not None
    assert run([], q, q.float(), cos, cos) is None
    assert run([], q, q, cos.float(), cos.float()) is None
    assert run([], q, q, cos[:, :1], cos[:, :1]) is None
    assert run([], q.transpose(2, 3).contiguous().transpose(2, 3), q, cos, cos) is None


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(3, 1, 1536), (1, 1, 4096), (7, 48), (0, 64)])
def test_gate_equals_torch(act, shape):
    torch.manual_seed(0)
    run = bound(Gated(), gated_op(shape[-1], act, "float16", CPU))
    gate, up = (torch.randn(shape).half() * 4 for _ in range(2))
    f = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    got = run([], gate, up)
    assert got.shape == gate.shape
    if gate.numel():
        # act is rounded first: a unit of it, and one of the product
        # (in float64: torch's float32 tanh loses the tail of GELU)
        exact = f[act](gate.double()).half()
        allowed = 2.0**-9 * (exact.float().abs() + 2.0**-14) * up.float().abs() + 2.0**-24
        want = exact * up
        assert ((got.float() - want.float()).abs() <= allowed).all()
        other = f["silu" if act != "silu" else "gelu_tanh"](gate) * up
        assert ((got.float() - other.float()).abs() > allowed).any()  # control


def test_gate_of_both_halves_of_one_product():
    run = bound(Gated(), gated_op(64, "silu", "float16", CPU))
    for rows in ((5, 1), (2, 3), (1, 1), (1, 4)):
        both = torch.randn(*rows, 128).half()
        gate, up = both.chunk(2, -1)
        got = run([], gate, up)
        assert got.is_contiguous()
        assert torch.equal(got, run([], gate.contiguous(), up.contiguous()))
    assert run([], *torch.randn(3, 4, 128).half().transpose(0, 1).chunk(2, -1)) is None
    assert run([], both[..., 4:68], up) is None  # address
    assert run([], gate, up.float()) is None
    assert run([], gate[..., :40], up[..., :40]) is None


def test_gate_carries_nan_and_infinity():
    run = bound(Gated(), gated_op(16, "silu", "float16", CPU))
    gate, up = torch.randn(1, 16).half(), torch.ones(1, 16).half()
    gate[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    got = run([], gate, up)
    assert got[0, 0].isnan()
    assert got[0, 1] == torch.inf
    assert torch.equal(got.isnan(), (F.silu(gate) * up).isnan())


def test_ops_pass_opcheck():
    ops, checks = torch.ops.quant_triton, ("test_schema", "test_faketensor")
    x, w = torch.randn(2, 64).half(), torch.randn(64).half()
    q, cos = torch.randn(1, 2, 4, 64).half().transpose(1, 2), torch.randn(1, 2, 64).half()
    for op, args in (
        (ops.rms_norm, (x, w, 1e-5, "")),
        (ops.add_rms_norm, (x, x, w, 1e-5, "round_last")),
        (ops.rotary, (q, q, cos, cos)),
        (ops.gated, (x, x, "silu")),
    ):
        torch.library.opcheck(op.default, args, test_utils=checks)
