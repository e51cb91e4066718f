"""The subcommands of constitution.py that ask a model.

    main.add_command(coverage)     # scripts/constitution.py adds each of COMMANDS

Leaves out what needs no model (lint, show, new, import, export, schema): scripts/constitution.py.
"""

import json
import shlex
from pathlib import Path

import click

from cai.authoring import derivation, inference, proposals, validation
from cai.base import cli, requests
from cai.base.errors import InputError
from cai.constitution import rendering
from cai.data import outputs, readers, reading
from cai.data.kinds import KINDS
from cai.evaluate import ablation, measurement
from cai.evaluate import coverage as coverage_of

TRIES = click.option(
    "--tries",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How often a question is asked until its answer can be used.",
)

THRESHOLD = click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="A principle applies to a prompt at this probability or above.",
)


def _beside(output: str, ending: str) -> str:
    """The file of rows beside an output: `<output>.<ending>.jsonl`, without the output's suffix."""
    return f"{Path(output).with_suffix('')}.{ending}.jsonl"


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "endpoint", "engine", "constitution")
@THRESHOLD
@cli.options("limit", "batch_size", "device", "dtype", "events", "json", "dry_run", "overwrite")
@reading.reading_options
def coverage(output, as_json, dry_run, overwrite, **values):
    """Find the prompts that no principle applies to, by a judge model.

    Each prompt is asked about with each principle, in both orders. OUTPUT has `covered` and the probabilities. Nonsense
    is asked about first: a prompt about which the judge is no surer than about nonsense is `unsure`. These answers are
    in OUTPUT.nonsense.jsonl, without OUTPUT's suffix.

    \b
    Example:
      python scripts/constitution.py coverage --input prompts.jsonl --model tiny \\
          --constitution harmlessness --output coverage.jsonl
    """
    questions = coverage_of.Coverage(measurement.gather(values))

    def claim(path: str, settings: dict) -> outputs.Output:
        inputs = values["inputs"]
        return outputs.Output(path, command="coverage", fingerprint=settings, overwrite=overwrite, inputs=inputs)

    journal = claim(output, questions.settings_of_rows)
    nonsense = claim(_beside(output, "nonsense"), questions.settings)
    if not dry_run:
        questions.write(journal, nonsense)
    counts = questions.count(journal, nonsense) if dry_run else journal.counts | _sum_requests([journal, nonsense])
    cli.finish({"command": "coverage", "output": output, **counts}, as_json=as_json)


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "endpoint", "engine", "constitution", "principle")
@click.option(
    "--by",
    type=click.Choice(["oracle", "judge"]),
    default="judge",
    show_default=True,
    help="Who reads the responses: the rules of the bundled world, or a judge model.",
)
@click.option("--judge", metavar="MODEL", help="The judge model: a folder, a hub id, or `tiny`.")
@cli.options("examples", "reasoning_tags", "temperature", "top_p", "max_new_tokens", "seed", "limit")
@cli.options("batch_size", "device", "dtype", "events", "json", "dry_run", "overwrite")
def ablate(output, as_json, dry_run, overwrite, **values):
    """Leave one principle out at a time, and show what changes in the figures of the revisions.

    Reads rows of revise.py, made with this model, constitution and sampling. The rows that drew a principle are
    revised and measured again without it. The constitutions without it lie beside OUTPUT, for `run.py` to use.

    \b
    Example:
      python scripts/constitution.py ablate --input revisions.jsonl --model tiny \\
          --constitution harmlessness --by oracle --output ablation.jsonl
    """
    without = ablation.measure_without_each(measurement.gather(values), Path(output).with_suffix(""))
    final = outputs.Output(
        output, command="ablate", fingerprint=without.settings, overwrite=overwrite, inputs=without.files
    )
    summary = {"command": "ablate", "output": output}
    if dry_run:
        return cli.finish({**summary, **without.plan}, as_json=as_json)
    measurement.write(without, final)
    rows = [row for _, row in readers.read_jsonl(output)]
    if not as_json:
        click.echo(ablation.differences_as_text(rows))
    summary |= {"rows": without.plan["rows"], "redone": without.plan["redone"], **final.counts}
    cli.finish({**summary, "principles": rows} if as_json else summary, as_json=as_json)


@click.command(cls=cli.Command)
@cli.options("constitution", "output", "model", "endpoint", "engine", "principle")
@TRIES
@cli.options("reasoning_tags", "temperature", "top_p", "max_new_tokens", "seed")
@cli.options("batch_size", "device", "dtype", "events", "json", "dry_run", "overwrite")
def derive(output, as_json, dry_run, overwrite, **values):
    """Let a model phrase critique, revision and preference for principles that are plain sentences.

    Each answer is checked: its form, the lint, and that it asks for what the sentence asks for. A principle without a
    usable answer keeps the requests phrased from its sentence, with the tag `underived` (exit 3). The answers are in
    OUTPUT.answers.jsonl, without OUTPUT's suffix; the same command continues there.

    \b
    Example:
      python scripts/constitution.py derive --constitution kitchen.yaml --model my-org/my-model --output derived.yaml
    """
    task = derivation.Derivation(measurement.gather(values))
    journal = outputs.Output(
        _beside(output, "answers"),
        command="derive",
        fingerprint=task.settings,
        overwrite=overwrite,
        inputs=[task.constitution.path],
    )
    if Path(output).resolve() == Path(task.constitution.path).resolve():
        raise InputError("the output is the constitution that is read", where=output, remedy="Name another output")
    summary = {"command": "derive", "output": output}
    if dry_run:
        return cli.finish({**summary, **task.plan(journal)}, as_json=as_json)
    if not journal.complete:
        rendering.check_free(output, overwrite)
    constitution = task.compose(task.write(journal))
    rendering.save_unless_same(output, constitution, overwrite)
    cli.finish({**summary, "principles": len(constitution.principles), **journal.counts}, as_json=as_json)


@click.command(cls=cli.Command)
@cli.options("constitution", "model", "endpoint", "engine", "principle")
@click.option("--kind", multiple=True, type=click.Choice(KINDS), help="Kind of prompt; repeatable.  [default: all]")
@click.option(
    "-n", "count", type=click.IntRange(1, 1000), default=10, show_default=True, help="Prompts per principle and kind."
)
@click.option(
    "--heldout-share",
    type=click.FloatRange(0, 1),
    default=0.2,
    show_default=True,
    help="Share of the prompts, of each principle and kind, that goes to --heldout.",
)
@click.option("--heldout", metavar="PATH", help="Where the held-out prompts go.  [default: OUTPUT.heldout.jsonl]")
@click.option("--check", metavar="MODEL", help="A judge that confirms each prompt's kind; may be openai:NAME@URL.")
@TRIES
@cli.options("output", "reasoning_tags", "temperature", "top_p", "max_new_tokens", "seed")
@cli.options("batch_size", "device", "dtype", "events", "json", "dry_run", "overwrite")
def prompts(output, heldout, as_json, dry_run, overwrite, **values):
    """Let a model write prompts for each principle: harmful, borderline and benign, with a share held out.

    Near-duplicates are left out over all kinds, so that no held-out prompt resembles one of OUTPUT, and asked for
    again up to --tries times. Exits with 3 if prompts are missing. The answers are in OUTPUT.answers.jsonl, without
    OUTPUT's suffix; the same command continues there.

    \b
    Example:
      python scripts/constitution.py prompts --constitution harmlessness --model my-org/my-model -n 20 \\
          --output train.jsonl --heldout heldout.jsonl
    """
    task = proposals.Proposals(measurement.gather(values))

    def claim(path: str, settings: dict) -> outputs.Output:
        inputs = [task.constitution.path]
        return outputs.Output(path, command="prompts", fingerprint=settings, overwrite=overwrite, inputs=inputs)

    paths = (output, heldout or _beside(output, "heldout"))
    if len({Path(path).resolve() for path in paths}) == 1:
        raise InputError("the same file as --output", where="--heldout", remedy="Name two files")
    train, held_out = (claim(path, task.settings) for path in paths)
    summary = {"command": "prompts", "output": output, "heldout": paths[1]}
    if dry_run:
        return cli.finish({**summary, **task.plan()}, as_json=as_json)
    if not (train.complete and held_out.complete):
        claim_beside, claimed = measurement.collect(lambda ending, settings: claim(_beside(output, ending), settings))
        rows, counts = task.write(claim_beside)
        counts = {"prompts": len(rows), **task.count(rows), **counts, **_sum_requests(claimed)}
        for final, name in zip((train, held_out), proposals.SPLITS, strict=True):
            _write_rows(final, [row for row in rows if row["split"] == name], counts)
    model = "MODEL" if values["model"].startswith("openai:") else values["model"]  # run.py trains it
    command = f"python scripts/run.py --model {shlex.quote(model)} --constitution "
    command += shlex.join([values["constitution"], "--input", output, "--heldout", paths[1], "--output", "runs/new"])
    cli.finish({**summary, **train.counts}, as_json=as_json, next_command=command)


def _sum_requests(claimed: list[outputs.Output]) -> dict:
    return requests.sum_counts(output.counts for output in claimed)


def _write_rows(output: outputs.Output, rows: list[dict], counts: dict) -> None:
    with output:
        if not output.complete:
            for row in rows:
                if row["id"] not in output.done:
                    output.write(row)
            output.finish([row["id"] for row in rows], counts)


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "endpoint", "engine")
@click.option("--judge", metavar="MODEL", help="The model that predicts held-out pairs.  [default: --model]")
@click.option("--candidates", metavar="NAME|FILE", help="A constitution whose principles are scored too.")
@click.option(
    "--propose",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Pairs about which the model is asked why one response is better; 0: score --candidates only, on all pairs.",
)
@click.option(
    "--clusters", type=click.IntRange(min=1), default=20, show_default=True, help="Proposals to score, at most."
)
@click.option("--best", type=click.IntRange(min=1), default=5, show_default=True, help="Principles in OUTPUT, at most.")
@click.option(
    "--heldout-share",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of the prompts whose pairs are predicted, and never shown to the model that proposes.",
)
@TRIES
@cli.options("reasoning_tags", "temperature", "top_p", "max_new_tokens", "seed", "limit")
@cli.options("batch_size", "device", "dtype", "events", "json", "dry_run", "overwrite")
@reading.reading_options
def infer(output, as_json, dry_run, overwrite, **values):
    """Find principles behind preferences: candidates, and how many held-out pairs each predicts.

    Reads pairs: chosen and rejected, or response_a, response_b and gold. OUTPUT is a constitution of the candidates
    that predict more than the longer response, the shorter, either position, and a placebo; without any it is not
    written (exit 3). All figures are in OUTPUT.scores.jsonl, without OUTPUT's suffix.

    \b
    Example:
      python scripts/constitution.py infer --input preferences.jsonl --model my-org/my-model --output inferred.yaml
    """
    task = inference.Inference(measurement.gather(values))

    def claim(ending: str, settings: dict) -> outputs.Output:
        path, inputs = _beside(output, ending), values["inputs"]
        return outputs.Output(path, command="infer", fingerprint=settings, overwrite=overwrite, inputs=inputs)

    scores = claim("scores", task.settings)
    summary = {"command": "infer", "output": output, "scores": str(scores.path)}
    if dry_run:
        return cli.finish({**summary, **task.plan()}, as_json=as_json)
    if not scores.complete:
        rendering.check_free(output, overwrite)
    claim_beside, claimed = measurement.collect(claim)
    rows, counts, constitution = task.write(claim_beside)
    counts |= _sum_requests(claimed)
    _write_rows(scores, rows, counts)
    if constitution.principles:
        rendering.save_unless_same(output, constitution, overwrite)
    else:
        cli.warn(f"no candidate predicts more than every baseline: {output} is not written")
    if not as_json:
        click.echo(inference.as_text(rows))
    cli.finish({**summary, "principles": len(constitution.principles), **counts}, as_json=as_json)
    if not constitution.principles:
        click.get_current_context().exit(cli.SOME_FAILED)


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "endpoint", "engine", "constitution")
@click.option("--judge", metavar="MODEL", help="The model that judges coverage and revisions.  [default: --model]")
@click.option(
    "-n", "count", type=click.IntRange(min=1), default=10, show_default=True, help="Prompts to try per principle."
)
@THRESHOLD
@cli.options("reasoning_tags", "temperature", "top_p", "max_new_tokens", "seed", "limit")
@cli.options("batch_size", "device", "dtype", "events", "json", "dry_run", "overwrite")
@reading.reading_options
def validate(output, as_json, dry_run, overwrite, **values):
    """Show whether a constitution does anything: lint, coverage, and a comparison with a placebo.

    Each principle is tried on -n prompts: a response is revised under it and under a placebo, requests of the same
    length about lavender and geese, and the judge compares both revisions. OUTPUT is the report as JSON; the stages are
    are in files beside it, and the same command continues there. Exits with 3 if no principle can be distinguished from
    the placebo.

    \b
    Example:
      python scripts/constitution.py validate --input prompts.jsonl --model my-org/my-model \\
          --constitution kitchen.yaml --output validation.json
    """
    task = validation.Validation(measurement.gather(values))

    def claim(ending: str, settings: dict) -> outputs.Output:
        path, inputs = _beside(output, ending), values["inputs"]
        return outputs.Output(path, command="validate", fingerprint=settings, overwrite=overwrite, inputs=inputs)

    summary = {"command": "validate", "output": output}
    if dry_run:
        return cli.finish({**summary, **task.plan()}, as_json=as_json)
    judgements = claim("judged", task.judging)
    if not judgements.complete:
        rendering.check_free(output, overwrite)
    claim_beside, claimed = measurement.collect(claim)
    report = task.write(claim_beside, judgements)
    report |= _sum_requests([*claimed, judgements])
    rendering.save(output, json.dumps(report, ensure_ascii=False, indent=1) + "\n", overwrite=True)
    if not as_json:
        click.echo(validation.as_text(report))
    shown = ("verdict", "placebo", "weakest", "failed", *(["requests"] if "requests" in report else []))
    cli.finish({**summary, **(report if as_json else {name: report[name] for name in shown})}, as_json=as_json)
    if report["verdict"] == validation.NOT_TOLD:
        click.get_current_context().exit(cli.SOME_FAILED)


COMMANDS = (coverage, ablate, validate, derive, prompts, infer)
