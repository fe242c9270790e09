"""Which scheme one module has: stored names decide together with the config, both must agree.

scales or codes stored       -> the scheme of the module's arguments; excluded = error
only scales of attention     -> not loaded, by a named rule
plain float weight stored    -> Unquantized, unless the same module of other layers is quantized
"""

from __future__ import annotations

from collections.abc import Mapping

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, ConfigError, printable
from quant_core.presence import check_stacked, stored_modules, unquantized
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_quark.args import LayerArgs
from quant_plugin_quark.beside import KV_MODULES
from quant_plugin_quark.config import QuarkConfig
from quant_plugin_quark.detect import is_quantized
from quant_plugin_quark.header import Header
from quant_plugin_quark.names import first_of
from quant_plugin_quark.scheme import KV_RULE, QuarkScheme
from quant_plugin_quark.weights import build

__all__ = ["scheme_for"]

_CACHE = frozenset(("output_scale", "output_zero_point", "prob_output_scale"))
Leaves = Mapping[str, TensorInfo]


def _unquantized(config: QuarkConfig, layer: LayerDesc, checkpoint: Checkpoint) -> Unquantized:
    path, leaves = next(iter(stored_modules(layer, checkpoint).items()))
    cache = _CACHE & leaves.keys()
    if "prob_output_scale" not in leaves and path.rpartition(".")[2] not in KV_MODULES:
        cache = frozenset()
    if cache and "weight" not in leaves:
        return Unquantized(rule=KV_RULE, evidence=", ".join(sorted(cache)), ignored=cache)
    if entry := first_of(config.exclude, path, layer.name):
        found = Unquantized(rule="exclude", evidence=f"entry {entry.text!r}")
    elif not config.args_of(path, layer.name).weight:
        found = Unquantized(rule="config leaves the weight as it is", evidence=path)
    else:
        found = unquantized(
            layer, checkpoint, config.siblings, (), source=config.file, plugin="quark"
        )
    return found if not cache else Unquantized(rule=KV_RULE, evidence=path, ignored=cache)


def _arguments(
    config: QuarkConfig, layer: LayerDesc, modules: Mapping[str, Leaves], checkpoint: Checkpoint
) -> LayerArgs:
    """The arguments of all matrices of a quantized layer.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` if the config excludes the module.
        ConfigError: ``Q-CFG-CONFLICT`` if experts of one stack differ.
    """
    found: dict[str, LayerArgs] = {}
    for path in modules:
        args = config.args_of(path, *(() if layer.experts else (layer.name,)))
        entry = first_of(config.exclude, path, *(() if layer.experts else (layer.name,)))
        if entry is not None or not args.weight:
            why = f"exclude ({entry.text!r})" if entry else f"{args.where} (no weight)"
            raise CheckpointError(
                f"{checkpoint.path}: {printable(path)!r} is quantized, but {why} of {config.file} "
                "leaves it as it is; expected config and stored tensors to agree. Correct the "
                "config, or export the checkpoint again.",
                code="Q-CKPT-MISMATCH",
                path=checkpoint.path,
                tensor=path,
                actual=why,
                plugin="quark",
            )
        found[path] = args
    first = next(iter(found.values()))
    kind = (first.weight, first.inputs)
    odd = next((p for p, a in found.items() if (a.weight, a.inputs) != kind), "")
    if odd:
        raise ConfigError(
            f"{config.file}: experts of {printable(layer.name)!r} are quantized by "
            f"{first.where} and, {printable(odd)!r}, by {found[odd].where}; expected one kind for "
            "a whole stack. Quantize all experts alike.",
            code="Q-CFG-CONFLICT",
            path=config.file,
            tensor=odd,
            expected=first.label,
            actual=found[odd].label,
            plugin="quark",
        )
    return first


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> QuarkScheme | Unquantized:
    """The scheme of one member.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` (config and stored names disagree),
            ``Q-TENSOR-MISSING`` (too little stored to tell the sizes).
        ConfigError: ``Q-CFG-VALUE`` (not supported), ``Q-CFG-CONFLICT``, ``Q-CFG-TRANSFORM``.
        LayoutError: ``Q-LAYOUT-GROUP``.
    """
    config: QuarkConfig = match.config
    modules = stored_modules(layer, checkpoint)
    quantized = {p: leaves for p, leaves in modules.items() if is_quantized(p, leaves)}
    if not quantized:
        return _unquantized(config, layer, checkpoint)
    check_stacked(modules, is_quantized, checkpoint, plugin="quark")
    args = _arguments(config, layer, quantized, checkpoint)
    path, leaves = next(iter(quantized.items()))
    return build(
        Header(
            config=config, args=args, layer=layer, checkpoint=checkpoint, path=path, leaves=leaves
        )
    )  # fmt: skip
