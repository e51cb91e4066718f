"""Annotators with biases: a case by hand, and simulated ones whose faults are known."""

import math
import random

import pytest

from cai.stats import agreement
from cai.stats.annotators import Annotators, Vote, in_words


def votes(*labels):
    return [None if p is None else Vote(p) for p in labels]


def simulate(annotators, n=300, share_a=0.5, seed=0):
    """(rows of votes, whether a is better). An annotator is "A", "random", or its share of right votes."""
    rng = random.Random(seed)
    rows, truth = [], []
    for _ in range(n):
        is_a = rng.random() < share_a
        says_a = [
            True if kind == "A" else rng.random() < 0.5 if kind == "random" else (rng.random() < kind) == is_a
            for kind in annotators
        ]
        rows.append(votes(*map(float, says_a)))
        truth.append(is_a)
    return rows, truth


def accuracy(labels, truth):
    return sum(0.5 if p == 0.5 else (p > 0.5) == t for p, t in zip(labels, truth, strict=True)) / len(truth)


def findings(rows, golds=None):
    model = Annotators(rows, len(rows[0]))
    return [figures["finding"] for figures in model.describe(zip(rows, golds or [None] * len(rows), strict=True))]


def test_by_hand():
    """Two annotators that always agree, half A and half B, and a third that always says A."""
    rows = [votes(1.0, 1.0, 1.0), votes(0.0, 0.0, 1.0)] * 50
    model = Annotators(rows, 3)
    # 50 right votes of 50 under either truth, and one of each of the eight kinds to begin with: 51/58 against 1/58.
    # (What is known of each row is 0.9996 and not 1: hence the tolerance.)
    log_odds = math.log(51)
    assert model.belief(votes(1.0, None, None)) == pytest.approx(1 / (1 + math.exp(-log_odds)), abs=1e-3)
    assert model.belief(votes(1.0, 1.0, None)) == pytest.approx(1 / (1 + math.exp(-2 * log_odds)), abs=1e-3)
    assert model.belief(votes(0.0, None, 1.0)) == pytest.approx(1 / (1 + math.exp(log_odds)), abs=1e-3)
    assert model.belief(votes(None, None, 1.0)) == pytest.approx(0.5, abs=1e-6), "one that always says A"
    assert model.belief(votes(None, None, None)) is None
    good, _, constant = model.describe((row, None) for row in rows)
    assert good["finding"] is None and constant["finding"] == "constant"
    assert (good["right_when_a"]["value"], good["right_when_b"]["value"], good["separation"]["value"]) == (1, 1, 1)
    assert (constant["right_when_a"]["value"], constant["right_when_b"]["value"]) == (1, 0)
    assert constant["separation"]["value"] == 0 and constant["says_a"]["value"] == 1 and constant["votes"] == 100


def test_a_swapped_row_is_an_answer_for_the_other_response():
    """An annotator that always says A, and saw response_b first in half of the rows: in the pairs' order it varies."""
    rows = []
    for n in range(200):
        is_swapped = n % 4 < 2
        good = votes(float(n % 2), float(n % 2))
        rows.append([*good, Vote(float(not is_swapped), is_swapped)])
    model = Annotators(rows, 3)
    constant = model.describe((row, None) for row in rows)[2]
    assert constant["finding"] == "constant" and constant["says_a"]["value"] == 1
    assert model.belief([None, None, Vote(0.0, is_swapped=True)]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_three_good_ones_with_a_constant_a_random_and_an_inverted_one(seed):
    rows, truth = simulate([0.85, 0.85, 0.8, "A", "random", 0.15], seed=seed)
    assert findings(rows) == [None, None, None, "constant", "random", "inverted"]
    model = Annotators(rows, 6)
    good = [row[:3] for row in rows]
    model_of_good = Annotators(good, 3)
    reached = accuracy(map(model.belief, rows), truth)
    # The inverted one is of use: turned round it is a fourth good one.
    assert reached >= accuracy(map(model_of_good.belief, good), truth) - 0.03
    assert reached > accuracy([agreement.mean([vote.p for vote in row]) for row in rows], truth) + 0.1
    assert model.belief(votes(None, None, None, None, None, 1.0)) < model.belief(votes(*[None] * 5, 0.0))


@pytest.mark.parametrize("share_a", [0.25, 0.5, 0.75])
def test_two_that_always_say_a_count_for_nothing(share_a):
    """Where both orders were averaged the older model is right; of such labels it takes the two for the best judges."""
    rows, truth = simulate([0.85, 0.8, 0.75, "A", "A"], n=400, share_a=share_a)
    model, good = Annotators(rows, 5), Annotators([row[:3] for row in rows], 3)
    reached = accuracy(map(model.belief, rows), truth)
    assert reached == pytest.approx(accuracy((good.belief(row[:3]) for row in rows), truth), abs=0.02)
    labels = [[vote.p for vote in row] for row in rows]
    assert reached > accuracy(map(agreement.DawidSkene(labels, 5), labels), truth) + 0.1
    assert findings(rows) == [None, None, None, "constant", "constant"]


def test_one_side_may_be_better_more_often():
    rows, truth = simulate([0.9, 0.85, 0.8], n=400, share_a=0.9)
    assert accuracy(map(Annotators(rows, 3).belief, rows), truth) > 0.92
    assert findings(rows) == [None] * 3, "one that says A in 85 % of pairs is right to"


def test_gold_labels_tell_what_the_others_cannot():
    rows, truth = simulate([0.85, 0.15], n=200)
    assert findings(rows) == [None, None], "one of the two is inverted, and nobody knows which"
    assert findings(rows, ["a" if is_a else "b" for is_a in truth]) == [None, "inverted"]
    alone, truth = simulate(["random"], n=200)
    assert findings(alone) == [None] and findings(alone, ["a" if is_a else "b" for is_a in truth]) == ["random"]
    assert findings(simulate(["A"], n=50)[0]) == ["constant"]


def test_without_votes():
    assert findings([votes(None, 0.5)]) == [None, None]
    assert Annotators([], 2).belief(votes(1.0, None)) == 0.5


def test_a_finding_in_words():
    rows = [votes(1.0, 1.0, 1.0), votes(0.0, 0.0, 1.0)] * 50
    figures = Annotators(rows, 3).describe((row, None) for row in rows)[2]
    assert in_words("carol", figures, "mean") == (
        "carol is constant: it gives the same answer whatever the others say (says A in 100 % (96–100) of 100 "
        "verdicts, separation 0.00 (-0.07 to 0.07)); it counts in full with --combine mean"
    )
    assert in_words("carol", figures, "dawid-skene").endswith("it counts for nearly nothing")
