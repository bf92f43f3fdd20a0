"""Tables for a terminal."""

from collections.abc import Sequence

from tghmoe_jax.terminal import one_line


def number(value: float | None, missing: str = "-") -> str:
    return missing if value is None else f"{value:.3f}"


def interval(pair: Sequence[float] | None, sign: str = "") -> str:
    """`[low, high]`, or nothing without a pair; `sign` is '+' for differences."""
    return "" if pair is None else f"[{pair[0]:{sign}.3f}, {pair[1]:{sign}.3f}]"


def table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """The lines of a table; the columns `left` are left-aligned, the others right-aligned. A cell stays on its line."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
