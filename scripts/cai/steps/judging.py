"""Comparisons of two responses, and what a judge says of them: preferences with soft labels.

    for comparison, verdicts in judge(engine, comparisons, question): ...

A judge sees each comparison in both orders and answers with one label; the labels' log-probabilities are read
(paper, section 4.1). An engine without them (`engine.scores_choices` is False) writes a one-letter answer, which is
read strictly: anything else is no verdict, never a guess. Several judges are combined in judges.py, and the quality
of the labels is measured in evaluate/audit.py. Leaves out self-consistency (several samples of one judge), and
comparisons of more than two responses.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain, groupby, islice, product
from operator import itemgetter
from typing import Any

from cai.base.hashing import hashed_seed
from cai.constitution import files, templates
from cai.data.preferences import LABELS, ORDERS, group_verdicts, same_position, with_sides
from cai.models.choice import Choice, check_logprobs, read_choices
from cai.models.engine import Engine, Message, Request, Sampling
from cai.models.local import WINDOW
from cai.stats import intervals


@dataclass(frozen=True)
class Question:
    """How a comparison is put to the judge.

    reasoning: the template of a first pass in which the judge thinks aloud, or None.
    sampling: of that first pass.
    written: the template for a judge without log-probabilities, best without a prefill; None: `template` itself.
    every: ask under each principle instead of a drawn one.
    choose_principle: chooses that of a comparison, where neither each is asked nor one drawn.
    most_examples: how many worked comparisons of the constitution to show first; None: all.
    """

    constitution: files.Constitution
    template: templates.Template
    reasoning: templates.Template | None = None
    sampling: Sampling | None = None
    seed: int = 0
    written: templates.Template | None = None
    every: bool = False
    most_examples: int | None = None
    choose_principle: Callable[[dict], files.Principle] | None = None
    _worked_turns: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def principles(self, comparison: dict) -> Sequence[files.Principle]:
        """The principles to judge it by: all, the chosen one, or one drawn by hashing; the same in both orders."""
        if self.every:
            return self.constitution.principles
        if self.choose_principle:
            return (self.choose_principle(comparison),)
        return (self.constitution.draw(self.seed, comparison["id"], 0),)

    @property
    def weights(self) -> dict[str, float]:
        """{principle id: weight}."""
        return {principle.id: principle.weight for principle in self.constitution.principles}

    def think(self, comparison: dict, order: str, principle: files.Principle) -> list[Message]:
        """The conversation of the first pass."""
        return self._render(self.reasoning, comparison, order, principle)

    def choose(
        self, comparison: dict, order: str, principle: files.Principle, reasoning: str = "", written: bool = False
    ) -> list[Message]:
        """The conversation whose next token is the label, or whose answer is the label if it is `written`."""
        template = (written and self.written) or self.template
        return self._render(template, comparison, order, principle, reasoning=reasoning)

    def _render(
        self, template: templates.Template, comparison: dict, order: str, principle: files.Principle, **more
    ) -> list[Message]:
        first, second = (comparison[f"response_{side}"] for side in order)
        conversation = template.render(
            principle=principle, prompt=comparison["prompt"], response_a=first, response_b=second, **more
        )
        system = [message for message in conversation[:1] if message["role"] == "system"]
        return [*system, *self._examples(template, principle), *conversation[len(system) :]]

    def _examples(self, template: templates.Template, principle: files.Principle) -> list[Message]:
        """The principle's worked comparisons as earlier turns, which every conversation about it begins with.

        The pass that asks for reasoning leaves out an example without reasoning.
        """
        key = template.sha256, principle.id
        if key not in self._worked_turns:
            rendered = (self._render_example(template, principle, example) for example in principle.examples)
            shown = islice(filter(None, rendered), self.most_examples)
            self._worked_turns[key] = list(chain.from_iterable(shown))
        return self._worked_turns[key]

    def _render_example(
        self, template: templates.Template, principle: files.Principle, example: Mapping
    ) -> list[Message]:
        comparison = worked_comparison(example)
        reasoning = example.get("reasoning", "")
        thinks = template is self.reasoning
        if comparison is None or (thinks and not reasoning):
            return []
        if not thinks:
            comparison["reasoning"] = reasoning if self.reasoning else ""
        label = LABELS[ORDERS[0].index(comparison.pop("gold"))]
        turns = [turn for turn in template.render(principle=principle, **comparison) if turn["role"] != "system"]
        prefill = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
        answer = prefill + label + (")" if prefill.endswith("(") else "")
        return [*turns, {"role": "assistant", "content": reasoning if thinks else answer}]


def worked_comparison(example: Mapping) -> dict | None:
    """An example of the constitution as {prompt, response_a, response_b, gold}, or None if it is of a critique.

    Where it has chosen and rejected only, hashing decides which response comes first.
    """
    if "chosen" in example and "rejected" in example:
        example = with_sides({"id": example["chosen"], **example})
    names = ("prompt", "response_a", "response_b", "gold")
    return {name: example[name] for name in names} if set(names) <= set(example) else None


_Key = tuple[str, str, str]  # comparison id, principle id, order
_Asked = Mapping[_Key, tuple[dict, str, files.Principle]]


def judge(
    engine: Engine, comparisons: Iterable[dict], question: Question, done: Set[str] = frozenset()
) -> Iterator[tuple[dict, list[dict] | None]]:
    """(comparison, its verdicts) as they are ready, not in order; None where it does not fit the model, or where a
    server would not answer.

    Two verdicts, one per order, for each principle that it is judged by.

    Args:
        comparisons: rows with id, prompt, response_a, response_b; read lazily.
        done: ids to leave out. The window in which a run was stopped is judged again as a whole: smaller batches
            would round differently, and the resumed run ends with exactly the same numbers.
    """
    comparisons, done = iter(comparisons), frozenset(done)
    unseen = len(done)
    # Reasoning and written answers take long, and a killed process loses what it has not judged yet: smaller windows.
    size = engine.batch_size * (WINDOW // 2 if engine.scores_choices and not question.reasoning else 4)
    if question.every:
        size = max(engine.batch_size // 2, size // len(question.constitution.principles), 1)
    while window := list(islice(comparisons, size)):
        new = [comparison for comparison in window if comparison["id"] not in done]
        unseen -= len(window) - len(new)
        if unseen or not new:  # an earlier window than the interrupted one: what is new in it failed
            window = new
        for comparison, verdicts in _judge_window(engine, window, question):
            if comparison["id"] not in done:
                yield comparison, verdicts


def _judge_window(engine: Engine, window: list[dict], question: Question) -> Iterator[tuple[dict, list[dict] | None]]:
    calls: _Asked = {
        (comparison["id"], principle.id, order): (comparison, order, principle)
        for comparison in window
        for principle, order in product(question.principles(comparison), ORDERS)
    }
    keys = {comparison_id: list(group) for comparison_id, group in groupby(calls, key=itemgetter(0))}
    thoughts = _think(engine, calls, question) if question.reasoning else dict.fromkeys(calls, "")
    verdicts: dict[str, dict[_Key, dict | None]] = defaultdict(dict)
    for key, choice in _choose(engine, calls, question, thoughts):
        comparison_id, principle_id, order = key
        named = {"principle": principle_id} if question.every else {}
        is_lost = choice.lost or thoughts[key] is None
        verdicts[comparison_id][key] = None if is_lost else {**named, **read_verdict(order, choice, thoughts[key])}
        if len(verdicts[comparison_id]) == len(keys[comparison_id]):
            in_order = [verdicts[comparison_id][key] for key in keys[comparison_id]]
            yield calls[key][0], None if None in in_order else in_order


def _think(engine: Engine, calls: _Asked, question: Question) -> dict[_Key, str | None]:
    """The reasoning before each choice; None where it does not fit the model."""
    requests = (
        Request(
            key,
            question.think(comparison, order, principle),
            hashed_seed("judge", question.seed, key[0], order, *([principle.id] if question.every else [])),
        )
        for key, (comparison, order, principle) in calls.items()
    )
    return {
        request.key: None if generation.lost else generation.text
        for request, generation in engine.generate(requests, question.sampling)
    }


def _choose(
    engine: Engine, calls: _Asked, question: Question, thoughts: Mapping[_Key, str | None]
) -> Iterator[tuple[_Key, Choice]]:
    """(key, choice) of every call.

    Log-probabilities are read principle by principle: the template begins with the principle, and what conversations
    have in common at the beginning is computed once.
    """
    written = not engine.scores_choices
    groups: dict[str, list[_Key]] = defaultdict(list)
    for key in calls:
        groups["" if written else key[1]].append(key)
    for group in groups.values():
        requests = (Request(key, question.choose(*calls[key], thoughts[key] or "", written)) for key in group)
        for request, choice in read_choices(engine, requests, LABELS):
            yield request.key, choice


def read_verdict(order: str, choice: Choice, reasoning: str = "") -> dict:
    """One order's verdict: {order, p_a, mass or answer[, reasoning]}.

    p_a: probability that response_a is better, whichever label it stood under, normalised over both labels; None
    where neither has any, or where the written answer is no label.
    mass: share of the probability that the two labels have; near 0, the judge was about to say something else.
    answer: the written answer of an engine without log-probabilities, whose p_a is 1 or 0.

    Raises CaiError for NaN, and for a log-probability above 0.
    """
    p_first = None
    measured: dict[str, Any] = {"answer": choice.answer}
    if choice.logprobs is not None:
        first, second = choice.logprobs
        check_logprobs(choice.logprobs)
        if max(first, second) > -math.inf:
            p_first = 0.5 + 0.5 * math.tanh((first - second) / 2)  # σ(first − second) without overflow
        if choice.answer is None:
            measured = {"mass": math.exp(first) + math.exp(second)}
    p_a = p_first if p_first is None or order == ORDERS[0] else 1 - p_first
    return {"order": order, "p_a": p_a, **measured, **({"reasoning": reasoning} if reasoning else {})}


def soft_label(verdicts: Sequence[dict], weights: Mapping[str, float] | None = None) -> float | None:
    """Probability that response_a is better: the mean over both orders, so that a position bias cancels out.

    With P(A) as the label's probability it is (P(A | ab) + 1 − P(A | ba)) / 2. Under several principles it is their
    mean by weight. A principle without a readable verdict in both orders is left out; None where no principle has one.

    Args:
        weights: {principle id: weight}; 1 for principles not in it.
    """
    total = weight = 0.0
    for (_, principle), both in group_verdicts(verdicts).items():
        if None not in both:
            share = (weights or {}).get(principle, 1.0)
            total += share * sum(both) / len(both)
            weight += share
    return total / weight if weight else None


def clamp(p: float, low: float, high: float) -> float:
    """`p` within low..high, against overconfidence after reasoning (paper: 0.4 to 0.6)."""
    return min(max(p, low), high)


def preference(
    comparison: dict, principle: str | None, verdicts: list[dict], p_a: float | None, limits: tuple[float, float]
) -> dict:
    """The row that judge.py writes: TRL's preference format, the soft label and where it comes from.

    chosen and rejected are None where the probability is exactly 0.5, and where there is no readable verdict (then
    p_chosen is None as well): undecided, never guessed.

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
    """The row of a comparison whose responses are identical: a tie, decided without a judge."""
    return {**preference(comparison, None, [], 0.5, (0.0, 1.0)), "tie": True}


def summary(rows: Iterable[dict]) -> dict:
    """The figures over the rows of `preference`.

    pairs (judged), identical (ties, not judged); undecided: at exactly 0.5; nulls: rate without a readable verdict;
    empty: pairs with an empty response; same_position: rate of pairs of orders that prefer the same position;
    mean_margin: of |2p − 1| before clamping, 0 (can't tell) to 1 (certain); label_mass: mean share of probability
    that the labels have, None where answers were written; a_chosen: rate of decided pairs won by response_a.
    With `gold`: accuracy over decided pairs, beside the accuracy of "always a" and "the longer one" on them.
    """
    totals: Counter = Counter()
    for row in rows:
        if row.get("tie"):
            totals.update(identical=1)
            continue
        p_a, is_decided = row["p_a"], row["chosen"] is not None
        readable = [both for both in group_verdicts(row["verdicts"]).values() if None not in both]
        masses = [verdict["mass"] for verdict in row["verdicts"] if "mass" in verdict]
        totals.update(
            pairs=1,
            empty=not (row["response_a"].strip() and row["response_b"].strip()),
            readable=len(readable),
            same_position=sum(same_position(*both) for both in readable),
            masses=len(masses),
            mass=sum(masses),
            nulls=p_a is None,
            margin=0 if p_a is None else abs(2 * p_a - 1),
            undecided=p_a is not None and not is_decided,
            decided=is_decided,
            a_chosen=is_decided and p_a > 0.5,
        )
        if is_decided and row.get("gold"):
            gold_is_a = row["gold"] == "a"
            a_is_longer = len(row["response_a"]) > len(row["response_b"])
            is_right = (p_a > 0.5) == gold_is_a
            totals.update(gold=1, accuracy=is_right, always_a=gold_is_a, longer=a_is_longer == gold_is_a)
    read = totals["pairs"] - totals["nulls"]
    figures = {
        "pairs": totals["pairs"],
        "identical": totals["identical"],
        "undecided": totals["undecided"],
        "nulls": intervals.rate(totals["nulls"], totals["pairs"]),
        "empty": totals["empty"],
        "same_position": intervals.rate(totals["same_position"], totals["readable"]),
        "mean_margin": totals["margin"] / read if read else None,
        "label_mass": totals["mass"] / totals["masses"] if totals["masses"] else None,
        "a_chosen": intervals.rate(totals["a_chosen"], totals["decided"]),
    }
    rates = ("accuracy", "always_a", "longer") if totals["gold"] else ()
    return figures | {name: intervals.rate(totals[name], totals["gold"]) for name in rates}
