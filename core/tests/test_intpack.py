"""Zeros in words: published constants of the tools that write them, and what must not agree."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantWarning
from quant_core.intpack import (
    check_symmetric,
    from_groups,
    read_zeros,
    stored_zeros,
    write_zeros,
)
from quant_core.intspec import (
    INTERLEAVE,
    check_groups,
    check_plain,
    check_tensors,
    weight_spec,
    word_count,
)
from quant_core.packing import packed_count
from quant_core.spec import LayerDesc, Packing, ParamSpec, TensorInfo
from quant_core.tensors import LayerTensors

WORDS = Packing(word="int32")
LAYER = LayerDesc(kind="linear", name="proj", stored="proj")


def unhex(text: str) -> Tensor:
    values = [int(w, 16) for w in text.split()]
    return torch.tensor([[v - (v >> 31 << 32) for v in values]], dtype=torch.int32)


def hexes(words: Tensor) -> str:
    return " ".join(f"{w & 0xFFFFFFFF:08x}" for w in words.flatten().tolist())


# words for zeros of 2**(bits-1): GPTQModel 7.7.0 (v1, v2) and AutoRound 0.16.1
CONSTANTS = [
    (2, True, "55555555"),
    (2, False, "aaaaaaaa"),
    (3, True, "db6db6db b6db6db6 6db6db6d"),
    (3, False, "24924924 49249249 92492492"),
    (4, True, "77777777"),
    (4, False, "88888888"),
    (8, True, "7f7f7f7f"),
    (8, False, "80808080"),
]


@pytest.mark.parametrize(("bits", "minus_one", "words"), CONSTANTS)
def test_zeros_of_symmetric_files_have_the_published_words(
    bits: int, minus_one: bool, words: str
) -> None:
    n = 32 * len(words.split()) // bits
    half = torch.full((1, n), 1 << (bits - 1), dtype=torch.uint8)
    assert torch.equal(read_zeros(unhex(words), bits, n, WORDS, minus_one=minus_one), half)
    assert hexes(write_zeros(half, bits, WORDS, minus_one=minus_one)) == words
    assert not torch.equal(read_zeros(unhex(words), bits, n, WORDS, minus_one=not minus_one), half)


def test_zero_of_zero_borrows_from_its_neighbour_and_comes_back() -> None:
    words = unhex("eeeeef3f")  # fields 15 3 15 14 14 14 14 14, low first
    zeros = torch.tensor([[0, 5, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    assert torch.equal(read_zeros(words, 4, 8, WORDS, minus_one=True), zeros)
    assert torch.equal(write_zeros(zeros, 4, WORDS, minus_one=True), words)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_zeros_of_odd_widths_wrap_in_their_own_field(bits: int) -> None:
    top = (1 << bits) - 1
    zeros = torch.zeros(1, 32, dtype=torch.uint8)
    zeros[0, 1] = top
    words = write_zeros(zeros, bits, WORDS, minus_one=True)
    fields = read_zeros(words, bits, 32, WORDS, minus_one=False)
    assert fields[0, :3].tolist() == [top, top - 1, top]
    assert torch.equal(read_zeros(words, bits, 32, WORDS, minus_one=True), zeros)


def test_interleaved_zeros_have_the_published_words() -> None:
    zeros = (torch.arange(8) + 1 + torch.arange(2)[:, None]).to(torch.uint8)  # (G, N)
    packing = Packing(word="int32", order=INTERLEAVE)
    words = torch.cat([unhex("86427531"), unhex("97538642")])
    assert torch.equal(read_zeros(words, 4, 8, packing, minus_one=False), zeros)
    assert not torch.equal(read_zeros(words, 4, 8, WORDS, minus_one=False), zeros)


# --------------------------------------------------------------------------------- symmetric files


def check(words: str, *, minus_one: bool) -> None:
    check_symmetric(
        unhex(words), 4, 8, WORDS, minus_one=minus_one, where="a.b", source="c.json", plugin="p"
    )


def test_symmetric_zeros_pass_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    check("77777777", minus_one=True)
    check("88888888", minus_one=False)
    assert not recwarn.list


@pytest.mark.parametrize(("words", "minus_one"), [("88888888", True), ("77777777", False)])
def test_symmetric_zeros_of_the_other_dialect_warn(words: str, minus_one: bool) -> None:
    with pytest.warns(QuantWarning, match=r"c\.json.*a\.b.*read by the values"):
        check(words, minus_one=minus_one)


def test_zeros_that_are_not_symmetric_raise_and_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"a\.b: sym is true \(c\.json\), but 2 zero") as err:
        check("77879777", minus_one=True)  # zeros 8 8 8 10 8 9 8 8, low field first
    assert (err.value.code, err.value.tensor) == ("Q-CFG-CONFLICT", "a.b.qzeros")


# ------------------------------------------------------------------------------------- header side


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("order", [None, INTERLEAVE])
def test_word_count_is_that_of_the_packing(bits: int, order: tuple[int, ...] | None) -> None:
    packing = Packing(word="int32", order=order)
    for count in (1, 7, 8, 31, 32, 33, 100, 4096):
        run = len(order) if order else 1
        assert word_count(count, bits, run=run) == packed_count(count, bits, packing)


def _scales(*shape: int) -> TensorInfo:
    return TensorInfo(name="m.scales", dtype="float16", shape=shape, file="f", offset=0, nbytes=0)


def test_check_groups_gives_the_size_of_one_group() -> None:
    for size, groups, expected in ((-1, 1, 96), (64, 2, 64), (128, 1, 96)):
        found = check_groups(_scales(groups, 8), 96, size, source="c.json", plugin="p")
        assert found == expected


def test_check_groups_names_the_size_that_the_scales_imply() -> None:
    with pytest.raises(LayoutError, match=r"group_size=32; check group_size in c\.json") as err:
        check_groups(_scales(3, 8), 96, 64, source="c.json", plugin="p")
    assert (err.value.code, err.value.expected, err.value.actual) == ("Q-LAYOUT-GROUP", 2, 3)


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({}, "Q-TENSOR-MISSING"),
        ({"a": torch.zeros(2, 2)}, "Q-LAYOUT-SHAPE"),
        ({"a": torch.zeros(2, 3, dtype=torch.int32)}, "Q-LAYOUT-DTYPE"),
    ],
)
def test_check_tensors_names_the_tensor(tensors: dict[str, Tensor], code: str) -> None:
    params = [
        ParamSpec(name="a", shape=(2, 3), dtypes=("float32",)),
        ParamSpec(name="b", shape=(1,), dtypes=("float32",), need="optional", rule="x"),
    ]
    with pytest.raises((LayoutError, CheckpointError), match=r"proj\.a") as err:
        check_tensors(LAYER, params, tensors, plugin="p")
    assert (err.value.code, err.value.tensor) == (code, "proj.a")
    check_tensors(LAYER, params, {"a": torch.zeros(2, 3)}, plugin="p")


def _made(*, sym: bool) -> LayerTensors:
    spec = weight_spec(4, 32, 16, sym=sym)
    scales = torch.ones(2, 8, dtype=torch.bfloat16)
    zeros = None if sym else torch.full((2, 8), 3, dtype=torch.uint8)
    packing = Packing(word="int32", k_major=True)
    codes = torch.zeros(4, 8, dtype=torch.int32)
    return LayerTensors(
        operands={"weight": from_groups(spec, (8, 32), packing, codes, scales, zeros)}
    )


def test_from_groups_turns_scales_and_zeros_and_keeps_the_stored_dtype() -> None:
    qt = _made(sym=False).weight
    assert qt.spec.label == "uint4 group(16):bf16 code-zero"
    assert qt.scales[0].shape == (8, 2)
    assert qt.zeros is not None
    assert qt.zeros.shape == (8, 2)
    assert float(qt.dequantize()[0, 0]) == -3


@pytest.mark.parametrize(("sym", "value"), [(True, 8), (False, 3)])
def test_stored_zeros_spells_a_constant_out(sym: bool, value: int) -> None:
    zeros = stored_zeros(_made(sym=sym).weight)
    assert zeros.shape == (8, 2)
    assert bool((zeros == value).all())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (SimpleNamespace(input_scale=torch.ones(1)), "input_scale"),
        (SimpleNamespace(transforms=((None, ()),)), "transforms"),
    ],
)
def test_check_plain_refuses_what_words_and_scales_do_not_hold(
    change: SimpleNamespace, found: str
) -> None:
    lt, spec = _made(sym=True), weight_spec(4, 32, 16, sym=True)
    check_plain("proj", lt, spec, (8, 32), holder="X", plugin="p")
    for name, value in vars(change).items():
        setattr(lt, name, value)
    with pytest.raises(LayoutError, match=f"{found} cannot be stored as X") as err:
        check_plain("proj", lt, spec, (8, 32), holder="X", plugin="p")
    assert err.value.code == "Q-LAYOUT-REPRESENT"


@pytest.mark.parametrize(
    ("bits", "group_size", "shape"), [(8, 16, (8, 32)), (4, 32, (8, 32)), (4, 16, (8, 64))]
)
def test_check_plain_refuses_another_meaning_or_size(
    bits: int, group_size: int, shape: tuple[int, int]
) -> None:
    spec = weight_spec(bits, 32, group_size, sym=True)
    with pytest.raises(LayoutError, match="cannot be stored") as err:
        check_plain("proj", _made(sym=True), spec, shape, holder="X", plugin="p")
    assert err.value.code == "Q-LAYOUT-REPRESENT"
