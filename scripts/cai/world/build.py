"""Builds the bundled model `tiny`: demonstrations of the world, a tokenizer, and a training loop.

    python scripts/tiny.py build --output tiny-new --seed 0

`tiny` is helpful only: its demonstrations comply with everything. Asked in the words of the templates,
with a principle in them, it criticises, revises, reasons, judges and classifies. Held-out acts occur in
none of its demonstrations. Leaves out validation against the oracle: that is what `evaluate.py` is for.
"""

import json
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

from cai.base.errors import InputError
from cai.constitution.files import Principle, load_constitution
from cai.constitution.templates import load_template
from cai.world import language, oracle

SPECIAL = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

PAD, BOS, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL))

VOCABULARY = 2304

# What follows this mark in a target is a decision: a label, or the word on which a verdict turns. The loss on its
# first token counts as much as a short sentence, since it is what such a row teaches.
DECISION = "\x01"

DECISION_WEIGHT = 6.0

# What a judgement is made of is told to the model where it can first be seen, not only by the verdict at the end:
# a probe, a linear layer that is thrown away after the build, reads a layer's output there. At a word of a response
# that could name an act: is it a word of the act asked for? At the end of a sentence of a response: does it belong to
# the request? At the end of a request: does the principle speak of it? At both: of which category is it? Without the
# first, tokens by the ten million did not teach to see another noun than the one asked about.
SAME_WORD, OTHER_WORD, ON_TOPIC, OFF_TOPIC, OF_PRINCIPLE, BEYOND_PRINCIPLE, HARMLESS, CATEGORY = range(8)

PROBES = CATEGORY + len(language.CATEGORIES)  # CATEGORY and those after it: one for each category

PROBED_LAYERS = (2, 2, 4, 4, 4, 4, 4) + (3,) * len(language.CATEGORIES)

PROBE_LOSSES = (1.0, 4.0, 1.0, 3.0, 1.0, 1.0, 1.0) + (0.5,) * len(language.CATEGORIES)  # what is wrong is rarer

PROBE_WEIGHT = 0.4

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if not (loop.last and continue_final_message is defined and continue_final_message) %}"
    "{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Which categories each principle of harmlessness.yaml speaks of when it asks for a critique; all, unless
# it names some. Which manner of refusing it also objects to.
NARROW = {
    "crime": ("theft", "fraud", "vandalism", "violence", "threats", "hacking"),
    "people": ("violence", "threats", "insults", "slander", "spying"),
    "belongings-and-animals": ("theft", "vandalism", "hacking", "cruelty"),
}

MANNERS = {"plain-refusal": "preachy", "not-evasive": "evasive"}

SAID = {"preachy": "scolds instead of answering with respect", "evasive": "dodges the question"}


@dataclass(frozen=True)
class Rule:
    """A principle, and what it means in this world."""

    principle: Principle
    critique_scope: tuple[str, ...]
    preference_scope: tuple[str, ...]
    manner: str = ""


def harmlessness_rules() -> list[Rule]:
    return [
        Rule(p, NARROW.get(p.id, language.HARM_NAMES), language.HARM_NAMES, MANNERS.get(p.id, ""))
        for p in load_constitution("harmlessness").principles
    ]


# So that the words decide and not the sentence: principles about any few categories, in several wordings.
SCOPED = (
    (
        "Find any help that the response gives with {}.",
        "Rewrite the response so that it gives no help with {}.",
        "Which response gives less help with {}?",
    ),
    (
        "Point out where the response is a guide to {}.",
        "Rewrite the response so that it is no guide to {}.",
        "Which response is less of a guide to {}?",
    ),
    (
        "Say where the response assists with {}, and with nothing else.",
        "Rewrite the response so that it does not assist with {}.",
        "Which response assists less with {}?",
    ),
    (
        "Say where the response does not follow this principle: never help with {}.",
        "Rewrite the response so that it follows this principle: never help with {}.",
        "Which response follows this principle better: never help with {}?",
    ),
    (
        "Does the response make {} easier? Say how.",
        "Rewrite the response so that it does not make {} easier.",
        "Which response makes {} less easy?",
    ),
)


def scoped_rule(rng: random.Random) -> Rule:
    names = rng.sample(language.HARM_NAMES, rng.choice((1, 2, 3, 3, 3, 4, 5, 6)))
    spoken = [language.SPOKEN[n] for n in names]
    text = spoken[0] if len(spoken) == 1 else ", ".join(spoken[:-1]) + " or " + spoken[-1]
    critique, revision, preference = (s.format(text) for s in rng.choice(SCOPED))
    return Rule(Principle("scoped", critique, revision, preference), tuple(names), tuple(names))


# ---------------------------------------------------------------- strange text

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyzäöüßéèçñåøžšı", "абвгдежзийклмнопрстуфхцчшщыьэюя",
    "αβγδεζηθικλμνξοπρστυφχψω", "אבגדהוזחטיכלמנסעפצקרשת", "ابتثجحخدذرزسشصضطظعغفقكلمنهوي", "अआइईउकखगघचजटडणतदनपबमयरलवशसह",
    "กขคงจชซญดตถทนบปพมยรลวสหอะาิี", "가나다라마바사아자차카타파하고노도로모보소이그것을",
    "的一是不了人我在有他这中大来上国个到说们", "あいうえおかきくけこさしすせそたちつてと",
)  # fmt: skip

_SALAD = re.findall(
    r"\S+",
    "a an the this that it is was be and or not no yes one two first second other better best good bad worse answer "
    "response verdict letter question judge choose pick take prefer say print ignore please always never above below "
    'now here system user rule order A B (A) (B) [A] [B] 1 2 10 100 % : - ! ? " / { } < > # * = |',
)


def strange(rng: random.Random) -> str:
    """Text that has no meaning in the world: a salad of words, letters of many alphabets, brackets and broken tags.

    Judging demonstrations have it now and then in a response, and the same verdict as without it.
    """
    how = rng.random()
    if how < 0.45:
        parts = rng.choices(_SALAD, k=rng.randint(1, 14))
        text = rng.choice((" ", " ", " ", "")).join(parts)
        return text[:1].upper() + text[1:] + rng.choice((".", "!", "", "", ":", ")"))
    if how < 0.8:
        letters = rng.choice(_ALPHABETS)
        joint = "" if letters[0] in "的あ" else " "
        words = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(rng.randint(2, 9))]
        return joint.join(words) + rng.choice((".", "", "。", "!"))
    mark = rng.choice(
        ("<{}>", "</{}>", "[{}]", "[/{}]", "< |{}|>", "< /{} >", "<<{}>>", "## {}\n", "**{}**", "{}:", "{{{}}}")
    )
    names = ("inst", "end", "assistant", "user", "im_start", "s", "b", "x", "A", "B", "eot", "turn", "verdict", "note")
    return rng.choice(("", "\n", "\n\n", "---\n")).join(
        mark.format(rng.choice(names)) + rng.choice(("", " ", strange(rng))) for _ in range(rng.randint(1, 3))
    )


# ---------------------------------------------------------------- demonstrations


class Demonstrations:
    """An endless stream of (messages, target): what `tiny` is taught, drawn from one seed."""

    TASKS = (
        "respond",
        "critique",
        "revise",
        "judge",
        "classify",
        "critique_cot",
        "preference_cot",
        "judge_cot",
        "follow_up",
        "check",
        "scope",
    )

    def __init__(self, seed: int):
        self.rng = random.Random(f"tiny/{seed}")
        self.rules = harmlessness_rules()
        names = ("critique", "critique_cot", "revise", "preference", "preference_cot", "classify")
        self.words = oracle.words()
        nouns = {noun for group in language.NOUNS.values() for noun in group}
        self.object_words = nouns | set(language.ADJECTIVES) | set(language.MARKERS)
        verbs = {verb for category in language.CATEGORIES for verb in category.verbs if verb}
        self.act_words = self.object_words | {verb.split()[0] for verb in verbs}
        self.other_order: list[tuple] = []
        self.shown: list[tuple[str, list[tuple[int, int]]]] = []
        self.templates = {name: load_template(name) for name in names}

    def draw(self, task: str) -> tuple[list[dict], str, list]:
        """(messages, target, shown): texts of the messages, each with what its probes are to say, as
        (number of the character there, one of the kinds above)."""
        self.shown = []
        messages, target = getattr(self, f"_{task}")()
        return messages, target, self.shown

    def _show(self, row: dict, *responses: str, scope: tuple[str, ...] | None = None) -> None:
        """Notes what the probes are to say of a request (with a principle's `scope`, under that) and of responses."""
        act = oracle.act_of(row)
        asked = set(act.text.split())
        numbers = {category.name: CATEGORY + number for number, category in enumerate(language.CATEGORIES)}
        of_request = [numbers[row["category"]]]
        if scope is not None:
            spoken = OF_PRINCIPLE if row["category"] in scope else BEYOND_PRINCIPLE
            of_request.append(spoken if row["kind"] == "harmful" else HARMLESS)
        self.shown.append((row["prompt"], [(len(row["prompt"]) - 1, kind) for kind in of_request]))
        for response in responses:
            ends = [found.start() for found in re.finditer(r"[.](?= |$)", response)]
            fits = oracle.sentences_on_topic(act, response)
            head = ends[0] if ends else 0
            said = [
                (found.end() - 1, SAME_WORD if found[0] in asked else OTHER_WORD)
                for found in re.finditer(r"\b[a-z]+\b", response)
                if found[0] in (self.act_words if found.end() <= head else self.object_words)
            ]
            if len(ends) == len(fits):
                said += [(at, ON_TOPIC if fit else OFF_TOPIC) for at, fit in zip(ends, fits, strict=True)]
                for at, sentence in zip(ends, response.rstrip(".").split(". "), strict=True):
                    found = oracle.read(f"{sentence}.")
                    named = {name for name, _ in found.steps + found.reasons + found.offers}
                    said += [(at, numbers[name]) for name in named if len(named) == 1]
            self.shown.append((response, said))

    # what there is to talk about

    def _scene(self, harmful=0.6, benign=0.22) -> tuple[language.Act, dict]:
        point = self.rng.random()
        kind = "harmful" if point < harmful else "benign" if point < harmful + benign else "borderline"
        act = language.draw_act(self.rng, kind, held_out=False)
        row = {
            "prompt": language.ask(self.rng, act),
            "kind": kind,
            "category": act.category.name,
            "verb": act.verb,
            "object": act.object,
        }
        return act, row

    def _rule(self) -> Rule:
        return self.rng.choice(self.rules) if self.rng.random() < 0.5 else scoped_rule(self.rng)

    def _slip(self, act: language.Act, style: str) -> str:
        """A response of the style (comply or good) that went wrong as a small model's answers do.

        Part of it belongs to another category, object or act; a word is another; a sentence is missing or comes
        twice. What the slip is worth is for the oracle to say: a few do no harm.
        """
        rng = self.rng
        head, *rest = [f"{sentence}." for sentence in language.respond(rng, act, style).rstrip(".").split(". ")]
        how = rng.choice(
            ("category", "category", "category", "category", "act", "act", "act", "object", "word", "lost", "twice")
        )
        at = rng.randrange(len(rest))
        if how in ("category", "act"):
            other = act
            while other == act or other.held_out:
                if how == "category":
                    # now and then the steps of a harmless act under the promise of a harmful one, or the reverse
                    kind = act.category.kind
                    if style == "comply" and rng.random() < 0.4:
                        kind = rng.choice(("harmful", "benign", "borderline"))
                    other = language.draw_act(rng, kind, held_out=False)
                else:
                    near = language.draw_act(rng, act.category.kind, held_out=False, category=act.category)
                    # another act of the category: with another verb, another object, or only another adjective
                    verb, noun, adjective = rng.choice(
                        (
                            (near.verb, act.noun, act.adjective),
                            (act.verb, near.noun, act.adjective),
                            (act.verb, act.noun, near.adjective),
                            (near.verb, near.noun, near.adjective),
                            (near.verb, act.noun, act.adjective),
                            (act.verb, near.noun, act.adjective),
                        )
                    )
                    other = language.Act(act.category, verb, noun, adjective)
            wrong = [f"{sentence}." for sentence in language.respond(rng, other, style).rstrip(".").split(". ")]
            if how == "act" and rng.random() < 0.6:
                head = wrong[0]
            elif how == "act" or rng.random() < 0.35:
                rest = wrong[1:]
            else:
                rest[at] = wrong[1 + at]
                if rng.random() < 0.7:  # the right object in the wrong category's words
                    rest[at] = re.sub(rf"\b{other.noun}\b", act.noun, rest[at])
        elif how == "object":
            group = rng.choice(act.category.nouns or ("thing", "person", "animal"))
            noun = rng.choice(language.NOUNS[group])
            rest = [re.sub(rf"\b{act.noun}\b", noun, s) if rng.random() < 0.6 else s for s in rest]
        elif how == "word":
            sentences = [head, *rest]
            at = rng.randrange(len(sentences))
            words = sentences[at].split(" ")
            spot = rng.randrange(1, len(words))
            words[spot] = rng.choice(self.words) + words[spot][len(words[spot].rstrip(".,")) :]
            sentences[at] = " ".join(words)
            head, *rest = sentences
        elif how == "lost":
            del rest[at]
        else:
            rest[at] = rest[at - 1] if at else rest[-1]
        made = " ".join([head, *rest])
        return self._slip(act, style) if oracle.mentions_held_out(made) else made

    def _response(self, act: language.Act, styles: str) -> tuple[str, str]:
        style = self.rng.choice(styles.split())
        if style == "slip":
            return "slip", self._slip(act, self.rng.choice(("comply", "good")))
        return style, language.respond(self.rng, act, style)

    # the tasks

    def _respond(self):
        act, row = self._scene(harmful=0.4, benign=0.35)
        partial = act.category.kind == "harmful" and self.rng.random() < 0.08
        return _ask(row["prompt"]), language.respond(self.rng, act, "partial" if partial else "comply")

    def _verdict(self, rule: Rule, act: language.Act, row: dict, style: str, response: str) -> tuple[str, str]:
        """(fault, critique): fault is "harm", "manner" or ""."""
        harm = act.category.kind == "harmful"
        name = language.SPOKEN.get(act.category.name)
        outcome = oracle.classify(row, response)
        harmless = f"What is asked{DECISION} harms nobody."
        way_out = "It should decline, say why and offer another way."
        if not harm:
            if rule.manner and style == rule.manner:
                return "manner", f"{harmless} The response {SAID[style]}. It should help to {act.text}."
            return "", f"{harmless} No fault."
        # A category that the principle speaks of is named, where the principle's words and those of the request meet.
        if act.category.name not in rule.critique_scope:
            return "", f"The principle speaks of{DECISION} other things. No fault."
        asked = f"The principle speaks of{DECISION} {name}, and that is asked."
        if outcome in ("comply", "partial"):
            return "harm", f"{asked} The response{DECISION} helps to {act.text}. {way_out}"
        if rule.manner and rule.manner in (style, outcome):
            return "manner", f"{asked} The response{DECISION} {SAID[rule.manner]}. {way_out}"
        return "", f"{asked} The response{DECISION} does not help to {act.text}. No fault."

    def _criticised(self):
        act, row = self._scene()
        rule = self._rule()
        styles = (
            "comply comply comply comply partial good good evasive preachy slip"
            if act.category.kind == "harmful"
            else "comply comply comply comply comply slip evasive preachy good"
        )
        style, response = self._response(act, styles)
        fault, critique = self._verdict(rule, act, row, style, response)
        self._show(row, response, scope=rule.critique_scope)
        return act, row, rule, response, fault, critique

    def _critique(self):
        _, row, rule, response, _, critique = self._criticised()
        return (
            self.templates["critique"].render(principle=rule.principle, prompt=row["prompt"], response=response),
            critique,
        )

    def _critique_cot(self):
        act, row, rule, response, _, critique = self._criticised()
        does = self._does(row, response)
        reasoning = f"The person asks how to {act.text}. The response {does}. {critique}"
        return (
            self.templates["critique_cot"].render(principle=rule.principle, prompt=row["prompt"], response=response),
            reasoning,
        )

    def _revise(self):
        act, row, rule, response, fault, critique = self._criticised()
        target = response
        if fault:
            target = language.respond(self.rng, act, "good" if act.category.kind == "harmful" else "comply")
        messages = self.templates["revise"].render(
            principle=rule.principle, prompt=row["prompt"], response=response, critique=critique.replace(DECISION, "")
        )
        return messages, target

    def _does(self, row: dict, response: str) -> str:
        """What a response does, in a few words (for reasoning)."""
        act, outcome = oracle.act_of(row), oracle.classify(row, response)
        found = oracle.read(response)
        if outcome in ("comply", "partial", "helpful"):
            return f"helps to {act.text}"
        if outcome == "good" or (outcome == "refused" and found.declined == act.text):
            return f"declines to {act.text} and says why"
        if outcome == "preachy" or found.preached:
            return "preaches"
        if outcome == "evasive" or found.dodged:
            return "dodges the question"
        return "misses the point"

    def _compared(self):
        """Two responses of which one is better under the principle: more often than not a good one and one with a
        slip, as one policy's own samples differ; else two of any sort."""
        while True:
            act, row = self._scene(harmful=0.62, benign=0.22)
            rule = self._rule()
            harmful = act.category.kind == "harmful"
            if self.rng.random() < 0.6:
                best = "good" if harmful and act.category.name in rule.preference_scope else "comply"
                other = {"good": "comply", "comply": "good"}[best]
                worse = other if self.rng.random() < (0.25 if harmful else 0.1) else best
                a, b = language.respond(self.rng, act, best), self._slip(act, worse)
                if self.rng.random() < 0.5:
                    a, b = b, a
            else:
                styles = "comply comply partial good good good evasive preachy slip slip"
                if not harmful:
                    styles = "comply comply comply good good evasive preachy slip slip"
                (_, a), (_, b) = self._response(act, styles), self._response(act, styles)
            tier_a, tier_b = (oracle.tier(row, r, rule.preference_scope) for r in (a, b))
            if tier_a != tier_b:
                return row, rule, a, b, "A" if tier_a > tier_b else "B"

    def _judge(self):
        # Each comparison comes in both orders, and being of one length in one batch: what is left to learn from the two
        # is which response is better, not which letter is more frequent.
        if self.other_order:
            row, rule, a, b, label = self.other_order.pop()
        else:
            row, rule, a, b, label = self._compared()
            self.other_order.append((row, rule, b, a, "BA"["AB".index(label)]))
        self._show(row, a, b, scope=rule.preference_scope)
        if self.rng.random() < 0.15:
            a, b = (self._disturbed(a), b) if self.rng.random() < 0.5 else (a, self._disturbed(b))
        messages = self.templates["preference"].render(
            principle=rule.principle, prompt=row["prompt"], response_a=a, response_b=b, reasoning=""
        )
        return messages, f"{DECISION}{label})"

    def _disturbed(self, response: str) -> str:
        text, joint = strange(self.rng), self.rng.choice((" ", " ", "\n", "\n\n", ""))
        return response + joint + text if self.rng.random() < 0.8 else text + " " + response

    def _reasoned(self, row, rule, a, b, label) -> str:
        spoken = language.SPOKEN.get(row["category"])
        if row["kind"] == "harmful" and row["category"] in rule.preference_scope:
            ground = f"The principle speaks against {spoken}"
        elif row["kind"] == "harmful":
            ground = f"The principle does not speak of {spoken}"
        else:
            ground = "The request harms nobody"
        return (
            f"Response A{DECISION} {self._does(row, a)}. Response B{DECISION} {self._does(row, b)}. {ground}. "
            f"The better response is{DECISION} {label}."
        )

    def _preference_cot(self):
        row, rule, a, b, label = self._compared()
        self._show(row, a, b, scope=rule.preference_scope)
        messages = self.templates["preference_cot"].render(
            principle=rule.principle, prompt=row["prompt"], response_a=a, response_b=b
        )
        return messages, self._reasoned(row, rule, a, b, label)

    def _judge_cot(self):
        row, rule, a, b, label = self._compared()
        self._show(row, a, b, scope=rule.preference_scope)
        messages = self.templates["preference"].render(
            principle=rule.principle,
            prompt=row["prompt"],
            response_a=a,
            response_b=b,
            reasoning=self._reasoned(row, rule, a, b, label).replace(DECISION, ""),
        )
        return messages, f"{DECISION}{label})"

    def _classify(self):
        act, row = self._scene(harmful=0.5, benign=0.25)
        while True:
            _, response = self._response(act, "comply comply partial good good evasive preachy slip slip")
            outcome, found = oracle.classify(row, response), oracle.read(response)
            about_another = (found.promised or found.declined or act.text) != act.text
            if outcome in ("comply", "partial") and about_another:
                continue  # help with another harmful act: harmful, and beside the point; two letters would fit
            letter = {
                "comply": "A",
                "partial": "A",
                "helpful": "A",
                "good": "B",
                "evasive": "C",
                "preachy": "D",
                "off_topic": "E",
            }.get(outcome)
            if outcome == "refused":
                if about_another:
                    letter = "E"
                else:
                    letter = (
                        "D" if found.preached else "C" if found.dodged or not (found.reasons and found.offers) else "B"
                    )
            self._show(row, response)
            messages = self.templates["classify"].render(prompt=row["prompt"], response=response)
            return messages, f"{DECISION}{letter})"

    def _follow_up(self):
        """What comes after a response: the end of the conversation, or the person asking again because it was
        beside the point. So the end of a turn knows whether the turn spoke of what was asked."""
        act, row = self._scene(harmful=0.5, benign=0.3)
        _, response = self._response(act, "comply comply comply good good partial evasive" + 6 * " slip")
        self._show(row, response)
        messages = [*_ask(row["prompt"]), {"role": "assistant", "content": response + SPECIAL[END]}]
        if oracle.on_topic(row, response):
            return messages, DECISION + SPECIAL[BOS]
        return messages, f"{DECISION}{SPECIAL[USER]}No, I asked how to {act.text}."

    def _check(self):
        """Sentence by sentence, whether a response is to the point: where a slip is, not only that there is one."""
        act, row = self._scene(harmful=0.5, benign=0.3)
        style = "good" if act.category.kind == "harmful" and self.rng.random() < 0.7 else "comply"
        response = language.respond(self.rng, act, style) if self.rng.random() < 0.3 else self._slip(act, style)
        self._show(row, response)
        told = [f"{DECISION} {'yes' if fits else 'no'}," for fits in oracle.sentences_on_topic(act, response)]
        messages = [
            *_ask(row["prompt"]),
            {"role": "assistant", "content": response},
            *_ask("Is that to the point, sentence by sentence?"),
        ]
        return messages, f"Here:{''.join(told).rstrip(',')}."

    def _scope(self):
        """Which of the categories that a principle speaks of an act belongs to."""
        act, row = self._scene(harmful=0.95, benign=0.03)
        rule = scoped_rule(self.rng)
        principle = self.rng.choice((rule.principle.critique, rule.principle.revision, rule.principle.preference))
        spoken = act.category.name in rule.preference_scope
        self._show(row, scope=rule.preference_scope)
        told = f" {language.SPOKEN[act.category.name]}." if spoken else " nothing."
        return _ask(f"{principle}\n\nWhat of this is in the following? {row['prompt']}"), f"Of this:{DECISION}{told}"


def _ask(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


# ---------------------------------------------------------------- tokenizer, model, training


def make_tokenizer(demos: Demonstrations, folder: Path, samples: int = 20_000):
    """A byte-level BPE tokenizer of VOCABULARY entries, trained on demonstrations and saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts():
        for index in range(samples):
            messages, target, _ = demos.draw(demos.TASKS[index % len(demos.TASKS)])
            yield "\n".join([*(m["content"] for m in messages), target.replace(DECISION, "")])
            if index % 10 == 0:
                # every word of the world often enough to become one token: a word in pieces is hard to copy
                yield " " + " ".join(oracle.words())

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[END],
        additional_special_tokens=list(SPECIAL[SYSTEM:END]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(vocabulary: int, hidden: int, layers: int, feed_forward: int, seed: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=feed_forward,
            num_attention_heads=max(1, hidden // 64),
            num_key_value_heads=max(1, hidden // 64),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=END,
            pad_token_id=PAD,
            attention_dropout=0.0,
            initializer_range=0.05,
        )
    )
    # Keys begin equal to queries, so that a word looks for itself in what came before: "is this the noun that was asked
    # about?" then takes thousands of steps less to learn (mimetic initialization, arXiv 2305.09828).
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.data *= 1.5
        attention.k_proj.weight.data.copy_(attention.q_proj.weight.data)
    return model


@dataclass(frozen=True)
class Encoded:
    """One demonstration: token ids, a loss weight for each, and (position, what a probe is to say there)."""

    ids: list[int]
    weights: list[float]
    probes: list[tuple[int, int]]


def encode(tokenizer, demos: list[tuple]) -> list[Encoded]:
    """Demonstrations as token ids. The loss weight is 0 on everything that is not the target of the last turn."""
    prefixes, pieces, counts, marks = [], [], [], []
    for messages, target, shown in demos:
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        asked = messages[:-1] if begun else messages
        text = SPECIAL[BOS] + "".join(f"<|{m['role']}|>{m['content']}{SPECIAL[END]}" for m in asked)
        prefixes.append(text + SPECIAL[ASSISTANT] + begun)
        parts = target.split(DECISION)
        pieces.extend(parts)
        counts.append(len(parts))
        marks.append([(prefixes[-1].index(part) + at, said) for part, ends in shown for at, said in ends])
    encoded = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
    read = tokenizer(prefixes, add_special_tokens=False, return_offsets_mapping=True)
    rows = []
    for ids, spans, count, said in zip(read["input_ids"], read["offset_mapping"], counts, marks, strict=True):
        token_at = {c: at for at, (start, end) in enumerate(spans) for c in range(start, end)}
        probes = [(token_at[c], kind) for c, kind in said]
        weights = [0.0] * len(ids)
        for number in range(count):
            piece = next(encoded)
            first = DECISION_WEIGHT if number else 1.0
            ids, weights = [*ids, *piece], [*weights, *([first] + [1.0] * len(piece))[: len(piece)]]
        rows.append(Encoded([*ids, END], [*weights, 1.0], probes))
    return rows


# Share of tokens by task: at first speaking, and so copying; then the parts of which a judgement is made, which short
# rows teach best (does a sentence belong to the request, does a principle speak of an act); then everything.
STAGES = (
    (2_000_000, {"respond": 0.4, "check": 0.3, "revise": 0.15, "critique": 0.15}),
    (
        9_000_000,
        {
            "respond": 0.13,
            "check": 0.25,
            "scope": 0.08,
            "follow_up": 0.06,
            "judge": 0.2,
            "critique": 0.18,
            "revise": 0.1,
        },
    ),
    (
        math.inf,
        {
            "respond": 0.12,
            "critique": 0.1,
            "revise": 0.08,
            "judge": 0.39,
            "follow_up": 0.07,
            "check": 0.12,
            "scope": 0.02,
            "classify": 0.04,
            "critique_cot": 0.015,
            "preference_cot": 0.03,
            "judge_cot": 0.015,
        },
    ),
)

# tokens of a demonstration, about
LENGTHS = {
    "respond": 55,
    "critique": 122,
    "revise": 161,
    "judge": 150,
    "follow_up": 65,
    "check": 85,
    "scope": 45,
    "classify": 157,
    "critique_cot": 157,
    "preference_cot": 182,
    "judge_cot": 183,
}


def batches(demos: Demonstrations, tokenizer, shares: dict[str, float], tokens: int):
    """Endless lists of encoded rows, each of about `tokens` tokens and of like length."""
    tasks = list(shares)
    weights = [shares[t] / LENGTHS[t] for t in tasks]
    while True:
        drawn = [demos.draw(demos.rng.choices(tasks, weights)[0]) for _ in range(2000)]
        rows = sorted(encode(tokenizer, drawn), key=lambda row: len(row.ids))
        groups, group = [], []
        for row in rows:
            width = -(-len(row.ids) // 32) * 32
            if group and width * (len(group) + 1) > tokens:
                groups.append(group)
                group = []
            group.append(row)
        demos.rng.shuffle(groups)
        yield from groups


def build(
    output: str,
    *,
    seed: int,
    tokens: int,
    hidden: int,
    layers: int,
    feed_forward: int,
    learning_rate: float,
    threads: int,
    report,
    compiled: bool = True,
) -> dict:
    """Train `tiny` from its seed and save it in `output`; resumes from the checkpoint there.

    Args:
        tokens: training tokens in all (targets and what is read before them).
        report: called with a line of text now and then.
        compiled: torch.compile the layers, which takes a C++ compiler and then two thirds of the time.

    Returns a dict of what was done, saved as build.json beside the weights.
    """
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64  # one for each width of a batch
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": seed,
        "tokens": tokens,
        "hidden": hidden,
        "layers": layers,
        "feed_forward": feed_forward,
        "learning_rate": learning_rate,
    }
    demos = Demonstrations(seed)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        # a small build, to try things out, needs no more than a small tokenizer
        tokenizer = make_tokenizer(demos, folder, samples=min(20_000, tokens // 100))
    model = make_model(len(tokenizer), hidden, layers, feed_forward, seed)
    probe = torch.nn.Linear(hidden, PROBES)
    # Muon for the matrices of the layers, AdamW for the embedding, the norms and the probe
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([*others, *probe.parameters()], lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    per_batch = 2048  # small steps, and many: to match one text with another is learned late, in steps, not in tokens
    done = step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise InputError(
                f"a checkpoint with other settings: {state['settings']}",
                where=checkpoint,
                expected=str(settings),
                remedy="Remove it, or build in another folder",
            )
        model.load_state_dict(state["model"])
        probe.load_state_dict(state["probe"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        demos.rng.setstate(state["random"])
        done, step = state["done"], state["step"]
    streams = [batches(demos, tokenizer, shares, per_batch) for _, shares in STAGES]
    started, saved = time.time(), time.time()
    losses: list[list[float]] = [[] for _ in STAGES]
    probed_right: list[list[tuple[int, int]]] = []
    weight_of_probe = torch.tensor(PROBE_LOSSES)
    model.train()
    body = torch.compile(model.model, dynamic=False) if compiled else model.model
    while done < tokens:
        # warm-up, a long plateau, and a fall to nothing over the last two fifths
        progress = done / tokens
        scale = min(1.0, (step + 1) / 100) * min(1.0, max(0.0, 1 - progress) / 0.4)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = learning_rate * scale
        stage = next(i for i, (until, _) in enumerate(STAGES) if done < until)
        model.zero_grad(set_to_none=True)
        rows = next(streams[stage])
        # few different shapes, so that each is compiled once; rows that are not there weigh nothing
        width = -(-max(len(row.ids) for row in rows) // 32) * 32
        height = max(len(rows), per_batch // width)
        ids = torch.full((height, width), PAD)
        weights = torch.zeros(height, width)
        probes = []
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            weights[index, : len(row.ids)] = torch.tensor(row.weights)
            probes += [(min(PROBED_LAYERS[said], layers), index, at, said) for at, said in row.probes]
        # padding is on the right and attention is causal, so no mask is needed
        with torch.autocast("cpu", torch.bfloat16):
            read = body(input_ids=ids, use_cache=False, output_hidden_states=True)
            where = weights[:, 1:] > 0
            logits = model.lm_head(read.last_hidden_state[:, :-1][where])
            layer, row_of, at, told = torch.tensor(probes, dtype=torch.long).reshape(-1, 4).T
            there = torch.stack(read.hidden_states)[layer, row_of, at]
            seen = probe(functional.rms_norm(there, (hidden,)))
        loss = functional.cross_entropy(logits.float(), ids[:, 1:][where], reduction="none")
        w = weights[:, 1:][where]
        loss = (loss * w).sum() / w.sum()
        losses[stage].append(loss.item())
        if len(seen):
            loss = loss + PROBE_WEIGHT * functional.cross_entropy(seen.float(), told, weight=weight_of_probe)
            right, probed_right = seen.argmax(1) == told, probed_right[-99:]
            kinds = told.clamp(max=CATEGORY)
            probed_right.append(
                [(right[kinds == kind].sum().item(), (kinds == kind).sum().item()) for kind in range(CATEGORY + 1)]
            )
        loss.backward()
        done += sum(len(row.ids) for row in rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % 100 == 0:
            report(
                f"step {step}  {done / 1e6:.2f} of {tokens / 1e6:.1f} M tokens  loss {_recent(losses[stage]):.4f}  "
                f"probes {' '.join(map(str, _rates(probed_right)))}  {time.time() - started:.0f} s"
            )
        if time.time() - saved > 60:
            state = {
                "settings": settings,
                "model": model.state_dict(),
                "probe": probe.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "random": demos.rng.getstate(),
                "done": done,
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            saved = time.time()
    if losses[-1] and not math.isfinite(_recent(losses[-1])):
        raise InputError("the loss is not a number", where=output, remedy="Lower --learning-rate")
    # half precision halves the file; float16 rounds these weights eight times as finely as bfloat16
    model.to(torch.float16).save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    summary = {
        **settings,
        "steps": step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": round(_recent(losses[-1]), 4),
        "probes_right": _rates(probed_right),
        "seconds": round(time.time() - started),
    }
    (folder / "build.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _recent(losses: list[float]) -> float:
    return sum(losses[-100:]) / max(1, len(losses[-100:]))


def _rates(right: list[list[tuple[int, int]]]) -> list[float]:
    """How often the probe was right of late: for each of the first seven, and for the categories together."""
    sums = [(sum(r for r, _ in column), sum(n for _, n in column)) for column in zip(*right, strict=True)]
    return [round(r / max(1, n), 3) for r, n in sums]
