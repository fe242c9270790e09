"""From the header to a scheme: the stored tensors decide, the config explains, both must agree.

packed tensors (qweight, ...) stored   AutoRoundScheme, unless extra_config names the module in
                                       full with 16 bits, or asks for what cannot be read
codes and scales of small floats       FloatScheme, see ``floats``; other types are refused
plain weight stored                    Unquantized, unless the config says otherwise and the
                                       same module of another layer is packed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import FLOAT_DTYPES
from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable
from quant_core.floatspec import FloatScheme
from quant_core.presence import stored_modules
from quant_core.resolve import numberless
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_autoround.config import AutoRoundConfig, LayerSettings
from quant_plugin_autoround.floats import family_of, float_scheme
from quant_plugin_autoround.scheme import AutoRoundScheme
from quant_plugin_autoround.sizes import scheme_of

__all__ = ["scheme_for"]

_PACKED = ("qweight", "qzeros", "scales", "g_idx")
_OTHER = (  # names of float, W8A8 and activation-quantized layers
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_global_scale", "weight_zero_point",
    "input_scale", "input_global_scale", "act_scales", "w_bf16_to_fp8_scale",
)  # fmt: skip
Leaves = Mapping[str, TensorInfo]


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> AutoRoundScheme | FloatScheme | Unquantized:
    """The scheme of one member.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for a kind of quantization that is not read,
            ``Q-CFG-CONFLICT`` if bits contradict the shapes or experts differ.
        CheckpointError: ``Q-CKPT-MISMATCH`` if config and stored tensors contradict each other,
            ``Q-TENSOR-MISSING`` if too little is stored to tell the sizes.
        LayoutError: ``Q-LAYOUT-GROUP``, ``Q-LAYOUT-SHAPE``.
    """
    config: AutoRoundConfig = match.config
    stored = stored_modules(layer, checkpoint)
    if any(_foreign(leaves) for leaves in stored.values()):
        return _float_member(config, layer, stored, checkpoint)
    packed = {n: v for n, v in stored.items() if any(p in v for p in _PACKED)}
    floats = [n for n, v in stored.items() if n not in packed and "weight" in v]
    if not packed:
        return _unquantized(config, layer, checkpoint, floats)
    if floats:
        other = f"{next(iter(packed))} holds codes"
        raise _mismatch(checkpoint, floats[0], "holds a float weight", other)
    first = next(iter(packed))
    settings = config.packed_settings(first)
    if not settings.quantized:
        said = f"{config.source} says {settings.bits} bits"
        raise _mismatch(checkpoint, first, "holds packed codes", said)
    if settings.unread or config.dialect == "float":
        raise _unread(config, first, settings, [t for t in _PACKED if t in packed[first]])
    _check_experts(config, packed, first)
    return scheme_of(config, settings, layer, first, packed[first], checkpoint)


def _float_member(
    config: AutoRoundConfig,
    layer: LayerDesc,
    stored: Mapping[str, Leaves],
    checkpoint: Checkpoint,
) -> FloatScheme:
    """A member with tensors of small floats; of a stack all experts must have them."""
    for name, leaves in stored.items():
        settings, found = config.packed_settings(name), _foreign(leaves)
        if not found:
            other = f"{next(n for n in stored if _foreign(stored[n]))} holds codes"
            raise _mismatch(checkpoint, name, "holds none", other)
        if not settings.quantized:
            said = f"{config.source} says {settings.bits} bits"
            raise _mismatch(checkpoint, name, "holds codes", said)
        if not family_of(settings.data_type, settings.bits):
            raise _unread(config, name, settings, found)
    first = next(iter(stored))
    _check_experts(config, stored, first)
    settings = config.packed_settings(first)
    return float_scheme(config, settings, layer, first, stored[first], checkpoint)


def _foreign(leaves: Leaves) -> list[str]:
    """Tensors of a quantized layer whose weights are no integers."""
    found = [name for name in _OTHER if name in leaves]
    weight = leaves.get("weight")
    if weight is not None and weight.dtype not in FLOAT_DTYPES:
        found.append(f"weight of {weight.dtype}")
    return found


def _unread(
    config: AutoRoundConfig, name: str, settings: LayerSettings, tensors: Iterable[str]
) -> ConfigError:
    kind = f"{settings.bits}-bit {settings.data_type} weights"
    what = ", ".join(settings.unread or [kind])
    return ConfigError(
        f"{config.source}: module {printable(name)!r} needs {what} in packing_format "
        f"{config.packing_format!r} (stored: {', '.join(tensors)}), expected integer weights and "
        "float activations, or weights of type mx_fp, nv_fp or fp. Export the model in format "
        "llm_compressor and load it as compressed-tensors, or quantize it with one of these.",
        code="Q-CFG-VALUE",
        path=config.source,
        tensor=name,
        expected="integer weights, float activations",
        actual=what,
        plugin="autoround",
    )


def _mismatch(checkpoint: Checkpoint, name: str, found: str, but: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: module {printable(name)!r} {found}, but {but}; expected config and "
        "stored tensors to agree. The config belongs to other weights, or a layer was replaced.",
        code="Q-CKPT-MISMATCH",
        path=checkpoint.path,
        tensor=name,
        expected=but,
        actual=found,
        plugin="autoround",
    )


def _unquantized(
    config: AutoRoundConfig, layer: LayerDesc, checkpoint: Checkpoint, floats: list[str]
) -> Unquantized:
    """The rule by which nothing is packed here; an error if the config says it should be."""
    if not floats:
        return Unquantized(rule="no weight stored under this name", evidence=layer.stored)
    name = floats[0]
    weight = checkpoint.modules[name]["weight"]
    evidence = f"{weight.name} is {weight.dtype}"
    rule = next(config.rules_for(name), None)
    settings = config.settings(name)
    if rule is not None and not settings.quantized:
        return Unquantized(
            rule=f"extra_config {rule.key!r}: {settings.bits} bits", evidence=evidence
        )
    if rule is not None and rule.key == name:
        said = f"{config.source} says {settings.bits} bits in extra_config"
        raise _mismatch(checkpoint, name, f"holds a weight of {weight.dtype}", said)
    if not config.in_blocks(name):
        return Unquantized(rule="not in block_name_to_quantize", evidence=evidence)
    if settings.quantized and numberless(name) in config.quantized:
        said = f"other layers hold codes and {config.source} does not exclude this one"
        raise _mismatch(checkpoint, name, f"holds a weight of {weight.dtype}", said)
    return Unquantized(rule="no packed tensor stored", evidence=evidence)


def _check_experts(config: AutoRoundConfig, packed: Mapping[str, Leaves], first: str) -> None:
    """All experts of a stack have the settings and shapes of the first."""
    settings = replace(config.packed_settings(first), rule="")
    for name, leaves in packed.items():
        found = replace(config.packed_settings(name), rule="")
        if found != settings:
            raise ConfigError(
                f"{config.source}: {printable(name)!r} has {found.bits} bits, group_size "
                f"{found.group_size}, sym {found.sym}, but {printable(first)!r} has "
                f"{settings.bits}, {settings.group_size}, {settings.sym}; expected one scheme for "
                "all experts of a stack. Use one rule of extra_config for all experts.",
                code="Q-CFG-CONFLICT",
                path=config.source,
                tensor=name,
                expected=str(settings),
                actual=str(found),
                plugin="autoround",
            )
        for leaf, info in leaves.items():
            like = packed[first].get(leaf)
            if like is not None and (like.shape, like.dtype) != (info.shape, info.dtype):
                raise LayoutError(
                    f"{info.file}: tensor {printable(info.name)!r} has shape {info.shape} "
                    f"{info.dtype}, expected {like.shape} {like.dtype} as {like.name!r}. "
                    "Experts of one stack must be stored alike.",
                    code="Q-LAYOUT-SHAPE",
                    path=info.file,
                    tensor=info.name,
                    expected=like.shape,
                    actual=info.shape,
                    plugin="autoround",
                )
