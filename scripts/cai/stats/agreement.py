"""Several judges as one: mean, majority, Dawid–Skene, and how far they agree.

    combine = combiner("dawid-skene", lambda: rows, judges=3)
    label = combine([0.9, 0.8, None])

One row per pair, one column per judge: the probability that response_a is better, after averaging both orders; None
where a judge gave no readable verdict. Everything is symmetric in a and b, since averaging the orders makes each
judge symmetric: exchanging the names of the responses turns every label p into 1 − p and changes nothing else.

Memory holds how often each pattern of votes occurs, not the rows. Leaves out judges' dependence on each other
(two checkpoints of one model err together, and Dawid–Skene then takes their agreement for evidence), how hard a pair
is, and gold labels: none are needed, and none are used.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

WAYS = ("mean", "majority", "dawid-skene")

Labels = Sequence[float | None]

# From these probabilities of the preferred side on, a vote counts as a stronger one.
_STRENGTHS = (0.6, 0.75, 0.9)


def combiner(way: str, rows: Callable[[], Iterable[Labels]], judges: int) -> Callable[[Labels], float | None]:
    """A function (of `DawidSkene`, an object) from one row of labels to the combined one.

    Args:
        way: one of `WAYS`.
        rows: makes an iterator over all rows; called once, by dawid-skene only.
    """
    return DawidSkene(rows(), judges) if way == "dawid-skene" else {"mean": mean, "majority": majority}[way]


def mean(labels: Labels) -> float | None:
    """The mean of the labels there are; None if there is none."""
    known = [p for p in labels if p is not None]
    return math.fsum(known) / len(known) if known else None


def majority(labels: Labels) -> float | None:
    """The share of judges that prefer response_a; one that can't decide counts half. None without any label."""
    return mean([None if p is None else 0.5 * ((p > 0.5) + (p >= 0.5)) for p in labels])


class DawidSkene:
    """Judges weighed by how they agree, with no gold labels: Dawid and Skene 1979 (Applied Statistics 28, 20–28).

    Each pair has a true, unseen answer; a judge gives a vote of one of four strengths, right or wrong, with
    probabilities of its own, independently of the others. Expectation maximisation finds them from the votes alone.
    Two things differ from the original: the two answers are treated alike (see the module), which halves the number
    of parameters, and votes have strengths, so that a judge that errs when it is unsure is trusted when it is sure.
    Each count starts with one right and one wrong vote, so that a few rows prove nothing.

    It begins from the mean vote, and so takes the majority to be right more often than not. Where most judges are
    worse than chance no method without gold labels can tell.

    Args:
        rows: labels of all pairs; read once.
        judges: how many columns they have.
    Attributes:
        accuracy: each judge's estimated share of right votes (None without votes).
    """

    def __init__(self, rows: Iterable[Labels], judges: int):
        patterns = Counter(tuple(map(binary_vote, row)) for row in rows)
        votes, n = np.array(list(patterns), int).reshape(-1, judges), np.array(list(patterns.values()), float)
        # (patterns, judges, strengths; 0: no vote)
        is_cast = np.abs(votes)[..., None] == np.arange(len(_STRENGTHS) + 2)
        beliefs = 0.5 + 0.5 * votes.sum(1) / np.maximum(np.abs(votes).sum(1), 1)
        for _ in range(1000):
            is_right = np.where(votes > 0, beliefs[:, None], 1 - beliefs[:, None])
            right, wrong = (np.einsum("p,pj,pjs->js", n, share, is_cast) for share in (is_right, 1 - is_right))
            self._log_odds = np.log((1 + right) / (1 + wrong))  # (judges, strengths)
            before, beliefs = beliefs, self._belief(votes)
            if np.abs(beliefs - before).max(initial=0.0) < 1e-9:
                break
        votes_of, rights = (right + wrong)[:, 1:].sum(1), right[:, 1:].sum(1)
        self.accuracy = [float(k / n) if n > 0.5 else None for k, n in zip(rights, votes_of, strict=True)]

    def __call__(self, labels: Labels) -> float | None:
        """Probability that response_a is better, given the votes; None where no judge has a verdict."""
        votes = np.array([[binary_vote(p) for p in labels]])
        return None if all(p is None for p in labels) else float(self._belief(votes)[0])

    def _belief(self, votes):
        """The probability that response_a is better, for each row of votes (rows, judges)."""
        evidence = np.sign(votes) * self._log_odds[np.arange(votes.shape[1]), np.abs(votes)]
        return 0.5 + 0.5 * np.tanh(evidence.sum(1) / 2)


def binary_vote(p: float | None) -> int:
    """+1 to +4 for response_a, −1 to −4 for response_b, by strength; 0 without a label or at 0.5."""
    if p is None or p == 0.5:
        return 0
    strength = 1 + bisect_right(_STRENGTHS, max(p, 1 - p))
    return strength if p > 0.5 else -strength


def agreement(votes: Mapping[tuple[int, int], int]) -> dict:
    """Krippendorff's alpha for two answers: 1 is full agreement, 0 what chance would give, below 0 worse.

    For nominal data with missing values (Krippendorff 2011, Computing Krippendorff's alpha-reliability, section C).
    The 95 % interval is the percentile one of 1,000 resamples of the pairs, always the same.

    Args:
        votes: {(judges for response_a, judges for response_b): how many pairs}. Pairs with fewer than two votes
            tell nothing and are not counted in `n`.

    Value, low and high are None where nothing could disagree: no pair with two votes, or all votes alike.
    """
    counts = {vote: times for vote, times in votes.items() if sum(vote) >= 2}
    n = sum(counts.values())
    kinds = np.array(sorted(counts), float).reshape(-1, 2)
    times = np.array([counts[kind] for kind in sorted(counts)], float)
    value = _alpha(kinds, times[None])[0] if n else math.nan
    if not math.isfinite(value):
        return {"value": None, "low": None, "high": None, "n": n}
    resampled = _alpha(kinds, np.random.default_rng(0).multinomial(n, times / n, 1000))
    low, high = np.quantile(resampled[np.isfinite(resampled)], (0.025, 0.975))
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value)), "n": n}


def _alpha(kinds, times):
    """Alpha of each row of `times` (resamples, kinds): how often each kind (votes for a, for b) occurs."""
    a, b = kinds.T
    observed = times @ (a * b / (a + b - 1))
    total_a, total_b = times @ a, times @ b
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - observed * (total_a + total_b - 1) / (total_a * total_b)


def votes(labels: Labels) -> tuple[int, int]:
    """How many of the labels are for response_a, and how many for response_b."""
    return sum(p is not None and p > 0.5 for p in labels), sum(p is not None and p < 0.5 for p in labels)
