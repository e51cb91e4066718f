"""Rates, means, correlations and differences, each with its 95 % interval.

    rate(97, 100)          # {"value": 0.97, "low": 0.915, "high": 0.990, "n": 100}

`rate` and `mean` take rows to be independent; where several rows share a prompt or a context, use `clustered_rate` and
`clustered_mean`. Leaves out hypothesis tests.
"""

import bisect
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

Z = 1.959963984540054  # two-sided 95 % of the normal distribution


def rate(successes: int, n: int) -> dict:
    """The share `successes / n` in 0..1 with its Wilson 95 % score interval (Wilson 1927, JASA 22).

    Unlike the normal approximation it is right near 0 and 1, where a good run ends up. Without rows
    (`n` = 0) value, low and high are None: nothing was measured, which is not 0 %.
    """
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    return {**wilson(successes / n, n), "n": n}


def wilson(share: float, n: float) -> dict:
    """{value, low, high} of a share of `n` independent rows; `n` need not be whole."""
    spread = Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # At 0 and 1 the bound is exactly that; rounding would leave 1e-17 beyond it.
    return {"value": share, "low": 0.0 if share == 0 else middle - half, "high": 1.0 if share == 1 else middle + half}


def mean(values: Iterable[float]) -> dict:
    """The mean in the values' own unit, with the normal 95 % interval (± 1.96 standard errors).

    With one value there is no spread to measure, so low and high are None; with none all three are.
    """
    values = list(values)
    result = clustered_mean(values, range(len(values)))
    return {name: result[name] for name in ("value", "low", "high", "n")}


def clustered_rate(successes: Sequence[bool | float], clusters: Sequence) -> dict:
    """The share of successes with a 95 % interval that counts rows of one cluster as alike; adds `clusters`.

    The variance is that of the clusters' sums (Miller 2024, arXiv 2411.00640, section 2.2, with the usual C / (C − 1)
    for C clusters). The interval is Wilson's for as many independent rows as would have this variance, never for
    more than there are; where the variance says nothing (all rows alike) each cluster counts as one row.

    Args:
        successes: one per row, 0 to 1 (half a success for a tie).
        clusters: one label per row; rows with equal labels belong together.
    """
    n = len(successes)
    if n == 0:
        return {**rate(0, 0), "clusters": 0}
    share, variance, count = _cluster(successes, clusters)
    spread = share * (1 - share)
    effective = min(n, spread / variance) if variance > 1e-12 and count > 1 else count
    return {**wilson(share, effective), "n": n, "clusters": count}


def clustered_mean(values: Sequence[float], clusters: Sequence) -> dict:
    """`mean` with the variance of `clustered_rate`; adds `clusters`. With one cluster low and high are None."""
    n = len(values)
    if n == 0:
        return {**rate(0, 0), "clusters": 0}
    centre, variance, count = _cluster(values, clusters)
    half = Z * math.sqrt(variance)
    low, high = (None, None) if count == 1 else (centre - half, centre + half)
    return {"value": centre, "low": low, "high": high, "n": n, "clusters": count}


def _cluster(values: Sequence[float], clusters: Sequence) -> tuple[float, float, int]:
    """(mean of the values, variance of the mean, number of clusters)."""
    n, sums = len(values), Counter()
    centre = math.fsum(values) / n
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - centre
    count = len(sums)
    return centre, math.fsum(part * part for part in sums.values()) / (n * n) * (count / max(1, count - 1)), count


def correlation(x: Sequence[float], y: Sequence[float]) -> dict:
    """Pearson's r with the 95 % interval of Fisher's z; None where one side never varies or n is below 4."""
    n, r = len(x), math.nan
    if n >= 4 and len(set(x)) > 1 and len(set(y)) > 1:
        with suppress(statistics.StatisticsError):  # they vary by less than a float can tell
            r = min(1.0, max(-1.0, statistics.correlation(x, y)))
    if math.isnan(r):
        return {**rate(0, 0), "n": n}
    half = Z / math.sqrt(n - 3)
    low, high = (r, r) if abs(r) == 1 else (math.tanh(math.atanh(r) + sign * half) for sign in (-1, 1))
    return {"value": r, "low": low, "high": high, "n": n}


def paired(differences: Sequence[float], z: float = Z, clusters: Sequence | None = None) -> tuple[float, float]:
    """Interval of the mean of differences, each −1 to 1, of the same prompts measured twice.

    Bonett and Price (2012, Journal of Educational and Behavioral Statistics 37): the normal interval after one
    difference of 1 and one of −1 are added, so that equal outcomes don't give an interval of no width.

    Args:
        clusters: one label per difference; those with equal labels count as alike, as in `clustered_mean`.
    """
    n = len(differences) + 2
    if clusters is None:
        centre = math.fsum(differences) / n
        variance = (math.fsum(difference * difference for difference in differences) + 2) / n - centre * centre
        half = z * math.sqrt(max(0.0, variance) / n)
    else:
        labels = [*((cluster,) for cluster in clusters), "added 1", "added −1"]
        centre, variance, _ = _cluster([*differences, 1, -1], labels)
        half = z * math.sqrt(variance)
    return max(-1.0, centre - half), min(1.0, centre + half)


def paired_means(differences: Sequence[float], z: float = Z, clusters: Sequence | None = None) -> tuple[float, float]:
    """`paired` for differences of any size: the normal interval of their mean. −inf to inf with one cluster."""
    centre, variance, count = _cluster(differences, range(len(differences)) if clusters is None else clusters)
    half = z * math.sqrt(variance) if count > 1 else math.inf
    return centre - half, centre + half


def unpaired(before: Mapping, now: Mapping, z: float = Z) -> tuple[float, float]:
    """Interval of now − before for two figures measured apart, from the interval of each.

    Newcombe (1998, Statistics in Medicine 17, method 10); the intervals' arms are scaled from 95 % to `z`, and of two
    rates stay within what rates can be. Without an interval on either side nothing is known: −inf to inf.
    """
    if None in (before["low"], before["high"], now["low"], now["high"]):
        return -math.inf, math.inf
    scale, change = z / Z, now["value"] - before["value"]
    arms = [[figure["value"] - figure["low"], figure["high"] - figure["value"]] for figure in (now, before)]
    arms = [[scale * arm for arm in of_figure] for of_figure in arms]
    if all(0 <= figure[end] <= 1 for figure in (before, now) for end in ("low", "high")):
        arms = [
            [min(down, figure["value"]), min(up, 1 - figure["value"])]
            for (down, up), figure in zip(arms, (now, before), strict=True)
        ]
    (now_down, now_up), (before_down, before_up) = arms
    return change - math.hypot(now_down, before_up), change + math.hypot(now_up, before_down)


def prompts_needed(margin: float, spread: Callable[[int], tuple[float, float]], power: float) -> int:
    """The smallest n with which an equal model's interval excludes a loss beyond the margin.

    Its lower end is the interval's arm below 0, and the estimate itself varies: n is enough where the arm and the
    variation that is exceeded with probability 1 − `power` together are within the margin (the usual sample size of a
    test of non-inferiority, solved for the interval that is reported and not for the normal one).

    Args:
        margin: above 0, as a share. power: 0.5 to 1, of this figure.
        spread: (the arm, the estimate's standard error) with n prompts, both falling with n.
    """
    z = statistics.NormalDist().inv_cdf(power)

    def is_enough(n: int) -> bool:
        arm, error = spread(n)
        return arm + z * error <= margin

    most = 1
    while not is_enough(most):
        most *= 2
    return bisect.bisect_left(range(most), True, lo=most // 2, key=is_enough)


def spread_of_rates(share: float, z: float = Z) -> Callable[[int], tuple[float, float]]:
    """`spread` for two measurements apart, both of a rate of `share`: the longer arm of `unpaired`."""

    def spread(n: int) -> tuple[float, float]:
        figure = wilson(share, n)
        low, high = unpaired(figure, figure, z)
        return max(-low, high), math.sqrt(2 * share * (1 - share) / n)

    return spread


def spread_of_pairs(variance: float, z: float = Z) -> Callable[[int], tuple[float, float]]:
    """`spread` for the same prompts measured twice: half of `paired` for differences of mean 0 and this variance."""

    def spread(n: int) -> tuple[float, float]:
        return z * math.sqrt(n * variance + 2) / (n + 2), math.sqrt(variance / n)

    return spread
