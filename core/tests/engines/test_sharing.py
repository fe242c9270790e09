"""What engine adapters share: names to members, options, accounts, packed layers in a module."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from quant_core.build import Builder
from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.complete import check_floats
from quant_core.engines.packed import (
    Packed,
    attach,
    bind_embedding,
    bind_linear,
    bind_stack,
    gating_of,
    neutral,
    run_experts,
)
from quant_core.engines.sharing import Account, Names, Options, Piece, open_plan, roles_of
from quant_core.errors import CheckpointError, ConfigError, LayoutError
from quant_core.load import load_tensor
from quant_core.plan import Plan, plan
from quant_core.spec import Span

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture
def linear(fixtures: Path) -> Plan:
    return plan(open_checkpoint(fixtures / "gptqmodel-4bit-g128-asym-descact"))


@pytest.fixture
def mixed(fixtures: Path) -> Plan:
    return plan(open_checkpoint(fixtures / "ar-mixed-bits"))


@pytest.fixture
def experts(fixtures: Path) -> Plan:
    return plan(open_checkpoint(fixtures / "gguf-moe-q4_k_m"))


def builder(p: Plan) -> Builder:
    return Builder(plan=p, dtype=torch.float32)


def dense(p: Plan, *names: str) -> torch.Tensor:
    return torch.cat([load_tensor(p, n).dequantize() for n in names])


def packed(p: Plan, names: list[str], layer: nn.Module, name: str = "layer") -> Packed:
    pieces = [Piece.whole(p.members[n]) for n in names]
    with neutral():
        return attach(name, layer, bind_linear(builder(p), name, pieces))


def members(module: str) -> list[str]:
    return [module.replace("qkv_proj", m) for m in FUSED["qkv_proj"]]


# --------------------------------------------------------------------------------------- names


def test_fused_module_has_its_members_in_row_order(linear: Plan) -> None:
    found = Names(linear).of(QKV, FUSED)
    assert [m.layer.name for m in found] == members(QKV)


def test_names_follow_the_engines_own(linear: Plan) -> None:
    names = Names(linear, lambda n: "lm." + n if n.startswith("model.") else None)
    assert [m.layer.name for m in names.of("lm." + QKV, FUSED)] == members(QKV)
    assert names.of(QKV, FUSED) == []


def test_fused_module_that_lacks_a_member_is_an_error(linear: Plan) -> None:
    names = Names(linear, lambda n: None if ".k_proj." in n else n)
    with pytest.raises(CheckpointError, match="k_proj") as err:
        names.of(QKV, FUSED)
    assert err.value.code == "Q-TENSOR-MISSING"


@pytest.mark.parametrize("kind", ["default", "of_an_engine"])
def test_missing_float_is_named_whatever_an_engine_wrote_into_the_config(
    linear: Plan, kind: str
) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(linear.checkpoint.folder)
    config.rope_parameters["rope_type"] = kind
    check_floats(linear, config)
    lost = "model.norm.weight"
    found = {name: stored for name, stored in linear.dense.items() if name != lost}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight") as err:
        check_floats(replace(linear, dense=found), config)
    assert err.value.code == "Q-TENSOR-MISSING"
    assert config.rope_parameters["rope_type"] == kind


def test_account_names_members_that_no_layer_took(linear: Plan) -> None:
    account = Account(linear)
    account.take("all", linear.quantized.values())
    account.check()
    lost = "model.layers.1.mlp.down_proj"
    del account.taken[lost]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj") as err:
        account.check()
    assert err.value.code == "Q-TENSOR-UNEXPECTED"
    account.check(lambda name: "another stage" if name == lost else "")
    assert linear.ledger.skipped[f"{lost}.qweight"] == "another stage"


def test_experts_partly_quantized_are_an_error(experts: Plan) -> None:
    module = "model.layers.0.mlp.experts"
    stacks = Names(experts).below(module)
    roles = {f"{r}_proj": r for r in ("gate", "up", "down")}
    assert set(roles_of(experts, module, stacks, roles)) == {"gate", "up", "down"}
    with pytest.raises(CheckpointError, match="down") as err:
        roles_of(experts, module, {k: v for k, v in stacks.items() if "down" not in k}, roles)
    assert err.value.code == "Q-TENSOR-MISSING"


# ------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("block", "code"),
    [
        ({"onlin": "x"}, "Q-CFG-KEY"),
        ({"online": "x", "skip": "lm_head"}, "Q-CFG-TYPE"),
        ({"kernels": 3}, "Q-CFG-TYPE"),
        ({"requantize": True}, "Q-CFG-CONFLICT"),
    ],
)
def test_wrong_options_are_refused(block: dict[str, object], code: str) -> None:
    with pytest.raises(ConfigError) as err:
        Options.parse({"quant_method": "quant_core"} | block)
    assert err.value.code == code


def test_options_may_name_another_checkpoint(fixtures: Path) -> None:
    there = fixtures / "hf-fp8-block128"
    found = open_plan("/no/such/folder", Options(path=str(there)))
    assert found.quantized


# ------------------------------------------------------------------------------- packed layers


def test_fused_layer_is_the_members_side_by_side(linear: Plan) -> None:
    layer = nn.Module()
    module = packed(linear, members(QKV), layer)
    x = torch.randn(3, 256)
    want = x @ dense(linear, *members(QKV)).T
    # float32 sums in another order: 256 terms of size 1
    torch.testing.assert_close(module.call_linear(x), want, rtol=1e-4, atol=1e-4)
    assert all(n.startswith("packed0_") for n, _ in layer.named_parameters())


def test_unlike_members_are_parts_of_one_layer(experts: Plan) -> None:
    names = members(QKV)
    assert len({experts.members[n].scheme.weight for n in names}) == 2
    module = packed(experts, names, layer := nn.Module())
    assert len(module.parts) == 2
    want = dense(experts, *names)
    x = torch.randn(2, want.shape[1])
    torch.testing.assert_close(module.call_linear(x), x @ want.T, rtol=1e-4, atol=1e-4)
    assert len(list(layer.parameters()))


def test_layer_is_one_op_of_a_traced_graph(linear: Plan) -> None:
    layer = nn.Module()
    module = packed(linear, members(QKV), layer)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(lambda x: module.call_linear(x) * 2, backend=backend, fullgraph=True)
    x = torch.randn(2, 256)
    assert torch.equal(run(x), module.call_linear(x) * 2)
    calls = [n for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls[:-1]] == [torch.ops.quant_core.packed_linear]


def test_second_layer_of_one_name_has_a_key_of_its_own(linear: Plan) -> None:
    one, two = nn.Module(), nn.Module()
    first = packed(linear, ["model.layers.0.mlp.down_proj"], one, "same")
    second = packed(linear, ["model.layers.1.mlp.down_proj"], two, "same")
    x = torch.randn(1, 512)
    assert first.key != second.key
    assert not torch.equal(first.call_linear(x), second.call_linear(x))
    key = first.key
    del first
    gc.collect()
    assert packed(linear, ["model.layers.0.mlp.down_proj"], one, "same").key == key


def test_refill_keeps_addresses(linear: Plan) -> None:
    layer = nn.Module()
    module = packed(linear, ["model.layers.0.mlp.down_proj"], layer)
    x = torch.randn(1, 512)
    want = module.call_linear(x)
    before = [p.data_ptr() for p in layer.parameters()]
    piece = Piece.whole(linear.members["model.layers.0.mlp.down_proj"])
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert not torch.equal(module.call_linear(x), want)
    module.refill(bind_linear(builder(linear), "layer", [piece]))
    assert torch.equal(module.call_linear(x), want)
    assert [p.data_ptr() for p in layer.parameters()] == before


def test_refill_with_another_layer_is_refused(linear: Plan, mixed: Plan) -> None:
    module = packed(linear, ["model.layers.0.mlp.down_proj"], layer := nn.Module())
    other = Piece.whole(mixed.members["model.layers.0.mlp.down_proj"])
    with pytest.raises(LayoutError) as err:
        module.refill(bind_linear(builder(mixed), "layer", [other]))
    assert err.value.code == "Q-ENGINE-RELOAD"
    assert len(list(layer.parameters()))


def test_sizes_of_the_engine_are_checked(linear: Plan) -> None:
    member = linear.members["model.layers.0.mlp.down_proj"]
    piece = Piece(member=member, out=Span.whole(256), inp=Span.whole(1024))
    with pytest.raises(LayoutError, match="1024") as err:
        bind_linear(builder(linear), "layer", [piece])
    assert err.value.code == "Q-LAYOUT-SHAPE"


def test_embedding_serves_ids_and_a_tied_output(experts: Plan) -> None:
    name = "model.embed_tokens"
    layer = nn.Module()
    part = bind_embedding(builder(experts), "table", Piece.whole(experts.members[name]))
    table = attach("table", layer, [part])
    want = dense(experts, name)
    ids = torch.tensor([0, 5, 17])
    rows = table.call_embedding(ids, want.shape[1], torch.float32)
    torch.testing.assert_close(rows, want[ids], rtol=0, atol=0)
    x = torch.randn(2, want.shape[1])
    torch.testing.assert_close(table.call_linear(x), x @ want.T, rtol=1e-4, atol=1e-4)


def test_experts_of_a_rank_and_none_at_minus_one(experts: Plan) -> None:
    """Ranks hold half of the experts each: what they compute adds up to the whole."""
    module, b = "model.layers.0.mlp.experts", builder(experts)
    weights = {r: load_tensor(experts, f"{module}.{r}_proj").dequantize()
               for r in ("gate", "up", "down")}  # fmt: skip
    count, hidden = weights["gate"].shape[0], weights["gate"].shape[2]
    x, index = torch.randn(6, hidden), torch.stack([torch.randperm(count)[:2] for _ in range(6)])
    share = torch.rand(6, 2)
    want = torch.zeros(6, hidden)
    for t in range(6):
        for j in range(2):
            e = int(index[t, j])
            h = nn.functional.silu(weights["gate"][e] @ x[t]) * (weights["up"][e] @ x[t])
            want[t] += share[t, j] * (weights["down"][e] @ h)
    got = torch.zeros(6, hidden)
    for rank in range(2):
        held = list(range(rank * count // 2, (rank + 1) * count // 2))
        layer = nn.Module()
        stacks = {
            r: attach(f"{r}{rank}", layer,
                      [bind_stack(b, r, Piece.whole(experts.members[f"{module}.{r}_proj"]), held)],
                      f"packed_{r}")
            for r in weights
        }  # fmt: skip
        slots = torch.full((count,), -1)
        slots[held] = torch.arange(len(held))
        got += run_experts(
            stacks["gate"], stacks["up"], stacks["down"], gating_of(nn.functional.silu), x,
            slots[index], share,
        )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
