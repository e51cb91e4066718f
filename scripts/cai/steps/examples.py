"""Worked rounds of a constitution, shown to the model as earlier turns of the conversation.

    examples = Examples(constitution, template, "critique", most=None)
    examples.fit(engine, new_tokens)
    conversation = examples.add(principle, conversation)

Each example is put as the row is, by the same template, and answered by what it says (few-shot, paper, section 3.1).
As many are shown as fit the model's context, the first ones first. Leaves out worked comparisons (judging.py).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from cai.base import cli
from cai.base.errors import InputError
from cai.constitution import files, templates
from cai.models.engine import Engine, Message

# What an example must have to be shown to each step; the last one is the answer.
FIELDS = {"critique": ("prompt", "response", "critique"), "revision": ("prompt", "response", "critique", "revision")}


def default_most(most: int | None, model: str) -> int | None:
    """How many examples to show at most: by default all, and none to `tiny`, whose context they would fill."""
    return 0 if most is None and model == "tiny" else most


class Examples:
    """The worked rounds that a step shows before each row.

    Args:
        answer: a key of `FIELDS`: what the step writes.
        most: how many to show at most; None: all.

    Attributes:
        shown: in how many conversations which number of examples was shown, of which number that there are for its
            principle. Those that do not fit without any example are not counted.

    Raises InputError if some are asked for, and the constitution has none with the fields.
    """

    def __init__(
        self, constitution: files.Constitution, template: templates.Template, answer: str, most: int | None = None
    ):
        self.template, self.answer, self.most = template, answer, most
        self.shown: Counter[tuple[int, int]] = Counter()
        self._turns: dict[str, list[list[Message]]] = {}  # by principle
        self._engine: Engine | None = None
        self._limit = 0
        every = [example for principle in constitution.principles for example in principle.examples]
        self.exist = any(map(self._is_usable, every))
        if most and not self.exist:
            raise InputError(
                f"no worked example of a {answer} in the constitution {constitution.name}",
                where="--examples",
                expected=f"examples with {', '.join(FIELDS[answer])}",
                remedy="Add some, or leave --examples out",
            )

    def fit(self, engine: Engine, new_tokens: int) -> None:
        """From now on, show only as many as leave room for `new_tokens` in the engine's context."""
        self._engine, self._limit = engine, (engine.context or 0) - new_tokens

    def check(self, rows: Iterable[tuple[files.Principle, Sequence[Message]]]) -> None:
        """Raise InputError if examples are asked for, and not one fits any row: (its principle, its conversation)."""
        if not self.most or self._engine is None or self._engine.context is None:
            return
        if not any(self._count_fitting(principle, conversation) for principle, conversation in rows):
            raise InputError(
                f"not one worked example fits the model's context of {self._engine.context} beside any row",
                where="--examples",
                remedy="Leave it out, shorten the examples, or take a smaller --max-new-tokens",
            )

    def add(self, principle: files.Principle, conversation: Sequence[Message]) -> Sequence[Message]:
        """The conversation about a row with the examples in front, after a system message."""
        if self.most == 0 or not self.exist:
            return conversation
        count = self._count_fitting(principle, conversation)
        if count or self._fits(conversation):
            self.shown[count, len(self._turns_of(principle))] += 1
        return self._join(principle, conversation, count)

    def count_shown(self, counters: Iterable[Counter[tuple[int, int]]]) -> dict[str, dict[str, int]]:
        """The entry `examples_shown` of a summary, {} where there was nothing to show; warns where not all fitted.

        Args:
            counters: `shown` of each process.
        """
        total: Counter[int] = Counter()
        fewer = 0
        for counter in counters:
            for (count, available), rows in counter.items():
                total[count] += rows
                fewer += rows if count < available else 0
        if fewer:
            cli.warn(f"not all worked examples fit the model's context in {fewer} rows")
        return {"examples_shown": {str(count): total[count] for count in sorted(total)}} if total else {}

    def _count_fitting(self, principle: files.Principle, conversation: Sequence[Message]) -> int:
        count = len(self._turns_of(principle))
        while count and not self._fits(self._join(principle, conversation, count)):
            count -= 1
        return count

    def _fits(self, conversation: Sequence[Message]) -> bool:
        if self._engine is None or self._engine.context is None:
            return True
        chat: Any = self._engine.chat  # type: ignore[attr-defined]  # what has a context has a tokenizer
        text = chat.render(conversation)
        # No tokenizer makes more tokens than bytes: most conversations need not be counted.
        return len(text.encode()) <= self._limit or len(chat.encode(text)) <= self._limit

    def _join(self, principle: files.Principle, conversation: Sequence[Message], count: int) -> Sequence[Message]:
        system = [message for message in conversation[:1] if message["role"] == "system"]
        turns = [turn for example in self._turns_of(principle)[:count] for turn in example]
        return [*system, *turns, *conversation[len(system) :]]

    def _turns_of(self, principle: files.Principle) -> list[list[Message]]:
        """The turns of each example that a row of this principle may be shown."""
        if principle.id not in self._turns:
            usable = list(filter(self._is_usable, principle.examples))[: self.most]
            self._turns[principle.id] = [self._put(principle, example) for example in usable]
        return self._turns[principle.id]

    def _is_usable(self, example: dict) -> bool:
        return all(name in example for name in FIELDS[self.answer])

    def _put(self, principle: files.Principle, example: dict) -> list[Message]:
        """An example as the template puts it, under its own requests where it has them, and its answer.

        In a prompt for a critique, a template with the block `example_revision` goes on to the revision, as the paper
        does.
        """
        principle = replace(
            principle,
            critique=example.get("critique_request", principle.critique),
            revision=example.get("revision_request", principle.revision),
        )
        fields = {name: example[name] for name in FIELDS[self.answer][:-1]}
        turns = [turn for turn in self.template.render(principle=principle, **fields) if turn["role"] != "system"]
        prefill = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
        turns.append({"role": "assistant", "content": prefill + example[self.answer]})
        question = self.template.render_block("example_revision", principle=principle, **fields)
        if self.answer == "critique" and question is not None and "revision" in example:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": example["revision"]}]
        return turns
