"""Requests phrased by a model for principles that are plain sentences: critique, revision and preference.

    derivation = Derivation(options)
    rows = derivation.write(outputs.Output("derived.answers.jsonl", command="derive", fingerprint=derivation.settings))
    constitution = derivation.compose(rows)

An answer counts only if its form is right, the lint finds nothing, and all three requests go in the direction of the
sentence (constitution/direction.py). Otherwise the principle keeps the requests that are phrased from its sentence,
and carries the tag `UNDERIVED`. The sentence itself is never changed.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

from cai.authoring import asking
from cai.base import cli, hashing
from cai.base.errors import InputError
from cai.constitution import direction, lint, polarity, rendering, templates
from cai.constitution.files import REQUESTS, Constitution, Principle, load_constitution, phrase
from cai.data import outputs
from cai.evaluate import measurement
from cai.models import loading
from cai.models.engine import Engine, Message

UNDERIVED = "underived"

# Tags of sentences whose direction is not that of a demand or a prohibition: their requests are left as they are.
_NO_DIRECTION = ("permission", "unclear")

MOST_CHARACTERS = 400

_LINE = re.compile(r"[*_]*(critique|revision|preference)[*_]*:[*_]*\s*(\S.*)", re.IGNORECASE)


class Derivation:
    """The principles to be phrased, and what decides the answers. Made without loading a model.

    Raises InputError if no principle of the constitution is a plain sentence.
    """

    def __init__(self, options: SimpleNamespace):
        loading.check_model(options.model)
        self.options, self.constitution = options, load_constitution(options.constitution)
        self.template = templates.load_template("derive")
        selected = rendering.select(self.constitution, options.principles)
        self.principles = {principle.id: principle for principle in selected if is_plain(principle)}
        if not self.principles:
            raise InputError(
                "no principle that is a plain sentence without requests of its own",
                where=self.constitution.path,
                expected="`principle: SENTENCE`, as constitution.py import and new write it",
            )
        self.settings = {
            "model": options.model,
            "weights": hashing.identity(options.model),
            "constitution": self.constitution.sha256,
            "principles": list(self.principles),
            "template": self.template.sha256,
            **asdict(options.sampling),
            "tries": options.tries,
            "seed": options.seed,
            "dtype": options.dtype,
        }

    def plan(self, journal: outputs.Output) -> dict:
        """What `--dry-run` reports."""
        done = len(self.principles) if journal.complete else len(journal.done)
        calls = len(self.principles) - done
        return {"principles": len(self.constitution.principles), "done": done, "model_calls_at_least": calls}

    def write(self, journal: outputs.Output) -> list[dict]:
        """Write one row {id, principle, critique, revision, preference, problems} per principle (resumable).

        The requests are None where no answer could be used; `problems` says why each was refused.
        """
        options = self.options
        return measurement.fill(
            journal,
            list(self.principles),
            "derive",
            partial(loading.load_engine, options.model, endpoints=options.endpoints, **options.loading),
            lambda engine: self._rows(engine, [id_ for id_ in self.principles if id_ not in journal.done]),
            count,
        )

    def _rows(self, engine: Engine, ids: Sequence[str]) -> Iterator[dict]:
        unsure = {id_: problem for id_ in ids if (problem := find_doubt(self.principles[id_]))}
        for id_, problem in unsure.items():
            yield self._row(asking.Answer(id_, problems=[problem]))
        options = self.options
        answers = asking.ask(
            engine,
            [id_ for id_ in ids if id_ not in unsure],
            self._render,
            lambda id_, text: read_requests(self.principles[id_], text),
            options.sampling,
            seed=("derive", options.seed),
            tries=options.tries,
        )
        yield from map(self._row, answers)

    def _render(self, id_: str, problem: str) -> list[Message]:
        return self.template.render(sentence=self.principles[id_].principle, problem=problem)

    def _row(self, answer: asking.Answer) -> dict:
        requests = answer.value or dict.fromkeys(REQUESTS)
        sentence = self.principles[answer.key].principle
        return {"id": answer.key, "principle": sentence, **requests, "problems": answer.problems}

    def compose(self, rows: Iterable[dict]) -> Constitution:
        """The constitution with the requests of the rows, and the tag `UNDERIVED` where there are none."""
        by_id = {row["id"]: row for row in rows}
        principles = [
            derive(principle, by_id[principle.id]) if principle.id in by_id else principle
            for principle in self.constitution.principles
        ]
        return replace(self.constitution, principles=tuple(principles))


def is_plain(principle: Principle) -> bool:
    """Whether all requests of the principle are phrased from its sentence."""
    return bool(principle.principle) and phrase(principle.principle) == {
        name: getattr(principle, name) for name in REQUESTS
    }


def find_doubt(principle: Principle) -> str | None:
    """Why no model is asked about a principle: its direction is not known, so no answer could be checked."""
    if tags := [tag for tag in principle.tags if tag in _NO_DIRECTION]:
        return f"tagged {tags[0]}: no demand and no prohibition"
    if polarity.judge_sentence(principle.principle).polarity == polarity.UNCLEAR:
        return "it is unclear whether the sentence demands or prohibits"
    return None


def derive(principle: Principle, row: dict) -> Principle:
    """The principle with the requests of its row, or tagged as underived."""
    tags = tuple(tag for tag in principle.tags if tag != UNDERIVED)
    if row["critique"] is None:
        return replace(principle, tags=(*tags, UNDERIVED))
    return replace(principle, tags=tags, **{name: row[name] for name in REQUESTS})


def count(rows: Iterable[dict]) -> dict:
    """asked, derived, and failed: those that keep the requests phrased from their sentence. Warns of the first."""
    rows = list(rows)
    failed = [row for row in rows if row["critique"] is None]
    for row in failed[:5]:
        cli.warn(f"{row['id']} keeps the requests phrased from its sentence: {row['problems'][-1]}")
    return {"asked": len(rows), "derived": len(rows) - len(failed), "failed": len(failed)}


def read_requests(principle: Principle, answer: str) -> dict[str, str]:
    """{critique, revision, preference} of an answer. Raises `Refused` for any that can't be used."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    matches = [_LINE.fullmatch(line) for line in lines]
    names = [match[1].lower() if match else "" for match in matches]
    if names != list(REQUESTS):
        raise asking.Refused("it does not consist of three lines that begin with Critique:, Revision: and Preference:")
    requests = {name: " ".join(match[2].split()) for name, match in zip(names, matches, strict=True) if match}
    for name, text in requests.items():
        if len(text) > MOST_CHARACTERS:
            raise asking.Refused(f"the {name} is longer than {MOST_CHARACTERS} characters")
        if re.search(r"[.?!]\s+\S", text):
            raise asking.Refused(f"the {name} is more than one sentence")
    if not requests["preference"].endswith("?"):
        raise asking.Refused("the preference is not a question")
    if problem := direction.find_problem(principle.principle, requests) or _find_fault(principle, requests):
        raise asking.Refused(problem)
    return requests


def _find_fault(principle: Principle, requests: dict[str, str]) -> str | None:
    """The first finding of the lint that the sentence alone does not cause."""

    def findings(candidate: Principle) -> list[str]:
        return [finding.message for finding in lint.lint(Constitution("", "", "", (candidate,)))]

    derived = replace(principle, **requests)
    # The lint reads the sentence where there is one: the requests are read by themselves as well.
    new = [*findings(derived), *findings(replace(derived, principle=""))]
    known = findings(principle)
    return next((message for message in new if message not in known), None)
