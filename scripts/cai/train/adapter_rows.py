"""What a critic and a judge are taught: worked demonstrations in the words of the templates, as rows of token ids.

    rows = critic_rows(demonstrations, chat, seed=0)
    rows = judge_rows(demonstrations, chat, seed=0)

Each demonstration is a prompt, a response with or without a fault, a critique, and a revision. The model reads exactly
what critique.py, revise.py and judge.py show it; the loss is on the answer alone. Principles, orders and letters are
drawn from the seed. Leaves out the training (adapters.py).
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai.base.errors import InputError
from cai.constitution.files import Constitution, Principle, load_constitution
from cai.constitution.templates import load_template
from cai.data.readers import Row
from cai.models.chat import Chat, encode
from cai.stats import letters, refusals
from cai.train.adapters import TokenRow

FAULTS = ("harm", "evasive", "preachy", "refusal", "off_topic", "none")

FIELDS = ("prompt", "kind", "category", "topic", "response", "fault", "critique", "revision")

# The principles that name a fault, beside those of harmlessness.yaml, which speak of harm.
_NAMING = {
    "evasive": (("harmlessness", "not-evasive"), ("non-evasive", "engage"), ("non-evasive", "reason")),
    "preachy": (("harmlessness", "plain-refusal"), ("non-evasive", "no-scolding")),
    "refusal": (
        ("harmlessness", "not-evasive"),
        ("non-evasive", "engage"),
        ("non-evasive", "good-faith"),
        ("non-evasive", "frightening-words"),
        ("helpfulness", "helps"),
    ),
    "off_topic": (("helpfulness", "helps"), ("helpfulness", "to-the-point"), ("non-evasive", "engage")),
}

# Principles that speak of some categories of harm only: no fault of the others is named under them.
_SCOPES = {
    "crime": {"theft", "fraud", "violence", "harassment", "sabotage", "intrusion"},
    "people": {"violence", "harassment", "slander", "intrusion"},
    "belongings-and-animals": {"theft", "sabotage", "intrusion", "cruelty"},
}

_ANY = 0.35  # how often a fault that is no harm is named under any principle of harmlessness.yaml

# The letters of templates/classify.jinja.
_LETTERS = {"harm": "A", "good": "B", "evasive": "C", "preachy": "D", "off_topic": "E", "helpful": "A"}


def check_demonstration(row: Row, where: str, line: int) -> None:
    """InputError unless the row has all FIELDS as texts, and a fault out of FAULTS."""
    missing = [name for name in FIELDS if not isinstance(row.get(name), str) or not row[name].strip()]
    if missing or row["fault"] not in FAULTS:
        raise InputError(
            f"a demonstration without {', '.join(missing)}" if missing else f"the fault {row['fault']!r}",
            where=where,
            line=line,
            expected=f"{', '.join(FIELDS)}, each a text, and fault one of {', '.join(FAULTS)}",
            remedy="Fix or delete this row",
        )


def own_demonstrations(demonstrations: Sequence[Row], answers: Mapping[str, str]) -> list[Row]:
    """Demonstrations with the model's own answer as the response: what it is going to criticise.

    A harmful request that is complied with has the critique and the revision as they are written; an answer to a
    harmless one has no fault. What declines is left out, and so are harmful requests without a critique of compliance.

    Args:
        answers: {id: answer}.
    """
    rows = []
    for row in demonstrations:
        answer = answers.get(row["id"], "").strip()
        if not answer or refusals.read(row["prompt"], answer) != "complied":
            continue
        if row["kind"] == "harmful" and row["fault"] == "harm":
            rows.append({**row, "response": answer})
        elif row["kind"] != "harmful":
            critique = row["critique"] if row["fault"] == "none" else _helps(row)
            rows.append({**row, "response": answer, "fault": "none", "critique": critique, "revision": answer})
    return rows


class Tasks:
    """Draws the rows of both roles.

    Args:
        chat: of the model that is trained.
        rng: decides principles, orders, and which rows are taken.
    """

    def __init__(self, chat: Chat, rng: random.Random):
        self.chat, self.rng = chat, rng
        names = ("harmlessness", "non-evasive", "helpfulness")
        self.constitutions: dict[str, Constitution] = {name: load_constitution(name) for name in names}
        self.templates = {
            name: load_template(name)
            for name in ("critique", "revise", "classify_critique", "check_prompt", "preference", "classify")
        }

    def principle(self, row: Row) -> Principle:
        """One under which the row's fault is named; for a row without a fault any."""
        if row["fault"] in _NAMING and self.rng.random() > _ANY:
            name, id_ = self.rng.choice(_NAMING[row["fault"]])
            return self.constitutions[name][id_]
        name = "harmlessness"
        if row["fault"] == "none" and self.rng.random() < 0.25:
            name = self.rng.choice(("non-evasive", "helpfulness"))
        principles = self.constitutions[name].principles
        if row["fault"] == "harm":
            principles = tuple(p for p in principles if p.id not in _SCOPES or row["category"] in _SCOPES[p.id])
        return self.rng.choice(principles)

    def write(self, template: str, answer: str, **variables: Any) -> TokenRow:
        """A row whose answer is a text."""
        prompt, target = encode(self.chat, self.templates[template].render(**variables), answer)
        return TokenRow([*prompt, *target], len(target))

    def choose(self, template: str, label: str, **variables: Any) -> TokenRow:
        """A row whose answer is a letter after the template's prefill."""
        messages = self.templates[template].render(**variables)
        return TokenRow(self.chat.encode(self.chat.render(messages) + label), 1)

    def criticise(self, row: Row) -> TokenRow:
        return self.write("critique", row["critique"], principle=self.principle(row), **_texts(row))

    def decide(self, row: Row) -> TokenRow:
        """A critique of which only the first word is trained: whether there is a fault at all."""
        whole = self.criticise(row)
        return TokenRow(whole.ids[: len(whole.ids) - whole.targets + 1], 1)

    def check_prompt(self, row: Row) -> TokenRow:
        """Whether giving what the prompt asks for would be at fault: option 0 is yes."""
        order = self.rng.choice(letters.cyclic_orders(2, 2))
        label = "AB"[order.index(int(row["kind"] != "harmful"))]
        principle = self.principle({**row, "fault": "harm"})
        return self.choose("check_prompt", label, principle=principle, prompt=row["prompt"], order=order)

    def revise(self, row: Row) -> TokenRow:
        return self.write(
            "revise", row["revision"], principle=self.principle(row), critique=row["critique"], **_texts(row)
        )

    def read_critique(self, row: Row) -> TokenRow:
        """Whether the critique finds a fault: option 0 is yes."""
        order = self.rng.choice(letters.cyclic_orders(2, 2))
        label = "AB"[order.index(int(row["fault"] == "none"))]
        return self.choose("classify_critique", label, critique=row["critique"], order=order, **_texts(row))

    def prefer(self, row: Row, better: str, worse: str) -> TokenRow:
        label = self.rng.choice("AB")
        first, second = (better, worse) if label == "A" else (worse, better)
        return self.choose(
            "preference",
            label,
            principle=self.principle(row),
            prompt=row["prompt"],
            response_a=first,
            response_b=second,
            reasoning="",
        )

    def classify(self, row: Row, response: str, name: str) -> TokenRow:
        """name: a key of _LETTERS, whose letter is the option's in the plain order."""
        order = self.rng.choice(letters.cyclic_orders(5, 5))
        label = "ABCDE"[order.index("ABCDE".index(_LETTERS[name]))]
        return self.choose("classify", label, prompt=row["prompt"], response=response, order=order)

    def share(self, rows: Sequence[Row], most: int) -> list[Row]:
        """At most so many of the rows, drawn at random."""
        return self.rng.sample(rows, min(most, len(rows)))


def _texts(row: Row) -> dict[str, str]:
    return {"prompt": row["prompt"], "response": row["response"]}


def critic_rows(demonstrations: Sequence[Row], own: Sequence[Row], chat: Chat, seed: int) -> list[TokenRow]:
    """One epoch of critiques, revisions, and readings of critiques.

    Args:
        own: of `own_demonstrations`.
    """
    tasks = Tasks(chat, random.Random(f"critic/{seed}"))
    rows = [*demonstrations, *own]
    faulty = [row for row in rows if row["fault"] != "none"]
    faultless = [row for row in rows if row["fault"] == "none"]
    revised = [
        {**row, "response": row["revision"], "fault": "none", "critique": _declines_well(row)}
        for row in demonstrations
        if row["fault"] == "harm"
    ]
    return [
        *map(tasks.criticise, [*tasks.share(rows, len(rows) * 3 // 4), *tasks.share(revised, len(rows) // 15)]),
        *map(tasks.revise, [*tasks.share(faulty, len(faulty) * 2 // 3), *tasks.share(faultless, len(rows) // 20)]),
        *map(tasks.read_critique, tasks.share(rows, len(rows) // 7)),
    ]


def decision_rows(demonstrations: Sequence[Row], own: Sequence[Row], chat: Chat, seed: int) -> list[TokenRow]:
    """What follows an epoch of `critic_rows`: above all, whether there is a fault. In a critique that is one word of
    fifty, which the epoch before hardly teaches. Faulty and faultless rows are as many here.

    Args:
        own: of `own_demonstrations`.
    """
    tasks = Tasks(chat, random.Random(f"decision/{seed}"))
    rows = [*demonstrations, *own]
    harm = [row for row in rows if row["fault"] == "harm"]
    helped = [
        {**row, "response": row["revision"], "fault": "none", "critique": _helps(row)}
        for row in demonstrations
        if row["kind"] != "harmful" and row["fault"] != "none"
    ]
    helped += [row for row in rows if row["fault"] == "none" and row["kind"] != "harmful"]
    declined = [row for row in demonstrations if row["fault"] == "none" and row["kind"] == "harmful"]
    other = [row for row in rows if row["fault"] not in ("harm", "none")]
    half = len(demonstrations) // 3
    faulty = [*tasks.share(harm, half), *tasks.share(other, half // 3)]
    faultless = [*tasks.share(helped, half), *tasks.share(declined, half // 6)]
    return [
        *map(tasks.decide, [*faulty, *faultless]),
        *map(tasks.check_prompt, demonstrations),
        *map(tasks.read_critique, [*tasks.share(faulty, half // 3), *tasks.share(faultless, half // 3)]),
        *map(tasks.criticise, [*tasks.share(faulty, half // 4), *tasks.share(faultless, half // 4)]),
        *map(tasks.revise, tasks.share(faulty, half // 4)),
    ]


def _helps(row: Row) -> str:
    topic = row["topic"].replace("-", " ")
    return f"Nothing in the response goes against this: the request, about {topic}, is harmless."


def _declines_well(row: Row) -> str:
    topic = row["topic"].replace("-", " ")
    return f"Nothing in the response goes against this: it declines help with {topic}, and offers another way."


def judge_rows(demonstrations: Sequence[Row], own: Sequence[Row], chat: Chat, seed: int) -> list[TokenRow]:
    """One epoch of comparisons and of classes of responses.

    Args:
        own: of `own_demonstrations`.
    """
    tasks = Tasks(chat, random.Random(f"judge/{seed}"))
    return [*_comparisons(tasks, demonstrations, own), *_classes(tasks, demonstrations, own)]


def _comparisons(tasks: Tasks, demonstrations: Sequence[Row], own: Sequence[Row]) -> Iterator[TokenRow]:
    """The revision against the response; a good answer against what is worse in some other way."""
    by_category = defaultdict(list)
    for row in demonstrations:
        by_category[row["category"]].append(row)
    answers = {row["id"]: row["response"] for row in own}
    for row in tasks.share(demonstrations, len(demonstrations) // 2):
        good, refuses = row["revision"], row["kind"] == "harmful"
        if row["fault"] != "none":
            yield tasks.prefer(row, good, row["response"])
        worse = [answers.get(row["id"])] if refuses else _refusals_like(row, by_category, tasks.rng)
        other = tasks.rng.choice([other for other in demonstrations if other["topic"] != row["topic"]])
        worse += [other["revision"]] if tasks.rng.random() < 0.3 else []
        for text in filter(None, worse):
            better = answers.get(row["id"]) if not refuses and tasks.rng.random() < 0.5 else None
            yield tasks.prefer({**row, "fault": "none" if not refuses else row["fault"]}, better or good, text)


def _refusals_like(row: Row, by_category: Mapping[str, Sequence[Row]], rng: random.Random) -> list[str]:
    """A refusal of another request of the category, for a harmless row in half of the cases."""
    texts = [
        other["response"] if other["fault"] == "refusal" else other["revision"]
        for other in by_category[row["category"]]
        if other is not row and (other["fault"] == "refusal" or other["kind"] == "harmful")
    ]
    return [rng.choice(texts)] if texts and rng.random() < 0.5 else []


def _classes(tasks: Tasks, demonstrations: Sequence[Row], own: Sequence[Row]) -> Iterator[TokenRow]:
    """What responses do: faulty ones, good refusals, and helpful answers."""
    faulty = [row for row in demonstrations if row["fault"] in _LETTERS]
    for row in [*tasks.share(faulty, len(demonstrations) // 5), *tasks.share(own, len(demonstrations) // 14)]:
        yield tasks.classify(row, row["response"], "helpful" if row["fault"] == "none" else row["fault"])
    for row in tasks.share(demonstrations, len(demonstrations) // 5):
        yield tasks.classify(row, row["revision"], "good" if row["kind"] == "harmful" else "helpful")
