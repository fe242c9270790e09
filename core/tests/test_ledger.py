"""Who may claim a stored tensor."""

from __future__ import annotations

import pytest
import torch

import toy
from quant_core.errors import CheckpointError
from quant_core.ledger import Ledger

PART = ("m.rotation.weight", ())


@pytest.fixture
def ledger():
    return Ledger(toy.MemoryCheckpoint({PART[0]: torch.ones(2, 2)}, {}))


def test_part_has_one_owner_unless_all_share_it(ledger):
    ledger.claim(PART, "first", shared=True)
    ledger.claim(PART, "second", shared=True)
    assert ledger.is_claimed(PART[0])
    assert ledger.unclaimed() == []
    ledger.load(PART)
    ledger.check_loaded()


@pytest.mark.parametrize("shares", [(False, False), (True, False), (False, True)])
def test_second_owner_of_an_unshared_part_is_refused(ledger, shares):
    ledger.claim(PART, "first", shared=shares[0])
    with pytest.raises(CheckpointError, match="'first' and 'second'") as err:
        ledger.claim(PART, "second", shared=shares[1])
    assert err.value.code == "Q-TENSOR-DUPLICATE"
