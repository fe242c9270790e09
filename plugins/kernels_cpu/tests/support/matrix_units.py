"""The library with tiles that are memory (csrc/amx.h), for processors without matrix units."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from quant_kernels_cpu import library

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("kernel_amx", "kernel_amx_float8", "kernel_int8_amx")


def build(folder: Path) -> Path:
    """Compile the units that use tiles, and what picks a unit, in front of the built library."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    cc = [*hook._compiler(), *hook._FLAGS, "-O1", "-DQK_AMX_EMULATED"]
    cc += [
        f"-DQK_VERSION={hook._VERSION}",
        *(f"-DQK_HAVE_{name}" for name in hook._OPTIONAL),
    ]
    flags = {unit: given for unit, given in hook._OPTIONAL.values() if unit in UNITS}
    objects = [str(folder / f"{unit}.o") for unit in ("cpu", *flags)]
    jobs = [
        subprocess.Popen([*cc, *more, "-c", f"{unit}.c", "-o", out], cwd=ROOT / "csrc")
        for (unit, more), out in zip((("cpu", []), *flags.items()), objects, strict=True)
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    out, built = folder / "emulated.so", library._FILE
    link = [
        "-shared",
        "-o",
        str(out),
        *objects,
        f"-L{built.parent}",
        f"-l:{built.name}",
    ]
    subprocess.run([*cc, *link, f"-Wl,-rpath,{built.parent}"], check=True)
    return out


def use(file: Path) -> None:
    """Load it in place of the built one; before anything else is loaded."""
    library._FILE = file
    found = library.library()
    if library.ISAS[found.isa] != "amx":
        sys.exit(f"{file} emulates no matrix units here: {library.ISAS[found.isa]}")
