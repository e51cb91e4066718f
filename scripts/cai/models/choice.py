"""Forced choices: the log-probability of each label as the answer to a question.

    for request, logprobs in choose(engine, requests, "AB"): ...
    for row, choice in choose_options(engine, rows, render, "AB", cyclic_orders(2, 2)): ...

`choose` reads labels that mean the same in every request. `choose_options` shows options under the labels in several
orders and averages per option, so that a preference for a letter cancels out.

An engine without log-probabilities (`engine.scores_choices` is False) writes the label instead. It is read strictly:
anything but a label is no choice, never a guess.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, TypeVar

from cai.base.errors import CaiError
from cai.models.engine import Engine, Message, Request, RequestT, Sampling, fold_prefill, label_instruction
from cai.models.local import MOST_ROWS, WINDOW
from cai.stats import letters
from cai.stats.letters import Order

ItemT = TypeVar("ItemT")
NameT = TypeVar("NameT", str, bool)

EQUAL = 1e-9  # probabilities that differ by less are equal, and rounding decides between them

ANSWER_TOKENS = 16  # room for "**(A)**." in any tokenizer, and too little to reason in


@dataclass(frozen=True)
class Choice:
    """What an engine chose.

    logprobs: of each label; None if the request was not answered, or the written answer is no label.
    answer: the written answer, None where log-probabilities were read.
    lost: the request does not fit the model's context, or a server would not answer.
    """

    logprobs: list[float] | None
    answer: str | None = None
    lost: bool = False


@dataclass(frozen=True, kw_only=True)
class _WrittenRequest(Request):
    """What an engine without log-probabilities is asked in place of the `original`."""

    original: Any  # the Request, in the caller's own class


@dataclass(frozen=True, kw_only=True)
class _OptionRequest(Request):
    """A question about the `item` with this number, with the options in an `order`."""

    item: Any
    number: int
    order: Order


def choose(
    engine: Engine, requests: Iterable[RequestT], labels: Sequence[str]
) -> Iterator[tuple[RequestT, list[float] | None]]:
    """Each request with the log-probability of every label, not in order; None where there is no choice.

    There is none where the conversation does not fit the model's context, a server would not answer, no label has any
    probability, or a written answer is no label. A written label has the log-probability 0, the others -inf.

    Args:
        requests: as for `engine.score`. A prefill becomes part of the question where the label is written.
    """
    for request, choice in read_choices(engine, requests, labels):
        logprobs = choice.logprobs
        yield request, None if logprobs is None or max(logprobs) == -math.inf else logprobs


def read_choices(
    engine: Engine, requests: Iterable[RequestT], labels: Sequence[str]
) -> Iterator[tuple[RequestT, Choice]]:
    """`choose` with all that is known: the written answer, and whether there was any answer."""
    if engine.scores_choices:
        for request, logprobs in engine.score(requests, labels):
            yield request, Choice(logprobs, lost=logprobs is None)
        return
    # The prefill becomes part of the question: not every server continues one, and a label does not need it.
    instruction = label_instruction(labels)
    written_requests = (
        _WrittenRequest(request.key, fold_prefill(request, instruction), original=request) for request in requests
    )
    for written, generation in engine.generate(written_requests, Sampling(ANSWER_TOKENS, 0.0)):
        label = read_label(generation.text.removeprefix(written.original.prefill), labels)
        logprobs = None if label is None else [0.0 if name == label else -math.inf for name in labels]
        yield written.original, Choice(logprobs, generation.text, generation.lost)


@dataclass(frozen=True)
class OptionChoice:
    """What an engine chose among options that it saw in several orders.

    orders: which option stood at each label.
    by_order: for each order, the probability of each option, normalised over the options; None where there is no choice
        in one of the orders. Of a written label the option's is 1.
    mass: share of the probability that all labels have, the mean over the orders; None where they are written.
    """

    orders: Sequence[Order]
    by_order: Sequence[Sequence[float]] | None
    mass: float | None = None

    @property
    def shares(self) -> list[float] | None:
        """The mean probability of each option over the orders.

        Each order is normalised before: one in which the engine would rather not answer with a label counts as much
        as the others, or the bias of the others would no longer cancel out. Probabilities are averaged and not their
        logarithms, as for preferences: one certain answer can't outvote all others, and a label that a server does not
        list (-inf) is no veto.
        """
        return None if self.by_order is None else letters.mean_shares(self.by_order)

    @property
    def letter_excess(self) -> list[float] | None:
        """Of each label, what its probability has beyond that of the options (`letters.letter_excess`); None where
        there is no choice, and for a single order, which can't tell."""
        if self.by_order is None or len(self.orders) == 1:
            return None
        return letters.letter_excess(self.by_order, self.orders)

    def decide(self, names: Sequence[NameT]) -> NameT | None:
        """The name of the likeliest option; None where there is no choice, where options of different names are equally
        likely, and where labels were written and the orders disagree about the name.

        Args:
            names: of the options; several may have the same.
        """
        if (shares := self.shares) is None:
            return None
        best = max(shares)
        is_written = self.mass is None
        likeliest = {
            name for share, name in zip(shares, names, strict=True) if share > (0 if is_written else best - EQUAL)
        }
        return likeliest.pop() if len(likeliest) == 1 else None


def choose_options(
    engine: Engine,
    items: Iterable[ItemT],
    render: Callable[[ItemT, Order], Sequence[Message]],
    labels: Sequence[str],
    orders: Sequence[Order],
) -> Iterator[tuple[ItemT, OptionChoice]]:
    """Each item with what the engine chose about it, when all orders are answered; not in the order of the items.

    Within one window of the engine the conversations of one order follow each other: what they have in common at the
    beginning is computed once.

    Args:
        items: read lazily, window by window.
        render: the conversation about an item with the options in an order.
        orders: such as `letters.cyclic_orders`; each has as many options as there are labels.
    """
    items = iter(items)
    size = max(1, min(WINDOW * engine.batch_size, MOST_ROWS) // len(orders))

    def ask() -> Iterator[_OptionRequest]:
        first = 0
        while window := list(islice(items, size)):
            for order in orders:
                for number, item in enumerate(window, first):
                    conversation = render(item, order)
                    yield _OptionRequest((number, order), conversation, item=item, number=number, order=order)
            first += len(window)

    answers: dict[int, dict[Order, list[float] | None]] = defaultdict(dict)
    for request, logprobs in choose(engine, ask(), labels):
        of_item = answers[request.number]
        of_item[request.order] = logprobs
        if len(of_item) == len(orders):
            in_order = answers.pop(request.number)
            yield request.item, _average([in_order[order] for order in orders], orders, engine.scores_choices)


def _average(logprobs: Sequence[Sequence[float] | None], orders: Sequence[Order], has_mass: bool) -> OptionChoice:
    """The choice by the log-probabilities of the labels in each order. CaiError for NaN."""
    by_order, masses = [], []
    for of_labels, order in zip(logprobs, orders, strict=True):
        if of_labels is None:
            return OptionChoice(orders, None)
        check_logprobs(of_labels)
        shares = dict(zip(order, probabilities(of_labels), strict=True))
        by_order.append([shares[option] for option in range(len(order))])
        masses.append(math.fsum(map(math.exp, of_labels)))
    return OptionChoice(orders, by_order, math.fsum(masses) / len(masses) if has_mass else None)


def check_logprobs(logprobs: Sequence[float]) -> None:
    """CaiError for NaN, and for a log-probability above 0."""
    if any(math.isnan(logprob) or logprob > 1e-3 for logprob in logprobs):
        raise CaiError(f"{list(logprobs)} are not log-probabilities of the labels. Try --dtype float32")


def probabilities(logprobs: Sequence[float]) -> list[float]:
    """The probability of each label, normalised over the labels. At least one of them is above -inf."""
    highest = max(logprobs)
    shares = [math.exp(logprob - highest) for logprob in logprobs]
    total = sum(shares)
    return [share / total for share in shares]


def read_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer consists of, or None.

    Strict: brackets, quotes, asterisks and a full stop around the label are passed over, words are not. A judge
    that explains, refuses, or quotes a response has not chosen.
    """
    match = _label_pattern(tuple(labels)).fullmatch(answer.strip())
    return match[1] if match else None


@cache
def _label_pattern(labels: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"[\s(\[*_`\"'“]*({'|'.join(map(re.escape, labels))})[\s)\]*_`\"'”.]*")
