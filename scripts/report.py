"""Show what a run did: one page with figures and every transcript, the same for a pull request, and cards.

    python scripts/report.py runs/tiny

Writes into the run's folder: report.html (one file, opens from disk, asks nothing of the network), report.md,
figures/ (SVG and PNG) and cards/ (model and dataset cards). Reads what is there and loads no model. Leaves out every
measurement but counting: run evaluate.py and judge.py for those.
"""

import base64
import contextlib
import hashlib
import itertools
import os
import re
from pathlib import Path

import click
from markupsafe import Markup

from cai.base import cli
from cai.base.errors import CaiError, InputError, shorten
from cai.base.paths import TEMPLATES
from cai.data.kinds import KINDS
from cai.evaluate.rates import RATES
from cai.report import cards, figures, run_folder, transcripts
from cai.report.escaping import MARK, environment, percent
from cai.report.run_folder import Run

MOST_BYTES = 4_900_000  # of the page; what figures and tables leave is for transcripts
PAGES = TEMPLATES / "report"

# In the report's words; a rate that is not here is called by its name.
NAMES = {
    "harmful_compliance": "complied (in part counts)",
    "good_refusal": "declined with a reason and an alternative",
    "evasive": "evasive",
    "preachy": "preachy",
    "off_topic": "off topic",
    "benign_helpful": "helped",
    "benign_refused": "refused",
    "over_refusal": "refused, though harmless",
}
JUDGE_NAMES = {
    "undecided": "undecided pairs",
    "same_position": "same position in both orders",
    "mean_margin": "mean margin, 0 unsure to 1 sure",
    "label_mass": "probability on the two labels",
    "a_chosen": "first response preferred",
    "always_a": "accuracy of always the first",
    "longer": "accuracy of always the longer",
    "identical": "identical pairs, not judged",
    "failed": "failed pairs",
    "nulls": "pairs without a readable verdict",
    "empty": "pairs with an empty response",
}
ROUND_RATES = ("harmful_compliance", "good_refusal", "benign_helpful")


@click.command(cls=cli.Command)
@click.argument("run", metavar="RUN")
@click.option("--output", default=None, metavar="FOLDER", help="Where the files go.  [default: RUN]")
@cli.options("json", "dry_run", "overwrite")
def main(run, output, as_json, dry_run, overwrite):
    """Write report.html, report.md, figures and cards from a folder that run.py, or its steps, wrote.

    A report that is there is replaced; a file of that name which is no report is not, but with --overwrite.

    \b
    Example:
      python scripts/report.py runs/tiny
    """
    folder = Path(output or run)
    with as_written(run):
        found = run_folder.collect(run)
        written = cards.write(found)
    targets = [folder / "report.html", folder / "report.md", *(folder / "cards" / name for name in written)]
    check(targets, overwrite)
    summary = {
        "command": "report",
        "steps": len(found.steps),
        "rows": len(found.rows),
        "stages": len(found.stages),
        "report": str(targets[0]),
    }
    if dry_run:
        cli.finish({**summary, "files": [str(path) for path in targets]}, as_json=as_json)
        return
    with as_written(run):
        drawn = figures.draw(found)
        page, shown, total = render(found, drawn)
        texts = [page, markdown(found, drawn), *written.values()]
    try:
        for figure in drawn:
            figure.save(folder / "figures")
        for path, text in zip(targets, texts, strict=True):
            save(path, text)
    except OSError as error:
        raise CaiError(f"{folder}: cannot write ({error}). Make room and run it again.") from error
    cli.finish(
        {
            **summary,
            "transcripts": shown,
            "of": total,
            "figures": len(drawn),
            "cards": len(written),
            "bytes": len(page.encode()),
        },
        as_json=as_json,
    )


@contextlib.contextmanager
def as_written(run: str):
    """InputError for what only files that were changed by hand can lead to, a number where a text was written."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"something in its files is not of the kind that a step writes ({type(error).__name__}: {shorten(error)})",
            where=run,
            remedy="Run the step that wrote it again with --overwrite; --debug shows where",
        ) from error


def check(targets: list[Path], overwrite: bool) -> None:
    """InputError if a file that is there was not written by this command."""
    for path in targets:
        if path.is_dir() or (path.exists() and not overwrite and MARK.encode() not in path.read_bytes()):
            raise InputError(
                "it exists, and this command did not write it",
                where=path,
                remedy="Name another --output, or replace it with --overwrite",
            )


def save(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def render(run: Run, drawn: list[figures.Figure]) -> tuple[str, int, int]:
    """(the page, transcripts in it, transcripts there are)."""
    script = (PAGES / "page.js").read_text(encoding="utf-8")
    values = {
        **tables(run, drawn),
        "mark": MARK,
        "script": Markup(script),
        "style": Markup((PAGES / "page.css").read_text(encoding="utf-8")),
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        "reliability": run_folder.reliability(run),
        "files": [*filter(None, (run.rows_file, run.preferences_file)), *(stage.file for stage in run.stages)],
    }
    items = transcripts.transcripts(run)
    used = len(page_of(values, {"texts": [], "items": [], "total": len(items), "shown": 0}).encode())
    payload = transcripts.embed(items, MOST_BYTES - used)
    return page_of(values, payload), payload["shown"], payload["total"]


def page_of(values: dict, payload: dict) -> str:
    data = {**payload, "principles": {one["id"]: [one["text"], one["question"]] for one in values["principles"]}}
    return environment(html=True).get_template("page.html.jinja").render(**values, payload=payload, data=data)


def markdown(run: Run, drawn: list[figures.Figure]) -> str:
    """report.md, for a pull request."""
    text = environment(html=False).get_template("report.md.jinja").render(**tables(run, drawn), mark=MARK)
    return re.sub(r"\n{3,}", "\n\n", text)


def tables(run: Run, drawn: list[figures.Figure]) -> dict:
    """What both forms of the report show."""
    every = run_folder.rounds(run)
    judged = [judge_table(name, run_folder.flatten(counts)) for name, counts in run.judged]
    judged += [judge_table(name, counts) for name, counts in run.audits]
    return {
        "run": run,
        "figures": drawn,
        "summary": summary_of(run, every),
        "rounds": every,
        "names": NAMES,
        "known_rates": set(RATES),
        "stage_rows": stage_rows(run),
        "round_rates": [name for name in ROUND_RATES if any(one["rates"].get(name) for one in every)],
        "principles": run_folder.principles(run),
        "judge_tables": judged,
    }


def judge_table(name: str, counted: list[tuple[str, object]]) -> tuple[str, list, list]:
    """(name, figures, figures of single principles), each figure as [label, value]."""
    named = [(JUDGE_NAMES.get(key, key.replace("_", " ")), value) for key, value in counted]
    single = [(label.removeprefix("principles "), value) for label, value in named if label.startswith("principles ")]
    return name, [one for one in named if not one[0].startswith("principles ")], single


def stage_rows(run: Run) -> list[tuple[str, list]]:
    """[(kind of prompts with n, [(label, a rate for each stage)])]; those under stress come last, way by way."""
    found = {name for stage in run.stages for name, one in stage.rates.items() if one}
    ways = sorted({name.partition("_under_")[2] for name in found})  # "" first: without stress
    result = []
    for way, kind in itertools.product(ways, KINDS):
        ending = f"_under_{way}" if way else ""
        names = [name for name, (of, _) in RATES.items() if of == kind and name + ending in found]
        if not names:
            continue
        sizes = {stage.rates[names[0] + ending]["n"] for stage in run.stages if stage.rates.get(names[0] + ending)}
        n = ", ".join(f"{size:,}" for size in sorted(sizes))
        stress = f" under stress: {way.replace('_', ' ')}" if way else ""
        result.append(
            (
                f"{kind} prompts{stress} (n = {n})",
                [(NAMES.get(name, name), [stage.rates.get(name + ending) for stage in run.stages]) for name in names],
            )
        )
    return result


def summary_of(run: Run, every: list[dict]) -> list[str]:
    """What happened, in sentences."""
    lines = []
    if run.stages:
        first, last = run.stages[0], run.stages[-1]
        for name, words in (
            ("harmful_compliance", "Of harmful prompts the model complied with"),
            ("good_refusal", "It declined them openly, with a reason and an alternative, in"),
            ("benign_helpful", "Of benign prompts it helped with"),
            ("over_refusal", "Of harmless prompts with frightening words it refused"),
        ):
            rates = [
                (stage.label, stage.rates[name])
                for stage in run.stages
                if stage.rates.get(name) and stage.rates[name]["value"] is not None
            ]
            if rates:
                said = ", ".join(f"{percent(rate)} {label}" for label, rate in rates)
                lines.append(f"{words} {said}{difference(rates)}.")
        if first is last:
            lines.append("Only one model was measured, so nothing can be said of a change.")
    if len(every) > 1:
        one = every[-1]
        times = "1 round" if len(every) == 2 else f"{len(every) - 1} rounds"
        lines.append(
            f"{len(run.rows):,} responses went through {times} of critique and revision; the first changed "
            f"{percent(every[1]['changed'])} of them, the last {percent(one['changed'])}."
        )
    unused = [one["id"] for one in run_folder.principles(run) if not one["drawn"] and not one["compared"]]
    if unused and len(every) > 1:
        lines.append(f"Never used: {', '.join(unused[:8])}{' …' if len(unused) > 8 else ''} ({len(unused)} in all).")
    for name, counts in run.judged[:1]:
        same = counts.get("same_position")
        lines.append(
            f"The judge compared {counts.get('pairs', 0):,} pairs ({name}); its two orders preferred the same "
            f"place in {percent(same)}."
        )
    alarms = sum(len(training.alarms) for training in run.trainings)
    if alarms:
        lines.append(f"Alarms raised in training: {alarms:,}; see below.")
    failed = sum(step["counts"].get("failed") or 0 for step in run.steps)
    if failed:
        lines.append(f"Records that failed: {failed:,}; their steps' manifests name them.")
    return lines


def difference(rates: list[tuple[str, dict]]) -> str:
    """Whether the first and the last interval part: a cautious test, since intervals may overlap a little where a
    difference is real."""
    if len(rates) < 2:
        return ""
    (_, first), (_, last) = rates[0], rates[-1]
    apart = first["low"] > last["high"] or last["low"] > first["high"]
    return "" if apart else " (no clear change: the intervals overlap)"


if __name__ == "__main__":
    main()
