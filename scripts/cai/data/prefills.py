"""Rows whose answer is prefilled: the beginning of the assistant's turn is given, and the response goes on from it.

    conversation_of(row)                      # the prompt's messages, and the prefill as the assistant's beginning
    join_prefill("Sure.", "But no: ...")      # the response, whole: "Sure. But no: ..."

In a row `prefill` is that beginning; `prompt` does not hold it, and `response`, revisions, `chosen` and `rejected` do.
A model is trained on what follows it. Leaves out where prefills come from (constitution/frames.py).
"""

from collections.abc import Mapping
from typing import Any

from cai.base.errors import InputError, shorten
from cai.data import dialogue

Message = dict[str, Any]


def prefill_of(row: Mapping[str, Any]) -> str:
    """The given beginning of the row's answer, "" if there is none."""
    return str(row.get("prefill") or "")


def begin_answer(messages: list[Message], prefill: str) -> list[Message]:
    """The conversation with the assistant's turn prefilled, after a prefill of its own; unchanged without a prefill."""
    if not prefill:
        return messages
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        prefill = f"{last['content']} {prefill}"
    return [*messages, {"role": "assistant", "content": prefill}]


def conversation_of(row: Mapping[str, Any]) -> list[Message]:
    """What a model is asked: the prompt's messages, and the prefill as the assistant's message that it continues."""
    return begin_answer(dialogue.as_messages(row["prompt"]), prefill_of(row))


def join_prefill(prefill: str, continuation: str) -> str:
    """The response, whole."""
    return f"{prefill} {continuation}".rstrip() if prefill else continuation


def continuation_of(row: Mapping[str, Any], text: str) -> str:
    """What follows the row's prefill in a text of it: what a model wrote, and is trained on.

    Raises ValueError if the text does not begin with the prefill.
    """
    prefill = prefill_of(row)
    if not text.startswith(prefill):
        raise ValueError(f"it does not begin with the prefill {shorten(prefill)!r}: {shorten(text)!r}")
    return text[len(prefill) :].lstrip() if prefill else text


def check_prefill(row: Mapping[str, Any], where: str, line: int) -> None:
    """Raise InputError unless `prefill` is a text, and the row's texts begin with it."""
    prefill = row.get("prefill")
    if prefill is None:
        return
    if not isinstance(prefill, str) or not prefill or dialogue.cut_at_end_token(prefill.strip()) != prefill:
        raise InputError(
            f"the prefill is {shorten(prefill)!r}",
            where=where,
            line=line,
            expected="the beginning of the answer: a text without space around it, and without an end token",
            remedy="Fix it, or leave the column out",
        )
    rounds = row.get("rounds")
    revisions = [each.get("revision") for each in rounds if isinstance(each, dict)] if isinstance(rounds, list) else []
    texts = [row.get(name) for name in ("response", "response_a", "response_b", "chosen", "rejected")]
    for text in (*texts, *revisions):
        if isinstance(text, str) and not text.startswith(prefill):
            raise InputError(
                f"a text that does not begin with the row's prefill {shorten(prefill)!r}: {shorten(text)!r}",
                where=where,
                line=line,
                expected="responses with the prefill in front",
                remedy="Fix or delete this row",
            )
