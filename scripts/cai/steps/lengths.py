"""How long the texts of a run will be: assumed from its options, or as they were in a small finished run.

    lengths = assume(prompt=100, share=0.5)                   # answers half as long as --max-new-tokens allows
    lengths = read_run("runs/small", rounds=4)                # what --like names
    lengths.written("critique-1", most=512)                   # tokens of an answer

Leaves out everything that follows from the lengths: pricing.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai.base.errors import InputError
from cai.constitution.files import Constitution, Principle
from cai.constitution.templates import load_template
from cai.data.outputs import read_manifest
from cai.models.engine import Message
from cai.models.estimate import token_counter
from cai.steps.examples import FIELDS, Examples, default_most
from cai.steps.judging import Question


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a run's texts.

    prompt: of a user's prompt in its chat template, ready to be answered.
    share: of --max-new-tokens, the length of an answer about which `answers` knows nothing.
    answers, prompts: by step, tokens of an answer, and of all that was read for it; from a finished run.
    distinct: share of the pairs of responses whose texts differ, which is all that a judge reads.
    """

    prompt: float
    share: float = 1.0
    answers: dict[str, float] = field(default_factory=dict)
    prompts: dict[str, float] = field(default_factory=dict)
    distinct: float = 1.0

    def written(self, step: str, most: int) -> float:
        """Tokens of an answer, `most` (--max-new-tokens) at most."""
        return min(self.answers.get(step, self.share * most), most)

    def scale(self, factor: float) -> "Lengths":
        """The same texts, all longer by a factor (or shorter)."""
        return Lengths(
            self.prompt * factor,
            self.share,
            {step: tokens * factor for step, tokens in self.answers.items()},
            {step: tokens * factor for step, tokens in self.prompts.items()},
            self.distinct,
        )


def read_run(folder: str, rounds: int) -> Lengths:
    """The lengths in a finished run of run.py, by its manifests. InputError where there is none.

    A round that it lacks is taken to be like its last one, and samples that it lacks like its first responses.
    """
    tokens = {step: _counted(folder, step) for step in ("responses", "samples")}
    if not tokens["responses"]:
        raise InputError(
            "no finished run with a manifest that counts the tokens of its responses",
            where=folder,
            expected="the --output of a finished run.py (with --seeds, one of its folders)",
            remedy="Make one with --limit 40 --heldout-limit 40, and name it with --like",
        )
    tokens["samples"] = tokens["samples"] or tokens["responses"]
    for kind in ("critique", "revision"):
        last = None
        for number in range(1, rounds + 1):
            last = tokens[f"{kind}-{number}"] = _counted(folder, f"{kind}-{number}") or last
            if last is None:
                raise InputError(f"no finished {kind}-1", where=folder, remedy="Finish that run first")
    counts = (_manifest(folder, "preferences") or {}).get("counts") or {}
    pairs, identical = counts.get("pairs", 0), counts.get("identical", 0)
    means = {
        step: (count["prompt"] / count["rows"], count["new"] / count["rows"]) for step, count in tokens.items() if count
    }
    return Lengths(
        prompt=means["responses"][0],
        answers={step: new for step, (_, new) in means.items()},
        prompts={step: prompt for step, (prompt, _) in means.items()},
        distinct=pairs / (pairs + identical) if pairs else 1.0,
    )


def _manifest(folder: str, step: str) -> dict[str, Any] | None:
    """The manifest of a step whose output is `NN-<step>.jsonl`."""
    for path in sorted(Path(folder).glob(f"[0-9][0-9]-{step}.jsonl")):
        return read_manifest(path)
    return None


def _counted(folder: str, step: str) -> dict[str, int] | None:
    """{rows, prompt, new} of a finished step; None if it has none."""
    tokens = (_manifest(folder, step) or {}).get("tokens") or {}
    return tokens if tokens.get("rows") else None


class Requests:
    """Tokens of a step's request without the texts of the row: the template, the principle, the worked examples.

    model: whose tokenizer counts; by characters where it is not on disk.
    principles: draw, match or all, as in run.py.
    """

    def __init__(self, model: str, constitution: Constitution, principles: str):
        self._model, self._count = model, token_counter(model)
        self.constitution, self._principles = constitution, principles
        self.chat = self._mean([[{"role": "user", "content": ""}]])

    def of_round(self, template: str, answer: str, most_examples: int | None) -> float:
        """Of a critique or revision (a key of `FIELDS`), averaged over the principles by weight."""
        loaded, most = load_template(template), default_most(most_examples, self._model)
        examples = Examples(self.constitution, loaded, answer, most)
        empty = dict.fromkeys(FIELDS[answer][:-1], "")
        return self._by_principle(lambda each: examples.add(each, loaded.render(principle=each, **empty)))

    def of_comparison(self, template: str, most_examples: int | None) -> float:
        """Of one order of a comparison."""
        question = Question(self.constitution, load_template(template), most_examples=most_examples)
        empty = {"prompt": "", "response_a": "", "response_b": ""}
        return self._by_principle(lambda principle: question.choose(empty, "ab", principle))

    def of_class(self) -> float:
        """Of the question what a response does."""
        return self._mean([load_template("classify").render(prompt="", response="")])

    def of_match(self) -> float:
        """Of the question whether a principle speaks to a prompt, averaged over all principles."""
        template = load_template("coverage")
        return self._mean([template.render(principle=p, prompt="") for p in self.constitution.principles])

    def _by_principle(self, render) -> float:
        if self._principles == "all":
            return self._mean([render(self.constitution.combine())])
        principles: Sequence[Principle] = self.constitution.principles
        return self._mean([render(principle) for principle in principles], [p.weight for p in principles])

    def _mean(self, talks: Sequence[Sequence[Message]], weights: Sequence[float] | None = None) -> float:
        weights = weights or [1.0] * len(talks)
        counts = self._count(talks)
        return sum(weight * count for weight, count in zip(weights, counts, strict=True)) / sum(weights)
