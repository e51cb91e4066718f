"""What a whole run costs before it starts: model calls, tokens, hours, memory and money of each step of the plan.

    terms = Terms(prompts=40_000, gpu="a100-80", gpus=2, gpu_hour=2.20)
    print(report([make_plan(choices, "runs/x", 0)], choices, terms, as_json=False))

The settings of a step are read from its command line; how long texts are comes from lengths.py, and hours and memory
from models/estimate.py. Each figure of time and money has a range, because lengths and speed are assumed. Leaves out
the loading of models, the words of frames, the matching of revisions with flags, the report, and discounts for cached
prompts.
"""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import click

from cai.base import cli
from cai.base.errors import InputError
from cai.constitution.files import load_constitution
from cai.constitution.frames import load_frames
from cai.data import preferences
from cai.data.dialogue import as_messages
from cai.data.kinds import KINDS
from cai.data.sources import Source
from cai.models import estimate, hardware
from cai.models.estimate import GPUS, Shape
from cai.models.local import auto_dtype, chunk_tokens
from cai.stats import tables
from cai.steps.lengths import Lengths, Requests, read_run
from cai.steps.plan import BUNDLED, Choices, Step

# Assumed where no file of prompts is given: tokens of a prompt (fewest, likely, most), and held-out prompts.
PROMPT_TOKENS, HELDOUT = (50, 100, 200), 1000

# Lengths of answers as a share of --max-new-tokens; of a finished run, as a multiple of its lengths.
SHARES, LIKE = (0.25, 0.5, 1.0), (0.9, 1.0, 1.1)

# Hours as a multiple of those of `estimate`, at best and at worst.
PACE = (1 / 1.5, 1.0, 2.0)

# The share of their added speed that several GPUs reach.
SCALING = 0.9

# The longest row as a multiple of the mean, which is what memory has to hold.
LONGEST = 2

# The names that stand in the plan for files that are not at hand.
NO_FILES = {"inputs": "PROMPTS.jsonl", "heldout": "HELDOUT.jsonl"}


@dataclass(frozen=True)
class Terms:
    """The options of run.py --dry-run that decide what is priced, and at what price."""

    prompts: int | None = None
    like: str | None = None
    gpu: str | None = None
    gpus: int = 1
    gpu_hour: float | None = None
    price: tuple[float, float] | None = None

    @property
    def is_asked(self) -> bool:
        """Whether the plan is to be priced, not only printed."""
        return any((self.prompts, self.like, self.gpu, self.price))

    def check(self, models: Mapping[str, str | None], inputs: Sequence[str], dry_run: bool) -> None:
        """UsageError for an option that has no effect beside the others, InputError for a size that is to run.

        models: {option: its value}.
        """
        estimate.refuse_without_dry_run(dry_run, *Terms.__dataclass_fields__)
        if not self.gpu:
            cli.refuse_options(["gpus", "gpu_hour"], "without --gpu no hours are estimated")
        if inputs:
            cli.refuse_options(["prompts"], "the prompts of --input are counted")
        for option, model in models.items():
            if model and is_size(model) and not dry_run:
                raise InputError(
                    f"{model} is a size and no model",
                    where=option,
                    expected="a folder, a hub id or `tiny`",
                    remedy="Name a model, or price the run with --dry-run",
                )

    def fill_in(self, model: str, inputs: Sequence[str], heldout: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        """The files of the plan, with `NO_FILES` in place of those that --prompts makes unnecessary."""
        if not self.prompts:
            return inputs, heldout
        return (NO_FILES["inputs"],), heldout if heldout or model in BUNDLED else (NO_FILES["heldout"],)


def options(function: Callable) -> Callable:
    """Decorator: the options of `Terms`, passed on as `terms` and checked."""

    @wraps(function)
    def command(**values):
        terms = Terms(**{name: values.pop(name) for name in Terms.__dataclass_fields__})
        models = {f"--{role}": values.get(role) for role in ("model", "critic", "judge", "reader", "gate")}
        terms.check(models, values["inputs"], values["dry_run"])
        return function(terms=terms, **values)

    for option in (
        estimate.price_option,
        click.option("--gpu-hour", type=click.FloatRange(min=0), help="With --gpu: the price of an hour of one GPU."),
        click.option(
            "--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="With --gpu: the number of them."
        ),
        estimate.gpu_option,
        click.option(
            "--like",
            metavar="FOLDER",
            help="With --dry-run: a finished run of a few rows, for the length of all texts.",
        ),
        click.option(
            "--prompts",
            type=click.IntRange(min=1),
            help="With --dry-run: the number of prompts, without any --input. A model of a usual size needs none "
            f"either: --model size:8b ({', '.join(hardware.SIZES)}).",
        ),
    ):
        command = option(command)
    return command


def is_size(model: str) -> bool:
    """Whether a model is named by its size alone."""
    return model.startswith(hardware.SIZE)


def is_server(model: str) -> bool:
    """Whether a model is on a server."""
    return model.startswith("openai:")


def is_file(choices: Choices, files: str) -> bool:
    """Whether the choice's `inputs` or `heldout` are files, not the name that stands for them."""
    return getattr(choices, files) != (NO_FILES[files],)


# --- the work of a step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one step does.

    calls: requests to the model; of a training, rows (each epoch counted); of PPO and GRPO, responses.
    read, written: tokens; a training only reads.
    hours: on one GPU; None where the model's sizes or the GPU are unknown, or a server works. memory: bytes of tensors,
    by part. is_text: only writes or judges text, which a server can do. served: tokens that a server reads and writes
    which the run names.
    """

    calls: int
    read: float
    written: float = 0.0
    hours: float | None = None
    memory: dict[str, int] | None = None
    is_text: bool = True
    served: tuple[float, float] = (0.0, 0.0)


class Estimator:
    """The work of each step of a plan, if its texts have certain lengths.

    counted: what the files tell. lengths, requests: tokens of the texts, and of what stands around them.
    """

    def __init__(self, choices: Choices, terms: Terms, counted: "Counted", lengths: Lengths, requests: Requests):
        self.choices, self.counted, self.lengths, self.requests = choices, counted, lengths, requests
        self.shape, self.gpu, self.gpus = hardware.shape_of(choices.model), terms.gpu, terms.gpus
        self.critic, self.judge, self.reader = map(choices.model_of, ("critic", "judge", "reader"))
        self.cpu = choices.device == "cpu" and not terms.gpu
        # Of the prompt alone, as it stands inside another request.
        self.prompt_text = max(0.0, lengths.prompt - requests.chat)
        self.answers: dict[str, float] = {}  # of the steps so far, by name
        self.pairs = 0

    def work(self, step: Step) -> Work:
        """The work of a step. The steps before it in the plan must have been asked about first."""
        kinds: dict[str, Callable[[str, dict[str, Any]], Work]] = {
            "generate": self._generate,
            "critique": self._critique,
            "revise": self._revise,
            "judge": self._judge,
            "evaluate": self._evaluate,
            "sft": self._sft,
            "reward_model": self._preferences,
            "dpo": self._preferences,
            "ppo": self._reinforce,
            "grpo": self._reinforce,
        }
        if step.command not in kinds:
            return Work(0, 0)
        return kinds[step.command](step.name, cli.read_settings(step.command, step.arguments))

    def _generate(self, name: str, settings: dict[str, Any]) -> Work:
        answer = self.answers[name] = self.lengths.written(name, settings["max_new_tokens"])
        return self._text(self.counted.prompts * settings["samples"], self.lengths.prompt, answer, settings)

    def _critique(self, name: str, settings: dict[str, Any]) -> Work:
        before = self.answers[self._before(name)]
        read = self.lengths.prompts.get(name)
        if read is None:
            template = settings["template"] or "critique"
            request = self.requests.of_round(template, "critique", settings["most_examples"])
            read = request + self.prompt_text + before
        answer = self.answers[name] = self.lengths.written(name, settings["max_new_tokens"])
        critiques = self._text(self.counted.prompts, read, answer, settings, self.critic)
        if self.choices.principles != "match" or not name.endswith("-1"):
            return critiques
        return _together(critiques, self._matches(settings, self.critic))

    def _matches(self, settings: dict[str, Any], model: str) -> Work:
        """Which principles speak to the prompts."""
        questions = 2 * len(self.requests.constitution.principles) * self.counted.prompts
        return self._text(questions, self.requests.of_match() + self.prompt_text, 0, settings, model)

    def _revise(self, name: str, settings: dict[str, Any]) -> Work:
        critique = f"critique-{name.rpartition('-')[2]}"
        read = self.lengths.prompts.get(name)
        if read is None:
            texts = self.prompt_text + self.answers[self._before(name)] + self.answers[critique]
            read = self.requests.of_round(settings["template"], "revision", settings["most_examples"]) + texts
        answer = self.answers[name] = self.lengths.written(name, settings["max_new_tokens"])
        return self._text(self.counted.prompts, read, answer, settings, self.critic)

    def _before(self, name: str) -> str:
        """The step that wrote the text which a round begins with."""
        number = int(name.rpartition("-")[2])
        return "responses" if number == 1 else f"revision-{number - 1}"

    def _judge(self, name: str, settings: dict[str, Any]) -> Work:
        # Of one prompt: the samples and the first response.
        responses = self.counted.samples + 1
        pairs = math.comb(responses, 2)
        pairs = min(pairs, settings["pairs_per_prompt"] or pairs)
        self.pairs = round(self.counted.prompts * pairs * self.lengths.distinct)
        request = self.requests.of_comparison(settings["template"], settings["most_examples"])
        read = request + self.prompt_text + 2 * self._answer_of_pairs
        verdicts = self._text(2 * self.pairs, read, 0, settings, self.judge)
        if self.choices.principles != "match" or self.judge == self.critic:  # which asks in the first round
            return verdicts
        return _together(verdicts, self._matches(settings, self.judge))

    @property
    def _answer_of_pairs(self) -> float:
        """Tokens of a response that is judged."""
        samples = self.counted.samples
        return (samples * self.answers["samples"] + self.answers["responses"]) / (samples + 1)

    def _evaluate(self, name: str, settings: dict[str, Any]) -> Work:
        kind = "responses" if name.endswith("-base") else "samples"
        answer = self.lengths.written(kind, settings["max_new_tokens"])
        rows, prompt = self.counted.heldout, self.counted.heldout_tokens or self.lengths.prompt
        rows += count_framed(settings, rows)
        responses = self._text(rows, prompt, answer, settings)
        if not settings["judge"]:
            return responses
        read = self.requests.of_class() + max(0.0, prompt - self.requests.chat) + answer
        classes = self._text(rows * settings["orders"], read, 0, settings, self.reader)
        return _together(responses, classes, is_same=self.reader == self.choices.model)

    def _size(self, shape: Shape) -> int:
        """Bytes of one number in the weights of a model that writes or judges."""
        dtype = self.choices.dtype
        auto = auto_dtype("cpu" if self.cpu else "cuda", shape.parameters)
        return estimate.BYTES[auto if dtype == "auto" else dtype]

    def _text(self, calls: int, read: float, new: float, settings: dict[str, Any], model: str | None = None) -> Work:
        """Calls that read and write so many tokens each.

        model: who is asked; None: --model, or one of its size.
        """
        work = Work(calls, calls * read, calls * new)
        if model and is_server(model):
            return replace(work, served=(work.read, work.written))
        shape = self.shape if model in (None, self.choices.model) else hardware.shape_of(str(model))
        if not shape or not calls:
            return work
        rows, most = min(settings["batch_size"], calls), settings["max_new_tokens"] if new else 0
        chunk = chunk_tokens(shape.hidden, self.cpu)
        memory = estimate.text_memory(
            shape, size=self._size(shape), rows=rows, longest=round(LONGEST * read), new=most, chunk=chunk
        )
        gpus = self.choices.engine_number("--tensor-parallel-size")
        memory = {name: size // gpus for name, size in memory.items()}  # of each GPU
        hours = self.gpu and estimate.text_hours(
            shape,
            self.gpu,
            size=self._size(shape),
            rows=rows,
            prompt_tokens=work.read,
            new_tokens=work.written,
            length=read + new / 2,
        )
        return Work(calls, work.read, work.written, hours or None, memory)

    def _sft(self, name: str, settings: dict[str, Any]) -> Work:
        last = self.answers[f"revision-{self.choices.rounds}"]
        rows = self.counted.prompts, self.counted.helpful
        tokens = sum(
            n * (self.lengths.prompt + a) for n, a in zip(rows, (last, self.answers["responses"]), strict=True)
        )
        return self._training(sum(rows), tokens, settings, frozen=False)

    def _preferences(self, name: str, settings: dict[str, Any]) -> Work:
        """Reward model and DPO: both sides of each pair."""
        files, most = ((self.pairs, 1), *self.counted.mixed), settings["limit"] or math.inf
        pairs = sum(weight * min(pairs, most) for pairs, weight in files)
        pairs = round(pairs * (1 - settings.get("holdout", 0)))
        tokens = pairs * 2 * (self.lengths.prompt + self._answer_of_pairs)
        return self._training(pairs, tokens, settings, frozen=name == "dpo" and not settings["lora"])

    def _training(self, rows: int, tokens: float, settings: dict[str, Any], frozen: bool) -> Work:
        """frozen: the rows also go through a reference of the model's size."""
        passes, work = settings["epochs"], settings["epochs"] * tokens
        if not self.shape or not rows:
            return Work(round(passes * rows), work, is_text=False)
        # A pair is two rows of a batch, and each is cut off by --max-length.
        sides = 1 if "rounds" in settings else 2
        longest = min(LONGEST * tokens / rows, sides * settings["max_length"])
        others = [self.shape] if frozen else []
        rank = settings["lora_rank"] if settings["lora"] else None
        batch = round(min(settings["batch_size"], rows) * longest)
        memory = estimate.supervised_memory(
            [self.shape],
            others,
            tokens=batch,
            longest=round(longest),
            lora_rank=rank,
            cpu=self.cpu,
            processes=self.gpus,
        )
        hours = None
        if self.gpu:
            hours = estimate.training_hours(
                self.shape, self.gpu, tokens=work, lora=settings["lora"], checkpointing=True
            ) + sum(estimate.reading_hours(shape, self.gpu, work) for shape in others)
        return Work(round(passes * rows), work, 0.0, hours, memory, is_text=False)

    def _reinforce(self, name: str, settings: dict[str, Any]) -> Work:
        """PPO and GRPO: sample, score, train."""
        group = settings["samples"] if name == "grpo" else 1
        update = settings["prompts_per_update"] * group
        episodes = settings["updates"] * update
        answer = self.lengths.written("samples", settings["max_new_tokens"])
        read, new = episodes * self.lengths.prompt, episodes * answer
        if not self.shape:
            return Work(episodes, read, new, is_text=False)
        has_value = name == "ppo" and not settings["value_head"]
        has_reference = not settings["lora"] and (name == "ppo" or settings["kl_coef"] > 0)
        trained: list[Shape] = [self.shape] * (2 if has_value else 1)
        frozen: list[Shape] = [self.shape] * (2 if has_reference else 1)
        rows = min(settings["generation_batch_size"], update) if name == "ppo" else update
        rank = settings["lora_rank"] if settings["lora"] else None
        memory = estimate.rl_memory(
            trained,
            frozen,
            batch_size=settings["batch_size"],
            rows=rows,
            longest=round(LONGEST * self.lengths.prompt),
            new=settings["max_new_tokens"],
            lora_rank=rank,
            cpu=self.cpu,
        )
        work = {"episodes": episodes, "read": read, "new": new, "epochs": settings["epochs"], "rows": rows}
        hours = estimate.rl_hours(trained, frozen, self.gpu, **work, lora=settings["lora"]) if self.gpu else None
        return Work(episodes, read, new, hours, memory, is_text=False)


def count_framed(settings: Mapping[str, Any], rows: int) -> int:
    """The most prompts that an evaluation asks in frames, beside its plain ones.

    Args:
        settings: of evaluate.py. rows: its plain prompts.
    """
    if not settings["frames"]:
        return 0
    frames = load_frames(settings["frames"]).of_split(settings["frame_split"])
    most = len(KINDS) * settings["frame_prompts"] if settings["frame_prompts"] else rows
    return len(frames) * min(rows, most)


def _together(first: Work, second: Work, *, is_same: bool = True) -> Work:
    """Two kinds of calls in one step, one after the other. The hours are those that are known: a server's are not. The
    memory is that of the first, which writes, or of a larger model.

    is_same: both by the same model.
    """
    known = [work.hours for work in (first, second) if work.hours is not None]
    needs = [work.memory for work in ((first,) if is_same else (first, second)) if work.memory]
    memory = max(needs, key=lambda parts: sum(parts.values()), default=None)
    return Work(
        first.calls + second.calls,
        first.read + second.read,
        first.written + second.written,
        sum(known) if known else None,
        memory,
        served=(first.served[0] + second.served[0], first.served[1] + second.served[1]),
    )


# --- what is counted ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """What the files at hand tell: numbers of rows, and tokens of a prompt (None where no file is given).

    mixed: rows and weight of each file of --mix.
    """

    prompts: int
    heldout: int
    helpful: int
    mixed: tuple[tuple[int, float], ...]
    samples: int
    prompt_tokens: float | None
    heldout_tokens: float | None


def count_inputs(steps: Sequence[Step], choices: Choices, terms: Terms) -> Counted:
    """Count the prompts, and how many samples the plan takes of each."""
    prompts, prompt_tokens = terms.prompts or 0, None
    if is_file(choices, "inputs"):
        prompts, prompt_tokens = _count_prompts(choices, "inputs")
    elif choices.limit:
        prompts = min(prompts, choices.limit)
    heldout, heldout_tokens = min(HELDOUT, choices.heldout_limit or HELDOUT), None
    if is_file(choices, "heldout"):
        heldout, heldout_tokens = _count_prompts(choices, "heldout")
    helpful = Source(choices.helpful, reading=choices.reading_of("helpful")).count if choices.helpful else 0
    samples = [cli.read_settings(step.command, step.arguments)["samples"] for step in steps if step.name == "samples"]
    weights = preferences.read_weights((), choices.mix)
    mixed = tuple((Source([file], reading=choices.reading.only()).count, weight) for file, weight in weights.items())
    return Counted(prompts, heldout, helpful, mixed, max(samples, default=0), prompt_tokens, heldout_tokens)


def _count_prompts(choices: Choices, files: str) -> tuple[int, float]:
    """(number of prompts, mean tokens of one)."""
    limit = choices.heldout_limit if files == "heldout" else choices.limit
    source = Source(getattr(choices, files), limit=limit, reading=choices.reading_of(files))
    tokens, _, count = estimate.count_tokens((as_messages(row["prompt"]) for row in source), choices.model)
    return count, tokens / count


# --- the price ----------------------------------------------------------------------------------------------


def price_plan(steps: Sequence[Step], choices: Choices, terms: Terms) -> dict[str, Any]:
    """{steps, total, warnings, assumptions} of a plan, of one seed or several.

    Hours, cost and the total of tokens are {value, low, high}, hours and cost None where they are not known. InputError
    where --gpu is given and the sizes of the model are unknown.
    """
    roles = {role: model for role, model in choices.models.items() if not is_server(model) and role != "gate"}
    for role, model in roles.items() if terms.gpu else ():
        if hardware.shape_of(model) is None:
            raise InputError(
                "the model's sizes are not on this machine, so that --gpu has no effect",
                where=model,
                expected="a local folder, or a size",
                remedy=f"Leave --gpu out, or give --{role} {hardware.SIZE}NAME with one of {', '.join(hardware.SIZES)}",
            )
    counted = count_inputs(steps, choices, terms)
    requests = Requests(choices.model, load_constitution(choices.constitution), choices.principles)
    cases = _cases(choices, terms, counted)
    estimators = [Estimator(choices, terms, counted, lengths, requests) for lengths in cases]
    rows, warnings, served = [], [], []
    for step in steps:
        low, likely, high = (estimator.work(step) for estimator in estimators)
        if not likely.calls:
            continue
        row = _price_step(step, (low, likely, high), terms, has_servers(choices))
        if any(likely.served):
            served.append(step.name)
        if terms.gpu and row["memory_gb"] and row["memory_gb"] + hardware.BESIDE_GB > GPUS[terms.gpu][0]:
            warnings.append(
                f"{step.name} needs {row['memory_gb']:.0f} GB, more than one {terms.gpu} has: shard it, or "
                "take a larger GPU (references/hardware.md)"
            )
        rows.append(row)
    total = {name: _add(row[name] for row in rows) for name in ("hours", "cost")}
    if terms.gpu and served:
        warnings.append(f"hours and memory leave out what the servers do in {', '.join(dict.fromkeys(served))}")
    unpriced = dict.fromkeys(row["name"] for row in rows if row["cost"] is None) if total["cost"] else []
    if unpriced:
        warnings.append(f"the total cost leaves out {', '.join(unpriced)}: give --gpu and --gpu-hour for them")
    lines = _assumptions(choices, terms, counted, cases)
    total = {"tokens": _add(row.pop("tokens") for row in rows), **total}
    return {"steps": rows, "total": total, "warnings": list(dict.fromkeys(warnings)), "assumptions": lines}


def _cases(choices: Choices, terms: Terms, counted: Counted) -> list[Lengths]:
    """The lengths at best, as is likely, and at worst."""
    if terms.like:
        lengths = read_run(terms.like, choices.rounds)
        return [lengths.scale(factor) for factor in LIKE]
    return [
        Lengths(counted.prompt_tokens or tokens, share) for tokens, share in zip(PROMPT_TOKENS, SHARES, strict=True)
    ]


def has_servers(choices: Choices) -> bool:
    """Whether the run names servers: --price is then what these take, else the price of every step that is text."""
    return any(is_server(choices.model_of(role)) for role in ("critic", "judge", "reader"))


def _price_step(step: Step, works: tuple[Work, Work, Work], terms: Terms, has_servers: bool) -> dict[str, Any]:
    likely = works[1]
    served = terms.price is not None and likely.is_text and not has_servers
    speed = 1.0 if terms.gpus == 1 else SCALING * terms.gpus
    hours = cost = None
    if likely.hours is not None and not served:
        hours = [work.hours / speed * pace for work, pace in zip(works, PACE, strict=True)]
    if hours and terms.gpu_hour is not None:
        cost = [hour * terms.gpus * terms.gpu_hour for hour in hours]
    if terms.price and (served or any(likely.served)):
        tokens = [(work.read, work.written) if served else work.served for work in works]
        asked = [(read * terms.price[0] + written * terms.price[1]) / 1e6 for read, written in tokens]
        cost = [sum(parts) for parts in zip(asked, cost or [0.0] * len(asked), strict=True)]
    memory = likely.memory and not served
    return {
        "name": step.name,
        "command": step.line,
        "output": step.output,
        "calls": likely.calls,
        "tokens": _range([work.read + work.written for work in works]),
        "tokens_read": round(likely.read),
        "tokens_written": round(likely.written),
        "hours": _range(hours),
        "memory_gb": estimate.gigabytes(likely.memory)["total"] if memory else None,
        "cost": _range(cost),
    }


def _range(values: Sequence[float] | None) -> dict[str, float] | None:
    if values is None:
        return None
    low, value, high = (float(f"{value:.3g}") for value in values)
    return {"value": value, "low": low, "high": high}


def _add(figures: Iterable[dict[str, float] | None]) -> dict[str, float] | None:
    known = [figure for figure in figures if figure]
    if not known:
        return None
    return {part: float(f"{sum(figure[part] for figure in known):.3g}") for part in ("value", "low", "high")}


def _assumptions(choices: Choices, terms: Terms, counted: Counted, cases: Sequence[Lengths]) -> list[str]:
    low, likely, high = (lengths.prompt for lengths in cases)
    shape, each = hardware.shape_of(choices.model), f"{likely:,.0f} tokens each"
    if low < high:
        each += f" ({low:,.0f} to {high:,.0f})"
    lines = [
        f"{counted.prompts:,} prompts of {each}; {counted.heldout:,} held-out prompts"
        + ("" if is_file(choices, "heldout") else " (assumed)"),
        f"texts as long as in {terms.like}, 10 % shorter to 10 % longer"
        if terms.like
        else "answers of half of --max-new-tokens, a quarter to all of them; --like FOLDER takes them from a small run",
        "a revision for every prompt, none left out for its flags",
    ]
    if shape:
        name = hardware.SIZES.get(choices.model.removeprefix(hardware.SIZE).lower(), choices.model)
        others = [role for role in ("critic", "judge", "reader") if getattr(choices, role)]
        beside = f" except {', '.join(others)}" if others else ""
        lines.append(f"{name}: {shape.parameters / 1e9:.3g} billion parameters, for every model of the run{beside}")
        lines += [_describe_model(role, getattr(choices, role)) for role in others]
    if terms.gpu:
        _, bandwidth, flops = GPUS[terms.gpu]
        used = {name: f"{100 * share:.0f} %" for name, share in estimate.USED.items()}
        lines.append(
            f"{terms.gpu}: {used['bandwidth']} of {bandwidth} TB/s, {used['reading']} of {flops} TFLOP/s, "
            f"{used['training']} in training; at best 1.5 times as fast, at worst half as fast"
        )
    if terms.gpus > 1:
        lines.append(
            f"{terms.gpus} GPUs, each with a whole copy, at {100 * SCALING:.0f} % of {terms.gpus} times the speed: "
            "start the steps with accelerate launch (references/scaling.md), because run.py itself uses one"
        )
    if choices.engine_number("--tensor-parallel-size") > 1:
        lines.append("GB per GPU of text steps is for each GPU of a copy, and their hours are those of one GPU")
    if terms.price:
        lines.append(
            "the price is that of the servers that are named"
            if has_servers(choices)
            else "every step that writes or judges text is served at that price, trained policies included"
        )
    lines.append("calls are requests to the model; of a training, rows in all epochs; of PPO and GRPO, responses")
    return [*lines, "not counted: loading of models, the report, repeated steps, discounts for cached prompts"]


def _describe_model(role: str, model: str) -> str:
    """One of the models beside --model, among the assumptions."""
    if is_server(model):
        return f"{role}: {model}, on its server, with as many tokens to a text as --model"
    shape = hardware.shape_of(model)
    size = f"{shape.parameters / 1e9:.3g} billion parameters" if shape else "of unknown size"
    return f"{role}: {hardware.SIZES.get(model.removeprefix(hardware.SIZE).lower(), model)}, {size}"


# --- output -------------------------------------------------------------------------------------------------


def report(plans: Sequence[Sequence[Step]], choices: Choices, terms: Terms, as_json: bool) -> str:
    """What run.py --dry-run prints: the plan as a shell script, or its price; or either as one JSON object.

    plans: one for each seed.
    """
    steps = [step for plan in plans for step in plan]
    if not terms.is_asked and not any(map(is_size, choices.models.values())):
        rows = [{"name": step.name, "command": step.line, "output": step.output} for step in steps]
        return json.dumps({"steps": rows}, ensure_ascii=False) if as_json else format_script(steps, choices.is_smoke)
    price = price_plan(steps, choices, terms)
    for row in price["steps"] if len(plans) > 1 else ():
        row["name"] = f"{Path(row['output']).parent.name}/{row['name']}"
    if as_json:
        return json.dumps({"model": choices.model, **asdict(terms), **price}, ensure_ascii=False)
    return format_price(price)


def format_script(steps: Sequence[Step], is_smoke: bool = False) -> str:
    """The plan as a shell script; in that of a smoke run no step measures how fit its model is.

    In parentheses, so that an error doesn't end the shell it is pasted into. A step that ends with 3 is done
    except for some records, and the next one continues with the others.
    """
    lines = [f"{step.line} || [ $? -eq {cli.SOME_FAILED} ]" for step in steps]
    first = ["set -e", *(["export CAI_QUALIFICATION=kept"] if is_smoke else []), f"cd {shlex.quote(str(Path.cwd()))}"]
    return "\n".join(["(", *first, *lines, ")"])


def format_price(price: dict[str, Any]) -> str:
    """The price as a table, with warnings and assumptions below."""
    header = ("step", "calls", "tokens read", "tokens written", "hours", "GB per GPU", "cost")
    rows = [
        (
            row["name"],
            f"{row['calls']:,}",
            _short(row["tokens_read"]),
            _short(row["tokens_written"]),
            _number(row["hours"]),
            f"{row['memory_gb']:.3g}" if row["memory_gb"] else "–",
            _number(row["cost"]),
        )
        for row in price["steps"]
    ]
    read, written = (_short(sum(row[name] for row in price["steps"])) for name in ("tokens_read", "tokens_written"))
    total = price["total"]
    rows.append(("total", "", read, written, _number(total["hours"]), "", _number(total["cost"])))
    lines = [tables.table(header, rows), "", f"tokens  {_spread(total['tokens'], _short)}"]
    lines += [f"{name:6}  {_spread(total[name], _plain)}" for name in ("hours", "cost") if total[name]]
    lines += [f"warning: {warning}" for warning in price["warnings"]]
    return "\n".join([*lines, "", "Assumed:", *(f"- {line}" for line in price["assumptions"])])


def _short(tokens: float) -> str:
    """`812`, `45 k`, `12.3 M`, `459 M`."""
    for limit, unit, scale in ((1e4, "", 1.0), (1e6, " k", 1e3)):
        if tokens < limit:
            return f"{tokens / scale:,.0f}{unit}"
    return f"{tokens / 1e6:.1f} M" if tokens < 1e8 else f"{tokens / 1e6:,.0f} M"


def _number(figure: dict[str, float] | None) -> str:
    return "–" if figure is None else _plain(figure["value"])


def _spread(figure: dict[str, float], show: Callable[[float], str]) -> str:
    return f"{show(figure['value'])} ({show(figure['low'])} to {show(figure['high'])})"


def _plain(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
