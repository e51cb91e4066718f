"""Which update of a run to keep: the best on harmful and on other prompts, without a loss on either."""

import math
from collections.abc import Mapping, Sequence

from cai.data.kinds import AXES


def axis_means(kinds: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """The mean score on each axis of `AXES`: over the harmful prompts, and over all others."""
    found = {}
    for axis, of in AXES.items():
        own = [score for kind, score in zip(kinds, scores, strict=True) if kind in of]
        found[axis] = sum(own) / len(own)
    return found


def choose_update(kinds: Sequence[str], candidates: Mapping[int, Sequence[float]]) -> int:
    """Which of the candidates to take: the largest sum of both axes among those that lost on neither.

    To lose is to fall below the start by more than two standard errors of the paired difference, for every candidate
    is asked the same prompts. The start itself has lost nothing, so that there always is one to take.

    Args:
        kinds: of the prompts.
        candidates: update -> a score for each prompt. The smallest update is the start.
    """
    start = candidates[min(candidates)]
    best, most = min(candidates), -math.inf
    for update in sorted(candidates):
        lost, total = False, 0.0
        for of in AXES.values():
            own = [i for i, kind in enumerate(kinds) if kind in of]
            gains = [candidates[update][i] - start[i] for i in own]
            mean = sum(gains) / len(gains)
            variance = sum((gain - mean) ** 2 for gain in gains) / max(len(gains) - 1, 1)
            lost |= mean < -2 * math.sqrt(variance / len(gains))
            total += mean
        if not lost and total > most:
            best, most = update, total
    return best
