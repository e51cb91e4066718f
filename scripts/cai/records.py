"""Rows in, rows out: validated reading of prompts and rows, and outputs that survive being killed.

    source = Source(["prompts.jsonl"])
    with Output("responses.jsonl", command="generate", fingerprint={"input": source.digest}) as output:
        for row in source:
            if row["id"] not in output.done:
                output.write({**row, "response": "..."})
        output.finish(source.ids, counts={"rows": source.count})

A `Source` reads its files twice, once to check every row and again to use them, so that bad input is
refused before anything is written and memory holds ids, never rows. An `Output` appends to a journal,
`<path>.partial`, and becomes `<path>` only when it is finished; `<path>.run.json` says from what.

Leaves out what a row means to a command, and editing in place: every step writes a new file.
"""

import csv
import errno
import fcntl
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice, takewhile
from pathlib import Path

from cai import cli
from cai.errors import CaiError, InputError, shorten
from cai.resources import model_path

# ---------------------------------------------------------------------------------------------- hashing


def sha256_text(text: str) -> str:
    """Hex digest of the text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path, size: int | None = None) -> str:
    """Hex digest of the bytes of a file, or of its first so many."""
    with open(path, "rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while size > 0 and (part := file.read(min(size, 1 << 20))):
            digest.update(part)
            size -= len(part)
        return digest.hexdigest()


def identity(model: str) -> str:
    """What tells one model from another in a fingerprint: what its folder holds, or a hub id itself.

    The same folder with other weights is another model. Of a large file 64 samples of 64 KiB are hashed:
    training changes weights everywhere, and seventy billion of them would take minutes.
    """
    folder = Path(model_path(model))
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    for path in sorted(path for path in folder.iterdir() if path.suffix in kinds):
        size = path.stat().st_size
        digest.update(f"{path.name}\x1f{size}\x1f".encode())
        with open(path, "rb") as file:
            for place in range(0, size, max(1 << 16, size // 64)):
                file.seek(place)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def hashed_seed(*parts) -> int:
    """A 63-bit integer that depends on the parts and on nothing else.

    Every draw for a record (its principle, its sampled text) is seeded so, from the record's id:
    order, batch and resumption cannot change it.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# ---------------------------------------------------------------------------------------------- reading


MOST_DEEP = 100  # levels of a row's lists and objects: what reads it later is recursive


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value - value:  # neither of infinity is 0
        raise ValueError(f"{shorten(digits)} is too large for a number")
    return value


def _once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {shorten(doubled(name for name, _ in pairs))!r} twice in one object")
    return found


_STRICT = {"parse_constant": _no_constant, "parse_float": _finite, "object_pairs_hook": _once}


def doubled(names: Iterable[str]) -> str | None:
    """The first name that is there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _check_depth(value) -> None:
    """ValueError if lists and objects are nested more than `MOST_DEEP` deep."""
    level = [value]
    for _ in range(MOST_DEEP + 1):
        level = [item for one in level if isinstance(one, dict | list)
                 for item in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return
    raise ValueError(f"nested more than {MOST_DEEP} deep")


def _parse(raw: bytes, where, line: int) -> dict:
    """One JSON object from one line; InputError for anything else."""
    try:
        row = json.loads(_text(raw, line), **_STRICT)
        if raw.count(b"[") + raw.count(b"{") > MOST_DEEP:
            _check_depth(row)
        if b"\\u" in raw:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"half a surrogate pair ({error.object[error.start]!a}) in the text", where=where, line=line,
            expected="valid Unicode", remedy="Write the character whole, or leave it out",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"not JSON ({error}): {shorten(raw.decode(errors='replace'))!r}", where=where, line=line,
            expected="one JSON object a line, in UTF-8", remedy="Mend or delete this line",
        ) from error
    if not isinstance(row, dict):
        raise InputError(
            f"a JSON {_kind(row)}, not an object: {shorten(row)!r}", where=where, line=line,
            expected='an object such as {"prompt": "..."}', remedy="Make each line one object",
        )
    return row


def _open(path):
    """The bytes of a file, unpacked if its name ends in .gz; InputError if there is none to read."""
    try:
        return gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")
    except OSError as error:
        raise InputError(
            f"cannot read it: {error.strerror or error}", where=path, remedy="Check the path",
        ) from error


def _lines(path) -> Iterator[tuple[int, bytes]]:
    line = 0
    with _open(path) as file:
        try:
            for line, raw in enumerate(file, 1):
                yield line, raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"damaged gzip data ({error})", where=path, line=line + 1) from error


def _text(raw: bytes, line: int) -> str:
    """The line in UTF-8, without the mark that some editors put before the first."""
    return raw.decode("utf-8-sig" if line == 1 else "utf-8")


def read_jsonl(path) -> Iterator[tuple[int, dict]]:
    """(1-based line number, row) of a JSON Lines file; empty lines are passed over.

    Raises InputError with file and line for what is not a JSON object.
    """
    for line, raw in _lines(path):
        if raw.strip():
            yield line, _parse(raw, path, line)


def write_jsonl(path, rows: Iterable[dict]) -> None:
    """Write the rows whole or not at all: into a file beside it, which then takes its place."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        for row in rows:
            file.write(_dump(row))
    os.replace(temporary, path)


def cell(value):
    """A value for a cell of a CSV file: text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def _dump(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _read_json(path) -> Iterator[tuple[int, dict]]:
    """A JSON array of objects (the number is the item's), or JSON Lines under the wrong name."""
    lines = (raw.removeprefix(b"\xef\xbb\xbf").strip() for _, raw in _lines(path))
    if not next(filter(None, lines), b"").startswith(b"["):
        yield from read_jsonl(path)
        return
    try:
        text = b"".join(raw for _, raw in _lines(path)).decode("utf-8-sig")
        rows = [json.dumps(row).encode() for row in json.loads(text, **_STRICT)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})", where=path, expected="an array of objects") from error
    for number, row in enumerate(rows, 1):
        yield number, _parse(row, path, number)


def _read_csv(path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader((_text(raw, line) for line, raw in _lines(path)), strict=True)
    try:
        if (name := doubled(reader.fieldnames or ())) is not None:
            raise InputError(f"the column {shorten(name)!r} twice", where=path, line=1, remedy="Rename one of the two")
        for row in reader:
            if None in row:
                raise InputError(
                    f"more cells than the {len(reader.fieldnames)} columns: {shorten(row[None])!r}",
                    where=path, line=reader.line_num, remedy="Quote cells that hold a comma",
                )
            yield reader.line_num, {name: cell for name, cell in row.items() if cell is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"not CSV ({error})", where=path, line=reader.line_num + 1,
            expected="comma-separated UTF-8 with a header line",
        ) from error


def _read_text(path) -> Iterator[tuple[int, dict]]:
    for line, raw in _lines(path):
        try:
            text = _text(raw, line).strip()
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 ({error})", where=path, line=line) from error
        if text:
            yield line, {"prompt": text}


def _read_parquet(path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if (name := doubled(file.schema_arrow.names)) is not None:
                raise InputError(f"the column {shorten(name)!r} twice", where=path, remedy="Rename one of the two")
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield number, _plain(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"not Parquet ({shorten(error)})", where=path, line=number + 1) from error
    except (ValueError, OverflowError, RecursionError) as error:  # text that is not UTF-8, a year 100,000
        raise InputError(f"a value that can't be read ({shorten(error)})", where=path, line=number + 1,
                         expected="text in UTF-8, numbers, lists and structs", remedy="Convert the column") from error


def _read_dataset(name: str) -> Iterator[tuple[int, dict]]:
    """Rows of a dataset id, `owner/name` or `owner/name:split` (the split is `train` if not named)."""
    import datasets

    path, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"no such file, and no dataset could be loaded under this id ({shorten(error, 160)})", where=name,
            expected="a file, or a dataset id such as owner/name or owner/name:split",
            remedy="Check the path; without a network, give a file",
        ) from error
    for number, row in enumerate(rows, 1):
        yield number, _plain(row)


def _plain(value):
    """Parquet's values as JSON has them; what is not a number is null. ValueError for bytes that are not UTF-8."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, bytes):
        return value.decode()
    return value if value is None or isinstance(value, str | int) else str(value)


_READERS = {
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": _read_json, ".csv": _read_csv,
    ".parquet": _read_parquet, ".txt": _read_text,
}


def _read(name: str) -> Iterator[tuple[int, dict]]:
    """(line, row) of one input, read by what its name ends with."""
    path = Path(name)
    suffix = Path(name.removesuffix(".gz")).suffix
    if os.path.isfile(name):
        if suffix not in _READERS or (suffix == ".parquet" and name.endswith(".gz")):
            raise InputError(
                f"unknown kind of file: {path.suffix or 'no suffix'!r}", where=name,
                expected="one of " + " ".join(_READERS), remedy="Rename or convert it",
            )
        return _READERS[suffix](name)
    if os.path.isdir(name):
        raise InputError("a folder", where=name, expected="a file of rows", remedy="Name a file in it")
    if suffix in _READERS or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/]+)?", name):
        raise InputError("no such file", where=name, remedy="Check the path")
    return _read_dataset(name)


# ------------------------------------------------------------------------------------ what a row must be

_TYPES = {
    "response": (str,), "response_a": (str,), "response_b": (str,), "rounds": (list,),
    "chosen": (str, type(None)), "rejected": (str, type(None)),
}
_TEXTS = ("prompt", "response", "response_a", "response_b", "chosen", "rejected")
# White space with an empty line in it, then the label. Possessive, and from where the white space begins: a text of
# nothing but line breaks is read once, not once for each of them.
_MARKS = re.compile(r"(?:\A|(?<!\s)(?:(?!\n\n)\s)*+\n\n\s*+)(Human|Assistant):")


def _kind(value) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _turns(transcript: str) -> list[dict] | None:
    r"""Messages of a `\n\nHuman: ... \n\nAssistant: ...` transcript, or None if the text is none.

    Neighbouring turns of one role (they occur in HH-RLHF) become one, since chat templates want the
    roles to alternate.
    """
    text = transcript.lstrip()
    if not text.startswith("Human:") or not ("\n\nAssistant:" in text or transcript.startswith("\n\n")):
        return None
    parts = _MARKS.split(text)[1:]
    turns: list[dict] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = ("user" if speaker == "Human" else "assistant"), said.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{said}"
        else:
            turns.append({"role": role, "content": said})
    return turns


def _rest(turns: list[dict]) -> str:
    """What one side of a pair said after the shared turns, as text."""
    names = {"user": "Human", "assistant": "Assistant"}
    text = "\n\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in turns)
    return text.removeprefix("Assistant:").strip()


def _spoken(side: str | list) -> list[dict] | None:
    """One side of a pair as messages: of a transcript, or TRL's list of them; None if it is neither."""
    if isinstance(side, str):
        return _turns(side)
    known = all(isinstance(one, dict) and isinstance(one.get("content"), str)
                and (one.get("role") in ("user", "assistant") or (one.get("role") == "system" and place == 0))
                for place, one in enumerate(side))
    return side if side and known else None


def split_pair(row: dict) -> dict:
    """Two whole conversations (HH-RLHF's transcripts, TRL's messages) as their shared turns and what follows in each.

    In 1 of 1,500 rows the two part before the last turn; then the rest of the transcript is kept as text.
    """
    sides = {side: _spoken(row[side]) for side in ("chosen", "rejected")}
    if not all(sides.values()):
        return row
    turns = list(zip(sides["chosen"], sides["rejected"], strict=False))
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], turns)]
    shared = shared[: min(len(side) for side in sides.values()) - 1]  # each keeps an answer of its own
    while shared and shared[-1]["role"] != "user":
        shared.pop()
    if not shared:
        return row
    answers = {side: _rest(said[len(shared) :]) for side, said in sides.items()}
    return {**row, "prompt": shared if len(shared) > 1 else shared[0]["content"], **answers}


def _check_prompt(prompt, where, line: int):
    """The prompt as a non-empty string or a list of messages that ends with the user's."""

    def wrong(found: str, remedy: str = "Mend or delete this row"):
        return InputError(
            found, where=where, line=line, remedy=remedy,
            expected="a non-empty string, or a list of {role, content} messages that ends with the user's",
        )

    if isinstance(prompt, str):
        turns = _turns(prompt)
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
        raise wrong(f"the prompt is a {_kind(prompt)}: {shorten(prompt)!r}")
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
        turns = _spoken(side) if row.get("prompt") is not None and isinstance(row.get(name), list) else None
        if turns and turns[0]["role"] != "system":
            row = {**row, name: _rest(turns)}
    for name in require:
        if name not in row or (row[name] is None and type(None) not in _TYPES.get(name, ())):
            raise InputError(
                f"a row without {name!r}", where=where, line=line,
                expected=f"the fields {', '.join(require)}",
                remedy=f"The row has: {shorten(', '.join(map(str, row)) or 'nothing')}",
            )
        if name in _TYPES and not isinstance(row[name], _TYPES[name]):
            raise InputError(
                f"{name!r} is a {_kind(row[name])}: {shorten(row[name])!r}", where=where, line=line,
                expected=f"a {_kind(_TYPES[name][0]())}", remedy="Mend or delete this row",
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
            f"the id is a {_kind(given)}: {shorten(given)!r}", where=where, line=line,
            expected="a string or a whole number", remedy="Mend it, or leave the id out and one is made",
        )
    return str(given), True


def _mark(path: str) -> tuple[int, int, int]:
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
        self, inputs: Sequence[str], *, require: Sequence[str] = ("prompt",), limit: int | None = None,
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
                for row_id, (line, row) in zip(islice(ids, self._counts[name]), _read(name), strict=False):
                    yield {**_check(self._converted(row, name, line), self.require, name, line), "id": row_id}
            except InputError:  # of a row that was good before
                self._still(name)
                raise
            self._still(name)

    def _still(self, name: str) -> None:
        """CaiError unless the file is what it was when it was checked, or only longer."""
        if name not in self._marks or _mark(name) == self._marks[name]:
            return
        if sha256_file(name, self._marks[name][0]) != self._digests[name]:
            raise CaiError(f"{name}: it changed while it was read. Put it back as it was and run the same command "
                           "again, or start anew with --overwrite.")
        cli.warn(f"{name} has grown since it was checked: what was added is left out")

    def _converted(self, row: dict, where: str, line: int) -> dict:
        """The row as it is meant; a source of another format says how (cai/publicsets.py)."""
        return row

    def _raw(self) -> Iterator[tuple[str, int, dict]]:
        rows = ((name, line, row) for name in self.inputs for line, row in _read(name))
        return islice(rows, self.limit)

    def _scan(self, check) -> list[str]:
        """Check every row; returns the ids and sets the digest."""
        places: dict[str, tuple[str, int]] = {}
        self._marks = {name: _mark(name) for name in self.inputs if os.path.isfile(name)}
        self._counts = Counter()
        hashes = {name: hashlib.sha256() for name in self.inputs if not os.path.isfile(name)}
        for where, line, row in self._raw():
            row = _check(self._converted(row, where, line), self.require, where, line)
            self._counts[where] += 1
            if check:
                check(row, where, line)
            if where in hashes:
                hashes[where].update(_dump(row))
            row_id, given = _id_of(row, where, line)
            if row_id in places:
                first_where, first_line = places[row_id]
                if given and first_where == where:
                    raise InputError(
                        f"the id {shorten(row_id)!r} again, first on line {first_line}",
                        where=where, line=line, expected="ids that differ",
                        remedy="Rename or delete one of the two rows",
                    )
                number = 2
                while f"{row_id}-{number}" in places:
                    number += 1
                row_id = f"{row_id}-{number}"
            places[row_id] = (where, line)
        self._digests = {name: hashes[name].hexdigest() if name in hashes else sha256_file(name)
                         for name in self.inputs}
        for name, mark in self._marks.items():
            if _mark(name) != mark:
                raise InputError("it changed while it was read", where=name, remedy="Wait until it is written whole")
        self.digest = sha256_text(json.dumps([list(self._digests.values()), self.limit]))
        return list(places)


# ---------------------------------------------------------------------------------------------- writing


def read_manifest(path) -> dict | None:
    """The manifest of an output (`<path>.run.json`), or None if it has none."""
    manifest = Path(f"{os.fspath(path).rstrip('/')}.run.json")
    if not manifest.exists():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        kinds = {"fingerprint": dict, "status": str, "counts": dict, "resumed": int, "started": str}
        if not isinstance(content, dict) or "fingerprint" not in content:
            problem = "no fingerprint in it"
        elif wrong := [name for name, kind in kinds.items() if not isinstance(content.get(name, kind()), kind)]:
            problem = f"its {wrong[0]} is a {_kind(content[wrong[0]])}"
        else:
            return content
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    raise InputError(f"not a manifest ({problem})", where=manifest, remedy="Delete it with its output")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "datasets", "accelerate", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Claim:
    """What a file and a folder of output share: the manifest, the lock, and the decision to go on.

    Making one reads only; entering it (`with`) takes the lock and writes the manifest.
    """

    main = True  # False in the other processes of a distributed run: they neither lock nor write

    def __init__(self, path, *, command: str, fingerprint: dict, overwrite: bool = False,
                 inputs: Sequence[str] = ()):
        self.path = Path(os.fspath(path))
        base = os.fspath(path).rstrip("/")
        self.manifest_path, self.lock_path = Path(f"{base}.run.json"), Path(f"{base}.lock")
        self.command, self.overwrite = command, overwrite
        self.fingerprint = json.loads(json.dumps(fingerprint))
        for name in inputs:
            if os.path.realpath(name) == os.path.realpath(self.path):
                raise InputError("the output is one of the inputs", where=path, remedy="Name another output")
        self._lock = None
        if self.main:
            self._refuse_second()
        self._look()

    def _look(self) -> None:
        """Set `complete`, `resuming` and `counts` from what is on disk; refuse another's."""
        self._check_kind()
        self.complete, self.resuming, self.counts = False, False, {}
        self._earlier = {}
        if self.overwrite:
            return
        manifest = read_manifest(self.path)
        if manifest is None:
            if self._exists():
                raise self._foreign()
            return
        self._compare(manifest)
        self.complete = manifest.get("status") == "done" and self._exists()
        self.resuming = manifest.get("status") == "running"
        self.counts = manifest.get("counts", {}) if self.complete else {}
        self._earlier = manifest if self.resuming else {}

    def _foreign(self) -> InputError:
        return InputError(
            "it exists, and no manifest says how it was made", where=self.path, remedy=self._foreign_remedy
        )

    def _compare(self, manifest: dict) -> None:
        before = {"command": manifest.get("command"), **manifest["fingerprint"]}
        now = {"command": self.command, **self.fingerprint}
        differing = [
            f"{key} was {shorten(json.dumps(before.get(key)))}, now {shorten(json.dumps(now.get(key)))}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise InputError(
                f"made by a run that differs: {'; '.join(differing)}", where=self.path,
                remedy="Run it as before, name another --output, or start anew with --overwrite",
            )

    def _refuse_second(self) -> None:
        """A running owner is refused at once, before a model is loaded."""
        with suppress(OSError), open(self.lock_path, "rb") as file:
            self._flock(file, fcntl.LOCK_SH)

    def _flock(self, file, kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = self.lock_path.read_text().strip() if self.lock_path.exists() else ""
            raise InputError(
                f"another process ({pid or 'pid unknown'}) is writing it", where=self.path,
                remedy="Wait for it or stop it, or name another --output",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            cli.warn(f"{self.path}: this file system has no locks; run one process at a time on it")

    def __enter__(self):
        if not self.main:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise InputError(f"cannot write ({error})", where=self.path, remedy="Check --output") from error
        try:
            self._look()  # again: another process may have been at it before we had the lock
            if self.overwrite:
                self._delete()
            if not self.complete:
                self._open()
                self._started = time.monotonic()
                self._manifest = {
                    "status": "running", "command": self.command,
                    "command_line": cli.command_line(), "fingerprint": self.fingerprint,
                    "versions": _versions(), "started": self._earlier.get("started", _now()),
                    "resumed": self._earlier.get("resumed", -1) + 1,
                }
                self._write_manifest()
        except BaseException:
            self._release()
            raise
        return self

    def _take_lock(self) -> None:
        while True:
            lock = open(self.lock_path, "a+")  # noqa: SIM115, held until _release
            try:
                self._flock(lock, fcntl.LOCK_EX)
                # The owner before us removes its lock file: ours may be that removed one.
                if self.lock_path.exists() and os.fstat(lock.fileno()).st_ino == self.lock_path.stat().st_ino:
                    break
            except BaseException:
                lock.close()
                raise
            lock.close()
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def __exit__(self, *_):
        self._close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self.lock_path.unlink(missing_ok=True)
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def _write_manifest(self) -> None:
        temporary = Path(f"{self.manifest_path}.tmp")
        text = json.dumps(self._manifest, indent=1, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")
        os.replace(temporary, self.manifest_path)

    def _finish_manifest(self, counts: dict, info: dict) -> dict:
        self._manifest |= {
            "status": "done", "counts": counts, "finished": _now(),
            "seconds": round(time.monotonic() - self._started, 2), **info,
        }
        self._write_manifest()
        self.complete, self.counts = True, counts
        return self._manifest

    def _open(self) -> None: ...

    def _close(self) -> None: ...


class Output(_Claim):
    """One JSONL output with its manifest: `<path>.partial` while it grows, `<path>` when it is finished.

    Args:
        path: the file. Its folder is made on entering; nothing is written before that.
        command: name of the command.
        fingerprint: everything that decides the rows (model, seed, sampling, hashes of template,
            constitution and input). The same fingerprint continues, or is complete; another is refused.
        overwrite: delete what is there and start anew.
        inputs: paths that the output must not be.

    Attributes:
        complete: whether a run with this fingerprint finished it.
        done: ids of the rows that are in the journal.
        counts: the counts of the finished run.

    Raises InputError for another run's output, a foreign file, or a second process.
    """

    _foreign_remedy = "Name another --output, or replace it with --overwrite"

    def _check_kind(self) -> None:
        if self.path.is_dir():
            raise InputError("a folder", where=self.path, expected="a file", remedy="Add a file name")

    def _exists(self) -> bool:
        return self.path.exists()

    @property
    def journal(self) -> Path:
        return Path(f"{self.path}.partial")

    @property
    def done(self) -> Set[str]:
        return self._offsets.keys()

    def _look(self) -> None:
        super()._look()
        self._offsets, self._end = {}, 0
        if self.resuming:
            self._offsets, self._end = self._read_journal()

    def _read_journal(self) -> tuple[dict[str, int], int]:
        """({id: offset of its line}, offset after the last whole line)."""
        offsets, end = {}, 0
        if not self.journal.exists():
            return offsets, end
        with open(self.journal, "rb") as file:
            for line, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break  # torn: the process was killed while it wrote
                try:
                    offsets[json.loads(raw)["id"]] = end
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise InputError(
                        f"a damaged row in the journal: {shorten(raw)!r}", where=self.journal, line=line,
                        remedy="Delete this line and those after it, or start anew with --overwrite",
                    ) from error
                end += len(raw)
        return offsets, end

    def _delete(self) -> None:
        for path in (self.manifest_path, self.journal, self.path, Path(f"{self.path}.tmp")):
            path.unlink(missing_ok=True)

    def _open(self) -> None:
        if not self.resuming:
            self.journal.unlink(missing_ok=True)
        elif self.journal.exists() and self.journal.stat().st_size > self._end:
            cli.warn(f"{self.journal}: the last line was torn off when the run was stopped; it is done again")
            os.truncate(self.journal, self._end)
        # Unbuffered: a row is out of our hands once written, and closing a full disk's file can't fail again.
        self._file = open(self.journal, "ab", buffering=0)  # noqa: SIM115, closed by _close

    def _close(self) -> None:
        if not self.complete and self.main:
            self._file.close()

    def write(self, row: dict) -> None:
        """Append one row, which has a new `id`, to the journal; it survives a kill from here on."""
        if row["id"] in self._offsets:
            raise ValueError(f"row {row['id']!r} was written before")
        line = _dump(row)
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise CaiError(f"{self.journal}: cannot write ({error}). Make room and run it again.") from error
        self._offsets[row["id"]] = self._end
        self._end += len(line)

    def finish(self, order: Iterable[str], counts: dict, **info) -> dict:
        """Put the journal's rows into `order` as `<path>`, write the manifest, and return it.

        Args:
            order: ids; one that has no row is passed over (the caller counts it as failed).
            counts: numbers for the manifest, given back as `counts` when the command is run again.
            info: more for the manifest.
        """
        temporary = Path(f"{self.path}.tmp")
        try:
            self._file.close()
            with open(self.journal, "rb") as journal, open(temporary, "wb") as file:
                for row_id in order:
                    if row_id in self._offsets:
                        journal.seek(self._offsets[row_id])
                        file.write(journal.readline())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CaiError(f"{temporary}: cannot write ({error}). Make room and run it again.") from error
        os.replace(temporary, self.path)
        manifest = self._finish_manifest(counts, info)
        self.journal.unlink()
        return manifest


class TrainingOutput(_Claim):
    """The same contract for a checkpoint folder: `<folder>.run.json`, a lock, the same refusals.

    `complete`: it was trained with this fingerprint; `resuming`: a run with this fingerprint was stopped,
    and checkpoints in the folder may be continued. `overwrite` deletes only a folder that a manifest says
    is ours. Under a distributed launch only rank 0 locks, deletes and writes: let the others wait for it.
    """

    _foreign_remedy = "Name another --output (a folder this program did not make is never deleted)"

    def __init__(self, path, **arguments):
        self.main = int(os.environ.get("RANK", "0")) == 0
        super().__init__(path, **arguments)

    def _check_kind(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError("a file", where=self.path, expected="a folder", remedy="Name another --output")
        if self.overwrite and self._exists() and not self.manifest_path.exists():
            raise self._foreign()

    def _exists(self) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def _delete(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
        self.manifest_path.unlink(missing_ok=True)

    def finish(self, counts: dict, **info) -> dict:
        """Mark the folder as done; returns the manifest ({} in the other processes of a distributed run)."""
        return self._finish_manifest(counts, info) if self.main else {}


def claim_folder(path, *, command: str, fingerprint: dict, overwrite: bool = False,
                 inputs: Sequence[str] = ()) -> TrainingOutput:
    """A `TrainingOutput` for the folder; see there."""
    return TrainingOutput(
        path, command=command, fingerprint=fingerprint, overwrite=overwrite, inputs=inputs
    )
