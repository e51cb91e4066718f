"""Constitutions: YAML files of principles, read, checked and drawn from.

    load_constitution("harmlessness").draw(seed=0, record_id="p1", round=0).critique

Leaves out judging whether a principle is a good one, and any format but ours.
"""

import difflib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cai.errors import InputError, shorten
from cai.records import hashed_seed
from cai.resources import CONSTITUTIONS, find

_TOP_KEYS = ("name", "description", "for", "source", "principles")
_KEYS = ("id", "principle", "critique", "revision", "preference", "weight", "tags", "examples")
_REQUESTS = ("critique", "revision", "preference")
_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Principle:
    """One principle: a critique request, a revision request and a preference question."""

    id: str
    critique: str
    revision: str
    preference: str
    weight: float = 1.0
    tags: tuple[str, ...] = ()
    examples: tuple = ()


@dataclass(frozen=True)
class Constitution:
    name: str
    path: str
    sha256: str
    principles: tuple[Principle, ...]
    description: str = ""
    _by_id: dict = field(default_factory=dict, repr=False)

    def draw(self, seed: int, record_id: str, round: int) -> Principle:
        """The principle for a record and round: at random by weight (paper, section 3.1), but by
        hashing, so that neither the order of the rows nor a resume changes it."""
        total = sum(p.weight for p in self.principles)
        # 53 bits: what a float holds exactly
        point = (hashed_seed("principle", seed, record_id, round) >> 10) / 2**53 * total
        for principle in self.principles:
            point -= principle.weight
            if point < 0:
                return principle
        return self.principles[-1]

    def __getitem__(self, id: str) -> Principle:
        return self._by_id[id]

    def __contains__(self, id: str) -> bool:
        return id in self._by_id


def load_constitution(name_or_path: str) -> Constitution:
    """Read and check a constitution: a file, or the name of one in constitutions/.

    Raises InputError (file, line, value, remedy) for anything that the schema does not know.
    """
    path = find(name_or_path, CONSTITUTIONS, ".yaml")
    raw = path.read_bytes()
    if len(raw) > _MAX_BYTES:
        raise InputError(f"{len(raw)} bytes", where=path, expected=f"at most {_MAX_BYTES}")
    tree = _parse(raw, path)
    if isinstance(tree.value, list) and isinstance(tree, yaml.SequenceNode):
        head, items = {}, tree
    else:
        head = _mapping(tree, path, _TOP_KEYS, "constitution")
        if "principles" not in head:
            raise InputError("no `principles`", where=path, line=1, remedy="Add a list of principles")
        items = head["principles"]
    if not isinstance(items, yaml.SequenceNode) or not items.value:
        raise InputError(
            "`principles` is not a list with entries",
            where=path,
            line=_line(items),
            expected="a list of principles, or of plain sentences",
        )
    principles, by_id = [], {}
    for number, node in enumerate(items.value, 1):
        principle = _principle(node, number, path)
        if principle.id in by_id:
            raise InputError(
                f"two principles with id {principle.id!r}", where=path, line=_line(node), remedy="Give each its own id"
            )
        by_id[principle.id] = principle
        principles.append(principle)
    text = {k: _scalar(head[k], path, k) for k in ("name", "description") if k in head}
    return Constitution(
        name=text.get("name", Path(path).stem),
        path=str(path),
        sha256=hashlib.sha256(raw).hexdigest(),
        principles=tuple(principles),
        description=text.get("description", ""),
        _by_id=by_id,
    )


def _parse(raw: bytes, path: Path) -> yaml.Node:
    try:
        text = raw.decode("utf-8-sig")
        # Aliases are what YAML bombs and cycles are made of, and no constitution needs one.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError(
                    f"a YAML alias (*{event.anchor})",
                    where=path,
                    line=event.start_mark.line + 1,
                    remedy="Write the text out",
                )
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            f"not YAML: {getattr(error, 'problem', error)}",
            where=path,
            line=mark.line + 1 if mark else None,
            remedy="Quote text that has a colon",
        ) from None
    except RecursionError:
        raise InputError("nested too deeply", where=path) from None
    if tree is None:
        raise InputError("an empty file", where=path, expected="a list of principles")
    return tree


def _principle(node: yaml.Node, number: int, path: Path) -> Principle:
    if isinstance(node, yaml.ScalarNode):
        sentence = _scalar(node, path, "principle")
        return Principle(id=f"principle-{number}", **phrase(sentence))
    keys = _mapping(node, path, _KEYS, "principle")
    texts = {k: _scalar(keys[k], path, k) for k in ("principle", *_REQUESTS) if k in keys}
    if "principle" in texts:
        texts = {**phrase(texts["principle"]), **texts}
    for name in _REQUESTS:
        if name not in texts:
            raise InputError(
                f"principle {number} has no `{name}`",
                where=path,
                line=_line(node),
                expected="critique, revision and preference, or `principle`: one sentence",
            )
    identity = _scalar(keys["id"], path, "id") if "id" in keys else f"principle-{number}"
    plain = {
        k: yaml.SafeLoader("").construct_object(keys[k], deep=True) for k in ("weight", "tags", "examples") if k in keys
    }
    weight = plain.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
        raise InputError(
            f"weight {shorten(weight)!r}", where=path, line=_line(keys["weight"]), expected="a number above 0"
        )
    for name in ("tags", "examples"):
        if not isinstance(plain.get(name, []), list):
            raise InputError(
                f"`{name}` is {shorten(plain[name])!r}", where=path, line=_line(keys[name]), expected="a list"
            )
    return Principle(
        id=identity,
        critique=texts["critique"],
        revision=texts["revision"],
        preference=texts["preference"],
        weight=float(weight),
        tags=tuple(plain.get("tags", ())),
        examples=tuple(plain.get("examples", ())),
    )


def phrase(sentence: str) -> dict[str, str]:
    """The three requests for a principle given as one plain sentence."""
    sentence = sentence.strip().rstrip(".")
    return {
        "critique": f"Say where the response does not follow this principle: {sentence}.",
        "revision": f"Rewrite the response so that it follows this principle: {sentence}.",
        "preference": f"Which response follows this principle better: {sentence}?",
    }


def _mapping(node: yaml.Node, path: Path, known: tuple[str, ...], what: str) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise InputError(
            f"a {what} that is no mapping", where=path, line=_line(node), expected=f"keys out of: {', '.join(known)}"
        )
    result = {}
    for key, value in node.value:
        name = str(key.value)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"unknown key {shorten(name)!r} in a {what}",
                where=path,
                line=_line(key),
                expected=f"one of: {', '.join(known)}",
                remedy=f"Did you mean {near[0]!r}?" if near else "Remove it",
            )
        if name in result:
            raise InputError(f"key {name!r} twice in one {what}", where=path, line=_line(key))
        result[name] = value
    return result


def _scalar(node: yaml.Node, path: Path, name: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not str(node.value).strip():
        raise InputError(f"`{name}` is empty or not a text", where=path, line=_line(node), expected="a sentence")
    return " ".join(str(node.value).split())


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
