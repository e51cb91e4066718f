"""Checks of a constitution by its words: duplicates, contradictions, and requests that are hard to follow.

    for finding in lint(load_constitution("harmlessness")): print(finding.rule, finding.message)

Rules over words, for English. Leaves out meaning: two principles that say the same, or the opposite, in other
words are not seen (`NOT_JUDGED` lists this beside the result).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from pathlib import Path

from cai.constitution import polarity
from cai.constitution.files import REQUESTS, Constitution, Principle, phrase, phrase_permission
from cai.constitution.prose import read_sentence
from cai.constitution.quotes import check_quotes
from cai.constitution.subjects import find_names

NOT_JUDGED = (
    "whether two principles say the same, or the opposite, in different words",
    "whether a principle is right for its purpose, and what it does to a model: try it (ablate, evaluate.py)",
    "which prompts no principle speaks to: see coverage",
    "requests in languages other than English, except for literal duplicates",
)

# Mean overlap of the words of all three requests, above which two principles are nearly the same. The closest two
# in the bundled constitutions, those of property-only, reach 0.75.
NEAR = 0.8

# Share of a clause's words that the opposite clause must have.
OPPOSED = 0.75


@dataclass(frozen=True)
class Finding:
    """A problem: `rule`, the ids of the principles, the line of the last of them, and what to do."""

    rule: str
    principles: tuple[str, ...]
    line: int
    message: str
    remedy: str


def lint(constitution: Constitution) -> list[Finding]:
    """All findings, in the order of the file."""
    findings = [*_unserved_duties(constitution), *_lost_quotes(constitution)]
    can_read = is_english(constitution)
    names = find_names(" ".join(principle.principle for principle in constitution.principles))
    for principle in constitution.principles:
        findings += _unclear(principle, names) if can_read else []
        findings += [*_double_negatives(principle), *_compound(principle), *_labels(principle), *_negated(principle)]
    for first, second in combinations(constitution.principles, 2):
        findings += _identical(first, second) or _contradiction(first, second) or _duplicate(first, second)
    return sorted(findings, key=lambda finding: finding.line)


def is_english(constitution: Constitution) -> bool:
    """Whether one word in ten or more is among the commonest of English: else the rules see next to nothing."""
    words = [word for p in constitution.principles for text in _texts(p).values() for word in _words(text)]
    return sum(word in _COMMON for word in words) >= len(words) / 10


# --- words --------------------------------------------------------------------------------------------------


_remembered = lru_cache(maxsize=10_000)  # each text is compared with those of all other principles


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_COMMON = _set("""
    a an the and or of to in on at by for from with as is are be been it its that this which who whom what how would
    could may might can should must so than then there any anything anybody some all each other more less""")

# Words of the task, in nearly every request, which say nothing of what it asks for.
_TASK = _set("""
    say point out find name explain identify describe list quote rewrite write response responses assistant answer
    person people does do did give gives gave better anybody somebody whether where help helps please make makes
    follow follows principle following revise revised revision amend change new last preceding content human""")

_NOT = _set("no not never without nothing nobody none")

_AVOID = _set("""
    avoid avoids avoiding refrain refrains refraining prevent prevents omit omits fail fails failing failed lack lacks
    remove removes drop drops""")

# Words that turn a demand into its opposite: all of these except those that find fault with an absence.
FORBIDS = (_NOT | _AVOID | {"neither", "nor"}) - _set("fail fails failing failed lack lacks")

_CLAUSE = re.compile(r"[.,;:?!()“”\"]|\b(?:but|while|instead|rather|because|although|unless|when|where|if|so)\b")


# What negates in a request as “not” does, though not in what a sentence demands.
_NEGATES = re.compile(r"\b(?:fail(?:s|ed|ing)? to|lack(?:s|ed|ing)?|free (?:of|from)|deletes?|cuts?|strips?)\b")

_REPLACES = re.compile(r"\breplac(?:e|es|ing) (.+?) (?:with|by)\b")

_LESS = re.compile(r"([^,.;:?!]*)(?<!\bat )\b(?:less|least|fewer|fewest)\b")


def read_request(text: str) -> str:
    """A request in lower case, with “not” in front of what it wants less of or names as missing (“fails to”)."""
    text = re.sub(r"\b(?:instead of|rather than)\b", ", not", _REPLACES.sub(r"not \1, ", text.lower()))
    return _LESS.sub(r" not \1", _NEGATES.sub("not", text))


def _words(text: str) -> list[str]:
    text = re.sub(r"n[’']t\b", " not", text.lower().replace("cannot", "can not").replace("leave out", "omit"))
    return re.findall(r"[^\W\d_]+|\d+", re.sub(r"[’']s\b", "", text.replace("leaves out", "omits")))


_ENDING = re.compile(r"(?<=...)(?:ations?|ingly|edly|ments?|ness|ings?|ies|e[ds]|ly|[sey])$")


def _stem(word: str) -> str:
    """A word without the commonest endings: enough to bring `helps`, `helping` and `helped` together."""
    return _ENDING.sub("", word)


def content_words(words: list[str]) -> frozenset[str]:
    """The stems of the words that say what a text is about."""
    return frozenset(_stem(w) for w in words if w not in _COMMON and w not in _TASK and w not in FORBIDS)


def split_clauses(text: str) -> Iterator[list[str]]:
    """The words of each clause, which ends at a punctuation mark or a word that begins another."""
    for part in _CLAUSE.split(text):
        if words := _words(part):
            yield words


# --- one principle ------------------------------------------------------------------------------------------


def _finding(rule: str, principles: tuple[Principle, ...], message: str, remedy: str) -> Finding:
    return Finding(rule, tuple(p.id for p in principles), principles[-1].line, message, remedy)


def _texts(principle: Principle) -> dict[str, str]:
    """The texts that a person wrote: the plain sentence, or else the requests."""
    if principle.principle:
        return {"principle": principle.principle}
    return {name: getattr(principle, name) for name in REQUESTS}


def _double_negatives(principle: Principle) -> Iterator[Finding]:
    for name, text in _texts(principle).items():
        for words in split_clauses(re.sub(r"\b(?:and|or)\b", ",", text)):
            if twice := _negated_twice(words):
                yield _finding(
                    "double-negative",
                    (principle,),
                    f"the {name} has a double negative (“{twice}”): {text}",
                    "Say what should be, not what should not be missing",
                )
                break


def _negated_twice(words: list[str]) -> str:
    """The two words of a clause that cancel each other, or "". `avoid harm without scolding` has none."""
    negators = [word for word in words if word in _NOT | _AVOID]
    for first, second in pairwise(negators):
        if first in _NOT or second != "without":
            return f"{first} … {second}"
    undone = re.search(r"\bnot ((?:un|in|im|ir|il|dis)[a-z]{4,})", " ".join(words))
    return undone[0] if undone and not undone[1].startswith(_NOT_NEGATED) else ""


# Words with a beginning like a negative one.
_NOT_NEGATED = tuple(
    _set("""
    incl infl info inst inte inti intr inve invi invo inside insi insu incr indi indu under until unless unit
    discu displ discl dista disti distr impro impos imply impli impor imme impac illus""")
)

_COMPARATIVE = r"(?:more|less|fewer|better|worse|most|least|\w{3,}er|\w{3,}est)"

_TWO_CRITERIA = re.compile(
    rf"\b{_COMPARATIVE}\b[^,.;?]*?(?:,? and|,? as well as|, but)(?: (?:is|are|also|has|gives|shows))*"
    rf" (?={_COMPARATIVE}\b)|\bboth\b[^.;?]* and\b|\bmost \w+, \w+,? and \w+",
    re.IGNORECASE,
)

_NO_COMPARATIVE = _set("""
    other another whether rather either neither never after under over ever answer matter number order letter
    water paper computer user person power offer consider remember however together further former later manner
    danger anger customer teacher lawyer refer deliver prefer suffer wonder interest request honest test best rest
    latest modest suggest protest forest harvest invest quest west guest""")

_SECOND_TASK = re.compile(
    r"\b(?:also|furthermore|moreover|in addition|additionally|and then|secondly)\b", re.IGNORECASE
)

_IMPERATIVE = _set("""
    find say point explain identify name list quote discuss describe criticise criticize critique comment rewrite
    revise write change remove add choose pick compare""")


def _compound(principle: Principle) -> Iterator[Finding]:
    remedy = "Make two principles of it: nobody can tell which of the two decided"
    for name, text in _texts(principle).items():
        if name == "preference":
            if any(_compares(match, text) for match in _TWO_CRITERIA.finditer(text)):
                yield _finding("compound", (principle,), f"the preference has two criteria: {text}", remedy)
            continue
        if second := _SECOND_TASK.search(text):
            yield _finding("compound", (principle,), f"the {name} asks for two things (“{second[0]}”): {text}", remedy)
            continue
        begins = [words[0] for part in re.split(r"[.;?!]", text) if (words := _words(part.replace("Please ", "")))]
        if sum(word in _IMPERATIVE for word in begins) > 1:
            yield _finding("compound", (principle,), f"the {name} asks for two things in two sentences: {text}", remedy)


def _compares(match: re.Match, text: str) -> bool:
    """Whether what looks like two comparatives are such, and not words that only end like one."""
    following = re.match(r"\w+", text[match.end() :])
    words = [match[0].split()[0].lower(), following[0].lower() if following else ""]
    return not set(words) & _NO_COMPARATIVE


def _labels(principle: Principle) -> Iterator[Finding]:
    text = principle.preference
    if position := re.search(
        r"\b(?:first|second|former|latter) (?:response|answer|one)\b|\((?:A|B)\)"
        r"|\b(?:response|answer|option) [AB]\b",
        text,
    ):
        yield _finding(
            "names-a-place",
            (principle,),
            f"the preference names a position (“{position[0]}”): {text}",
            "Both orders are asked: ask which response, and name none",
        )


_WRAPPING = re.compile(r"^.*?\b(?:follows?|following) (?:this|the) principle(?: better)?: ", re.IGNORECASE)

_FAULT_FINDING = re.compile(r"^(?:please )?(?:find|point out|name|list|quote|identify|say where)\b", re.IGNORECASE)


def _negated(principle: Principle) -> Iterator[Finding]:
    """Requests that ask for what the sentence forbids, or find fault with what it asks for."""
    sentence = principle.principle
    wanted, forbidden = _demands(sentence)
    for name, phrased in phrase(sentence).items() if sentence and not _is_permission(principle) else ():
        if (text := getattr(principle, name)) == phrased:
            continue
        is_wrapped = bool(_WRAPPING.search(text))
        is_fault = name == "critique" and not is_wrapped and bool(_FAULT_FINDING.search(text))
        opposite = wanted if is_fault else forbidden if is_wrapped or name != "critique" else []
        if any(_covers(a, b) for a in _demands(read_request(_WRAPPING.sub("", text)))[0] for b in opposite):
            problem = f"the {name} {'finds fault with' if is_fault else 'asks for'} what “{sentence}” "
            yield _finding(
                "negated",
                (principle,),
                f"{problem}{'asks for' if is_fault else 'forbids'}: {text}",
                "Reword the request, or the sentence: a model is trained towards what the requests ask for",
            )


def _unclear(principle: Principle, names: frozenset[str]) -> Iterator[Finding]:
    sentence = principle.principle
    is_unclear = bool(sentence) and polarity.judge_sentence(sentence).polarity == polarity.UNCLEAR
    if is_unclear and not read_sentence(sentence, names).kind and not _is_permission(principle):
        problem = f"unclear whether it demands or prohibits what it names: {sentence}"
        remedy = "Begin with what to do (“Name …”), or with “Never” or “Do not”"
        yield _finding("unclear", (principle,), problem, remedy)


def _is_permission(principle: Principle) -> bool:
    """Whether its requests are phrased so that what it permits is neither forbidden nor demanded."""
    return all(getattr(principle, name) == text for name, text in phrase_permission(principle.principle).items())


def _covers(first: frozenset, second: frozenset) -> bool:
    """Whether two clauses are about the same."""
    return len(first & second) >= max(2, OPPOSED * min(len(first), len(second)))


# --- two principles -----------------------------------------------------------------------------------------


_REMOVE = "Remove one of them, and give the other more weight if it should count twice"


def _identical(first: Principle, second: Principle) -> list[Finding]:
    if _same_requests(first, second) == list(REQUESTS):
        return [_finding("duplicate", (first, second), f"{first.id!r} and {second.id!r} are the same", _REMOVE)]
    return []


def _same_requests(first: Principle, second: Principle) -> list[str]:
    """The requests that are the same word for word."""
    return [name for name in REQUESTS if _letters(getattr(first, name)) == _letters(getattr(second, name))]


@_remembered
def _letters(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _duplicate(first: Principle, second: Principle) -> list[Finding]:
    """At most one finding: nearly the same in all requests, or the same in one of them."""
    ids = f"{first.id!r} and {second.id!r}"
    overlap = sum(_overlap(getattr(first, name), getattr(second, name)) for name in REQUESTS) / len(REQUESTS)
    if overlap >= NEAR:
        return [_finding("near-duplicate", (first, second), f"{ids} share {overlap:.0%} of their words", _REMOVE)]
    if same := _same_requests(first, second):
        return [
            _finding(
                "duplicate",
                (first, second),
                f"{ids} have the same {' and '.join(same)}",
                "Reword it, so that each asks for something different",
            )
        ]
    return []


def _overlap(first: str, second: str) -> float:
    """Jaccard index of the words that carry meaning."""
    a, b = _meaning(first), _meaning(second)
    return len(a & b) / len(a | b) if a | b else 0.0


@_remembered
def _meaning(text: str) -> frozenset[str]:
    """The words that carry meaning, or all words where none does."""
    return content_words(_words(text)) or frozenset(_words(text))


# Demands on the complete response, which can meet only one of the two.
_OPPOSITES = [
    (side, re.compile(rf"\b(?:{words})"), opposite, re.compile(rf"\b(?:{opposite_words})"))
    for side, words, opposite, opposite_words in (
        (
            "short",
            r"brief|concise|terse|succinct|few words|one sentence|short(?! sentence| word)",
            "long",
            r"long(?! ago|-| term)|detailed|in (?:\w+ )?detail|in depth|at length|thorough|exhaustive",
        ),
        ("formal", r"formal", "casual", r"casual|informal|slang|chatty|colloquial"),
        ("joking", r"jok|humou?r|funny|sarcas|witty|ironic", "serious", r"serious(?!ly)|solemn|sober"),
        ("technical", r"technical|jargon|expert terms", "plain", r"plain words|everyday words|layman|simple words"),
        (
            "to refuse",
            r"always (?:declin|refus)|never (?:answer|help|compl)|(?:refus|declin)\w* everything",
            "to comply",
            r"(?:always|never fail to) (?:answer|help|compl)|never (?:declin|refus)|answers? everything",
        ),
        ("firm", r"confident|firmly|without (?:any )?doubt|sounds? certain", "tentative", r"tentative|hedg|unsure"),
    )
]


def _demand(principle: Principle) -> str:
    """What the principle wants a response to be."""
    return principle.principle or principle.revision


def _contradiction(first: Principle, second: Principle) -> list[Finding]:
    """At most one finding: one principle wants what the other forbids, or each wants one of two opposites."""
    orders = ((first, second), (second, first))
    conflicts = [f"{a.id!r} asks for what {b.id!r} forbids" for a, b in orders if _wants_what_is_forbidden(a, b)]
    for side, _, opposite, _ in () if conflicts else _OPPOSITES:
        for a, b in orders:
            sides, others = _sides(_demand(a)), _sides(_demand(b))
            if side in sides - others and opposite in others - sides:
                conflicts.append(f"{a.id!r} wants the response {side}, {b.id!r} {opposite}")
    if not conflicts:
        return []
    a, b = orders[not conflicts[0].startswith(repr(first.id))]
    message = f"{conflicts[0]}: “{_demand(a)}” against “{_demand(b)}”"
    remedy = "Write in both which of them yields, and when; or remove one"
    return [_finding("contradiction", (first, second), message, remedy)]


def _wants_what_is_forbidden(principle: Principle, other: Principle) -> bool:
    return any(
        _covers(wanted, unwanted)
        for wanted in _demands(_demand(principle))[0]
        for unwanted in _demands(_demand(other))[1]
    )


@_remembered
def _demands(demand: str) -> tuple[list[frozenset], list[frozenset]]:
    """(what it asks for, what it forbids): the words of each clause that carry meaning."""
    demands: tuple[list[frozenset], list[frozenset]] = ([], [])
    verdict, (_, items) = polarity.judge_sentence(demand), polarity.split_label(demand)
    is_forbidden = (verdict.polarity, verdict.governing) == (polarity.PROHIBITION, 0)
    for words in split_clauses(items if is_forbidden else demand):
        demands[(sum(word in FORBIDS for word in words) + is_forbidden) % 2].append(content_words(words))
    return demands


@_remembered
def _sides(demand: str) -> frozenset[str]:
    """The sides of `_OPPOSITES` that a demand takes."""
    phrases = {name: pattern for opposites in _OPPOSITES for name, pattern in (opposites[:2], opposites[2:])}
    return frozenset(name for name, pattern in phrases.items() if _asks(demand, pattern))


def _asks(demand: str, phrases: re.Pattern) -> bool:
    """Whether a clause has one of the phrases, and nothing before it that turns it into its opposite."""
    for words in split_clauses(demand):
        text = " ".join(words)
        if (match := phrases.search(text)) and not set(text[: match.start()].split()) & FORBIDS:
            return True
    return False


# --- the constitution ----------------------------------------------------------------------------------------------


def _lost_quotes(constitution: Constitution) -> Iterator[Finding]:
    for principle, problem in check_quotes(constitution, Path(constitution.path).parent):
        remedy = "Import the document again, or correct the `source` of the principle"
        yield _finding("quote", (principle,), problem, remedy)


def _unserved_duties(constitution: Constitution) -> Iterator[Finding]:
    tags = {tag for principle in constitution.principles for tag in principle.tags}
    for name in constitution.duties:
        if name not in tags:
            yield Finding(
                "unkept-duty",
                (),
                1,
                f"no principle has the duty {name!r} among its tags",
                "Tag the principle that serves it, write one, or remove the duty",
            )
