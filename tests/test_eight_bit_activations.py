"""Real layers with 8-bit activations are offered the kernels that multiply them as such.

What those kernels compute needs a GPU (benchmarks/gpu_mixed.py); here a Hopper is only named.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from checkpoint_sets import FIXTURES, SHARED, has_shared
from quant_core.build import Builder
from quant_core.checkpoint.open import open_checkpoint
from quant_core.kernels.choose import accepting
from quant_core.load import read_matrix
from quant_core.plan import plan
from quant_core.registry import registry

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

FAR = [
    ("ct-w4afp8", "model.layers.0.mlp.down_proj", "gluon_a8"),
    ("modelopt-w4a8-awq", "model.layers.0.mlp.down_proj", "gluon_a8_stored@transformed"),
    ("msmodelslim-moe-w4a8-g64", "model.layers.0.mlp.experts.down_proj", "gluon_a8"),
]
CASES = [
    ("ct-w8a8-int8-dynamic-gptq", "model.layers.0.mlp.down_proj", "gluon_a8"),
    *(pytest.param(*case, marks=pytest.mark.shared) for case in FAR),
]


@pytest.mark.parametrize(("name", "module", "kernel"), CASES)
def test_kernel_takes_the_layer_as_it_is(name, module, kernel):
    folder = FIXTURES / name if (FIXTURES / name).is_dir() else SHARED / name
    if not folder.is_dir():
        assert not has_shared()
        pytest.skip("needs the full set of checkpoints")
    made = plan(open_checkpoint(folder))
    member = made.members[module]
    experts = member.layer.experts
    what, sizes = ("grouped_linear", {"experts": len(experts)}) if experts else ("linear", {})
    matrix = read_matrix(made, member, experts[0] if experts else None)
    op = Builder(plan=made, device="cpu").op_for(what, matrix, member, **sizes)
    op = replace(op, device=("cuda", "9.0"), act_dtype="bfloat16")
    assert kernel in {k.name for k, _, _ in accepting(op, registry())}
    without = replace(op, operands=tuple((r, s) for r, s in op.operands if r != "input"))
    assert kernel not in {k.name for k, _, _ in accepting(without, registry())}
