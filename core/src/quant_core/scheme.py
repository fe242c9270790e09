"""A scheme: how one layer is stored in one format, and what its numbers mean.

A plugin subclasses ``Scheme`` as a frozen dataclass in a module that imports no torch; the methods
that touch tensors import their layout code when called. A scheme sees one matrix at a time: for
a stack of experts, core calls it once per expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from quant_core.errors import LayoutError
from quant_core.spec import LayerDesc, ParamSpec, QuantSpec, Transform

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.packing import Packed
    from quant_core.tensors import LayerTensors

__all__ = ["Scheme"]


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """How one member is stored and computed.

    Attributes:
        name: "w4a16", "w8a8", ...; layers of one name form a cohort.
        shape: (out_features, in_features) of the whole layer (of one expert).
        operands: role -> meaning: "weight", and "input" when activations are quantized.
        transforms: maps around the matmul.
    """

    name: str
    shape: tuple[int, int]
    operands: Mapping[str, QuantSpec]
    transforms: tuple[Transform, ...] = field(default=())

    @abstractmethod
    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        """The stored tensors of this layer (of one expert of a stack). Pure, no torch."""

    @abstractmethod
    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        """Stored tensors to canonical form, bit-exact.

        Args:
            tensors: param name -> stored tensor as read; optional params may be absent. May be
                kept in the result, must not be changed.

        Raises:
            LayoutError: values that the format does not allow.
        """

    @property
    def row_order(self) -> str:
        """The feature (``quant_core.row_order``) of rows stored in another order; "" if none."""
        return ""

    def canonicalize_in_place(
        self, layer: LayerDesc, tensors: Mapping[str, Tensor]
    ) -> LayerTensors:
        """As ``canonicalize``, but rows of the weight stay in the order that ``row_order`` says,
        and what can be a view of the stored tensors is one.

        Asked where weights are to stay pages of a file.
        """
        return self.canonicalize(layer, tensors)

    @property
    def pattern(self) -> tuple[Hashable, Sequence[str]] | None:
        """On what ``canonicalize_in_place`` depends, but for stored dtypes and shapes.

        Where weights stay pages of a file, layers that agree on all of it are built like the first
        of them, and the method is not asked again.

        Returns:
            What two layers must share, and the params at whose values the method looks: a few
            numbers each. None: it looks at more, or what it gives depends on more.
        """
        return None

    def alike(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a layer with this ``pattern`` has the values that layers usually have.

        Asked of the first layer of a kind and of each further one, where there is a pattern; those
        that have others are built by themselves. Values of many numbers are looked at here.
        """
        return True

    unpacks: ClassVar[tuple[str, ...]] = ()
    """Tensors of the weight that ``unpacked`` gives."""

    def unpacked(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Packed]:
        """What ``canonicalize_in_place`` unpacks and not only passes on, where there is a pattern.

        Returns:
            The tensors ``unpacks``, by the names of ``QuantizedTensor.tensors``, as they are
            stored. The weight holds their codes as they are, or turned.
        """
        return {}

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        """Exact inverse of ``canonicalize``: param name -> tensor as stored.

        Raises:
            LayoutError: ``Q-LAYOUT-REPRESENT`` if this format cannot hold ``tensors`` exactly.
        """
        raise LayoutError(
            f"{layer.name}: scheme {self.name!r} cannot be written in its own format. "
            "Use `quant convert` to write another format.",
            code="Q-LAYOUT-REPRESENT",
            tensor=layer.name,
            actual=self.name,
        )

    def quantize(
        self, layer: LayerDesc, dense: Tensor, stats: Mapping[str, Tensor] | None = None
    ) -> LayerTensors:
        """Float weight [N, K] to canonical form by this scheme's own rounding."""
        raise LayoutError(
            f"{layer.name}: scheme {self.name!r} does not quantize. "
            "Choose an online scheme (`quant formats` lists them).",
            code="Q-LAYOUT-REPRESENT",
            tensor=layer.name,
            actual=self.name,
        )

    @property
    def weight(self) -> QuantSpec:
        return self.operands["weight"]
