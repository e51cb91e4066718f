"""Questions to a model whose answers have a fixed form: asked again, with the problem named, until the form is right.

    for answer in ask(engine, ["a", "b"], render, read, sampling, seed=("derive", 0), tries=2): ...

Leaves out what the form is: each caller reads its own, and raises `Refused` with the reason.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cai.base.hashing import hashed_seed
from cai.constitution import templates
from cai.models.engine import Engine, Generation, Message, Request, Sampling


class Refused(Exception):
    """An answer that can't be used. The message says why, and the model reads it when it is asked again."""


@dataclass
class Answer:
    """What became of a question.

    Attributes:
        value: what `read` returned; None if no answer could be used.
        problems: why each earlier answer was refused, in order.
        is_lost: whether the last request was not answered: it is too long, or the server failed.
    """

    key: Hashable
    value: Any = None
    problems: list[str] = field(default_factory=list)
    is_lost: bool = False


def ask(
    engine: Engine,
    keys: Iterable[Hashable],
    render: Callable[[Any, str], Sequence[Message]],
    read: Callable[[Any, str], Any],
    sampling: Sampling,
    *,
    seed: tuple[object, ...],
    tries: int,
) -> Iterator[Answer]:
    """Each question with its answer, as soon as it is decided, not in order.

    Args:
        render: the conversation for (key, problem of the answer before, or "").
        read: the value of (key, answer); raises `Refused`.
        seed: what the seed of each answer is hashed from, beside its key and the number of the try.
        tries: how often each question is asked at most.
    """
    answers = {key: Answer(key) for key in keys}
    for number in range(tries):
        waiting = [answer for answer in answers.values() if answer.value is None and not answer.is_lost]
        requests = (
            Request(
                answer.key,
                render(answer.key, answer.problems[-1] if answer.problems else ""),
                hashed_seed(*seed, answer.key, number),
            )
            for answer in waiting
        )
        for request, generation in engine.generate(requests, sampling):
            answer = answers[request.key]
            try:
                answer.value = read(answer.key, read_text(generation))
            except Refused as refusal:
                answer.problems.append(str(refusal))
                answer.is_lost = generation.lost
            if answer.value is not None or answer.is_lost or len(answer.problems) == tries:
                yield answer


def read_text(generation: Generation) -> str:
    """The text of a complete answer. Raises Refused for one that was cut or is missing, and for our own tags in it.

    What is made of the text goes into prompts of later steps, where a tag would end a part of them.
    """
    if generation.lost:
        raise Refused(generation.reason or f"no answer ({generation.finish.replace('_', ' ')})")
    if generation.finish == "length":
        raise Refused("the answer was cut at --max-new-tokens")
    if templates.neutralise(generation.text) != generation.text:
        raise Refused("the answer has a tag of the prompt templates in it")
    return generation.text
