"""stats/preference.py: outright and relative preference worked by hand."""

import math

import pytest

from cai.stats import intervals, preference


def pair(prompt, logps, reference=None, tokens=(2, 1), characters=(8, 4)):
    return preference.PairLogprobs(prompt, logps, tokens, characters, reference)


def test_figures_by_hand():
    pairs = [
        pair("p", (-4.0, -3.0), (-6.0, -3.5)),  # unlikelier, likelier per token, moved by 1.5
        pair("q", (-2.0, -3.0), (-3.0, -2.5), tokens=(1, 1)),  # likelier, which it was not before, moved by 1.5
        pair("r", (-5.0, -1.0), (-3.0, -3.0), tokens=(2, 2)),  # moved away by 4
        pair("s", (-2.0, -2.0), (-2.0, -2.0), tokens=(2, 2), characters=(4, 4)),  # a tie is no success
    ]
    figures = preference.figures(pairs)
    assert {name: figure["value"] for name, figure in figures.items()} == pytest.approx(
        {
            "outright": 1 / 4,
            "outright_per_token": 2 / 4,
            "logp_chosen": -13 / 4,
            "logp_chosen_per_token": (-2 - 2 - 2.5 - 1) / 4,
            "logp_rejected": -9 / 4,
            "logp_rejected_per_token": (-3 - 3 - 0.5 - 1) / 4,
            "relative": 2 / 4,
            "outright_reference": 0,
            "outright_change": 1 / 4,
            "logp_margin": (1.5 + 1.5 - 4 + 0) / 4,
            "logp_chosen_change": (2 + 1 - 2 + 0) / 4,
            "logp_rejected_change": (0.5 - 0.5 + 2 + 0) / 4,
            "longer": 3 / 4,
        }
    )
    assert all(figure["n"] == figure["clusters"] == 4 for figure in figures.values())
    alone = preference.figures([pair("p", (-4.0, -3.0))])
    assert "relative" not in alone and alone["outright"]["value"] == 0


def test_pairs_of_one_prompt_count_as_alike():
    apart, alike = (
        preference.figures([pair(f"{n % prompts}", (-1.0 - n % 2, -1.5), (-1.0, -1.0)) for n in range(24)])
        for prompts in (24, 4)
    )
    for name in ("outright", "relative", "outright_change", "logp_margin"):
        assert alike[name]["value"] == apart[name]["value"], name
        assert alike[name]["high"] - alike[name]["low"] > 1.5 * (apart[name]["high"] - apart[name]["low"]), name


def test_paired_with_clusters_by_hand():
    # Differences 1, 1, 0, 0 and the added 1 and −1: mean 1/3, clusters {1, 1}, {0, 0}, {1}, {−1}.
    low, high = intervals.paired([1, 1, 0, 0], clusters=["a", "a", "b", "b"])
    squares = (4 / 3) ** 2 + (-2 / 3) ** 2 + (2 / 3) ** 2 + (-4 / 3) ** 2
    half = 1.959964 * math.sqrt(squares / 36 * 4 / 3)
    assert (low, high) == pytest.approx((1 / 3 - half, 1.0), abs=1e-6)
    assert intervals.paired_means([3.0, 1.0])[0] == pytest.approx(2 - 1.959964 * 1)
    assert intervals.paired_means([3.0, 1.0], clusters=["a", "a"]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("successes", "expected"), [(10, "yes: in 90.9 %"), (7, "not shown: in 63.6 %"), (5, "no: in 45.5 %")]
)
def test_the_answer_in_words(successes, expected):
    assert preference.answer(intervals.rate(successes, 11)).startswith(expected)
