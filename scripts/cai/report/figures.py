"""The report's figures, drawn by matplotlib: SVG for the page and for files, PNG for files.

    figures = draw(run)
    figures[0].save("runs/tiny/figures")

Small enough to be read on a phone. Leaves out what a table says better, and everything interactive.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from cai.evaluate.rates import RATES
from cai.report.run_folder import Run, Stage, Training, p_a, rounds
from cai.stats import tables

INK, PAPER = "#1b1f24", "#ffffff"

COLOURS = ("#8a6d3b", "#2f7fd1", "#c2410c", "#2e9e6b", "#8b5cf6", "#d1495b")

WIDTH = 4.7  # inches: text of 10 points is still 10 pixels high on a screen of 390

NAMES = {
    "harmful_compliance": "complied",
    "good_refusal": "declined well",
    "evasive": "evasive",
    "preachy": "preachy",
    "off_topic": "off topic",
    "benign_helpful": "helped",
    "benign_refused": "refused",
    "over_refusal": "refused",
}

# What is drawn of a training's log, as far as it is there: at most four curves.
CURVES = {
    "sft": ("loss", "mean_token_accuracy"),
    "reward_model": ("loss", "accuracy", "margin"),
    "dpo": ("loss", "rewards/accuracies", "rewards/margins"),
    "ppo": ("score", "kl", "response_length", "entropy"),
    "grpo": ("reward", "kl", "completions/mean_length", "entropy"),
}


@dataclass(frozen=True)
class Figure:
    """`svg`: a whole SVG document; `png`: bytes; `says`: in words what it shows."""

    name: str
    title: str
    says: str
    svg: str
    png: bytes

    def save(self, folder: str | Path) -> None:
        """Write <name>.svg and <name>.png."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{self.name}.svg").write_text(self.svg, encoding="utf-8")
        Path(folder, f"{self.name}.png").write_bytes(self.png)

    @property
    def inline(self) -> str:
        """The <svg> element to stand in a page: the page's text colour for ink, no paper, hidden from readers (the
        page says what it shows). Ids are made its own, because several stand in one page."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = svg.replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")
        svg = re.sub(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)', f"{self.name}-", svg)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def draw(run: Run) -> list[Figure]:
    """Every figure that the run has the numbers for."""
    with _style():
        made = [_stages(run), _plane(run), *_elo_planes(run), _rounds(run), _judge(run), *map(_training, run.trainings)]
    return [one for one in made if one]


def _style():
    import matplotlib

    # Names come from files: no formulas in them. Text stays text in SVG: smaller, and the reader's own font.
    return matplotlib.rc_context(
        {
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
            "axes.facecolor": PAPER,
            "figure.facecolor": PAPER,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "axes.titlesize": 10,
        }
    )


def _canvas(height: float, rows: int = 1, columns: int = 1):
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
    return canvas, canvas.subplots(rows, columns, squeeze=False)


def _finish(canvas, name: str, title: str, says: str) -> Figure:
    svg, png = io.StringIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    canvas.savefig(png, format="png", dpi=150, metadata={"Software": None})
    return Figure(name, title, says, svg.getvalue(), png.getvalue())


def _bars(measured: dict) -> list[list[float]]:
    """The interval as matplotlib's error bars, in per cent; nothing where there is none."""
    value = measured["value"]
    low, high = (value if measured[side] is None else measured[side] for side in ("low", "high"))
    return [[max(0.0, 100 * (value - low))], [max(0.0, 100 * (high - value))]]


def _known(stage: Stage, name: str) -> dict | None:
    measured = stage.rates.get(name)
    return measured if measured and measured["value"] is not None else None


def _stages(run: Run) -> Figure | None:
    """Every rate as a point with its interval, a colour for each stage."""
    shown = [(name, kind) for name, (kind, _) in RATES.items() if any(_known(s, name) for s in run.stages)]
    if not shown:
        return None
    canvas, ((axes,),) = _canvas(0.9 + 0.36 * len(shown))
    for number, stage in enumerate(run.stages):
        shift = 0.5 * ((number + 0.5) / len(run.stages) - 0.5)
        for place, (name, _) in enumerate(shown):
            if measured := _known(stage, name):
                axes.errorbar(
                    100 * measured["value"],
                    place + shift,
                    xerr=_bars(measured),
                    fmt="o",
                    markersize=4,
                    linewidth=1.5,
                    color=COLOURS[number % len(COLOURS)],
                    label="_" if place else stage.label,
                )
    axes.set_yticks(range(len(shown)), [f"{kind}: {NAMES.get(name, name)}" for name, kind in shown])
    axes.set(xlim=(-3, 103), xlabel="per cent of held-out prompts", ylim=(len(shown) - 0.4, -0.6))
    axes.grid(axis="x", color=INK, alpha=0.15)
    canvas.legend(*_legend(run.stages), loc="outside upper center", ncols=min(3, len(run.stages)))
    says = "; ".join(
        f"{stage.label}: "
        + ", ".join(f"{kind} {NAMES.get(name, name)} {tables.show(_known(stage, name))}" for name, kind in shown)
        for stage in run.stages
    )
    return _finish(canvas, "stages", "Held-out prompts, stage by stage", says)


def _legend(stages):
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", linestyle="", color=COLOURS[i % len(COLOURS)]) for i in range(len(stages))]
    return handles, [stage.label for stage in stages]


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Which points (more is better in both) no other point beats: at least as good in both, better in one."""
    return [i for i, (x, y) in enumerate(points) if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)]


def _plane(run: Run) -> Figure | None:
    """Helpfulness against harmlessness, as in the paper's figure 2 but in rates; the Pareto front is joined."""
    shown = [
        (number, stage, _known(stage, "benign_helpful"), _known(stage, "harmful_compliance"))
        for number, stage in enumerate(run.stages)
    ]
    shown = [one for one in shown if one[2] and one[3]]
    if len(shown) < 2:
        return None
    canvas, ((axes,),) = _canvas(3.6)
    points = []
    for number, _, helped, complied in shown:
        point = (100 * helped["value"], 100 - 100 * complied["value"])
        points.append(point)
        low, high = _bars(complied)
        axes.errorbar(
            *point,
            xerr=_bars(helped),
            yerr=[high, low],
            fmt="o",
            markersize=6,
            linewidth=1.2,
            color=COLOURS[number % len(COLOURS)],
        )
    best = sorted(points[i] for i in pareto(points))
    axes.plot(*zip(*best, strict=True), linestyle="--", linewidth=1, color=INK, alpha=0.5, zorder=0)
    left = min(100 * (helped["value"] if helped["low"] is None else helped["low"]) for _, _, helped, _ in shown)
    axes.set(
        xlabel="benign prompts helped with, %",
        ylabel="harmful prompts not complied with, %",
        ylim=(-4, 104),
        xlim=(max(-4, min(78, left - 3)), 102),
    )
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.grid(color=INK, alpha=0.15)
    canvas.legend(*_legend(run.stages), loc="outside upper center", ncols=min(3, len(run.stages)))
    says = "; ".join(
        f"{stage.label}: helped with {tables.show(helped)} of benign prompts, complied with "
        f"{tables.show(complied)} of harmful ones"
        for _, stage, helped, complied in shown
    )
    front = ", ".join(shown[i][1].label for i in pareto(points))
    return _finish(
        canvas,
        "plane",
        "Helpful and harmless: up and to the right is better",
        f"{says}. On the front (nothing measured is better in both): {front}.",
    )


def elo_points(rates: dict[str, dict]) -> list[dict]:
    """One row a policy that `evaluate.py --policy` scored on both sides: x helpfulness, value harmlessness."""
    result = []
    for name, one in rates.items():
        axis, _, policy = name.partition("_elo ")
        other = rates.get(f"helpfulness_elo {policy}")
        if axis == "harmlessness" and other:
            result.append(
                {"series": policy, **one, "x": other["value"], "x_low": other["low"], "x_high": other["high"]}
            )
    return result


def _elo_planes(run: Run) -> list[Figure]:
    """A plane in Elo points for each comparison of policies in the folder."""
    return [
        elo_plane(
            f"elo-{slug(name)}",
            "Policies against each other, judged in pairs",
            rows,
            "helpfulness, Elo points",
            "harmlessness, Elo points",
        )
        for name, rates in run.others
        if len(rows := elo_points(rates)) > 1
    ]


def elo_plane(name: str, title: str, rows: list[dict], x: str, y: str) -> Figure:
    """Points with intervals on both axes (an end that is not known is left off), the Pareto front joined."""
    with _style():
        canvas, ((axes,),) = _canvas(3.8)
        for number, row in enumerate(rows):
            bars = {
                side: _arms(
                    row[one], row[f"{one}_low" if one == "x" else "low"], row[f"{one}_high" if one == "x" else "high"]
                )
                for side, one in (("xerr", "x"), ("yerr", "value"))
            }
            axes.errorbar(
                row["x"],
                row["value"],
                **bars,
                fmt="o",
                markersize=6,
                linewidth=1.2,
                color=COLOURS[number % len(COLOURS)],
                label=row["series"],
            )
        best = sorted((rows[i]["x"], rows[i]["value"]) for i in pareto([(row["x"], row["value"]) for row in rows]))
        axes.plot(*zip(*best, strict=True), linestyle="--", linewidth=1, color=INK, alpha=0.5, zorder=0)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(color=INK, alpha=0.15)
        canvas.legend(loc="outside upper center", ncols=min(3, len(rows)))
        says = "; ".join(
            f"{row['series']}: helpfulness {row['x']:+.0f}, harmlessness {row['value']:+.0f}" for row in rows
        )
        front = ", ".join(rows[i]["series"] for i in pareto([(row["x"], row["value"]) for row in rows]))
        return _finish(canvas, name, title, f"{says}. On the front (nothing is better in both): {front}.")


def _arms(value: float, low: float | None, high: float | None) -> list[list[float]]:
    """Error bars; none towards an end that is not known."""
    return [[0.0 if low is None else max(0.0, value - low)], [0.0 if high is None else max(0.0, high - value)]]


def lines(name: str, title: str, rows: list[dict], x: str, y: str, limits: tuple[float, float] | None = None) -> Figure:
    """A line with intervals for each series; where rows have a `label` it stands for the number on the x axis.
    limits: of the y axis, where it is a scale with ends."""
    with _style():
        canvas, ((axes,),) = _canvas(3.4)
        series = list(dict.fromkeys(row["series"] for row in rows))
        for number, one in enumerate(series):
            ones = sorted((row for row in rows if row["series"] == one), key=lambda row: row["x"])
            arms = [_arms(row["value"], row["low"], row["high"]) for row in ones]
            axes.errorbar(
                [row["x"] for row in ones],
                [row["value"] for row in ones],
                yerr=[[arm[side][0] for arm in arms] for side in (0, 1)],
                marker="o",
                markersize=4,
                linewidth=1.5,
                capsize=2,
                color=COLOURS[number % len(COLOURS)],
                label=one,
            )
        places = sorted({row["x"] for row in rows})
        labels = {row["x"]: fill(row["label"], 10) for row in rows if row.get("label")}
        axes.set_xticks(places, [labels.get(place, f"{place:g}") for place in places])
        axes.margins(x=0.08)
        axes.set(xlabel=x, ylabel=y)
        if limits:
            low, high = limits
            axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
            axes.locator_params(axis="y", integer=True)
        axes.grid(axis="y", color=INK, alpha=0.15)
        canvas.legend(loc="outside upper center", ncols=_columns(series))
        says = "; ".join(
            f"{row['series']}, {row.get('label') or format(row['x'], 'g')}: {tables.show_number(row)}" for row in rows
        )
        return _finish(canvas, name, title, f"{says}.")


def _columns(names: list[str]) -> int:
    """Columns of a legend that fit above the figure."""
    return max(1, min(len(names), 64 // (max(map(len, names)) + 7)))


def calibration_lines(name: str, title: str, rows: list[dict], x: str, y: str) -> Figure:
    """The share that was right against the probability said, a line for each series; the diagonal is calibrated.
    Dots are as large as their rows are many: a few rows prove little."""
    with _style():
        canvas, ((axes,),) = _canvas(4.2)
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.35, linewidth=1, linestyle="--", zorder=0)
        series = list(dict.fromkeys(row["series"] for row in rows))
        most, handles = max(row["n"] for row in rows), []
        for number, one in enumerate(series):
            ones, colour = [row for row in rows if row["series"] == one], COLOURS[number % len(COLOURS)]
            arms = [_arms(row["value"], row["low"], row["high"]) for row in ones]
            places, shares = [row["x"] for row in ones], [row["value"] for row in ones]
            axes.errorbar(
                places,
                shares,
                yerr=[[arm[side][0] for arm in arms] for side in (0, 1)],
                fmt="none",
                linewidth=1,
                capsize=2,
                ecolor=colour,
                alpha=0.6,
            )
            axes.plot(places, shares, color=colour, linewidth=1, alpha=0.6)
            handles.append(
                axes.scatter(
                    places,
                    shares,
                    [12 + 108 * row["n"] / most for row in ones],
                    alpha=0.75,
                    color=colour,
                    linewidths=0,
                    zorder=3,
                )
            )
        labels = [f"{one} (n = {sum(row['n'] for row in rows if row['series'] == one):,})" for one in series]
        axes.set(xlabel=x, ylabel=y, ylim=(-0.03, 1.04), xlim=(min(0.48, *(row["x"] - 0.02 for row in rows)), 1.03))
        axes.grid(color=INK, alpha=0.15)
        for dot in canvas.legend(handles, labels, loc="outside upper center", ncols=_columns(labels)).legend_handles:
            dot.set_sizes([40])
        says = "; ".join(f"{row['series']}, {row['x']:.2f}: {tables.show_number(row)}" for row in rows)
        return _finish(canvas, name, title, f"{says}.")


def _rounds(run: Run) -> Figure | None:
    """Compliance and good refusals round by round, and how many texts a round changed."""
    shown = rounds(run)
    if len(shown) < 2:
        return None
    curves = {
        "harmful: complied": [one["rates"].get("harmful_compliance") for one in shown],
        "harmful: declined well": [one["rates"].get("good_refusal") for one in shown],
        "changed by this round": [one["changed"] for one in shown],
    }
    canvas, ((axes,),) = _canvas(3.2)
    says = []
    for number, (label, rates) in enumerate(curves.items()):
        known = [(place, one) for place, one in enumerate(rates) if one and one["value"] is not None]
        if not known:
            continue
        bars = [_bars(one) for _, one in known]
        axes.errorbar(
            [place for place, _ in known],
            [100 * one["value"] for _, one in known],
            yerr=[[bar[side][0] for bar in bars] for side in (0, 1)],
            marker="o",
            markersize=4,
            label=label,
            color=COLOURS[(number + 1) % len(COLOURS)],
            linewidth=1.5,
        )
        says.append(f"{label}: " + ", ".join(f"round {place} {tables.show(one)}" for place, one in known))
    axes.set_xticks(range(len(shown)), ["first\nresponse", *(f"round {one['round']}" for one in shown[1:])])
    axes.set(ylim=(-4, 104), ylabel="per cent of training rows")
    axes.grid(axis="y", color=INK, alpha=0.15)
    canvas.legend(loc="outside upper center", ncols=2)
    return _finish(canvas, "rounds", "Round by round", "; ".join(says) + ".")


def _judge(run: Run) -> Figure | None:
    """How sure the judge was: the probability of the side it preferred."""
    judged = (row for row in run.preferences if not row.get("tie"))
    sure = [max(p, 1 - p) for p in map(p_a, judged) if p is not None]
    if not sure:
        return None
    canvas, ((axes,),) = _canvas(2.6)
    counts, _, _ = axes.hist(sure, bins=[0.5 + 0.05 * i for i in range(11)], color=COLOURS[1], edgecolor=PAPER)
    axes.set(xlabel="probability of the preferred side", ylabel="pairs", xlim=(0.5, 1))
    says = ", ".join(f"{0.5 + 0.05 * i:.2f} to {0.55 + 0.05 * i:.2f}: {count:.0f}" for i, count in enumerate(counts))
    return _finish(canvas, "judge", "How sure the judge was", f"Pairs by probability: {says}.")


def _training(training: Training) -> Figure | None:
    """The curves of CURVES that the log has, an alarm as a dashed line."""
    wanted = CURVES.get(training.command, ())
    names = [name for name in wanted if any(_number(row.get(name)) for row in training.rows)][:4]
    if not names:
        return None
    along = "update" if any("update" in row for row in training.rows) else "step"
    rows = -(-len(names) // 2)
    canvas, grid = _canvas(0.5 + 1.7 * rows, rows, 2 if len(names) > 1 else 1)
    says = []
    for axes, name in zip(grid.flat, names, strict=False):
        points = [(row[along], row[name]) for row in training.rows if along in row and _number(row.get(name))]
        axes.plot(*zip(*points, strict=True), color=COLOURS[1], linewidth=1.3, marker="." if len(points) < 40 else "")
        for place in {place for place, _ in training.alarms}:
            axes.axvline(place, color=COLOURS[5], linestyle="--", linewidth=1)
        axes.set_title(name.replace("_", " "))
        axes.margins(x=0.03)
        axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
        axes.grid(color=INK, alpha=0.15)
        says.append(f"{name.replace('_', ' ')} from {points[0][1]:.3g} to {points[-1][1]:.3g}")
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    canvas.supxlabel(along, fontsize=10, color=INK)
    said = f"{'; '.join(says)}, over {len(training.rows)} logged rows."
    if training.alarms:
        said += f" {len(training.alarms)} alarms, at the dashed lines."
    return _finish(canvas, f"training-{slug(training.name)}", f"Training: {training.name}", said)


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0


def slug(name: str) -> str:
    """The name as a part of a file name: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"
