"""Every ordered pair of formats: exact, inexact with a bound on the loss, or refused with a reason.

Each cell converts a real checkpoint. "exact" means: every weight equal bit by bit after loading
the result by itself, through its own plugin's plan. What the formats' own tools make of the
results is in test_convert_tools.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from checkpoint_sets import checkpoints_root
from quant_core.checkpoint.open import open_checkpoint
from quant_core.convert import convert, diff, targets
from quant_core.errors import LayoutError
from quant_core.load import load_tensor
from quant_core.plan import plan
from quant_core.registry import registry


@dataclass(frozen=True)
class Cell:
    """``refused``: part of the reason. ``bound``: largest relative error of one module if losses
    are allowed (None: refused all the same); ``loss``: part of what is named."""

    refused: str = ""
    bound: float | None = None
    loss: str = ""


EXACT = Cell()
ORDER = Cell(refused="activation order")
WIDE = Cell(refused="more than 4 bits")
OPAQUE = Cell(refused="expected integer codes")
FLOAT_ACT = Cell(refused="quantizes its activations", bound=0.0, loss="no longer quantized")
# weights on the best of some ten finer grids of 8 bits: rounding each to 1/127 of the largest of
# its group would be 0.5 % off
MINIMA = Cell(refused="no multiple of their scale", bound=0.004, loss="8-bit codes")

# source -> target -> cell; targets not named are exact
TABLE: dict[str, dict[str, Cell]] = {
    "gptqmodel-awq-gemm-g128": {},
    "gptqmodel-4bit-g128-asym-descact": {"awq": ORDER, "autoround": ORDER, "gguf": ORDER},
    "gptqmodel-dynamic-4-8bit-skip": {"awq": WIDE},
    "gguf-llama-q4_k_m": {
        "awq": Cell(refused="not f16 or bf16 exactly"),  # and Q6_K has 6 bits
        "gptq": MINIMA,
        "autoround": MINIMA,
        "compressed_tensors": MINIMA,
    },
    "gguf-moe-q4_k_m": {
        "awq": Cell(refused="not f16 or bf16 exactly"),
        "gptq": MINIMA,
        "autoround": MINIMA,
        "compressed_tensors": MINIMA,
    },
    "gguf-llama-iq3_s": dict.fromkeys(("awq", "gptq", "autoround", "compressed_tensors"), OPAQUE),
    # the full set only
    "gguf-llama-q4_0": {},
    "gguf-llama-q8_0": {"awq": WIDE},
    "gptqmodel-2bit-g32-asym": {},
    "gptqmodel-3bit-g128": {},
    "gptqmodel-4bit-g64-asym-v2": {},
    "ar-w4g128-sym": {},
    "ar-w4g64-asym": {},
    "ar-mixed-bits": {"awq": WIDE},
    "ar-moe-w4g64": {},
    "ct-w4a16-awq-asym": {},
    "ct-moe-w4a16-g128": {},
    "ct-w8a16-g128": {"awq": WIDE},
    "hqq-4bit-g64": {  # float zero points, float32 scales
        "awq": Cell("no multiple of their scale", bound=0.12, loss="rounded to integers"),
        "gptq": MINIMA,
        "autoround": MINIMA,
        "compressed_tensors": MINIMA,
        "gguf": Cell("not f16 exactly", bound=0.001, loss="float16 minima"),
    },
    "ct-w8a8-int8-dynamic-gptq": {
        "awq": WIDE,
        "gptq": FLOAT_ACT,
        "autoround": FLOAT_ACT,
        "gguf": FLOAT_ACT,
    },
    "ct-w8a8-int8-static-asym-act": {
        "awq": WIDE,
        "gptq": FLOAT_ACT,
        "autoround": FLOAT_ACT,
        "gguf": FLOAT_ACT,
    },
}
INTEGERS = {"awq", "gptq", "gguf", "autoround", "compressed_tensors"}
OTHERS = {
    "fp8",
    "nvfp4",
    "mxfp4",
    "mxfp8",
    "quark",
    "modelslim_npu",
    "bitsandbytes",
    "hqq",
    "torchao",
}
FORMATS = [t for t in targets(registry()) if t in INTEGERS]
CELLS = [
    pytest.param(checkpoints_root() / source, to, cells.get(to, EXACT), id=f"{source}-{to}")
    for source, cells in TABLE.items()
    if (checkpoints_root() / source).is_dir()
    for to in FORMATS
]


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: waiting for threads of a busy machine would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same_weights(a, b):
    left, right = plan(open_checkpoint(a)), plan(open_checkpoint(b))
    assert left.members.keys() == right.members.keys()
    for name in left.quantized:
        written = name if right.members[name].quantized else f"{name}.weight"
        want, got = load_tensor(left, name).dequantize(), load_tensor(right, written).dequantize()
        assert torch.equal(want, got), name
    for name in left.dense:
        assert torch.equal(load_tensor(left, name).dense, load_tensor(right, name).dense), name
    right.ledger.check_loaded()


@pytest.mark.parametrize(("source", "to", "cell"), CELLS)
def test_cell(source, to, cell, tmp_path):
    out = tmp_path / "out"
    if not cell.refused:
        assert convert(source, out, to=to).exact
        assert plan(open_checkpoint(out)).match.plugin == to
        assert_same_weights(source, out)
        return
    with pytest.raises(LayoutError) as caught:
        convert(source, out, to=to)
    assert caught.value.code == "Q-LAYOUT-REPRESENT"
    assert cell.refused in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    if cell.bound is None:
        with pytest.raises(LayoutError):
            convert(source, out, to=to, allow_inexact=True)
        assert list(tmp_path.iterdir()) == []
        return
    result = convert(source, out, to=to, allow_inexact=True)
    assert not result.exact
    assert any(cell.loss in loss for layer in result.layers for loss in layer.losses)
    found = {d.name.removesuffix(".weight"): d.error for d in diff(source, out).layers}
    for layer in result.layers:
        assert layer.error == pytest.approx(found[layer.name], rel=1e-6), layer.name
        assert layer.error <= cell.bound, layer.name
        assert layer.losses or layer.error == 0
    if cell.bound:
        assert max(found.values()) > 1e-4  # a bound that nothing comes near would prove nothing


def test_every_format_with_exact_storage_is_a_target():
    assert (INTEGERS | OTHERS) & set(registry().plugins) == set(targets(registry()))


def test_all_pairs_are_covered():
    """Every format that a source of the table is in meets every format as a target."""
    sources = {plan(open_checkpoint(p.values[0])).match.plugin for p in CELLS}
    assert {"awq", "gptq", "gguf"} <= sources
    assert len(CELLS) == len({p.values[0] for p in CELLS}) * len(FORMATS)
