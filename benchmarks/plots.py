"""Bar charts as SVG text, for the pages of docs/; no plotting package needed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["bar_chart"]

_WIDTH, _ROW, _LABEL, _ROOM = 760, 26, 300, 70  # pixels; _ROOM for the number behind a bar


def bar_chart(title: str, bars: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars from zero with their values.

    Args:
        bars: (label, value >= 0), from top to bottom; at least one.
    """
    most = max(value for _, value in bars) or 1.0
    height = _ROW * (len(bars) + 2)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    for i, (label, value) in enumerate(bars):
        top, length = _ROW * (i + 1) + 8, (_WIDTH - _LABEL - _ROOM) * value / most
        color = "#2b6cb0" if label.startswith("ours") else "#a0aec0"
        out += [
            f'<text x="{_LABEL - 8}" y="{top + 14}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{_LABEL}" y="{top}" width="{length:.1f}" height="18" fill="{color}"/>',
            f'<text x="{_LABEL + length + 6:.1f}" y="{top + 14}">{value:g}</text>',
        ]
    return "\n".join([*out, "</svg>", ""])
