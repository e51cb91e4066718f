"""Constitutions in other formats: read into ours, and written back without losing a word.

    constitution = read_foreign(["CritiqueRevisionInstructions.json", "RLMadisonInstructions.json"], name="paper")

Known are the paper's prompt files (arXiv 2212.08073; its repository ConstitutionalHarmlessnessPaper), the JSON of
Hugging Face's llm-swarm, and lists of sentences in Markdown, plain text or JSON. A file is known by what is in it.
Leaves out formats that mix principles with other matter: make a list of them first.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from cai.base.errors import InputError, shorten
from cai.constitution.files import REQUESTS, Constitution, Principle, phrase
from cai.data.readers import doubled

# A preference question that was not in the file but made from the revision request carries this tag.
PHRASED = "phrased-preference"

_MAX_BYTES = 5_000_000

CRITIQUES, PREFERENCES = "CritiqueRevisionInstructions.json", "RLMadisonInstructions.json"

ROUNDS, PAIRS = "CritiqueRevisionFewShotPrompts.json", "RLMadisonFewShotPrompts.json"

REASONED = "RLMadisonPrecogFewShotPrompts.json"

_LABELS = re.compile(r"\n\n(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):")

_ROUND = ["CritiqueRequest", "Critique", "RevisionRequest", "Revision"]

_COMPARISON = re.compile(
    r"\s*Human: Consider the following conversation between a human(?: \(H\))? and an assistant(?: \(A\))?:"
    r"\s*\n\n(?=H:)"
)

# What stands between the parts of a comparison, in this order.
_BETWEEN = ("\n\n{}\n (A) [[[", "]]]\n (B) [[[", "]]]\n\nAssistant: Let's think step by step:")

_GOLD = re.compile(r"\s*So the answer is: \((A|B)\)\s*")

_SPEAKERS = {"Human": "user", "Assistant": "assistant", "H": "user", "A": "assistant"}


def read_foreign(paths: Iterable[str], name: str) -> Constitution:
    """One constitution of all the files together.

    The paper's preference questions are paired with its critiques by place. That is not in the paper, and
    changes nothing: each is drawn by itself. Where there are none, the question is phrased from the revision
    request, and the principle tagged `PHRASED`.

    Raises InputError, naming the file and the item, for what is in none of the formats, and if a word of a file
    would not be found again in what `write_foreign` makes of the result.
    """
    parts = _Parts()
    paths = [Path(path) for path in paths]
    for path in paths:
        parts.read(path)
    constitution = parts.constitution(name, "Imported from " + ", ".join(path.name for path in paths))
    for path, (kind, texts) in parts.texts.items():
        lost = _words(texts) - _words(_strings(list(write_foreign(constitution, kind)[0].values())))
        if lost:
            found = f"{sum(lost.values())} words would be lost, such as {shorten(' '.join(lost))!r}"
            raise InputError(
                found, where=path, remedy="Please report this file's format; meanwhile import it as a plain list"
            )
    return constitution


def write_foreign(constitution: Constitution, kind: str) -> tuple[dict[str, object], dict[str, int]]:
    """({file name: its content, a text or what is written as JSON}, {what the format can't hold: how often}).

    Args:
        kind: paper, llm-swarm or markdown.
    """
    rounds = [one for one in _all_examples(constitution) if "critique" in one]
    pairs = [one for one in _all_examples(constitution) if "critique" not in one]
    left: Counter = Counter()
    left["weights"] = sum(p.weight != 1 for p in constitution.principles)
    left["duties"] = len(constitution.duties)
    if kind == "markdown":
        left["requests"] = sum(
            getattr(p, k) != v for p in constitution.principles if p.principle for k, v in phrase(p.principle).items()
        )
        left["examples"] = len(rounds) + len(pairs)
        return {f"{_file_name(constitution.name)}.md": _markdown(constitution)}, +left
    left["tags"] = sum(len(set(p.tags) - {PHRASED}) for p in constitution.principles)
    whole = [one for one in rounds if {"critique_request", "revision_request", "revision"} <= set(one)]
    left["examples"] = len(rounds) - len(whole)
    if kind == "llm-swarm":
        left["preferences"] = sum(PHRASED not in p.tags for p in constitution.principles)
        left["examples"] += len(pairs)
        listed = [{"critic": p.critique, "revision": p.revision} for p in constitution.principles]
        chats = [[*_talk(one["prompt"]), *_swarm(one)] for one in whole]
        return {f"{_file_name(constitution.name)}.json": {"constitutions": listed, "system_chat": chats}}, +left
    reasoned = [one for one in pairs if "reasoning" in one]
    files = {
        CRITIQUES: {
            p.id: {
                "prompt": [f"\n\nCritiqueRequest: {p.critique}\n\nCritique:"],
                "edit_request": f"\n\nRevisionRequest: {p.revision}\n\nRevision:",
            }
            for p in constitution.principles
        },
        PREFERENCES: [f"\n{p.preference} Options:" for p in constitution.principles if PHRASED not in p.tags],
        ROUNDS: [_round_text(one) for one in whole],
        PAIRS: [_pair(one) for one in pairs if "reasoning" not in one],
        REASONED: [{"prompt": _comparison_text(one)} for one in reasoned],
    }
    return {name: content for name, content in files.items() if content}, +left


def _file_name(name: str) -> str:
    """A name out of a constitution as that of a file in the folder it is written to, and nowhere else."""
    return re.sub(r"[^\w. -]", "-", name).lstrip(". -")[:100] or "constitution"


# --- reading ------------------------------------------------------------------------------------------------


class _Parts:
    """What has been read: parts of principles and examples, and every text with the format it came in."""

    def __init__(self):
        self.requests: list[tuple[str, str, str]] = []  # id, critique, revision
        self.questions: list[str] = []
        self.sentences: list[tuple[str, tuple[str, ...]]] = []  # sentence, tags
        self.examples: list[dict] = []
        self.description = ""
        self.texts: dict[Path, tuple[str, list[str]]] = {}

    def read(self, path: Path) -> None:
        text = _read_text(path)
        if path.suffix == ".json":
            tree = _read_json(text, path)
            kind = self._read_json(tree, path)
            texts = list(_strings(tree if kind == "paper" else [tree]))
        elif path.suffix in (".md", ".markdown", ".txt"):
            kind, texts = "markdown", [self._read_list(text, path)]
        else:
            raise InputError(
                f"unknown kind of file: {path.suffix or 'no suffix'!r}",
                where=path,
                expected=".json, .md or .txt",
                remedy="A constitution in YAML is read as it is",
            )
        self.texts[path] = (kind, texts)

    def _read_json(self, tree, path: Path) -> str:
        """Add what the tree holds; returns the format."""
        if isinstance(tree, dict) and "constitutions" in tree:
            for number, one in enumerate(_items(tree["constitutions"], path, "constitutions"), 1):
                critique, revision = _fields(one, ("critic", "revision"), path, f"constitutions, item {number}")
                self.requests.append((f"principle-{len(self.requests) + 1}", critique, revision))
            chats = tree.get("system_chat") or []
            if not isinstance(chats, list):
                raise _unknown(chats, path, "system_chat", expected="a list of conversations")
            for number, chat in enumerate(chats, 1):
                self.examples.append(_from_chat(chat, path, f"system_chat, item {number}"))
            if more := set(tree) - {"constitutions", "system_chat"}:
                raise InputError(
                    f"unknown key {shorten(min(more))!r}", where=path, expected="constitutions, system_chat"
                )
            return "llm-swarm"
        if isinstance(tree, dict) and tree:
            for key, one in tree.items():
                prompt, edit = _fields(one, ("prompt", "edit_request"), path, f"key {key!r}")
                self.requests.append(
                    (
                        key,
                        _without(prompt, "CritiqueRequest:", "Critique:"),
                        _without(edit, "RevisionRequest:", "Revision:"),
                    )
                )
            return "paper"
        for number, one in enumerate(_items(tree, path, "the file"), 1):
            self._read_item(one, path, f"item {number}")
        return "markdown" if self.sentences else "paper"

    def _read_item(self, one, path: Path, place: str) -> None:
        if isinstance(one, dict) and "corrects" in one:
            prompt, chosen, rejected = _fields(one, ("prompt", "corrects", "incorrects"), path, place)
            turns = _turns(prompt, path, place)
            if turns and turns[-1] == {"role": "assistant", "content": ""}:
                turns.pop()
            self.examples.append({"prompt": _plain_prompt(turns), "chosen": chosen, "rejected": rejected})
        elif isinstance(one, dict):
            (prompt,) = _fields(one, ("prompt",), path, place)
            self.examples.append(_from_comparison(prompt, path, place))
        elif not isinstance(one, str) or not one.strip():
            raise _unknown(one, path, place)
        elif "\n\nCritiqueRequest:" in one:
            self.examples.append(_from_round(one, path, place))
        elif one.rstrip().endswith("Options:"):
            self.questions.append(" ".join(one.rstrip().removesuffix("Options:").split()))
        else:
            self.sentences.append((" ".join(one.split()), ()))

    def _read_list(self, text: str, path: Path) -> str:
        """Add the items of a Markdown list, or the lines of a text that has none; returns all the words.

        Headings below the first become tags, and other text the description.
        """
        lines, heading, headings, said = text.splitlines(), None, [], []
        bullet = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s+(.*)")
        listed, found, title = any(bullet.match(line) for line in lines), [], ""
        before = ""
        for line in lines:
            item = bullet.match(line)
            if mark := re.match(r"\s{0,3}#+", line):
                words = line[mark.end() :].strip().rstrip("#").rstrip()
                if title:
                    heading = words
                    headings.append(heading)
                title = title or words
            elif item or (not listed and line.strip()):
                found.append((item[1] if item else line.strip(), (heading,) if heading else ()))
            elif line.strip() and found and line[:1].isspace() and before.strip():
                found[-1] = (f"{found[-1][0]} {line.strip()}", found[-1][1])
            elif line.strip():
                said.append(line.strip())
            before = line
        found = [(_unmarked(sentence), tags) for sentence, tags in found if _unmarked(sentence)]
        if not found:
            raise InputError(
                "no list in it, and no lines", where=path, expected="one principle a line, or a Markdown list"
            )
        self.sentences += found
        used = {tag for _, tags in found for tag in tags}
        said = [title, *(one for one in headings if one not in used), *said]
        self.description = " ".join(filter(None, [self.description, *map(_unmarked, said)]))
        return " ".join([*map(_unmarked, said), *used, *(sentence for sentence, _ in found)])

    def constitution(self, name: str, source: str) -> Constitution:
        where = ", ".join(path.name for path in self.texts)
        if self.questions and len(self.questions) != len(self.requests):
            raise InputError(
                f"{len(self.questions)} preference questions and {len(self.requests)} critique requests",
                where=where,
                expected="as many of both",
                remedy=f"Give {CRITIQUES} and {PREFERENCES} together",
            )
        questions = self.questions or [None] * len(self.requests)
        principles = [
            Principle(
                id,
                critique,
                revision,
                question or phrase_preference(revision),
                tags=() if question else (PHRASED,),
                examples=tuple(self.examples),
            )
            for (id, critique, revision), question in zip(self.requests, questions, strict=True)
        ]
        for number, (sentence, tags) in enumerate(self.sentences, len(principles) + 1):
            principles.append(
                Principle(
                    f"principle-{number}",
                    **phrase(sentence),
                    tags=tags,
                    principle=sentence,
                    examples=tuple(self.examples),
                )
            )
        if not principles:
            raise InputError("examples, and no principles", where=where, remedy=f"Give {CRITIQUES} with them")
        doubled = [id for id, times in Counter(p.id for p in principles).items() if times > 1]
        if doubled:
            raise InputError(f"the principle {doubled[0]!r} in two files", where=where, remedy="Import them one by one")
        return Constitution(
            name, "", "", tuple(principles), description=self.description, source=source, examples=tuple(self.examples)
        )


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
    def once(pairs):
        if (key := doubled(key for key, _ in pairs)) is not None:
            raise InputError(f"the key {shorten(key)!r} twice", where=path, remedy="Rename one of the two")
        return dict(pairs)

    try:
        tree = json.loads(text, object_pairs_hook=once)
        json.dumps(tree, ensure_ascii=False).encode()
        return tree
    except UnicodeEncodeError:
        raise InputError("half a surrogate pair in the text", where=path, expected="valid Unicode") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise InputError(f"not JSON ({shorten(error)})", where=path, line=line) from None


def _items(tree, path: Path, place: str) -> list:
    if not isinstance(tree, list) or not tree:
        raise _unknown(tree, path, place)
    return tree


def _fields(one, names: tuple[str, ...], path: Path, place: str) -> list[str]:
    """The texts of the fields; one that is a list of one text is that text."""
    if not isinstance(one, dict) or set(one) != set(names):
        raise _unknown(one, path, place, expected=f"an object with {', '.join(names)}")
    values = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in map(one.get, names)]
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise _unknown(one, path, place, expected=f"one text in each of {', '.join(names)}")
    return values


def _unknown(one, path: Path, place: str, expected: str = "one of the known formats") -> InputError:
    return InputError(
        f"{place} is {shorten(json.dumps(one, ensure_ascii=False))}",
        where=path,
        expected=expected,
        remedy="references/data-formats.md shows what is read",
    )


def _without(text: str, before: str, after: str) -> str:
    return " ".join(text.strip().removeprefix(before).removesuffix(after).split())


def _unmarked(text: str) -> str:
    """Without Markdown's emphasis, which is no part of the words."""
    return " ".join(re.sub(r"\*\*|__|`", "", text).split())


def _turns(text: str, path: Path, place: str, labels: re.Pattern = _LABELS) -> list[dict]:
    """(role, content) of each turn of a transcript."""
    parts = labels.split("\n\n" + text.strip())[1:]
    turns = [
        {"role": _SPEAKERS.get(speaker, speaker), "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    wanted = ["user", "assistant"] * len(turns)
    if not turns or any(turn["role"] != role for turn, role in zip(turns, wanted, strict=False)):
        raise _unknown(text, path, place, expected="a transcript of Human and Assistant in turn")
    return turns


def _plain_prompt(turns: list[dict]) -> str | list[dict]:
    return turns[0]["content"] if len(turns) == 1 else turns


def _from_round(text: str, path: Path, place: str) -> dict:
    """A worked round of the paper: a conversation, then critique and revision with their requests."""
    parts = _LABELS.split("\n\n" + text.strip())[1:]
    labels, said = parts[::2], [part.strip() for part in parts[1::2]]
    if labels and labels[-1] == "Human" and not said[-1]:  # the next example would begin here
        labels, said = labels[:-1], said[:-1]
    talk = labels[:-4]
    if labels[-4:] != _ROUND or talk != ["Human", "Assistant"] * (len(talk) // 2) or not talk:
        raise _unknown(text, path, place, expected="Human, Assistant, then " + ", ".join(_ROUND))
    return _round(said, [_SPEAKERS[label] for label in talk])


def _from_chat(chat, path: Path, place: str) -> dict:
    """A worked round of llm-swarm: the same as messages."""
    messages = _items(chat, path, place)
    said = [_fields(one, ("role", "content"), path, place) for one in messages]
    if len(said) < 6 or [role for role, _ in said] != ["user", "assistant"] * (len(said) // 2):
        raise _unknown(chat, path, place, expected="six messages or more, user and assistant in turn")
    return _round([content for _, content in said], [role for role, _ in said[:-4]])


def _round(said: list[str], roles: list[str]) -> dict:
    *talk, asked, critique, wanted, revision = said
    turns = [{"role": role, "content": content} for role, content in zip(roles, talk, strict=True)]
    return {
        "prompt": _plain_prompt(turns[:-1]),
        "response": talk[-1],
        "critique_request": asked,
        "critique": critique,
        "revision_request": wanted,
        "revision": revision,
    }


def _from_comparison(text: str, path: Path, place: str) -> dict:
    """A worked comparison of the paper, with reasoning."""
    begins = _COMPARISON.match(text)
    parts, rest = [], text[begins.end() :] if begins else ""
    for mark in _BETWEEN:  # one after the other: a pattern of them all takes time with a power of the length
        part, _, rest = rest.partition(mark)
        parts.append(part)
    reasoning, _, last = rest.rpartition("\n\nHuman:")
    gold = _GOLD.fullmatch(last)
    if not gold:
        raise _unknown(text, path, place, expected="a conversation, (A) [[[…]]], (B) [[[…]]], reasoning, an answer")
    turns = _turns(parts[0], path, place, re.compile(r"\n\n(H|A):"))
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
    own = len(constitution.examples)
    return [
        *(one for p in constitution.principles for one in p.examples[: len(p.examples) - own]),
        *constitution.examples,
    ]


def _talk(prompt: str | list[dict]) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _swarm(one: dict) -> list[dict]:
    names = ("response", "critique_request", "critique", "revision_request", "revision")
    roles = ("assistant", "user") * 3
    return [{"role": role, "content": one[name]} for role, name in zip(roles, names, strict=False)]


def _transcript(prompt: str | list[dict], names: tuple[str, str] = ("Human", "Assistant")) -> str:
    return "\n\n".join(f"{names[turn['role'] == 'assistant']}: {turn['content']}" for turn in _talk(prompt))


def _round_text(one: dict) -> str:
    said = (one["response"], one["critique_request"], one["critique"], one["revision_request"], one["revision"])
    parts = [f"{label}: {text}" for label, text in zip(("Assistant", *_ROUND), said, strict=True)]
    return "\n\n" + "\n\n".join([_transcript(one["prompt"]), *parts, "Human:"])


def _pair(one: dict) -> dict:
    chosen, rejected = one.get("chosen"), one.get("rejected")
    if chosen is None:
        chosen, rejected = (one[f"response_{side}"] for side in ("ab" if one["gold"] == "a" else "ba"))
    return {"prompt": f"\n\n{_transcript(one['prompt'])}\n\nAssistant:", "corrects": [chosen], "incorrects": [rejected]}


def _comparison_text(one: dict) -> str:
    a, b = one.get("response_a", one.get("chosen")), one.get("response_b", one.get("rejected"))
    return (
        "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):\n\n"
        f"{_transcript(one['prompt'], ('H', 'A'))}\n\n{{}}\n (A) [[[{a}]]]\n (B) [[[{b}]]]\n\n"
        f"Assistant: Let's think step by step: {one['reasoning']}\n\n"
        f"Human:\nSo the answer is: ({one.get('gold', 'a').upper()})"
    )


def _markdown(constitution: Constitution) -> str:
    """A title, the description, and a list; tags that the next principle has too stand above it as headings."""
    lines, heading = [f"# {constitution.name}", ""], ()
    if constitution.description:
        lines += [constitution.description, ""]
    for principle in constitution.principles:
        if principle.tags != heading and principle.tags:
            lines += ["", f"## {', '.join(principle.tags)}", ""]
        heading = principle.tags
        said = principle.principle or " ".join(getattr(principle, name) for name in REQUESTS)
        lines.append(f"- {said}")
    return "\n".join(lines) + "\n"


# --- words --------------------------------------------------------------------------------------------------


def _strings(tree) -> Iterator[str]:
    """All texts in a tree, keys that are the principles' names included."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _strings(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _strings(value)


def _words(texts: Iterable[str]) -> Counter:
    return Counter(word for text in texts for word in re.findall(r"\w+", text))
