"""Rows in the shapes that data sets are published in, as rows of ours: `prompt`, `response`, `chosen`, `rejected`.

    row = normalise(row, ("prompt", "chosen", "rejected"), partial(InputError, where="rows.jsonl", line=1))

Read are messages ({role, content}), ShareGPT's ({from, value}), HH-RLHF's transcripts and plain text, in `prompt`,
`messages` or `conversations`, and in the responses; TRL's prompt, explicit or in both sides; lists of messages that a
CSV file or pandas has saved as text. What a row needs by its role (`require`) must be clear or is an error; other
columns are carried along. Leaves out other names of columns (reading.py) and what a prompt must be (sources.py).
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from cai.base.errors import LEAVE_OUT, InputError, shorten
from cai.data.dialogue import (
    as_messages,
    prompt_text,
    shared_turns,
    side_turns,
    split_pair,
    split_transcript,
    transcript_text,
)
from cai.data.readers import Row, check_depth, doubled, parse_json

SIDES = ("chosen", "rejected")

CONVERSATIONS = ("messages", "conversations")

_Error = Callable[..., InputError]

# ShareGPT's speakers, as LLaMA-Factory, FastChat and Axolotl document them.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

_SHAPES = (("role", "content"), ("from", "value"))

_SKIP = f"Fix this row, {LEAVE_OUT}"


def normalise(row: Row, require: Sequence[str], error: _Error) -> Row:
    """The row with the fields that `require` names, as text or messages, from whatever shape it has.

    A field that cannot be found is not added. Raises `error(...)` where it is not clear what the prompt or the
    response is.
    """
    row = _read_columns(row, require, error)
    if set(SIDES) <= set(require):
        row = _read_pair(row, error)
    elif "response" in require:
        row = _read_response(row, error)
    elif row.get("prompt") is None:
        row = _read_prompt(row, error)
    for name in SIDES:  # TRL's answer as messages, carried along
        turns = side_turns(row[name]) if row.get("prompt") is not None and isinstance(row.get(name), list) else None
        if turns and turns[0]["role"] != "system":
            row = {**row, name: transcript_text(turns)}
    return row


# --- messages -----------------------------------------------------------------------------------------------


def parse_messages(text: str) -> list[Row] | None:
    """The messages that a text is, if it is nothing but a list of them, as JSON or as Python prints it.

    None for any other text. ValueError for one that looks like such a list and cannot be read as one.
    """
    text = text.strip()
    if not re.match(r"\[\s*\{|\{", text):
        return None
    for parse in (parse_json, _parse_literal):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        items = value if isinstance(value, list) else [value]
        are_messages = [isinstance(item, dict) and any(set(shape) <= set(item) for shape in _SHAPES) for item in items]
        if items and all(are_messages):
            return items
        if any(are_messages):
            raise ValueError("some of its items are messages, and some are not")
        return None
    keys = set(re.findall(r"""["'](\w+)["']\s*:""", text))
    if text.startswith("[") and any(set(shape) <= keys for shape in _SHAPES):
        raise ValueError("it is neither JSON nor a Python list")
    return None


def _parse_literal(text: str) -> Any:
    """What `repr` of lists, dicts, texts and numbers gives. ValueError or SyntaxError for anything else."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if doubled(map(str, keys)) is not None:
                raise ValueError("the same key twice")
    value = ast.literal_eval(tree)
    check_depth(value)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def read_message(message: Any) -> Any:
    """A message of ShareGPT, or one whose content is a list of text parts, as {role, content}; others as they are."""
    if not isinstance(message, dict):
        return message
    if "role" not in message and set(_SHAPES[1]) <= set(message):
        message = {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
    content = message.get("content")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        message = {**message, "content": "".join(part["text"] for part in content)}
    return message


def _is_text_part(part: Any) -> bool:
    """OpenAI's {type: text, text}."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _read_columns(row: Row, require: Sequence[str], error: _Error) -> Row:
    """The row with messages in one form wherever its columns hold them."""
    # What a model wrote is text, whatever it looks like.
    is_ours = any(name in row for name in ("finish", "rounds", "p_a", "verdicts"))
    names = ["prompt", *CONVERSATIONS]
    if not is_ours:
        is_pair = set(SIDES) <= set(require) or row.get("prompt") is None
        names += [*(["response"] if "response" in require else []), *(SIDES if is_pair else [])]
    changed: Row = {}
    for name in names:
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = parse_messages(value)
            except ValueError as problem:
                raise error(
                    f"{name!r} looks like a list of messages saved as text, but {problem}: {shorten(row[name])!r}",
                    expected="JSON, or a list as Python prints it, of {role, content}",
                    remedy="Save it with json.dumps, or as JSON Lines or Parquet",
                ) from problem
        elif isinstance(value, dict) and name != "prompt":
            value = [value]
        if isinstance(value, list):
            messages = [read_message(message) for message in value]
            if messages != row[name]:
                changed[name] = messages
    return {**row, **changed} if changed else row


def _conversation(row: Row, error: _Error) -> list[Row] | None:
    """The turns of `messages` or `conversations`, or None if the row has neither."""
    name = next((name for name in CONVERSATIONS if row.get(name)), None)
    if name is None:
        return None
    turns = side_turns(row[name]) if isinstance(row[name], list) else None
    if turns is None:
        raise error(
            f"{name!r} is not a conversation: {shorten(row[name])!r}",
            expected="a list of {role, content} or {from, value}, of system, user and assistant",
            remedy=_SKIP,
        )
    return _plain(turns)


def _plain(turns: Sequence[Row]) -> list[Row]:
    """The turns with role and content only, so that two can be compared."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _is_whole(turns: Sequence[Row] | None) -> bool:
    """Whether the turns begin with the user's, and so repeat the prompt."""
    return bool(turns) and next((turn["role"] for turn in turns or () if turn["role"] != "system"), None) == "user"


def _as_prompt(turns: list[Row]) -> str | list[Row]:
    return turns if len(turns) > 1 else str(turns[0]["content"])


# --- the prompt, and one response ---------------------------------------------------------------------------


def _read_prompt(row: Row, error: _Error) -> Row:
    """The prompt of a row without one: what a pair shares, or a conversation up to its last answer."""
    if all(isinstance(row.get(name), str | list) for name in SIDES):
        row = split_pair(row)
    if row.get("prompt") is None and (turns := _conversation(row, error)):
        before = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if before:
            row = {**row, "prompt": _as_prompt(before)}
    return row


def _read_response(row: Row, error: _Error) -> Row:
    """A row of one response: in `response`, or as the last turn of a conversation."""
    response = row.get("response")
    turns = _conversation(row, error) if response is None or row.get("prompt") is None else None
    if isinstance(response, list):
        turns = side_turns(response)
        if turns is None or turns[-1]["role"] != "assistant" or not (_is_whole(turns) or len(turns) == 1):
            raise error(
                f"'response' is a list: {shorten(response)!r}",
                expected="a string, an assistant's message, or a conversation that ends with one",
                remedy=_SKIP,
            )
        turns = _plain(turns)
        row = {**row, "response": turns[-1]["content"]}
    elif response is None and turns:
        if turns[-1]["role"] != "assistant":
            raise error(
                "the conversation ends without an answer", expected="a last turn of the assistant", remedy=_SKIP
            )
        row = {**row, "response": turns[-1]["content"]}
    if turns and turns[-1] == {"role": "assistant", "content": row["response"]}:
        turns = turns[:-1]
    return _with_prompt(row, turns, error) if turns else row


def _with_prompt(row: Row, turns: list[Row], error: _Error) -> Row:
    """The row with the turns as its prompt, which must contain the prompt that it has already."""
    prompt = row.get("prompt")
    if prompt is not None:
        if _is_prompt(prompt) and not isinstance(prompt, str) and prompt[0]["role"] == "system" != turns[0]["role"]:
            turns = [*_plain(prompt[:1]), *turns]
        if not _contains(turns, prompt):
            shown = prompt_text(prompt) if _is_prompt(prompt) else prompt
            raise error(
                f"the prompt is not in the conversation: {shorten(shown)!r}",
                expected="one of its user's turns, or the turns before the response",
                remedy="Fix this row, delete one of the two columns, or leave the row out with --skip-invalid",
            )
    return {**row, "prompt": _as_prompt(turns)}


def _prompt_turns(prompt: str | list[Row]) -> list[Row]:
    """The turns of a prompt: of a text, of a transcript without an empty answer at its end, or of messages."""
    turns = (split_transcript(prompt) if isinstance(prompt, str) else None) or as_messages(prompt)
    return turns[:-1] if len(turns) > 1 and turns[-1]["role"] == "assistant" and not _text(turns[-1]) else turns


def _is_prompt(prompt: Any) -> TypeGuard[str | list[Row]]:
    return isinstance(prompt, str) or bool(isinstance(prompt, list) and prompt and side_turns(prompt))


def _contains(turns: Sequence[Row], prompt: Any) -> bool:
    """Whether a prompt, as text, transcript or messages, is a part of the turns: all, the first ones or the last."""
    if not _is_prompt(prompt):
        return False
    if isinstance(prompt, str) and prompt.strip() == prompt_text(turns).strip():
        return True
    wanted = [(turn["role"], _text(turn)) for turn in _prompt_turns(prompt)]
    given = [(turn["role"], _text(turn)) for turn in turns]
    return any(given[start : start + len(wanted)] == wanted for start in range(len(given) - len(wanted) + 1))


def _text(turn: Row) -> str:
    return str(turn["content"]).strip()


# --- two responses ------------------------------------------------------------------------------------------


def _read_pair(row: Row, error: _Error) -> Row:
    """A row of a chosen and a rejected response, each on its own or at the end of the whole conversation."""
    sides = [row.get(name) for name in SIDES]
    if "response_a" in row or not all(isinstance(side, str | list) and side != [] for side in sides):
        return row  # of judge.py, undecided, or wrong: the checks of the fields say it
    turns = [side_turns(side) for side in sides]  # type: ignore[arg-type]
    if any(isinstance(side, list) and side_turn is None for side, side_turn in zip(sides, turns, strict=True)):
        return row
    whole = [_is_whole(side) for side in turns]
    if all(whole):
        return _split_conversations(row, turns, error)  # type: ignore[arg-type]
    if any(whole):
        raise error(
            f"{SIDES[whole.index(True)]!r} is a whole conversation, and {SIDES[whole.index(False)]!r} is not",
            expected="two responses of the same shape",
            remedy=_SKIP,
        )
    if row.get("prompt") is None and (conversation := _conversation(row, error)):
        row = {**row, "prompt": _as_prompt(conversation)}
    prompt = row.get("prompt")
    texts = [side for side in sides if isinstance(side, str)]
    if _is_prompt(prompt) and len(texts) == 2 and all(_repeats(prompt, text) for text in texts):
        raise error(
            f"both responses begin with the prompt {shorten(prompt_text(prompt))!r}",
            expected="responses without the prompt, or two lists of messages",
            remedy="Take the prompt out of both, or leave the row out with --skip-invalid",
        )
    return row


def _repeats(prompt: str | list[Row], response: str) -> bool:
    """Whether a text is the prompt, or its last turn, then white space, then more."""
    texts = {prompt_text(prompt).strip(), _text(_prompt_turns(prompt)[-1])} - {""}
    response = response.strip()
    return any(response.startswith(text) and response[len(text) : len(text) + 1].isspace() for text in texts)


def _split_conversations(row: Row, sides: list[list[Row]], error: _Error) -> Row:
    """Two whole conversations as the turns that they share, and what follows in each."""
    are_transcripts = all(isinstance(row[name], str) for name in SIDES)
    chosen, rejected = map(_plain, sides)
    shared = shared_turns(chosen, rejected)
    if not shared:
        raise error(
            "the two conversations do not begin with the same turns",
            expected="the same prompt in both, and a response of its own in each",
            remedy=_SKIP,
        )
    rest = {"chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
    for name, turns in rest.items():
        if not are_transcripts and [turn["role"] for turn in turns] != ["assistant"]:
            raise error(
                f"after the shared turns {name!r} has {len(turns)} turns: {shorten(transcript_text(turns))!r}",
                expected="one answer of the assistant",
                remedy=_SKIP,
            )
    row = _with_prompt(row, shared, error)
    return {**row, **{name: transcript_text(turns) for name, turns in rest.items()}}
