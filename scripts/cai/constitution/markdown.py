"""Documents in Markdown or plain text, read as principles: each with its polarity, its introduction and its lines.

    document = read_markdown("# Rules\\n\\nThe assistant must never:\\n\\n- Lecture the reader\\n", "rules.md")

markdown-it parses CommonMark, with tables and struck-out text. A list item is a principle, and so is a paragraph that
orders or forbids something in so many words. What is none is listed with its line and the reason. Leaves out meaning:
an item whose polarity neither its words nor its introduction tell is listed as unclear (constitution/polarity.py).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.tree import SyntaxTreeNode

from cai.constitution import polarity, prose, quotes
from cai.constitution.predicates import PERMISSION, PREFERENCE
from cai.constitution.statements import Document, Statement, state
from cai.constitution.subjects import OURS, find_names

_LISTS = ("bullet_list", "ordered_list")

_REASONS = {
    "fence": "a code block",
    "code_block": "a code block",
    "html_block": "HTML",
    "blockquote": "a quotation",
    "table": "a table",
    "hr": "a rule between sections",
    "aside": "an aside",
}

# Bullets and numbers that CommonMark does not know; `1.1` only before a capital, since it may be a quantity.
_BULLETS = re.compile(
    r"^([ \t]*)(?:[•‣◦▪●·–—](?=[ \t])|\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{1,5})\)(?=[ \t])|"
    r"\d+(?:\.\d+)+\.?(?=[ \t]+[A-Z*_]))[ \t]*",
    re.MULTILINE,
)

# “1. Money” underlined is meant as a heading, and CommonMark reads a list item and a rule.
_NUMBERED_HEADING = re.compile(r"^(\d+)\.(?= [^\n]*\n {0,3}(?:-{3,}|={3,})[ \t]*$)", re.MULTILINE)

_ATTRIBUTES = re.compile(r"\s*\{[:#.][^{}]*\}\s*$")

_SEE = "(?:see|cf\\.)(?: also)?(?:,?(?: and)? ?\ue000[^\ue001]*\ue001)+"

_REFERENCE = re.compile(rf"\s*\({_SEE}\)|\s*\b{_SEE}[.;]?", re.IGNORECASE)

_NO_RULES = re.compile(
    r"^\W*(?:[\d.]+ )?(?:\w+ )?(?:definitions?|glossary|terms|terminology|abbreviations|(?:table of )?contents|"
    r"references|"
    r"bibliography|sources|see also|further reading|change ?log|history|revision history|acknowledge?ments|credits|"
    r"who we are|about us|background|"
    r"about this (?:document|page|file)|licen[cs]e|(?:worked )?examples?(?: (?:answers?|dialogues?|"
    r"conversations?).*)?)\W*$",
    re.IGNORECASE,
)

_ASIDE = re.compile(
    r"^\W*(?:(?:for )?(?:counter)?examples?\b(?:\W*\d+)?\s*(?:[:.—–-]|$|\()|for example,|e\.g\.|for instance,|such as:|"
    r"note\b\W*:|notes:|n\.b\.|rationale\W*:|commentary\W*:|(?:user|assistant|human|system)\**:\**\s|!!!|\?\?\?|:::)",
    re.IGNORECASE,
)

_LISTS_EXAMPLES = re.compile(
    r"(?:^|[,;(]?\s*)\b(?:for example|for instance|examples?|e\.g\.|such as)[^.:]*:$", re.IGNORECASE
)

_DEFINES = re.compile(r"^[“\"'\w][^.:]{0,60} (?:(?<!the )(?<!by )means|refers to|denotes|stands for|is defined as)\b")


def _aside(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A block between `:::` lines, and the front matter of a file: no part of CommonMark."""
    line = state.getLines(start, start + 1, 0, False).strip()
    is_front = start == 0 and line == "---" and re.match(r"[\w-]+:", state.getLines(1, 2, 0, False))
    if not is_front and not line.startswith(":::"):
        return False
    mark = "---" if is_front else re.match(":+", line)[0]
    lines = (number for number in range(start + 1, end) if state.getLines(number, number + 1, 0, False).strip() == mark)
    stop = next(lines, end - 1)
    if not silent:
        state.push("aside", "", 0).map = [start, stop + 1]
        state.line = stop + 1
    return True


_MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_MARKDOWN.block.ruler.before("fence", "aside", _aside, {"alt": ["paragraph", "reference", "blockquote", "list"]})


def read_markdown(text: str, file: str | Path, is_prose: bool | None = None) -> Document:
    """The principles of a document, what is unclear, and what is left out; each line is in one of them or blank.

    Args:
        is_prose: whether each sentence of a paragraph that is a rule is a principle by itself (prose.py); None: if the
            document has at least 12 sentences in paragraphs, and twice as many as list items.
    """
    text = re.sub("\r\n?", "\n", text)
    text = _NUMBERED_HEADING.sub(r"\1\\.", _BULLETS.sub(r"\1- ", text))
    root = SyntaxTreeNode(_MARKDOWN.parse(text.replace("\0", "\ufffd")))
    reader = _Reader(str(file), text.split("\n"), root, is_prose)
    reader.read_blocks(root.children, [])
    document = reader.document
    reader.leave_out_headings()
    return document


class _Reader:
    """One pass over the blocks; `headings` are those above the block that is read."""

    def __init__(self, file: str, lines: list[str], root: SyntaxTreeNode, is_prose: bool | None):
        self.document, self.source = Document(file, _is_prose(root) if is_prose is None else is_prose), lines
        self.names = find_names("\n".join(lines)) if self.document.is_prose else frozenset()
        self.headings: list[tuple[str, str]] = []  # (tag, title), the outermost first
        self.titles: list[str] = []
        self.title_lines: list[int] = []
        self.preamble: list[str] = []
        self.after_prohibitions = False  # a list in this section was introduced as prohibitions
        self.has_lists = any(node.type in _LISTS for node in root.walk())
        nodes = [node for node in root.walk() if node.type == "heading"]
        self.anchors = {
            match[1]: self._title(node) for node in nodes if (match := re.search(r"\{#([\w-]+)", _raw(node)))
        }

    # --- blocks -----------------------------------------------------------------------------------------------------

    def read_blocks(self, nodes: Sequence[SyntaxTreeNode], contexts: list[tuple[str, str]]) -> None:
        """Add what the blocks of the document hold; an introduction holds until the next paragraph or heading."""
        introduction, list_type = "", ""
        for node, following in zip_longest(nodes, nodes[1:]):
            if node.type == "heading":
                self._enter(node.tag, self._title(node), node)
                introduction = ""
            elif title := self._title_without_marks(node, following):
                self._enter("h7", title, node)
                introduction = ""
            elif node.type == "paragraph":
                introduction, list_type = self._read_paragraph(node, _is_list(following), introduction), ""
            elif node.type in _LISTS:
                introduction = introduction if list_type in ("", node.type) else ""
                list_type = node.type
                self._read_list(node, [*([(introduction, "introduction")] if introduction else []), *contexts])
            else:
                self._leave_out(node, _REASONS.get(node.type, node.type))
                introduction = "" if node.type == "hr" else introduction

    def _enter(self, tag: str, title: str, node: SyntaxTreeNode) -> None:
        self.headings = [*(heading for heading in self.headings if heading[0] < tag), (tag, title)]
        self.titles.append(title)
        self.title_lines.append(_lines(node)[0])
        self.after_prohibitions = False

    def _read_paragraph(self, node: SyntaxTreeNode, before_list: bool, previous: str) -> str:
        """The introduction that the paragraph gives to the list after it, or ""."""
        text = self._text(node)
        *sentences, last = polarity.split_sentences(text)
        if not before_list or text.startswith(("!!!", "???")) or not _introduces(last):
            self._add_prose(text, node)
            return ""
        if sentences:
            self._add_prose(" ".join(sentences), node)
        if previous and polarity.continues(last):
            self._leave_out(node, "it goes on with the list before it", last)
            return previous
        return last

    def _add_prose(self, text: str, node: SyntaxTreeNode) -> None:
        """A paragraph outside lists: a principle if each sentence orders or forbids, or the lines of a plain text."""
        if self._is_aside(text) or not text:
            self._leave_out(node, "an example or a remark", text)
        elif self.document.is_prose:
            self._add_sentences(text, _lines(node))
        elif not self.has_lists and not self.titles:
            for sentence, lines in _plain_lines(self.source, *node.map):
                self._add(sentence, lines, [])
        else:
            for orders, sentences in groupby(polarity.split_sentences(text), polarity.is_order):
                if orders:
                    self._add(" ".join(sentences), _lines(node), [])
                else:
                    self._leave_out(node, "prose", prose := " ".join(sentences))
                    is_before = not self.document.statements and not self.document.unclear and len(self.headings) < 2
                    self.preamble += [prose] if is_before else []

    def _read_list(self, node: SyntaxTreeNode, contexts: list[tuple[str, str]]) -> None:
        introduction = contexts[0][0] if contexts else ""
        if _LISTS_EXAMPLES.search(introduction[-200:]) or self._is_aside(introduction):
            self._leave_out(node, "examples or definitions", f"{introduction} {self._source(node)}".strip())
            return
        says = polarity.signal(*contexts[0]) if contexts else None
        self.after_prohibitions = says == "forbids" or (self.after_prohibitions and says != "demands")
        for item in node.children:
            self._read_item(item, contexts)

    def _read_item(self, item: SyntaxTreeNode, contexts: list[tuple[str, str]]) -> None:
        """One principle of the item's paragraphs and nested lists; a list that they introduce is read by itself."""
        parts: list[str] = []
        lines: list[int] = []
        is_aside = False
        for child in item.children:
            is_aside = self._is_aside(self._text(child)) if child.type == "paragraph" else is_aside
            if is_aside or child.type not in ("paragraph", *_LISTS):
                self._leave_out(child, _REASONS.get(child.type, "an example or a remark"))
            elif child.type == "paragraph":
                parts += [self._text(child)]
                lines += _lines(child)
            elif parts:
                *sentences, last = polarity.split_sentences(parts[-1])
                is_label = len(parts) == 1 and polarity.mood(parts[0]) == "fragment" and not sentences
                if examples := _LISTS_EXAMPLES.search(last[-200:]):
                    parts[-1] = parts[-1].removesuffix(examples[0])
                    self._leave_out(child, "examples", f"{examples[0].strip()} {self._source(child)}")
                elif last.endswith(":") or is_label:
                    parts[-1:] = [" ".join(sentences)] if sentences else []
                    self._read_list(child, [(last, "introduction" if last.endswith(":") else "label"), *contexts])
                else:
                    nested = "; ".join(self._flatten(child))
                    parts[-1] += (" " if re.search(r"[.!?;]$", parts[-1]) else ": ") + nested if nested else ""
                    lines += _lines(child)
            else:
                self._read_list(child, contexts)
        if any(parts):
            add = self._add_prose_item if self.document.is_prose else self._add
            add(" ".join(parts), (min(lines), max(lines)), contexts)

    def _flatten(self, node: SyntaxTreeNode) -> Iterator[str]:
        """The items of a nested list, as texts."""
        for child in (child for item in node.children for child in item.children):
            if child.type in _LISTS:
                yield from self._flatten(child)
            elif child.type == "paragraph" and not self._is_aside(text := self._text(child)):
                yield text.rstrip(";,")
            else:
                self._leave_out(child, _REASONS.get(child.type, "an example or a remark"))

    # --- results ----------------------------------------------------------------------------------------------------

    def _add(self, text: str, lines: tuple[int, int], contexts: list[tuple[str, str]]) -> None:
        text = re.sub(r"^\[[ xX]\] ", "", text)
        reason = (
            ("a definition" if _DEFINES.search(text) else "a link") if _DEFINES.search(text) or "\ue000" in text else ""
        )
        if reason or not re.search(r"\w", text):
            self._record(lines[0], reason or "no words", text)
            return
        self._keep(self._state(text, lines, contexts), text)

    def _state(self, text: str, lines: tuple[int, int], contexts: list[tuple[str, str]]) -> Statement:
        headings = [(title, "heading") for _, title in reversed(self.headings)]
        tags = () if len(self.titles) < 2 or not self.headings else (self.headings[-1][1],)
        is_doubtful = self.after_prohibitions
        return state(text, self.document.file, lines, [*contexts, *headings], tags, is_doubtful=is_doubtful)

    def _keep(self, statement: Statement, words: str) -> None:
        """Add a statement with the words that it was made from as its quote: all of its lines if they are not there."""
        first, last = statement.lines
        lines = quotes.locate(words, self.source, first, last)
        quote = words if lines else quotes.quote_lines(self.source, first, last)
        kind, lines, section = statement.kind or statement.polarity, lines or statement.lines, self._section()
        self.document.add(replace(statement, lines=lines, quote=quote, kind=kind, section=section))

    def _section(self) -> tuple[str, ...]:
        return tuple(title for _, title in self.headings)

    # --- prose ------------------------------------------------------------------------------------------------------

    def _add_sentences(self, text: str, lines: tuple[int, int], previous: prose.Reading | None = None) -> None:
        """Each sentence of a paragraph: a principle if it is a rule, or left out with the reason."""
        before, (start, end) = "", lines
        for sentence in prose.split_sentences(text):
            reading = prose.read_sentence(sentence, self.names, previous)
            place = quotes.locate(sentence, self.source, start, end) or lines
            start = place[1] if place != lines else start
            if reading.kind and not _DEFINES.search(sentence):
                words = prose.name_subject(sentence, reading, self.names)
                statement = self._state(words, place, [])
                # a command takes its polarity from the heading above it, such as “What to avoid”
                is_command = reading.is_command and polarity.mood(sentence) == "command"
                if not is_command or statement.polarity == polarity.DEMAND:
                    statement = replace(statement, **_of_kind(reading.kind), text=words, introduction=before)
                self._keep(statement, sentence)
            else:
                self._record(place[0], "a definition" if reading.kind else reading.reason, sentence, place[1])
                is_before = not self.document.statements and not self.document.unclear and len(self.headings) < 2
                self.preamble += [sentence] if is_before and len(self.preamble) < 3 else []
            previous, before = reading, sentence

    def _add_prose_item(self, text: str, lines: tuple[int, int], contexts: list[tuple[str, str]]) -> None:
        """An item of a list in prose: each of its sentences that is a rule by itself, or else a principle by its
        introduction, or by the heading above it."""
        introduction = contexts[0][0] if contexts else ""
        above = prose.read_introduction(introduction, self.names) if introduction else prose.Reading()
        text = re.sub(r"^\[[ xX]\] ", "", text)
        parts = prose.split_sentences(text)
        if "\ue000" in text or text.endswith("?"):
            self._record(lines[0], "a link" if "\ue000" in text else "a question", text, lines[1])
            return
        readings = [prose.read_sentence(part, self.names, above) for part in parts]
        commands = ("command", "command-not") if introduction else ()
        has_rule = any(
            reading.kind and polarity.mood(part) not in commands for part, reading in zip(parts, readings, strict=True)
        )
        statement = self._state(text, lines, contexts)
        if introduction:
            signal = polarity.signal(introduction, "introduction")
            is_completed = signal in ("demands", "command") and prose.is_label(introduction, text)
            is_rule = above.kind or signal == "forbids" or is_completed
        else:
            form, is_ours = polarity.mood(text), len(parts) == 1 and readings[0].subject == OURS
            is_decided = form in ("fragment", "no", "fault") or (form == "sentence" and is_ours)
            is_rule = is_decided and statement.polarity != polarity.UNCLEAR
        if has_rule or not (introduction or is_rule):
            self._add_sentences(text, lines, above)
        elif above.kind == PERMISSION:
            self._keep(replace(statement, **_of_kind(above.kind)), text)
        elif is_rule:
            self._add(text, lines, contexts)
        else:
            self._record(lines[0], above.reason or "no rule", text, lines[1])

    def _leave_out(self, node: SyntaxTreeNode, reason: str, text: str = "") -> None:
        first, last = _lines(node)
        self._record(first, reason, text or self._source(node), last)

    def leave_out_headings(self) -> None:
        """Record the headings that no principle has as a tag; the first is the description's beginning."""
        is_title = bool(self.titles) and not _NO_RULES.search(self.titles[0])
        self.document.description = " ".join([*self.titles[:is_title], *self.preamble])
        used = {tag for statement in [*self.document.statements, *self.document.unclear] for tag in statement.tags}
        for line, title in list(zip(self.title_lines, self.titles, strict=True))[is_title:]:
            if title not in used:
                self.headings = [("", title)]
                self._record(line, "a heading without principles", title)

    def _source(self, node: SyntaxTreeNode) -> str:
        first, last = _lines(node)
        return " ".join(" ".join(self.source[first - 1 : last]).split())

    def _record(self, line: int, reason: str, text: str, last: int | None = None) -> None:
        text = re.sub("[\ue000\ue001]", "", text)
        part = {"file": self.document.file, "line": line, "lines": (line, last or line), "reason": reason, "text": text}
        self.document.left_out.append({**part, "section": self._section()})

    def _is_aside(self, text: str) -> bool:
        """Whether a text is an example or a remark, or its section holds no rules."""
        return bool(_ASIDE.search(text)) or self._has_no_rules()

    def _has_no_rules(self) -> bool:
        """Whether this section is one of definitions, examples and the like; the document's title is no section."""
        return any(
            _NO_RULES.search(title) for tag, title in self.headings if tag != "h1" or title == self.headings[-1][1]
        )

    # --- words ------------------------------------------------------------------------------------------------------

    def _title(self, node: SyntaxTreeNode) -> str:
        return _ATTRIBUTES.sub("", " ".join(re.sub("[\ue000\ue001]", "", self._words(node)).split()))

    def _title_without_marks(self, node: SyntaxTreeNode, following: SyntaxTreeNode | None) -> str:
        """The text of a block that serves as a heading: a line in bold, or one numbered item above a list; else ""."""
        if node.type == "ordered_list" and len(node.children) == 1 and _is_list(following):
            node = node.children[0].children[0] if len(node.children[0].children) == 1 else node
        elif not (node.type == "paragraph" and [part.type for part in node.children[0].children] == ["strong"]):
            return ""
        title = self._title(node) if node.type == "paragraph" else ""
        return title if polarity.mood(title) in ("fragment", "no") and not re.search(r"[.:;,!?]$", title) else ""

    def _text(self, node: SyntaxTreeNode) -> str:
        """The words of a block without marks; references to other sections are left out and recorded."""
        text = " ".join(self._words(node).split())
        for reference in _REFERENCE.findall(text):
            self._record(_lines(node)[0], "a reference", reference.strip())
        text = _REFERENCE.sub("", text)
        return text if re.fullmatch("\ue000[^\ue001]*\ue001", text) else re.sub("[\ue000\ue001]", "", text)

    def _words(self, node: SyntaxTreeNode) -> str:
        if node.type in ("text", "code_inline"):
            return node.content
        if node.type in ("softbreak", "hardbreak"):
            return " "
        if node.type == "s":
            self._record(_lines(node.parent)[0], "struck out", "".join(map(self._words, node.children)))
            return ""
        words = "".join(map(self._words, node.children)) if node.type != "image" else ""
        if node.type == "link" and (target := str(node.attrs.get("href", ""))).startswith("#"):
            return f"\ue000{self.anchors.get(target[1:], target[1:]) if words.strip() in ('', '?') else words}\ue001"
        return words


def _is_prose(root: SyntaxTreeNode) -> bool:
    """Whether the sentences of the paragraphs are at least 12, and at least twice as many as the items of lists."""
    items = sum(node.type == "list_item" for node in root.walk())
    paragraphs = (node for node in root.children if node.type == "paragraph" and node.children)
    sentences = sum(len(prose.split_sentences(_raw(node).replace("\n", " "))) for node in paragraphs)
    return sentences >= max(12, 2 * items)


def _of_kind(kind: str) -> dict[str, str]:
    return {"kind": kind, "polarity": polarity.DEMAND if kind == PREFERENCE else kind}


def _is_list(node: SyntaxTreeNode | None) -> bool:
    return node is not None and node.type in _LISTS


def _introduces(sentence: str) -> bool:
    """Whether the sentence before a list introduces it: by a colon, by its polarity, or as the start of a sentence."""
    return not re.search(r"[.!?]$", sentence) or polarity.signal(sentence, "introduction") in ("forbids", "unclear")


def _raw(node: SyntaxTreeNode) -> str:
    return node.children[0].content if node.children else ""


def _lines(node: SyntaxTreeNode) -> tuple[int, int]:
    """(first, last) line of a block, counted from 1."""
    start, end = node.map
    return start + 1, max(start + 1, end)


def _plain_lines(source: list[str], start: int, end: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The sentences of a plain text, one per line: a line that begins in lower case goes on with the one before it."""
    lines = [" ".join(line.split()) for line in source[start:end]]
    starts = [number for number, line in enumerate(lines) if number == 0 or not re.match(r"[a-z(]", line)]
    for first, following in zip(starts, [*starts[1:], len(lines)], strict=True):
        text = re.sub(r"(\*\*|__|`)(?=\S)(.+?)\1", r"\2", " ".join(lines[first:following]))
        yield text, (start + first + 1, start + following)
