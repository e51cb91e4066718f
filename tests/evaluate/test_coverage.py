"""Coverage by hand: the indifference of a model, what is unsure, and the counts."""

import pytest

from cai.constitution.files import Constitution, Principle
from cai.evaluate.coverage import UNSURE, coverage_counts, is_covered, measure_indifference

RULES = Constitution("two", "", "", tuple(Principle(name, "c", "r", "p") for name in "ab"))


def test_the_indifference_is_the_wider_of_percentiles_and_spread():
    # 21 values: the 5th percentile is the second of them, the 95th the last but one.
    undecided = measure_indifference([0.4] * 10 + [0.5] + [0.6] * 10)
    assert (undecided["n"], undecided["certain"]["value"]) == (21, 0)
    # Mean 0.5, variance 20 · 0.01 / 21, twice the standard deviation 0.19518.
    assert undecided["low"] == pytest.approx(0.30482, abs=1e-4) and undecided["high"] == pytest.approx(
        0.69518, abs=1e-4
    )
    # One stray value of 40: mean 0.0035, variance 0.0196/40 − 0.0035², standard deviation 0.02186.
    stray = measure_indifference([0.0] * 39 + [0.14])
    assert (stray["low"], stray["high"]) == (0.0, pytest.approx(0.04721, abs=1e-4))
    # A tenth of them far away: the percentile is beyond the spread.
    skewed = measure_indifference([0.0] * 36 + [0.8] * 4)
    assert skewed["high"] == 0.8


def test_certainty_about_nonsense_is_counted_and_not_called_indifference():
    certain = measure_indifference([0.99] * 9 + [0.5])
    assert certain["high"] == 0.9 and certain["certain"]["value"] == 0.9
    assert measure_indifference([]) == {
        "low": None,
        "high": 0.9,
        "n": 0,
        "certain": certain["certain"] | dict(value=None, low=None, high=None, n=0),
    }


@pytest.mark.parametrize(
    ("probabilities", "covered"),
    [([0.9, 0.1], True), ([0.61], True), ([0.6, 0.2], UNSURE), ([0.5], UNSURE), ([0.49], False), ([], None)],
)
def test_what_nonsense_reaches_too_is_unsure(probabilities, covered):
    assert is_covered(probabilities, 0.5, 0.6) == covered


def test_where_nonsense_stays_low_the_threshold_decides():
    assert is_covered([0.5], 0.5, 0.1) is True and is_covered([0.4], 0.5, 0.1) is False


def test_coverage_is_counted_over_what_could_be_asked():
    rows = [
        {"covered": True, "by": {"a": 0.9, "b": 0.5}, "label_mass": 1.0},
        {"covered": False, "by": {"a": 0.2, "b": 0.1}, "label_mass": 0.5},
        {"covered": UNSURE, "by": {"a": 0.6, "b": 0.1}, "label_mass": 0.75},
        {"covered": None, "by": {}, "label_mass": None},
    ]
    counts = coverage_counts(rows, RULES, 0.5, {"high": 0.7})
    assert (counts["prompts"], counts["failed"], counts["label_mass"]) == (4, 1, 0.75)
    assert (counts["uncovered"]["value"], counts["uncovered"]["n"]) == (pytest.approx(1 / 3), 3)
    assert counts["unsure"]["value"] == pytest.approx(1 / 3)
    assert counts["speaks_to"] == {"a": 1, "b": 0}
