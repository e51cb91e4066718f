"""Which principles speak to a prompt: a forced choice for each principle, asked once per prompt and kept in a file.

    matches = Matches("critiques.matches.jsonl", "tiny", constitution)
    matches.fill(team, load, rows)
    matches.best(row["prompt"], used=["privacy"])     # (principle id, probability), or None

critique.py and judge.py choose principles by it, and `constitution.py coverage` prints it. Leaves out what happens to
a prompt to which no principle speaks (principles.py).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any

from cai.base import cli, hashing
from cai.base.errors import InputError, shorten
from cai.constitution.files import Constitution, Principle
from cai.constitution.templates import load_template
from cai.data import outputs, processes, readers
from cai.data.dialogue import prompt_text
from cai.models import choice, loading
from cai.models.engine import Engine, Message
from cai.models.local import WINDOW
from cai.stats import letters
from cai.steps.sharing import finish_output

LABELS = ("A", "B")

ORDERS = letters.cyclic_orders(2, 2)

FIGURES = ("label_mass", "same_letter")  # means that say how the model answered

SPEAKS = 0.5  # a principle speaks to a prompt at this probability or above


def cover(engine: Engine, prompts: Iterable[dict], constitution: Constitution) -> Iterator[dict]:
    """{id, prompt, by: {principle: probability}, label_mass, same_letter, letter_excess} of each prompt, in order.

    Each principle is asked about in two orders of the answers, and the probabilities of "it speaks to the prompt",
    normalised over the two labels, are averaged: a bias for one letter cancels out. A prompt about which the judge
    makes no choice (it is too long, for example) has no probabilities, and None for the other figures.
    label_mass: mean share of the probability that the letters have; None where they are written. same_letter: the share
    of principles for which the likelier letter is the same in both orders; near 1, the judge answers by position.
    letter_excess: of `letters.letter_excess`, the mean over the principles.

    Args:
        prompts: rows with id and prompt, read window by window.
    """
    prompts = iter(prompts)
    # One window of the engine: what is asked about a principle begins alike, and a killed process loses one window.
    size = max(1, WINDOW * engine.batch_size // (2 * len(constitution.principles)))
    while window := list(islice(prompts, size)):
        yield from _cover_window(engine, window, constitution)


def _cover_window(engine: Engine, prompts: Sequence[dict], constitution: Constitution) -> Iterator[dict]:
    template = load_template("coverage")

    def render(question: tuple[int, Principle], order: letters.Order) -> Sequence[Message]:
        number, principle = question
        return template.render(principle=principle, prompt=prompts[number]["prompt"], order=order)

    # By principle, so that what its questions begin with is read once.
    questions = [(number, principle) for principle in constitution.principles for number in range(len(prompts))]
    choices: dict[int, dict[str, choice.OptionChoice]] = defaultdict(dict)
    for (number, principle), chosen in choice.choose_options(engine, questions, render, LABELS, ORDERS):
        choices[number][principle.id] = chosen
    for number, row in enumerate(prompts):
        in_order = {principle.id: choices[number][principle.id] for principle in constitution.principles}
        yield {"id": row["id"], "prompt": row["prompt"], **_summarise(in_order)}


def _summarise(choices: Mapping[str, choice.OptionChoice]) -> dict:
    """What `cover` has about a prompt, from the choice about each principle."""
    by_orders = [chosen.by_order for chosen in choices.values() if chosen.by_order is not None]
    if len(by_orders) < len(choices):
        return {"by": {}, **dict.fromkeys(FIGURES), "letter_excess": None}
    shares = {name: round(chosen.shares[0], 4) for name, chosen in choices.items() if chosen.shares}
    same = [(plain[0] > plain[1]) == (swapped[1] > swapped[0]) for plain, swapped in by_orders]
    masses = [chosen.mass for chosen in choices.values() if chosen.mass is not None]
    excess = letters.mean_shares([chosen.letter_excess for chosen in choices.values() if chosen.letter_excess])
    return {
        "by": dict(sorted(shares.items(), key=lambda share: -share[1])),
        "label_mass": round(sum(masses) / len(masses), 4) if masses else None,
        "same_letter": round(sum(same) / len(same), 4),
        "letter_excess": [round(share, 6) for share in excess],
    }


class Matches:
    """The principles that speak to each prompt, best first, in a file of `cover`'s rows whose ids are prompt hashes.

    The file is made by `fill`, which asks only about prompts that it lacks: both rounds of a run and its judge can
    share it. Prompts about which the model made no choice are not in it, and are asked about again.

    Args:
        path: the file; made by the same model, constitution and template, or InputError.
        overwrite: replace a file that was made by others.
        inputs: paths that it must not be.
    """

    def __init__(
        self,
        path: str,
        model: str,
        constitution: Constitution,
        *,
        dtype: str = "auto",
        overwrite: bool = False,
        inputs: Sequence[str] = (),
    ):
        loading.check_model(model)
        self.path, self.constitution = path, constitution
        fingerprint = {
            "model": model,
            "weights": hashing.identity(model),
            "constitution": constitution.sha256,
            "template": load_template("coverage").sha256,
            "dtype": dtype,
        }
        claim: dict[str, Any] = {"command": "match", "fingerprint": fingerprint, "inputs": inputs}
        self._speaking: dict[str, tuple[tuple[str, float], ...]] | None = None  # by prompt; None: not read yet
        self._output: outputs.Output | None = None  # in process 0
        if processes.Team().first:
            try:
                self._output = outputs.Output(path, **claim)
            except InputError:
                if not overwrite:
                    raise
                self._output = outputs.Output(path, **claim, overwrite=True)

    def best(self, prompt: Any, used: Collection[str | None] = ()) -> tuple[str, float] | None:
        """(principle id, probability) of the one that most likely speaks to the prompt, of those not in `used`.

        None where there is none, and before `fill`.
        """
        speaking = (self._speaking or {}).get(key_of(prompt), ())
        return next((match for match in speaking if match[0] not in used), None)

    @property
    def is_filled(self) -> bool:
        """Whether the file has been read."""
        return self._speaking is not None

    def count_calls(self, rows: Iterable[dict]) -> int:
        """Questions that `fill` would ask a model about these rows."""
        if self._output is not None and self._output.complete:
            self._read()
        return 2 * len(self.constitution.principles) * sum(1 for _ in self._missing(rows))

    def fill(self, team: processes.Team, load: Callable[[], Engine], rows: Iterable[dict]) -> None:
        """Ask about every prompt of the rows that the file lacks (resumable); each process its share.

        Args:
            load: called only if there is something to ask. rows: with `prompt`; iterable again and again.
        """
        output = self._output
        if output is not None and output.complete:
            self._read()
        if team.tell(output is not None and next(self._missing(rows), None) is not None):
            engine = load()
            with output or nullcontext():
                if output is not None and output.complete:
                    output.reopen()
                journal: Any = team.begin(output)
                missing = (row for row in team.share(_unique(rows)) if row["id"] not in journal.done)
                unanswered = team.gather(journal, self._ask(engine, missing, journal))
                if output is not None and unanswered is not None:
                    self._finish(output, engine, rows, list(chain.from_iterable(unanswered)))
            team.tell()  # the file is there
        self._read()

    def _ask(self, engine: Engine, prompts: Iterable[dict], journal: Any) -> list[str]:
        """Write the rows of `cover`; returns the prompts about which the model made no choice."""
        unanswered = []
        for row in cover(engine, prompts, self.constitution):
            if row["by"]:
                journal.write(row)
            else:
                unanswered.append(shorten(prompt_text(row["prompt"])))
        return unanswered

    def _finish(self, output: outputs.Output, engine: Engine, rows: Iterable[dict], unanswered: list[str]) -> None:
        count = len(output.done)
        figures = summarise_letters(row for _, row in readers.read_jsonl(output.journal))
        remedy = "its matches mean little. Take a larger model, or --principles draw"
        if figures.get("label_mass", 1) < 0.5:
            cli.warn(f"the model gives A and B only {figures['label_mass']:.0%} of its probability: {remedy}")
        if figures.get("same_letter", 0) > 0.5:
            share = f"{figures['same_letter']:.0%}"
            cli.warn(f"the model chose the same letter in both orders in {share} of cases: {remedy}")
        if unanswered:
            cli.warn(
                f"no principle is known to speak to {len(unanswered)} prompts, which are too long or were not "
                f"answered, such as {unanswered[0]!r}"
            )
        order = dict.fromkeys([row["id"] for row in _unique(rows)] + list(output.done))
        counts = {"prompts": count, "unanswered": len(unanswered), **figures}
        finish_output(output, list(order), counts, {}, engine)

    def _missing(self, rows: Iterable[dict]) -> Iterator[dict]:
        return (row for row in _unique(rows) if row["id"] not in (self._speaking or {}))

    def _read(self) -> None:
        """Read the finished file."""
        self._speaking = {}
        for line, row in readers.read_jsonl(self.path):
            by = row.get("by")
            if not isinstance(by, dict) or not all(isinstance(p, float | int) for p in by.values()):
                raise InputError(
                    f"`by` is {shorten(by)!r}",
                    where=self.path,
                    line=line,
                    expected="a probability for each principle",
                    remedy="Delete the file and its manifest",
                )
            self._speaking[row["id"]] = tuple(
                (name, p) for name, p in by.items() if p >= SPEAKS and name in self.constitution
            )


def summarise_letters(rows: Iterable[dict]) -> dict:
    """{label_mass, same_letter, letter_bias} over rows of `cover`: two means and `letters.letter_bias`, where known."""
    rows = list(rows)
    known = {name: [row[name] for row in rows if row.get(name) is not None] for name in FIGURES}
    means = {name: round(sum(values) / len(values), 4) for name, values in known.items() if values}
    excesses = [row["letter_excess"] for row in rows if row.get("letter_excess")]
    return {**means, **({"letter_bias": letters.letter_bias(excesses)} if excesses else {})}


def key_of(prompt: Any) -> str:
    """What names a prompt in the file of matches: a hash of its text."""
    return hashing.sha256_text(prompt_text(prompt))[:32]


def _unique(rows: Iterable[dict]) -> Iterator[dict]:
    """{id, prompt} of each prompt, where it comes first."""
    seen: set[str] = set()
    for row in rows:
        key = key_of(row["prompt"])
        if key not in seen:
            seen.add(key)
            yield {"id": key, "prompt": row["prompt"]}
