"""The plan of the whole method: every step with its command line, from prompts to the report.

    for step in make_plan(Choices(model="tiny", ...), "runs/tiny", seed=0): print(step.line)

The plan follows from the choices alone. Leaves out running it (run.py) and choices inside a step: change PRESETS, or
run the script that `run.py --dry-run` prints.
"""

import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from cai.base.paths import SCRIPTS, TINY
from cai.data.reading import AS_THEY_ARE, Reading

TRAINS = ("sft", "reward_model", "ppo", "dpo", "grpo")

# The settings of each step. A critique that found no fault leaves the response as it was: from such copies
# of harmless rows SFT learns to stay helpful, hence `--keep copy`. Pairs are sampled hotter than answers are,
# because two that are alike teach a reward model nothing. `batch_size` is that of the steps that write or
# judge text; `size`: updates, prompts in each, and minibatches.
PRESETS = {
    "tiny": {
        "batch_size": 64,
        "generate": "--temperature 0.5 --max-new-tokens 96",
        "critique": "--temperature 0.3 --max-new-tokens 96 --examples 0",
        "revise": "--temperature 0.3 --max-new-tokens 96 --examples 0",
        "sft": "--keep copy --epochs 4 --learning-rate 1e-3 --batch-size 32 --max-length 512",
        "samples": "--samples 4 --temperature 1.3 --max-new-tokens 96",
        "judge": "--pairs-per-prompt 5",
        "reward_model": "--epochs 1 --learning-rate 5e-4 --batch-size 32 --max-length 512",
        "size": {"ppo": (24, 64, 4), "grpo": (20, 16, 1)},
        "ppo": "--epochs 1 --batch-size 32 --learning-rate 8e-5 --temperature 1.0 --max-new-tokens 96",
        "dpo": "--epochs 1 --learning-rate 1e-4 --batch-size 32 --max-length 512",
        "grpo": "--samples 4 --batch-size 64 --learning-rate 1e-4 --max-new-tokens 96",
        "evaluate": "--by oracle --temperature 0.7 --max-new-tokens 96",
    },
    "default": {
        "batch_size": 32,
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
    },
}


# The options of how rows are read that are for a kind of files, beside --prompt-field.
READING_OF = {"inputs": (), "heldout": ("kind_field", "kind", "form"), "helpful": ("response_field",)}

BUNDLED = (TINY / "prompts").resolve()


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

    `limit` is that of the prompts to train on, `heldout_limit` that of the prompts to measure on.
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

    def reading_of(self, files: str) -> Reading:
        """How the rows of `inputs`, `heldout` or `helpful` are read; the bundled prompts have our names."""
        if all(Path(name).resolve().parent == BUNDLED for name in getattr(self, files)):
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
        batch_size = str(self.choices.batch_size or self.preset["batch_size"])
        extra = [] if command in TRAINS else ["--batch-size", batch_size]
        preset = str(self.preset[settings or command]).split()
        self.steps.append(Step(name, command, [*arguments, "--output", path, *preset, *extra, *self.shared], path))
        return path

    def add_rows(self, name: str, command: str, arguments: list[str], settings: str | None = None) -> str:
        return self.add(name, command, arguments, f"{next(self.numbers):02d}-{name}.jsonl", settings)

    def add_evaluation(self, stage: str, model: str) -> None:
        judge = ["--judge", self.choices.model] if "--by judge" in str(self.preset["evaluate"]) else []
        reading = self.choices.reading_of("heldout").arguments
        prompts = [*_repeat("--input", self.choices.heldout), *self.heldout_limit, *reading]
        arguments = [*prompts, "--model", model, *judge]
        self.add(f"evaluate-{stage}", "evaluate", arguments, f"evaluation-{stage}.jsonl")


def make_plan(choices: Choices, output: str, seed: int) -> list[Step]:
    """The steps, in order, into the folder `output`."""
    model, plan = choices.model, _Plan(choices, Path(output), seed)
    plan.add_evaluation("base", model)
    prompts = [*_repeat("--input", choices.inputs), *plan.limit, *choices.reading_of("inputs").arguments]
    responses = plan.add_rows("responses", "generate", [*prompts, "--model", model])
    base, revised = ["--model", model, "--constitution", choices.constitution], responses
    # One file of matches: both rounds and the judge ask about the same prompts.
    shared_matches = ["--matches", str(plan.folder / "matches.jsonl")] if choices.principles == "match" else []
    by = ["--principles", choices.principles, *shared_matches]
    gate = ["--gate", choices.gate] if choices.gate else []
    stop = ["--stop-when-content"] if choices.stops else []
    for number in range(1, choices.rounds + 1):
        critiqued = plan.add_rows(f"critique-{number}", "critique", ["--input", revised, *base, *by, *stop])
        revised = plan.add_rows(f"revision-{number}", "revise", ["--input", critiqued, *base, *gate, *stop])
    helpful = [*_repeat("--helpful", choices.helpful), *choices.reading_of("helpful").arguments]
    sft = plan.add("sft", "sft", ["--input", revised, *helpful, "--model", model], "sft")
    plan.add_evaluation("sft", sft)
    if choices.rl != "none":
        samples = plan.add_rows("samples", "generate", [*prompts, "--model", sft], "samples")
        # The base model's first responses add one per prompt: those of a well-behaved policy hardly differ.
        pairs = _repeat("--input", (samples, responses))
        preferences = plan.add_rows("preferences", "judge", [*pairs, *base, *by])
        plan.add_evaluation(choices.rl, _add_rl(plan, prompts, preferences, sft))
    report = str(plan.folder / "report.html")
    return [*plan.steps, Step("report", "report", [str(plan.folder)], report)]


def _add_rl(plan: _Plan, prompts: list[str], preferences: str, sft: str) -> str:
    """Add the reward model and the reinforcement learning, or DPO; returns the policy."""
    rl, limit = plan.choices.rl, plan.choices.limit
    if rl == "dpo":
        return plan.add("dpo", "dpo", ["--input", preferences, "--model", sft], "dpo")
    reward = plan.add("reward-model", "reward_model", ["--input", preferences, "--model", sft], "reward-model")
    updates, most, minibatches = plan.preset["size"][rl]  # type: ignore[index]
    if limit:  # a trial run: the few prompts once, in minibatches of equal size
        updates, most = min(updates, -(-limit // most)), min(most, limit)
        minibatches = min(minibatches, most)
        most -= most % minibatches
    size = ["--updates", updates, "--prompts-per-update", most, "--minibatches", minibatches]
    return plan.add(rl, rl, [*prompts, "--model", sft, "--reward-model", reward, *map(str, size)], rl)


def _repeat(option: str, values: Iterable[str]) -> list[str]:
    return [part for value in values for part in (option, value)]


def shorten_path(path: str | Path) -> str:
    """The path from the current directory if it lies below it, else absolute."""
    here, path = Path.cwd(), Path(os.path.abspath(path))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
