"""Random layers through plan and loader, both ways; values that must fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.errors import LayoutError
from quant_core.load import read_matrix
from quant_core.packing import repack, unpack
from quant_core.spec import CANONICAL, Packing, Transform

N, K, G = 24, 96, 32


def load(ct, write, stored, config):
    planned = ct.plan(write(ct.named(stored), config))
    member = planned.members[ct.NAME]
    return member, read_matrix(planned, member)


def same_bytes(member, lt, stored):
    back = member.scheme.serialize(member.layer, lt)
    assert back.keys() == stored.keys()
    for name, want in stored.items():
        assert back[name].dtype == want.dtype, name
        assert torch.equal(back[name], want), name


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("version", ["0.17.1", "0.18.0"])
def test_packed_layer_reads_and_writes_exactly(ct, write, bits, asym, version):
    pad = version == "0.17.1"
    codes, scale, zeros = ct.random_layer(N, K, G, bits)
    stored = ct.packed_layer(codes, scale, zeros if asym else None, bits=bits, pad=pad)
    stored["bias"] = torch.randn(N).half()
    config = ct.block(ct.args(bits, G, symmetric=not asym), version=version)
    member, lt = load(ct, write, stored, config)
    assert torch.equal(lt.dequantize(), ct.dense(codes, scale, zeros if asym else 1 << bits - 1, G))
    assert torch.equal(lt.bias, stored["bias"])
    same_bytes(member, lt, stored)
    qt = lt.weight  # codes may come back in another packing
    moved = repack(qt.codes, bits, (N, K), qt.packing, CANONICAL)
    lt.operands["weight"] = replace(qt, codes=moved, packing=CANONICAL)
    same_bytes(member, lt, stored)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("size", [None, -1])
def test_packed_layer_with_one_scale_a_row_or_for_all(ct, write, bits, size):
    k = 100  # no multiple of a word: only weight_shape tells K
    codes, _, _ = ct.random_layer(N, k, k, bits)
    scale = torch.rand(N, 1).half() if size else torch.rand(1)
    stored = ct.packed_layer(codes, scale, bits=bits)
    member, lt = load(ct, write, stored, ct.block(ct.args(bits, size)))
    assert member.scheme.shape == (N, k)
    assert torch.equal(lt.dequantize(), ct.dense(codes, scale.view(-1, 1), 1 << bits - 1, k))
    same_bytes(member, lt, stored)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_layer_with_plain_int8_zeros(ct, write, bits):
    codes, scale, zeros = ct.random_layer(N, K, G, bits)
    stored = ct.packed_layer(codes, scale, bits=bits)
    stored["weight_zero_point"] = (zeros.int() - (1 << bits - 1)).to(torch.int8)
    config = ct.block(ct.args(bits, G, symmetric=False), version="0.8.0")
    member, lt = load(ct, write, stored, config)
    assert torch.equal(lt.dequantize(), ct.dense(codes, scale, zeros, G))
    same_bytes(member, lt, stored)


def float_zeros(ct, dtype, zeros):
    """A layer of blocks of one row, which are the ones whose zero points are not packed."""
    codes, scale, _ = ct.random_layer(N, K, G, 4)
    stored = ct.packed_layer(codes, scale.to(dtype), bits=4)
    stored["weight_zero_point"] = zeros.to(dtype)
    args = ct.args(4, None, strategy="block", block_structure=[1, G], symmetric=False)
    return codes, stored, ct.block(args | {"zp_dtype": str(dtype)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_layer_with_float_zeros_reads_and_writes_exactly(ct, write, dtype):
    """(v - z) * s with v = c - 8, as the library's dequantize says (compressed-tensors 0.20.0)."""
    zeros = (torch.randn(N, K // G) * 4).to(dtype) - 8
    zeros = ((zeros + 8) - 8).to(dtype)  # as ours are: 8 more is a number of the type
    codes, stored, config = float_zeros(ct, dtype, zeros)
    member, lt = load(ct, write, stored, config)
    wide = [
        stored[n].float().repeat_interleave(G, 1) for n in ("weight_zero_point", "weight_scale")
    ]
    assert torch.equal(lt.dequantize(), (codes.float() - (wide[0] + 8)) * wide[1])
    same_bytes(member, lt, stored)


def test_float_zeros_that_lose_digits_beside_unsigned_codes_are_refused(ct, write):
    _, stored, config = float_zeros(ct, torch.float32, torch.full((N, K // G), 1e-9))
    with pytest.raises(LayoutError, match="72 of 72 values lose digits") as caught:
        load(ct, write, stored, config)
    assert caught.value.code == "Q-VALUE-ZERO"


def test_float_zeros_wider_than_the_scale_are_refused(ct, write):
    """The library would compute them in the type of the scale."""
    _, stored, config = float_zeros(ct, torch.float32, torch.zeros(N, K // G))
    stored["weight_scale"] = stored["weight_scale"].half()
    with pytest.raises(LayoutError, match="weight_zero_point") as caught:
        load(ct, write, stored, config)
    assert caught.value.code == "Q-LAYOUT-DTYPE"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("fmt", ["int-quantized", "naive-quantized"])
def test_int8_storage_reads_and_writes_exactly(ct, write, bits, asym, fmt):
    half = 1 << bits - 1
    codes, scale, zeros = ct.random_layer(N, K, G, bits)
    stored = {"weight": (codes.int() - half).to(torch.int8), "weight_scale": scale}
    if asym:
        stored["weight_zero_point"] = (zeros.int() - half).to(torch.int8)
    config = ct.block(ct.args(bits, G, symmetric=not asym), format=fmt)
    member, lt = load(ct, write, stored, config)
    assert torch.equal(lt.dequantize(), ct.dense(codes, scale, zeros if asym else half, G))
    assert lt.weight.codes.nbytes == N * K * bits // 8
    same_bytes(member, lt, stored)


def test_static_input_scale_and_zero_are_kept(ct, write):
    stored = {
        "weight": torch.randint(-128, 128, (N, K), dtype=torch.int8),
        "weight_scale": torch.rand(N, 1).bfloat16(),
        "input_scale": torch.tensor([0.02]).bfloat16(),
        "input_zero_point": torch.tensor([-37], dtype=torch.int8),
    }
    inputs = {"num_bits": 8, "strategy": "tensor", "symmetric": False}
    config = ct.block(ct.args(8, -1), inputs, format="int-quantized")
    member, lt = load(ct, write, stored, config)
    spec = member.scheme.operands["input"]
    assert (spec.element.name, spec.scales[0].element, spec.scales[0].static) == (
        "int8", "bf16", True,
    )  # fmt: skip
    assert lt.input_zero.view(torch.int8).tolist() == [-37]
    same_bytes(member, lt, stored)


@pytest.mark.parametrize("pad", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_activation_order_with_packed_zeros(ct, write, bits, pad):
    codes, scale, zeros = ct.random_layer(N, K, G, bits)
    g_idx = torch.arange(K)[torch.randperm(K)] % (K // G)
    stored = ct.packed_layer(codes, scale, zeros, bits=bits, pad=pad)
    stored["weight_g_idx"] = g_idx.to(torch.int32)
    args = ct.args(bits, G, symmetric=False, actorder="group")
    member, lt = load(ct, write, stored, ct.block(args, version="0.10.0" if pad else "0.18.0"))
    want = (codes.float() - zeros[:, g_idx].float()) * scale[:, g_idx].float()
    assert torch.equal(lt.dequantize(), want)
    same_bytes(member, lt, stored)


def test_plain_order_in_g_idx_needs_no_gather(ct, write):
    codes, scale, _ = ct.random_layer(N, K, G, 4)
    stored = ct.packed_layer(codes, scale, bits=4)
    stored["weight_g_idx"] = (torch.arange(K) // G).to(torch.int32)
    for actorder in (None, "group"):
        member, lt = load(ct, write, stored, ct.block(ct.args(4, G, actorder=actorder)))
        assert lt.weight.gather is None
        same_bytes(member, lt, stored)


# -------------------------------------------------------------------------------- what must fail


def _layer(ct, **changes):
    codes, scale, _ = ct.random_layer(N, K, G, 4)
    return ct.packed_layer(codes, scale, bits=4) | changes


def raises(ct, write, stored, config, code, match):
    with pytest.raises(LayoutError, match=match) as err:
        load(ct, write, stored, config)
    assert err.value.code == code
    assert ct.NAME in str(err.value)


def test_weight_shape_of_another_layer_raises(ct, write):
    stored = _layer(ct, weight_shape=torch.tensor([N, K + 32]))
    raises(ct, write, stored, ct.block(ct.args(4, G)), "Q-LAYOUT-SHAPE", "weight_shape")


@pytest.mark.parametrize(
    ("g_idx", "actorder"),
    [
        (torch.full((K,), -1), "group"),
        (torch.full((K,), K // G), "group"),
        (torch.arange(K).flip(0) // G, None),
    ],
    ids=["negative", "too large", "denied by the config"],
)
def test_bad_g_idx_raises(ct, write, g_idx, actorder):
    stored = _layer(ct, weight_g_idx=g_idx.to(torch.int32))
    config = ct.block(ct.args(4, G, actorder=actorder))
    raises(ct, write, stored, config, "Q-VALUE-GIDX", "weight_g_idx")


def test_int8_value_outside_its_bits_raises(ct, write):
    weight = torch.zeros(N, K, dtype=torch.int8)
    weight[3, 5] = 8
    stored = {"weight": weight, "weight_scale": torch.rand(N, K // G).half()}
    config = ct.block(ct.args(4, G), format="int-quantized")
    raises(ct, write, stored, config, "Q-VALUE-CODE", "-8 to 7")


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
def test_bad_input_scale_raises(ct, write, value):
    stored = {
        "weight": torch.zeros(N, K, dtype=torch.int8),
        "weight_scale": torch.rand(N, 1).half(),
        "input_scale": torch.tensor([value]).half(),
    }
    inputs = {"num_bits": 8, "strategy": "tensor"}
    config = ct.block(ct.args(8, -1), inputs, format="int-quantized")
    raises(ct, write, stored, config, "Q-VALUE-SCALE", "input_scale")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weight_scale_raises(ct, write, value):
    stored = _layer(ct)
    stored["weight_scale"][2, 1] = value
    raises(ct, write, stored, ct.block(ct.args(4, G)), "Q-VALUE-SCALE", "1 of 72")


def test_what_the_format_cannot_hold_raises(ct, write):
    member, lt = load(ct, write, _layer(ct), ct.block(ct.args(4, G)))
    qt = lt.weight
    spec = replace(qt.spec, element=replace(qt.spec.element, name="uint3", bits=3))
    rotation = Transform(site="input", kind="hadamard", key="r")
    gathered = replace(qt, gather=torch.arange(K, dtype=torch.int32))
    for bad in (
        replace(lt, operands={"weight": replace(qt, spec=spec)}),
        replace(lt, operands={"weight": gathered}),
        replace(lt, input_scale=torch.ones(1)),
        replace(lt, acc_bias=torch.ones(N, dtype=torch.int32)),
        replace(lt, transforms=((rotation, ()),)),
    ):
        with pytest.raises(LayoutError) as err:
            member.scheme.serialize(member.layer, bad)
        assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_constant_zero_is_written_as_stored_zeros(ct, write):
    codes, scale, zeros = ct.random_layer(N, K, G, 4)
    asym = ct.packed_layer(codes, scale, torch.full_like(zeros, 8), bits=4)
    member, _ = load(ct, write, asym, ct.block(ct.args(4, G, symmetric=False)))
    _, sym = load(ct, write, _layer(ct), ct.block(ct.args(4, G)))
    back = member.scheme.serialize(member.layer, sym)
    want = unpack(back["weight_zero_point"], 4, zeros.shape, Packing(word="int32", axis="out"))
    assert bool((want == 8).all())
