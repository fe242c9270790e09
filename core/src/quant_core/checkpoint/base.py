"""A checkpoint: what is stored, from the header alone, and how to read any of it.

A container plugin returns a subclass from ``open_checkpoint``. Opening reads headers only and
imports no torch; ``read`` is where bytes become tensors, always memory of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.errors import ConfigError, LimitError, printable
from quant_core.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "Index", "no_config"]

_SMALL_BYTES = 1 << 16

Index = tuple[int | tuple[int, int] | tuple[int, int, int], ...]


class Checkpoint(ABC):
    """An opened checkpoint.

    Attributes:
        path: the folder, or the single file, that was opened.
        folder: the folder that holds it.
        container: "safetensors", or the container plugin's id.
        tensors: stored name -> ``TensorInfo``, in file order.
        config: the model's ``config.json``, read-only; empty when there is none.
        metadata: free-form key/values of the container.
        warnings: what was odd but harmless, one sentence each.
    """

    path: Path
    folder: Path
    container: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    warnings: list[str]

    @abstractmethod
    def read(self, name: str, index: Index = ()) -> Tensor:
        """The stored tensor ``name``, or the part of it that ``index`` selects.

        Reads only the bytes needed when ``index`` cuts leading axes. The tensor owns its memory.
        Containers of blocks return uint8 [..., bytes per row].

        Raises:
            CheckpointError: ``Q-CKPT-CHANGED`` if the file shrank since it was opened,
                ``Q-CKPT-IO`` with the OS reason otherwise.
        """

    def mapped(self, name: str) -> Tensor | None:
        """All of a stored tensor as ``read`` gives it, but as pages of its file; None: read it.

        See ``checkpoint.mapped`` for what happens to such a tensor when the file changes.

        Raises:
            CheckpointError: as ``read``.
        """
        return None

    def mapped_parameter(self, stored: str) -> Tensor | None:
        """What ``read_parameter`` gives, where that is the stored tensor itself; None: read it."""
        return None

    def read_bytes(self, name: str) -> bytes:
        """The raw bytes of a small tensor that describes others: sizes, a text.

        For planning, so at most 64 KiB; the safetensors reader imports no torch for it.

        Raises:
            LimitError: ``Q-LIMIT-COUNT`` for a larger tensor.
            CheckpointError: as ``read``.
        """
        import torch

        self._check_small(name)
        return bytes(self.read(name).contiguous().flatten().view(torch.uint8).tolist())

    @cached_property
    def described_by(self) -> set[str]:
        """Tensors that planning read, by ``read_bytes``: a plan holds for no other values."""
        return set()

    def _check_small(self, name: str) -> None:
        self.described_by.add(name)
        info = self.tensors.get(name)
        if info is not None and info.nbytes > _SMALL_BYTES:
            raise LimitError(
                f"{printable(info.file)}: tensor {printable(name)!r} has {info.nbytes} bytes, "
                f"expected at most {_SMALL_BYTES}: it describes other tensors. "
                "Export the checkpoint again.",
                code="Q-LIMIT-COUNT",
                path=info.file,
                tensor=name,
                expected=_SMALL_BYTES,
                actual=info.nbytes,
            )

    def side_file(self, name: str) -> Mapping[str, Any] | None:
        """A JSON file beside the weights, parsed strictly and read-only; None if absent.

        Raises:
            ConfigError: malformed JSON, duplicate keys, NaN, or not an object.
        """
        from quant_core.checkpoint.json import read_json_object

        file = self.folder / name
        return read_json_object(file) if file.is_file() else None

    def public_name(self, stored: str) -> str:
        """Name of a stored tensor in the model's own (Hugging Face) naming. Default: the same."""
        return stored

    def read_parameter(self, stored: str) -> Tensor:
        """A float tensor as the model wants it: layout edits of the container's writer undone.

        The default is ``read``. A container whose writer permutes rows or shifts norms undoes
        that here.
        """
        return self.read(stored)

    @property
    def ignored(self) -> Mapping[str, str]:
        """Stored tensors that are rightly not loaded: stored name -> the named rule."""
        return {}

    def pretrained_args(self) -> Mapping[str, str]:
        """Keyword arguments with which transformers finds config and tokenizer.

        Always holds ``pretrained_model_name_or_path``.
        """
        return {"pretrained_model_name_or_path": str(self.folder)}

    @contextmanager
    def config_args(self) -> Iterator[Mapping[str, str]]:
        """``pretrained_args`` for the config alone; what they name may go when the context ends.

        A container whose metadata hold far more than a config needs can give a smaller file.
        """
        yield self.pretrained_args()

    def config_overrides(self) -> Mapping[str, Any]:
        """Settings of the model's config that this container states and transformers overlooks.

        Used where the config is made from ``config_args`` and not read from a config.json.
        """
        return {}

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, TensorInfo]]:
        """Stored module path -> {rest of the name: TensorInfo}, in file order.

        The rest is the last component, and more where a name continues that of another tensor:
        ``weight`` and ``weight.absmax`` are two tensors of one module.
        """
        out: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            module, _, leaf = name.rpartition(".")
            parent = module.rpartition(".")[0]
            owner = next((p for p in (module, parent) if p in self.tensors), None)
            if owner is not None:
                module = owner.rpartition(".")[0]
                leaf = name[len(module) + 1 :] if module else name
            out.setdefault(module, {})[leaf] = info
        return out

    def close(self) -> None:  # noqa: B027 - a container without handles has nothing to do
        """Release file handles. Reading after this raises."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def no_config(checkpoint: Checkpoint, why: str) -> ConfigError:
    """``Q-CFG-MISSING``: nothing beside the weights, or in them, says which model they are."""
    return ConfigError(
        f"{printable(checkpoint.folder)}: {why}, expected the model's config. "
        "Put the model's config.json beside the weights.",
        code="Q-CFG-MISSING",
        path=checkpoint.folder,
        tensor="config.json",
    )
