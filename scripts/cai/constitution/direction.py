"""Direction: whether requests ask for what their sentence asks for, or for the opposite, by the words of both.

    find_problem("Never lecture the reader", {"critique": "Say where the response lectures the reader.", ...})

Requests have a fixed beginning (`OPENINGS`), which tells what the rest is: a fault, or what is wanted. A text is read
in four ways, which differ in what a negation reaches and in whether “decline” is one; all four must agree. For English.
Leaves out requests that share no words with their sentence: their direction is unknown, and so they are refused.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import product

from cai.constitution import lint, polarity

# How each request begins. The critique names a fault; revision and preference name what is wanted.
OPENINGS = {
    "critique": re.compile(
        r"(?:say|point out|find|identify|list|quote) (?:where|how|(?:each|every|any) place where) the response ", re.I
    ),
    "revision": re.compile(r"(?:rewrite|revise|change) the response (?:so that it|to) ", re.I),
    "preference": re.compile(r"which response ", re.I),
}

_CONDITION = re.compile(r"\b(?:if|when|whenever|where|wherever|unless|until|while|although|because)\b[^,.;:?!]*")

# Verbs after which what follows is unwanted, or which are themselves what is wanted: “decline with a reason”.
_TURNS = re.compile(
    r"(?:refus|declin|reject|discourag|oppos|resist|withhold|withheld|den[iy]|conceal|hid|stop|warn)"
    r"(?:e|s|es|ed|ing)?"
)

# “Advice must not be given”: the negation comes after what it is about.
_PASSIVE = re.compile(
    r"^((?:(?!\b(?:and|but|or|not|no|never)\b).)*\b(?:should|must|may|can|shall|will|is|are)) (?:not|never)"
    r"(?= be\b| \w+ed\b)"
)

Clauses = tuple[list[frozenset[str]], list[frozenset[str]]]  # words of what is wanted, and of what is forbidden


def find_problem(sentence: str, requests: Mapping[str, str]) -> str | None:
    """Why the requests (critique, revision, preference) can't be taken for the sentence; None if they can.

    A request must share words with the sentence, ask in the same direction, and keep the sentence's condition.
    """
    if polarity.judge_sentence(sentence).polarity == polarity.UNCLEAR:
        return "it is unclear whether the sentence demands or prohibits"
    if lint.read_request(sentence) != sentence.lower():  # in a request the same words would be read as a negation
        return "the sentence has a word such as “less”, “delete” or “fail to”, which may turn it round"
    condition = _condition_words(sentence)
    for name, opening in OPENINGS.items():
        match = opening.match(requests[name])
        if match is None:
            return f"the {name} does not begin as it must"
        rest = requests[name][match.end() :]
        for turns, reach in product((False, True), repeat=2):
            wanted, forbidden = _read_sentence(sentence, turns, reach)
            good, bad = _read_clauses(lint.read_request(rest), turns, reach)
            if name == "critique":
                good, bad = bad, good
            if _meet(good, forbidden) or _meet(bad, wanted):
                return f"the {name} may ask for the opposite of the sentence"
            if not (_meet(good, wanted) or _meet(bad, forbidden)):
                return f"the {name} shares too few words with the sentence to compare the two"
        if condition and not _overlap(condition, _all_words(rest)):
            return f"the {name} leaves out the sentence's condition"
    return None


def _read_sentence(sentence: str, turns: bool, reach: bool) -> Clauses:
    label, items = polarity.split_label(sentence)
    verdict = polarity.judge_sentence(sentence)
    is_forbidden = bool(label) and (verdict.polarity, verdict.governing) == (polarity.PROHIBITION, 0)
    return _read_clauses(items if is_forbidden else sentence, turns, reach, is_forbidden)


def _read_clauses(text: str, turns: bool, reach: bool, is_forbidden: bool = False) -> Clauses:
    """What a text wants and forbids.

    Args:
        turns: whether “decline” and the like negate what follows.
        reach: whether a negation reaches the whole clause, or only what follows it.
    """
    clauses: Clauses = ([], [])
    for words in lint.split_clauses(_CONDITION.sub(" , ", text.lower())):
        words = _PASSIVE.sub(r"not \1", " ".join(words)).split()
        parts = list(_split_at_negations(words, turns))
        if reach:
            parts = [([word for part, _ in parts for word in part], parts[-1][1])]
        for part, negations in parts:
            if content := lint.content_words(part):
                clauses[(negations + is_forbidden) % 2].append(content)
    return clauses


def _split_at_negations(words: list[str], turns: bool) -> Iterator[tuple[list[str], int]]:
    """(words, number of negations before them) of the parts of a clause between its negations."""
    part, negations = [], 0
    for word in words:
        if word in lint.FORBIDS or (turns and _TURNS.fullmatch(word)):
            yield part, negations
            part, negations = [], negations + 1
        else:
            part.append(word)
    yield part, negations


def _meet(first: list[frozenset[str]], second: list[frozenset[str]]) -> bool:
    return any(_overlap(a, b) for a in first for b in second)


def _overlap(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether they share half of the words of the shorter one."""
    return bool(first and second) and 2 * len(first & second) >= min(len(first), len(second))


def _condition_words(text: str) -> frozenset[str]:
    return _all_words(" ".join(match[0].partition(" ")[2] for match in _CONDITION.finditer(text.lower())))


def _all_words(text: str) -> frozenset[str]:
    return frozenset(word for words in lint.split_clauses(text) for word in lint.content_words(words))
