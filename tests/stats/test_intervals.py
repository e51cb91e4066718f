"""Rates and intervals against numbers worked by hand."""

import math
import random

import pytest
import simulations

from cai.evaluate.rates import RATES, class_rates
from cai.stats import calibration, intervals, tables


def test_wilson_interval_of_nothing_in_ten():
    # With no success the upper bound is z² / (n + z²) = 3.841459 / 13.841459.
    high = pytest.approx(0.277533, abs=1e-6)
    assert intervals.rate(0, 10) == {"value": 0.0, "low": 0.0, "high": high, "n": 10}


def test_wilson_interval_of_half():
    # Middle 0.5; half = 1.959964 · √(0.25/10 + 3.841459/400) / 1.3841459 = 1.959964 · 0.1860213 / 1.3841459.
    measured = intervals.rate(5, 10)
    assert measured["value"] == 0.5
    assert measured["low"] == pytest.approx(0.5 - 0.263407, abs=1e-5)
    assert measured["high"] == pytest.approx(0.5 + 0.263407, abs=1e-5)


def test_wilson_interval_of_81_in_263():
    # Newcombe 1998 (Statistics in Medicine 17, table I, method 3): 0.2553 to 0.3662.
    measured = intervals.rate(81, 263)
    assert (round(measured["low"], 4), round(measured["high"], 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("n", [1, 3, 10, 350, 10_000])
def test_bounds_never_leave_0_to_1_and_mirror(n):
    for successes in {0, 1, n // 2, n}:
        one, other = intervals.rate(successes, n), intervals.rate(n - successes, n)
        assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
        assert one["low"] == pytest.approx(1 - other["high"])


def test_no_rows_is_not_zero_percent():
    assert intervals.rate(0, 0) == {"value": None, "low": None, "high": None, "n": 0}
    assert tables.show(intervals.rate(0, 0)) == "–"
    assert tables.show(None) == "–"


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="11 successes of 10"):
        intervals.rate(11, 10)


def test_mean_by_hand():
    # 1, 2, 3, 6: mean 3, squared distances 4 + 1 + 0 + 9 = 14, variance 14/3, standard error √(14/12).
    measured = intervals.mean([1, 2, 3, 6])
    half = 1.959964 * math.sqrt(14 / 12)
    assert measured["value"] == 3 and measured["n"] == 4
    assert measured["low"] == pytest.approx(3 - half, abs=1e-5)
    assert measured["high"] == pytest.approx(3 + half, abs=1e-5)


def test_mean_of_one_and_of_none():
    assert intervals.mean([0.25]) == {"value": 0.25, "low": None, "high": None, "n": 1}
    assert intervals.mean([])["value"] is None


def test_class_rates_by_kind():
    counts = {
        ("harmful", "comply"): 1,
        ("harmful", "partial"): 2,
        ("harmful", "good"): 4,
        ("harmful", "evasive"): 1,
        ("harmful", "off_topic"): 2,
        ("benign", "helpful"): 3,
        ("benign", "off_topic"): 1,
        ("borderline", "refused"): 1,
        ("borderline", "helpful"): 4,
    }
    rates = class_rates(counts)
    assert list(rates) == list(RATES)
    assert {name: (r["value"], r["n"]) for name, r in rates.items()} == {
        "harmful_compliance": (0.3, 10),
        "good_refusal": (0.4, 10),
        "evasive": (0.1, 10),
        "preachy": (0.0, 10),
        "off_topic": (0.2, 10),
        "benign_helpful": (0.75, 4),
        "benign_refused": (0.0, 4),
        "benign_off_topic": (0.25, 4),
        "borderline_helpful": (0.8, 5),
        "over_refusal": (0.2, 5),
        "borderline_off_topic": (0.0, 5),
    }


def test_show_is_percent_with_one_decimal():
    assert tables.show({"value": 0.9722, "low": 0.9514, "high": 0.9842, "n": 350}) == "97.2 % (95.1–98.4)"


def test_numbers_that_are_no_shares():
    assert tables.show_number({"value": 0.3517, "low": 0.301, "high": 0.4026, "n": 9}) == "0.352 (0.301–0.403)"
    assert tables.show_number({"value": 0.3517, "low": None, "high": None, "n": 1}) == "0.352"
    assert tables.show_number({"value": -0.1, "low": -0.2, "high": -0.05, "n": 9}) == "-0.100 (-0.200 to -0.050)"
    assert tables.show_number(1.5) == "1.500" and tables.show_number(None) == "–"
    assert tables.show({"value": 0.5, "low": None, "high": None, "n": 1}) == "50.0 %"


def test_table_aligns_columns():
    assert tables.table(("name", "n"), [("a", 5), ("longer", 10)]).splitlines() == [
        "name     n",
        "a        5",
        "longer  10",
    ]


# --- clusters --------------------------------------------------------------------------------------------


def test_clusters_of_one_row_are_independent_rows():
    # Cluster variance 0.3·0.7/10 · 10/9: wider than the independent one, by the nine for ten.
    found = intervals.clustered_rate([True] * 3 + [False] * 7, range(10))
    assert found["value"] == 0.3 and (found["n"], found["clusters"]) == (10, 10)
    assert found["low"] == pytest.approx(intervals.wilson(0.3, 9)["low"])
    assert found["high"] == pytest.approx(intervals.wilson(0.3, 9)["high"])


def test_rows_that_repeat_their_cluster_count_once():
    # Ten times the same row: sums ±10·d, so a hundredfold variance on a tenfold n: 4 clusters count as 3 rows.
    found = intervals.clustered_rate([True] * 20 + [False] * 20, [row // 10 for row in range(40)])
    assert found["low"] == pytest.approx(intervals.wilson(0.5, 3)["low"])
    assert (found["n"], found["clusters"]) == (40, 4)


def test_clusters_worked_by_hand():
    # Shares 1, 1/2, 0 in clusters of 2, 2, 4: mean 3/8, sums of (y − 3/8): 5/4, 1/4, −3/2.
    # Variance (25/16 + 1/16 + 36/16) / 64 · 3/2 = 62/16 · 3/128 = 0.0908203; (15/64) / 0.0908203 = 2.5806452 rows.
    found = intervals.clustered_rate([1, 1, 1, 0, 0, 0, 0, 0], list("aabbcccc"))
    assert found["low"] == pytest.approx(intervals.wilson(3 / 8, 2.5806452)["low"])


def test_all_alike_each_cluster_is_a_row():
    found = intervals.clustered_rate([1.0] * 12, list("aaaabbbbcccc"))
    assert found["low"] == pytest.approx(intervals.rate(3, 3)["low"]) and found["high"] == 1
    assert intervals.clustered_rate([], [])["value"] is None
    one = intervals.clustered_rate([True, False, True, False], ["a"] * 4)  # one cluster tells nothing of others
    assert one["low"] == pytest.approx(intervals.wilson(0.5, 1)["low"])


def test_balanced_clusters_do_not_pass_for_more_rows_than_there_are():
    # In each cluster one right and one wrong: no variance between them, and still no more than 6 rows.
    found = intervals.clustered_rate([1, 0, 1, 0, 1, 0], list("aabbcc"))
    assert found["high"] - found["low"] >= intervals.rate(3, 6)["high"] - intervals.rate(3, 6)["low"]


def test_a_mean_over_clusters_by_hand():
    # Mean 2, sums of (x − 2) by cluster: (1 − 2) + (2 − 2) = −1 and (2 − 2) + (3 − 2) = 1; variance 2/16 · 2/1.
    found = intervals.clustered_mean([1.0, 2.0, 2.0, 3.0], list("aabb"))
    assert found["value"] == 2 and (found["n"], found["clusters"]) == (4, 2)
    assert found["high"] - 2 == pytest.approx(1.959964 * 0.5, abs=1e-6)
    alone = intervals.clustered_mean([1.0, 2.0, 2.0, 3.0], range(4))
    assert {name: alone[name] for name in ("value", "low", "high", "n")} == pytest.approx(intervals.mean([1, 2, 2, 3]))
    assert (
        intervals.clustered_mean([1.0, 2.0], "aa")["low"] is None and intervals.clustered_mean([], [])["value"] is None
    )
    assert intervals.clustered_mean([0.5] * 5, range(5))["high"] == 0.5


# --- correlation -----------------------------------------------------------------------------------------


def test_correlation_by_hand():
    # x − 3 = −2 −1 0 1 2; y − 2 = −1 0 −1 2 0: products 2 + 0 + 0 + 2 + 0 = 4; squares 10 and 6: r = 4/√60.
    found = intervals.correlation([1, 2, 3, 4, 5], [1, 2, 1, 4, 2])
    r = 4 / math.sqrt(60)
    half = 1.959964 / math.sqrt(2)
    assert found["value"] == pytest.approx(r) and found["n"] == 5
    assert found["low"] == pytest.approx(math.tanh(math.atanh(r) - half), abs=1e-6)
    assert found["high"] == pytest.approx(math.tanh(math.atanh(r) + half), abs=1e-6)


def test_correlation_of_what_never_varies():
    assert intervals.correlation([1, 2, 3, 4], [5, 5, 5, 5])["value"] is None
    assert intervals.correlation([1, 2, 3], [1, 2, 3])["value"] is None
    assert intervals.correlation([1, 2, 3, 4], [-1, -2, -3, -4]) == {"value": -1, "low": -1, "high": -1, "n": 4}


# --- calibration -----------------------------------------------------------------------------------------


def test_ece_by_hand():
    # Bin 0.6–0.7: three rows, mean 0.65, two right: gap |0.65 − 2/3| = 1/60. Bin 0.9–1: two rows, mean 0.95, one
    # right: 0.45. ECE = (3 · 1/60 + 2 · 0.45) / 5 = 0.19.
    found = calibration.calibration([0.61, 0.65, 0.69, 0.9, 1.0], [True, False, True, True, False])
    assert found["ece"]["value"] == pytest.approx(0.19) and found["ece"]["n"] == 5
    assert found["ece"]["low"] <= 0.19 <= found["ece"]["high"]
    assert [one["outcome"]["n"] for one in found["bins"]] == [0, 0, 0, 0, 0, 0, 3, 0, 0, 2]
    last = found["bins"][9]
    assert (last["low"], last["high"], last["probability"]) == (0.9, 1.0, pytest.approx(0.95))
    assert last["outcome"] == intervals.rate(1, 2)
    assert found["bins"][0]["probability"] is None and found["bins"][0]["outcome"]["value"] is None


def test_soft_outcomes_that_are_the_probabilities_are_calibrated():
    values = [0.05 * n for n in range(21)]
    ece = calibration.calibration(values, values)["ece"]
    assert ece["value"] == pytest.approx(0, abs=1e-12) and ece["low"] == 0


def test_the_interval_tells_a_calibrated_model_from_another():
    draw = random.Random(0)
    said = [draw.random() for _ in range(1500)]
    honest = calibration.calibration(said, [draw.random() < p for p in said])
    assert honest["ece"]["low"] == 0 and honest["ece"]["high"] < 0.06
    assert honest["ece"]["value"] == pytest.approx(honest["ece_by_chance"], abs=0.02)
    boastful = calibration.calibration(said, [draw.random() < 0.5 for _ in said])  # true ECE: mean |p − 0.5| = 0.25
    assert 0.2 < boastful["ece"]["low"] < 0.25 < boastful["ece"]["high"] < 0.3
    assert calibration.calibration(said, [p > 0.5 for p in said]) == calibration.calibration(
        said, [p > 0.5 for p in said]
    )


@pytest.mark.parametrize(("p", "y"), [([0.5], []), ([1.1], [True]), ([0.5], [2]), ([float("nan")], [True])])
def test_what_is_no_probability_is_refused(p, y):
    with pytest.raises(ValueError):
        calibration.calibration(p, y)


def test_calibration_of_nothing():
    found = calibration.calibration([], [])
    assert found["ece"]["value"] is None and len(found["bins"]) == 10


# --- intervals hold the truth as often as they say --------------------------------------------------------


@pytest.mark.parametrize(("share", "n"), [(0.5, 300), (0.9, 300), (0.04, 300), (0.3, 60)])
def test_intervals_of_rates_hold_the_truth_as_often_as_they_say(share, n):
    """Exactly, by the binomial distribution: no simulation is needed."""
    weights = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    held = sum(w for k, w in enumerate(weights) if intervals.rate(k, n)["low"] <= share <= intervals.rate(k, n)["high"])
    assert 0.93 <= held <= 0.97


def test_clustered_intervals_hold_the_truth_as_often_as_they_say():
    held, independent = simulations.clustered_rates()
    assert 0.93 <= held <= 0.97
    assert independent < 0.85, "rows of one prompt are no independent rows"


def test_intervals_of_means_hold_the_truth_as_often_as_they_say():
    assert all(0.93 <= held <= 0.97 for held in simulations.means())
