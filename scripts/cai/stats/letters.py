"""Letter bias: how far a forced choice depends on the letters under which its options stand.

    letter_excess([[0.9, 0.1], [0.2, 0.8]], [(0, 1), (1, 0)])      # [0.35, -0.35]
    letter_bias([[0.35, -0.35], [0.1, -0.1]])                      # {"value": 0.225, "low": ..., "high": ..., "n": 2}

An order says which option stands at each letter: (1, 0) is the second option at A, the first at B. Without a bias a
letter has, on average over the orders, the probability of the options that stood at it. Leaves out how a model is
asked: models/choice.py.
"""

import math
import statistics
from collections.abc import Sequence

Order = tuple[int, ...]  # the option at each letter


def cyclic_orders(options: int, count: int) -> list[Order]:
    """`count` of the cyclic orders of so many options, evenly spread, the plain order first.

    In all of them together each option stands once at each letter.
    """
    shifts = (number * options // count for number in range(count))
    return [tuple((shift + letter) % options for letter in range(options)) for shift in shifts]


def mean_shares(by_order: Sequence[Sequence[float]]) -> list[float]:
    """The mean probability of each option over the orders."""
    return [math.fsum(shares) / len(by_order) for shares in zip(*by_order, strict=True)]


def letter_excess(by_order: Sequence[Sequence[float]], orders: Sequence[Order]) -> list[float]:
    """The mean probability of each letter, minus the mean probability of the options that stood at it; sums to 0.

    With all cyclic orders the options account for an equal share of every letter. With fewer, part of a bias looks as
    if the options had caused it, and the excess is smaller than it would be.

    Args:
        by_order: for each order, the probability of each option (not of each letter).
    """
    options = mean_shares(by_order)
    excess = [0.0] * len(options)
    for shares, order in zip(by_order, orders, strict=True):
        for letter, option in enumerate(order):
            excess[letter] += (shares[option] - options[option]) / len(orders)
    return excess


def letter_bias(excesses: Sequence[Sequence[float]]) -> dict:
    """{value, low, high, n}: the total variation distance between the mean distribution over the letters and the one
    that the options account for: 0 without a bias, 1 − 1 / letters for a model that always chooses one letter.

    The distance is the excess of those letters that are chosen too often, a mean over rows; low and high are its normal
    95 % interval by rows, within 0..1. Which letters these are is read from the same rows, so the interval is
    widened to hold for every division of the letters in two (Bonferroni; with two letters there is only one).

    Args:
        excesses: of `letter_excess`, one per row, which count as independent.
    """
    n = len(excesses)
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    means = mean_shares(excesses)
    in_excess = [letter for letter, mean in enumerate(means) if mean > 0]
    of_rows = [math.fsum(row[letter] for letter in in_excess) for row in excesses]
    value = math.fsum(of_rows) / n
    if n == 1:
        return {"value": value, "low": None, "high": None, "n": n}
    divisions = 2 ** (len(means) - 1) - 1
    z = statistics.NormalDist().inv_cdf(1 - 0.025 / divisions)
    half = z * statistics.stdev(of_rows) / math.sqrt(n)
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}
