"""Kernels without weights: what they answer, and that they compile for sm_90 without a GPU.

What they compute is checked in the interpreter (interpreted/check_attention.py, check_between.py)
and on a device (benchmarks/gpu_step.py).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from quant_core.errors import KernelError
from quant_core.kernels.base import Accepted, Kernel
from quant_core.kernels.between import gated_op, norm_op, rotary_op, update_op
from quant_core.spec import CHANNEL, Element, OpSpec, QuantSpec, Scale
from quant_kernels_triton.attention_kernel import AttentionStep, AttentionUpdate
from quant_kernels_triton.between_kernel import Gated, RmsNorm, Rotary

OP = OpSpec(
    op="attention", operands=(), features=frozenset({"one_token"}), device=("cuda", "9.0"),
    act_dtype="bfloat16",
)  # fmt: skip


def test_kernel_of_the_contract_says_what_it_runs():
    kernel = AttentionStep()
    assert isinstance(kernel, Kernel)
    assert isinstance(kernel.accepts(OP), Accepted)
    rounded = QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),))
    refused = {
        "op": replace(OP, op="linear"),
        "device": replace(OP, device=("cpu", "")),
        "operands": replace(OP, operands=(("k", rounded),)),
        "features": replace(OP, features=frozenset()),
        "act_dtype": replace(OP, act_dtype="float32"),
    }
    assert {n: kernel.accepts(op).axis for n, op in refused.items()} == {n: n for n in refused}
    for ask in (lambda: kernel.restore({}, OP), lambda: kernel.load_({}, OP, None, {})):
        with pytest.raises(KernelError):
            ask()


GPU = ("cuda", "9.0")
PARTS = {
    "rms_norm": (RmsNorm(), norm_op(4096, frozenset({"round_last"}), "bfloat16", GPU)),
    "rotary": (Rotary(), rotary_op(128, 64, "bfloat16", GPU)),
    "gated": (Gated(), gated_op(14336, "gelu_tanh", "float32", GPU)),
    "update": (AttentionUpdate(), update_op(32, 8, 128, 64, "bfloat16", GPU)),
    "attention": (AttentionStep(), OP),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_say_what_they_run(name):
    kernel, op = PARTS[name]
    assert isinstance(kernel, Kernel)
    assert isinstance(kernel.accepts(op), Accepted)
    refused = {
        "op": replace(op, op="linear"),
        "device": replace(op, device=("cpu", "")),
        "act_dtype": replace(op, act_dtype="float64"),
        "features": replace(op, features=frozenset({"unknown"})),
    }
    if name == "update":
        del refused["features"]  # it has none
    if name != "attention":
        odd = 65536 if name == "rms_norm" else 4090
        refused["k"] = replace(op, sizes=(("k", odd), *op.sizes[1:]))
    assert {n: kernel.accepts(o).axis for n, o in refused.items()} == {n: n for n in refused}


@pytest.mark.parametrize("name", PARTS)
def test_bound_functions_pickle(name):
    pytest.importorskip("triton", reason="needs triton, which exists for Linux only")
    kernel, op = PARTS[name]
    run = kernel.bind(op)
    assert isinstance(pickle.loads(pickle.dumps(run)), type(run))


def test_kernels_compile_with_pipelined_loads_and_without_spills(tmp_path):
    pytest.importorskip("triton", reason="needs triton, which exists for Linux only")
    here = os.path.join(os.path.dirname(__file__), "support")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "attention_compiled"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = ("step", "masked", "wide", "combine", "norm", "rotary", "gated")
    assert done.stdout.split() == [word for name in names for word in (name, "ok")]
