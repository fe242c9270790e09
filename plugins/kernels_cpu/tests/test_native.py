"""Operators in C: what the ones in Python give, errors instead of wrong memory, and no leaks."""

from __future__ import annotations

import gc
import resource
import weakref

import pytest
import torch

from cpu_made import SPECS, make_layer, make_op
from quant_kernels_cpu import native, ops
from quant_kernels_cpu.kernel import WnA16
from quant_kernels_cpu.library import unavailable

K = 352
linear, shared = torch.ops.quant_cpu.linear.default, torch.ops.quant_cpu.linear_shared.default

if unavailable():
    pytest.skip(f"no CPU kernels: {unavailable()}", allow_module_level=True)
if native._torch_library() is None:
    pytest.skip("this torch has no stable C ABI", allow_module_level=True)


def made(name, n=40, seed=0):
    lt = make_layer(SPECS[name], n, K, seed=seed)
    op, kernel = make_op("linear", lt, K), WnA16()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    return kernel._bound(op).text(), list(buffers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 3, K), (1, 33, K)])
@pytest.mark.parametrize("name", list(SPECS)[::4])
def test_operator_in_c_gives_the_bits_of_the_one_in_python(isa, name, shape, dtype):
    text, tensors = made(name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = ops._linear(x, tensors, text)
    got = linear(x, tensors, text)
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    assert torch.equal(got, want)
    both = shared(x, tensors * 2, [text, text])
    assert torch.equal(both, ops._linear_shared(x, tensors * 2, [text, text]))


def test_input_that_does_not_lie_dense_is_read_right(isa):
    text, tensors = made("uint4 g32 f16 code")
    x = torch.randn(5, 2 * K, 3).transpose(1, 2)[..., ::2]
    assert not x.is_contiguous()
    assert torch.equal(linear(x, tensors, text), ops._linear(x, tensors, text))


def test_wrong_arguments_are_errors(caplog):
    text, tensors = made("uint4 g32 f16 code")
    x = torch.randn(2, K)
    for args, words in (
        ((x[:, :32], tensors, text), "features"),
        ((x, tensors[:-1], text), "tensors"),
        ((x, [*tensors, x], text), "tensors"),
        ((x.double(), tensors, text), "dtype"),
        ((x, tensors, "nonsense"), "layout"),
    ):
        with pytest.raises(RuntimeError, match=words):
            linear(*args)
    with pytest.raises(RuntimeError, match="layers"):
        shared(x, [], [])
    assert "nonsense" in caplog.text


def test_calls_keep_nothing():
    text, tensors = made("uint4 g32 f16 code", n=4096)
    x = torch.randn(7, K)
    seen = weakref.ref(x)

    def call(x, tensors):
        linear(x, tensors, text)
        shared(x, tensors * 2, [text, text])
        with pytest.raises(RuntimeError):
            linear(x, tensors[:-1], text)

    for _ in range(20):
        call(x, tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(500):  # 170 MB of outputs, were they kept
        call(x, tensors)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB
    held = weakref.ref(tensors[0])
    del x, tensors
    gc.collect()
    assert seen() is None
    assert held() is None


def test_more_layers_than_c_takes_share_a_call():
    text, tensors = made("uint4 g32 f16 code")
    x = torch.randn(3, K).bfloat16()
    got = shared(x, tensors * 65, [text] * 65)
    assert torch.equal(got, shared(x, tensors, [text]).repeat(65, 1))
