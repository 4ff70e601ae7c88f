"""Tables of text, with columns of a fixed width."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text(rows: Sequence[Sequence[object]], *, right: Collection[int] = (), rule_after: int | None = None) -> str:
    """Rows of cells as lines of text.

    Args:
      rows: the cells of each row, as many in each; the first rows may be headings.
      right: the columns whose cells stand at the right, such as numbers.
      rule_after: the number of rows before a line of dashes; no line if not given.
    """
    lines = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if rule_after is not None:
        lines.insert(rule_after, ["-" * width for width in widths])
    padded = (
        [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
