"""What a target format answers when asked to hold a matrix: a scheme, tensors, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quant_core.errors import ConfigError, LayoutError, printable

if TYPE_CHECKING:
    from quant_core.scheme import Scheme
    from quant_core.tensors import LayerTensors

__all__ = ["Allowed", "Fit", "Losses", "cannot_hold", "check_options"]

Allowed = tuple[Any, ...] | type[int]
"""Values of an option: these, every positive integer (``int``), or all ()."""


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
        hint: how less would be lost; "" = not known, or nothing is.
    """

    scheme: Scheme | None
    tensors: LayerTensors
    losses: tuple[str, ...] = ()
    hint: str = ""


@dataclass(slots=True)
class Losses:
    """What one matrix would lose. Collected first, so that a refusal names all of it."""

    where: str
    allowed: bool = False
    instead: str = ""  # how to lose less, for the message of a refusal and ``Fit.hint``
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
                f"Allow inexact conversion (--allow-inexact) to accept: {'; '.join(self._items)}."
                f"{' ' if self.instead else ''}{self.instead}",
            )
        return tuple(self._items)


def check_options(options: Mapping[str, Any], known: Mapping[str, Allowed], plugin: str) -> None:
    """Refuse option names and values that a format does not have.

    Args:
        known: option -> allowed values; ``int`` allows every positive integer, () every value.

    Raises:
        ConfigError: ``Q-CFG-VALUE``.
    """
    for key, value in options.items():
        allowed = known.get(key)
        if allowed is None:
            what, expected = f"option {printable(key)!r}", f"one of {sorted(known) or 'none'}"
        elif allowed is int:
            if type(value) is int and value > 0:
                continue
            what, expected = f"option {key!r}: {printable(value)!r}", "a positive integer"
        elif not allowed or value in allowed:  # type: ignore[operator]
            continue
        else:
            what, expected = f"option {key!r}: {printable(value)!r}", f"one of {allowed}"
        raise ConfigError(
            f"convert to {plugin!r}: {what}, expected {expected}. Correct or drop the option.",
            code="Q-CFG-VALUE",
            tensor=key,
            expected=sorted(known) if allowed is None else allowed,
            actual=value,
            plugin=plugin,
        )
