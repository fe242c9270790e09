"""The oracle against plain formulas written out per element, and against producers' own weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant_core.dequantize import combine_factors, dense_weight, dequantize, scatter_columns
from quant_core.errors import LayoutError
from quant_core.packing import pack, unpack
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    Packing,
    QuantSpec,
    Scale,
    Zero,
    block,
    group,
)
from quant_core.tensors import QuantizedTensor

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"


def codes_of(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_worked_vector_of_the_formats_page() -> None:
    n, k = torch.meshgrid(torch.arange(8), torch.arange(32), indexing="ij")
    rows, groups = torch.meshgrid(torch.arange(8), torch.arange(2), indexing="ij")
    qt = QuantizedTensor(
        spec=QuantSpec(
            element=Element.uint(4),
            scales=(Scale(element="f16", grain=group(16)),),
            zero=Zero(kind="code", element="uint4"),
        ),
        shape=(8, 32),
        codes=pack(((3 * n + k) % 16).to(torch.uint8), 4, CANONICAL),
        scales=(((1 + rows + 8 * groups) / 16).to(torch.float16),),
        zeros=((rows + 1 + groups) % 16).to(torch.uint8),
    )
    w = dequantize(qt)
    assert w[0, :4].tolist() == [-0.0625, 0.0, 0.0625, 0.125]
    assert w[7, 28:].tolist() == [-8.0, -7.0, -6.0, -5.0]
    assert w.sum().item() == 224.0
    broken = QuantizedTensor(
        spec=qt.spec, shape=qt.shape, codes=qt.codes, scales=qt.scales, zeros=qt.zeros + 1
    )
    assert dequantize(broken).sum().item() != 224.0


@pytest.mark.parametrize(("n", "k", "g"), [(3, 70, 32), (1, 31, 32), (5, 64, 64), (4, 33, 1)])
def test_group_with_tail_equals_per_element_formula(n: int, k: int, g: int) -> None:
    groups = -(-k // g)
    codes, scale = codes_of(n, k, 4), random(n, groups).to(torch.float16)
    zeros = codes_of(n, groups, 4, seed=9)
    spec = QuantSpec(
        element=Element.uint(4),
        scales=(Scale(element="f16", grain=group(g)),),
        zero=Zero(kind="code", element="uint4"),
    )
    qt = QuantizedTensor(
        spec=spec, shape=(n, k), codes=pack(codes, 4, CANONICAL), scales=(scale,), zeros=zeros
    )
    w = dequantize(qt)
    for i in range(n):
        for j in range(k):
            c, z = int(codes[i, j]), int(zeros[i, j // g])
            assert w[i, j].item() == (c - z) * scale[i, j // g].float().item()


@pytest.mark.parametrize("grain", [block(2, 3), block(4, 4), block(0, 5), block(3, 0), TENSOR])
def test_block_grain_with_tails_equals_per_element_formula(grain: tuple[int, int]) -> None:
    n, k = 7, 10
    r, c = grain[0] or n, grain[1] or k
    scale = random(-(-n // r), -(-k // c))
    codes = codes_of(n, k, 8)
    spec = QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=grain),))
    w = dequantize(QuantizedTensor(spec=spec, shape=(n, k), codes=codes, scales=(scale,)))
    signed = codes.view(torch.int8).float()
    for i in range(n):
        for j in range(k):
            assert w[i, j] == signed[i, j] * scale[i // r, j // c]


def test_two_levels_with_offset_multiply_coarsest_first() -> None:
    n, k = 2, 64
    codes, fine = codes_of(n, k, 4), codes_of(n, 2, 6)
    fine_o = codes_of(n, 2, 6, seed=3)
    coarse, coarse_o = random(n, 1).to(torch.float16), random(n, 1, seed=2).to(torch.float16)
    levels = (Scale(element="uint6", grain=group(32)), Scale(element="f16", grain=group(64)))
    spec = QuantSpec(
        element=Element.uint(4), scales=levels, zero=Zero(kind="offset", levels=levels)
    )
    qt = QuantizedTensor(
        spec=spec,
        shape=(n, k),
        codes=pack(codes, 4, CANONICAL),
        scales=(fine, coarse),
        offset=(fine_o, coarse_o),
    )
    s = (coarse.float() * fine.float()).repeat_interleave(32, 1)
    o = (coarse_o.float() * fine_o.float()).repeat_interleave(32, 1)
    assert torch.equal(dequantize(qt), codes.float() * s + o)


def inverse_spec(*scales: Scale) -> QuantSpec:
    return QuantSpec(element=Element.int(8), scales=scales)


def test_inverse_factor_divides_and_differs_from_the_reciprocal() -> None:
    codes = codes_of(64, 64, 8)
    stored = random(64, 1).abs() + 0.5
    spec = inverse_spec(Scale(element="f32", grain=CHANNEL, inverse=True))
    w = dequantize(QuantizedTensor(spec=spec, shape=(64, 64), codes=codes, scales=(stored,)))
    values = codes.view(torch.int8).float()
    assert torch.equal(w, values / stored)
    assert not torch.equal(w, values * (1 / stored))


def test_inverse_factor_beside_others_divides_in_its_turn() -> None:
    fine, coarse = random(32, 4).abs(), random(32, 1).abs() + 3
    inverse_last = (
        Scale(element="f32", grain=group(16)),
        Scale(element="f32", grain=CHANNEL, inverse=True),
    )
    inverse_first = (
        Scale(element="f32", grain=group(16), inverse=True),
        Scale(element="f32", grain=CHANNEL),
    )
    last = combine_factors((fine, coarse), inverse_last, (32, 64))
    first = combine_factors((fine, coarse), inverse_first, (32, 64))
    assert torch.equal(last, ((1 / coarse) * fine).repeat_interleave(16, 1))
    assert torch.equal(first, (coarse / fine).repeat_interleave(16, 1))
    assert not torch.equal(first, (coarse * (1 / fine)).repeat_interleave(16, 1))


def test_float_zeros_are_read_by_their_element() -> None:
    codes, zeros = codes_of(3, 8, 4), random(3, 1).to(torch.float16)
    spec = QuantSpec(
        element=Element.uint(4),
        scales=(Scale(element="f32", grain=CHANNEL),),
        zero=Zero(kind="code", element="f16"),
    )
    scale = random(3, 1)
    qt = QuantizedTensor(
        spec=spec, shape=(3, 8), codes=pack(codes, 4, CANONICAL), scales=(scale,), zeros=zeros
    )
    assert torch.equal(dequantize(qt), (codes.float() - zeros.float()) * scale)


def test_signed_four_bit_zeros_are_twos_complement() -> None:
    spec = QuantSpec(
        element=Element.int(8),
        scales=(Scale(element="f32", grain=CHANNEL),),
        zero=Zero(kind="code", element="int4"),
    )
    qt = QuantizedTensor(
        spec=spec,
        shape=(2, 1),
        codes=torch.zeros(2, 1, dtype=torch.uint8),
        scales=(torch.ones(2, 1),),
        zeros=torch.tensor([[15], [8]], dtype=torch.uint8),
    )
    assert dequantize(qt).flatten().tolist() == [1.0, 8.0]


def test_gather_scatters_columns_and_drops_padding() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.uint8)
    spec = QuantSpec(element=Element.uint(8), gather=True)
    gather = torch.tensor([2, -1, 0, 3], dtype=torch.int32)
    qt = QuantizedTensor(spec=spec, shape=(2, 4), codes=codes, gather=gather)
    assert dense_weight(qt).tolist() == [[3, 0, 1, 4], [7, 0, 5, 8]]
    assert dense_weight(qt, in_features=6).tolist() == [[3, 0, 1, 4, 0, 0], [7, 0, 5, 8, 0, 0]]
    values = torch.tensor([[1.0, float("nan"), 2.0, 3.0]])
    assert scatter_columns(values, gather, 4).tolist() == [[2.0, 0.0, 1.0, 3.0]]


def test_stack_equals_its_experts_one_by_one() -> None:
    spec = QuantSpec(
        element=Element.uint(3),
        scales=(Scale(element="f16", grain=block(2, 16)),),
        zero=Zero(kind="code", element="uint3"),
        gather=True,
    )
    parts = []
    for e in range(3):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(e)).to(torch.int32)
        parts.append(
            QuantizedTensor(
                spec=spec,
                shape=(5, 40),
                codes=pack(codes_of(5, 40, 3, e), 3, Packing(word="int32", k_major=True)),
                packing=Packing(word="int32", k_major=True),
                scales=(random(3, 3, seed=e).to(torch.float16),),
                zeros=codes_of(3, 3, 3, e + 7),
                gather=order,
            )
        )
    tensors = {k: torch.stack([p.tensors()[k] for p in parts]) for k in parts[0].tensors()}
    stack = parts[0].with_tensors(tensors, shape=(3, 5, 40))
    assert torch.equal(dequantize(stack), torch.stack([dequantize(p) for p in parts]))
    assert torch.equal(dense_weight(stack), torch.stack([dense_weight(p) for p in parts]))


def test_missing_zeros_raise_layout_error() -> None:
    spec = QuantSpec(
        element=Element.uint(8),
        scales=(Scale(element="f32", grain=TENSOR),),
        zero=Zero(kind="code", element="uint8"),
    )
    qt = QuantizedTensor(
        spec=spec, shape=(1, 1), codes=codes_of(1, 1, 8), scales=(torch.ones(1, 1),)
    )
    with pytest.raises(LayoutError) as err:
        dequantize(qt)
    assert err.value.tensor == "zeros"


# ------------------------------------------------------------------- weights of the producers


def stored(folder: str, module: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Stored tensors of a module and the first rows of the producer's own float32 weight."""
    if not SHARED.is_dir():
        pytest.skip("the full set of checkpoints is not beside the repository")
    safetensors = pytest.importorskip("safetensors.torch")
    everything = safetensors.load_file(SHARED / folder / "model.safetensors")
    expected = safetensors.load_file(SHARED / folder / "expected.safetensors")
    tensors = {k[len(module) + 1 :]: v for k, v in everything.items() if k.startswith(module)}
    (weight,) = [v for k, v in expected.items() if k.startswith("weight." + module)]
    return tensors, weight


@pytest.mark.shared
def test_nvfp4_weight_equals_compressed_tensors_bit_for_bit() -> None:
    t, expected = stored("ct-nvfp4", "model.layers.1.mlp.down_proj")
    spec = QuantSpec(
        element=Element(name="fp4_e2m1", bits=4, kind="float"),
        scales=(
            Scale(element="fp8_e4m3", grain=group(16)),
            Scale(element="f32", grain=TENSOR, inverse=True),
        ),
    )
    scales = (t["weight_scale"].view(torch.uint8), t["weight_global_scale"].view(1, 1))
    qt = QuantizedTensor(spec=spec, shape=(256, 512), codes=t["weight_packed"], scales=scales)
    rows = expected.shape[0]
    assert torch.equal(dequantize(qt)[:rows], expected)
    codes = qt.codes >> 4 | qt.codes << 4  # negative control: nibbles swapped
    swapped = QuantizedTensor(spec=spec, shape=qt.shape, codes=codes, scales=scales)
    assert not torch.equal(dequantize(swapped)[:rows], expected)


@pytest.mark.shared
def test_fp8_block_weight_equals_compressed_tensors_bit_for_bit() -> None:
    t, expected = stored("ct-fp8-block128", "model.layers.0.self_attn.k_proj")
    spec = QuantSpec(
        element=Element(name="fp8_e4m3", bits=8, kind="float"),
        scales=(Scale(element="bf16", grain=block(128, 128)),),
    )
    codes = t["weight"].view(torch.uint8)
    qt = QuantizedTensor(
        spec=spec, shape=tuple(codes.shape), codes=codes, scales=(t["weight_scale"],)
    )
    assert torch.equal(dequantize(qt), expected)


@pytest.mark.shared
def test_awq_weight_equals_gptqmodel_bit_for_bit() -> None:
    t, expected = stored("gptqmodel-awq-gemm-g128", "model.layers.1.mlp.down_proj")
    awq = Packing(word="int32", axis="out", k_major=True, order=(0, 4, 1, 5, 2, 6, 3, 7))
    spec = QuantSpec(
        element=Element.uint(4),
        scales=(Scale(element="bf16", grain=group(128)),),
        zero=Zero(kind="code", element="uint4"),
    )
    qt = QuantizedTensor(
        spec=spec,
        shape=(256, 512),
        codes=t["qweight"],
        packing=awq,
        scales=(t["scales"].t(),),
        zeros=unpack(t["qzeros"], 4, (256, 4), awq),
    )
    assert torch.equal(dequantize(qt)[: expected.shape[0]], expected)
