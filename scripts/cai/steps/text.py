"""The loop of the commands that write text: ask the model about the rows that are left, and write each answer.

    run(Step("critique", model, source, source.ids, render, answer), settings, ...)   # see scripts/critique.py

generate.py, critique.py and revise.py differ only in what they ask and where the answer goes; the rest of their
contract (resume, counts, exit codes, `--dry-run`) is here. Leaves out judging (judges.py).
"""

import shlex
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import click

from cai.base import cli, engine_options, hashing, requests, run_settings
from cai.base.errors import InputError
from cai.data import outputs, processes, readers, shards
from cai.data.reading import Reading, reading_options
from cai.models import estimate, loading
from cai.models.engine import Engine, Generation, Message, RowRequest, Sampling
from cai.steps import gating
from cai.steps.duplicates import Duplicates
from cai.steps.examples import Examples
from cai.steps.sharing import finish_output, share_progress, share_work

# Answers that wait to be written before the model waits for the file.
WAITING = 1000


@dataclass(frozen=True)
class Settings:
    """What the options of `options` say.

    endpoints, loading: arguments of `load_engine`. plan: arguments of `text_plan`. reading: how rows are read.
    """

    sampling: Sampling
    endpoints: tuple[str, ...]
    loading: dict[str, Any]
    plan: dict[str, Any]
    seed: int
    limit: int | None
    as_json: bool
    dry_run: bool
    overwrite: bool
    reading: Reading
    shard: shards.Shard | None


def options(function):
    """Decorator: adds the options that all commands with an engine share, and passes them on as `settings`.

    They are attributes: sampling; endpoints and loading, the arguments of `load_engine`; plan, those of `text_plan`;
    seed, limit, as_json, dry_run, overwrite, reading, shard.
    """

    @wraps(function)
    def command(**values):
        def take(*names: str) -> dict[str, Any]:
            return {name: values.pop(name) for name in names}

        estimate.refuse_without_dry_run(values["dry_run"])
        sampling = Sampling(**take("max_new_tokens", "temperature", "top_p"))
        loading = take("batch_size", "batch_tokens", "device", "dtype")
        plan = {**take("like", "gpu", "price"), **loading}
        others = take("endpoints", "seed", "limit", "as_json", "dry_run", "overwrite", "reading", "shard")
        return function(settings=Settings(sampling=sampling, loading=loading, plan=plan, **others), **values)

    for option in (
        reading_options,
        shards.shard_option,
        cli.options("device", "dtype", "events", "json", "dry_run", "overwrite"),
        estimate.plan_options,
        click.option(
            "--batch-tokens",
            type=click.IntRange(min=1),
            default=None,
            help="Most tokens in one batch, prompts and answers together.  [default: what memory allows]",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=None,
            help="Most rows in one forward pass.  [default: 128]",
        ),
        cli.options("endpoint", "engine", "reasoning_tags", "temperature", "top_p", "max_new_tokens", "seed", "limit"),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Step:
    """What one of the commands does to its rows.

    rows: with their ids in the output; iterable again and again. ids: the same ids, in the order of the output.
    render: the conversation for a row. answer: the row with the model's answer in it.
    check: called with the engine before anything is written; raises what must not begin.
    prepare: called in every process with the team and the engine before rows are rendered.
    settle: the finished row of one that needs no answer, else None. After `prepare`.
    plan: further entries of what `--dry-run` reports.
    examples: those that `render` adds, whose number is counted.
    info: further entries of the manifest.
    written, flag_duplicate: arguments of `Duplicates`.
    """

    command: str
    model: str
    rows: Iterable[dict]
    ids: list[str]
    render: Callable[[dict], list[Message]]
    answer: Callable[[dict, Generation], dict]
    check: Callable[[Engine], None] = lambda _: None
    prepare: Callable[[processes.Team, Engine], None] = lambda _team, _engine: None
    settle: Callable[[dict], dict | None] = lambda _: None
    plan: Callable[[], dict] = dict
    examples: Examples | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    written: Callable[[dict], str | None] = lambda _: None
    flag_duplicate: Callable[[dict], dict] | None = None


def run(
    step: Step,
    settings: SimpleNamespace,
    *,
    inputs: tuple[str, ...],
    output: str,
    fingerprint: dict,
    tally: Callable[[Iterable[dict]], dict],
    next_command: list[str],
    alternative: list[str] | None = None,
    gate: gating.Gate | None = None,
) -> None:
    """Ask the model about every row that the output does not have yet, write the answers, print the summary.

    Under `accelerate launch` each process answers its share, and the first writes the output (data/processes.py). A
    row whose conversation does not fit the model's context, or that a server would not answer, is left out and counted
    as failed (exit 3).

    Args:
        fingerprint: what decides the rows beside model, sampling, seed and limit.
        tally: counts over the finished rows, for the summary and the manifest.
        next_command, alternative: a command's name and its arguments.
        gate: judges the answers, which are then written to a file of their own first.
    """
    loading.check_model(step.model)
    team = processes.Team()
    fingerprint = {
        "model": step.model,
        "weights": hashing.identity(step.model),
        **fingerprint,
        **asdict(settings.sampling),
        "seed": settings.seed,
        "limit": settings.limit,
        "dtype": settings.loading["dtype"],
        **shards.fingerprint(settings.shard),
    }
    claim = {"command": step.command, "fingerprint": fingerprint, "overwrite": settings.overwrite, "inputs": inputs}
    final = answers = None
    if team.first:
        gated = {} if gate is None else gate.fingerprint
        final = outputs.Output(output, **{**claim, "fingerprint": fingerprint | gated})
        answers = final if gate is None else gating.claim_ungated(output, claim)
    summary = {"command": step.command, "output": output}
    if settings.dry_run:
        if final:
            cli.finish({**summary, **_plan(step, settings, answers, gate)}, as_json=settings.as_json)
        return
    if team.tell(final.complete if final else None):
        if team.first:
            cli.note(f"{output} is done already; --overwrite makes it again")
    else:
        _write_answers(step, settings, team, answers, tally)
        if gate:
            revisions = gating.ungated_path(output)
            gating.gate_output(gate, team, final, revisions, step.ids, settings.loading, step.info)
    if team.first:
        summary |= {"failed_rows": f"{final.manifest_path}"} if final.counts.get("failed") else {}
        following = [["merge", *MERGE], None] if settings.shard else [next_command, alternative]
        lines = dict(zip(("next_command", "alternative"), map(_command_line, following), strict=True))
        cli.finish({**summary, **final.counts}, as_json=settings.as_json, **lines)


def _command_line(words: list[str] | None) -> str | None:
    return shlex.join(["python", f"scripts/{words[0]}.py", *words[1:]]) if words else None


# The arguments of merge.py in the line to run next after a shard.
MERGE = ("--input", "SHARDS", "--output", "MERGED")

# The settings of a run that its next text step takes over from this command line.
_SHARED = ("endpoints", "max_new_tokens", "seed", "batch_size", "batch_tokens", "device", "dtype")


# What critique.py and revise.py share besides.
OF_A_ROUND = ("constitution", "temperature", "top_p", "most_examples", "stops")


def next_step(
    command: str, output: str, model: str, result: str, *names: str, options: Sequence[str] = ()
) -> list[str]:
    """The arguments of `run` that name another text step, with this command's settings where they were given.

    Args:
        result: a word for its output. names: further options to take over, by parameter name.
        options: further words.
    """
    key_name = ["--key-name", cli.key_name()] if cli.key_name() != "OPENAI_API_KEY" else []
    of_runs = [*requests.command_options(), *run_settings.command_options()]
    given = [*options, *cli.given_options(*names, *_SHARED), *key_name, *engine_options.command_options(), *of_runs]
    return [command, "--input", output, "--model", model, *given, "--output", result]


def round_options(inputs: Sequence[str]) -> list[str]:
    """The options that the last step of this kind had alone, as its manifest keeps them: critique.py's where the inputs
    are critiques, revise.py's where they are revisions."""
    with suppress(InputError):  # a damaged manifest is no reason not to read the rows
        options = (outputs.read_manifest(inputs[0]) or {}).get("round_options")
        if isinstance(options, list) and all(isinstance(word, str) for word in options):
            return options
    return []


def _write_answers(
    step: Step,
    settings: SimpleNamespace,
    team: processes.Team,
    journal: outputs.Output | None,
    tally: Callable[[Iterable[dict]], dict],
) -> None:
    """Fill the output, which only process 0 has, and finish it."""

    def load() -> Engine:
        engine = loading.load_engine(step.model, endpoints=settings.endpoints, **settings.loading)
        step.check(engine)
        loading.check_sampling(engine, settings.sampling.temperature)
        return engine

    with share_work(team, journal, load, partial(_answer_rows, step, settings)) as (engine, results):
        if journal is None or results is None:
            return
        failed, tokens = {}, Counter()
        for share_failed, share_tokens, _ in results:
            failed |= share_failed
            tokens.update(share_tokens)
        rows = Duplicates(readers.JsonlRows(journal.journal), step.written, step.flag_duplicate)
        repeated, info = rows.report()
        counts = {"rows": len(step.ids) - len(failed), "failed": len(failed), **tally(rows), **repeated}
        counts |= step.examples.count_shown(shown for *_, shown in results) if step.examples else {}
        amend = rows.amend if repeated else None
        finish_output(journal, step.ids, counts, failed, engine, amend=amend, tokens=dict(tokens), **step.info, **info)


def _plan(step: Step, settings: SimpleNamespace, journal: outputs.Output, gate: gating.Gate | None) -> dict:
    """What `--dry-run` reports."""
    rows = () if journal.complete else (row for row in step.rows if row["id"] not in journal.done)
    rows = (row for row in rows if step.settle(row) is None)
    judged = (row for row in step.rows if step.settle(row) is None)
    return {
        "rows": len(step.ids),
        "done": len(step.ids) if journal.complete else len(journal.done),
        **({} if journal.complete else step.plan()),
        **({"gate_calls_at_most": gate.count_calls(judged)} if gate else {}),
        **estimate.text_plan(map(step.render, rows), step.model, settings.sampling, **settings.plan),
    }


def _answer_rows(
    step: Step, settings: SimpleNamespace, team: processes.Team, journal, engine: Engine
) -> tuple[dict[str, str], Counter, Counter]:
    """Answer the rows of this process that are left.

    Returns ({row id: why it failed}, token counts, how often how many examples were shown).
    """
    failed, tokens = {}, Counter(rows=0, prompt=0, new=0, unfinished=0)
    done, sampling = frozenset(journal.done), settings.sampling
    seed = partial(hashing.hashed_seed, step.command, settings.seed)
    step.prepare(team, engine)
    requests = (
        RowRequest(row["id"], step.render(row), seed(row["id"], len(row.get("rounds") or ())), row=row)
        for row in team.share(step.rows)
        if step.settle(row) is None
    )

    def write(row: dict, generation: Generation) -> None:
        journal.write(step.answer(row, generation))

    with share_progress(team, len(step.ids), len(done), step.command) as bar, ThreadPoolExecutor(1) as writer:
        for row in team.share(step.rows):
            if row["id"] not in done and (settled := step.settle(row)) is not None:
                journal.write(settled)
                bar.update(1)
        waiting = deque()
        for request, generation in engine.generate(requests, sampling, done):
            bar.update(1)
            if generation.lost:
                failed[request.key] = generation.reason or (
                    f"its {generation.prompt_tokens} tokens and {sampling.max_new_tokens} new ones exceed the model's "
                    f"context of {engine.context}"
                )
                continue
            waiting.append(writer.submit(write, request.row, generation))
            while waiting and (waiting[0].done() or len(waiting) > WAITING):
                waiting.popleft().result()  # raises what writing raised
            tokens.update(
                rows=1, prompt=generation.prompt_tokens, new=generation.tokens, unfinished=generation.finish == "length"
            )
        for write_result in waiting:
            write_result.result()
    return failed, tokens, step.examples.shown if step.examples else Counter()
