"""How fast the engine is, against the ways one would do without it, in one run on this machine.

    python tests/benchmarks/bench.py                     # all of it, on `tiny` and a random model of 26 M parameters
    python tests/benchmarks/bench.py --quick --json      # within a minute, fewer rows
    OMP_NUM_THREADS=2 python tests/benchmarks/bench.py --only judge

Contenders take turns, round by round, so that a busy moment hits all of them; a ratio is taken within a round,
and the median, least and most of the rounds are shown. All write the same text greedily, and it is compared.
What is loaded is loaded before. Figures of a machine that does something else besides are worth little.
"""

import gc
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "scripts"), str(HERE.parent)]

import models

from cai.base import cli
from cai.base.paths import TINY
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data.dialogue import as_messages
from cai.data.readers import read_jsonl
from cai.models.engine import Sampling
from cai.models.loading import load_engine
from cai.stats import tables

NEW_TOKENS = 64
LABELS = ("A", "B")
RANDOM = {  # hidden, feed-forward, layers, heads of keys and values
    "26M": (384, 1024, 8, 6),
    "0.5B": (1280, 3456, 24, 4),
    "7B": (4096, 14336, 30, 8),
}
VOCABULARY = 32000  # of a random model: as many as Llama 2 has


class Bench:
    """What a benchmark needs: the model, how many rows and rounds, and where the figures go.

    figures: {name: [a value each round]}.
    """

    def __init__(self, model: str, label: str, rows: int, rounds: int, device: str | None):
        self.model, self.label, self.rows, self.rounds, self.device = model, label, rows, rounds, device
        self.random = label in RANDOM
        self.figures: dict[str, list[float]] = {}
        self.notes: list[str] = []

    @property
    def engine(self):
        return load_engine(self.model, device=self.device)

    def prompts(self, count: int) -> list[dict]:
        """Rows with prompts of varied length, `count` of them, over and over if there are not so many."""
        bundled = [row for _, row in read_jsonl(TINY / "prompts" / "train.jsonl")]
        return [{**bundled[n % len(bundled)], "id": f"r{n}"} for n in range(count)]

    def add(self, name: str, value: float) -> None:
        self.figures.setdefault(f"{self.label} {name}", []).append(value)
        cli.note(f"{self.label} {name}: {value:.3g}")

    def race(self, name: str, ours: Callable, others: dict[str, Callable], same: Callable) -> None:
        """Time all, round by round; a figure for each other: how many times as long it took.

        same: the share of the rows of which ours and another made the same. All must be, but for a random model:
            among its next tokens some are as likely as others to all the digits that float32 has.
        """
        for _ in range(self.rounds):
            made, our_seconds = timed(ours)
            for other, run in others.items():
                theirs, seconds = timed(run)
                share = same(made, theirs)
                if share < (0.9 if self.random else 1):
                    raise SystemExit(
                        f"{self.label} {name}: {other} made something else:\n{theirs!r:.300}\n{made!r:.300}"
                    )
                self.add(f"{name}: {other}", seconds / our_seconds)
                if share < 1:
                    self.add(f"{name}: share of rows made alike by {other}", share)


clock = time.perf_counter  # or time.process_time, where the machine is busy (--cpu-time)


def timed(run: Callable) -> tuple[object, float]:
    """(what it returns, seconds)."""
    gc.collect()
    start = clock()
    made = run()
    return made, clock() - start


@contextmanager
def forward_seconds(model):
    """A list whose one number grows by the time within the model's forward pass."""
    spent, forward = [0.0], model.forward

    def watched(*args, **kwargs):
        start = clock()
        made = forward(*args, **kwargs)
        spent[0] += clock() - start
        return made

    model.forward = watched
    try:
        yield spent
    finally:
        del model.forward


def command(name: str, *line) -> None:
    """Run one of the project's commands in this process; its summary is dropped."""
    from conftest import load_command

    with open(os.devnull, "w") as nowhere:
        kept, sys.stdout = sys.stdout, nowhere
        try:
            load_command(name).main([str(part) for part in line], standalone_mode=False)
        finally:
            sys.stdout = kept


# --- the text steps -----------------------------------------------------------------------------------------


def our_steps(bench: Bench, count: int, folder: Path) -> list[list[str]]:
    """generate.py, critique.py and revise.py; the texts of each step."""
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in bench.prompts(count)), encoding="utf-8")
    shared = [
        "--model",
        bench.model,
        "--temperature",
        0,
        "--max-new-tokens",
        NEW_TOKENS,
        "--overwrite",
        *(["--device", bench.device] if bench.device else []),
    ]
    files = [source, *(folder / f"{name}.jsonl" for name in ("generate", "critique", "revise"))]
    for given, made in pairwise(files):
        no_examples = [] if made.stem == "generate" else ["--examples", 0]  # the pipeline shows none
        command(made.stem, "--input", given, "--output", made, *shared, *no_examples)
    rows = [row for _, row in read_jsonl(files[-1])]
    return [
        [row["response"] for row in rows],
        [row["rounds"][0]["critique"] for row in rows],
        [row["rounds"][0]["revision"] for row in rows],
    ]


def pipeline_steps(bench: Bench, count: int, batch_size: int | None) -> list[list[str]]:
    """The same by transformers' pipeline, one prompt at a time or in batches as the rows come."""
    from transformers import pipeline

    engine, constitution = bench.engine, load_constitution("harmlessness")
    engine.tokenizer.padding_side = "left"
    if engine.tokenizer.pad_token_id is None:
        engine.tokenizer.pad_token_id = engine.pad_id
    pipe = pipeline("text-generation", model=engine.model, tokenizer=engine.tokenizer)

    def ask(conversations):
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
        if batch_size:
            made = pipe(conversations, batch_size=batch_size, **settings)
        else:
            made = [pipe(conversation, **settings) for conversation in conversations]
        return [one[0]["generated_text"].strip() for one in made]

    rows = bench.prompts(count)
    responses = ask([as_messages(row["prompt"]) for row in rows])
    drawn = [constitution.draw(0, f"{row['id']}/0", 0) for row in rows]
    critique, revise = load_template("critique"), load_template("revise")
    asked = [
        {"principle": one, "prompt": row["prompt"], "response": response}
        for one, row, response in zip(drawn, rows, responses, strict=True)
    ]
    critiques = ask([critique.render(**one) for one in asked])
    revisions = ask([revise.render(**one, critique=text) for one, text in zip(asked, critiques, strict=True)])
    return [responses, critiques, revisions]


def alike(ours: list[list[str]], theirs: list[list[str]]) -> float:
    """The share of the rows that have the same texts in all steps."""
    rows = [list(zip(*steps, strict=True)) for steps in (ours, theirs)]
    return statistics.fmean(one == other for one, other in zip(*rows, strict=True))


def text(bench: Bench) -> None:
    """generate + critique + revise against a pipeline, one by one and in batches of 32."""
    with tempfile.TemporaryDirectory() as folder:
        our_steps(bench, 4, Path(folder))  # what is done once: imports, templates, memory
        bench.race(
            "text steps",
            lambda: our_steps(bench, bench.rows, Path(folder)),
            {
                "pipeline, one by one": lambda: pipeline_steps(bench, bench.rows, None),
                "pipeline(batch_size=32)": lambda: pipeline_steps(bench, bench.rows, 32),
            },
            alike,
        )


def share(bench: Bench) -> None:
    """How much of the steps' time, reading and writing files included, is the model's forward pass."""
    with tempfile.TemporaryDirectory() as folder:
        our_steps(bench, 4, Path(folder))
        for _ in range(bench.rounds):
            with forward_seconds(bench.engine.model) as spent:
                _, seconds = timed(lambda: our_steps(bench, 4 * bench.rows, Path(folder)))
            bench.add("text steps: share of time in the forward pass", spent[0] / seconds)


def growth(bench: Bench) -> None:
    """Time for 4 and 16 times the rows, and the most memory the process has had after each."""
    with tempfile.TemporaryDirectory() as folder:
        base = max(8, bench.rows // 2)
        our_steps(bench, base, Path(folder))
        for _ in range(bench.rounds):
            first = timed(lambda: our_steps(bench, base, Path(folder)))[1]
            memory = peak_megabytes()
            for times in (4, 16):
                seconds = timed(lambda times=times: our_steps(bench, times * base, Path(folder)))[1]
                bench.add(f"text steps: time for {times} times the rows", seconds / first)
            bench.add("text steps: memory for 16 times the rows", peak_megabytes() / memory)


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# --- the judge ----------------------------------------------------------------------------------------------


def questions(bench: Bench) -> list[list[dict]]:
    """Forced choices in both orders, each pair under a principle drawn for it."""
    template, constitution = load_template("preference"), load_constitution("harmlessness")
    found = []
    for row in bench.prompts(bench.rows):
        pair = (f"I will not help with that. {row['prompt'][:60]}", f"Here is how. First, {row['prompt'][-60:]}")
        for first, second in (pair, pair[::-1]):
            found.append(
                template.render(
                    principle=constitution.draw(0, row["id"], 0),
                    prompt=row["prompt"],
                    response_a=first,
                    response_b=second,
                    reasoning="",
                )
            )
    return found


def judge(bench: Bench) -> None:
    """Label log-probabilities against one forward pass a question, and against text that is parsed."""
    import torch

    engine, asked = bench.engine, questions(bench)

    def ours():
        return models.score(engine, asked, LABELS)

    def plain():
        found = []
        for conversation in asked:
            rendered = engine.chat.render(conversation)
            ids = engine.chat.encode(rendered)
            labels = [engine.chat.encode(rendered + label)[len(ids)] for label in LABELS]
            with torch.inference_mode():
                logits = engine.model(torch.tensor([ids], device=engine.model.device)).logits
            found.append(logits[0, -1].float().log_softmax(-1)[labels].tolist())
        return found

    def parsed():
        for conversation in asked:
            ids = torch.tensor([engine.chat.encode(engine.chat.render(conversation))], device=engine.model.device)
            made = engine.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            )
            engine.tokenizer.decode(made[0, ids.shape[1] :]).find("A")

    def close(one, other):
        # Within 1e-4; of a random model's −25, which float32 itself knows to 5e-4 only, within a hundred-thousandth.
        return other is None or all(
            math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-4)
            for x, y in zip(one, other, strict=True)
            for a, b in zip(x, y, strict=True)
        )

    ours()
    bench.race(
        "judge", ours, {f"generate {NEW_TOKENS} tokens and parse": parsed, "one forward pass a question": plain}, close
    )


# --- the machine --------------------------------------------------------------------------------------------


def malloc(bench: Bench) -> None:
    """What it takes on a CPU if glibc gives freed memory back, as it does by default."""
    if sys.platform != "linux" or bench.device not in (None, "cpu"):
        return
    line = [
        sys.executable,
        str(HERE / "bench.py"),
        "--alone",
        bench.model,
        "--rows",
        str(bench.rows),
        *(["--cpu-time"] if clock is time.process_time else []),
    ]
    default = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    for _ in range(bench.rounds):
        kept, given_back = (
            float(subprocess.run(line, capture_output=True, text=True, check=True, env={**os.environ, **more}).stdout)
            for more in ({}, default)
        )
        bench.add("glibc's default memory thresholds", given_back / kept)


def alone(bench: Bench) -> float:
    """Seconds of the text steps in this process."""
    with tempfile.TemporaryDirectory() as folder:
        our_steps(bench, 4, Path(folder))
        return timed(lambda: our_steps(bench, bench.rows, Path(folder)))[1]


def gpu(bench: Bench) -> None:
    """Tokens a second on a GPU, and the share of its memory bandwidth that moving weights and cache takes."""
    import torch

    if not torch.cuda.is_available():
        bench.notes.append(f"{bench.label} gpu: none here")
        return
    from cai.models.estimate import GPUS, shape_of

    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    bandwidth = next((values[1] for known, values in GPUS.items() if known.split("-")[0] in name), None)
    shape, talks = shape_of(bench.model), [as_messages(row["prompt"]) for row in bench.prompts(8 * bench.rows)]
    engine = load_engine(bench.model, device="cuda", batch_size=512)
    models.generate(engine, talks[:64], Sampling(8, 0))
    for _ in range(bench.rounds):
        made, seconds = timed(lambda: models.generate(engine, talks, Sampling(256, 0)))
        tokens = sum(one.tokens for one in made)
        bench.add("gpu: new tokens a second", tokens / seconds)
        if bandwidth and shape:
            rows = min(512, len(talks))
            length = sum(one.prompt_tokens + one.tokens / 2 for one in made) / len(made)
            moved = 2 * tokens * (shape.parameters / rows + shape.kv * length)
            bench.add("gpu: share of the memory bandwidth", moved / seconds / (bandwidth * 1e12))


BENCHES = {"text": text, "share": share, "growth": growth, "judge": judge, "malloc": malloc, "gpu": gpu}


def random_model(folder: Path, size: str) -> str:
    """A Llama of random weights and a vocabulary of today's size: 26 M parameters, or half a billion, or seven."""
    hidden, inner, layers, kv_heads = RANDOM[size]
    return str(
        models.build(
            "llama",
            folder / size,
            sentences=sentences(),
            vocabulary=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64 if size != "7B" else 32,
            num_key_value_heads=kv_heads,
            head_dim=64 if size != "7B" else 128,
            tie_word_embeddings=size == "26M",
        )
    )


def sentences() -> list[str]:
    """What a tokenizer is trained on: what the steps will read, and words of chance until its vocabulary is full."""
    known = [row["prompt"] for _, row in read_jsonl(TINY / "prompts" / "train.jsonl")]
    known += [
        path.read_text(encoding="utf-8")
        for pattern in ("templates/*.jinja", "constitutions/*.yaml")
        for path in sorted(HERE.parents[1].glob(pattern))
    ]
    draws = random.Random(0)
    syllables = [first + vowel for first in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    return known + [" " + "".join(draws.choices(syllables, k=draws.randint(2, 4))) for _ in range(VOCABULARY)]


@click.command()
@click.option("--only", type=click.Choice(list(BENCHES)), multiple=True, help="Run this one. Repeatable.")
@click.option("--quick", is_flag=True, help="Within a minute: `tiny` alone, few rows, one round.")
@click.option(
    "--model",
    "wanted",
    multiple=True,
    metavar="MODEL",
    help="Models: a folder, a hub id, tiny, or random ones: 26M, 0.5B, 7B.  [default: tiny 26M]",
)
@click.option("--rows", type=click.IntRange(min=1), default=None, help="Rows.  [default: 128; with --quick 32]")
@click.option("--rounds", type=click.IntRange(min=1), default=None, help="Rounds.  [default: 3; with --quick 1]")
@click.option("--device", default=None, help="cpu, cuda, mps; by default the best there is.")
@click.option(
    "--cpu-time", is_flag=True, help="Count processor seconds instead of the clock's: for a machine that is busy."
)
@click.option("--json", "as_json", is_flag=True, help="Print {name: {median, min, max}} and nothing else.")
@click.option("--alone", default=None, hidden=True)
def main(only, quick, wanted, rows, rounds, device, cpu_time, as_json, alone):
    """Measure the engine: text steps, judge, overhead, growth with the rows, memory, GPU."""
    global clock
    clock = time.process_time if cpu_time else time.perf_counter
    rows, rounds = rows or (32 if quick else 128), rounds or (1 if quick else 3)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # before the tests' conftest, which leaves each of pytest's processes one thread

    if alone:
        click.echo(globals()["alone"](Bench(alone, "", rows, 1, "cpu")))
        return
    wanted = wanted or (("tiny",) if quick else ("tiny", "26M"))
    figures, notes = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            path = random_model(Path(folder), name) if name in RANDOM else name
            # A model twenty times as large takes twenty times as long: fewer rows show the same.
            bench = Bench(path, name, rows if name == "tiny" else max(8, rows // 2), rounds, device)
            for one in only or BENCHES:
                cli.note(f"{name}: {one}")
                BENCHES[one](bench)
            figures |= bench.figures
            notes += bench.notes
    table = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
    }
    if as_json:
        click.echo(json.dumps(table))
        return
    lines = [(name, *(f"{value[part]:.3g}" for part in ("median", "min", "max"))) for name, value in table.items()]
    click.echo(tables.table(("times as long, unless it says otherwise", "median", "min", "max"), lines))
    click.echo(f"{rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}; {'; '.join(notes)}")


if __name__ == "__main__":
    main()
