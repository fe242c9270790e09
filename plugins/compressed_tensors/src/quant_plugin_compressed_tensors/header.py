"""What the header says of one quantized module: shapes, dtypes, and checks against its group.

Formats build their schemes from a ``Header``; no tensor data is read here, except the 16 bytes of
``weight_shape`` where nothing else tells the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, ConfigError, printable
from quant_core.intspec import SCALE_ELEMENTS, check_whole_groups, unsized
from quant_core.spec import LayerDesc, QuantSpec, TensorInfo
from quant_plugin_compressed_tensors.args import QuantArgs
from quant_plugin_compressed_tensors.config import CtConfig, Group
from quant_plugin_compressed_tensors.inputs import input_spec
from quant_plugin_compressed_tensors.scheme import grain_of, scheme_name
from quant_plugin_compressed_tensors.transforms import rotations_of

__all__ = ["Header"]

_SINGLE = ("weight_scale", "weight_global_scale", "input_scale", "input_global_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One module (one expert of a stack) as it is stored."""

    config: CtConfig
    group: Group
    weights: QuantArgs
    layer: LayerDesc
    checkpoint: Checkpoint
    path: str
    leaves: Mapping[str, TensorInfo]

    def shape(self, leaf: str, rank: int = 2) -> tuple[int, ...] | None:
        """Stored shape; None if the tensor is absent or of another rank (reported by core)."""
        info = self.leaves.get(leaf)
        return info.shape if info is not None and len(info.shape) == rank else None

    def dtype(self, leaf: str, allowed: Mapping[str, Any], default: str) -> str:
        """Stored dtype if it is allowed, else ``default`` (core then reports the tensor)."""
        info = self.leaves.get(leaf)
        return info.dtype if info is not None and info.dtype in allowed else default

    def common(self, n: int, k: int) -> dict[str, Any]:
        """The fields that all schemes share."""
        inputs, config, kind = self.group.inputs, self.config, self.layer.kind
        rotations = rotations_of(
            config.transforms, self.path, kind, (n, k), self.checkpoint, config.file
        )
        return {
            "name": scheme_name(self.weights, inputs),
            "shape": (n, k),
            "weights": self.weights,
            "inputs": inputs,
            "format": self.group.format,
            "scale_dtype": self.dtype("weight_scale", SCALE_ELEMENTS, "bfloat16"),
            "input_scale_dtype": self.dtype("input_scale", SCALE_ELEMENTS, "bfloat16"),
            "has_g_idx": "weight_g_idx" in self.leaves,
            "scalars": frozenset(n for n in _SINGLE if self.shape(n, 0) is not None),
            "rotations": rotations,
            "transforms": tuple(t for r in rotations for t in r.transforms),
            "output_scale": "output_scale" in self.leaves
            and self.path.rpartition(".")[2] in ("k_proj", "v_proj"),
            "source": self.config.file,
        }

    def operands(self, weight: QuantSpec) -> dict[str, QuantSpec]:
        """Role -> meaning, with the input's if activations are quantized."""
        inputs = self.group.inputs
        if inputs is None:
            return {"weight": weight}
        dtype = self.dtype("input_scale", SCALE_ELEMENTS, "bfloat16")
        return {"weight": weight, "input": input_spec(inputs, dtype, self.path, self.config.file)}

    # ------------------------------------------------------------------------------------ checks

    def unsized(self, leaf: str) -> CheckpointError:
        """The error if too little is stored to tell the layer's sizes."""
        expected = f"a matrix {leaf!r} and its weight_scale"
        return unsized(
            self.checkpoint, self.path, self.leaves, leaf,
            expected=expected, plugin="compressed_tensors",
        )  # fmt: skip

    def conflict(self, key: str, said: object, found: object, fix: str) -> ConfigError:
        """Config and stored tensors contradict each other."""
        return ConfigError(
            f"{self.config.file}: {key} is {said!r} for {printable(self.path)!r} (config group "
            f"{printable(self.group.name)!r}), but the stored tensors say {found!r}; expected both "
            f"to agree. {fix}",
            code="Q-CFG-CONFLICT",
            path=self.config.file,
            tensor=self.path,
            expected=found,
            actual=said,
            plugin="compressed_tensors",
        )

    def check_arguments(self) -> None:
        """Arguments that integer formats cannot have, and zero points against ``symmetric``."""
        args = self.weights
        if args.kind != "int" or args.strategy not in ("tensor", "channel", "group", "block"):
            raise ConfigError(
                f"{self.config.file}: format {self.group.format!r} of {printable(self.path)!r} has "
                f"weights {args.label}, expected integers with a scale per tensor, channel, group "
                "or block. Other kinds are not supported yet in this format.",
                code="Q-CFG-VALUE",
                path=self.config.file,
                tensor=self.path,
                actual=args.label,
                plugin="compressed_tensors",
            )
        if args.dynamic:
            raise self.conflict("weights.dynamic", args.dynamic, False, "Weights are stored.")
        self.check_zero_points()

    def check_zero_points(self) -> None:
        """Stored zero points against ``symmetric``."""
        if self.weights.symmetric and "weight_zero_point" in self.leaves:
            fix = "Set symmetric to false if the weights have zero points."
            raise self.conflict("weights.symmetric", True, "weight_zero_point", fix)

    def check_groups(self, n: int, k: int) -> None:
        """Groups divide the inputs, and as many scales are stored as there are groups.

        Raises:
            LayoutError: ``Q-LAYOUT-GROUP``, with the group size that the shapes imply.
        """
        size = grain_of(self.weights)[1]
        if self.weights.strategy not in ("group", "tensor_group"):
            return
        check_whole_groups(
            self.leaves.get("weight_scale"), 1, k, size,
            module=self.path, source=self.config.file, plugin="compressed_tensors",
        )  # fmt: skip

    def stored_sizes(self) -> tuple[int, int] | None:
        """(N, K) from the values of ``weight_shape``; None if it is absent or odd."""
        if self.shape("weight_shape", 1) != (2,):
            return None
        n, k = (int(v) for v in self.checkpoint.read(f"{self.path}.weight_shape").tolist())
        return (n, k) if n > 0 and k > 0 else None
