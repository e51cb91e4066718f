"""Several judges: votes by hand, and judges whose skill is known."""

import math
import random

import pytest

from cai.stats import agreement
from cai.stats.agreement import DawidSkene


def combine(way, rows):
    return list(map(agreement.combiner(way, lambda: rows, len(rows[0])), rows))


def test_mean_and_majority():
    rows = [[0.9, 0.8, 0.1], [0.9, None, 0.4], [None, None, None], [0.6, 0.5, 0.2], [0.9, 0.1, None]]
    assert combine("mean", rows) == [pytest.approx(0.6), pytest.approx(0.65), None, pytest.approx(13 / 30), 0.5]
    assert combine("majority", rows) == [pytest.approx(2 / 3), 0.5, None, 0.5, 0.5]


def test_votes_have_strengths():
    assert [agreement.binary_vote(p) for p in (None, 0.5, 0.51, 0.65, 0.8, 0.95, 1.0)] == [0, 0, 1, 2, 3, 4, 4]
    assert [agreement.binary_vote(p) for p in (0.49, 0.3, 0.2, 0.0)] == [-1, -2, -3, -4]


def test_agreement_is_that_of_the_published_example():
    """Krippendorff 2011, section A: two observers, ten units, two values: 0.095."""
    meg, owen = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    votes: dict = {}
    for pair in zip(meg, owen, strict=True):
        vote = (pair.count(0), pair.count(1))
        votes[vote] = votes.get(vote, 0) + 1
    found = agreement.agreement({**votes, (1, 0): 7, (0, 0): 3})  # alone or silent: no agreement to speak of
    assert found["value"] == pytest.approx(0.095, abs=5e-4) and found["n"] == 10
    assert found["low"] < found["value"] < found["high"]


def test_agreement_by_hand():
    # Three judges: 4 pairs 3:0, 4 pairs 0:3, 2 pairs 2:1. Disagreement 2 · 2·1/2 = 2 of 30 votes, 16 and 14.
    found = agreement.agreement({(3, 0): 4, (0, 3): 4, (2, 1): 2})
    assert found["value"] == pytest.approx(1 - 2 * 29 / (16 * 14)) and found["n"] == 10
    assert agreement.agreement({(2, 0): 5, (0, 2): 5})["value"] == 1
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert agreement.agreement({}) == nothing == agreement.agreement({(1, 0): 9})
    assert agreement.agreement({(2, 0): 9}) == {**nothing, "n": 9}


def test_votes_of_labels():
    assert agreement.votes([0.9, 0.5, None, 0.2, 0.7]) == (2, 1)


def judged(accuracies, n=4000, seed=0, hard=False):
    """(labels, whether a is better): judges that err independently, and are less sure when they err."""
    rng = random.Random(seed)
    rows, truth = [], []
    for _ in range(n):
        truth.append(rng.random() < 0.5)
        row = []
        for accuracy in accuracies:
            right = rng.random() < accuracy
            sure = 1.0 if hard else 0.5 + (rng.betavariate(4, 1) if right else rng.betavariate(1, 2)) / 2
            row.append(sure if right == truth[-1] else 1 - sure)
        rows.append(row)
    return rows, truth


def accuracy(labels, truth):
    return sum(0.5 if p == 0.5 else (p > 0.5) == t for p, t in zip(labels, truth, strict=True)) / len(truth)


def test_dawid_skene_finds_how_good_the_judges_are():
    for hard in (True, False):
        rows, _ = judged([0.95, 0.85, 0.7], hard=hard)
        found = DawidSkene(rows, 3).accuracy
        assert found == pytest.approx([0.95, 0.85, 0.7], abs=0.03)


@pytest.mark.parametrize("accuracies", [(0.97, 0.95, 0.05), (0.95, 0.93, 0.5), (0.9, 0.6, 0.6, 0.6)])
def test_a_bad_judge_does_little_harm(accuracies):
    rows, truth = judged(accuracies)
    found = {way: accuracy(combine(way, rows), truth) for way in agreement.WAYS}
    best = max(accuracy([row[j] for row in rows], truth) for j in range(len(accuracies)))
    assert found["dawid-skene"] >= best - 0.005
    assert found["dawid-skene"] > found["majority"] + 0.01


def test_names_of_the_responses_change_nothing():
    rows, _ = judged([0.9, 0.7, 0.6], n=300)
    mirrored = [[1 - p for p in row] for row in rows]
    for way in agreement.WAYS:
        assert combine(way, mirrored) == pytest.approx([1 - p for p in combine(way, rows)], abs=1e-6)


def test_dawid_skene_by_hand():
    """Two sure judges that always agree, and a third that is as often against them as with them."""
    rows = [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]] * 50
    found = DawidSkene(rows, 3)
    assert found.accuracy == pytest.approx([1, 1, 0.5], abs=1e-3)
    # 200 right votes and one of each to begin with: a log-odds of log 201 for each of the two, 0 for the third.
    assert found([1.0, None, 0.0]) == pytest.approx(1 / (1 + 1 / 201), abs=1e-4)
    assert found([None, None, 1.0]) == pytest.approx(0.5, abs=1e-3)
    assert found([None, None, None]) is None
    # A strength that no row had says nothing.
    assert found([0.55, None, None]) == pytest.approx(0.5)


def test_dawid_skene_of_little_is_cautious():
    assert DawidSkene([], 2)([1.0, None]) == 0.5 and DawidSkene([], 2).accuracy == [None, None]
    [p] = combine("dawid-skene", [[1.0, 1.0]])
    assert 0.5 < p < 0.9
    assert combine("dawid-skene", [[0.5, None], [None, None]]) == [0.5, None]
    assert not any(math.isnan(p) for p in combine("dawid-skene", [[0.0, 1.0]] * 9))
