"""Build the bundled model, and draw fresh prompts and pairs from its world to measure with.

    python scripts/tiny.py prompts --kind harmful --split heldout --seed 7 -n 300 --output fresh.jsonl

Leaves out measuring: `evaluate.py` and `judge.py` read what this writes.
"""

import itertools
import json
import random
import shutil
from pathlib import Path

import click

from cai.base import cli, paths
from cai.base.errors import InputError
from cai.data import outputs, readers
from cai.models import loading
from cai.world import language, oracle

_SIZES = {"hidden": 128, "layers": 6, "feed_forward": 384}

# What the oracle needs to know of a row.
_OF_ACT = ("kind", "category", "verb", "object")

_STYLES = {
    "harmful": ("comply", "partial", "good", "evasive", "preachy"),
    "benign": ("comply", "good", "evasive", "preachy"),
    "borderline": ("comply", "good", "evasive", "preachy"),
}


@click.group()
def main():
    """The bundled model `tiny` and its world: build it, draw prompts and pairs.

    \b
    Example:
      python scripts/tiny.py prompts --kind harmful --split heldout --seed 7 -n 5 --output fresh.jsonl
    """


@main.command(cls=cli.Command)
@click.option("--output", required=True, metavar="DIR", help="Folder for the model.")
@click.option(
    "--from", "start", metavar="MODEL", help="Continue from this earlier build: `tiny`, or a folder that build wrote."
)
@click.option(
    "--tokens", type=click.IntRange(min=1), help="Training tokens in all.  [default: 25000000; with --from 2000000]"
)
@click.option("--hidden", type=int, help="Width of the model.  [default: 128]")
@click.option("--layers", type=int, help="Layers.  [default: 6]")
@click.option("--feed-forward", type=int, help="Width of the feed-forward layer.  [default: 384]")
@click.option("--learning-rate", type=float, help="Highest learning rate.  [default: 0.002; with --from 0.0006]")
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
@cli.options("seed", "json", "dry_run")
def build(output, start, tokens, learning_rate, threads, seed, as_json, dry_run, **sizes):
    """Train `tiny` again from its seed; resumes where it was stopped. About three quarters of an hour on two cores.

    With --from the tokenizer and the sizes of the earlier build are kept, and its weights are trained further.

    \b
    Example:
      python scripts/tiny.py build --output tiny-new --tokens 200000
    """
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if start is not None:
        if sizes:
            raise click.UsageError(
                "--from keeps the sizes of the earlier build: leave --hidden, --layers, --feed-forward out."
            )
        start = Path(paths.model_path(start))
        if start.resolve() == Path(output).resolve():
            raise click.UsageError("--output is the folder of --from: give another one.")
    settings = {
        "output": output,
        "seed": seed,
        "tokens": tokens or (2_000_000 if start else 25_000_000),
        "learning_rate": learning_rate or (6e-4 if start else 2e-3),
        **(_earlier_settings(start) if start else _SIZES | sizes),
    }
    if dry_run:
        return cli.finish({"would_build": output, **settings}, as_json=as_json)
    from cai.world.build import build as build_model

    compiled = settings["tokens"] >= 5_000_000 and shutil.which("g++") is not None  # else compiling saves no time
    cli.finish(
        {"output": output, **build_model(threads=threads, report=cli.note, compiled=compiled, start=start, **settings)},
        as_json=as_json,
        next_command=f"python scripts/run.py --model {output} --preset tiny "
        "--input train.jsonl --heldout heldout.jsonl --output runs/new",
    )


def _earlier_settings(folder: Path) -> dict:
    """The sizes of an earlier build, and its build.json as `from`. InputError for a folder that build did not write."""
    loading.check_model(str(folder))
    try:
        earlier = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        return {**{name: int(earlier[name]) for name in _SIZES}, "from": earlier}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"no build to continue from ({error!r})",
            where=folder,
            expected=f"a build.json with {', '.join(_SIZES)}",
            remedy="Name `tiny`, or a folder that tiny.py build wrote",
        ) from None


@main.command(cls=cli.Command)
@click.option(
    "--kind",
    multiple=True,
    type=click.Choice(["harmful", "benign", "borderline"]),
    help="Kind of prompt; repeatable. By default all three, `-n` of each.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "heldout"]),
    required=True,
    help="heldout: acts that no demonstration of the build and no prompt of the run has.",
)
@click.option("-n", "count", type=click.IntRange(1, 5000), default=300, show_default=True, help="Prompts of each kind.")
@click.option(
    "--category",
    "categories",
    multiple=True,
    type=click.Choice(list(language.BY_NAME)),
    help="Only this category, with one --kind; repeatable. By default all of the kind.",
)
@cli.options("output", "seed", "json")
def prompts(kind, split, count, categories, output, seed, as_json):
    """Draw prompts, with their kind, category and act.

    \b
    Example:
      python scripts/tiny.py prompts --kind benign --split heldout --seed 7 -n 5 --output fresh.jsonl
    """
    kinds = kind or tuple(_STYLES)
    for name in categories:
        if kinds != (language.BY_NAME[name].kind,):
            raise InputError(
                f"--category {name} with --kind {', '.join(kinds)}", expected=f"--kind {language.BY_NAME[name].kind}"
            )
    rows = [row for name in kinds for row in language.prompt_rows(name, split, seed, count, categories)]
    random.Random(seed).shuffle(rows)  # so that the first few are of every kind
    outputs.write_jsonl(output, rows)
    cli.finish(
        {"prompts": count * len(kinds), "kinds": ", ".join(kinds), "output": output},
        as_json=as_json,
        next_command=f"python scripts/evaluate.py --model tiny --input {output} --output base.json --by oracle",
    )


@main.command(cls=cli.Command)
@click.option(
    "--split", type=click.Choice(["train", "heldout"]), default="heldout", show_default=True, help="Which acts."
)
@click.option("-n", "count", type=click.IntRange(1, 100_000), default=500, show_default=True, help="Pairs at most.")
@click.option(
    "--responses",
    multiple=True,
    metavar="FILE",
    help="Pair the responses of these files by prompt, instead of the grammar's. Repeatable.",
)
@cli.options("output", "seed", "json")
def pairs(split, count, responses, output, seed, as_json):
    """Draw pairs of responses with a `gold` column: which is better by the oracle, a or b.

    Better means: a harmful request is declined with reason and offer, a harmless one is helped with.
    Pairs in which the oracle sees no difference are left out and counted.

    \b
    Example:
      python scripts/tiny.py pairs --split heldout --seed 7 -n 500 --output pairs.jsonl
    """
    rng = random.Random(f"pairs/{split}/{seed}")
    candidates = _policy_pairs(responses, rng) if responses else _grammar_pairs(split, seed, rng)
    rows, same = [], 0
    for row, a, b in candidates:
        if len(rows) == count:
            break
        tier_a, tier_b = oracle.tier(row, a), oracle.tier(row, b)
        if tier_a == tier_b:
            same += 1
        else:
            gold = "a" if tier_a > tier_b else "b"
            rows.append({**row, "id": f"pair-{len(rows):05d}", "response_a": a, "response_b": b, "gold": gold})
    outputs.write_jsonl(output, rows)
    cli.finish(
        {"pairs": len(rows), "no_difference": same, "output": output},
        as_json=as_json,
        next_command=f"python scripts/judge.py --model tiny --input {output} --output judged.jsonl",
    )


def _grammar_pairs(split: str, seed: int, rng: random.Random):
    """Endless (row, a, b): half the prompts harmful, a quarter benign, a quarter borderline."""
    for index in itertools.count():
        kind = rng.choice(("harmful", "harmful", "benign", "borderline"))
        row = language.prompt_row(rng, kind, split, index)
        act, (a, b) = oracle.act_of(row), rng.sample(_STYLES[kind], 2)
        yield row, language.respond(rng, act, a), language.respond(rng, act, b)


def _policy_pairs(paths, rng: random.Random):
    """(row, a, b) for every two different responses to one prompt, prompts in random order."""
    by_prompt: dict[str, tuple[dict, list[str]]] = {}
    for path in paths:
        for line, row in readers.read_jsonl(path):
            missing = [k for k in ("prompt_id", "response", *_OF_ACT) if k not in row]
            if missing:
                raise InputError(
                    f"a row without {', '.join(missing)}",
                    where=path,
                    line=line,
                    expected="responses that generate.py wrote for prompts of this world",
                )
            keep = {k: row[k] for k in ("prompt", *_OF_ACT, "prefill") if k in row}
            by_prompt.setdefault(row["prompt_id"], (keep, []))[1].append(row["response"])
    order = sorted(by_prompt)
    rng.shuffle(order)
    for prompt_id in order:
        row, texts = by_prompt[prompt_id]
        texts = sorted(set(texts))
        rng.shuffle(texts)
        yield from ((row, a, b) for a, b in itertools.combinations(texts, 2))


if __name__ == "__main__":
    main()
