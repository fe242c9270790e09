"""Layers and a cache that handles stand for: what single operators give, whatever is put there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from cpu_layer import HOW, ROOM, Made
from quant_kernels_cpu import held, native, ops
from quant_kernels_cpu.library import unavailable

if unavailable():
    pytest.skip(f"no CPU kernels: {unavailable()}", allow_module_level=True)
if native._torch_library() is None:
    pytest.skip("this torch has no stable C ABI", allow_module_level=True)

ONE = ops._ops.decoder_layer.default
HELD = ops._ops.held_layers.default


class Stack:
    """Three layers of other weights, and two handles."""

    def __init__(self, batch: int = 1, *, placed: bool = True, **how) -> None:
        self.made = [Made(batch, at, **how) for at in (5, 5, 5)]
        for i, made in enumerate(self.made):
            made.buffers[0][0] += i
        self.weights = [t for m in self.made for t in (m.table.tensor, *m.norms)]
        self.fresh()
        run, places = self.made[0].run, self.places if placed else None
        self.layers = run.held(lambda: self.weights, places and (lambda: places("weights")))
        self.cache = run.held(lambda: self.tensors, places and (lambda: places("tensors")))

    def places(self, name: str) -> list[tuple]:
        held = self.__dict__
        return [(held, name, held[name]), *((held[name], i, t) for i, t in enumerate(held[name]))]

    def fresh(self) -> None:
        """The cache as it was."""
        self.tensors = [
            t for m in self.made for t in (m.keys.clone(), m.values.clone(), m.at[0].clone())
        ]

    def arguments(self, /, **changes) -> tuple:
        one = self.made[0]
        given = {
            "x": one.x, "layers": self.layers.tensor, "cache": self.cache.tensor, "of": [0, 1, 2],
            "to": [0, 1, 2], "layout": one.run.kind, "cos": one.cos, "sin": one.sin,
            "mask": one.mask, "first": self.tensors[2], "scale": one.scale,
            "eps": list(one.eps) * 3,
        }  # fmt: skip
        assert set(changes) <= set(given)
        return tuple((given | changes).values())

    def plain(self, order=(0, 1, 2)) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One layer after another by the single operator, on copies of the cache."""
        tensors, x = [t.clone() for t in self.tensors], self.made[0].x
        for i in order:
            made, (keys, values, at) = self.made[i], tensors[3 * i : 3 * i + 3]
            one = self.made[0]
            norms = self.weights[i * (1 + len(one.norms)) + 1 :][: len(one.norms)]
            x = ONE(
                x, made.table.tensor, norms, made.run.text, one.cos, one.sin, keys, values,
                one.mask, at, one.scale, one.eps,
            )  # fmt: skip
        return x, tensors


def same_caches(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for i, (a, b) in enumerate(zip(got, want)) if i % 3 < 2)


@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize("batch", [1, 3])
def test_held_layers_give_what_single_ones_give(isa, how, batch):
    stack = Stack(batch, **HOW[how])
    want, tensors = stack.plain()
    assert torch.equal(HELD(*stack.arguments()), want)
    assert same_caches(stack.tensors, tensors)
    # all positions but the first are counted, which is the graph's
    assert [int(t) for t in stack.tensors[2::3]] == [5, 6, 6]


def test_layers_run_in_the_order_that_is_asked_for():
    stack = Stack()
    want, tensors = stack.plain((2, 0))
    changes = {"of": [2, 0], "to": [2, 0], "eps": list(stack.made[0].eps) * 2}
    assert torch.equal(HELD(*stack.arguments(**changes)), want)
    assert same_caches(stack.tensors, tensors)
    assert not torch.equal(want, Stack().plain((0, 2))[0])


@pytest.mark.parametrize("placed", [True, False])
def test_what_is_put_in_a_tensors_place_is_taken(placed):
    stack = Stack(placed=placed)
    before = HELD(*stack.arguments())
    old = stack.tensors[3]
    stack.fresh()
    want, tensors = stack.plain()
    kept = old.clone()
    assert torch.equal(HELD(*stack.arguments()), want)
    assert torch.equal(before, want)
    assert torch.equal(old, kept)
    assert same_caches(stack.tensors, tensors)
    stack.fresh()
    stack.weights[1] = stack.weights[1] * 2  # a norm
    want, _ = stack.plain()
    assert torch.equal(HELD(*stack.arguments()), want)
    assert not torch.equal(want, before)
    stack.fresh()
    stack.weights[1].data = stack.weights[1] * 2  # the tensor stays, its memory does not
    want, _ = stack.plain()
    assert torch.equal(HELD(*stack.arguments()), want)


def test_wrong_arguments_are_errors_and_count_nothing():
    stack, other = Stack(), Made(1, head_norms=True)
    wrong = {
        "no such layer": [{"of": [0, 1, 3]}, {"to": [0, 1, 3]}, {"of": [0, -1, 2]}],
        "as many of each thing": [{"of": [0]}, {"of": [], "to": []}],
        "layout cannot be read": [{"layout": "nonsense"}],
        "number of norms": [{"eps": [1e-5]}, {"layout": other.run.kind}],
        "layers or the cache of this graph are gone": [
            {"cache": torch.zeros(1, dtype=torch.int64)},
            {"layers": torch.zeros(1)},
            {"layers": torch.zeros(2, dtype=torch.int64)},
        ],
    }
    for words, cases in wrong.items():
        for changes in cases:
            with pytest.raises(RuntimeError, match=words):
                HELD(*stack.arguments(**changes))
    made = stack.tensors
    bad = {
        "keys have other sizes": (3, made[3][:, :1]),
        "another dtype": (4, made[4].float()),
        "outside of the cache": (5, torch.tensor(ROOM)),
        "table or position is not of int64": (8, made[8].int()),
    }
    for words, (i, tensor) in bad.items():
        stack.tensors = [*made[:i], tensor, *made[i + 1 :]]
        with pytest.raises(RuntimeError, match=words):
            HELD(*stack.arguments())
    stack.tensors = made
    assert [int(t) for t in made[2::3]] == [5, 5, 5]
    assert all(torch.equal(t, getattr(m, n)) for m, k, v in zip(stack.made, made[::3], made[1::3])
               for n, t in (("keys", k), ("values", v)))  # fmt: skip
    stack.weights = None
    with pytest.raises(RuntimeError, match="are gone"):
        HELD(*stack.arguments())


def test_python_is_asked_only_where_something_changed():
    stack, asked = Stack(), []
    stack.cache = stack.cache.another(
        lambda: (asked.append(1), stack.tensors)[1], lambda: stack.places("tensors")
    )
    for expected in (1, 1, 1):
        HELD(*stack.arguments())
        assert len(asked) == expected
    stack.tensors[0] = stack.tensors[0].clone()
    HELD(*stack.arguments())
    assert len(asked) == 2
    del stack.__dict__["tensors"][3:]  # a list that became shorter
    with pytest.raises(RuntimeError, match="no such layer"):
        HELD(*stack.arguments())
    assert len(asked) == 3


VALUES: list[torch.Tensor] = [torch.arange(3)]


def values() -> list[torch.Tensor]:
    return VALUES


def test_copies_are_handles_of_their_own():
    one = held.Held(values)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other.tensor.data_ptr() != one.tensor.data_ptr()
        assert held.held_at(int(other.tensor[0])) not in (0, held.held_at(int(one.tensor[0])))
    copied = one.tensor.clone()  # of the tensor alone: good for as long as the handle is there
    assert held.held_at(int(copied[0])) == one.address()
    del one
    gc.collect()
    assert held.held_at(int(copied[0])) == 0


def test_tensors_are_held_as_long_as_the_handle():
    tensors = [torch.zeros(3)]
    handle, seen = held.Held(lambda: tensors), weakref.ref(tensors[0])
    handle.address()
    tensors[0] = torch.ones(3)
    assert seen() is not None  # until it is looked at again
    handle.address()
    gc.collect()
    assert seen() is None
    seen = weakref.ref(tensors.pop())
    del handle
    gc.collect()
    assert seen() is None


def test_opcheck():
    stack = Stack(2)
    torch.library.opcheck(HELD, stack.arguments(), test_utils=("test_schema", "test_faketensor"))
