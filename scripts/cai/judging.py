"""Comparisons of two responses, and what a judge makes of them: preferences with soft labels.

    for comparison, verdicts in judge(engine, comparisons, ask): ...

A judge sees each comparison in both orders and answers with one label; the labels' log-probabilities are
read, never prose (paper, section 4.1). Leaves out ensembles of judges, self-consistency, and comparisons of
more than two responses.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import combinations, islice, product

from cai import metrics
from cai.constitution import Constitution, Principle
from cai.engines import WINDOW, Sampling
from cai.errors import InputError, shorten
from cai.records import Source, hashed_seed, sha256_text
from cai.revision import current_response
from cai.templates import Template

LABELS = ("A", "B")
ORDERS = ("ab", "ba")  # which response is shown first, and so under the label A

# Of two rows that are compared, these stay behind: they speak of one response.
_OF_ONE_RESPONSE = ("id", "response", "rounds", "sample", "finish")


# --- which responses are compared ---------------------------------------------------------------------------


def choose_pairs(ours: Sequence, theirs: Sequence | None, most: int | None, *draw) -> list[tuple]:
    """Pairs of responses to one prompt: all within `ours`, or each of `ours` with each of `theirs`.

    Args:
        most: keep so many, picked by hashing the pair with `draw` (seed and the like), so that neither the
            order of the rows nor a resume changes which.
    """
    pairs = list(combinations(ours, 2)) if theirs is None else list(product(ours, theirs))
    if most is None or len(pairs) <= most:
        return pairs
    kept = set(sorted(pairs, key=lambda pair: hashed_seed("pair", *draw, *pair))[:most])
    return [pair for pair in pairs if pair in kept]


def prompt_key(row: dict) -> str:
    """What the responses to one prompt share: `prompt_id`, or the hash of the prompt itself."""
    if row.get("prompt_id") is not None:
        return str(row["prompt_id"])
    return sha256_text(json.dumps(row["prompt"], sort_keys=True))


class Pairs:
    """Comparisons of the responses to the same prompt, from rows of one response; iterable again and again.

    Holds ids, and of the rows those only whose partner has not come yet.

    Args:
        source: rows with `prompt` and `response`; a revised row counts with its last revision.
        against: rows to compare them with; without it they are compared among themselves.
        most: pairs for one prompt at most.
    Attributes:
        ids: of the comparisons, `<row id> vs <row id>`, in the order of the prompts.
    Raises InputError if two rows of one prompt_id have different prompts, or nothing can be paired.
    """

    def __init__(self, source: Source, against: Source | None, most: int | None, seed: int):
        self.sources = [source] if against is None else [source, against]
        rows: dict[str, list[list[str]]] = {}
        prompts: dict[str, str] = {}
        for side, one in enumerate(self.sources):
            for row in one:
                key = prompt_key(row)
                prompt = sha256_text(json.dumps(row["prompt"], sort_keys=True))
                if prompts.setdefault(key, prompt) != prompt:
                    raise InputError(
                        f"row {shorten(row['id'])!r} has another prompt than those before it with prompt_id "
                        f"{shorten(key)!r}", where=", ".join(one.inputs), expected="one prompt a prompt_id",
                        remedy="Mend the prompt_id, or remove it: rows are then joined by their prompt",
                    )
                rows.setdefault(key, [[] for _ in self.sources])[side].append(row["id"])
        self.plan = {}
        for key, sides in rows.items():
            ours, *theirs = map(sorted, sides)  # so that the order of the rows decides nothing
            pairs = choose_pairs(ours, theirs[0] if theirs else None, most, seed, key)
            if pairs:
                self.plan[key] = pairs
        self.ids = [_pair_id(*pair) for pairs in self.plan.values() for pair in pairs]
        if not self.ids:
            raise InputError(
                "no two responses to the same prompt",
                where=", ".join(name for one in self.sources for name in one.inputs),
                remedy="Sample more with generate.py --samples 2, or name a second file of responses",
            )

    def __iter__(self) -> Iterator[dict]:
        last = len(self.sources) - 1
        waiting: dict[str, dict] = {}
        for side, source in enumerate(self.sources):
            for row in source:
                key, place = prompt_key(row), (side, row["id"])
                pairs = self.plan.get(key, ())
                wanted = {(0, a) for a, _ in pairs} | {(last, b) for _, b in pairs}
                if place not in wanted:
                    continue
                seen = waiting.setdefault(key, {})
                seen[place] = row
                if len(seen) == len(wanted):
                    yield from (_compared(seen[0, a], seen[last, b]) for a, b in pairs)
                    del waiting[key]


def _pair_id(a: str, b: str) -> str:
    return f"{a} vs {b}"


def _compared(a: dict, b: dict) -> dict:
    """One comparison of two rows, with what both say alike."""
    shared = {k: v for k, v in a.items() if k not in _OF_ONE_RESPONSE and k in b and b[k] == v}
    return {
        "id": _pair_id(a["id"], b["id"]), **shared,
        "response_a": current_response(a), "response_b": current_response(b),
    }


def identical(comparison: dict) -> bool:
    """Whether both responses are the same but for outer whitespace: there is nothing to judge."""
    return comparison["response_a"].strip() == comparison["response_b"].strip()


def check_gold(row: dict, where, line: int) -> None:
    """Raise InputError if a pair's `gold` is neither "a" nor "b" nor missing."""
    if row.get("gold") not in (None, "a", "b"):
        raise InputError(
            f"gold is {shorten(row['gold'])!r}", where=where, line=line, expected='"a" or "b"',
            remedy="Mend it, or leave gold out where nobody knows",
        )


# --- what the judge is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """How a comparison is put to the judge.

    reasoning: the template of a first pass in which the judge thinks aloud, or None.
    sampling: of that first pass.
    """

    constitution: Constitution
    template: Template
    reasoning: Template | None = None
    sampling: Sampling | None = None
    seed: int = 0

    def principle(self, comparison: dict) -> Principle:
        """One for each comparison, drawn by hashing; the same in both orders."""
        return self.constitution.draw(self.seed, comparison["id"], 0)

    def think(self, comparison: dict, order: str) -> list[dict]:
        """The conversation of the first pass."""
        return self.reasoning.render(**self._shown(comparison, order))

    def choose(self, comparison: dict, order: str, reasoning: str = "") -> list[dict]:
        """The conversation whose next token is the label."""
        return self.template.render(**self._shown(comparison, order), reasoning=reasoning)

    def _shown(self, comparison: dict, order: str) -> dict:
        first, second = (comparison[f"response_{side}"] for side in order)
        return {"principle": self.principle(comparison), "prompt": comparison["prompt"],
                "response_a": first, "response_b": second}


def judge(
    engine, comparisons: Iterable[dict], question: Question, done: Set[str] = frozenset()
) -> Iterator[tuple[dict, list[dict] | None]]:
    """(comparison, its two verdicts) as they are reached, not in order; None where it does not fit the model.

    Args:
        engine: has `generate` and `score`.
        comparisons: rows with id, prompt, response_a, response_b; read lazily.
        done: ids to leave out. The window that a killed run was in is judged whole all the same: other
            batches would round otherwise, and the resumed run ends with the very same numbers.
    """
    comparisons, done = iter(comparisons), frozenset(done)
    unseen = len(done)
    # Reasoning takes long, and what is not judged yet is lost when the process is killed: smaller windows.
    size = engine.batch_size * (4 if question.reasoning else WINDOW // 2)
    while window := list(islice(comparisons, size)):
        left = [one for one in window if one["id"] not in done]
        unseen -= len(window) - len(left)
        if unseen or not left:  # before the last one that was begun: what is left there failed
            window = left
        thoughts = _think(engine, window, question) if question.reasoning else {}
        # By principle, because the template begins with it: what prompts begin with alike is computed once.
        groups: dict[str, list[dict]] = {}
        for comparison in window:
            groups.setdefault(question.principle(comparison).id, []).append(comparison)
        for group in groups.values():
            for one, verdicts in _choose(engine, group, question, thoughts):
                if one["id"] not in done:
                    yield one, verdicts


def _think(engine, comparisons: list[dict], question: Question) -> dict[tuple[str, str], str | None]:
    """The reasoning for each (comparison id, order); None where it does not fit the model."""
    asked = [(one, order) for one in comparisons for order in ORDERS]
    conversations = (question.think(one, order) for one, order in asked)
    seeds = [hashed_seed("judge", question.seed, one["id"], order) for one, order in asked]
    return {
        (asked[index][0]["id"], asked[index][1]): None if made.finish == "too_long" else made.text
        for index, made in engine.generate(conversations, question.sampling, seeds)
    }


def _choose(engine, comparisons: list[dict], question: Question, thoughts: dict):
    """The verdicts of comparisons under one principle, as `judge` yields them."""
    asked = [(one, order) for one in comparisons for order in ORDERS]  # the two of one comparison: 2n, 2n + 1
    reasons = [thoughts.get((one["id"], order), "") for one, order in asked]
    conversations = (
        question.choose(one, order, reason or "") for (one, order), reason in zip(asked, reasons, strict=True)
    )
    found: dict[int, dict | None] = {}
    for index, logprobs in engine.score(conversations, LABELS):
        lost = logprobs is None or reasons[index] is None
        found[index] = None if lost else verdict(asked[index][1], logprobs, reasons[index])
        if index ^ 1 in found:
            both = [found.pop(index & ~1), found.pop(index | 1)]
            yield asked[index][0], None if None in both else both


# --- what the judge said ------------------------------------------------------------------------------------


def verdict(order: str, logprobs: Sequence[float], reasoning: str = "") -> dict:
    """One order's verdict: {order, p_a, mass[, reasoning]}.

    Args:
        logprobs: of the labels A and B, over the whole vocabulary.

    p_a: probability that response_a is the better one, whichever label it stood under, normalised over both.
    mass: what the two labels have of the probability; near 0, the judge was about to say something else.
    """
    first = 0.5 + 0.5 * math.tanh((logprobs[0] - logprobs[1]) / 2)  # σ(A − B), which never overflows
    made = {"order": order, "p_a": first if order == "ab" else 1 - first,
            "mass": math.exp(logprobs[0]) + math.exp(logprobs[1])}
    return {**made, "reasoning": reasoning} if reasoning else made


def soft_label(verdicts: Sequence[dict]) -> float:
    """Probability that response_a is better: the mean over both orders, so that a bent for one position
    cancels out. With P(A) as the label's probability it is (P(A | ab) + 1 − P(A | ba)) / 2."""
    return sum(one["p_a"] for one in verdicts) / len(verdicts)


def clamp(p: float, low: float, high: float) -> float:
    """`p` within low..high: what reasoning makes too sure of itself (paper: 0.4 to 0.6)."""
    return min(max(p, low), high)


def same_position(verdicts: Sequence[dict]) -> bool:
    """Whether both orders prefer the response in the same place, which says nothing about the responses."""
    p_ab, p_ba = (one["p_a"] for one in verdicts)
    return (p_ab - 0.5) * (p_ba - 0.5) < 0


def preference(comparison: dict, principle: str, verdicts: list[dict], limits: tuple[float, float]) -> dict:
    """The row that judge.py writes: TRL's preference format, the soft label and where it comes from.

    chosen and rejected are None where the probability is exactly 0.5: undecided, never guessed.
    """
    p = clamp(soft_label(verdicts), *limits)
    a, b = comparison["response_a"], comparison["response_b"]
    chosen, rejected = (None, None) if p == 0.5 else (a, b) if p > 0.5 else (b, a)
    return {**comparison, "chosen": chosen, "rejected": rejected, "p_chosen": max(p, 1 - p),
            "principle": principle, "verdicts": verdicts}


def summary(rows: Iterable[dict]) -> dict:
    """What the rows of `preference` say together.

    pairs, undecided; same_position: rate of pairs whose two orders prefer the same place; mean_margin: of
    |2p − 1| before clamping, 0 (can't tell) to 1 (certain); label_mass: mean share of probability that went
    to the labels; a_chosen: rate of decided pairs won by response_a. With `gold`: accuracy over decided
    pairs, beside what "always a" and "the longer one" would have got on the same pairs.
    """
    n = undecided = same = a_chosen = right = first = longer = known = 0
    margins = masses = 0.0
    for row in rows:
        n += 1
        same += same_position(row["verdicts"])
        margins += abs(2 * soft_label(row["verdicts"]) - 1)
        masses += sum(one["mass"] for one in row["verdicts"]) / len(row["verdicts"])
        if row["chosen"] is None:
            undecided += 1
            continue
        won = soft_label(row["verdicts"]) > 0.5
        a_chosen += won
        if row.get("gold"):
            gold_is_a = row["gold"] == "a"
            known += 1
            right += won == gold_is_a
            first += gold_is_a
            longer += (len(row["response_a"]) > len(row["response_b"])) == gold_is_a
    result = {
        "pairs": n, "undecided": undecided, "same_position": metrics.rate(same, n),
        "mean_margin": margins / n if n else None, "label_mass": masses / n if n else None,
        "a_chosen": metrics.rate(a_chosen, n - undecided),
    }
    if known:
        result |= {"accuracy": metrics.rate(right, known), "always_a": metrics.rate(first, known),
                   "longer": metrics.rate(longer, known)}
    return result
