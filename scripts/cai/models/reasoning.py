"""A model's reasoning cut out of its answers: blocks between tags, as the families of models spell them.

    strip_thinking("<think>Hm.</think>Hello.")       # "Hello."
    has_reasoning_tag("Hello.</think>")              # True: something was not recognised

The spellings are those of published chat templates and of the reasoning parsers of vLLM and SGLang, and beyond them
any tag whose name is a word for reasoning, at the beginning of an answer. `--reasoning-tags` adds a pair of your own.
Leaves out reasoning without tags.
"""

import re
from collections.abc import Sequence

# Tags that are not a name in brackets, or that only ever mean reasoning: their blocks are cut out wherever they are.
THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<unused94>thought", "<unused95>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)

_WORD = (
    r"(?:think(?:ing)?|thoughts?|reason(?:ing|s)?|reflect(?:ion|ions|ing)?|analysis|cot|chain[_-]of[_-]thought"
    r"|scratch[_-]?pad|(?:inner[_-])?monologue|deliberat(?:ion|ing)|rationale)"
)

_NAME = rf"(?:[a-z0-9]{{1,20}}[:._-]){{0,3}}{_WORD}(?:[:_-][a-z0-9]{{1,20}}){{0,3}}"

_BAR = r"[|｜]"

_GAP = r"[_▁ ]"

# What opens a block whose name is a word for reasoning, by the shape of its brackets, and what closes it.
_SHAPES = (
    (rf"<(?P<name>{_NAME})(?:\s[^<>\n]{{0,80}})?>", r"</{name}\s*>"),
    (r"\[(?P<name>(?-i:THINK|THINKING|THOUGHT|REASON|REASONING|REFLECTION))\]", r"\[/{name}\]"),
    (rf"◁(?P<name>{_NAME})▷", "◁/{name}▷"),
    (
        rf"<{_BAR}(?:(?:begin|start){_GAP}(?:of{_GAP})?)?(?P<name>{_NAME}?)(?:{_GAP}(?:begin|start))?{_BAR}>",
        rf"<{_BAR}(?:/|(?:end|stop){_GAP}(?:of{_GAP})?){{name}}{_BAR}>|<{_BAR}{{name}}{_GAP}(?:end|stop){_BAR}>"
        r"|<\|end\|>\s*<\|begin\|>assistant<\|content\|>",
    ),
    (
        r"(?:<\|start\|>assistant)?<\|channel\|?>\s*(?P<name>analysis|commentary|thought|thinking)\b",
        r"<channel\|>|<\|channel\|?>\s*(?:final|response)\s*(?:<\|message\|>)?",
    ),
    (r'<details type="(?P<name>reasoning)"[^<>]{0,200}>', "</details>"),
)

_OPENINGS = tuple((re.compile(opening, re.IGNORECASE), closing) for opening, closing in _SHAPES)

# Reasoning that only both of its marks together show: gpt-oss without its control tokens, and Granite 3.2.
_LEADING_PAIRS = (
    re.compile(r"analysis(?=\S).*?assistantfinal", re.DOTALL),
    re.compile(r"Here is my thought process:.*?Here is my response:", re.DOTALL),
)

_CLOSINGS = (
    re.compile(rf"</(?P<name>{_NAME})\s*>", re.IGNORECASE),
    re.compile(r"\[/(?P<name>THINK|THINKING|THOUGHT|REASON|REASONING|REFLECTION)\]"),
    re.compile(rf"◁/(?P<name>{_NAME})▷", re.IGNORECASE),
    re.compile(
        rf"<{_BAR}(?:/|(?:end|stop){_GAP}(?:of{_GAP})?)(?P<name>{_NAME}){_BAR}>"
        rf"|<{_BAR}{_NAME}{_GAP}(?:end|stop){_BAR}>",
        re.IGNORECASE,
    ),
)

# What some models put around the answer that follows their reasoning.
_ANSWER = re.compile(
    r"\s*<(?P<name>answer|response|output|solution|final|final_answer|conclusion)>(?P<text>.*?)(?:</(?P=name)>\s*)?\Z"
    r"|\s*<\|(?:begin_of_solution|START_RESPONSE)\|>(?P<marked>.*?)(?:<\|(?:end_of_solution|END_RESPONSE)\|>\s*)?\Z",
    re.DOTALL | re.IGNORECASE,
)

_FINAL = re.compile(r"\A\s*(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>")  # an answer without reasoning

_Pairs = Sequence[tuple[str, str]]


def strip_thinking(text: str, opened: str | None = None, tags: _Pairs = ()) -> str:
    """`text` without the model's reasoning, also where the reasoning is cut off, or where its opening tag is missing
    because the prompt had it.

    Args:
        opened: closing tag of a block that the prompt opens; where `text` lacks it, all of it is reasoning.
        tags: further pairs of an opening and a closing text.
    """
    full = text
    if opened:
        text = text.partition(opened)[2]
    pairs, before = (*tags, *THINKING), None
    while text != before:
        before = text
        text = _cut_leading(_cut_unopened(text, pairs), pairs)
    for opening, closing in pairs:
        text = re.sub(f"{re.escape(opening)}.*?(?:{re.escape(closing)}|\\Z)", "", text, flags=re.DOTALL)
    text = _FINAL.sub("", text)
    answer = _ANSWER.match(text) if text != full else None
    return (answer["text"] or answer["marked"] or "") if answer else text


def _cut_unopened(text: str, pairs: _Pairs) -> str:
    """What follows a closing tag that no opening one stands before."""
    for opening, closing in pairs:
        before, closed, after = text.partition(closing)
        if closed and opening not in before:
            return after
    for (opening_pattern, _), closing_pattern in zip(_OPENINGS, _CLOSINGS, strict=False):
        match = closing_pattern.search(text)
        if match and not opening_pattern.search(text, 0, match.start()):
            return text[match.end() :]
    return text


def _cut_leading(text: str, pairs: _Pairs) -> str:
    """What follows a block of reasoning at the beginning of the text; "" if the block is not closed."""
    start = len(text) - len(text.lstrip())
    for opening, closing in pairs:
        if text.startswith(opening, start):
            return text[start + len(opening) :].partition(closing)[2]
    for pattern in _LEADING_PAIRS:
        if match := pattern.match(text, start):
            return text[match.end() :]
    for opening_pattern, closing in _OPENINGS:
        match = opening_pattern.match(text, start)
        if match and match["name"]:
            closed = re.compile(closing.replace("{name}", re.escape(match["name"])), re.IGNORECASE)
            end = closed.search(text, match.end())
            return text[end.end() :] if end else ""
    return text


def closing_tag(prompt_end: str, tags: _Pairs = ()) -> str | None:
    """The closing tag of a reasoning block that a prompt's end opens, or None.

    Args:
        prompt_end: what a chat template writes after the user's message.
        tags: as for `strip_thinking`.
    """
    text = prompt_end.rstrip()
    for opening, closing in (*tags, *THINKING):
        if text.endswith(opening):
            return closing
    for opening_pattern, _ in _OPENINGS[:4]:
        last = next((match for match in opening_pattern.finditer(text) if match.end() == len(text)), None)
        if last and last["name"]:
            return _close(last[0], last["name"])
    return None


def _close(opening: str, name: str) -> str:
    """The closing tag in the style of an opening one."""
    for begin in ("begin", "start", "BEGIN", "START"):
        if begin in opening.replace(name, ""):
            return opening.replace(begin, "end" if begin.islower() else "END")
    first = re.match(rf"[\[◁<]{_BAR}?", opening)
    bracket = first[0] if first else "<"
    last = {"[": "]", "◁": "▷", "<": ">"}[bracket[0]]
    return f"{bracket}/{name}{bracket[1:]}{last}"


def has_reasoning_tag(text: str, tags: _Pairs = ()) -> bool:
    """Whether a tag of reasoning is left in a text: it was not recognised, or stands where none is expected."""
    patterns = (*(opening for opening, _ in _OPENINGS), *_CLOSINGS)
    return any(tag in text for pair in (*tags, *THINKING) for tag in pair) or any(
        match["name"] for pattern in patterns for match in pattern.finditer(text)
    )
