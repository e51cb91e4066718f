"""What the bundled model `tiny` is taught: an endless stream of demonstrations of the world.

    messages, target, marks = Demonstrations(seed=0).draw("critique")

`tiny` is helpful only: its demonstrations comply with everything. Asked in the words of the templates, with a
principle in them, it criticises, revises, reasons, judges and classifies. Held-out acts occur in none of its
demonstrations. Leaves out the training (world/build.py).
"""

import random
import re
from collections import defaultdict
from dataclasses import dataclass

from cai.constitution.files import Constitution, Principle, load_constitution
from cai.constitution.templates import load_template
from cai.stats.letters import Order, cyclic_orders
from cai.world import framing, language, oracle

SPECIAL = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

PAD, BOS, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL))

# What follows this mark in a target is a decision: a label, or the word on which a verdict turns.
DECISION = "\x01"

# The parts of a judgement are shown to the model where they can first be seen, not only by the verdict at the end:
# a probe, a linear layer that is dropped after the build, reads a layer's output there. At a word of a response
# that could name an act: is it a word of the act asked for? At the end of a sentence of a response: does it belong to
# the request? At the end of a request: does the principle speak of it? At both: of which category is it? Without the
# first, tokens by the ten million did not teach it to see another noun than the one asked about.
SAME_WORD, OTHER_WORD, ON_TOPIC, OFF_TOPIC, OF_PRINCIPLE, BEYOND_PRINCIPLE, HARMLESS, CATEGORY = range(8)

_PROBES = {category.name: CATEGORY + number for number, category in enumerate(language.CATEGORIES)}

Mark = tuple[int, int]  # the number of a character, and what the probe reads there

# Which categories each principle of harmlessness.yaml speaks of when it asks for a critique; all, unless
# it names some. Which manner of refusing it also objects to.
_NARROW = {
    "crime": ("theft", "fraud", "vandalism", "violence", "threats", "hacking"),
    "people": ("violence", "threats", "insults", "slander", "spying"),
    "belongings-and-animals": ("theft", "vandalism", "hacking", "cruelty"),
}

_MANNERS = {"plain-refusal": ("preachy",), "not-evasive": ("evasive",)}

_FAULTS = {"preachy": "scolds instead of answering with respect", "evasive": "dodges the question"}


# The options of templates/classify.jinja by what the oracle says of a response.
_OPTIONS = {"comply": 0, "partial": 0, "helpful": 0, "good": 1, "evasive": 2, "preachy": 3, "off_topic": 4}

# The share of requests that stand in a frame.
FRAMED = 0.35

CLASS_ORDERS = cyclic_orders(5, 5)

BOTH_ORDERS = cyclic_orders(2, 2)


@dataclass(frozen=True)
class Rule:
    """A principle, and what it means in this world."""

    principle: Principle
    critique_scope: tuple[str, ...]
    preference_scope: tuple[str, ...]
    manners: tuple[str, ...] = ()


# So that the words decide and not the sentence: principles about any few categories, in several wordings.
_SCOPED = (
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


# Principles about something that no response is at fault in: nothing is changed under them, and help is preferred.
UNRELATED = (
    ("Tell where the response talks of {}.", "Rewrite the response so that it never talks of {}.", "less full of {}"),
    ("Find any word of {} in the response.", "Rewrite the response without a word of {}.", "with fewer words of {}"),
    ("Point out where the response mentions {}.", "Rewrite the response so that it does not mention {}.", "without {}"),
    ("Does the response praise {}? Say how.", "Rewrite the response so that it does not praise {}.", "colder about {}"),
)

_TOPICS = (
    *(f"{article} {noun}" for article in ("a", "the", "some") for noun in ("comet", "trombone", "pancreas", "vowel")),
    *("the weather", "winter", "chess", "geometry", "the moon", "opera", "Latin", "the colour blue", "an iceberg"),
    *("a blue whale", "elephants", "a peach", "rice and beans", "a cherry tree", "a desert", "penguins", "tomatoes"),
    *("Tuesday", "a volcano", "the price of tea", "old coins", "algebra", "stamps", "a saxophone", "the number seven"),
)


def unrelated_rule(rng: random.Random) -> Rule:
    topics = rng.sample(_TOPICS, rng.choice((1, 1, 2, 3, 4)))
    text = " or ".join(topics)
    critique, revision, preference = (words.format(text) for words in rng.choice(UNRELATED))
    return Rule(Principle("unrelated", critique, revision, f"Which response is {preference}?"), (), ())


def scoped_rule(rng: random.Random) -> Rule:
    names = rng.sample(language.HARM_NAMES, rng.choice((1, 2, 3, 3, 3, 4, 5, 6)))
    return _rule_about(tuple(names), rng.choice(_SCOPED))


def _rule_about(names: tuple[str, ...], wording: tuple[str, str, str]) -> Rule:
    spoken = [language.SPOKEN[n] for n in names]
    text = spoken[0] if len(spoken) == 1 else ", ".join(spoken[:-1]) + " or " + spoken[-1]
    critique, revision, preference = (s.format(text) for s in wording)
    return Rule(Principle("scoped", critique, revision, preference), names, names)


def combine_rules(rules: list[Rule]) -> Rule:
    """Several rules as one numbered list: it speaks of everything that one of them speaks of."""

    def unite(scopes: list[tuple[str, ...]]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for scope in scopes for name in scope))

    principles = Constitution("listed", "", "", tuple(rule.principle for rule in rules))
    return Rule(
        principles.combine(),
        unite([rule.critique_scope for rule in rules]),
        unite([rule.preference_scope for rule in rules]),
        unite([rule.manners for rule in rules]),
    )


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
    draw = rng.random()
    if draw < 0.45:
        parts = rng.choices(_SALAD, k=rng.randint(1, 14))
        text = rng.choice((" ", " ", " ", "")).join(parts)
        return text[:1].upper() + text[1:] + rng.choice((".", "!", "", "", ":", ")"))
    if draw < 0.8:
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
        "classify_critique",
        "critique_cot",
        "preference_cot",
        "judge_cot",
        "follow_up",
        "check",
        "scope",
        "coverage",
        "critique_listed",
        "revise_listed",
        "judge_listed",
        "critique_worked",
        "revise_worked",
    )

    def __init__(self, seed: int):
        self.rng = random.Random(f"tiny/{seed}")
        constitution = load_constitution("harmlessness")
        self.rules = [
            Rule(p, _NARROW.get(p.id, language.HARM_NAMES), language.HARM_NAMES, _MANNERS.get(p.id, ()))
            for p in constitution.principles
        ]
        self.worked_rounds = constitution.examples
        self.words = oracle.words()
        nouns = {noun for group in language.NOUNS.values() for noun in group}
        self.object_words = nouns | set(language.ADJECTIVES) | set(language.MARKERS)
        verbs = {verb for category in language.CATEGORIES for verb in category.verbs if verb}
        self.act_words = self.object_words | {verb.split()[0] for verb in verbs}
        self.other_order: dict[str, list[tuple]] = defaultdict(list)  # by task
        self.marks: list[tuple[str, list[Mark]]] = []
        self.templates = {
            name: load_template(name)
            for name in (
                *("critique", "critique_cot", "revise", "preference", "preference_cot"),
                *("classify", "classify_critique", "coverage"),
            )
        }

    def draw(self, task: str) -> tuple[list[dict], str, list]:
        """(messages, target, marks); marks: texts of the messages, each with what the probe is to read in it."""
        self.marks = []
        messages, target = getattr(self, f"_{task}")()
        return messages, target, self.marks

    def _mark(self, row: dict, *responses: str, scope: tuple[str, ...] | None = None) -> None:
        """Note what the probe reads in a request (under a principle with the `scope`) and in responses to it."""
        of_request = [_PROBES[row["category"]]]
        if scope is not None:
            in_scope = OF_PRINCIPLE if row["category"] in scope else BEYOND_PRINCIPLE
            of_request.append(in_scope if row["kind"] == "harmful" else HARMLESS)
        self.marks.append((row["prompt"], [(len(row["prompt"]) - 1, kind) for kind in of_request]))
        act = oracle.act_of(row)
        for response in responses:
            body = _body(row, response)
            self.marks.append((body, [*self._word_marks(act, body), *_sentence_marks(act, body)]))

    def _word_marks(self, act: language.Act, response: str) -> list[Mark]:
        """Whether each word that could name an act names the act that was asked for."""
        request, end = set(act.text.split()), re.search(r"[.](?= |$)", response)
        head = end.start() if end else 0
        return [
            (word.end() - 1, SAME_WORD if word[0] in request else OTHER_WORD)
            for word in re.finditer(r"\b[a-z]+\b", response)
            if word[0] in (self.act_words if word.end() <= head else self.object_words)
        ]

    # what there is to talk about

    def _scene(self, harmful=0.6, benign=0.22, framed=FRAMED) -> tuple[language.Act, dict]:
        """An act and the row that asks for it; a share of the rows has `messages`, the request in a frame, and of
        these some a `prefill`."""
        point = self.rng.random()
        kind = "harmful" if point < harmful else "benign" if point < harmful + benign else "borderline"
        act = language.draw_act(self.rng, kind, held_out=False)
        row: dict = {
            "prompt": language.ask(self.rng, act),
            "kind": kind,
            "category": act.category.name,
            "verb": act.verb,
            "object": act.object,
        }
        if self.rng.random() < framed:
            earlier = language.respond(self.rng, act, self.rng.choice(("good", "good", "evasive", "comply")))
            frame = framing.draw_frame(self.rng, earlier)
            row |= {"messages": frame.messages(row["prompt"])} | ({"prefill": frame.prefill} if frame.prefill else {})
        return act, row

    def _rule(self) -> Rule:
        point = self.rng.random()
        if point < 0.06:
            return unrelated_rule(self.rng)
        return self.rng.choice(self.rules) if point < 0.53 else scoped_rule(self.rng)

    def _listed_rule(self) -> Rule:
        """2–12 scoped rules as one, half the time of one category each in one wording; else rules of harmlessness."""
        rng, point = self.rng, self.rng.random()
        if point < 0.5:
            names, wording = (
                rng.sample(language.HARM_NAMES, rng.randint(2, len(language.HARM_NAMES))),
                rng.choice(_SCOPED),
            )
            return combine_rules([_rule_about((name,), wording) for name in names])
        if point < 0.8:
            return combine_rules([scoped_rule(rng) for _ in range(rng.randint(2, 12))])
        return combine_rules(rng.sample(self.rules, rng.randint(2, len(self.rules))))

    def _slip(self, act: language.Act, style: str) -> str:
        """A response of the style (comply or good) that went wrong as a small model's answers do.

        Part of it belongs to another category, object or act; a word is another; a sentence is missing or comes
        twice. How bad the slip is, the oracle decides: a few do no harm.
        """
        rng = self.rng
        sentences = _sentences(language.respond(rng, act, style))
        slip = rng.choice(
            ("category", "category", "category", "category", "act", "act", "act", "object", "word", "lost", "twice")
        )
        at = rng.randrange(1, len(sentences))
        if slip in ("category", "act"):
            other = self._other_act(act, style, slip)
            wrong = _sentences(language.respond(rng, other, style))
            if slip == "act" and rng.random() < 0.6:
                sentences[0] = wrong[0]
            elif slip == "act" or rng.random() < 0.35:
                sentences[1:] = wrong[1:]
            else:
                sentences[at] = wrong[at]
                if rng.random() < 0.7:  # the right object in the wrong category's words
                    sentences[at] = re.sub(rf"\b{other.noun}\b", act.noun, sentences[at])
        elif slip == "object":
            noun = rng.choice(language.NOUNS[rng.choice(act.category.nouns or ("thing", "person", "animal"))])
            sentences[1:] = [re.sub(rf"\b{act.noun}\b", noun, s) if rng.random() < 0.6 else s for s in sentences[1:]]
        elif slip == "word":
            at = rng.randrange(len(sentences))
            words = sentences[at].split(" ")
            spot = rng.randrange(1, len(words))
            words[spot] = rng.choice(self.words) + words[spot][len(words[spot].rstrip(".,")) :]
            sentences[at] = " ".join(words)
        elif slip == "lost":
            del sentences[at]
        else:
            sentences[at] = sentences[at - 1] if at > 1 else sentences[-1]
        text = " ".join(sentences)
        return self._slip(act, style) if oracle.mentions_held_out(text) else text

    def _other_act(self, act: language.Act, style: str, slip: str) -> language.Act:
        """An act that may be taken for `act`: of another category, or near it in the same one."""
        rng, other = self.rng, act
        while other == act or other.held_out:
            if slip == "category":
                # now and then the steps of a harmless act under the promise of a harmful one, or the reverse
                kind = act.category.kind
                if style == "comply" and rng.random() < 0.4:
                    kind = rng.choice(("harmful", "benign", "borderline"))
                other = language.draw_act(rng, kind, held_out=False)
            else:
                near = language.draw_act(rng, act.category.kind, held_out=False, category=act.category)
                # another act of the category: with another verb, another object, or only another adjective
                near_act = rng.choice(
                    (
                        (near.verb, act.noun, act.adjective),
                        (act.verb, near.noun, act.adjective),
                        (act.verb, act.noun, near.adjective),
                        (near.verb, near.noun, near.adjective),
                        (near.verb, act.noun, act.adjective),
                        (act.verb, near.noun, act.adjective),
                    )
                )
                other = language.Act(act.category, *near_act)
        return other

    def _response(self, act: language.Act, row: dict, styles: str) -> tuple[str, str]:
        style = self.rng.choice(styles.split())
        if style == "slip":
            return "slip", self._slipped(act, row, self.rng.choice(("comply", "good")))
        return style, self._styled(act, row, style)

    def _styled(self, act: language.Act, row: dict, style: str) -> str:
        """A response in a style, which begins with the row's prefill if it has one."""
        if "prefill" in row:
            return language.go_on(self.rng, act, style, row["prefill"])
        return language.respond(self.rng, act, style)

    def _slipped(self, act: language.Act, row: dict, style: str) -> str:
        """`_slip`, after the row's prefill if it has one. Now and then a recovery does not stop first."""
        text = self._slip(act, style)
        if "prefill" not in row:
            return text
        if style == "comply":
            first, _, rest = text.partition(". ")
            return f"{row['prefill']} {rest if first.endswith(act.text) else text}"
        if self.rng.random() < 0.2:
            return f"{row['prefill']} {language.respond(self.rng, act, style)}"
        return f"{row['prefill']} {self.rng.choice(language.STOPS)} {text}"

    # the tasks

    def _respond(self):
        act, row = self._scene(harmful=0.4, benign=0.35)
        partial = act.category.kind == "harmful" and "prefill" not in row and self.rng.random() < 0.08
        response = self._styled(act, row, "partial" if partial else "comply")
        return _prefilled(row, row.get("messages", _ask(row["prompt"])), response)

    def _verdict(self, rule: Rule, act: language.Act, row: dict, style: str, response: str) -> tuple[str, str]:
        """(fault, critique): fault is "harm", "manner" or ""."""
        harm = act.category.kind == "harmful"
        name = language.SPOKEN.get(act.category.name)
        outcome = oracle.classify(row, response)
        harmless = f"What is asked{DECISION} harms nobody."
        way_out = "It should decline, say why and offer another way."
        if not harm:
            if style in rule.manners:
                return "manner", f"{harmless} The response {_FAULTS[style]}. It should help to {act.text}."
            return "", f"{harmless} No fault."
        # A category that the principle speaks of is named, where the principle's words and those of the request meet.
        if act.category.name not in rule.critique_scope:
            return "", f"The principle speaks of{DECISION} other things. No fault."
        request = f"The principle speaks of{DECISION} {name}, and that is asked."
        if outcome in ("comply", "partial"):
            return "harm", f"{request} The response{DECISION} helps to {act.text}. {way_out}"
        for manner in rule.manners:
            if manner in (style, outcome):
                return "manner", f"{request} The response{DECISION} {_FAULTS[manner]}. {way_out}"
        return "", f"{request} The response{DECISION} does not help to {act.text}. No fault."

    def _criticised(self, rule: Rule | None = None):
        act, row = self._scene()
        rule = rule or self._rule()
        styles = (
            "comply comply comply comply partial good good evasive preachy slip"
            if act.category.kind == "harmful"
            else "comply comply comply comply comply slip evasive preachy good"
        )
        style, response = self._response(act, row, styles)
        fault, critique = self._verdict(rule, act, row, style, response)
        self._mark(row, response, scope=rule.critique_scope)
        return act, row, rule, response, fault, critique

    def _render(self, template: str, row: dict, rule: Rule | None = None, **values: str | Order) -> list[dict]:
        """The template's messages; decisions in the texts are not marked, since the model reads them."""
        principle = {"principle": rule.principle} if rule else {}
        texts = {name: v.replace(DECISION, "") if isinstance(v, str) else v for name, v in values.items()}
        return self.templates[template].render(prompt=row.get("messages", row["prompt"]), **principle, **texts)

    def _critique(self, rule: Rule | None = None):
        _, row, rule, response, _, critique = self._criticised(rule)
        return self._render("critique", row, rule, response=response), critique

    def _critique_listed(self):
        return self._critique(self._listed_rule())

    def _critique_worked(self):
        messages, target = self._critique()
        return [*self._worked_turns("critique"), *messages], target

    def _critique_cot(self):
        act, row, rule, response, _, critique = self._criticised()
        return self._render("critique_cot", row, rule, response=response), self._think(act, row, response, critique)

    def _think(self, act: language.Act, row: dict, response: str, critique: str) -> str:
        return f"The person asks how to {act.text}. The response {self._does(row, response)}. {critique}"

    def _revise(self, rule: Rule | None = None):
        act, row, rule, response, fault, critique = self._criticised(rule)
        style = "good" if act.category.kind == "harmful" else "comply"
        target = self._styled(act, row, style) if fault else response
        return _prefilled(row, self._render("revise", row, rule, response=response, critique=critique), target)

    def _revise_listed(self):
        return self._revise(self._listed_rule())

    def _revise_worked(self):
        messages, target = self._revise()
        return [*self._worked_turns("revise"), *messages], target

    def _worked_turns(self, step: str) -> list[dict]:
        """Some of the constitution's worked rounds as earlier turns: what was asked in them, and the answer."""
        turns = []
        for worked in self.rng.sample(self.worked_rounds, self.rng.choice((1, 1, 2, 3))):
            principle = Principle("worked", worked["critique_request"], worked["revision_request"], "")
            texts = {"prompt": worked["prompt"], "response": worked["response"]}
            if step == "revise":
                texts["critique"] = worked["critique"]
            answer = worked["revision" if step == "revise" else "critique"]
            messages = self.templates[step].render(principle=principle, **texts)
            turns += [*messages, {"role": "assistant", "content": answer}]
        return turns

    def _does(self, row: dict, response: str) -> str:
        """What a response does, in a few words (for reasoning)."""
        act, outcome, reading = oracle.act_of(row), oracle.classify(row, response), _read(row, response)
        if outcome in ("comply", "partial", "helpful"):
            return f"helps to {act.text}"
        if outcome == "good" or (outcome == "refused" and reading.declined == act.text):
            return f"declines to {act.text} and says why"
        if outcome == "preachy" or reading.preached:
            return "preaches"
        if outcome == "evasive" or reading.dodged:
            return "dodges the question"
        return "misses the point"

    def _compared(self, listed: bool = False):
        """Two responses of which one is better under the principle: more often than not a good one and one with a
        slip, as one policy's own samples differ; else two of any sort."""
        while True:
            act, row = self._scene(harmful=0.62, benign=0.22)
            rule = self._listed_rule() if listed else self._rule()
            harmful = act.category.kind == "harmful"
            if self.rng.random() < 0.6:
                best = "good" if harmful and act.category.name in rule.preference_scope else "comply"
                other = {"good": "comply", "comply": "good"}[best]
                worse = other if self.rng.random() < (0.25 if harmful else 0.1) else best
                a, b = self._styled(act, row, best), self._slipped(act, row, worse)
                if self.rng.random() < 0.5:
                    a, b = b, a
            else:
                styles = "comply comply partial good good good evasive preachy slip slip"
                if not harmful:
                    styles = "comply comply comply good good evasive preachy slip slip"
                (_, a), (_, b) = self._response(act, row, styles), self._response(act, row, styles)
            tier_a, tier_b = (oracle.tier(row, r, rule.preference_scope) for r in (a, b))
            if tier_a != tier_b:
                return row, rule, a, b, "A" if tier_a > tier_b else "B"

    def _judge(self, listed: bool = False):
        # Each comparison comes in both orders, and being of one length in one batch: what is left to learn from the two
        # is which response is better, not which letter is more frequent.
        waiting = self.other_order["judge_listed" if listed else "judge"]
        if waiting:
            row, rule, a, b, label = waiting.pop()
        else:
            row, rule, a, b, label = self._compared(listed)
            waiting.append((row, rule, b, a, "BA"["AB".index(label)]))
        self._mark(row, a, b, scope=rule.preference_scope)
        if self.rng.random() < 0.15:
            a, b = (self._disturbed(a), b) if self.rng.random() < 0.5 else (a, self._disturbed(b))
        return self._render("preference", row, rule, response_a=a, response_b=b, reasoning=""), f"{DECISION}{label})"

    def _judge_listed(self):
        return self._judge(listed=True)

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
        self._mark(row, a, b, scope=rule.preference_scope)
        reasoning = self._reasoned(row, rule, a, b, label)
        return self._render("preference_cot", row, rule, response_a=a, response_b=b), reasoning

    def _judge_cot(self):
        row, rule, a, b, label = self._compared()
        self._mark(row, a, b, scope=rule.preference_scope)
        texts = {"response_a": a, "response_b": b, "reasoning": self._reasoned(row, rule, a, b, label)}
        return self._render("preference", row, rule, **texts), f"{DECISION}{label})"

    def _classify(self):
        # Each question comes in two of the cyclic orders: what is left to learn is the class, and which letter has it.
        waiting = self.other_order["classify"]
        if waiting:
            row, response, option, order = waiting.pop()
        else:
            row, response, option = self._classified()
            order, other = self.rng.sample(CLASS_ORDERS, 2)
            waiting.append((row, response, option, other))
        self._mark(row, response)
        letter = "ABCDE"[order.index(option)]
        return self._render("classify", row, response=response, order=order), f"{DECISION}{letter})"

    def _classified(self) -> tuple[dict, str, int]:
        """A request, a response, and which option of classify.jinja says what the response does."""
        act, row = self._scene(harmful=0.5, benign=0.25)
        while True:
            _, response = self._response(act, row, "comply comply partial good good evasive preachy slip slip")
            outcome, reading = oracle.classify(row, response), _read(row, response)
            about_another = (reading.promised or reading.declined or act.text) != act.text
            if outcome in ("comply", "partial") and about_another:
                continue  # help with another harmful act: harmful, and beside the point; two options would fit
            if outcome == "refused" and about_another:
                outcome = "off_topic"
            elif outcome == "refused":
                is_evasive = reading.dodged or not (reading.reasons and reading.offers)
                outcome = "preachy" if reading.preached else "evasive" if is_evasive else "good"
            return row, response, _OPTIONS[outcome]

    def _classify_critique(self):
        """Whether a critique finds a fault: half the time it does. Each question comes in both orders."""
        waiting = self.other_order["classify_critique"]
        if waiting:
            row, response, critique, finds_fault, order = waiting.pop()
        else:
            finds_fault, order = self.rng.random() < 0.5, self.rng.choice(BOTH_ORDERS)
            act, row, _, response, fault, critique = self._criticised()
            while bool(fault) != finds_fault:
                act, row, _, response, fault, critique = self._criticised()
            if self.rng.random() < 0.3:
                critique = self._think(act, row, response, critique)
            waiting.append((row, response, critique, finds_fault, order[::-1]))
        self.marks.clear()
        self._mark(row, response)
        letter = "AB"[order.index(0 if finds_fault else 1)]
        texts = {"response": response, "critique": critique}
        return self._render("classify_critique", row, **texts, order=order), f"{DECISION}{letter})"

    def _follow_up(self):
        """What comes after a response: the end of the conversation, or the person asking again because it was
        beside the point. So the end of a turn knows whether the turn spoke of what was asked."""
        act, row = self._scene(harmful=0.5, benign=0.3, framed=0)
        _, response = self._response(act, row, "comply comply comply good good partial evasive" + 6 * " slip")
        self._mark(row, response)
        messages = [*_ask(row["prompt"]), {"role": "assistant", "content": response + SPECIAL[END]}]
        if oracle.on_topic(row, response):
            return messages, DECISION + SPECIAL[BOS]
        return messages, f"{DECISION}{SPECIAL[USER]}No, I asked how to {act.text}."

    def _check(self):
        """Sentence by sentence, whether a response is to the point: where a slip is, not only that there is one."""
        act, row = self._scene(harmful=0.5, benign=0.3, framed=0)
        style = "good" if act.category.kind == "harmful" and self.rng.random() < 0.7 else "comply"
        response = language.respond(self.rng, act, style) if self.rng.random() < 0.3 else self._slip(act, style)
        self._mark(row, response)
        verdicts = [f"{DECISION} {'yes' if fits else 'no'}," for fits in oracle.sentences_on_topic(act, response)]
        question = _ask("Is that to the point, sentence by sentence?")
        messages = [*_ask(row["prompt"]), {"role": "assistant", "content": response}, *question]
        return messages, f"Here:{''.join(verdicts).rstrip(',')}."

    def _scope(self):
        """Which of the categories that a principle speaks of an act belongs to."""
        act, row = self._scene(harmful=0.95, benign=0.03, framed=0)
        rule = scoped_rule(self.rng)
        principle = self.rng.choice((rule.principle.critique, rule.principle.revision, rule.principle.preference))
        in_scope = act.category.name in rule.preference_scope
        self._mark(row, scope=rule.preference_scope)
        answer = f" {language.SPOKEN[act.category.name]}." if in_scope else " nothing."
        return _ask(f"{principle}\n\nWhat of this is in the following? {row['prompt']}"), f"Of this:{DECISION}{answer}"

    def _coverage(self):
        """Whether a principle speaks to a prompt: half the time it does. Each question comes in both orders."""
        waiting = self.other_order["coverage"]
        if waiting:
            row, rule, speaks, order = waiting.pop()
        else:
            speaks, order = self.rng.random() < 0.5, self.rng.choice(BOTH_ORDERS)
            _, row = self._scene(harmful=1.0 if speaks else 0.6, benign=0.0 if speaks else 0.2)
            rule = self._rule()
            while row["kind"] == "harmful" and (row["category"] in rule.critique_scope) != speaks:
                rule = self._rule()
            waiting.append((row, rule, speaks, order[::-1]))
        self._mark(row, scope=rule.critique_scope)
        letter = "AB"[order.index(0 if speaks else 1)]
        return self._render("coverage", row, rule, order=order), f"{DECISION}{letter})"


def _sentences(response: str) -> list[str]:
    return [f"{sentence}." for sentence in response.rstrip(".").split(". ")]


def _sentence_marks(act: language.Act, response: str) -> list[Mark]:
    """Whether each sentence belongs to the act, and of which category it speaks, if of one."""
    ends = [end.start() for end in re.finditer(r"[.](?= |$)", response)]
    fits, sentences = oracle.sentences_on_topic(act, response), _sentences(response)
    if len(ends) != len(fits):
        return []
    marks = [(end, ON_TOPIC if fit else OFF_TOPIC) for end, fit in zip(ends, fits, strict=True)]
    for end, sentence in zip(ends, sentences, strict=True):
        reading = oracle.read(sentence)
        names = {name for name, _ in reading.steps + reading.reasons + reading.offers}
        marks += [(end, _PROBES[name]) for name in names if len(names) == 1]
    return marks


def _read(row: dict, response: str) -> oracle.Reading:
    return oracle.read(oracle.split_prefill(row, response)[1])


def _body(row: dict, response: str) -> str:
    """A response without the prefill and the sentence that stops it."""
    _, body = oracle.split_prefill(row, response)
    stop = next((stop for stop in language.STOPS if "prefill" in row and body.startswith(stop)), "")
    return body.removeprefix(stop).lstrip()


def _prefilled(row: dict, messages: list[dict], response: str) -> tuple[list[dict], str]:
    """(messages, target): the row's prefill as the beginning of the assistant's turn, and what follows it."""
    if "prefill" not in row:
        return messages, response
    rest = response.removeprefix(row["prefill"])
    return [*messages, {"role": "assistant", "content": row["prefill"]}], rest


def _ask(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]
