"""Subjects: whom a clause is about, by the words before its verb.

    class_of("answers that name a dose", frozenset())      # OURS

Classes are the assistant with what it writes (OURS), somebody else (OTHER), the document itself (PAGE) and any other
thing (THING). Rules over words, for English. Leaves out what the verb says (predicates.py).
"""

import re
from collections import Counter
from collections.abc import Callable

from cai.constitution import polarity

OURS, OTHER, THING, PAGE = "the assistant", "somebody else", "a thing", "the document"


def _words(words: str) -> str:
    return "|".join(words.split())


_ANSWER = _words("answer answers response responses reply replies output outputs explanation explanations")

_OUR_NOUN = rf"{_ANSWER}|" + _words("assistant assistants model models ai ais bot bots chatbot chatbots claude")

# What a document may call its model; where it does not, such people are somebody else or a thing.
_ROLE = _words("tutor helper advisor adviser librarian coach clerk teacher counsellor guide editor nurse agent")

_OTHER_NOUN = _words(
    """
    user users operator operators developer developers provider providers people person persons someone somebody anyone
    anybody everyone everybody others reader readers tester testers reviewer reviewers employee employees we i one you
    humans human critics critic company companies author authors team teams friend friends builder soldier locksmith
    customer customers client clients attacker attackers adversary adversaries character characters law laws regulator
    regulators regulation patient patients doctor doctors parent parents child children pupil pupils student students
    teacher teachers staff society school schools bank banks hospital hospitals family families platform platforms
    publisher publishers editor editors institution institutions authority authorities board committee department
    office agency agencies government governments court courts states country countries vendor vendors partner partners
    researcher researchers engineer engineers annotator annotators rater raters expert experts scientist scientists
    employer employers manager managers citizen citizens community organisation organisations organization
    organizations business businesses he she who visitor visitors member members owner owners administrator
    administrators nurse writer writers journalist journalists lawyer lawyers nobody adult adults volunteer volunteers
    guest guests buyer buyers seller sellers applicant applicants resident residents philosopher philosophers skeptics
    sceptics lawmaker lawmakers competitor competitors hacker hackers criminal criminals"""
)

_PAGE_NOUN = _words(
    """
    document documents text section sections page pages chapter letter version versions release releases word words
    example examples rule rules guideline guidelines policy policies list table definition definitions training
    evaluation evaluations test tests result results specification spec constitution principles charter paragraph
    appendix draft drafts revision revisions framework edition editions change changes amendment amendments comments
    feedback audit audits review reviews"""
)

PRONOUN = r"it|they|this|these|those|that|he|she"

LEAD = re.compile(
    rf"""^(?:{
        _words('''
    if when whenever where wherever unless because since although though while as until before after once than whether
    whatever whoever whichever that which who whom whose so even in on at by for from with without to under during
    despite regardless faced given like unlike among between within throughout against beyond outside inside instead
    rather except besides upon through about over according depending subject only''')
    })\\b"""
)

OPENERS = re.compile(
    r"^(?:(?:however|also|then|instead|similarly|likewise|therefore|thus|hence|moreover|furthermore|finally|still|"
    r"but|and|so|yet|or|first|second|third|please|accordingly|conversely|nevertheless|nonetheless|in practice|"
    r"in general|generally|usually|typically|ideally|above all|in particular|by default|of course|importantly|rather|"
    r"at the same time|in short|as a rule|in addition|by contrast|on the other hand|in turn|equally|more generally|"
    r"again|otherwise|crucially|here|too|overall|where possible|at the very least|at least|in such cases|"
    r"in that case|even then|even so|\w+ly)\b,? )+"
)

FINITE = re.compile(
    r"\b(?:must|should|shall|ought|may|can|cannot|can't|could|might|would|will|won't|mustn't|shouldn't|needn't|"
    r"need not|needs? to|(?:has|have) to|is|are|was|were|isn't|aren't|wasn't|weren't|has|have|had|does|do|did|doesn't|"
    r"don't|didn't|never|always|avoids?|refrains?|tries|try|aims?|strives?|seeks?|prefers?|declines?)\b"
)

# Nouns as well, and so verbs only after the assistant.
LEXICAL = re.compile(r"avoids?|refrains?|tries|try|aims?|strives?|seeks?|prefers?|declines?")

_MODAL = r"(?:should|must|may|can|will|ought|shall|never|always|tries|aims|does|has|need)"


def find_names(text: str) -> frozenset[str]:
    """What a document calls the model, in lower case, other than `the assistant`: its name, `you`, or its profession.

    A name is a word in capitals that stands within sentences too, without an article, and three times before a verb
    such as `should`.
    """
    counts = Counter(re.findall(rf"\b([A-Z][a-z]+) (?={_MODAL}\b)", text))
    inside = Counter(re.findall(r"(?<=[a-z,] )(?<!the )(?<!an )(?<!a )([A-Z][a-z]+)\b", text))
    known = re.compile(rf"(?:{_OUR_NOUN}|{_ROLE}|{_OTHER_NOUN}|{_PAGE_NOUN}|{PRONOUN})s?", re.IGNORECASE)
    names = [
        (count, name)
        for name, count in counts.items()
        if count >= 3 and inside[name] >= 2 and not known.fullmatch(name)
    ]
    if names:
        return frozenset([max(names)[1].lower()])
    if len(re.findall(rf"\b(?:assistant|model|ai|chatbot) (?={_MODAL}\b)", text.lower())) >= 3:
        return frozenset()
    subjects = Counter(re.findall(rf"\b(you|(?<=the )(?:{_ROLE})) (?={_MODAL}\b)", text.lower()))
    return frozenset(name for name, count in subjects.most_common(1) if count >= 3)


def _ours(names: frozenset[str]) -> str:
    return "|".join(["the (?:assistant|model|ai)", *map(re.escape, sorted(names))])


def mentions_us(words: str, names: frozenset[str]) -> bool:
    """Whether the assistant is named anywhere."""
    return bool(re.search(rf"\b(?:{_ours(names)})\b", words))


def head_of(subject: str) -> str:
    """The noun phrase at the beginning, without what follows its noun."""
    phrase = re.split(
        r" (?:that|which|who|whom|whose|of|in|on|at|about|for|from|with|to|by|between|where|when|if|under|over|like|"
        r"without|against|than|as|such|is|are|was|must|should|may|can|will|shall|does|do|has|have|respects?|not|never|"
        r"always|also|ought|outside|inside|per|within|across|during|towards?|because|while)\b|,",
        f" {OPENERS.sub('', subject.strip())}",
        maxsplit=1,
    )[0].strip()
    return re.sub(r"^(?:both|all|each|every|any) (?:of )?", "", phrase)


def class_of(subject: str, names: frozenset[str], refer: Callable[[str], str] = lambda pronoun: OURS) -> str:
    """OURS, OTHER, PAGE or THING for a noun phrase, or for what begins with one; "" for none.

    Args:
        names: names of the model, in lower case.
        refer: the class of what a pronoun stands for.
    """
    head = head_of(subject)
    if not head:
        return ""
    nouns = head.split()
    first, last = nouns[0], nouns[-1]
    if first in ("what", "whatever"):
        return THING
    if first in ("it", "they") or (head == first and re.fullmatch(PRONOUN, first)):
        return refer(first)
    # “the assistant …”, or “the less benefit of the doubt the assistant [should give]”
    if re.match(rf"(?:{_ours(names)})\b(?!')", head) or re.search(rf"\b(?:{_ours(names)})$", subject):
        return OURS
    if re.fullmatch(r"\w+ing", first) and len(nouns) > 1 and first not in ("nothing", "everything"):
        return THING  # “Lecturing the user”
    if re.match(r"(?:its|their|his|her|our|my)\b", head):
        return PAGE if first == "our" and re.fullmatch(_PAGE_NOUN, last) else THING
    if any(re.fullmatch(r"\w+'s?", noun) for noun in nouns[:-1]):
        return THING  # “a user's request”
    if re.fullmatch(_OUR_NOUN, last):
        return OURS
    if re.match(rf"{re.escape(head)} who\b", OPENERS.sub("", subject.strip())):
        return OTHER  # “a cook who …”
    if re.fullmatch(_OTHER_NOUN, last) and not (last == "one" and len(nouns) > 1):
        return OTHER
    is_any = first == "such" or (first in ("a", "an") and re.fullmatch("list|table|word|text|letter|test|change", last))
    is_any = is_any or (last in ("result", "results") and first != "the")
    return PAGE if re.fullmatch(_PAGE_NOUN, last) and not is_any else THING


_RELATIVES = (
    "that|which|who|whom|what|why|how|whether|if|when|where|because|than|as|whose|while|until|unless|before|after"
)


def is_inside_relative(subject: str, names: frozenset[str] = frozenset()) -> bool:
    """Whether a verb after these words belongs to a clause inside the sentence: “the rules that the model [must]”."""
    parts = re.split(rf"(?:^| )(?:{_RELATIVES})(?: |$)", f" {subject} ")
    if len(parts) < 2:
        return False
    words = parts[-1].split()
    noun_end = 2 if words and re.fullmatch(r"the|an?|its|our|your|their|this", words[0]) else 1
    has_verb = any(map(_is_verb, words[noun_end:]))
    begins_with_verb = len(words) > 1 and (_is_verb(words[0]) or bool(re.search(r"[^s]s$", words[0])))
    if len(words) == 1:  # “numbers that matter [must …]”, and not “rules that users [must …]”
        is_noun = re.search(rf"^(?:{PRONOUN}|we|you|i|one|people)$|s$", words[0]) or words[0] in names
        begins_with_verb = not is_noun
    return not (has_verb or begins_with_verb)


def _is_verb(word: str) -> bool:
    return word in polarity.THIRD_PERSON or bool(re.search(r"(?:ed|wn)$", word) or FINITE.fullmatch(word))
