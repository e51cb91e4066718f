"""The complete method in one command: every step from prompts to the table base / after SFT / after RL.

    python scripts/run.py --model tiny --output runs/tiny

The options are in cai/steps/run_options.py, the plan in cai/steps/plan.py. Each step is a command of its own, called in
this process so that torch and a model are loaded once; `--dry-run` prints the same plan as a shell script. Run again,
it skips the steps that are done. Leaves out choices inside a step: run the printed script.
"""

import gc
import json
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import click

from cai.base import cli, events
from cai.base.errors import CaiError
from cai.evaluate import qualification, smoke, stages
from cai.models import loading
from cai.stats import tables
from cai.steps import duplicates, pricing, run_options
from cai.steps.plan import Step, make_plan, shorten_path


@click.command(cls=cli.Command)
@run_options.options
def main(output, seeds, is_smoke, seed, as_json, dry_run, unqualified, terms, **options):
    """Run the complete method: critique, revision, SFT, judging, reward model, PPO, and measure each stage.

    --prompt-field is for the files of --input, --heldout and --helpful, --response-field for --helpful, --kind-field,
    --kind and --set for --heldout.

    \b
    Example:
      python scripts/run.py --model tiny --output runs/tiny
    """
    choices = run_options.choose(terms, **options)
    run_options.check_inputs(choices)
    if is_smoke:
        cli.refuse_options(["seeds"], "a smoke run is one run")
        output, seeds, choices = str(Path(output) / "smoke"), 1, smoke.bound(choices)
    folders = {seed + n: output if seeds == 1 else str(Path(output) / f"seed-{seed + n}") for n in range(seeds)}
    if dry_run:
        plans = [make_plan(choices, folder, seed) for seed, folder in folders.items()]
        click.echo(pricing.report(plans, choices, terms, as_json))
        return
    # Once for all steps: in one process the GPU can't be chosen again after the first step has used it.
    loading.choose_device(choices.device)
    if choices.device and choices.device.startswith("cuda"):
        choices = replace(choices, device="cuda")
    runs, some_failed = [], False
    with qualification.only_kept() if is_smoke else nullcontext():
        if not unqualified:
            qualification.require_run(choices)
        for seed, folder in folders.items():
            started, steps = time.monotonic(), make_plan(choices, folder, seed)
            some_failed |= run_steps(steps, checks_revisions=not is_smoke)
            result = stages.read_stages({step.name: step.output for step in steps})
            runs.append({**result, "seconds": round(time.monotonic() - started, 1), "output": folder})
    if is_smoke:
        if not smoke.print_signs(steps, choices, as_json):
            click.get_current_context().exit(1)
    else:
        print_rates(runs, output, as_json)
    if some_failed:
        click.get_current_context().exit(cli.SOME_FAILED)


def run_steps(steps: list[Step], checks_revisions: bool) -> bool:
    """Run every step; returns whether in one of them some records failed. CaiError where one stops, and where most
    revisions are the same text, unless `checks_revisions` is off: a smoke run reports it among its signs."""
    times, some_failed = [], False
    try:
        for number, step in enumerate(steps, 1):
            title = f"step {number} of {len(steps)} ({step.name})"
            cli.note(f"\n# {title}\n$ {step.line}", is_event=False)
            place = {"command": step.command, "step": step.name, "number": number, "steps": len(steps)}
            started = time.monotonic()
            with events.record_step(place, line=step.line, output=step.output) as ending:
                try:
                    code = ending.exit_code = run_step(step, title)
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
        cli.note("\n" + tables.table(("step", "seconds", "peak MB so far"), times), is_event=False)
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
        cli.note(f"{_stopped(title, 1)}", is_event=False)
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
    events.emit_figures(result)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
        return
    click.echo(f"{table}\n\n{summary} · everything is in {output}")
    for run in runs:
        click.echo(f"report  {run['report']}")


if __name__ == "__main__":
    main()
