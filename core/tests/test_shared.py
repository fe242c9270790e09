from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import toy
from made_layers import SPECS, make_layer, make_op
from quant_core.kernels import reference
from quant_core.kernels.choose import choose
from quant_core.nn import QuantComposite, QuantLinear
from quant_core.parts import load_part_
from quant_core.shared import MOST_TOKENS, share_inputs
from quant_core.spec import CHANNEL, TENSOR, Element, QuantSpec, Scale
from with_input import with_input

TOKEN = QuantSpec(
    element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL, static=False),)
)
STATIC = QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=TENSOR),))
NAMES = ("uint4_code", "int8_channel", "uint3_const")


def linear(name="int8_channel", *, seed=0, acts=TOKEN, scale=None, n=40):
    lt = make_layer(SPECS[name], n=n, seed=seed)
    op = make_op("linear", lt)
    if acts is not None:
        op = with_input(op, acts, *([] if scale is None else ["input_scale"]))
    if scale is not None:
        lt = replace(lt, input_scale=torch.tensor([scale]))
    choice = choose(op, toy.toy_registry(), kernels="torch_ref")
    buffers = choice.kernel.allocate(choice.op)
    choice.kernel.load_(buffers, choice.op, lt, {"row": 0})
    return QuantLinear(choice, buffers)


class Block(nn.Module):
    """q, k and v of one input, o of another that is as wide."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.q, self.k, self.v, self.o = (
            linear(n, seed=i) for i, n in enumerate((*NAMES, "int8_channel"))
        )
        self.between = between

    def forward(self, x):
        q = self.q(x)
        x = self.between(x)
        k, v = self.k(x), self.v(x)
        return torch.cat([q, k, v, self.o(x * 2)], dim=-1)


@pytest.fixture
def rounds(monkeypatch):
    """How often activations were quantized."""
    calls = []
    original = reference.fake_quantize

    def counted(x, *args):
        calls.append(x.shape)
        return original(x, *args)

    monkeypatch.setattr(reference, "fake_quantize", counted)
    return calls


def inputs(count, tokens=2):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(1, tokens, 96, generator=g) for _ in range(count)]


@pytest.mark.parametrize("inference", [True, False])
def test_layers_of_one_input_run_once_and_give_the_same_bits(rounds, inference):
    block, alone = Block(), Block()
    share_inputs(block)
    counts = []
    with torch.inference_mode(inference):
        for x in inputs(4):
            want = alone(x)
            rounds.clear()
            assert torch.equal(block(x), want)
            counts.append(len(rounds))
    assert counts == [4, 2, 2, 2]  # the first pass learns; then q, k and v are one


@pytest.mark.parametrize("inference", [True, False])
def test_input_changed_in_place_between_the_layers_is_seen(inference):
    def shift(x):
        return x.add_(1)

    block, alone = Block(shift), Block(shift)
    share_inputs(block)
    with torch.inference_mode(inference):
        for x in inputs(6):
            x = x.clone()
            assert torch.equal(block(x.clone()), alone(x.clone()))


def test_other_inputs_than_in_the_first_pass_end_the_sharing(rounds):
    block, alone = Block(), Block()
    share_inputs(block)
    for x in inputs(2):
        block(x)
    for module in (block, alone):
        module.between = torch.clone
    counts = []
    for x in inputs(8):
        want = alone(x)
        rounds.clear()
        assert torch.equal(block(x), want)
        counts.append(len(rounds))
    assert counts[-1] == 4
    assert all(m._shared is None for m in block.children())


def test_results_made_with_old_weights_are_not_used():
    block = Block()
    share_inputs(block)
    (x,) = inputs(1)
    block(x), block(x)
    block.q(x)
    lt = make_layer(SPECS["int8_channel"], seed=9)
    choice = choose(block.k.op, toy.toy_registry(), kernels="torch_ref")
    load_part_(choice, block.k.tensors, lt, {"row": 0})
    assert torch.equal(block.k(x), linear(seed=9)(x))
    block.q(x)
    block.k.load_state_dict(linear(seed=10).state_dict())
    assert torch.equal(block.k(x), linear(seed=10)(x))


def test_a_result_is_handed_out_once():
    block, alone = Block(), Block()
    share_inputs(block)
    (x,) = inputs(1)
    block(x), block(x)
    block.q(x)
    first = block.k(x)
    first.zero_()
    assert torch.equal(block.k(x), alone.k(x))


def test_many_tokens_run_alone(rounds):
    block = Block()
    share_inputs(block)
    small, (large,) = inputs(3), inputs(1, MOST_TOKENS + 1)
    for x in small:
        block(x)
    rounds.clear()
    block(large)
    assert len(rounds) == 4


def test_gradient_reaches_the_input():
    block, alone = Block(), Block()
    share_inputs(block)
    (x,) = inputs(1)
    block(x), block(x)
    grads = []
    for module in (block, alone):
        leaf = x.clone().requires_grad_()
        module(leaf * 1).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


def test_copies_start_alone_and_state_is_untouched():
    block, alone = Block(), Block()
    keys = list(block.state_dict())
    share_inputs(block)
    (x,) = inputs(1)
    block(x), block(x)
    assert list(block.state_dict()) == keys
    single = pickle.loads(pickle.dumps(block.k))
    assert torch.equal(single(x), alone.k(x))
    assert len(pickle.dumps(block.k)) < 2 * len(pickle.dumps(alone.k))
    twin = copy.deepcopy(block.q)
    assert twin._shared is None
    twin.codes.zero_()
    assert torch.equal(block(x), alone(x))


def test_threads_do_not_mix_results():
    block, alone = Block(), Block()
    share_inputs(block)
    xs = inputs(24)
    block(xs[0]), block(xs[0])
    want, got = [alone(x) for x in xs], {}

    def work(part):
        for i in range(part, len(xs), 3):
            got[i] = block(xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(got[i], w) for i, w in enumerate(want))


def test_moving_keeps_results():
    block, alone = Block(), Block()
    share_inputs(block)
    (x,) = inputs(1)
    block(x), block(x)
    block.q(x)
    block.to(torch.bfloat16)
    assert torch.equal(block(x), alone(x))


def test_compiled_graph_is_whole_and_equal():
    block, alone = Block(), Block()
    share_inputs(block)
    (x,) = inputs(1)
    block(x), block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), alone(x))


# --------------------------------------------------------------------------------- unlike members


def test_composite_quantizes_x_once_for_all_parts_alike(rounds):
    parts = [linear(name, seed=i) for i, name in enumerate(NAMES)]
    (x,) = inputs(1)
    want = torch.cat([part(x) for part in parts], dim=-1)
    assert len(rounds) == 3
    rounds.clear()
    assert torch.equal(QuantComposite(parts, "elements")(x), want)
    assert len(rounds) == 1


def test_composite_quantizes_once_per_distinct_input(rounds):
    parts = [
        linear(acts=TOKEN),
        linear(acts=STATIC, scale=0.02, seed=1),
        linear(acts=STATIC, scale=0.03, seed=2),
        linear(acts=STATIC, scale=0.02, seed=3),
        linear(acts=TOKEN, seed=4),
        linear(acts=None, seed=5),
    ]
    (x,) = inputs(1)
    want = torch.cat([part(x) for part in parts], dim=-1)
    rounds.clear()
    composite = QuantComposite(parts, "inputs")
    assert torch.equal(composite(x), want)
    assert len(rounds) == 3
    parts[2].input_scale.fill_(0.02)  # equal from now on, though not when they were bound
    rounds.clear()
    want = torch.cat([part(x) for part in parts], dim=-1)
    rounds.clear()
    assert torch.equal(composite(x), want)
    assert len(rounds) == 2
