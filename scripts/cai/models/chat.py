"""A tokenizer with its chat template: conversations to text to tokens, and tokens back to an answer.

    chat = Chat(tokenizer)
    ids = chat.encode(chat.render([{"role": "user", "content": "Hello"}]))

Control tokens spelled out in a message are broken up, and reasoning blocks are cut out of answers. Leaves out images
and tools.
"""

import re
from collections.abc import Sequence

from cai.base.errors import InputError, shorten

# How models mark their reasoning: what opens it and what closes it.
THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)

# Stands for a text while a template is tried out. `trim` leaves it alone.
_MARK = "Zx9MARKx9Z"


class Chat:
    """A tokenizer with its chat template: conversation to text to tokens, and an answer's tokens to text.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        name: what to call the model in an error.
    Attributes:
        opened: closing tag of the thinking that the prompt itself opens, or None.
        stop_id, stop_text: what the template ends an assistant's turn with, a control token or plain text.
    """

    def __init__(self, tokenizer, name: str = "the model"):
        self.tokenizer, self.name = tokenizer, name
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template", where=name, remedy=TEMPLATE_REMEDY)
        self._control = _control_pattern(tokenizer)
        user = {"role": "user", "content": _MARK}
        # Multimodal templates read lists of parts and drop a plain string without a word.
        self._parts = False
        self._parts = _MARK not in self._try([user])
        if self._parts and _MARK not in self._try([user]):
            raise InputError("the chat template leaves out what the user says", where=name, remedy=TEMPLATE_REMEDY)
        # Some templates refuse a system role, others ignore it.
        system = {"role": "system", "content": _MARK}
        self._takes_system = _MARK in self._try([system, {**user, "content": "x"}])
        opening = self._try([user]).rpartition(_MARK)[2].rstrip()
        self.opened = next((close for open_, close in THINKING if opening.endswith(open_)), None)
        turns = [{**user, "content": "x"}, {"role": "assistant", "content": _MARK}]
        end = self._try(turns, False).rpartition(_MARK)[2]
        control = self._control and self._control.search(end)
        plain = (end[: control.start()] if control else end).strip()
        self.stop_text = plain or None
        self.stop_id = tokenizer.convert_tokens_to_ids(control[0]) if control and not plain else None

    def render(self, conversation: Sequence[dict]) -> str:
        """The text the model reads, up to where the assistant goes on.

        Control tokens spelled out in a message get a space after their first character, so that text from a
        record can't end a turn or begin another. A system message goes into the first user turn where the
        template takes none. Neighbours of the same role are joined: many templates insist on alternation.
        Raises InputError if the template refuses the conversation all the same.
        """
        from jinja2 import TemplateError

        messages = []
        for message in conversation:
            role, content = message["role"], self.neutralise(message["content"])
            if role == "system" and not self._takes_system:
                role = "user"
            if messages and messages[-1]["role"] == role:
                content = messages.pop()["content"] + "\n\n" + content
            messages.append({"role": role, "content": content})
        try:
            if messages[-1]["role"] != "assistant":
                return self._apply(messages, True)
            # Cut at a mark of our own: the template's trimming can't reach the end of what was begun.
            messages[-1]["content"] += _MARK
            text, found, _ = self._apply(messages, False).rpartition(_MARK)
            if not found:
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
        """Token ids of a rendered text. The template has written the BOS, if any: none is added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each of many texts, in one call, which takes a fraction of the time."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def neutralise(self, text: str) -> str:
        """`text` with every control token broken up by a space."""
        while self._control and self._control.search(text):
            text = self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    def answer(self, ids: Sequence[int], *, continued: bool, stop: Sequence[str] = ()) -> tuple[str, bool]:
        """An answer's text and whether a stop string ended it.

        Args:
            ids: new tokens before the end token.
            continued: the conversation ended with the assistant, whose answer this continues.
            stop: strings that end the answer; they are not part of it.
        """
        # Special tokens stay until the thinking is cut out: in some models they are all that marks it.
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        cuts = [at for at in (text.find(s) for s in self.stops(stop)) if at >= 0]
        text = strip_thinking(text[: min(cuts, default=None)], opened=None if continued else self.opened)
        return (self._control.sub("", text) if self._control else text).strip(), bool(cuts)

    def stops(self, stop: Sequence[str]) -> list[str]:
        """The stop strings given and the template's own."""
        return [s for s in (*stop, self.stop_text) if s]

    def _try(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The rendered text, or "" where the template refuses."""
        from jinja2 import TemplateError

        try:
            return self._apply(messages, add_generation_prompt)
        except (TemplateError, TypeError, ValueError, ArithmeticError):
            return ""

    def _apply(self, messages: list[dict], add_generation_prompt: bool) -> str:
        if self._parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        # Where a template can switch thinking off, it is off: the answer alone is wanted, and trained turns
        # look like that in those templates.
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )


def strip_thinking(text: str, opened: str | None = None) -> str:
    """`text` without the model's reasoning, also where it never came to an end.

    Args:
        opened: closing tag of a block that the prompt has opened; without it all of `text` is thinking.
    """
    if opened:
        text = text.partition(opened)[2]
    for open_, close in THINKING:
        text = re.sub(f"{re.escape(open_)}.*?(?:{re.escape(close)}|\\Z)", "", text, flags=re.DOTALL)
    return text.removeprefix("<|channel|>final<|message|>")  # an answer without thinking, where it has a tag too


TEMPLATE_REMEDY = (
    "Take the instruction-tuned model, or put its chat template beside it as chat_template.jinja "
    "(a Jinja file over `messages`, each with role and content)"
)


def _control_pattern(tokenizer) -> re.Pattern | None:
    """What spells a control token: the special ones, and any added token that the chat template speaks of."""
    template = str(tokenizer.chat_template)
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content in template]
    names = {t for t in [*added, *tokenizer.all_special_tokens] if len(t.strip()) > 1}
    # Longest first, so that a token is found before one that it begins with.
    longest_first = sorted(names, key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, longest_first))) if names else None


def encode(chat: Chat, prompt: list[dict], response: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, up to where the assistant begins, and of the response with its end token.

    Prompt and response are tokenized one by one, because an answer is generated after the tokens of the
    prompt alone. The end is the one the chat template writes, EOS where it writes none: a model that is never
    shown an end never learns to stop. What templates put after it (a line break) is left out.
    """
    before = chat.render(prompt)
    whole = chat.render([*prompt, {"role": "assistant", "content": response}])
    # Some templates begin a turn otherwise than they write one that is over: then take the text alone.
    answer = whole.removeprefix(before) if whole.startswith(before) else chat.neutralise(response)
    if chat.opened:  # the prompt ends within the model's thinking, of which there is none: close it
        answer = f"{chat.opened}\n\n{answer}"
    if chat.stop_id is not None:
        end = [chat.stop_id]
    else:
        end = [*chat.encode(chat.stop_text or ""), chat.tokenizer.eos_token_id]
    return chat.encode(before), [*chat.encode(answer), *end]


def chat_stops(chat: Chat, policy) -> set[int]:
    """Token ids that end a response: the template's end of turn, EOS, and those of the model's settings."""
    declared = policy.generation_config.eos_token_id if policy.generation_config else None
    declared = declared if isinstance(declared, list | tuple) else [declared]
    size = policy.config.get_text_config().vocab_size
    found = {*declared, chat.tokenizer.eos_token_id, chat.stop_id}
    return {int(token) for token in found if token is not None and token < size}
