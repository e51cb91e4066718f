"""Figures as text: rates with their intervals, and aligned columns.

    print(table(("", "value", "n"), [("accuracy", show(rate(97, 100)), 100)]))

Leaves out HTML and Markdown (report/escaping.py).
"""

from collections.abc import Iterable, Mapping, Sequence


def show(measured: Mapping | None) -> str:
    """`97.2 % (95.1–98.4)`, without the interval where there is none, or `–` where nothing was measured."""
    if not measured or measured["value"] is None:
        return "–"
    if measured["low"] is None:
        return f"{100 * measured['value']:.1f} %"
    value, low, high = (100 * measured[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f}–{high:.1f})"


def show_number(measured: Mapping | float | None) -> str:
    """`0.352 (0.301–0.403)` of what is not a share, without the interval where there is none; `–` for nothing."""
    if isinstance(measured, int | float):
        return f"{measured:.3f}"
    if not measured or measured["value"] is None:
        return "–"
    value, low, high = (measured[key] for key in ("value", "low", "high"))
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f}{between(low)}{high:.3f})"


def between(low: float) -> str:
    """What separates the ends of an interval: a word beside a minus sign, because a dash looks like one."""
    return "–" if low >= 0 else " to "


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of aligned columns, two spaces apart: the first to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def align(line: list[str]) -> str:
        first, *others = line
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join(align(line) for line in lines)
