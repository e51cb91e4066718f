"""Which response of a pair a policy makes likelier, outright and relative to a reference, with 95 % intervals.

    figures([PairLogprobs("How?", (-12.0, -9.5), (6, 4), (25, 17), reference=(-13.0, -9.4))])["relative"]

Two questions that are easily confused. Outright: does the policy give the chosen response the higher probability? A
sum of log-probabilities falls with every token, so the shorter response mostly wins it, which is why the mean per token
and the lengths stand beside it. Relative: has the policy moved towards the chosen response, compared with a reference?
That difference is DPO's implicit reward up to β (arXiv 2305.18290, section 4), and what its training raises; a policy
may answer yes to the second and no to the first (arXiv 2405.19534). Leaves out how log-probabilities are computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cai.stats import intervals, tables


@dataclass(frozen=True)
class PairLogprobs:
    """One pair; each field of two has (of the chosen response, of the rejected one).

    prompt: as one text; pairs of the same prompt are alike. logps, reference: summed log-probabilities by the policy
    and by the reference, in nats. tokens, characters: lengths.
    """

    prompt: str
    logps: tuple[float, float]
    tokens: tuple[int, int]
    characters: tuple[int, int]
    reference: tuple[float, float] | None = None

    @property
    def margin(self) -> float:
        """By how much more the policy prefers the chosen response, in nats."""
        return self.logps[0] - self.logps[1]

    @property
    def margin_per_token(self) -> float:
        """The same of the mean log-probabilities per token."""
        return self.logps[0] / self.tokens[0] - self.logps[1] / self.tokens[1]

    @property
    def reference_margin(self) -> float:
        """The reference's `margin`."""
        assert self.reference is not None
        return self.reference[0] - self.reference[1]

    @property
    def relative_margin(self) -> float:
        """By how much the policy moved towards the chosen response: its margin minus that of the reference."""
        return self.margin - self.reference_margin


def figures(pairs: Sequence[PairLogprobs]) -> dict[str, dict]:
    """{name: {value, low, high, n, clusters}} of pairs that all have a reference, or all none.

    outright, outright_per_token: shares of pairs whose chosen response is likelier. relative: those towards which the
    policy moved. A tie is no success. outright_change: outright minus the same of the reference, on the same pairs.
    longer: shares in which the chosen response is the longer one. logp_...: means in nats.
    """
    prompts = [pair.prompt for pair in pairs]

    def share(margins: Sequence[float]) -> dict:
        return intervals.clustered_rate([margin > 0 for margin in margins], prompts)

    def mean(values: Sequence[float]) -> dict:
        return intervals.clustered_mean(values, prompts)

    results = {
        "outright": share([pair.margin for pair in pairs]),
        "outright_per_token": share([pair.margin_per_token for pair in pairs]),
    }
    for side, name in enumerate(("chosen", "rejected")):
        results[f"logp_{name}"] = mean([pair.logps[side] for pair in pairs])
        results[f"logp_{name}_per_token"] = mean([pair.logps[side] / pair.tokens[side] for pair in pairs])
    if pairs and pairs[0].reference is not None:
        results |= _against_reference(pairs, prompts)
    results["longer"] = share([pair.characters[0] - pair.characters[1] for pair in pairs])
    return results


def _against_reference(pairs: Sequence[PairLogprobs], prompts: Sequence[str]) -> dict[str, dict]:
    changes = [float(pair.margin > 0) - float(pair.reference_margin > 0) for pair in pairs]
    low, high = intervals.paired(changes, clusters=prompts)
    results = {
        "relative": intervals.clustered_rate([pair.relative_margin > 0 for pair in pairs], prompts),
        "outright_reference": intervals.clustered_rate([pair.reference_margin > 0 for pair in pairs], prompts),
        "outright_change": {"value": sum(changes) / len(changes), "low": low, "high": high, "n": len(changes)},
        "logp_margin": intervals.clustered_mean([pair.relative_margin for pair in pairs], prompts),
    }
    results["outright_change"]["clusters"] = len(set(prompts))
    for side, name in enumerate(("chosen", "rejected")):
        moved = [pair.logps[side] - pair.reference[side] for pair in pairs if pair.reference is not None]
        results[f"logp_{name}_change"] = intervals.clustered_mean(moved, prompts)
    return results


def answer(figure: dict) -> str:
    """What a share of pairs says in words: yes if its interval is above one half, no if the share is not above."""
    word = "yes" if figure["low"] > 0.5 else "no" if figure["value"] <= 0.5 else "not shown"
    return f"{word}: in {tables.show(figure)} of the pairs"
