"""YAML files that people write, read as nodes with their lines, so that every error can name file and line.

    keys = read_mapping(parse_yaml(raw, path, "at most 500 principles"), path, ("name", "principles"), "constitution")

Aliases and tags are refused, and what is larger or deeper than a person writes. Leaves out what the keys mean: files.py
for constitutions, frames.py for frames.
"""

import difflib
from pathlib import Path

import yaml

from cai.base.errors import InputError, shorten

MAX_BYTES = 500_000

_MAX_DEPTH = 20

_MAX_PARTS = 20_000


def read_yaml(path: Path, entries: str) -> tuple[yaml.Node, bytes]:
    """(the tree of a file, its bytes); `parse_yaml` tells the arguments and errors."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{size} bytes", where=path, expected=f"at most {MAX_BYTES}")
    raw = path.read_bytes()
    return parse_yaml(raw, path, entries), raw


def parse_yaml(raw: bytes, path: Path, entries: str) -> yaml.Node:
    """The tree of a file's bytes.

    Args:
        entries: what the file is a list of, and how many at most, for the errors: "at most 500 principles".

    Raises InputError (file, line) for what is not YAML, or has aliases, tags, or more parts than a person writes.
    """
    try:
        text = raw.decode("utf-8-sig")
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            line = event.start_mark.line + 1
            if number > _MAX_PARTS:  # read no further: it would take seconds to reach the same result
                raise InputError(f"more than {_MAX_PARTS} keys and texts", where=path, line=line, expected=entries)
            # YAML bombs and cycles are made of aliases, and no constitution needs one.
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"a YAML alias (*{event.anchor})", where=path, line=line, remedy="Write the text out")
            if getattr(event, "tag", None):
                raise InputError(f"a YAML tag ({shorten(event.tag)})", where=path, line=line, remedy="Remove it")
            # PyYAML takes quadratic time in the depth, and a constitution has seven levels at most.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.ScalarEvent):
                _check_unicode(event.value, path, line)
            if depth > _MAX_DEPTH:
                raise InputError(f"nested more than {_MAX_DEPTH} deep", where=path, line=line, expected="a flat list")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            f"not YAML: {shorten(getattr(error, 'problem', None) or error, 200)}",
            where=path,
            line=mark.line + 1 if mark else None,
            remedy="Quote text that has a colon",
        ) from None
    except (ValueError, OverflowError) as error:  # invalid numbers in escapes and directives
        raise InputError(f"not YAML: {shorten(error, 200)}", where=path, remedy="Write the text out") from None
    if tree is None:
        raise InputError("an empty file", where=path, expected=f"a list of {entries.split()[-1]}")
    return tree


def _check_unicode(text: str, path: Path, line: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"half a surrogate pair ({text[error.start]!a})",
            where=path,
            line=line,
            expected="valid Unicode",
            remedy="Write the whole character, or leave it out",
        ) from None


def read_mapping(node: yaml.Node, path: Path, known, what: str) -> dict[str, yaml.Node]:
    """The keys of a mapping node; InputError for one that is not `known` (None: any) or comes twice."""
    if not isinstance(node, yaml.MappingNode):
        raise InputError(
            f"a {what} that is not a mapping",
            where=path,
            line=line_of(node),
            expected=f"keys out of: {', '.join(known)}",
        )
    result = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "[...]"
        if known is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"unknown key {shorten(name)!r} in a {what}",
                where=path,
                line=line_of(key),
                expected=f"one of: {', '.join(known)}",
                remedy=f"Did you mean {near[0]!r}?" if near else "Remove it",
            )
        if name in result:
            raise InputError(f"key {shorten(name)!r} twice in one {what}", where=path, line=line_of(key))
        result[name] = value
    return result


def read_list(node: yaml.Node, path: Path, name: str) -> list[yaml.Node]:
    """The items of a list node; InputError for another node, or an empty list."""
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        value = repr(shorten(node.value)) if node.value else "empty"
        raise InputError(f"`{name}` is {value}", where=path, line=line_of(node), expected="a list with entries")
    return node.value


def read_text(node: yaml.Node, path: Path, name: str) -> str:
    """A text as it stands; InputError for another node, or an empty text."""
    if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
        raise InputError(f"`{name}` is empty or not a text", where=path, line=line_of(node), expected="a text")
    return node.value


def read_line(node: yaml.Node, path: Path, name: str) -> str:
    """A text on one line."""
    return " ".join(read_text(node, path, name).split())


def line_of(node: yaml.Node) -> int:
    """The line on which a node begins, counted from 1."""
    return node.start_mark.line + 1
