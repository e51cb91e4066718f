"""Constitutions as output: findings and principles as JSON or text, and files that are checked before they are kept.

    save_constitution("kitchen.yaml", compose("kitchen", ["Never play down an allergy"], bases), overwrite=False)

Leaves out what a finding is (lint.py), and other formats (importing.py).
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cai.base import cli, files
from cai.base.errors import InputError, shorten
from cai.constitution import lint
from cai.constitution.files import Constitution, Principle, load_constitution, move_sources, phrase, to_yaml
from cai.constitution.prose import PERHAPS


def check_all(names: Sequence[str]) -> dict:
    """{ok, constitutions, principles, findings, not_judged}; what can't be read is a finding with the rule `schema`."""
    findings, count = [], 0
    for name in names:
        problems: list[InputError] = []
        constitution = None
        try:
            constitution = load_constitution(name, problems)
        except InputError as error:
            problems.append(error)
        findings += [{"rule": "schema", "message": str(problem)} for problem in problems]
        if constitution:
            count += len(constitution.principles)
            if not lint.is_english(constitution):
                cli.warn(f"{name}: apparently not in English: only sentences that are identical are found")
            findings += [{"file": constitution.path, **asdict(finding)} for finding in lint.lint(constitution)]
    summary = {"ok": not findings, "constitutions": len(names), "principles": count}
    return {**summary, "findings": findings, "not_judged": lint.NOT_JUDGED}


def findings_as_text(report: dict) -> str:
    """What `check_all` returned, one line per finding."""
    lines = []
    for finding in report["findings"]:
        where = f"{finding['file']}:{finding['line']}: " if "file" in finding else ""
        remedy = f". {finding['remedy']}" if "remedy" in finding else ""
        lines.append(f"{where}{finding['rule']}: {finding['message']}{remedy}")
    counts = f"{len(lines)} findings in {report['principles']} principles of {report['constitutions']} constitutions"
    return "\n".join([*lines, counts, f"not judged: {'; '.join(report['not_judged'])}"])


def select(constitution: Constitution, ids: Sequence[str]) -> list[Principle]:
    """The principles with these ids, or all of them if none is named. InputError for an id that it does not have."""
    for id_ in ids:
        if id_ not in constitution:
            raise InputError(
                f"no principle {id_!r}",
                where=constitution.path,
                expected=f"one of: {', '.join(principle.id for principle in constitution.principles)}",
            )
    return [principle for principle in constitution.principles if not ids or principle.id in ids]


def describe(constitution: Constitution, ids: Sequence[str]) -> dict:
    """What the constitution is for, and the selected principles with the probability that each is drawn."""
    total = sum(principle.weight for principle in constitution.principles)
    return {
        "name": constitution.name,
        "file": constitution.path,
        "description": constitution.description,
        "for": constitution.audience,
        "source": constitution.source,
        "duties": constitution.duties,
        "principles": [
            {
                "id": principle.id,
                "drawn": principle.weight / total,
                "critique": principle.critique,
                "revision": principle.revision,
                "preference": principle.preference,
                "tags": principle.tags,
                "source": asdict(principle.source) if principle.source else None,
                "examples": principle.examples,
            }
            for principle in select(constitution, ids)
        ],
    }


def description_as_text(description: dict) -> str:
    """What `describe` returned, as lines."""
    head = ("name", "file", "description", "for", "source")
    lines = [f"{name}: {description[name]}" for name in head if description[name]]
    lines += [f"  duty {duty}: {text}" for duty, text in description["duties"].items()]
    for principle in description["principles"]:
        tags = f"  [{', '.join(principle['tags'])}]" if principle["tags"] else ""
        lines.append(f"\n{principle['id']}  ({principle['drawn']:.1%} of draws){tags}")
        lines += [f"  {name}: {principle[name]}" for name in ("critique", "revision", "preference")]
        if source := principle["source"]:
            lines.append(f"  source: {source['file']}:{source['lines'][0]}: {source['quote']}")
        lines += [f"  examples: {len(principle['examples'])}"] if principle["examples"] else []
    return "\n".join(lines)


def compose(
    name: str, sentences: Sequence[str], bases: Sequence[Constitution], description: str = "", audience: str = ""
) -> Constitution:
    """A constitution of the principles of the bases, and of one principle per sentence, phrased from it.

    Raises InputError without any principle, or for an empty sentence.
    """
    if not sentences and not bases:
        raise InputError("no principles", expected="--sentence or --base, or both")
    if not all(sentence.strip() for sentence in sentences):
        raise InputError("an empty sentence", where="--sentence", expected="a principle in one sentence")
    principles = [item for base in bases for item in move_sources(base.principles, Path(base.path).parent, ".")]
    known = {principle.id for principle in principles}
    free = (f"principle-{n}" for n in range(1, len(known) + len(sentences) + 1) if f"principle-{n}" not in known)
    principles += [Principle(id_, **phrase(sentence)) for id_, sentence in zip(free, sentences, strict=False)]
    source = f"principles of {', '.join(base.name for base in bases)}" if bases else ""
    duties = {duty: text for base in bases for duty, text in base.duties.items()}
    return Constitution(name, "", "", tuple(principles), description, audience, source, duties)


KINDS = ("demand", "prohibition", "permission", "preference", "unclear")


def report_losses(report: dict, keep_unclear: bool, as_json: bool) -> dict:
    """Print on stderr how documents were read, and what `importing.read_foreign` reported as left out or unclear, one
    line each; returns the entries of the summary: counts, or with `as_json` the lists themselves, and `failed` if a
    sentence is missing."""
    for document in report["outline"]:
        kinds = Counter(item["kind"] for section in document["sections"] for item in section["sentences"])
        counts = ", ".join(f"{kinds[kind]} {kind or 'left out'}" for kind in (*KINDS, "") if kinds[kind])
        reasons = [item.get("reason") for section in document["sections"] for item in section["sentences"]]
        counts += f", of which {count} are perhaps rules" if (count := reasons.count(PERHAPS)) else ""
        cli.note(f"{document['file']}: read as {document['read_as']}: {counts}")
    report = {name: entries for name, entries in report.items() if name != "outline"}
    for part in report["left_out"]:
        cli.note(f"{part['file']}:{part['line']}: left out ({part['reason']}): {shorten(part['text'])}")
    remedy = (
        "kept as it is" if keep_unclear else "left out: begin with “Do” or “Never”, or introduce the list with either"
    )
    for sentence in report["unclear"]:
        problem = f"unclear whether it demands or prohibits: {shorten(sentence['text'])!r}; {remedy}"
        cli.warn(f"{sentence['file']}:{sentence['line']}: {problem}")
    entries = report if as_json else {name: len(report[name]) for name in ("unclear", "left_out")}
    return {**entries, "failed": len(report["unclear"])} if report["unclear"] and not keep_unclear else entries


def check_free(path: str | Path, overwrite: bool) -> None:
    """InputError if there is a file that must not be replaced."""
    if Path(path).exists() and not overwrite:
        raise InputError("it exists", where=path, remedy="Name another --output, or replace it with --overwrite")


def save(path: str | Path, text: str, overwrite: bool) -> None:
    """Write the text whole or not at all."""
    check_free(path, overwrite)
    try:
        files.write_text(path, text)
    except OSError as error:
        raise InputError(f"cannot write ({error})", where=path, remedy="Check --output") from error


def save_all(folder: Path, contents: Mapping[str, Any], overwrite: bool) -> list[str]:
    """Write {name: text, or an object for JSON} into the folder, none if one of them exists; returns the paths."""
    for name in contents:
        check_free(folder / name, overwrite)
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        save(folder / name, text, overwrite)
    return [str(folder / name) for name in contents]


def save_constitution(path: str | Path, constitution: Constitution, overwrite: bool) -> None:
    """Write a constitution, once it has been read back as the same; the paths of its sources become relative to it."""
    check_free(path, overwrite)
    constitution = _move(constitution, path)
    draft = Path(f"{path}.draft")
    save(draft, to_yaml(constitution), overwrite=True)
    try:
        copy = load_constitution(str(draft))
        if (copy.principles, copy.examples) != (constitution.principles, constitution.examples):
            raise InputError(
                "the file would not hold the same principles", where=path, remedy="Please report what it was made from"
            )
        os.replace(draft, path)
    except InputError as error:
        raise InputError(str(error).replace(f"{draft}:", f"{path}:").rstrip(".")) from error
    finally:
        draft.unlink(missing_ok=True)


def _move(constitution: Constitution, path: str | Path) -> Constitution:
    """The constitution as it is written at `path`: with the paths of its sources relative to that folder."""
    moved = move_sources(constitution.principles, Path(constitution.path).parent, Path(path).parent)
    return replace(constitution, principles=moved)


def save_unless_same(path: str | Path, constitution: Constitution, overwrite: bool) -> None:
    """`save_constitution`, except that a file which has this very content already is left as it is."""
    text = to_yaml(_move(constitution, path))
    if not (Path(path).is_file() and Path(path).read_bytes() == text.encode()):
        save_constitution(path, constitution, overwrite)
