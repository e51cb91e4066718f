"""Conversations: transcripts to chat messages, chat messages to text, and the turns that two of them share.

    split_transcript("\n\nHuman: Hello\n\nAssistant:")     # [{"role": "user", "content": "Hello"}, ...]

Leaves out chat templates of models (models/chat.py).
"""

import re
from itertools import takewhile

# White space with an empty line in it, then the label. Possessive, and from where the white space begins: a text of
# nothing but line breaks is read once, not once for each of them.
_MARKS = re.compile(r"(?:\A|(?<!\s)(?:(?!\n\n)\s)*+\n\n\s*+)(Human|Assistant):")


def split_transcript(transcript: str) -> list[dict] | None:
    r"""Messages of a `\n\nHuman: ... \n\nAssistant: ...` transcript, or None if the text is none.

    Neighbouring turns of one role (they occur in HH-RLHF) become one, since chat templates want the
    roles to alternate.
    """
    text = transcript.lstrip()
    if not text.startswith("Human:") or not ("\n\nAssistant:" in text or transcript.startswith("\n\n")):
        return None
    parts = _MARKS.split(text)[1:]
    turns: list[dict] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = ("user" if speaker == "Human" else "assistant"), said.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{said}"
        else:
            turns.append({"role": role, "content": said})
    return turns


def transcript_text(turns: list[dict]) -> str:
    """What one side of a pair said after the shared turns, as text."""
    names = {"user": "Human", "assistant": "Assistant"}
    text = "\n\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in turns)
    return text.removeprefix("Assistant:").strip()


def side_turns(side: str | list) -> list[dict] | None:
    """One side of a pair as messages: of a transcript, or TRL's list of them; None if it is neither."""
    if isinstance(side, str):
        return split_transcript(side)
    known = all(
        isinstance(one, dict)
        and isinstance(one.get("content"), str)
        and (one.get("role") in ("user", "assistant") or (one.get("role") == "system" and place == 0))
        for place, one in enumerate(side)
    )
    return side if side and known else None


def split_pair(row: dict) -> dict:
    """Two whole conversations (HH-RLHF's transcripts, TRL's messages) as their shared turns and what follows in each.

    In 1 of 1,500 rows the two part before the last turn; then the rest of the transcript is kept as text.
    """
    sides = {side: side_turns(row[side]) for side in ("chosen", "rejected")}
    if not all(sides.values()):
        return row
    turns = list(zip(sides["chosen"], sides["rejected"], strict=False))
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], turns)]
    shared = shared[: min(len(side) for side in sides.values()) - 1]  # each keeps an answer of its own
    while shared and shared[-1]["role"] != "user":
        shared.pop()
    if not shared:
        return row
    answers = {side: transcript_text(said[len(shared) :]) for side, said in sides.items()}
    return {**row, "prompt": shared if len(shared) > 1 else shared[0]["content"], **answers}


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt as one text: itself, or a transcript where it has more than one turn."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n".join(f"{names.get(m['role'], m['role'])}: {m['content']}" for m in prompt)
