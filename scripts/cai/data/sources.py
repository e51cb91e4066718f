"""Checked input rows: what a row must hold, its id, and a source that streams its files.

    source = Source(["prompts.jsonl"])
    for row in source: ...

A `Source` reads its files twice, once to check every row and again to use them. Bad input is therefore refused before
anything is written, and memory holds ids, never rows. Leaves out what a row means to a command.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import Any

from cai.base import cli
from cai.base.errors import CaiError, InputError, shorten
from cai.base.hashing import sha256_file, sha256_text
from cai.data.dialogue import side_turns, split_pair, split_transcript, transcript_text
from cai.data.outputs import dump_row
from cai.data.readers import Row, read_rows, type_name

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

_FIX = "Fix or delete this row"


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
    sides: dict[str, Any] = {name: row.get(name) for name in ("chosen", "rejected")}
    if row.get("prompt") is None and all(isinstance(side, str | list) for side in sides.values()):
        row = split_pair(row)
    for name, side in sides.items():  # TRL's answer as messages
        turns = side_turns(side) if row.get("prompt") is not None and isinstance(row.get(name), list) else None
        if turns and turns[0]["role"] != "system":
            row = {**row, name: transcript_text(turns)}
    for name in require:
        types = _TYPES.get(name, ())
        if name not in row or (row[name] is None and type(None) not in types):
            raise InputError(
                f"a row without {name!r}",
                where=where,
                line=line,
                expected=f"the fields {', '.join(require)}",
                remedy=f"The row has: {shorten(', '.join(map(str, row)) or 'nothing')}",
            )
        if types and not isinstance(row[name], types):
            raise InputError(
                f"{name!r} is a {type_name(row[name])}: {shorten(row[name])!r}",
                where=where,
                line=line,
                expected=f"a {type_name(types[0]())}",
                remedy=_FIX,
            )
    if row.get("prompt") is not None:
        row = {**row, "prompt": _check_prompt(row["prompt"], where, line)}
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
        inputs: files (.jsonl .json .csv .parquet .txt, .gz of the texts) or dataset ids.
        require: fields that every row must have.
        limit: read the first so many rows only.
        check: called with (row, file, line) for every row, to raise an InputError of the command's own.

    Attributes:
        count: number of rows.
        ids: their ids, in order.
        digest: SHA-256 over the bytes of the files, and the limit.

    Raises InputError with file and line for the first bad row. Raises CaiError if a file changes between the two
    passes; rows that were only added to it are left out, with a warning.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        *,
        require: Sequence[str] = ("prompt",),
        limit: int | None = None,
        check: _Check | None = None,
    ):
        self.inputs = [str(name) for name in inputs]
        self.require, self.limit = tuple(require), limit
        paths = [os.path.realpath(name) for name in self.inputs]
        for number, name in enumerate(self.inputs):
            if paths[number] in paths[:number]:
                raise InputError("the same input twice", where=name, remedy="Name it once")
        self.ids = self._scan(check)
        self.count = len(self.ids)
        if not self.count:
            raise InputError("no rows", where=", ".join(self.inputs), expected="at least one row")

    def __iter__(self) -> Iterator[Row]:
        ids = iter(self.ids)
        for name in self.inputs:
            # As many as were counted: a row added since must not take the id of another file's row.
            try:
                for row_id, (line, row) in zip(islice(ids, self._counts[name]), read_rows(name), strict=False):
                    yield {**self._checked(row, name, line), "id": row_id}
            except InputError:  # of a row that was good before
                self._check_unchanged(name)
                raise
            self._check_unchanged(name)

    def _check_unchanged(self, name: str) -> None:
        """Raise CaiError unless the file is what it was when it was checked, or only longer."""
        if name not in self._stamps or _file_stamp(name) == self._stamps[name]:
            return
        if sha256_file(name, self._stamps[name][0]) != self._digests[name]:
            raise CaiError(
                f"{name}: it changed while it was read. Put it back as it was and run the same command "
                "again, or start again with --overwrite."
            )
        cli.warn(f"{name} has grown since it was checked: what was added is left out")

    def _converted(self, row: Row, where: str, line: int) -> Row:
        """The row in our format; a source of another format overrides this (data/public_sets.py)."""
        return row

    def _checked(self, row: Row, where: str, line: int) -> Row:
        return _check_row(self._converted(row, where, line), self.require, where, line)

    def _scan(self, check: _Check | None) -> list[str]:
        """Check every row; returns the ids and sets the digest."""
        positions: dict[str, tuple[str, int]] = {}
        self._stamps = {name: _file_stamp(name) for name in self.inputs if os.path.isfile(name)}
        self._counts: Counter[str] = Counter()
        hashes = {name: hashlib.sha256() for name in self.inputs if name not in self._stamps}
        rows = ((name, line, row) for name in self.inputs for line, row in read_rows(name))
        for where, line, raw_row in islice(rows, self.limit):
            row = self._checked(raw_row, where, line)
            self._counts[where] += 1
            if check:
                check(row, where, line)
            if where in hashes:
                hashes[where].update(dump_row(row))
            row_id, is_explicit = _id_of(row, where, line)
            if row_id in positions:
                first_where, first_line = positions[row_id]
                if is_explicit and first_where == where:
                    raise InputError(
                        f"the id {shorten(row_id)!r} again, first on line {first_line}",
                        where=where,
                        line=line,
                        expected="ids that differ",
                        remedy="Rename or delete one of the two rows",
                    )
                row_id = next(id_ for number in count(2) if (id_ := f"{row_id}-{number}") not in positions)
            positions[row_id] = (where, line)
        self._digests = {
            name: hashes[name].hexdigest() if name in hashes else sha256_file(name) for name in self.inputs
        }
        for name, stamp in self._stamps.items():
            if _file_stamp(name) != stamp:
                raise InputError("it changed while it was read", where=name, remedy="Wait until it is complete")
        self.digest = sha256_text(json.dumps([list(self._digests.values()), self.limit]))
        return list(positions)
