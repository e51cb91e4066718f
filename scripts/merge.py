"""Put the shards of a run together: all rows once, in the order of the input.

    python scripts/merge.py --input 'shards/*.jsonl' --output responses.jsonl

The shards are outputs of `generate.py`, `critique.py`, `revise.py` or `judge.py` with `--shard K/N`. The result is what
the same command would have written without --shard. Leaves out shards that are not finished: run those again first.
"""

import click

from cai.base import cli
from cai.data import outputs
from cai.stats import tables
from cai.steps.merging import Merger


@click.command(cls=cli.Command)
@cli.options("input", "output", "json", "dry_run", "overwrite")
def main(inputs, output, as_json, dry_run, overwrite):
    """Merge the shards of a run: check that they agree and that no row is missing, and restore the input's order.

    \b
    Example:
      python scripts/merge.py --input shards/1.jsonl --input shards/2.jsonl \\
          --output responses.jsonl
    """
    merger = Merger(inputs)
    merger.report_inputs()
    result = outputs.LinesOutput(
        output, command=merger.command, fingerprint=merger.fingerprint, overwrite=overwrite, inputs=inputs
    )
    summary = {"command": "merge", "merged": merger.command, "shards": len(inputs), "output": output}
    if dry_run:
        cli.finish({**summary, "rows": sum(1 for _ in merger.rows()), "failed": len(merger.failed)}, as_json=as_json)
        return
    with result:
        if result.complete:
            cli.note(f"{output} is done already; --overwrite makes it again")
        else:
            result.finish(merger.rows(), merger.count, failed_rows=merger.failed, **merger.info)
    summary |= result.counts
    cli.finish(summary if as_json else tables.show_rates(summary), as_json=as_json)


if __name__ == "__main__":
    main()
