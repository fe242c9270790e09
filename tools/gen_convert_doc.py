"""Write the table of conversions in docs/convert.md (``--check``: compare only).

The data are those of the test that holds them: tests/convert_cells.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "convert.md"
BEGIN, END = "<!-- table: begin, by tools/gen_convert_doc.py -->", "<!-- table: end -->"
SHORT = {"compressed_tensors": "CT", "modelslim_npu": "modelslim", "bitsandbytes": "bnb"}


def render() -> str:
    """The table and what its cells mean."""
    sys.path.insert(0, str(ROOT / "tests"))
    from convert_cells import CELLS, OPTIONS, TARGETS, rows

    names = [SHORT.get(t, t) for t in TARGETS]
    lines = [f"| from | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row.text} | {' | '.join(row.cells[t] for t in TARGETS)} |" for row in rows()]
    texts = {row.source: row.text for row in rows()}
    lines += ["", "| from | to | with | cell |", "|---|---|---|---|"]
    for source, to, options, key in OPTIONS:
        words = ", ".join(f"`{name}={value}`" for name, value in options.items())
        lines.append(f"| {texts[source]} | {SHORT.get(to, to)} | {words} | {key} |")
    lines += ["", "| cell | what becomes of it |", "|---|---|"]
    lines += [f"| {key} | {cell.text} |" for key, cell in CELLS.items()]
    return "\n".join(lines)


def main() -> int:
    text = TARGET.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if "--check" in sys.argv:
        if new != text:
            print("docs/convert.md is not current; run tools/gen_convert_doc.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
