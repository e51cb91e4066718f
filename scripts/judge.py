"""Compare responses by a principle of the constitution: preferences with soft labels.

    python scripts/judge.py --input samples.jsonl --model tiny --output preferences.jsonl

The judge answers a forced choice in both orders; the labels' log-probabilities are read and averaged (paper,
section 4.1). A principle is drawn for each comparison, or matched to its prompt, or all are used. Several judges run
one after the other, each with its own file beside the output, and their labels are then combined. No judge is asked
with --verdicts, which combines labels that exist already, and with --prefer-input, which prefers one file to another.
--serve answers requests for rewards over HTTP. Leaves out any training.
"""

import shlex
from functools import partial

import click

from cai.base import cli
from cai.data import processes, readers
from cai.data.outputs import Output
from cai.data.reading import Reading
from cai.evaluate import audit, qualification
from cai.models.loading import load_engine
from cai.stats import agreement, tables
from cai.steps import contrast, judges, pairs, principles, serving, text, verdicts

# The parameters that have an effect without a judge.
WITHOUT_JUDGE = {
    *("inputs", "against", "output", "prefer_input", "pairs_per_prompt", "seed", "limit"),
    *("events", "as_json", "dry_run", "overwrite", "debug"),
    *Reading.__dataclass_fields__,
}


@click.command(cls=cli.Command)
@cli.rows_option(
    "--input",
    "inputs",
    help="File of pairs, or of responses of which those to one prompt are compared (JSONL, JSON, CSV, Parquet), a "
    "pattern such as 'part-*.jsonl', a folder of save_to_disk, or a dataset id. Repeatable.",
)
@cli.options("date")
@click.option("--output", metavar="PATH", help="Where the result goes.  [required without --serve]")
@click.option("--model", metavar="MODEL", help="The judge: a folder, a GGUF file, a hub id, or `tiny` (bundled).")
@click.option(
    "--judge", multiple=True, metavar="MODEL", help="A further judge. Repeatable; then --model may be left out."
)
@verdicts.options
@click.option(
    "--combine",
    type=click.Choice(agreement.WAYS),
    default="mean",
    show_default=True,
    help="How the labels of several judges are combined. dawid-skene weighs judges by their agreement. A different "
    "way with --overwrite does not run the judges again.",
)
@cli.options("constitution", "examples")
@principles.principles_option("draw", "match", "all", "each")
@principles.matches_option
@click.option(
    "--against", metavar="FILE", help="Compare with these responses to the same prompts instead of among --input."
)
@click.option(
    "--prefer-input",
    is_flag=True,
    help="Ask no judge: each response of --input is preferred to those of --against, with p_chosen 1. For responses "
    "that are better by the way they were made, such as generate.py --in-context.",
)
@click.option(
    "--pairs-per-prompt",
    type=click.IntRange(min=1),
    default=None,
    help="Compare at most N pairs of responses per prompt.  [default: all]",
)
@click.option(
    "--template", default="preference", show_default=True, metavar="NAME|FILE", help="Template of the forced choice."
)
@click.option(
    "--answer-template",
    default="preference_answer",
    show_default=True,
    metavar="NAME|FILE",
    help="Template for a judge without log-probabilities, which writes a letter.",
)
@click.option("--cot", is_flag=True, help="Let the judge reason first, by the template preference_cot.")
@click.option(
    "--clamp",
    nargs=2,
    type=click.FloatRange(0, 1),
    default=None,
    metavar="LOW HIGH",
    help="Keep probabilities within these; 0 1 is off.  [default: 0.4 0.6 with --cot, else off]",
)
@click.option(
    "--audit",
    "audit_path",
    metavar="FILE",
    help="Measure the quality of the labels, with intervals, and write it here as JSON; with gold labels also a "
    "reliability diagram (PNG) beside it.",
)
@serving.serve_option
@text.options
def main(
    inputs,
    output,
    model,
    judge,
    verdict_files,
    verdict_fields,
    combine,
    audit_path,
    prefer_input,
    address,
    settings,
    **task_options,
):
    """Compare responses to the same prompt, and write which one is better and how sure the judge is.

    Rows have a `response` (those of one prompt_id are compared), a `response_a` and a `response_b`, or TRL's
    `chosen` and `rejected`. With a `gold` of "a" or "b", or a chosen response, the judge's accuracy is measured.
    Sampling options matter with --cot only. With --audit a finished output is measured without judging again.

    \b
    Example:
      python scripts/judge.py --input samples.jsonl --model tiny \\
          --constitution harmlessness --output preferences.jsonl
    """
    if serving.answer_requests(address, output, model, settings, task_options):
        return
    verdicts.check_files(inputs, verdict_files)
    if verdict_files:
        return take_verdicts(inputs, verdict_files, verdict_fields, output, combine, audit_path, settings, task_options)
    if prefer_input:
        return prefer(inputs, output, task_options["against"], task_options["pairs_per_prompt"], settings)
    if not task_options["cot"]:
        cli.refuse_options(["like"], "without --cot a judge writes no answers")
    servers = judges.read_judges([model, *judge] if model else judge, settings.endpoints)
    names = list(servers)
    task = judges.read_task(inputs, settings, model=names[0], output=output, **task_options)
    loads = {name: partial(load_engine, name, endpoints=servers[name], **settings.loading) for name in names}
    team = processes.Team()
    if not team.first:
        if not (settings.dry_run or team.tell()):
            judges.match_prompts(team, task, loads[names[0]])
            for load in loads.values():
                judges.judge_output(team, None, task, load)
        return
    outputs, final = judges.claim_outputs(output, names, combine, task, settings.overwrite)
    audit.check_path(audit_path, [*inputs, output, *(judge_output.path for judge_output in outputs.values())])
    summary = {"command": "judge", "output": output}
    if settings.dry_run:
        return cli.finish({**summary, **judges.plan_judges(task, outputs, settings.plan)}, as_json=settings.as_json)
    if team.tell(final.complete):
        cli.note(f"{output} is done already; --overwrite makes it again")
    else:
        qualify(task, loads, servers, settings)
        judges.match_prompts(team, task, loads[names[0]])
        for name, load in loads.items():
            judges.judge_output(team, outputs[name], task, load)
        if len(names) > 1:
            judges.combine_judges(final, outputs, task, combine)
    finish({**summary, **final.counts}, output, names, audit_path, settings)


def finish(summary: dict, output: str, names: list[str], audit_path: str | None, settings) -> None:
    """Write the audit, and print the summary."""
    if audit_path:
        measured = audit.measure((row for _, row in readers.read_jsonl(output)), names)
        summary["audit"] = audit.write(audit_path, measured, title=", ".join(names))
    summary = summary if settings.as_json else tables.show_rates(summary)
    train = f"reward_model.py --input {shlex.quote(output)} --model SFT_MODEL --output REWARD_MODEL"
    merge = shlex.join(["merge.py", *text.MERGE])
    cli.finish(summary, as_json=settings.as_json, next_command=f"python scripts/{merge if settings.shard else train}")


def take_verdicts(inputs, files, columns, output: str, combine: str, audit_path: str | None, settings, options) -> None:
    """judge.py --verdicts: combine the verdicts and print the summary; one process does it."""
    parameters = {option.name for option in click.get_current_context().command.params}
    used = verdicts.USED | WITHOUT_JUDGE - {"prefer_input"}
    cli.refuse_options(parameters - used, "--verdicts asks no judge")
    limits = judges.read_limits(options["clamp"], (0.0, 1.0))
    labels = verdicts.Verdicts(inputs, files, columns, options["against"], options["pairs_per_prompt"], settings)
    audit.check_path(audit_path, [*inputs, *files, output])
    claim = labels.claim(output, combine, limits, settings.overwrite)
    summary = {"command": "judge", "output": output}
    if not processes.Team().first:
        return
    if settings.dry_run:
        cli.finish({**summary, **labels.plan}, as_json=settings.as_json)
        return
    findings = labels.write(claim, combine, limits)
    finish({**summary, "findings": findings, **claim.counts}, output, labels.names, audit_path, settings)


def qualify(task: judges.Task, loads: dict, servers: dict, settings) -> None:
    """Measure each judge on pairs whose better side is known, with the templates of this task."""
    question, dtype = task.question, settings.loading["dtype"]
    asked = qualification.Task(
        "judge",
        template=question.template,
        answer_template=question.written,
        reasoning=question.reasoning,
        sampling=settings.sampling,
    )
    for name, load in loads.items():
        qualification.report(name, asked, load, endpoints=servers[name], dtype=dtype)


def prefer(inputs, output: str, against: str | None, most: int | None, settings) -> None:
    """judge.py --prefer-input: write the pairs and print the summary; one process does it."""
    parameters = {option.name for option in click.get_current_context().command.params}
    cli.refuse_options(parameters - WITHOUT_JUDGE, "--prefer-input asks no judge")
    if against is None:
        raise click.UsageError("--prefer-input needs --against, the responses that are not preferred.")
    comparisons, digests = pairs.read_comparisons(
        inputs, against, most, settings.seed, settings.limit, settings.reading, unflagged=True
    )
    if not processes.Team().first:
        return
    claim = Output(
        output,
        command="judge",
        fingerprint={
            **digests,
            "preferred": "input",
            "pairs_per_prompt": most,
            "seed": settings.seed,
            "limit": settings.limit,
        },
        overwrite=settings.overwrite,
        inputs=[*inputs, against],
    )
    summary = {"command": "judge", "output": output}
    if settings.dry_run:
        cli.finish({**summary, **contrast.count_pairs(comparisons)}, as_json=settings.as_json)
        return
    contrast.prefer_input(claim, comparisons)
    next_command = f"python scripts/dpo.py --input {shlex.quote(output)} --model MODEL --output POLICY"
    cli.finish({**summary, **claim.counts}, as_json=settings.as_json, next_command=next_command)


if __name__ == "__main__":
    main()
