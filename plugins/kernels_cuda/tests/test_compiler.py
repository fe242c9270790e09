"""Compiling: the cache is keyed, atomic and repaired; sources compile where NVRTC is."""

from __future__ import annotations

import logging

import pytest

from cuda_cases import SPECS, inputs_of, make_layer, make_op
from quant_core.errors import KernelError
from quant_kernels_cuda import compiler as module
from quant_kernels_cuda.compiler import compile_cached, sources, unavailable
from quant_kernels_cuda.ops import _defines
from quant_kernels_cuda.schedule import candidates
from quant_kernels_cuda.variant import describe


class FakeRtc:
    version = (13, 0)

    def __init__(self):
        self.calls = []

    def compile(self, name, source, headers, options):
        self.calls.append(options)
        return b"cubin of " + " ".join(options).encode()


@pytest.fixture
def rtc(monkeypatch, tmp_path):
    fake = FakeRtc()
    monkeypatch.setattr(module, "compiler", lambda: fake)
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path))
    return fake


def files(tmp_path):
    return sorted((tmp_path / "cuda").iterdir())


def test_second_compilation_is_read_from_disk(rtc, tmp_path):
    first = compile_cached("decode", (("NT", "1"),), "90")
    assert compile_cached("decode", (("NT", "1"),), "90") == first
    assert len(rtc.calls) == 1
    assert rtc.calls[0][0] == "--gpu-architecture=sm_90"
    assert "-DNT=1" in rtc.calls[0]
    assert [f.suffix for f in files(tmp_path)] == [".cubin"]


def test_options_architecture_version_and_source_make_other_entries(rtc, monkeypatch):
    compile_cached("decode", (("NT", "1"),), "90")
    compile_cached("decode", (("NT", "2"),), "90")
    compile_cached("decode", (("NT", "1"),), "80")
    rtc.version = (13, 1)
    compile_cached("decode", (("NT", "1"),), "90")
    text, headers = sources()
    monkeypatch.setattr(module, "sources", lambda _name: (text + "\n", headers))
    compile_cached("decode", (("NT", "1"),), "90")
    assert len(rtc.calls) == 5


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40] + b"x" + b[41:],
                                    lambda b: b""])  # fmt: skip
def test_damaged_entry_is_compiled_again_and_replaced(rtc, tmp_path, damage, caplog):
    good = compile_cached("decode", (), "90")
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING, logger="quant_core"):
        assert compile_cached("decode", (), "90") == good
    assert "damaged" in caplog.text
    assert file.read_bytes() == whole
    assert len(rtc.calls) == 2


def test_folder_that_cannot_be_written_is_said_once(rtc, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="quant_core"):
        compile_cached("decode", (), "90")
        compile_cached("decode", (), "90")
    assert len(rtc.calls) == 2
    assert caplog.text.count("is not kept") == 1


def test_no_library_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_candidates", lambda: iter([str(tmp_path / "libnvrtc.so")]))
    module._find.cache_clear()
    try:
        assert "nvidia-cuda-nvrtc" in unavailable()
        with pytest.raises(KernelError) as e:
            module.compiler()
        assert e.value.code == "Q-KERNEL-COMPILE"
    finally:
        module._find.cache_clear()


def test_named_library_is_the_only_candidate(monkeypatch):
    monkeypatch.setenv("QUANT_NVRTC", "/somewhere/libnvrtc.so")
    assert list(module._candidates()) == ["/somewhere/libnvrtc.so"]


def test_constants_of_the_source_are_all_given():
    """Every name that group.cuh's head lists is defined by a variant and its schedule."""
    v = describe(make_op(make_layer(SPECS["int4_g128"], 64, 256), 256))
    names = {name for name, _ in _defines(v, candidates(v, 1, 132, 232448, (66,))[0][1])}
    head = sources()[1]["group.cuh"].partition("#pragma")[0].partition("Compile-time:")[2]
    listed = {w.strip("(),:") for w in head.split()} & {w for w in names if "_T" not in w[-6:]}
    assert {"F16", "NT", "RT", "GPC", "ST", "CODE_BITS", "FLUSH", "OUT_EXP"} <= listed
    assert {"S0_TYPE", "O1_SUBS", "Z_GRAIN", "IN_WEIGHT"} <= names


needs_nvrtc = pytest.mark.skipif(bool(unavailable()), reason=f"no NVRTC: {unavailable()}")
COMPILED = ["int4_g128", "int4_two_level", "int3_g64_zeros", "fp4_e4m3_g16", "fp8_block",
            "uint8_g128_zeros"]  # fmt: skip


@needs_nvrtc
@pytest.mark.parametrize("act", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", COMPILED)
def test_source_compiles_for_hopper_and_ampere(name, act):
    spec = SPECS[name]
    v = describe(make_op(make_layer(spec, 64, 512), inputs_of(spec, 512), act))
    found = {s.kernel: s for _, s in candidates(v, 1, 132, 163 << 10, (66,))}
    found |= {s.kernel + "16": s for _, s in candidates(v, 16, 132, 163 << 10, ())}
    assert {"decode", "resident", "resident16"} <= set(found)
    for arch, s in zip(("90", "80", "90", "80"), found.values()):
        source, headers = sources(s.kernel)
        options = (f"--gpu-architecture=sm_{arch}", "--std=c++17", "-default-device")
        options += tuple(f"-D{a}={b}" for a, b in _defines(v, s))
        cubin = module.compiler().compile(f"{s.kernel}.cu", source, headers, options)
        assert cubin[:4] == b"\x7fELF"


@needs_nvrtc
def test_broken_source_raises_with_the_compilers_words():
    with pytest.raises(KernelError, match="nonsense") as e:
        module.compiler().compile("x.cu", "nonsense;", {}, ("--gpu-architecture=sm_90",))
    assert e.value.code == "Q-KERNEL-COMPILE"
