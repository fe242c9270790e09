"""Every stored tensor is accounted for: loaded, skipped by a named rule, or an error.

The ledger knows the parts of each stored tensor: the whole, or the cuts that are read, an expert or
its even rows. A part is claimed while planning and ticked off while loading.
Header checks report all problems of one kind at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from quant_core.checkpoint.base import Checkpoint, Index
from quant_core.errors import CheckpointError, printable, summarize

__all__ = ["Ledger", "missing_error", "unexpected_error"]

Part = tuple[str, Index]
"""(stored name, the cut that is meant; () = the whole tensor)."""


def missing_error(checkpoint: Checkpoint, names: Iterable[str], needed_by: str) -> CheckpointError:
    names = list(names)
    return CheckpointError(
        f"{checkpoint.path}: {len(names)} tensor(s) missing: {summarize(names)}; expected by "
        f"{needed_by}. The checkpoint is incomplete; download or export it again.",
        code="Q-TENSOR-MISSING",
        path=checkpoint.path,
        tensor=names[0],
        expected=names,
        actual=None,
    )


def unexpected_error(checkpoint: Checkpoint, names: Iterable[str], why: str) -> CheckpointError:
    names = list(names)
    return CheckpointError(
        f"{checkpoint.path}: {len(names)} unexpected tensor(s): {summarize(names)}; expected "
        f"{why}. A tensor was renamed or added, or the config describes another model.",
        code="Q-TENSOR-UNEXPECTED",
        path=checkpoint.path,
        tensor=names[0],
        expected=why,
        actual=names,
    )


@dataclass(slots=True)
class Ledger:
    """Who claims which part, and what was loaded."""

    checkpoint: Checkpoint
    claims: dict[Part, str] = field(default_factory=dict)
    loaded: set[Part] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)  # stored name -> rule
    _claimed_names: set[str] = field(default_factory=set)
    _shared: set[Part] = field(default_factory=set)

    def claim(self, part: Part, by: str, *, shared: bool = False) -> None:
        """Reserve a part for one reader, or for all that say they share it.

        Raises:
            CheckpointError: ``Q-TENSOR-DUPLICATE`` if another reader has it.
        """
        if part in self.claims and not (shared and part in self._shared):
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {printable(part[0])!r} is claimed by "
                f"{self.claims[part]!r} and {by!r}, expected one owner. "
                "The same parameter is stored twice, or a plugin claims too much.",
                code="Q-TENSOR-DUPLICATE",
                path=self.checkpoint.path,
                tensor=part[0],
                expected=self.claims[part],
                actual=by,
            )
        self.claims.setdefault(part, by)
        if shared:
            self._shared.add(part)
        self._claimed_names.add(part[0])

    def release(self, name: str) -> None:
        """Forget who claims a tensor as a whole, so that its parts can be claimed."""
        self.claims.pop((name, ()), None)

    def skip(self, name: str, rule: str) -> None:
        """Account for a tensor that is rightly not loaded."""
        self.skipped[name] = rule

    def load(self, part: Part) -> None:
        self.loaded.add(part)

    def is_claimed(self, name: str) -> bool:
        return name in self._claimed_names

    def unclaimed(self) -> list[str]:
        """Stored tensors that nobody claims and no rule skips."""
        return [
            n
            for n in self.checkpoint.tensors
            if n not in self._claimed_names and n not in self.skipped
        ]

    def check_loaded(self) -> None:
        """After loading: every claimed part was loaded, or its tensor skipped by a rule.

        Raises:
            CheckpointError: ``Q-TENSOR-UNREAD`` naming the parts.
        """
        left = [
            f"{name}[{', '.join(map(str, index))}]" if index else name
            for name, index in self.claims
            if (name, index) not in self.loaded and name not in self.skipped
        ]
        if left:
            raise CheckpointError(
                f"{self.checkpoint.path}: {len(left)} tensor(s) were planned but never loaded: "
                f"{summarize(left)}; expected every stored tensor to be used or skipped by a named "
                "rule. The engine's model does not match the checkpoint.",
                code="Q-TENSOR-UNREAD",
                path=self.checkpoint.path,
                tensor=left[0],
                actual=left,
            )
