"""Decoder layers as one operator: what single ones give, and which calls of a graph become it."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config

from cpu_layer import HOW, ROOM, Made
from quant_kernels_cpu import join, layers, native, ops
from quant_kernels_cpu.library import unavailable

if unavailable():
    pytest.skip(f"no CPU kernels: {unavailable()}", allow_module_level=True)

ONE = ops._ops.decoder_layer.default
ALL = ops._ops.decoder_layers.default


class Stack:
    """Three layers of other weights, each with a cache and a position of its own."""

    def __init__(self, batch: int = 1, **how) -> None:
        self.made = [Made(batch, at, **how) for at in (5, 5, 5)]
        for i, made in enumerate(self.made):
            made.buffers[0][0] += i
            made.keys, made.values = made.keys * (1 + i), made.values * (1 - i)
        self.x, self.mask = self.made[0].x, self.made[0].mask
        self.cos, self.sin = self.made[0].cos, self.made[0].sin

    def caches(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [m.keys.clone() for m in self.made], [m.values.clone() for m in self.made]

    def single(self, x, i: int, keys, values, at):
        made = self.made[i]
        return ONE(
            x, made.table.tensor, made.norms, made.run.text, self.cos, self.sin, keys, values,
            self.mask, at, made.scale, made.eps,
        )  # fmt: skip

    def arguments(self, keys, values, /, **changes) -> tuple:
        """Of the joint operator."""
        made, first = self.made, self.made[0]
        given = {
            "x": self.x, "tables": [m.table.tensor for m in made],
            "norms": [n for m in made for n in m.norms], "layouts": [m.run.text for m in made],
            "cos": self.cos, "sin": self.sin, "keys": keys, "values": values,
            "mask": self.mask, "at": [m.at for m in made], "scale": first.scale,
            "eps": [e for m in made for e in m.eps],
        }  # fmt: skip
        assert set(changes) <= set(given)
        return tuple((given | changes).values())


@pytest.mark.parametrize("run", [ALL, layers.run_layers])
@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize("batch", [1, 3])
def test_the_joint_operator_gives_what_one_after_another_gives(isa, how, batch, run):
    stack = Stack(batch, **HOW[how])
    keys, values = stack.caches()
    want = stack.x
    for i, made in enumerate(stack.made):
        want = stack.single(want, i, keys[i], values[i], made.at)
    mine = stack.caches()
    assert torch.equal(run(*stack.arguments(*mine)), want)
    assert all(torch.equal(a, b) for a, b in zip([*mine[0], *mine[1]], [*keys, *values]))
    assert not torch.equal(mine[0][2], stack.made[2].keys)  # the last one was written too


def test_opcheck():
    stack = Stack(2)
    torch.library.opcheck(
        ALL,
        stack.arguments(*stack.caches()),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_wrong_arguments_are_errors_and_write_nothing():
    if native._torch_library() is None:
        pytest.skip("this torch has no stable C ABI")
    stack, other = Stack(), Made(1, head_norms=True)
    far = [m.at for m in stack.made[:2]] + [torch.tensor([ROOM])]
    keys, values = stack.caches()
    norms = [n for m in stack.made for n in m.norms]
    wrong = {
        "outside of the cache": {"at": far},
        "as many of each thing": {"at": far[:2]},
        "1 to 64 layers": {"tables": []},
        "layout cannot be read": {"layouts": [stack.made[0].run.text, "nonsense", "nonsense"]},
        "number of norms": {"norms": norms[:-1]},
        "keys have other sizes": {"keys": [*keys[:2], keys[2][:, :1]]},
        "more than their weights": {"layouts": [stack.made[0].run.text] * 2 + [other.run.text]},
        "not those that the graph": {
            "tables": [torch.zeros_like(m.table.tensor) for m in stack.made]
        },
    }
    for words, changes in wrong.items():
        with pytest.raises(RuntimeError, match=words):
            ALL(*stack.arguments(keys, values, **changes))
        assert all(torch.equal(k, m.keys) for k, m in zip(keys, stack.made)), words
    many = Stack()
    many.made = many.made[:1] * 65
    with pytest.raises(RuntimeError, match="1 to 64 layers"):
        ALL(*many.arguments(*many.caches()))


def steps(between=lambda i, x, keys, values, at: x):
    """Three layers, and the count of each one's positions."""
    stack = Stack()

    def run(x, keys, values, at):
        for i in range(3):
            y = stack.single(x, i, keys[i], values[i], at[i])
            at[i].add_(1)
            x = between(i, y, keys, values, at)
        return x

    return stack, run


def joined(stack: Stack, run) -> list[int]:
    """Layers in each joint call of the graph; the results are those of the graph as it was."""
    seen: list[int] = []

    def backend(gm, inputs):
        plain = torch.fx.GraphModule(gm, gm.graph.__class__())
        plain.graph.output(plain.graph.graph_copy(gm.graph, {}))
        plain.recompile()
        join.JoinLayers()(gm.graph)
        gm.graph.lint()
        gm.recompile()
        seen.extend(len(n.args[1]) for n in gm.graph.nodes if n.target is ALL)

        def both(*given):
            copies = [t.clone() for t in given]
            out, want = gm(*given), plain(*copies)
            assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
            written = [t.is_floating_point() or t.numel() == 1 for t in given]  # no table
            assert all(torch.equal(a, b) for a, b, w in zip(given, copies, written) if w)
            return out

        return both

    keys, values = stack.caches()
    with torch.no_grad():
        torch.compile(run, backend=backend, fullgraph=True)(
            stack.x, keys, values, [m.at.clone() for m in stack.made]
        )
    return seen


def test_layers_that_follow_each_other_become_one_call():
    assert joined(*steps()) == [3]


APART = {
    "something between": lambda i, x, keys, values, at: x * 1,
    "a write between": lambda i, x, keys, values, at: (keys[2].zero_(), x)[1],
    "another layer's position": lambda i, x, keys, values, at: (at[2].add_(1), x)[1],
}


@pytest.mark.parametrize("what", list(APART))
def test_layers_with_something_between_stay_apart(what):
    assert joined(*steps(APART[what])) == []


def test_layers_whose_outputs_others_read_stay_apart():
    stack, _ = steps()

    def run(x, keys, values, at):
        y = stack.single(x, 0, keys[0], values[0], at[0])
        z = stack.single(y, 1, keys[1], values[1], at[1])
        return y, stack.single(z, 2, keys[2], values[2], at[2])

    assert joined(stack, run) == [2]


def test_layers_of_one_cache_stay_apart():
    stack, _ = steps()

    def run(x, keys, values, at):
        y = stack.single(x, 0, keys[0], values[0], at[0])
        z = stack.single(y, 1, keys[0], values[0], at[1])
        return stack.single(z, 2, keys[2], values[2], at[2])

    assert joined(stack, run) == [2]


def test_the_pass_is_asked_for_once_and_beside_others():
    def theirs(graph):
        return None

    with config.patch(pre_grad_custom_pass=None):
        join.join_layers()
        first = config.pre_grad_custom_pass
        assert isinstance(first, join.JoinLayers)
        join.join_layers()
        assert config.pre_grad_custom_pass is first
    with config.patch(pre_grad_custom_pass=theirs):
        join.join_layers()
        join.join_layers()
        found = [type(p).__name__ for p in config.pre_grad_custom_pass]
        assert found == ["function", "JoinLayers"]
