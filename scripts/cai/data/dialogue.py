"""Conversations: transcripts to chat messages, chat messages to text, and the turns that two of them share.

    split_transcript("\n\nHuman: Hello\n\nAssistant:")     # [{"role": "user", "content": "Hello"}, ...]

Also where an answer ends that a server or a file gives with the control tokens in it (`cut_at_end_token`). Leaves out
the chat templates of models (models/chat.py).
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

_Message = dict[str, Any]

_SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}

# White space with an empty line in it, then the label. Possessive, and from where the white space begins: a text of
# nothing but line breaks is read once, not once for each of them.
_MARKS = re.compile(r"(?:\A|(?<!\s)(?:(?!\n\n)\s)*+\n\n\s*+)(Human|Assistant):")


def split_transcript(transcript: str) -> list[_Message] | None:
    r"""Messages of a `\n\nHuman: ... \n\nAssistant: ...` transcript, or None if the text is not one.

    Neighbouring turns of one role (they occur in HH-RLHF) become one, since chat templates want the
    roles to alternate.
    """
    text = transcript.lstrip()
    if not text.startswith("Human:") or not ("\n\nAssistant:" in text or transcript.startswith("\n\n")):
        return None
    parts = _MARKS.split(text)[1:]
    turns: list[_Message] = []
    for speaker, content in zip(parts[::2], map(str.strip, parts[1::2]), strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns.append({"role": role, "content": content})
    return turns


def _transcript(turns: Sequence[_Message]) -> str:
    return "\n\n".join(f"{_SPEAKERS.get(turn['role'], turn['role'])}: {turn['content']}" for turn in turns)


def transcript_text(turns: Sequence[_Message]) -> str:
    """What follows the shared turns in one side of a pair, as text."""
    return _transcript(turns).removeprefix("Assistant:").strip()


def side_turns(side: str | list[Any]) -> list[_Message] | None:
    """One side of a pair as messages: of a transcript, or TRL's list of them; None if it is neither."""
    if isinstance(side, str):
        return split_transcript(side)
    are_messages = all(
        isinstance(message, dict)
        and isinstance(message.get("content"), str)
        and (message.get("role") in ("user", "assistant") or (message.get("role") == "system" and index == 0))
        for index, message in enumerate(side)
    )
    return side if side and are_messages else None


def shared_turns(chosen: Sequence[_Message], rejected: Sequence[_Message]) -> list[_Message]:
    """The turns that two conversations begin with, up to a user's; each of the two keeps an answer of its own."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = [turn for turn, _ in pairs][: min(len(chosen), len(rejected)) - 1]
    while shared and shared[-1]["role"] != "user":
        shared.pop()
    return shared


def split_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Two complete conversations (HH-RLHF's transcripts, TRL's messages) as their shared turns and what follows in
    each.

    In 1 of 1,500 rows the two part before the last turn; then the rest of the transcript is kept as text.
    """
    chosen, rejected = side_turns(row["chosen"]), side_turns(row["rejected"])
    if not chosen or not rejected:
        return row
    shared = shared_turns(chosen, rejected)
    if not shared:
        return row
    answers = {"chosen": transcript_text(chosen[len(shared) :]), "rejected": transcript_text(rejected[len(shared) :])}
    return {**row, "prompt": shared if len(shared) > 1 else shared[0]["content"], **answers}


def is_blank(text: str) -> bool:
    """Whether a text has no character that can be seen: white space and invisible characters alone."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def as_messages(prompt: str | Sequence[_Message]) -> list[_Message]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def add_system(messages: Sequence[_Message], text: str) -> list[_Message]:
    """The conversation with a text in front of its system message, or as its system message where it has none."""
    if not text:
        return list(messages)
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def prompt_text(prompt: str | Sequence[_Message]) -> str:
    """A prompt as one text: itself, or a transcript where it has more than one turn."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt[0]["content"]) if len(prompt) == 1 else _transcript(prompt)


# --- control tokens in a text ---------------------------------------------------------------------------------------

# Control tokens that end an answer, as the families of models spell them: end of turn or of text, or the header of the
# next turn where a model went on without an end.
_END_TOKENS = re.compile(
    r"<[|｜](?:im_end|im_start|eot_id|eom_id|eot|EOT|end|endoftext|end_of_text|end_of_turn|end_of_sentence|eos|EOS"
    r"|eoa|eom|end_of_message|endofturn|endofassistant|return|call|separator|stop|start_header_id|header_start"
    r"|begin_of_text|startoftext|bos|user|User|assistant|Assistant|system|System|observation|start_of_role|im_user"
    r"|im_assistant|im_system|start|END_OF_TURN_TOKEN|START_OF_TURN_TOKEN|END_RESPONSE|end▁of▁sentence"
    r"|begin▁of▁sentence|EOS_TOKEN|eod)[|｜]>"
    r"|<(?:end_of_turn|start_of_turn|eos|bos|eot|eoa|eoh|EOT|eod|end_of_utterance|turn\||\|turn)>"
    r"|<extra_id_1>|\[\|endofturn\|\]|\[/?INST\]|\[EOS\]|</s>|<s>\Z"
)

# The header of the assistant's own turn, which some servers repeat before the answer.
_ANSWER_HEADER = re.compile(
    r"(?:\s*(?:<\|(?:im_start|start|im_assistant|start_of_role)\|>\s*assistant\s*(?:<\|(?:im_middle|end_of_role)\|>)?"
    r"|<\|(?:start_header_id|header_start)\|>\s*assistant\s*<\|(?:end_header_id|header_end)\|>"
    r"|<start_of_turn>\s*(?:model|assistant)\b|<[|｜](?:assistant|Assistant|begin_of_text|startoftext|bos|start"
    r"|begin▁of▁sentence|START_OF_TURN_TOKEN|CHATBOT_TOKEN|START_RESPONSE)[|｜]>|<s>|<bos>|\[/INST\]|<\|message\|>))+\s*"
)

_STRIKE = re.compile(r"<(/?)s>")


def cut_at_end_token(text: str) -> str:
    """A response up to the first control token that ends a turn, in the spelling of any known family of models.

    Such a token in a text is a model's own end that a server, or whoever made a file, did not take out; trained on, it
    would be broken up into pieces. The header of the answer's own turn in front is taken off. `</s>` after a `<s>` is
    HTML's struck-out text and stays.
    """
    header = _ANSWER_HEADER.match(text)
    start = header.end() if header else 0
    for match in _END_TOKENS.finditer(text, start):
        if match[0] == "</s>" and _is_strike(text[start : match.end()]):
            continue
        return text[start : match.start()].rstrip()
    return text[start:]


def is_end_token(text: str) -> bool:
    """Whether a text is nothing but a control token that ends a turn."""
    return _END_TOKENS.fullmatch(text) is not None


def _is_strike(text: str) -> bool:
    """Whether the `</s>` at the end of the text closes an `<s>` of HTML."""
    depth = 0
    for mark in _STRIKE.finditer(text):
        depth = depth - 1 if mark[1] else depth + 1
    return depth >= 0
