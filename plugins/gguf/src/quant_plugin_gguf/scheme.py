"""Which scheme a stored tensor has: its type decides, nothing else. Imports no torch.

GGUF mixes types tensor by tensor (Q4_K_M holds Q4_K and Q6_K), so there is no config to parse:
each member's scheme is named after the type of its weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, LayoutError, printable
from quant_core.row_order import row_pairs
from quant_core.scheme import Scheme
from quant_core.spec import (
    EXPERT,
    TENSOR,
    Axis,
    FormatMatch,
    LayerDesc,
    ParamSpec,
    Scale,
    Source,
    TensorInfo,
    Unquantized,
)
from quant_plugin_gguf.checkpoint import GgufCheckpoint
from quant_plugin_gguf.layouts import LAYOUTS, spec_of
from quant_plugin_gguf.types import BY_NAME

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["TENSOR_SCALE", "GgufConfig", "GgufScheme", "detect", "scheme_for"]

_AXES = (Axis(tag="out"), Axis(tag="in"))
_FLOATS = ("float32", "float16", "bfloat16", "float64")
TENSOR_SCALE = Scale(element="f32", grain=TENSOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufConfig:
    """What a GGUF header declares: container version, architecture, tensors of each type."""

    version: int
    architecture: str
    types: tuple[tuple[str, int], ...]


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """Claim every checkpoint that our own container opened.

    Raises:
        FormatError: ``Q-GGUF-ARCH`` if the names and edits of the architecture are not known.
    """
    if not isinstance(checkpoint, GgufCheckpoint):
        return None
    counts = Counter(t.dtype for t in checkpoint.tensors.values())
    types = tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    arch = checkpoint.architecture.name
    shown = ", ".join(f"{count} {name}" for name, count in types)
    return FormatMatch(
        plugin="gguf",
        level="declared",
        evidence=f"GGUF version {checkpoint.version}, architecture {arch!r}: {shown}",
        config=GgufConfig(version=checkpoint.version, architecture=arch, types=types),
    )


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Scheme | Unquantized:
    """The scheme of one member, from the type of its stored weight.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING`` if no weight is stored for it.
        LayoutError: ``Q-LAYOUT-SHAPE`` if the stored shape is not the engine's.
    """
    assert isinstance(checkpoint, GgufCheckpoint)
    info = _stored_weight(layer, checkpoint)
    if info is None:
        return Unquantized(rule="no weight stored, only parameters", evidence=layer.stored)
    if BY_NAME[info.dtype].kind == "plain":
        return Unquantized(rule="stored as float", evidence=f"{info.name} is {info.dtype}")
    stacked = len(info.shape) == 3
    _check_shape(layer, info, stacked)
    module = info.name.rpartition(".")[0]
    beside = {leaf: checkpoint.tensors.get(f"{module}.{leaf}") for leaf in ("bias", "scale")}
    spec = spec_of(info.dtype)
    if beside["scale"] is not None and info.dtype == "nvfp4":
        spec = replace(spec, scales=(*spec.scales, TENSOR_SCALE))
    else:
        beside["scale"] = None
    return GgufScheme(
        name=info.dtype,
        shape=(info.shape[-2], info.shape[-1]),
        operands={"weight": spec},
        module=module,
        stacked=stacked,
        heads=checkpoint.permuted_heads(info.name),
        beside=tuple((leaf, t.dtype) for leaf, t in beside.items() if t is not None),
    )


def _stored_weight(layer: LayerDesc, checkpoint: GgufCheckpoint) -> TensorInfo | None:
    tensors = checkpoint.tensors
    info = tensors.get(f"{layer.stored}.weight")
    if info is None and layer.stored not in checkpoint.modules:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {layer.stored + '.weight'!r} is missing, expected by "
            f"{printable(layer.name)!r}. The file is incomplete or holds another model.",
            code="Q-TENSOR-MISSING",
            path=checkpoint.path,
            tensor=f"{layer.stored}.weight",
        )
    return info


def _check_shape(layer: LayerDesc, info: TensorInfo, stacked: bool) -> None:
    n, k = info.shape[-2] if len(info.shape) > 1 else 0, info.shape[-1]
    expected = (layer.out_features or n, layer.in_features or k)
    if len(info.shape) not in (2, 3) or (n, k) != expected or stacked != bool(layer.experts):
        kind = "a stack of experts" if layer.experts else "one matrix"
        raise LayoutError(
            f"{info.file}: tensor {printable(info.name)!r} has shape {info.shape}, expected "
            f"{kind} of {expected} for {printable(layer.name)!r}. "
            "The model's config belongs to another checkpoint.",
            code="Q-LAYOUT-SHAPE",
            path=info.file,
            tensor=info.name,
            expected=expected,
            actual=info.shape,
        )


@dataclass(frozen=True, kw_only=True)
class GgufScheme(Scheme):
    """Rows of blocks of one type.

    Attributes:
        module: stored module path; for a tied output the embedding's.
        stacked: the stored tensor is [E, N, K] and read one expert at a time.
        heads: heads whose rows the writer reordered (q and k of llama); 0 = rows as they are.
        beside: (leaf, dtype) of the tensors stored beside the weight: "bias", "scale" (NVFP4).
    """

    module: str
    stacked: bool = False
    heads: int = 0
    beside: tuple[tuple[str, str], ...] = ()

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        """``weight``, in logical shape and with the type as dtype, and what lies beside it."""
        n, k = self.shape
        out = [
            ParamSpec(
                name="weight",
                shape=(n, k),
                dtypes=(self.name,),
                axes=_AXES,
                sources=self._source("weight"),
            )
        ]
        for leaf, dtype in self.beside:
            bias = leaf == "bias"
            accepted = (dtype,) if dtype in _FLOATS else ("float32",)
            shape = (n,) if bias else () if self.stacked else (1,)
            out.append(
                ParamSpec(
                    name=leaf,
                    shape=shape,
                    dtypes=accepted,
                    axes=(Axis(tag="out" if bias else "fixed"),) * len(shape),
                    sources=self._source(leaf),
                )
            )
        return out

    def _source(self, leaf: str) -> tuple[Source, ...]:
        return (Source(name=f"{self.module}.{leaf}", index=(EXPERT,) if self.stacked else ()),)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        """See ``Scheme.canonicalize``; ``weight`` is uint8 [N, row_bytes] as stored.

        Raises:
            LayoutError: ``Q-LAYOUT-SHAPE``; ``Q-VALUE-SCALE`` for NVFP4 scales with a sign.
        """
        return self._canonical(layer, tensors, in_place=False)

    @property
    def row_order(self) -> str:
        """See ``Scheme.row_order``. Heads that do not fit are for ``canonicalize`` to refuse."""
        rows = self.shape[0]
        fits = self.heads and not self.stacked and rows % (2 * self.heads) == 0
        return row_pairs(rows // self.heads) if fits else ""

    @property
    def pattern(self) -> tuple[Hashable, Sequence[str]] | None:
        """See ``Scheme.pattern``. Scales of NVFP4 are looked at, each of them."""
        if self.stacked or self.name == "nvfp4":
            return None
        return (self.name, self.shape, self.heads, self.beside), ()

    def canonicalize_in_place(
        self, layer: LayerDesc, tensors: Mapping[str, Tensor]
    ) -> LayerTensors:
        """See ``Scheme.canonicalize_in_place``."""
        return self._canonical(layer, tensors, in_place=True)

    def _canonical(
        self, layer: LayerDesc, tensors: Mapping[str, Tensor], *, in_place: bool
    ) -> LayerTensors:
        from quant_core.tensors import LayerTensors
        from quant_plugin_gguf.blocks import check_scales, split_rows
        from quant_plugin_gguf.rows import to_public_rows

        rows, bias = tensors["weight"], tensors.get("bias")
        row_bytes = BY_NAME[self.name].row_bytes(self.shape[1])
        if tuple(rows.shape) != (self.shape[0], row_bytes):
            raise LayoutError(
                f"{layer.name}: {self.name} rows have shape {tuple(rows.shape)}, expected "
                f"{(self.shape[0], row_bytes)} bytes for a weight of {self.shape}. "
                "Pass the tensor as the checkpoint reads it.",
                code="Q-LAYOUT-SHAPE",
                tensor=f"{self.module}.weight",
                expected=(self.shape[0], row_bytes),
                actual=tuple(rows.shape),
            )
        if self.heads:
            if not in_place:
                rows = to_public_rows(rows, self.heads, f"{self.module}.weight")
            bias = None if bias is None else to_public_rows(bias, self.heads, f"{self.module}.bias")
        weight = split_rows(rows, self.name, in_place=in_place)
        if weight.scales:
            check_scales(weight, f"{self.module}.weight")
        if "scale" in tensors:
            scale = tensors["scale"].reshape(1, 1).float()
            weight = replace(weight, spec=self.weight, scales=(*weight.scales, scale))
        return LayerTensors(operands={"weight": weight}, bias=bias)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        """See ``Scheme.serialize``: the bytes that ``canonicalize`` was given."""
        from quant_plugin_gguf.blocks import join_rows
        from quant_plugin_gguf.rows import to_stored_rows

        weight, bias = tensors.weight, tensors.bias
        self._check_representable(layer, tensors)
        out: dict[str, Tensor] = {}
        if any(leaf == "scale" for leaf, _ in self.beside):
            out["scale"] = weight.scales[-1].reshape(() if self.stacked else (1,))
            weight = replace(weight, spec=spec_of(self.name), scales=weight.scales[:-1])
        rows = join_rows(weight, self.name)
        out["weight"] = to_stored_rows(rows, self.heads) if self.heads else rows
        if bias is not None:
            out["bias"] = to_stored_rows(bias, self.heads) if self.heads else bias
        return out

    def _check_representable(self, layer: LayerDesc, tensors: LayerTensors) -> None:
        weight = tensors.weight
        beside = {leaf for leaf, _ in self.beside}
        found = _first(
            (weight.spec == self.weight, f"weights of {weight.spec.label}"),
            (weight.shape == self.shape, f"a weight of shape {weight.shape}"),
            (_same_codebook(self.name, weight.codebook), "another codebook"),
            ((tensors.bias is not None) == ("bias" in beside), "a bias added or removed"),
            (tensors.acc_bias is None and tensors.out_scale is None, "accumulator terms"),
            (tensors.input_scale is None and not tensors.transforms, "activation terms"),
        )
        if found:
            raise LayoutError(
                f"{layer.name}: has {found}, expected {self.weight.label} of shape {self.shape} as "
                f"{self.name} stores it. Quantize to this type first, or choose another format.",
                code="Q-LAYOUT-REPRESENT",
                tensor=layer.name,
                expected=self.weight.label,
                actual=found,
            )


def _first(*checks: tuple[bool, str]) -> str:
    return next((text for ok, text in checks if not ok), "")


def _same_codebook(name: str, codebook: tuple[Tensor, ...]) -> bool:
    layout = LAYOUTS.get(name)
    want = layout.codebook if layout else ()
    return tuple(v for table in codebook for v in table.tolist()) == want
