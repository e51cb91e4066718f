"""The whole method in one command: every step from prompts to the table base / after SFT / after RL.

    python scripts/run.py --model tiny --output runs/tiny

The plan follows from the flags alone. Each step is a command of its own, called in this process so that torch
and a model are loaded once; `--dry-run` prints the same plan as a shell script. Run again, the steps that
are done are passed over. Leaves out choices inside a step: change PRESETS, or run the printed script.
"""

import contextlib
import gc
import importlib.util
import json
import os
import resource
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.base.paths import SCRIPTS, TINY
from cai.constitution.files import load_constitution
from cai.data.outputs import read_manifest
from cai.data.sources import Source
from cai.evaluate.rates import KINDS, RATES, read_rates
from cai.evaluate.smoke import LIMIT, look
from cai.models.loading import check_model
from cai.stats import tables

TRAINS = ("sft", "reward_model", "ppo", "dpo", "grpo")
STAGES = {"base": "base", "sft": "after SFT", "ppo": "after PPO", "dpo": "after DPO", "grpo": "after GRPO"}

# The settings of each step. A critique that found no fault leaves the response as it was: from such copies
# SFT learns to stay helpful, hence `--keep copy`. Pairs are sampled hotter than answers are, because two that
# are alike teach a reward model nothing. `batch_size` is that of the steps that write or judge text;
# `size`:
# updates, prompts in each, and minibatches.
PRESETS = {
    "tiny": {
        "batch_size": 64,
        "generate": "--temperature 0.5 --max-new-tokens 96",
        "critique": "--temperature 0.3 --max-new-tokens 96",
        "revise": "--temperature 0.3 --max-new-tokens 96",
        "sft": "--keep copy --epochs 4 --learning-rate 1e-3 --batch-size 32 --max-length 512",
        "samples": "--samples 4 --temperature 1.3 --max-new-tokens 96",
        "judge": "--pairs-per-prompt 5",
        "reward_model": "--epochs 1 --learning-rate 5e-4 --batch-size 32 --max-length 512",
        "size": {"ppo": (24, 64, 4), "grpo": (20, 16, 1)},
        "ppo": "--epochs 1 --batch-size 32 --learning-rate 8e-5 --temperature 1.0 --max-new-tokens 96",
        "dpo": "--epochs 1 --learning-rate 1e-4 --batch-size 32 --max-length 512",
        "grpo": "--samples 4 --batch-size 64 --learning-rate 1e-4 --max-new-tokens 96",
        "evaluate": "--by oracle --temperature 0.7 --max-new-tokens 96",
    },
    "default": {
        "batch_size": 32,
        "generate": "--temperature 0.7 --max-new-tokens 512",
        "critique": "--temperature 0.7 --max-new-tokens 512",
        "revise": "--temperature 0.7 --max-new-tokens 512",
        "sft": "--keep copy --lora --epochs 2 --learning-rate 1e-4",
        "samples": "--samples 2 --temperature 1.0 --max-new-tokens 512",
        "judge": "",
        "reward_model": "--lora --epochs 1 --learning-rate 1e-4",
        "size": {"ppo": (100, 128, 1), "grpo": (100, 16, 1)},
        "ppo": "--lora --learning-rate 1e-5 --max-new-tokens 512",
        "dpo": "--lora --epochs 1 --learning-rate 5e-6",
        "grpo": "--lora --learning-rate 1e-5 --max-new-tokens 512",
        "evaluate": "--by judge --temperature 0.7 --max-new-tokens 512",
    },
}


@dataclass(frozen=True)
class Step:
    """One command of the plan. `output` is the file or folder it writes."""

    name: str
    command: str
    arguments: list[str]
    output: str

    @property
    def line(self) -> str:
        """The step as typed into a shell in the current directory."""
        return shlex.join([_near(sys.executable), _near(SCRIPTS / f"{self.command}.py"), *self.arguments])


@click.command(cls=cli.Command)
@cli.options("model")
@click.option("--output", required=True, metavar="FOLDER", help="Folder for everything that is made.")
@cli.options("constitution")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="FILE",
    help="Prompts to train on, harmful and harmless; for `tiny` the bundled ones. Repeatable.",
)
@click.option(
    "--heldout",
    multiple=True,
    metavar="FILE",
    help="Prompts with their kind to measure on; for `tiny` the bundled ones. Repeatable.",
)
@click.option(
    "--helpful", multiple=True, metavar="FILE", help="Rows with a helpful `response` to mix into SFT. Repeatable."
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Rounds of critique and revision."
)
@click.option(
    "--rl",
    type=click.Choice(["ppo", "dpo", "grpo", "none"]),
    default="ppo",
    show_default=True,
    help="What follows SFT; none ends there.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Run it all so many times, with the seeds from --seed on, and give mean and spread.",
)
@click.option(
    "--smoke",
    is_flag=True,
    help="Every step on a handful of rows, in a minute or so, into OUTPUT/smoke; then look for signs of "
    "life. What to run before a costly night.",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default=None,
    help="Settings of the steps. Default: `tiny` for that model, else `default`.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=None,
    help="Rows in one forward pass of the steps that write or judge text. Default: the preset's.",
)
@cli.options("seed", "limit", "device", "dtype", "json", "dry_run", "overwrite")
def main(
    model,
    output,
    constitution,
    inputs,
    heldout,
    helpful,
    rounds,
    rl,
    seeds,
    smoke,
    preset,
    batch_size,
    seed,
    limit,
    device,
    dtype,
    as_json,
    dry_run,
    overwrite,
):
    """Run the whole method: critique, revision, SFT, judging, reward model, PPO, and measure each stage.

    \b
    Example:
      python scripts/run.py --model tiny --output runs/tiny
    """
    inputs = inputs or _bundled(model, "--input", "train.jsonl")
    heldout = heldout or _bundled(model, "--heldout", "heldout.jsonl")
    if smoke:
        output, limit, seeds, overwrite = str(Path(output) / "smoke"), min(limit or LIMIT, LIMIT), 1, True
    _check(model, inputs, heldout, helpful, constitution, limit)

    settings = PRESETS[preset or ("tiny" if model == "tiny" else "default")]
    folders = {seed + n: output if seeds == 1 else str(Path(output) / f"seed-{seed + n}") for n in range(seeds)}

    def make_plans(device):
        return {
            folder: plan(
                model,
                folder,
                settings,
                constitution=constitution,
                inputs=inputs,
                heldout=heldout,
                helpful=helpful,
                rounds=rounds,
                rl=rl,
                seed=one,
                limit=limit,
                batch_size=batch_size,
                device=device,
                dtype=dtype,
                overwrite=overwrite,
            )
            for one, folder in folders.items()
        }

    if dry_run:
        show_plan([step for steps in make_plans(device).values() for step in steps], as_json)
        return
    from cai.models.loading import choose_device

    # Once for all steps: in one process the GPU can't be chosen again after the first has used it.
    choose_device(device)
    plans = make_plans("cuda" if device and device.startswith("cuda") else device)
    found, some_failed = [], False
    for folder, steps in plans.items():
        started = time.monotonic()
        some_failed |= run_steps(steps)
        found.append({**collect(steps), "seconds": round(time.monotonic() - started, 1), "output": folder})
    if smoke:
        show_signs(plans[output], device, as_json)
    elif seeds == 1:
        finish(found[0], as_json)
    else:
        finish_seeds(found, output, as_json)
    if some_failed:
        click.get_current_context().exit(cli.SOME_FAILED)


def _bundled(model: str, option: str, name: str) -> tuple[str, ...]:
    if model != "tiny":
        raise InputError(
            f"no {option}",
            expected="a file of prompts",
            remedy=f"Only --model tiny brings prompts of its own; give {option} FILE",
        )
    return (_near(TINY / "prompts" / name),)


def _check(model, inputs, heldout, helpful, constitution, limit) -> None:
    """Refuse bad input now, rather than hours later when its step comes."""
    check_model(model)
    load_constitution(constitution)
    Source(inputs, limit=limit)
    Source(heldout, require=("prompt", "kind"), limit=limit)
    if helpful:
        Source(helpful, require=("prompt", "response"))


def plan(
    model,
    output,
    preset,
    *,
    constitution,
    inputs,
    heldout,
    helpful,
    rounds,
    rl,
    seed,
    limit,
    batch_size,
    device,
    dtype,
    overwrite,
) -> list[Step]:
    """The steps, in order. Files of rows are numbered in `output`; evaluations and models are not."""
    folder, steps, files = Path(output), [], iter(range(1, 100))
    shared = ["--seed", str(seed), "--dtype", dtype]
    if device:
        shared += ["--device", device]
    if overwrite:
        shared += ["--overwrite"]
    few = [] if limit is None else ["--limit", str(limit)]

    def add(name: str, command: str, arguments: list[str], file: str, settings: str | None = None) -> str:
        path = str(folder / file)
        extra = [] if command in TRAINS else ["--batch-size", str(batch_size or preset["batch_size"])]
        settings = preset[settings or command].split()
        steps.append(Step(name, command, [*arguments, "--output", path, *settings, *extra, *shared], path))
        return path

    def evaluate(stage: str, stage_model: str) -> None:
        judge = ["--judge", model] if "--by judge" in preset["evaluate"] else []
        arguments = [*_each("--input", heldout), "--model", stage_model, *judge, *few]
        add(f"evaluate-{stage}", "evaluate", arguments, f"evaluation-{stage}.jsonl")

    def rows(name: str, command: str, arguments: list[str], settings: str | None = None) -> str:
        return add(name, command, arguments, f"{next(files):02d}-{name}.jsonl", settings)

    evaluate("base", model)
    prompts = [*_each("--input", inputs), *few]
    responses = rows("responses", "generate", [*prompts, "--model", model])
    base, revised = ["--model", model, "--constitution", constitution], responses
    for number in range(1, rounds + 1):
        critiqued = rows(f"critique-{number}", "critique", ["--input", revised, *base])
        revised = rows(f"revision-{number}", "revise", ["--input", critiqued, *base])
    sft = add("sft", "sft", ["--input", revised, *_each("--helpful", helpful), "--model", model], "sft")
    evaluate("sft", sft)
    if rl == "none":
        return [*steps, _report(folder)]
    samples = rows("samples", "generate", [*prompts, "--model", sft], "samples")
    # The base model's first responses make one more a prompt: those of a well-behaved policy hardly differ.
    preferences = rows("preferences", "judge", [*_each("--input", (samples, responses)), *base])
    if rl == "dpo":
        policy = add("dpo", "dpo", ["--input", preferences, "--model", sft], "dpo")
    else:
        reward = add("reward-model", "reward_model", ["--input", preferences, "--model", sft], "reward-model")
        size = _size(preset["size"][rl], limit)
        policy = add(rl, rl, [*prompts, "--model", sft, "--reward-model", reward, *size], rl)
    evaluate(rl, policy)
    return [*steps, _report(folder)]


def _size(size: tuple[int, int, int], limit: int | None) -> list[str]:
    """Updates, prompts in each, and minibatches, as ppo.py and grpo.py take them."""
    updates, most, parts = size
    if limit:  # a trial run: the few prompts once, in minibatches of equal size
        updates, most = min(updates, -(-limit // most)), min(most, limit)
        parts = min(parts, most)
        most -= most % parts
    return ["--updates", str(updates), "--prompts-per-update", str(most), "--minibatches", str(parts)]


def _report(folder: Path) -> Step:
    return Step("report", "report", [str(folder)], str(folder / "report.html"))


def _each(option: str, values) -> list[str]:
    return [part for value in values for part in (option, value)]


def _near(path: str | Path) -> str:
    """The path from the current directory if it lies below it, else absolute."""
    here, path = Path.cwd(), Path(os.path.abspath(path))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def show_plan(steps: list[Step], as_json: bool) -> None:
    """Print the plan as a shell script.

    In parentheses, so that an error doesn't end the shell it is pasted into. A step that ends with 3 is done
    but for some records, and the next one goes on with the others.
    """
    if as_json:
        listed = [{"name": step.name, "command": step.line, "output": step.output} for step in steps]
        click.echo(json.dumps({"steps": listed}, ensure_ascii=False))
        return
    click.echo(f"(\nset -e\ncd {shlex.quote(str(Path.cwd()))}")
    for step in steps:
        click.echo(f"{step.line} || [ $? -eq {cli.SOME_FAILED} ]")
    click.echo(")")


def run_steps(steps: list[Step]) -> bool:
    """Run every step; returns whether in one of them some records failed. CaiError where one stops."""
    times, some_failed = [], False
    try:
        for number, step in enumerate(steps, 1):
            place = f"step {number} of {len(steps)} ({step.name})"
            cli.note(f"\n# {place}\n$ {step.line}")
            began = time.monotonic()
            try:
                code = run_step(step, place)
            finally:
                times.append((step.name, f"{time.monotonic() - began:.1f}", f"{_peak_megabytes():,.0f}"))
            if code == cli.SOME_FAILED:
                some_failed = True
                cli.warn(f"{place}: some records failed; going on with the others")
            elif code:
                raise _stopped(place, code)
    finally:
        cli.note("\n" + tables.table(("step", "seconds", "peak MB so far"), times))
    return some_failed


def run_step(step: Step, place: str) -> int:
    """Call the step's command in this process; returns its exit code (0 or 3) or raises CaiError."""
    context = click.get_current_context()
    debug, context.meta["command_line"] = context.meta.get("debug"), step.line
    try:
        # stdout is for our own summary alone.
        with contextlib.redirect_stdout(sys.stderr):
            code = load_command(step.command).main(
                step.arguments, prog_name=step.command, standalone_mode=False, parent=context
            )
    except CaiError as error:
        raise _stopped(place, error.exit_code, str(error)) from error
    except click.ClickException as error:
        raise _stopped(place, error.exit_code, error.format_message()) from error
    except Exception:
        # A bug or a full disk: the traceback tells more than we can, but not in which step.
        cli.note(f"{_stopped(place, 1)}")
        raise
    finally:
        context.meta["debug"] = debug
        _free_memory()
    return code or 0


def _stopped(place: str, code: int, reason: str = "") -> CaiError:
    words = [word for word in sys.argv if word != "--overwrite"]
    error = CaiError(
        f"{place} ended with exit code {code}. {reason}{' ' if reason else ''}What is done is kept; "
        f"the same command continues: {shlex.join([_near(sys.executable), *words])}"
    )
    error.exit_code = code
    return error


def load_command(name: str) -> click.Command:
    """The click command of scripts/<name>.py."""
    module_name = f"command_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name].main


def _free_memory() -> None:
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here


def collect(steps: list[Step]) -> dict:
    """{stages, judge, report}: read back from the files of the evaluations and the judge."""
    outputs = {step.name: step.output for step in steps}
    stages = {stage: read_rates(outputs[f"evaluate-{stage}"]) for stage in STAGES if f"evaluate-{stage}" in outputs}
    judge = read_manifest(outputs["preferences"])["counts"] if "preferences" in outputs else None
    return {"stages": stages, "judge": judge, "report": outputs["report"]}


def finish(found: dict, as_json: bool) -> None:
    """The final table, or one JSON object."""
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    stages = found["stages"]
    click.echo(tables.table(("", *(STAGES[stage] for stage in stages)), list(_table_rows(stages))))
    click.echo(f"\nrates with 95 % intervals · {found['seconds']:.0f} s · everything is in {found['output']}")
    click.echo(f"report  {found['report']}")


def finish_seeds(found: list[dict], output: str, as_json: bool) -> None:
    """Mean and range of every rate over the seeds, as a table or one JSON object with each seed's own."""

    def of_seeds(stage: str, name: str) -> dict:
        values = [one["stages"][stage][name]["value"] for one in found]
        return {"mean": sum(values) / len(values), "lowest": min(values), "highest": max(values), "seeds": len(values)}

    spread = {stage: {name: of_seeds(stage, name) for name in rates} for stage, rates in found[0]["stages"].items()}
    if as_json:
        click.echo(json.dumps({"stages": spread, "runs": found, "output": output}, ensure_ascii=False))
        return
    rows = [
        (
            name.replace("_", " "),
            *(
                f"{100 * one['mean']:.1f} ({100 * one['lowest']:.1f}–{100 * one['highest']:.1f})"
                for one in (rates[name] for rates in spread.values())
            ),
        )
        for name in next(iter(spread.values()))
    ]
    click.echo(tables.table(("", *(STAGES[stage] for stage in spread)), rows))
    click.echo(f"\nmean and range in % over {len(found)} seeds · everything is in {output}")
    for one in found:
        click.echo(f"report  {one['report']}")


def show_signs(steps: list[Step], device: str | None, as_json: bool) -> None:
    """What a smoke run shows: each sign of life, and exit 1 where one is missing."""
    signs = look([(step.command, step.output) for step in steps], device)
    dead = [sign for sign in signs if not sign.alive]
    if as_json:
        click.echo(json.dumps({"alive": not dead, "signs": [asdict(sign) for sign in signs]}, ensure_ascii=False))
    else:
        rows = [(sign.step, sign.name, "yes" if sign.alive else "NO", sign.seen) for sign in signs]
        click.echo(tables.table(("step", "sign of life", "", "seen"), rows))
    if dead:
        click.get_current_context().exit(1)


def _table_rows(stages: dict):
    """A heading for each kind of prompt, under it a row a rate."""
    for kind in KINDS:
        names = [name for name, (of, _) in RATES.items() if of == kind]
        n = next(iter(stages.values()))[names[0]]["n"]
        yield (f"{kind} prompts (n = {n})", *([""] * len(stages)))
        for name in names:
            measured = (tables.show(stage[name]) for stage in stages.values())
            yield (f"  {name.replace('_', ' ')}", *measured)


if __name__ == "__main__":
    main()
