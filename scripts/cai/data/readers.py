"""Files of rows: JSON Lines, JSON, CSV, Parquet, plain text, and dataset ids.

    for line, row in read_jsonl("rows.jsonl"): ...

Every reader yields (line, row) and raises InputError with file and line for what it cannot read. Leaves out what a row
must hold (sources.py).
"""

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cai.base.errors import InputError, shorten

MOST_DEEP = 100  # levels of a row's lists and objects: what reads it later is recursive

PathName = str | os.PathLike[str]

Row = dict[str, Any]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if value - value:  # neither of infinity is 0
        raise ValueError(f"{shorten(digits)} is too large for a number")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    """An `object_pairs_hook` that raises ValueError for a key that occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key {shorten(doubled(name for name, _ in pairs))!r} twice in one object")
    return row


def _loads(text: str) -> Any:
    """JSON without what other readers would not take. ValueError for anything else."""
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float, object_pairs_hook=unique_keys)


def doubled(names: Iterable[str]) -> str | None:
    """The first name that occurs twice, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _check_depth(value: Any) -> None:
    """Raise ValueError if lists and objects are nested more than `MOST_DEEP` deep."""
    level = [value]
    for _ in range(MOST_DEEP + 1):
        level = [
            item
            for parent in level
            if isinstance(parent, dict | list)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MOST_DEEP} deep")


def _parse(raw: bytes, where: PathName, line: int) -> Row:
    """One JSON object from one line; InputError for anything else."""
    try:
        row = _loads(_decode(raw, line))
        if raw.count(b"[") + raw.count(b"{") > MOST_DEEP:
            _check_depth(row)
        if b"\\u" in raw:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"half a surrogate pair ({error.object[error.start]!a}) in the text",
            where=where,
            line=line,
            expected="valid Unicode",
            remedy="Write the whole character, or leave it out",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"not JSON ({error}): {shorten(raw.decode(errors='replace'))!r}",
            where=where,
            line=line,
            expected="one JSON object per line, in UTF-8",
            remedy="Fix or delete this line",
        ) from error
    if not isinstance(row, dict):
        raise InputError(
            f"a JSON {type_name(row)}, not an object: {shorten(row)!r}",
            where=where,
            line=line,
            expected='an object such as {"prompt": "..."}',
            remedy="Make each line one object",
        )
    return row


def _lines(path: PathName) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of each line of a file, unpacked if its name ends in .gz."""
    line = 0
    open_file: Any = gzip.open if str(path).endswith(".gz") else open
    try:
        file = open_file(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read it: {error.strerror or error}", where=path, remedy="Check the path") from error
    with file:
        try:
            for line, raw in enumerate(file, 1):
                yield line, raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"damaged gzip data ({error})", where=path, line=line + 1) from error


def _decode(raw: bytes, line: int) -> str:
    """The line in UTF-8, without the byte order mark that some editors put before the first."""
    return raw.decode("utf-8-sig" if line == 1 else "utf-8")


def read_jsonl(path: PathName) -> Iterator[tuple[int, Row]]:
    """(1-based line number, row) of a JSON Lines file; empty lines are skipped.

    Raises InputError with file and line for what is not a JSON object.
    """
    for line, raw in _lines(path):
        if raw.strip():
            yield line, _parse(raw, path, line)


def _read_json(path: PathName) -> Iterator[tuple[int, Row]]:
    """A JSON array of objects (the number is the item's), or JSON Lines under the wrong name."""
    lines = (raw.removeprefix(b"\xef\xbb\xbf").strip() for _, raw in _lines(path))
    if not next(filter(None, lines), b"").startswith(b"["):
        yield from read_jsonl(path)
        return
    try:
        text = b"".join(raw for _, raw in _lines(path)).decode("utf-8-sig")
        rows = [json.dumps(row).encode() for row in _loads(text)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})", where=path, expected="an array of objects") from error
    for number, row in enumerate(rows, 1):
        yield number, _parse(row, path, number)


def _read_csv(path: PathName) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader((_decode(raw, line) for line, raw in _lines(path)), strict=True)
    try:
        columns = reader.fieldnames or ()
        if (name := doubled(columns)) is not None:
            raise InputError(f"the column {shorten(name)!r} twice", where=path, line=1, remedy="Rename one of the two")
        for row in reader:
            if None in row:
                raise InputError(
                    f"more cells than the {len(columns)} columns: {shorten(row[None])!r}",
                    where=path,
                    line=reader.line_num,
                    remedy="Quote cells that hold a comma",
                )
            yield reader.line_num, {name: cell for name, cell in row.items() if cell is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"not CSV ({error})",
            where=path,
            line=reader.line_num + 1,
            expected="comma-separated UTF-8 with a header line",
        ) from error


def _read_text(path: PathName) -> Iterator[tuple[int, Row]]:
    for line, raw in _lines(path):
        try:
            if text := _decode(raw, line).strip():
                yield line, {"prompt": text}
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 ({error})", where=path, line=line) from error


def _read_parquet(path: PathName) -> Iterator[tuple[int, Row]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if (name := doubled(file.schema_arrow.names)) is not None:
                raise InputError(f"the column {shorten(name)!r} twice", where=path, remedy="Rename one of the two")
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield number, _as_json(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"not Parquet ({shorten(error)})", where=path, line=number + 1) from error
    except (ValueError, OverflowError, RecursionError) as error:  # text that is not UTF-8, a year 100,000
        raise InputError(
            f"a value that can't be read ({shorten(error)})",
            where=path,
            line=number + 1,
            expected="text in UTF-8, numbers, lists and structs",
            remedy="Convert the column",
        ) from error


def _read_dataset(name: str) -> Iterator[tuple[int, Row]]:
    """Rows of a dataset id, `owner/name` or `owner/name:split` (the split is `train` if none is named)."""
    import datasets

    path, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"no such file, and no dataset could be loaded under this id ({shorten(error, 160)})",
            where=name,
            expected="a file, or a dataset id such as owner/name or owner/name:split",
            remedy="Check the path; without a network, give a file",
        ) from error
    for number, row in enumerate(rows, 1):
        yield number, _as_json(row)


def _as_json(value: Any) -> Any:
    """A value of Parquet as JSON has it; NaN and infinity become null. ValueError for bytes that are not UTF-8."""
    if isinstance(value, dict):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, bytes):
        return value.decode()
    return value if value is None or isinstance(value, str | int) else str(value)


_READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def read_rows(name: str) -> Iterator[tuple[int, Row]]:
    """(line, row) of one input, read by the suffix of its name."""
    suffix = Path(name.removesuffix(".gz")).suffix
    if os.path.isfile(name):
        if suffix not in _READERS or (suffix == ".parquet" and name.endswith(".gz")):
            raise InputError(
                f"unknown kind of file: {Path(name).suffix or 'no suffix'!r}",
                where=name,
                expected="one of " + " ".join(_READERS),
                remedy="Rename or convert it",
            )
        return _READERS[suffix](name)
    if os.path.isdir(name):
        raise InputError("a folder", where=name, expected="a file of rows", remedy="Name a file in it")
    if suffix in _READERS or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/]+)?", name):
        raise InputError("no such file", where=name, remedy="Check the path")
    return _read_dataset(name)


def type_name(value: object) -> str:
    """The name that JSON has for the type of a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
