"""A cache that grows in place: nobody who holds a part of it sees a change."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from quant_core.engines.transformers_room import room_of

pytest.importorskip("transformers")
from transformers.cache_utils import DynamicLayer


def filled(length=5):
    layer = DynamicLayer()
    g = torch.Generator().manual_seed(0)
    layer.update(*(torch.randn(1, 2, length, 4, generator=g) for _ in range(2)))
    return layer


def write(layer, value):
    """What a kernel does: the last position of both views."""
    room = room_of(layer)
    for t in room.next:
        t[:, :, -1] = value
    room.take(layer)


def test_tokens_are_appended_like_concatenation():
    layer, own = filled(), filled()
    new = torch.ones(1, 2, 1, 4)
    for step in range(200):  # over several buffers
        write(layer, step)
        own.update(new * step, new * step)
    assert torch.equal(layer.keys, own.keys)
    assert torch.equal(layer.values, own.values)
    assert layer.get_seq_length() == own.get_seq_length() == 205


def test_the_buffer_is_kept_while_it_lasts():
    layer = filled()
    write(layer, 1)
    places = set()
    for step in range(40):
        write(layer, step)
        places.add(layer.keys.data_ptr())
    assert len(places) == 1


def test_what_somebody_holds_does_not_change():
    layer = filled()
    write(layer, 1)
    held, was = layer.keys, layer.keys.clone()
    for step in range(100):
        write(layer, step)
    assert torch.equal(held, was)


@pytest.mark.parametrize("how", ["shallow", "deep", "pickle"])
def test_copies_grow_apart(how):
    layer = filled()
    write(layer, 1)
    other = {
        "shallow": copy.copy, "deep": copy.deepcopy,
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    }[how](layer)  # fmt: skip
    for step in range(3):
        write(layer, 10 + step)
        write(other, 20 + step)
    assert layer.keys[0, 0, 6:, 0].tolist() == [10, 11, 12]
    assert other.keys[0, 0, 6:, 0].tolist() == [20, 21, 22]
    assert torch.equal(layer.keys[:, :, :6], other.keys[:, :, :6])


def test_a_rejected_token_is_written_over():
    """Assisted decoding goes back: to the same position, or to a view held before."""
    layer = filled()
    write(layer, 1)
    before = layer.keys, layer.values
    write(layer, 2)
    layer.crop(-1)
    write(layer, 3)
    assert layer.keys[0, 0, 5:, 0].tolist() == [1, 3]
    later = layer.keys
    layer.keys, layer.values = before
    write(layer, 4)
    assert layer.keys[0, 0, 5:, 0].tolist() == [1, 4]
    assert later[0, 0, 5:, 0].tolist() == [1, 3]


def test_reordering_and_updates_of_transformers_go_on_from_what_they_left():
    layer = filled()
    layer.batch_repeat_interleave(2)
    write(layer, 1)
    layer.reorder_cache(torch.tensor([1, 1]))
    write(layer, 2)
    layer.update(torch.full((2, 2, 2, 4), 7.0), torch.full((2, 2, 2, 4), 8.0))
    write(layer, 3)
    assert layer.keys[1, 1, 5:, 0].tolist() == [1, 2, 7, 7, 3]
    assert layer.values[1, 1, 5:, 0].tolist() == [1, 2, 8, 8, 3]
