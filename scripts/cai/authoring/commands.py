"""The subcommands of constitution.py that ask a model.

    main.add_command(coverage)     # scripts/constitution.py adds each of COMMANDS

Leaves out what needs no model (lint, show, new, import, export, schema): scripts/constitution.py.
"""

from pathlib import Path

import click

from cai.base import cli
from cai.data import outputs, readers, reading
from cai.evaluate import ablation, measurement


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "endpoint", "constitution")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="A principle applies to a prompt at this probability or above.",
)
@cli.options("limit", "batch_size", "device", "dtype", "json", "dry_run", "overwrite")
@reading.reading_options
def coverage(output, as_json, dry_run, overwrite, **values):
    """Find the prompts that no principle applies to, by a judge model.

    Each prompt is asked about with each principle, in both orders. OUTPUT has `covered` and the probabilities.

    \b
    Example:
      python scripts/constitution.py coverage --input prompts.jsonl --model tiny \\
          --constitution harmlessness --output coverage.jsonl
    """
    questions = ablation.Coverage(measurement.gather(values))
    journal = outputs.Output(
        output, command="coverage", fingerprint=questions.settings, overwrite=overwrite, inputs=values["inputs"]
    )
    if not dry_run:
        questions.write(journal)
    counts = questions.count(journal) if dry_run else journal.counts
    cli.finish({"command": "coverage", "output": output, **counts}, as_json=as_json)


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "endpoint", "constitution", "principle")
@click.option(
    "--by",
    type=click.Choice(["oracle", "judge"]),
    default="judge",
    show_default=True,
    help="Who reads the responses: the rules of the bundled world, or a judge model.",
)
@click.option("--judge", metavar="MODEL", help="The judge model: a folder, a hub id, or `tiny`.")
@cli.options("examples", "reasoning_tags", "temperature", "top_p", "max_new_tokens", "seed", "limit")
@cli.options("batch_size", "device", "dtype", "json", "dry_run", "overwrite")
def ablate(output, as_json, dry_run, overwrite, **values):
    """Leave one principle out at a time, and show what changes in the figures of the revisions.

    Reads rows of revise.py, made with this model, constitution and sampling. The rows that drew a principle are
    revised and measured again without it. The constitutions without it lie beside OUTPUT, for `run.py` to use.

    \b
    Example:
      python scripts/constitution.py ablate --input revisions.jsonl --model tiny \\
          --constitution harmlessness --by oracle --output ablation.jsonl
    """
    without = ablation.measure_without_each(measurement.gather(values), Path(output).with_suffix(""))
    final = outputs.Output(
        output, command="ablate", fingerprint=without.settings, overwrite=overwrite, inputs=without.files
    )
    summary = {"command": "ablate", "output": output}
    if dry_run:
        return cli.finish({**summary, **without.plan}, as_json=as_json)
    measurement.write(without, final)
    rows = [row for _, row in readers.read_jsonl(output)]
    if not as_json:
        click.echo(ablation.differences_as_text(rows))
    summary |= {"rows": without.plan["rows"], "redone": without.plan["redone"], **final.counts}
    cli.finish({**summary, "principles": rows} if as_json else summary, as_json=as_json)


COMMANDS = (coverage, ablate)
