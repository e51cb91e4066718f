"""PPO, DPO, IPO, SimPO, GRPO and RLOO at equal wall time, from the same SFT model, reward model and preferences.

    python tests/benchmarks/compare_rl.py --output runs/compare-rl --seeds 5

All steps are those of run.py, with its settings. What PPO takes there to train with seed 0, start and loading not
counted, is the time that the others get, as updates or epochs, measured by a short run of each, so that every schedule
comes to its end. Each policy then answers the held-out prompts, and evaluate.py's oracle reads the answers. Run again,
what is done is passed over. Let nothing else run on the machine: time is what is held equal.

Leaves out a search for each algorithm's best settings (--add changes them), and the time that pairs and reward model
take.
"""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from cai.data import readers
from cai.evaluate.rates import read_rates
from cai.stats import intervals, tables

# {algorithm: (run.py's step, options that make it this algorithm)}
ALGORITHMS: dict[str, tuple[str, list[str]]] = {
    "ppo": ("ppo", []),
    "dpo": ("dpo", []),
    "ipo": ("dpo", ["--loss", "ipo"]),
    "simpo": ("dpo", ["--loss", "simpo"]),
    "grpo": ("grpo", []),
    "rloo": ("grpo", ["--algorithm", "rloo"]),
}
UNIT = {"ppo": "--updates", "grpo": "--updates", "dpo": "--epochs"}  # of each step
SHORT = {"grpo": 3, "dpo": 0.2}  # units of the run that measures their time
SHOWN = (
    "harmful_compliance",
    "good_refusal",
    "evasive",
    "preachy",
    "off_topic",
    "benign_helpful",
    "benign_refused",
    "over_refusal",
    "harmful_compliance_under_seen_frames",
    "harmful_compliance_under_held_out_frames",
    "benign_helpful_under_held_out_frames",
)
T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's, 97.5 %


@click.command()
@click.option("--output", required=True, metavar="FOLDER", help="Folder for everything that is made.")
@click.option("--model", default="tiny", show_default=True, help="Where the method begins.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each algorithm.")
@click.option(
    "--algorithms", default="ppo,dpo,simpo,grpo", show_default=True, help=f"Which, of {', '.join(ALGORITHMS)}."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="Training time of each. Default: what PPO takes with seed 0 and run.py's settings.",
)
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Only so many prompts: a trial.")
@click.option(
    "--add", nargs=2, multiple=True, metavar="NAME FLAGS", help="Flags to add to those of an algorithm. Repeatable."
)
def main(output, model, seeds, algorithms, seconds, limit, add):
    """Compare algorithms of reinforcement and preference learning at equal wall time."""
    folder, algorithms = Path(output), algorithms.split(",")
    if unknown := {*algorithms, *(name for name, _ in add)} - set(ALGORITHMS):
        raise click.BadParameter(f"{', '.join(unknown)}; expected {', '.join(ALGORITHMS)}", param_hint="--algorithms")
    steps = prepare(folder, model, limit)
    more = {name: [word for of, flags in add if of == name for word in shlex.split(flags)] for name in ALGORITHMS}
    lines = {name: [*line_of(name, steps), *more[name]] for name in ALGORITHMS}
    ppo_updates = value_of(lines["ppo"], "--updates")
    if seconds is None:
        seconds = train(lines["ppo"], folder / "ppo-0", seed=0)
    amounts = {}
    for name in algorithms:
        if name == "ppo":
            spent = train(lines["ppo"], folder / "ppo-0", seed=0)
            amounts[name] = max(1, round(int(ppo_updates) * seconds / spent))
        else:
            step = ALGORITHMS[name][0]
            spent = train(lines[name], folder / f"{name}-short", seed=0, amount=SHORT[step])
            amount = SHORT[step] * seconds / spent
            amounts[name] = max(0.01, round(amount, 2)) if UNIT[step] == "--epochs" else max(1, round(amount))
    measured = {"sft": [evaluate(steps, steps["sft"]["output"], folder / f"sft-{seed}", seed) for seed in range(seeds)]}
    times = {}
    for name in algorithms:
        same = name == "ppo" and amounts[name] == int(ppo_updates)
        for seed in range(seeds):
            where = folder / (f"ppo-{seed}" if same else f"{name}-{amounts[name]}-{seed}")
            times.setdefault(name, []).append(
                train(lines[name], where, seed=seed, amount=None if same else amounts[name])
            )
            measured.setdefault(name, []).append(evaluate(steps, where, where, seed))
    report(folder, measured, times, amounts)


def prepare(folder: Path, model: str, limit: int | None) -> dict[str, dict]:
    """run.py's steps by name, those before reinforcement learning done."""
    steps: dict[str, dict] = {}
    for algorithm in ("ppo", "dpo", "grpo"):
        line = [
            sys.executable,
            str(ROOT / "scripts" / "run.py"),
            "--model",
            model,
            "--output",
            str(folder / "base"),
            "--rl",
            algorithm,
            "--dry-run",
            "--json",
            *([] if limit is None else ["--limit", str(limit)]),
        ]
        planned = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)["steps"]
        steps |= {step["name"]: step for step in planned}
    for name, step in steps.items():
        if name == "ppo":  # the first plan comes first, and the others have the same steps before
            break
        if not name.startswith("evaluate"):
            run(shlex.split(step["command"]))
    return steps


def line_of(name: str, steps: dict[str, dict]) -> list[str]:
    """The command line of an algorithm with run.py's settings, without its seed and output."""
    step, flags = ALGORITHMS[name]
    line = shlex.split(steps[step]["command"])
    for option in ("--output", "--seed"):
        del line[line.index(option) : line.index(option) + 2]
    return [*line, *flags]


def value_of(line: list[str], option: str) -> str:
    """The value an option has: the last one, which is the one that counts."""
    return line[len(line) - 1 - line[::-1].index(option) + 1]


def run(line: list[str]) -> None:
    """A command in a process of its own; it passes over what is done."""
    click.echo(shlex.join(line), err=True)
    done = subprocess.run([*line, "--json"], stdout=subprocess.PIPE)
    if done.returncode not in (0, 3):
        raise SystemExit(f"exit code {done.returncode}; the same command continues")


def train(line: list[str], where: Path, *, seed: int, amount: float | None = None) -> float:
    """Train to `where`; returns the seconds from the first step to the last."""
    script = Path(line[1]).stem
    units = [] if amount is None else [UNIT[script], str(amount)]
    run([*line, *units, "--seed", str(seed), "--output", str(where)])
    return [row for _, row in readers.read_jsonl(where / "metrics.jsonl")][-1]["seconds"]


def evaluate(steps: dict[str, dict], model, where: Path, seed: int) -> dict[str, dict]:
    """The rates of a policy on run.py's held-out prompts."""
    line = shlex.split(steps["evaluate-sft"]["command"])
    for option, value in (("--model", str(model)), ("--output", f"{where}.rates.jsonl"), ("--seed", str(seed))):
        line[line.index(option) + 1] = value
    run(line)
    return read_rates(f"{where}.rates.jsonl")


def over_seeds(rates: list[dict]) -> dict:
    """The mean of a rate over the seeds, with the wider of two 95 % intervals: of the seeds, and of the responses.

    The seeds' own (Student's t) is nothing where all of them have the same rate, 0 for instance; that of all
    responses together (Wilson) does not see that a training run comes out otherwise with another seed.
    """
    values = [rate["value"] for rate in rates]
    n = sum(rate["n"] for rate in rates)
    pooled = intervals.rate(round(sum(rate["value"] * rate["n"] for rate in rates)), n)
    if len(values) == 1:
        return pooled
    centre = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))
    half = T.get(len(values) - 1, 1.96) * spread / math.sqrt(len(values))
    return {
        "value": centre,
        "low": max(0.0, min(pooled["low"], centre - half)),
        "high": min(1.0, max(pooled["high"], centre + half)),
        "n": n,
    }


def report(folder: Path, measured: dict[str, list], times: dict[str, list], amounts: dict) -> None:
    """The two tables on stdout, and everything in comparison.json."""
    together = {
        name: {rate: over_seeds([rates[rate] for rates in runs]) for rate in SHOWN} for name, runs in measured.items()
    }
    rows = [(rate.replace("_", " "), *(tables.show(together[name][rate]) for name in measured)) for rate in SHOWN]
    rows += [
        ("training, seconds", "", *(f"{sum(s) / len(s):.0f} ({min(s):.0f}–{max(s):.0f})" for s in times.values())),
        ("amount", "", *(f"{amounts[name]} {UNIT[ALGORITHMS[name][0]].removeprefix('--')}" for name in times)),
    ]
    click.echo(tables.table(("mean over the seeds (95 %)", *measured), rows))
    both = ("harmful_compliance", "benign_helpful")
    seeds = [
        (
            f"seed {seed}",
            *("  ".join(f"{100 * runs[seed][rate]['value']:5.1f}" for rate in both) for runs in measured.values()),
        )
        for seed in range(len(measured["sft"]))
    ]
    click.echo("\n" + tables.table(("complied, helped in %", *measured), seeds))
    content = {"rates": together, "seeds": measured, "seconds": times, "amounts": amounts}
    (folder / "comparison.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    click.echo(f"\neverything is in {folder / 'comparison.json'}")


if __name__ == "__main__":
    main()
