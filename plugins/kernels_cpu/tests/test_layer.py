"""The operator of a decoder layer: against plain torch, whatever the mask and the position say."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch

from cpu_layer import HEADS, HOW, ROOM, Made, near
from quant_core.errors import LayoutError
from quant_core.shared import weights_changed
from quant_kernels_cpu import layer as layer_module
from quant_kernels_cpu import native, ops
from quant_kernels_cpu.library import unavailable

if unavailable():
    pytest.skip(f"no CPU kernels: {unavailable()}", allow_module_level=True)

OP = torch.ops.quant_cpu.decoder_layer.default


def masks(batch: int) -> dict[str, torch.Tensor]:
    places = torch.arange(ROOM)
    causal = (places <= 5).expand(batch, 1, 1, ROOM)
    padded = causal.clone()
    padded[-1, ..., :3] = False
    heads = causal.expand(batch, HEADS, 1, ROOM).clone()
    heads[:, 1, :, 1:4] = False
    strided = torch.zeros(batch, 1, 1, 2 * ROOM, dtype=torch.bool)[..., ::2]
    strided.copy_(padded)
    return {
        "causal": causal,
        "padded": padded,
        "of each head": heads,
        "beyond the position": (places <= 9).expand(batch, 1, 1, ROOM),
        "all": torch.ones(1, 1, 1, ROOM, dtype=torch.bool),
        "without the new token": (places <= 4).expand(batch, 1, 1, ROOM),
        "added": torch.where(padded, 0.0, float("-inf")),
        "added, weighted": torch.where(causal, places / 4.0, -1e30),
        "strided": strided,
    }


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", list(masks(1)))
def test_the_mask_is_obeyed_whatever_it_says(isa, kind, batch):
    made, mask = Made(batch), masks(batch)[kind]
    want, _ = made.plain(mask)
    got = OP(*made.arguments(mask=mask))
    assert near(got, want)
    other, _ = made.plain(masks(batch)["causal"])
    if kind != "causal":  # the mask moves the result further than roundings do
        assert (got.double() - want).norm() < 0.5 * (want - other).norm()
    assert torch.equal(*(f(*made.arguments(mask=mask)) for f in (OP, layer_module.run_layer)))


@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize("at", [0, 5, ROOM - 1])
def test_the_new_token_is_written_where_the_position_says(isa, at, how):
    made = Made(2, at, **HOW[how])
    given = made.arguments()
    y, (keys, values) = OP(*given), given[6:8]
    want, written = made.plain(made.mask)
    assert near(y, want)
    assert near(keys[:, :, at], written)
    others = torch.arange(ROOM) != at
    assert torch.equal(keys[:, :, others], made.keys[:, :, others])
    assert torch.equal(values[:, :, others], made.values[:, :, others])
    assert not torch.equal(values[:, :, at], made.values[:, :, at])
    # what lies behind a position that the mask hides is never read
    hidden = made.keys.clone()
    hidden[:, :, at + 1 :] = float("nan")
    assert torch.equal(OP(*made.arguments(keys=hidden)), y)
    # the same bits as over a cache that ends there, and as the eager call
    cut = [made.keys[:, :, : at + 1].clone(), made.values[:, :, : at + 1].clone()]
    inputs = (made.buffers, made.norms, made.x, made.cos, made.sin)
    assert torch.equal(made.run(*inputs, *cut, None, made.scale, made.eps), y)
    both = made.keys.clone(), made.values.clone()
    assert torch.equal(made.run(*inputs, *both, made.mask, made.scale, made.eps, made.at), y)


def test_inputs_that_do_not_lie_dense_are_read_right(isa):
    made = Made(2)
    want = OP(*made.arguments())
    apart = torch.stack([made.x] * 2, -1)[..., 0]
    angles = [torch.stack([t] * 2, 1)[:, 0] for t in (made.cos, made.sin)]
    cache = made.keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert not apart.is_contiguous()
    got = OP(*made.arguments(x=apart, cos=angles[0], sin=angles[1], keys=cache))
    assert torch.equal(got, want)


def test_opcheck():
    made = Made(2)
    torch.library.opcheck(
        OP,
        made.arguments(),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_changed_buffers_are_seen_when_they_are_told_of(isa):
    made = Made()
    before = OP(*made.arguments())
    made.buffers = [[t.clone() for t in mine] for mine in made.buffers]
    made.buffers[0][0] ^= 1
    weights_changed()
    gc.collect()
    after = OP(*made.arguments())
    assert not torch.equal(after, before)
    assert torch.equal(after, layer_module.run_layer(*made.arguments()))


def test_wrong_arguments_are_errors_and_write_nothing(caplog):
    made = Made(2)
    if native._torch_library() is None:
        pytest.skip("this torch has no stable C ABI")
    wrong = {
        "x has other sizes": {"x": made.x[..., :32]},
        "keys have other sizes": {"keys": made.keys[:, :1]},
        "values have other sizes": {"values": made.values[:, :, :4]},
        "mask has other sizes": {"mask": made.mask[..., :4]},
        "mask is neither": {"mask": made.mask.long()},
        "angles have other sizes": {"cos": made.cos[..., :8]},
        "norm has another size": {"norms": (made.norms[0][:32], made.norms[1])},
        "another number of norms": {"norms": made.norms[:1]},
        "number of norms": {"eps": (1e-5,) * 5},
        "another dtype": {"x": made.x.float()},
        "not one number": {"at": torch.tensor([1, 2])},
        "not of int64": {"at": made.at.int()},
        "layout cannot be read": {"layout": "nonsense"},
        "no table of weights": {"table": made.table.tensor[:-1]},
        "not those that the graph": {"table": torch.zeros_like(made.table.tensor)},
        "outside of the cache": {"at": torch.tensor([ROOM])},
    }
    for words, changes in wrong.items():
        given = made.arguments(**changes)
        cache = [t.clone() for t in given[6:8]]
        with pytest.raises(RuntimeError, match=words):
            OP(*given)
        assert all(torch.equal(a, b) for a, b in zip(cache, given[6:8])), words
    with pytest.raises(RuntimeError, match="outside of the cache"):
        OP(*made.arguments(at=torch.tensor([-1])))
    other = replace(made.run.layout, mark=1)
    with pytest.raises(RuntimeError, match="not those that the graph"):
        OP(*made.arguments(layout=other.text()))
    assert "is gone, or was none" in caplog.text
    with pytest.raises(LayoutError) as caught:
        made.run(
            made.buffers, made.norms, made.x, made.cos, made.sin, made.keys, made.values,
            made.mask, made.scale, made.eps, torch.tensor([ROOM]),
        )  # fmt: skip
    assert caught.value.code == "Q-LAYOUT-INPUT"
    made.buffers[0][0] = made.buffers[0][0][:-1]
    weights_changed()
    with pytest.raises(LayoutError):
        layer_module.run_layer(*made.arguments())


class Holder:
    """What a table asks, as a model's layers are asked."""

    def __init__(self, buffers: list[list[torch.Tensor]]) -> None:
        self.buffers = buffers

    def __call__(self) -> list[list[torch.Tensor]]:
        return self.buffers


def test_copies_of_a_table_are_tables_of_their_own():
    made = Made()
    table = made.run.table(Holder(made.buffers))
    want = OP(*made.arguments(table=table.tensor))
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        other.values.buffers[6][0].zero_()
        got = OP(*made.arguments(table=other.tensor))
        assert not torch.equal(got, want)
    assert torch.equal(OP(*made.arguments(table=table.tensor)), want)
    copied = table.tensor.clone()  # of the tensor alone: good for as long as the table is there
    for op in (OP, layer_module.run_layer):
        assert torch.equal(op(*made.arguments(table=copied)), want)
    del table, other
    gc.collect()
    for op in (OP, layer_module.run_layer):
        with pytest.raises(RuntimeError if op is OP else LayoutError):
            op(*made.arguments(table=copied))


def test_calls_keep_nothing():
    made = Made()
    assert ops.has_native or native._torch_library() is None
    import weakref

    given = made.arguments()
    seen = [weakref.ref(t) for t in given if isinstance(t, torch.Tensor) and t is not made.x]
    kept = {id(t) for t in (*made.norms, made.table.tensor, made.cos, made.sin, made.mask, made.at)}
    OP(*given)
    del given
    gc.collect()
    assert all(r() is None or id(r()) in kept for r in seen)
