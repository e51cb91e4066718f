"""Quotes: where the words of a sentence stand in a document, and whether they still stand there.

    locate("The assistant must never lecture.", lines, 3, 5)     # (4, 4)

Compared are words, so that marks, bullets and line breaks do not count. Leaves out what a sentence means (prose.py).
"""

import html
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from cai.constitution.files import Constitution, Principle

_MAX_BYTES = 5_000_000

_MARKS = re.compile(
    r"^\s*(?:>\s*)*(?:[-*+•‣◦▪●·–—]|\(?\d{1,3}[.)]|\(?[a-zA-Z]\)|\(?[ivx]{1,5}\))(?:\s+\[[ xX]\])?(?=\s)"  # bullets
    r"|(?<=\])\([^()]*\)"  # targets of links
    r"|\s*\{[:#.][^{}]*\}"  # attributes
    r"|<!--.*?-->|</?\w[^<>]*>"
)


def strip_marks(line: str) -> str:
    """A line of Markdown without bullets, targets of links, attributes and tags."""
    return html.unescape(_MARKS.sub(" ", line)).replace("\\", "")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


@lru_cache(maxsize=10_000)  # each line is compared with several sentences
def _words_of_line(line: str) -> tuple[str, ...]:
    return tuple(_words(strip_marks(line)))


def locate(text: str, source: Sequence[str], first: int, last: int) -> tuple[int, int] | None:
    """The (first, last) line that the words of the text take among these lines, counted from 1; None if not there."""
    words = _words(text)
    numbered = [(word, n) for n in range(first, last + 1) for word in _words_of_line(source[n - 1])]
    there = [word for word, _ in numbered]
    for start in range(len(there) - len(words) + 1):
        if words and there[start : start + len(words)] == words:
            return numbered[start][1], numbered[start + len(words) - 1][1]
    return None


def quote_lines(source: Sequence[str], first: int, last: int) -> str:
    """All that these lines hold, without marks and on one line."""
    return " ".join(" ".join(map(strip_marks, source[first - 1 : last])).split())


def check_quotes(constitution: Constitution, folder: str | Path) -> Iterator[tuple[Principle, str]]:
    """(principle, problem) for each quote that does not stand in its file at its lines.

    Args:
        folder: that of the constitution's file, to which the paths are relative.
    """
    documents: dict[str, list[str] | None] = {}
    for principle in constitution.principles:
        source = principle.source
        if not source:
            continue
        if source.file not in documents:
            documents[source.file] = _read_lines(Path(folder) / source.file)
        lines = documents[source.file]
        first, last = source.lines
        if lines is None:
            yield principle, f"no such document: {source.file}"
        elif last > len(lines):
            yield principle, f"{source.file} has {len(lines)} lines, and the quote is from line {first} to {last}"
        elif not locate(source.quote, lines, first, last):
            other = locate(source.quote, lines, 1, len(lines))
            where = f"it is in lines {other[0]} to {other[1]}" if other else "nor anywhere in the document"
            yield principle, f"not in {source.file} at lines {first} to {last} ({where}): “{source.quote}”"


def _read_lines(path: Path) -> list[str] | None:
    """The lines of a text; None for what can't be read as one."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        return re.sub("\r\n?", "\n", path.read_bytes().decode("utf-8-sig")).split("\n")
    except (OSError, UnicodeDecodeError, ValueError):
        return None
