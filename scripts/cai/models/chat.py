"""A tokenizer with its chat template: conversations to text to tokens, and tokens back to an answer.

    chat = Chat(tokenizer)
    ids = chat.encode(chat.render([{"role": "user", "content": "Hello"}]))

Control tokens spelled out in a message are broken up, and reasoning blocks are cut out of answers. Leaves out images
and tools.
"""

import json
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from functools import cache
from typing import Any

from cai.base import run_settings
from cai.base.errors import InputError, shorten
from cai.data.dialogue import cut_at_end_token
from cai.models.engine import Message
from cai.models.gguf import TEMPLATE_REMEDY
from cai.models.reasoning import closing_tag, strip_thinking

# A string of a template that may be a format of `strftime`. Looked for at every position, since an apostrophe may come
# before it.
_DATE_FORMAT = re.compile(r"(?=(['\"])((?:(?!\1)[^\n])*%[-#]?[A-Za-z](?:(?!\1)[^\n])*)\1)")

# Where the responses that a reward model reads may end (`Chat.set_ending`).
ENDINGS = ("eos", "template")

# Stands for a text while a template is tried out. `trim` leaves it alone.
_MARK = "Zx9MARKx9Z"


class Chat:
    """A tokenizer with its chat template: conversation to text to tokens, and an answer's tokens to text.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        name: what to call the model in an error.
    Attributes:
        opened: closing tag of the reasoning block that the prompt itself opens, or None.
        stop_id, stop_text: the control token, or plain text, with which the template ends an assistant's turn.
        turn_end: what the template writes after the text of an assistant's turn.
        tail: what a scored response has after its end token, as the template writes it: "" unless `set_ending`.
        date: for a template that writes the date (`--date`).
        tags: further reasoning tags (`--reasoning-tags`).
    """

    def __init__(self, tokenizer: Any, name: str = "the model"):
        self.tokenizer, self.name, self._opening = tokenizer, name, ""
        self.adopt_run_settings()
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template", where=name, remedy=TEMPLATE_REMEDY)
        self._control = _control_pattern(tokenizer)
        user = {"role": "user", "content": _MARK}
        # Multimodal templates read lists of parts and silently drop a plain string.
        self._parts = False
        self._parts = _MARK not in self._try([user])
        if self._parts and _MARK not in self._try([user]):
            raise InputError("the chat template leaves out the user's message", where=name, remedy=TEMPLATE_REMEDY)
        # Some templates refuse a system role, others ignore it.
        system = {"role": "system", "content": _MARK}
        self._takes_system = _MARK in self._try([system, {**user, "content": "x"}])
        self._opening = self._try([user]).rpartition(_MARK)[2]
        self.opened = closing_tag(self._opening, self.tags)
        turns = [{**user, "content": "x"}, {"role": "assistant", "content": _MARK}]
        end = self._try(turns, False).rpartition(_MARK)[2]
        control = self._control.search(end) if self._control else None
        self.stop_text = (end[: control.start()] if control else end).strip() or None
        self.stop_id = tokenizer.convert_tokens_to_ids(control[0]) if control and not self.stop_text else None
        self.turn_end, self.tail = end, ""

    def set_ending(self, ending: str) -> "Chat":
        """Choose where the responses that a reward model reads end; returns the chat.

        ending: one of `ENDINGS`. "eos": at the end token. "template": where the chat template ends a turn, which in
            ChatML and Gemma is a line break later.
        """
        end_token = None if self.stop_id is None else self.tokenizer.convert_ids_to_tokens(self.stop_id)
        self.tail = self.turn_end.partition(end_token)[2] if end_token and ending == "template" else ""
        return self

    def adopt_run_settings(self) -> None:
        """Take the date and the reasoning tags of the running command: an engine outlives the command it is from."""
        self.date, self.tags = run_settings.run_date(), run_settings.reasoning_tags()
        self.opened = closing_tag(self._opening, self.tags)

    def render(self, conversation: Sequence[Message]) -> str:
        """The text that the model reads, up to where the assistant goes on.

        Raises InputError if the template refuses the conversation, in spite of `join_turns`.
        """
        from jinja2 import TemplateError

        messages = join_turns(conversation, self._control, self._takes_system)
        try:
            if messages[-1]["role"] != "assistant":
                return self._apply(messages, True)
            # Cut at a mark of our own: the template's trimming can't reach the end of the prefill.
            messages[-1]["content"] += _MARK
            text, mark, _ = self._apply(messages, False).rpartition(_MARK)
            if not mark:
                raise TemplateError("it leaves out the last message")
            return text
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise InputError(
                f"the chat template refuses a conversation of {roles}: {shorten(error)}",
                where=self.name,
                expected="user and assistant in turn, the user first",
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text. No BOS is added: the template writes it, if any."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts in one call, which takes a fraction of the time."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def neutralise(self, text: str) -> str:
        """`text` with every control token broken up by a space."""
        return break_up(text, self._control)

    def answer(self, ids: Sequence[int], *, continued: bool, stop: Sequence[str] = ()) -> tuple[str, bool]:
        """An answer's text and whether a stop string ended it.

        Args:
            ids: new tokens before the end token.
            continued: the answer continues the conversation's last message (a prefill).
            stop: strings that end the answer; they are not part of it.
        """
        # Special tokens stay until the reasoning is cut out: in some models they alone mark it.
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        cuts = [at for at in (text.find(s) for s in self.stops(stop)) if at >= 0]
        text = strip_thinking(text[: min(cuts, default=None)], None if continued else self.opened, self.tags)
        return cut_at_end_token(self._control.sub("", text) if self._control else text).strip(), bool(cuts)

    def stops(self, stop: Sequence[str]) -> list[str]:
        """The stop strings of the caller and the template's own."""
        return [s for s in (*stop, self.stop_text) if s]

    def _try(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The rendered text, or "" where the template refuses."""
        from jinja2 import TemplateError

        try:
            return self._apply(messages, add_generation_prompt)
        except (TemplateError, TypeError, ValueError, ArithmeticError):
            return ""

    def _apply(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        if self._parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        # Reasoning is off where a template can switch it off: the answer alone is wanted, and these templates write
        # past turns without reasoning.
        settings: dict[str, Any] = {"enable_thinking": False}
        if "strftime_now" in str(self.tokenizer.chat_template):
            settings["chat_template"] = fix_template_date(self.tokenizer.get_chat_template(), self.date)
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **settings
        )
        return str(rendered)


@cache
def fix_template_date(template: str, day: date) -> str:
    """A chat template whose `strftime_now` writes this day, at midnight.

    The function is shadowed by a macro that knows every format in the template's strings: transformers takes no
    function from its callers.
    """
    midnight = datetime.combine(day, time.min)
    formats = {match[2] for match in _DATE_FORMAT.finditer(template)}
    texts = json.dumps({layout: midnight.strftime(layout) for layout in sorted(formats)})
    return (
        f"{{% macro strftime_now(format) %}}{{{{ ({texts})[format] if format in ({texts}) "
        "else raise_exception('a date in the format ' ~ format) }}{% endmacro %}\n"
    ) + template


def break_up(text: str, control: re.Pattern[str] | None) -> str:
    """`text` with a space after the first character of every control token."""
    while control and control.search(text):
        text = control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def join_turns(
    conversation: Sequence[Message], control: re.Pattern[str] | None, takes_system: bool
) -> list[dict[str, str]]:
    """The conversation in a form that most chat templates accept.

    Control tokens in a message are broken up: text from a record can't end a turn or begin another. A system message
    goes into the first user turn where the template takes none. Neighbours of the same role are joined, because many
    templates insist on alternation.
    """
    turns: list[dict[str, str]] = []
    for message in conversation:
        role, content = message["role"], break_up(message["content"], control)
        if role == "system" and not takes_system:
            role = "user"
        if turns and turns[-1]["role"] == role:
            content = f"{turns.pop()['content']}\n\n{content}"
        turns.append({"role": role, "content": content})
    return turns


def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches control tokens: the special ones, and any added token that the chat template contains."""
    template = str(tokenizer.chat_template)
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content in template]
    names = {t for t in [*added, *tokenizer.all_special_tokens] if len(t.strip()) > 1}
    # Longest first: a token must match before another one that it begins with.
    longest_first = sorted(names, key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, longest_first))) if names else None


def encode(
    chat: Chat, prompt: Sequence[Message], response: str, *, is_cut: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, up to where the assistant goes on, and of the response with its end token.

    A response that `is_cut`, at a limit of tokens, has no end token: it does not end there.

    A prompt that ends with the assistant has a prefilled answer, and the response is what follows it.
    Prompt and response are tokenized separately, because an answer is generated after the tokens of the prompt
    alone. The end token is the one that the chat template writes, EOS where it writes none: a model that never sees
    an end token in training never learns to stop. What templates put after it (a line break) is left out, unless
    the chat has a `tail`.
    """
    before = chat.render(prompt)
    prefill = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    written = f" {response}" if prefill and response else response
    turns = prompt[:-1] if prefill else prompt
    rendered = chat.render([*turns, {"role": "assistant", "content": prefill + written}])
    # Some templates begin a finished turn differently from an open one: then take the text alone.
    answer = rendered.removeprefix(before) if rendered.startswith(before) else chat.neutralise(written)
    if chat.opened and not prefill:  # the prompt ends within a reasoning block: close it, since there is no reasoning
        answer = f"{chat.opened}\n\n{answer}"
    if is_cut:
        return chat.encode(before), chat.encode(answer)
    end = [*chat.encode(chat.stop_text or ""), chat.tokenizer.eos_token_id] if chat.stop_id is None else [chat.stop_id]
    return chat.encode(before), [*chat.encode(answer), *end, *(chat.encode(chat.tail) if chat.tail else ())]


def chat_stops(chat: Chat, model: Any) -> set[int]:
    """Token ids that end a response: the template's end of turn, EOS, and those of the model's settings."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ends = [
        *(declared if isinstance(declared, list | tuple) else [declared]),
        chat.tokenizer.eos_token_id,
        chat.stop_id,
    ]
    size = model.config.get_text_config().vocab_size
    return {int(token) for token in ends if token is not None and token < size}


def unknown_tokens(chat: Chat, size: int) -> list[str]:
    """The tokens beyond an embedding of `size` rows that a conversation or its end can hold.

    Left out are control tokens that the chat template does not write, since they are broken up in every message, and
    the padding token, in whose place another one is taken.
    """
    tokenizer = chat.tokenizer
    unknown = {token: number for token, number in tokenizer.get_vocab().items() if number >= size}
    if not unknown:
        return []
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
    written = {*chat.encode(chat.render(turns)), chat.stop_id, tokenizer.eos_token_id}
    reachable = [token for token, number in unknown.items() if number in written or token not in special]
    return sorted(reachable, key=unknown.__getitem__)


def check_embedding(chat: Chat, size: int) -> None:
    """Raise InputError for `unknown_tokens`.

    Args:
        size: rows of the model's embedding.
    """
    if unknown := unknown_tokens(chat, size):
        names = ", ".join(map(repr, unknown[:4])) + (", ..." if len(unknown) > 4 else "")
        raise InputError(
            f"the tokenizer has tokens beyond the model's embedding of {size} rows: {names}",
            where=chat.name,
            expected="an embedding with a row per token",
            remedy="Take the tokenizer that belongs to the weights, or add the rows and train them: "
            "model.resize_token_embeddings(len(tokenizer)), then save both",
        )
