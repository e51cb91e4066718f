"""Polarity: whether a sentence demands something or prohibits it, by its own words and by what introduces it.

    judge("Lectures the reader", [("A reader would object if the assistant:", "introduction")]).polarity

Rules over words, for English. Where neither the sentence nor its introduction decides, the answer is `UNCLEAR`: a
prohibition that is read as a demand would train the fault. Leaves out meaning: “Lecture the reader” is a demand.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

DEMAND, PROHIBITION, UNCLEAR = "demand", "prohibition", "unclear"


_MOST = 1000  # characters: the words that decide are near the beginning of an item, and at the end of an introduction


@dataclass(frozen=True)
class Verdict:
    """The polarity of a sentence.

    Attributes:
        governing: the context that decided it; None: its own words.
        signal: what the nearest context that says something says (see `signal`).
    """

    polarity: str
    governing: int | None = None
    signal: str | None = None


def _pattern(words: str) -> re.Pattern:
    return re.compile(rf"\b(?:{words})\b")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_VERBS = _set(
    """
    accept acknowledge act adapt add address adjust admit advise agree aim allow answer anticipate apologise apologize
    apply approach ask assess assist assume attend attribute back balance base be become begin behave believe bring
    build calculate call care challenge change check choose cite clarify close comfort comment communicate compare
    complete confirm connect consider consult continue convey correct count cover create credit criticise deal
    decide decline defend defer define deliver demonstrate describe direct disclose discourage discuss display
    distinguish draw eliminate emphasise emphasize empower encourage end engage ensure err escalate establish
    evaluate examine exclude exercise expect explain explore express favour favor find finish flag focus follow
    format foster gauge give go greet ground guard guide hand handle have hear hedge help highlight hold honour honor
    identify illustrate include indicate inform insist interpret introduce invite judge justify keep know label lead
    learn leave let level limit link list listen look maintain make manage match meet mention mind minimise minimize
    mirror model name note notify obey offer omit open own pass pause pay phrase place point praise prefer prepare
    present preserve prevent prioritise prioritize proceed produce promote promise prompt propose protect prove
    provide put qualify question quote raise reach read recognise recognize recommend redirect refer reflect refuse
    reject rely remain remember remind remove repeat reply report represent request require resist resolve respect
    respond return reveal review rewrite round say search seek select send separate serve set share shield show sign
    simplify slow sound speak specify stand start state stay step stick strive structure suggest summarise summarize
    supply support take talk teach tell test thank think translate treat trust try understand use value verify wait
    warn watch weigh welcome withhold work write yield"""
)

THIRD_PERSON = frozenset(
    verb[:-1] + "ies"
    if re.search(r"[^aeiou]y$", verb)
    else verb + "es" * bool(re.search(r"(?:s|x|ch|sh|o)$", verb)) or verb
    for verb in _VERBS
) | {verb + "s" for verb in _VERBS}

_NOT_VERBS = _set(
    "the a an any all each every some no none both half such many much most few other as in on at by for from with "
    "of to if when where while who whom which what that this these those it they we you he she i there here and or "
    "but nor so because since although though unless until than then"
)

_DETERMINERS = _set(
    """
    the a an any all each every your their its his her our my no this that these those what who whom how why when
    where whether it them him us me you anyone anybody everyone everybody something anything nothing nobody"""
)

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z“\"(])")

_SUBJECT = (
    r"(?:(?:the|an?|our|your|every|each|any|this|its?|good|ideal|helpful|careful|thoughtful|library|bank|school|ai|"
    r"chat|"
    r"language) )*(?:assistant|model|ai|bot|chatbot|agent|system|tutor|teacher|librarian|clerk|advis[eo]r|coach|helper|"
    r"answer|response|reply|output|explanation|message|claude|it|you|we|they)s?(?![’'\w-])"
)

_ADVERBS = re.compile(r"^(?:(?:please|also|then|instead|just|only|first|where possible|at least|\w+ly),? )+")

_LEAD = re.compile(r"^(?:if|when|whenever|where|in|for|before|after|to|even|as|while|once|during|with|unless|until)\b")

_MODAL = r"(?:must|should|shall|may|can|could|will|would|do|does|is|are|was|has|have|had|needs?|ought)"

# Relative and other subordinate clauses: what they negate is not what the sentence asks for.
_SUBORDINATE = re.compile(r"\b(?:that|which|who|whom|whose|when|where|if|because|unless|while|although|what)\b[^,.;:]*")

_COMMAND_NOT = re.compile(
    r"^(?:please )?(?:(?:never|don't|dont|do not|do n't)(?: ever)? (?!\w+(?:[^s]s|ing)\b)|avoid\b|refrain\b|stop\b|"
    r"under no circumstances|at no time|neither \w+[^s] )"
)

_SENTENCE_NOT = re.compile(
    rf"^.{{1,80}}?\b(?:{_MODAL}(?: \w+)?(?: not|n't| never| no longer)\b|cannot\b|never\b|refrains\b|avoids\b)"
    r"|^(?:no|nobody|no one|nothing|none|neither)\b.{0,60}?\b(?:may|must|should|shall|can|will|is|are|ever)\b"
    r"|\b(?:is|are)(?: \w+)? (?:forbidden|prohibited|banned|unacceptable|disallowed|off[- ]limits|out of bounds|"
    r"taboo)\b"
)

_FAULT = re.compile(
    r"^(?:an?|any|the) (?:bad|poor|wrong|unacceptable|harmful|inappropriate) \w+ (?!is\b|are\b)"
    r"|\b(?:objects?|complains?|(?:be|are|is) (?:upset|angry|unhappy|annoyed|disappointed)|dislikes?)(?: to| if|"
    r" when)\b"
    r"|\bwould be (?:an? )?(?:wrong|mistake|fault|error)\b"
)

_OBLIGED = _pattern(
    r"must|should|shall|ought to|needs? to|has to|have to|is to|are to|(?:is|are) (?:required|expected)"
)

_PASSIVE = re.compile(r"^(?:\w[\w’' -]*) (?:is|are) (?:\w+ed|kept|given|shown|left|written|named|put|taken|held)\b")

_THIRD = re.compile(
    r"^(?:the|an?|every|each|our) (?:\w+ ){0,1}(\w*[^\Ws]) (\w+s)\b(?! (?:of|in|for|from|with|to|on|by)\b)"
)


def _plain(text: str) -> str:
    text = re.sub(r"\b(it|that|there)'s\b", r"\1 is", " ".join(text.lower().replace("’", "'").split()))
    return re.sub(r"^\W+|^\W*\d[\d.]*[.)]? |[\s.;,:]+$", "", text)


def split_sentences(text: str) -> list[str]:
    return _SENTENCE_END.split(text)


def is_order(sentence: str) -> bool:
    """Whether a sentence of prose orders or forbids something in so many words, and of the assistant."""
    kind, words = mood(sentence), _plain(sentence[:_MOST])
    is_ours = re.match(rf"(?:no|always) |{_SUBJECT} ", words)
    return kind == "command-not" or bool(is_ours and kind in ("obliged", "sentence-not"))


def mood(text: str) -> str:
    """What a text is by its own words: command-not, sentence-not, no, fault, obliged, command, sentence, fragment.

    `no` is a fragment with a negation in front (“No flattery”), which an introduction may turn round. Of several
    sentences the first that is more than a fragment counts.
    """
    moods = map(_mood, split_sentences(text[:_MOST]))
    return next((kind for kind in moods if kind != "fragment"), "fragment")


def _mood(text: str) -> str:
    if text.rstrip(" ”\"')").endswith("?"):
        return "fragment"
    words = _plain(text)
    if _LEAD.match(words) and ", " in words:  # “If they are in danger, name the emergency number”
        words = words.partition(", ")[2]
    words = _ADVERBS.sub("", words)
    if _COMMAND_NOT.match(words):
        return "command-not"
    if _FAULT.search(words):
        return "fault"
    main = " ".join(_SUBORDINATE.sub(" ", words).split()) or words
    first, _, rest = main.partition(" ")
    has_subject = first not in THIRD_PERSON and not re.match(r"(?:does|is|has|was|never|not|no)\b(?! \w+ may)", main)
    is_command = _is_command(words.removeprefix("always "))
    if not is_command and (has_subject or main.startswith("no ")) and _SENTENCE_NOT.search(main):
        return "sentence-not"
    if re.match(r"(?:no|not|without|nothing)\b", words):
        return "no"
    if is_command:
        return "obliged" if words.startswith("always ") else "command"
    if has_subject and _OBLIGED.search(main) and not _OBLIGED.match(main):
        return "obliged"
    is_sentence = re.match(rf"{_SUBJECT} \w+", words) and (first not in THIRD_PERSON or re.match(r"\w+ are\b", rest))
    third = _THIRD.match(words)
    if is_sentence or _PASSIVE.match(main) or (third and third[2] in THIRD_PERSON):
        return "sentence"
    return "fragment"


def _is_command(words: str) -> bool:
    """Whether it begins with a verb in the imperative: a known one, or any word before an article or a pronoun."""
    first, second = (re.sub(r"\W+$", "", word) for word in [*words.split(maxsplit=2), "", ""][:2])
    if first in _VERBS:
        return not (second in _VERBS and second == "is")
    is_noun = first in _NOT_VERBS or re.search(r"(?:[^s]s|ing|ed|ly|tion|ment|ness|ity|'s)$", first)
    return second in _DETERMINERS and first.isalpha() and not is_noun


# --- introductions and headings -------------------------------------------------------------------------------------

_NEGATIVE = _pattern(
    r"never|not|\w+n't|cannot|avoid\w*|refrain\w*|without|nobody|nothing|none|no|neither|nor|prohibit\w*|forbid\w*|"
    r"bans?|banned|disallow\w*|unacceptable|inappropriate|intolerable|off[- ]limits|out of bounds|taboos?|object\w*|"
    r"complain\w*|dislikes?|upset|angry|unhappy|annoy\w*|disappoint\w*|regrets?|wrong\w*|bad|badly|poor|poorly|worse|"
    r"worst|mistakes?|faults?|flaws?|problems?|harms|errors?|pitfalls?|violat\w*|fail\w*|forget\w*|neglect\w*|"
    r"hesitate\w*|don'ts|misconduct|undesir\w*|unwanted|unwelcome|breach\w*|stops?|rejects?|condemns?|criticis\w*|"
    r"blames?|penalis\w*|penaliz\w*|rude|offends?|offensive|refuses?|refusing|declines?|refusals?"
)

_HARMLESS = _pattern(r"not only|whether or not|or not|no matter|if not|no doubt|no later than|why not|no less")

# To refuse a thing, or to fail at it, does not tell whether what is listed below is wanted.
_REFUSAL = _pattern(r"fail\w*|forget\w*|neglect\w*|refuses?|refusing|refusals?|declines?|rejects?")

_ORDERS = _pattern(r"must|should|shall|ought to|needs? to|has to|have to|always")

_OPEN = re.compile(
    rf"(?:^|\b)(?:never|not|\w+n't|cannot|avoid|avoiding|avoids|from|to|that|which|who|if|when|by|of|with|for|about|"
    rf"be|is|"
    rf"are|do|does|doing|ever|must|should|shall|may|can|will|would|"
    rf"(?:if|when|whenever|where|that|because|unless) {_SUBJECT}|it|you|we|they)$"
)

_POINTS = _pattern(r"these|this|following|things?|below|any of|items|list|behaviour|behaviours|behavior|behaviors|what")

_KINDS = (
    r"behaviour|behaviours|behavior|behaviors|conduct|content|answers?|response|responses|replies|practices?|actions?|habits|advice|style|words|"
    r"uses|topics|language|things"
)

_FORBIDDING = re.compile(
    r"^(?:what|things?|ways|how|behaviour|behaviours|behavior|behaviors|actions|topics|words|content|practices|habits|everything|anything|"
    r"something)\b"
    r"(?:(?!\b(?:when|if|where|because)\b).)*?(?:\bavoid\b|\bnot to\b|\bnever\b(?! know)|"
    r"\b(?:must|should|shall|may|can|will|do|does|would)(?: not|n't)\b(?! (?:know|understand|remember|see))|"
    r"\bcannot\b(?! (?:know|see))|\b(?:forbidden|prohibited|banned|unacceptable|disallowed|not allowed|"
    r"not acceptable)\b)"
    rf"|^(?:\w+ ){{0,3}}(?:forbidden|prohibited|banned|unacceptable|disallowed|inappropriate|bad|poor|wrong|"
    rf"undesirable|unwanted)"
    rf"(?: (?:\w+ )?(?:{_KINDS}))?(?: (?:by|of|from|for|in) .*)?$"
    r"|^(?:\w+ ){0,3}(?:faults|flaws|harms|pitfalls|don'?ts|dont's|prohibitions|violations|red lines?|bright lines?|"
    r"no[- ]gos?|"
    r"taboos?|anti-?patterns?|vices|sins|misconduct|deal[- ]?breakers|bad habits|never events|off[- ]limits|"
    r"out of bounds)"
    r"(?: (?:to avoid|of|in|for|with) .*|)$"
    r"|^(?:\w+ ){0,3}(?:mistakes|errors|problems|faults|harms|pitfalls|traps|failures) (?:to avoid|we (?:do not|"
    r"never) want).*$"
)

# Headings of sections about these, too: a command below them may be what to do about it.
_TOPIC = re.compile(r"^(?:\w+ ){0,2}(?:mistakes?|errors?|problems?|failures|weaknesses|harms)(?: (?:of|in|with) .*)?$")

_DOUBTFUL = _pattern(
    r"limits?|boundar(?:y|ies)|restrict\w*|constraints?|off the table|exclusions?|risks|dangers|threats|abuses?|"
    r"misuses?|"
    r"lines|concerns|worries|warnings?"
)

_APPROVING = _pattern(
    r"must|should|shall|ought to|needs? to|has to|have to|always|good|great|ideal|excellent|best|better|will|does|"
    r"tries|"
    r"aims?|strives?|please|ensures?|make sure|be sure|remember|wants?|expects?|values?|virtues?|goals?|dut(?:y|ies)|"
    r"happy|pleased|glad|praises?|welcomes?|may|can|promises?|commitments?|principles|do|dos|do's|requirements?|"
    r"qualities"
)

# “A good refusal:” tells what it does, although refusals are mostly unwanted.
_GOOD = re.compile(r"(?:an?|the) (?:good|ideal|excellent|great|helpful|careful|proper) \w+")

_CONTINUES = re.compile(r"^(?:and|also|nor|or|likewise|further|furthermore|in addition|as well|besides|moreover)\b")


def continues(introduction: str) -> bool:
    """Whether an introduction goes on with the list before it (“And also:”)."""
    return bool(_CONTINUES.match(_plain(introduction[-_MOST:]))) and signal(introduction, "introduction") != "demands"


def signal(text: str, role: str) -> str | None:
    """What an introduction says of the items below it: forbids, topic, command, unclear, demands, or None.

    `topic` and `command` forbid fragments alone: below “Mistakes” or “Avoid harm:” a full sentence may be a demand.

    Args:
        role: introduction, label (“Never: …” in the item itself) or heading.
    """
    words = _HARMLESS.sub(" ", _plain(text[-_MOST:]))
    if _FORBIDDING.search(words):
        return "forbids"
    if _GOOD.fullmatch(words):
        return "demands"
    if _TOPIC.search(words):
        return "topic"
    for clause in reversed(re.split(r"[,;:.]\s|\s[–—-]\s", words)):
        orders = [order.end() for order in _ORDERS.finditer(clause)]
        negatives = _NEGATIVE.findall(clause, orders[-1] if orders else 0)
        if len(negatives) > 1 and not _POINTS.search(clause):
            return "unclear"
        if negatives:
            return _forbids(clause, negatives, role, bool(orders))
        if orders:
            return "demands"
    if _DOUBTFUL.search(words):
        return "unclear"
    is_condition = re.search(r"\b(?:if|when|whenever)\b", words)
    if not is_condition and (_APPROVING.search(words) or re.fullmatch(_SUBJECT, words)):
        return "demands"
    return "unclear" if role == "introduction" and _OPEN.search(words) else None


def _forbids(clause: str, negatives: list[str], role: str, has_order: bool) -> str | None:
    """The signal of a clause with one negation: whether that reaches the items depends on how the clause ends."""
    is_open = bool(_OPEN.search(clause))
    if is_open or (_POINTS.search(clause) and role != "heading" and not _REFUSAL.fullmatch(negatives[0])):
        return "forbids"
    if role == "heading":
        return "command" if re.fullmatch(r"(?:never|do not|don't|avoid) (\w+)", clause) and _names_act(clause) else None
    if has_order or _COMMAND_NOT.match(clause):
        return "command"
    return "unclear" if _REFUSAL.search(clause) else "command"


def _names_act(clause: str) -> bool:
    last = clause.split()[-1]
    return last in _VERBS or (clause.startswith("avoid") and last.endswith("ing"))


# --- verdicts -------------------------------------------------------------------------------------------------------


def judge(text: str, contexts: Sequence[tuple[str, str]] = ()) -> Verdict:
    """The polarity of an item.

    Args:
        contexts: (text, role) of what stands above it, the nearest first; see `signal`.
    """
    signals = ((number, signal(context, role)) for number, (context, role) in enumerate(contexts))
    governing, kind = next(((number, kind) for number, kind in signals if kind), (None, None))
    roles = [role for _, role in contexts[: (governing or 0) + 1]]
    form = mood(text)
    by_words = Verdict(PROHIBITION if form in ("command-not", "fault", "sentence-not", "no") else DEMAND, None, kind)
    above = _above(form, kind, roles, text)
    return by_words if above is None else Verdict(above, governing, kind)


def _above(form: str, kind: str | None, roles: list[str], text: str) -> str | None:
    """The polarity that an item of this form takes from what stands above it; None: its own words decide."""
    is_far = roles.count("heading") > 1  # a heading stands between, so that a full sentence may be about something else
    if form in ("command-not", "fault"):
        return None
    if form == "no":
        return PROHIBITION if kind in ("forbids", "topic") and roles[-1] == "introduction" else None
    if form == "sentence-not":
        return UNCLEAR if kind == "unclear" else None
    if form == "fragment":
        if is_far and not _is_continuation(text):
            return UNCLEAR
        return {"forbids": PROHIBITION, "topic": PROHIBITION, "command": PROHIBITION, "demands": DEMAND}.get(
            kind, UNCLEAR
        )
    if form == "obliged":
        return UNCLEAR if kind == "forbids" and not is_far else None
    if kind == "forbids":
        return UNCLEAR if is_far else PROHIBITION
    is_doubtful = kind in ("topic", "unclear") or (
        kind == "command" and roles[-1] == "introduction" and form == "command"
    )
    return UNCLEAR if is_doubtful else None


def _is_continuation(text: str) -> bool:
    """Whether a fragment begins with a verb in the third person or in -ing."""
    first = _plain(text[:_MOST]).partition(" ")[0]
    return (
        first in THIRD_PERSON
        or first.endswith("ing")
        or bool(re.match(r"\w+[^s]s (?:the|an?|any|all)\b", _plain(text[:_MOST])))
    )


def split_label(text: str) -> tuple[str, str]:
    """(introduction, rest) of a sentence such as “What to avoid: lecturing”; the introduction may be empty."""
    label, colon, rest = text.partition(": ")
    return (label, rest) if colon and rest and len(label) < 300 else ("", text)


def judge_sentence(sentence: str) -> Verdict:
    """The polarity of a sentence that stands alone, with its introduction before a colon if it has one."""
    label, rest = split_label(sentence)
    return judge(rest, [(label, "label")] if label else [])


def describes_fault(sentence: str) -> bool:
    """Whether a sentence describes what a response must not do, instead of forbidding it: “Mistakes: lecturing”."""
    label, _ = split_label(sentence)
    if not label or judge_sentence(sentence).governing is None:
        return mood(sentence) == "fault"
    is_prohibition = judge_sentence(sentence).polarity == PROHIBITION
    is_order = _COMMAND_NOT.match(_plain(label[:_MOST]) + " ") or mood(f"{label} do it") == "sentence-not"
    return is_prohibition and not is_order
