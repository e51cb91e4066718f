"""Kill the commands at random instants, run them again, and see that nothing is lost and nothing is there twice.

    python tests/benchmarks/crash.py --kills 100                         # nine commands, in turn
    python tests/benchmarks/crash.py --kills 20 --only judge --json

Each command first runs once from beginning to end. Then it is started again and again, each time killed (SIGKILL) at
an instant drawn at random over the time that the whole run took, until it comes to its end; the result must be the
same bytes. After each kill the files are read as they lie: JSON whole, no row twice, none gone that was there before.
Now and then the last line is torn in addition, as a power cut would, or the process is only stopped and a second one
is sent at the same output. The processes are forked from this one, which has the libraries loaded, so that instants
fall on the work and not on the imports. A long run can be taken in parts: by `--only`, or by `--seed`, which draws
other instants. Leaves out power cuts (what the disk had not yet written is not lost here).
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "scripts"), str(HERE.parent)]

from cai.base.errors import shorten

TEXT = ("generate", "critique", "revise", "judge")
TRAINING = ("sft", "reward_model", "dpo", "ppo", "grpo")
ROWS = 24


class Bench:
    """The inputs and models that the commands are run on, in one folder."""

    def __init__(self, folder: Path):
        import models

        self.folder, self.model = folder, str(models.folder("llama"))
        self.rules = folder / "rules.yaml"
        self.rules.write_text("- Respect property.\n- Tell the truth.\n", encoding="utf-8")
        self.rows = folder / "rows.jsonl"
        with open(self.rows, "w", encoding="utf-8") as file:
            for n in range(ROWS):
                file.write(
                    json.dumps(
                        {
                            "id": f"r{n}",
                            "prompt": "How do I open the gate? " * (1 + n * 7 % 5) + str(n),
                            "kind": "benign",
                            "response": f"Lift bar {n}.",
                            "response_a": f"Lift bar {n}.",
                            "response_b": f"Lift bar {n}."
                            if n % 12 == 5
                            else f"Ask the owner, {n} times. " * (1 + n % 3),
                            "rounds": [
                                {
                                    "principle": f"principle-{1 + n % 2}",
                                    "critique": f"It harms {n}.",
                                    "revision": f"Ask the owner, {n} times.",
                                    "flags": [],
                                }
                            ],
                        }
                    )
                    + "\n"
                )
        self.undone = folder / "undone.jsonl"  # rounds whose revision is still to come
        with open(self.undone, "w", encoding="utf-8") as file:
            for line in self.rows.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                row["rounds"] = [{"principle": row["rounds"][0]["principle"], "critique": "It harms."}]
                file.write(json.dumps(row) + "\n")
        self.comparisons = folder / "comparisons.jsonl"  # for the judge: a row's own response would win over its pair
        with open(self.comparisons, "w", encoding="utf-8") as file:
            for line in self.rows.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                file.write(json.dumps({k: v for k, v in row.items() if k not in ("response", "rounds")}) + "\n")
        self.pairs = folder / "pairs.jsonl"
        with open(self.pairs, "w", encoding="utf-8") as file:
            for n in range(ROWS):
                file.write(
                    json.dumps(
                        {
                            "id": f"p{n}",
                            "prompt": f"A or B, {n}?",
                            "chosen": f"Ask the owner, {n} times.",
                            "rejected": f"Push it {n} times.",
                            "p_chosen": 0.5 + n % 5 / 10,
                        }
                    )
                    + "\n"
                )
        self._reward_model = None

    def reward_model(self) -> Path:
        """A random one, made when it is first asked for."""
        if self._reward_model is None:
            import torch
            from transformers import AutoModelForSequenceClassification

            from cai.models import loading

            self._reward_model = self.folder / "reward"
            torch.manual_seed(0)
            AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=1).save_pretrained(
                self._reward_model
            )
            loading.load_chat(self.model).tokenizer.save_pretrained(self._reward_model)
        return self._reward_model

    def arguments(self, command: str, output: Path) -> list[str]:
        """The command's line on these inputs. Greedy where it samples; states saved at every step where it trains."""
        sources = {"revise": self.undone, "judge": self.comparisons, "reward_model": self.pairs, "dpo": self.pairs}
        source = sources.get(command, self.rows)
        line: list = ["--input", source, "--output", output, "--model", self.model, "--device", "cpu", "--json"]
        if command in TEXT:
            line += ["--batch-size", 2]
            line += ["--temperature", 0, "--max-new-tokens", 12] if command != "judge" else []
            line += ["--constitution", self.rules] if command != "generate" else []
        elif command in ("ppo", "grpo"):
            line += [
                "--reward-model",
                self.reward_model(),
                "--updates",
                6,
                "--prompts-per-update",
                4,
                "--epochs",
                1,
                "--minibatches",
                2,
                "--max-new-tokens",
                6,
                "--save-every",
                1,
            ]
            line += ["--samples", 4] if command == "grpo" else []
        else:
            line += ["--batch-size", 8, "--epochs", 2, "--save-steps", 2]
        return [str(part) for part in line]


class Failure(AssertionError):
    """What must not be."""


def start(command: str, line: list[str], log: Path) -> int:
    """Fork a process that runs the command as its file would, with all it says in `log`; returns its pid."""
    from conftest import load_command

    main = load_command(command)
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = [f"scripts/{command}.py", *line]
        main.main(line)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, timeout: float = 300.0) -> int:
    """The exit code of a process, negative for a signal."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise Failure(f"it had not ended after {timeout:.0f} s")


# --- what must be so, whenever it was killed ---------------------------------------------------------------------


def rows_in(path: Path) -> list[str]:
    """Ids of the whole lines of a file; Failure if one is no row, or there twice."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        ids = [json.loads(line)["id"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"{path.name}: a line that is no row ({error})") from error
    if len(set(ids)) < len(ids):
        raise Failure(f"{path.name}: rows twice: {[i for i, times in Counter(ids).items() if times > 1][:3]}")
    return ids


def look(command: str, output: Path, before: list[str]) -> list[str]:
    """Read what a killed process has left. Returns the ids in its journal, {} once the output is there."""
    manifest = Path(f"{output}.run.json")
    if manifest.exists():
        try:
            status = json.loads(manifest.read_text(encoding="utf-8"))["status"]
        except (ValueError, KeyError) as error:
            raise Failure(f"a manifest that is none: {error}") from error
        if status == "done" and not output.exists():
            raise Failure("the manifest says done, and there is no output")
    if command in TRAINING:
        return []
    rows_in(output)
    journal = rows_in(Path(f"{output}.partial"))
    if not output.exists() and (gone := set(before) - set(journal)):
        raise Failure(f"rows that were there are gone: {sorted(gone)[:3]}")
    return journal


def contents(output: Path) -> dict[str, object]:
    """What a run leaves, without what differs between any two: times, and the paths of the outputs."""
    if output.is_file():
        return {"rows": output.read_bytes(), "files": sorted(path.name for path in output.parent.iterdir())}
    found: dict[str, object] = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if any("update" in row for row in rows):
                rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows if "update" in row]
            else:  # Trainer's means since its last log begin anew in a run that goes on
                rows = [{k: row[k] for k in ("step", "grad_norm", "learning_rate") if k in row} for row in rows]
            found[name] = rows
        elif path.suffix in (".safetensors", ".json", ".jinja"):
            found[name] = path.read_bytes()
    found["files"] = sorted(path.name for path in output.parent.iterdir() if "log" not in path.name)
    return found


def differing(one: dict, other: dict) -> list[str]:
    """Names of what is not the same; of rows, the first that differs, too."""
    wrong = [name for name in sorted({**one, **other}) if one.get(name) != other.get(name)]
    for name in wrong:
        if isinstance(one.get(name), list) and isinstance(other.get(name), list):
            pair = next((pair for pair in zip_longest(one[name], other[name]) if pair[0] != pair[1]), None)
            return [*wrong, f"{name} has {shorten(pair[0], 300)} for {shorten(pair[1], 300)}"]
    return wrong


# --- one command -------------------------------------------------------------------------------------------------


def torment(command: str, bench: Bench, kills: int, draw: random.Random, folder: Path) -> dict:
    """Kill the command so many times, in as many runs as it takes. Returns what happened, counted.

    Raises Failure for anything that must not be.
    """
    found: Counter = Counter()
    log = folder / "log"
    whole = folder / "whole" / "out"
    whole.parent.mkdir(parents=True)
    began = time.monotonic()
    if code := ended(start(command, bench.arguments(command, whole), log)):
        raise Failure(f"ended with {code} though nobody killed it:\n{log.read_text()[-2000:]}")
    took = time.monotonic() - began
    right = contents(whole)
    while found["kills"] < kills:
        place = folder / f"run{found['runs']}"
        place.mkdir()
        output, journal = place / "out", []
        line = bench.arguments(command, output)
        torn = False
        while True:
            last = found["kills"] >= kills
            pid = start(command, line, log)
            until = time.monotonic() + (300 if last else draw.uniform(0, took))
            while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < until:
                time.sleep(0.001)
            if done[0]:
                break
            if last:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Failure("it had not ended after 300 s")
            lock = Path(f"{output}.lock")
            if draw.random() < 0.25 and lock.exists():
                os.kill(pid, signal.SIGSTOP)
                if lock.exists() and lock.read_text() == str(pid):
                    second(command, line, folder / "log2", pid)
                    found["second refused"] += 1
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found["kills"] += 1
            journal = look(command, output, journal)
            found["killed with rows written"] += bool(journal)
            found["killed with a state saved"] += any(output.glob("checkpoints/checkpoint-*/trainer_state.json"))
            torn = tear(output, draw) if journal and draw.random() < 0.25 else False
            found["torn"] += torn
        code = os.waitstatus_to_exitcode(done[1])
        said = log.read_text()
        if code:
            raise Failure(f"the run after a kill ended with {code}:\n{said[-2000:]}")
        if torn and "torn off" not in said:
            raise Failure("a torn line was mended without a word")
        found["runs"] += 1
        if wrong := differing(contents(output), right):
            raise Failure(f"not as an uninterrupted run: {', '.join(wrong)}")
        counts = [json.loads(Path(f"{path}.run.json").read_text())["counts"] for path in (output, whole)]
        if counts[0].keys() != counts[1].keys() or any(
            counts[0][k] != counts[1][k] for k in counts[1] if isinstance(counts[1][k], int)
        ):
            raise Failure(f"other counts: {counts}")
        shutil.rmtree(place)
    return {"seconds of a whole run": round(took, 2), **dict(found)}


def second(command: str, line: list[str], log: Path, first: int) -> None:
    """Start the command again on the output that the process `first` holds."""
    began = time.monotonic()
    code = ended(start(command, line, log), 60)
    said = log.read_text()
    if code != 2 or f"another process ({first}) is writing it" not in said:
        raise Failure(f"a second process ended with {code} after {time.monotonic() - began:.1f} s: {said[-500:]}")


def tear(output: Path, draw: random.Random) -> bool:
    """Cut the journal within its last line, as a power cut may; returns whether there was one to cut."""
    journal = Path(f"{output}.partial")
    if not journal.exists() or output.exists():
        return False
    raw = journal.read_bytes()
    last = raw[:-1].rfind(b"\n") + 1
    if not raw.endswith(b"\n") or len(raw) - last < 4:
        return False
    # What was torn is another line's beginning: the rows that were whole stay.
    with open(journal, "ab") as file:
        file.write(raw[last : draw.randrange(last + 1, len(raw) - 1)])
    return True


@click.command()
@click.option("--kills", type=click.IntRange(min=1), default=100, show_default=True, help="Kills, over all commands.")
@click.option("--only", multiple=True, type=click.Choice([*TEXT, *TRAINING]), help="Kill this command. Repeatable.")
@click.option("--seed", default=0, show_default=True, help="Seed of the instants.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(kills, only, seed, as_json):
    """Kill commands at random instants and see that running them again loses nothing."""
    commands = list(only or (*TEXT, *TRAINING))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    if set(commands) & set(TRAINING):
        from trl import DPOTrainer, GRPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    draw, results, failures, spared = random.Random(seed), {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        if {"ppo", "grpo"} & set(commands):
            bench.reward_model()
        for number, command in enumerate(commands):
            share = kills * (number + 1) // len(commands) - kills * number // len(commands)
            if not share:
                spared.append(command)
                continue
            place = Path(folder) / command
            place.mkdir()
            try:
                results[command] = torment(command, bench, share, draw, place)
            except Failure as failure:
                failures[command] = str(failure)
            if not as_json:
                click.echo(f"{command}: {failures.get(command) or results[command]}")
    total: Counter = Counter()
    for one in results.values():
        total.update({name: value for name, value in one.items() if isinstance(value, int)})
    if as_json:
        click.echo(json.dumps({"total": total, "commands": results, "failures": failures, "never killed": spared}))
    else:
        click.echo(
            f"all: {dict(total)}; failures: {len(failures)}"
            + (f"; never killed, for want of kills: {', '.join(spared)}" if spared else "")
        )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
