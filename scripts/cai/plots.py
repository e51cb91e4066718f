"""Pictures of measurements, as PNG files.

    plots.reliability("reliability.png", metrics.calibration(probabilities, outcomes), "judge on gold labels")

Leaves out everything interactive: no window is opened, and the figures are also in the JSON beside them.
"""

from collections.abc import Mapping
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
    bars = [[max(0.0, one["outcome"]["value"] - one["outcome"]["low"]) for one in bins],
            [max(0.0, one["outcome"]["high"] - one["outcome"]["value"]) for one in bins]]
    figure = Figure(figsize=(4.5, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    above.errorbar(x, y, yerr=bars, fmt="o-", markersize=4, linewidth=1, capsize=2, color="tab:blue")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of successes", title=title.replace("$", r"\$"))
    ece = calibration["ece"]
    if ece["value"] is not None:
        text = f"ECE {ece['value']:.3f} ({ece['low']:.3f}–{ece['high']:.3f}), n = {ece['n']}"
        above.text(0.03, 0.97, text, verticalalignment="top", fontsize=9)
    below.bar([(one["low"] + one["high"]) / 2 for one in bins], [one["outcome"]["n"] for one in bins],
              width=[0.9 * (one["high"] - one["low"]) for one in bins], color="0.6")
    below.set(xlabel="probability", ylabel="rows")
    Path(path_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path_png, format="png")
