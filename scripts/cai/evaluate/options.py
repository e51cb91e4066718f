"""Options of evaluate.py that belong together, as decorators.

    @gate_options
    def main(against, watch, gated, margin, no_worse_than, unqualified, ...): ...

Leaves out what they do: gate.py, benchmarks.py, pairs.py.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from cai.constitution.frames import SPLITS
from cai.evaluate import benchmarks

_Function = TypeVar("_Function", bound=Callable[..., Any])


def gate_options(function: _Function) -> _Function:
    """Decorator: an earlier evaluation to compare with, and when that is a failure."""
    for option in (
        click.option(
            "--unqualified",
            is_flag=True,
            help="With --gate: compare although the judge is unfit to read what responses do.",
        ),
        click.option(
            "--no-worse-than",
            type=click.FloatRange(0, 100, min_open=True),
            default=None,
            metavar="POINTS",
            help="With --gate: may the model replace the one before? Only if every figure's interval excludes a loss "
            "of more than these percentage points; else exit with 4.",
        ),
        click.option(
            "--margin",
            type=click.FloatRange(0, 100),
            default=0.0,
            show_default=True,
            help="Percentage points that a figure may change without being called better or worse.",
        ),
        click.option(
            "--gate",
            "gated",
            is_flag=True,
            help="With --against: print one line VERDICT at the end, and exit with 4 if it is worse, or if there are "
            "too few prompts to tell.",
        ),
        click.option(
            "--watch",
            is_flag=True,
            help="With --against: report signs that the policy learned to please its judge, such as phrases that "
            "became a habit.",
        ),
        click.option(
            "--against", metavar="FILE", help="An earlier --output: report what has changed since, with intervals."
        ),
    ):
        function = option(function)
    return function


def frame_options(function: _Function) -> _Function:
    """Decorator: the frames that prompts are asked in, in addition to the plain prompts."""
    for option in (
        click.option(
            "--frame-prompts",
            type=click.IntRange(min=1),
            default=None,
            help="With --frames: prompts of each kind that each frame is asked with, drawn by hashing.  [default: all]",
        ),
        click.option(
            "--frame-split",
            type=click.Choice([*SPLITS, "all"]),
            default="all",
            show_default=True,
            help="With --frames: the frames that are seen in training, those that are held out, or all.",
        ),
        click.option(
            "--frames",
            metavar="NAME|FILE",
            help="Also ask the prompts in frames, and report each frame and the worst: a YAML file, or `frames` for "
            "the bundled one.",
        ),
    ):
        function = option(function)
    return function


def other_options(function: _Function) -> _Function:
    """Decorator: what is measured instead of the responses to prompts: choices, pairs, a reward model."""
    for option in (
        click.option(
            "--samples",
            type=click.IntRange(min=0),
            default=None,
            help="With --pairs: texts per prompt, the first one greedy. Default: 1.",
        ),
        click.option("--reference", metavar="MODEL", help="With --pairs: the model before training, to compare with."),
        click.option(
            "--pairs",
            metavar="FILE",
            help="Instead of --input: pairs with `chosen` and `rejected`, or with gold. Which one does --model make "
            "likelier, "
            "and what does it write itself?",
        ),
        click.option(
            "--choice-format",
            type=click.Choice(benchmarks.FORMS),
            default="chat",
            show_default=True,
            help="Ask in a user turn with a prefilled answer, or continue the plain text, as for a pretrained model.",
        ),
        click.option(
            "--choice",
            metavar="FILE",
            help="Instead of --input: questions with `prompt`, `corrects` and `incorrects`, from which --model chooses "
            "the likeliest answer; the format of the paper's three evaluation sets.",
        ),
        click.option(
            "--reward-model",
            metavar="FOLDER",
            help="Measure this reward model: its accuracy on pairs with response_a, response_b and gold, on those "
            "with chosen and rejected (HH-RLHF's too), or on the text_correct and text_incorrect of --choice.",
        ),
    ):
        function = option(function)
    return function
