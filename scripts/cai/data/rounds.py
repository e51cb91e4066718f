"""Rounds of critique and revision in a row: the text after n rounds, and whether the rounds are in order.

    text_of_round(row, 1)     # the first revision

A round without a revision has `skipped`, the reason why it changed nothing: one of `SKIPPED`. A revision that the
gate refused has the flag `REFUSED`: its `revision` is the text before it, and `refused` the text that was refused.
Leaves out how a revision is flagged (steps/flags.py) and what the gate asks (steps/gating.py).
"""

from collections.abc import Mapping
from typing import Any

from cai.base.errors import InputError, shorten

UNCHANGED = "copy"  # revise.py's flag of a revision that repeats the response

REFUSED = "gate"  # revise.py's flag of a revision that its judge did not prefer to the text before it

# Why a round has no revision: no principle speaks to the prompt, or the critique finds no fault.
SKIPPED = ("unmatched", "content")

CONTENT = "content"


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """The first response, then the text after each round that is complete; a skipped round leaves it as it was."""
    texts = [row["response"]]
    for round_ in row.get("rounds") or ():
        if "skipped" in round_:
            texts.append(texts[-1])
        elif round_.get("revision") is not None:
            texts.append(round_["revision"])
    return texts


def text_of_round(row: Mapping[str, Any], number: int | None = None) -> str:
    """The response after a round: the last completed one by default; 0 is the first response.

    A row that is content keeps its text in all later rounds. IndexError for another row without that round.
    """
    texts = texts_of(row)
    return texts[-1 if number is None or (is_content(row) and number >= len(texts)) else number]


def is_skipped(row: Mapping[str, Any]) -> bool:
    """Whether the row's last round was skipped: there is nothing to revise."""
    return bool(row.get("rounds")) and "skipped" in row["rounds"][-1]


def is_content(row: Mapping[str, Any]) -> bool:
    """Whether the row's last critique found no fault, so that no further round is spent on it."""
    return is_skipped(row) and row["rounds"][-1]["skipped"] == CONTENT


def is_changed(round_: Mapping[str, Any]) -> bool:
    """Whether a round changed the text: its revision is there, no copy, and not refused."""
    return round_.get("revision") is not None and not {UNCHANGED, REFUSED}.intersection(round_.get("flags", ()))


def check_rounds(row: Mapping[str, Any], where: object, line: int, *, critiqued: bool | None = None) -> None:
    """Raise InputError unless the row's rounds are in order and the last of them awaits what comes next.

    Args:
        critiqued: whether the last round must have a critique and no revision yet (what revise.py reads);
            False: every round must be complete (what critique.py reads). None: either.
    """

    def error(problem: str, expected: str, remedy: str = "Fix or delete this row") -> InputError:
        return InputError(problem, where=where, line=line, expected=expected, remedy=remedy)

    rounds = row.get("rounds") or []
    if not isinstance(rounds, list):
        raise error(f"`rounds` is {shorten(rounds)!r}", "a list")
    for number, round_ in enumerate(rounds, 1):
        flags = round_.get("flags", []) if isinstance(round_, dict) else []
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise error(f"the flags {shorten(flags)!r}", "a list of words")
        if isinstance(round_, dict) and "skipped" in round_:
            is_skipped = isinstance(round_.get("critique"), str) and isinstance(round_.get("principle", 0), str | None)
            if not is_skipped or round_["skipped"] not in SKIPPED or "revision" in round_:
                raise error(
                    f"round {number} is {shorten(round_)!r}",
                    f"principle, critique, skipped ({' or '.join(SKIPPED)}) and no revision",
                )
            continue
        is_round = isinstance(round_, dict) and all(isinstance(round_.get(k), str) for k in ("principle", "critique"))
        if not is_round or not isinstance(round_.get("revision"), str | None):
            raise error(f"round {number} is {shorten(round_)!r}", "{principle, critique, revision}, all text")
        if round_.get("revision") is None and not (critiqued is not False and number == len(rounds)):
            raise error(
                f"round {number} has a critique and no revision",
                "rows whose rounds are complete",
                "Run revise.py on them first",
            )
    if critiqued and (not rounds or (rounds[-1].get("revision") is not None and "skipped" not in rounds[-1])):
        raise error("no critique that awaits its revision", "rows of critique.py", "Run critique.py on them first")
