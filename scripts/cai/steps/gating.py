"""The gate of revise.py: a revision replaces the text before it only if a judge prefers it.

    gate = read_gate("tiny", (), load_constitution("harmlessness"), seed=0)
    row = gate.decide(row, verdicts)

The judge compares the text before (response a) with the revision (response b), in both orders, under the principle of
the round and under those of the row's earlier rounds. The revision passes if it is preferred in both orders under its
own principle, and is not worse in the mean of both orders under any earlier one. Otherwise the text before stays, and
the round keeps what was refused, and why. Leaves out a second try for what was refused.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click

from cai.base import cli
from cai.base.errors import InputError, shorten
from cai.base.hashing import identity
from cai.constitution import files, templates
from cai.data import outputs, preferences, processes, readers, rounds
from cai.models import loading
from cai.models.engine import Engine
from cai.stats import intervals
from cai.steps import judging, sharing

gate_option = click.option(
    "--gate",
    metavar="JUDGE",
    help="A revision replaces the text before it only if this judge (a model, or openai:NAME@URL) prefers it in both "
    "orders, and does not find it worse under the principles of earlier rounds.",
)

# Why a revision is refused: both orders prefer the text before; the orders disagree, or one can't tell; it is worse
# under an earlier principle; a verdict can't be read.
REASONS = ("worse", "undecided", "earlier", "unread")

# Rate of pairs of orders that prefer the same position, above which a judge says little about the texts.
SAME_POSITION = 0.3


@dataclass(frozen=True)
class RevisionQuestion(judging.Question):
    """How a revision is put to the judge: under the principle of its round, then under those of earlier rounds."""

    def principles(self, comparison: dict) -> list[files.Principle]:
        return [self._combined if name == files.ALL else self.constitution[name] for name in comparison["principles"]]

    @cached_property
    def _combined(self) -> files.Principle:
        return self.constitution.combine()


@dataclass(frozen=True)
class Gate:
    """A judge of revisions. servers: where it is `openai:NAME`."""

    judge: str
    servers: tuple[str, ...]
    question: RevisionQuestion

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the verdicts, beside constitution and seed."""
        written = self.question.written
        return {
            "gate": self.judge,
            "gate_weights": identity(self.judge),
            "gate_template": self.question.template.sha256,
            "gate_answer_template": written.sha256 if written else None,
        }

    def check_row(self, row: Mapping[str, Any], where: object, line: int) -> None:
        """Raise InputError for an earlier round whose principle the constitution lacks: it can't be asked."""
        constitution = self.question.constitution
        for number, round_ in enumerate(row["rounds"], 1):
            name = round_["principle"]
            if "skipped" not in round_ and name != files.ALL and name not in constitution:
                raise InputError(
                    f"round {number} has the principle {shorten(name)!r}, which {constitution.name} lacks",
                    where=where,
                    line=line,
                    expected="one constitution for all rounds: --gate asks the principles of earlier rounds too",
                    remedy="Give the constitution of all rounds, or leave --gate out",
                )

    def count_calls(self, rows: Iterable[dict]) -> int:
        """The most that the judge is asked about rows that await a revision."""
        return sum(2 * len(_principles_of(row)) for row in rows)

    def decide(self, row: dict, verdicts: list[dict] | None) -> dict:
        """The row after the gate: its last round has `gate`, and of a refused revision `refused` and a flag.

        gate: p_ab and p_ba, the probability that the revision is better under its own principle with the text before
        shown first and second; earlier, {principle: mean of both orders}; reason, where it is refused: of `REASONS`.

        Args:
            verdicts: both orders of each principle of `_principles_of`; None where the judge could not be asked.
        """
        *earlier_rounds, last = row["rounds"]
        names = _principles_of(row)
        p = [None if verdict["p_a"] is None else 1 - verdict["p_a"] for verdict in verdicts or [{"p_a": None}] * 2]
        orders = dict(zip(names, zip(p[::2], p[1::2], strict=True), strict=False))
        p_ab, p_ba = orders.pop(names[0])
        earlier = {name: None if None in both else sum(both) / 2 for name, both in orders.items()}
        numbers = {"p_ab": p_ab, "p_ba": p_ba, "earlier": earlier}
        if reason := refuse(p_ab, p_ba, earlier):
            refused = {"refused": last["revision"], "gate": {**numbers, "reason": reason}}
            flags = [*last["flags"], rounds.REFUSED]
            last = {**last, "revision": rounds.texts_of(row)[-2], "flags": flags, **refused}
        else:
            last = {**last, "gate": numbers}
        return {**row, "rounds": [*earlier_rounds, last]}


def refuse(p_ab: float | None, p_ba: float | None, earlier: Mapping[str, float | None]) -> str | None:
    """Why a revision is refused, one of `REASONS`; None if it passes.

    Args:
        p_ab, p_ba: probability that it is better under its own principle, in each order; None: unreadable.
        earlier: {principle of an earlier round: mean of both orders}.
    """
    if p_ab is None or p_ba is None:
        return "unread"
    if p_ab < 0.5 and p_ba < 0.5:
        return "worse"
    if p_ab <= 0.5 or p_ba <= 0.5:
        return "undecided"
    if any(mean is not None and mean < 0.5 for mean in earlier.values()):
        return "earlier"
    return "unread" if None in earlier.values() else None


def _principles_of(row: Mapping[str, Any]) -> list[str]:
    """Ids of the principles to judge the last round's revision by: its own, then those of earlier rounds, each once."""
    *earlier, last = (round_["principle"] for round_ in row["rounds"] if "skipped" not in round_)
    return list(dict.fromkeys([last, *earlier]))


def read_gate(name: str, endpoints: tuple[str, ...], constitution: files.Constitution, seed: int) -> Gate:
    """The gate with this judge: a model's folder or id, or `openai:NAME@URL`.

    endpoints: the servers of an `openai:NAME` without its own. Raises InputError if there is no such model.
    """
    judge, servers = loading.split_endpoint(name, endpoints)
    loading.check_model(judge)
    template, written = map(templates.load_template, ("preference", "preference_answer"))
    return Gate(judge, servers, RevisionQuestion(constitution, template, seed=seed, written=written))


def claim_ungated(output: str, claim: dict[str, Any]) -> outputs.Output:
    """The output of the revisions before the gate, beside the gated one.

    Under the same settings it stays valid for another judge, with overwrite or not.

    claim: arguments of `Output`.
    """
    path = ungated_path(output)
    claim = {**claim, "command": f"{claim['command']}-ungated"}
    with suppress(InputError):
        return outputs.Output(path, **{**claim, "overwrite": False})
    return outputs.Output(path, **claim)


def ungated_path(output: str) -> str:
    path = Path(output)
    return str(path.with_name(f"{path.stem}.ungated{path.suffix}"))


def gate_output(
    gate: Gate,
    team: processes.Team,
    output: outputs.Output | None,
    revisions: str,
    ids: list[str],
    load_options: Mapping[str, Any],
    info: Mapping[str, Any],
) -> None:
    """Have the judge decide the revisions that are left; under `accelerate launch` each process its share.

    A revision that the judge could not be asked about stays refused, and is counted and named as failed.

    Args:
        output: in process 0. revisions: the finished file of revisions, whose counts the output takes over.
        ids: the order of the rows. load_options: arguments of `load_engine`. info: further entries of the manifest.
    """
    load = partial(loading.load_engine, gate.judge, endpoints=gate.servers, **load_options)
    with sharing.share_work(team, output, load, partial(_judge_share, gate, revisions)) as (judge, results):
        if output is None or results is None:
            return
        manifest = outputs.read_manifest(revisions) or {}
        lost = {row_id: reason for share in results for row_id, reason in share.items()}
        failed = {**manifest.get("failed_rows", {}), **lost}
        decisions = count_decisions(readers.JsonlRows(output.journal))
        counts = {**manifest.get("counts", {}), "failed": len(failed), "gate": decisions}
        kept = {
            name: manifest[name] for name in ("tokens", "most_repeated", "reproducible_sampling") if name in manifest
        }
        sharing.finish_output(output, ids, counts, failed, judge, **kept, **info)


def _judge_share(gate: Gate, revisions: str, team: processes.Team, journal: Any, judge: Engine) -> dict[str, str]:
    """Judge the revisions of this process that are left. Returns {row id: why the judge could not be asked}."""
    lost, done = {}, frozenset(journal.done)
    why = (
        f"the gate: it does not fit the judge's context of {judge.context} tokens"
        if judge.context
        else "the gate: it is too long for the judge, or the server would not answer"
    )

    rows = readers.JsonlRows(revisions)
    with sharing.share_progress(team, sum(1 for _ in rows), len(done), "gate") as bar:
        comparisons = map(_comparison, filter(_is_changed, team.share(rows)))
        for comparison, verdicts in judging.judge(judge, comparisons, gate.question, done):
            row = comparison["row"]
            if verdicts is None:
                lost[row["id"]] = why
            journal.write(gate.decide(row, verdicts))
            bar.update(1)
        # Last, so that `done` tells `judge` in which window a run was stopped.
        for row in team.share(rows):
            if not _is_changed(row) and row["id"] not in done:
                journal.write(row)
                bar.update(1)
    return lost


def _is_changed(row: dict) -> bool:
    """Whether the last round has a revision that differs: no copy, and not skipped."""
    return rounds.is_changed(row["rounds"][-1])


def _comparison(row: dict) -> dict:
    before, revision = rounds.texts_of(row)[-2:]
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "response_a": before,
        "response_b": revision,
        "principles": _principles_of(row),
        "row": row,
    }


def count_decisions(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """{judged, replaced, refused, unread, reasons, same_position}: the counts of the gate over its rows.

    A warning where more than `SAME_POSITION` of the pairs of orders prefer the same position.
    """
    counts, reasons, readable, same = Counter(judged=0, replaced=0, refused=0, unread=0), Counter(), 0, 0
    for row in rows:
        numbers = row["rounds"][-1].get("gate")
        if numbers is None:
            continue
        reason = numbers.get("reason")
        counts.update(judged=1, replaced=reason is None, unread=reason == "unread")
        if reason not in (None, "unread"):
            counts["refused"] += 1
            reasons[reason] += 1
        if None not in (numbers["p_ab"], numbers["p_ba"]):
            readable += 1
            same += preferences.same_position(numbers["p_ab"], numbers["p_ba"])
    rate = intervals.rate(same, readable)
    if readable and same / readable > SAME_POSITION:
        cli.warn(
            f"in {same} of {readable} pairs the gate's judge prefers the same position in both orders: it says little "
            "about the texts and refuses good revisions; take a stronger judge, or leave --gate out"
        )
    return {**counts, "reasons": dict(reasons), "same_position": rate}
