"""Layers of real checkpoints on the emulated operators give what the reference gives.

Found by what they are (integer or MXFP8 weights and activations), not by who wrote them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from checkpoint_sets import checkpoint_dirs
from quant_core.build import Builder
from quant_core.checkpoint.open import open_checkpoint
from quant_core.kernels.base import Accepted
from quant_core.kernels.reference import ReferenceKernel
from quant_core.load import read_matrix
from quant_core.parts import with_packing
from quant_core.plan import plan
from quant_core.spec import CANONICAL
from quant_kernels_npu.kernel import KERNELS

DIRS = checkpoint_dirs(("msmodelslim-",))
RUN = {
    "msmodelslim-mixed": {"npu_int8"},
    "msmodelslim-moe-w4a8-g64": {"npu_int8"},
    "msmodelslim-moe-w8a8-dynamic": {"npu_int8"},
    "msmodelslim-mxfp8": {"npu_mxfp8"},
    "msmodelslim-pdmix": {"npu_int8"},
    "msmodelslim-quarot-w8a8": {"npu_int8"},
    "msmodelslim-w4a4-dynamic": {"npu_int4", "npu_int8"},
    "msmodelslim-w4a8-dynamic": {"npu_int8"},
    "msmodelslim-w4a8-g64": {"npu_int8"},
    "msmodelslim-w8a16": {"npu_weight_only"},
    "msmodelslim-w8a8": {"npu_int8"},
    "msmodelslim-w8a8-kvc8": {"npu_int8"},
}
# results are bfloat16; these are rounded once more before: to float16, to bfloat16
PLACES = {"npu_int4": 2.0**-8 + 2.0**-11, "npu_weight_only": 2 * 2.0**-8}
REASONS = {  # MXFP4
    "msmodelslim-mxfp4": "integer codes of 4 or 8 bits",
    "msmodelslim-w4a8-mxfp": "integer codes of 4 or 8 bits",
}


def _first_of_each_scheme(p):
    found = {}
    for member in p.quantized.values():
        found.setdefault((member.scheme.name, member.layer.kind), member)
    return found.values()


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_layers_run_as_on_the_reference_or_say_why_not(folder, npu):
    p = plan(open_checkpoint(folder))
    build = Builder(plan=p, device="npu", dtype=torch.bfloat16)
    ran, reasons = set(), ""
    for member in _first_of_each_scheme(p):
        experts = member.layer.experts
        parts = [with_packing(read_matrix(p, member, e), CANONICAL) for e in experts or (None,)]
        kind = "grouped_linear" if experts else "linear"
        sizes = {"experts": len(experts)} if experts else {}
        op = build.op_for(kind, parts[0], member, **sizes)
        answers = {k: k.accepts(op) for k in KERNELS}
        accepted = [k for k, a in answers.items() if isinstance(a, Accepted)]
        reasons += " ".join(map(str, answers.values()))
        x = torch.randn(6, op.size("k")).bfloat16()
        rest = [torch.randint(0, len(experts), (6,))] if experts else []
        for kernel in accepted:
            same = _to_even(op) if "halfway" in answers[kernel].note else op
            same = replace(same, act_dtype="float32")
            want = _run(ReferenceKernel(), same, parts, x.float(), *rest)
            got = _run(kernel, op, parts, x, *rest)
            off = (got.float() - want).abs()
            bound = PLACES.get(kernel.name, 2.0**-8) * want.abs() + 1e-6 * want.abs().max()
            assert (off <= bound).all(), kernel.name
            ran.add(kernel.name)
    assert ran == RUN.get(folder.name, set())
    assert REASONS.get(folder.name, "") in reasons


def _to_even(op):
    """The same with halves of activations rounded to even, as the operator does."""
    operands = dict(op.operands)
    operands["input"] = replace(operands["input"], ties="even")
    return replace(op, operands=tuple(operands.items()))


def _run(kernel, op, parts, x, *rest):
    buffers = kernel.allocate(op)
    for i, lt in enumerate(parts):
        kernel.load_(buffers, op, lt, {"row": 0, "expert": i} if rest else {"row": 0})
    return kernel.bind(op)(list(buffers.values()), x, *rest)
