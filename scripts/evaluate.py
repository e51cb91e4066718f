"""Measure what a model's responses do: comply, refuse well, evade, preach, help, over-refuse.

    python scripts/evaluate.py --input scripts/cai/tiny/prompts/heldout.jsonl --model tiny --by oracle \
        --output evaluation.jsonl
    python scripts/evaluate.py --choice 438HHHEvaluations.jsonl --model runs/sft --output choice.jsonl
    python scripts/evaluate.py --input heldout.jsonl --model runs/sft --judge my-org/my-judge --output sft.jsonl \
        --against base.jsonl --gate

Every response is put into one class, by the bundled world's oracle (prompts made by tiny.py only), by a judge model's
forced choice between letters, by a safety classifier, or by its phrases. Also measured: a language model or a reward
model on multiple choices (`--choice`) and on pairs whose better response is known (`--pairs`, `--reward-model`).
Leaves out policies against each other (compare.py), the paper's figures (figures.py), any score of how good a text is,
and any rate over prompts without a kind.
"""

import click

from cai.base import cli
from cai.base.errors import InputError
from cai.data import outputs
from cai.data.reading import reading_options
from cai.evaluate import classes, gate, habits, options, responding, tasks
from cai.evaluate.measurement import gather, print_rates, write

NOT_PASSED = 4  # exit code of --gate


@click.command(cls=cli.Command)
@cli.rows_option(
    "--input", "inputs", help="Prompts with their kind, or pairs with gold (with --reward-model). Repeatable."
)
@cli.options("output", "date", "reasoning_tags")
@click.option(
    "--model", metavar="MODEL", help="Answers the prompts: a folder, a GGUF file, a hub id, `tiny`, or openai:NAME."
)
@cli.options("endpoint", "engine")
@cli.rows_option("--responses", help="Instead of --input and --model: rows that have a response already. Repeatable.")
@click.option(
    "--round",
    "round_",
    type=click.IntRange(min=0),
    default=None,
    help="For revised rows, the revision of this round; 0 is the first response. Default: the last.",
)
@click.option(
    "--every-round",
    is_flag=True,
    help="For revised rows (--responses) with --by phrases: the flags, skipped rounds and refusals of each round.",
)
@click.option(
    "--by",
    type=click.Choice(["oracle", "judge", "phrases"]),
    default="judge",
    show_default=True,
    help="Who reads the responses: the rules of the bundled world, a judge model, or rules for the phrases in which "
    "English responses decline, which need no model and tell refusals alone.",
)
@click.option(
    "--judge",
    metavar="MODEL",
    help="The judge model: a folder, a hub id, `tiny`, or openai:NAME@URL. With --by oracle its classes are "
    "compared with the oracle's.",
)
@click.option(
    "--orders",
    type=click.IntRange(1, len(classes.LETTERS)),
    default=classes.ORDERS,
    show_default=True,
    help="In how many orders the judge sees the classes; their probabilities are averaged, and the letter bias is "
    f"measured. {len(classes.LETTERS)}: each class once under each letter.",
)
@click.option(
    "--classifier",
    metavar="MODEL",
    help="Instead of a judge: a sequence-classification model with labels for safe and unsafe, or a guard model "
    "that writes them, such as Llama Guard.",
)
@click.option(
    "--unsafe-label",
    multiple=True,
    metavar="LABEL",
    help="The classifier's label for unsafe. Repeatable. Default: the labels whose names mean unsafe.",
)
@click.option(
    "--stress",
    multiple=True,
    type=click.Choice([*responding.WAYS, "all"]),
    help="Also run harmful prompts under stress: push-back, prefill, role-play, a jailbreak system prompt, and all "
    "prompts under a safety system prompt. Repeatable.",
)
@options.frame_options
@click.option(
    "--drift-from",
    metavar="MODEL",
    help="Also measure the KL divergence of --model from this model, its base, on harmless prompts.",
)
@click.option(
    "--faults",
    is_flag=True,
    help="For revised rows (--responses): what each principle did, and with --judge how often its critiques "
    "found fault.",
)
@cli.options("constitution")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sample this many times, with the seeds from --seed on, and report the spread.",
)
@options.gate_options
@options.other_options
@cli.options("temperature", "top_p", "max_new_tokens", "seed", "limit")
@cli.options("batch_size", "device", "dtype", "events", "json", "dry_run", "overwrite")
@reading_options
def main(output, against, watch, gated, margin, no_worse_than, unqualified, as_json, dry_run, overwrite, **values):
    """Measure responses: rates per kind of prompt, with 95 % intervals.

    Prompts need a `kind`: harmful, benign or borderline. The rates go to OUTPUT, one per line; the responses
    and their classes, or the scores of each choice, to files beside it.

    \b
    Example:
      python scripts/evaluate.py --input scripts/cai/tiny/prompts/heldout.jsonl \\
          --model tiny --by oracle --output evaluation.jsonl
    """
    if not values["faults"]:
        reason = "without --faults no principle is read. By rules of your own judge.py --against compares two models"
        cli.refuse_options(["constitution"], reason)
    if not values["frames"]:
        cli.refuse_options(["frame_split", "frame_prompts"], "without --frames no prompt is asked in a frame")
    chosen = gather(values)
    chosen.reader = classes.Reader(
        "classifier" if chosen.classifier else chosen.by,
        chosen.judge,
        chosen.classifier,
        chosen.unsafe_label,
        chosen.endpoints,
        chosen.loading,
        chosen.orders,
    )
    if (gated or watch) and not against:
        raise InputError(
            f"{'--gate' if gated else '--watch'} without --against FILE", remedy="Name the evaluation to compare with"
        )
    if no_worse_than and (margin or not gated):
        raise InputError(
            "--no-worse-than is for --gate, without --margin", remedy="Give --gate, and leave --margin out"
        )
    if unqualified and not gated:
        raise InputError("--unqualified without --gate", remedy="It lets the gate compare; nothing else is refused")
    before = gate.load(against) if against else None
    measurement = tasks.choose(chosen)
    measurement.files += [against] if against else []
    final = outputs.Output(
        output, command="evaluate", fingerprint=measurement.settings, overwrite=overwrite, inputs=measurement.files
    )
    if dry_run:
        cli.finish({**measurement.plan, "output": output}, as_json=as_json)
        return
    write(measurement, final)
    signs = habits.watch(gate.read_responses(against), gate.read_responses(output)) if watch else None
    unfit = gated and not unqualified and final.counts.get("qualified") is False
    margin = (no_worse_than or margin) / 100
    report(final, as_json, before, gated, margin, signs, replaces=bool(no_worse_than), refuses=unfit)


def report(
    output: outputs.Output,
    as_json: bool,
    before: gate.Evaluation | None,
    gated: bool,
    margin: float,
    signs: dict | None,
    *,
    replaces: bool = False,
    refuses: bool = False,
) -> None:
    """Print the rates and what has changed; exit with 3 if rows failed, with 4 if the gate is not passed.

    replaces: the gate asks whether the model may replace the one before. refuses: it compares nothing, because the
    reader is unfit.
    """
    deltas = gate.compare(before, gate.load(output.path), gated=gated, each=replaces) if before else []
    verdict, needed = gate.rule(deltas, margin, replaces=replaces) if gated else (None, {})
    if refuses:
        verdict, needed, deltas = gate.REFUSED, {}, []
    more = {"watch": signs} if signs else {}
    if before:
        changes = {delta.metric: gate.as_json(delta) for delta in deltas}
        ruling = {"verdict": verdict, **({"prompts_needed": needed} if gated else {})}
        more = {"against": {"file": str(before.path), **ruling, "deltas": changes}, **more}
    column = {delta.metric: gate.show(delta) for delta in deltas} if before else None
    print_rates(output, as_json=as_json, changes=column, more=more)
    if signs and not as_json:
        click.echo(habits.table(signs))
    if gated:
        reason = f"{output.counts['qualification']} (--unqualified compares all the same)" if refuses else ""
        click.echo(gate.verdict_line(deltas, verdict, needed) + reason, err=as_json)
    if verdict in ("worse", "may not", gate.TOO_FEW, gate.REFUSED):
        click.get_current_context().exit(NOT_PASSED)
    cli.exit_if_failed(output.counts)


if __name__ == "__main__":
    main()
