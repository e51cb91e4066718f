"""Make files that trainers read, from revised, answered or judged rows, with a ledger of every input row.

    python scripts/export.py --input revisions.jsonl --to trl-sft --keep copy --output train.jsonl
    python scripts/export.py --input runs/mine --to openrlhf --stage ppo --nodes 2 --output handover

With an engine as --to, the output is a folder: rows, launch file, reward model, README. The ledger begins with the rows
of the first command's input, found by the manifests. Leaves out training (sft.py, dpo.py) and uploads (push.py).
"""

import os
from pathlib import Path

import click

from cai.base import cli, hashing
from cai.base.errors import InputError
from cai.base.paths import model_path
from cai.data import engine_rows, exports, outputs, run_files
from cai.data.reading import reading_options
from cai.models import estimate, handover, launch, loading
from cai.steps.flags import selection_options

# Options that only a hand-over to an engine reads.
OF_ENGINES = ("stage", "model", "reward_model", "nodes", "gpus", "gpu", "max_new_tokens", "check", "device", "dtype")

# Those that only a stage with a reward reads.
OF_REWARDS = ("reward_model", "max_new_tokens", "check", "device", "dtype")


def engine_options(function):
    """Decorator: the options of a hand-over to an engine."""
    options = [
        click.option("--stage", type=click.Choice(engine_rows.STAGES), help="With an engine: what it trains."),
        click.option(
            "--model",
            metavar="FOLDER",
            help="With an engine: the folder or hub id that it trains. Default: the run's SFT model, or the model that "
            "SFT began from.",
        ),
        click.option(
            "--reward-model", metavar="FOLDER", help="With --stage ppo or grpo: the reward model. Default: the run's."
        ),
        click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines."),
        click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs per machine."),
        click.option(
            "--gpu",
            type=click.Choice(list(estimate.GPUS)),
            default="h100",
            show_default=True,
            help="The GPU that memory and hours are estimated for.",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=256,
            show_default=True,
            help="Tokens of a response in --stage ppo and grpo.",
        ),
        click.option(
            "--check",
            type=click.IntRange(min=1),
            default=None,
            metavar="N",
            help="Score N responses as each engine would, before and after the reward model is written for it, and "
            "report differences and their causes. Refuses the export if the engine's scores differ.",
        ),
        cli.options("device", "dtype"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command(cls=cli.Command)
@cli.options("input", "output")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice([*exports.TARGETS, *engine_rows.ENGINES]),
    help="The format. trl-sft: prompt and completion. trl-preference: prompt, chosen, rejected and p_chosen. "
    "trl-prompt: the prompt alone. openai: messages. sharegpt: conversations. Or an engine, for a folder with "
    "all that it needs; --input may then be a run folder.",
)
@selection_options("Export")
@click.option(
    "--keep-repeats",
    is_flag=True,
    help="Keep the answer to a prompt that an earlier input row has too. Default: it is a duplicate.",
)
@engine_options
@cli.options("limit", "json", "dry_run", "overwrite")
@reading_options
def main(inputs, output, target, rounds, keep, keep_repeats, limit, as_json, dry_run, overwrite, reading, **engine):
    """Export rows in a format that trainers read, with a ledger of what became of every input row.

    \b
    Example:
      python scripts/export.py --input revisions.jsonl --to trl-sft \\
          --keep copy --output train.jsonl
    """
    selection = {"rounds": rounds, "keep": sorted(set(keep)), "keep_repeats": keep_repeats, "limit": limit}
    flags = {"overwrite": overwrite, "dry_run": dry_run}
    if target in engine_rows.ENGINES:
        summary = hand_over(inputs, output, target, selection, reading, flags, **engine)
    else:
        cli.refuse_options(OF_ENGINES, f"--to {target} makes a file of rows, not a folder for an engine")
        summary = export_rows(inputs, output, target, selection, reading, flags)
    cli.finish(summary, as_json=as_json)
    cli.exit_if_failed({"failed": summary["invalid"]})


def read_rows(inputs, target, selection, reading, convert=None):
    """The rows to export, with the notes on where they come from printed."""
    keep = frozenset(selection["keep"])
    export = exports.Export(inputs, target, **{**selection, "keep": keep}, reading=reading, convert=convert)
    for note in export.notes:
        cli.warn(note)
    return export


def export_rows(inputs, output, target, selection, reading, flags):
    """One file of rows and its ledger; returns the summary."""
    export = read_rows(inputs, target, selection, reading)
    ledger = f"{output}.ledger.jsonl"
    result = outputs.WholeOutput(
        output,
        command="export",
        fingerprint={"input": export.digest, "to": target, **selection},
        overwrite=flags["overwrite"],
        inputs=[*inputs, *export.origins],
    )
    is_input = os.path.realpath(ledger) in map(os.path.realpath, [*inputs, *export.origins])
    if is_input or (os.path.exists(ledger) and not (result.manifest_path.exists() or flags["overwrite"])):
        raise InputError("it exists, and the ledger would take its place", where=ledger, remedy=result.foreign_remedy)
    if flags["dry_run"]:
        result.counts = export.counts
    else:
        with result:
            if result.complete:
                cli.note(f"{output} is done already; --overwrite makes it again")
            else:
                result.finish({ledger: export.ledger, output: export.records}, export.counts, origins=export.origins)
    return {"command": "export", "output": output, "ledger": ledger, "begins_with": export.origins, **result.counts}


def find_run(inputs, stage, model, reward_model):
    """The files of a run folder, or those that are named; options come first. InputError for what is missing."""
    if len(inputs) == 1 and Path(inputs[0]).is_dir():
        run = run_files.find_files(inputs[0], stage)
    else:
        run = run_files.RunFiles(tuple(inputs), None, None)
    model = model or run.model
    if model is None:
        raise InputError("no model to train", where="--model", remedy="Name its folder or hub id, or give a run folder")
    if not launch.is_rl(stage):
        cli.refuse_options(
            ("reward_model", "check", "device", "dtype", "max_new_tokens"), f"--stage {stage} scores nothing"
        )
        return run, model, None
    scorer = reward_model or run.reward_model
    if scorer is None:
        raise InputError(
            f"--stage {stage} needs a reward model",
            where="--reward-model",
            remedy="Name its folder, or train one with reward_model.py",
        )
    return run, model, scorer


def hand_over(inputs, output, engine, selection, reading, flags, *, stage, check, device, dtype, **options):
    """A folder with what an engine needs for one stage; returns the summary."""
    engine_rows.check_stage(engine, stage)
    run, model, scorer = find_run(inputs, stage, options.pop("model"), options.pop("reward_model"))
    if check is None:
        cli.refuse_options(("device", "dtype"), "without --check no model is loaded")
    loading.check_model(model)
    export = read_rows(run.inputs, engine_rows.BASES[stage], selection, reading, engine_rows.convert(engine, stage))
    settings = {"to": engine, "stage": stage, "model": model, "check": check, **options}
    result = outputs.WholeFolder(
        output,
        command="export",
        fingerprint={
            "input": export.digest,
            "reward_model": hashing.identity(scorer) if scorer else None,
            **settings,
            **selection,
        },
        overwrite=flags["overwrite"],
        inputs=[*run.inputs, *export.origins],
    )
    summary = {"command": "export", "output": output, "begins_with": export.origins}
    if result.complete and not flags["dry_run"]:
        cli.note(f"{output} is done already; --overwrite makes it again")
        return {**summary, **result.counts}
    terms = launch.Terms(model_path(model), scorer, output=output, **options)
    folder = handover.Handover(engine, stage, terms, export)
    counts = {**export.counts, **folder.summary}
    if scorer and check:
        responses, are_pairs = run_files.read_responses(run.inputs, run.preferences, check, reading)
        counts["scores"] = folder.check_scores(
            responses, are_pairs, device=device, dtype=dtype, is_refused=not flags["dry_run"]
        )
    if flags["dry_run"]:
        return {**summary, **counts}
    with result:
        result.build(folder.write, counts, origins=export.origins)
    return {**summary, **counts}


if __name__ == "__main__":
    main()
