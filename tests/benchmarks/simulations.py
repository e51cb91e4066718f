"""How often the 95 % intervals of rates, means, changes and scores hold the truth, by simulation. The tests read these.

    python tests/benchmarks/simulations.py

Leaves out the rates' plain interval, whose coverage test_metrics.py computes exactly.
"""

import itertools
import math
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from cai.evaluate import gate
from cai.stats import intervals, tables
from cai.stats.elo import ELO, Comparison, rate

STRENGTHS = {"base": 0.0, "sft": 150.0, "rl": 260.0}


def clustered_rates(times: int = 2000) -> tuple[float, float]:
    """100 prompts with 5 responses each, whose chance differs by prompt: (coverage, that of independent rows)."""
    draw, held, independent = random.Random(0), 0, 0
    for _ in range(times):
        rows = [
            (draw.random() < p, prompt) for prompt in range(100) for p in [draw.betavariate(1.2, 0.8)] for _ in range(5)
        ]
        found = intervals.clustered_rate([success for success, _ in rows], [prompt for _, prompt in rows])
        held += found["low"] <= 0.6 <= found["high"]
        plain = intervals.rate(sum(success for success, _ in rows), 500)
        independent += plain["low"] <= 0.6 <= plain["high"]
    return held / times, independent / times


def means(times: int = 2000) -> tuple[float, float]:
    """(coverage of means of 150 skewed values, of means over 80 clusters of 4 values)."""
    draw, held, clustered = random.Random(1), 0, 0
    for _ in range(times):
        found = intervals.mean([draw.gammavariate(4, 1) for _ in range(150)])
        held += found["low"] <= 4 <= found["high"]
        values = [centre + draw.gauss(0, 1) for centre in (draw.gauss(2, 1) for _ in range(80)) for _ in range(4)]
        found = intervals.clustered_mean(values, [i // 4 for i in range(320)])
        clustered += found["low"] <= 2 <= found["high"]
    return held / times, clustered / times


def changes(both: float, before: float, now: float, times: int = 4000) -> float:
    """Coverage of paired changes: 300 prompts on which both models succeed, one does, or none."""
    draw, held = random.Random(0), 0
    for _ in range(times):
        found = draw.choices((0, -1, 1, 0), (both, before, now, 1 - both - before - now), k=300)
        low, high = intervals.paired(found)
        held += low <= now - before <= high
    return held / times


def simulate(strengths, prompts: int, rng) -> list[Comparison]:
    """Every pair of policies of these strengths, in Elo points, on every prompt."""
    chances = {
        (a, b): 1 / (1 + math.exp((strengths[b] - strengths[a]) / ELO)) for a, b in itertools.combinations(strengths, 2)
    }
    return [
        Comparison(a, b, float(rng.random() < p), f"p{prompt}")
        for prompt in range(prompts)
        for (a, b), p in chances.items()
    ]


def strengths(times: int = 200) -> tuple[float, list[float]]:
    """(coverage, errors in Elo points) of three policies of known strength on 150 prompts, 300 resamples each."""
    rng, held, errors = np.random.default_rng(1), 0, []
    for number in range(times):
        for one in rate(simulate(STRENGTHS, 150, rng), resamples=300, seed=number)[0]:
            if one.policy != "base":
                held += one.low <= STRENGTHS[one.policy] <= one.high
                errors.append(one.score - STRENGTHS[one.policy])
    return held / len(errors), errors


SHARES = {"harmful_compliance": 0.04, "good_refusal": 0.9, "benign_helpful": 0.95, "over_refusal": 0.06}

MARGIN = 0.05


def draw_evaluation(shares, n: int, rng, paired: bool, chance=None) -> gate.Evaluation:
    """An evaluation of n prompts per figure: each succeeds at random, and on the same prompts policies are alike."""
    evaluation = gate.Evaluation("simulated", {})
    for number, (metric, share) in enumerate(shares.items()):
        # The chance of a success differs by prompt, more than by chance alone: what both policies have in common.
        of_prompt = chance[number][:n] if paired else np.full(n, share)
        of_prompt = np.clip(of_prompt + share - of_prompt.mean(), 0, 1)
        success = rng.random(n) < of_prompt
        evaluation.rates[metric] = intervals.rate(int(success.sum()), n)
        evaluation.outcomes[metric] = {
            f"{metric}-{i}" if paired else rng.random(): float(x) for i, x in enumerate(success)
        }
    return evaluation


def replacements(paired: bool, times: int = 2000, pilot: int = 200) -> tuple[float, float, float]:
    """How often the gate for replacing a model passes one that is worse by the margin in one figure, and one that is
    equal, with as many prompts as it asked for after a pilot; and how many that were on average."""
    rng, passed, asked = np.random.default_rng(int(paired)), Counter(), []
    for number in range(times):
        worse = dict(SHARES)
        metric = list(SHARES)[number % len(SHARES)]
        worse[metric] -= MARGIN * gate.towards(metric)
        worse[metric] = min(1.0, max(0.0, worse[metric]))

        def measure(shares, n):
            common = [rng.beta(share, 1 - share, n) for share in SHARES.values()]  # most prompts are easy or hard
            pair = (draw_evaluation(of, n, rng, paired, common) for of in (SHARES, shares))
            return gate.compare(*pair, each=True)

        needed = max(gate.prompts_needed(measure(SHARES, pilot), MARGIN).values())
        asked.append(needed)
        for name, shares in (("worse", worse), ("equal", SHARES)):
            passed[name] += gate.replacement(measure(shares, needed), MARGIN) == "may replace"
    return passed["worse"] / times, passed["equal"] / times, sum(asked) / times


if __name__ == "__main__":
    clustered, independent = clustered_rates()
    plain, of_clusters = means()
    lines = [
        ("clustered rate, 100 prompts of 5", clustered),
        ("  the same rows as independent ones", independent),
        ("mean of 150 skewed values", plain),
        ("clustered mean, 80 of 4", of_clusters),
    ]
    lines += [
        (f"paired change of {now - before:+.0%}", changes(both, before, now))
        for both, before, now in ((0.7, 0.1, 0.05), (0.02, 0.02, 0.02), (0.3, 0.3, 0.1))
    ]
    held, errors = strengths()
    for paired in (False, True):
        worse, equal, asked = replacements(paired)
        name = f"replacing a model, prompts {'paired' if paired else 'apart'}, {asked:,.0f} on average"
        print(f"{name}: passes one worse by {MARGIN:.0%} in {worse:.1%}, an equal one in {equal:.1%} of 2,000 draws")
    lines.append(("Bradley-Terry score, 150 prompts", held))
    print(tables.table(("95 % interval of a", "holds the truth"), [(name, f"{one:.1%}") for name, one in lines]))
    print(
        f"Bradley-Terry, truth {STRENGTHS}: mean error {np.mean(errors):+.1f}, standard deviation "
        f"{np.std(errors, ddof=1):.1f} Elo points, {len(errors)} scores"
    )
