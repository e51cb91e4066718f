"""Bradley–Terry scores of policies on the Elo scale, from comparisons, with bootstrap intervals by prompt.

    scores, notes = rate([Comparison("sft", "base", 0.9, prompt="p1"), ...], anchor="base")

Bradley and Terry (1952): policy i beats j with probability σ(s_i − s_j); 400 Elo points are odds of 10 to 1.
A tie, or a soft label, counts as that share of a win to each. Each pair of policies that was compared is given
half a win more on either side: for two policies that is Jeffreys' prior (Firth 1993), so a score stays finite
after a clean sweep, and after many comparisons the prior has no effect. Libraries (choix, evalica) fit the same model
but report neither a sweep nor policies that never met. Leaves out games in sequence, the effect of the order (the
judge sees both), and any difference between judges.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

ELO = 400 / math.log(10)  # points per unit of log-odds

PRIOR = 0.5  # wins added on either side of a pair that was compared


@dataclass(frozen=True)
class Comparison:
    """Two policies' responses to one prompt. `p`: probability that `a`'s is better; 0.5 is a tie."""

    a: str
    b: str
    p: float
    prompt: str


@dataclass(frozen=True)
class Score:
    """A policy's position on the scale.

    score: Elo points above the anchor of its group, whose own score is 0.
    low, high: 95 % interval, None on a side that the comparisons do not bound (see `rate`).
    group: 0 for the policies that a chain of comparisons joins to the anchor; scores of different groups can't be
        compared.
    wins, losses, ties: comparisons with p above, below and at 0.5.
    """

    policy: str
    score: float
    low: float | None
    high: float | None
    group: int
    wins: int
    losses: int
    ties: int


def rate(
    comparisons: Iterable[Comparison], *, anchor: str | None = None, resamples: int = 1000, seed: int = 0
) -> tuple[list[Score], list[str]]:
    """(scores, best first within each group; notes on what they can't say).

    The interval is the 2.5 and 97.5 percentile over `resamples` draws of the prompts with replacement (all
    comparisons of a prompt stay together: they are not independent). It is open, None, towards a side where no
    chain of wins leads: a policy that won every comparison has no upper bound. With fewer than two prompts
    there is no interval at all.

    Args:
        anchor: the policy whose score is 0; by default the first that is named. Other groups are anchored
            at the first of theirs.
    Raises ValueError for no comparison, a policy compared with itself, a p outside 0..1 or an unknown anchor.
    """
    comparisons = list(comparisons)
    _check(comparisons)
    names = list(dict.fromkeys(name for comparison in comparisons for name in (comparison.a, comparison.b)))
    if anchor not in (None, *names):
        raise ValueError(f"no comparison names the anchor {anchor!r}, only {', '.join(names)}")
    names.sort(key=lambda name: name != anchor)
    wins = wins_by_prompt(comparisons, names)  # (prompts, policies, policies)
    total = wins.sum(0)
    played = total + total.T > 0
    firsts = _reaches(played).argmax(1).tolist()  # of the group of each policy: those that comparisons join
    anchors = sorted(set(firsts))
    prior = PRIOR * played
    scores = ELO * fit(total + prior, anchors)
    low = high = np.full(len(names), np.nan)
    if len(wins) > 1:
        times = np.random.default_rng(seed).multinomial(len(wins), np.full(len(wins), 1 / len(wins)), resamples)
        drawn = np.tensordot(times, wins, 1)
        low, high = np.percentile(ELO * fit(drawn + prior, anchors), [2.5, 97.5], axis=0)
    beats = _reaches(total > 0)  # beats[i, j]: a chain of wins leads from i down to j; i = j included
    result = []
    for i, name in enumerate(names):
        j = firsts[i]
        ps = [row.p if row.a == name else 1 - row.p for row in comparisons if name in (row.a, row.b)]
        outcomes = (sum(p > 0.5 for p in ps), sum(p < 0.5 for p in ps), sum(p == 0.5 for p in ps))
        ends = [
            float(end) if is_bounded and not math.isnan(end) else None
            for end, is_bounded in ((low[i], beats[i, j]), (high[i], beats[j, i]))
        ]
        result.append(Score(name, float(scores[i]), *ends, anchors.index(j), *outcomes))
    result.sort(key=lambda score: (score.group, -score.score))
    return result, _write_notes(result, [names[i] for i in anchors], len(wins))


def _check(comparisons: Sequence[Comparison]) -> None:
    if not comparisons:
        raise ValueError("no comparisons")
    for row in comparisons:
        if row.a == row.b:
            raise ValueError(f"{row.a!r} compared with itself, on prompt {row.prompt!r}")
        if not 0 <= row.p <= 1:  # NaN too
            raise ValueError(f"p = {row.p}, on prompt {row.prompt!r}: expected 0 to 1")


def wins_by_prompt(comparisons: Sequence[Comparison], names: Sequence[str]) -> np.ndarray:
    """Wins (prompts, policies, policies): [c, i, j] is what policy i won against j on the c-th prompt."""
    policies = {name: i for i, name in enumerate(names)}
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in comparisons))}
    wins = np.zeros((len(prompts), len(names), len(names)))
    for row in comparisons:
        c, a, b = prompts[row.prompt], policies[row.a], policies[row.b]
        wins[c, a, b] += row.p
        wins[c, b, a] += 1 - row.p
    return wins


def fit(wins: np.ndarray, anchors: Sequence[int]) -> np.ndarray:
    """Maximum-likelihood log-strengths (..., policies) of win matrices (..., policies, policies).

    Newton's method on all matrices at once. The strengths in `anchors` (one of each group) are 0; every group
    must be bounded, which the prior of `rate` ensures. A step changes no log-odds by more than 1; so small a step of
    Newton's raises the likelihood (the logistic curve's curvature changes by less than e there).
    """
    n = wins.shape[-1]
    free = np.array([i for i in range(n) if i not in set(anchors)], dtype=int)
    strengths = np.zeros(wins.shape[:-1])
    games = wins + np.swapaxes(wins, -1, -2)
    for _ in range(200):
        p = 0.5 + 0.5 * np.tanh((strengths[..., :, None] - strengths[..., None, :]) / 2)
        gradient = (wins - games * p).sum(-1)[..., free]
        weight = games * p * (1 - p)
        hessian = np.eye(n) * weight.sum(-1)[..., None] - weight
        step = np.linalg.solve(hessian[..., free[:, None], free], gradient[..., None])[..., 0]
        padded = np.concatenate([step, np.zeros((*step.shape[:-1], 1))], -1)  # the anchors do not move
        spread = np.ptp(padded, axis=-1)[..., None]
        strengths[..., free] += step / np.maximum(spread, 1)
        if spread.max(initial=0) < 1e-9:
            return strengths
    raise ArithmeticError(f"no convergence after 200 steps (last step {spread.max():.2g})")


def _reaches(edges: np.ndarray) -> np.ndarray:
    """Whether a path leads from i to j (itself included), by squaring."""
    paths = edges | np.eye(len(edges), dtype=bool)
    for _ in range(len(edges).bit_length()):
        paths = paths @ paths
    return paths


def _write_notes(scores: Sequence[Score], anchors: Sequence[str], prompts: int) -> list[str]:
    """What the scores can't say; anchors: one per group."""
    notes = []
    if len(anchors) > 1:
        groups = ["; ".join(row.policy for row in scores if row.group == number) for number in range(len(anchors))]
        notes.append(
            f"{len(anchors)} groups of policies were never compared with each other, so their scores "
            f"can't be either: {' | '.join(groups)}."
        )
    if prompts < 2:
        return [*notes, "All comparisons are on one prompt: no interval can be given."]
    sides = {(True, True): "neither above nor below", (False, True): "not above", (True, False): "not below"}
    for row in scores:
        side = sides.get((row.low is None, row.high is None))
        if side and row.policy != anchors[row.group]:
            notes.append(
                f"{row.policy} is bounded {side} against {anchors[row.group]}: no chain of wins leads the other way. "
                "Its score depends on the prior on that side; compare on more prompts."
            )
    return notes
