"""What is compiled past Triton's launcher is what Triton itself makes, and it is kept on disk."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest
import torch

from quant_kernels_triton import compiler, jitted, machine_code
from quant_kernels_triton.compiler import code_of
from quant_kernels_triton.jitted import Descriptor, Jits, Jitted
from quant_kernels_triton.machine_code import Code, Map

triton = pytest.importorskip("triton", reason="needs Triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
ASTSource = pytest.importorskip("triton.compiler").ASTSource
binder_of = pytest.importorskip("triton.runtime.jit").create_function_from_signature

ARGS = (
    torch.zeros(8, dtype=torch.int64), torch.zeros(8, 512, dtype=torch.bfloat16), 8, 512, 4,
)  # fmt: skip
CLEAR = Jitted("schedule", "clear")
CONSTANTS, OPTIONS = {"BT": 16, "BN": 512}, {"num_warps": 4}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(compiler, "_held", {})
    return tmp_path / "own" / "triton"


def made(**changes: object) -> Code:
    how = {"args": ARGS, "constants": CONSTANTS, "options": OPTIONS, "capability": 90} | changes
    code = code_of(CLEAR, **how)
    assert code is not None
    return code


def test_code_is_what_triton_compiles(folder):
    code = made()
    clear = CLEAR.function()
    names = clear.arg_names
    signature = dict.fromkeys(names, "constexpr")
    signature |= {"INDEX": "*i64", "Y": "*bf16", "T": "i32", "N": "i32", "E": "i32"}
    assert set(names) == set(signature)
    fixed = {(names.index(n),): v for n, v in CONSTANTS.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in ("INDEX", "Y", "N")}
    source = ASTSource(fn=clear, signature=signature, constexprs=fixed, attrs=aligned)
    want = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
    assert code.cubin == want.asm["cubin"]
    meta = want.metadata
    assert (code.name, code.shared, code.threads) == (meta.name, meta.shared, 32 * meta.num_warps)
    assert code.kinds == ("*i64", "*bf16", "i32", "i32", "i32")
    assert not code.dependent


@pytest.mark.parametrize(
    "value",
    [torch.zeros(64, dtype=t) for t in compiler._NAMES]
    + [torch.zeros(64)[1:], 0, 1, 7, 48, -16, 1 << 31, -(1 << 31), 1 << 40, True, False, 0.5, 16.0],
    ids=str,
)
def test_arguments_are_typed_as_triton_types_them(value):
    @triton.jit
    def kernel(A, B):
        pass

    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = binder_of(kernel.signature, kernel.params, backend)
    _, wanted, _ = binder(value, value)
    found = compiler._typed((), ("A", "B"), (value, value))
    assert found is not None
    for i, (kind, mark) in enumerate(wanted):
        one = kind == "constexpr"
        assert (i in found.ones) == one
        assert one or found.types[i] == kind
        assert one or (i in found.aligned) == (mark == "D")


ALL = [
    Jitted(file.stem, name)
    for file in sorted(Path(compiler.__file__).parent.glob("*.py"))
    for name, f in jitted._module(file.stem).items()
    if any("jit" in ast.unparse(d) for d in f.decorator_list)
]


def test_heads_of_functions_are_read_as_triton_reads_them():
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    assert len(ALL) > 60
    for one in ALL:
        fn = one.function()
        assert list(one.names) == fn.arg_names, one.name
        assert one.loose == {p.name for p in fn.params if p.do_not_specialize}, one.name
    assert any(one.loose for one in ALL)
    assert Jits("schedule").clear.function() is CLEAR.function()


@pytest.mark.parametrize("plain", [False, True])
def test_descriptors_are_typed_as_triton_types_them(plain):
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    x = torch.zeros(8, 128, dtype=torch.uint8)
    made = Descriptor(x, (4, 64), dtype=torch.int32, shape=(8, 32), plain=plain)

    @triton.jit
    def kernel(A):
        pass

    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = binder_of(kernel.signature, kernel.params, backend)
    _, ((wanted, _),), _ = binder(made.triton())
    typed = compiler._typed((), ("A",), (made,))
    assert typed is not None
    assert machine_code._with_layout(typed.types[0]).replace(" ", "") == wanted.replace(" ", "")
    assert (made.triton().shape, made.triton().strides) == (made.shape, made.strides)


def test_code_is_kept_on_disk_and_found_again(folder, monkeypatch):
    first = made()
    (file,) = folder.iterdir()
    monkeypatch.setattr(compiler, "_held", {})
    monkeypatch.setattr(machine_code, "_lowered", None)  # must not be asked
    assert made() == first
    assert [f.name for f in folder.iterdir()] == [file.name]


def test_damaged_code_is_compiled_again(folder, monkeypatch, caplog):
    first = made()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    monkeypatch.setattr(compiler, "_held", {})
    with caplog.at_level(logging.WARNING, logger="quant_core"):
        assert made() == first
    assert "damaged" in caplog.text
    assert file.read_bytes() == whole


def test_all_that_code_depends_on_makes_another_entry(folder, monkeypatch):
    asked = []

    def compiled(source):
        asked.append(source)
        return Code(name="", kinds=(), maps=(), threads=1, shared=0, dependent=False, cubin=b"x")

    monkeypatch.setattr(machine_code, "_lowered", compiled)
    made()
    made()
    made(args=(*ARGS[:2], 1, *ARGS[3:]))  # T is not specialized
    made(args=(*ARGS[:3], 1024, 4))
    assert len(asked) == 1
    made(args=(*ARGS[:3], 511, 4))
    made(args=(*ARGS[:3], 1, 4))
    made(args=(ARGS[0].int(), *ARGS[1:]))
    made(constants={"BT": 32, "BN": 512})
    made(options={"num_warps": 8})
    made(capability=80)
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    made()
    monkeypatch.setattr(machine_code, "_sources", lambda: "others")
    made()
    monkeypatch.setattr(machine_code, "_compiler", lambda: "another")
    made()
    assert len(asked) == len(list(folder.iterdir())) == 10


def test_a_code_survives_the_disk():
    code = Code(
        name="kernel", kinds=("tensordesc<bf16[64,64],L>", None, "*i32"), threads=128, shared=7,
        maps=(Map(kind="bf16", box=(64, 64), swizzle=3),), dependent=True, cubin=bytes(range(256)),
    )  # fmt: skip
    assert Code.from_bytes(code.to_bytes()) == code


def test_kinds_that_are_not_known_are_left_to_triton(folder):
    assert code_of(CLEAR, (object(),), {}, {}, 90) is None
    assert code_of(CLEAR, (torch.zeros(8, dtype=torch.complex64),), {}, {}, 90) is None
    assert not folder.exists()
