"""One measurement: its input, its plan, the file of rates that it writes, and that file as a table or JSON.

    measurement = tasks.choose(options)
    output = Output("evaluation.jsonl", command="evaluate", fingerprint=measurement.settings)
    write(measurement, output)
    print_rates(output, as_json=False)

Leaves out what is measured: tasks.py for evaluate.py, contest.py for compare.py.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import click

from cai.base import cli, events, requests
from cai.data import outputs, readers
from cai.evaluate import framed
from cai.evaluate.rates import disagreements
from cai.models.engine import Sampling
from cai.models.local import fast_path
from cai.stats import tables

Claim = Callable[[str, dict], outputs.Output]

# Metrics that are not shares, beside those in nats (`logp_...`).
NUMBERS = ("log_loss", "ece", "length_correlation", "drift_kl", "drift_kl_token")


@dataclass
class Measurement:
    """What is to be measured; made without loading a model, so that bad input is refused first.

    files: the inputs. plan: what --dry-run prints. settings: everything that decides the figures.
    measure: returns ({metric: figure}, counts), given `claim(ending, settings)`, the file of rows beside the output.
    """

    files: list[str]
    plan: dict
    settings: dict
    measure: Callable[[Claim], tuple[dict, dict]]


def gather(values: Mapping[str, Any]) -> SimpleNamespace:
    """A command's options by name; with `loading`, those of a model on this machine, and `sampling` if it samples."""
    options = SimpleNamespace(**values, loading={name: values[name] for name in ("batch_size", "device", "dtype")})
    if "temperature" in values:
        options.sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
    return options


def write(measurement: Measurement, output: outputs.Output) -> None:
    """Measure, and write one row {metric, value, low, high, n} per figure (resumable)."""
    if output.complete:
        return

    def claim(ending: str, settings: dict) -> outputs.Output:
        return outputs.Output(
            f"{output.path.with_suffix('')}.{ending}.jsonl",
            command=output.command,
            fingerprint=settings,
            overwrite=output.overwrite,
            inputs=measurement.files,
        )

    claim, claimed = collect(claim)
    rates, counts = measurement.measure(claim)
    counts = {**counts, **requests.sum_counts(each.counts for each in claimed)}
    with output:
        for name, figure in rates.items():
            if name not in output.done:
                output.write({"id": name, "metric": name, **figure})
        output.finish(rates, counts)


def collect(claim: Claim) -> tuple[Claim, list[outputs.Output]]:
    """`claim`, and the list of the outputs that it will have claimed."""
    claimed: list[outputs.Output] = []

    def claim_and_keep(ending: str, settings: dict) -> outputs.Output:
        claimed.append(claim(ending, settings))
        return claimed[-1]

    return claim_and_keep, claimed


def fill(
    output: outputs.Output,
    ids: Sequence[str],
    label: str,
    load: Callable[[], object],
    produce: Callable[[Any], Iterable[dict | None]],
    count: Callable[[Iterable[dict]], dict] | None = None,
) -> list[dict]:
    """Write what `produce(engine)` yields, unless the output is complete, and return all rows of it (resumable).

    Args:
        ids: of all rows, in the order of the file. label: of the progress bar.
        load: loads the engine, or returns None; called only if something is left to do.
        produce: yields the rows whose ids are not in `output.done`, and None in place of one that could not be made.
        count: the counts of the manifest, by all rows; their number by default.
    """
    if not output.complete:
        engine = load()
        with output, cli.progress(len(ids) - len(output.done), label) as bar:
            for row in produce(engine):
                if row is not None:
                    output.write(row)
                bar.update()
            rows = (row for _, row in readers.read_jsonl(output.journal))
            counts = count(rows) if count else {"rows": len(output.done)}
            output.finish(ids, counts, **fast_path(getattr(engine, "engine", engine)))  # a guard model has one inside
    return [row for _, row in readers.read_jsonl(output.path)]


def print_rates(
    output: outputs.Output, *, as_json: bool, changes: Mapping[str, str] | None = None, more: Mapping | None = None
) -> None:
    """Print the rates as a table with the counts below, or as one JSON object.

    Args:
        changes: a further column of the table, {metric: text}.
        more: further fields of the JSON object.
    """
    rows = {row["metric"]: row for _, row in readers.read_jsonl(output.path)}
    apart = disagreements(rows)
    events.emit_figures({"metrics": rows, **output.counts, "output": str(output.path)})
    if as_json:
        metrics = {name: {k: v for k, v in row.items() if k not in ("id", "metric")} for name, row in rows.items()}
        summary = {
            **({"disagreements": apart} if apart else {}),
            "metrics": metrics,
            **output.counts,
            "output": str(output.path),
            **(more or {}),
        }
        first = {name: summary[name] for name in ("qualification", "qualified") if name in summary}
        return click.echo(json.dumps({**first, **summary}, ensure_ascii=False))
    if verdict := output.counts.get("qualification"):
        click.echo(f"reader: {verdict}")
    if apart:
        pairs = (f"{name} {100 * a:.1f} % against {100 * b:.1f} %" for name, (a, b) in apart.items())
        click.echo(f"THE READERS DISAGREE: {'; '.join(pairs)} (the oracle against the judge)")
    columns = {
        "by the judge": {name: show_figure(name, row["by_judge"]) for name, row in rows.items() if "by_judge" in row},
        # standard deviation and range over the seeds, in points
        "over seeds": {
            name: "± {sd:.1f} ({lowest:.1f}–{highest:.1f})".format(**{key: 100 * x for key, x in row["seeds"].items()})
            for name, row in rows.items()
            if "seeds" in row
        },
        "change": {} if changes is None else {name: changes.get(name, "–") for name in rows},
    }
    columns = {title: cells for title, cells in columns.items() if cells}
    shown = {name: row for name, row in rows.items() if not framed.is_single(name) and not framed.is_of_kind(name)}
    lines = [
        (name.replace("_", " "), show_figure(name, row), row["n"], *(cells.get(name, "") for cells in columns.values()))
        for name, row in shown.items()
        if row["n"]
    ]
    value = "unqualified value" if output.counts.get("qualified") is False else "value"
    click.echo(tables.table(("", f"{value} (95 % interval)", "n", *columns), lines))
    if unmeasured := [name.replace("_", " ") for name, row in shown.items() if not row["n"]]:
        click.echo(f"no prompts or responses for: {', '.join(unmeasured)}")
    if frames := framed.table(rows):
        click.echo("\n".join(["", frames, *framed.worst_lines(rows), ""]))
    for note in output.counts.get("notes", ()):
        click.echo(f"note: {note}")
    counts = [
        f"{name.replace('_', ' ')} {tables.show(count) if isinstance(count, Mapping) and 'value' in count else count}"
        for name, count in output.counts.items()
        if name not in ("notes", "qualification", "qualified")
    ]
    click.echo(f"{', '.join(counts)}; {output.path}")


def show_figure(name: str, row: Mapping) -> str:
    """A figure in its own unit: Elo points, a number, or per cent."""
    if "_elo " in name:
        ends = ("open" if row[end] is None else f"{row[end]:+.0f}" for end in ("low", "high"))
        return f"{row['value']:+.0f} ({' to '.join(ends)})".replace("-", "−")
    return (tables.show_number if name in NUMBERS or name.startswith("logp_") else tables.show)(row)
