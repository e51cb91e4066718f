"""Show what a run did: one page with figures and every transcript, the same for a pull request, and cards.

    python scripts/report.py runs/tiny

Writes into the run's folder: report.html (one file, opens from disk, asks nothing of the network), report.md,
figures/ (SVG and PNG) and cards/ (model and dataset cards). Reads what is there and loads no model. Leaves out every
measurement except counting: run evaluate.py and judge.py for those.
"""

from pathlib import Path

import click

from cai.base import cli, files
from cai.base.errors import CaiError, InputError, shorten
from cai.report import cards, escaping, figures, pages, run_folder


@click.command(cls=cli.Command)
@click.argument("run", metavar="RUN")
@click.option("--output", default=None, metavar="FOLDER", help="Where the files go.  [default: RUN]")
@cli.options("json", "dry_run", "overwrite")
def main(run, output, as_json, dry_run, overwrite):
    """Write report.html, report.md, figures and cards from a folder that run.py, or its steps, wrote.

    An earlier report is replaced; a file of that name which is no report only with --overwrite.

    \b
    Example:
      python scripts/report.py runs/tiny
    """
    folder = Path(output or run)
    try:
        collected = run_folder.collect(run)
        pictures = figures.draw(collected)
        page, payload = pages.render_html(collected, pictures)
        texts = {"report.html": page, "report.md": pages.render_markdown(collected, pictures)}
        written = cards.write(collected)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # What only files that were changed by an editor can lead to: a number where a text was written.
        raise InputError(
            f"something in its files is not of the kind that a step writes ({type(error).__name__}: {shorten(error)})",
            where=run,
            remedy="Run the step that wrote it again with --overwrite; --debug shows where",
        ) from error
    texts |= {f"cards/{name}": text for name, text in written.items()}
    check_targets([folder / name for name in texts], overwrite)
    summary = {
        "command": "report",
        "steps": len(collected.steps),
        "rows": len(collected.rows),
        "stages": len(collected.stages),
        "report": str(folder / "report.html"),
    }
    if dry_run:
        cli.finish({**summary, "files": [str(folder / name) for name in texts]}, as_json=as_json)
        return
    try:
        for picture in pictures:
            picture.save(folder / "figures")
        for name, text in texts.items():
            files.write_text(folder / name, text)
    except OSError as error:
        raise CaiError(f"{folder}: cannot write ({error}). Make room and run it again.") from error
    summary |= {"transcripts": payload["shown"], "of": payload["total"], "figures": len(pictures)}
    cli.finish({**summary, "cards": len(written), "bytes": len(page.encode())}, as_json=as_json)


def check_targets(paths: list[Path], overwrite: bool) -> None:
    """InputError if a file that would be replaced was not written by this command."""
    for path in paths:
        if path.is_dir() or (path.exists() and not overwrite and escaping.MARK.encode() not in path.read_bytes()):
            raise InputError(
                "it exists, and this command did not write it",
                where=path,
                remedy="Name another --output, or replace it with --overwrite",
            )


if __name__ == "__main__":
    main()
