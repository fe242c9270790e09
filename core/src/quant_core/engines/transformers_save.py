"""``save_pretrained`` of a packed model: its own format again, bit for bit.

    module.restore() -> rows of one member -> its stored packing -> scheme.serialize -> stored names

Float tensors go back under their stored names, in their stored dtype where that holds the values
exactly, else in the model's. What was rightly not loaded is copied from the source. config.json
and the other files are those of the source; at most one shard is held in memory.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant_core.answers import ask_scheme
from quant_core.checkpoint.open import open_checkpoint
from quant_core.checkpoint.write import write_safetensors
from quant_core.engines.transformers_names import Slot
from quant_core.errors import ConfigError, LayoutError, QuantError, printable, summarize
from quant_core.kv_states import QuantCache
from quant_core.nn import BoundMember, QuantModule
from quant_core.packing import repack
from quant_core.parts import matrices
from quant_core.plan import Member, Plan, member_parts, param_sources
from quant_core.registry import registry
from quant_core.rewrites import slice_out
from quant_core.scheme import Scheme
from quant_core.spec import TensorInfo
from quant_core.tensors import LayerTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant_core.engines.transformers_fill import Filled

__all__ = ["Provenance", "attach_save", "save_model"]

log = logging.getLogger("quant_core")

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|h5|msgpack|onnx)(\.index\.json)?$")
_SIDE_BYTES = 64 << 20  # larger files beside the weights are not configuration
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a model came from, as plain data: enough to write it back without the source."""

    path: Path
    folder: Path
    container: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    members: Mapping[str, Member]
    dense: Mapping[str, str]  # public name -> stored name
    slots: Mapping[str, Slot]  # public name -> parameter
    skipped: Mapping[str, str]  # stored name -> rule
    files: Mapping[str, bytes]  # config.json and the side files of plugins
    dropped: frozenset[str] = frozenset()  # files of the source that do not describe the result
    refusal: str = ""  # why this model cannot be saved

    @staticmethod
    def of(plan: Plan, filled: Filled) -> Provenance:
        source = plan.checkpoint
        names = {"config.json"}
        for plugin in plan.registry.plugins.values():
            names |= set(plugin.info.side_files)
        files = [source.folder / name for name in sorted(names)]
        return Provenance(
            path=source.path,
            folder=source.folder,
            container=source.container,
            tensors=dict(source.tensors),
            metadata={k: v for k, v in source.metadata.items() if isinstance(v, str)},
            members=dict(filled.members),
            dense=dict(plan.dense),
            slots=dict(filled.slots),
            skipped=dict(plan.ledger.skipped),
            files={f.name: f.read_bytes() for f in files if f.is_file()},
        )

    def __deepcopy__(self, memo: object) -> Provenance:
        return self


def attach_save(model: PreTrainedModel, provenance: Provenance) -> None:
    """Make ``model.save_pretrained`` write the checkpoint's own format."""
    model.save_pretrained = functools.partial(save_model, model, provenance)


def save_model(
    model: PreTrainedModel,
    provenance: Provenance,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    **kwargs: Any,
) -> None:
    """What ``model.save_pretrained(folder)`` does for a packed model.

    Raises:
        LayoutError: ``Q-SAVE-CONTAINER`` if the container cannot be written in place,
            ``Q-SAVE-CHANGED`` if layers were replaced or resized since loading,
            ``Q-LAYOUT-REPRESENT`` if layers quantized while loading belong to no one format.
        ConfigError: ``Q-CFG-VALUE`` for an argument that a packed model cannot honour.
        CheckpointError: see ``write_safetensors``.
    """
    wrong = [k for k, v in kwargs.items() if v not in (None, True) and k != "token"]
    if state_dict is not None or push_to_hub or wrong:
        names = wrong or ["state_dict" if state_dict is not None else "push_to_hub"]
        raise ConfigError(
            f"save_pretrained: got {summarize(names)}, expected only a folder and max_shard_size "
            "for a packed model. Drop it; upload the folder afterwards.",
            code="Q-CFG-VALUE",
            tensor=names[0],
        )
    if provenance.container != "safetensors":
        raise LayoutError(
            f"{provenance.path}: is a {provenance.container} container, expected safetensors to "
            "save in place. Use `quant convert` to write the model in another format.",
            code="Q-SAVE-CONTAINER",
            path=provenance.path,
            expected="safetensors",
            actual=provenance.container,
        )
    if provenance.refusal:
        raise LayoutError(
            f"save_pretrained: {provenance.refusal}; expected layers that one format can hold. "
            "Quantize all of them, or save the float model.",
            code="Q-LAYOUT-REPRESENT",
            path=provenance.path,
            actual=provenance.refusal,
        )
    if not is_main_process:
        return
    folder = Path(os.path.abspath(save_directory))
    with torch.no_grad():
        write_safetensors(
            folder,
            _stored_tensors(model, provenance),
            max_shard_bytes=_bytes(max_shard_size),
            metadata={"format": "pt"} | dict(provenance.metadata),
            overwrite=True,
        )
    for name, data in provenance.files.items():
        (folder / name).write_bytes(data)
    _copy_side_files(provenance, folder)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*(\d+)\s*([KMG]i?B)\s*", size, re.IGNORECASE)
    if found is None:
        raise ConfigError(
            f"save_pretrained: max_shard_size is {size!r}, expected bytes or text such as '5GB'. "
            "Correct the argument.",
            code="Q-CFG-VALUE",
            tensor="max_shard_size",
            actual=size,
        )
    return int(found[1]) * _UNITS[found[2].upper()]


def _copy_side_files(provenance: Provenance, folder: Path) -> None:
    if not provenance.folder.is_dir():
        log.warning(
            "%s: is gone; tokenizer and other files beside the weights were not saved",
            provenance.folder,
        )
        return
    containers = tuple(c for p in registry().plugins.values() for c in p.info.containers)
    for file in sorted(provenance.folder.iterdir()):
        weights = _WEIGHTS.search(file.name) or file.name.endswith(containers)
        wanted = file.is_file() and not weights and file.name[0] != "."
        written = file.name in provenance.files or file.name in provenance.dropped
        if not wanted or written or file.stat().st_size > _SIDE_BYTES:
            continue
        target = folder / file.name
        if not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)


# ------------------------------------------------------------------------------- stored tensors


def _stored_tensors(model: PreTrainedModel, p: Provenance) -> Iterator[tuple[str, Tensor]]:
    written = set()
    for name, tensor in _quantized(model, p):
        written.add(name)
        yield name, tensor
    for module in model.modules():
        if isinstance(module, QuantCache):
            for name, tensor in module.stored().items():
                written.add(name)
                yield name, tensor
    for public, slot in p.slots.items():
        name = p.dense[public]
        written.add(name)
        yield name, _float_tensor(model, slot, p.tensors[name])
    lost = [n for n in p.tensors if n not in written and n not in p.skipped]
    if lost:
        raise _changed(f"{summarize(lost)} cannot be rebuilt from the model")
    yield from _not_loaded(p, [n for n in p.tensors if n not in written])


def _changed(what: str) -> LayoutError:
    return LayoutError(
        f"save_pretrained: {what}; expected the layers that were loaded. "
        "The model was changed since; save its parts yourself, or use `quant convert`.",
        code="Q-SAVE-CHANGED",
        actual=what,
    )


def _quantized(model: PreTrainedModel, p: Provenance) -> Iterator[tuple[str, Tensor]]:
    found: set[str] = set()
    cut = {name: _cut_tensors(p, member) for name, member in p.members.items()}
    left = Counter(tensor for names in cut.values() for tensor in names)
    shared: dict[str, Tensor] = {}
    once = {name: True for m in p.members.values() for name in _common_tensors(m)}
    for module in model.modules():
        if isinstance(module, QuantModule) and module.owns_buffers:
            whole = module.restore()
            for bound in module.members:
                found.add(bound.name)
                for name, value in _member(p, p.members[bound.name], bound, whole, shared):
                    if once.get(name, True):
                        yield name, value
                    if name in once:
                        once[name] = False
                left.subtract(cut[bound.name])
                complete = [n for n in cut[bound.name] if not left[n] and n in shared]
                yield from ((n, shared.pop(n)) for n in complete)
    gone = [name for name in p.members if name not in found]
    if gone:
        raise _changed(f"no module holds {summarize(gone)} any more")


def _cut_tensors(p: Provenance, member: Member) -> list[str]:
    """Stored tensors of which experts, or several members, hold a part each."""
    names = {name for _, name, index, _ in member_parts(member) if index}
    return sorted(n for n in names if n in p.tensors)


def _common_tensors(member: Member) -> list[str]:
    """Stored tensors that other members read as well, whole: written by the first of them."""
    return [name for param, name, _, _ in member_parts(member) if param.shared]


def _member(
    p: Provenance,
    member: Member,
    bound: BoundMember,
    whole: LayerTensors,
    shared: dict[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors of one member; parts of shared ones are put together in ``shared``."""
    layer, scheme = member.layer, member.scheme
    assert isinstance(scheme, Scheme)
    count = len(layer.experts)
    for (_, part), expert in zip(matrices(whole, count), layer.experts or (None,), strict=True):
        one = layer
        if expert is not None:
            one = replace(layer, stored=layer.stored.format(expert=expert), experts=())
        values = ask_scheme(scheme, "serialize", one, _as_stored(part, bound))
        for param in ask_scheme(scheme, "params", layer):
            if param.name in values:
                sources = param_sources(layer, param, expert)
                yield from _split(p, values[param.name], sources, shared)


def _as_stored(lt: LayerTensors, bound: BoundMember) -> LayerTensors:
    """The member's rows, on the CPU, in the packing they were stored in."""
    if (bound.start, bound.stop) != (0, lt.weight.shape[0]):
        lt = slice_out(lt, bound.start, bound.stop)
    qt = lt.weight
    qt = qt.with_tensors({name: t.cpu() for name, t in qt.tensors().items()})
    if not qt.spec.blocks and qt.packing != bound.packing:
        n, k = qt.shape
        codes = repack(qt.codes, qt.spec.element.bits, (n, k), qt.packing, bound.packing)
        qt = replace(qt, codes=codes, packing=bound.packing)
    return replace(
        lt,
        operands={**lt.operands, "weight": qt},
        bias=_cpu(lt.bias),
        acc_bias=_cpu(lt.acc_bias),
        out_scale=_cpu(lt.out_scale),
        input_scale=_cpu(lt.input_scale),
        input_zero=_cpu(lt.input_zero),
        transforms=tuple((t, tuple(v.cpu() for v in values)) for t, values in lt.transforms),
    )


def _cpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cpu()


def _split(
    p: Provenance, value: Tensor, sources: Any, shared: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """One param to the stored tensors, or parts of them, that it came from."""
    row = 0
    for name, index in sources:
        info = p.tensors[name]
        if not index:
            part = value if len(sources) == 1 else value[row : row + info.shape[0]]
            row += info.shape[0] if info.shape else 0
            yield name, part
            continue
        if name not in shared:
            shared[name] = torch.empty(info.shape, dtype=value.dtype)
        cut = tuple(slice(*i) if isinstance(i, tuple) else i for i in index)
        target = shared[name][cut]
        target.copy_(value if len(sources) == 1 else value[row : row + target.shape[0]])
        row += target.shape[0] if target.dim() else 0


def _float_tensor(model: PreTrainedModel, slot: Slot, info: TensorInfo) -> Tensor:
    module, _, leaf = slot.target.rpartition(".")
    try:
        whole = getattr(model.get_submodule(module), leaf)
        value = whole.detach()[slot.index]
    except (AttributeError, IndexError) as err:
        raise _changed(f"parameter {slot.target!r} is gone") from err
    if tuple(value.shape) != info.shape:
        raise _changed(f"{slot.target!r} has shape {tuple(value.shape)}, stored {info.shape}")
    stored: torch.dtype = getattr(torch, info.dtype)
    value = value.cpu()
    back = value.to(stored)
    same = back.to(value.dtype)
    exact = bool(((same == value) | ((same != same) & (value != value))).all())
    return back if exact else value


def _not_loaded(p: Provenance, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a rule kept from being loaded, from the source if it is still the same."""
    if not names:
        return
    try:
        source = open_checkpoint(p.path)
    except QuantError as err:
        log.warning("%d tensor(s) not saved, %s: %s", len(names), printable(err), summarize(names))
        return
    with source:
        for name in names:
            if source.tensors.get(name) == p.tensors[name]:
                yield name, source.read(name)
            else:
                log.warning("%s: changed in %s since loading, not saved", printable(name), p.path)
