"""Pictures of measurements, drawn by matplotlib: SVG for pages and files, PNG for files.

    picture = drawing.lines("scores", "Scores of revisions", rows, x="revisions", y="reward model score")
    picture.save("runs/tiny/figures")

The rows to draw are {series, x, value, low, high}, in the units of the axes; an end of an interval that is missing or
None is not drawn. Pictures are small enough to be read on a phone. Leaves out everything interactive: no window is
opened.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import fill

from cai.stats import tables

INK, PAPER = "#1b1f24", "#ffffff"

COLOURS = ("#8a6d3b", "#2f7fd1", "#c2410c", "#2e9e6b", "#8b5cf6", "#d1495b")

WIDTH = 4.7  # inches: text of 10 points is still 10 pixels high on a screen of 390

# Names come from files: no formulas in them. Text stays text in SVG: smaller, and in the reader's font.
_STYLE = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.titlesize": 10,
}

# Fields of a reinforcement learning run's metrics.jsonl, and the titles of their panels.
_UPDATES = {
    "score": "score",
    "kl": "KL, nats per response",
    "entropy": "entropy, nats per token",
    "response_length": "tokens per response",
    "eos_rate": "share that ended",
    "duplicates": "share of duplicates",
    "boilerplate": "growth of one phrase",
    "clip_fraction": "share of ratios clipped",
    "explained_variance": "explained variance",
}


@dataclass(frozen=True)
class Picture:
    """`svg`: an SVG document; `png`: bytes; `says`: what the picture shows, in words."""

    name: str
    title: str
    says: str
    svg: str
    png: bytes

    def save_png(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(self.png)

    def save(self, folder: str | Path, stem: str | None = None) -> None:
        """Write <stem>.svg and <stem>.png into the folder; the stem is by default the picture's name."""
        self.save_png(Path(folder, f"{stem or self.name}.png"))
        Path(folder, f"{stem or self.name}.svg").write_text(self.svg, encoding="utf-8")

    @property
    def inline(self) -> str:
        """The <svg> element for a page: drawn in the page's text colour, without a background, and hidden from screen
        readers (the page has the words). Its ids begin with its name, because one page has several pictures."""
        svg = self.svg[self.svg.index("<svg") :].replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")
        svg = re.sub(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)', f"{self.name}-", svg)
        for size in ("width", "height"):
            svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
        return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (more is better in both) no other point beats: at least as good in both, better in one."""
    return [i for i, (x, y) in enumerate(points) if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)]


@contextmanager
def _canvas(height: float, width: float = WIDTH, rows: int = 1, columns: int = 1, lines: str = "both", **grid):
    """(matplotlib's figure, its axes of shape (rows, columns)), in the style of all pictures; lines: of the grid."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": lines}):
        canvas = Figure(figsize=(width, height), layout="constrained")
        yield canvas, canvas.subplots(rows, columns, squeeze=False, **grid)


def _finish(canvas, name: str, title: str, says: str) -> Picture:
    svg, png = io.StringIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    canvas.savefig(png, format="png", dpi=150, metadata={"Software": None})
    return Picture(name, title, says, svg.getvalue(), png.getvalue())


def _by_series(rows: Iterable[Mapping]) -> dict[str, list[Mapping]]:
    series: dict[str, list[Mapping]] = {}
    for row in rows:
        series.setdefault(row["series"], []).append(row)
    return series


def _arms(rows: Sequence[Mapping], centre: str, ends: tuple[str, str]) -> list[list[float]]:
    """Lengths of error bars, (2, rows): never below 0, as a bound may lie 1e-17 on the wrong side of its value."""
    return [
        [0.0 if row.get(end) is None else max(0.0, sign * (row[end] - row[centre])) for row in rows]
        for end, sign in zip(ends, (-1, 1), strict=True)
    ]


def _plot(canvas, axes, rows: Iterable[Mapping], **style) -> None:
    """Draw each series in a colour of its own, with its intervals on both axes, and name it in the legend."""
    from matplotlib.lines import Line2D

    series, dots = _by_series(rows), []
    for points, colour in zip(series.values(), cycle(COLOURS), strict=False):
        axes.errorbar(
            [row["x"] for row in points],
            [row["value"] for row in points],
            xerr=_arms(points, "x", ("x_low", "x_high")),
            yerr=_arms(points, "value", ("low", "high")),
            color=colour,
            **{"marker": "o", "markersize": 4, "linewidth": 1.5, **style},
        )
        dots.append(Line2D([], [], marker="o", linestyle="", color=colour))
    columns = 64 // (max(map(len, series), default=0) + 7)
    canvas.legend(dots, list(series), loc="outside upper center", ncols=max(1, min(len(series), columns)))


def ranges(name: str, title: str, rows: Sequence[Mapping], *, x: str, says: str) -> Picture:
    """Percentages with their intervals as dots, one line per `label` of the rows, one colour per series."""
    labels, series = (list(dict.fromkeys(row[field] for row in rows)) for field in ("label", "series"))
    dots = [
        {
            "series": row["series"],
            "x": row["value"],
            "x_low": row["low"],
            "x_high": row["high"],
            "value": labels.index(row["label"]) + 0.5 * ((series.index(row["series"]) + 0.5) / len(series) - 0.5),
        }
        for row in rows
    ]
    with _canvas(0.9 + 0.36 * len(labels), lines="x") as (canvas, ((axes,),)):
        _plot(canvas, axes, dots, linestyle="", elinewidth=1.5)
        axes.set(
            xlim=(-3, 103), xlabel=x, yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6)
        )
        return _finish(canvas, name, title, says)


def plane(name: str, title: str, rows: Sequence[Mapping], *, x: str, y: str, says: str, **limits) -> Picture:
    """One point per row, with intervals on both axes (`x_low`, `x_high`); the Pareto front is joined by a line.

    limits: `xlim` and `ylim`, where matplotlib should not choose them.
    """
    points = [(row["x"], row["value"]) for row in rows]
    front = pareto(points)
    with _canvas(3.7) as (canvas, ((axes,),)):
        _plot(canvas, axes, rows, linestyle="", markersize=6, elinewidth=1.2)
        axes.plot(
            *zip(*sorted(points[i] for i in front), strict=True),
            linestyle="--",
            linewidth=1,
            color=INK,
            alpha=0.5,
            zorder=0,
        )
        axes.set(xlabel=x, ylabel=y, **limits)
        axes.locator_params(axis="x", nbins=6, integer=True)
        names = ", ".join(rows[i]["series"] for i in front)
        return _finish(canvas, name, title, f"{says}. On the front (nothing is better in both): {names}.")


def lines(
    name: str, title: str, rows: Sequence[Mapping], *, x: str, y: str, says: str | None = None, limits=None
) -> Picture:
    """One line with intervals per series; a row's `label`, if it has one, replaces the number on the x axis.

    limits: (low, high) of the y axis, where it is a scale with ends.
    """
    positions = sorted({row["x"] for row in rows})
    labels = {row["x"]: fill(row["label"], 10) for row in rows if row.get("label")}
    with _canvas(3.4, lines="y") as (canvas, ((axes,),)):
        _plot(canvas, axes, sorted(rows, key=lambda row: row["x"]))
        axes.set_xticks(positions, [labels.get(position, f"{position:g}") for position in positions])
        axes.margins(x=0.08)
        axes.set(xlabel=x, ylabel=y)
        if limits:
            margin = 0.03 * (limits[1] - limits[0])
            axes.set_ylim(limits[0] - margin, limits[1] + margin)
            axes.locator_params(axis="y", integer=True)
        return _finish(canvas, name, title, says or _words(rows))


def _words(rows: Iterable[Mapping]) -> str:
    points = ((row["series"], row.get("label") or format(row["x"], ".3g"), tables.show_number(row)) for row in rows)
    return f"{'; '.join(f'{series}, {label}: {number}' for series, label, number in points)}."


def histogram(name: str, title: str, values: Sequence[float], edges: Sequence[float], *, x: str, y: str) -> Picture:
    """How many values lie between each two edges."""
    with _canvas(2.6, lines="y") as (canvas, ((axes,),)):
        counts, *_ = axes.hist(values, bins=edges, color=COLOURS[1], edgecolor=PAPER)
        axes.set(xlabel=x, ylabel=y, xlim=(edges[0], edges[-1]))
        bars = (f"{low:.2f} to {high:.2f}: {n:.0f}" for low, high, n in zip(edges, edges[1:], counts, strict=False))
        return _finish(canvas, name, title, f"{y.capitalize()} by {x}: {', '.join(bars)}.")


def calibration_lines(name: str, title: str, rows: Sequence[Mapping], *, x: str, y: str) -> Picture:
    """The share that was right against the stated probability, one line per series; see `_plot_calibration`."""
    with _canvas(4.2) as (canvas, ((axes,),)):
        totals = {series: sum(row["n"] for row in points) for series, points in _by_series(rows).items()}
        named = [{**row, "series": f"{row['series']} (n = {totals[row['series']]:,})"} for row in rows]
        _plot_calibration(canvas, axes, named)
        axes.set(xlabel=x, ylabel=y)
        return _finish(canvas, name, title, _words(rows))


def _plot_calibration(canvas, axes, rows: Sequence[Mapping]) -> None:
    """Calibrated probabilities lie on the diagonal, overconfident ones below it. The size of a dot shows how many rows
    (`n`) it stands for: a few rows prove little."""
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.35, linewidth=1, linestyle="--", zorder=0)
    _plot(canvas, axes, rows, marker="", linewidth=1, alpha=0.6)
    largest = max((row["n"] for row in rows), default=1)
    for points, colour in zip(_by_series(rows).values(), cycle(COLOURS), strict=False):
        sizes = [12 + 108 * row["n"] / largest for row in points]
        x, y = ([row[field] for row in points] for field in ("x", "value"))
        axes.scatter(x, y, sizes, alpha=0.75, color=colour, linewidths=0, zorder=3)
    axes.set(ylim=(-0.03, 1.04), xlim=(min([0.48, *(row["x"] - 0.02 for row in rows)]), 1.03))


def reliability(path: str | Path, calibration: Mapping, title: str) -> None:
    """Write a reliability diagram as PNG: the share of successes in each bin against its mean stated probability.

    Args:
        calibration: of `calibration.calibration`; bins without rows are left out. Bars are the bins' 95 % intervals;
            below are the numbers of rows.
    """
    bins, ece = [entry for entry in calibration["bins"] if entry["outcome"]["n"]], calibration["ece"]
    label = f"ECE {tables.show_number(ece)}, n = {ece['n']:,}"
    rows = [{"series": label, "x": entry["probability"], **entry["outcome"]} for entry in bins]
    with _canvas(5.5, 4.5, rows=2, sharex=True, height_ratios=(4, 1)) as (canvas, ((above,), (below,))):
        _plot_calibration(canvas, above, rows)
        above.set(ylabel="share of successes", title=title)
        below.bar(
            [entry["low"] for entry in bins],
            [entry["outcome"]["n"] for entry in bins],
            width=[entry["high"] - entry["low"] for entry in bins],
            align="edge",
            color=COLOURS[0],
            edgecolor=PAPER,
        )
        below.set(xlabel="probability", ylabel="rows")
        _finish(canvas, "reliability", title, _words(rows)).save_png(path)


def panels(
    name: str,
    title: str,
    rows: Sequence[Mapping],
    fields: Mapping[str, str],
    *,
    along: str,
    alarms: Sequence[float] = (),
    columns: int = 2,
    width: float = WIDTH,
    beside: Mapping[str, str] | None = None,
    heading: str = "",
) -> Picture | None:
    """One panel per field of the logged rows (field: title of its panel), an alarm as a dashed line in every panel.

    Fields without numbers are left out; without any field there is no picture.

    Args:
        along: the field on the x axis.
        beside: {field: another field that its panel shows too, on an axis of its own, as its unit is another one}.
    """
    curves = {field: _points(rows, along, field) for field in fields}
    curves = {field: points for field, points in curves.items() if points}
    if not curves:
        return None
    columns, height = min(columns, len(curves)), -(-len(curves) // columns)
    with _canvas(0.5 + 1.7 * height, width, height, columns) as (canvas, grid):
        for axes in list(grid.flat)[len(curves) :]:
            axes.remove()
        for axes, (field, points) in zip(grid.flat, curves.items(), strict=False):
            _plot_curve(axes, points, COLOURS[1])
            for position in set(alarms):
                axes.axvline(position, color=COLOURS[5], linestyle="--", linewidth=1)
            axes.set_title(fields[field])
            axes.margins(x=0.03)
            axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
            other = (beside or {}).get(field)
            if other and (second := _points(rows, along, other)):
                axes.set_title(f"{fields[field]} (blue), {other} (orange)")
                twin = axes.twinx()
                twin.grid(False)
                _plot_curve(twin, second, COLOURS[2])
        canvas.supxlabel(along, fontsize=10)
        if heading:
            canvas.suptitle(heading)
        changes = (
            f"{fields[field]} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for field, points in curves.items()
        )
        says = f"{'; '.join(changes)}, over {len(rows)} logged rows."
        says += f" {len(alarms)} alarms, at the dashed lines." if alarms else ""
        return _finish(canvas, name, title, says)


def _points(rows: Iterable[Mapping], along: str, field: str) -> list[tuple[float, float]]:
    """(along, field) of the rows that have both, except values that can not be drawn: infinite ones, and no numbers."""
    values = ((row[along], row.get(field)) for row in rows if along in row)
    return [(x, y) for x, y in values if type(y) in (int, float) and y - y == 0]


def _plot_curve(axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, marker="." if len(points) < 40 else "")


def curves(path: str | Path, rows: Sequence[Mapping], title: str) -> None:
    """Write the curves of a reinforcement learning run as PNG; without anything to draw, nothing is written.

    Args:
        rows: those of metrics.jsonl that have `update`. An update with `alarms` is marked.
    """
    picture = panels(
        "curves",
        title,
        rows,
        _UPDATES,
        along="update",
        alarms=[row["update"] for row in rows if row.get("alarms")],
        columns=3,
        width=11,
        beside={"score": "judge"},
        heading=title,
    )
    if picture:
        picture.save_png(path)
