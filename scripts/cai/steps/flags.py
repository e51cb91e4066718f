"""Flags of a revision: the visible faults of its form.

    flags(response="I can't help with that.", revision="Revised response: no.", finish="stop")  # ["preamble"]

The rules need no model. They do not tell whether a revision is better than the response that it revises. A flagged
revision stays in its row; sft.py skips it unless `--keep` names the flag. `duplicate`, the same text for many prompts,
needs all rows and is added at the end (duplicates.py).
"""

import re
from collections.abc import Callable
from typing import Any

import click

from cai.data.rounds import REFUSED
from cai.models.reasoning import has_reasoning_tag

# In the order in which a revision's flags are listed.
REASONS = ("empty", "unfinished", "copy", "leaked_tag", "preamble", "repeated_tail", "bare_refusal", "duplicate")

LEAKED_TAG = "leaked_tag"

DUPLICATE = "duplicate"

# Delimiters of our templates (also with the bracket that stands in for theirs), control tokens of common
# chat templates, and the speakers of a transcript.
_LEAKED = re.compile(
    r"[<‹]\s*/?\s*(?:prompt|response(?:_[ab])?|critique|revision|reasoning|principle|think(?:ing)?)\s*>"
    r"|<\|[\w ]{1,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>"
    r"|^(?:Human|Assistant|Critique|Revision) ?:",
    re.IGNORECASE | re.MULTILINE,
)

_NEW = r"(?:re-?vis|re-?writ|re-?word|improv|updat|correct|edit|modif|new|better)\w*"

_TEXT = r"(?:response|answer|reply|version|message|text)"

_NEAR = r"[^.:\n]{0,40}?\b"

_PREAMBLE = re.compile(
    r"[\s*#_\"“>]*"
    r"(?:(?:sure|certainly|of course|absolutely|okay|ok|understood|thanks)\b[^.:\n]{0,20}[,.!:\s]+)?"
    rf"(?:(?:here(?:['’]s| is| are)|below is|this is)\b{_NEAR}{_NEW}\b{_NEAR}{_TEXT}\b"
    rf"|(?:(?:my|the|a) )?{_NEW}\s+{_TEXT}[\s*_]*[:\n]"
    rf"|i(?:['’]?ve| have)? (?:revised|rewritten|rewrote|reworded|edited) (?:the|my|your)\b{_NEAR}{_TEXT}\b)",
    re.IGNORECASE,
)

_REFUSAL = re.compile(
    r"\bi (?:\w+ )?(?:can['’]?t(?! wait)|cannot|can not|won['’]?t|will not|decline|refuse|have to say no)\b"
    r"|\bi(?:['’]?m| am) (?:\w+ )?(?:unable|not (?:able|going|allowed|permitted|comfortable))\b"
    r"|\bi(?:['’]d| would) rather not\b|\A\W*(?:i['’]?m |i am )?(?:very |so )?sorry\W*\Z",
    re.IGNORECASE,
)

_REASON_OR_OFFER = re.compile(
    r"\b(?:because|since|harm\w*|hurt\w*|danger\w*|illegal|unlawful|unsafe|unfair|wrong|risk\w*|damag\w*"
    r"|it would|that would|instead|alternativ\w*|rather than|i can(?!['’]?t|not| not)|happy to|glad to"
    r"|let me|consider|suggest\w*|recommend\w*|you (?:could|can|might|may)|we (?:could|can)|try(?:ing)?"
    r"|how about|if you)\b",
    re.IGNORECASE,
)

_BARE_WORDS = 25  # a refusal this short without a reason or an offer is the evasion the paper trains away


def selection_options(verb: str) -> Callable[[Any], Any]:
    """Decorator: `--rounds` and `--keep`, which say what is used of revised rows (data/selection.py).

    verb: what the command does to them, as its help begins.
    """

    def add(function: Any) -> Any:
        keep = click.option(
            "--keep",
            multiple=True,
            type=click.Choice([*REASONS, REFUSED, "all"]),
            help=f"{verb} revisions with this flag too. `copy` also keeps rounds that were skipped, but nothing that "
            "was left as it was in rows whose kind is harmful; `all` does. Repeatable.",
        )
        rounds = click.option(
            "--rounds",
            type=click.Choice(["last", "all"]),
            default="last",
            show_default=True,
            help=f"{verb} the last revision of a row that is not flagged, or all of them.",
        )
        return rounds(keep(function))

    return add


def flags(response: str, revision: str, finish: str) -> list[str]:
    """The visible faults of a revision, as words of `REASONS` without `DUPLICATE`; [] if there are none.

    Args:
        response: the text that was revised.
        revision: the text that replaces it.
        finish: how its generation ended: "stop" or "length".
    """
    if not revision.strip():
        return ["empty"]
    words = revision.split()
    checks = {
        "unfinished": finish == "length",
        "copy": words == response.split(),
        "leaked_tag": _LEAKED.search(revision) or has_reasoning_tag(revision),
        "preamble": _PREAMBLE.match(revision),
        "repeated_tail": repeats(revision),
        "bare_refusal": len(words) <= _BARE_WORDS
        and _REFUSAL.search(revision)
        and not _REASON_OR_OFFER.search(revision),
    }
    return [reason for reason in REASONS if checks.get(reason)]


def repeats(text: str) -> bool:
    """Whether the text ends in a loop: at least 12 characters that repeat one piece three times, or a piece of at
    least 60 characters twice. Pieces longer than 500 characters are not looked for."""
    text = " " + " ".join(text.split())
    times = {size: 2 if size >= 60 else max(3, -(-12 // size)) for size in range(1, min(len(text) // 2, 500) + 1)}
    return any(text.endswith(text[-size:] * count) for size, count in times.items())
