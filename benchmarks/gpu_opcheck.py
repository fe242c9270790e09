"""``torch.library.opcheck`` of every operator that this project registers, on one GPU.

    python benchmarks/gpu_opcheck.py [--json FILE] [--only NAME,...]

Operators are listed from torch's own registry, so one without a case here is an error, also in a
test that needs no GPU. A case is a call that reaches the operator: a layer of a kernel, or what
runs between layers. opcheck then calls it again with what it was given: its schema (what is
written, what aliases what), its fake, its autograd registration, and traced with fixed and with
dynamic shapes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from source_tree import REPO, use

use()
_PATHS = [str(REPO / "benchmarks"), str(REPO / "plugins/kernels_triton/tests/support")]
sys.path[:0] = _PATHS

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

__all__ = ["CASES", "missing", "operators"]

PACKAGES = {
    "quant_core": "quant_core",
    "quant_cuda": "quant_kernels_cuda",
    "quant_triton": "quant_kernels_triton",
    "quant_torch": "quant_kernels_torch",
    "quant_humming": "quant_kernels_humming",
}
"""namespace -> the package that registers it; quant_cpu's operators have their own tests."""
ENGINES = ("vllm", "sglang")  # adapters that import their engine
DEVICE = ("cuda", "9.0")
SIZES = (256, 640)  # what torch's own products want


def operators() -> list[str]:
    """Names of all operators of ``PACKAGES``, as torch knows them once every module is imported."""
    for package in PACKAGES.values():
        path = importlib.import_module(package).__path__
        for found in pkgutil.walk_packages(path, f"{package}."):
            leaf = found.name.rpartition(".")[2]
            if not leaf.startswith((*ENGINES, "__main__")):
                importlib.import_module(found.name)
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n for n in names if n.partition("::")[0] in PACKAGES)


def missing() -> tuple[list[str], list[str]]:
    """(operators without a case, cases without an operator)."""
    known = set(operators())
    return sorted(known - set(CASES)), sorted(set(CASES) - known)


class Calls(TorchDispatchMode):
    """What calls give the operators of this project that they reach; the first call of each."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name.partition("::")[0] in PACKAGES and name not in self.held:
            copies = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs or {}))
            self.held[name] = (func, *copies)
        return func(*args, **(kwargs or {}))


def _x(rows: int, k: int, act: str = "bfloat16", device: str = "cuda") -> Tensor:
    return torch.randn(rows, k, device=device).to(getattr(torch, act))


@dataclass(frozen=True)
class Layer:
    """A call of one kernel on one random layer of ``gpu_accuracy_cases``."""

    kernel: str
    weight: str
    inputs: str = ""
    kind: str = "linear"
    experts: int = 0
    rows: int = 7
    sizes: tuple[int, int] = SIZES
    act: str = "bfloat16"
    device: tuple[str, str] = DEVICE

    def loaded(self) -> tuple[Any, Any, list[Tensor]]:
        """(the kernel, the operation as it runs it, its buffers)."""
        from gpu_accuracy_cases import INPUTS, WEIGHTS, make_layer, make_op

        from quant_core.kernels.choose import accepting
        from quant_core.kernels.reference import ReferenceKernel
        from quant_core.registry import registry

        inputs = INPUTS[self.inputs] if self.inputs else None
        op = make_op(WEIGHTS[self.weight], *self.sizes, kind=self.kind, act=self.act,
                     device=self.device, inputs=inputs, experts=self.experts)  # fmt: skip
        found: dict[str, tuple[Any, Any]] = {"torch_ref": (ReferenceKernel(), op)}
        found |= {k.name: (k, o) for k, o, _ in accepting(op, registry())}
        if self.kernel not in found:
            raise LookupError(f"{self.kernel} refuses {self.weight}, others: {sorted(found)}")
        kernel, op = found[self.kernel]
        buffers = kernel.allocate(op, self.device[0])
        for e in range(max(1, self.experts)):
            at = {"row": 0, "expert": e} if self.experts else {"row": 0}
            kernel.load_(buffers, op, make_layer(op, seed=e), at)
        return kernel, op, list(buffers.values())

    def given(self) -> tuple[Tensor, ...]:
        """What the bound kernel takes besides its buffers."""
        if self.kind == "embedding":
            return (torch.arange(self.rows, device=self.device[0]),)
        x = _x(self.rows, self.sizes[1], self.act, self.device[0])
        if not self.experts:
            return (x,)
        return x, torch.arange(self.rows, device=self.device[0]) % (self.experts + 1) - 1

    def __call__(self) -> None:
        kernel, op, values = self.loaded()
        kernel.bind(op)(values, *self.given())


def _weightless(kernel: Callable[[], Any], spec: str) -> None:
    from gpu_rounding import SPECS, op_of, stored

    held = [None if t is None else t.cuda() for t in stored(SPECS[spec], 640)]
    kernel().bind(op_of(spec, 640, "bfloat16"))([], _x(7, 640), *held)


def _round_core() -> None:
    from quant_core.kernels.quantizer import TorchRound

    _weightless(TorchRound, "fp8 token")


def _round_triton() -> None:
    from quant_kernels_triton.rounding_kernel import Round

    _weightless(Round, "fp8 stored")


def _states() -> None:
    import quant_core.kv_states  # noqa: F401  registers it
    from quant_core.spec import TENSOR, Element, QuantSpec, Scale
    from quant_core.spec_json import to_text

    element = Element(name="fp8_e4m3", bits=8, kind="float")
    spec = QuantSpec(element=element, scales=(Scale(element="f32", grain=TENSOR),))
    scale = torch.full((1,), 0.02, device="cuda")
    torch.ops.quant_core.round_states(_x(5, 128), scale, None, to_text(spec))


def _hadamard(kernel: str) -> None:
    from gpu_rounding import _hadamard_op, _held

    from quant_core.kernels.hadamard import TorchHadamard
    from quant_kernels_triton.hadamard_kernel import Hadamard

    _, parts, root = _held(12, 32)
    made = {"torch": TorchHadamard, "triton": Hadamard}[kernel]()
    made.bind(_hadamard_op(12, 32, 768, "bfloat16"))([], _x(5, 768), *parts, root)


def _step(kind: str) -> None:
    import gpu_step

    run, _ = next(c for name, c in gpu_step.cases().items() if name.startswith(kind))
    run()


def _add_norm() -> None:
    from quant_kernels_triton.between_run import run_norm

    run_norm("", [_x(1, 640)[0]], _x(7, 640), 1e-5, _x(7, 640))


def _shared() -> None:
    from quant_core.kernels.reference_shared import bind_shared

    layer = Layer("torch_ref", "int8 channel f32", "int8 token")
    loaded = [layer.loaded() for _ in range(2)]
    run = bind_shared([op for _, op, _ in loaded])
    assert run is not None, "layers that quantize x are run in one call"
    run([values for _, _, values in loaded], *layer.given())


def _rows(kind: str, experts: int = 0) -> None:
    """A table of two kernels over one stored copy, as a family binds it."""
    from quant_core.kernels.family import RowsBound

    some = Layer("triton_wna16", "int4 g128 bf16", kind=kind, experts=experts)
    kernel, op, values = some.loaded()
    many, other, _ = replace(some, kernel="torch_dequant").loaded()
    table = ((4, kernel.bind(op)), (1 << 62, many.bind(other)))
    bound = RowsBound(op, table, f"opcheck {kind}")
    bound._traced(values, *(*some.given(), None)[:2])


def _packed(kind: str) -> None:
    """A layer inside an engine's module."""
    from quant_core.engines.packed import Bound, attach

    layer = Layer("triton_wna16", "int4 g128 bf16", kind=kind)
    kernel, op, values = layer.loaded()
    names = {f"t{i}": t for i, t in enumerate(values)}
    part = Bound(run=kernel.bind(op), tensors=names, rows=SIZES[0], op=op, kernel=kernel.name)
    _KEPT.append(nn.Module())
    packed = attach(f"opcheck.{kind}", _KEPT[-1], [part])
    _KEPT.append(packed)
    if kind == "embedding":
        packed.call_embedding(*layer.given(), SIZES[1], torch.bfloat16)
    else:
        packed.call_linear(*layer.given())


_KEPT: list[Any] = []  # modules outlive their calls
_INT4, _FP8, _STACK = "int4 g128 bf16", "fp8 channel", {"kind": "grouped_linear", "experts": 3}
_TABLE = {"kind": "embedding"}
CASES: dict[str, Sequence[Callable[[], None]]] = {
    "quant_core::linear_ref": [Layer("torch_ref", _INT4), Layer("torch_ref", _FP8, "fp8 token")],
    "quant_core::grouped_linear_ref": [Layer("torch_ref", _INT4, **_STACK)],
    "quant_core::embedding_ref": [Layer("torch_ref", _INT4, **_TABLE)],
    "quant_core::linear_shared_ref": [_shared],
    "quant_core::hadamard": [partial(_hadamard, "torch")],
    "quant_core::round_input": [_round_core],
    "quant_core::round_states": [_states],
    "quant_core::rows_linear": [partial(_rows, "linear")],
    "quant_core::rows_grouped_linear": [partial(_rows, "grouped_linear", 3)],
    "quant_core::rows_embedding": [partial(_rows, "embedding")],
    "quant_core::packed_linear": [partial(_packed, "linear")],
    "quant_core::packed_embedding": [partial(_packed, "embedding")],
    "quant_cuda::linear": [Layer("cuda_decode", _INT4), Layer("cuda_decode", "nvfp4")],
    "quant_cuda::grouped_linear": [Layer("cuda_decode", _INT4, **_STACK)],
    "quant_torch::fp8_linear": [Layer("torch_scaled_mm", _FP8, "fp8 token")],
    "quant_torch::block_fp8_linear": [Layer("torch_scaled_mm_block", "fp8 block", "fp8 g128")],
    "quant_torch::int8_linear": [Layer("torch_int_mm", "int8 channel f32", "int8 token", rows=33)],
    "quant_torch::fp8_grouped": [Layer("torch_grouped_fp8", _FP8, "fp8 token", **_STACK)],
    "quant_torch::tiles_linear": [Layer("torch_dequant", _INT4, rows=100)],
    "quant_torch::tiles_grouped": [Layer("torch_dequant", _INT4, rows=100, **_STACK)],
    "quant_torch::tiles_embedding": [Layer("torch_dequant", _INT4, **_TABLE)],
    "quant_torch::int4_cpu": [Layer("torch_int4_cpu", _INT4, rows=3, device=("cpu", ""))],
    "quant_humming::linear": [Layer("humming", _INT4)],
    "quant_humming::grouped_linear": [Layer("humming", _INT4, **_STACK)],
    "quant_triton::linear": [
        Layer("triton_wna16", _INT4), Layer("triton_dense", _INT4, rows=100),
        Layer("gluon_wna16", _INT4, rows=33), Layer("gluon_wna16", "uint4 g32 code", rows=256),
    ],
    "quant_triton::grouped_linear": [
        Layer("triton_wna16", _INT4, **_STACK),
        Layer("gluon_wna16", _INT4, rows=100, **_STACK),
    ],
    "quant_triton::embedding": [Layer("triton_wna16", _INT4, **_TABLE)],
    "quant_triton::scaled_linear": [Layer("triton_scaled", _FP8, "fp8 token"),
                                    Layer("triton_scaled", "fp8 block", "fp8 g128", rows=100)],
    "quant_triton::scaled_ring": [Layer("gluon_scaled", _FP8, "fp8 token", rows=33)],
    "quant_triton::mixed_linear": [Layer("gluon_a8", _INT4, "fp8 token", rows=33),
                                   Layer("gluon_a8_stored", _INT4, "int8 stored", rows=100)],
    "quant_triton::mixed_grouped": [Layer("gluon_a8", _INT4, "fp8 token", rows=33, **_STACK)],
    "quant_triton::round_input": [_round_triton],
    "quant_triton::hadamard": [partial(_hadamard, "triton")],
    "quant_triton::rms_norm": [partial(_step, "norm (5, 576)")],
    "quant_triton::add_rms_norm": [_add_norm],
    "quant_triton::rotary": [partial(_step, "rotary")],
    "quant_triton::gated": [partial(_step, "gated")],
    "quant_triton::attention_step": [partial(_step, "attention (2, 6, 2, 33, 80) bool")],
    "quant_triton::attention_decode": [partial(_step, "decode (3, 6")],
}  # fmt: skip
"""operator -> calls that reach it."""


def check(name: str, number: int) -> dict[str, Any]:
    """One case: what torch says of the operator."""
    torch.manual_seed(0)
    began, row = time.time(), {"operator": name, "case": number, "wrong": ""}
    try:
        calls = Calls()
        with calls:
            CASES[name][number]()
        if name not in calls.held:
            raise LookupError(f"the call reaches {sorted(calls.held)} only")
        func, args, kwargs = calls.held[name]
        torch.library.opcheck(func, args, kwargs)
    except Exception as err:  # all cases are run
        row["wrong"] = f"{type(err).__name__}: {str(err)[:800]}"
    return row | {"seconds": round(time.time() - began, 1)}


def main() -> int:
    """1 if an operator has no case, or torch finds something wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="operators whose names hold one of these")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=300.0, help="of one case")
    a = parser.parse_args()
    without, unknown = missing()
    wrong = [f"{n}: no case" for n in without] + [f"{n}: no such operator" for n in unknown]
    jobs = [(n, i) for n in CASES for i in range(len(CASES[n]))
            if any(o in n for o in a.only.split(","))]  # fmt: skip
    os.environ["PYTHONPATH"] = os.pathsep.join([*_PATHS, os.environ.get("PYTHONPATH", "")])
    rows = []
    with multiprocessing.get_context("spawn").Pool(min(a.workers, len(jobs))) as pool:
        for job, result in [(job, pool.apply_async(check, job)) for job in jobs]:
            try:
                rows.append(result.get(timeout=a.seconds))
            except multiprocessing.TimeoutError:
                rows.append({"operator": job[0], "case": job[1], "wrong": "not done in time"})
            print(json.dumps(rows[-1]), flush=True)
        pool.terminate()
    wrong += [f"{r['operator']}: {r['wrong']}" for r in rows if r["wrong"]]
    if a.json:
        a.json.write_text(json.dumps({"rows": rows, "wrong": wrong}, indent=1))
    print(f"{len(operators())} operators, {len(jobs)} cases, {len(wrong)} wrong")
    print("\n".join(f"WRONG {w}" for w in wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
