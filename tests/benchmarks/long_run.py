"""Many rows through the text steps: memory, time, and how soon a killed run goes on.

    python tests/benchmarks/long_run.py                         # 100,000 rows
    python tests/benchmarks/long_run.py --rows 5000 --json

generate.py, critique.py and revise.py run one after the other, each in a process of its own, on what the one before
has written. Only the model is left out: an engine that answers at once stands for it, while its libraries are loaded
as they would be. Each step is then run again, killed (SIGKILL) at 90 % of its rows and resumed, and must end with the
same bytes. What was found is set against what is promised, but only other bytes make the command fail: on a
busy machine the first row waits long for the libraries. Leaves out the time that a model takes, nearly all of a real
run.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
STEPS = ("generate", "critique", "revise")


class Stub:
    """Stands for a model: answers in the order it is asked, and notes time and memory now and then.

    Args:
        notes: file that gets a row {row, at, rss} for every `every`-th answer, and for the first.
        kill_at: the answer before which the process kills itself.
    """

    batch_size, context, scores_choices = 128, None, True

    def __init__(self, notes: Path, every: int, kill_at: int | None):
        self.notes, self.every, self.kill_at = notes, every, kill_at

    def generate(self, requests, sampling, done=()):
        from cai.models.engine import Generation

        page, said = os.sysconf("SC_PAGE_SIZE"), 0
        with open(self.notes, "w", encoding="utf-8") as notes:
            for request in requests:
                if request.key in done:
                    continue
                if said == self.kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if said % self.every == 0:
                    with open("/proc/self/statm", encoding="ascii") as file:
                        rss = int(file.read().split()[1]) * page
                    notes.write(json.dumps({"row": said, "at": time.time(), "rss": rss}) + "\n")
                    notes.flush()
                text = f"Ask the owner, {request.seed % 997} times. {'Then wait. ' * 12}"
                yield request, Generation(text, "stop", len(request.conversation), 60)
                said += 1


def one(step: str, source: str, output: str, notes: str, every: int, kill_at: int | None) -> None:
    """The step itself, in this process, with the stub for an engine."""
    sys.path[:0] = [str(HERE.parents[1] / "scripts"), str(HERE.parent)]
    import torch  # noqa: F401
    from conftest import load_command
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from cai.base.paths import TINY
    from cai.models import loading

    loading.load_engine = lambda *_, **__: Stub(Path(notes), every, kill_at)
    load_command(step).main(["--input", source, "--output", output, "--model", str(TINY), "--json"])


def run(step: str, source: Path, output: Path, notes: Path, every: int, kill_at: int | None = None) -> float:
    """The step in a process of its own; returns when it was started (seconds of the clock)."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps([step, str(source), str(output), str(notes), every, kill_at])],
        capture_output=True,
        text=True,
    )
    if done.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise SystemExit(f"{step} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return began


def measure(step: str, source: Path, folder: Path, rows: int) -> dict:
    """Figures of one step over the rows of `source`; its output is `folder/<step>.jsonl`."""
    output, again, notes = folder / f"{step}.jsonl", folder / f"{step}-killed.jsonl", folder / "notes"
    every = max(1, rows // 100)
    began = run(step, source, output, notes, every)
    ended = time.time()
    seen = [json.loads(line) for line in notes.read_text().splitlines()]
    tenth = rows // 10
    early = [note for note in seen if note["row"] <= tenth]
    late = [note for note in seen if note["row"] >= tenth]

    def pace(first: int, last: int) -> float:
        """Seconds a row between two rows."""
        inside = [note for note in seen if first <= note["row"] <= last]
        return (inside[-1]["at"] - inside[0]["at"]) / (inside[-1]["row"] - inside[0]["row"])

    run(step, source, again, notes, every, rows * 9 // 10)
    journal = Path(f"{again}.partial").read_bytes().count(b"\n")
    resumed = run(step, source, again, notes, every)
    first = json.loads(notes.read_text().splitlines()[0])["at"]
    same = output.read_bytes() == again.read_bytes()
    again.unlink()
    return {
        "rows": rows,
        "seconds": round(ended - began, 1),
        "seconds_to_first_row": round(seen[0]["at"] - began, 1),
        "mb_at_a_tenth": round(early[-1]["rss"] / 2**20),
        "mb_most_after": round(max(n["rss"] for n in late) / 2**20),
        "growth": round(max(n["rss"] for n in late) / early[-1]["rss"] - 1, 4),
        "last_tenth_per_row_to_second": round(pace(rows - tenth, rows) / pace(tenth, 2 * tenth), 2),
        "kept_at_the_kill": journal,
        "seconds_to_first_new_row": round(first - resumed, 1),
        "same_bytes": same,
    }


@click.command()
@click.option("--rows", type=click.IntRange(min=100), default=100_000, show_default=True, help="Rows of the input.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--one", hidden=True)
def main(rows, as_json, one):
    """Put many rows through the text steps; ends with 1 if a resumed run is not as one that never stopped."""
    if one:
        globals()["one"](*json.loads(one))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "in.jsonl"
        with open(source, "w", encoding="utf-8") as file:
            for n in range(rows):
                row = {"id": f"prompt-{n:06d}", "prompt": f"How do I open gate number {n}? " * 8}
                file.write(json.dumps(row) + "\n")
        found = {}
        for step in STEPS:
            found[step] = measure(step, source, folder, rows)
            source = folder / f"{step}.jsonl"
            if not as_json:
                click.echo(f"{step}: {found[step]}")
    kept = promises(list(found.values()))
    if as_json:
        click.echo(json.dumps({**found, "promises": kept}))
    else:
        for promise, (figure, held) in kept.items():
            click.echo(f"{promise}: {figure}{'' if held else ', NOT KEPT'}")
    raise SystemExit(not all(figures["same_bytes"] for figures in found.values()))


def promises(steps: list[dict]) -> dict[str, tuple[float | bool, bool]]:
    """{what is promised: (the worst figure of the steps, whether it keeps the promise)}."""
    growth, pace, first = (
        max(step[name] for step in steps)
        for name in ("growth", "last_tenth_per_row_to_second", "seconds_to_first_new_row")
    )
    same = all(step["same_bytes"] for step in steps)
    return {
        "memory grows by 10 % or less after the first tenth": (growth, growth <= 0.1),
        "a row of the last tenth takes no more than 1.5 times one of the second": (pace, pace <= 1.5),
        "after a kill at 90 %, less than 10 s to the first new row": (first, first < 10),
        "resumed, the same bytes": (same, same),
    }


if __name__ == "__main__":
    main()
