"""Tensor parallelism by ``Span``: the ranks' parts of every format put together are the whole.

Ranks are simulated: each cuts its own part from what was read, as a worker does, and its float32
weights are compared with the whole's bit for bit. What cannot be cut is refused by name, and only
for one of the reasons listed here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_sets import FIXTURES
from quant_core.checkpoint.open import open_checkpoint
from quant_core.dequantize import dense_weight
from quant_core.engines.parallel import cut, even, heads, vocabulary
from quant_core.errors import LayoutError
from quant_core.load import read_matrix
from quant_core.packing import pack
from quant_core.plan import Member, Plan, plan
from quant_core.spec import CANONICAL, Element, QuantSpec, Scale, Span, Zero, block, group
from quant_core.tensors import LayerTensors, QuantizedTensor

RANKS = (1, 2, 4, 8)
FOLDERS = sorted(d for d in FIXTURES.iterdir() if d.is_dir())


def one_of_each(p: Plan) -> list[Member]:
    """The first member of every scheme, kind and last name."""
    found: dict[tuple[str, str, str], Member] = {}
    for name, m in p.quantized.items():
        found.setdefault((m.scheme.name, m.layer.kind, name.rpartition(".")[2]), m)
    return list(found.values())


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; a zero may have either sign."""
    return torch.equal(a, b)


def refusal(lt: LayerTensors, axis: str) -> str:
    """Why this axis may be refused; "" if it may not."""
    spec = lt.weight.spec
    if axis == "in" and spec.blocks:
        return "opaque blocks run along the input"
    if spec.element.covers != (1, 1):
        return "one code stands for several weights"
    site = "input" if axis == "in" else "output"
    if any(t.site == site for t, _ in lt.transforms):
        return "a transform mixes features of several ranks"
    return ""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda d: d.name)
def test_parts_of_all_ranks_are_the_whole(folder: Path) -> None:
    p = plan(open_checkpoint(folder))
    cuts, codes = 0, []
    for member in one_of_each(p):
        lt = read_matrix(p, member, member.layer.experts[0] if member.layer.experts else None)
        n, k = member.scheme.shape
        dense = dense_weight(lt.weight, k)
        for ranks in RANKS:
            for axis, size in (("out", n), ("in", k)):
                if size % ranks:
                    continue
                spans = [even(size, r, ranks) for r in range(ranks)]
                try:
                    if axis == "out":
                        parts = [cut(lt, out=s, inp=Span.whole(k)) for s in spans]
                        got = torch.cat([dense_weight(x.weight, k) for x in parts])
                        biases = [x.bias for x in parts if x.bias is not None]
                        assert lt.bias is None or same(torch.cat(biases), lt.bias)
                    else:
                        parts = [cut(lt, out=Span.whole(n), inp=s) for s in spans]
                        got = torch.cat([dense_weight(x.weight, s.size) for x, s in
                                         zip(parts, spans, strict=True)], dim=1)  # fmt: skip
                        assert [x.bias is None for x in parts[1:]] == [True] * (ranks - 1)
                except LayoutError as err:
                    codes.append((err.code, bool(refusal(lt, axis)), str(err)))
                    continue
                assert same(got, dense), (member.layer.name, axis, ranks)
                cuts += 1
    assert cuts >= 8
    assert [c for c in codes if c[:2] != ("Q-LAYOUT-TP", True)] == []


# ------------------------------------------------------------------------- sizes that find bugs


def int4(n: int, k: int, size: int, seed: int = 0) -> tuple[LayerTensors, Tensor]:
    """Random int4 in groups along K (the last may be short), and its weights in plain torch."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scales = torch.rand(n, -(-k // size), generator=g).half() + 0.01
    dense = (codes.float() - 8) * scales.float().repeat_interleave(size, dim=1)[:, :k]
    spec = QuantSpec(
        element=Element.uint(4),
        scales=(Scale(element="f16", grain=group(size)),),
        zero=Zero(kind="const", value=8),
    )
    qt = QuantizedTensor(spec=spec, shape=(n, k), codes=pack(codes, 4, CANONICAL), scales=(scales,))
    return LayerTensors(operands={"weight": qt}), dense


def shards(lt: LayerTensors, k: int, ranks: int) -> Tensor:
    n = lt.weight.shape[0]
    spans = [even(k, r, ranks) for r in range(ranks)]
    parts = [cut(lt, out=Span.whole(n), inp=s) for s in spans]
    sizes = zip(parts, spans, strict=True)
    return torch.cat([dense_weight(part.weight, s.size) for part, s in sizes], dim=1)


@pytest.mark.parametrize(
    ("k", "size", "ranks"),
    [
        (29568, 128, 2),
        (29568, 128, 4),
        (4304, 32, 2),
        (4304, 32, 4),
        (4304, 32, 8),
        (18944, 128, 8),
    ],
)
def test_cut_through_a_group_is_exact(k: int, size: int, ranks: int) -> None:
    lt, dense = int4(6, k, size)
    assert k // ranks % size  # the cut is inside a group
    assert same(shards(lt, k, ranks), dense)


def test_comparison_notices_a_scale_that_moved() -> None:
    lt, dense = int4(6, 512, 128)
    scales = lt.weight.scales[0]
    scales[0, 0], scales[0, 1] = scales[0, 1].clone(), scales[0, 0].clone()
    assert not same(shards(lt, 512, 4), dense)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_block_of_128_cut_at_64_is_exact(axis: str) -> None:
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 0x7E, (256, 256), generator=g, dtype=torch.uint8)
    scales = torch.rand(2, 2, generator=g) + 0.1
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    dense = codes.view(torch.float8_e4m3fn).float() * wide
    element = Element(name="fp8_e4m3", bits=8, kind="float")
    spec = QuantSpec(element=element, scales=(Scale(element="f32", grain=block(128, 128)),))
    qt = QuantizedTensor(spec=spec, shape=(256, 256), codes=codes, scales=(scales,))
    lt = LayerTensors(operands={"weight": qt})
    whole = Span.whole(256)
    spans = [even(256, r, 4) for r in range(4)]
    if axis == "out":
        parts = [dense_weight(cut(lt, out=s, inp=whole).weight, 256) for s in spans]
    else:
        parts = [dense_weight(cut(lt, out=whole, inp=s).weight, 64) for s in spans]
    assert same(torch.cat(parts, dim=0 if axis == "out" else 1), dense)


def test_more_ranks_than_heads_hold_the_same_head() -> None:
    lt, dense = int4(2 * 16, 64, 32)  # two heads of 16
    for rank in range(8):
        span = heads(32, 2, rank, 8)
        part = cut(lt, out=span, inp=Span.whole(64))
        first = 16 * (rank // 4)
        assert same(dense_weight(part.weight, 64), dense[first : first + 16])


def test_fewer_ranks_than_heads_hold_whole_heads() -> None:
    assert [heads(6 * 16, 6, r, 3).start for r in range(3)] == [0, 32, 64]
    with pytest.raises(LayoutError, match="divides") as err:
        heads(6 * 16, 6, 0, 4)
    assert err.value.code == "Q-LAYOUT-TP"
    with pytest.raises(LayoutError):
        heads(3 * 16, 3, 0, 4)


@pytest.mark.parametrize("ranks", RANKS)
def test_padded_vocabulary_has_rows_of_zeros_at_its_end(ranks: int) -> None:
    lt, dense = int4(1000, 64, 32)
    parts = [
        dense_weight(cut(lt, out=vocabulary(1000, 1024, r, ranks), inp=Span.whole(64)).weight, 64)
        for r in range(ranks)
    ]
    assert {len(x) for x in parts} == {1024 // ranks}
    got = torch.cat(parts)
    assert same(got[:1000], dense)
    assert not got[1000:].any()


def test_uneven_features_name_the_numbers_of_ranks_that_work() -> None:
    with pytest.raises(LayoutError, match=r"\[1, 2, 3\]") as err:
        even(6, 0, 4)
    assert err.value.code == "Q-LAYOUT-TP"


def test_what_is_added_once_stays_on_the_first_rank() -> None:
    lt, _ = int4(4, 64, 32)
    lt.bias = torch.ones(4)
    lt.acc_bias = torch.ones(4, dtype=torch.int32)
    parts = [cut(lt, out=Span.whole(4), inp=even(64, r, 2)) for r in range(2)]
    assert parts[0].bias is not None
    assert parts[0].acc_bias is not None
    assert parts[1].bias is None
    assert parts[1].acc_bias is None
