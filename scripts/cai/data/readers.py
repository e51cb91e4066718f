"""Files of rows: JSON Lines, JSON, CSV, Parquet, plain text, folders of `datasets`, and dataset ids.

    for line, row in read_jsonl("rows.jsonl"): ...

Every reader yields (line, row) and raises InputError with file and line for what it cannot read; with `on_error` a
single bad line is reported there and skipped. Leaves out what a row must hold (sources.py).
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cai.base.errors import InputError, shorten

MOST_DEEP = 100  # levels of a row's lists and objects: what reads it later is recursive

PathName = str | os.PathLike[str]

Row = dict[str, Any]

OnError = Callable[[InputError], None]

KeepLine = Callable[[int, bytes], bool]  # whether a line is to be parsed


def raise_error(error: InputError) -> None:
    """The `on_error` of a reader that stops at the first bad line."""
    raise error


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


def parse_json(text: str) -> Any:
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


def check_depth(value: Any) -> None:
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
        row = parse_json(_decode(raw, line))
        if raw.count(b"[") + raw.count(b"{") > MOST_DEEP:
            check_depth(row)
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


@contextmanager
def _open(path: PathName) -> Iterator[Iterable[bytes]]:
    """The lines of a file, unpacked if its name ends in .gz or .zst."""
    if str(path).endswith(".zst"):
        import pyarrow  # unlike the package zstandard, it reports a file that was cut off

        with pyarrow.OSFile(os.fspath(path)) as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 20)
        return
    open_file: Any = gzip.open if str(path).endswith(".gz") else open
    with open_file(path, "rb") as file:
        yield file


def read_lines(path: PathName) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of each line of a file."""
    line = 0
    try:
        with _open(path) as file:
            for line, raw in enumerate(file, 1):
                yield line, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"damaged gzip data ({error})", where=path, line=line + 1) from error
    except OSError as error:
        if error.errno is None:
            raise InputError(f"damaged zstd data ({shorten(error)})", where=path, line=line + 1) from error
        raise InputError(f"cannot read it: {error.strerror or error}", where=path, remedy="Check the path") from error


def _decode(raw: bytes, line: int) -> str:
    """The line in UTF-8, without the byte order mark that some editors put before the first."""
    return raw.decode("utf-8-sig" if line == 1 else "utf-8")


def read_jsonl(
    path: PathName, on_error: OnError = raise_error, keep: KeepLine | None = None
) -> Iterator[tuple[int, Row]]:
    """(1-based line number, row) of a JSON Lines file; empty lines are skipped.

    keep: called for each line that is not empty; one for which it returns False is not parsed.
    Raises InputError with file and line for what is not a JSON object.
    """
    for line, raw in read_lines(path):
        if raw.strip() and (keep is None or keep(line, raw)):
            for row in parse_line(raw, path, line, on_error):
                yield line, row


class JsonlRows:
    """The rows of a JSON Lines file, read again in each pass over them."""

    def __init__(self, path: PathName):
        self.path = path

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in read_jsonl(self.path))


def parse_line(raw: bytes, where: PathName, line: int, on_error: OnError) -> list[Row]:
    """The row of a line of JSON, or nothing where `on_error` takes the error."""
    try:
        return [_parse(raw, where, line)]
    except InputError as error:
        on_error(error)
        return []


def _read_json(path: PathName, on_error: OnError) -> Iterator[tuple[int, Row]]:
    """A JSON array of objects (the number is the item's), or JSON Lines under the wrong name."""
    lines = (raw.removeprefix(b"\xef\xbb\xbf").strip() for _, raw in read_lines(path))
    if not next(filter(None, lines), b"").startswith(b"["):
        yield from read_jsonl(path, on_error)
        return
    try:
        text = b"".join(raw for _, raw in read_lines(path)).decode("utf-8-sig")
        rows = [json.dumps(row).encode() for row in parse_json(text)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})", where=path, expected="an array of objects") from error
    for number, row in enumerate(rows, 1):
        for parsed in parse_line(row, path, number, on_error):
            yield number, parsed


def _read_csv(path: PathName, on_error: OnError) -> Iterator[tuple[int, Row]]:
    """Rows of a CSV file, each with the number of its last line."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((_decode(raw, line) for line, raw in read_lines(path)), strict=True)
    empty_lines: list[int] = []  # of a file with one column they are empty cells, except at the end of the file
    try:
        columns = next(filter(None, reader), [])
        if (name := doubled(columns)) is not None:
            raise InputError(f"the column {shorten(name)!r} twice", where=path, line=1, remedy="Rename one of the two")
        for cells in reader:
            if not cells:
                empty_lines += [reader.line_num] if len(columns) == 1 else []
                continue
            yield from ((line, {columns[0]: ""}) for line in empty_lines)
            empty_lines.clear()
            if len(cells) > len(columns):
                error = InputError(
                    f"more cells than the {len(columns)} columns: {shorten(cells[len(columns) :])!r}",
                    where=path,
                    line=reader.line_num,
                    remedy="Quote cells that hold a comma",
                )
                on_error(error)
                continue
            yield reader.line_num, dict(zip(columns, cells, strict=False))
    except (csv.Error, UnicodeDecodeError) as problem:
        raise InputError(
            f"not CSV ({problem})",
            where=path,
            line=reader.line_num + 1,
            expected="comma-separated UTF-8 with a header line",
        ) from problem


def _read_text(path: PathName, on_error: OnError) -> Iterator[tuple[int, Row]]:
    for line, raw in read_lines(path):
        try:
            text = _decode(raw, line).strip()
        except UnicodeDecodeError as error:
            on_error(InputError(f"not UTF-8 ({error})", where=path, line=line))
            continue
        if text:
            yield line, {"prompt": text}


def _read_parquet(path: PathName, on_error: OnError) -> Iterator[tuple[int, Row]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if (name := doubled(file.schema_arrow.names)) is not None:
                raise InputError(f"the column {shorten(name)!r} twice", where=path, remedy="Rename one of the two")
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield from _convert_or_report(row, path, number, on_error)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"not Parquet ({shorten(error)})", where=path, line=number + 1) from error
    except (ValueError, OverflowError, RecursionError) as error:  # text that is not UTF-8, a year 100,000
        raise _unreadable(error, path, number + 1) from error


def _unreadable(error: Exception, where: PathName, line: int) -> InputError:
    return InputError(
        f"a value that can't be read ({shorten(error)})",
        where=where,
        line=line,
        expected="text in UTF-8, numbers, lists and structs",
        remedy="Convert the column",
    )


def _convert_or_report(row: Row, where: PathName, line: int, on_error: OnError) -> Iterator[tuple[int, Row]]:
    """(line, the row as JSON has it), or nothing where `on_error` takes the error."""
    try:
        converted = _as_json(row)
    except (ValueError, OverflowError, RecursionError) as error:
        on_error(_unreadable(error, where, line))
    else:
        yield line, converted


def _read_dataset(name: str, on_error: OnError) -> Iterator[tuple[int, Row]]:
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
        yield from _convert_or_report(row, name, number, on_error)


def _find_saved_dataset(name: str) -> tuple[str, str | None] | None:
    """(folder, split or None) of `FOLDER` or `FOLDER:SPLIT` that save_to_disk of `datasets` wrote; None for others."""
    folder, _, split = name.rpartition(":")
    for path, chosen in ((name, None), (folder, split)):
        if path and any(os.path.isfile(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json")):
            return path, chosen
    return None


def _read_saved_dataset(path: str, split: str | None, name: str, on_error: OnError) -> Iterator[tuple[int, Row]]:
    """Rows of a folder that save_to_disk wrote; of several splits, one must be named."""
    import datasets
    import pyarrow

    try:
        rows = datasets.load_from_disk(path)
    except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException) as error:
        raise InputError(
            f"a folder of `datasets` that can't be loaded ({shorten(error, 160)})",
            where=name,
            remedy="Save it again with save_to_disk, or convert it with to_json",
        ) from error
    splits = list(rows) if isinstance(rows, datasets.DatasetDict) else []
    if splits and split is None and len(splits) == 1:
        split = splits[0]
    if (split is not None or splits) and split not in splits:
        raise InputError(
            f"no split {split!r}" if split else "several splits",
            where=name,
            expected=f"{path}:SPLIT with one of {', '.join(splits)}" if splits else f"{path}, which has no splits",
            remedy="Name one split",
        )
    for number, row in enumerate(rows[split] if split else rows, 1):
        yield from _convert_or_report(row, name, number, on_error)


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


def _suffix(name: str) -> str:
    return Path(re.sub(r"\.(gz|zst)$", "", name)).suffix


def is_json_lines(name: str) -> bool:
    """Whether an input is a file of JSON Lines, packed or not."""
    return os.path.isfile(name) and _READERS.get(_suffix(name)) is read_jsonl


def read_rows(name: str, on_error: OnError = raise_error, keep: KeepLine | None = None) -> Iterator[tuple[int, Row]]:
    """(line, row) of one input, read by the suffix of its name.

    Args:
        on_error: called with the error of a line that is bad by itself, which is then skipped; the default raises it.
        keep: see `read_jsonl`; called for JSON Lines alone.
    """
    suffix = _suffix(name)
    if is_json_lines(name):
        return read_jsonl(name, on_error, keep)
    if os.path.isfile(name):
        if suffix not in _READERS or (suffix == ".parquet" and not name.endswith(".parquet")):
            raise InputError(
                f"unknown kind of file: {Path(name).suffix or 'no suffix'!r}",
                where=name,
                expected="one of " + " ".join(_READERS),
                remedy="Rename or convert it",
            )
        return _READERS[suffix](name, on_error)
    if saved := _find_saved_dataset(name):
        return _read_saved_dataset(*saved, name, on_error)
    if os.path.isdir(name):
        raise InputError(
            "a folder",
            where=name,
            expected="a file of rows, or a folder that save_to_disk of `datasets` wrote",
            remedy=f"Name a file in it, or several with a pattern such as '{name}/*.jsonl'",
        )
    if suffix in _READERS or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/]+)?", name):
        raise InputError("no such file", where=name, remedy="Check the path")
    return _read_dataset(name, on_error)


def type_name(value: object) -> str:
    """The name that JSON has for the type of a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
