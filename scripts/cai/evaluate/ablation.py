"""What principles do: which prompts they speak to, and what changes on the figures without one of them.

    for prompt_id, row in coverage(engine, prompts, constitution): ...
    for row in redo(engine, rows, sampling, seed): ...

`coverage` asks a judge model about every prompt and principle. `redo` makes those revisions again that had drawn a
principle which is then left out: all others would be the same without it, so that they are not made again. Leaves
out training with each reduced constitution, which `run.py` does.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

from cai.base.errors import InputError
from cai.base.hashing import hashed_seed
from cai.constitution.files import Constitution
from cai.constitution.templates import load_template
from cai.data.rounds import text_of_round
from cai.evaluate import rates
from cai.models.engine import Sampling
from cai.stats import intervals
from cai.steps.flags import flags

LABELS = ("A", "B")


# --- coverage -----------------------------------------------------------------------------------------------


def coverage(engine, prompts: Sequence[dict], constitution: Constitution, threshold: float) -> Iterator[dict]:
    """{id, prompt, covered, by: {principle: probability}, label_mass} of each prompt, in order.

    Each principle is asked about in two orders of the answers, and the probabilities of "it speaks to the prompt",
    normalised over the two labels, are averaged: a bent for one letter cancels out.

    Args:
        engine: has `score`.
        prompts: rows with id and prompt.
        threshold: a principle speaks to a prompt at this probability or above.

    A prompt too long for the model's context has `covered` None and no probabilities.
    """
    template = load_template("coverage")
    # By principle, so that what its questions begin with is read once.
    asked = [
        (place, principle, swapped)
        for principle in constitution.principles
        for swapped in (False, True)
        for place in range(len(prompts))
    ]
    questions = (
        template.render(principle=principle, prompt=prompts[place]["prompt"], swapped=swapped)
        for place, principle, swapped in asked
    )
    by: list[dict[str, float]] = [{} for _ in prompts]
    masses, too_long = [0.0] * len(prompts), set()
    for index, logprobs in engine.score(questions, LABELS):
        place, principle, swapped = asked[index]
        if logprobs is None:
            too_long.add(place)
            continue
        first = 0.5 + 0.5 * math.tanh((logprobs[0] - logprobs[1]) / 2)
        yes = 1 - first if swapped else first
        by[place][principle.id] = by[place].get(principle.id, 0.0) + yes / 2
        masses[place] += sum(map(math.exp, logprobs)) / (2 * len(constitution.principles))
    for place, row in enumerate(prompts):
        said = {} if place in too_long else {name: round(p, 4) for name, p in by[place].items()}
        found = dict(sorted(said.items(), key=lambda one: -one[1]))
        covered = None if place in too_long else any(p >= threshold for p in found.values())
        yield {
            "id": row["id"],
            "prompt": row["prompt"],
            "covered": covered,
            "by": found,
            "label_mass": None if place in too_long else round(masses[place], 4),
        }


def coverage_counts(rows: Iterable[dict], constitution: Constitution, threshold: float) -> dict:
    """prompts, failed, uncovered (a rate), label_mass, and to how many prompts each principle speaks."""
    speaks = dict.fromkeys((p.id for p in constitution.principles), 0)
    n = failed = uncovered = 0
    mass = 0.0
    for row in rows:
        n += 1
        if row["covered"] is None:
            failed += 1
            continue
        uncovered += not row["covered"]
        mass += row["label_mass"]
        for name, p in row["by"].items():
            speaks[name] += p >= threshold
    asked = n - failed
    return {
        "prompts": n,
        "failed": failed,
        "uncovered": intervals.rate(uncovered, asked),
        "label_mass": mass / asked if asked else None,
        "speaks_to": speaks,
    }


# --- ablation -----------------------------------------------------------------------------------------------


def without_each(rows: Iterable[dict], left_out: Sequence[str]) -> Iterator[dict]:
    """For each principle, the rows that drew it, back at the round that did: {…, left_out, original, wanted}.

    original: the row's id; wanted: how many rounds it had. The id says both, so that it is one of its own.
    """
    for row in rows:
        drawn = [one["principle"] for one in row["rounds"]]
        for name in left_out:
            if name in drawn:
                yield {
                    **row,
                    "id": f"{row['id']} without {name}",
                    "original": row["id"],
                    "left_out": name,
                    "wanted": len(drawn),
                    "rounds": row["rounds"][: drawn.index(name)],
                }


def redo(
    engine, rows: list[dict], constitutions: dict[str, Constitution], sampling: Sampling, seed: int
) -> Iterator[dict]:
    """Rows of `without_each` with their rounds completed under `constitutions[left_out]`.

    Each text is drawn from the seed that critique.py and revise.py would use for the row and round. A row that does
    not fit the model's context comes back with fewer rounds than `wanted`.
    """
    critique, revise = load_template("critique"), load_template("revise")

    def ask(command, render):
        seeds = [hashed_seed(command, seed, row["original"], len(row["rounds"])) for row in active]
        made = dict(engine.generate([render(row) for row in active], sampling, seeds))
        return [(row, made[place]) for place, row in enumerate(active) if not made[place].lost]

    def principle(row):
        if row["rounds"] and row["rounds"][-1].get("revision") is None:
            return constitutions[row["left_out"]][row["rounds"][-1]["principle"]]
        return constitutions[row["left_out"]].draw(seed, row["original"], len(row["rounds"]))

    def shown(row):
        return {"principle": principle(row), "prompt": row["prompt"], "response": text_of_round(row)}

    rows = [{**row, "rounds": list(row["rounds"])} for row in rows]
    while active := [row for row in rows if len(row["rounds"]) < row["wanted"] and not row.get("failed")]:
        for row in active:
            row["failed"] = True  # until both texts of the round are there
        for row, made in ask("critique", lambda row: critique.render(**shown(row))):
            row["rounds"].append({"principle": principle(row).id, "critique": made.text})
        active = [row for row in active if row["rounds"] and row["rounds"][-1].get("revision") is None]
        for row, made in ask("revise", lambda row: revise.render(**shown(row), critique=row["rounds"][-1]["critique"])):
            before = text_of_round(row)
            row["rounds"][-1] |= {"revision": made.text, "flags": flags(before, made.text, made.finish)}
            row["failed"] = False
    for row in rows:
        if row.pop("failed", False) and row["rounds"] and row["rounds"][-1].get("revision") is None:
            row["rounds"].pop()
    yield from rows


def differences(classes: dict[str, tuple[str, str | None]], redone: dict[str, str]) -> Iterator[dict]:
    """{metric, full, without, difference, low, high, n} of each rate of `rates.RATES`.

    Args:
        classes: {row id: (kind, class)} of the full constitution's rows and of the redone ones.
        redone: {original id: id of the row that takes its place}.

    The difference is without minus full, with the 95 % interval of a paired difference: rows that were not redone
    count as no difference. With one row low and high are None. Rows without a class on either side are in no rate.
    """
    for metric, (kind, counted) in rates.RATES.items():
        full, less = [], []
        for row_id, (its_kind, before) in classes.items():
            after = classes.get(redone.get(row_id, row_id), (kind, None))[1]
            if its_kind == kind and before is not None and after is not None and row_id not in redone.values():
                full.append(before in counted)
                less.append(after in counted)
        if not full:
            continue
        found = intervals.mean([b - a for a, b in zip(full, less, strict=True)])
        yield {
            "metric": metric,
            "full": sum(full) / len(full),
            "without": sum(less) / len(less),
            "difference": found["value"],
            "low": found["low"],
            "high": found["high"],
            "n": len(full),
        }


def check_drawn(row: dict, constitution: Constitution, where, line: int) -> None:
    """InputError unless every round of the row drew a principle of the constitution, and is complete."""
    for number, one in enumerate(row["rounds"], 1):
        if one["principle"] not in constitution:
            found = f"round {number} drew {one['principle']!r}, which {constitution.name} has not"
            raise InputError(found, where=where, line=line, expected="rows that were revised under this constitution")
    if not row["rounds"]:
        raise InputError("no rounds", where=where, line=line, expected="rows of revise.py")
