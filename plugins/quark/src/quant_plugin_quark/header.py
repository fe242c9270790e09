"""What the header says of one quantized module, and the errors where config and header disagree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import ConfigError, printable
from quant_core.intspec import check_whole_groups, unsized
from quant_core.resolve import numberless
from quant_core.spec import Axis, LayerDesc, ParamSpec, TensorInfo
from quant_plugin_quark.args import LayerArgs
from quant_plugin_quark.config import QuarkConfig

__all__ = ["FIXED", "Header"]

FIXED = Axis(tag="fixed", cut="replicate")


_leaves_of_kin: WeakKeyDictionary[Checkpoint, Mapping[str, set[str]]] = WeakKeyDictionary()


def _kin(checkpoint: Checkpoint) -> Mapping[str, set[str]]:
    """Module path without layer and expert numbers -> names stored in any such module."""
    found = _leaves_of_kin.get(checkpoint)
    if found is None:
        found = defaultdict(set)
        for path, leaves in checkpoint.modules.items():
            found[numberless(path)].update(leaves)
        _leaves_of_kin[checkpoint] = found
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One module (one expert of a stack) as it is stored."""

    config: QuarkConfig
    args: LayerArgs
    layer: LayerDesc
    checkpoint: Checkpoint
    path: str
    leaves: Mapping[str, TensorInfo]

    def expects(self, leaf: str) -> bool:
        """Whether ``leaf`` is stored here, or beside the same module of another layer.

        Writers store a tensor that symmetric schemes do not need for all layers or for none, so
        one that is lost in a single layer is missed.
        """
        return leaf in self.leaves or leaf in _kin(self.checkpoint)[numberless(self.path)]

    def dtype(self, leaf: str, allowed: Mapping[str, Any], default: str) -> str:
        """Stored dtype if it is allowed, else ``default`` (core then reports the tensor)."""
        info = self.leaves.get(leaf)
        return info.dtype if info is not None and info.dtype in allowed else default

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: str, axes: tuple[Axis, ...], role: str
    ) -> ParamSpec:
        """A required tensor. One with a value per tensor or row may have a last axis of 1."""
        info = self.leaves.get(name)
        if len(shape) < 2 and info is not None and info.shape == (*shape, 1):
            shape, axes = info.shape, (*axes, FIXED)
        return ParamSpec(name=name, shape=shape, dtypes=(dtype,), axes=axes, role=role)

    def sizes(self, shape: tuple[int, ...] | None) -> tuple[int, int]:
        """(N, K): the engine's, else those that the stored shapes imply.

        Raises:
            CheckpointError: ``Q-TENSOR-MISSING`` if nothing tells them.
        """
        n, k = self.layer.out_features, self.layer.in_features
        if n is not None and k is not None:
            return (n, k)
        if shape is not None and len(shape) == 2:
            return (shape[0], shape[1])
        raise unsized(
            self.checkpoint, self.path, self.leaves, "weight",
            expected="a matrix 'weight' and its weight_scale", plugin="quark",
        )  # fmt: skip

    def unsupported(self, what: str, expected: str) -> ConfigError:
        """Arguments that this plugin has no scheme for."""
        return ConfigError(
            f"{self.config.file}: {what} of {printable(self.path)!r} ({self.args.where}), expected "
            f"{expected}. Not supported; export the model with one of these.",
            code="Q-CFG-VALUE",
            path=self.config.file,
            tensor=self.path,
            expected=expected,
            actual=what,
            plugin="quark",
        )

    def conflict(self, key: str, said: object, found: object, fix: str) -> ConfigError:
        """Config and stored tensors contradict each other."""
        return ConfigError(
            f"{self.config.file}: {key} is {said!r} for {printable(self.path)!r} "
            f"({self.args.where}), but the stored tensors say {found!r}; expected both to agree. "
            f"{fix}",
            code="Q-CFG-CONFLICT",
            path=self.config.file,
            tensor=self.path,
            expected=found,
            actual=said,
            plugin="quark",
        )

    def check_groups(self, k: int, size: int, axis: int) -> int:
        """Number of groups of a row, checked against the stored scales.

        Args:
            axis: of ``weight_scale`` along which the groups run.

        Raises:
            LayoutError: ``Q-LAYOUT-GROUP``, with the group size that the shapes imply.
        """
        return check_whole_groups(
            self.leaves.get("weight_scale"), axis, k, size,
            module=self.path, source=self.config.file, plugin="quark",
        )  # fmt: skip
