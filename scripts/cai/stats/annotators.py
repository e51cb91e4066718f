"""Labels of annotators whose biases are unknown: a confusion matrix for each, and who is constant, random or inverted.

    model = Annotators(rows, annotators=3)
    model.belief([Vote(1.0), Vote(0.2), None])     # the probability that response_a is better
    model.describe(zip(rows, golds))

agreement.py treats both responses alike, because a judge that was asked in both orders has no side left. Labels that
somebody else made have one: an annotator that always answers A is right whenever A is. Here the share of right votes
is estimated for either truth (Dawid and Skene 1979, Applied Statistics 28, 20–28), and such votes count for nothing.
Leaves out what agreement.py leaves out too: annotators that err together, and how hard a pair is.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np

from cai.stats import agreement, intervals

# A label is named constant where one answer has this share of the votes, and what the others say makes a difference
# below `LEAST_SEPARATION` to it.
CONSTANT_SHARE, LEAST_SEPARATION = 0.9, 0.5

STEPS = 5  # of expectation maximisation

SURE = 0.8  # what the others say counts as known from this probability on

_STRENGTHS = 4  # of votes, see `binary_vote`

FINDINGS = {
    "constant": "it gives the same answer whatever the others say",
    "inverted": "it contradicts the others: are its labels exchanged?",
    "random": "it is no better than chance, as far as these pairs show",
}


@dataclass(frozen=True)
class Vote:
    """One label.

    p: probability that response_a is better. is_swapped: whether the annotator saw response_b first, so that its
    answer A is for response_b.
    """

    p: float
    is_swapped: bool = False


Votes = Sequence[Vote | None]  # one per annotator; None where there is no label


class Annotators:
    """Confusion matrices, found by expectation maximisation from the votes alone.

    An annotator gives a vote of one of eight kinds (A or B, at four strengths) with probabilities that depend on which
    response is better, independently of the others. Each kind starts with one vote under either truth, so that a few
    rows prove nothing. An inverted annotator gets a negative weight: its votes count for the other response. Most must
    be better than chance.

    The votes alone hardly tell an annotator's bias from a set in which one side is better more often. So the search
    begins where `DawidSkene` ends without the constant annotators, keeps the share of better response_a from there,
    and takes `STEPS` steps only: with three annotators the matrices can fit any votes, and many steps fit their noise.

    Args:
        rows: all rows; read once.
        annotators: the number of votes in a row.
    """

    def __init__(self, rows: Iterable[Votes], annotators: int):
        times_of: Counter = Counter()
        labels_of: dict[tuple, list[float | None]] = {}
        for row in rows:
            pattern = tuple(map(_encode, row))
            times_of[pattern] += 1
            labels_of.setdefault(pattern, [vote and vote.p for vote in row])
        codes = np.array(list(times_of), int).reshape(-1, annotators, 2)
        times = np.array(list(times_of.values()), float)
        kinds, turns = codes[..., 0], codes[..., 1]
        beliefs = _first_guess(list(labels_of.values()), kinds, turns, times)
        is_a = times @ beliefs
        self._prior = math.log((1 + is_a) / (1 + times.sum() - is_a))
        is_cast = kinds[..., None] == _KINDS
        for _ in range(STEPS):
            a_is_first = np.where(turns > 0, beliefs[:, None], 1 - beliefs[:, None])
            counts = [1 + np.einsum("p,pj,pjk->jk", times, share, is_cast) for share in (a_is_first, 1 - a_is_first)]
            shares = [count / count.sum(1, keepdims=True) for count in counts]
            self._log_odds = np.log(shares[0] / shares[1])  # (annotators, kinds)
            beliefs = _sigmoid(self._prior + self._evidence(kinds, turns).sum(1))

    def belief(self, votes: Votes, without: int | None = None) -> float | None:
        """The probability that response_a is better; None where nobody has a label.

        without: an annotator whose vote is left out.
        """
        votes = [None if number == without else vote for number, vote in enumerate(votes)]
        if not any(votes):
            return None
        codes = np.array([[_encode(vote) for vote in votes]])
        return float(_sigmoid(self._prior + self._evidence(codes[..., 0], codes[..., 1]).sum(1))[0])

    def _evidence(self, kinds, turns):
        """The log-odds that each vote adds for response_a, shape (rows, annotators)."""
        numbers = np.searchsorted(_KINDS, np.where(kinds, kinds, 1))
        return np.where(kinds, turns * self._log_odds[np.arange(kinds.shape[1]), numbers], 0.0)

    def describe(self, rows: Iterable[tuple[Votes, str | None]]) -> list[dict]:
        """For each annotator {votes, says_a, right_when_a, right_when_b, separation, finding}.

        says_a: share of its votes that are for what it saw first. right_when_a, right_when_b: share of right votes
        where the better response stood first, and second. separation: right_when_a + right_when_b − 1, which is 1 for
        one that is always right, 0 for one that is constant or random, −1 for one that is inverted; all with 95 %
        intervals. finding: of `FINDINGS`, or None.

        What is right is the row's gold label where it has one, else what the other annotators say, where they are sure
        by `SURE`. Without gold labels fewer than three annotators can't tell who is wrong: then only "constant" is
        found.

        Args:
            rows: (votes, gold label: "a", "b" or None); read once.
        """
        tables: list[Counter] = [Counter() for _ in self._log_odds]
        has_gold = False
        for votes, gold in rows:
            has_gold |= gold is not None
            for number, vote in enumerate(votes):
                if vote is None or vote.p == 0.5:
                    continue
                belief = float(gold == "a") if gold else self.belief(votes, without=number)
                is_known = belief is not None and max(belief, 1 - belief) >= SURE
                truth = None if not is_known else (belief > 0.5) != vote.is_swapped
                tables[number][truth, (vote.p > 0.5) != vote.is_swapped] += 1
        return [_describe(table, has_gold or len(tables) > 2) for table in tables]


def _describe(table: Counter, is_told: bool) -> dict:
    """One annotator's figures from {(whether a is better, or None; whether it says a): votes}.

    is_told: whether the table can tell right from wrong.
    """
    votes = sum(table.values())
    says_a = intervals.rate(sum(n for (_, is_a), n in table.items() if is_a), votes)
    when_a, when_b = (
        intervals.rate(table[truth, truth], table[truth, True] + table[truth, False]) for truth in (True, False)
    )
    separation = {"value": None, "low": None, "high": None, "n": when_a["n"] + when_b["n"]}
    if when_a["n"] and when_b["n"]:
        wrong_b = intervals.rate(table[False, True], when_b["n"])
        low, high = intervals.unpaired(wrong_b, when_a)
        separation |= {"value": when_a["value"] - wrong_b["value"], "low": low, "high": high}
    figures = {"says_a": says_a, "right_when_a": when_a, "right_when_b": when_b, "separation": separation}
    return {"votes": votes, **figures, "finding": _find(says_a, separation, is_told)}


def _find(says_a: dict, separation: dict, is_told: bool) -> str | None:
    if not says_a["n"]:
        return None
    is_known = separation["value"] is not None
    if max(says_a["value"], 1 - says_a["value"]) >= CONSTANT_SHARE and (
        not is_known or separation["high"] < LEAST_SEPARATION
    ):
        return "constant"
    if not is_known or not is_told or separation["low"] > 0:
        return None
    return "inverted" if separation["high"] < 0 else "random"


_KINDS = np.array([sign * strength for sign in (-1, 1) for strength in range(1, _STRENGTHS + 1)])
_KINDS.sort()


def _encode(vote: Vote | None) -> tuple[int, int]:
    """(its kind as the annotator gave it, 1 or −1 where it saw response_b first); kind 0 is no vote."""
    if vote is None:
        return 0, 1
    kind = agreement.binary_vote(vote.p)
    return (-kind, -1) if vote.is_swapped else (kind, 1)


def _first_guess(labels, kinds, turns, times):
    """The probability that response_a is better in each pattern of votes, by the annotators that are not constant."""
    is_constant = [_is_constant(number, kinds, turns, times) for number in range(kinds.shape[1])]
    labels = [[None if out else p for p, out in zip(row, is_constant, strict=True)] for row in labels]
    rows = chain.from_iterable(repeat(row, int(n)) for row, n in zip(labels, times, strict=True))
    model = agreement.DawidSkene(rows, kinds.shape[1])
    return np.array([0.5 if (p := model(row)) is None else p for row in labels])


def _is_constant(number, kinds, turns, times):
    """Whether an annotator gives nearly always one answer, and it does not go with the others' by more than chance."""
    own, times = np.sign(kinds[:, number]), times * (kinds[:, number] != 0)
    n = times.sum()
    if not n or abs(times @ own) / n < 2 * CONSTANT_SHARE - 1:
        return False
    others = (np.sign(kinds) * turns).sum(1) * turns[:, number] - own
    own, others = (votes - times @ votes / n for votes in (own, others))
    spread = math.sqrt((times @ own**2) * (times @ others**2))
    return not spread or (times @ (own * others)) / spread * math.sqrt(n) < intervals.Z


def _sigmoid(x):
    return 0.5 + 0.5 * np.tanh(x / 2)


def in_words(name: str, figures: dict, combine: str) -> str:
    """One sentence about an annotator that has a finding."""

    def share(rate: dict) -> str:
        return f"{100 * rate['value']:.0f} % ({100 * rate['low']:.0f}–{100 * rate['high']:.0f})"

    finding, separation = figures["finding"], figures["separation"]
    numbers = f"says A in {share(figures['says_a'])} of {figures['votes']} verdicts"
    if separation["value"] is not None and math.isfinite(separation["low"]):
        numbers += f", separation {separation['value']:.2f} ({separation['low']:.2f} to {separation['high']:.2f})"
    weight = {"inverted": "counts for the other response"}.get(finding, "counts for nearly nothing")
    effect = weight if combine == "dawid-skene" else f"counts in full with --combine {combine}"
    return f"{name} is {finding}: {FINDINGS[finding]} ({numbers}); it {effect}"
