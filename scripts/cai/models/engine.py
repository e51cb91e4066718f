"""What every engine takes and returns: requests in; text, or the log-probabilities of labels, out.

    for request, generation in engine.generate([Request("a", conversation, seed=1)], Sampling()): ...
    for request, logprobs in engine.score([Request("a", conversation)], "AB"): ...

Leaves out the engines themselves: local.py runs a model on this machine, servers.py asks one over the network.
"""

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Request:
    """A conversation for an engine, which comes back beside its result.

    key: names the request; no two requests of one call have the same.
    conversation: one that ends with the assistant is continued (a prefill).
    seed: of the text that is sampled, and of nothing else.
    """

    key: Hashable
    conversation: Sequence[Message]
    seed: int = 0

    @property
    def prefill(self) -> str:
        """The beginning of the answer that the conversation ends with, or ""."""
        last = self.conversation[-1]
        return last["content"] if last["role"] == "assistant" else ""


@dataclass(frozen=True, kw_only=True)
class RowRequest(Request):
    """A request about a row, which comes back with it."""

    row: dict[str, Any]


RequestT = TypeVar("RequestT", bound=Request)


@dataclass(frozen=True)
class Sampling:
    """How to sample: `temperature` 0 is greedy; `max_new_tokens` never counts the prompt."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """One answer, stripped of thinking, control tokens and outer whitespace.

    finish: "stop" (the model ended, or a stop string came), "length" (cut at max_new_tokens), "too_long"
    (prompt and max_new_tokens do not fit the model's context), or "failed" (a server would not answer; `reason`
    says why). In the last two nothing was generated, and `text` is empty.
    tokens: new tokens, the end token included. prompt_tokens: tokens of the rendered conversation.
    """

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    reason: str = ""

    @property
    def lost(self) -> bool:
        """Whether there is no answer."""
        return self.finish in ("too_long", "failed")


class Engine(Protocol):
    """A model that answers requests. `load_engine` makes one.

    name: the model as the caller named it.
    batch_size: most requests in one forward pass, or in flight at once at a server.
    context: tokens that the model can hold; None where there is no limit, or where a server keeps it.
    """

    name: str
    batch_size: int
    context: int | None

    @property
    def scores_choices(self) -> bool:
        """Whether `score` works. Where it does not, `choice.choose` has the label written."""

    def generate(
        self, requests: Iterable[RequestT], sampling: Sampling, done: Container[Hashable] = ()
    ) -> Iterator[tuple[RequestT, Generation]]:
        """Each request with its answer, as they are ready, not in order.

        Args:
            requests: read lazily, ahead of the model, and possibly in another thread.
            done: keys of requests that the caller has the answers of. They are not returned.
        """

    def score(
        self, requests: Iterable[RequestT], labels: Sequence[str]
    ) -> Iterator[tuple[RequestT, list[float] | None]]:
        """Each request with the log-probability of every label as what comes next, not in order.

        They are of the distribution over the whole vocabulary: what they lack to 1 belongs to other tokens. None
        where the conversation does not fit the model's context, or a server would not answer.
        """


def fold_prefill(request: Request, instruction: str) -> Sequence[Message]:
    """The conversation with `instruction` and the prefill at the end of its last question, instead of a prefill."""
    if not request.prefill:
        return request.conversation
    *before, question, _ = request.conversation
    return [*before, {**question, "content": f"{question['content']}\n\n{instruction}\n{request.prefill}"}]


def label_instruction(labels: Sequence[str]) -> str:
    """Asks for a label alone, in front of a prefill that became part of the question."""
    return f"Complete this sentence, with {', '.join(labels[:-1])} or {labels[-1]} and nothing else:"


def count_tokens(engine: Engine, conversation: Sequence[Message]) -> int | None:
    """Tokens of a conversation in the model's chat template; None for a server, which keeps its tokenizer."""
    chat = getattr(engine, "chat", None)
    return None if chat is None else len(chat.encode(chat.render(conversation)))
