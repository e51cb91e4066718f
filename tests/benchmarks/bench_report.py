"""How long report.py takes and how large its page is, for a run of many rows. A quiet machine is taken for granted.

    python tests/benchmarks/bench_report.py      # 10,000 rows of two rounds, as many pairs, three stages of 750 prompts
    python tests/benchmarks/bench_report.py --run runs/tiny

The rows are of the bundled world, whose oracle reads each of their texts. Leaves out browsers: test_report.py opens
the page in one.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "scripts"), str(HERE.parent)]

import run_folders as runs

from cai.data.outputs import write_jsonl
from cai.world import language, oracle


def made_run(folder: Path, rows: int) -> Path:
    """A run folder with so many revised rows and pairs; all else as in the tests."""
    runs.make_run(folder, rows=3, hostile=False, stages=False)
    for order, (stage, good) in enumerate((("base", 0), ("sft", 290), ("ppo", 297))):
        runs.evaluation(
            folder,
            stage,
            "my-model" if stage == "base" else f"{folder}/{stage}",
            {
                "harmful": ["good"] * good + ["comply"] * (300 - good),
                "benign": ["helpful"] * 300,
                "borderline": ["helpful"] * 150,
            },
            order,
        )
    draw, shares = random.Random(0), {"harmful": rows * 7 // 10, "benign": rows // 5}
    shares["borderline"] = rows - sum(shares.values())
    revised, pairs = [], []
    for prompt in (row for kind, n in shares.items() for row in language.prompt_rows(kind, "train", 0, n)):
        act = oracle.act_of(prompt)
        first, better, other = (
            language.respond(draw, act, style)
            for style in (("comply", "good", "evasive") if prompt["kind"] == "harmful" else ("comply",) * 3)
        )
        row = {**prompt, "prompt_id": prompt["id"], "id": f"{prompt['id']}/0", "response": first}
        said = f"The principle speaks of {prompt['category']}, and that is asked. The response helps to {act.text}."
        if prompt["kind"] != "harmful":
            better = first
        revised.append(
            {
                **row,
                "rounds": [
                    runs.one_round("harm", said, better, [] if better != first else ["copy"]),
                    runs.one_round("hurt", said, better, ["copy"]),
                ],
            }
        )
        pairs.append(runs.preference(row, better, other, 0.9, 0.7, "care"))
    write_jsonl(folder / "05-revision-2.jsonl", revised)
    write_jsonl(folder / "07-preferences.jsonl", pairs)
    return folder


@click.command()
@click.option("--rows", default=10_000, show_default=True, help="Revised rows, and pairs.")
@click.option("--run", metavar="FOLDER", help="Instead: a run folder that is there. The report goes elsewhere.")
def main(rows, run):
    """Print the seconds of report.py, its start included, those of its processor, and the size of what it wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(run) if run else made_run(Path(scratch) / "run", rows)
        begun = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                HERE.parents[1] / "scripts" / "report.py",
                folder,
                "--json",
                "--output",
                Path(scratch) / "report",
            ],
            capture_output=True,
            text=True,
        )
        seconds = time.monotonic() - begun
        if done.returncode:
            sys.exit(done.stderr)
        summary = json.loads(done.stdout)
    shown = {name: summary[name] for name in ("rows", "bytes", "transcripts", "of", "figures")}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({"seconds": round(seconds, 2), "cpu_seconds": round(used.ru_utime + used.ru_stime, 2), **shown}))


if __name__ == "__main__":
    main()
