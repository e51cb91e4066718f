"""Constitutions in other formats, read into ours and written back without losing a word.

    constitution = read_foreign(["CritiqueRevisionInstructions.json", "RLMadisonInstructions.json"], name="paper")

The formats are the paper's prompt files (arXiv 2212.08073; its repository ConstitutionalHarmlessnessPaper), the JSON
of Hugging Face's llm-swarm, lists of sentences in JSON, and documents in Markdown or plain text (markdown.py). A
file's content tells its format, whatever its name ends in. Leaves out tables and prose: they are listed, not read.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from cai.base.errors import InputError, shorten
from cai.base.files import file_name
from cai.constitution import polarity
from cai.constitution.files import (
    PRINCIPLE_KEYS,
    REQUESTS,
    TOP_KEYS,
    Constitution,
    Principle,
    Source,
    load_constitution,
    move_sources,
    phrase,
    phrase_permission,
)
from cai.constitution.markdown import read_markdown
from cai.constitution.predicates import PERMISSION
from cai.constitution.statements import Document, Statement, outline, state
from cai.data.dialogue import as_messages
from cai.data.readers import doubled, unique_keys

# A preference question that was not in the file but made from the revision request carries this tag.
PHRASED = "phrased-preference"

_MAX_BYTES = 5_000_000

CRITIQUES, PREFERENCES = "CritiqueRevisionInstructions.json", "RLMadisonInstructions.json"

FORMATS = ("paper", "llm-swarm", "markdown")  # that `write_foreign` knows

ROUNDS, PAIRS = "CritiqueRevisionFewShotPrompts.json", "RLMadisonFewShotPrompts.json"

REASONED = "RLMadisonPrecogFewShotPrompts.json"

_SUFFIXES = (".md", ".markdown", ".mdx", ".txt", ".text", ".json", ".yaml", ".yml", "")

# JSON, and not a link or a box to tick of Markdown.
_JSON = re.compile(r"\s*(?:\{\s*[\"}]|\[\s*(?:[\"\[{]|\]\s*$))")

# The first key of a constitution in our own format, after comments.
_OWN_YAML = re.compile(
    rf"(?:\s*(?:#[^\n]*|---)\n)*\s*(?:(?:{'|'.join(TOP_KEYS)}):(?=.*^principles:)|principles:|"
    rf"-\s+(?:{'|'.join(PRINCIPLE_KEYS)}):)",
    re.DOTALL | re.MULTILINE,
)

_PAPER_ITEM = re.compile(r"\n\nCritiqueRequest:|Options:\s*$")

_LABELS = re.compile(r"\n\n(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):")

_REQUESTED = ("critique_request", "revision_request", "revision")

_ROUND = ["CritiqueRequest", "Critique", "RevisionRequest", "Revision"]

_COMPARISON = re.compile(
    r"\s*Human: Consider the following conversation between a human(?: \(H\))? and an assistant(?: \(A\))?:"
    r"\s*\n\n(?=H:)"
)

# The text between the parts of a comparison, in this order.
_BETWEEN = ("\n\n{}\n (A) [[[", "]]]\n (B) [[[", "]]]\n\nAssistant: Let's think step by step:")

_GOLD = re.compile(r"\s*So the answer is: \((A|B)\)\s*")

_SPEAKERS = {"Human": "user", "Assistant": "assistant", "H": "user", "A": "assistant"}


def read_foreign(
    paths: Iterable[str],
    name: str,
    report: dict | None = None,
    *,
    keep_unclear: bool = False,
    is_prose: bool | None = None,
) -> Constitution:
    """One constitution of all the files together.

    The paper's preference questions are paired with its critiques by place. That is not in the paper, and
    changes nothing: each is drawn by itself. Where there are none, the question is phrased from the revision
    request, and the principle tagged `PHRASED`.

    Args:
        report: filled with `origins` (id, file, lines and polarity of each principle), `unclear` (sentences whose
            polarity nothing tells, with file and line), `left_out` (what is not a principle, with the reason) and
            `outline` (all of this by sections, see markdown.outline).
        keep_unclear: make principles of the unclear sentences as they are, tagged `unclear`; else they are left out.
        is_prose: whether documents are read sentence by sentence; None: see read_markdown.

    The paths of the principles' sources are as `paths` gives them: relative to the current folder.

    Raises InputError, naming the file and the item, for what is in none of the formats, and if a word of a file in
    JSON would not be found again in what `write_foreign` makes of the result.
    """
    parts = _Parts(keep_unclear, is_prose)
    paths = [Path(path) for path in paths]
    for path in paths:
        parts.read(path)
    constitution = parts.constitution(name, "Imported from " + ", ".join(path.name for path in paths))
    for path, (kind, texts) in parts.texts.items():
        lost = _words(texts) - _words(_strings(list(write_foreign(constitution, kind)[0].values())))
        if lost:
            problem = f"{sum(lost.values())} words would be lost, such as {shorten(' '.join(lost))!r}"
            raise InputError(
                problem, where=path, remedy="Please report this file's format; meanwhile import it as a plain list"
            )
    if report is not None:
        report |= parts.report(constitution)
    return constitution


def write_foreign(constitution: Constitution, kind: str) -> tuple[dict[str, object], dict[str, int]]:
    """({file name: its content, a text or what is written as JSON}, {what the format can't hold: how often}).

    Args:
        kind: paper, llm-swarm or markdown.
    """
    principles, examples = constitution.principles, _all_examples(constitution)
    pairs = [example for example in examples if "critique" not in example]
    rounds = [example for example in examples if {"critique", *_REQUESTED} <= set(example)]
    lost = Counter(weights=sum(p.weight != 1 for p in principles), duties=len(constitution.duties))
    lost["examples"] = len(examples) - len(pairs) - len(rounds)
    lost["sources"] = sum(p.source is not None for p in principles)
    name = file_name(constitution.name, "constitution")
    if kind == "markdown":
        lost["requests"] = sum(
            getattr(p, k) != v for p in principles if p.principle for k, v in phrase(p.principle).items()
        )
        lost["examples"] = len(examples)
        return {f"{name}.md": _markdown(constitution)}, +lost
    lost["tags"] = sum(len(set(p.tags) - {PHRASED}) for p in principles)
    if kind == "llm-swarm":
        lost["preferences"] = sum(PHRASED not in p.tags for p in principles)
        lost["examples"] += len(pairs)
        requests = [{"critic": p.critique, "revision": p.revision} for p in principles]
        chats = [[*as_messages(example["prompt"]), *_to_chat(example)] for example in rounds]
        return {f"{name}.json": {"constitutions": requests, "system_chat": chats}}, +lost
    files = {
        CRITIQUES: {
            p.id: {
                "prompt": [f"\n\nCritiqueRequest: {p.critique}\n\nCritique:"],
                "edit_request": f"\n\nRevisionRequest: {p.revision}\n\nRevision:",
            }
            for p in principles
        },
        PREFERENCES: [f"\n{p.preference} Options:" for p in principles if PHRASED not in p.tags],
        ROUNDS: [_to_round_text(example) for example in rounds],
        PAIRS: [_to_pair(example) for example in pairs if "reasoning" not in example],
        REASONED: [{"prompt": _to_comparison_text(example)} for example in pairs if "reasoning" in example],
    }
    return {name: content for name, content in files.items() if content}, +lost


# --- reading ------------------------------------------------------------------------------------------------


class _Parts:
    """What the files hold: parts of principles and examples, and every text with the format it came in."""

    def __init__(self, keep_unclear: bool, is_prose: bool | None):
        self.keep_unclear, self.is_prose = keep_unclear, is_prose
        self.requests: list[tuple[str, str, str, Path]] = []  # id, critique, revision, file
        self.questions: list[str] = []
        self.taken_over: list[tuple[Principle, Path]] = []
        self.documents: list[Document] = []
        self.examples: list[dict] = []
        self.duties: dict[str, str] = {}
        self.description = ""
        self.texts: dict[Path, tuple[str, list[str]]] = {}

    def read(self, path: Path) -> None:
        """Add what the file holds; its content tells the format, whatever its name ends in."""
        text = _read_text(path)
        if path.suffix.lower() not in _SUFFIXES:
            raise InputError(
                f"unknown kind of file: {path.suffix!r}",
                where=path,
                expected="a text in Markdown, JSON or YAML",
                remedy="Save it as text",
            )
        is_json = _JSON.match(text) or (path.suffix == ".json" and re.match(r"\s*[\[{\"]", text))
        tree = _read_json(text, path) if is_json else None
        is_own = _is_own(tree) if is_json else bool(_OWN_YAML.match(text))
        if is_json and not is_own:
            kind = self._read_json(tree, path, text)
            if kind:
                self.texts[path] = (kind, list(_strings(tree if kind == "paper" else [tree])))
        elif not (is_own or path.suffix in (".yaml", ".yml")) or not self._take_over(path, is_own):
            self._add_document(read_markdown(text, path, self.is_prose))

    def _take_over(self, path: Path, is_own: bool) -> bool:
        """Add the principles of a constitution in our own format; False if the file is none and `is_own` is unsure."""
        try:
            constitution = load_constitution(str(path))
        except InputError:
            if is_own:
                raise
            return False
        shared = len(constitution.examples)
        for principle in move_sources(constitution.principles, path.parent, "."):
            examples = principle.examples[: len(principle.examples) - shared]
            self.taken_over.append((replace(principle, examples=examples), path))
        self.duties |= constitution.duties
        self.examples += constitution.examples
        self.description = " ".join(filter(None, [self.description, constitution.description]))
        return True

    def _add_document(self, document: Document) -> None:
        """Add a document; InputError, naming the sentences, if none of them is a principle."""
        if not document.statements and not (self.keep_unclear and document.unclear):
            unclear = [f"line {item.lines[0]}: {shorten(item.text, 60)!r}" for item in document.unclear[:20]]
            raise InputError(
                "no list in it, and no sentence that orders or forbids something"
                + (f"; of {len(document.unclear)} sentences it is unclear: {'; '.join(unclear)}" if unclear else ""),
                where=document.file,
                line=document.unclear[0].lines[0] if unclear else None,
                expected="one principle per line, or a Markdown list",
                remedy="Write sentences (“Do …”, “Never …”), or introduce the list (“The assistant must never:”)",
            )
        self.documents.append(document)
        self.description = " ".join(filter(None, [self.description, document.description]))

    def _read_json(self, tree, path: Path, text: str) -> str:
        """Add what the tree holds; returns the format, or "" for a list of sentences."""
        if isinstance(tree, dict) and "constitutions" in tree:
            for number, item in enumerate(_items(tree["constitutions"], path, "constitutions"), 1):
                critique, revision = _fields(item, ("critic", "revision"), path, f"constitutions, item {number}")
                self.requests.append((f"principle-{len(self.requests) + 1}", critique, revision, path))
            chats = tree.get("system_chat") or []
            if not isinstance(chats, list):
                raise _unknown(chats, path, "system_chat", expected="a list of conversations")
            for number, chat in enumerate(chats, 1):
                self.examples.append(_from_chat(chat, path, f"system_chat, item {number}"))
            if unknown := set(tree) - {"constitutions", "system_chat"}:
                raise InputError(
                    f"unknown key {shorten(min(unknown))!r}", where=path, expected="constitutions, system_chat"
                )
            return "llm-swarm"
        if isinstance(tree, dict) and tree:
            for key, item in tree.items():
                prompt, edit = _fields(item, ("prompt", "edit_request"), path, f"key {key!r}")
                critique = _without(prompt, "CritiqueRequest:", "Critique:")
                self.requests.append((key, critique, _without(edit, "RevisionRequest:", "Revision:"), path))
            return "paper"
        sentences = Document(str(path))
        for number, item in enumerate(_items(tree, path, "the file"), 1):
            if isinstance(item, str) and item.strip() and not _PAPER_ITEM.search(item):
                offset = text.find(json.dumps(item, ensure_ascii=False))
                line = text.count("\n", 0, max(offset, 0)) + 1
                sentences.add(state(" ".join(item.split()), str(path), (line, line)))
            else:
                self._read_item(item, path, f"item {number}")
        if not (sentences.statements or sentences.unclear):
            return "paper"
        self._add_document(sentences)
        return ""

    def _read_item(self, item, path: Path, position: str) -> None:
        if isinstance(item, dict) and "corrects" in item:
            prompt, chosen, rejected = _fields(item, ("prompt", "corrects", "incorrects"), path, position)
            turns = _turns(prompt, path, position)
            if turns and turns[-1] == {"role": "assistant", "content": ""}:
                turns.pop()
            self.examples.append({"prompt": _plain_prompt(turns), "chosen": chosen, "rejected": rejected})
        elif isinstance(item, dict):
            (prompt,) = _fields(item, ("prompt",), path, position)
            self.examples.append(_from_comparison(prompt, path, position))
        elif not isinstance(item, str) or not item.strip():
            raise _unknown(item, path, position)
        elif "\n\nCritiqueRequest:" in item:
            self.examples.append(_from_round(item, path, position))
        else:
            self.questions.append(_without(item, "", "Options:"))

    def constitution(self, name: str, source: str) -> Constitution:
        where = source.removeprefix("Imported from ")
        if self.questions and len(self.questions) != len(self.requests):
            raise InputError(
                f"{len(self.questions)} preference questions and {len(self.requests)} critique requests",
                where=where,
                expected="as many of both",
                remedy=f"Give {CRITIQUES} and {PREFERENCES} together",
            )
        questions = self.questions or [None] * len(self.requests)
        examples = tuple(self.examples)
        principles = [
            Principle(
                id,
                critique,
                revision,
                question or phrase_preference(revision),
                tags=() if question else (PHRASED,),
                examples=examples,
            )
            for (id, critique, revision, _), question in zip(self.requests, questions, strict=True)
        ]
        principles += [replace(item, examples=(*item.examples, *examples)) for item, _ in self.taken_over]
        principles += [
            Principle(
                f"principle-{number}",
                **(phrase_permission if item.polarity == PERMISSION else phrase)(item.text),
                tags=_tags(item),
                principle=item.text,
                source=Source(item.file, item.lines, item.quote) if item.quote else None,
                examples=examples,
            )
            for number, item in enumerate(self._statements(), len(principles) + 1)
        ]
        if not principles:
            raise InputError("examples, and no principles", where=where, remedy=f"Give {CRITIQUES} with them")
        if (id := doubled(principle.id for principle in principles)) is not None:
            raise InputError(f"the principle {id!r} in two files", where=where, remedy="Import them one by one")
        return Constitution(name, "", "", tuple(principles), self.description, "", source, self.duties, examples)

    def _statements(self) -> list[Statement]:
        """The sentences of all documents that become principles, in the order of the files."""
        kept = [[*item.statements, *(item.unclear if self.keep_unclear else [])] for item in self.documents]
        return [statement for statements in kept for statement in sorted(statements, key=lambda item: item.lines)]

    def report(self, constitution: Constitution) -> dict:
        """{origins, unclear, left_out, outline}: where each principle comes from, and what became none."""
        origins = [{"file": str(path)} for *_, path in self.requests]
        origins += [{"file": str(path), "lines": (item.line, item.line)} for item, path in self.taken_over]
        origins += [
            {"file": item.file, "lines": item.lines, "polarity": item.polarity, "introduction": item.introduction}
            for item in self._statements()
        ]
        unclear = [item for document in self.documents for item in document.unclear]
        ids = {p.source: p.id for p in constitution.principles if p.source}
        return {
            "origins": [
                {"id": principle.id, **origin}
                for principle, origin in zip(constitution.principles, origins, strict=True)
            ],
            "unclear": [{"file": item.file, "line": item.lines[0], "text": item.text} for item in unclear],
            "left_out": sorted(
                (part for document in self.documents for part in document.left_out),
                key=lambda part: (part["file"], part["line"]),
            ),
            "outline": [outline(document, ids) for document in self.documents],
        }


def _tags(statement: Statement) -> tuple[str, ...]:
    return (*statement.tags, *((statement.polarity,) if statement.polarity in (PERMISSION, polarity.UNCLEAR) else ()))


def count_parts(constitution: Constitution) -> dict[str, int]:
    """How many worked examples an imported constitution has, and preference questions that no file held."""
    phrased = sum(PHRASED in principle.tags for principle in constitution.principles)
    return {"examples": len(constitution.examples), "phrased_preferences": phrased}


def phrase_preference(revision: str) -> str:
    """A preference question for a principle that has a revision request alone."""
    return f"Which response has less need of this: {revision.rstrip('.')}?"


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path.stat().st_size} bytes", where=path, expected=f"at most {_MAX_BYTES}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=path) from None
    except OSError as error:
        raise InputError(f"cannot read it: {error.strerror or error}", where=path, remedy="Check the path") from None


def _read_json(text: str, path: Path):
    try:
        tree = json.loads(text, object_pairs_hook=unique_keys)
        json.dumps(tree, ensure_ascii=False).encode()
        return tree
    except UnicodeEncodeError:
        raise InputError("half a surrogate pair in the text", where=path, expected="valid Unicode") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise InputError(f"not JSON ({shorten(error)})", where=path, line=line) from None


def _is_own(tree) -> bool:
    """Whether JSON is a constitution in our own format."""
    if isinstance(tree, dict):
        return "principles" in tree
    return isinstance(tree, list) and bool(tree) and isinstance(tree[0], dict) and set(tree[0]) <= set(PRINCIPLE_KEYS)


def _items(tree, path: Path, position: str) -> list:
    if not isinstance(tree, list) or not tree:
        raise _unknown(tree, path, position)
    return tree


def _fields(item, names: tuple[str, ...], path: Path, position: str) -> list[str]:
    """The texts of the fields; a list of one text stands for that text."""
    if not isinstance(item, dict) or set(item) != set(names):
        raise _unknown(item, path, position, expected=f"an object with {', '.join(names)}")
    values = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in map(item.get, names)]
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise _unknown(item, path, position, expected=f"one text in each of {', '.join(names)}")
    return values


def _unknown(item, path: Path, position: str, expected: str = "one of the known formats") -> InputError:
    return InputError(
        f"{position} is {shorten(json.dumps(item, ensure_ascii=False))}",
        where=path,
        expected=expected,
        remedy="references/constitution-files.md shows what is read",
    )


def _without(text: str, before: str, after: str) -> str:
    return " ".join(text.strip().removeprefix(before).removesuffix(after).split())


def _split(text: str, labels: re.Pattern = _LABELS) -> tuple[list[str], list[str]]:
    """(labels, texts) of the turns of a transcript."""
    parts = labels.split("\n\n" + text.strip())[1:]
    return parts[::2], [part.strip() for part in parts[1::2]]


def _turns(text: str, path: Path, position: str, labels: re.Pattern = _LABELS) -> list[dict]:
    """The messages of a transcript."""
    speakers, texts = _split(text, labels)
    roles = [_SPEAKERS.get(speaker, speaker) for speaker in speakers]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise _unknown(text, path, position, expected="a transcript of Human and Assistant in turn")
    return [{"role": role, "content": content} for role, content in zip(roles, texts, strict=True)]


def _plain_prompt(turns: list[dict]) -> str | list[dict]:
    return turns[0]["content"] if len(turns) == 1 else turns


def _from_round(text: str, path: Path, position: str) -> dict:
    """A worked round of the paper: a conversation, then critique and revision with their requests."""
    labels, texts = _split(text)
    if labels and labels[-1] == "Human" and not texts[-1]:  # the next example would begin here
        labels, texts = labels[:-1], texts[:-1]
    speakers = labels[:-4]
    if labels[-4:] != _ROUND or not speakers or speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        raise _unknown(text, path, position, expected="Human, Assistant, then " + ", ".join(_ROUND))
    return _round(texts, [_SPEAKERS[label] for label in speakers])


def _from_chat(chat, path: Path, position: str) -> dict:
    """A worked round of llm-swarm: the same as messages."""
    messages = [_fields(message, ("role", "content"), path, position) for message in _items(chat, path, position)]
    roles = [role for role, _ in messages]
    if len(roles) < 6 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise _unknown(chat, path, position, expected="six messages or more, user and assistant in turn")
    return _round([content for _, content in messages], roles[:-4])


def _round(texts: list[str], roles: list[str]) -> dict:
    turns = [{"role": role, "content": content} for role, content in zip(roles, texts[:-4], strict=True)]
    names = ("critique_request", "critique", "revision_request", "revision")
    answers = dict(zip(names, texts[-4:], strict=True))
    return {"prompt": _plain_prompt(turns[:-1]), "response": texts[-5], **answers}


def _from_comparison(text: str, path: Path, position: str) -> dict:
    """A worked comparison of the paper, with reasoning."""
    begins = _COMPARISON.match(text)
    parts, rest = [], text[begins.end() :] if begins else ""
    for mark in _BETWEEN:  # one after the other: a pattern of them all takes time with a power of the length
        part, _, rest = rest.partition(mark)
        parts.append(part)
    reasoning, _, last = rest.rpartition("\n\nHuman:")
    gold = _GOLD.fullmatch(last)
    if not gold:
        raise _unknown(text, path, position, expected="a conversation, (A) [[[…]]], (B) [[[…]]], reasoning, an answer")
    turns = _turns(parts[0], path, position, re.compile(r"\n\n(H|A):"))
    return {
        "prompt": _plain_prompt(turns),
        "response_a": parts[1],
        "response_b": parts[2],
        "gold": gold[1].lower(),
        "reasoning": reasoning.strip(),
    }


# --- writing ------------------------------------------------------------------------------------------------


def _all_examples(constitution: Constitution) -> list[dict]:
    """Those of single principles, then those of all."""
    shared = len(constitution.examples)
    examples = (p.examples[: len(p.examples) - shared] for p in constitution.principles)
    return [*chain.from_iterable(examples), *constitution.examples]


def _to_chat(example: dict) -> list[dict]:
    names = ("response", "critique_request", "critique", "revision_request", "revision")
    roles = ("assistant", "user") * 3
    return [{"role": role, "content": example[name]} for role, name in zip(roles, names, strict=False)]


def _transcript(prompt: str | list[dict], names: tuple[str, str] = ("Human", "Assistant")) -> str:
    turns = as_messages(prompt)
    return "\n\n".join(f"{names[turn['role'] == 'assistant']}: {turn['content']}" for turn in turns)


def _to_round_text(example: dict) -> str:
    labels = ("Assistant", *_ROUND)
    parts = [f"{label}: {turn['content']}" for label, turn in zip(labels, _to_chat(example), strict=True)]
    return "\n\n" + "\n\n".join([_transcript(example["prompt"]), *parts, "Human:"])


def _to_pair(example: dict) -> dict:
    chosen, rejected = example.get("chosen"), example.get("rejected")
    if chosen is None:
        chosen, rejected = (example[f"response_{side}"] for side in ("ab" if example["gold"] == "a" else "ba"))
    prompt = f"\n\n{_transcript(example['prompt'])}\n\nAssistant:"
    return {"prompt": prompt, "corrects": [chosen], "incorrects": [rejected]}


def _to_comparison_text(example: dict) -> str:
    a, b = example.get("response_a", example.get("chosen")), example.get("response_b", example.get("rejected"))
    return (
        "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):\n\n"
        f"{_transcript(example['prompt'], ('H', 'A'))}\n\n{{}}\n (A) [[[{a}]]]\n (B) [[[{b}]]]\n\n"
        f"Assistant: Let's think step by step: {example['reasoning']}\n\n"
        f"Human:\nSo the answer is: ({example.get('gold', 'a').upper()})"
    )


def _markdown(constitution: Constitution) -> str:
    """A title, the description, and a list; tags that differ from those before stand above it as a heading."""
    lines, heading = [f"# {constitution.name}", ""], ()
    if constitution.description:
        lines += [constitution.description, ""]
    for principle in constitution.principles:
        if principle.tags and principle.tags != heading:
            lines += ["", f"## {', '.join(principle.tags)}", ""]
        heading = principle.tags
        lines.append(f"- {principle.principle or ' '.join(getattr(principle, name) for name in REQUESTS)}")
    return "\n".join(lines) + "\n"


# --- words --------------------------------------------------------------------------------------------------


def _strings(tree) -> Iterator[str]:
    """All texts in a tree, keys included, since they are the names of principles."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        yield from _strings(list(chain.from_iterable(tree.items())))
    elif isinstance(tree, list | tuple):
        yield from chain.from_iterable(map(_strings, tree))


def _words(texts: Iterable[str]) -> Counter:
    return Counter(word for text in texts for word in re.findall(r"\w+", text))
