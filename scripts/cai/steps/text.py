"""The loop of the commands that write text: pick the rows that are left, ask the model, write each answer.

    run("critique", source.rows, render=..., answer=..., ...)   # see scripts/critique.py

generate.py, critique.py and revise.py differ only in what they ask and where the answer goes; the rest of
their contract (resume, counts, exit codes, `--dry-run`) is here. Leaves out judging, which reads
log-probabilities and writes no text.
"""

import shlex
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice

import click

from cai.base import cli
from cai.base.hashing import hashed_seed, identity
from cai.data.outputs import Output
from cai.data.processes import Team
from cai.data.readers import read_jsonl
from cai.models.engine import Generation, RowRequest, Sampling
from cai.models.estimate import plan_options, text_plan
from cai.models.loading import check_model, load_engine
from cai.models.local import fast_path

OPTIONS = (
    "temperature",
    "top_p",
    "max_new_tokens",
    "seed",
    "limit",
    "batch_size",
    "device",
    "dtype",
    "json",
    "dry_run",
    "overwrite",
)

# Rows that wait to be written before the model waits for the file.
WAITING = 1000


def options(function):
    """Decorator: all the options that `run` takes, but for input, output and model."""
    for option in reversed(
        (
            cli.options("endpoint", *OPTIONS[: OPTIONS.index("batch_size")]),
            click.option(
                "--batch-size",
                type=click.IntRange(min=1),
                default=None,
                help="Most rows in one forward pass.  [default: 128]",
            ),
            click.option(
                "--batch-tokens",
                type=click.IntRange(min=1),
                default=None,
                help="Most tokens in one batch, prompts and answers.  [default: what the memory holds]",
            ),
            plan_options,
            cli.options(*OPTIONS[OPTIONS.index("device") :]),
        )
    ):
        function = option(function)
    return function


def run(
    command: str,
    rows: Iterable[dict],
    ids: list[str],
    render: Callable[[dict], list[dict]],
    answer: Callable[[dict, Generation], dict],
    *,
    inputs: Iterable[str],
    output: str,
    fingerprint: dict,
    next_command: list[str],
    tally: Callable[[Iterator[dict]], dict] = lambda rows: {},
    model: str,
    endpoints: tuple[str, ...],
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    limit: int | None,
    batch_size: int | None,
    batch_tokens: int | None,
    device: str | None,
    dtype: str,
    like: str | None,
    gpu: str | None,
    price: tuple[float, float] | None,
    as_json: bool,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Ask the model about every row that the output does not have yet, write the answers, print the summary.

    Under `accelerate launch` each process answers its share, and the first writes the output (cai/data/processes.py).

    Args:
        rows: with their ids in the output; iterable again and again.
        ids: those ids, in the order of the output.
        render: the conversation for a row.
        answer: the row with the model's answer in it.
        fingerprint: what decides the rows beside model, sampling, seed and limit.
        next_command: a command's name and its arguments.
        tally: counts over the finished rows, for the summary and the manifest.

    A row whose conversation does not fit the model's context, or that no server would answer, is left out and
    counted as failed (exit 3).
    """
    check_model(model)
    team = Team()
    sampling = Sampling(max_new_tokens, temperature, top_p)
    fingerprint = {
        "model": model,
        "weights": identity(model),
        **fingerprint,
        **asdict(sampling),
        "seed": seed,
        "limit": limit,
        "dtype": dtype,
    }
    summary = {"command": command, "output": output}
    loading = {
        "endpoints": endpoints,
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "device": device,
        "dtype": dtype,
    }
    if not team.first:
        if not dry_run:
            _help(team, rows, len(ids), render, answer, loading, sampling, command, seed, model)
        return
    journal = Output(output, command=command, fingerprint=fingerprint, overwrite=overwrite, inputs=inputs)
    if dry_run:
        plan = text_plan(
            (render(row) for row in rows if row["id"] not in journal.done and not journal.complete),
            model,
            sampling,
            like=like,
            gpu=gpu,
            price=price,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            dtype=dtype,
            device=device,
        )
        done = len(ids) if journal.complete else len(journal.done)
        cli.finish({**summary, "rows": len(ids), "done": done, **plan}, as_json=as_json)
        return
    engine = None
    if not journal.complete:  # before anything is written: a model that can't be loaded leaves no trace
        engine = load_engine(model, **loading)
    with journal:
        if team.begin(journal) is None:
            cli.note(f"{output} is done already; --overwrite makes it anew")
        else:
            found = _fill(journal, team, rows, len(ids), render, answer, engine, sampling, command, seed)
            failed, tokens = {}, Counter()
            for one_failed, one_tokens in team.gather(journal, found):
                failed |= one_failed
                tokens.update(one_tokens)
            counts = {
                "rows": len(ids) - len(failed),
                "failed": len(failed),
                **tally(row for _, row in read_jsonl(journal.journal)),
            }
            journal.finish(ids, counts, tokens=dict(tokens), failed_rows=failed, **fast_path(engine))
            for row_id, reason in islice(failed.items(), 5):
                cli.warn(f"row {row_id}: {reason}")
    if journal.counts.get("failed"):
        summary["failed_rows"] = f"{journal.manifest_path}"
    cli.finish(
        {**summary, **journal.counts},
        as_json=as_json,
        next_command=shlex.join(["python", f"scripts/{next_command[0]}.py", *next_command[1:]]),
    )


def _help(team, rows, total, render, answer, loading, sampling, command, seed, model) -> None:
    """What a process does that is not the first: its share of the rows."""
    journal = team.begin(None)
    if journal is not None:
        engine = load_engine(model, **loading)
        found = _fill(journal, team, rows, total, render, answer, engine, sampling, command, seed)
        team.gather(journal, found)


def _fill(journal, team, rows, total, render, answer, engine, sampling, command, seed) -> tuple[dict, dict]:
    """Answer the rows of this process that are left. Returns ({id: why it failed}, token counts)."""
    failed, tokens = {}, {"rows": 0, "prompt": 0, "new": 0, "unfinished": 0}
    done = frozenset(journal.done)
    requests = (
        RowRequest(row["id"], render(row), hashed_seed(command, seed, row["id"], len(row.get("rounds") or ())), row=row)
        for row in team.share(rows)
    )

    def write(row, generation):
        journal.write(answer(row, generation))

    mine = len(range(team.rank, total, team.count))
    with cli.progress(mine, command) as bar, ThreadPoolExecutor(1) as writer:
        bar.disable = bar.disable or not team.first
        bar.update(len(done) // team.count)
        written = deque()
        for request, generation in engine.generate(requests, sampling, done):
            bar.update(1)
            if generation.lost:
                failed[request.key] = generation.reason or (
                    f"its {generation.prompt_tokens} tokens and {sampling.max_new_tokens} new ones exceed the model's "
                    f"context of {engine.context}"
                )
                continue
            written.append(writer.submit(write, request.row, generation))
            while written and (written[0].done() or len(written) > WAITING):
                written.popleft().result()  # raises what the writing has
            tokens["rows"] += 1
            tokens["prompt"] += generation.prompt_tokens
            tokens["new"] += generation.tokens
            tokens["unfinished"] += generation.finish == "length"
        for one in written:
            one.result()
    return failed, tokens


def estimate(rows: Iterable[dict], render: Callable[[dict], list[dict]], max_new_tokens: int, model: str) -> dict:
    """What the rows will ask of the model, without loading it (cai/models/estimate.py)."""
    return text_plan((render(row) for row in rows), model, Sampling(max_new_tokens))
