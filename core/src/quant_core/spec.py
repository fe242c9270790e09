"""The contract's plain data: what a tensor means, where it is stored, what a kernel is asked.

Nothing here imports torch. All types are frozen, hashable where a kernel key needs it, and pickle
small, so that they cross process borders in engines that start workers.

    LayerDesc   what the engine has: one logical member (q_proj; one stack of experts)
    ParamSpec   what a scheme expects to be stored for it, and where
    QuantSpec   what the stored numbers mean
    Packing     in which physical order the codes lie
    OpSpec      what a kernel is asked to run
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

__all__ = [
    "CANONICAL",
    "CHANNEL",
    "EXPERT",
    "PLUGIN_API",
    "TENSOR",
    "Axis",
    "BlockType",
    "Element",
    "Field",
    "FormatMatch",
    "Grain",
    "LayerDesc",
    "OpSpec",
    "Packing",
    "ParamSpec",
    "PluginInfo",
    "QuantSpec",
    "Scale",
    "Source",
    "Span",
    "TensorInfo",
    "Transform",
    "Unquantized",
    "Zero",
    "block",
    "group",
]

PLUGIN_API = (0, 2)
"""(major, minor) of the contract. A plugin states the one it was written for in ``PluginInfo``."""

Grain = tuple[int, int]
"""(rows, columns) that one value covers; 0 stands for the whole axis."""

TENSOR: Grain = (0, 0)
CHANNEL: Grain = (1, 0)  # of an activation: one value per token


def group(size: int) -> Grain:
    """One value per ``size`` consecutive input features of one row."""
    return (1, size)


def block(rows: int, cols: int) -> Grain:
    """One value per ``rows`` x ``cols`` rectangle."""
    return (rows, cols)


# ------------------------------------------------------------------------------- what it means


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """How ONE code is read; never how it is stored.

    ``int`` is two's complement in ``bits`` bits, ``uint`` is unsigned, ``float`` is one of the
    small float types of ``quant_core.numerics``, ``lut`` reads ``codebook[code]``, ``vector``
    reads several weights per code from ``books`` additive codebooks.
    """

    name: str  # "uint4" "int8" "fp8_e4m3" "fp4_e2m1" "nf4" "e8p"
    bits: int
    kind: Literal["uint", "int", "float", "lut", "vector"]
    covers: tuple[int, int] = (1, 1)  # (out, in) weights that one code stands for
    books: int = 1  # additive codebooks or residual stages

    @staticmethod
    def uint(bits: int) -> Element:
        return Element(name=f"uint{bits}", bits=bits, kind="uint")

    @staticmethod
    def int(bits: int) -> Element:
        return Element(name=f"int{bits}", bits=bits, kind="int")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One factor of a scale. Factors are listed finest first and multiply coarsest first.

    ``element`` names how the stored value is read: ``f16 bf16 f32``, ``fp8_e4m3``, ``e8m0``,
    ``uint<b>`` / ``int<b>`` (raw bits in uint8), or ``lut8``: the last codebook at that index.
    With ``add`` the value is added to the product of the coarser factors (a scale that is itself
    quantized around a mean).

    A symmetric scale computed at run time is max|x| / peak: 127 for int8, 448 for fp8_e4m3, and
    127.5 where a producer takes half the range of the codes. The value is kept within ``least`` and
    ``most`` (0 = no bound), then rounded if ``element`` is a small float. For e8m0 ``rule`` names
    how the exponent is chosen (``numerics.MX_RULES``; "" = "rceil").
    """

    element: str
    grain: Grain
    static: bool = True  # False: computed at run time (activations)
    inverse: bool = False  # the stored value is 1/s and is applied by DIVISION
    add: bool = False  # a summand, not a factor
    peak: float = 0.0  # run-time scales only; 0 = the element's largest value
    least: float = 0.0  # run-time scales only
    most: float = 0.0  # run-time scales only
    rule: str = ""  # run-time e8m0 scales only


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """What is subtracted from a code, or added to the scaled code.

    const   W = (c - value) * s
    code    W = (c - z) * s,  z of ``element``, on the grid of the finest scale; an integer, or
            a float of f16, bf16 or f32
    offset  W = c * s + o,    o = product of ``levels``, with factors of its own
    """

    kind: Literal["const", "code", "offset"]
    value: int = 0
    element: str = "uint4"
    levels: tuple[Scale, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """The meaning of one quantized operand: hashable, JSON-able, the key kernels choose on.

    ``ties`` is where values halfway between two codes go when codes are made at run time
    (``numerics.casts``); stored codes have it behind them.
    """

    element: Element
    scales: tuple[Scale, ...] = ()
    zero: Zero | None = None
    gather: bool = False  # columns are reordered, ragged or padded
    blocks: str = ""  # opaque block type with its own reference; no element, scales or zero apply
    ties: Literal["even", "down", "up", "away"] = "even"

    @property
    def label(self) -> str:
        """Short text for tables: ``uint4 group(128) code-zero``."""
        if self.blocks:
            return f"blocks:{self.blocks}"
        parts = [self.element.name]
        for s in self.scales:
            r, c = s.grain
            grain = (
                "tensor"
                if (r, c) == TENSOR
                else "channel"
                if (r, c) == CHANNEL
                else f"group({c})"
                if r == 1
                else f"block({r},{c})"
            )
            marks = ("/inv" if s.inverse else "") + (f"/{s.rule}" if s.rule else "")
            marks += "/add" if s.add else ""
            parts.append(f"{grain}:{s.element}{marks}")
        if self.zero is not None:
            parts.append(
                f"zero={self.zero.value}" if self.zero.kind == "const" else f"{self.zero.kind}-zero"
            )
        if self.gather:
            parts.append("gather")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Field:
    """Some bits of each code of a block of bytes: ``nbytes`` bytes from byte ``at`` of it on.

    They are runs of ``stride`` bytes; value v of a run has its ``width`` bits in byte v % stride,
    from bit width * (v // stride) on. Stride 1 is a plain bit stream.
    """

    at: int
    nbytes: int
    width: int
    stride: int

    @property
    def count(self) -> int:
        """Values held."""
        return self.nbytes * 8 // self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Physical order of codes, as data; several formats share one.

    Codes run along one logical axis of W [N, K] (``axis``: "in" = K, "out" = N). Every run of
    ``len(order)`` codes is permuted (code i of the run goes to slot ``order[i]``), then the slots
    are written LSB first into little-endian words of type ``word``:

    - ``straddle=True``: one bit stream, slot i occupies bits [i*b, (i+1)*b); the stream is padded
      with zero bits to a whole word.
    - ``straddle=False``: floor(word_bits / b) slots a word, the top bits stay zero.
    - ``planes=(2, 1)``: runs of 32 codes, b words each; first the low 2 bits of all 32, then the
      next bit of all 32, ...

    ``fields`` (words are uint8): rows are blocks of ``block`` bytes that may hold other things
    beside; a code is its fields' bits put together, low field first.

    ``k_major=False`` stores [N, K...] with the packed axis in place; ``k_major=True`` stores
    [K..., N]. The packed axis is always the one named by ``axis``.
    """

    word: Literal["uint8", "int16", "int32"] = "uint8"
    axis: Literal["in", "out"] = "in"
    order: tuple[int, ...] | None = None
    straddle: bool = True
    planes: tuple[int, ...] = ()
    k_major: bool = False
    fields: tuple[Field, ...] = ()
    block: int = 0


CANONICAL = Packing()
"""LSB-first bit stream along K in bytes, row-major: uint8 [..., N, ceil(K * bits / 8)]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """A map applied around the matmul at ``site``; members fuse only if they agree on it.

    Tensors of each kind, applied to x [..., K] before it is quantized (to y, after the bias, at
    site "output"):
        scale    one vector [K] or [1]: x * v; ``inverse``: x / v
        matrix   [b, b], or [K/b, b, b] for ``block`` = b; [K, K] for 0: each block of x @ M
        kron     left [L, L] and right [R, R], K = L * R: x @ kron(left, right), which is
                 left^T @ X @ right for x seen as X [L, R]
    """

    site: Literal["input", "output", "q", "k", "v"]
    kind: Literal["scale", "hadamard", "matrix", "kron", "lowrank"]
    key: str  # share identity: one matrix for many layers
    block: int = 0  # 0 = whole axis; block-diagonal otherwise
    inverse: bool = False  # kind "scale": divide by the stored vector
    online: bool = True
    tp: Literal["block", "replicate", "refuse"] = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """An opaque block type: weights that fit no scale/zero description and stay bytes.

    ``target`` is ``"module:function"``, imported on first use:
    function(blocks: uint8 [rows, row_bytes], k: int) -> float32 [rows, k].

    ``codes`` names, likewise, what may stand for the blocks in kernels that read codes and scales
    (``kernels.expanded.BlockCodes``); "" = nothing does.
    """

    name: str
    weights: int  # weights per block
    bytes: int  # bytes per block
    target: str
    codes: str = ""


# -------------------------------------------------------------------- what the engine asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A rank's part [start, stop) of one logical axis of size ``total`` in the checkpoint."""

    start: int
    stop: int
    total: int
    padded: int = 0  # size the engine wants (vocabulary padding); 0 = stop - start

    @staticmethod
    def whole(size: int) -> Span:
        return Span(start=0, stop=size, total=size)

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDesc:
    """ONE logical member: ``q_proj``, or ``experts.gate_proj`` as one stack of all experts.

    ``inp`` / ``out`` are None while only the header is known (``quant inspect``); a scheme then
    takes the sizes from the stored shapes. With an engine they are always set.
    ``stored`` is the module path in checkpoint naming; for experts stored one by one it holds
    ``{expert}`` in place of the expert's number.
    """

    kind: Literal["linear", "embedding", "experts", "attention"]
    name: str
    stored: str
    inp: Span | None = None
    out: Span | None = None
    experts: tuple[int, ...] = ()  # expert ids, () = not a stack
    role: str = ""  # "q" "k" "v" "gate" "up" "down" "kv_b" ...
    bias: bool = False
    tied_to: str | None = None
    dtype: str = "bfloat16"

    @property
    def in_features(self) -> int | None:
        return None if self.inp is None else self.inp.total

    @property
    def out_features(self) -> int | None:
        return None if self.out is None else self.out.total


# ------------------------------------------------------------------------------ what is stored


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One stored tensor, from the header alone.

    ``shape`` is the logical shape. ``dtype`` is a torch dtype name without ``torch.``
    ("int32", "bfloat16", "float8_e4m3fn"); containers whose tensors are blocks of bytes use a
    type name of their own and are read as uint8 [..., bytes per row].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str  # relative to the checkpoint's folder
    offset: int  # of the first byte, from the start of the file
    nbytes: int


EXPERT = "expert"
"""Marks the expert's position in ``Source.index``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a param's values are: one stored tensor, or a part of one.

    ``name`` may hold ``{expert}``. ``index`` cuts leading axes: an int or the marker ``EXPERT``
    selects (and drops) an axis, ``(start, stop)`` or ``(start, stop, step)`` slices it.
    """

    name: str
    index: tuple[int | str | tuple[int, int] | tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What one axis of a stored tensor runs along, and how tensor parallelism cuts it.

    ``per`` is the number of logical elements per stored element: 8 for eight codes a word, 128
    for a scale per 128 columns, 32/3 for 3-bit streams.
    """

    tag: Literal["in", "out", "group", "expert", "member", "fixed"]
    per: Fraction = Fraction(1)
    cut: Literal["slice", "replicate", "rank0", "sum"] = "slice"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One stored tensor that a scheme expects for a layer (for one expert of a stack).

    ``shape`` is that of the WHOLE layer, whatever the rank; -1 stands for any size (a text).
    ``need``:
    required  absent = error; cohort = all layers with this scheme name have it, or none;
    optional  may be absent, ``rule`` says why that is right; ignored = present but unused, by
    the named ``rule``.
    ``sources`` = () means ``layer.stored + "." + name``. ``shared``: several layers read the same
    stored tensor, a matrix that a file holds once.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # accepted; the first is the one written
    axes: tuple[Axis, ...] = ()
    role: str = "weight"
    need: Literal["required", "cohort", "optional", "ignored"] = "required"
    rule: str = ""
    sources: tuple[Source, ...] = ()
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Unquantized:
    """The answer of ``make_scheme`` for a member whose weight is stored as plain floats.

    ``ignored``: last name components of its stored tensors that are not loaded, by ``rule``.
    """

    rule: str  # which rule decided: "no packed tensor stored", "modules_to_not_convert"
    evidence: str = ""
    ignored: frozenset[str] = frozenset()


# ------------------------------------------------------------------------ plugins and matches


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """Who a plugin is, as plain data.

    ``api`` is the ``PLUGIN_API`` it was written for: same major, minor not above core's.
    ``side_files`` are JSON files beside the weights that it reads; engines need their names
    before anything is opened. ``containers`` are file suffixes its ``open_checkpoint`` reads.
    """

    id: str
    api: tuple[int, int]
    summary: str = ""
    side_files: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    quant_methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatMatch:
    """A plugin's claim on a checkpoint: plain data that pickles small.

    ``declared``: the checkpoint names this format. ``structural``: only its tensors look like it. A
    declared claim beats the other; two of one level are an error. ``config``: the plugin's own.
    """

    plugin: str
    level: Literal["declared", "structural"]
    evidence: str
    config: Any = None


# ------------------------------------------------------------------------- what kernels are asked


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSpec:
    """Everything a kernel may decide on; no layer name, no format.

    Sizes: ``n`` out_features, ``k`` in_features (of x), ``k_stored`` columns of the codes (differs
    from ``k`` only with gather), ``experts``, ``top_k``.
    Features: "bias", "acc_bias", "gather", "tied:embedding", ... Tensor j of transform i is the
    feature "transform_<i>_<j>:<dtype>:<shape, x between sizes>", see ``kernels.transforms``.
    Operations between layers have no operands; their features are in ``kernels.between``.
    """

    op: Literal[
        "linear",
        "grouped_linear",
        "moe",
        "embedding",
        "quantize",
        "kv_write",
        "kv_read",
        "attention",
        "rms_norm",
        "rotary",
        "gated",
        "attention_update",
        "hadamard",
        "finite",
        "unpack",
        "collective",
    ]
    operands: tuple[tuple[str, QuantSpec], ...]
    packing: Packing = CANONICAL
    sizes: tuple[tuple[str, int], ...] = ()
    act_dtype: str = "bfloat16"
    device: tuple[str, str] = ("cpu", "")  # type, capability
    features: frozenset[str] = field(default_factory=frozenset)
    transforms: tuple[Transform, ...] = ()

    def size(self, name: str, default: int | None = None) -> int:
        for key, value in self.sizes:
            if key == name:
                return value
        if default is None:
            raise KeyError(name)
        return default

    def operand(self, role: str) -> QuantSpec | None:
        return next((s for r, s in self.operands if r == role), None)

    @property
    def weight(self) -> QuantSpec:
        spec = self.operand("weight")
        if spec is None:
            raise KeyError("weight")
        return spec
