"""Checked input rows: what a row must hold, its id, and a source that streams its files.

    source = Source(["prompts.jsonl"])
    for row in source: ...

A `Source` reads its files twice, once to check every row and again to use them. Bad input is therefore refused before
anything is written, and memory holds ids, never rows. Leaves out what a row means to a command.
"""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, count, islice, repeat
from typing import Any

from cai.base import cli
from cai.base.errors import LEAVE_OUT, CaiError, InputError, shorten
from cai.base.files import expand_patterns
from cai.base.hashing import sha256_file, sha256_text
from cai.data.dialogue import split_transcript
from cai.data.outputs import dump_row
from cai.data.prefills import check_prefill
from cai.data.readers import Row, is_json_lines, parse_line, read_lines, read_rows, type_name
from cai.data.reading import AS_THEY_ARE, FIELDS, Reading, list_columns
from cai.data.shapes import normalise
from cai.data.shards import Shard, Spool, explicit_id, line_key, read_first_id, shard_number

_Check = Callable[[Row, str, int], None]

_TYPES: dict[str, tuple[type, ...]] = {
    "response": (str,),
    "response_a": (str,),
    "response_b": (str,),
    "rounds": (list,),
    "chosen": (str, type(None)),
    "rejected": (str, type(None)),
}

_TEXTS = ("prompt", "response", "response_a", "response_b", "chosen", "rejected")

MOST_ERRORS = 20  # bad rows that an error names

_FIX = f"Fix or delete this row, {LEAVE_OUT}"


def _check_prompt(prompt: Any, where: str, line: int) -> str | list[Row]:
    """The prompt as a non-empty string or a list of messages that ends with the user's."""
    error = partial(
        InputError,
        where=where,
        line=line,
        expected="a non-empty string, or a list of {role, content} messages that ends with the user's",
    )
    turns = split_transcript(prompt) if isinstance(prompt, str) else None
    if turns is not None:
        if turns and turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()
        prompt = turns[0]["content"] if len(turns) == 1 else turns
    if isinstance(prompt, str):
        if not prompt.strip():
            raise error("the prompt is empty", remedy=_FIX)
        return prompt
    if not isinstance(prompt, list):
        raise error(f"the prompt is a {type_name(prompt)}: {shorten(prompt)!r}", remedy=_FIX)
    before = None
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise error(f"not a message: {shorten(message)!r}", remedy=_FIX)
        role = message.get("role")
        if role not in ("system", "user", "assistant") or (role == "system" and before is not None):
            roles = "The roles: system (first only), user, assistant"
            raise error(f"the role {shorten(role)!r} in the prompt", remedy=roles)
        if role == before or (role == "assistant" and before in (None, "system")):
            raise error(f"the role {role!r} after {before!r}", remedy="They take turns, the user first")
        before = role
    if before != "user":
        problem = f"the prompt ends with the role {before!r}" if prompt else "the prompt is an empty list"
        raise error(problem, remedy=_FIX)
    if not prompt[-1]["content"].strip():
        raise error("the user's last message is empty", remedy=_FIX)
    return prompt


def _check_row(row: Row, require: Sequence[str], where: str, line: int) -> Row:
    """The row with its prompt normalised; InputError if a required field is missing or of another type."""
    error = partial(InputError, where=where, line=line)
    row = normalise(row, require, error)
    for name in require:
        types = _TYPES.get(name, ())
        if name not in row or (row[name] is None and type(None) not in types):
            options = [f"--{name}-field COLUMN" if name in FIELDS else "", "--kind or --set" if name == "kind" else ""]
            advice = " or ".join(filter(None, options))
            raise error(
                f"a row without {name!r}",
                expected=f"the fields {', '.join(require)}",
                remedy=f"The row has: {list_columns(row)}{advice and '. Say where it is with ' + advice}",
            )
        if types and not isinstance(row[name], types):
            raise error(
                f"{name!r} is a {type_name(row[name])}: {shorten(row[name])!r}",
                expected=f"a {type_name(types[0]())}",
                remedy=_FIX,
            )
    if row.get("prompt") is not None:
        row = {**row, "prompt": _check_prompt(row["prompt"], where, line)}
    check_prefill(row, where, line)
    return row


def _id_of(row: Row, where: str, line: int) -> tuple[str, bool]:
    """(id, whether the row has one itself); an implied id is the hash of the row's text."""
    row_id = row.get("id")
    if row_id is None or row_id == "":
        return sha256_text(json.dumps([row.get(name) for name in _TEXTS], sort_keys=True))[:16], False
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise InputError(
            f"the id is a {type_name(row_id)}: {shorten(row_id)!r}",
            where=where,
            line=line,
            expected="a string or a whole number",
            remedy="Fix it, or leave the id out and one is made",
        )
    return str(row_id), True


def _file_stamp(path: str) -> tuple[int, int, int]:
    """(size, time of change, inode): another stamp means that the file may have changed."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


class Source:
    """Rows of one or more inputs, all checked on creation; iterable again and again, streaming.

    Each row has an `id` (str) and, if it has a prompt, a checked one. A missing id is made from the row's
    text, so that the order of rows does not change it; repeated ones get -2, -3 and so on. An id that occurs
    twice in one file is an error; in two files (samples of two models), the later gets a suffix.

    Args:
        inputs: files (.jsonl .json .csv .parquet .txt, .gz or .zst of the texts), patterns of their names, folders of
            save_to_disk, or dataset ids.
        require: fields that every row must have. They are the row's role: columns of another role are carried along.
        limit: read the first so many rows only, bad ones included.
        check: called with (row, file, line) for every row, to raise an InputError of the command's own.
        reading: names of columns and the like; with `skip_invalid` bad rows are left out and reported by cli.
        shard: the rows of this shard alone, which may be none. They are kept in a temporary file, so that only the
            first pass reads the whole input.

    Attributes:
        count: number of rows.
        ids: their ids, in order.
        bad_rows: the errors of rows that `skip_invalid` leaves out, with file and line.
        digests: {input: SHA-256 of its bytes}; of an input that is no file, of its rows.
        digest: SHA-256 over the digests, the limit, and what `reading` renames; the same in all shards.

    Raises InputError with file and line for the bad rows, the first `MOST_ERRORS` of them. Raises CaiError if a file
    changes between the two passes; rows that were only added to it are left out, with a warning.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        *,
        require: Sequence[str] = ("prompt",),
        limit: int | None = None,
        check: _Check | None = None,
        reading: Reading = AS_THEY_ARE,
        shard: Shard | None = None,
    ):
        self.inputs = expand_patterns(inputs)
        self.require, self.limit, self.reading = tuple(require), limit, reading
        self.shard, self._spool = shard, Spool() if shard else None
        paths = [os.path.realpath(name) for name in self.inputs]
        for number, name in enumerate(self.inputs):
            if paths[number] in paths[:number]:
                raise InputError("the same input twice", where=name, remedy="Name it once")
        self.ids = self._scan(check)
        self.count = len(self.ids)
        if not self.count and not shard:
            raise InputError("no rows", where=", ".join(self.inputs), expected="at least one row")

    def __iter__(self) -> Iterator[Row]:
        return self._read_again() if self._spool is None else iter(self._spool)

    def _read_again(self) -> Iterator[Row]:
        ids = iter(self.ids)
        for name in self.inputs:
            # As many as were counted: a row added since must not take the id of another file's row.
            try:
                for row_id, (line, row) in zip(islice(ids, self._counts[name]), self._good_rows(name), strict=False):
                    yield {**self._checked(row, name, line), "id": row_id}
            except InputError:  # of a row that was good before
                self._check_unchanged(name)
                raise
            self._check_unchanged(name)

    def positions(self) -> Iterator[tuple[str, int, str]]:
        """(file, line, id) of each row."""
        names = chain.from_iterable(repeat(name, self._counts[name]) for name in self.inputs)
        return zip(names, self._lines, self.ids, strict=True)

    def _good_rows(self, name: str) -> Iterator[tuple[int, Row]]:
        """The rows of a file without those that the first pass has skipped."""
        bad = self._bad_lines[name]
        rows = read_rows(name, lambda _: None) if bad else read_rows(name)
        return ((line, row) for line, row in rows if line not in bad)

    def _check_unchanged(self, name: str) -> None:
        """Raise CaiError unless the file is what it was when it was checked, or only longer."""
        if name not in self._stamps or _file_stamp(name) == self._stamps[name]:
            return
        if sha256_file(name, self._stamps[name][0]) != self.digests[name]:
            raise CaiError(
                f"{name}: it changed while it was read. Put it back as it was and run the same command "
                "again, or start again with --overwrite."
            )
        cli.warn(f"{name} has grown since it was checked: what was added is left out")

    def _checked(self, row: Row, where: str, line: int) -> Row:
        return _check_row(self.reading.apply(row, where, line), self.require, where, line)

    def _scan(self, check: _Check | None) -> list[str]:
        """Check every row; returns the ids and sets the digest."""
        self._stamps = {name: _file_stamp(name) for name in self.inputs if os.path.isfile(name)}
        self._counts: Counter[str] = Counter()
        self._bad_lines: dict[str, set[int]] = {name: set() for name in self.inputs}
        scan = _Scan(self.reading.skip_invalid, self.limit)
        hashes = {name: hashlib.sha256() for name in self.inputs if name not in self._stamps}
        for where, line, raw_row in self._read(scan):
            key = explicit_id(raw_row)
            if self.shard and key is not None and not self.shard.has(key) and where not in hashes:
                continue
            try:
                row = self._checked(raw_row, where, line)
                key = key or _id_of(row, where, line)[0]
                is_ours = self.shard is None or self.shard.has(key)
                row_id = scan.choose_id(row, where, line) if is_ours else key
                if check:
                    check(row, where, line)
            except InputError as error:
                if self.shard is None or self.shard.has(key or line_key(line)):
                    self._bad_lines[where].add(line)
                    scan.add_error(error)
                continue
            if where in hashes:
                hashes[where].update(dump_row(row))
            if not is_ours:
                continue
            scan.positions[row_id] = (where, line)
            if set(self.require) <= {"prompt", "kind"}:
                scan.count_prompt(row)
            self._counts[where] += 1
            if self._spool is not None:
                self._spool.append({**row, "id": row_id})
        scan.finish(self.inputs)
        self.digests = {name: hashes[name].hexdigest() if name in hashes else sha256_file(name) for name in self.inputs}
        for name, stamp in self._stamps.items():
            if _file_stamp(name) != stamp:
                raise InputError("it changed while it was read", where=name, remedy="Wait until it is complete")
        self.bad_rows = scan.errors
        self._lines = array("Q", (line for _, line in scan.positions.values()))
        part = {"shard": str(self.shard)} if self.shard else {}
        cli.report_input(
            files=self.digests, require=list(self.require), limit=self.limit, reading=self.reading.renames, **part
        )
        renames = [self.reading.renames] if self.reading.renames else []
        self.digest = sha256_text(json.dumps([list(self.digests.values()), self.limit, *renames]))
        return list(scan.positions)

    def _read(self, scan: "_Scan") -> Iterator[tuple[str, int, Row]]:
        """(file, line, row) up to the limit; lines that can't be read count, and go to `scan.add_error`."""
        for name in self.inputs:
            keep = _ShardFilter(self.shard, scan) if self.shard else None

            def report(error: InputError, name: str = name, keep: "_ShardFilter | None" = keep) -> None:
                if scan.takes_row() and (keep is None or keep.has_bad_line(error.line or 0)):
                    self._bad_lines[name].add(0)  # a reader's lines begin with 1: read again, it skips this one itself
                    scan.add_error(error)

            rows = read_rows(name, report, keep)
            while not scan.is_full and (numbered := next(rows, None)):
                if scan.takes_row():
                    yield name, *numbered


class _ShardFilter:
    """Which lines of JSON Lines have to be parsed for a shard: its own, and those that do not begin with their id.

    A line that belongs to another shard counts for the limit all the same.
    """

    def __init__(self, shard: Shard, scan: "_Scan"):
        self._shard, self._scan = shard, scan
        self._is_ours = False  # whether the last line belongs to the shard by the id that it begins with

    def __call__(self, _line: int, raw: bytes) -> bool:
        key = read_first_id(raw)
        self._is_ours = key is not None and self._shard.has(key)
        if key is not None and not self._is_ours:
            self._scan.takes_row()
            return False
        return True

    def has_bad_line(self, line: int) -> bool:
        """Whether the shard reports a line that can't be read, the last one."""
        return self._is_ours or self._shard.has(line_key(line))


class _Scan:
    """What the first pass over the rows has found: ids, bad rows, repeated prompts."""

    def __init__(self, skip_invalid: bool, limit: int | None):
        self.skip_invalid, self.limit = skip_invalid, limit
        self.positions: dict[str, tuple[str, int]] = {}  # (file, line) of each id
        self.errors: list[InputError] = []
        self.read = self.repeated = 0
        self._prompts: set[bytes] = set()

    @property
    def is_full(self) -> bool:
        return self.limit is not None and self.read >= self.limit

    def takes_row(self) -> bool:
        """Whether one more row is within the limit; it is then counted."""
        if self.is_full:
            return False
        self.read += 1
        return True

    def add_error(self, error: InputError) -> None:
        self.errors.append(error)
        if len(self.errors) == MOST_ERRORS and not self.skip_invalid:
            raise self._refusal()

    def choose_id(self, row: Row, where: str, line: int) -> str:
        """The row's id, or a new one. InputError for one that its file has already."""
        row_id, is_explicit = _id_of(row, where, line)
        if row_id in self.positions:
            first_where, first_line = self.positions[row_id]
            if is_explicit and first_where == where:
                raise InputError(
                    f"the id {shorten(row_id)!r} again, first on line {first_line}",
                    where=where,
                    line=line,
                    expected="ids that differ",
                    remedy="Rename or delete one of the two rows",
                )
            row_id = next(id_ for number in count(2) if (id_ := f"{row_id}-{number}") not in self.positions)
        return row_id

    def count_prompt(self, row: Row) -> None:
        prompt = hashlib.sha256(json.dumps(row.get("prompt"), sort_keys=True).encode()).digest()[:12]
        self.repeated += prompt in self._prompts
        self._prompts.add(prompt)

    def finish(self, inputs: Sequence[str]) -> None:
        """Refuse bad rows, or report those that are left out, and prompts that are repeated."""
        if self.errors and not self.skip_invalid:
            raise self._refusal()
        cli.report_rows(", ".join(inputs), {f"{e.where}:{e.line}": str(e) for e in self.errors}, self.repeated)

    def _refusal(self) -> InputError:
        if len(self.errors) == 1:
            return self.errors[0]
        number = f"the first {MOST_ERRORS}" if len(self.errors) == MOST_ERRORS else str(len(self.errors))
        lines = "".join(f"\n  {shorten(error, 300)}" for error in self.errors)
        return InputError(f"{number} bad rows:{lines}\nFix them, or leave them out with --skip-invalid")


def read_shards(
    inputs: Sequence[str], count: int, *, require: Sequence[str], limit: int | None, reading: Reading
) -> Iterator[tuple[str, int, str, int]]:
    """(file, line, id, number of its shard of `count`) of the rows, as sources with `shard` divide them; streaming.

    The id lacks the suffix that a `Source` gives to a repeated one. A row without an id that a source would refuse is
    left out; one with an id is not.
    """
    read = 0

    def note_bad_line(_error: InputError) -> None:
        nonlocal read
        read += 1

    for name in expand_patterns(inputs):
        for line, key, row in _read_keys(name, note_bad_line):
            if limit is not None and read >= limit:
                return
            read += 1
            row_id = key.decode(errors="replace") if key is not None else explicit_id(row)
            if row_id is None:
                try:
                    row_id = _id_of(_check_row(reading.apply(row, name, line), require, name, line), name, line)[0]
                except InputError:
                    continue
            yield name, line, row_id, shard_number(key or row_id, count)


def _read_keys(name: str, on_error: Callable[[InputError], None]) -> Iterator[tuple[int, bytes | None, Row]]:
    """(line, the id that it begins with, {}) of lines of JSON that begin with one, (line, None, row) of others."""
    if not is_json_lines(name):
        yield from ((line, None, row) for line, row in read_rows(name, on_error))
        return
    for line, raw in read_lines(name):
        if (key := read_first_id(raw)) is not None:
            yield line, key, {}
        elif raw.strip():
            for row in parse_line(raw, name, line, on_error):
                yield line, None, row


def first_row(inputs: Sequence[str], reading: Reading = AS_THEY_ARE) -> Row:
    """The first row that has a prompt, as a `Source` gives it; {} if there is none."""
    for name in expand_patterns(inputs):
        for line, row in read_rows(name, lambda _: None):
            with suppress(InputError):
                return _check_row(reading.apply(row, name, line), ("prompt",), name, line)
    return {}
