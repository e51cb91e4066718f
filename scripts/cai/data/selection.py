"""Which texts of a row are trained on, and why others are not: what sft.py and export.py share.

    texts, flags = choose_revisions(row, "last", frozenset({"copy"}))

Leaves out pairs (preferences.py), the formats of the texts (exports.py), and how a revision is flagged
(steps/flags.py).
"""

from collections.abc import Mapping, Set
from typing import Any

from cai.base.errors import InputError, shorten
from cai.data.dialogue import cut_at_end_token, is_blank
from cai.data.readers import Row
from cai.data.rounds import UNCHANGED, check_rounds


def check_revised(row: Row, where: str, line: int) -> None:
    """Raise InputError unless the row is one of revise.py: rounds that are complete, and flags that are words."""
    check_rounds(row, where, line, critiqued=False)
    if not row["rounds"]:
        raise InputError(
            "no round of revision",
            where=where,
            line=line,
            expected="rows of revise.py",
            remedy="Run critique.py and revise.py on them first",
        )
    for revision_round in row["rounds"]:
        flags = revision_round.get("flags", [])
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise InputError(f"the flags {shorten(flags)!r}", where=where, line=line, expected="a list of words")
    if "skipped" in row["rounds"][0] and not isinstance(row.get("response"), str):
        raise InputError(
            "round 1 has changed nothing, and there is no `response`",
            where=where,
            line=line,
            expected="rows of revise.py, with their first response",
            remedy="Fix or delete this row",
        )


def flags_of(revision_round: Mapping[str, Any]) -> set[str]:
    """The flags of a round; one that was skipped counts as a copy of the text before it."""
    return {UNCHANGED} if "skipped" in revision_round else set(revision_round.get("flags", ()))


def choose_revisions(row: Row, rounds: str, keep: Set[str]) -> tuple[dict[int, str], list[str]]:
    """({number of a round: text to train on}, the flags for which other rounds were left out).

    Args:
        row: a row of revise.py.
        rounds: "last" takes the last revision that may be kept (an earlier one where the last is flagged),
            "all" every one.
        keep: flags that don't matter; "all" for any flag.
    """
    texts: dict[int, str] = {}
    flags: list[str] = []
    text = row.get("response", "")
    for number, revision_round in enumerate(row["rounds"], 1):
        text = revision_round.get("revision", text)
        raised = flags_of(revision_round)
        if raised <= keep or "all" in keep:
            texts[number] = text
        else:
            flags += sorted(raised - keep)
    last = dict(list(texts.items())[-1:])
    return (last if rounds == "last" else texts), flags


def choose_response(row: Row, keep: Set[str]) -> tuple[dict[int, str], list[str]]:
    """({0: the response}, []), or ({}, flags) for one that is empty, cut off, or flagged by generate.py.

    What follows an end token is no part of a response (`cut_at_end_token`).
    """
    text = cut_at_end_token(row["response"])
    flags = row.get("flags")
    raised = {flag for flag in flags if isinstance(flag, str)} if isinstance(flags, list) else set()
    raised |= {"unfinished"} if row.get("finish") == "length" else set()
    raised |= {"empty"} if is_blank(text) else set()
    left_out = set() if "all" in keep else raised - keep
    return ({} if left_out else {0: text}), sorted(left_out)
