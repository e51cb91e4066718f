"""Comparisons of two responses, and what a judge makes of them: preferences with soft labels.

    for comparison, verdicts in judge(engine, comparisons, ask): ...

A judge sees each comparison in both orders and answers with one label; the labels' log-probabilities are read
(paper, section 4.1). Where an engine has none (`engine.scores_choices` is False) a one-letter answer is written and
read strictly: anything else is no verdict, never a guess. Several judges are combined in `cai.ensemble`, and what
the labels are worth is measured in `cai.audit`. Leaves out self-consistency (several samples of one judge), and
comparisons of more than two responses.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice, product

from cai.base.errors import CaiError
from cai.base.hashing import hashed_seed
from cai.constitution.files import Constitution, Principle
from cai.constitution.templates import Template
from cai.data.preferences import LABELS, ORDERS, group_verdicts, same_position, with_sides
from cai.models.choice import Choice, read_choices
from cai.models.engine import Engine, Request, Sampling
from cai.models.local import WINDOW
from cai.stats import intervals


@dataclass(frozen=True)
class Question:
    """How a comparison is put to the judge.

    reasoning: the template of a first pass in which the judge thinks aloud, or None.
    sampling: of that first pass.
    written: the template for a judge without log-probabilities, best without a prefill; None: `template` itself.
    every: ask under each principle, not under one that is drawn.
    examples: show the worked comparisons of the constitution first.
    """

    constitution: Constitution
    template: Template
    reasoning: Template | None = None
    sampling: Sampling | None = None
    seed: int = 0
    written: Template | None = None
    every: bool = False
    examples: bool = True
    _shots: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def principles(self, comparison: dict) -> Sequence[Principle]:
        """What it is judged by: all principles, or one drawn by hashing; the same in both orders."""
        if self.every:
            return self.constitution.principles
        return (self.constitution.draw(self.seed, comparison["id"], 0),)

    @property
    def weights(self) -> dict[str, float]:
        """{principle id: weight}."""
        return {one.id: one.weight for one in self.constitution.principles}

    def think(self, comparison: dict, order: str, principle: Principle) -> list[dict]:
        """The conversation of the first pass."""
        return self._shown(self.reasoning, comparison, order, principle)

    def choose(
        self, comparison: dict, order: str, principle: Principle, reasoning: str = "", written: bool = False
    ) -> list[dict]:
        """The conversation whose next token is the label, or whose answer is one if it is `written`."""
        template = self.written if written and self.written else self.template
        return self._shown(template, comparison, order, principle, reasoning=reasoning)

    def _shown(self, template: Template, comparison: dict, order: str, principle: Principle, **more) -> list[dict]:
        first, second = (comparison[f"response_{side}"] for side in order)
        talk = template.render(
            principle=principle, prompt=comparison["prompt"], response_a=first, response_b=second, **more
        )
        system = [one for one in talk[:1] if one["role"] == "system"]
        return [*system, *self._examples(template, principle), *talk[len(system) :]]

    def _examples(self, template: Template, principle: Principle) -> list[dict]:
        """The principle's worked comparisons as turns that went before; they begin every conversation alike.

        An example without reasoning is left out of the pass that asks for it.
        """
        key = template.sha256, principle.id
        if key not in self._shots:
            self._shots[key] = [
                turn
                for example in (principle.examples if self.examples else ())
                for turn in self._worked(template, principle, example)
            ]
        return self._shots[key]

    def _worked(self, template: Template, principle: Principle, example: Mapping) -> list[dict]:
        pair = worked_comparison(example)
        reasoning = example.get("reasoning", "")
        thinks = template is self.reasoning
        if pair is None or (thinks and not reasoning):
            return []
        if not thinks:
            pair["reasoning"] = reasoning if self.reasoning else ""
        gold = pair.pop("gold")
        talk = [one for one in template.render(principle=principle, **pair) if one["role"] != "system"]
        begun = talk.pop()["content"] if talk[-1]["role"] == "assistant" else ""
        label = LABELS[ORDERS[0].index(gold)]
        closing = ")" if begun.endswith("(") else ""
        return [*talk, {"role": "assistant", "content": reasoning if thinks else begun + label + closing}]


def worked_comparison(example: Mapping) -> dict | None:
    """An example of the constitution as {prompt, response_a, response_b, gold}, or None if it is of a critique.

    Where it says chosen and rejected only, hashing decides which is shown first.
    """
    if "chosen" in example and "rejected" in example:
        example = with_sides({"id": example["chosen"], **example})
    if not {"prompt", "response_a", "response_b", "gold"} <= set(example):
        return None
    return {name: example[name] for name in ("prompt", "response_a", "response_b", "gold")}


_Key = tuple[str, str, str]  # comparison id, principle id, order


def judge(
    engine: Engine, comparisons: Iterable[dict], question: Question, done: Set[str] = frozenset()
) -> Iterator[tuple[dict, list[dict] | None]]:
    """(comparison, its verdicts) as they are reached, not in order; None where it does not fit the model, or where
    a server would not answer.

    Two verdicts, one per order, for each principle that it is judged under.

    Args:
        comparisons: rows with id, prompt, response_a, response_b; read lazily.
        done: ids to leave out. The window that a killed run was in is judged whole all the same: other
            batches would round otherwise, and the resumed run ends with the very same numbers.
    """
    comparisons, done = iter(comparisons), frozenset(done)
    unseen = len(done)
    # Reasoning and written answers take long, and what is not judged yet is lost when the process is killed:
    # smaller windows.
    size = engine.batch_size * (WINDOW // 2 if engine.scores_choices and not question.reasoning else 4)
    if question.every:
        size = max(engine.batch_size // 2, size // len(question.constitution.principles), 1)
    while window := list(islice(comparisons, size)):
        new = [comparison for comparison in window if comparison["id"] not in done]
        unseen -= len(window) - len(new)
        if unseen or not new:  # before the last one that was begun: what is new there failed
            window = new
        for comparison, verdicts in _judge_window(engine, window, question):
            if comparison["id"] not in done:
                yield comparison, verdicts


def _judge_window(engine: Engine, window: list[dict], question: Question) -> Iterator[tuple[dict, list[dict] | None]]:
    asked: dict[_Key, tuple[dict, str, Principle]] = {
        (comparison["id"], principle.id, order): (comparison, order, principle)
        for comparison in window
        for principle, order in product(question.principles(comparison), ORDERS)
    }
    keys: dict[str, list[_Key]] = {}  # of each comparison
    for key in asked:
        keys.setdefault(key[0], []).append(key)
    thoughts = _think(engine, asked, question) if question.reasoning else dict.fromkeys(asked, "")
    verdicts: dict[str, dict[_Key, dict | None]] = {comparison_id: {} for comparison_id in keys}
    for key, choice in _choose(engine, asked, question, thoughts):
        comparison, order, principle = asked[key]
        so_far = verdicts[comparison["id"]]
        if choice.lost or thoughts[key] is None:
            so_far[key] = None
        elif choice.answer is None:
            so_far[key] = verdict(order, choice.logprobs, thoughts[key])
        else:
            so_far[key] = written_verdict(order, choice, thoughts[key])
        if so_far[key] and question.every:
            so_far[key] = {"principle": principle.id, **so_far[key]}
        if len(so_far) == len(keys[comparison["id"]]):
            in_order = [so_far[key] for key in keys[comparison["id"]]]
            yield comparison, None if None in in_order else in_order


def _think(engine: Engine, asked: Mapping[_Key, tuple], question: Question) -> dict[_Key, str | None]:
    """The reasoning before each choice; None where it does not fit the model."""
    requests = (
        Request(
            key,
            question.think(comparison, order, principle),
            hashed_seed("judge", question.seed, key[0], order, *([principle.id] if question.every else [])),
        )
        for key, (comparison, order, principle) in asked.items()
    )
    return {
        request.key: None if generation.lost else generation.text
        for request, generation in engine.generate(requests, question.sampling)
    }


def _choose(
    engine: Engine, asked: Mapping[_Key, tuple], question: Question, thoughts: Mapping[_Key, str | None]
) -> Iterator[tuple[_Key, Choice]]:
    """(key, choice) of every question.

    Log-probabilities are read principle by principle, because the template begins with the principle: what prompts
    begin with alike is computed once.
    """
    groups: dict[str, list[_Key]] = {}
    for key in asked:
        groups.setdefault(key[1] if engine.scores_choices else "", []).append(key)
    for group in groups.values():
        requests = (
            Request(key, question.choose(*asked[key], thoughts[key] or "", written=not engine.scores_choices))
            for key in group
        )
        for request, choice in read_choices(engine, requests, LABELS):
            yield request.key, choice


def verdict(order: str, logprobs: Sequence[float], reasoning: str = "") -> dict:
    """One order's verdict: {order, p_a, mass[, reasoning]}.

    Args:
        logprobs: of the labels A and B, over the whole vocabulary.

    p_a: probability that response_a is the better one, whichever label it stood under, normalised over both; None
    where neither label has any.
    mass: what the two labels have of the probability; near 0, the judge was about to say something else.
    """
    if any(math.isnan(one) or one > 1e-3 for one in logprobs):
        raise CaiError(f"{list(logprobs)} are no log-probabilities of the labels. Try --dtype float32")
    p_first = None
    if max(logprobs) > -math.inf:
        p_first = 0.5 + 0.5 * math.tanh((logprobs[0] - logprobs[1]) / 2)  # σ(A − B), which never overflows
    made = {"order": order, "p_a": _of_a(order, p_first), "mass": math.exp(logprobs[0]) + math.exp(logprobs[1])}
    return {**made, "reasoning": reasoning} if reasoning else made


def written_verdict(order: str, choice: Choice, reasoning: str = "") -> dict:
    """One order's verdict from a written answer: {order, p_a: 1, 0 or None, answer[, reasoning]}."""
    p_first = None if choice.logprobs is None else math.exp(choice.logprobs[0])
    made = {"order": order, "p_a": _of_a(order, p_first), "answer": choice.answer}
    return {**made, "reasoning": reasoning} if reasoning else made


def _of_a(order: str, p_first: float | None) -> float | None:
    return p_first if p_first is None or order == ORDERS[0] else 1 - p_first


def soft_label(verdicts: Sequence[dict], weights: Mapping[str, float] | None = None) -> float | None:
    """Probability that response_a is better: the mean over both orders, so that a bent for one position
    cancels out. With P(A) as the label's probability it is (P(A | ab) + 1 − P(A | ba)) / 2.

    Under several principles, their mean by weight. A principle without a readable verdict in both orders is left
    out; None where no principle has one.

    Args:
        weights: {principle id: weight}; 1 for those not in it.
    """
    total = weight = 0.0
    for (_, principle), both in group_verdicts(verdicts).items():
        if None not in both:
            share = (weights or {}).get(principle, 1.0)
            total += share * sum(both) / len(both)
            weight += share
    return total / weight if weight else None


def clamp(p: float, low: float, high: float) -> float:
    """`p` within low..high: what reasoning makes too sure of itself (paper: 0.4 to 0.6)."""
    return min(max(p, low), high)


def preference(
    comparison: dict, principle: str, verdicts: list[dict], p_a: float | None, limits: tuple[float, float]
) -> dict:
    """The row that judge.py writes: TRL's preference format, the soft label and where it comes from.

    chosen and rejected are None where the probability is exactly 0.5, and where there is no readable verdict
    (then p_chosen is None as well): undecided, never guessed.

    Args:
        p_a: probability that response_a is better; p_chosen is it, or its complement, within `limits`.
    """
    p = None if p_a is None else clamp(p_a, *limits)
    a, b = comparison["response_a"], comparison["response_b"]
    chosen, rejected = (None, None) if p in (None, 0.5) else (a, b) if p > 0.5 else (b, a)
    return {
        **comparison,
        "chosen": chosen,
        "rejected": rejected,
        "p_chosen": None if p is None else max(p, 1 - p),
        "p_a": p_a,
        "principle": principle,
        "verdicts": verdicts,
    }


def tie(comparison: dict) -> dict:
    """The row of a pair whose responses are identical: a tie, which no judge was asked about."""
    return {**preference(comparison, None, [], 0.5, (0.0, 1.0)), "tie": True}


def summary(rows: Iterable[dict]) -> dict:
    """What the rows of `preference` say together.

    pairs (judged), identical (ties, not judged); undecided: at exactly 0.5; nulls: rate without a readable verdict;
    empty: pairs with an empty response; same_position: rate of pairs of orders that prefer the same place;
    mean_margin: of |2p − 1| before clamping, 0 (can't tell) to 1 (certain); label_mass: mean share of probability
    that went to the labels, None where answers were written; a_chosen: rate of decided pairs won by response_a.
    With `gold`: accuracy over decided pairs, beside what "always a" and "the longer one" would have got on them.
    """
    n = ties = empty = nulls = undecided = asked = same = decided = a_chosen = right = first = longer = known = 0
    margin = mass = 0.0
    masses = 0
    for row in rows:
        if row.get("tie"):
            ties += 1
            continue
        n += 1
        empty += not (row["response_a"].strip() and row["response_b"].strip())
        for both in group_verdicts(row["verdicts"]).values():
            if None not in both:
                asked += 1
                same += same_position(*both)
        for one in row["verdicts"]:
            if "mass" in one:
                masses += 1
                mass += one["mass"]
        if row["p_a"] is None:
            nulls += 1
            continue
        margin += abs(2 * row["p_a"] - 1)
        if row["chosen"] is None:
            undecided += 1
            continue
        won = row["p_a"] > 0.5
        decided += 1
        a_chosen += won
        if row.get("gold"):
            gold_is_a = row["gold"] == "a"
            known += 1
            right += won == gold_is_a
            first += gold_is_a
            longer += (len(row["response_a"]) > len(row["response_b"])) == gold_is_a
    result = {
        "pairs": n,
        "identical": ties,
        "undecided": undecided,
        "nulls": intervals.rate(nulls, n),
        "empty": empty,
        "same_position": intervals.rate(same, asked),
        "mean_margin": margin / (n - nulls) if n > nulls else None,
        "label_mass": mass / masses if masses else None,
        "a_chosen": intervals.rate(a_chosen, decided),
    }
    if known:
        result |= {
            "accuracy": intervals.rate(right, known),
            "always_a": intervals.rate(first, known),
            "longer": intervals.rate(longer, known),
        }
    return result
