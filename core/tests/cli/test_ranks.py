"""Bytes per rank, against sizes worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from quant_core.cli.output import escaped, size, table
from quant_core.cli.ranks import cut_axis, rank_bytes
from quant_core.plan import Member
from quant_core.spec import Axis, LayerDesc, ParamSpec, TensorInfo, Unquantized
from toy import SPEC, ToyScheme


def member(name: str, cut: str = "slice") -> tuple[Member, dict[str, TensorInfo]]:
    """256 x 512 weights, 4 bits in int32 words along K; float16 scales per 128 columns."""
    group = Axis(tag="group", per=Fraction(128), cut=cut)  # type: ignore[arg-type]
    params = (
        ParamSpec(
            name="qweight", shape=(64, 256), dtypes=("int32",),
            axes=(Axis(tag="in", per=Fraction(8)), Axis(tag="out")),
        ),
        ParamSpec(
            name="scales", shape=(4, 256), dtypes=("float16",), axes=(group, Axis(tag="out"))
        ),
    )  # fmt: skip
    layer = LayerDesc(kind="linear", name=name, stored=name)
    scheme = ToyScheme(name="w4a16", shape=(256, 512), operands={"weight": SPEC})
    sizes = {"qweight": ((64, 256), 65536), "scales": ((4, 256), 2048)}
    tensors = {
        f"{name}.{leaf}": TensorInfo(
            name=f"{name}.{leaf}", dtype="x", shape=shape, file="f", offset=0, nbytes=nbytes
        )
        for leaf, (shape, nbytes) in sizes.items()
    }
    return Member(layer=layer, scheme=scheme, params=params), tensors


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("model.layers.0.mlp.up_proj", 4, (65536 + 2048) / 4),
        ("model.layers.0.mlp.down_proj", 4, (65536 + 2048) / 4),
        ("model.layers.0.mlp.down_proj", 8, 65536 / 8 + 2048 / 4),  # 4 groups: one a rank at least
        ("model.layers.0.mlp.up_proj", 3, (65536 + 2048) * 86 / 256),  # 256 rows: 86, 86, 84
        ("model.layers.0.mlp.gate", 4, 65536 + 2048),  # a router: whole everywhere
    ],
)
def test_rank_bytes_quantized_member_is_cut_along_its_axis(
    name: str, ranks: int, expected: float
) -> None:
    one, tensors = member(name)
    assert rank_bytes(one, tensors, ranks) == pytest.approx(expected, rel=1e-12)


def test_rank_bytes_replicated_axis_is_kept_whole() -> None:
    one, tensors = member("model.layers.0.mlp.down_proj", cut="replicate")
    assert rank_bytes(one, tensors, 4) == 65536 / 4 + 2048


def test_rank_bytes_float_member_and_norm() -> None:
    head = TensorInfo(name="lm_head.weight", dtype="bfloat16", shape=(1000, 64), file="f",
                      offset=0, nbytes=128000)  # fmt: skip
    norm = TensorInfo(name="norm.weight", dtype="bfloat16", shape=(64,), file="f",
                      offset=0, nbytes=128)  # fmt: skip
    tensors = {"lm_head.weight": head, "norm.weight": norm}

    def of(name: str) -> Member:
        layer = LayerDesc(kind="linear", name=name, stored=name)
        return Member(layer=layer, scheme=Unquantized(rule="float"), stored=(f"{name}.weight",))

    assert rank_bytes(of("lm_head"), tensors, 2) == 64000
    assert rank_bytes(of("norm"), tensors, 2) == 128


def test_cut_axis_unknown_name_is_replicated() -> None:
    assert cut_axis("model.layers.0.self_attn.q_a_proj") is None
    assert cut_axis("model.layers.0.self_attn.o_proj") == "in"


def test_table_right_aligns_numbers_and_escapes_cells() -> None:
    assert table(("n", "count"), [("a\x1b[1m", 7), ("b", 1234)], indent="") == [
        "n         count",
        "a\\x1b[1m      7",
        "b          1234",
    ]


def test_escaped_keeps_line_breaks_only() -> None:
    assert escaped("a\nb\x1bc\r") == "a\nb\\x1bc\\r"


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1024.0 GiB")]
)
def test_size_uses_binary_units(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
