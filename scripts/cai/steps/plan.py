"""The plan of the whole method: every step with its command line, from prompts to the report.

    for step in make_plan(Choices(model="tiny", ...), "runs/tiny", seed=0): print(step.line)

The plan follows from the choices alone. Leaves out the options (run_options.py), running the steps (run.py), and
choices inside a step: change PRESETS, or run the script that `run.py --dry-run` prints.
"""

import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

from cai.base.paths import SCRIPTS, SMOLLM2, TINY
from cai.constitution.frames import FRAME_SHARE
from cai.data.reading import AS_THEY_ARE, Reading
from cai.models.loading import split_endpoint
from cai.models.servers import IN_FLIGHT

TRAINS = ("sft", "reward_model", "ppo", "dpo", "grpo")

# The settings of each step. A critique that found no fault leaves the response as it was: from such copies
# of harmless rows SFT learns to stay helpful, hence `--keep copy`. Pairs are sampled hotter than answers are,
# because two that are alike teach a reward model nothing. With `tiny` SFT is light, so that RL has something to do, and
# PPO takes 48 rows per optimizer step: with 16 its noise costs helpfulness (references/results.md). `batch_size` is
# that of the steps that write or judge text; `size`: updates, prompts in each, and minibatches; `value_warmup`: updates
# of PPO before the policy's first; `frames`: of the evaluations of a run in frames; `rounds` of critique and revision;
# `stop`: no revision where the critique finds no fault. Those of `smollm2` are for two cores
# (references/small-models.md): so responses are short, the reward model learns from 800 pairs, and DPO trains the later
# blocks, on pairs that the judge is sure of. Responses are sampled at temperature 1, because SFT on copies that are
# sampled colder makes the model's answers colder too. An answer that is cut is not penalised there, because this model
# answers at length.
PRESETS = {
    "tiny": {
        "batch_size": 64,
        "rounds": 1,
        "generate": "--temperature 1.0 --max-new-tokens 96",
        "critique": "--temperature 1.0 --max-new-tokens 96 --examples 0",
        "revise": "--temperature 1.0 --max-new-tokens 96 --examples 0",
        "sft": "--keep all --epochs 1 --learning-rate 3e-4 --batch-size 32 --max-length 512",
        "samples": "--samples 4 --temperature 1.3 --max-new-tokens 96",
        "judge": "--pairs-per-prompt 4",
        "reward_model": "--epochs 1 --learning-rate 5e-4 --batch-size 32 --max-length 512",
        "size": {"ppo": (36, 96, 2), "grpo": (20, 16, 1)},
        "value_warmup": 2,
        "ppo": "--epochs 1 --batch-size 32 --learning-rate 3e-4 --value-learning-rate 1e-3 "
        "--value-clip-range 10 --lam 1 --kl-coef 0.1 --temperature 1.0 --max-new-tokens 96",
        "dpo": "--epochs 1 --learning-rate 1e-5 --batch-size 32 --max-length 512",
        "grpo": "--samples 4 --batch-size 64 --learning-rate 3e-4 --max-new-tokens 96",
        "evaluate": "--by oracle --temperature 1.0 --max-new-tokens 96",
        "frames": "--frame-prompts 10",
    },
    "smollm2": {
        "batch_size": 64,
        "rounds": 1,
        "stop": True,
        "generate": "--temperature 1.0 --max-new-tokens 48",
        "critique": "--temperature 0 --max-new-tokens 72 --examples 0",
        "revise": "--temperature 0 --max-new-tokens 112 --examples 0",
        "sft": "--keep copy --epochs 2 --learning-rate 5e-5 --batch-size 16 --max-length 384",
        "samples": "--samples 1 --temperature 1.0 --max-new-tokens 80",
        "judge": "--pairs-per-prompt 1 --examples 0",
        "reward_model": "--epochs 1 --learning-rate 3e-5 --batch-size 16 --max-length 384 --limit 800",
        "size": {"ppo": (12, 48, 2), "grpo": (12, 8, 1)},
        "ppo": "--epochs 1 --batch-size 24 --learning-rate 2e-5 --temperature 1.0 --max-new-tokens 80 "
        "--missing-eos-penalty 0 --kl-coef 0.05",
        "dpo": "--epochs 2 --learning-rate 3e-5 --batch-size 16 --max-length 384 --first-layer 16 --min-margin 0.4",
        "grpo": "--samples 4 --batch-size 16 --learning-rate 1e-5 --max-new-tokens 80 --missing-eos-penalty 0",
        "evaluate": "--by phrases --temperature 0.7 --max-new-tokens 80",
        "frames": "--frame-prompts 20",
    },
    "default": {
        "batch_size": 32,
        "rounds": 2,
        "generate": "--temperature 0.7 --max-new-tokens 512",
        "critique": "--temperature 0.7 --max-new-tokens 512",
        "revise": "--temperature 0.7 --max-new-tokens 512",
        "sft": "--keep copy --lora --epochs 2 --learning-rate 1e-4",
        "samples": "--samples 2 --temperature 1.0 --max-new-tokens 512",
        "judge": "",
        "reward_model": "--lora --epochs 1 --learning-rate 1e-4",
        "size": {"ppo": (100, 128, 1), "grpo": (100, 16, 1)},
        "ppo": "--lora --learning-rate 1e-5 --max-new-tokens 512",
        "dpo": "--lora --epochs 1 --learning-rate 5e-6",
        "grpo": "--lora --learning-rate 1e-5 --max-new-tokens 512",
        "evaluate": "--by judge --temperature 0.7 --max-new-tokens 512",
        "frames": "--frame-prompts 20",
    },
}


# The most of everything in a smoke run: a 135M model on two CPU cores then ends within two minutes. What a preset has
# less of stays as it is, and so do tokens and updates that the user chose: a model that reasons before it answers needs
# more tokens. Rows are bounded by `evaluate.smoke`. With one pair per prompt the responses can all be alike, and a good
# judge then chooses the same letter throughout.
SMOKE_TOKENS = 32
SMOKE = {
    "critique": {"--examples": 0},
    "revise": {"--examples": 0},
    "sft": {"--epochs": 1},
    "samples": {"--samples": 2},
    "judge": {"--pairs-per-prompt": 3, "--examples": 0},
    "reward_model": {"--epochs": 1},
    "ppo": {"--epochs": 1, "--updates": 1},
    "dpo": {"--epochs": 1},
    "grpo": {"--epochs": 1, "--samples": 2, "--updates": 1},
    "evaluate": {"--orders": 1},
}

# Bounded tokens leave most revisions unfinished; SFT takes them all the same, so that there is something to train on.
SMOKE_KEEP = ["--keep", "all"]

# The options of how rows are read that are for a kind of files, beside --prompt-field.
READING_OF = {"inputs": (), "heldout": ("kind_field", "kind", "form"), "helpful": ("response_field",)}

HUMAN_LABEL = 1.0  # p_chosen of pairs of --mix that have none

# The models whose prompts are bundled.
BUNDLED = {"tiny": TINY, "smollm2": SMOLLM2}


@dataclass(frozen=True)
class Step:
    """One command of the plan. `output` is the file or folder it writes."""

    name: str
    command: str
    arguments: list[str]
    output: str

    @property
    def line(self) -> str:
        """The step as typed into a shell in the current directory."""
        paths = (sys.executable, SCRIPTS / f"{self.command}.py")
        return shlex.join([*map(shorten_path, paths), *self.arguments])


@dataclass(frozen=True)
class Choices:
    """What the user chose, as the options of run.py; `preset` is a key of PRESETS.

    `limit` is that of the prompts to train on, `heldout_limit` that of the prompts to measure on. `critic`, `judge` and
    `reader`: the models of these roles (see `model_of`). `updates` and `max_new_tokens` replace those of the preset.
    `is_smoke`: everything is bounded by SMOKE. `engine`: the words of --engine and what belongs to it; `requests`:
    those of --request-timeout and --no-server-seed. `frames`: a
    frames file, in whose frames a share of the prompts is asked. `mix`: FILE=WEIGHT of pairs beside the judge's.
    """

    model: str
    constitution: str
    inputs: tuple[str, ...]
    heldout: tuple[str, ...]
    helpful: tuple[str, ...]
    rounds: int
    rl: str
    preset: str
    batch_size: int | None
    limit: int | None
    device: str | None
    dtype: str
    overwrite: bool
    principles: str = "draw"
    gate: str | None = None
    stops: bool = False
    heldout_limit: int | None = None
    reading: Reading = AS_THEY_ARE
    critic: str | None = None
    judge: str | None = None
    reader: str | None = None
    max_new_tokens: int | None = None
    updates: int | None = None
    is_smoke: bool = False
    engine: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    frames: str | None = None
    frame_share: float = FRAME_SHARE
    mix: tuple[str, ...] = ()

    def model_of(self, role: str) -> str:
        """The model that criticises and revises (`critic`), compares responses (`judge`) or says what a response does
        (`reader`): --model by default."""
        return getattr(self, role) or self.model

    def engine_number(self, option: str) -> int:
        """The number of an option of --engine, such as --replicas; 1 where it is not given."""
        return int(self.engine[self.engine.index(option) + 1]) if option in self.engine else 1

    @property
    def reads_by_judge(self) -> bool:
        """Whether a model reads the responses that are measured, not the oracle; one that is named does."""
        return self.reader is not None or "--by judge" in str(PRESETS[self.preset]["evaluate"])

    @property
    def models(self) -> dict[str, str]:
        """{role: model} of all models of the run, as on the command line; the gate's judge is `gate`."""
        names = {"model": self.model, "critic": self.critic, "judge": self.judge, "reader": self.reader}
        return {role: name for role, name in {**names, "gate": self.gate}.items() if name}

    def reading_of(self, files: str) -> Reading:
        """How the rows of `inputs`, `heldout` or `helpful` are read; the bundled prompts have our names."""
        bundled = {(folder / "prompts").resolve() for folder in BUNDLED.values()}
        if all(Path(name).resolve().parent in bundled for name in getattr(self, files)):
            return AS_THEY_ARE
        return self.reading.only("prompt_field", *READING_OF[files])


class _Plan:
    """The steps added so far. Files of rows are numbered in `folder`; evaluations and models are not."""

    def __init__(self, choices: Choices, folder: Path, seed: int):
        self.choices, self.folder, self.preset = choices, folder, PRESETS[choices.preset]
        self.steps: list[Step] = []
        self.numbers = count(1)
        self.limit, self.heldout_limit = (
            [] if limit is None else ["--limit", str(limit)] for limit in (choices.limit, choices.heldout_limit)
        )
        self.shared = ["--seed", str(seed), "--dtype", choices.dtype]
        self.shared += ["--device", choices.device] if choices.device else []
        self.shared += ["--overwrite"] if choices.overwrite else []

    def add(self, name: str, command: str, arguments: list[str], file: str, settings: str | None = None) -> str:
        """Add a step with the settings of the preset's entry `settings` (else of the command); returns its output."""
        path = str(self.folder / file)
        engine, batch_size = self._engine(command, arguments), self.preset["batch_size"]
        if engine:
            batch_size = IN_FLIGHT * self.choices.engine_number("--replicas")
        extra = (
            []
            if command in TRAINS
            else [
                *engine,
                *self._requests(engine, arguments),
                "--batch-size",
                str(self.choices.batch_size or batch_size),
            ]
        )
        words = [*arguments, "--output", path, *self.settings(settings or command), *extra, *self.shared]
        self.steps.append(Step(name, command, words, path))
        return path

    def _engine(self, command: str, arguments: list[str]) -> list[str]:
        """The options of --engine for a step that asks a model of this machine; [] for the others."""
        pairs = pairwise(arguments)
        models = [value for option, value in pairs if option in ("--model", "--judge", "--gate")]
        is_asked = command not in TRAINS and not all(model.startswith("openai:") for model in models)
        return list(self.choices.engine) if is_asked else []

    def _requests(self, engine: list[str], arguments: list[str]) -> list[str]:
        """The options of requests for a step that asks a server; [] for the others."""
        asks_server = engine or any(word.startswith("openai:") for word in arguments)
        return list(self.choices.requests) if asks_server else []

    def settings(self, entry: str) -> list[str]:
        """The preset's settings, with the user's choices in their place, and bounded in a smoke run."""
        words = str(self.preset[entry]).split()
        if "--max-new-tokens" in words and self.choices.max_new_tokens:
            words = _set(words, "--max-new-tokens", self.choices.max_new_tokens)
        if entry == "evaluate" and self.choices.reader:
            words = _set(words, "--by", "judge")
        if self.choices.is_smoke:
            words = _bound(words, entry, self.choices)
        return words

    def add_rows(self, name: str, command: str, arguments: list[str], settings: str | None = None) -> str:
        return self.add(name, command, arguments, f"{next(self.numbers):02d}-{name}.jsonl", settings)

    def add_evaluation(self, stage: str, model: str) -> None:
        judge = ["--judge", self.choices.model_of("reader")] if self.choices.reads_by_judge else []
        reading = self.choices.reading_of("heldout").arguments
        prompts = [*_repeat("--input", self.choices.heldout), *self.heldout_limit, *reading]
        # A smoke run has no rows to spare for each frame.
        in_frames = self.choices.frames and not self.choices.is_smoke
        frames = ["--frames", self.choices.frames, *self.settings("frames")] if in_frames else []
        arguments = [*prompts, "--model", model, *judge, *frames]
        self.add(f"evaluate-{stage}", "evaluate", arguments, f"evaluation-{stage}.jsonl")


def make_plan(choices: Choices, output: str, seed: int) -> list[Step]:
    """The steps, in order, into the folder `output`."""
    model, plan = choices.model, _Plan(choices, Path(output), seed)
    plan.add_evaluation("base", model)
    prompts = [*_repeat("--input", choices.inputs), *plan.limit, *choices.reading_of("inputs").arguments]
    if choices.frames:  # with the same seed in every step, so that a prompt keeps its frame
        prompts += ["--frames", choices.frames, "--frame-share", str(choices.frame_share)]
    responses = plan.add_rows("responses", "generate", [*prompts, "--model", model])
    critic, revised = [*name_model(choices.model_of("critic")), "--constitution", choices.constitution], responses
    by = _choose_by(choices, plan.folder, "matches.jsonl")
    gate = ["--gate", choices.gate] if choices.gate else []
    stop = ["--stop-when-content"] if choices.stops else []
    for number in range(1, choices.rounds + 1):
        critiqued = plan.add_rows(f"critique-{number}", "critique", ["--input", revised, *critic, *by, *stop])
        revised = plan.add_rows(f"revision-{number}", "revise", ["--input", critiqued, *critic, *gate, *stop])
    helpful = [*_repeat("--helpful", choices.helpful), *choices.reading_of("helpful").arguments]
    helpful += plan.limit if choices.is_smoke else []  # of the helpful rows too
    sft = plan.add("sft", "sft", ["--input", revised, *helpful, "--model", model], "sft")
    plan.add_evaluation("sft", sft)
    if choices.rl != "none":
        samples = plan.add_rows("samples", "generate", [*prompts, "--model", sft], "samples")
        # The base model's first responses add one per prompt: those of a well-behaved policy hardly differ.
        pairs = _repeat("--input", (samples, responses))
        # Both rounds and the judge ask about the same prompts: one file of matches, unless another model asks.
        is_critic = choices.model_of("judge") == choices.model_of("critic")
        by = _choose_by(choices, plan.folder, "matches.jsonl" if is_critic else "matches-judge.jsonl")
        judge = [*name_model(choices.model_of("judge")), "--constitution", choices.constitution]
        preferences = plan.add_rows("preferences", "judge", [*pairs, *judge, *by])
        plan.add_evaluation(choices.rl, _add_rl(plan, prompts, preferences, sft))
    report = str(plan.folder / "report.html")
    return [*plan.steps, Step("report", "report", [str(plan.folder)], report)]


def _add_rl(plan: _Plan, prompts: list[str], preferences: str, sft: str) -> str:
    """Add the reward model and the reinforcement learning, or DPO; returns the policy."""
    rl, limit, mix = plan.choices.rl, plan.choices.limit, plan.choices.mix
    more = ["--default-label", str(HUMAN_LABEL), *plan.choices.reading.only().arguments] if mix else []
    more += plan.limit if mix and plan.choices.is_smoke else []
    pairs = ["--input", preferences, *_repeat("--mix", mix), *more]
    if rl == "dpo":
        return plan.add("dpo", "dpo", [*pairs, "--model", sft], "dpo")
    reward = plan.add("reward-model", "reward_model", [*pairs, "--model", sft], "reward-model")
    updates, most, minibatches = plan.preset["size"][rl]  # type: ignore[index]
    if limit:  # a trial run: the few prompts once, in minibatches of equal size
        updates, most = min(updates, -(-limit // most)), min(most, limit)
        minibatches = min(minibatches, most)
        most -= most % minibatches
    updates = plan.choices.updates or updates
    if plan.choices.is_smoke and not plan.choices.updates:
        updates = min(updates, SMOKE[rl]["--updates"])
    size = ["--updates", updates, "--prompts-per-update", most, "--minibatches", minibatches]
    warmup = min(plan.preset.get("value_warmup", 0), updates - 1)  # type: ignore[call-overload]
    if rl == "ppo" and warmup:  # at least one update trains the policy
        size += ["--value-warmup", warmup]
    return plan.add(rl, rl, [*prompts, "--model", sft, "--reward-model", reward, *map(str, size)], rl)


def name_model(model: str) -> list[str]:
    """The options that name a model, with its server where it is `openai:NAME@URL`."""
    name, servers = split_endpoint(model)
    return ["--model", name, *_repeat("--endpoint", servers)]


def _choose_by(choices: Choices, folder: Path, matches: str) -> list[str]:
    """The options of how principles are chosen."""
    file = ["--matches", str(folder / matches)] if choices.principles == "match" else []
    return ["--principles", choices.principles, *file]


def _set(words: list[str], option: str, value: object) -> list[str]:
    """The words with this value of the option, which may be new."""
    if option not in words:
        return [*words, option, str(value)]
    index = words.index(option) + 1
    return [*words[:index], str(value), *words[index + 1 :]]


def _bound(words: list[str], entry: str, choices: Choices) -> list[str]:
    """The settings of a step with nothing above its bound in a smoke run."""
    bounds = {name: value for name, value in SMOKE.get(entry, {}).items() if name != "--updates"}
    if "--max-new-tokens" in words and not choices.max_new_tokens:
        bounds["--max-new-tokens"] = SMOKE_TOKENS
    if not choices.reads_by_judge:
        bounds.pop("--orders", None)
    if "--limit" in words and choices.limit:
        bounds["--limit"] = choices.limit
    for option, most in bounds.items():
        value = float(words[words.index(option) + 1]) if option in words else most
        words = _set(words, option, int(min(value, most)))
    if "--keep" in words:
        index = words.index("--keep")
        words = [*words[:index], *SMOKE_KEEP, *words[index + 2 :]]
    return words


def _repeat(option: str, values: Iterable[str]) -> list[str]:
    return [part for value in values for part in (option, value)]


def shorten_path(path: str | Path) -> str:
    """The path from the current directory if it lies below it, else absolute."""
    here, path = Path.cwd(), Path(os.path.abspath(path))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
