"""The complete method in one command: every step from prompts to the table base / after SFT / after RL.

    python scripts/run.py --model tiny --output runs/tiny

The plan is made in cai/steps/plan.py. Each step is a command of its own, called in this process so that torch and a
model are loaded once; `--dry-run` prints the same plan as a shell script. Run again, it skips the steps that are done.
Leaves out choices inside a step: run the printed script.
"""

import gc
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import click

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.base.paths import TINY
from cai.constitution.files import load_constitution
from cai.data.reading import reading_options
from cai.data.sources import Source
from cai.evaluate import qualification, smoke, stages
from cai.models import loading
from cai.stats import tables
from cai.steps import content, duplicates, gating, pricing
from cai.steps import principles as choosing
from cai.steps.plan import PRESETS, Choices, Step, make_plan, shorten_path


@click.command(cls=cli.Command)
@cli.options("model")
@click.option("--output", required=True, metavar="FOLDER", help="Folder for all outputs.")
@cli.options("constitution")
@cli.rows_option(
    "--input", "inputs", help="Prompts to train on, harmful and harmless; for `tiny` the bundled ones. Repeatable."
)
@cli.rows_option("--heldout", help="Prompts with their kind to measure on; for `tiny` the bundled ones. Repeatable.")
@cli.rows_option("--helpful", help="Rows with a helpful `response` to mix into SFT. Repeatable.")
@choosing.principles_option("draw", "match", "all")
@gating.gate_option
@content.stop_option
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
    help="Number of complete runs, with the seeds from --seed on; prints mean and range.",
)
@click.option(
    "--smoke",
    "is_smoke",
    is_flag=True,
    help="Run every step on a handful of rows, in a minute or so, into OUTPUT/smoke; then look for signs of life. "
    "For use before a costly run.",
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
@click.option(
    "--unqualified", is_flag=True, help="Run although the model is unfit to read, judge or criticise responses."
)
@click.option(
    "--heldout-limit",
    type=click.IntRange(min=1),
    default=None,
    help="Measure on the first N held-out prompts only; --limit is for the prompts of --input.",
)
@cli.options("reasoning_tags", "seed", "limit", "device", "dtype", "json", "dry_run", "overwrite")
@pricing.options
@reading_options
def main(output, seeds, is_smoke, seed, as_json, dry_run, unqualified, terms, **options):
    """Run the complete method: critique, revision, SFT, judging, reward model, PPO, and measure each stage.

    --prompt-field is for the files of --input, --heldout and --helpful, --response-field for --helpful, --kind-field,
    --kind and --set for --heldout.

    \b
    Example:
      python scripts/run.py --model tiny --output runs/tiny
    """
    if is_smoke:
        output, seeds = str(Path(output) / "smoke"), 1
        limits = {name: min(options[name] or smoke.LIMIT, smoke.LIMIT) for name in ("limit", "heldout_limit")}
        options |= {**limits, "overwrite": True}
    choices = choose(terms, **options)
    check_inputs(choices)
    folders = {seed + n: output if seeds == 1 else str(Path(output) / f"seed-{seed + n}") for n in range(seeds)}
    if dry_run:
        plans = [make_plan(choices, folder, seed) for seed, folder in folders.items()]
        click.echo(pricing.report(plans, choices, terms, as_json))
        return
    # Once for all steps: in one process the GPU can't be chosen again after the first step has used it.
    loading.choose_device(choices.device)
    if choices.device and choices.device.startswith("cuda"):
        choices = replace(choices, device="cuda")
    if not unqualified:
        qualification.require_run(choices)
    runs, some_failed = [], False
    for seed, folder in folders.items():
        started, steps = time.monotonic(), make_plan(choices, folder, seed)
        some_failed |= run_steps(steps, checks_revisions=not is_smoke)
        result = stages.read_stages({step.name: step.output for step in steps})
        runs.append({**result, "seconds": round(time.monotonic() - started, 1), "output": folder})
    if is_smoke:
        if not smoke.print_signs([(step.command, step.output) for step in steps], choices.device, as_json):
            click.get_current_context().exit(1)
    else:
        print_rates(runs, output, as_json)
    if some_failed:
        click.get_current_context().exit(cli.SOME_FAILED)


def choose(terms: pricing.Terms, *, model, inputs, heldout, preset, **options) -> Choices:
    """The choices, with the bundled prompts and preset for the bundled model. InputError for another without them."""
    inputs, heldout = terms.fill_in(model, inputs, heldout)
    files = {"--input": (inputs, "train.jsonl"), "--heldout": (heldout, "heldout.jsonl")}
    for option, (names, _) in files.items():
        if model != "tiny" and not names:
            raise InputError(
                f"no {option}",
                expected="a file of prompts",
                remedy=f"Only --model tiny has bundled prompts; give {option} FILE, or --dry-run with --prompts N",
            )
    inputs, heldout = (names or (shorten_path(TINY / "prompts" / file),) for names, file in files.values())
    preset = preset or ("tiny" if model == "tiny" else "default")
    return Choices(model=model, inputs=inputs, heldout=heldout, preset=preset, **options)


def check_inputs(choices: Choices) -> None:
    """Refuse bad input now, rather than hours later when its step comes."""
    for model in filter(None, (choices.model, choices.gate)):
        if not pricing.is_size(model):
            loading.check_model(loading.split_endpoint(model)[0])
    load_constitution(choices.constitution)
    of_files = {"inputs": (("prompt",), choices.limit), "heldout": (("prompt", "kind"), choices.heldout_limit)}
    for files, (fields, limit) in of_files.items():
        if pricing.is_file(choices, files):
            Source(getattr(choices, files), require=fields, limit=limit, reading=choices.reading_of(files))
    if choices.helpful:
        Source(choices.helpful, require=("prompt", "response"), reading=choices.reading_of("helpful"))


def run_steps(steps: list[Step], checks_revisions: bool) -> bool:
    """Run every step; returns whether in one of them some records failed. CaiError where one stops, and where most
    revisions are the same text, unless `checks_revisions` is off: a smoke run reports it among its signs."""
    times, some_failed = [], False
    try:
        for number, step in enumerate(steps, 1):
            title = f"step {number} of {len(steps)} ({step.name})"
            cli.note(f"\n# {title}\n$ {step.line}")
            started = time.monotonic()
            try:
                code = run_step(step, title)
            finally:
                times.append((step.name, f"{time.monotonic() - started:.1f}", _peak_megabytes()))
            if code == cli.SOME_FAILED:
                some_failed = True
                cli.warn(f"{title}: some records failed; going on with the others")
            elif code:
                raise _stopped(title, code)
            if checks_revisions and step.command == "revise":
                duplicates.check_revisions(step.output, title)
    finally:
        cli.note("\n" + tables.table(("step", "seconds", "peak MB so far"), times))
    return some_failed


def run_step(step: Step, title: str) -> int:
    """Call the step's command in this process; returns its exit code (0 or 3) or raises CaiError."""
    try:
        return cli.call_command(step.command, step.arguments, step.line)
    except (CaiError, click.ClickException) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise _stopped(title, error.exit_code, reason) from error
    except Exception:
        # A bug or a full disk: the traceback tells more than we can, but not in which step.
        cli.note(f"{_stopped(title, 1)}")
        raise
    finally:
        gc.collect()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()  # does nothing where CUDA was not used


def _stopped(title: str, code: int, reason: str = "") -> CaiError:
    words = [shorten_path(sys.executable), *(word for word in sys.argv if word != "--overwrite")]
    error = CaiError(
        f"{title} ended with exit code {code}. {reason}{' ' if reason else ''}What is done is kept; "
        f"the same command continues: {shlex.join(words)}"
    )
    error.exit_code = code
    return error


def _peak_megabytes() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**20 if sys.platform == 'darwin' else 2**10):,.0f}"  # bytes on macOS, KiB elsewhere


def print_rates(runs: list[dict], output: str, as_json: bool) -> None:
    """Print the rates of a run, or mean and range over several seeds, as a table or as one JSON object."""
    if len(runs) == 1:
        [result], table = runs, stages.stage_table(runs[0]["stages"])
        summary = f"rates with 95 % intervals · {runs[0]['seconds']:.0f} s"
    else:
        spread = stages.spread_over_seeds([run["stages"] for run in runs])
        result, table = {"stages": spread, "runs": runs, "output": output}, stages.spread_table(spread)
        summary = f"mean and range in % over {len(runs)} seeds"
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
        return
    click.echo(f"{table}\n\n{summary} · everything is in {output}")
    for run in runs:
        click.echo(f"report  {run['report']}")


if __name__ == "__main__":
    main()
