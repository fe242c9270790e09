"""The adapter without the library: what it declines, and the order it hands weights over in."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch

from quant_core.kernels.base import Accepted, Rejected
from quant_core.packing import pack
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    OpSpec,
    QuantSpec,
    Scale,
    Zero,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_kernels_humming import kernel as module
from quant_kernels_humming.kernel import Humming
from quant_kernels_humming.layout import configs, tensors_of
from quant_kernels_humming.ops import blocks_of

BF = Scale(element="bf16", grain=group(128))
FP4 = Element(name="fp4_e2m1", bits=4, kind="float")
FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
U4 = QuantSpec(element=Element.uint(4), scales=(BF,), zero=Zero(kind="const", value=8))
U4Z = replace(U4, zero=Zero(kind="code"))
U4ROW = replace(U4, scales=(Scale(element="bf16", grain=CHANNEL),))
U5 = replace(U4, element=Element.uint(5), zero=Zero(kind="const", value=16))
N, K = 64, 256


def op_of(spec, acts=None, **changes):
    operands = (("weight", spec), *((("input", acts),) if acts else ()))
    op = OpSpec(
        op="linear", operands=operands, sizes=(("n", N), ("k", K), ("k_stored", K)),
        device=("cuda", "9.0"),
    )  # fmt: skip
    return replace(op, **changes)


def test_absent_library_is_the_reason(monkeypatch):
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    answer = Humming().accepts(op_of(U4))
    assert isinstance(answer, Rejected)
    assert (answer.axis, answer.have) == ("library", "not installed")


def test_other_device_is_the_reason_before_the_library():
    answer = Humming().accepts(op_of(U4, device=("cpu", "")))
    assert isinstance(answer, Rejected)
    assert answer.axis == "device"


def test_unknown_version_is_refused(monkeypatch):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "1.0.0")
    answer = Humming().accepts(op_of(U4))
    assert isinstance(answer, Rejected)
    assert answer.have == "version 1.0.0"


def test_accepted_behind_all_kernels_that_share_their_weights(monkeypatch):
    monkeypatch.setattr(module, "_unavailable", lambda: "")
    answer = Humming().accepts(op_of(U4))
    assert isinstance(answer, Accepted)
    assert answer.cost > 1e5
    assert "second copy" in answer.note


def token(element):
    return QuantSpec(element=element, scales=(Scale(element="f32", grain=CHANNEL, static=False),))


INT8 = QuantSpec(element=Element.int(8), scales=(Scale(element="bf16", grain=CHANNEL),))
E4 = QuantSpec(element=FP8, scales=(Scale(element="bf16", grain=CHANNEL),))
BLOCK = QuantSpec(element=FP8, scales=(Scale(element="f32", grain=(128, 128)),))
BLOCK16 = QuantSpec(element=FP8, scales=(Scale(element="bf16", grain=(128, 128)),))
MX = QuantSpec(element=FP4, scales=(Scale(element="e8m0", grain=group(32)),))
NV = QuantSpec(
    element=FP4,
    scales=(Scale(element="fp8_e4m3", grain=group(16)), Scale(element="f32", grain=TENSOR)),
)
BY128 = QuantSpec(element=FP8, scales=(Scale(element="f32", grain=group(128), static=False),))


@pytest.mark.parametrize(
    ("spec", "acts", "weight", "inputs"),
    [
        (U4, None, {"dtype": "uint4", "group_size": 128}, None),
        (U4Z, None, {"dtype": "uint4", "group_size": 128, "has_zero_point": True}, None),
        (INT8, None, {"dtype": "uint8", "group_size": 0}, None),
        (INT8, token(Element.int(8)), {"dtype": "uint8", "group_size": 0}, {"dtype": "int8"}),
        (E4, token(FP8), {"dtype": "float8e4m3", "group_size": 0}, {"dtype": "float8e4m3"}),
        (
            BLOCK, BY128, {"dtype": "float8e4m3", "group_size": 128, "group_size_n": 128},
            {"dtype": "float8e4m3", "group_size": 128},
        ),
        (
            BLOCK16, BY128, {"dtype": "float8e4m3", "group_size": 128, "group_size_n": 128},
            {"dtype": "float8e4m3", "group_size": 128},
        ),
        (U4, token(FP8), {"dtype": "uint4", "group_size": 128}, {"dtype": "float8e4m3"}),
        (U4ROW, token(Element.int(8)), {"dtype": "uint4", "group_size": 0}, {"dtype": "int8"}),
        (MX, None, {"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}, None),
        (
            NV, None,
            {"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3",
             "scale_2_type": "tensor"}, None,
        ),
    ],
)  # fmt: skip
def test_operations_become_the_librarys_configs(spec, acts, weight, inputs):
    assert configs(op_of(spec, acts)) == (weight, inputs)


@pytest.mark.parametrize(
    ("op", "axis"),
    [
        (op_of(U4, op="embedding"), "op"),
        (op_of(U4, op="quantize_activations", sizes=(("k", K),)), "op"),
        (op_of(U4, act_dtype="float32"), "act_dtype"),
        (op_of(U4, act_dtype="float16"), "scales"),  # bf16 scales would be rounded
        (op_of(U4, sizes=(("n", 60), ("k", K))), "sizes"),
        (op_of(replace(U4, zero=Zero(kind="const", value=7))), "zero"),
        (op_of(replace(U4, zero=Zero(kind="offset", levels=(BF,)))), "element"),
        (op_of(replace(U4, scales=(BF, BF))), "scales"),
        (op_of(replace(U4, gather=True)), "weight"),
        (op_of(U4, token(Element.int(8))), "input"),  # scales of groups would be rounded
        (op_of(U5, token(FP8)), "input"),  # fp8_e4m3 does not hold five bits
        (op_of(U4, features=frozenset({"bias", "bias:float32"})), "features"),
    ],
)
def test_what_the_library_has_not_is_rejected_by_name(op, axis):
    answer = configs(op)
    assert isinstance(answer, Rejected)
    assert answer.axis == axis


def _words(codes, bits):
    """The loop of humming's pack_weight.cuh, one code at a time."""
    out = [0] * (len(codes) * bits // 32)
    for i, c in enumerate(codes):
        word, offset = divmod(i * bits, 32)
        out[word] |= c << offset & 0xFFFFFFFF
        if offset + bits > 32:
            out[word + 1] |= c >> (32 - offset)
    return torch.tensor(out, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_and_zeros_are_in_the_librarys_words(bits):
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=g)
    zeros = torch.randint(0, 1 << bits, (N, K // 128), dtype=torch.uint8, generator=g)
    e = Element.uint(bits)
    spec = QuantSpec(element=e, scales=(BF,), zero=Zero(kind="code", element=e.name))
    qt = QuantizedTensor(
        spec=spec, shape=(N, K), codes=pack(codes, bits, CANONICAL),
        scales=(torch.rand(N, K // 128).bfloat16(),), zeros=zeros,
    )  # fmt: skip
    got = tensors_of(qt, None)
    assert got["weight"].shape == (N, K * bits // 32)
    assert torch.equal(got["weight"][5], _words(codes[5].tolist(), bits))
    assert got["zero_point"].shape == (N * bits // 32, K // 128)
    assert torch.equal(got["zero_point"][:, 1], _words(zeros[:, 1].tolist(), bits))


def test_signed_bytes_become_offset_binary():
    codes = torch.tensor([[-128, -1, 0, 127] * 32] * N, dtype=torch.int8).view(torch.uint8)
    qt = QuantizedTensor(
        spec=INT8, shape=(N, 128), codes=codes, scales=(torch.ones(N, 1).bfloat16(),)
    )
    word = int(tensors_of(qt, None)["weight"][0, 0]) & 0xFFFFFFFF
    assert [word >> s & 255 for s in (0, 8, 16, 24)] == [0, 127, 128, 255]


def test_block_scales_of_16_bits_are_widened():
    scales = torch.tensor([[0.5], [1.0078125]]).bfloat16()
    codes = torch.zeros(256, 128, dtype=torch.uint8)
    qt = QuantizedTensor(spec=BLOCK16, shape=(256, 128), codes=codes, scales=(scales,))
    got = tensors_of(qt, None)["weight_scale"]
    assert got.dtype == torch.float32
    assert got.tolist() == [[0.5], [1.0078125]]


@pytest.fixture
def library(monkeypatch):
    """A stand-in that multiplies by what it was given: what was made of it, and what ran."""
    made, ran = [], []

    class Layer(torch.nn.Module):
        def __init__(self, **kw):
            super().__init__()
            made.append(kw)

        def load_from_tensors(self, tensors):
            words = tensors["weight"].contiguous().view(torch.uint8).view(N, K)
            self.w = (words.float() - 128) * tensors["weight_scale"].float()

        def transform(self):
            pass

        def forward(self, x, *, tuning_config):
            assert x.data_ptr() % 16 == 0, "the library refuses others: check_tensor_data_alignment"
            ran.append((x.shape[0], tuning_config))
            return (x.float() @ self.w.t()).to(x.dtype)

    class Method:
        @staticmethod
        def get_default_tuning_configs(layer):
            return [[0, 8, {"few": True}], [8, 64, {"few": False}], [64, 1 << 30, {"stages": 4}]]

    stand_in = types.ModuleType("humming.layer")
    stand_in.HummingLayer, stand_in.HummingLayerMethod = Layer, Method
    monkeypatch.setitem(sys.modules, "humming", types.ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.layer", stand_in)
    monkeypatch.setattr(torch.cuda, "device", lambda d: torch.inference_mode(False))
    return made, ran


def part(seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (N, K), dtype=torch.uint8, generator=g)
    qt = QuantizedTensor(
        spec=INT8, shape=(N, K), codes=codes, scales=(torch.rand(N, 1).bfloat16(),)
    )
    return LayerTensors(operands={"weight": qt})


def test_a_call_names_the_configuration_of_its_rows(library):
    op, kernel = op_of(INT8), Humming()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, part(0), {"row": 0})
    run = kernel.bind(op)
    for rows in (1, 8, 9, 64, 65, 5000):
        run(list(buffers.values()), torch.randn(rows, K).bfloat16())
    few, more, many = '{"few": true}', '{"few": false}', '{"stages": 4}'
    assert library[1] == list(zip((1, 8, 9, 64, 65, 5000), (few, few, more, more, many, many)))


def test_x_at_an_odd_address_is_copied(library):
    op, kernel = op_of(INT8), Humming()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, part(0), {"row": 0})
    run, x = kernel.bind(op), torch.randn(3, K).bfloat16()
    odd = torch.empty(3 * K + 1, dtype=x.dtype)[1:].view(3, K).copy_(x)
    assert odd.data_ptr() % 16
    assert torch.equal(run(list(buffers.values()), odd), run(list(buffers.values()), x))


def test_library_layer_is_made_once_and_again_after_a_reload(library):
    made, _ = library
    op, kernel = op_of(INT8), Humming()
    buffers = kernel.allocate(op)
    run, x = kernel.bind(op), torch.randn(2, 3, K).bfloat16()
    for seed in (0, 1):
        lt = part(seed)
        kernel.load_(buffers, op, lt, {"row": 0})
        for _ in range(2):
            y = run(list(buffers.values()), x)
        want = x.double() @ lt.dequantize().double().t()
        assert (y.double() - want).norm() / want.norm() < 4e-3  # bfloat16 result
        assert len(made) == seed + 1
    assert made[0]["weight_config"] == {"dtype": "uint8", "group_size": 0}


def test_two_operations_on_the_same_weights_have_layers_of_their_own(library):
    made, _ = library
    kernel, buffers, x = Humming(), None, torch.randn(2, K).bfloat16()
    for op in (op_of(INT8), op_of(INT8, token(Element.int(8)))):
        if buffers is None:
            buffers = kernel.allocate(op)
            kernel.load_(buffers, op, part(0), {"row": 0})
        kernel.bind(op)(list(buffers.values()), x)
    assert [m["input_config"] for m in made] == [None, {"dtype": "int8"}]


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_blocks_hold_each_experts_rows_and_nothing_else(rows, size):
    experts = 6
    torch.manual_seed(rows)
    index = torch.randint(-1, experts + 1, (rows,))
    ids, owners, count = blocks_of(index, experts, size)
    assert ids.shape[0] == owners.shape[0] * size >= int(count)
    want = []
    for e in range(experts):
        mine = torch.where(index == e)[0].tolist()
        want += mine + [rows] * (-len(mine) % size)
    assert ids[: int(count)].tolist() == want
    assert (ids[int(count) :] == rows).all()
    for b in range(int(count) // size):
        assert int(index[ids[b * size]]) == int(owners[b])


def test_experts_run_by_the_librarys_indexed_product(library, monkeypatch):
    made, _ = library
    experts, blocks = 3, []

    class Layer(sys.modules["humming.layer"].HummingLayer):
        def load_from_tensors(self, tensors):
            words = tensors["weight"].contiguous().view(torch.uint8).view(experts, N, K)
            self.w = (words.float() - 128) * tensors["weight_scale"].float()

        def forward(self, x, *, outputs, sorted_ids, expert_ids, num_tokens_padded,
                    compute_config, tuning_config):  # fmt: skip
            blocks.append((compute_config["gemm_type"], tuning_config))
            size = sorted_ids.shape[0] // expert_ids.shape[0]
            for b in range(int(num_tokens_padded) // size):
                rows = sorted_ids[b * size : (b + 1) * size].long()
                rows = rows[rows < x.shape[0]]
                outputs[rows] = (x[rows].float() @ self.w[expert_ids[b]].t()).to(x.dtype)

    class Method:
        @staticmethod
        def get_default_tuning_configs(layer, gemm_type):
            assert gemm_type == "indexed"
            return [[0, 16, {"block_shape": [8, 64]}], [16, 1 << 30, {"block_shape": [16, 64]}]]

    monkeypatch.setattr(sys.modules["humming.layer"], "HummingLayer", Layer)
    monkeypatch.setattr(sys.modules["humming.layer"], "HummingLayerMethod", Method)
    sizes = (("n", N), ("k", K), ("k_stored", K), ("experts", experts))
    op, kernel = op_of(INT8, op="grouped_linear", sizes=sizes), Humming()
    buffers = kernel.allocate(op)
    parts = [part(e) for e in range(experts)]
    for e, lt in enumerate(parts):
        kernel.load_(buffers, op, lt, {"row": 0, "expert": e})
    run, x = kernel.bind(op), torch.randn(40, K).bfloat16()
    for index in (torch.randint(-1, experts + 1, (40,)), torch.randint(experts, (9,))):
        y = run(list(buffers.values()), x[: index.shape[0]], index)
        want = torch.zeros(index.shape[0], N, dtype=torch.float64)
        for e, lt in enumerate(parts):
            mine = index == e
            want[mine] = x[: index.shape[0]][mine].double() @ lt.dequantize().double().t()
        assert (y.double() - want).norm() / want.norm() < 4e-3  # bfloat16 result
    assert [kind for kind, _ in blocks] == ["indexed"] * 2
    assert made[0]["num_experts"] == experts


def test_one_factor_of_a_matrix_becomes_a_vector_of_the_stack(library, monkeypatch):
    given, experts = {}, 3

    class Layer(sys.modules["humming.layer"].HummingLayer):
        def load_from_tensors(self, tensors):
            given.update({n: tuple(t.shape) for n, t in tensors.items()})

        def forward(self, x, *, outputs, **_):
            outputs.zero_()

    class Method:
        @staticmethod
        def get_default_tuning_configs(layer, gemm_type):
            return [[0, 1 << 30, {"block_shape": [8, 64]}]]

    monkeypatch.setattr(sys.modules["humming.layer"], "HummingLayer", Layer)
    monkeypatch.setattr(sys.modules["humming.layer"], "HummingLayerMethod", Method)
    sizes = (("n", N), ("k", K), ("k_stored", K), ("experts", experts))
    op, kernel = op_of(NV, op="grouped_linear", sizes=sizes), Humming()
    buffers = kernel.allocate(op)
    for t in buffers.values():
        t.zero_()
    index = torch.zeros(2, dtype=torch.int64)
    kernel.bind(op)(list(buffers.values()), torch.randn(2, K).bfloat16(), index)
    # the library's own shapes of a stack: schema/humming.py, create_weights
    assert given["weight_scale_2"] == (experts,)
    assert given["weight_scale"] == (experts, N, K // 16)
