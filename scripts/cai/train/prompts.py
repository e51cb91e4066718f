"""Prompts of reinforcement learning, encoded and checked against the policy's context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cai.base.errors import InputError, shorten
from cai.models.chat import Chat

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user, its token ids up to where the assistant begins, and its kind if known."""

    messages: list[dict]
    ids: "Tensor"
    kind: str | None = None


def encode_prompts(
    conversations: Sequence[list[dict]],
    chat: Chat,
    policy,
    max_new_tokens: int,
    kinds: Sequence[str | None] | None = None,
) -> list[Prompt]:
    """The prompts of a run. InputError for one that leaves no room for a response in the policy's context."""
    import torch

    kinds = kinds or [None] * len(conversations)
    prompts = [
        Prompt(messages, torch.tensor(chat.encode(chat.render(messages))), kind)
        for messages, kind in zip(conversations, kinds, strict=True)
    ]
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if context and len(longest.ids) + max_new_tokens > context:
        raise InputError(
            f"a prompt of {len(longest.ids)} tokens ({shorten(longest.messages[-1]['content'])!r}) and "
            f"{max_new_tokens} new ones do not fit the model's context of {context}",
            where="--input",
            remedy="Leave out long prompts, or lower --max-new-tokens",
        )
    return prompts
