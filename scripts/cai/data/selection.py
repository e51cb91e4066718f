"""Which texts of a row are trained on, and why others are not: what sft.py and export.py share.

    selection = choose_revisions(row, "last", frozenset({"copy"}))
    selection.texts, selection.left_out

Leaves out pairs (preferences.py), the formats of the texts (exports.py), and how a revision is flagged
(steps/flags.py).
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from cai.base.errors import InputError
from cai.data.dialogue import cut_at_end_token, is_blank
from cai.data.prefills import prefill_of
from cai.data.readers import Row
from cai.data.rounds import UNCHANGED, check_rounds, is_changed


@dataclass(frozen=True)
class Selection:
    """The texts of a row that are trained on.

    texts: {number of a round: text}, 0 being the response. left_out: the flags for which other texts were left out.
    flags: {number: the flags of a text that `keep` let pass}. falls_back: the text is earlier than the row's last.
    """

    texts: dict[int, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    flags: dict[int, list[str]] = field(default_factory=dict)
    falls_back: bool = False

    @property
    def kept(self) -> list[str]:
        """All flags of the texts."""
        return [flag for flags in self.flags.values() for flag in flags]


def check_revised(row: Row, where: str, line: int) -> None:
    """Raise InputError unless the row is one of revise.py: rounds, one or more, that are complete."""
    check_rounds(row, where, line, critiqued=False)
    if not row["rounds"]:
        raise InputError(
            "no round of revision",
            where=where,
            line=line,
            expected="rows of revise.py",
            remedy="Run critique.py and revise.py on them first",
        )
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


def flags_of_texts(rounds: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """For each round the flags of the text after it: its own, and where it left the text as it was, also those of the
    round that wrote the text."""
    found: list[set[str]] = []
    of_text: set[str] = set()
    for revision_round in rounds:
        own = flags_of(revision_round)
        of_text = own if is_changed(revision_round) else of_text
        found.append(own | of_text)
    return found


def choose_revisions(row: Row, rounds: str, keep: Set[str]) -> Selection:
    """The revisions to train on.

    Args:
        row: a row of revise.py.
        rounds: "last" takes the last revision that may be kept (an earlier one where the last is flagged),
            "all" every one.
        keep: flags that don't matter; "all" for any flag. "copy" is not for rows of the kind harmful: a copy is right
            where there was no fault, and a harmful text that stayed as it was would teach to comply.
    """
    if row.get("kind") == "harmful" and "all" not in keep:
        keep = keep - {UNCHANGED}
    texts: dict[int, str] = {}
    flags: dict[int, list[str]] = {}
    left_out: list[str] = []
    text = row.get("response", "")
    for number, (revision_round, of_text) in enumerate(
        zip(row["rounds"], flags_of_texts(row["rounds"]), strict=True), 1
    ):
        text = revision_round.get("revision", text)
        raised = of_text | ({"empty"} if _is_empty(row, text) else set())  # of a round that changed nothing, too
        if raised <= keep or "all" in keep:
            texts[number], flags[number] = text, sorted(raised)
        else:
            left_out += sorted(raised - keep)
    falls_back = False
    if rounds == "last" and texts:
        last = max(texts)
        texts, falls_back = {last: texts[last]}, texts[last] != text
    return Selection(texts, left_out, {number: flags[number] for number in texts}, falls_back)


def choose_response(row: Row, keep: Set[str]) -> Selection:
    """The response, unless it is empty, cut off, or flagged by generate.py.

    What follows an end token is no part of a response (`cut_at_end_token`).
    """
    text = cut_at_end_token(row["response"])
    flags = row.get("flags")
    raised = {flag for flag in flags if isinstance(flag, str)} if isinstance(flags, list) else set()
    raised |= {"unfinished"} if row.get("finish") == "length" else set()
    raised |= {"empty"} if _is_empty(row, text) else set()
    left_out = set() if "all" in keep else raised - keep
    return Selection(left_out=sorted(left_out)) if left_out else Selection({0: text}, flags={0: sorted(raised)})


def _is_empty(row: Row, text: str) -> bool:
    """Whether a text of the row has nothing that can be seen after the row's prefill."""
    return is_blank(text.removeprefix(prefill_of(row)))
