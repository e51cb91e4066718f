"""Measure what a model's responses do: comply, refuse well, dodge, preach, help, over-refuse.

    python scripts/evaluate.py --input scripts/cai/tiny/prompts/heldout.jsonl --model tiny --by oracle \
        --output evaluation.jsonl
    python scripts/evaluate.py --choice 438HHHEvaluations.jsonl --model runs/sft --output choice.jsonl
    python scripts/evaluate.py --input heldout.jsonl --model runs/sft --judge my-org/my-judge --output sft.jsonl \
        --against base.jsonl --gate

Every response is put into one class, by the bundled world's oracle (prompts made by tiny.py only), by a judge model's
forced choice between letters, or by a safety classifier. Besides: a language model or a reward model on multiple
choices (`--choice`), and a reward model on pairs whose better response is known. Leaves out any score of how good a
text is, and any rate over prompts whose kind is not stated.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import click

from cai.base import cli
from cai.base.errors import InputError
from cai.data import public_sets
from cai.data.outputs import Output
from cai.data.readers import read_jsonl
from cai.evaluate import benchmarks, gate, habits, responding, tasks
from cai.report import paper
from cai.stats import tables

WORSE = 4  # exit code of --gate

# Metrics that are no shares.
NUMBERS = ("log_loss", "ece", "length_correlation", "drift_kl", "drift_kl_token")


@click.command(cls=cli.Command)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="FILE",
    help="Prompts with their kind, or pairs with gold (with --reward-model). Repeatable.",
)
@cli.options("output")
@click.option("--model", metavar="MODEL", help="Answers the prompts: a folder, a hub id, `tiny`, or openai:NAME.")
@cli.options("endpoint")
@click.option(
    "--responses",
    multiple=True,
    metavar="FILE",
    help="Instead of --input and --model: rows that have a response already. Repeatable.",
)
@click.option(
    "--set",
    "form",
    type=click.Choice(list(public_sets.FORMATS)),
    help="The public set that the rows are of. Default: told by their columns.",
)
@click.option(
    "--round",
    "round_",
    type=click.IntRange(min=0),
    default=None,
    help="Of revised rows, the revision of this round; 0 is the first response. Default: the last.",
)
@click.option(
    "--by",
    type=click.Choice(["oracle", "judge"]),
    default="judge",
    show_default=True,
    help="Who reads the responses: the rules of the bundled world, or a judge model.",
)
@click.option(
    "--judge",
    metavar="MODEL",
    help="The judge model: a folder, a hub id, `tiny`, or openai:NAME@URL. With "
    "--by oracle its classes are compared with the oracle's.",
)
@click.option(
    "--classifier",
    metavar="MODEL",
    help="Instead of a judge: a sequence-classification model that knows "
    "safe from unsafe, or a guard model that writes it, such as Llama Guard.",
)
@click.option(
    "--unsafe-label",
    multiple=True,
    metavar="LABEL",
    help="The classifier's label for unsafe. Repeatable. Default: those whose name says so.",
)
@click.option(
    "--stress",
    multiple=True,
    type=click.Choice([*responding.WAYS, "all"]),
    help="Ask harmful prompts also so: pushed again, with a begun answer, under a role or a system prompt "
    "that drops all principles, under one that asks for care. Repeatable.",
)
@click.option(
    "--drift-from",
    metavar="MODEL",
    help="Also the KL divergence of --model from this one, its base, on harmless prompts.",
)
@click.option(
    "--faults",
    is_flag=True,
    help="Of revised rows (--responses): what each principle did, and with "
    "--judge how often its critiques found fault.",
)
@click.option(
    "--policy",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="Instead of --model: this one against the others, by --judge, harmlessness and helpfulness apart; "
    "Elo points above the first. A model, or a file of its responses. Repeatable.",
)
@cli.options("constitution")
@click.option(
    "--helpfulness",
    default="helpfulness",
    show_default=True,
    metavar="NAME|FILE",
    help="With --policy: the constitution that harmless prompts are judged by.",
)
@click.option(
    "--figure",
    type=click.Choice(list(paper.FIGURES)),
    help="Make this figure of the paper from --run: 2 the plane in Elo points, 5 scores by revision round, 6 "
    "by number of principles, 7 with and without critiques, 9 calibration, 10 harmfulness 0 to 4.",
)
@click.option("--run", multiple=True, metavar="FOLDER", help="With --figure: the folder of a run. Repeatable.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sample so many times, with the seeds from --seed on, and give the spread.",
)
@click.option("--against", metavar="FILE", help="An earlier --output: say what changed since, with intervals.")
@click.option(
    "--watch",
    is_flag=True,
    help="With --against: signs that the policy pleases its judge instead of its "
    "reader, such as phrases that became a habit.",
)
@click.option(
    "--gate",
    "gated",
    is_flag=True,
    help="With --against: end with one line VERDICT, and with exit code 4 if it is worse.",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, 100),
    default=0.0,
    show_default=True,
    help="Points of a hundred that a figure may change without being called better or worse.",
)
@click.option(
    "--reward-model",
    metavar="FOLDER",
    help="Measure this reward model: its accuracy on pairs with response_a, response_b and gold, on those "
    "with chosen and rejected (HH-RLHF's too), or on the text_correct and text_incorrect of --choice.",
)
@click.option(
    "--choice",
    metavar="FILE",
    help="Instead of --input: questions with `prompt`, `corrects` and `incorrects`, of which --model picks "
    "the likeliest; the format of the paper's three evaluation sets.",
)
@click.option(
    "--choice-format",
    type=click.Choice(benchmarks.FORMS),
    default="chat",
    show_default=True,
    help="Ask as a user's turn with the answer begun, or go on from the plain text, as for a pretrained model.",
)
@cli.options(
    "temperature",
    "top_p",
    "max_new_tokens",
    "seed",
    "limit",
    "batch_size",
    "device",
    "dtype",
    "json",
    "dry_run",
    "overwrite",
)
def main(output, against, watch, gated, margin, as_json, dry_run, overwrite, **options):
    """Measure responses: rates per kind of prompt, with 95 % intervals.

    Prompts need a `kind`: harmful, benign or borderline. The rates go to OUTPUT, one a line; the responses
    and their classes, or the scores of each choice, to files beside it.

    \b
    Example:
      python scripts/evaluate.py --input scripts/cai/tiny/prompts/heldout.jsonl \\
          --model tiny --by oracle --output evaluation.jsonl
    """
    given = SimpleNamespace(**options)
    given.loading = {name: options[name] for name in ("batch_size", "device", "dtype")}
    if (gated or watch) and not against:
        raise InputError(
            f"{'--gate' if gated else '--watch'} without --against FILE", remedy="Name the evaluation to compare with"
        )
    before = gate.load(against) if against else None
    task = tasks.pick(given)(given)
    claim = {"command": "evaluate", "overwrite": overwrite, "inputs": [*task.files, *([against] if against else [])]}
    final = Output(output, fingerprint=task.settings, **claim)
    if dry_run:
        cli.finish({**task.plan, "output": output}, as_json=as_json)
        return
    if not final.complete:
        stem = Path(output).with_suffix("")
        rates, counts = task.measure(
            lambda ending, settings: Output(f"{stem}.{ending}.jsonl", fingerprint=settings, **claim)
        )
        write_rates(final, rates, counts)
    if given.figure:
        paper.save(given.figure, (row for _, row in read_jsonl(output)), Path(output).with_suffix(""))
    signs = habits.watch(gate.rows(against), gate.rows(output)) if watch else None
    report(final, as_json, before, gated, margin / 100, signs)


# --- what comes out -----------------------------------------------------------------------------------------


def write_rates(output: Output, rates: dict, counts: dict) -> None:
    """Write {metric, value, low, high, n} rows."""
    with output:
        for name, measured in rates.items():
            if name not in output.done:
                output.write({"id": name, "metric": name, **measured})
        output.finish(rates, counts)


def report(
    output: Output, as_json: bool, before: gate.Evaluation | None, gated: bool, margin: float, signs: dict | None
) -> None:
    """Print the rates as a table, or all as one JSON object; with 3 if rows failed, with 4 if a gate says worse."""
    rows = {row["metric"]: row for _, row in read_jsonl(output.path)}
    deltas = gate.compare(before, gate.load(output.path), gated=gated) if before else []
    said = gate.verdict(deltas, margin) if gated else None
    if as_json:
        rates = {name: {key: row[key] for key in row if key not in ("id", "metric")} for name, row in rows.items()}
        summary = {"metrics": rates, **output.counts, "output": str(output.path)}
        if before:
            summary["against"] = {
                "file": str(before.path),
                "verdict": said,
                "deltas": {one.metric: gate.as_json(one) for one in deltas},
            }
        click.echo(json.dumps(summary | ({"watch": signs} if signs else {}), ensure_ascii=False))
    else:
        changes = {one.metric: gate.shown(one).removeprefix(f"{one.metric} ") for one in deltas}
        extra = {
            "by the judge": lambda name, row: shown(name, row["by_judge"]) if "by_judge" in row else "",
            "over seeds": lambda name, row: _spread(row),
            "change": lambda name, row: changes.get(name, "–"),
        }
        there = {
            "by the judge": any("by_judge" in row for row in rows.values()),
            "over seeds": any("seeds" in row for row in rows.values()),
            "change": before is not None,
        }
        columns = {name: of for name, of in extra.items() if there[name]}
        lines = [
            (name.replace("_", " "), shown(name, row), row["n"], *(of(name, row) for of in columns.values()))
            for name, row in rows.items()
        ]
        header = ("", "value (95 % interval)", "n", *columns)
        click.echo(tables.table(header, lines))
        for note in output.counts.get("notes", ()):
            click.echo(f"note: {note}")
        told = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in output.counts.items() if name != "notes"
        )
        click.echo(f"{told}; {output.path}")
        if signs:
            click.echo(habits.table(signs))
    if gated:
        click.echo(gate.line(deltas, said), err=as_json)
    if said == "worse":
        click.get_current_context().exit(WORSE)
    if output.counts.get("failed"):
        click.get_current_context().exit(cli.SOME_FAILED)


def shown(name: str, row: dict) -> str:
    """A figure in its own unit: Elo points, a number, or per cent."""
    if "_elo " in name:
        ends = ("open" if row[end] is None else f"{row[end]:+.0f}" for end in ("low", "high"))
        return f"{row['value']:+.0f} ({' to '.join(ends)})".replace("-", "−")
    return (tables.show_number if name in NUMBERS or "series" in row else tables.show)(row)


def _spread(row: dict) -> str:
    """`± 1.2 (93.0–96.0)`: standard deviation and range over the seeds, in points."""
    one = row.get("seeds")
    return f"± {100 * one['sd']:.1f} ({100 * one['lowest']:.1f}–{100 * one['highest']:.1f})" if one else ""


if __name__ == "__main__":
    main()
