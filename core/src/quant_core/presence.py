"""What is quantized is what is stored so: the config may not contradict it.

For formats whose config only lists modules to leave out:

    stored quantized, the list names the module       contradiction
    stored as floats, the list names it               unquantized
    stored as floats, its siblings are quantized      contradiction: a tensor was lost or replaced
    stored as floats otherwise                        unquantized

Siblings are modules of one name in other layers or experts. A list entry permits by any match in
the module's name, and contradicts only where it names the module, or a parent, in whole parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quant_core.checkpoint.base import Checkpoint
from quant_core.describe import module_names
from quant_core.errors import CheckpointError, printable
from quant_core.resolve import NamePattern, first_match, numberless
from quant_core.spec import LayerDesc, TensorInfo, Unquantized

__all__ = ["check_stacked", "refuse_skipped", "siblings_of", "stored_modules", "unquantized"]

Leaves = Mapping[str, TensorInfo]


def siblings_of(
    checkpoint: Checkpoint, is_quantized: Callable[[str, Leaves], bool]
) -> frozenset[str]:
    """Names without numbers of all quantized modules."""
    modules = checkpoint.modules.items()
    return frozenset(numberless(path) for path, leaves in modules if is_quantized(path, leaves))


def stored_modules(layer: LayerDesc, checkpoint: Checkpoint) -> dict[str, Leaves]:
    """Stored module path -> its tensors, one entry per expert of a stack."""
    return {p: checkpoint.modules.get(p, {}) for p in module_names(layer)}


def _mismatch(
    checkpoint: Checkpoint, tensor: str, found: str, fix: str, plugin: str
) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {printable(tensor)!r} {found}, expected config and stored tensors to "
        f"agree. {fix}",
        code="Q-CKPT-MISMATCH",
        path=checkpoint.path,
        tensor=tensor,
        actual=found,
        plugin=plugin,
    )


def refuse_skipped(
    path: str, skip: Sequence[NamePattern], checkpoint: Checkpoint, *, source: str, plugin: str
) -> None:
    """A quantized module must not be on the list.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH``.
    """
    dotted = f".{path}."
    entry = next((p for p in skip if f".{p.text.strip('.')}." in dotted), None)
    if entry is not None:
        raise _mismatch(
            checkpoint,
            path,
            f"is quantized, but {entry.purpose} of {source} names it ({printable(entry.label)!r})",
            "Correct the list, or export the checkpoint again.",
            plugin,
        )


def check_stacked(
    modules: Mapping[str, Leaves],
    is_quantized: Callable[[str, Leaves], bool],
    checkpoint: Checkpoint,
    *,
    plugin: str,
) -> None:
    """All experts of a quantized stack must be quantized.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` naming one that is not.
    """
    plain = [p for p, leaves in modules.items() if leaves and not is_quantized(p, leaves)]
    if plain and len(plain) < len(modules):
        raise _mismatch(
            checkpoint,
            plain[0],
            "is stored as floats, but other experts of its stack are quantized",
            "Quantize all experts alike.",
            plugin,
        )


def unquantized(
    layer: LayerDesc,
    checkpoint: Checkpoint,
    siblings: frozenset[str],
    skip: Sequence[NamePattern],
    *,
    source: str,
    plugin: str,
) -> Unquantized:
    """Why a module that is stored as floats is not quantized.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` if its siblings are and nothing excludes it.
    """
    path, leaves = next(iter(stored_modules(layer, checkpoint).items()))
    entry = first_match(skip, path)
    if entry is not None:
        return Unquantized(rule=entry.purpose, evidence=f"entry {entry.label!r}")
    weight = leaves.get("weight")
    if weight is not None and len(weight.shape) == 2 and numberless(path) in siblings:
        raise _mismatch(
            checkpoint,
            weight.name,
            f"is a plain {weight.dtype} weight, but the same module of other layers is quantized "
            f"and nothing in {source} excludes this one",
            "List the module there, or export the checkpoint again.",
            plugin,
        )
    return Unquantized(rule="no quantized tensor stored", evidence=path)
