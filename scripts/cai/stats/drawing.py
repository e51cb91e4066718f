"""Pictures of measurements, as PNG files.

    plots.reliability("reliability.png", metrics.calibration(probabilities, outcomes), "judge on gold labels")

Leaves out everything interactive: no window is opened, and the figures are also in the JSON beside them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path


def reliability(path_png: str | Path, calibration: Mapping, title: str) -> None:
    """A reliability diagram: the share of successes in each bin against the mean probability said.

    Args:
        calibration: of `metrics.calibration`; bins without rows are left out.

    Below, how many rows each bin has. A calibrated model's points lie on the diagonal, those of one too sure of
    itself below it. Bars are the bins' own 95 % intervals.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = [one for one in calibration["bins"] if one["outcome"]["n"]]
    x = [one["probability"] for one in bins]
    y = [one["outcome"]["value"] for one in bins]
    # Never below 0: a bound may lie 1e-17 on the wrong side of the value.
    bars = [
        [max(0.0, one["outcome"]["value"] - one["outcome"]["low"]) for one in bins],
        [max(0.0, one["outcome"]["high"] - one["outcome"]["value"]) for one in bins],
    ]
    figure = Figure(figsize=(4.5, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    above.errorbar(x, y, yerr=bars, fmt="o-", markersize=4, linewidth=1, capsize=2, color="tab:blue")
    above.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share of successes", title=title.replace("$", r"\$"))
    ece = calibration["ece"]
    if ece["value"] is not None:
        text = f"ECE {ece['value']:.3f} ({ece['low']:.3f}–{ece['high']:.3f}), n = {ece['n']}"
        above.text(0.03, 0.97, text, verticalalignment="top", fontsize=9)
    below.bar(
        [(one["low"] + one["high"]) / 2 for one in bins],
        [one["outcome"]["n"] for one in bins],
        width=[0.9 * (one["high"] - one["low"]) for one in bins],
        color="0.6",
    )
    below.set(xlabel="probability", ylabel="rows")
    Path(path_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path_png, format="png")


def curves(path_png: str | Path, rows: Sequence[Mapping], title: str) -> None:
    """The figures of a reinforcement learning run, one panel each, over its updates.

    Args:
        rows: those of metrics.jsonl that have `update`; what none of them has is left out, and with no rows at all
            nothing is written. An update with `alarms` is marked by a dashed line in every panel.

    The judge stands beside the score on an axis of its own, for they are in different units.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "score": "score",
        "kl": "KL, nats a response",
        "entropy": "entropy, nats a token",
        "response_length": "tokens a response",
        "eos_rate": "share that ended",
        "duplicates": "share of duplicates",
        "boilerplate": "growth of one phrase",
        "clip_fraction": "share of ratios clipped",
        "explained_variance": "explained variance",
    }
    shown = [name for name in panels if any(name in row for row in rows)]
    if not shown:
        return
    figure = Figure(figsize=(11, 2.6 * math.ceil(len(shown) / 3)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(title.replace("$", r"\$"))

    def draw(axes, name, colour):
        points = [(row["update"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, marker="." if len(points) < 40 else "")

    for place, name in enumerate(shown, 1):
        axes = figure.add_subplot(math.ceil(len(shown) / 3), 3, place)
        draw(axes, name, "tab:blue")
        axes.set_title(panels[name], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        for row in rows:
            if row.get("alarms"):
                axes.axvline(row["update"], color="tab:red", linestyle="--", linewidth=0.8)
        if name == "score" and any("judge" in row for row in rows):
            axes.set_title("score (blue), judge (orange)", fontsize=9)
            beside = axes.twinx()
            beside.tick_params(labelsize=8)
            draw(beside, "judge", "tab:orange")
    Path(path_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path_png, format="png")
