"""Draw a figure of the paper (arXiv 2212.08073) from the folders of runs.

    python scripts/figures.py --figure 5 --run runs/tiny --output runs/tiny/figure5.jsonl

The points of the figure go to the output, one per line, and its drawings (PNG, SVG, CSV) to files beside it. Leaves out
every measurement that a run folder should already hold: run evaluate.py, compare.py and judge.py for those.
"""

from pathlib import Path
from types import SimpleNamespace

import click

from cai.base import cli
from cai.data import outputs, readers
from cai.report import paper
from cai.stats import tables


@click.command(cls=cli.Command)
@click.option(
    "--figure",
    required=True,
    type=click.Choice(list(paper.FIGURES)),
    help="2 the plane in Elo points, 5 scores by revision round, 6 by number of principles, 7 with and without "
    "critiques, 9 calibration, 10 harmfulness from 0 to 4.",
)
@click.option("--run", multiple=True, required=True, metavar="FOLDER", help="The folder of a run. Repeatable.")
@cli.options("output")
@click.option(
    "--reward-model",
    metavar="MODEL",
    help="Scores the revisions in figures 5, 6 and 7.  [default: the one that the first run trained]",
)
@click.option(
    "--judge", metavar="MODEL", help="Rates the responses in figure 10: a folder, a hub id, `tiny`, or openai:NAME@URL."
)
@cli.options("endpoint", "engine", "limit", "batch_size", "device", "dtype", "json", "dry_run", "overwrite")
def main(figure, run, output, as_json, dry_run, overwrite, batch_size, device, dtype, **options):
    """Make the points of a figure of the paper, and draw them.

    The points go to OUTPUT, one per line; OUTPUT's name with .png, .svg and .csv are the drawings and the table.

    \b
    Example:
      python scripts/figures.py --figure 5 --run runs/tiny --output runs/tiny/figure5.jsonl
    """
    loading = {"batch_size": batch_size, "device": device, "dtype": dtype}
    settings, make = paper.FIGURES[figure].points(run, SimpleNamespace(**options, dtype=dtype, loading=loading))
    points = outputs.Output(output, command="figures", fingerprint={"figure": figure, **settings}, overwrite=overwrite)
    if dry_run:
        cli.finish({"figure": figure, "runs": len(run), "output": output}, as_json=as_json)
        return
    if not points.complete:
        with points:
            rows = {paper.name_of(row): row for row in make()}
            for name, row in rows.items():
                if name not in points.done:
                    points.write({"id": name, "metric": name, **row})
            points.finish(rows, {"points": len(rows)})
    rows = [row for _, row in readers.read_jsonl(output)]
    summary = {**points.counts, "output": output, "files": paper.save(figure, rows, Path(output).with_suffix(""))}
    if as_json:
        metrics = {row["id"]: {key: row[key] for key in row if key not in ("id", "metric")} for row in rows}
        summary = {"metrics": metrics, **summary}
    else:
        lines = [(row["id"], tables.show_number(row), row["n"]) for row in rows]
        click.echo(tables.table(("", "value (95 % interval)", "n"), lines))
    cli.finish(summary, as_json=as_json)


if __name__ == "__main__":
    main()
