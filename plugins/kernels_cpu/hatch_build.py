"""Builds the C kernels with the system compiler; without one the package is pure Python.

Every unit of ``csrc`` is compiled with the flags of its own instruction set and may be left out
by a compiler that does not know them; at run time the processor decides. The library is linked
WITHOUT an OpenMP runtime: it takes the symbols of the one that torch has loaded, so that both
share one pool of threads.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_ROOT = Path(__file__).parent
_LIBRARY = "src/quant_kernels_cpu/_kernels.so"
_FLAGS = "-O3 -std=c11 -D_GNU_SOURCE -fPIC -fopenmp -fno-strict-aliasing -Wall".split()
_AVX2 = "-mavx2 -mfma -mf16c".split()
_AVX512 = [*_AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq".split()]
_AMX = [*_AVX512, *"-mavx512bf16 -mavx512vbmi -mamx-tile".split()]
# unit -> flags; the first ones are needed, each other one defines QK_HAVE_<name> when it compiles
_NEEDED = {
    "rows": [*_AVX2, "-ffp-contract=off"],
    "load": _AVX2,
    "load_streams": _AVX2,
    "finite": _AVX2,
    "unpack": _AVX2,
    "stored": [*_AVX2, "-mbmi2"],
    "kernel_avx2": _AVX2,
    "kernel_avx2_float8": _AVX2,
    "kernel_avx2_lookup": _AVX2,
    "kernel_int8_avx2": _AVX2,
    "step_avx2": _AVX2,
    "round_avx2": [*_AVX2, "-ffp-contract=off"],
}
_OPTIONAL = {
    "AVX512": ("kernel_avx512", _AVX512),
    "LOAD_AVX512": ("load_avx512", _AVX512),
    "AVX512_FLOAT8": ("kernel_avx512_float8", _AVX512),
    "STEP_AVX512": ("step_avx512", [*_AVX512, "-mprefer-vector-width=512"]),
    "ROUND_AVX512": (
        "round_avx512",
        [*_AVX512, "-mprefer-vector-width=512", "-ffp-contract=off"],
    ),
    "BF16": ("kernel_bf16", [*_AVX512, "-mavx512bf16"]),
    "STORED_BF16": ("kernel_stored", [*_AVX512, "-mavx512bf16", "-mavx512vbmi"]),
    "STORED_AVX512": ("kernel_stored_avx512", _AVX512),
    "BF16_FLOAT8": ("kernel_bf16_float8", [*_AVX512, "-mavx512bf16", "-mavx512vbmi"]),
    "VNNI": ("kernel_w4a8", [*_AVX512, "-mavx512vnni"]),
    "INT8_VNNI": ("kernel_int8_vnni", [*_AVX512, "-mavx512vnni"]),
    "AMX_FLOAT8": ("kernel_amx_float8", [*_AMX, "-mamx-bf16"]),
    "AMX_INT8": ("kernel_int8_amx", [*_AMX, "-mavx512vnni", "-mamx-int8"]),
    "AMX": ("kernel_amx", [*_AMX, "-mamx-bf16"]),
}
_VERSION = 32  # of the C interface; library.py checks it


def _compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CC", "cc"))
    return command if command and shutil.which(command[0]) else None


def build_library(target: Path) -> str:
    """Compile ``csrc`` into ``target``; returns "" or why there is no library.

    Raises:
        RuntimeError: a compiler is there but a needed unit does not compile.
    """
    machine = platform.machine().lower()
    if sys.platform != "linux" or machine not in ("x86_64", "amd64"):
        return f"kernels are written for Linux on x86-64, found {sys.platform} on {machine}"
    cc = _compiler()
    if cc is None:
        return "no C compiler (cc) found"

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*cc, *args], capture_output=True, text=True, cwd=_ROOT / "csrc")

    with tempfile.TemporaryDirectory() as folder:
        objects, defines = [], [f"-DQK_VERSION={_VERSION}"]

        def compile_unit(unit: str, flags: list[str]) -> str:
            out = str(Path(folder) / f"{unit}.o")
            done = run(*_FLAGS, *flags, "-c", f"{unit}.c", "-o", out)
            if done.returncode == 0:
                objects.append(out)
            return done.stderr if done.returncode else ""

        for unit, flags in _NEEDED.items():
            if error := compile_unit(unit, flags):
                raise RuntimeError(f"{unit}.c does not compile with {cc[0]}:\n{error}")
        for name, (unit, flags) in _OPTIONAL.items():
            if not compile_unit(unit, flags):
                defines.append(f"-DQK_HAVE_{name}")
        for unit in ("cpu", "load_calls", "between", "blocks", "dispatch", "dispatch_layer"):
            if error := compile_unit(unit, [*defines, "-fexceptions"]):
                raise RuntimeError(f"{unit}.c does not compile with {cc[0]}:\n{error}")
        fresh = Path(folder) / "kernels.so"  # moved into place whole: a loaded one stays intact
        done = run("-shared", "-o", str(fresh), *objects)
        if done.returncode:
            raise RuntimeError(f"{cc[0]} does not link:\n{done.stderr}")
        staged = target.with_suffix(".so.new")
        shutil.copyfile(fresh, staged)
        staged.replace(target)
    return ""


class KernelBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        target = _ROOT / _LIBRARY
        missing = build_library(target)
        if missing:
            self.app.display_warning(f"quant-kernels-cpu is built without C kernels: {missing}")
            return
        build_data["artifacts"].append(_LIBRARY)
        build_data["pure_python"] = False
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{system}"  # plain C: no Python ABI


if __name__ == "__main__":  # rebuild in place while developing
    print(build_library(_ROOT / _LIBRARY) or f"built {_ROOT / _LIBRARY}")
