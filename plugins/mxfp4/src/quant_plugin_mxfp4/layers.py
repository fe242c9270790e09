"""Which members a checkpoint of MXFP4 experts holds, and how each is stored.

One module ``...mlp.experts`` holds two stacks of all experts and their biases:

    gate_up_proj_blocks uint8 [E, 2I, H/32, 16]   rows 0, 2, 4 ..: gate    rows 1, 3, 5 ..: up
    gate_up_proj_scales uint8 [E, 2I, H/32]       gate_up_proj_bias [E, 2I], rows alike
    down_proj_blocks    uint8 [E, H, I/32, 16]    down_proj_scales, down_proj_bias [E, H]

that is three members: gate, up and down. Blocks may also lie in one row, [E, N, K/2].
"""

from __future__ import annotations

from collections.abc import Mapping

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, LayoutError, printable
from quant_core.spec import FormatMatch, LayerDesc, TensorInfo, Unquantized
from quant_plugin_mxfp4.config import Mxfp4Config
from quant_plugin_mxfp4.scheme import BLOCK, BLOCK_BYTES, ROLES, Mxfp4Scheme, Rows

__all__ = ["block_stacks", "expert_members", "scheme_for"]


def block_stacks(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """(module, stack) of everything stored as bytes of blocks beside bytes of scales."""
    return [
        (path, leaf.removesuffix("_blocks"))
        for path, leaves in checkpoint.modules.items()
        for leaf, info in leaves.items()
        if leaf.endswith("_blocks") and info.dtype == "uint8"
        if (scales := leaves.get(f"{leaf.removesuffix('_blocks')}_scales")) is not None
        and scales.dtype == "uint8"
    ]


def _is_experts(leaves: Mapping[str, TensorInfo]) -> bool:
    stacks = {rows.stack for rows in ROLES.values()}
    return any(f"{s}_{part}" in leaves for s in stacks for part in ("blocks", "scales"))


def expert_members(checkpoint: Checkpoint) -> dict[str, tuple[LayerDesc, ...]]:
    """Stored module path -> gate, up and down of its experts."""
    out = {}
    for path, leaves in checkpoint.modules.items():
        if not _is_experts(leaves):
            continue
        count = max(info.shape[0] for info in leaves.values() if info.shape)
        out[path] = tuple(
            LayerDesc(
                kind="experts",
                name=f"{path}.{role}_proj",
                stored=path,
                experts=tuple(range(count)),
                role=role,
            )
            for role in ROLES
        )
    return out


def _bad_shape(info: TensorInfo, expected: object, why: str) -> LayoutError:
    return LayoutError(
        f"{info.file}: tensor {printable(info.name)!r} has shape {info.shape}, expected {expected} "
        f"{why}. The checkpoint was cut short, or is of another model.",
        code="Q-LAYOUT-SHAPE",
        path=info.file,
        tensor=info.name,
        expected=expected,
        actual=info.shape,
        plugin="mxfp4",
    )


def _missing(checkpoint: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: tensor {printable(name)!r} is missing, expected it beside the other "
        "tensors of the experts. The checkpoint is incomplete; download or export it again.",
        code="Q-TENSOR-MISSING",
        path=checkpoint.path,
        tensor=name,
        plugin="mxfp4",
    )


def _sizes(info: TensorInfo, rows: Rows, experts: int) -> tuple[int, int]:
    """(N, K) of one matrix of a stack, checked.

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE``.
    """
    shape = info.shape
    whole = shape[2] * 2 if len(shape) == 3 else shape[2] * BLOCK if len(shape) == 4 else 0
    good = whole and whole % BLOCK == 0 and (len(shape) == 3 or shape[3] == BLOCK_BYTES)
    if not good:
        raise _bad_shape(info, "[E, N, K/32, 16] or [E, N, K/2]", "for blocks of 32 codes")
    if shape[0] != experts or shape[1] % rows.step:
        expected = f"[{experts}, a multiple of {rows.step}, ...]"
        raise _bad_shape(info, expected, f"for {experts} experts, rows of {rows.stack} in turn")
    return shape[1] // rows.step, whole


def scheme_for(
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Mxfp4Scheme | Unquantized:
    """The scheme of one member.

    Raises:
        CheckpointError: ``Q-CKPT-MISMATCH`` (quantized, but the config excludes it),
            ``Q-TENSOR-MISSING``.
        LayoutError: ``Q-LAYOUT-SHAPE``.
    """
    config: Mxfp4Config = match.config
    leaves = checkpoint.modules.get(layer.stored, {})
    rows = ROLES.get(layer.role)
    if rows is None or not _is_experts(leaves):
        entry = config.skip_entry(layer.stored)
        if entry:
            return Unquantized(rule="modules_to_not_convert", evidence=f"entry {entry!r}")
        return Unquantized(rule="no blocks stored", evidence=layer.stored)
    if entry := config.skip_entry(layer.stored):
        raise CheckpointError(
            f"{checkpoint.path}: {printable(layer.stored)!r} is quantized, but {config.file} "
            f"excludes it (modules_to_not_convert entry {entry!r}); expected both to agree. "
            "Correct the entry, or export the checkpoint again.",
            code="Q-CKPT-MISMATCH",
            path=checkpoint.path,
            tensor=f"{layer.stored}.{rows.stack}_blocks",
            actual=entry,
            plugin="mxfp4",
        )
    blocks = leaves.get(f"{rows.stack}_blocks")
    if blocks is None:
        raise _missing(checkpoint, f"{layer.stored}.{rows.stack}_blocks")
    n, k = _sizes(blocks, rows, len(layer.experts))
    for part in ("scales", "bias"):
        info = leaves.get(f"{rows.stack}_{part}")
        whole = (len(layer.experts), n * rows.step)
        if info is not None and info.shape[:2] != whole:
            raise _bad_shape(info, f"{list(whole)}, ...", "like the blocks")
    return Mxfp4Scheme.of(n, k, role=layer.role, flat=len(blocks.shape) == 3)
