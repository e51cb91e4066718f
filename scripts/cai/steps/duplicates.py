"""Texts that a model has written for many different prompts, such as one refusal for everything.

    duplicates = Duplicates(rows, written=lambda row: row["response"], flag=add_flag)
    output.finish(ids, counts | duplicates.counts, amend=duplicates.amend)

Which texts are repeated is known only when all rows are there, so the flag is added as the output is finished. Leaves
out texts that are nearly the same (stats/texts.py says why), and what is visible in one text alone (flags.py).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cai.base import cli
from cai.base.errors import CaiError, shorten
from cai.data import outputs
from cai.stats.texts import RepeatedTexts
from cai.steps.flags import DUPLICATE

MOST = 0.2  # share of duplicates among the revisions from which run.py does not train on them


class NotPassedError(CaiError):
    """What was made is not good enough to go on with (exit code 4)."""

    exit_code = 4


@dataclass(frozen=True)
class Duplicates:
    """The finished rows of a step, with those flagged whose text answers many other prompts too.

    Iterating gives the rows as they will be.

    Args:
        journal: the rows as the model wrote them; iterable again and again.
        written: the text that the model wrote into a row; None where it wrote none.
        flag: the row with the flag; None: duplicates are counted and not flagged.
    """

    journal: Iterable[dict]
    written: Callable[[dict], str | None]
    flag: Callable[[dict], dict] | None

    def __post_init__(self) -> None:
        answers = ((row["prompt"], self.written(row) or "") for row in self.journal)
        object.__setattr__(self, "_repeated", RepeatedTexts(answers))

    def __iter__(self) -> Iterator[dict]:
        return map(self.amend, self.journal)

    def amend(self, row: dict) -> dict:
        """The row, with the flag if it is a duplicate."""
        return self.flag(row) if self.flag and self._is_duplicate(row) else row

    def _is_duplicate(self, row: dict) -> bool:
        return (self.written(row) or "") in self._repeated

    def report(self) -> tuple[dict[str, int], dict[str, Any]]:
        """({duplicate: rows}, {most_repeated: {text, prompts}} for the manifest), both {} without any; a warning if
        rows are flagged."""
        most_frequent = self._repeated.most_frequent()
        if most_frequent is None:
            return {}, {}
        text, prompts = most_frequent
        count = sum(map(self._is_duplicate, self.journal))
        if self.flag:
            cli.warn(
                f"{count} rows have the flag {DUPLICATE}, the same text for many prompts; most often, for {prompts} "
                f"prompts: {shorten(text)!r}"
            )
        return {DUPLICATE: count}, {"most_repeated": {"text": shorten(text, 300), "prompts": prompts}}


def check_revisions(path: str, step: str) -> None:
    """Raise NotPassedError if more than `MOST` of the revisions in an output of revise.py are duplicates.

    step: its name in the message.
    """
    manifest = outputs.read_manifest(path) or {}
    counts = manifest.get("counts", {})
    revisions = counts.get("rows", 0) - sum(counts.get("skipped", {}).values())
    duplicates = counts.get(DUPLICATE, 0)
    if duplicates <= MOST * revisions:
        return
    text = manifest.get("most_repeated", {}).get("text", "")
    raise NotPassedError(
        f"{step}: {duplicates} of {revisions} revisions are the same text for many prompts, most often "
        f"{shorten(text)!r}; at most {MOST:.0%} may be. Nothing was trained. Read {path}. A stronger critic "
        "and reviser may help, or answers with the constitution in context (generate.py --in-context). To train all "
        "the same, run the next commands that --dry-run prints"
    )
