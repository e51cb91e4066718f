"""Files that replace another one whole, patterns of file names, and names that are safe as file names.

    with replace_file("figures.json") as file: file.write(b"...")

Leaves out outputs that grow row by row and survive a kill (data/outputs.py).
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import BinaryIO

from cai.base.errors import InputError


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file beside `path` that takes its place, synced to the disk, when the block ends without an error.

    A reader sees the old content or the new one, never a part; after an error the old file is as it was.
    """
    temporary = Path(f"{os.fspath(path)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text whole or not at all; its folder is created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(text.encode())


def file_name(name: str, default: str = "unnamed") -> str:
    """`name` as part of a file name: letters, digits, `_`, `.` and `-`, and nothing that leads to another folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:100] or default


def expand_patterns(names: Iterable[str]) -> list[str]:
    """The names, with every pattern such as `part-*.jsonl` replaced by the files that it matches, sorted.

    Raises InputError for a pattern that matches no file.
    """
    expanded: list[str] = []
    for name in map(str, names):
        if os.path.exists(name) or not re.search(r"[*?\[]", name):
            expanded.append(name)
            continue
        matches = sorted(path for path in glob(name, recursive=True) if os.path.isfile(path))
        if not matches:
            raise InputError("no file matches the pattern", where=name, remedy="Check the path and the pattern")
        expanded += matches
    return expanded
