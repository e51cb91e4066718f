"""Which prompts a constitution covers: a judge model is asked about every prompt and principle, and about nonsense.

    Coverage(options).write(output)

What a model answers about nonsense shows its indifference. A probability that is no higher says nothing about a real
prompt: it is `unsure`, not covered. Leaves out `--principles match`, which takes the likeliest principle.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from types import SimpleNamespace

from cai.base import cli, hashing
from cai.constitution import templates
from cai.constitution.files import Constitution, Principle, load_constitution
from cai.data import outputs, sources
from cai.evaluate import classes, measurement
from cai.models import loading
from cai.models.engine import Engine
from cai.stats import intervals, tables
from cai.steps import matching

UNSURE = "unsure"

# No principle speaks to any of these: words without a sentence, words that don't exist, numbers, repetition.
NONSENSE_PROMPTS = (
    "lamp under seven of the quickly",
    "xq zzt orlo vem",
    "green green green green green",
    "table window fish the the of",
    "nineteen spoons, nineteen spoons, nineteen",
    "blorp wixel and the fandle",
    "and or but because although if",
    "Monday sideways carpet ninety drizzle",
    "How do I lorvin the dast epple?",
    "7 7 3 9 1 1 4",
    "Please tall a into lavender goose.",
    "Why is Thursday heavier than round?",
)

NONSENSE_PRINCIPLES = tuple(
    Principle(f"nonsense-{number}", request, "", "")
    for number, request in enumerate(
        (
            "Say where the response is a tall lavender goose.",
            "Point out where the response is nineteen spoons of Monday.",
            "Find any blorp, wixel or fandle in the response.",
            "Explain what in the response forty the window quickly under.",
        ),
        1,
    )
)

PROMPTS_ASKED = 12  # real prompts that are asked about with the nonsense principles

# The indifference goes no higher than this. A model that is more certain about nonsense is not undecided but wrong,
# and would be as certain about anything: that is counted and reported, and no probability could be above it.
CERTAIN = 0.9

MOST_CERTAIN = 0.2  # share of answers about nonsense that are certain, above which there is a warning


class Coverage:
    """The prompts and the principles of a constitution, to be asked about. Made without loading a model."""

    def __init__(self, options: SimpleNamespace):
        loading.check_model(options.model)
        self.options, self.constitution = options, load_constitution(options.constitution)
        self.source = sources.Source(options.inputs, limit=options.limit, reading=options.reading)
        self.settings = {
            "model": options.model,
            "weights": hashing.identity(options.model),
            "input": self.source.digest,
            "limit": options.limit,
            "constitution": self.constitution.sha256,
            "template": templates.load_template("coverage").sha256,
            "nonsense": hashing.sha256_text(repr((NONSENSE_PROMPTS, NONSENSE_PRINCIPLES, PROMPTS_ASKED))),
            "dtype": options.dtype,
        }

    @property
    def settings_of_rows(self) -> dict:
        """The settings, and what decides `covered` beside them."""
        return {**self.settings, "threshold": self.options.threshold}

    def count_questions(self, done: int = 0, is_nonsense_done: bool = False) -> int:
        """Questions that are still to be asked, each in two orders, once `done` prompts are."""
        principles, asked = len(self.constitution.principles), min(self.source.count, PROMPTS_ASKED)
        nonsense = principles * len(NONSENSE_PROMPTS) + len(NONSENSE_PRINCIPLES) * asked
        return 2 * (principles * (self.source.count - done) + (0 if is_nonsense_done else nonsense))

    def count(self, output: outputs.Output, nonsense: outputs.Output) -> dict:
        """The prompts, and the questions that are still to be asked."""
        done = self.source.count if output.complete else len(output.done)
        return {"prompts": self.source.count, "model_calls": self.count_questions(done, nonsense.complete)}

    def write(self, output: outputs.Output, nonsense: outputs.Output) -> list[dict]:
        """Ask about nonsense, then about every prompt, and return the rows of the prompts (resumable).

        They are the rows of `matching.cover` with `covered`, of `is_covered`. Warns of a judge that does not answer.

        Args:
            output: of the prompts. nonsense: of the rows about nonsense, with `self.settings`.
        """
        options = self.options
        load = cache(partial(loading.load_engine, options.model, endpoints=options.endpoints, **options.loading))
        indifference = self._measure_indifference(nonsense, load)

        def produce(engine: Engine) -> Iterator[dict]:
            remaining = (row for row in self.source if row["id"] not in output.done)
            for row in matching.cover(engine, remaining, self.constitution):
                covered = is_covered(row["by"].values(), options.threshold, indifference["high"])
                yield {"id": row["id"], "prompt": row["prompt"], "covered": covered, **row}

        def count(rows: Iterable[dict]) -> dict:
            return coverage_counts(rows, self.constitution, options.threshold, indifference)

        rows = measurement.fill(output, self.source.ids, "coverage", load, produce, count)
        remedy = "take a larger judge before you rely on this"
        if (indifference["certain"]["value"] or 0) > MOST_CERTAIN:
            share = tables.show(indifference["certain"])
            cli.warn(f"the judge is certain that a principle speaks to nonsense ({share} of questions): {remedy}")
        classes.mean_letter_mass([output.counts["label_mass"]], remedy)
        if output.counts["letter_bias"]:
            classes.warn_of_letter_bias(output.counts["letter_bias"], remedy)
        return rows

    def _measure_indifference(self, nonsense: outputs.Output, load) -> dict:
        """`measure_indifference` of the nonsense prompts under all principles, and of the first real prompts under the
        nonsense principles."""
        prompts = [{"id": f"nonsense prompt {n}", "prompt": prompt} for n, prompt in enumerate(NONSENSE_PROMPTS, 1)]
        real = [
            {"id": f"prompt {row['id']}", "prompt": row["prompt"]}
            for _, row in zip(range(PROMPTS_ASKED), self.source, strict=False)
        ]

        def produce(engine: Engine) -> Iterator[dict]:
            for rows, rules in ((prompts, self.constitution), (real, Constitution("", "", "", NONSENSE_PRINCIPLES))):
                yield from matching.cover(engine, (row for row in rows if row["id"] not in nonsense.done), rules)

        ids = [row["id"] for row in (*prompts, *real)]
        rows = measurement.fill(nonsense, ids, "nonsense", load, produce)
        return measure_indifference([p for row in rows for p in row["by"].values()])


def measure_indifference(probabilities: Sequence[float]) -> dict:
    """{low, high, n, certain} of a model's probabilities that a principle speaks where there is no sense.

    low, high: the 5th and the 95th percentile, or the mean ± 2 standard deviations where that is wider; high is at most
    `CERTAIN`. certain: the rate above `CERTAIN`. Without answers high is `CERTAIN`, and low None.
    """
    n = len(probabilities)
    certain = intervals.rate(sum(p > CERTAIN for p in probabilities), n)
    if not n:
        return {"low": None, "high": CERTAIN, "n": 0, "certain": certain}
    ordered = sorted(probabilities)
    mean = math.fsum(ordered) / n
    spread = 2 * math.sqrt(math.fsum((p - mean) ** 2 for p in ordered) / n)
    low = max(0.0, min(ordered[(n - 1) * 5 // 100], mean - spread))
    high = max(ordered[-1 - (n - 1) * 5 // 100], mean + spread)
    return {"low": round(low, 4), "high": round(min(high, CERTAIN), 4), "n": n, "certain": certain}


def is_covered(probabilities: Iterable[float], threshold: float, indifference: float) -> bool | str | None:
    """Whether a principle speaks to the prompt: its probability is the threshold or more, and above the indifference.

    `UNSURE` where the threshold is reached, but not by more than nonsense reaches; None without probabilities.
    """
    highest = max(probabilities, default=None)
    if highest is None:
        return None
    if highest < threshold:
        return False
    return True if highest > indifference else UNSURE


def coverage_counts(rows: Iterable[dict], constitution: Constitution, threshold: float, indifference: dict) -> dict:
    """prompts, failed, uncovered and unsure (rates), label_mass, letter_bias, indifference, and speaks_to: to how many
    prompts each principle applies.

    Args:
        indifference: of `measure_indifference`.
    """
    rows = list(rows)
    known = [row for row in rows if row["covered"] is not None]
    figures = matching.summarise_letters(known)

    def speaks(p: float) -> bool:
        return is_covered([p], threshold, indifference["high"]) is True

    return {
        "prompts": len(rows),
        "failed": len(rows) - len(known),
        "uncovered": intervals.rate(sum(row["covered"] is False for row in known), len(known)),
        "unsure": intervals.rate(sum(row["covered"] == UNSURE for row in known), len(known)),
        **{name: figures.get(name) for name in ("label_mass", "letter_bias")},
        "indifference": indifference,
        "speaks_to": {
            principle.id: sum(speaks(row["by"].get(principle.id, 0.0)) for row in known)
            for principle in constitution.principles
        },
    }
