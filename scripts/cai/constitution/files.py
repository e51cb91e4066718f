"""Constitutions: YAML files of principles, read, checked, drawn from and written.

    load_constitution("harmlessness").draw(seed=0, record_id="p1", round=0).critique

Leaves out whether a principle is a good one (constitution/lint.py checks what can be checked), and other formats
(constitution/importing.py).
"""

import difflib
import hashlib
import os
import re
import textwrap
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from cai.base.errors import InputError, shorten
from cai.base.hashing import hashed_seed
from cai.base.paths import CONSTITUTIONS, find_file
from cai.constitution import polarity
from cai.constitution.yaml_nodes import line_of, read_line, read_list, read_mapping, read_text, read_yaml

REQUESTS = ("critique", "revision", "preference")

# Worked examples of a comparison or a round of revision: rows as the steps write them.
EXAMPLES = {
    "a critique": ("prompt", "response", "critique"),
    "a comparison": ("prompt", "chosen", "rejected"),
    "a comparison in a given order": ("prompt", "response_a", "response_b", "gold"),
}

# Each key of the file, and what it is: the source of the messages, the JSON Schema and the reference.
TOP_KEYS = {
    "name": "The constitution's name, which is also that of its file.",
    "description": "One sentence: what it asks for, and of whom.",
    "for": "Whom it is meant for.",
    "source": "Where the principles come from.",
    "duties": "The duties that principles implement, by name; a principle carries the name among its tags.",
    "principles": "The principles: mappings, or plain sentences.",
    "examples": "Worked examples for all principles.",
}

PRINCIPLE_KEYS = {
    "id": "The principle's name in every row; without it principle-1 and so on, by place.",
    "principle": "One plain sentence, from which the requests that are not given are phrased.",
    "critique": "What to look for in a response.",
    "revision": "How to rewrite the response.",
    "preference": "The question which of two responses is better.",
    "weight": "How often it is drawn against the others.",
    "tags": "Words to sort principles by, and the names of duties.",
    "source": "The sentence that it was made from: its file, lines and words.",
    "examples": "Worked examples for this principle.",
}

SOURCE_KEYS = {
    "file": "The document: a path relative to the folder of this file.",
    "lines": "The first and the last line of the sentence, counted from 1.",
    "quote": "Its words without marks, as they stand in these lines.",
}

EXAMPLE_KEYS = {
    "prompt": "What was asked: a text, or a list of messages with role and content.",
    "response": "The response that is criticised.",
    "critique_request": "The critique request, where it is not the principle's.",
    "critique": "A good critique of it.",
    "revision_request": "The revision request, where it is not the principle's.",
    "revision": "A good revision.",
    "chosen": "The better response.",
    "rejected": "The worse response.",
    "response_a": "The response shown first.",
    "response_b": "The response shown second.",
    "gold": "Which of the two is better: a or b.",
    "reasoning": "Why it is better, as a judge would reason.",
}

ALL = "all"  # the id, in rows, of all principles as one

_MAX_PRINCIPLES = 500


@dataclass(frozen=True)
class Source:
    """The sentence that a principle was made from.

    Attributes:
        file: path of the document, relative to the folder of the constitution.
        lines: (first, last), counted from 1.
        quote: the words in these lines, without marks and on one line.
    """

    file: str
    lines: tuple[int, int]
    quote: str


@dataclass(frozen=True)
class Principle:
    """One principle: a critique request, a revision request and a preference question.

    Attributes:
        examples: worked examples (mappings with `EXAMPLE_KEYS`), its own before those of the constitution.
        principle: the plain sentence that it was written as, or "".
        source: the sentence of a document that it was made from, or None.
        line: where it begins in its file.
    """

    id: str
    critique: str
    revision: str
    preference: str
    weight: float = 1.0
    tags: tuple[str, ...] = ()
    examples: tuple[dict, ...] = ()
    principle: str = ""
    source: Source | None = None
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Constitution:
    """Principles and their description; `examples` are those that all principles share."""

    name: str
    path: str
    sha256: str
    principles: tuple[Principle, ...]
    description: str = ""
    audience: str = ""
    source: str = ""
    duties: dict[str, str] = field(default_factory=dict)
    examples: tuple[dict, ...] = ()

    def draw(self, seed: int, record_id: str, round: int, used: Collection[str] = ()) -> Principle:
        """The principle for a record and round: at random by weight (paper, section 3.1), but by
        hashing, so that neither the order of the rows nor a resume changes it.

        Args:
            used: ids that the record's earlier rounds had, in order. None of them comes again before all have come
                equally often.
        """
        times = Counter(used)
        fewest = min(times[p.id] for p in self.principles)
        principles = [p for p in self.principles if times[p.id] == fewest]
        total = sum(p.weight for p in principles)
        # 53 bits: what a float holds exactly
        point = (hashed_seed("principle", seed, record_id, round) >> 10) / 2**53 * total
        for principle in principles:
            point -= principle.weight
            if point < 0:
                return principle
        return principles[-1]

    def combine(self) -> Principle:
        """All principles as one, with the id `ALL`: each request is a numbered list of theirs, in the file's order."""

        def number(heading: str, request: str) -> str:
            lines = (f"{n}. {getattr(p, request)}" for n, p in enumerate(self.principles, 1))
            return "\n".join([heading, *lines])

        return Principle(
            ALL,
            critique=number("Examine the response under each of these principles:", "critique"),
            revision=number("Follow each of these instructions:", "revision"),
            preference=number("Weigh the answers to all of these questions:", "preference"),
            examples=self.examples,
        )

    def without(self, id: str) -> "Constitution":
        """The constitution without one principle. InputError if it has no such principle, or no other."""
        rest = tuple(p for p in self.principles if p.id != id)
        if len(rest) == len(self.principles):
            raise InputError(
                f"no principle {id!r}", where=self.path, expected=f"one of: {', '.join(p.id for p in self.principles)}"
            )
        if not rest:
            raise InputError(f"no principle except {id!r}", where=self.path, expected="two or more")
        return replace(self, principles=rest)

    def __getitem__(self, id: str) -> Principle:
        return {p.id: p for p in self.principles}[id]

    def __contains__(self, id: str) -> bool:
        return any(p.id == id for p in self.principles)


def load_constitution(name_or_path: str, problems: list[InputError] | None = None) -> Constitution:
    """Read and check a constitution: a file, or the name of one in constitutions/.

    Args:
        problems: a list for the errors in single principles, which are then left out; without it the first is
            raised.

    Raises InputError (file, line, value, remedy) for anything that the schema does not know.
    """
    path = find_file(name_or_path, CONSTITUTIONS, ".yaml")
    tree, raw = read_yaml(path, f"at most {_MAX_PRINCIPLES} principles")
    _refuse_markdown(tree, raw, path)
    head: dict[str, yaml.Node] = {"principles": tree}
    if not isinstance(tree, yaml.SequenceNode):
        head = read_mapping(tree, path, TOP_KEYS, "constitution")
        if "principles" not in head:
            raise InputError("no `principles`", where=path, line=1, remedy="Add a list of principles")
    shared = _examples(head["examples"], path) if "examples" in head else ()
    text = {k: read_line(head[k], path, k) for k in ("name", "description", "for", "source") if k in head}
    return Constitution(
        name=text.get("name", Path(path).stem),
        path=str(path),
        sha256=hashlib.sha256(raw).hexdigest(),
        principles=_principles(head["principles"], path, shared, problems),
        description=text.get("description", ""),
        audience=text.get("for", ""),
        source=text.get("source", ""),
        duties=_duties(head["duties"], path) if "duties" in head else {},
        examples=shared,
    )


def _principles(
    node: yaml.Node, path: Path, shared: tuple[dict, ...], problems: list[InputError] | None
) -> tuple[Principle, ...]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise InputError(
            "`principles` is not a list with entries",
            where=path,
            line=line_of(node),
            expected="a list of principles, or of plain sentences",
        )
    if len(node.value) > _MAX_PRINCIPLES:
        raise InputError(
            f"{len(node.value)} principles",
            where=path,
            expected=f"at most {_MAX_PRINCIPLES}",
            remedy="Each is drawn in turn: a dozen or two are enough",
        )
    principles: dict[str, Principle] = {}
    for number, item in enumerate(node.value, 1):
        try:
            principle = _principle(item, number, path, shared)
            if principle.id in principles:
                raise InputError(
                    f"two principles with id {principle.id!r}",
                    where=path,
                    line=line_of(item),
                    remedy=f"Give each its own id; the other is on line {principles[principle.id].line}",
                )
            principles[principle.id] = principle
        except InputError as error:
            if problems is None:
                raise
            problems.append(error)
    return tuple(principles.values())


def _refuse_markdown(tree: yaml.Node, raw: bytes, path: Path) -> None:
    """Raise InputError for what is YAML by accident: a document in Markdown, whose headings would be comments."""
    remedy = f"For Markdown or plain text: constitution.py import --input {path} --output NAME.yaml"
    is_text = path.suffix.lower() not in (".yaml", ".yml", ".json")
    if isinstance(tree, yaml.MappingNode):
        names = [key.value for key, _ in tree.value]
        if not any(difflib.get_close_matches(str(name), TOP_KEYS, n=1) for name in names):
            problem = f"not a constitution in YAML: it begins with {shorten(names[0] if names else '{}')!r}"
            raise InputError(
                problem, where=path, line=line_of(tree), expected=f"keys out of: {', '.join(TOP_KEYS)}", remedy=remedy
            )
    if not isinstance(tree, yaml.SequenceNode):
        return
    sentences = [(line_of(item), item.value) for item in tree.value if isinstance(item, yaml.ScalarNode)]
    for number, line in enumerate(raw.decode("utf-8-sig").splitlines(), 1):
        below = [text for start, text in sentences if start > number]
        if not line.startswith("#") or not below:
            continue
        forbids = polarity.signal(line, "heading") in ("forbids", "topic")
        if is_text or (
            forbids and any(polarity.judge_sentence(text).polarity != polarity.PROHIBITION for text in below)
        ):
            problem = f"a list below {shorten(line)!r}, which is a comment to YAML: the items would lose what it says"
            raise InputError(problem, where=path, line=number, expected="sentences that stand alone", remedy=remedy)


def _principle(node: yaml.Node, number: int, path: Path, shared: tuple[dict, ...]) -> Principle:
    if isinstance(node, yaml.ScalarNode):
        keys = {"principle": node}
    else:
        keys = read_mapping(node, path, PRINCIPLE_KEYS, "principle")
    texts = {k: read_line(keys[k], path, k) for k in ("principle", *REQUESTS) if k in keys}
    if "principle" in texts:
        texts = {**phrase(texts["principle"]), **texts}
    for name in REQUESTS:
        if name not in texts:
            raise InputError(
                f"principle {number} has no `{name}`",
                where=path,
                line=line_of(node),
                expected="critique, revision and preference, or `principle`: one sentence",
            )
    identity = read_line(keys["id"], path, "id") if "id" in keys else f"principle-{number}"
    if identity == ALL:
        raise InputError(
            f"a principle with the id {ALL!r}",
            where=path,
            line=line_of(keys["id"]),
            expected="another id: in rows it stands for all principles as one",
            remedy="Rename it",
        )
    examples = _examples(keys["examples"], path) if "examples" in keys else ()
    return Principle(
        id=identity,
        **texts,
        weight=_weight(keys["weight"], path) if "weight" in keys else 1.0,
        tags=tuple(read_line(tag, path, "tags") for tag in read_list(keys["tags"], path, "tags"))
        if "tags" in keys
        else (),
        examples=(*examples, *shared),
        source=_source(keys["source"], path) if "source" in keys else None,
        line=line_of(node),
    )


def _source(node: yaml.Node, path: Path) -> Source:
    keys = read_mapping(node, path, SOURCE_KEYS, "source")
    for name in SOURCE_KEYS:
        if name not in keys:
            raise InputError(
                f"a source without `{name}`", where=path, line=line_of(node), expected=", ".join(SOURCE_KEYS)
            )
    numbers = [read_line(item, path, "lines") for item in read_list(keys["lines"], path, "lines")]
    is_range = len(numbers) == 2 and all(re.fullmatch("[1-9][0-9]{0,8}", number) for number in numbers)
    lines = tuple(map(int, numbers)) if is_range else (1, 0)
    if lines[0] > lines[1]:
        raise InputError(
            f"lines {shorten(', '.join(numbers))}",
            where=path,
            line=line_of(keys["lines"]),
            expected="the first and the last line, counted from 1: [3, 4]",
        )
    return Source(read_line(keys["file"], path, "file"), (lines[0], lines[1]), read_line(keys["quote"], path, "quote"))


def move_sources(
    principles: Collection[Principle], folder: str | Path, new_folder: str | Path
) -> tuple[Principle, ...]:
    """The principles with the paths of their sources, which were relative to `folder`, relative to `new_folder`."""
    return tuple(
        replace(item, source=replace(item.source, file=_move(item.source.file, folder, new_folder)))
        if item.source
        else item
        for item in principles
    )


def _move(file: str, folder: str | Path, new_folder: str | Path) -> str:
    path = os.path.realpath(os.path.join(folder, file))
    try:
        return Path(os.path.relpath(path, os.path.realpath(new_folder))).as_posix()
    except ValueError:  # another drive
        return Path(path).as_posix()


def _weight(node: yaml.Node, path: Path) -> float:
    try:
        weight = float(read_line(node, path, "weight"))
    except ValueError:
        weight = 0.0
    if not 0 < weight < 1e6:
        raise InputError(f"weight {shorten(node.value)!r}", where=path, line=line_of(node), expected="a number above 0")
    return weight


def _duties(node: yaml.Node, path: Path) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise InputError(
            "`duties` is not a mapping", where=path, line=line_of(node), expected="a name and a text for each"
        )
    return {name: read_line(value, path, name) for name, value in read_mapping(node, path, None, "mapping").items()}


def _examples(node: yaml.Node, path: Path) -> tuple[dict, ...]:
    return tuple(_example(item, path) for item in read_list(node, path, "examples"))


def _example(node: yaml.Node, path: Path) -> dict:
    """One worked example: text as it stands, line breaks and all."""
    keys = read_mapping(node, path, EXAMPLE_KEYS, "example")
    example = {k: _turns(v, path) if k == "prompt" else read_text(v, path, k) for k, v in keys.items()}
    if not any(set(form) <= set(example) for form in EXAMPLES.values()):
        forms = "; ".join(f"{what}: {', '.join(form)}" for what, form in EXAMPLES.items())
        problem = f"an example of {', '.join(example) or 'nothing'}"
        raise InputError(problem, where=path, line=line_of(node), expected=forms)
    if example.get("gold", "a") not in ("a", "b"):
        raise InputError(
            f"gold {shorten(example['gold'])!r}", where=path, line=line_of(keys["gold"]), expected="a or b"
        )
    return example


def _turns(node: yaml.Node, path: Path) -> str | list[dict]:
    """The prompt of an example: a text, or messages that take turns and end with the user's."""
    if isinstance(node, yaml.ScalarNode):
        return read_text(node, path, "prompt")
    messages = []
    for item in read_list(node, path, "prompt"):
        keys = read_mapping(item, path, ("role", "content"), "message")
        message = {k: read_text(v, path, k) for k, v in keys.items()}
        if set(message) != {"role", "content"} or message["role"] not in ("user", "assistant", "system"):
            raise InputError(
                f"the message {shorten(message)}",
                where=path,
                line=line_of(item),
                expected="role (system, user or assistant) and content",
            )
        messages.append(message)
    return messages


def phrase(sentence: str) -> dict[str, str]:
    """The three requests for a principle given as one plain sentence."""
    sentence = sentence.strip().rstrip(".")
    if polarity.describes_fault(sentence):  # “What to avoid: lecturing” is nothing to follow
        return {
            "critique": f"Say where the response does what this principle forbids: {sentence}.",
            "revision": f"Rewrite the response so that it does nothing that this principle forbids: {sentence}.",
            "preference": f"Which response does less of what this principle forbids: {sentence}?",
        }
    return {
        "critique": f"Say where the response does not follow this principle: {sentence}.",
        "revision": f"Rewrite the response so that it follows this principle: {sentence}.",
        "preference": f"Which response follows this principle better: {sentence}?",
    }


def phrase_permission(sentence: str) -> dict[str, str]:
    """The three requests for a sentence that permits something, so that neither doing nor leaving it is a fault."""
    sentence = sentence.strip().rstrip(".")
    return {
        "critique": f"Say where the response forbids, or demands, what this principle only permits: {sentence}.",
        "revision": f"Rewrite the response so that it neither forbids nor demands what is only permitted: {sentence}.",
        "preference": f"Which response leaves more open what this principle only permits: {sentence}?",
    }


def json_schema() -> dict:
    """The JSON Schema (draft 2020-12) of a constitution, for editors.

    Leaves out what a schema can't say: that ids differ, and the bounds on size and depth.
    """

    def keys(known: dict[str, str], **kinds) -> dict:
        text = {"type": "string", "pattern": r"\S"}
        return {name: {"description": meaning, **kinds.get(name, text)} for name, meaning in known.items()}

    def some(items: dict) -> dict:
        return {"type": "array", "minItems": 1, "items": items}

    def mapping(properties: dict, **more) -> dict:
        return {"type": "object", "properties": properties, "additionalProperties": False, **more}

    text = {"type": "string", "pattern": r"\S"}
    role = {"enum": ["system", "user", "assistant"]}
    line_range = {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer", "minimum": 1}}
    message = mapping({"role": role, "content": text}, required=["role", "content"])
    refer = {name: {"$ref": f"#/$defs/{name}"} for name in ("example", "principle")}
    example = mapping(
        keys(EXAMPLE_KEYS, prompt={"anyOf": [text, some(message)]}, gold={"enum": ["a", "b"]}),
        anyOf=[{"required": list(form)} for form in EXAMPLES.values()],
    )
    principle = mapping(
        keys(
            PRINCIPLE_KEYS,
            tags=some(text),
            source=mapping(keys(SOURCE_KEYS, lines=line_range), required=list(SOURCE_KEYS)),
            examples=some(refer["example"]),
            weight={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e6},
        ),
        anyOf=[{"required": list(REQUESTS)}, {"required": ["principle"]}],
    )
    principles = {**some({"anyOf": [text, refer["principle"]]}), "maxItems": _MAX_PRINCIPLES}
    duties = {"type": "object", "minProperties": 1, "additionalProperties": text}
    head = mapping(
        keys(TOP_KEYS, duties=duties, principles=principles, examples=some(refer["example"])), required=["principles"]
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A constitution",
        "anyOf": [head, principles],
        "$defs": {"example": example, "principle": principle},
    }


# --- writing ------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Block style, texts of several lines as they are, and never an alias."""

    def ignore_aliases(self, data):
        return True

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)

    def represent_str(self, data):
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(constitution: Constitution) -> str:
    """The file that `load_constitution` reads as this constitution, with its audience in a comment on top.

    Requests that were phrased from a plain sentence are left to be phrased again.
    """
    audience = constitution.audience or constitution.description
    comment = "".join(f"# {line}\n" for line in textwrap.wrap(f"For: {audience}", 108)) if audience else ""
    head = {
        "name": constitution.name,
        "description": constitution.description,
        "for": constitution.audience,
        "source": constitution.source,
        "duties": dict(constitution.duties),
    }
    shared = len(constitution.examples)
    tree = {
        **{key: value for key, value in head.items() if value},
        "principles": [_plain(p, p.examples[: len(p.examples) - shared]) for p in constitution.principles],
        **({"examples": list(constitution.examples)} if shared else {}),
    }
    return comment + yaml.dump(tree, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=110)


def _plain(principle: Principle, examples: tuple[dict, ...]) -> dict:
    phrased = phrase(principle.principle) if principle.principle else {}
    requests = {k: getattr(principle, k) for k in REQUESTS}
    row = {
        "id": principle.id,
        "principle": principle.principle,
        **{k: text for k, text in requests.items() if phrased.get(k) != text},
        "weight": principle.weight if principle.weight != 1 else None,
        "tags": list(principle.tags),
        "source": _plain_source(principle.source) if principle.source else None,
        "examples": list(examples),
    }
    return {key: value for key, value in row.items() if value}


def _plain_source(source: Source) -> dict:
    return {"file": source.file, "lines": list(source.lines), "quote": source.quote}
