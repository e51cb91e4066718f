"""What servers answer: the parts of a chat completion, and of an error, read and checked.

    answer = check_answer(json.loads(content))
    finish, reason = read_finish(answer["choices"][0])

Servers spell the same things in many ways; what is no answer is never read as one. Leaves out the requests
(servers.py).
"""

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai.data.dialogue import is_end_token
from cai.models.reasoning import strip_thinking

Body = dict[str, Any]  # of a request, or of its answer


def check_answer(answer: Any) -> Body:
    """A chat completion; ValueError, or what looking into it raises, if it is none."""
    if answer.get("error"):
        raise ValueError(error_text(answer["error"]))
    message_text(answer["choices"][0]["message"].get("content"))
    for name in ("prompt_tokens", "completion_tokens"):
        if not isinstance((answer.get("usage") or {}).get(name), int | None):
            raise ValueError(f"{name} is not a number")
    for entry in top_logprobs(answer):
        if not isinstance(entry["token"], str) or not isinstance(entry["logprob"], int | float):
            raise ValueError("malformed log-probabilities")
    checked: Body = answer
    return checked


def message_text(content: Any) -> str:
    """The text of a message: of a string, of parts as some servers of reasoning models send them, or of nothing."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str | None):
        raise ValueError("the content is not text")
    (content or "").encode()  # half a character is an error, too
    return content or ""


def count_prompt(answer: Body) -> int:
    """The tokens of the prompt by an answer's usage; 0 where it has none."""
    return (answer.get("usage") or {}).get("prompt_tokens") or 0


# What servers call an answer that came to its end, and one that was cut at its longest length. Only these are answers:
# an error, an abort, a filter or no reason at all leaves a text that nobody knows to be whole.
_ENDED = {
    *("stop", "eos", "eos_token", "end_turn", "end_of_turn", "stop_sequence", "stop_token", "stop_str", "complete"),
    *("completed", "finished", "eos_token_id", "end_of_text", "end_of_sequence"),
}

_CUT = {
    *("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "max_completion_tokens"),
    *("model_length", "token_limit", "max_token", "limit", "model_context_window_exceeded", "max_tokens_reached"),
}


def read_finish(choice: Body) -> tuple[str, str]:
    """(finish, reason) of a choice: "stop", "length", or "failed" with the reason.

    Only `stop`, its synonyms and an end token are a stop. Spellings differ by case, `-`, and the prefix
    `FINISH_REASON_`.
    """
    raw = choice.get("finish_reason")
    if isinstance(raw, str):
        word = re.sub(r"[\s-]+", "_", raw.strip().lower()).removeprefix("finish_reason_").removeprefix("finishreason.")
        if word in _ENDED or is_end_token(raw.strip()):
            return "stop", ""
        if word in _CUT:
            return "length", ""
    error = choice.get("error")
    detail = f": {error_text(error)}" if error else ""
    return "failed", f"the server's finish reason is {json.dumps(raw, ensure_ascii=False)}{detail}"


def top_logprobs(answer: Body) -> list[Body]:
    """The likeliest first tokens with their log-probabilities; [] if the server gave none."""
    first = ((answer["choices"][0].get("logprobs") or {}).get("content") or [{}])[0]
    return [entry for entry in first.get("top_logprobs") or [] if entry["logprob"] is not None]


def label_logprobs(tokens: Sequence[Body], labels: Sequence[str]) -> list[float]:
    """Log-probability of each label, from the tokens that a server lists as the likeliest.

    Args:
        tokens: `{"token": ..., "logprob": ...}`, over the whole vocabulary, so that probabilities add up to 1 at most.
    """
    # A space before a token as SentencePiece and GPT-2 write it.
    words = [(entry["token"].strip(" \n\t\u2581\u0120"), float(entry["logprob"])) for entry in tokens]
    by_label = [[logprob for word, logprob in words if word == label] for label in labels]
    if not any(by_label):
        return [-math.inf] * len(labels)
    lowest = min(logprob for _, logprob in words)
    return [min(0.0, float(np.logaddexp.reduce(logprobs))) if logprobs else lowest for logprobs in by_label]


def without_thinking(text: str, tags: Sequence[tuple[str, str]] = ()) -> str:
    """An answer without reasoning, also where the prompt opened it and the answer has its end only."""
    return strip_thinking(text, tags=tags).strip()


def error_text(body: object) -> str:
    """The message in an error's body."""
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return str(body or "")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, by a number or a date; None if it asks for nothing readable."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name, "")
        try:
            wait = float(value) / unit
        except ValueError:
            date = email.utils.parsedate_tz(value)
            wait = email.utils.mktime_tz(date) - time.time() if date else math.nan
        if math.isfinite(wait):
            return max(0.0, wait)
    return None
