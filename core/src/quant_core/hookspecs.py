"""The hooks a plugin may implement. Their docstrings are the manual (docs/hooks.md renders them).

A plugin is a module named by an entry point in the group ``quant_core``; the entry point's name is
the plugin's id. It implements any of these functions, marked with ``@quant_core.hookimpl``. The
module may import neither torch nor triton at import: heavy imports go inside the functions.

Core calls the implementations one by one in sorted plugin order, each in its own try, so that one
broken plugin never hides another. Hooks are called while a checkpoint is planned and loaded, never
in a forward pass. Hook wrappers are rejected.

A plugin states in ``PluginInfo.api`` the version that has every hook and field it uses. The minor
number grows when hooks or fields are added, the major number when one changes meaning or goes; all
changes of one release are one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from quant_core.checkpoint.base import Checkpoint
    from quant_core.convert.fit import Fit
    from quant_core.convert.target import Target
    from quant_core.describe import Extras
    from quant_core.kernels.base import Kernel
    from quant_core.kv_cache import CacheForm
    from quant_core.online import OnlineScheme
    from quant_core.scheme import Scheme
    from quant_core.spec import (
        BlockType,
        FormatMatch,
        LayerDesc,
        OpSpec,
        ParamSpec,
        PluginInfo,
        QuantSpec,
        Unquantized,
    )
    from quant_core.tensors import LayerTensors

__all__ = ["GROUP", "hook_names", "hookimpl", "hookspec"]

GROUP = "quant_core"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


def hook_names() -> tuple[str, ...]:
    """All hooks, in the order of this file."""
    return tuple(n for n, f in globals().items() if hasattr(f, f"{GROUP}_spec"))


@hookspec
def plugin_info() -> PluginInfo:  # type: ignore[empty-body]
    """Who are you?

    Called once, right after the plugin is imported, in every process that loads plugins. Must be
    cheap and pure. A plugin without this hook is set aside (``Q-PLUGIN-RESULT``). Since API 0.1.
    """


@hookspec
def open_checkpoint(path: Path) -> Checkpoint | None:
    """Can you read this container?

    Called once per opened path, for a folder or a single file that core's own safetensors reader
    does not claim. Read the header only; never unpickle; take memory in proportion to the header.

    Args:
        path: existing file or folder, resolved.

    Returns:
        A ``Checkpoint``, or None if the container is not yours. Two answers are an error naming
        both plugins (``Q-FMT-AMBIGUOUS``). A file that is yours but broken: raise
        ``CheckpointError``. Since API 0.1.
    """


@hookspec
def detect_format(checkpoint: Checkpoint) -> FormatMatch | None:
    """Is this checkpoint in your format?

    Called once per opened checkpoint on every plugin, in the planning process. Decide from
    ``checkpoint.config``, ``checkpoint.side_file(name)`` and ``checkpoint.tensors`` (names,
    dtypes, shapes); read no tensor data and import no torch.

    Returns:
        ``FormatMatch`` with level "declared" (the checkpoint names your format) or "structural"
        (its tensors look like it), or None. Declared beats structural; two claims of one level
        are ``Q-FMT-AMBIGUOUS`` naming both. A config that names your format but is malformed:
        raise ``ConfigError``. Since API 0.1.
    """


@hookspec
def split_modules(  # type: ignore[empty-body]
    match: FormatMatch, checkpoint: Checkpoint
) -> Mapping[str, Sequence[LayerDesc]]:
    """Which stored modules hold several members?

    Called once per plan, before ``make_scheme``, on the plugin that owns the checkpoint. Without
    an answer each stored module is one member, and experts stored one by one form a stack. A
    format that stores gate and up of all experts in one tensor names both members here; their
    schemes then say by ``ParamSpec.sources`` which part of the tensor is whose.

    Returns:
        Stored module path -> its members, in the model's own names. Every tensor of such a module
        must belong to one of them. Since API 0.2.
    """


@hookspec
def attention_schemes(  # type: ignore[empty-body]
    match: FormatMatch, checkpoint: Checkpoint
) -> Mapping[str, Scheme]:
    """Which attention modules have quantized keys and values?

    Called once per plan, before ``make_scheme`` answers are checked, on the plugin that owns the
    checkpoint. Usually ``quant_core.kv_cache.cache_schemes`` with the format's own names. Tensors
    claimed here are not skipped by the schemes of the layers that they lie beside. Without an
    answer the cache stays float. Must not import torch.

    Returns:
        Stored path of the attention module -> its ``CacheScheme``. Since API 0.2.
    """


@hookspec
def make_scheme(  # type: ignore[empty-body]
    match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
) -> Scheme | Unquantized:
    """How is this member stored and computed?

    Called for each logical member of a checkpoint, on the plugin that owns it only. Presence
    wins: the stored tensors decide together with the config, and a contradiction is an error.
    ``layer.inp`` / ``layer.out`` may be None (header only); take the sizes from the stored shapes
    then. Must not import torch.

    Returns:
        A ``Scheme``, or ``Unquantized(rule, evidence)``. Never None. Since API 0.1.
    """


@hookspec
def create_weights(scheme: Scheme, layer: LayerDesc) -> Sequence[ParamSpec]:  # type: ignore[empty-body]
    """Which stored tensors belong to this layer?

    Called once per member after ``make_scheme``, on the owner. Pure: allocates nothing. Usually
    ``return scheme.params(layer)``; core does that itself for a plugin without this hook.
    Since API 0.1.
    """


@hookspec
def apply(op: OpSpec) -> Iterable[Kernel]:  # type: ignore[empty-body]
    """Which of your kernels could run this operation?

    Called once per distinct ``OpSpec`` on every plugin. Return all candidates, also those that
    will reject the operation: their reason is shown to the user. Kernels are cheap objects; what
    they need is imported in ``allocate``. Since API 0.1.
    """


@hookspec
def block_types() -> Mapping[str, BlockType]:  # type: ignore[empty-body]
    """Which opaque block types do you know?

    Called once after loading. A type may name codes that stand for its blocks in kernels
    (``BlockType.codes``). Two plugins with one name conflict (``Q-PLUGIN-CONFLICT``).
    Since API 0.1.
    """


@hookspec
def make_config(plan: Any) -> Mapping[str, Any]:  # type: ignore[empty-body]
    """The ``quantization_config`` block that describes this plan in your format.

    Called once by writers, on the plugin that owns the target format. ``plan`` is a
    ``quant_core.plan.Plan`` in the model's own names whose members have your schemes; its
    ``match`` is None unless it was read from your format. Since API 0.1.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the layers differ in what your config states once.
    """


@hookspec
def make_extras(plan: Any) -> Extras | None:
    """What describes this plan in your format outside of config.json.

    Called once by writers of safetensors, after ``make_config``, on the plugin that owns the target
    format: for descriptions in files of their own, or in the header of the weights. If there are
    such, ``make_config`` may answer None: config.json then has no quantization block.

    Args:
        plan: as for ``make_config``.

    Returns:
        ``quant_core.describe.Extras``, or None. Since API 0.2.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the layers cannot be described together.
    """


@hookspec
def fit_scheme(  # type: ignore[empty-body]
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """Which of your schemes holds this matrix?

    Called on the target's plugin by ``convert``, for every matrix, twice: while everything is
    surveyed, before a byte is written, and again while writing. The answer must depend on the
    arguments only. The tensors may be rewritten by exact rewrites (``quant_core.rewrites``,
    ``quant_core.convert.steps``): another grain, packing or scale type, a constant zero as codes,
    int8 as uint8. Core writes what your scheme serializes, reads it back through it, and compares
    the weights bit by bit: an inexact answer that names no loss is an error of the plugin.

    Args:
        layer: the member in the model's own names; of a stack, the whole stack.
        tensors: one matrix, to be kept unchanged.
        operands: role -> meaning of all operands of its scheme, "input" among them when
            activations are quantized.
        options: the user's, and what ``settle_options`` made of them. Refuse keys you do not
            know (``quant_core.convert.fit.check_options``).
        allow_inexact: whether a loss may be taken.

    Returns:
        A ``Fit``: scheme, tensors, what is lost. A scheme of None means that this layer (an
        embedding, say) is written as floats.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` with the reason and what can be done. All refusals of
            a checkpoint are reported together. Since API 0.2.
    """


@hookspec
def cache_form() -> CacheForm | None:
    """Which scales of quantized keys and values can you store?

    Called on the target's plugin by ``convert``, for every attention module that has such scales
    in the source. Core carries them over bit by bit under your names, or refuses with the
    difference. Whoever answers describes them in ``make_config`` or ``make_extras`` too:
    ``plan.attention`` holds the modules. Without an answer the format stores none.

    Returns:
        ``quant_core.kv_cache.CacheForm``, or None. Since API 0.2.
    """


@hookspec
def settle_options(  # type: ignore[empty-body]
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Do these layers go into one checkpoint, and if not, under which options would they?

    Called after all matrices were fitted, with the schemes of each member (one per matrix of a
    stack). A format that states a group size once answers options with one that divides all; one
    that stores a stack as one tensor answers with the type that holds every expert. If the answer
    differs from ``options``, the survey is repeated under it, up to three times. A plugin without
    this hook takes the schemes as they are. Since API 0.2.
    """


@hookspec
def write_checkpoint(target: Target, folder: Path) -> Sequence[Path]:  # type: ignore[empty-body]
    """Write a checkpoint in your own container.

    Called once, for a target format whose container is not safetensors. ``folder`` is a fresh
    temporary folder that core renames, or removes if anything is raised. Take the values one
    matrix at a time from ``target.matrix`` and ``target.parameter``; metadata of the model from
    ``target.source.checkpoint`` and ``target.config``.

    Returns:
        The files that were written, the main one first.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if names or metadata cannot be written completely.
        Since API 0.2.
    """


@hookspec
def online_schemes() -> Mapping[str, OnlineScheme]:  # type: ignore[empty-body]
    """What can you make from float weights at load time?

    Called on every plugin once per load that asks for it; must be cheap and import no torch. A
    user names ``plugin:name``, or the bare name: that belongs to the plugin with that id if it
    offers such a scheme, else to the one whose ``OnlineScheme.bare`` claims it. Two claims of one
    bare name are ``Q-PLUGIN-CONFLICT``. The schemes made must ``quantize``; for saving,
    ``serialize`` and the hook ``make_config`` are used.

    Returns:
        Name -> ``quant_core.online.OnlineScheme``. Since API 0.1.
    """
