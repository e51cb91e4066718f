"""This project's engine against vLLM, by vLLM's own interface and as a managed server, and against pipelines.

    python tests/benchmarks/engines.py PAIRS --model MODEL --vllm ENVIRONMENT/bin/vllm
    python tests/benchmarks/engines.py PAIRS --model 0.5B --rounds 3 --works generate,judge

PAIRS are human preferences such as HH-RLHF's, in any format that the commands read: their prompts are answered, and
their pairs are judged in both orders. MODEL is a folder, a GGUF file, or the size of a random model (26M, 0.5B, 7B).

Contenders take turns, round by round; a ratio is taken within a round. Everything is loaded before, text is greedy,
and vLLM begins each turn with an empty prefix cache. Prints the median, least and most of the rounds, how many texts
are those of our engine, the versions, and whether the fast path is on. Without --vllm, its rows are left out.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "scripts"), str(HERE.parent), str(HERE)]

import bench
import models

from cai.base import cli
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data.dialogue import as_messages
from cai.data.sources import Source
from cai.models import local
from cai.models.engine import Sampling
from cai.models.loading import load_engine
from cai.stats import tables

LABELS = ("A", "B")
LONGEST = 2048  # tokens of a prompt and its answer
WORKS = ("generate", "judge", "round", "forward")


class Ours:
    """The engine of this project in one process, as the commands use it."""

    def __init__(self, model: str, dtype: str, device: str | None):
        self.model, self.dtype, self.device = model, dtype, device

    @property
    def engine(self):
        return load_engine(self.model, dtype=self.dtype, device=self.device)

    def prepare(self) -> None:
        _ = self.engine  # loaded again if another contender's was loaded in between

    def generate(self, conversations, new_tokens):
        answers, seconds = bench.timed(lambda: models.generate(self.engine, conversations, Sampling(new_tokens, 0)))
        return {"seconds": seconds, "texts": [a.text for a in answers], "tokens": sum(a.tokens for a in answers)}

    def choose(self, conversations):
        chosen, seconds = bench.timed(lambda: models.score(self.engine, conversations, LABELS))
        return {"seconds": seconds, "chosen": chosen}


class Pipeline(Ours):
    """transformers' pipeline in batches of 32, as the prompts come."""

    def prepare(self) -> None:
        from transformers import pipeline

        engine = self.engine
        engine.model.set_attn_implementation("sdpa")  # as a pipeline has it
        engine.tokenizer.padding_side = "left"
        if engine.tokenizer.pad_token_id is None:
            engine.tokenizer.pad_token_id = engine.pad_id
        self.pipe = pipeline("text-generation", model=engine.model, tokenizer=engine.tokenizer)

    def generate(self, conversations, new_tokens):
        settings = {"max_new_tokens": new_tokens, "do_sample": False, "return_full_text": False, "batch_size": 32}
        answers, seconds = bench.timed(lambda: self.pipe(conversations, **settings))
        from cai.models.loading import release_engines

        release_engines()  # so that ours is loaded again with its own attention
        return {"seconds": seconds, "texts": [answer[0]["generated_text"].strip() for answer in answers]}


class Bare:
    """vLLM by its own Python interface, in its own environment."""

    def __init__(self, model: str, dtype: str, executable: str):
        worker = [str(Path(executable).parent / "python"), str(HERE / "vllm_worker.py"), model, dtype, str(LONGEST)]
        self.process = subprocess.Popen(
            worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = json.loads(self._read())["version"]

    def _read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM ended with {self.process.wait()}: run {' '.join(self.process.args)} to see why")
        return line

    def _ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def prepare(self) -> None:
        pass

    def generate(self, conversations, new_tokens):
        return self._ask(task="generate", conversations=conversations, max_new_tokens=new_tokens)

    def choose(self, conversations):
        return self._ask(task="choose", conversations=conversations, labels=LABELS)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


class Managed(Ours):
    """vLLM as a server that our commands start and ask (`--engine vllm`)."""

    def __init__(self, model: str, dtype: str, executable: str, device: str | None):
        super().__init__(model, dtype, device)
        from cai.base.engine_options import EngineChoice
        from cai.models import managed

        # Its address for emptying the prefix cache is there in development mode only.
        os.environ["VLLM_SERVER_DEV_MODE"] = "1"
        choice = EngineChoice(engine="vllm", engine_path=executable)
        self.servers = managed.serve(model, choice, dtype=dtype, device=device)
        [server] = self.servers.servers
        self.address, self.name = server.address, server.serving["name"]
        self.client = self.servers._client
        managed._running = None  # a command would stop it before it loads a model; here both stay

    @property
    def engine(self):
        return self.client

    def prepare(self) -> None:
        root = self.address.removesuffix("/v1")
        urllib.request.urlopen(urllib.request.Request(f"{root}/reset_prefix_cache", method="POST"), timeout=60)

    def stop(self) -> None:
        self.servers.stop()


def round_of_commands(folder: Path, engine: list[str]) -> dict:
    """generate.py, critique.py and revise.py over the prompts of the folder, as one types them."""
    shared = [*engine, "--temperature", 0, "--max-new-tokens", 64, "--overwrite"]
    files = [folder / "prompts.jsonl", *(folder / f"{name}.jsonl" for name in ("generate", "critique", "revise"))]
    start = time.perf_counter()
    for source, output in pairwise(files):
        settings = [] if output.stem == "generate" else ["--examples", 0]
        bench.command(output.stem, "--input", source, "--output", output, *shared, *settings)
    return {"seconds": time.perf_counter() - start}


def questions(rows) -> list[list[dict]]:
    """Forced choices of both orders, each pair under a principle that is drawn for it."""
    template, constitution = load_template("preference"), load_constitution("harmlessness")
    conversations = []
    for row in rows:
        values = {"principle": constitution.draw(0, row["id"], 0), "prompt": row["prompt"], "reasoning": ""}
        for first, second in ((row["chosen"], row["rejected"]), (row["rejected"], row["chosen"])):
            conversations.append(template.render(response_a=first, response_b=second, **values))
    return conversations


def race(name: str, runs: dict, rounds: int, figures: dict) -> None:
    """Run each contender once per round; the first one is what the others are compared with."""
    for _ in range(rounds):
        results = {}
        for label, (contender, work) in runs.items():
            contender.prepare()
            gc.collect()
            results[label] = work(contender)
            cli.note(f"{name}: {label}: {results[label]['seconds']:.1f} s")
        first = next(iter(results))
        for label, result in results.items():
            figures.setdefault((name, label, "seconds"), []).append(result["seconds"])
            if label != first:
                ratio = results[first]["seconds"] / result["seconds"]
                figures.setdefault((name, f"{first} / {label}", "ratio"), []).append(ratio)
                if "texts" in result and "texts" in results[first]:
                    same = sum(map(str.__eq__, results[first]["texts"], result["texts"])) / len(result["texts"])
                    figures.setdefault((name, label, "share of texts as ours"), []).append(same)
            if "tokens" in result:
                rate = result["tokens"] / result["seconds"]
                figures.setdefault((name, label, "new tokens per second"), []).append(rate)


@click.command()
@click.argument("pairs")
@click.option("--model", required=True, help="A folder, a GGUF file, or a random model: 26M, 0.5B, 7B.")
@click.option("--vllm", default=None, help="vLLM's executable, in an environment of its own.")
@click.option("--dtypes", default="bfloat16,float32", show_default=True)
@click.option("--works", default=",".join(WORKS), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--judged", type=click.IntRange(min=1), default=60, show_default=True, help="Pairs.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Prompts of a whole round.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=96, show_default=True)
@click.option("--device", default=None)
@click.option("--json", "as_json", is_flag=True)
def main(pairs, model, vllm, dtypes, works, rounds, prompts, judged, steps, new_tokens, device, as_json):
    """Measure text, judging and whole rounds by several engines in turn."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "CAI_QUALIFICATION": "off"}
    import torch

    works = works.split(",")
    if unknown := set(works) - set(WORKS):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: of {', '.join(WORKS)}", param_hint="--works")
    rows = list(Source([pairs], require=("prompt", "chosen", "rejected"), limit=max(prompts, judged, steps)))
    figures: dict[tuple[str, str, str], list[float]] = {}
    notes = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = bench.random_model(folder, model) if model in bench.RANDOM else model
        file = folder / "prompts.jsonl"
        file.write_text("".join(json.dumps({"id": r["id"], "prompt": r["prompt"]}) + "\n" for r in rows[:steps]))
        for dtype in dtypes.split(","):
            notes += measure(
                figures, works, rows, folder, model, vllm, dtype, rounds, prompts, judged, new_tokens, device
            )
        if torch.cuda.is_available():
            on_gpu = bench.Bench(model, "", max(1, prompts // 8), rounds, device)
            bench.gpu(on_gpu)
            figures |= {("512 rows of 256 tokens", "ours", name): values for name, values in on_gpu.figures.items()}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    notes.append(f"{rounds} rounds, {torch.get_num_threads()} threads, {versions}")
    table = [
        {"work": work, "engine": label, "figure": figure, "median": statistics.median(v), "min": min(v), "max": max(v)}
        for (work, label, figure), v in figures.items()
    ]
    if as_json:
        click.echo(json.dumps({"figures": table, "notes": notes}))
        return
    lines = [
        (row["work"], row["engine"], row["figure"], *(f"{row[part]:.3g}" for part in ("median", "min", "max")))
        for row in table
    ]
    click.echo(tables.table(("work", "engine", "figure", "median", "min", "max"), lines))
    click.echo("\n".join(dict.fromkeys(notes)))


def measure(figures, works, rows, folder, model, vllm, dtype, rounds, prompts, judged, new_tokens, device):
    """All works in one precision; returns notes on what ran."""
    ours, shipped = Ours(model, dtype, device), Ours(model, "auto", device)
    fast = local.fast_path(ours.engine)
    notes = [
        f"ours in {dtype}: fast path {fast['fast_path']}",
        f"auto is {local.fast_path(shipped.engine)['weights_dtype']}",
    ]
    bare = Bare(model, dtype, vllm) if vllm else None
    managed = Managed(model, dtype, vllm, device) if vllm else None
    notes += [f"vllm {bare.version}"] if bare else ["vLLM: not measured, no --vllm"]
    conversations = [as_messages(row["prompt"]) for row in rows[:prompts]]
    contenders = {"ours": ours, "vLLM": bare, "managed vLLM": managed}
    contenders = {label: contender for label, contender in contenders.items() if contender}
    if dtype == "bfloat16":
        contenders["ours, --dtype auto"] = shipped
    for contender in contenders.values():  # what is done once: imports, threads, memory
        contender.prepare()
        contender.generate(conversations[:4], 4)
    if "generate" in works:
        runs = {**contenders, "pipeline(batch_size=32)": Pipeline(model, dtype, device)}
        work = lambda contender: contender.generate(conversations, new_tokens)  # noqa: E731
        race(f"generate, {dtype}", {label: (c, work) for label, c in runs.items()}, rounds, figures)
    if "judge" in works:
        asked = questions(rows[:judged])
        work = lambda contender: contender.choose(asked)  # noqa: E731
        race(f"judge, {dtype}", {label: (c, work) for label, c in contenders.items()}, rounds, figures)
    if "round" in works and dtype == "bfloat16":
        run = lambda *engine: lambda _: round_of_commands(folder, list(engine))  # noqa: E731
        runs = {"ours": (ours, run("--model", model, "--dtype", dtype, *(["--device", device] if device else [])))}
        if managed:
            served = run("--model", f"openai:{managed.name}", "--endpoint", managed.address)
            runs["managed vLLM"] = (managed, served)
        race(f"whole round, {dtype}", runs, rounds, figures)
    if "forward" in works:
        for _ in range(rounds):
            with bench.forward_seconds(ours.engine.model) as spent:
                seconds = ours.generate(conversations, new_tokens)["seconds"]
            figures.setdefault((f"generate, {dtype}", "ours", "share in the forward pass"), []).append(
                spent[0] / seconds
            )
    for server in filter(None, (bare, managed)):
        server.stop()
    return notes


if __name__ == "__main__":
    main()
