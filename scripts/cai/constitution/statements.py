"""Statements: the principles of a document with their polarity, introduction, lines and section, and what is none.

    state("Lectures the reader", "rules.md", (3, 3), [("The assistant must never:", "introduction")]).polarity

Leaves out how a document is taken apart (markdown.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cai.constitution import polarity, prose
from cai.constitution.files import Source
from cai.constitution.predicates import PERMISSION

_PERMITS = re.compile(r"\b(?:may|can|(?:is|are) (?:free|allowed|permitted|welcome) to)(?: also)?\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class Statement:
    """A principle as its document states it.

    Attributes:
        text: its words in the document's order, after the introduction that it needs.
        lines: (first, last) line of the item.
        polarity: demand, prohibition, permission or unclear.
        kind: the same, or preference for a demand that only weighs one thing against another.
        quote: its words as they stand in these lines; "" for what is from no document.
        section: the headings above it, the outermost first.
    """

    text: str
    file: str
    lines: tuple[int, int]
    polarity: str
    introduction: str = ""
    tags: tuple[str, ...] = ()
    kind: str = ""
    quote: str = ""
    section: tuple[str, ...] = ()


@dataclass
class Document:
    """What a document holds.

    Attributes:
        left_out: {file, line, reason, text, section} for each part that is not a principle.
        is_prose: whether it was read sentence by sentence.
    """

    file: str
    is_prose: bool = False
    statements: list[Statement] = field(default_factory=list)
    unclear: list[Statement] = field(default_factory=list)
    left_out: list[dict] = field(default_factory=list)
    description: str = ""

    def add(self, statement: Statement) -> None:
        is_unclear = statement.polarity == polarity.UNCLEAR
        (self.unclear if is_unclear else self.statements).append(statement)


def outline(document: Document, ids: Mapping[Source, str]) -> dict:
    """{file, read_as, sections}: each section with its headings and its sentences in order, rules and others.

    A rule has `lines`, `kind` (demand, prohibition, permission, preference or unclear), `introduction`, `text` and
    `principle` (null if it became none); what is no rule has the kind "" and the `reason`.

    Args:
        ids: those of the principles, by their source.
    """
    rows = [
        (
            item.section,
            {
                "lines": list(item.lines),
                "kind": item.kind,
                "introduction": item.introduction,
                "text": item.quote,
                "principle": ids.get(Source(item.file, item.lines, item.quote)),
            },
        )
        for item in [*document.statements, *document.unclear]
    ]
    rows += [
        (part["section"], {"lines": list(part["lines"]), "kind": "", "text": part["text"], "reason": part["reason"]})
        for part in document.left_out
    ]
    rows.sort(key=lambda row: row[1]["lines"])
    sections: dict[tuple[str, ...], list[dict]] = {}
    for section, sentence in rows:
        sections.setdefault(section, []).append(sentence)
    return {
        "file": document.file,
        "read_as": "prose" if document.is_prose else "lists",
        "sections": [{"headings": list(path), "sentences": sentences} for path, sentences in sections.items()],
    }


def state(
    text: str,
    file: str,
    lines: tuple[int, int],
    contexts: Sequence[tuple[str, str]] = (),
    tags: tuple[str, ...] = (),
    *,
    is_doubtful: bool = False,
) -> Statement:
    """The statement that an item makes below its introductions and headings (`contexts`, the nearest first).

    Its text begins with the introductions that end in a colon, and with the heading that decides its polarity.

    Args:
        is_doubtful: a list before it was one of prohibitions, so that a bare command may be one too.
    """
    label, core = polarity.split_label(text)
    above = [*([(label, "label")] if label else []), *contexts]
    verdict = polarity.judge(core, above)
    governing = above[verdict.governing] if verdict.governing is not None else None
    names = [name for name, role in contexts if (role == "introduction" and name.endswith(":")) or role == "label"]
    if not governing and verdict.signal == "forbids":  # “Never …” below “What to avoid:” stands for itself
        names = []
    is_permitted = verdict.polarity == polarity.DEMAND and (
        (bool(above) and above[0][1] != "heading" and bool(_PERMITS.search(above[0][0])))
        or prose.read_sentence(core).kind == PERMISSION
    )
    is_decided = governing and verdict.polarity != polarity.UNCLEAR
    if is_decided and governing[1] != "label" and governing[0] not in names:
        names.append(governing[0])
    is_unclear = is_doubtful and not (governing or verdict.signal) and polarity.mood(core) == "command"
    return Statement(
        text=": ".join([*(name.rstrip(":. ") for name in reversed(names)), text]),
        file=file,
        lines=lines,
        polarity=polarity.UNCLEAR if is_unclear else PERMISSION if is_permitted else verdict.polarity,
        introduction=contexts[0][0] if contexts and contexts[0][1] != "heading" else "",
        tags=tags,
    )
