from __future__ import annotations

import copy

import pytest
import torch

import toy
from made_layers import SPECS, make_layer, make_op
from quant_core.kernels.choose import choose
from quant_core.nn import BoundMember, QuantEmbedding, QuantLinear
from quant_core.spec import CANONICAL


def _module(cls, name, kind):
    lt = make_layer(SPECS[name])
    choice = choose(make_op(kind, lt), toy.toy_registry())
    buffers = choice.kernel.allocate(choice.op)
    choice.kernel.load_(buffers, choice.op, lt, {"row": 0})
    member = BoundMember(name="m", start=0, stop=40, packing=CANONICAL)
    return cls(choice, buffers, [member])


@pytest.fixture(params=SPECS)
def linear(request):
    return _module(QuantLinear, request.param, "linear")


def _bits(module):
    return {k: v.clone().view(torch.uint8) for k, v in module.tensors.items()}


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.float32),
        lambda m: m.to("cpu", torch.float64),
        lambda m: torch.nn.ModuleList([m]).bfloat16(),
    ],
    ids=["to", "half", "double", "type", "to_both", "parent"],
)
def test_dtype_changes_never_touch_codes_or_scales(linear, cast):
    before = _bits(linear)
    dtypes = {k: v.dtype for k, v in linear.tensors.items()}
    cast(linear)
    after = _bits(linear)
    assert {k: v.dtype for k, v in linear.tensors.items()} == dtypes
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_output_has_the_dtype_of_the_input(linear):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert linear(torch.ones(2, 96, dtype=dtype)).dtype == dtype


def test_deepcopy_and_state_dict_round_trip(linear):
    x = torch.randn(3, 96)
    twin = copy.deepcopy(linear)
    assert torch.equal(twin(x), linear(x))
    for t in twin.tensors.values():
        t.zero_()
    assert not torch.equal(twin.restore().weight.codes, linear.restore().weight.codes)
    twin.load_state_dict(linear.state_dict())
    assert torch.equal(twin(x), linear(x))


def test_weight_attribute_tells_what_to_use_instead(linear):
    with pytest.raises(AttributeError, match="restore"):
        _ = linear.weight


def test_compiles_without_graph_breaks(linear):
    x = torch.randn(3, 96)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), linear(x))


def test_tied_linear_reads_the_embedding_and_owns_nothing():
    embedding = _module(QuantEmbedding, "uint4_two_level_offset", "embedding")
    head = QuantLinear.tied(embedding)
    model = torch.nn.ModuleDict({"embed": embedding, "head": head})
    x = torch.randn(2, 96)
    want = x @ embedding.restore().dequantize().T
    assert torch.allclose(head(x), want, rtol=1e-5, atol=1e-4)
    assert not [k for k in model.state_dict() if k.startswith("head")]
    assert head.nbytes == 0
    model.to(torch.bfloat16)
    assert torch.equal(head(x), model["head"](x))
    embedding.tensors["codes"].zero_()
    assert not torch.allclose(head(x), want, rtol=1e-3, atol=1e-3)
    twin = copy.deepcopy(model)
    twin["embed"].tensors["offset_1"].fill_(0)
    twin["embed"].tensors["scales_1"].fill_(0)
    assert torch.equal(twin["head"](x), torch.zeros(2, 40))
    assert torch.equal(torch.compile(head, fullgraph=True, backend="eager")(x), head(x))


def test_embedding_follows_float_casts():
    embedding = _module(QuantEmbedding, "int8_channel", "embedding")
    assert embedding(torch.tensor([1])).dtype == torch.float32
    embedding.to(torch.bfloat16)
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16


class _Elsewhere(torch.Tensor):
    """A tensor that says it lies on another type of device."""

    device = torch.device("xpu")


def test_another_type_of_device_asks_for_a_kernel_and_restores_where_the_bytes_are(monkeypatch):
    module = _module(QuantLinear, "uint4_code", "linear")
    before = module.restore()
    asked = []

    def rechoose(op):
        asked.append(op.device[0])
        return choose(make_op("linear", make_layer(SPECS["uint4_code"])), toy.toy_registry())

    module._rechoose = rechoose
    kernel = type(module.kernel)
    allocate = kernel.allocate
    monkeypatch.setattr(kernel, "allocate", lambda self, op, device: allocate(self, op, "cpu"))
    module._apply(lambda t: t.as_subclass(_Elsewhere))
    assert asked == ["xpu"]
    after = module.restore()
    assert torch.equal(after.weight.codes, before.weight.codes)
    assert torch.equal(after.weight.scales[0], before.weight.scales[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moving_to_a_gpu_and_back_keeps_every_bit(linear):
    linear._rechoose = lambda op: choose(op, toy.toy_registry())
    before, x = _bits(linear), torch.randn(3, 96)
    want = linear(x)
    linear.to("cuda")
    assert torch.allclose(linear(x.cuda()).cpu(), want, rtol=1e-4, atol=1e-3)
    linear.to("cpu")
    assert all(torch.equal(before[k], v) for k, v in _bits(linear).items())
