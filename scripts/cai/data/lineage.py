"""Rows followed back through the manifests, to the file that the first command read, and what became of each.

    lineage = trace(Source(["revised.jsonl"]))
    for entry in lineage.entries: ...          # every row of questions.csv, also those that never became a revision

A manifest (`<output>.run.json`) names the inputs of its output and the rows that failed. Followed are generate.py,
critique.py, revise.py and judge.py, as long as each file is the one that the next command read (by its SHA-256). Where
the chain breaks, the lineage begins with the file after the break, and `notes` says why. Leaves out which of the last
rows are used (exports.py).
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from cai.base.errors import InputError
from cai.data.outputs import read_manifest
from cai.data.readers import read_jsonl
from cai.data.reading import Reading
from cai.data.shards import Shard
from cai.data.sources import Source

FOLLOWED = ("generate", "critique", "revise", "judge")

LEFT_OUT, FAILED, INVALID = "left_out", "failed", "invalid"


@dataclass
class Entry:
    """One row, and what became of it.

    Attributes:
        file, line: where it began.
        id: in the last file that has it; None for a row that could not be read.
        step: the command that it ended in; None while it is in the last file.
        outcome: one of `LEFT_OUT`, `FAILED`, `INVALID`; None while it is in the last file.
        reason: of the outcome, as one sentence.
        is_merged: it is the second sample of a pair, and the entry of the first stands for both.
    """

    file: str
    line: int
    id: str | None = None
    step: str | None = None
    outcome: str | None = None
    reason: str | None = None
    is_merged: bool = False

    def end(self, step: str | None, outcome: str, reason: str) -> None:
        self.step, self.outcome, self.reason = step, outcome, reason


@dataclass
class Lineage:
    """The rows behind a source.

    Attributes:
        entries: all of them, those of the source among them, in the order of the files that they began in.
        by_id: {id in the source: its entries}; a pair that judge.py made of two rows has two.
        origins: the files that the rows began in.
        notes: why an earlier file could not be followed.
    """

    entries: list[Entry] = field(default_factory=list)
    by_id: dict[str, list[Entry]] = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def trace(source: Source, command: str | None = None) -> Lineage:
    """The lineage of a source's rows.

    Args:
        command: the command that read the source, as the step of rows that end here.
    """
    lineage = _trace(source, command, frozenset())
    position = {name: number for number, name in enumerate(lineage.origins)}
    entries = [entry for entry in lineage.entries if entry.id is not None and not entry.is_merged]
    # A bad row of a file that two commands have read is one row.
    bad_rows = {(entry.file, entry.line): entry for entry in lineage.entries if entry.id is None}
    entries += bad_rows.values()
    lineage.entries = sorted(entries, key=lambda entry: (position[entry.file], entry.line, entry.id or ""))
    return lineage


def _trace(source: Source, command: str | None, visited: frozenset[str]) -> Lineage:
    lineage = Lineage()
    lines: dict[tuple[str, int], list[Entry]] = {}
    for name in source.inputs:
        earlier = _trace_output(name, ids := _Ids(name, source), lineage.notes, visited)
        if earlier is None:
            lineage.origins.append(name)
            continue
        lineage.origins += [origin for origin in earlier.origins if origin not in lineage.origins]
        lineage.entries += earlier.entries
        lines |= {(name, line): earlier.by_id[row_id] for line, row_id in ids if row_id in earlier.by_id}

    def take(name: str, line: int) -> list[Entry]:
        """The row's entries; of an origin, and of a row that somebody has added to an output, a new one."""
        if (name, line) not in lines:
            lineage.origins += [] if name in lineage.origins else [name]
            lineage.entries.append(Entry(name, line))
            return lineage.entries[-1:]
        return lines.pop((name, line))

    for name, line, row_id in source.positions():
        lineage.by_id[row_id] = take(name, line)
        for entry in lineage.by_id[row_id]:
            entry.id = row_id
    for error in source.bad_rows:
        where, line = str(error.where), error.line or 0
        for entry in take(where, line):
            entry.end(command, INVALID, str(error).removeprefix(f"{where}:{line}: "))
    for entry in chain.from_iterable(lines.values()):
        entry.end(command, LEFT_OUT, f"beyond --limit {source.limit}")
    return lineage


def _trace_output(name: str, ids: "_Ids", notes: list[str], visited: frozenset[str]) -> Lineage | None:
    """The lineage of the rows of a command's output, by their ids in it; None where the rows begin with this file.

    Why an output is not followed further is added to `notes`.
    """
    path = os.path.realpath(name)
    manifest = read_manifest(name) if os.path.isfile(name) else None
    if manifest is None or manifest.get("command") not in FOLLOWED:
        return None
    if path in visited:
        raise InputError("it is its own input", where=name)
    try:
        source = _read_inputs(name, manifest)
        parents = _trace(source, manifest["command"], visited | {path})
    except InputError as error:
        notes.append(f"{name}: its rows are not followed further back: {error}")
        return None
    notes += parents.notes
    return Lineage(parents.entries, _Children(name, ids, manifest, parents).by_id, parents.origins)


def _read_inputs(name: str, manifest: Mapping[str, Any]) -> Source:
    """The rows that a command read as its `--input`. InputError if its files are gone, or others by now."""
    folder = os.path.dirname(os.path.realpath(name))
    try:
        entry = manifest["inputs"][0]
        require, limit, renames = tuple(map(str, entry["require"])), entry["limit"], dict(entry["reading"])
        digests = {os.path.relpath(os.path.join(folder, file)): digest for file, digest in entry["files"].items()}
        reading = Reading(**renames, skip_invalid=True)
        shard = Shard.parse(str(entry["shard"])) if "shard" in entry else None
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError("its manifest does not name its inputs") from error
    for file in digests:
        if not os.path.isfile(file):
            raise InputError(f"{file} is no file, or was moved")
    source = Source(list(digests), require=require, limit=limit, reading=reading, shard=shard)
    if source.digests != digests:
        raise InputError(f"{', '.join(digests)}: changed since {manifest['command']}.py read it")
    return source


class _Ids:
    """(line, id) of all rows of an output, iterable again and again.

    As a source has read it, or from the file itself where the source has left rows out or may have changed ids.
    """

    def __init__(self, name: str, source: Source):
        self._name, self._source = name, source
        self._is_whole = len(source.inputs) == 1 and source.limit is None and not source.bad_rows

    def __iter__(self) -> Iterator[tuple[int, str]]:
        if self._is_whole:
            return ((line, row_id) for _, line, row_id in self._source.positions())
        return ((line, str(row.get("id"))) for line, row in read_jsonl(self._name, lambda _: None))


class _Children:
    """The rows of a command's output as continuations of the rows that it read.

    Attributes:
        by_id: {id of a row in the output: its entries}.
    """

    def __init__(self, name: str, ids: _Ids, manifest: Mapping[str, Any], parents: Lineage):
        self.name, self.command, self.parents = name, manifest["command"], parents
        self._continued: set[str] = set()
        self.by_id = {row_id: entries for _, row_id in ids if (entries := self._continue(row_id))}
        failed, skipped = manifest.get("failed_rows"), manifest.get("skipped_rows")
        reasons = failed if isinstance(failed, dict) else {}
        for row_id in reasons:
            for entry in () if row_id in self.by_id else self._continue(row_id):
                entry.end(self.command, FAILED, str(reasons[row_id]))
        for row_id in self._expected_ids(manifest["fingerprint"].get("samples")):
            if row_id not in self.by_id and row_id not in reasons:
                self._end_lost(row_id, [str(reason) for reason in skipped] if isinstance(skipped, list) else [])

    def _expected_ids(self, samples: Any) -> list[str]:
        """Ids of the rows that the output should have; of pairs, those of the rows that are in none."""
        if self.command == "generate":
            count = samples if isinstance(samples, int) else 1
            return [f"{prompt_id}/{n}" for prompt_id in self.parents.by_id for n in range(count)]
        return [row_id for row_id in self.parents.by_id if row_id not in self._continued]

    def _continue(self, row_id: str) -> list[Entry]:
        """The entries of a row: those of its parents, or copies where a parent has a child already."""
        entries = []
        for parent_id in self._find_parents(row_id):
            entries += [
                self._copy(entry) if parent_id in self._continued else entry for entry in self.parents.by_id[parent_id]
            ]
            self._continued.add(parent_id)
        positions: set[tuple[str, int]] = set()
        for entry in entries:
            entry.id, entry.is_merged = row_id, (entry.file, entry.line) in positions
            positions.add((entry.file, entry.line))
        return entries

    def _copy(self, entry: Entry) -> Entry:
        self.parents.entries.append(Entry(entry.file, entry.line))
        return self.parents.entries[-1]

    def _find_parents(self, row_id: str) -> list[str]:
        """Ids of the rows among the parents that a row of the output was made from."""
        known = self.parents.by_id
        if self.command == "generate":  # <prompt id>/<sample>
            prompt_id = row_id.rpartition("/")[0]
            return [prompt_id] if prompt_id in known else []
        if row_id in known or self.command != "judge":
            return [row_id] if row_id in known else []
        parts = row_id.split(" vs ")
        sides = ((" vs ".join(parts[:n]), " vs ".join(parts[n:])) for n in range(1, len(parts)))
        return next(([side for side in pair if side in known] for pair in sides if pair[0] in known), [])

    def _end_lost(self, row_id: str, skipped: list[str]) -> None:
        """End a row that the output does not have and that did not fail."""
        for entry in self._continue(row_id):
            position = f"{os.path.basename(entry.file)}:{entry.line}: "
            problems = [problem for _, _, problem in (reason.partition(position) for reason in skipped) if problem]
            if problems:
                entry.end(self.command, INVALID, problems[0])
            elif self.command == "judge":
                entry.end(self.command, LEFT_OUT, f"in no pair of {self.name}")
            else:
                entry.end(self.command, LEFT_OUT, f"not in {self.name}: it was removed there")
