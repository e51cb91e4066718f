"""The loop of the commands that write text: pick the rows that are left, ask the model, write each answer.

    run("critique", source.rows, render=..., answer=..., ...)   # see scripts/critique.py

generate.py, critique.py and revise.py differ only in what they ask and where the answer goes; the rest of
their contract (resume, counts, exit codes, `--dry-run`) is here. Leaves out judging, which reads
log-probabilities and writes no text.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from cai import cli
from cai.engines import WINDOW, Generation, Sampling, check_model, load_engine
from cai.records import Output, hashed_seed, identity, read_jsonl
from cai.resources import model_path

OPTIONS = ("temperature", "top_p", "max_new_tokens", "seed", "limit", "batch_size", "device", "dtype",
           "json", "dry_run", "overwrite")


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
    model: str, temperature: float, top_p: float, max_new_tokens: int, seed: int, limit: int | None,
    batch_size: int, device: str | None, dtype: str, as_json: bool, dry_run: bool, overwrite: bool,
) -> None:
    """Ask the model about every row that the output does not have yet, write the answers, print the summary.

    Args:
        rows: with their ids in the output; iterable again and again.
        ids: those ids, in the order of the output.
        render: the conversation for a row.
        answer: the row with the model's answer in it.
        fingerprint: what decides the rows beside model, sampling, seed and limit.
        next_command: a command's name and its arguments.
        tally: counts over the finished rows, for the summary and the manifest.

    A row whose conversation does not fit the model's context is left out and counted as failed (exit 3).
    """
    check_model(model)
    sampling = Sampling(max_new_tokens, temperature, top_p)
    fingerprint = {"model": model, "weights": identity(model), **fingerprint, **asdict(sampling),
                   "seed": seed, "limit": limit, "dtype": dtype}
    journal = Output(output, command=command, fingerprint=fingerprint, overwrite=overwrite, inputs=inputs)
    summary = {"command": command, "output": output}
    if dry_run:
        plan = estimate((row for row in rows if row["id"] not in journal.done), render, max_new_tokens, model)
        plan = {"rows": len(ids), "done": len(ids) if journal.complete else len(journal.done), **plan}
        cli.finish({**summary, **plan}, as_json=as_json)
        return
    engine = None
    if not journal.complete:  # before anything is written: a model that can't be loaded leaves no trace
        engine = load_engine(model, batch_size=batch_size, device=device, dtype=dtype)
    with journal:
        if journal.complete:
            cli.note(f"{output} is done already; --overwrite makes it anew")
        else:
            failed, tokens = _fill(journal, rows, len(ids), render, answer, engine, sampling, command, seed)
            counts = {"rows": len(ids) - len(failed), "failed": len(failed),
                      **tally(row for _, row in read_jsonl(journal.journal))}
            journal.finish(ids, counts, tokens=tokens, failed_rows=failed)
            for row_id, reason in islice(failed.items(), 5):
                cli.warn(f"row {row_id}: {reason}")
    if journal.counts["failed"]:
        summary["failed_rows"] = f"{journal.manifest_path}"
    cli.finish({**summary, **journal.counts}, as_json=as_json,
               next_command=shlex.join(["python", f"scripts/{next_command[0]}.py", *next_command[1:]]))


def _fill(journal, rows, total, render, answer, engine, sampling, command, seed) -> tuple[dict, dict]:
    """Answer the rows that are left. Returns ({id: why it failed}, token counts of this process)."""
    failed, tokens = {}, {"rows": 0, "prompt": 0, "new": 0, "unfinished": 0}
    rows, size = iter(rows), WINDOW * engine.batch_size
    with cli.progress(total, command) as bar:
        bar.update(len(journal.done))
        # As many as the engine sorts by length together: memory does not grow with the number of rows.
        while window := list(islice(rows, size)):
            done = {index for index, row in enumerate(window) if row["id"] in journal.done}
            if len(done) == len(window):
                continue
            seeds = [hashed_seed(command, seed, row["id"], len(row.get("rounds") or ())) for row in window]
            conversations = [render(row) for row in window]
            for index, made in engine.generate(conversations, sampling, seeds, done):
                row = window[index]
                if index in done:
                    continue
                if made.finish == "too_long":
                    failed[row["id"]] = (f"its {made.prompt_tokens} tokens and {sampling.max_new_tokens} new "
                                         f"ones exceed the model's context of {engine.context}")
                else:
                    journal.write(answer(row, made))
                    tokens["rows"] += 1
                    tokens["prompt"] += made.prompt_tokens
                    tokens["new"] += made.tokens
                    tokens["unfinished"] += made.finish == "length"
                bar.update(1)
    return failed, tokens


def estimate(
    rows: Iterable[dict], render: Callable[[dict], list[dict]], max_new_tokens: int, model: str
) -> dict:
    """What the rows will ask of the model, without loading it: four characters are taken for a token."""
    calls = characters = 0
    for row in rows:
        calls += 1
        characters += sum(len(message["content"]) for message in render(row))
    sizes = [path.stat().st_size for path in Path(model_path(model)).glob("*.safetensors")]
    return {
        "model_calls": calls,
        "prompt_tokens_about": characters // 4,
        "new_tokens_at_most": calls * max_new_tokens,
        "weights_on_disk_mb": round(sum(sizes) / 1e6, 1) if sizes else "unknown",
    }
