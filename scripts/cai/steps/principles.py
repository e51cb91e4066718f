"""The principle of a round or of a comparison: drawn, the one that best matches the prompt, or all as one.

    chooser = Chooser(constitution, "draw", seed=0)
    principle = chooser.choose(row)

critique.py and judge.py share it, with their options `--principles` and `--matches`. Leaves out how a match is found
(matching.py).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from cai.base.errors import InputError
from cai.constitution import files, templates
from cai.data.processes import Team
from cai.models.engine import Engine, count_tokens
from cai.steps.matching import Matches

MODES = {
    "draw": "one at random by weight, none twice before all were used.",
    "match": "the one that most likely speaks to the prompt, of those not used yet; MODEL is asked once per prompt.",
    "all": "the whole constitution at once.",
    "each": "under every principle separately, averaged by weight.",
}

matches_option = click.option(
    "--matches",
    metavar="FILE",
    help="With --principles match: the file of the matches, which commands can share.  [default: beside the output]",
)


def principles_option(*modes: str) -> Callable[[Any], Any]:
    """The option `--principles` with these of `MODES`; the first is the default."""
    return click.option(
        "--principles",
        type=click.Choice(modes),
        default=modes[0],
        show_default=True,
        help=" ".join(f"{mode}: {MODES[mode]}" for mode in modes),
    )


class Chooser:
    """Chooses principles by one of `MODES` except "each", the same ones for the same row whenever it is asked.

    Args:
        matches: with the mode "match", which then draws where no unused principle speaks to the prompt.
    """

    def __init__(self, constitution: files.Constitution, mode: str, seed: int, matches: Matches | None = None):
        self.constitution, self.mode, self.seed, self.matches = constitution, mode, seed, matches

    @cached_property
    def combined(self) -> files.Principle:
        return self.constitution.combine()

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the choice depends on, beside the seed."""
        coverage = {"coverage": templates.load_template("coverage").sha256} if self.matches else {}
        return {"constitution": self.constitution.sha256, "principles": self.mode, **coverage}

    def choose(self, row: Mapping[str, Any]) -> files.Principle:
        """The principle of a row's next round, or of a comparison: of those that its `rounds` have not used."""
        if self.mode == "all":
            return self.combined
        if match := self._match(row):
            return self.constitution[match[0]]
        used = _used(row)
        return self.constitution.draw(self.seed, row["id"], len(used), [name for name in used if name is not None])

    def is_unmatched(self, row: Mapping[str, Any]) -> bool:
        """Whether the prompts' matches are known, and no unused principle speaks to this one."""
        return self.matches is not None and self.matches.is_filled and self._match(row) is None

    def describe(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Fields for the output: with the mode "match", `speaks`, the probability that the chosen principle speaks to
        the prompt; None where no unused one does, and one was drawn."""
        if not self.matches:
            return {}
        match = self._match(row)
        return {"speaks": match[1] if match else None}

    def prepare(self, team: Team, load: Callable[[], Engine], rows: Iterable[dict]) -> None:
        """With the mode "match", ask about the prompts of which nothing is known yet."""
        if self.matches:
            self.matches.fill(team, load, rows)

    def plan(self, rows: Iterable[dict]) -> dict[str, int]:
        """What `--dry-run` reports: the questions that `prepare` would ask."""
        return {"match_calls": self.matches.count_calls(rows)} if self.matches else {}

    def check_context(self, engine: Engine, new_tokens: int, template: templates.Template, **empty: str) -> None:
        """Raise InputError if all principles as one exceed the engine's context, whatever the row.

        Args:
            empty: the template's variables for a row of empty texts.
        """
        if self.mode != "all" or not engine.context:
            return
        tokens = count_tokens(engine, template.render(principle=self.combined, **empty))
        if tokens is not None and tokens + new_tokens > engine.context:
            raise InputError(
                f"the {len(self.constitution.principles)} principles of {self.constitution.name} take {tokens} tokens, "
                f"and with {new_tokens} new ones exceed the model's context of {engine.context}",
                where="--principles all",
                remedy="Take --principles match or draw, a smaller constitution, or a model with a longer context",
            )

    def _match(self, row: Mapping[str, Any]) -> tuple[str, float] | None:
        return self.matches.best(row["prompt"], _used(row)) if self.matches else None


def _used(row: Mapping[str, Any]) -> list[str | None]:
    """Ids of the principles of the earlier rounds; None for a round without one."""
    return [earlier_round["principle"] for earlier_round in row.get("rounds") or ()]


def read_matches(
    mode: str,
    path: str | None,
    model: str,
    constitution: files.Constitution,
    output: str,
    inputs: Iterable[str],
    settings: Any,
) -> Matches | None:
    """The matches of `--principles match`, in `path` or beside the output; None with another mode.

    settings: those of `text.options`. InputError for `--matches` with another mode, or a file of other matches.
    """
    if mode != "match":
        if path:
            raise InputError("--matches without --principles match", remedy="Give both, or neither")
        return None
    beside = Path(output).with_name(f"{Path(output).stem}.matches.jsonl")
    return Matches(
        path or str(beside),
        model,
        constitution,
        dtype=settings.loading["dtype"],
        overwrite=settings.overwrite,
        inputs=[*inputs, output],
    )


# The last line of a critique by the template critique_all_cot.
_VIOLATED = re.compile(r"^\W*violated\W*:[\s*_]*(none|\d+(?:\s*(?:,|;|and)\s*\d+)*)[\s*_.]*$", re.IGNORECASE)


def read_violated(critique: str, constitution: files.Constitution) -> list[str] | None:
    """Ids of the principles whose numbers the critique's last line names; None where it cannot be read."""
    line = critique.strip().rpartition("\n")[2]
    match = _VIOLATED.match(line.strip())
    if match is None:
        return None
    numbers = list(map(int, re.findall(r"\d+", match[1])))
    if not all(1 <= number <= len(constitution.principles) for number in numbers):
        return None
    return [constitution.principles[number - 1].id for number in dict.fromkeys(numbers)]
