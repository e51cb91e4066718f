"""Make a file that trainers read, from revised, answered or judged rows, with a ledger of every input row.

    python scripts/export.py --input revisions.jsonl --to trl-sft --keep copy --output train.jsonl

The ledger, `<output>.ledger.jsonl`, begins with the rows of the first command's input, found by the manifests. Leaves
out training (sft.py, dpo.py) and uploads (push.py).
"""

import os

import click

from cai.base import cli
from cai.base.errors import InputError
from cai.data import exports, outputs
from cai.data.reading import reading_options
from cai.steps.flags import selection_options


@click.command(cls=cli.Command)
@cli.options("input", "output")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(list(exports.TARGETS)),
    help="The format. trl-sft: prompt and completion. trl-preference: prompt, chosen, rejected and p_chosen. "
    "trl-prompt: the prompt alone. openai: messages. sharegpt: conversations.",
)
@selection_options("Export")
@click.option(
    "--keep-repeats",
    is_flag=True,
    help="Keep the answer to a prompt that an earlier input row has too. Default: it is a duplicate.",
)
@cli.options("limit", "json", "dry_run", "overwrite")
@reading_options
def main(inputs, output, target, rounds, keep, keep_repeats, limit, as_json, dry_run, overwrite, reading):
    """Export rows in a format that trainers read, with a ledger of what became of every input row.

    \b
    Example:
      python scripts/export.py --input revisions.jsonl --to trl-sft \\
          --keep copy --output train.jsonl
    """
    export = exports.Export(
        inputs, target, rounds=rounds, keep=frozenset(keep), keep_repeats=keep_repeats, limit=limit, reading=reading
    )
    settings = {"to": target, "rounds": rounds, "keep": sorted(set(keep)), "keep_repeats": keep_repeats, "limit": limit}
    ledger = f"{output}.ledger.jsonl"
    result = outputs.WholeOutput(
        output,
        command="export",
        fingerprint={"input": export.digest, **settings},
        overwrite=overwrite,
        inputs=[*inputs, *export.origins],
    )
    is_input = os.path.realpath(ledger) in map(os.path.realpath, [*inputs, *export.origins])
    if is_input or (os.path.exists(ledger) and not (result.manifest_path.exists() or overwrite)):
        raise InputError("it exists, and the ledger would take its place", where=ledger, remedy=result.foreign_remedy)
    for note in export.notes:
        cli.warn(note)
    if dry_run:
        result.counts = export.counts
    else:
        with result:
            if result.complete:
                cli.note(f"{output} is done already; --overwrite makes it again")
            else:
                result.finish({ledger: export.ledger, output: export.records}, export.counts, origins=export.origins)
    summary = {"command": "export", "output": output, "ledger": ledger, "begins_with": export.origins, **result.counts}
    cli.finish(summary, as_json=as_json)
    cli.exit_if_failed({"failed": summary["invalid"]})


if __name__ == "__main__":
    main()
