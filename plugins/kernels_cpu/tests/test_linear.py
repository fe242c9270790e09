"""Every kernel against the float32 oracle: dense weight, then a float64 product."""

from __future__ import annotations

import pytest
import torch

from cpu_made import HALF_ULP, SPECS, TABLE_SPECS, bind, excess, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.errors import LayoutError


@pytest.mark.parametrize(("n", "k"), [(1, 32), (40, 1056), (96, 96)])
def test_linear_is_as_exact_as_float32_sums(isa, spec, n, k):
    lt = make_layer(spec, n, k, bias=torch.float16 if n == 40 else None)
    w, run = dense_weight(lt.weight, k), bind(lt, make_op("linear", lt, k))
    g = torch.Generator().manual_seed(1)
    for m in (1, 2, 3, 7, 8, 16, 33, 100):
        for dtype in HALF_ULP:
            x = torch.randn(m, k, generator=g).to(dtype)
            got = run(x)
            assert got.dtype == dtype
            assert excess(got, x, w, lt.bias) <= 1, (m, dtype)


@pytest.mark.parametrize("name", TABLE_SPECS)
def test_linear_with_table_elements(isa, name):
    lt = make_layer(TABLE_SPECS[name], 40, 352)
    op = make_op("linear", lt, 352)
    w, run = dense_weight(lt.weight, 352), bind(lt, op)
    for m in (1, 7, 33):
        for dtype in HALF_ULP:
            x = torch.randn(m, 352).to(dtype)
            assert excess(run(x), x, w) <= 1, (m, dtype)


@pytest.mark.parametrize("break_it", ["codes", "scales_0", "zeros"])
def test_error_measure_notices_one_broken_tensor(isa, break_it):
    lt = make_layer(SPECS["uint4 g32 f16 code"], 40, 96)
    w = dense_weight(lt.weight, 96)
    tensors = lt.weight.tensors()
    broken = tensors[break_it].clone()
    if break_it == "codes":
        broken = (broken >> 4) | (broken << 4)  # nibbles swapped
    else:
        broken = broken.roll(1, dims=-1)  # groups shifted
    lt.operands["weight"] = lt.weight.with_tensors({**tensors, break_it: broken})
    x = torch.randn(2, 96).bfloat16()
    assert excess(bind(lt, make_op("linear", lt, 96))(x), x, w) > 10


def test_no_tokens_give_no_rows(isa, spec):
    lt = make_layer(spec, 40, 96)
    run = bind(lt, make_op("linear", lt, 96))
    assert run(torch.empty(0, 96)).shape == (0, 40)
    assert run(torch.empty(2, 0, 96, dtype=torch.bfloat16)).shape == (2, 0, 40)


def test_leading_axes_are_kept_and_strides_do_not_matter(isa, spec):
    lt = make_layer(spec, 40, 96)
    run = bind(lt, make_op("linear", lt, 96))
    for dtype in HALF_ULP:
        x = torch.randn(96, 3, 5).to(dtype).permute(1, 2, 0)
        got = run(x)
        assert got.shape == (3, 5, 40)
        assert torch.equal(got.view(15, 40), run(x.contiguous().view(15, 96)))
    odd = torch.randn(97).bfloat16()[1:]  # starts between two aligned addresses
    assert torch.equal(run(odd), run(odd.clone()))


@pytest.mark.parametrize("m", [1, 4, 9, 300])
def test_bits_do_not_depend_on_the_number_of_threads(isa, spec, m, threads):
    lt = make_layer(spec, 232, 1040)
    run = bind(lt, make_op("linear", lt, 1040))
    x = torch.randn(m, 1040).bfloat16()
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_reach_every_output_of_their_token_only(isa, spec, m, bad):
    lt = make_layer(spec, 40, 96)
    run = bind(lt, make_op("linear", lt, 96))
    for dtype in HALF_ULP:
        x = torch.randn(m, 96).to(dtype)
        x[-1, 50] = bad
        got = run(x)
        used = dense_weight(lt.weight, 96)[:, 50] != 0
        assert not got[-1, used].isfinite().any()
        assert got[:-1].isfinite().all()


@pytest.mark.parametrize("m", [1, 4, 33])
def test_rows_without_weight_are_exactly_zero(isa, spec, m):
    if any(s.element == "e8m0" for s in spec.scales):
        pytest.skip("a power of two is never zero")
    lt = make_layer(spec, 40, 96)
    tensors = {name: t.clone() for name, t in lt.weight.tensors().items()}
    for name, t in tensors.items():
        if name.startswith(("scales", "offset")):
            t[7] = 0
    lt.operands["weight"] = lt.weight.with_tensors(tensors)
    got = bind(lt, make_op("linear", lt, 96))(torch.randn(m, 96).bfloat16())
    assert (got[:, 7] == 0).all()
    assert (got[:, 8] != 0).any()


@pytest.mark.parametrize("name", ["uint4 g64 bf16 const", "uint3 g32 const", "int8 g32 f16"])
def test_groups_whose_codes_equal_the_constant_add_exactly_nothing(isa, name):
    lt = make_layer(SPECS[name], 40, 192)
    one = make_layer(SPECS[name], 40, 192)
    tensors = lt.weight.tensors()
    half = tensors["codes"].shape[1] // 3
    fill = {"uint4": 0x88, "uint3": 0, "int8": 0}[name.split()[0]]
    codes = tensors["codes"].clone()
    codes[:, :half] = fill
    if name.startswith("uint3"):  # code 4 in a stream of 3 bits: 0b100_100_100...
        codes[:, :half] = torch.tensor([0x24, 0x49, 0x92], dtype=torch.uint8).repeat(half // 3)
    lt.operands["weight"] = lt.weight.with_tensors({**tensors, "codes": codes})
    assert (dense_weight(lt.weight)[:, :64] == 0).all()
    assert not torch.equal(one.weight.codes, codes)
    run, x = bind(lt, make_op("linear", lt, 192)), torch.randn(2, 192).bfloat16()
    y = x.clone()
    y[:, :64] = torch.randn(2, 64)
    assert torch.equal(run(x), run(y))


@pytest.mark.parametrize("m", [8, 33])
def test_panels_of_codes_that_equal_their_zero_point_give_exact_zeros(isa, m):
    """Fewer tokens subtract z times the sum of x instead: zero within float32 sums only."""
    lt = make_layer(SPECS["uint4 g32 f16 code"], 40, 96)
    z = lt.weight.zeros[7].repeat_interleave(32)
    codes = lt.weight.codes.clone()
    codes[7] = z[0::2] | (z[1::2] << 4)
    lt.operands["weight"] = lt.weight.with_tensors({**lt.weight.tensors(), "codes": codes})
    got = bind(lt, make_op("linear", lt, 96))(torch.randn(m, 96).bfloat16())
    assert (got[:, 7] == 0).all()
    assert (got[:, 8] != 0).any()


def test_outlier_keeps_its_precision(isa):
    lt = make_layer(SPECS["uint4 g32 f16 code"], 40, 96)
    w, run = dense_weight(lt.weight), bind(lt, make_op("linear", lt, 96))
    for dtype in HALF_ULP:
        x = torch.randn(3, 96).to(dtype)
        x[1, 17] = 1e4
        assert excess(run(x), x, w) <= 1


@pytest.mark.parametrize(
    "x", [torch.randn(1, 95), torch.ones(1, 96, dtype=torch.long), torch.ones(1, 96).double()]
)
def test_input_of_wrong_size_or_type_is_refused(isa, x):
    lt = make_layer(SPECS["uint4 g32 f16 code"], 40, 96)
    with pytest.raises(LayoutError) as e:
        bind(lt, make_op("linear", lt, 96))(x)
    assert e.value.code == "Q-LAYOUT-INPUT"
