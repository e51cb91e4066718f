"""What a critic and a judge are taught: worked demonstrations in the words of the templates, as rows of token ids.

    material = Material(demonstrations, own, decided, named)
    rows = critic_rows(material, chat, seed=0)
    rows = judge_rows(material, chat, seed=0)

Each demonstration is a prompt, a response with or without a fault, a critique, and a revision. To these come the
model's own answers, which it is going to criticise and compare, and demonstrations of the principles of the bundled
constitutions. The model reads exactly what the commands show it, and the loss is on the answer alone. Principles and
orders are drawn from the seed. Leaves out the training (adapters.py).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from cai.base.errors import InputError
from cai.base.hashing import hashed_seed
from cai.base.paths import CONSTITUTIONS
from cai.constitution.files import Principle, load_constitution
from cai.constitution.templates import load_template
from cai.data.kinds import KINDS
from cai.data.readers import Row
from cai.models.chat import Chat, encode
from cai.models.engine import Request
from cai.stats import letters, refusals
from cai.train.adapters import TokenRow, shared_tokens

FAULTS = ("harm", "evasive", "preachy", "refusal", "off_topic", "none")

FIELDS = ("prompt", "kind", "category", "topic", "response", "fault", "critique", "revision")

PRINCIPLE_FIELDS = ("principle", "prompt", "response", "critique", "revision", "praise")

_REMEDY = "Fix or delete this row"

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

# Refusals of any topic, for comparisons in which harm alone decides. With these alone a judge knows them by their
# words, and takes any other refusal for the better answer.
_REFUSALS = (
    "I won't help with {topic}, because somebody could get hurt. I can help you with something else that you need.",
    "I'm sorry, but I can't help with {topic}: it may do harm. Tell me what is behind it, and I'll do what I can.",
    "No, I don't want to take part in this. {topic} can end badly for others. If you like, we look for another way.",
    "I can't give advice on {topic}, since it could harm people. What I can do is talk through what troubles you.",
)

_BY_TEMPLATE = 0.25  # of the judge's refusals, where the critic has written any

# What critiques begin with: with a fault, and without one.
_OPENING = {True: "The", False: "Nothing"}


def check_demonstration(row: Row, where: str, line: int) -> None:
    """InputError unless the row has all FIELDS as texts, a kind out of KINDS, and a fault out of FAULTS."""
    _check_texts(row, FIELDS, where, line)
    for name, known in (("fault", FAULTS), ("kind", KINDS)):
        if row[name] not in known:
            expected = f"one of {', '.join(known)}"
            raise InputError(f"the {name} {row[name]!r}", where=where, line=line, expected=expected, remedy=_REMEDY)


def check_principle(row: Row, where: str, line: int) -> None:
    """InputError unless the row has all PRINCIPLE_FIELDS as texts, and names a principle of a bundled constitution."""
    _check_texts(row, PRINCIPLE_FIELDS, where, line)
    name, _, id_ = row["principle"].partition("/")
    if name not in {file.stem for file in CONSTITUTIONS.glob("*.yaml")} or id_ not in load_constitution(name):
        expected = "CONSTITUTION/ID, of a constitution in constitutions/"
        raise InputError(
            f"the principle {row['principle']!r}", where=where, line=line, expected=expected, remedy=_REMEDY
        )


def _check_texts(row: Row, fields: Sequence[str], where: str, line: int) -> None:
    missing = [name for name in fields if not isinstance(row.get(name), str) or not row[name].strip()]
    if missing:
        problem, expected = f"a demonstration without {', '.join(missing)}", f"{', '.join(fields)}, each a text"
        raise InputError(problem, where=where, line=line, expected=expected, remedy=_REMEDY)


def principle_demonstrations(rows: Sequence[Row]) -> list[Row]:
    """Two demonstrations of each row with PRINCIPLE_FIELDS: its response is faulty, and its revision is not.

    They differ in what they say and in little else.
    """
    both = []
    for row in rows:
        about = {"prompt": row["prompt"], "principle": row["principle"], "revision": row["revision"]}
        both.append({**about, "fault": "named", "response": row["response"], "critique": row["critique"]})
        both.append({**about, "fault": "none", "response": row["revision"], "critique": row["praise"]})
    return both


def own_demonstrations(demonstrations: Sequence[Row], answers: Mapping[str, str]) -> list[Row]:
    """Demonstrations with the model's own answer as the response: what it is going to criticise.

    A harmful request that is complied with has the critique and the revision as they are written; an answer to a
    harmless one has no fault. What declines is left out, and so are harmful requests without a critique of compliance.

    Args:
        answers: {id: answer}.
    """
    rows = []
    for row, answer in _helped(demonstrations, answers):
        if row["kind"] == "harmful" and row["fault"] == "harm":
            rows.append({**row, "response": answer})
        elif row["kind"] != "harmful":
            critique = row["critique"] if row["fault"] == "none" else _helps(row)
            rows.append({**row, "response": answer, "fault": "none", "critique": critique, "revision": answer})
    return rows


def own_decisions(prompts: Sequence[Row], answers: Mapping[str, str]) -> list[Row]:
    """The model's own answers to prompts without a demonstration: whether they have a fault follows from the kind.

    Their critique is its first word alone, which says whether there is a fault. What declines is left out.

    Args:
        prompts: rows with id, prompt, kind, category, topic. answers: {id: answer}.
    """
    return [
        {
            **row,
            "response": answer,
            "fault": "harm" if row["kind"] == "harmful" else "none",
            "critique": _OPENING[row["kind"] == "harmful"],
        }
        for row, answer in _helped(prompts, answers)
    ]


def _helped(rows: Sequence[Row], answers: Mapping[str, str]) -> Iterator[tuple[Row, str]]:
    """The rows that were answered, with an answer that does not decline."""
    for row in rows:
        answer = answers.get(row["id"], "").strip()
        if answer and refusals.read(row["prompt"], answer) == "complied":
            yield row, answer


@dataclass(frozen=True)
class Material:
    """What rows are made of.

    own: of `own_demonstrations`. decided: of `own_decisions`. named: of `principle_demonstrations`.
    refusals: {id of a row of own or decided: a refusal of its prompt}, of `refusal_requests`.
    """

    demonstrations: Sequence[Row]
    own: Sequence[Row] = ()
    decided: Sequence[Row] = ()
    named: Sequence[Row] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)

    def answered(self) -> list[Row]:
        """All of the model's own answers."""
        return [*self.own, *self.decided]


@cache
def _principle(constitution: str, id_: str) -> Principle:
    return load_constitution(constitution)[id_]


class Tasks:
    """Draws the rows of both roles.

    Args:
        chat: of the model that is trained; None to draw alone.
        rng: decides principles, orders, and which rows are taken.
    """

    def __init__(self, chat: Chat | None, rng: random.Random):
        self.chat, self.rng = chat, rng
        names = ("harmlessness", "non-evasive", "helpfulness")
        self.constitutions = {name: load_constitution(name) for name in names}
        self.templates = {
            name: load_template(name) for name in ("critique", "revise", "classify_critique", "preference")
        }

    def principle(self, row: Row) -> Principle:
        """The row's own, or one under which its fault is named; for a row without a fault any."""
        if "principle" in row:
            return _principle(*row["principle"].split("/"))
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

    def write(self, template: str, answer: str, *, lead: float = 0.0, **variables: Any) -> TokenRow:
        """A row whose answer is a text."""
        prompt, target = encode(self.chat, self.templates[template].render(**variables), answer)
        return TokenRow([*prompt, *target], len(target), lead)

    def choose(self, template: str, label: str, **variables: Any) -> TokenRow:
        """A row whose answer is a letter after the template's prefill."""
        messages = self.templates[template].render(**variables)
        return TokenRow(self.chat.encode(self.chat.render(messages) + label), 1)

    def criticise(self, row: Row) -> TokenRow:
        """Its first word decides whether there is a fault: it counts as much as all words."""
        return self.write("critique", row["critique"], lead=1.0, principle=self.principle(row), **_texts(row))

    def decide(self, row: Row) -> TokenRow:
        """A critique of which only the first word is trained: whether there is a fault at all."""
        whole = self.criticise(row)
        return TokenRow(whole.ids[: len(whole.ids) - whole.targets + 1], 1)

    def revise(self, row: Row) -> TokenRow:
        return self.write(
            "revise", row["revision"], principle=self.principle(row), critique=row["critique"], **_texts(row)
        )

    def read_critique(self, row: Row, critic: Row) -> list[TokenRow]:
        """Whether the critique of `critic`, the row itself or another one, finds a fault, in both orders: option 0 is
        yes.

        Both orders come in the same batches: a step on one alone teaches a letter, and not what it stands for.
        """
        none = int(critic["fault"] == "none")
        both = [
            self.choose(
                "classify_critique", "AB"[order.index(none)], critique=critic["critique"], order=order, **_texts(row)
            )
            for order in letters.cyclic_orders(2, 2)
        ]
        return [replace(row, beginning=min(row.beginning, shared_tokens(both))) for row in both]

    def prefer(self, row: Row, better: str, worse: str) -> list[TokenRow]:
        """Both orders of a comparison: what stands first tells nothing."""
        principle = self.principle(row)
        return [
            self.choose(
                "preference",
                label,
                principle=principle,
                prompt=row["prompt"],
                response_a=first,
                response_b=second,
                reasoning="",
            )
            for label, first, second in (("A", better, worse), ("B", worse, better))
        ]

    def share(self, rows: Sequence[Row], most: int) -> list[Row]:
        """At most so many of the rows, drawn at random."""
        return self.rng.sample(rows, min(most, len(rows)))


def _texts(row: Row) -> dict[str, str]:
    return {"prompt": row["prompt"], "response": row["response"]}


def critic_rows(material: Material, chat: Chat, seed: int) -> list[TokenRow]:
    """One epoch of critiques, their first words, revisions, and readings of critiques.

    Most demonstrations have a fault, most of the model's own answers have none: together they are about as many. An
    epoch has half of the texts, and the first word of each. Half of the readings are of a critique of another row, with
    the other verdict: a reader is to go by the critique, not by what it thinks of the response itself.
    """
    tasks = Tasks(chat, random.Random(f"critic/{seed}"))
    demonstrations = material.demonstrations
    rows = [*demonstrations, *material.own, *material.named]
    faulty = [row for row in rows if row["fault"] != "none"]
    faultless = [row for row in rows if row["fault"] == "none"]
    harmful = [row for row in demonstrations if row["fault"] == "harm"]
    declined = [
        {**row, "response": row["revision"], "fault": "none", "critique": _declines_well(row)} for row in harmful
    ]
    helped = [
        {**row, "response": row["revision"], "fault": "none", "critique": _helps(row)}
        for row in demonstrations
        if row["kind"] != "harmful" and row["fault"] != "none"
    ]
    criticised = [*demonstrations, *material.named, *helped, *tasks.share(declined, len(rows) // 15)]
    tasks.rng.shuffle(criticised)
    half = len(criticised) // 2
    read = [
        (row, row if number % 2 else tasks.rng.choice(others))
        for part, others in ((faulty, faultless), (faultless, faulty))
        for number, row in enumerate(tasks.share(part, len(rows) // 6))
    ]
    return [
        *map(tasks.criticise, criticised[:half]),
        *map(tasks.decide, [*criticised[half:], *material.answered()]),
        *map(tasks.revise, [*tasks.share(faulty, len(faulty) // 5), *tasks.share(faultless, len(rows) // 50)]),
        *(row for pair in read for row in tasks.read_critique(*pair)),
    ]


def _helps(row: Row) -> str:
    return f"Nothing in the response goes against this: the request, about {_about(row)}, is harmless."


def _declines_well(row: Row) -> str:
    return f"Nothing in the response goes against this: it declines help with {_about(row)}, and offers another way."


def refusal_requests(rows: Sequence[Row], seed: int) -> list[Request]:
    """Requests to the critic for a refusal of each row's prompt, harmful or not: the revision of its response, after a
    critique that finds it harmful.

    These are the words of the policy's own refusals, needless ones included. Of each kind as many rows are taken as a
    third of the harmful ones, at most; the requests' keys are the rows' ids.
    """
    tasks = Tasks(None, random.Random(f"refusals/{seed}"))
    most = sum(row["kind"] == "harmful" for row in rows)
    chosen = [row for kind in KINDS for row in tasks.share([row for row in rows if row["kind"] == kind], most // 3)]
    requests = []
    for row in chosen:
        critique = f"The response helps with {_about(row)}, and others could be harmed. It should decline, and say why."
        principle = tasks.rng.choice(tasks.constitutions["harmlessness"].principles)
        messages = tasks.templates["revise"].render(principle=principle, critique=critique, **_texts(row))
        requests.append(Request(row["id"], messages, hashed_seed("refusal", seed, row["id"])))
    return requests


def read_refusals(rows: Sequence[Row], texts: Mapping[str, str]) -> dict[str, str]:
    """{id: refusal}: the texts that decline."""
    prompts = {row["id"]: row["prompt"] for row in rows}
    return {id_: text for id_, text in texts.items() if refusals.read(prompts[id_], text) == "declined"}


def judge_rows(material: Material, chat: Chat, seed: int) -> list[TokenRow]:
    """One epoch of comparisons, each in both orders.

    A third of the revisions against their responses; and the model's own answers to harmful prompts, which are worse
    than a refusal, with as many answers to harmless ones, which are better than one. The refusals of both are
    written in the same way, by the critic, and one in four by template: so harm alone tells which is better, not how a
    refusal is worded or whether it fits its prompt.
    """
    tasks = Tasks(chat, random.Random(f"judge/{seed}"))
    rows: list[TokenRow] = []
    faulty = [row for row in [*material.demonstrations, *material.named] if row["fault"] != "none"]
    for row in tasks.share(faulty, len(faulty) // 3):
        rows += tasks.prefer(row, row["revision"], row["response"])
    answered = [row for row in material.answered() if not material.refusals or row["id"] in material.refusals]
    harmful = [row for row in answered if row["fault"] == "harm"]
    harmless = [row for row in answered if row["fault"] == "none"]
    most = min(len(harmful), len(harmless))
    for row in [*tasks.share(harmful, most), *tasks.share(harmless, most)]:
        refusal = tasks.rng.choice(_REFUSALS).format(topic=_about(row))
        if tasks.rng.random() > _BY_TEMPLATE:
            refusal = material.refusals.get(row["id"], refusal)
        both = (refusal, row["response"]) if row["fault"] == "harm" else (row["response"], refusal)
        rows += tasks.prefer(row, *both)
    return rows


def _about(row: Row) -> str:
    return row["topic"].replace("-", " ")
