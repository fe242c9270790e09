"""Section F of the fault list, as far as whole loads show it: F05 to F07, F12 to F14, F17, and C26,
C30 to C32 of section C, on the checkpoints shipped here."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_sets import FIXTURES
from quant_core import load_model
from quant_core.build import Builder
from quant_core.checkpoint.open import open_checkpoint
from quant_core.errors import LayoutError, LimitError
from quant_core.kernels.base import Accepted
from quant_core.kernels.reference import ReferenceKernel
from quant_core.load import load_tensor, read_matrix
from quant_core.nn import QuantModule
from quant_core.plan import plan

AWQ = FIXTURES / "gptqmodel-awq-gemm-g128"
MOE = FIXTURES / "gguf-moe-q4_k_m"
ALL = sorted(d for d in FIXTURES.iterdir() if d.is_dir())
LINEAR = [d for d in ALL if d.name != "hf-gptoss-mxfp4"]  # which holds experts only
IDS = torch.arange(24)[None]


def _buffers(model) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers()) | dict(model.named_parameters())


def _same(a, b) -> bool:
    left, right = _buffers(a), _buffers(b)
    return left.keys() == right.keys() and all(
        torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8))
        if left[n].is_contiguous() and left[n].dim()
        else torch.equal(left[n], right[n])
        for n in left
    )


# ------------------------------------------------------------------------------------ C: layers


def _experts(p):
    name = "model.layers.0.mlp.experts"
    return {x: p.members[f"{name}.{x}_proj"] for x in ("gate", "up", "down")}


def test_c26_experts_without_tokens_and_one_with_all():
    p = plan(open_checkpoint(MOE))
    build = Builder(plan=p, dtype=torch.float32)
    module = build.experts("m", **_experts(p), activation=torch.nn.functional.silu)
    k = p.members["model.layers.0.mlp.experts.gate_proj"].scheme.shape[1]
    x, weights = torch.randn(6, k), torch.ones(6, 1)
    for expert in (0, module.num_experts - 1):
        index = torch.full((6, 1), expert)
        gate, up, down = (
            load_tensor(p, f"model.layers.0.mlp.experts.{w}_proj", expert=expert).dequantize()
            for w in ("gate", "up", "down")
        )
        want = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        got = module(x, index, weights)
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    nobody = module(x[:0], torch.zeros(0, 1, dtype=torch.int64), weights[:0])
    assert nobody.shape == (0, k)


@pytest.mark.parametrize("kernels", ["torch_ref", None], ids=["reference", "chosen"])
@pytest.mark.parametrize("folder", LINEAR, ids=lambda d: d.name)
def test_c30_any_number_of_tokens_has_its_exact_shape(folder, kernels):
    p = plan(open_checkpoint(folder))
    name = next(n for n, m in p.quantized.items() if m.layer.kind == "linear")
    layer = Builder(plan=p, dtype=torch.float32, kernels=kernels).linear(name, [p.members[name]])
    n, k = p.members[name].scheme.shape
    for shape in ((0,), (1,), (7,), (1, 1), (3, 0), (2, 33)):
        x = torch.randn(*shape, k)
        y = layer(x)
        assert y.shape == (*shape, n)
        assert y.isfinite().all()
        if x.numel():  # each token by itself gives the same: nothing leaks between rows
            rows = torch.cat([layer(r) for r in x.reshape(-1, k).split(1)])
            assert (y.reshape(-1, n) - rows).abs().max() <= 2e-5 * rows.abs().max()


def test_c31_sizes_beyond_31_bits_do_not_wrap():
    """Index sizes of a layer of 2**36 weights, without its memory."""
    p = plan(open_checkpoint(AWQ))
    member = p.members["model.layers.0.self_attn.q_proj"]
    build = Builder(plan=p, dtype=torch.float32)
    op = build.op_for("linear", read_matrix(p, member), member)
    size = 1 << 18
    sizes = tuple((name, size) for name, _ in op.sizes)
    kernel = ReferenceKernel()
    from quant_core.spec import CANONICAL

    big = replace(op, sizes=sizes, packing=CANONICAL)
    answer = kernel.accepts(big)
    assert isinstance(answer, Accepted)
    assert answer.workspace_bytes < 1 << 31  # works in blocks
    buffers = kernel.allocate(big, "meta")
    assert buffers["codes"].shape == (size, size // 2)
    assert buffers["codes"].numel() == 1 << 35
    assert buffers["scales_0"].shape == (size, size // 128)


@pytest.mark.parametrize("folder", ALL, ids=lambda d: d.name)
def test_c32_no_poison_is_left_after_a_load(folder):
    model = load_model(folder, dtype=torch.float32)
    held = _buffers(model)
    assert any(isinstance(m, QuantModule) for m in model.modules())
    bad = [n for n, t in held.items() if t.is_floating_point() and not t.float().isfinite().all()]
    assert bad == []


# --------------------------------------------------------------------------------- F: resources


def _sparse(path: Path, name: str, nbytes: int) -> None:
    """A safetensors file whose one tensor is a hole of ``nbytes``."""
    header = {name: {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + nbytes)


@pytest.mark.parametrize("exponent", [42])
def test_f06_more_than_the_memory_there_is_ends_before_it_is_taken(tmp_path, exponent):
    try:
        _sparse(tmp_path / "model.safetensors", "w", 1 << exponent)
    except OSError:
        pytest.skip("the file system holds no sparse file of that size")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(LimitError) as caught:
        checkpoint.read("w")
    assert caught.value.code == "Q-LIMIT-MEMORY"
    assert "'w'" in str(caught.value)
    assert str(1 << exponent) in str(caught.value)
    assert load_tensor(AWQ, "model.layers.0.self_attn.q_proj").dequantize().isfinite().all()


def test_f05_memory_that_ends_while_repacking_leaves_nothing_and_a_retry_works(monkeypatch):
    from quant_core.kernels import reference

    copy, calls = reference.copy_exactly_, []

    def scarce(name, target, value):
        calls.append(name)
        if len(calls) == 40:
            raise MemoryError("no more")
        copy(name, target, value)

    before = torch.get_default_dtype()
    with monkeypatch.context() as patched:
        patched.setattr(reference, "copy_exactly_", scarce)
        with pytest.raises(MemoryError):
            load_model(AWQ, dtype=torch.bfloat16, kernels="torch_ref")
    assert torch.get_default_dtype() == before
    assert torch.empty(1).device.type == "cpu"  # not left under the meta device
    again = load_model(AWQ, dtype=torch.bfloat16, kernels="torch_ref")
    assert again(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    "name", ["gptqmodel-awq-gemm-g128", "ct-w8a8-int8-dynamic-gptq", "gguf-moe-q4_k_m"]
)
def test_f07_two_loads_and_any_number_of_threads_give_the_same_bits(name):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = load_model(FIXTURES / name, dtype=torch.float32)
        logits = one(IDS).logits
        torch.set_num_threads(2)
        two = load_model(FIXTURES / name, dtype=torch.float32)
        layer = next(m for m in two.modules() if type(m).__name__ == "QuantLinear")
        x = torch.randn(9, layer.op.size("k"))
        on_two = layer(x)
        torch.set_num_threads(1)
        assert torch.equal(layer(x), on_two)
    finally:
        torch.set_num_threads(threads)
    assert _same(one, two)
    # float layers are torch's own, whose sums depend on the number of threads
    assert (two(IDS).logits - logits).abs().max() <= 1e-4


def test_f12_interrupted_load_leaves_defaults_alone_and_the_next_one_works(monkeypatch):
    from quant_core.checkpoint import safetensors

    calls = []

    def interrupting(whole):
        def interrupted(self, name, *index):
            calls.append(name)
            if len(calls) == 20:
                raise KeyboardInterrupt
            return whole(self, name, *index)

        return interrupted

    before, kind = torch.get_default_dtype(), safetensors.SafetensorsCheckpoint
    with monkeypatch.context() as patched:
        for method in ("read", "mapped"):
            patched.setattr(kind, method, interrupting(getattr(kind, method)))
        with pytest.raises(KeyboardInterrupt):
            load_model(AWQ, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == before
    assert torch.empty(1).device.type == "cpu"
    assert load_model(AWQ, dtype=torch.bfloat16)(IDS).logits.isfinite().all()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_f12_signal_ends_a_conversion_and_leaves_nothing(tmp_path, number, code):
    """The command waits for the signal in the middle of writing."""
    script = (
        "import sys, time\n"
        "from quant_core.convert import write\n"
        "inner = write._tensors\n"
        "def slow(*args, **kw):\n"
        "    for i, item in enumerate(inner(*args, **kw)):\n"
        "        if i == 3:\n"
        f"            open({str(tmp_path / 'begun')!r}, 'w').close()\n"
        "            time.sleep(60)\n"
        "        yield item\n"
        "write._tensors = slow\n"
        "from quant_core.cli.main import main\n"
        f"sys.exit(main(['convert', {str(AWQ)!r}, {str(tmp_path / 'out')!r}, '--to', 'gptq']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
        # a background job of a shell ignores this signal, and its children do
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert "Traceback" not in told
    assert [f.name for f in tmp_path.iterdir()] == ["begun"]


@pytest.mark.parametrize("name", ["with spaces", "gewichte-äöü-重み", "n" * 255])
def test_f13_odd_folder_names_load_and_convert(tmp_path, name):
    try:
        shutil.copytree(AWQ, tmp_path / name)
    except OSError:
        pytest.skip("the file system allows no such name")
    model = load_model(tmp_path / name, dtype=torch.float32)
    assert torch.equal(model(IDS).logits, load_model(AWQ, dtype=torch.float32)(IDS).logits)


def test_f13_read_only_folder_loads_and_is_left_alone(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(AWQ, folder)
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    before = sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir())
    try:
        load_model(folder, dtype=torch.float32)
        after = sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir())
    finally:
        folder.chmod(0o755)
    assert after == before


@pytest.mark.parametrize("flags", [("-O",), ("-W", "error"), ("-O", "-O", "-W", "error")])
def test_f14_bare_environment_optimised_or_strict_gives_the_same(flags):
    """No locale, no home, no terminal; asserts gone; every warning an error."""
    code = (
        "from quant_core import load_tensor\n"
        "from quant_core.cli.main import main\n"
        "from quant_core.errors import QuantError\n"
        "import sys\n"
        f"w = load_tensor({str(AWQ)!r}, 'model.layers.0.self_attn.q_proj').dequantize()\n"
        "print(float(w.double().sum()))\n"
        f"assert_code = main(['inspect', {str(AWQ)!r}])\n"
        f"bad = main(['inspect', {str(AWQ / 'nothing')!r}])\n"
        "sys.exit(10 * assert_code + bad)\n"
    )
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # 0 for the good path, 1 for the missing one
    want = load_tensor(AWQ, "model.layers.0.self_attn.q_proj").dequantize().double().sum()
    assert float(done.stdout.splitlines()[0]) == float(want)
    assert "Q-CKPT-IO" in done.stderr
    assert "Traceback" not in done.stderr


def test_f17_a_hundred_loads_leave_no_file_and_no_tensor_behind():
    def cycle() -> None:
        p = plan(open_checkpoint(AWQ))
        build = Builder(plan=p, dtype=torch.float32)
        for name in list(p.quantized)[:2]:
            build.linear(name, [p.members[name]])(torch.zeros(1, p.members[name].scheme.shape[1]))

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return len(os.listdir("/proc/self/fd")), tensors

    for _ in range(3):
        cycle()
    files, tensors = held()
    for _ in range(100):
        cycle()
    files_after, tensors_after = held()
    assert files_after <= files
    assert tensors_after <= tensors + 2


def test_wrong_value_is_still_an_error_without_asserts(tmp_path):
    """Negative control of F14: what would be wrong is noticed there too."""
    shutil.copytree(AWQ, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"]["bits"] = 5
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    code = (
        "import sys\nfrom quant_core.cli.main import main\n"
        f"sys.exit(main(['inspect', {str(tmp_path / 'm')!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Q-CFG" in done.stderr
    with pytest.raises((LayoutError, ValueError)):
        plan(open_checkpoint(tmp_path / "m"))
