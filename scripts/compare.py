"""Compare policies: every one against every other by a judge, as Elo points.

    python scripts/compare.py --input scripts/cai/tiny/prompts/heldout.jsonl --policy base=tiny --policy sft=runs/sft \
        --judge my-org/my-judge --output elo.jsonl

Harmlessness is judged on harmful prompts, helpfulness on harmless ones, each by a constitution of its own and in both
orders. A policy is a model, or a file of its responses. Leaves out rates of what one policy's responses do:
evaluate.py.
"""

import click

from cai.base import cli
from cai.data import outputs
from cai.data.reading import reading_options
from cai.evaluate import contest
from cai.evaluate.measurement import gather, print_rates, write


@click.command(cls=cli.Command)
@cli.options("input", "output", "date", "reasoning_tags")
@click.option(
    "--policy",
    multiple=True,
    required=True,
    metavar="[NAME=]MODEL",
    help="A model, or a .jsonl file of its responses; scores are Elo points above the first. Repeatable.",
)
@click.option(
    "--judge",
    required=True,
    metavar="MODEL",
    help="The judge model, best none of the policies: a folder, a hub id, `tiny`, or openai:NAME@URL.",
)
@cli.options("constitution")
@click.option(
    "--helpfulness",
    default="helpfulness",
    show_default=True,
    metavar="NAME|FILE",
    help="The constitution that harmless prompts are judged by.",
)
@cli.options("endpoint", "engine")
@cli.options("temperature", "top_p", "max_new_tokens", "seed", "limit")
@cli.options("batch_size", "device", "dtype", "events", "json", "dry_run", "overwrite")
@reading_options
def main(output, as_json, dry_run, overwrite, **values):
    """Compare policies: Elo points for harmlessness and for helpfulness, with 95 % intervals.

    Prompts need a `kind`: harmful, benign or borderline. The scores go to OUTPUT, one per line; the responses
    of each model and the judged comparisons to files beside it.

    \b
    Example:
      python scripts/compare.py --input prompts.jsonl --policy base=tiny --policy sft=runs/sft \\
          --judge tiny --output elo.jsonl
    """
    measurement = contest.measure_policies(gather(values))
    final = outputs.Output(
        output, command="compare", fingerprint=measurement.settings, overwrite=overwrite, inputs=measurement.files
    )
    if dry_run:
        cli.finish({**measurement.plan, "output": output}, as_json=as_json)
        return
    write(measurement, final)
    print_rates(final, as_json=as_json)
    cli.exit_if_failed(final.counts)


if __name__ == "__main__":
    main()
