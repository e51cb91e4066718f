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
from itertools import islice

from cai.base import cli
from cai.base.errors import CaiError, InputError, shorten
from cai.base.hashing import sha256_file, sha256_text
from cai.data.dialogue import side_turns, split_pair, split_transcript, transcript_text
from cai.data.outputs import dump_row
from cai.data.readers import read_rows, type_name

_TYPES = {
    "response": (str,),
    "response_a": (str,),
    "response_b": (str,),
    "rounds": (list,),
    "chosen": (str, type(None)),
    "rejected": (str, type(None)),
}

_TEXTS = ("prompt", "response", "response_a", "response_b", "chosen", "rejected")


def _check_prompt(prompt, where, line: int):
    """The prompt as a non-empty string or a list of messages that ends with the user's."""

    def wrong(found: str, remedy: str = "Mend or delete this row"):
        return InputError(
            found,
            where=where,
            line=line,
            remedy=remedy,
            expected="a non-empty string, or a list of {role, content} messages that ends with the user's",
        )

    if isinstance(prompt, str):
        turns = split_transcript(prompt)
        if turns and turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()
        if turns is not None and len(turns) != 1:
            prompt = turns
        elif turns:
            prompt = turns[0]["content"]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise wrong("the prompt is empty")
        return prompt
    if not isinstance(prompt, list):
        raise wrong(f"the prompt is a {type_name(prompt)}: {shorten(prompt)!r}")
    before = None
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise wrong(f"not a message: {shorten(message)!r}")
        role = message.get("role")
        if role not in ("system", "user", "assistant") or (role == "system" and before is not None):
            raise wrong(f"the role {shorten(role)!r} in the prompt", "The roles: system (first only), user, assistant")
        if role == before or (role == "assistant" and before in (None, "system")):
            raise wrong(f"the role {role!r} after {before!r}", "They take turns, the user first")
        before = role
    if before != "user":
        raise wrong(f"the prompt ends with the role {before!r}" if prompt else "the prompt is an empty list")
    if not prompt[-1]["content"].strip():
        raise wrong("the user's last message is empty")
    return prompt


def _check(row: dict, require: Sequence[str], where, line: int) -> dict:
    """The row with its prompt normalised; InputError if a required field is missing or of another type."""
    pair = (row.get("chosen"), row.get("rejected"))
    if row.get("prompt") is None and all(isinstance(side, str | list) for side in pair):
        row = split_pair(row)
    for name, side in zip(("chosen", "rejected"), pair, strict=True):  # TRL's answer as messages
        turns = side_turns(side) if row.get("prompt") is not None and isinstance(row.get(name), list) else None
        if turns and turns[0]["role"] != "system":
            row = {**row, name: transcript_text(turns)}
    for name in require:
        if name not in row or (row[name] is None and type(None) not in _TYPES.get(name, ())):
            raise InputError(
                f"a row without {name!r}",
                where=where,
                line=line,
                expected=f"the fields {', '.join(require)}",
                remedy=f"The row has: {shorten(', '.join(map(str, row)) or 'nothing')}",
            )
        if name in _TYPES and not isinstance(row[name], _TYPES[name]):
            raise InputError(
                f"{name!r} is a {type_name(row[name])}: {shorten(row[name])!r}",
                where=where,
                line=line,
                expected=f"a {type_name(_TYPES[name][0]())}",
                remedy="Mend or delete this row",
            )
    if row.get("prompt") is not None:
        row = {**row, "prompt": _check_prompt(row["prompt"], where, line)}
    return row


def _id_of(row: dict, where, line: int) -> tuple[str, bool]:
    """(id, whether the row itself gave it); an implied one is the hash of the row's own text."""
    given = row.get("id")
    if given is None or given == "":
        own = [row.get(name) for name in _TEXTS]
        return sha256_text(json.dumps(own, sort_keys=True))[:16], False
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise InputError(
            f"the id is a {type_name(given)}: {shorten(given)!r}",
            where=where,
            line=line,
            expected="a string or a whole number",
            remedy="Mend it, or leave the id out and one is made",
        )
    return str(given), True


def _file_stamp(path: str) -> tuple[int, int, int]:
    """(size, time of change, inode): whether a file may be another than before."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino


class Source:
    """Rows of one or more inputs, all checked when it is made; iterable again and again, streaming.

    Each row has an `id` (str) and, if it has a prompt, a checked one. A missing id is made from the row's
    text, so that the order of rows does not change it; repeated ones get -2, -3 and so on. An id given
    twice in one file is an error; given in two files (samples of two models), the later gets a suffix.

    Args:
        inputs: files (.jsonl .json .csv .parquet .txt, .gz of the texts) or dataset ids.
        require: fields that every row must have.
        limit: take the first so many rows only.
        check: called with (row, file, line) for every row, to raise an InputError of the command's own.

    Attributes:
        count: number of rows.
        ids: their ids, in order.
        digest: SHA-256 over the bytes of the files, and the limit.

    Raises InputError with file and line for the first row that is not as it must be. A file that is another one when
    it is read again is a CaiError; what was only added to one is left out, with a warning.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        *,
        require: Sequence[str] = ("prompt",),
        limit: int | None = None,
        check: Callable[[dict, str, int], None] | None = None,
    ):
        self.inputs = [str(name) for name in inputs]
        self.require, self.limit = tuple(require), limit
        same = {}
        for name in self.inputs:
            if (real := os.path.realpath(name)) in same:
                raise InputError("the same input twice", where=name, remedy="Name it once")
            same[real] = name
        self.ids = self._scan(check)
        self.count = len(self.ids)
        if not self.count:
            raise InputError("no rows", where=", ".join(self.inputs), expected="at least one row")

    def __iter__(self) -> Iterator[dict]:
        ids = iter(self.ids)
        for name in self.inputs:
            # As many as were counted: of rows added since, none takes the id of another file's row.
            try:
                for row_id, (line, row) in zip(islice(ids, self._counts[name]), read_rows(name), strict=False):
                    yield {**_check(self._converted(row, name, line), self.require, name, line), "id": row_id}
            except InputError:  # of a row that was good before
                self._still(name)
                raise
            self._still(name)

    def _still(self, name: str) -> None:
        """CaiError unless the file is what it was when it was checked, or only longer."""
        if name not in self._marks or _file_stamp(name) == self._marks[name]:
            return
        if sha256_file(name, self._marks[name][0]) != self._digests[name]:
            raise CaiError(
                f"{name}: it changed while it was read. Put it back as it was and run the same command "
                "again, or start anew with --overwrite."
            )
        cli.warn(f"{name} has grown since it was checked: what was added is left out")

    def _converted(self, row: dict, where: str, line: int) -> dict:
        """The row as it is meant; a source of another format says how (cai/data/public_sets.py)."""
        return row

    def _raw(self) -> Iterator[tuple[str, int, dict]]:
        rows = ((name, line, row) for name in self.inputs for line, row in read_rows(name))
        return islice(rows, self.limit)

    def _scan(self, check) -> list[str]:
        """Check every row; returns the ids and sets the digest."""
        places: dict[str, tuple[str, int]] = {}
        self._marks = {name: _file_stamp(name) for name in self.inputs if os.path.isfile(name)}
        self._counts = Counter()
        hashes = {name: hashlib.sha256() for name in self.inputs if not os.path.isfile(name)}
        for where, line, row in self._raw():
            row = _check(self._converted(row, where, line), self.require, where, line)
            self._counts[where] += 1
            if check:
                check(row, where, line)
            if where in hashes:
                hashes[where].update(dump_row(row))
            row_id, given = _id_of(row, where, line)
            if row_id in places:
                first_where, first_line = places[row_id]
                if given and first_where == where:
                    raise InputError(
                        f"the id {shorten(row_id)!r} again, first on line {first_line}",
                        where=where,
                        line=line,
                        expected="ids that differ",
                        remedy="Rename or delete one of the two rows",
                    )
                number = 2
                while f"{row_id}-{number}" in places:
                    number += 1
                row_id = f"{row_id}-{number}"
            places[row_id] = (where, line)
        self._digests = {
            name: hashes[name].hexdigest() if name in hashes else sha256_file(name) for name in self.inputs
        }
        for name, mark in self._marks.items():
            if _file_stamp(name) != mark:
                raise InputError("it changed while it was read", where=name, remedy="Wait until it is written whole")
        self.digest = sha256_text(json.dumps([list(self._digests.values()), self.limit]))
        return list(places)
