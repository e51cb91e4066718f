"""Figures as text: rates with their intervals, and aligned columns.

    print(table(("", "value", "n"), [("accuracy", show(rate(97, 100)), 100)]))

Leaves out HTML and Markdown (report/escaping.py).
"""

from collections.abc import Iterable, Mapping, Sequence


def show(measured: Mapping | None) -> str:
    """`97.2 % (95.1–98.4)`, without the interval where there is none, or `–` where nothing was measured."""
    return _show(measured, ".1f", scale=100, unit=" %")


def show_rates(summary: Mapping) -> dict:
    """The summary of a command, with its rates as `show` writes them."""
    is_rate = {name: isinstance(value, Mapping) and "low" in value for name, value in summary.items()}
    return {name: show(value) if is_rate[name] else value for name, value in summary.items()}


def show_number(measured: Mapping | float | None, spec: str = ".3f") -> str:
    """`0.352 (0.301–0.403)` of what is not a share, without the interval where there is none; `–` for nothing."""
    return format(measured, spec) if isinstance(measured, int | float) else _show(measured, spec)


def _show(measured: Mapping | None, spec: str, scale: float = 1, unit: str = "") -> str:
    if not measured or measured["value"] is None:
        return "–"
    value, low, high = (
        None if measured[key] is None else format(scale * measured[key], spec) for key in ("value", "low", "high")
    )
    if low is None or high is None:
        return f"{value}{unit}"
    dash = " to " if low.startswith("-") else "–"  # a dash beside a minus sign looks like another one
    return f"{value}{unit} ({low}{dash}{high})"


def show_points(difference: float | None, low: float | None, high: float | None) -> str:
    """`+2.0 (-1.0 to +5.0)`: a difference of shares and its interval, in points; `–` for what was not measured."""
    value, low_, high_ = ("–" if part is None else f"{100 * part:+.1f}" for part in (difference, low, high))
    return f"{value} ({low_} to {high_})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of aligned columns, two spaces apart: the first to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def align(line: list[str]) -> str:
        first, *others = line
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join(align(line) for line in lines)
