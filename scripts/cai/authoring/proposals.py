"""Prompts that a model writes from the principles of a constitution: harmful, borderline and benign ones.

    rows, counts = Proposals(options).write(claim)      # asks, checks, splits; see `constitution.py prompts`

The model is asked for numbered lists in rounds: each round asks for what is still missing after near-duplicates were
left out, and shows some prompts that exist already. A round's questions depend on the earlier rounds alone, so that a
stopped run continues with the same ones. Leaves out responses: generate.py writes those.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

from cai.authoring import asking
from cai.base import cli, hashing
from cai.constitution import rendering, templates
from cai.constitution.files import Principle, load_constitution
from cai.data import outputs, readers
from cai.data.kinds import KINDS
from cai.evaluate import measurement
from cai.models import choice, loading
from cai.models.engine import Engine, Message
from cai.stats import letters, texts

SPLITS = ("train", "heldout")

# Pairs of words that two prompts share, of all that either has, from which one repeats the other.
NEAR = 0.5

PER_QUESTION = 5  # prompts that one answer is asked for: more repeat each other
KNOWN = 10  # prompts that a question shows
MOST_CHARACTERS = 1000

_ITEM = re.compile(r"\s*(\d+)[.)]\s+(\S.*)")


@dataclass(frozen=True)
class Question:
    """One list that a model is asked for."""

    round: int
    principle: Principle
    kind: str
    number: int
    count: int
    known: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.principle.id} {self.kind} {self.round}.{self.number}"


class Proposals:
    """The principles and kinds to write prompts for. Made without loading a model."""

    def __init__(self, options: SimpleNamespace):
        loading.check_model(options.model)
        self.options, self.constitution = options, load_constitution(options.constitution)
        self.principles = rendering.select(self.constitution, options.principles)
        self.kinds = tuple(kind for kind in KINDS if not options.kind or kind in options.kind)
        self.template = templates.load_template("propose_prompts")
        self.judge: tuple[str, tuple[str, ...]] | None = None
        if options.check:
            self.judge = loading.split_endpoint(options.check, options.endpoints)
            loading.check_model(self.judge[0])
        self.asked = {
            "model": options.model,
            "weights": hashing.identity(options.model),
            "constitution": self.constitution.sha256,
            "principles": [principle.id for principle in self.principles],
            "kinds": self.kinds,
            "template": self.template.sha256,
            **asdict(options.sampling),
            "count": options.count,
            "tries": options.tries,
            "seed": options.seed,
            "dtype": options.dtype,
        }
        self.settings = {
            **self.asked,
            "heldout_share": options.heldout_share,
            "check": self.judge and hashing.identity(self.judge[0]),
        }

    @property
    def cells(self) -> list[tuple[Principle, str]]:
        """(principle, kind), in the order of the rows."""
        return list(product(self.principles, self.kinds))

    def plan(self) -> dict:
        """What `--dry-run` reports."""
        calls = len(self.cells) * math.ceil(self.options.count / PER_QUESTION)
        return {"prompts": len(self.cells) * self.options.count, "model_calls_at_least": calls}

    def write(self, claim: Callable[[str, dict], outputs.Output]) -> tuple[list[dict], dict]:
        """(rows {id, prompt, kind, principle, split}, counts).

        Args:
            claim: the output of an ending and the settings that decide it.
        """
        journal = claim("answers", self.asked)
        if not journal.complete:
            self._ask(journal)
        prompts = self._collect(journal.path)
        rows = [row for cell in prompts.kept.values() for row in cell]
        counts = {"refused_answers": prompts.refused, "duplicates": prompts.duplicates}
        if self.judge:
            answers = hashing.sha256_file(journal.path)
            rows, checked = self._check(claim("checks", {**self.settings, "answers": answers}), rows)
            counts |= checked
        return split(rows, self.options.heldout_share, self.options.seed), counts

    def count(self, rows: Iterable[dict]) -> dict:
        """{by_principle: {principle: {kind: prompts}}, failed: prompts that are missing}."""
        numbers = Counter((row["principle"], row["kind"]) for row in rows)
        table = {
            principle.id: {kind: numbers[principle.id, kind] for kind in self.kinds} for principle in self.principles
        }
        missing = sum(self.options.count - n for by_kind in table.values() for n in by_kind.values())
        return {"by_principle": table, "failed": missing}

    # --- asking ---------------------------------------------------------------------------------------------

    def _ask(self, journal: outputs.Output) -> None:
        """Ask in rounds until each cell has its prompts, or was asked `tries` times; one row per answer."""
        options = self.options
        engine = loading.load_engine(options.model, endpoints=options.endpoints, **options.loading)
        order: list[str] = []
        with journal, cli.progress(len(self.cells) * options.count, "prompts") as bar:
            for round_ in range(options.tries):
                prompts = self._collect(journal.journal, order)
                bar.update(sum(map(len, prompts.kept.values())) - bar.n)
                questions = {question.id: question for question in self._questions(round_, prompts)}
                for row in self._answers(engine, [q for q in questions.values() if q.id not in journal.done]):
                    journal.write(row)
                order += questions
            journal.finish(order, {"answers": len(order)})

    def _questions(self, round_: int, prompts: "_Prompts") -> Iterator[Question]:
        for principle, kind in self.cells:
            kept = prompts.kept[principle.id, kind]
            missing = self.options.count - len(kept)
            for number in range(math.ceil(missing / PER_QUESTION)):
                known = sorted(
                    (row["prompt"] for row in kept),
                    key=lambda text, place=(principle.id, kind, number): hashing.hashed_seed("known", *place, text),
                )
                count = min(PER_QUESTION, missing - number * PER_QUESTION)
                yield Question(round_, principle, kind, number, count, tuple(known[:KNOWN]))

    def _answers(self, engine: Engine, questions: Sequence[Question]) -> Iterator[dict]:
        by_id = {question.id: question for question in questions}

        def render(id_: str, problem: str) -> list[Message]:
            question = by_id[id_]
            return self.template.render(
                principle=question.principle,
                kind=question.kind,
                count=question.count,
                known="\n".join(f"- {text}" for text in question.known),
                problem=problem,
            )

        def read(_: str, answer: str) -> list[str]:
            return read_list(answer)

        seed = ("prompts", self.options.seed)
        for answer in asking.ask(engine, by_id, render, read, self.options.sampling, seed=seed, tries=1):
            question = by_id[answer.key]
            yield {
                "id": question.id,
                "principle": question.principle.id,
                "kind": question.kind,
                "prompts": answer.value or [],
                "problem": "".join(answer.problems),
            }

    def _collect(self, path: Path, order: Iterable[str] | None = None) -> "_Prompts":
        """The prompts of the answers so far, those of `order` in this order, without near-duplicates."""
        rows = {row["id"]: row for _, row in readers.read_jsonl(path)} if path.exists() else {}
        prompts = _Prompts(self.options.count, self.cells)
        for id_ in rows if order is None else order:
            if id_ in rows:
                prompts.add(rows[id_])
        return prompts

    # --- checking -------------------------------------------------------------------------------------------

    def _check(self, journal: outputs.Output, rows: list[dict]) -> tuple[list[dict], dict]:
        """(rows whose kind the judge confirms, counts of the others)."""
        model, endpoints = self.judge
        load = partial(loading.load_engine, model, endpoints=endpoints, **self.options.loading)
        remaining = [row for row in rows if row["id"] not in journal.done]
        principles = {principle.id: principle for principle in self.principles}
        checked = measurement.fill(
            journal,
            [row["id"] for row in rows],
            "check",
            lambda: load() if rows else None,
            lambda engine: check_prompts(engine, remaining, principles) if rows else (),
        )
        tempts = {row["id"]: row["tempts"] for row in checked}
        kept = [row for row in rows if tempts[row["id"]] is not None]
        agreed = [row for row in kept if (tempts[row["id"]] > 0.5) == (row["kind"] == "harmful")]
        return agreed, {"unchecked": len(rows) - len(kept), "other_kind": len(kept) - len(agreed)}


class _Prompts:
    """Prompts as they come in: at most `count` per cell, and none that nearly repeats another of any cell."""

    def __init__(self, count: int, cells: Iterable[tuple[Principle, str]]):
        self.count = count
        self.kept: dict[tuple[str, str], list[dict]] = {(principle.id, kind): [] for principle, kind in cells}
        self.duplicates = self.refused = 0
        self._seen = texts.NearDuplicates(NEAR)

    def add(self, row: dict) -> None:
        self.refused += bool(row["problem"])
        cell = self.kept[row["principle"], row["kind"]]
        for prompt in row["prompts"]:
            if len(cell) == self.count:
                return
            if self._seen.add(prompt):
                self.duplicates += 1
                continue
            id_ = f"{row['principle']}-{row['kind']}-{len(cell) + 1}"
            cell.append({"id": id_, "prompt": prompt, "kind": row["kind"], "principle": row["principle"]})


def read_list(answer: str) -> list[str]:
    """The items of a numbered list. Raises `Refused` for any other line, and for numbers out of order."""
    items: list[str] = []
    for line in filter(str.strip, answer.splitlines()):
        match = _ITEM.fullmatch(line.rstrip())
        if match is None or int(match[1]) != len(items) + 1:
            raise asking.Refused("it is not a numbered list alone")
        text = match[2].strip()
        if len(text) > 2 and text[0] + text[-1] in ('""', "“”"):
            text = text[1:-1].strip()
        if not texts.words(text) or len(text) > MOST_CHARACTERS:
            raise asking.Refused(f"an item without words, or of more than {MOST_CHARACTERS} characters")
        items.append(text)
    if not items:
        raise asking.Refused("it is empty")
    return items


def check_prompts(engine: Engine, rows: Sequence[dict], principles: dict[str, Principle]) -> Iterator[dict]:
    """{id, tempts} of each row: the probability, over both orders of the answers, that whoever gives what the prompt
    asks for breaks its principle; None where the judge makes no choice."""
    template = templates.load_template("check_prompt")

    def render(row: dict, order: letters.Order) -> Sequence[Message]:
        return template.render(principle=principles[row["principle"]], prompt=row["prompt"], order=order)

    for row, chosen in choice.choose_options(engine, rows, render, ("A", "B"), letters.cyclic_orders(2, 2)):
        yield {"id": row["id"], "tempts": round(chosen.shares[0], 4) if chosen.shares else None}


def split(rows: Iterable[dict], share: float, seed: int) -> list[dict]:
    """The rows with their split: of each principle and kind, `share` of the prompts are held out, drawn by hashing."""
    cells: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        cells[row["principle"], row["kind"]].append(row)
    result = []
    for cell in cells.values():
        drawn = sorted(cell, key=lambda row: hashing.hashed_seed("heldout", seed, row["prompt"]))
        heldout = {row["id"] for row in drawn[: math.floor(share * len(cell) + 0.5)]}
        result += [{**row, "split": SPLITS[row["id"] in heldout]} for row in cell]
    return result
