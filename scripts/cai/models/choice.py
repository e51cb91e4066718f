"""Forced choices: the log-probability of each label as the answer to a question.

    for request, logprobs in choose(engine, requests, "AB"): ...

An engine without log-probabilities (`engine.scores_choices` is False) writes the label instead. It is read strictly:
anything but a label is no choice, never a guess.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from cai.models.engine import Engine, Request, RequestT, Sampling, fold_prefill, label_instruction

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
