"""Bradley–Terry scores: hand-worked numbers, known strengths found again, and what can't be known said."""

import math

import numpy as np
import pytest
import simulations

from cai.stats.elo import Comparison, fit, rate


def outcomes(a, b, wins, losses, ties=0, start=0):
    """One comparison a prompt."""
    ps = [1.0] * wins + [0.0] * losses + [0.5] * ties
    return [Comparison(a, b, p, f"p{start + i}") for i, p in enumerate(ps)]


def by_name(scores):
    return {one.policy: one for one in scores}


def test_two_policies_by_hand():
    # 30 wins, 10 losses, and half a win more on either side: 400·log10(30.5 / 10.5) = 185.25
    scores, notes = rate(outcomes("new", "base", 30, 10), anchor="base")
    new, base = by_name(scores)["new"], by_name(scores)["base"]
    assert base.score == base.low == base.high == 0
    assert new.score == pytest.approx(185.25, abs=0.01)
    assert (new.wins, new.losses, new.ties) == (30, 10, 0) and not notes
    assert [one.policy for one in scores] == ["new", "base"], "best first"
    # The interval of log-odds by the delta method: 1.96·√(1/30 + 1/10)·173.7 = 124; the bootstrap's is near.
    assert (new.high - new.low) / 2 == pytest.approx(124, rel=0.2)


def test_ties_and_soft_labels_are_shares_of_a_win():
    tied = by_name(rate(outcomes("a", "b", 20, 10, ties=10), anchor="b")[0])["a"]
    assert tied.ties == 10
    assert tied.score == pytest.approx(400 * math.log10(25.5 / 15.5))
    soft = by_name(rate([Comparison("a", "b", 0.625, f"p{i}") for i in range(40)], anchor="b")[0])["a"]
    assert soft.score == pytest.approx(tied.score)
    assert soft.high - soft.low == pytest.approx(0, abs=1e-6), "every prompt says the same"


def test_at_the_optimum_expected_wins_are_the_wins():
    """The likelihood equations, which hold nowhere else; lopsided counts, a chain without all pairs."""
    wins = np.array([[0, 90, 0, 0], [0.5, 0, 70, 3], [0, 30, 0, 1], [0, 0.5, 9, 0]])
    strengths = fit(wins, [0])
    p = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    assert ((wins + wins.T) * p).sum(1) == pytest.approx(wins.sum(1))
    assert strengths[0] == 0
    assert fit(np.stack([wins, 2 * wins]), [0]) == pytest.approx(np.stack([strengths, strengths]))


def test_an_extreme_and_long_chain_converges():
    wins = np.zeros((12, 12))
    for i in range(11):
        wins[i, i + 1], wins[i + 1, i] = 10_000, 0.5
    strengths = fit(wins, [11])
    assert -np.diff(strengths) == pytest.approx(np.full(11, math.log(20_000)))


def test_known_strengths_are_found_within_the_interval():
    """Over 200 simulations the 95 % intervals hold the truth as often as they say."""
    held, errors = simulations.strengths()
    # 400 intervals, two a simulation: 0.95 within three standard errors of 200 independent ones
    assert 0.904 <= held <= 0.996
    assert abs(np.mean(errors)) < 4, "no bias to speak of: the standard error of one score is about 26"


def test_intervals_are_clustered_by_prompt():
    """Ten copies of each comparison on its prompt tell no more than one."""
    once = outcomes("a", "b", 30, 20)
    copied = [one for one in once for _ in range(10)]
    width = {}
    for name, rows in (("once", once), ("copied", copied)):
        a = by_name(rate(rows, anchor="b", resamples=2000)[0])["a"]
        width[name] = a.high - a.low
    assert width["copied"] == pytest.approx(width["once"], rel=0.1)
    independent = [Comparison(one.a, one.b, one.p, f"{one.prompt}/{i}") for one in once for i in range(10)]
    a = by_name(rate(independent, anchor="b", resamples=2000)[0])["a"]
    assert a.high - a.low < 0.5 * width["copied"]


def test_a_clean_sweep_is_finite_open_above_and_said():
    scores, notes = rate(outcomes("winner", "base", 20, 0), anchor="base")
    winner = by_name(scores)["winner"]
    assert winner.score == pytest.approx(400 * math.log10(20.5 / 0.5))
    assert winner.high is None and winner.low is not None
    assert len(notes) == 1 and "winner" in notes[0] and "not above" in notes[0]
    loser = by_name(rate(outcomes("base", "loser", 20, 0), anchor="base")[0])["loser"]
    assert loser.low is None and loser.high is not None


def test_one_tie_bounds_a_sweep():
    winner = by_name(rate(outcomes("winner", "base", 20, 0, ties=1), anchor="base")[0])["winner"]
    assert winner.high is not None


def test_a_sweep_in_the_middle_leaves_what_lies_beyond_it_open():
    rows = [*outcomes("b", "a", 15, 5), *outcomes("c", "b", 20, 0, start=20), *outcomes("d", "c", 12, 8, start=40)]
    scores, notes = rate(rows, anchor="a")
    found = by_name(scores)
    assert found["b"].high is not None
    assert found["c"].high is None and found["d"].high is None
    assert sum("not above" in note for note in notes) == 2


def test_policies_that_never_met_are_in_groups_and_said():
    rows = [*outcomes("a", "b", 12, 8), *outcomes("x", "y", 5, 15, start=20)]
    scores, notes = rate(rows, anchor="b")
    found = by_name(scores)
    assert found["a"].group == found["b"].group == 0 and found["x"].group == found["y"].group == 1
    assert found["b"].score == 0 and found["x"].score == 0, "each group has an anchor of its own"
    assert found["a"].score == pytest.approx(400 * math.log10(12.5 / 8.5))
    assert len(notes) == 1 and "never compared" in notes[0]
    assert [one.group for one in scores] == [0, 0, 1, 1]


def test_one_prompt_gives_no_interval():
    rows = [Comparison("a", "b", p, "same") for p in (1, 0, 1)]
    scores, notes = rate(rows)
    assert all(one.low is None and one.high is None for one in scores if one.policy != "a")
    assert notes == ["All comparisons are on one prompt: no interval can be given."]


def test_the_same_seed_gives_the_same_interval_and_order_does_not_matter_to_scores():
    rows = simulations.simulate({"a": 0, "b": 50, "c": 90}, 30, np.random.default_rng(2))
    assert rate(rows, seed=3) == rate(rows, seed=3)
    assert rate(rows, seed=3) != rate(rows, seed=4)
    back = by_name(rate(rows[::-1], anchor="a")[0])
    assert {name: one.score for name, one in back.items()} == pytest.approx(
        {one.policy: one.score for one in rate(rows, anchor="a")[0]}
    )


@pytest.mark.parametrize(
    ("rows", "anchor", "said"),
    [
        ([], None, "no comparisons"),
        ([Comparison("a", "a", 1, "p1")], None, "'a' compared with itself, on prompt 'p1'"),
        ([Comparison("a", "b", 1.5, "p1")], None, "p = 1.5"),
        ([Comparison("a", "b", float("nan"), "p1")], None, "p = nan"),
        ([Comparison("a", "b", 1, "p1")], "c", "'c'"),
    ],
)
def test_what_is_no_comparison_is_refused(rows, anchor, said):
    with pytest.raises(ValueError, match=said):
        rate(rows, anchor=anchor)
