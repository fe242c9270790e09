"""Which scheme one layer has: stored names decide together with the config.

    packed tensors stored        -> AwqScheme, unless the config names the module as excluded
    plain weight stored          -> Unquantized, unless the same module of another layer is packed
    experts                      -> all of one stack must agree

Sizes come from the engine where it knows them, else from the stored shapes; every stored shape is
then compared with what the config implies, before any data is read.
"""

from __future__ import annotations

from collections.abc import Mapping

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, printable, summarize
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.presence import stored_modules
from quant_core.resolve import numberless
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_awq.checks import check_header, header_sizes, resolve_group
from quant_plugin_awq.config import AwqConfig
from quant_plugin_awq.geometry import TILED
from quant_plugin_awq.scheme import AwqScheme, build_scheme

__all__ = ["scheme_for"]

_PACKED = ("qweight", "qzeros", "scaled_zeros", "scales")
Leaves = Mapping[str, TensorInfo]


def _is_packed(leaves: Leaves) -> bool:
    """Any packed tensor counts, so that a lost one is reported instead of the layer's absence.

    A lone one-dimensional ``scales`` belongs to a scaled activation.
    """
    return any(n in leaves for n in _PACKED[:3]) or (
        "scales" in leaves and len(leaves["scales"].shape) > 1
    )


def _mismatch(checkpoint: Checkpoint, tensor: str, found: str, fix: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: tensor {printable(tensor)!r}: {found}. {fix}",
        code="Q-CKPT-MISMATCH",
        path=checkpoint.path,
        tensor=tensor,
        plugin="awq",
    )


def _missing(checkpoint: Checkpoint, names: list[str], needed_by: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {len(names)} tensor(s) not stored: {summarize(names)}; expected for "
        f"{printable(needed_by)}. The checkpoint is incomplete; download or export it again.",
        code="Q-TENSOR-MISSING",
        path=checkpoint.path,
        tensor=names[0],
        expected=names,
        plugin="awq",
    )


def _required(config: AwqConfig) -> list[str]:
    zeros = "scaled_zeros" if config.layout == "llm-awq" else "qzeros"
    return ["qweight", *([zeros] if config.zero_point else []), "scales"]


def _unquantized(
    config: AwqConfig, layer: LayerDesc, modules: Mapping[str, Leaves], checkpoint: Checkpoint
) -> Unquantized:
    """The rule by which nothing is packed here; an error if no rule explains it."""
    first, leaves = next(iter(modules.items()))
    pattern = config.excluded(first)
    if pattern:
        return Unquantized(rule="modules_to_not_convert", evidence=f"pattern {pattern!r}")
    expected_packed = numberless(first) in config.quantized or (
        config.lm_head and first.rpartition(".")[2] == "lm_head" and "weight" in leaves
    )
    if not expected_packed:
        return Unquantized(rule="no packed tensor stored", evidence=f"{first}.qweight is absent")
    stored = next((f"{p}.weight" for p, have in modules.items() if "weight" in have), "")
    if stored:
        raise _mismatch(
            checkpoint,
            stored,
            f"a plain weight is stored, expected {first}.qweight: the same module is packed in "
            "other layers and modules_to_not_convert does not name this one",
            "Add the module to modules_to_not_convert, or export the checkpoint again.",
        )
    names = [f"{p}.{leaf}" for p in modules for leaf in _required(config)]
    raise _missing(checkpoint, names, layer.name)


def _check_presence(
    config: AwqConfig, layer: LayerDesc, modules: Mapping[str, Leaves], checkpoint: Checkpoint
) -> None:
    """All matrices of a packed layer are packed, and nothing says that they are not."""
    packed = [p for p, leaves in modules.items() if _is_packed(leaves)]
    for path, leaves in modules.items():
        if "weight" in leaves:
            raise _mismatch(
                checkpoint,
                f"{path}.weight",
                f"a plain weight is stored beside the packed tensors of {printable(packed[0])!r}, "
                "expected one of the two for the whole layer",
                "Remove the one that is not meant, or export the checkpoint again.",
            )
    absent = [f"{p}.{n}" for p in modules if p not in packed for n in _required(config)]
    if absent:
        raise _missing(checkpoint, absent, layer.name)
    for path in modules:
        pattern = config.excluded_exactly(path)
        if pattern:
            raise _mismatch(
                checkpoint,
                f"{path}.qweight",
                f"packed tensors are stored, but {config.file} excludes this module "
                f"(pattern {pattern!r})",
                "Correct modules_to_not_convert.",
            )
    if config.scaled_activation:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {printable(config.scaled_activation)!r} scales an "
            "activation function's output, expected weights that need no such scale. Export the "
            "model without activation scaling; it is not supported.",
            code="Q-TENSOR-UNEXPECTED",
            path=checkpoint.path,
            tensor=config.scaled_activation,
            plugin="awq",
        )


def _zeros_name(config: AwqConfig, leaves: Leaves) -> str:
    """Stored name of the zeros; "" only where the config allows their absence."""
    names = ("scaled_zeros", "qzeros") if config.layout in TILED else ("qzeros",)
    stored = next((n for n in names if n in leaves), "")
    if stored or not config.zero_point:
        return stored
    return "scaled_zeros" if config.layout == "llm-awq" else "qzeros"


def _dtype(leaves: Leaves, name: str) -> str:
    """Stored float dtype of ``name``; float16 if absent or odd, which a later check reports."""
    info = leaves.get(name)
    return info.dtype if info is not None and info.dtype in SCALE_ELEMENTS else "float16"


def _scheme(config: AwqConfig, layer: LayerDesc, path: str, leaves: Leaves) -> AwqScheme:
    zeros = _zeros_name(config, leaves)
    shape = header_sizes(config, layer, path, leaves, zeros)
    return build_scheme(
        layout=config.layout,
        shape=shape,
        bits=config.bits,
        group_size=resolve_group(config, path, leaves, shape[1]),
        scale_dtype=_dtype(leaves, "scales"),
        zeros=zeros,
        zeros_dtype=_dtype(leaves, zeros),
        zero_point=config.zero_point,
        interleaved=config.bits == 4 or config.producer != "gptqmodel",
    )


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> AwqScheme | Unquantized:
    """The scheme of one layer.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` (config and stored names disagree),
            ``Q-TENSOR-MISSING``, ``Q-TENSOR-UNEXPECTED`` (a scaled activation).
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-LAYOUT-DTYPE``, ``Q-LAYOUT-GROUP``.
        ConfigError: ``Q-CFG-CONFLICT`` if the words hold another number of bits.
    """
    config: AwqConfig = match.config
    modules = stored_modules(layer, checkpoint)
    if not any(_is_packed(leaves) for leaves in modules.values()):
        return _unquantized(config, layer, modules, checkpoint)
    _check_presence(config, layer, modules, checkpoint)
    first = next(iter(modules))
    scheme = _scheme(config, layer, first, modules[first])
    for path, leaves in modules.items():
        check_header(config, scheme, path, leaves, layer)
    return scheme
