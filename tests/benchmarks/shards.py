"""Many rows over many shards, some of them killed and started again, then merged: complete, in order, the same bytes.

    python tests/benchmarks/shards.py --rows 1000000 --shards 100

Each shard is `generate.py --shard K/N` in a process of its own, with an engine that answers at once; the shards run in
a random order, `--processes` at a time. A share of them is killed (SIGKILL) at a random instant and starts again later.
Then `merge.py` runs, and its file is compared byte by byte with the rows that one run would write. Prints times and
peaks of memory. Leaves out models, so that what is measured is the handling of rows.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "scripts"), str(HERE.parent)]


class Echo:
    """Stands for a model: the answer is the seed of the request."""

    name, batch_size, context, scores_choices = "tiny", 128, None, True

    def generate(self, requests, _sampling, done=()):
        from cai.models.engine import Generation

        for request in requests:
            if request.key not in done:
                yield request, Generation(f"Answer {request.seed}.", "stop", 3, 4)


def write_input(path: Path, rows: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for n in range(rows):
            file.write(f'{{"id": "r{n}", "prompt": "Say {n}."}}\n')


def expected_digest(rows: int) -> str:
    """SHA-256 of what one run over all rows writes."""
    from cai.base.hashing import hashed_seed

    digest = hashlib.sha256()
    for n in range(rows):
        row_id = f"r{n}/0"
        row = {"id": row_id, "prompt": f"Say {n}.", "prompt_id": f"r{n}", "sample": 0}
        row |= {"response": f"Answer {hashed_seed('generate', 0, row_id, 0)}.", "model": "tiny", "finish": "stop"}
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def start(name: str, *arguments: object) -> int:
    """Run a command in a forked process; returns its pid."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        from conftest import load_command

        from cai.models import loading

        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        loading.load_engine = lambda *_, **__: Echo()
        load_command(name).main([str(argument) for argument in arguments], prog_name=name)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Fleet:
    """The shards of a run, started in a random order and some of them killed.

    Attributes: kills, and the highest peak of a shard's memory in MB.
    """

    def __init__(self, folder: Path, shards: int, processes: int, share: float, draw: random.Random):
        self.folder, self.shards, self.processes, self.draw = folder, shards, processes, draw
        self.order = draw.sample(range(1, shards + 1), shards)
        self.doomed = set(draw.sample(self.order, round(share * shards)))
        self.kills, self.peak, self._seconds = 0, 0.0, 2.0

    def run(self) -> None:
        waiting, running = list(self.order), {}
        while waiting or running:
            while waiting and len(running) < self.processes:
                number = waiting.pop(0)
                running[self._start(number)] = number, time.monotonic(), self._instant(number)
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if not pid:
                self._kill_doomed(running)
                time.sleep(0.01)
                continue
            number, began, _ = running.pop(pid)
            self.peak = max(self.peak, usage.ru_maxrss / 1024)
            if os.WIFSIGNALED(status):
                self.kills += 1
                waiting.append(number)
            elif os.waitstatus_to_exitcode(status):
                raise RuntimeError(f"shard {number} ended with {os.waitstatus_to_exitcode(status)}")
            else:
                self._seconds = time.monotonic() - began

    def _start(self, number: int) -> int:
        rows, output = self.folder / "rows.jsonl", self.folder / f"shard-{number}.jsonl"
        line = ["--input", rows, "--model", "tiny", "--dtype", "float32", "--shard", f"{number}/{self.shards}"]
        return start("generate", *line, "--output", output, "--json")

    def _instant(self, number: int) -> float:
        """When a shard is killed, in seconds from its start, within the time that the last whole one took."""
        if number not in self.doomed:
            return float("inf")
        self.doomed.remove(number)
        return self.draw.uniform(0, self._seconds)

    def _kill_doomed(self, running: dict) -> None:
        for pid, (_, began, instant) in running.items():
            if time.monotonic() - began > instant:
                os.kill(pid, signal.SIGKILL)


def measure(folder: Path, rows: int, shards: int, processes: int, share: float, seed: int) -> dict:
    """Run all shards and merge them, in an empty folder."""
    write_input(folder / "rows.jsonl", rows)
    began = time.monotonic()
    fleet = Fleet(folder, shards, processes, share, random.Random(seed))
    fleet.run()
    merging = time.monotonic()
    merged = folder / "merged.jsonl"
    _, status, usage = os.wait4(start("merge", "--input", folder / "shard-*.jsonl", "--output", merged, "--json"), 0)
    ended = time.monotonic()
    with open(merged, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "rows": rows,
        "shards": shards,
        "kills": fleet.kills,
        "merge_exit": os.waitstatus_to_exitcode(status),
        "is_complete": digest == expected_digest(rows),
        "sha256": digest,
        "shards_s": round(merging - began, 1),
        "merge_s": round(ended - merging, 1),
        "us_per_row": round((ended - began) / rows * 1e6, 1),
        "shard_peak_mb": round(fleet.peak),
        "merge_peak_mb": round(usage.ru_maxrss / 1024),
    }


@click.command()
@click.option("--rows", default=100_000, show_default=True)
@click.option("--shards", default=100, show_default=True)
@click.option("--processes", default=2, show_default=True)
@click.option("--kill-share", default=0.2, show_default=True, help="Share of the shards that are killed once.")
@click.option("--seed", multiple=True, type=int, default=[0, 1], show_default=True, help="One whole run per seed.")
@click.option("--folder", help="Where the files go, which are deleted afterwards.  [default: a temporary folder]")
def main(rows, shards, processes, kill_share, seed, folder):
    from conftest import load_command

    load_command("generate"), load_command("merge")  # once, for all forked processes
    digests = set()
    for number in seed:
        where = Path(tempfile.mkdtemp(dir=folder))
        try:
            result = measure(where, rows, shards, processes, kill_share, number)
        finally:
            shutil.rmtree(where)
        digests.add(result["sha256"])
        print(json.dumps({"seed": number, **result}), flush=True)
        if not result["is_complete"] or result["merge_exit"]:
            sys.exit("the merged file is not what one run writes")
    if len(digests) > 1:
        sys.exit("the order of the shards or the kills changed the file")


if __name__ == "__main__":
    main()
