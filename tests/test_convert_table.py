"""Every ordered pair of formats: exact, inexact with a bound on the loss, or refused with a reason.

Each cell converts a real checkpoint. "exact" means: every weight equal bit by bit after loading
the result by itself, through its own plugin's plan. What the formats' own tools make of the
results is in test_convert_tools.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_sets import REPO, checkpoints_root, has_shared
from convert_cells import CELLS, LEFT_CACHE, OPTIONS, TARGETS, rows
from quant_core.checkpoint.open import open_checkpoint
from quant_core.convert import convert, diff, targets
from quant_core.convert.cache import check_cache
from quant_core.errors import LayoutError
from quant_core.load import load_tensor, read_matrix
from quant_core.plan import plan
from quant_core.registry import registry

INTEGERS = {"awq", "gptq", "gguf", "autoround", "compressed_tensors"}
INSTALLED = set(targets(registry()))
PAIRS = [
    pytest.param(checkpoints_root() / row.source, to, {}, CELLS[key], id=f"{row.source}-{to}")
    for row in rows()
    if (checkpoints_root() / row.source).is_dir()
    for to, key in row.cells.items()
    if to in INSTALLED
] + [
    pytest.param(
        checkpoints_root() / source,
        to,
        options,
        CELLS[key],
        id=f"{source}-{to}-{'-'.join(options)}",
    )
    for source, to, options, key in OPTIONS
    if (checkpoints_root() / source).is_dir() and to in INSTALLED
]


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: waiting for threads of a busy machine would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def attention(folder):
    """Modules with scales of keys and values."""
    return plan(open_checkpoint(folder)).attention.keys()


def assert_same_weights(a, b):
    left, right = plan(open_checkpoint(a)), plan(open_checkpoint(b))
    assert left.members.keys() == right.members.keys()
    for name in left.quantized:
        written = name if right.members[name].quantized else f"{name}.weight"
        want, got = load_tensor(left, name).dequantize(), load_tensor(right, written).dequantize()
        assert torch.equal(want, got), name
    for name in left.dense:
        assert torch.equal(load_tensor(left, name).dense, load_tensor(right, name).dense), name
    for name, member in right.attention.items():
        assert check_cache(read_matrix(left, left.attention[name]), read_matrix(right, member)), (
            name
        )
    right.ledger.check_loaded()


@pytest.mark.parametrize(("source", "to", "options", "cell"), PAIRS)
def test_cell(source, to, options, cell, tmp_path):
    out = tmp_path / "out"
    if cell.exact:
        assert convert(source, out, to=to, options=options).exact
        assert plan(open_checkpoint(out)).match.plugin == to
        assert_same_weights(source, out)
        assert attention(source) == attention(out)
        return
    with pytest.raises(LayoutError) as caught:
        convert(source, out, to=to, options=options)
    assert caught.value.code == "Q-LAYOUT-REPRESENT"
    assert list(tmp_path.iterdir()) == []
    if cell.refused:
        with pytest.raises(LayoutError) as caught:
            convert(source, out, to=to, allow_inexact=True, options=options)
        assert cell.refused in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        return
    assert "--allow-inexact" in str(caught.value)
    result = convert(source, out, to=to, allow_inexact=True, options=options)
    assert not result.exact
    named = [loss for layer in result.layers for loss in layer.losses]
    assert all(any(part in loss for loss in named) for part in cell.losses)
    assert bool(attention(out)) == (bool(attention(source)) and LEFT_CACHE not in named)
    if not cell.bound:
        assert_same_weights(source, out)
        return
    found = {d.name.removesuffix(".weight"): d.error for d in diff(source, out).layers}
    for layer in result.layers:
        assert layer.error == pytest.approx(found[layer.name], rel=1e-6), layer.name
        assert layer.error <= cell.bound, layer.name
        assert layer.losses or layer.error == 0
    # a bound that nothing comes near would prove nothing
    assert max(found.values()) > cell.bound / 100


def test_the_table_has_a_column_for_every_target():
    assert set(TARGETS) & set(registry().plugins) == INSTALLED


def test_every_cell_says_what_becomes_of_it():
    keys = {key for row in rows() for key in row.cells.values()} | {o[-1] for o in OPTIONS}
    assert keys <= CELLS.keys()
    assert CELLS.keys() - keys == set()
    assert all(len(row.cells) == len(TARGETS) for row in rows())


def test_every_format_is_a_source_too():
    """A row for each format that is written: what is written can be read back and converted."""
    found = {plan(open_checkpoint(p.values[0])).match.plugin for p in PAIRS}
    assert INTEGERS - {"compressed_tensors"} <= found
    if has_shared():
        assert found == INSTALLED - {"mxfp8"}  # no producer's file of it is at hand


def test_page_holds_this_table():
    script = REPO / "tools" / "gen_convert_doc.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_changed_weight_would_be_seen(fixtures, tmp_path):
    """Negative control of the comparison that every exact cell rests on."""
    source = fixtures / "hf-fp8-block128"
    convert(source, tmp_path / "out", to="fp8")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name].view(torch.uint8)[3, 5] ^= 1
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(AssertionError, match="q_proj"):
        assert_same_weights(source, tmp_path / "out")
