"""Options that training commands share, as tables; a command gives its own defaults.

    @click.command(cls=cli.Command)
    @training_options(epochs=2, learning_rate=1e-5)
    def main(options): ...

Leaves out what one command alone takes.
"""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace

import click

from cai.base import cli
from cai.constitution.frames import frame_options
from cai.data.reading import reading_options
from cai.models import estimate
from cai.train import alarms

POSITIVE = click.IntRange(min=1)
FROM_0 = click.FloatRange(min=0)
ABOVE_0 = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(0, 1)


def add_options(*decorators: Callable) -> Callable:
    """One decorator that adds several options, in their order."""

    def decorate(function):
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


pairs_options = add_options(
    click.option(
        "--mix",
        multiple=True,
        metavar="FILE=WEIGHT",
        help="More preferences, and how often each of their pairs comes in a pass over those of --input, such "
        "as human ones of helpfulness: 0.5 takes half of them each time. Repeatable.",
    ),
    click.option(
        "--labels",
        type=click.Choice(["soft", "hard"]),
        default="soft",
        show_default=True,
        help="Train to the judge's probability p_chosen, or as if the chosen response were certainly the better one.",
    ),
    click.option(
        "--default-label",
        type=click.FloatRange(0.5, 1),
        default=None,
        help="p_chosen of pairs that have none, such as human ones. Default: they are refused.",
    ),
    click.option(
        "--min-margin",
        type=SHARE,
        default=0.0,
        show_default=True,
        help="Leave out pairs whose |2 p_chosen - 1| is less: labels near a toss-up.",
    ),
)


def take_options(function: Callable) -> Callable:
    """Decorator: the command gets its options as one object, with an attribute for each."""

    @wraps(function)
    def command(**options):
        estimate.refuse_without_dry_run(options["dry_run"], "gpu")
        if options.get("labels") == "hard" and not options.get("min_margin"):
            cli.refuse_options(["default_label"], "with --labels hard every pair is certain")
        if not options["lora"]:
            cli.refuse_options(
                ["lora_rank", "merge"], "without --lora all weights are trained, and there are no adapters"
            )
        return function(SimpleNamespace(**options))

    return command


weights_options = add_options(
    click.option(
        "--lora/--full", "lora", default=False, show_default=True, help="Train low-rank adapters, or all weights."
    ),
    click.option("--lora-rank", type=POSITIVE, default=16, show_default=True, help="Rank of the adapters."),
    click.option(
        "--first-layer",
        type=click.IntRange(min=0),
        default=None,
        help="First block, from 0, that is trained; the blocks before it, the embeddings, and a head that is tied to "
        "them stay as they are. Faster; estimates of memory count everything as trained. Default: all is trained.",
    ),
)


def training_options(
    *, epochs: float, learning_rate: float, batch_size: int = 8, max_length: int = 1024, save_steps: int = 500
) -> Callable:
    """Decorator with the options of sft.py, reward_model.py and dpo.py."""
    return add_options(
        click.option("--epochs", type=ABOVE_0, default=epochs, show_default=True, help="Passes over the rows."),
        click.option(
            "--learning-rate", type=ABOVE_0, default=learning_rate, show_default=True, help="Peak of the schedule."
        ),
        click.option(
            "--batch-size",
            type=POSITIVE,
            default=batch_size,
            show_default=True,
            help="Rows in one forward pass, on each process.",
        ),
        click.option(
            "--gradient-accumulation",
            type=POSITIVE,
            default=1,
            show_default=True,
            help="Forward passes per optimizer step.",
        ),
        click.option(
            "--max-length",
            type=POSITIVE,
            default=max_length,
            show_default=True,
            help="Longest prompt and response, in tokens, at most the model's context; longer rows are left out and "
            "counted.",
        ),
        weights_options,
        click.option(
            "--save-steps",
            type=click.IntRange(min=0),
            default=save_steps,
            show_default=True,
            help="Optimizer steps between two saved states to resume from; 0: none.",
        ),
        estimate.gpu_option,
        cli.options("device", "dtype", "seed", "limit", "events", "json", "dry_run", "overwrite"),
        reading_options,
        take_options,
    )


def rl_options(
    *, prompts_per_update: int, responses: str, epochs: int, learning_rate: float, kl_coef: float
) -> Callable:
    """Decorator with the options of ppo.py and grpo.py.

    Args:
        responses: the number of responses per prompt, for --help.
    """
    return add_options(
        click.option(
            "--updates", type=POSITIVE, default=100, show_default=True, help="Rounds of sampling and training."
        ),
        click.option(
            "--prompts-per-update",
            type=POSITIVE,
            default=prompts_per_update,
            show_default=True,
            help=f"Prompts drawn for an update, {responses}.",
        ),
        click.option(
            "--epochs", type=POSITIVE, default=epochs, show_default=True, help="Passes over the rows of an update."
        ),
        click.option(
            "--minibatches",
            type=POSITIVE,
            default=1,
            show_default=True,
            help="Optimizer steps per pass; each takes the same number of rows.",
        ),
        click.option(
            "--batch-size",
            type=POSITIVE,
            default=8,
            show_default=True,
            help="Rows in one forward pass, on each process. Changes memory and speed, not the result.",
        ),
        click.option(
            "--learning-rate", type=ABOVE_0, default=learning_rate, show_default=True, help="At the start; falls to 0."
        ),
        click.option(
            "--kl-coef", type=FROM_0, default=kl_coef, show_default=True, help="Weight of the KL to the reference."
        ),
        click.option(
            "--temperature",
            type=ABOVE_0,
            default=0.7,
            show_default=True,
            help="Sampling temperature. The policy is trained at this temperature.",
        ),
        click.option(
            "--max-new-tokens", type=POSITIVE, default=256, show_default=True, help="Longest response, in tokens."
        ),
        click.option(
            "--missing-eos-penalty",
            type=FROM_0,
            default=1.0,
            show_default=True,
            help="Subtracted from the score of a response that did not end.",
        ),
        frame_options,
        weights_options,
        click.option(
            "--save-every",
            type=click.IntRange(min=0),
            default=10,
            show_default=True,
            help="Updates between two saved states to resume from; 0: none.",
        ),
        click.option(
            "--samples-every",
            type=POSITIVE,
            default=10,
            show_default=True,
            help="Updates between two that write some responses to samples.jsonl.",
        ),
        alarms.options,
        estimate.gpu_option,
        cli.options("reasoning_tags", "seed", "limit", "device", "dtype", "events", "json", "dry_run", "overwrite"),
        reading_options,
        take_options,
    )


ppo_options = add_options(
    click.option(
        "--generation-batch-size",
        type=POSITIVE,
        default=128,
        show_default=True,
        help="Rows sampled at once, on each process.",
    ),
    click.option(
        "--value-learning-rate", type=ABOVE_0, default=None, help="The value model's. Default: --learning-rate."
    ),
    click.option(
        "--value-warmup",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="First updates that train the value model alone: it begins as the reward model, whose figures before the "
        "end of a response mean nothing.",
    ),
    click.option(
        "--kl-estimator",
        type=click.Choice(["k1", "k3"]),
        default="k1",
        show_default=True,
        help="k1: the log-ratio, unbiased. k3: never negative, varies less.",
    ),
    click.option(
        "--kl-target",
        type=ABOVE_0,
        default=None,
        help="KL per response that --kl-coef is adapted to. Default: the coefficient is constant.",
    ),
    click.option(
        "--clip-range", type=ABOVE_0, default=0.2, show_default=True, help="How far from 1 the ratio has an effect."
    ),
    click.option(
        "--value-clip-range",
        type=ABOVE_0,
        default=0.2,
        show_default=True,
        help="How far a value may move from its old one.",
    ),
    click.option("--vf-coef", type=FROM_0, default=0.1, show_default=True, help="Weight of the value loss."),
    click.option("--gamma", type=SHARE, default=1.0, show_default=True, help="Discount of later rewards."),
    click.option("--lam", type=SHARE, default=0.95, show_default=True, help="Lambda of the advantage estimation."),
    click.option(
        "--scale-scores",
        is_flag=True,
        help="Divide scores by their standard deviation in the run so far, which fixes the meaning of --kl-coef.",
    ),
)
