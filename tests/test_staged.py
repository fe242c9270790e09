"""New tensors in place of a checkpoint's: the same layout or an error, whatever an engine sends."""

from __future__ import annotations

import pytest
import torch

from checkpoint_sets import FIXTURES
from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.staged import check_described, staged_plan, stored_names
from quant_core.errors import CheckpointError, LayoutError
from quant_core.load import read_matrix
from quant_core.plan import Plan, plan

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(params=["bnb-nf4-dq", "hqq-4bit-g64"])
def made(request: pytest.FixtureRequest) -> Plan:
    return plan(open_checkpoint(FIXTURES / request.param))


def values_of(made: Plan) -> dict[str, torch.Tensor]:
    names = stored_names(made, [made.members[MODULE]])
    return {n: made.checkpoint.read(n) for n in names}


def test_same_values_give_the_same_matrix(made: Plan) -> None:
    member = made.members[MODULE]
    want = read_matrix(made, member)
    got = read_matrix(staged_plan(made, values_of(made)), member)
    assert torch.equal(got.weight.codes, want.weight.codes)
    assert all(map(torch.equal, got.weight.scales, want.weight.scales))


def test_changed_description_is_refused(made: Plan) -> None:
    values = values_of(made)
    told = sorted(made.checkpoint.described_by & values.keys())
    assert told, "planning read nothing"
    for name in told:
        other = values[name].clone()
        other.view(-1).view(torch.uint8)[0] ^= 1
        with pytest.raises(LayoutError) as err:
            check_described(made, name, other)
        assert err.value.code == "Q-ENGINE-RELOAD"
        assert name in str(err.value)
        with pytest.raises(LayoutError):
            staged_plan(made, values | {name: other})


def test_other_shape_and_absent_tensor_are_named(made: Plan) -> None:
    values, member = values_of(made), made.members[MODULE]
    name = next(n for n in values if n not in made.checkpoint.described_by)
    with pytest.raises(LayoutError, match="was") as err:
        read_matrix(staged_plan(made, values | {name: values[name].flatten()[:-1]}), member)
    assert err.value.code == "Q-ENGINE-RELOAD"
    del values[name]
    with pytest.raises(CheckpointError) as missing:
        read_matrix(staged_plan(made, values), member)
    assert missing.value.code == "Q-TENSOR-MISSING"
