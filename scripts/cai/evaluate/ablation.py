"""What principles do: what changes in the figures of the revisions without one of them.

    measurement = measure_without_each(options, "runs/ablation")

An ablation repeats those revisions that had drawn the principle which is then left out: all others would be the same
without it. Leaves out training with each reduced constitution, which `run.py` does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from cai.base import cli, files, hashing
from cai.base.errors import InputError
from cai.constitution import rendering, templates
from cai.constitution.files import ALL, Constitution, Principle, load_constitution
from cai.data import outputs, rounds, sources
from cai.evaluate import classes, measurement, rates
from cai.models import loading
from cai.models.engine import Engine, Generation, Message, Request
from cai.stats import intervals, tables
from cai.steps.examples import Examples, default_most
from cai.steps.flags import flags


def measure_without_each(options: SimpleNamespace, stem: Path) -> measurement.Measurement:
    """What changes in the rates of revised rows without one principle at a time.

    Args:
        options: of `constitution.py ablate` by name, with sampling and loading.
        stem: the reduced constitutions become `<stem>.without-<principle>.yaml`.
    """
    loading.check_model(options.model)
    reader = classes.Reader(options.by, options.judge, endpoints=options.endpoints, loading=options.loading)
    reader.check()
    constitution = load_constitution(options.constitution)
    reduced = {
        principle.id: constitution.without(principle.id)
        for principle in rendering.select(constitution, options.principles)
    }

    def check(row: dict, where: str, line: int) -> None:
        rounds.check_rounds(row, where, line, critiqued=False)
        check_drawn(row, constitution, where, line)
        reader.check_row(row, where, line)

    fields = ("prompt", "kind", "response", "rounds")
    source = sources.Source(options.inputs, require=fields, limit=options.limit, check=check)
    rows = list(without_each(source, list(reduced)))
    settings = {
        **_revision_settings(options, constitution),
        "weights": hashing.identity(options.model),
        "input": source.digest,
        "limit": options.limit,
        "left_out": list(reduced),
        "dtype": options.dtype,
        "templates": [templates.load_template(name).sha256 for name in ("critique", "revise")],
    }
    reading = settings | {"by": options.by, "judge": options.judge, "orders": reader.orders if reader.judge else None}

    def measure(claim: measurement.Claim) -> tuple[dict, dict]:
        redone = _write_redone(claim("rows", settings), rows, reduced, options)
        for name, without in reduced.items():
            rendering.save_constitution(f"{stem}.without-{files.file_name(name)}.yaml", without, overwrite=True)
        texts = [*source, *(row for row in redone if len(row["rounds"]) == row["wanted"])]
        texts = ({**row, "response": rounds.text_of_round(row)} for row in texts)
        classified = reader.write_classes(texts, claim("classes", reading))
        letters = classes.letter_figures(classified, "take a larger judge before you rely on this")
        figures, counts = _figures_without_each(classified, redone, reduced)
        return figures, {**counts, **letters}

    return measurement.Measurement(
        list(options.inputs),
        {
            "rows": source.count,
            "redone": len(rows),
            "model_calls": 2 * sum(row["wanted"] - len(row["rounds"]) for row in rows),
            "measured": source.count + len(rows),
        },
        reading,
        measure,
    )


def _revision_settings(options: SimpleNamespace, constitution: Constitution) -> dict:
    """Those that revise.py has as well; warns where the rows were made with others."""
    settings = {
        "model": options.model,
        "constitution": constitution.sha256,
        "seed": options.seed,
        "examples": default_most(options.most_examples, options.model),
        **{name: value for name, value in asdict(options.sampling).items() if name != "stop"},
    }
    _warn_of_other_settings(options.inputs, settings)
    return settings


def _warn_of_other_settings(inputs: Iterable[str], settings: dict) -> None:
    """Warn where the rows were written with other settings: the difference would then not be the principle's."""
    for path in inputs:
        before = (outputs.read_manifest(path) or {}).get("fingerprint", {})
        for key, value in settings.items():
            if key in before and before[key] != value:
                what = "another constitution file" if key == "constitution" else f"{key} {before[key]}, not {value}"
                cli.warn(f"{path} was made with {what}: what changes is not due to the principle alone")


def _write_redone(
    output: outputs.Output, rows: Sequence[dict], reduced: dict[str, Constitution], options: SimpleNamespace
) -> list[dict]:
    """Write the rows of `redo`, window by window (resumable), and return them."""

    def produce(engine: Engine) -> Iterator[dict]:
        remaining = (row for row in rows if row["id"] not in output.done)
        while window := list(islice(remaining, 16 * options.batch_size)):
            yield from redo(engine, window, reduced, options)

    def count(redone: Iterable[dict]) -> dict:
        return {"rows": len(rows), "failed": sum(len(row["rounds"]) < row["wanted"] for row in redone)}

    def load() -> Engine | None:
        return loading.load_engine(options.model, endpoints=options.endpoints, **options.loading) if rows else None

    return measurement.fill(output, [row["id"] for row in rows], "revise again", load, produce, count)


def without_each(rows: Iterable[dict], left_out: Sequence[str]) -> Iterator[dict]:
    """For each principle, the rows that drew it, back at the round that did: {…, left_out, original, wanted}.

    original: the row's id; wanted: how many rounds it had. The new id names the row and the principle.
    """
    for row in rows:
        drawn = [round_["principle"] for round_ in row["rounds"]]
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
    engine: Engine, rows: Iterable[dict], reduced: dict[str, Constitution], options: SimpleNamespace
) -> Iterator[dict]:
    """Rows of `without_each` with their rounds completed under `reduced[left_out]`.

    Each text is drawn from the seed that critique.py and revise.py would use for the row and round, and sees as many
    worked examples. A row that does not fit the model's context comes back with fewer rounds than `wanted`.
    """

    def draw(row: dict) -> Principle:
        used = [round_["principle"] for round_ in row["rounds"]]
        return reduced[row["left_out"]].draw(options.seed, row["original"], len(used), used)

    def answer(command: str, rows: Iterable[dict], critiques: Mapping | None = None) -> dict[str, Generation]:
        """{row id: its critique or revision}; a row that is not answered is missing."""
        template, most = templates.load_template(command), default_most(options.most_examples, options.model)
        examples = {
            name: Examples(rules, template, "revision" if critiques else "critique", most)
            for name, rules in reduced.items()
        }
        for each in examples.values():
            each.fit(engine, options.sampling.max_new_tokens)

        def ask(row: dict) -> Sequence[Message]:
            principle, response = draw(row), rounds.text_of_round(row)
            more = {"critique": critiques[row["id"]].text} if critiques else {}
            question = template.render(principle=principle, prompt=row["prompt"], response=response, **more)
            return examples[row["left_out"]].add(principle, question)

        requests = (
            # revise.py counts the round that it completes
            Request(
                row["id"],
                ask(row),
                hashing.hashed_seed(command, options.seed, row["original"], len(row["rounds"]) + bool(critiques)),
            )
            for row in rows
        )
        generated = engine.generate(requests, options.sampling)
        return {request.key: generation for request, generation in generated if not generation.lost}

    rows = active = [{**row, "rounds": list(row["rounds"])} for row in rows]
    while active:
        critiques = answer("critique", active)
        revisions = answer("revise", [row for row in active if row["id"] in critiques], critiques)
        active = [row for row in active if row["id"] in revisions]
        for row in active:
            revision = revisions[row["id"]]
            completed = {
                "principle": draw(row).id,
                "critique": critiques[row["id"]].text,
                "revision": revision.text,
                "flags": flags(rounds.text_of_round(row), revision.text, revision.finish),
            }
            row["rounds"].append(completed)
        active = [row for row in active if len(row["rounds"]) < row["wanted"]]
    yield from rows


def _figures_without_each(
    classified: Iterable[dict], redone: Sequence[dict], names: Iterable[str]
) -> tuple[dict, dict]:
    """({`<principle> <metric>`: difference}, counts) from the classes of all rows, those that were redone included."""
    class_of = {row["id"]: (row["kind"], row["class"]) for row in classified}
    redone_ids = {row["id"] for row in redone}
    figures = {}
    for name in names:
        new_id = {row["original"]: row["id"] for row in redone if row["left_out"] == name}
        relevant = {id_: class_of[id_] for id_ in class_of if id_ not in redone_ids or id_ in new_id.values()}
        for difference in differences(relevant, new_id):
            figures[f"{name} {difference['metric']}"] = {"left_out": name, "redone": len(new_id), **difference}
    failed = sum(class_ is None for _, class_ in class_of.values()) + len(redone_ids - set(class_of))
    return figures, {"failed": failed}


def differences(classes: dict[str, tuple[str, str | None]], redone: dict[str, str]) -> Iterator[dict]:
    """{metric, full, without, difference, low, high, n} of each rate of `rates.RATES`.

    Args:
        classes: {row id: (kind, class)} of the full constitution's rows and of the redone ones.
        redone: {original id: id of the row that takes its place}.

    The difference is without minus full, with the 95 % interval of a paired difference: rows that were not redone
    count as no difference. With one row low and high are None. Rows without a class on either side are in no rate.
    """
    substitutes = set(redone.values())
    for metric, (kind, counted) in rates.RATES.items():
        pairs = [
            (before in counted, after in counted)
            for row_id, (kind_of_row, before) in classes.items()
            for _, after in [classes.get(redone.get(row_id, row_id), (kind, None))]
            if kind_of_row == kind and None not in (before, after) and row_id not in substitutes
        ]
        if pairs:
            full, without = (sum(successes) / len(pairs) for successes in zip(*pairs, strict=True))
            difference = intervals.mean([after - before for before, after in pairs])
            yield {
                "metric": metric,
                "full": full,
                "without": without,
                "difference": difference["value"],
                "low": difference["low"],
                "high": difference["high"],
                "n": len(pairs),
            }


def check_drawn(row: dict, constitution: Constitution, where: str, line: int) -> None:
    """InputError unless every round of the row drew a principle of the constitution, and is complete."""
    for number, round_ in enumerate(row["rounds"], 1):
        if round_["principle"] == ALL or "speaks" in round_ or "skipped" in round_:
            raise InputError(
                f"round {number} did not draw its principle",
                where=where,
                line=line,
                expected="rows that were critiqued with --principles draw, without --stop-when-content",
                remedy="Critique and revise the responses again with --principles draw",
            )
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
    # A single row has no spread to measure: its interval is not shown.
    changed = [
        (
            f"without {row['left_out']}",
            row["metric"].replace("_", " "),
            row["redone"],
            f"{100 * row['full']:.1f} → {100 * row['without']:.1f} %",
            tables.show_points(row["difference"], row["low"], row["high"]),
        )
        for row in rows
        if row["difference"]
    ]
    if not changed:
        return "no figure changed, whichever principle was left out"
    return tables.table(("", "figure", "redone", "full → without", "points (95 % interval)"), changed)
