"""Prompts of reinforcement learning, encoded and checked against the policy's context, and responses to compare with.

prompts = encode_prompts(rows, chat, policy, max_new_tokens=256)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cai.base.errors import InputError, shorten
from cai.data import dialogue, prefills, rounds, sources
from cai.models.chat import Chat
from cai.models.decoding import context_length

MAKE_REFERENCES = "Make them: python scripts/generate.py --model MODEL --input PROMPTS --output FILE"


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user, its token ids up to where the policy goes on, and its kind if known.

    prefill: the given beginning of the answer, or "". The ids end with it, the messages do not hold it.
    """

    messages: list[dict]
    ids: Any  # a tensor
    kind: str | None = None
    prefill: str = ""

    @property
    def conversation(self) -> list[dict]:
        """The conversation that the policy continues."""
        return prefills.begin_answer(self.messages, self.prefill)

    def read_answer(self, chat: Chat, ids: Sequence[int]) -> str:
        """The response as text, its prefill included.

        Args:
            ids: what the policy wrote, before the end token.
        """
        text, _ = chat.answer(ids, continued=bool(self.prefill))
        return prefills.join_prefill(self.prefill, text)


def encode_prompts(rows: Sequence[dict], chat: Chat, policy, max_new_tokens: int) -> list[Prompt]:
    """The prompts of a run.

    Args:
        rows: each with a `prompt`, some with a `kind` or a `prefill`.
        chat: the policy's tokenizer and chat template.
    Raises:
        InputError: a prompt leaves no room for `max_new_tokens` in the policy's context.
    """
    import torch

    prompts = []
    for row in rows:
        ids = torch.tensor(chat.encode(chat.render(prefills.conversation_of(row))))
        messages = dialogue.as_messages(row["prompt"])
        prompts.append(Prompt(messages, ids, row.get("kind"), prefills.prefill_of(row)))
    check_context(prompts, policy, max_new_tokens)
    return prompts


def check_context(prompts: Sequence[Prompt], model, max_new_tokens: int) -> None:
    """Raise InputError if a prompt leaves no room for `max_new_tokens` in the context of a model that reads it."""
    context = context_length(model)
    longest = max(prompts, key=lambda prompt: len(prompt.ids), default=None)
    if context and longest is not None and len(longest.ids) + max_new_tokens > context:
        raise InputError(
            f"a prompt of {len(longest.ids)} tokens ({shorten(longest.messages[-1]['content'])!r}) and "
            f"{max_new_tokens} new ones do not fit the model's context of {context} ({type(model).__name__})",
            where="--input",
            remedy="Leave out long prompts, or lower --max-new-tokens",
        )


def read_references(against: str, rows: Sequence[dict]) -> tuple[list[list[str]], str]:
    """The responses of a file to prompts.

    Returns:
        (the responses to each prompt of `rows`, digest of the file).
    Raises:
        InputError: a prompt has no response.
    """
    answers, by_prompt = sources.Source([against], require=("prompt", "response")), {}
    for row in answers:
        by_prompt.setdefault(_conversation_key(row), []).append(rounds.text_of_round(row))
    unanswered = [row for row in rows if _conversation_key(row) not in by_prompt]
    if unanswered:
        raise InputError(
            f"{len(unanswered)} of {len(rows)} prompts have no response to compare with, "
            f"{shorten(unanswered[0]['id'])!r} among them",
            where=against,
            remedy=MAKE_REFERENCES,
        )
    return [by_prompt[_conversation_key(row)] for row in rows], answers.digest


def _conversation_key(row: dict) -> str:
    """What a row asks as a string, the same for a text and for its messages."""
    return json.dumps(prefills.conversation_of(row), sort_keys=True)
