"""The fields of a GPTQ config: widths that exist in two layouts are told apart here."""

from __future__ import annotations

from dataclasses import dataclass

from quant_core.fields import Fields

__all__ = ["ALL_BITS", "COMMON_BITS", "Reader"]

COMMON_BITS = (2, 3, 4, 8)
ALL_BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Reader(Fields):
    """Typed access to one JSON object, with errors that name file and key."""

    plugin: str | None = "gptq"

    def bits(self, allowed: tuple[int, ...]) -> int | None:
        value = self.raw.get("bits")
        if "bits" not in self.raw:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
            fix = "Correct it to the width the tensors were packed with."
            if value in ALL_BITS and not isinstance(value, bool):
                fix = (
                    "These widths exist in two layouts; they are read with "
                    "checkpoint_format 'gptq_p' or provider 'auto-round' only."
                )
            raise self.fail("bits", f"one of {allowed}", fix)
        return value
