"""4-bit and int8 layers: values, the way back, fused and stacked members."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from quant_core.build import Builder
from quant_core.errors import LayoutError
from quant_core.load import load_tensor, read_matrix
from quant_core.rewrites import slice_out
from quant_core.spec import Packing

SIZES = [(4, 128), (8, 32), (3, 96), (5, 7), (6, 48), (3, 11), (130, 64)]
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("nested", [0, 4, 256])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_four_bit_weights_equal_the_formula_and_come_back(write, bnb, n, k, nested):
    stored, weight = bnb.four_bit(n, k, nested=nested)
    config = bnb.FOUR | {"bnb_4bit_use_double_quant": bool(nested)}
    planned = bnb.plan(write(bnb.named(stored), config))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    assert torch.equal(lt.dequantize(), weight)
    back = member.scheme.serialize(member.layer, lt)
    assert back.keys() == stored.keys()
    for name, want in stored.items():
        assert torch.equal(back[name], want), name
        assert back[name].dtype == want.dtype, name


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_block_sizes(write, bnb, block):
    stored, weight = bnb.four_bit(10, 160, block=block, kind="fp4")
    config = bnb.FOUR | {"bnb_4bit_quant_type": "fp4"}
    planned = bnb.plan(write(bnb.named(stored), config))
    assert torch.equal(load_tensor(planned, bnb.NAME).dequantize(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_bytes_stored_under_another_dtype(write, bnb, dtype):
    stored, weight = bnb.four_bit(8, 64)
    stored["weight"] = stored["weight"].view(-1).view(dtype).view(-1, 1)
    planned = bnb.plan(write(bnb.named(stored), bnb.FOUR))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    assert torch.equal(lt.dequantize(), weight)
    back = member.scheme.serialize(member.layer, lt)["weight"]
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), stored["weight"].view(torch.uint8))


def test_low_nibble_first_misses_the_weights(write, bnb):
    stored, weight = bnb.four_bit(8, 64)
    (lt,) = load_tensor(bnb.plan(write(bnb.named(stored), bnb.FOUR)), bnb.NAME).matrices
    swapped = replace(lt.weight, packing=Packing())
    assert not torch.allclose(swapped.dequantize(), weight, atol=0.1)


def test_int8_weights_are_rows_over_127_and_come_back(write, bnb):
    stored, weight = bnb.int8(5, 24)
    planned = bnb.plan(write(bnb.named(stored), bnb.EIGHT))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    # three float32 roundings against one
    assert ((lt.dequantize() - weight).abs() <= 2 * EPS * weight.abs()).all()
    back = member.scheme.serialize(member.layer, lt)
    assert all(torch.equal(back[name], want) for name, want in stored.items())


def test_int8_without_weight_format_is_written_without_it(write, bnb):
    stored, _ = bnb.int8(5, 24)
    del stored["weight_format"]
    planned = bnb.plan(write(bnb.named(stored), bnb.EIGHT))
    (member,) = planned.quantized.values()
    back = member.scheme.serialize(member.layer, read_matrix(planned, member))
    assert back.keys() == stored.keys()


def test_bias_is_kept(write, bnb):
    stored, _ = bnb.four_bit(4, 64)
    bias = torch.randn(4, dtype=torch.bfloat16)
    planned = bnb.plan(write(bnb.named(stored | {"bias": bias}), bnb.FOUR))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    assert torch.equal(member.scheme.serialize(member.layer, lt)["bias"], bias)


@pytest.mark.parametrize("sizes", [((64, 256), (32, 256)), ((3, 96), (5, 96)), ((7, 64), (2, 64))])
def test_fused_members_equal_the_single_ones_and_are_restored(write, bnb, sizes):
    tensors, names = {}, []
    for i, (n, k) in enumerate(sizes):
        stored, _ = bnb.four_bit(n, k, nested=4, seed=i)
        if i:  # one table for all, as the tool has it
            for leaf in ("weight.quant_map", "weight.nested_quant_map"):
                stored[leaf] = tensors[f"{names[0]}.{leaf}"]
        names.append(f"model.layers.0.self_attn.{'qkv'[i]}_proj")
        tensors |= bnb.named(stored, names[-1])
    config = bnb.FOUR | {"bnb_4bit_use_double_quant": True}
    planned = bnb.plan(write(tensors, config))
    members = [planned.members[n] for n in names]
    weights = [load_tensor(planned, n).dequantize() for n in names]
    builder = Builder(plan=planned, dtype=torch.float64)
    module = builder.linear("qkv", members)
    x = torch.randn(3, sizes[0][1], dtype=torch.float64)
    want = x @ torch.cat(weights).double().T
    assert torch.allclose(module(x), want, rtol=1e-12, atol=1e-12)  # float64 summation order
    whole, row = module.restore(), 0
    for member in members:
        part = slice_out(whole, row, row + member.scheme.shape[0])
        row += member.scheme.shape[0]
        back = member.scheme.serialize(member.layer, part)
        for leaf, t in back.items():
            assert torch.equal(t, tensors[f"{member.layer.stored}.{leaf}"]), leaf


def test_experts_with_descriptions_of_unequal_length_load_as_one_stack(write, bnb):
    tensors, weights = {}, []
    for e in range(3):
        stored, weight = bnb.four_bit(4, 64, nested=4, seed=e)
        tensors |= bnb.named(stored, f"model.layers.0.mlp.experts.{e}.up_proj")
        weights.append(weight)
    lengths = {len(t) for name, t in tensors.items() if "quant_state" in name}
    assert len(lengths) > 1  # the case this is about
    config = bnb.FOUR | {"bnb_4bit_use_double_quant": True}
    planned = bnb.plan(write(tensors, config))
    loaded = load_tensor(planned, "model.layers.0.mlp.experts.up_proj")
    assert torch.equal(loaded.dequantize(), torch.stack(weights))
    (member,) = planned.quantized.values()
    for e, lt in enumerate(loaded.matrices):
        for leaf, t in member.scheme.serialize(member.layer, lt).items():
            assert torch.equal(t, tensors[f"model.layers.0.mlp.experts.{e}.up_proj.{leaf}"])


def test_expert_of_another_block_size_is_refused(write, bnb):
    tensors = {}
    for e, block in enumerate((64, 32)):
        stored, _ = bnb.four_bit(4, 64, block=block)
        if e:
            stored["weight.absmax"] = stored["weight.absmax"][:4]
        tensors |= bnb.named(stored, f"model.layers.0.mlp.experts.{e}.up_proj")
    planned = bnb.plan(write(tensors, bnb.FOUR))
    with pytest.raises(LayoutError, match="block 32") as err:
        load_tensor(planned, "model.layers.0.mlp.experts.up_proj")
    assert err.value.code == "Q-LAYOUT-FUSED"


def test_another_meaning_is_not_written(write, bnb):
    stored, _ = bnb.four_bit(4, 64)
    planned = bnb.plan(write(bnb.named(stored), bnb.FOUR))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    scales = (replace(lt.weight.spec.scales[0], inverse=True),)
    odd = replace(lt.weight, spec=replace(lt.weight.spec, scales=scales))
    with pytest.raises(LayoutError) as err:
        member.scheme.serialize(member.layer, replace(lt, operands={"weight": odd}))
    assert err.value.code == "Q-LAYOUT-REPRESENT"


@pytest.mark.parametrize("leaf", ["weight.absmax", "weight.quant_map", "SCB"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_and_tables_that_are_not_finite_are_refused(write, bnb, leaf, bad):
    eight = leaf == "SCB"
    stored, _ = bnb.int8(4, 64) if eight else bnb.four_bit(4, 64)
    stored[leaf][1] = bad
    planned = bnb.plan(write(bnb.named(stored), bnb.EIGHT if eight else bnb.FOUR))
    with pytest.raises(LayoutError, match=bnb.NAME) as err:
        load_tensor(planned, bnb.NAME)
    assert err.value.code == "Q-VALUE-SCALE"


def test_config_of_a_plan_is_the_one_it_was_read_from(write, bnb):
    import quant_plugin_bitsandbytes as plugin

    stored, _ = bnb.four_bit(4, 64)
    planned = bnb.plan(write(bnb.named(stored), bnb.FOUR))
    assert plugin.make_config(planned) == bnb.FOUR
    planned.match = None
    made = plugin.make_config(planned)
    assert {k: made[k] for k in bnb.FOUR} == bnb.FOUR
    assert json.dumps(made)
