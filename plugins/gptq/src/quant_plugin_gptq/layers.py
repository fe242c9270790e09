"""From the header to a scheme: the stored tensors decide, the config explains, both must agree.

Sizes come from the engine where it gives them, else from the stored shapes:

    N = columns of qweight (or scales)      K = len(g_idx), else rows of qweight * 32 / bits
    G = rows of scales                      every count is checked against bits and group_size
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.describe import module_names
from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable
from quant_core.intspec import SCALE_ELEMENTS, check_groups, weight_spec
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_gptq.config import GptqConfig, LayerSettings
from quant_plugin_gptq.scheme import GptqScheme

__all__ = ["scheme_for"]

_PACKED = ("qweight", "qzeros", "scales", "g_idx")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
Leaves = Mapping[str, TensorInfo]


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> GptqScheme | Unquantized:
    """The scheme of one member.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` if config and stored tensors contradict each other.
        ConfigError: ``Q-CFG-CONFLICT`` if bits, desc_act or dynamic contradict the shapes.
        LayoutError: ``Q-LAYOUT-GROUP`` for a wrong number of groups, ``Q-LAYOUT-SHAPE`` for
            experts of unlike shapes.
    """
    config: GptqConfig = match.config
    names = module_names(layer)
    stored = {n: checkpoint.modules[n] for n in names if n in checkpoint.modules}
    packed = {n: v for n, v in stored.items() if any(p in v for p in _PACKED)}
    floats = [n for n, v in stored.items() if n not in packed and "weight" in v]
    if not packed:
        return _unquantized(config, layer, checkpoint, floats)
    if floats:
        raise _mismatch(
            checkpoint, floats[0], "holds a float weight", f"{next(iter(packed))} holds codes"
        )
    for name in packed:
        if rule := config.settings(name).skip:
            raise _mismatch(checkpoint, name, "holds packed codes", f"dynamic {rule!r} excludes it")
    first = next(iter(packed))
    _check_experts(config, packed, first)
    return _Builder(config, layer, checkpoint, first, packed[first]).scheme()


def _mismatch(checkpoint: Checkpoint, name: str, found: str, but: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: module {printable(name)!r} {found}, but {but}; expected config and "
        "stored tensors to agree. The config belongs to other weights, or a layer was replaced.",
        code="Q-CKPT-MISMATCH",
        path=checkpoint.path,
        tensor=name,
        expected=but,
        actual=found,
        plugin="gptq",
    )


def _neighbours(name: str) -> list[str]:
    """The same module one layer (or expert) before and after."""
    return [
        f"{name[: m.start()]}{number}{name[m.end() :]}"
        for m in _NUMBER.finditer(name)
        for number in (int(m[0]) - 1, int(m[0]) + 1)
        if len(m[0]) < 8
    ]


def _unquantized(
    config: GptqConfig, layer: LayerDesc, checkpoint: Checkpoint, floats: list[str]
) -> Unquantized:
    if not floats:
        return Unquantized(rule="no weight stored under this name", evidence=layer.stored)
    name = floats[0]
    weight = checkpoint.modules[name]["weight"]
    if rule := config.skips(name):
        return Unquantized(rule=f"dynamic {rule}", evidence=f"{weight.name} is {weight.dtype}")
    for other in _neighbours(name):
        if "qweight" in checkpoint.modules.get(other, {}):
            raise _mismatch(
                checkpoint,
                name,
                f"holds a weight of {weight.dtype}",
                f"{other!r} holds codes and {config.source} does not exclude it",
            )
    if config.lm_head and name.rpartition(".")[2] == "lm_head":
        raise _mismatch(
            checkpoint,
            name,
            f"holds a weight of {weight.dtype}",
            f"{config.source} says lm_head is quantized",
        )
    return Unquantized(rule="no packed tensor stored", evidence=f"{weight.name} is {weight.dtype}")


def _check_experts(config: GptqConfig, packed: Mapping[str, Leaves], first: str) -> None:
    """All experts of a stack have the settings and shapes of the first."""
    settings = replace(config.settings(first), rule="")
    for name, leaves in packed.items():
        if replace(config.settings(name), rule="") != settings:
            raise ConfigError(
                f"{config.source}: dynamic gives {name!r} other settings than {first!r}, expected "
                "one scheme for all experts of a stack. Use one rule for all experts.",
                code="Q-CFG-CONFLICT",
                path=config.source,
                tensor=name,
                expected=str(settings),
                actual=str(config.settings(name)),
                plugin="gptq",
            )
        for leaf, info in leaves.items():
            like = packed[first].get(leaf)
            if like is not None and (like.shape, like.dtype) != (info.shape, info.dtype):
                raise LayoutError(
                    f"{info.file}: tensor {info.name!r} has shape {info.shape} {info.dtype}, "
                    f"expected {like.shape} {like.dtype} as {like.name!r}. "
                    "Experts of one stack must be stored alike.",
                    code="Q-LAYOUT-SHAPE",
                    path=info.file,
                    tensor=info.name,
                    expected=like.shape,
                    actual=info.shape,
                )


class _Builder:
    """Sizes and cross-checks of one packed module."""

    def __init__(
        self,
        config: GptqConfig,
        layer: LayerDesc,
        checkpoint: Checkpoint,
        name: str,
        leaves: Leaves,
    ) -> None:
        self.config, self.layer, self.checkpoint = config, layer, checkpoint
        self.name, self.leaves = name, leaves
        self.settings: LayerSettings = config.settings(name)
        self.planar = config.checkpoint_format == "gptq_p"

    def scheme(self) -> GptqScheme:
        n = self._out_features()
        bits = self._bits(n)
        k = self._in_features(bits)
        group_size = self._group_size(k)
        if self.planar and (n % 32 or k % 32):
            raise LayoutError(
                f"{self.name}: planar layer has {n} outputs and {k} inputs, expected multiples of "
                "32. Export it in format gptq_v2.",
                code="Q-LAYOUT-SHAPE",
                tensor=self.name,
                expected=32,
                actual=(n, k),
            )
        scales = self.leaves.get("scales")
        scale_dtype = scales.dtype if scales and scales.dtype in SCALE_ELEMENTS else "float16"
        sym, desc_act = self.settings.sym, self.settings.desc_act
        if desc_act and group_size < k:
            self._check_g_idx()
        return GptqScheme(
            name=f"w{bits}a16",
            shape=(n, k),
            operands={
                "weight": weight_spec(
                    bits,
                    k,
                    group_size,
                    sym=sym is not False,
                    scale_dtype=scale_dtype,
                    gather=bool(desc_act) and group_size < k,
                )
            },
            bits=bits,
            group_size=group_size,
            sym=sym,
            v1=self.config.checkpoint_format in (None, "gptq"),
            planar=self.planar,
            desc_act=desc_act,
            has_g_idx="g_idx" in self.leaves,
            scale_dtype=scale_dtype,
            source=self.config.source,
        )

    def _shape(self, leaf: str, rank: int) -> tuple[int, ...] | None:
        """Stored shape of ``leaf``; None if it is absent or of another rank (reported later)."""
        info = self.leaves.get(leaf)
        return info.shape if info is not None and len(info.shape) == rank else None

    def _unsized(self, what: str) -> CheckpointError:
        have = ", ".join(f"{leaf} {info.shape}" for leaf, info in self.leaves.items())
        return CheckpointError(
            f"{self.checkpoint.path}: {what} of module {printable(self.name)!r} cannot be told "
            f"from what is stored ({have}), expected qweight, qzeros and scales. "
            "The checkpoint is incomplete; download or export it again.",
            code="Q-TENSOR-MISSING",
            path=self.checkpoint.path,
            tensor=f"{self.name}.qweight",
            expected=_PACKED[:3],
            actual=sorted(self.leaves),
            plugin="gptq",
        )

    def _out_features(self) -> int:
        if self.layer.out_features is not None:
            return self.layer.out_features
        for leaf in ("qweight", "scales"):
            if shape := self._shape(leaf, 2):
                return shape[1]
        raise self._unsized("out_features")

    def _bits(self, n: int) -> int:
        """The config's width, checked against the width that the shapes imply."""
        implied = self._implied_bits(n)
        bits = self.settings.bits
        if bits is None:
            if implied in (2, 4, 8):
                return int(implied)
            raise self._conflict("bits", None, implied, "Add a quantize_config.json.")
        if implied is not None and implied != bits:
            fix = f"The tensors were packed with {implied} bits; correct the config."
            raise self._conflict("bits", bits, implied, fix)
        return bits

    def _implied_bits(self, n: int) -> int | None:
        """Width that two stored sizes agree on; None if they do not or are absent."""
        found = []
        if (shape := self._shape("qzeros", 2)) and n:
            found.append(32 * shape[1] / n)
        k = self.layer.in_features
        if k is None and (g_idx := self._shape("g_idx", 1)):
            k = g_idx[0]
        size, scales = self.settings.group_size, self._shape("scales", 2)
        if k is None and scales and size and size > 0:
            k = size * scales[0]
        if (shape := self._shape("qweight", 2)) and k:
            found.append(32 * shape[0] / k)
        whole = {int(b) for b in found if b == int(b) and 2 <= b <= 8}
        return whole.pop() if len(whole) == 1 and len(found) == 2 else None

    def _conflict(self, key: str, said: object, found: object, fix: str) -> ConfigError:
        return ConfigError(
            f"{self.config.source}: {key} is {said!r} for {printable(self.name)!r}, but the stored "
            f"tensors say {found!r}; expected both to agree. {fix}",
            code="Q-CFG-CONFLICT",
            path=self.config.source,
            tensor=self.name,
            expected=found,
            actual=said,
            plugin="gptq",
        )

    def _in_features(self, bits: int) -> int:
        if self.layer.in_features is not None:
            return self.layer.in_features
        if shape := self._shape("g_idx", 1):
            return shape[0]
        if shape := self._shape("qweight", 2):
            return shape[0] * 32 // bits
        if (shape := self._shape("scales", 2)) and (self.settings.group_size or -1) > 0:
            return shape[0] * int(self.settings.group_size or 0)
        raise self._unsized("in_features")

    def _group_size(self, k: int) -> int:
        """The config's group size (K when there is one group), checked against the scales."""
        shape = self._shape("scales", 2)
        size = self.settings.group_size
        if size is None:
            if shape is None or k % shape[0]:
                raise self._conflict("group_size", None, shape, "Add a quantize_config.json.")
            return k // shape[0]
        return check_groups(
            self.leaves.get("scales"), k, size, source=self.config.source, plugin="gptq"
        )

    def _check_g_idx(self) -> None:
        """desc_act needs g_idx. One lost g_idx is left to the check for missing tensors."""
        if "g_idx" in self.leaves:
            return
        if any("g_idx" in leaves for leaves in self.checkpoint.modules.values()):
            return
        raise ConfigError(
            f"{self.config.source}: desc_act is true, but no layer stores g_idx "
            f"(first: {printable(self.name)!r}); expected one per layer. "
            "Set desc_act to false if the columns are in order, else export again.",
            code="Q-CFG-CONFLICT",
            path=self.config.source,
            tensor=f"{self.name}.g_idx",
            expected="g_idx",
            actual=None,
            plugin="gptq",
        )
