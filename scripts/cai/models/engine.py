"""What an engine takes and returns: sampling settings and generations."""

from dataclasses import dataclass


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
