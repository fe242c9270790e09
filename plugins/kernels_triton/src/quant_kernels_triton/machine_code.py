"""Machine code of a jitted function by Triton's compiler alone; nothing here imports torch.

    function, types of its arguments, constants, options
      -> TTGIR -> LLVM IR -> PTX -> cubin        the stages of Triton's backend
      -> Code                                    what the CUDA driver needs for a launch

On a first launch Triton also builds two extension modules with the system's C compiler, hashes its
library of 400 MB and keeps the text of every stage: more than half of the time to a first result.
A ``Code`` is launched by ``direct``; whatever is not known here (scratch memory, clusters) is left
to Triton.

A code has no sizes in it but those that are constants, so layers of one type share it. The folder
"triton" of the cache has one file for each, named by all that it depends on: the sources of this
package, types, constants, options, compute capability, Triton's version and environment variables.

What each stage took is logged at level DEBUG, and is the record's attribute ``stages``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import struct
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quant_core.cache import cache_folder, keep, kept
from quant_core.memory import collector_paused
from quant_kernels_triton.jitted import Jitted, layout_of

__all__ = ["Code", "Map", "Source", "Typed", "any_stored", "lowered", "report", "stored"]

log = logging.getLogger("quant_core")

_HEAD = struct.Struct("<I")  # bytes of the description, which the machine code follows
_DESCRIPTOR = re.compile(r"tensordesc<([a-z0-9]+)\[")
_ORDERED = re.compile(r"tensordesc<([a-z0-9]+)\[([0-9,]+)\],(plain|swizzled)>")
_ODD = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A tensor map among the arguments: element type, box, CUDA's number of the swizzle."""

    kind: str
    box: tuple[int, ...]
    swizzle: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A compiled function.

    Attributes:
        kinds: Triton's type of every argument before the constants; None if it became one.
        maps: one for each descriptor among them.
        dependent: may be launched while the kernel before still runs.
    """

    name: str
    kinds: tuple[str | None, ...]
    maps: tuple[Map, ...]
    threads: int
    shared: int
    dependent: bool
    cubin: bytes

    def to_bytes(self) -> bytes:
        """For the disk; inverse of ``from_bytes``."""
        maps = [(m.kind, m.box, m.swizzle) for m in self.maps]
        rest = (self.name, self.kinds, self.threads, self.shared, self.dependent)
        text = json.dumps([maps, *rest]).encode()
        return _HEAD.pack(len(text)) + text + self.cubin

    @staticmethod
    def from_bytes(held: bytes) -> Code:
        """What ``to_bytes`` gave."""
        at = _HEAD.size + _HEAD.unpack_from(held)[0]
        maps, name, kinds, threads, shared, dependent = json.loads(held[_HEAD.size : at])
        return Code(
            name=name, kinds=tuple(kinds), threads=threads, shared=shared, dependent=dependent,
            maps=tuple(Map(kind=k, box=tuple(b), swizzle=s) for k, b, s in maps),
            cubin=held[at:],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Typed:
    """Types of the arguments before the constants, and which are multiples of 16 or one."""

    types: tuple[str, ...]
    aligned: tuple[int, ...]
    ones: tuple[int, ...]


def _with_layout(kind: str) -> str:
    """A descriptor's type with the layout as Triton writes it."""
    found = _ORDERED.fullmatch(kind)
    if found is None:
        return kind
    element, box, order = found.groups()
    layout = layout_of(element, [int(n) for n in box.split(",")], order == "plain")
    return f"tensordesc<{element}[{box}],{layout!r}>"


@functools.cache
def _sources() -> str:
    """A digest of this package's source files."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


@functools.cache
def _compiler() -> str:
    """Which Triton this is: of its files, which tells without importing it."""
    found = find_spec("triton")
    assert found is not None, "kernels are offered only where there is Triton"
    assert found.origin is not None
    package = Path(found.origin).parent
    library = next(package.glob("_C/libtriton*.so"), package / "__init__.py").stat()
    return f"{package.joinpath('__init__.py').read_text('utf-8')} {library.st_size}"


def _variables() -> str:
    """Environment variables that Triton's compiler may heed."""
    names = ("TRITON", "LLVM", "MLIR", "PTXAS", "DISABLE_PTXAS", "NVPTX")
    held = {k: v for k, v in os.environ.items() if k.startswith(names)}
    return str(sorted((k, v) for k, v in held.items() if not k.endswith(("_DIR", "_HOME"))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a code is made of.

    Attributes:
        constants, options: compile-time constants by name, and what the backend is told.
        capability: of the device, 90 for 9.0.
    """

    module: str
    name: str
    typed: Typed
    constants: dict[str, Any]
    options: dict[str, Any]
    capability: int

    @property
    def file(self) -> Path:
        """Where the code is kept."""
        text = "\0".join((
            self.module, self.name, repr(self.typed), repr(sorted(self.constants.items())),
            repr(sorted(self.options.items())), str(self.capability),
        ))  # fmt: skip
        name = hashlib.sha256(text.encode()).hexdigest()
        return cache_folder("triton") / f"{_build()}-{name}.code"


def _build() -> str:
    """A name for what all codes of this build depend on."""
    text = "\0".join((_sources(), _compiler(), _variables()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def any_stored() -> bool:
    """Whether this build has compiled anything."""
    return next(cache_folder("triton").glob(f"{_build()}-*.code"), None) is not None


def stored(file: Path) -> Code | None:
    """The code that ``lowered`` kept there."""
    held = kept(file)
    return None if held is None else Code.from_bytes(held)


def lowered(source: Source, file: Path) -> Code | None:
    """Compile ``source`` and keep the code as ``file``.

    Returns:
        None if the result needs what only Triton's launcher gives.
    """
    with collector_paused():  # the front end makes a million objects: looking took a fifth
        code = _lowered(source)
    if code is not None:
        keep(file, code.to_bytes())
    return code


class _Clock:
    """Seconds of the stages of a compilation."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._last = time.perf_counter()

    def done(self, stage: str) -> None:
        """``stage`` is what was done since the one before."""
        now = time.perf_counter()
        self.stages[stage] = now - self._last
        self._last = now


def report(name: str, stages: dict[str, float], where: str = "") -> None:
    """A line of the log: what the stages of a compilation took."""
    text = ", ".join(f"{stage} {s:.3f}" for stage, s in stages.items())
    log.debug("compiled %s%s, seconds: %s", name, where, text, extra={"stages": stages})


def _lowered(made_of: Source) -> Code | None:
    clock = _Clock()
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    fn = Jitted(made_of.module, made_of.name).function()
    typed, constants, options = made_of.typed, made_of.constants, made_of.options
    source_of: Any = ASTSource
    if fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_of = GluonASTSource
    clock.done("import")
    names, count = fn.arg_names, len(typed.types)
    fixed = {names[i]: 1 for i in typed.ones} | constants
    types = [_with_layout(t) for t in typed.types]
    signature = {n: "constexpr" if n in fixed else types[i] for i, n in enumerate(names)}
    source = source_of(
        fn=fn,
        signature=signature,
        constexprs={(i,): fixed[n] for i, n in enumerate(names) if n in fixed},
        attrs={(i,): [["tt.divisibility", 16]] for i in typed.aligned if i not in typed.ones},
    )
    target = GPUTarget("cuda", made_of.capability, 32)
    backend = make_backend(target)
    # checks of overflow are dropped where nothing is debugged; without them there is less to read
    held = backend.parse_options({"sanitize_overflow": False, **options})
    meta: dict[str, Any] = {"target": target, **held.__dict__}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, held, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers, modules = backend.get_codegen_implementation(held), backend.get_module_map()
    module = source.make_ir(target, held, helpers, modules, context)
    clock.done("front end")
    for name, stage in stages.items():
        module = stage(module, meta)
        clock.done(name)
    report(made_of.name, clock.stages)
    boxes = list(meta.get("tensordesc_meta") or [])
    kinds = tuple(None if n in fixed else signature[n] for n in names[:count])
    described = [m[1] for k in kinds if k and (m := _DESCRIPTOR.match(k))]
    plain = all(b is not None and not b.get("fp4_padded") and not b.get("is_im2col") for b in boxes)
    if any(meta.get(name) for name in _ODD) or held.num_ctas != 1 or not plain:
        return None
    if len(described) != len(boxes):
        return None
    maps = tuple(
        Map(kind=k, box=tuple(b["block_size"]), swizzle=b["swizzle"])
        for k, b in zip(described, boxes, strict=True)
    )
    return Code(
        name=meta["name"], kinds=kinds, maps=maps, threads=32 * meta["num_warps"],
        shared=meta["shared"], dependent=bool(held.launch_pdl), cubin=bytes(module),
    )  # fmt: skip
