"""Verdicts that somebody else has made: matched to the pairs, combined into one label, and audited.

    labels = Verdicts(["pairs.jsonl"], ["alice.jsonl", "bob.csv"], ["winner"], None, None, settings)
    findings = labels.write(labels.claim("combined.jsonl", "dawid-skene", limits, False), "dawid-skene", limits)

No judge is asked. A row belongs to the pair with its id, else to the pair with its prompt and responses, in whichever
order. Leaves out how a verdict is read from a row (data/verdicts.py).
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace
from typing import Any, TypeVar

import click

from cai.base import cli
from cai.base.errors import InputError, shorten
from cai.data import outputs, preferences, readers, verdicts
from cai.data.dialogue import as_messages
from cai.data.readers import Row
from cai.data.reading import Reading
from cai.data.sources import Source, first_row
from cai.stats import agreement, annotators
from cai.stats.annotators import Vote
from cai.steps import judging, pairs

_Function = TypeVar("_Function", bound=Callable[..., Any])

_Combine = Callable[[annotators.Votes], float | None]

_Key = tuple[int, int]  # hashes of the prompt, and of both responses in whichever order

# The options of judge.py that have an effect with --verdicts, beside those that have one without a judge.
USED = {"verdict_files", "verdict_fields", "combine", "audit_path", "clamp"}


def options(function: _Function) -> _Function:
    """Decorator: adds --verdicts and --verdict-field."""
    function = click.option(
        "--verdict-field",
        "verdict_fields",
        multiple=True,
        metavar="COLUMN",
        help="With --verdicts: the column of the verdicts. Repeatable: each column is an annotator.",
    )(function)
    return cli.rows_option(
        "--verdicts",
        "verdict_files",
        help="Ask no judge: combine verdicts that exist already, one annotator per file: p_a, chosen and rejected, A "
        "or B, or a probability. Repeatable. Without --input the pairs are those of the first file.",
    )(function)


def check_files(inputs: Sequence[str], files: Sequence[str]) -> None:
    """Raise UsageError for a command line without pairs, or with --verdict-field and no file that it is for."""
    if not inputs and not files:
        raise click.UsageError("--input is missing: pairs, or several responses per prompt.")
    if not files:
        cli.refuse_options(["verdict_fields"], "without --verdicts there is no column to read")


@dataclass
class Ballots:
    """The verdicts of one annotator.

    votes: {id of a pair: vote}; None where its row has no verdict. unmatched: rows that belong to no pair.
    """

    name: str
    digest: str
    votes: dict[str, Vote | None] = field(default_factory=dict)
    unmatched: int = 0


class PairIndex:
    """The pairs by id, and by prompt and responses.

    comparisons: rows with id, prompt, response_a and response_b; read once. Memory holds the ids and hashes.
    """

    def __init__(self, comparisons: Iterable[Row]):
        self.first_response: dict[str, int] = {}  # {id: hash of response_a}
        self.keys: dict[str, _Key] = {}
        self.ids: dict[_Key, list[str]] = defaultdict(list)
        for row in comparisons:
            sides = row["response_a"], row["response_b"]
            key = _key_of(row["prompt"], sides)
            self.first_response[row["id"]], self.keys[row["id"]] = _hash(sides[0]), key
            self.ids[key].append(row["id"])


def _hash(text: str) -> int:
    return hash(text.strip())


def _key_of(prompt: Any, sides: tuple[str, str]) -> _Key:
    return hash(json.dumps(as_messages(prompt), sort_keys=True)), hash(tuple(sorted(map(_hash, sides))))


def read_ballots(path: str, columns: Sequence[str], index: PairIndex, reading: Reading) -> list[Ballots]:
    """The verdicts of a file: one annotator per column, or the one whose verdicts its rows are.

    Raises InputError with file and line for a row without a verdict or with fields that contradict each other, for an
    id whose responses are those of another pair, for a second verdict on a pair, and if no row belongs to any pair.
    """
    explicit: dict[tuple[str, int], str] = {}

    def check(row: Row, where: str, line: int) -> None:
        if row.get("id") not in (None, ""):
            explicit[where, line] = str(row["id"])
        for column in columns or [None]:
            verdicts.read_verdict(row, column, where, line)

    shape = first_row([path], reading)
    is_pair = preferences.is_pair(shape)
    sides = ("response_a", "response_b") if verdicts.has_responses(shape) else ("chosen", "rejected")
    source = Source([path], require=("prompt", *sides) if is_pair else (), check=check, reading=reading)
    names = [f"{path}:{column}" if columns else path for column in columns or [None]]
    ballots = [Ballots(name, source.digest) for name in names]
    seen: set[str] = set()
    lines: dict[str, int] = {}
    for (where, line, _), row in zip(source.positions(), source, strict=True):
        seen |= row.keys()
        pair_id = _find_pair(row, explicit.get((where, line)), index, lines, where, line)
        if pair_id is None:
            for ballot in ballots:
                ballot.unmatched += 1
            continue
        if pair_id in lines:
            raise InputError(
                f"a second verdict on the pair {shorten(pair_id)!r}, the first is on line {lines[pair_id]}",
                where=where,
                line=line,
                expected="one verdict per pair and file",
                remedy="Delete one of the two, or put the verdicts of another annotator into a file of their own",
            )
        lines[pair_id] = line
        for ballot, column in zip(ballots, columns or [None], strict=True):
            ballot.votes[pair_id] = _vote(row, verdicts.read_verdict(row, column, where, line), index, pair_id)
    if missing := set(columns) - seen:
        raise InputError(
            f"no column {sorted(missing)[0]!r}",
            where=path,
            expected="the columns of --verdict-field in every file",
            remedy=f"The rows have: {', '.join(sorted(seen))}",
        )
    if not lines:
        raise InputError(
            "no row belongs to any of the pairs",
            where=path,
            expected="the ids of the pairs, or their prompts and responses",
            remedy="Name the file of the pairs with --input",
        )
    return ballots


def _find_pair(
    row: Row, row_id: str | None, index: PairIndex, taken: dict[str, int], where: str, line: int
) -> str | None:
    """The id of the pair that a row is about; None if there is none.

    row_id: the id that the row itself has. taken: pairs with a verdict, which others with the same texts go before.
    """
    sides = verdicts.sides_of(row)
    key = _key_of(row["prompt"], sides) if sides and row.get("prompt") is not None else None
    if row_id in index.keys:
        if key is not None and key != index.keys[row_id]:
            raise InputError(
                f"the id {shorten(row_id)!r} has another prompt or other responses here",
                where=where,
                line=line,
                expected="the pair with this id",
                remedy="Fix the id, or leave the ids out: rows are then matched by their texts",
            )
        return row_id
    candidates = index.ids.get(key, []) if key is not None else []
    return next((pair_id for pair_id in candidates if pair_id not in taken), candidates[0] if candidates else None)


def _vote(row: Row, p: float | None, index: PairIndex, pair_id: str) -> Vote | None:
    """The vote about the pair as it is in the index, from the probability that the row's first response is better."""
    if p is None:
        return None
    sides = verdicts.sides_of(row)
    if sides is None or _hash(sides[0]) == index.first_response[pair_id]:
        return Vote(p)
    # A row of chosen and rejected does not say which was shown first.
    return Vote(1 - p, is_swapped=verdicts.has_responses(row))


class Verdicts:
    """Pairs, and what annotators say of them.

    Args:
        inputs: files of the pairs, with `against` and `most` as `read_comparisons` takes them; empty: the pairs are
            those of the first file of verdicts.
        files: of verdicts. columns: of the verdicts in each file; empty: the rows' own fields.
        settings: of judge.py.
    Attributes:
        names: of the annotators. plan: the counts before anything is written.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        files: Sequence[str],
        columns: Sequence[str],
        against: str | None,
        most: int | None,
        settings: SimpleNamespace,
    ):
        self.comparisons, digests = pairs.read_comparisons(
            inputs or files[:1], against, most, settings.seed, settings.limit, settings.reading
        )
        # Where the pairs are the verdicts' own, what was chosen is a verdict and not the truth.
        self._has_gold = bool(inputs) or not getattr(self.comparisons, "trl", False)
        index = PairIndex(self.comparisons)
        ballots = (read_ballots(path, columns, index, settings.reading) for path in files)
        self.ballots = list(chain.from_iterable(ballots))
        self.names = [ballot.name for ballot in self.ballots]
        self.inputs = [*inputs, *files, *([against] if against else [])]
        self._fingerprint = {
            **digests,
            "verdicts": {ballot.name: ballot.digest for ballot in self.ballots},
            "pairs_per_prompt": most,
            "seed": settings.seed,
            "limit": settings.limit,
        }
        unmatched = {ballot.name: ballot.unmatched for ballot in self.ballots}
        self.plan = {"pairs": len(self.comparisons.ids), "annotators": len(self.names), "unmatched": unmatched}

    def claim(self, output: str, way: str, limits: tuple[float, float], overwrite: bool) -> outputs.Output:
        """The output of the verdicts combined in this way."""
        fingerprint = {**self._fingerprint, "combine": way, "clamp": limits}
        return outputs.Output(output, command="judge", fingerprint=fingerprint, overwrite=overwrite, inputs=self.inputs)

    def write(self, output: outputs.Output, way: str, limits: tuple[float, float]) -> list[str]:
        """Write the pairs with their combined labels; returns a sentence about each annotator that does not help, and
        prints it as a warning.

        Args:
            way: one of `agreement.WAYS`. limits: p_chosen is clamped to them.
        """
        model = annotators.Annotators((votes for _, votes in self._differing()), len(self.ballots))
        figures = model.describe((votes, row.get("gold")) for row, votes in self._differing())
        with output:
            if not output.complete:
                self._write_rows(output, model.belief if way == "dawid-skene" else _combine_labels(way), limits)
                cast = Counter(agreement.votes(_labels(votes)) for _, votes in self._differing())
                described = {
                    ballot.name: {
                        "missing": len(self.comparisons.ids) - len(ballot.votes),
                        "unmatched": ballot.unmatched,
                        **numbers,
                    }
                    for ballot, numbers in zip(self.ballots, figures, strict=True)
                }
                counts = judging.summary(readers.JsonlRows(output.journal))
                more = {"combine": way, "agreement": agreement.agreement(cast), "judges": described}
                output.finish(self.comparisons.ids, {**counts, **more})
        for ballot in self.ballots:
            if ballot.unmatched:
                cli.warn(f"{ballot.name}: {ballot.unmatched} rows belong to none of the pairs, and are left out")
        findings = [
            annotators.in_words(name, numbers, way)
            for name, numbers in zip(self.names, figures, strict=True)
            if numbers["finding"]
        ]
        for finding in findings:
            cli.warn(finding)
        return findings

    def _rows(self) -> Iterator[Row]:
        for row in self.comparisons:
            yield row if self._has_gold else {name: value for name, value in row.items() if name != "gold"}

    def _differing(self) -> Iterator[tuple[Row, list[Vote | None]]]:
        """The pairs that are no ties, with the votes on them."""
        return (
            (row, [ballot.votes.get(row["id"]) for ballot in self.ballots])
            for row in self._rows()
            if not preferences.is_tie(row)
        )

    def _write_rows(self, output: outputs.Output, combine: _Combine, limits: tuple[float, float]) -> None:
        for row in self._rows():
            if preferences.is_tie(row) and row["id"] not in output.done:
                output.write(judging.tie(row))
        for row, votes in self._differing():
            if row["id"] not in output.done:
                preference = judging.preference(row, None, [], combine(votes), limits)
                output.write({**preference, "judges": dict(zip(self.names, _labels(votes), strict=True))})


def _labels(votes: annotators.Votes) -> list[float | None]:
    return [vote and vote.p for vote in votes]


def _combine_labels(way: str) -> _Combine:
    combine = agreement.combiner(way, lambda: (), 0)
    return lambda votes: combine(_labels(votes))
