"""What a target format answers when asked to hold a matrix: a scheme, tensors, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quant_core.errors import ConfigError, LayoutError, printable

if TYPE_CHECKING:
    from quant_core.scheme import Scheme
    from quant_core.tensors import LayerTensors

__all__ = ["Fit", "Losses", "cannot_hold", "check_options"]


def cannot_hold(where: str, found: str, expected: str, fix: str) -> LayoutError:
    """``Q-LAYOUT-REPRESENT``: what the matrix has, what the target holds, what can be done."""
    return LayoutError(
        f"{where}: {found}, expected {expected}. {fix}",
        code="Q-LAYOUT-REPRESENT",
        tensor=where,
        expected=expected,
        actual=found,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How one matrix is written in the target format.

    Attributes:
        scheme: the target's; None to write the weight as floats.
        tensors: what ``scheme.serialize`` is given.
        losses: what is not kept, one phrase each; () = the weights are equal bit by bit.
    """

    scheme: Scheme | None
    tensors: LayerTensors
    losses: tuple[str, ...] = ()


@dataclass(slots=True)
class Losses:
    """What one matrix would lose. Collected first, so that a refusal names all of it."""

    where: str
    allowed: bool = False
    _items: dict[str, tuple[str, str]] = field(default_factory=dict)

    def lose(self, found: str, expected: str, loss: str) -> None:
        """Record a loss.

        Args:
            found: what the matrix has that the target cannot hold.
            expected: what the target holds.
            loss: what is given up, as shown to the user.
        """
        self._items.setdefault(loss, (found, expected))

    def taken(self) -> tuple[str, ...]:
        """The losses, for ``Fit.losses``.

        Raises:
            LayoutError: ``Q-LAYOUT-REPRESENT`` if there are any and none is allowed.
        """
        if self._items and not self.allowed:
            pairs = self._items.values()
            raise cannot_hold(
                self.where,
                "; ".join(found for found, _ in pairs),
                " and ".join(expected for _, expected in pairs),
                f"Allow inexact conversion (--allow-inexact) to accept: {'; '.join(self._items)}.",
            )
        return tuple(self._items)


def check_options(
    options: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], plugin: str
) -> None:
    """Refuse option names and values that a format does not have.

    Args:
        known: option -> allowed values; () allows every value.

    Raises:
        ConfigError: ``Q-CFG-VALUE``.
    """
    for key, value in options.items():
        allowed = known.get(key)
        if allowed is None or (allowed and value not in allowed):
            expected = f"one of {sorted(known)}" if allowed is None else f"one of {allowed}"
            what = "option" if allowed is None else f"option {key!r}:"
            shown = printable(key if allowed is None else value)
            raise ConfigError(
                f"convert to {plugin!r}: {what} {shown!r}, expected {expected}. "
                "Correct or drop the option.",
                code="Q-CFG-VALUE",
                tensor=key,
                expected=sorted(known) if allowed is None else allowed,
                actual=value,
                plugin=plugin,
            )
