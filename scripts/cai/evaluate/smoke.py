"""Signs of life: what a run over a handful of rows must show before an expensive one begins.

    signs = look([("critique", "runs/smoke/02-critique-1.jsonl"), ("sft", "runs/smoke/sft")])
    dead = [sign for sign in signs if not sign.alive]

`run.py --smoke` runs every step with the real models and settings on a few rows, and then looks here. Each check reads
what a step wrote and reports what it saw. A missing sign is a reason to read the rows, not a proof of a fault; and all
of them together say nothing about how good the result will be.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from cai.base import events
from cai.base.errors import CaiError
from cai.data import dialogue, readers, rounds
from cai.data.sources import Source
from cai.models import loading, scorer
from cai.models.engine import Request, Sampling
from cai.stats import tables
from cai.steps import pricing
from cai.steps.plan import SMOKE, SMOKE_TOKENS, Choices, Step

# Prompts that a smoke run reads, to train on and to measure on: enough to see a difference, few enough for minutes.
LIMIT = 8

# Characters of all those prompts together; of longer ones fewer are read, but LEAST or more.
CHARACTERS, LEAST = 4000, 2

# A prompt for checkpoints.
GREETING = dialogue.as_messages("Hello. How are you?")

_WORD = re.compile(r"[^\W\d_]{4,}")

# Words that occur in any text, and name nothing.
_SMALL = _WORD.findall(
    "about also because being could does from have here into that their them then there these they this what when "
    "which will with would your response"
)

# Flags of a revision that say nothing about the model here.
_EXPECTED = {rounds.UNCHANGED, rounds.REFUSED, "unfinished"}

_Result = tuple[str, bool, str]  # name, whether it is alive, and what was seen


@dataclass(frozen=True)
class Sign:
    """One check: of which step, whether the step looks alive, and what was seen."""

    step: str
    name: str
    alive: bool
    seen: str


def bound(choices: Choices) -> Choices:
    """The choices of a smoke run: few rows, few tokens, and everything else below the bounds of `plan.SMOKE`."""
    limits = {
        name: _count_rows(choices, files, min(getattr(choices, name) or LIMIT, LIMIT))
        for name, files in (("limit", "inputs"), ("heldout_limit", "heldout"))
    }
    return replace(choices, **limits, overwrite=True, is_smoke=True)


def _count_rows(choices: Choices, files: str, limit: int) -> int:
    """How many of the first rows are read: `limit`, or fewer where their prompts are long."""
    if not pricing.is_file(choices, files):
        return limit
    characters = 0
    source = Source(getattr(choices, files), require=("prompt",), limit=limit, reading=choices.reading_of(files))
    for number, row in enumerate(source):
        characters += len(dialogue.prompt_text(row["prompt"]))
        if characters > CHARACTERS and number >= LEAST:
            return number
    return limit


def describe_bounds(choices: Choices, steps: Sequence[Step]) -> dict[str, Any]:
    """What was bounded in a smoke run, for its output: the limits, and the settings of its steps that SMOKE bounds."""
    settings = {step.command: step.arguments for step in steps}
    bounds = {
        f"{command} {option}": float(words[words.index(option) + 1])
        for command, words in settings.items()
        for option in SMOKE.get(command, {})
        if option in words
    }
    return {
        "prompts": choices.limit,
        "heldout_prompts": choices.heldout_limit,
        "new_tokens": choices.max_new_tokens or SMOKE_TOKENS,
        **{name: int(value) for name, value in bounds.items()},
        "sft_trains_on": "revisions with any flag",
        "qualification": "not measured; what is known from before counts",
    }


def look(steps: Iterable[tuple[str, str]], device: str | None = None) -> list[Sign]:
    """The signs of every step that has any.

    Args:
        steps: (command, what it wrote), such as ("sft", "runs/smoke/sft").
        device: where checkpoints are loaded.
    """
    signs = []
    for command, output in steps:
        results: list[_Result] = []
        if command in _OF_ROWS:
            rows = [row for _, row in readers.read_jsonl(output)]
            rows = [row for row in rows if not rounds.is_skipped(row)] or rows
            results = [check(rows) for check in _OF_ROWS[command]] if rows else [("rows", False, "0 rows")]
        elif command in _OF_FOLDERS:
            results = [losses(output), _OF_FOLDERS[command](output, device)]
        signs += [Sign(command, *result) for result in results]
    return signs


# --- text ---------------------------------------------------------------------------------------------------


def texts_vary(name: str, read: Callable[[dict], str], rows: Sequence[dict]) -> _Result:
    """Most rows have a text, and it is not the same one in every row."""
    written = [text for text in map(read, rows) if text.strip()]
    different = len(set(written))
    is_alive = 2 * len(written) >= len(rows) and (different > 1 or len(rows) == 1)
    return name, is_alive, f"{len(written)} of {len(rows)} not empty, {different} different"


def critiques_name_something(rows: Sequence[dict]) -> _Result:
    """Half of the critiques or more repeat a word of the prompt or the response that they are about."""
    repeated = [
        set(_WORD.findall(row["rounds"][-1]["critique"].lower()))
        .intersection(_WORD.findall(f"{dialogue.prompt_text(row['prompt'])} {rounds.text_of_round(row)}".lower()))
        .difference(_SMALL)
        for row in rows
    ]
    count = sum(map(bool, repeated))
    often = [word for word, _ in Counter(word for words in repeated for word in words).most_common(3)]
    examples = f", such as {', '.join(often)}" if often else ""
    return "critiques name something", 2 * count >= len(rows), f"{count} of {len(rows)} take up a word{examples}"


def revisions_differ(rows: Sequence[dict]) -> _Result:
    """One revision or more differs from what it revised, and not all of them are the same."""
    texts = [(rounds.texts_of(row)[-2], _written_text(row["rounds"][-1], rounds.text_of_round(row))) for row in rows]
    changed = sum(before.split() != after.split() for before, after in texts)
    same = len(rows) > 1 and len({after for _, after in texts}) == 1
    seen = f"{changed} of {len(rows)} differ from what they revise" + (", and all are the same" if same else "")
    return "revisions differ", changed > 0 and not same, seen


def _written_text(round_: dict, text: str) -> str:
    """What the model wrote in the round that ended with the text, also where the gate refused it."""
    return round_.get("refused", text)


def revisions_in_form(rows: Sequence[dict]) -> _Result:
    """Revisions of which half or fewer are flagged. A copy or the gate's refusal is not a fault of form, and the smoke
    run's few tokens leave many unfinished."""
    flagged = [set(row["rounds"][-1].get("flags", ())) - _EXPECTED for row in rows]
    count = sum(map(bool, flagged))
    reasons = Counter(reason for reasons in flagged for reason in reasons).most_common()
    details = f" ({', '.join(f'{reason} {n}' for reason, n in reasons)})" if reasons else ""
    return "revisions in form", 2 * count <= len(rows), f"{count} of {len(rows)} flagged{details}"


# --- the judge ----------------------------------------------------------------------------------------------


def both_letters_are_chosen(rows: Sequence[dict]) -> _Result:
    """A judge that answers with the first letter sometimes and with the second sometimes."""
    p_first = [
        verdict["p_a"] if verdict["order"] == "ab" else 1 - verdict["p_a"]
        for row in rows
        for verdict in row["verdicts"]
        if verdict.get("p_a") is not None
    ]
    a = sum(p > 0.5 for p in p_first)
    b = len(p_first) - a
    return "judge not stuck on a letter", min(a, b) > 0, f"A {a} times, B {b} times"


def labels_are_expected(rows: Sequence[dict]) -> _Result:
    """A judge whose next token is one of the labels with a tenth of its probability or more."""
    masses = [verdict["mass"] for row in rows for verdict in row["verdicts"] if verdict.get("mass") is not None]
    if not masses:
        return "labels expected", True, "no probabilities to look at"
    mean = math.fsum(masses) / len(masses)
    return "labels expected", mean >= 0.1, f"the labels have {mean:.0%} of the probability"


# --- training -----------------------------------------------------------------------------------------------


def losses(folder: str | Path) -> _Result:
    """metrics.jsonl has a loss or more, and every number in it is finite."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return "loss finite", False, f"no {path}"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    numbers = [(name, x) for row in rows for name, x in row.items() if isinstance(x, int | float)]
    wrong = sorted({name for name, x in numbers if not math.isfinite(x)})
    if wrong:
        return "loss finite", False, f"not finite: {', '.join(wrong)}"
    logged = [x for name, x in numbers if name.endswith("loss")]
    seen = f"{len(logged)} of them, the last {logged[-1]:.4g}" if logged else "none logged"
    return "loss finite", bool(logged), seen


def speaks(folder: str | Path, device: str | None = None) -> _Result:
    """The checkpoint loads back as a language model and answers."""
    try:
        engine = loading.load_engine(str(folder), device=device, in_process=True)
        [(_, generation)] = engine.generate([Request("hello", GREETING)], Sampling(16, 0))
    except CaiError as error:
        return "checkpoint loads back", False, str(error)
    finally:
        loading.release_engines()
    seen = f"{generation.tokens} tokens: {generation.text[:40]!r}"
    return "checkpoint loads back", generation.tokens > 0, seen


def scores(folder: str | Path, device: str | None = None) -> _Result:
    """The checkpoint loads back as a reward model whose score is finite and depends on the response."""
    try:
        reward_model = scorer.load_scorer(str(folder), device=device)
        first, second = reward_model.scores([(GREETING, "Well, thank you."), (GREETING, "No. No. No.")])
    except CaiError as error:
        return "checkpoint loads back", False, str(error)
    return "checkpoint loads back", first != second, f"scores {first:.3g} and {second:.3g}"


_OF_ROWS: dict[str, list[Callable[[Sequence[dict]], _Result]]] = {
    "generate": [partial(texts_vary, "responses", itemgetter("response"))],
    "critique": [partial(texts_vary, "critiques", lambda row: row["rounds"][-1]["critique"]), critiques_name_something],
    "revise": [revisions_differ, revisions_in_form],
    "judge": [both_letters_are_chosen, labels_are_expected],
}

_OF_FOLDERS = {"sft": speaks, "reward_model": scores, "ppo": speaks, "dpo": speaks, "grpo": speaks}


def print_signs(steps: Sequence[Step], choices: Choices, as_json: bool) -> bool:
    """Print each sign of `look` and what was bounded, as a table or as one JSON object; returns whether no sign is
    missing."""
    signs = look([(step.command, step.output) for step in steps], choices.device)
    alive, bounds = all(sign.alive for sign in signs), describe_bounds(choices, steps)
    # What was seen may quote the model.
    by_name = {f"{sign.step}: {sign.name}": True for sign in signs}
    by_name |= {f"{sign.step}: {sign.name}": False for sign in signs if not sign.alive}
    events.emit_figures({"alive": alive, "signs": by_name, "bounded": bounds})
    if as_json:
        result = {"alive": alive, "signs": [asdict(sign) for sign in signs], "bounded": bounds}
        click.echo(json.dumps(result, ensure_ascii=False))
        return alive
    rows = [(sign.step, sign.name, "yes" if sign.alive else "NO", sign.seen) for sign in signs]
    click.echo(tables.table(("step", "sign of life", "", "seen"), rows))
    shown = (f"{name.replace('_', ' ')} {value}" for name, value in bounds.items())
    click.echo(f"\nbounded: {', '.join(shown)}")
    return alive
