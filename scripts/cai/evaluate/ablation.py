"""What principles do: which prompts they apply to, and what changes in the figures without one of them.

    Coverage(options).write(output)
    measurement = measure_without_each(options, "runs/ablation")

`Coverage` asks a judge model about every prompt and principle. An ablation repeats those revisions that had drawn the
principle which is then left out: all others would be the same without it. Leaves out training with each reduced
constitution, which `run.py` does.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from cai.base import cli, files
from cai.base.errors import InputError
from cai.base.hashing import hashed_seed, identity
from cai.constitution import rendering
from cai.constitution.files import Constitution, load_constitution
from cai.constitution.templates import load_template
from cai.data.outputs import Output, read_manifest
from cai.data.readers import read_jsonl
from cai.data.rounds import check_rounds, current_response
from cai.data.sources import Source
from cai.evaluate import classes
from cai.evaluate.measurement import Claim, Measurement
from cai.evaluate.rates import RATES
from cai.models.engine import Sampling
from cai.models.loading import check_model, load_engine
from cai.models.local import fast_path
from cai.stats import intervals, tables
from cai.steps.flags import flags

LABELS = ("A", "B")


def _windows(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """The rows in lists of `size`; the last may be shorter."""
    rows = iter(rows)
    return iter(lambda: list(islice(rows, size)), [])


def _load(options: SimpleNamespace):
    return load_engine(options.model, endpoints=options.endpoints, **options.loading)


# --- coverage -----------------------------------------------------------------------------------------------


class Coverage:
    """The prompts and the principles of a constitution, to be asked about. Made without loading a model."""

    def __init__(self, options: SimpleNamespace):
        check_model(options.model)
        self.options = options
        self.constitution = load_constitution(options.constitution)
        self.source = Source(options.inputs, limit=options.limit)
        self.settings = {
            "model": options.model,
            "weights": identity(options.model),
            "input": self.source.digest,
            "limit": options.limit,
            "constitution": self.constitution.sha256,
            "template": load_template("coverage").sha256,
            "threshold": options.threshold,
            "dtype": options.dtype,
        }

    def count_calls(self, output: Output) -> int:
        """Questions that are still to be asked."""
        remaining = 0 if output.complete else self.source.count - len(output.done)
        return 2 * len(self.constitution.principles) * remaining

    def write(self, output: Output) -> None:
        """Write the row of `cover` for every prompt (resumable), and warn of a judge that does not answer."""
        threshold, size = self.options.threshold, 16 * self.options.batch_size
        if not output.complete:
            engine = _load(self.options)
            with output, cli.progress(self.source.count, "coverage") as bar:
                bar.update(len(output.done))
                for window in _windows((row for row in self.source if row["id"] not in output.done), size):
                    for row in cover(engine, window, self.constitution, threshold):
                        output.write(row)
                        bar.update(1)
                rows = (row for _, row in read_jsonl(output.journal))
                counts = coverage_counts(rows, self.constitution, threshold)
                output.finish(self.source.ids, counts, **fast_path(engine))
        classes.warn_of_low_mass(output.counts["label_mass"], "take a larger judge before you rely on this")


def cover(engine, prompts: Sequence[dict], constitution: Constitution, threshold: float) -> Iterator[dict]:
    """{id, prompt, covered, by: {principle: probability}, label_mass} of each prompt, in order.

    Each principle is asked about in two orders of the answers, and the probabilities of "it applies to the prompt",
    normalised over the two labels, are averaged: a bias for one letter cancels out.

    Args:
        engine: has `score`.
        prompts: rows with id and prompt.
        threshold: a principle applies to a prompt at this probability or above.

    A prompt that is too long for the model's context has `covered` None and no probabilities.
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
        if place in too_long:
            yield {"id": row["id"], "prompt": row["prompt"], "covered": None, "by": {}, "label_mass": None}
            continue
        shares = sorted(((name, round(p, 4)) for name, p in by[place].items()), key=lambda share: -share[1])
        yield {
            "id": row["id"],
            "prompt": row["prompt"],
            "covered": any(p >= threshold for _, p in shares),
            "by": dict(shares),
            "label_mass": round(masses[place], 4),
        }


def coverage_counts(rows: Iterable[dict], constitution: Constitution, threshold: float) -> dict:
    """prompts, failed, uncovered (a rate), label_mass, and to how many prompts each principle applies."""
    applies = dict.fromkeys((principle.id for principle in constitution.principles), 0)
    prompts = failed = uncovered = 0
    masses = []
    for row in rows:
        prompts += 1
        if row["covered"] is None:
            failed += 1
            continue
        uncovered += not row["covered"]
        masses.append(row["label_mass"])
        for principle, p in row["by"].items():
            applies[principle] += p >= threshold
    return {
        "prompts": prompts,
        "failed": failed,
        "uncovered": intervals.rate(uncovered, len(masses)),
        "label_mass": sum(masses) / len(masses) if masses else None,
        "speaks_to": applies,
    }


# --- ablation -----------------------------------------------------------------------------------------------


def measure_without_each(options: SimpleNamespace, stem: str | Path) -> Measurement:
    """What changes in the rates of revised rows without one principle at a time.

    Args:
        options: of `constitution.py ablate` by name, with sampling and loading.
        stem: the reduced constitutions become `<stem>.without-<principle>.yaml`.
    """
    check_model(options.model)
    reader = classes.Reader(options.by, options.judge or None, endpoints=options.endpoints, loading=options.loading)
    reader.check()
    constitution = load_constitution(options.constitution)
    names = [principle.id for principle in rendering.select(constitution, options.principles)]
    reduced = {name: constitution.without(name) for name in names}

    def check(row: dict, where: str, line: int) -> None:
        check_rounds(row, where, line, critiqued=False)
        check_drawn(row, constitution, where, line)
        reader.check_row(row, where, line)

    source = Source(options.inputs, require=("prompt", "kind", "response", "rounds"), limit=options.limit, check=check)
    rows = list(without_each(source, names))
    decisive = {
        "model": options.model,
        "constitution": constitution.sha256,
        **asdict(options.sampling),
        "seed": options.seed,
    }
    _warn_of_other_settings(options.inputs, decisive)
    settings = {
        **decisive,
        "weights": identity(options.model),
        "input": source.digest,
        "limit": options.limit,
        "left_out": names,
        "dtype": options.dtype,
        "templates": [load_template(name).sha256 for name in ("critique", "revise")],
    }

    def measure(claim: Claim) -> tuple[dict, dict]:
        revised = claim("rows", settings)
        _revise_again(revised, rows, reduced, options)
        for name, without in reduced.items():
            rendering.save_constitution(f"{stem}.without-{files.file_name(name)}.yaml", without, overwrite=True)
        again = [row for _, row in read_jsonl(revised.path)]
        everything = [*source, *(row for row in again if len(row["rounds"]) == row["wanted"])]
        classified = claim("classes", settings | {"by": options.by, "judge": options.judge})
        texts = ({**row, "response": current_response(row)} for row in everything)
        reader.write_classes(texts, [row["id"] for row in everything], classified)
        read = [row for _, row in read_jsonl(classified.path)]
        classes.check_letter_mass(read)
        return _figures_without_each(read, again, names)

    plan = {
        "rows": source.count,
        "redone": len(rows),
        "model_calls": 2 * sum(row["wanted"] - len(row["rounds"]) for row in rows),
        "measured": source.count + len(rows),
    }
    return Measurement(list(options.inputs), plan, settings | {"by": options.by, "judge": options.judge}, measure)


def _warn_of_other_settings(inputs: Iterable[str], settings: dict) -> None:
    """Warn where the rows were written with other settings: the difference would then not be the principle's."""
    for path in inputs:
        before = (read_manifest(path) or {}).get("fingerprint", {})
        for key, value in settings.items():
            if key in before and before[key] != value:
                what = "another constitution file" if key == "constitution" else f"{key} {before[key]}, not {value}"
                cli.warn(f"{path} was made with {what}: what changes is not due to the principle alone")


def _revise_again(output: Output, rows: list[dict], reduced: dict[str, Constitution], options: SimpleNamespace) -> None:
    """Write the rows of `redo`, window by window (resumable)."""
    if output.complete:
        return
    engine = _load(options) if rows else None
    with output, cli.progress(len(rows), "revise again") as bar:
        bar.update(len(output.done))
        for window in _windows((row for row in rows if row["id"] not in output.done), 16 * options.batch_size):
            for row in redo(engine, window, reduced, options.sampling, options.seed):
                output.write(row)
                bar.update(1)
        failed = sum(len(row["rounds"]) < row["wanted"] for _, row in read_jsonl(output.journal))
        output.finish([row["id"] for row in rows], {"rows": len(rows), "failed": failed}, **fast_path(engine))


def _figures_without_each(classified: list[dict], again: list[dict], names: Sequence[str]) -> tuple[dict, dict]:
    """({`<principle> <metric>`: difference}, counts) from the classes of all rows, those revised again included."""
    class_of = {row["id"]: (row["kind"], row["class"]) for row in classified}
    replaced = {name: {row["original"]: row["id"] for row in again if row["left_out"] == name} for name in names}
    new_ids = {row["id"] for row in again}
    figures = {}
    for name, new_id in replaced.items():
        relevant = {id_: class_of[id_] for id_ in class_of if id_ not in new_ids or id_ in new_id.values()}
        for difference in differences(relevant, new_id):
            key = f"{name} {difference['metric']}"
            figures[key] = {"left_out": name, "redone": len(new_id), **difference}
    failed = sum(class_ is None for _, class_ in class_of.values()) + len(new_ids - set(class_of))
    return figures, {"failed": failed}


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
        return {"principle": principle(row), "prompt": row["prompt"], "response": current_response(row)}

    rows = [{**row, "rounds": list(row["rounds"])} for row in rows]
    while active := [row for row in rows if len(row["rounds"]) < row["wanted"] and not row.get("failed")]:
        for row in active:
            row["failed"] = True  # until both texts of the round are there
        for row, made in ask("critique", lambda row: critique.render(**shown(row))):
            row["rounds"].append({"principle": principle(row).id, "critique": made.text})
        active = [row for row in active if row["rounds"] and row["rounds"][-1].get("revision") is None]
        for row, made in ask("revise", lambda row: revise.render(**shown(row), critique=row["rounds"][-1]["critique"])):
            before = current_response(row)
            row["rounds"][-1] |= {"revision": made.text, "flags": flags(before, made.text, made.finish)}
            row["failed"] = False
    for row in rows:
        if row.pop("failed", False) and row["rounds"] and row["rounds"][-1].get("revision") is None:
            row["rounds"].pop()
    yield from rows


def differences(classes: dict[str, tuple[str, str | None]], redone: dict[str, str]) -> Iterator[dict]:
    """{metric, full, without, difference, low, high, n} of each rate of `RATES`.

    Args:
        classes: {row id: (kind, class)} of the full constitution's rows and of the redone ones.
        redone: {original id: id of the row that takes its place}.

    The difference is without minus full, with the 95 % interval of a paired difference: rows that were not redone
    count as no difference. With one row low and high are None. Rows without a class on either side are in no rate.
    """
    for metric, (kind, counted) in RATES.items():
        full, less = [], []
        for row_id, (its_kind, before) in classes.items():
            after = classes.get(redone.get(row_id, row_id), (kind, None))[1]
            if its_kind == kind and before is not None and after is not None and row_id not in redone.values():
                full.append(before in counted)
                less.append(after in counted)
        if not full:
            continue
        difference = intervals.mean([b - a for a, b in zip(full, less, strict=True)])
        yield {
            "metric": metric,
            "full": sum(full) / len(full),
            "without": sum(less) / len(less),
            "difference": difference["value"],
            "low": difference["low"],
            "high": difference["high"],
            "n": len(full),
        }


def check_drawn(row: dict, constitution: Constitution, where: str, line: int) -> None:
    """InputError unless every round of the row drew a principle of the constitution, and is complete."""
    for number, round_ in enumerate(row["rounds"], 1):
        if round_["principle"] not in constitution:
            raise InputError(
                f"round {number} drew {round_['principle']!r}, which {constitution.name} does not have",
                where=where,
                line=line,
                expected="rows that were revised under this constitution",
            )
    if not row["rounds"]:
        raise InputError("no rounds", where=where, line=line, expected="rows of revise.py")


def differences_as_text(rows: Iterable[dict]) -> str:
    """A line for each principle and figure that changed."""

    def points(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:+.1f}"  # a single row has no spread to measure

    changed = [
        (
            f"without {row['left_out']}",
            row["metric"].replace("_", " "),
            row["redone"],
            f"{100 * row['full']:.1f} → {100 * row['without']:.1f} %",
            f"{points(row['difference'])} ({points(row['low'])} to {points(row['high'])})",
        )
        for row in rows
        if row["difference"]
    ]
    if not changed:
        return "no figure changed, whichever principle was left out"
    return tables.table(("", "figure", "redone", "full → without", "points (95 % interval)"), changed)
