"""Which members a header holds: stored modules, or what is in them; experts stacked.

model.layers.0.mlp.experts.0.up_proj ... .7.up_proj   ->  one stack of eight
one tensor of three dimensions under ".experts."       ->  one stack
a module that its format splits (hook split_modules)   ->  the members that it names
any other module                                       ->  one member
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quant_core.checkpoint.base import Checkpoint
from quant_core.errors import CheckpointError, printable
from quant_core.ledger import missing_error
from quant_core.spec import LayerDesc, TensorInfo

__all__ = ["Stored", "describe", "stored_members", "stored_twice", "tensor_names"]

_EXPERT_NUMBER = re.compile(r"^(.*\bexperts)\.(\d{1,9})\.(.+)$")
_SHOWN_GAPS = 1000  # experts named as missing, at most
_EMBEDDING_NAMES = frozenset({"embed_tokens", "wte", "tok_embeddings", "word_embeddings"})


@dataclass(slots=True)
class Stored:
    """Stored module paths that form one member."""

    name: str
    stored: str
    leaves: Mapping[str, TensorInfo]
    experts: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    layer: LayerDesc | None = None  # where the owner of the format says what the member is


def _public_module(checkpoint: Checkpoint, path: str, leaves: Mapping[str, TensorInfo]) -> str:
    leaf, first = next(iter(leaves.items()))
    return checkpoint.public_name(first.name).rsplit(".", leaf.count(".") + 1)[0]


def stored_members(
    checkpoint: Checkpoint, split: Mapping[str, Sequence[LayerDesc]]
) -> Iterator[Stored]:
    """Modules of the header, or the members in them; experts of one name become one stack.

    Raises:
        CheckpointError: ``Q-CKPT-NAME`` for a name that reads as a stack's template,
            ``Q-TENSOR-MISSING`` for experts that are not there, ``Q-TENSOR-DUPLICATE``.
    """
    stacks: dict[tuple[str, str], dict[int, str]] = {}
    for path, leaves in checkpoint.modules.items():
        if "{" in path or "}" in path:
            raise CheckpointError(
                f"{checkpoint.path}: tensor name {printable(path)!r} holds a brace, expected a "
                "module's name. The file is damaged; get it again.",
                code="Q-CKPT-NAME",
                path=checkpoint.path,
                tensor=path,
            )
        if path in split:
            for layer in split[path]:
                yield Stored(layer.name, layer.stored, leaves, layer.experts, (path,), layer)
            continue
        name = _public_module(checkpoint, path, leaves)
        numbered = _EXPERT_NUMBER.match(name)
        in_stored = _EXPERT_NUMBER.match(path)
        if numbered and in_stored:
            member = f"{numbered[1]}.{numbered[3]}"
            template = f"{in_stored[1]}.{{expert}}.{in_stored[3]}"
            stack, expert = stacks.setdefault((member, template), {}), int(numbered[2])
            if expert in stack:  # 3 and 03
                raise stored_twice(checkpoint, name, stack[expert], path)
            stack[expert] = path
            continue
        stacked = next((t.shape[0] for t in leaves.values() if len(t.shape) == 3), 0)
        experts = tuple(range(stacked)) if stacked and ".experts." in f"{name}." else ()
        yield Stored(name, path, leaves, experts, (path,))
    for (member, template), paths in stacks.items():
        ids = tuple(sorted(paths))
        first = range(min(ids[-1] + 1, len(ids) + _SHOWN_GAPS))  # a number may be absurd
        if gaps := [e for e in first if e not in paths]:
            raise missing_error(
                checkpoint,
                [template.format(expert=e) + ".*" for e in gaps],
                f"{member} (experts 0..{ids[-1]})",
            )
        leaves = checkpoint.modules[paths[0]]
        ordered = tuple(paths[e] for e in ids)
        yield Stored(member, template, leaves, ids, ordered)


def describe(s: Stored) -> LayerDesc:
    """What a plugin is asked about it; sizes come from the scheme."""
    if s.layer is not None:
        return s.layer
    last = s.name.rpartition(".")[2]
    kind = "experts" if s.experts else "embedding" if last in _EMBEDDING_NAMES else "linear"
    return LayerDesc(kind=kind, name=s.name, stored=s.stored, experts=s.experts)  # type: ignore[arg-type]


def tensor_names(checkpoint: Checkpoint, stored: Stored) -> list[str]:
    """All tensors of a member."""
    paths = stored.paths or (stored.stored,)
    return [info.name for path in paths for info in checkpoint.modules[path].values()]


def stored_twice(checkpoint: Checkpoint, name: str, first: str, second: str) -> CheckpointError:
    """``Q-TENSOR-DUPLICATE`` for a member or parameter under two stored names."""
    return CheckpointError(
        f"{checkpoint.path}: {printable(name)!r} is stored twice, as {printable(first)!r} and "
        f"{printable(second)!r}; expected once. Remove one of them.",
        code="Q-TENSOR-DUPLICATE",
        path=checkpoint.path,
        tensor=name,
        expected=first,
        actual=second,
    )
