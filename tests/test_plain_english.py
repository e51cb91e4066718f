"""The project's English: no phrase that a reader has to read twice, and hardly a variable whose name says nothing.

The glossary is searched in the documents, in the comments of templates and constitutions, and in all comments and
strings of the code. Text that `tiny` was trained on is left out: its wording is data.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT

# A unit after a count: "n rows a prompt" is "n rows per prompt".
_COUNTED = (
    "rows?|responses?|samples|answers?|prompts?|tokens?|texts?|lines?|files?|bytes|copy|copies|process(?:es)?|"
    "commands?|steps?|calls?|hours?|minutes?|seconds?|nats|updates?|rounds?|principles?|pass(?:es)?|pages?|GPUs?|"
    "pictures?|transcripts?|launchers?|one|two|three|four|several|once|twice"
)
_UNITS = (
    "row|rows|response|sample|prompt|token|text|line|file|step|update|round|principle|process|GPU|parameter|second|"
    "minute|hour|node|batch|pair|comparison|order|run|seed|stage|policy|judge|side|kind|conversation|group|million|"
    "day|user|record|device|layer|question|verdict|class"
)
# {the phrase as the style guide lists it: (regular expression, what to write)}
GLOSSARY = {
    "mend": (r"(?i)\bmend(?:s|ed|ing)?\b", "fix"),
    "anew": (r"(?i)\banew\b", "again"),
    "hangs on, rests on": (r"(?i)\b(?:hangs?|hung)\s+on\b|(?<!the )\brests?\s+on\b|\brested\s+on\b", "depends on"),
    "its bents": (r"(?i)\bbents?\b", "its biases"),
    "an address that is none": (r"(?i)\b(?:that|which)\s+(?:is|are|was|were)\s+none\b", "not a valid URL"),
    "a loss that is no number": (r"(?i)\b(?:is|are|was|were)\s+no\s+numbers?\b", "is NaN, is not a number"),
    "a row an update, n rows a prompt": (
        rf"\b(?:{_COUNTED})\s+an?\s+(?:{_UNITS})\b",
        "one row per update, n rows per prompt",
    ),
    "what answers, what a step costs": (
        r"(?im)^\W*what\s+(?:answers|a\s+step\s+costs)\b",
        "the engine, the cost of a step",
    ),
    "is said, is told, says so": (
        r"(?i)\b(?:is|are|was|were|be|been)\s+(?:said|told)\b|\b(?:says?|said)\s+so\b",
        "is reported, prints a message",
    ),
    "begun answer": (
        r"(?i)\bbegun\s+answers?\b|\banswers?\s+(?:(?:that\s+)?(?:is|are|was|were)\s+)?begun\b",
        "prefilled answer (prefill)",
    ),
    "what it is worth": (r"(?i)\bwhat\s+(?:[\w'’]+\s+){1,4}(?:is|are|was|were)\s+worth\b", "its quality, its accuracy"),
    "heldout": (r"(?i)(?<=\s)(?<!split )heldout(?=[\s,;:]|\.\s)", "held-out"),
    "on top may stand": (r"(?i)\bon\s+top\s+may\b|\bmay\s+stand\b", "may be set at the top level"),
    "behind `install`": (r"(?i)\bbehind\s+(?:`|--|the\s+(?:option|command)\b)", "after `install`"),
    "but for, save for": (r"(?i)\bbut\s+for\b|\bsave\s+for\b", "except"),
    "by hand": (r"(?i)\bby\s+hand\b", "our own"),
}
# {phrase: [(files, what follows or surrounds it where it is right)]}
LEGITIMATE = {
    "mend": [("scripts/cai/world/*", r".*")],  # a verb of the bundled world
    "by hand": [
        ("references/*.md", r"edit|fix|writ|repair|chang|output"),
        ("tests/skill_evals/*", r"written by hand"),
        ("scripts/cai/world/*", r".*"),
    ],
}
EMPTY_NAMES = {"one", "found", "made", "said", "asked", "given", "place", "whole", "own", "left", "shown", "told"}
MOST_EMPTY = 0.005
SOURCES = sorted((ROOT / "scripts").rglob("*.py"))
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
        *(ROOT / "references").glob("*.md"),
        *(ROOT / "tests" / "skill_evals").glob("*.json"),
    ]
)
TEMPLATES = sorted(path for path in (ROOT / "templates").rglob("*") if path.is_file())
CONSTITUTIONS = sorted((ROOT / "constitutions").glob("*.yaml"))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def passages(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every passage that is written for a reader."""
    text = read(path)
    if path.suffix == ".py":
        yield from strings(text)
        yield from comments(text)
    elif path.suffix == ".jinja" and not is_page(path):
        for comment in re.finditer(r"\{#(.*?)#\}", text, re.DOTALL):
            yield line_of(text, comment.start()), comment[1]
    elif path.suffix == ".yaml":
        for block in re.finditer(r"(?:^ *#.*\n)+", text, re.MULTILINE):
            yield line_of(text, block.start()), re.sub(r"^ *#", "", block[0], flags=re.MULTILINE)
    else:
        yield 1, text


def is_page(template: Path) -> bool:
    """Whether a template is part of the report, and not a prompt."""
    return template.parent.name == "report"


def line_of(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def strings(source: str) -> Iterator[tuple[int, str]]:
    """String literals, docstrings among them; the fields of an f-string become `{}`."""
    tree = ast.parse(source)
    parts = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(value.value) if isinstance(value, ast.Constant) else "{}" for value in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments; those on lines that follow each other are one passage."""
    start, last, lines = 0, -1, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 and lines:
            yield start, "\n".join(lines)
            lines = []
        if not lines:
            start = token.start[0]
        lines.append(token.string.lstrip("# "))
        last = token.start[0]
    if lines:
        yield start, "\n".join(lines)


def is_legitimate(path: Path, phrase: str, context: str) -> bool:
    name = path.relative_to(ROOT).as_posix()
    return any(fnmatch(name, files) and re.search(pattern, context) for files, pattern in LEGITIMATE.get(phrase, ()))


def findings(path: Path) -> list[str]:
    lines = []
    for line, text in passages(path):
        for phrase, (pattern, better) in GLOSSARY.items():
            for match in re.finditer(pattern, text):
                context = text[max(0, match.start() - 40) : match.end() + 40]
                if not is_legitimate(path, phrase, context):
                    where = line + text.count("\n", 0, match.start())
                    lines.append(f"{path.relative_to(ROOT)}:{where}: {' '.join(match[0].split())!r}: write {better!r}")
    return lines


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, *TEMPLATES, *CONSTITUTIONS, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_no_phrase_of_the_glossary_is_used(path):
    phrases = findings(path)
    assert not phrases, "\n".join(phrases)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("Mend or delete this row", "mend"),
        ("start\nanew", "anew"),
        ("it hangs on the settings", "hangs on, rests on"),
        ("Hours rest\non 40 %", "hangs on, rests on"),
        ("its bents", "its bents"),
        ("an address that is none", "an address that is none"),
        ("a loss that is no number", "a loss that is no number"),
        ("one row a prompt", "a row an update, n rows a prompt"),
        ("16 bytes\na parameter", "a row an update, n rows a prompt"),
        ("## What answers", "what answers, what a step costs"),
        ("it is said on stderr", "is said, is told, says so"),
        ("`doctor.py` says so", "is said, is told, says so"),
        ("with a begun answer", "begun answer"),
        ("what a judge's labels are worth", "what it is worth"),
        ("Heldout prompts", "heldout"),
        ("they are heldout.", "heldout"),
        ("on top may stand", "on top may stand"),
        ("`-c x` behind `install`", "behind `install`"),
        ("done but\nfor some records", "but for, save for"),
        ("written by hand", "by hand"),
    ],
)
def test_each_phrase_is_recognised(text, phrase):
    assert re.search(GLOSSARY[phrase][0], f" {text} ")


@pytest.mark.parametrize(
    "text",
    [
        "the rest on stderr",
        "--heldout heldout.jsonl",
        "tiny.py prompts --split heldout --seed 7",
        "amended",
        "a bench",
        "a text in a row",
        "rows per prompt",
        "whatever the judge answers",
        "one of the prompts",
        "sample a response",
        "the responses. A response",
        "evaluate heldout.jsonl",
    ],
)
def test_what_is_right_is_not_reported(text):
    assert not [phrase for phrase, (pattern, _) in GLOSSARY.items() if re.search(pattern, f" {text} ")]


def test_passages_are_found_with_their_lines(tmp_path):
    source = '"""Doc."""\n\nx = f"one {y} two"  # first\n# second\n\n# third\n'
    assert list(strings(source)) == [(1, "Doc."), (3, "one {} two")]
    assert list(comments(source)) == [(3, "first\nsecond"), (6, "third")]


def bindings(source: str) -> Iterator[str]:
    """Every name that an assignment, a loop, a `with`, a comprehension or a parameter binds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def test_hardly_a_variable_has_an_empty_name():
    counts: Counter[str] = Counter()
    total = 0
    for path in SOURCES:
        names = [name.strip("_") for name in bindings(read(path))]
        total += len(names)
        counts.update(name for name in names if name in EMPTY_NAMES)
    share = counts.total() / total
    assert share < MOST_EMPTY, f"{counts.total()} of {total} bindings ({100 * share:.2f} %): {counts.most_common()}"


def test_bindings_are_counted():
    source = (
        "one = 1\nfor _found in x: pass\ndef f(said, *told): return [made for made in said]\nwith y as place: pass\n"
    )
    assert sorted(bindings(source)) == sorted(["one", "_found", "said", "told", "made", "place"])
