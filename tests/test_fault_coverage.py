"""Every fault of the list and every trap between float formats has a test that exists.

The table is in fault_coverage.py. Also here: the few traps that no package can show alone.
"""

from __future__ import annotations

import ast
import gc
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from checkpoint_sets import FIXTURES, REPO
from fault_coverage import ABSENT, COUNTS, FAULTS, FOLDERS, TRAPS
from quant_core import load_model
from quant_core.online import find_online
from quant_core.registry import registry
from quant_core.spec import LayerDesc, Span


@cache
def _tests(folder: str) -> frozenset[str]:
    """Names of all test functions below a folder."""
    return frozenset(
        node.name
        for file in (REPO / folder).rglob("test_*.py")
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def _lost(named: str) -> list[str]:
    pairs = (text.split(":") for text in named.split())
    return [f"{where}:{name}" for where, name in pairs if name not in _tests(FOLDERS[where])]


@pytest.mark.parametrize("rows", FAULTS)
def test_every_fault_of_the_list_has_its_tests(rows):
    assert FAULTS[rows].split()
    assert _lost(FAULTS[rows]) == []


def test_no_row_of_the_list_is_left_out():
    rows = {row for key in FAULTS for row in key.split()}
    every = {f"{s}{i:02}" for s, count in COUNTS.items() for i in range(1, count + 1)}
    assert rows | set(ABSENT) == every
    assert not rows & set(ABSENT)


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_its_tests(trap):
    assert _lost(TRAPS[trap]) == []


def test_all_traps_are_there():
    assert [int(t.split()[0]) for t in TRAPS] == list(range(1, 15))


def test_a_test_that_does_not_exist_is_noticed():
    assert _lost("core:test_that_nobody_wrote") == ["core:test_that_nobody_wrote"]


# ------------------------------------------------------------------------- what takes two packages


def test_trap_12_two_producers_of_nvfp4_write_the_same_bytes():
    """ModelOpt stores the global scale, compressed-tensors its inverse; codes and block scales of
    one matrix are equal byte by byte."""
    if not {"nvfp4", "compressed_tensors"} <= set(registry().plugins):
        pytest.skip("needs both plugins")
    dense = torch.randn(64, 256, generator=torch.Generator().manual_seed(7))
    stored = {}
    for name in ("nvfp4:nvfp4", "compressed_tensors:nvfp4"):
        _, offer = find_online(registry(), name)
        layer = LayerDesc(
            kind="linear", name="m", stored="m", inp=Span.whole(256), out=Span.whole(64),
            dtype="float32",
        )  # fmt: skip
        scheme = offer.make(layer, offer.options)
        stored[name] = scheme.serialize(layer, scheme.quantize(layer, dense))
    modelopt, ct = stored.values()
    assert torch.equal(modelopt["weight"], ct["weight_packed"])
    ours, theirs = (t["weight_scale"].view(torch.uint8) for t in (modelopt, ct))
    assert torch.equal(ours, theirs)
    factor = modelopt["weight_scale_2"].double() * ct["weight_global_scale"].double()
    assert factor.item() == pytest.approx(1.0, rel=2**-22)


def test_e13_threads_load_alike():
    folder = FIXTURES / "gptqmodel-awq-gemm-g128"
    ids = torch.arange(16)[None]
    before = torch.get_num_threads()
    state = (PreTrainedModel.tie_weights, torch.get_default_dtype(), gc.isenabled())
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(8) as pool:
            models = list(pool.map(lambda _: load_model(folder, dtype=torch.float32), range(8)))
        with torch.no_grad():
            logits = [m(ids).logits for m in models]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert state == (PreTrainedModel.tie_weights, torch.get_default_dtype(), gc.isenabled())
