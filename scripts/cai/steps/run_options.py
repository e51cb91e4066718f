"""The options of run.py, as one table, and what is wrong with them before a step has begun.

    @click.command(cls=cli.Command)
    @run_options.options
    def main(output, ..., **options):
        choices = run_options.choose(terms, **options)

Leaves out what they lead to (plan.py), and the price of a run (pricing.py).
"""

from collections.abc import Callable
from typing import Any

import click

from cai.base import cli, engine_options, requests
from cai.base.errors import InputError
from cai.base.paths import TINY
from cai.constitution.files import load_constitution
from cai.constitution.frames import frame_options, read_framing
from cai.data import preferences
from cai.data.reading import reading_options
from cai.data.sources import Source
from cai.models import loading
from cai.steps import content, gating, pricing
from cai.steps import principles as choosing
from cai.steps.plan import BUNDLED, HUMAN_LABEL, PRESETS, Choices, shorten_path

NO_FRAMES = "none"  # as --frames: the bundled prompts are asked without the bundled frames

# The models beside --model, and what they do.
_ROLES = {
    "critic": "Criticises and revises responses",
    "judge": "Compares responses for the preferences",
    "reader": "Says what the responses do in the evaluations, with every preset",
}


def _role_option(role: str) -> Callable:
    return click.option(
        f"--{role}",
        metavar="MODEL",
        help=f"{_ROLES[role]}: a folder, a hub id, `tiny`, or openai:NAME@URL.  [default: --model"
        f"{'; the oracle of preset tiny' if role == 'reader' else ''}]",
    )


_TABLE = (
    cli.options("model", "engine"),
    *map(_role_option, _ROLES),
    requests.patience_options,
    click.option("--output", required=True, metavar="FOLDER", help="Folder for all outputs."),
    cli.options("constitution"),
    cli.rows_option(
        "--input",
        "inputs",
        help="Prompts to train on, harmful and harmless; bundled for `tiny` and `smollm2`. Repeatable.",
    ),
    cli.rows_option(
        "--heldout", help="Prompts with their kind to measure on; bundled for `tiny` and `smollm2`. Repeatable."
    ),
    cli.rows_option("--helpful", help="Rows with a helpful `response` to mix into SFT. Repeatable."),
    click.option(
        "--mix",
        multiple=True,
        metavar="FILE[=WEIGHT]",
        help="Pairs with `chosen` and `rejected` that the reward model or DPO learns from beside the judge's, such as "
        "human ones of helpfulness, and how often each comes in a pass over those: 0.5 takes half of them each time, "
        "1 is the default. Without a p_chosen they count as certain. Repeatable.",
    ),
    frame_options,
    choosing.principles_option("draw", "match", "all"),
    gating.gate_option,
    content.stop_option,
    click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=None,
        help="Rounds of critique and revision. Default: the preset's, 2; with `tiny` and `smollm2` 1.",
    ),
    click.option(
        "--rl",
        type=click.Choice(["ppo", "dpo", "grpo", "none"]),
        default="ppo",
        show_default=True,
        help="What follows SFT; none ends there.",
    ),
    click.option(
        "--updates",
        type=click.IntRange(min=1),
        default=None,
        help="Rounds of sampling and training of PPO or GRPO. Default: the preset's, fewer with --limit.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=None,
        help="Longest answer of every step, in tokens. Default: the preset's.",
    ),
    click.option(
        "--seeds",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Number of complete runs, with the seeds from --seed on; prints mean and range.",
    ),
    click.option(
        "--smoke",
        "is_smoke",
        is_flag=True,
        help="Run every step on a handful of rows and few tokens, within minutes, into OUTPUT/smoke; then look for "
        "signs of life. Measures no model's fitness. For use before a costly run.",
    ),
    click.option(
        "--preset",
        type=click.Choice(list(PRESETS)),
        default=None,
        help="Settings of the steps. Default: the one named like the model, else `default`.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=None,
        help="Rows in one forward pass of the steps that write or judge text. Default: the preset's.",
    ),
    click.option(
        "--unqualified", is_flag=True, help="Run although a model is unfit to read, judge or criticise responses."
    ),
    click.option(
        "--heldout-limit",
        type=click.IntRange(min=1),
        default=None,
        help="Measure on the first N held-out prompts only; --limit is for the prompts of --input.",
    ),
    cli.options("reasoning_tags", "seed", "limit", "device", "dtype", "events", "json", "dry_run", "overwrite"),
    pricing.options,
    reading_options,
)


def options(function: Callable) -> Callable:
    """Decorator: all options of run.py; those of `pricing.Terms` are passed on as `terms`."""
    for option in reversed(_TABLE):
        function = option(function)
    return function


def choose(
    terms: pricing.Terms,
    *,
    model: str,
    inputs: Any,
    heldout: Any,
    preset: str | None,
    rounds: int | None,
    stops: bool,
    **options: Any,
) -> Choices:
    """The choices, with the bundled prompts, frames, preset and adapters for a model that has them. InputError for
    another without prompts."""
    inputs, heldout = terms.fill_in(model, inputs, heldout)
    files = {"--input": (inputs, "train.jsonl"), "--heldout": (heldout, "heldout.jsonl")}
    for option, (names, _) in files.items():
        if model not in BUNDLED and not names:
            raise InputError(
                f"no {option}",
                expected="a file of prompts",
                remedy=f"Only --model tiny and smollm2 have bundled prompts; give {option} FILE, or --dry-run with "
                "--prompts N",
            )
    has_own_prompts, folder = bool(inputs or heldout), BUNDLED.get(model)
    if folder:
        inputs, heldout = (names or (shorten_path(folder / "prompts" / file),) for names, file in files.values())
    for role in ("critic", "judge"):
        if folder and (folder / role).is_dir() and (role == "critic" or options["rl"] != "none"):
            options[role] = options[role] or shorten_path(folder / role)
    preset = preset or (model if model in PRESETS else "default")
    settings = PRESETS[preset]
    if model == "tiny" and not has_own_prompts and options["frames"] is None:
        options["frames"] = shorten_path(TINY / "frames.yaml")
    elif options["frames"] == NO_FRAMES:
        options["frames"] = None
    options["mix"] = tuple("{}={:g}".format(*preferences.split_weight(text, 1.0)) for text in options["mix"])
    words = {"engine": engine_options.command_options(), "requests": requests.command_options()}
    servers = {name: tuple(options) for name, options in words.items()}
    return Choices(
        model=model,
        inputs=inputs,
        heldout=heldout,
        preset=preset,
        rounds=rounds or int(str(settings["rounds"])),
        stops=stops or bool(settings.get("stop")),
        **servers,
        **options,
    )


def check_inputs(choices: Choices) -> None:
    """Refuse options without effect and bad input now, rather than hours later when its step comes."""
    if choices.rl not in ("ppo", "grpo"):
        cli.refuse_options(["updates"], f"--rl {choices.rl} has none")
    if choices.rl == "none":
        cli.refuse_options(["judge", "mix"], "--rl none compares no responses")
    if "llama.cpp" in choices.engine:
        raise InputError(
            "llama.cpp can't serve what this run trains",
            where="--engine",
            expected="an engine that reads safetensors",
            remedy="Take vllm, or give llama.cpp to single steps",
        )
    for role, model in choices.models.items():
        _check_model(f"--{role}", model)
    _check_blocks(choices)
    load_constitution(choices.constitution)
    read_framing(choices.frames, choices.frame_share, seed=0)
    of_files = {"inputs": (("prompt",), choices.limit), "heldout": (("prompt", "kind"), choices.heldout_limit)}
    for files, (fields, limit) in of_files.items():
        if pricing.is_file(choices, files):
            Source(getattr(choices, files), require=fields, limit=limit, reading=choices.reading_of(files))
    if choices.helpful:
        Source(choices.helpful, require=("prompt", "response"), reading=choices.reading_of("helpful"))
    for file in preferences.read_weights((), choices.mix):
        preferences.read_pairs([file], "soft", None, default_label=HUMAN_LABEL, reading=choices.reading.only())


def _check_blocks(choices: Choices) -> None:
    """InputError where the preset's reinforcement learning trains from a block on that the model does not have."""
    words = str(PRESETS[choices.preset].get(choices.rl, "")).split()
    if "--first-layer" not in words or pricing.is_size(choices.model):
        return
    first, blocks = int(words[words.index("--first-layer") + 1]), loading.read_blocks(choices.model)
    if first >= blocks:
        raise InputError(
            f"the preset {choices.preset} trains from block {first} on, and {choices.model} has {blocks}",
            where=f"--rl {choices.rl}",
            remedy="Take another --preset or --rl, or run the script of --dry-run with another --first-layer",
        )


def _check_model(option: str, model: str) -> None:
    """InputError for a model that is not there, and for a server where none can be or without its address."""
    if pricing.is_size(model):
        return
    name, servers = loading.split_endpoint(model)
    is_server = name.startswith("openai:")
    if option == "--model" and is_server:
        raise InputError(
            f"{model} is on a server",
            where=option,
            expected="a folder, a hub id or `tiny`, because this model is trained",
            remedy="Name a server as --critic, --judge, --reader or --gate",
        )
    if is_server and not servers:
        raise InputError(
            f"{model} without its server",
            where=option,
            expected=f"{model}@URL, such as {name}@http://localhost:8000/v1",
            remedy="Add @ and the server's address to the name",
        )
    loading.check_model(name)
