"""Rounds of critique and revision in a row: the text after n rounds, and whether the rounds are in order.

    text_of_round(row, 1)     # the first revision

Leaves out how a revision is flagged (steps/flags.py).
"""

from cai.base.errors import InputError, shorten


def current_response(row: dict) -> str:
    """The response as it stands: the last completed round's revision, or the first response."""
    revised = [one["revision"] for one in row.get("rounds") or () if one.get("revision") is not None]
    return revised[-1] if revised else row["response"]


def check_rounds(row: dict, where, line: int, *, critiqued: bool) -> None:
    """InputError unless the row's rounds are in order and the last of them awaits what comes next.

    Args:
        critiqued: whether the last round must have a critique and no revision yet (what revise.py reads);
            else every round must be complete (what critique.py reads).
    """
    rounds = row.get("rounds") or []
    if not isinstance(rounds, list):
        raise _wrong(f"`rounds` is {shorten(rounds)!r}", where, line, "a list", "Mend or delete this row")
    for number, one in enumerate(rounds, 1):
        known = isinstance(one, dict) and all(isinstance(one.get(k), str) for k in ("principle", "critique"))
        if not known or not isinstance(one.get("revision"), str | None):
            raise _wrong(
                f"round {number} is {shorten(one)!r}",
                where,
                line,
                "{principle, critique, revision}, all text",
                "Mend or delete this row",
            )
        if one.get("revision") is None and not (critiqued and number == len(rounds)):
            raise _wrong(
                f"round {number} has a critique and no revision",
                where,
                line,
                "rows whose rounds are complete",
                "Run revise.py on them first",
            )
    if critiqued and (not rounds or rounds[-1].get("revision") is not None):
        raise _wrong(
            "no critique that awaits its revision", where, line, "rows of critique.py", "Run critique.py on them first"
        )


def _wrong(found: str, where, line: int, expected: str, remedy: str) -> InputError:
    return InputError(found, where=where, line=line, expected=expected, remedy=remedy)


UNCHANGED = "copy"  # revise.py's flag of a revision that is the response again


def texts_of(row: dict) -> list[str]:
    """The first response, then each round's revision."""
    return [row["response"], *(one["revision"] for one in row.get("rounds") or () if one.get("revision") is not None)]


def is_changed(one: dict) -> bool:
    """Whether a round's revision differs from what it revised (revise.py flags one that does not)."""
    return UNCHANGED not in one.get("flags", ())


def text_of_round(row: dict, round_: int | None) -> str:
    """The response to measure: the last revision, or that of the round (0: the first response)."""
    rounds = row.get("rounds") or ()
    number = len(rounds) if round_ is None else round_
    return rounds[number - 1]["revision"] if number else row["response"]
