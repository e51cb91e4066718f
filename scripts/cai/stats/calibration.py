"""Calibration of probabilities: expected calibration error, temperature, and the soft-label loss.

    calibration([0.9, 0.6], [True, False])["ece"]

Leaves out drawing (drawing.py).
"""

import math
from collections.abc import Sequence

import numpy as np

from cai.stats.intervals import rate, wilson


def calibration(probabilities: Sequence[float], outcomes: Sequence[bool | float], bins: int = 10) -> dict:
    """Whether events with a stated probability p happen in a share p of the cases.

    Args:
        probabilities: 0 to 1. Of a choice between two, give the probability of the side that was chosen and whether
            that side was right: with the right side's own probability, every outcome would be a success.
        outcomes: True or False; or a probability, where nobody knows better than a soft label.
        bins: of equal width, 0 to 1.

    Returns {"ece": {value, low, high, n}, "ece_by_chance": the ECE that these bins would show on average if every
    bin were calibrated, "bins": [{low, high, probability: mean or None, outcome: {value, low, high, n}}]}.

    ECE is the mean distance between probability and outcome over the bins, weighted by their rows (Guo et al. 2017,
    arXiv 1706.04599). It is never below 0, so it is too high on few rows: its interval is the basic bootstrap one
    (500 resamples, always the same) and begins at 0 unless the ECE is higher than 95 % of those by chance.
    """
    p, y = np.asarray(probabilities, float), np.asarray(outcomes, float)
    if p.shape != y.shape:
        raise ValueError(f"{p.size} probabilities and {y.size} outcomes")
    if not all(((values >= 0) & (values <= 1)).all() for values in (p, y)):
        raise ValueError("a value outside 0 to 1")
    n, bin_of = p.size, np.minimum((p * bins).astype(int), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    filled = np.maximum(counts, 1)
    probability, share = (np.bincount(bin_of, weights=values, minlength=bins) / filled for values in (p, y))
    table = [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "probability": float(probability[b]) if counts[b] else None,
            "outcome": {
                **(wilson(float(min(share[b], 1)), int(counts[b])) if counts[b] else rate(0, 0)),
                "n": int(counts[b]),
            },
        }
        for b in range(bins)
    ]
    if n == 0:
        return {"ece": rate(0, 0), "ece_by_chance": None, "bins": table}
    gap = probability - share
    value = float((np.abs(gap) * counts).sum() / n)
    # Each row without the gap of its bin: these residuals, resampled, give the ECE by chance.
    rest = (p - y - gap[bin_of]) * np.sqrt(counts / np.maximum(counts - 1, 1))[bin_of]
    draw, chance, resampled = np.random.default_rng(0), [], []
    for _ in range(500):
        rows = draw.integers(0, n, n)
        inside = bin_of[rows]
        sums = np.bincount(inside, weights=rest[rows], minlength=bins)
        chance.append(float(np.abs(sums).sum() / n))
        resampled.append(float(np.abs(sums + gap * np.bincount(inside, minlength=bins)).sum() / n))
    least, most = (float(edge) for edge in np.quantile(resampled, (0.025, 0.975)))
    low = 0.0 if value <= np.quantile(chance, 0.95) else min(value, max(0.0, 2 * value - most))
    ece = {"value": value, "low": low, "high": min(1.0, max(value, 2 * value - least)), "n": n}
    return {"ece": ece, "ece_by_chance": math.fsum(chance) / len(chance), "bins": table}


def calibrate_margins(margins: Sequence[float], labels: Sequence[float]) -> dict:
    """Calibration of the side that the scores prefer: whether it is the better one as often as they say.

    With the labelled side's own probability the labels would all be above one half, and say which side is which.

    Args:
        margins: score of one side − score of the other, in log-odds.
        labels: probability that the first of them is the better one.
    """
    preferred = [p if d > 0 else 1 - p for d, p in zip(margins, labels, strict=True)]
    return calibration([sigmoid(abs(d)) for d in margins], preferred)


def soft_loss(d: float, p: float) -> float:
    """−p·log σ(d) − (1−p)·log σ(−d), for one margin d = score of chosen − score of rejected."""
    return max(d, 0) - p * d + math.log1p(math.exp(-abs(d)))


def sigmoid(x: float) -> float:
    """1 / (1 + e^−x), which never overflows."""
    return 0.5 + 0.5 * math.tanh(x / 2)


def logit(p: float) -> float:
    """The margin whose sigmoid is p; 40 and −40 stand for infinity."""
    return 40.0 * (2 * p - 1) if p in (0, 1) else math.log(p / (1 - p))


def fit_temperature(margins: Sequence[float], labels: Sequence[float]) -> float:
    """The T for which σ(margin / T) has the least log-loss against the labels (Guo et al. 2017, section 4.2).

    With a weak prior toward 1 (log T normal, deviation 1), so that a handful of pairs, all on the right side, do not
    make it 0. Between e^−3 and e^3.
    """
    low, high = -3.0, 3.0  # of log T

    def slope(log_t: float) -> float:
        by = math.exp(-log_t)
        return log_t - by * math.fsum(d * (sigmoid(by * d) - p) for d, p in zip(margins, labels, strict=True))

    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return math.exp((low + high) / 2)
