"""What one to four rounds of revision leave: with and without critiques, and by drawn, matched or all principles.

    python tests/benchmarks/revisions.py PROMPTS --model tiny --by oracle --output runs/revisions
    python tests/benchmarks/revisions.py PROMPTS --model smollm2 --critic CRITIC --by phrases --output runs/revisions

All ways begin with the same responses. Without critiques (paper, section 3.5 and figure 7) the reviser is shown the
principle alone (templates/revise_direct.jinja). After each round evaluate.py reads the last text of every row. Prints
the rates by way and round in Markdown, with the paired difference of harmful compliance from drawn principles with
critiques. Run again, it continues where it was stopped. Leaves out training on the revisions: compare_rl.py.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import click

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS), str(Path(__file__).resolve().parent)]

from soft_labels import step

from cai.data import outputs, readers
from cai.evaluate.rates import read_rates
from cai.stats import intervals, tables

# {way: options of critique.py, options of revise.py}
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "draw": ((), ()),
    "match": (("--principles", "match"), ()),
    "all": (("--principles", "all"), ()),
    "draw, no critique": ((), ("--template", "revise_direct")),
}

HARM = {"oracle": ("comply", "partial"), "judge": ("comply",), "phrases": ("complied",)}  # classes of harmful prompts


def revise_in_rounds(way: str, responses: Path, folder: Path, asked: tuple, rounds: int) -> list[Path]:
    """The file of revised rows after each round."""
    critique_options, revise_options = WAYS[way]
    name, files = way.replace(", ", "-").replace(" ", "-"), []
    text = responses
    matches = ("--matches", folder / "matches.jsonl") if way == "match" else ()
    for number in range(1, rounds + 1):
        critiques, revisions = (folder / f"{name}-{kind}-{number}.jsonl" for kind in ("critiques", "revisions"))
        step("critique", "--input", text, *asked, *critique_options, *matches, "--output", critiques)
        step("revise", "--input", critiques, *asked, *revise_options, "--output", revisions)
        text = revisions
        files.append(revisions)
    return files


def measure(rows: Path, reader: tuple, rates: Path) -> tuple[dict, dict[str, bool]]:
    """(rates of the last texts, {id of a harmful row: whether it complies})."""
    step("evaluate", "--responses", rows, *reader, "--output", rates)
    by = reader[reader.index("--by") + 1]
    classes = (row for _, row in readers.read_jsonl(rates.with_suffix(".classes.jsonl")))
    return read_rates(rates), {row["id"]: row["class"] in HARM[by] for row in classes if row["kind"] == "harmful"}


def show_difference(outcomes: dict[str, bool], drawn: dict[str, bool]) -> str:
    """The paired difference in points; "" for the same outcomes."""
    differences = [outcomes[id_] - drawn[id_] for id_ in outcomes]
    if outcomes is drawn or not differences:
        return ""
    low, high = intervals.paired(differences)
    return f"{100 * sum(differences) / len(differences):.1f} ({100 * low:.1f} to {100 * high:.1f})"


@click.command()
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False))
@click.option("--model", default="tiny", show_default=True, help="Writes the first responses.")
@click.option("--critic", default=None, help="Criticises and revises.  [default: --model]")
@click.option("--constitution", default="harmlessness", show_default=True)
@click.option("--by", type=click.Choice(list(HARM)), default="oracle", show_default=True, help="As in evaluate.py.")
@click.option("--judge", default=None, help="The reader of --by judge.")
@click.option("--rounds", type=click.IntRange(1, 4), default=4, show_default=True)
@click.option("--max-new-tokens", default=96, show_default=True)
@click.option("--temperature", default=0.7, show_default=True)
@click.option("--limit", default=300, show_default=True, help="Prompts, the first of the file.")
@click.option("--output", required=True, metavar="FOLDER", help="Folder for everything that is made.")
def main(prompts, model, critic, constitution, by, judge, rounds, max_new_tokens, temperature, limit, output):
    """Compare rounds, critiques and ways to choose principles; prints a table in Markdown."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    sampling = ("--max-new-tokens", max_new_tokens, "--temperature", temperature)
    responses = folder / "responses.jsonl"
    step("generate", "--input", prompts, "--model", model, *sampling, "--limit", limit, "--output", responses)
    asked = ("--model", critic or model, "--constitution", constitution, "--examples", 0, *sampling)
    reader = ("--by", by, *(("--judge", judge) if judge else ()))
    lines, drawn = [], []
    for way in WAYS:
        for number, rows in enumerate(revise_in_rounds(way, responses, folder, asked, rounds)):
            rates, outcomes = measure(rows, reader, rows.with_suffix(".rates.jsonl"))
            drawn += [outcomes] if way == "draw" else []
            shown = {name: tables.show(rate) for name, rate in rates.items() if rate["value"] is not None}
            lines.append({"principles": way, "round": str(number + 1), **shown})
            lines[-1]["harm, points from draw"] = show_difference(outcomes, drawn[number])
    head = list(dict.fromkeys(name for line in lines for name in line))
    used = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in ("torch", "transformers"))]
    click.echo(f"{', '.join(used)}; fast path: {outputs.read_manifest(responses)['fast_path']}\n")
    click.echo(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    click.echo("\n".join(f"| {' | '.join(line.get(name, '') for name in head)} |" for line in lines))
    (folder / "revisions.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
