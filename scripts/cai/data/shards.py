"""One run split into shards that know nothing of each other, for fleets without a shared launcher.

    shard = Shard.parse("3/100")
    source = Source(["prompts.jsonl"], shard=shard)      # the rows whose ids hash to the third of 100 shards
    shard.has("row-17")

The shard of a row depends on its id alone, not on the order of the file. Leaves out how shards are put together again
(merging.py), and several processes of one launch (processes.py).
"""

import json
import re
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

from cai.base.errors import InputError

# The id of a row whose line begins with it: no need to parse the line of a row that belongs to another shard.
_FIRST_ID = re.compile(rb'\s*\{\s*"id"\s*:\s*"([^"\\]+)"')


@dataclass(frozen=True)
class Shard:
    """The rows of one shard. number: from 1 to `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard named `K/N`. Raises InputError for anything else."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count:
            raise InputError(
                f"{text!r} is not a shard", where="--shard", expected="K/N with K from 1 to N, such as 3/8"
            )
        return cls(number, count)

    def has(self, key: str | bytes) -> bool:
        """Whether the row with this id belongs to the shard."""
        return shard_number(key, self.count) == self.number


def fingerprint(shard: Shard | None) -> dict[str, str]:
    """What `--shard` adds to the fingerprint of a run."""
    return {"shard": str(shard)} if shard else {}


def shard_number(key: str | bytes, count: int) -> int:
    """The shard, from 1 to `count`, of the row with this id."""
    return zlib.crc32(key.encode() if isinstance(key, str) else key) % count + 1


def read_first_id(line: bytes) -> bytes | None:
    """The id that a line of JSON begins with; None where only parsing shows whether there is one."""
    match = _FIRST_ID.match(line)
    return match[1] if match else None


def explicit_id(row: Mapping[str, Any]) -> str | None:
    """The id that a row has itself; None where it has none, or one of a type that is refused."""
    row_id = row.get("id")
    return None if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "" else str(row_id)


def line_key(line: int) -> str:
    """What decides the shard of a bad row without an id: its line."""
    return f"line {line}"


class Spool:
    """Rows of one shard in a temporary file, read again in each pass over them; passes may run in several threads."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the source
        self._lock = threading.Lock()

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        position = 0
        while True:
            with self._lock:
                self._file.seek(position)
                lines = self._file.readlines(1 << 20)
                position = self._file.tell()
            if not lines:
                return
            yield from map(json.loads, lines)


class _ShardType(click.ParamType[Shard]):
    name = "K/N"

    def convert(self, value: Any, _parameter: click.Parameter | None, _context: click.Context | None) -> Shard:
        return value if isinstance(value, Shard) else Shard.parse(value)


def shard_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: adds `--shard`, the parameter `shard`."""
    return click.option(
        "--shard",
        type=_ShardType(),
        metavar="K/N",
        help="Take the K-th of N shards of the rows, by a hash of their ids, with an output of its own. merge.py puts "
        "the shards together.",
    )(function)
