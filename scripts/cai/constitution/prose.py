"""Prose: which sentences are rules for the assistant, of which kind, and why the others are none.

    read_sentence("If it is unsure, the assistant should ask.").kind      # demand

A rule orders, forbids, permits or prefers something, and its subject is the assistant, what it writes, or a thing that
is to be treated in some way (“Sources should be named”). Rules over words, for English. Leaves out sentences about
somebody else (“Users must be adults”), what others say, suppositions, questions and descriptions, each with the reason.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cai.constitution import polarity
from cai.constitution.polarity import DEMAND, PROHIBITION
from cai.constitution.predicates import (
    ABOUT_OTHERS,
    DESCRIPTION,
    HEEDS,
    PERMISSION,
    PREFERENCE,
    REFUSES,
    is_treatment,
    read_predicate,
)
from cai.constitution.subjects import (
    FINITE,
    LEAD,
    LEXICAL,
    OPENERS,
    OTHER,
    OURS,
    PAGE,
    PRONOUN,
    THING,
    class_of,
    head_of,
    is_inside_relative,
    mentions_us,
)

_MOST = 1000  # characters of a sentence that are read

# Of the kinds of several clauses the first in this order is that of the sentence.
_RANK = (PROHIBITION, DEMAND, PREFERENCE, PERMISSION)


@dataclass(frozen=True)
class Reading:
    """What a sentence is.

    Attributes:
        kind: demand, prohibition, permission, preference, or "" for what is no rule.
        reason: why it is no rule, or "".
        subject: the class of its main clause's subject, see subjects.py, or "".
        noun: the words of that subject in lower case, if it is the assistant.
        is_plural: whether `they` may refer to that subject.
        mentions_us: whether it names the assistant anywhere.
        is_command: whether it is in the imperative, so that a heading such as “What to avoid” may turn it round.
    """

    kind: str = ""
    reason: str = ""
    subject: str = ""
    noun: str = ""
    is_plural: bool = False
    mentions_us: bool = False
    is_command: bool = False


_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z“\"(])|(?<=[.!?][”\"’)])\s+(?=[A-Z“\"(])")


def split_sentences(text: str) -> list[str]:
    """The sentences of a paragraph, whose last may lack its full stop."""
    return _SENTENCE_END.split(text)


def name_subject(sentence: str, reading: Reading, names: frozenset[str] = frozenset()) -> str:
    """The sentence with the noun that its first word `It` stands for, so that it can stand alone."""
    verb = r"(?:must|should|shall|may|can|need|ought|will|never|always|does|has|is)"
    if not reading.noun or not re.match(rf"It {verb}\b", sentence):
        return sentence
    noun = reading.noun.title() if reading.noun in names else reading.noun[0].upper() + reading.noun[1:]
    return f"{noun}{sentence.removeprefix('It')}"


def is_label(introduction: str, item: str) -> bool:
    """Whether an introduction without a verb is completed by the item: “A good answer:”, “names its source”."""
    is_sentence = re.match(rf"(?:{PRONOUN}|we|you)\b", item.lower())
    return bool(introduction) and not is_sentence and not FINITE.search(_plain(introduction.rstrip(": ")))


def read_introduction(text: str, names: frozenset[str] = frozenset()) -> Reading:
    """What the introduction of a list is: “The assistant always:” as if its items were there."""
    text = text.rstrip(": ")
    last = re.search(r"[\w']+$", text)
    return read_sentence(f"{text} do it" if last and FINITE.fullmatch(last[0].lower()) else text, names)


def read_sentence(text: str, names: frozenset[str] = frozenset(), previous: Reading | None = None) -> Reading:
    """What a sentence of prose is.

    Args:
        names: names of the model, in lower case (`subjects.find_names`).
        previous: the sentence before it in its paragraph, to which a pronoun refers.
    """
    words = _plain(text)
    if text.rstrip(" ”\"')*").endswith("?"):
        return Reading(reason="a question", subject=OURS if mentions_us(words, names) else "")
    if not re.search(r"[a-z]", words.replace("quoted", "")):
        return Reading(reason="a quotation")
    if re.match(r"(?:for example|for instance|e\.g\.|as an example)\b", words):
        return Reading(reason="an example")
    return _Sentence(words, names, previous).read()


def _plain(text: str) -> str:
    """The sentence in lower case, with straight quotes, and without what stands in quotation marks or brackets."""
    text = " ".join(text[:_MOST].replace("’", "'").split())
    text = re.sub(r"“[^”]*”|\"[^\"]*\"|(?<!\w)'[^']*'(?!\w)", "quoted", text)
    text = re.sub(r"\([^()]*\)", "", text)
    text = re.sub(r"\b(it|that|there|what)'s\b", r"\1 is", text.lower())
    return " ".join(re.sub(r"[\s.;:!]+$", "", text).split())


_BREAK = re.compile(r"[,;:]\s|\s[–—-]\s|—|,? (?:but|though) |\s+(?:and|or|so) (?=(?:it|they|the|we|you|never) )")


def _clauses(words: str) -> list[str]:
    """The parts between commas, dashes and coordinating words that may be main clauses."""
    return [part.strip(" ,;:") for part in _BREAK.split(words) if part.strip(" ,;:")]


# “After three attempts the conversation must …”: a phrase without a verb and without a comma.
_PHRASE = re.compile(
    r"^(?:after|before|until|since|for|at|on|during|to) (?!.*\b(?:that|which|who|if|when|because)\b).*?"
    r"(?P<clause>\b(?:the|an?|all|any|such|its|it) (?:\w+ )??(?:\w+ )?(?:must|should|shall|may)\b.*)$"
)

# Clauses whose verbs say nothing of the sentence; unlike phrases such as “in an emergency”.
_SUBORDINATE = re.compile(
    r"^(?!that (?:\w+ )?(?:must|should|shall|may|is|ought)\b)"  # “That part must …”
    r"(?:(?:and|or|but|even|just|only|especially|particularly|not|merely) )?(?:if|when|whenever|where|wherever|unless|"
    r"because|since|although|though|while|as|until|before|after|once|than|whether|whatever|whoever|whichever|that|"
    r"which|who|whose|whom|why|how|so that|in order|to|no matter|lest|provided|given that|for)\b"
)

_CLARIFIES = re.compile(
    r"\b(?:should|must|may|is|are) (?:not |never )?(?:to )?be (?:confused|mistaken|conflated|equated) (?:with|for)\b|"
    r"\b(?:should|must) (?:not |never )?be (?:read|understood|thought of|construed|interpreted|taken) "
    r"(?:here |less |more |only )*(?:as a|as an|to mean|literally)\b"
)

# “Some reliance is fine”: an observation
_SOME = re.compile(
    r"(?:some|others|many|most|few|a few|several|certain|the following|these|those) \w+ (?:is|are)\b"
    r"(?!.*\b(?:must|should|shall)\b)"
)

_REPORTS = re.compile(
    r"\b(?:says?|said|thinks?|thought|argues?|argued|claims?|claimed|believes?|suggests?|asks?|asked|wonders?|wrote|"
    r"told|fears?|worr(?:y|ies)|assumes?|holds?|insists?|objects?|impl(?:y|ies)|means?|meant|feels?|proposes?|pretend|"
    r"complains?|explains?|tempting|tempted|concludes?)\b(?: \w+)?(?: that| why| whether| how| what| if|:|,|$)"
)

REPORT = "what others say"

# What reads as a description and has such a word: the likeliest place of a rule that was not recognised.
PERHAPS = "perhaps a rule"

_ADDRESSES_READER = re.compile(
    r"^(?:(?:think of|suppose|imagine|picture|thank you|note|see|recall|let us|let's|read on|notice|assume|"
    r"contrast|compare (?:this|these|the (?:two|following)|with)|"
    r"consider (?:an?|the|two|three|how|what|why|someone|somebody|this|these|for)|"
    r"take (?:the (?:case|example|question)|for example|for instance|this)|say(?: that)? (?:an?|the|somebody|someone)|"
    r"(?:remember|bear in mind) that (?:this|these|we))\b)"
)

_BELIEVES = re.compile(
    r"(?:we (?:\w+ )?(?:think|believe|hold|feel)|this (?:also )?means|it follows|that means|in practice this means)"
    r"(?: that)? (?P<rest>.*)"
)

_WANTS = re.compile(
    r"^(?:we|i|the (?:company|team|developers|authors?|provider)|[a-z]+(?= (?:wants|expects|asks)\b)) "
    r"(?:(?:also|strongly|really|generally|particularly|certainly|especially|therefore|still|always|do|would|much) )*"
    r"(?P<no>(?:do not|don't|never|would not|wouldn't|does not|doesn't) (?:ever )?)?"
    r"(?P<verb>wants?|expects?|hope|wish|like|asks?|encourage|prefer|rather|intend|need|require|urge|invite|trust|hate|"
    r"dislike|aim for|look to|count on|rely on)(?: (?:that|for|instead|rather))? (?P<rest>.*)$"
)

_IMPERSONAL = re.compile(
    r"^(?:it|what)(?: is|'s| will be| remains| would be)(?P<no> not| never|n't)? (?:\w+ )??(?P<word>\w+(?:-\w+)?)"
    r"(?P<rest>(?:,[^,]*,)? (?:that|for|to|of|when|if|practice)\b.*)$"
)

_VITAL = re.compile(
    "vital|important|essential|crucial|necessary|imperative|best|better|right|preferable|desirable|critical|key|"
    "required|mandatory|wise|paramount"
)

_FINE = re.compile(
    "fine|ok|okay|acceptable|permissible|permitted|allowed|right|legitimate|reasonable|appropriate|good|harmless|"
    "welcome|natural|proper|unobjectionable"
)

_BAD = re.compile(
    "wrong|unacceptable|forbidden|prohibited|inappropriate|bad|inexcusable|intolerable|impermissible|improper|banned|"
    "off-limits|disallowed|unwelcome|dishonest|disrespectful|harmful"
)


class _Sentence:
    """One sentence in the course of being read; `words` as of `_plain`."""

    def __init__(self, words: str, names: frozenset[str], previous: Reading | None):
        self.words, self.names, self.previous = words, names, previous
        self.subject, self.noun, self.is_plural, self.is_command = "", "", False, False
        self.reason, self.is_about_authors = DESCRIPTION, False

    def read(self) -> Reading:
        kind = min(filter(None, self._kinds()), key=_RANK.index, default="")
        ours = mentions_us(self.words, self.names)
        reason = "" if kind else self.reason
        if reason == DESCRIPTION and re.search(r"\b(?:must|should|shall|ought|never)\b", self.words):
            reason = PERHAPS
        return Reading(kind, reason, self.subject, self.noun, self.is_plural, ours, self.is_command)

    def _kinds(self) -> Iterator[str]:
        """The kind of each main clause, "" for one that is no rule."""
        if _CLARIFIES.search(self.words):
            self.reason = "a clarification"
            self._note_subject(_clauses(self.words)[0])
            return
        if _SOME.match(self.words):
            return
        is_first = True
        for clause in _clauses(self.words):
            clause = OPENERS.sub("", clause)
            if is_first and (phrase := _PHRASE.match(clause)):
                clause = phrase["clause"]
            if not _SUBORDINATE.match(clause):
                yield self._read_clause(clause, is_first or f": {clause}" in self.words)
                is_first = False

    # --- clauses ----------------------------------------------------------------------------------------------------

    def _read_clause(self, clause: str, is_first: bool) -> str:
        """The kind of a clause; only where one may begin, at the first or after a colon, it may be a command."""
        if not is_first and re.match(rf"never (?!{HEEDS})\w", clause):
            return PROHIBITION  # “… should be used sparingly, and never in bad news”
        for reader in (self._read_negated_start, self._read_wish, self._read_impersonal):
            if (kind := reader(clause)) is not None:
                return kind
        if is_first and (kind := self._read_command(clause)) is not None:
            self.is_command = True
            return kind
        return self._read_statement(clause)

    def _leave_to_others(self) -> str:
        self.subject, self.reason = OTHER, ABOUT_OTHERS
        return ""

    def _read_negated_start(self, clause: str) -> str | None:
        """“Nor should it …”, “Under no circumstances may it …”, “No answer may …”."""
        inverted = re.match(
            r"(?:nor|never|under no circumstances|in no case|at no (?:point|time)|on no account|not once) "
            r"(?:should|must|may|shall|can|will|does) (?P<subject>[^,]*)",
            clause,
        )
        if inverted:
            return PROHIBITION if self._class_of(inverted["subject"]) in (OURS, THING, "") else ""
        none = re.match(
            r"(?:no|none of|neither|nothing|nobody(?:'s)?)\b(?P<subject>[^,]*?) ?\b"
            r"(?P<verb>may|must|should|shall|can|will|is|are)\b(?P<rest>.*)",
            clause,
        )
        if not none:
            return None
        is_person = clause.startswith("nobody ") or self._class_of(none["subject"].strip() or "nothing") == OTHER
        is_command = re.search(r"\b(?:instruction|argument|request|reason|claim|role|authority|operator|user)", none[1])
        if is_person and not (is_command or is_treatment(none["rest"].strip())):
            return self._leave_to_others()
        if none["verb"] in ("may", "must", "should", "shall") or (none["verb"] in ("can", "will") and is_command):
            self.subject = THING
            is_page = re.search(r"\b(?:section|rule|document)s?\b", none[1])
            return "" if is_page else PROHIBITION
        return PROHIBITION if re.match(r" (?:ever )?(?:allowed|acceptable|permitted)\b", none["rest"]) else ""

    def _read_wish(self, clause: str) -> str | None:
        """“We want the assistant to …”, “We think that the assistant should …”."""
        belief = _BELIEVES.match(clause)
        if re.match(r"we (?:do not|don't) (?:think|believe) (?:that )?(?:[\w ]{2,40}) (?:should|may|must)\b", clause):
            return (
                PROHIBITION if self._class_of(re.sub(r"^.*?(?:think|believe) (?:that )?", "", clause)) == OURS else ""
            )
        if belief and self._class_of(belief["rest"]) == OURS:
            return self._read_statement(belief["rest"])
        wish = _WANTS.match(clause)
        if not wish:
            return None
        verb, rest = wish["verb"], wish["rest"]
        to = (
            r"to|will|would|should|not|never"
            if verb in ("hope", "trust")
            else r"to|will|would|should|not|never|\w+ed|\w+s"
        )
        if self._class_of(rest) != OURS or not re.match(rf"[\w' ]{{2,60}}? (?:{to})\b", rest):
            return self._leave_to_others()
        self.subject = OURS
        is_wish = verb.rstrip("s") in ("want", "like", "hope", "wish", "prefer", "intend")
        if wish["no"] and not is_wish:
            return PERMISSION  # “We do not expect it to …”
        if wish["no"] or verb in ("hate", "dislike"):
            return PROHIBITION
        if re.match(r"[\w' ]{2,40}? (?:(?:not|never) to|(?:will|would|should) (?:not|never))\b", rest):
            return PROHIBITION
        return PREFERENCE if verb in ("prefer", "rather", "hope", "wish") else DEMAND

    def _read_impersonal(self, clause: str) -> str | None:
        """“It is important that …”, “It is fine to …”, “It is wrong to …”."""
        match = _IMPERSONAL.match(self.words[self.words.find(clause) :] if clause.startswith("it ") else clause)
        if not match:
            return None
        word, is_negated, rest = match["word"], bool(match["no"]), match["rest"].lstrip(" ,")
        about = re.match(r"(?:that|for|of) (.*)", rest)
        if about and self._class_of(about[1]) in (OTHER, PAGE, *([""] if rest.startswith("that") else [])):
            return ""
        if " all right" in match[0]:
            return PROHIBITION if is_negated else PERMISSION
        if _BAD.fullmatch(word):
            return PERMISSION if is_negated else PROHIBITION
        if _VITAL.fullmatch(word) and not (word == "right" and is_negated):
            if is_negated:
                return PERMISSION
            is_not = about and re.search(rf"\b(?:{REFUSES}|does not|doesn't|never|not)\b", about[1][:60])
            if is_not or rest.startswith("not to"):
                return PROHIBITION
            return PREFERENCE if word in ("better", "preferable") else DEMAND
        if _FINE.fullmatch(word):
            return PROHIBITION if is_negated else PERMISSION
        return None

    def _read_command(self, clause: str) -> str | None:
        """An imperative; None for what is none."""
        if _ADDRESSES_READER.match(clause):
            self.reason = "a word to the reader"
            return ""
        clause = re.sub(r"^do (?!not\b|n't)", "", clause)
        if re.match(r"(?:resist|withstand) (?:the |any )?(?:urge|temptation)|abstain|steer clear", clause):
            return PROHIBITION
        if re.match(rf"(?:never|do not|don't) (?:ever )?{HEEDS}", clause):
            return DEMAND
        kind = polarity.mood(clause)
        if kind == "obliged" and clause.startswith("always "):
            return DEMAND
        if kind == "command-not" and not clause.startswith("neither"):
            return PROHIBITION
        if kind == "command" and re.search(r"\b(?:us|our)\b", clause):
            self.reason = "a word to the reader"
            return ""
        if kind != "command" or " " not in clause or FINITE.search(" ".join(clause.split()[1:3])):
            return None
        return PREFERENCE if re.match(r"(?:prefer|favou?r)\b", clause) else DEMAND

    def _read_statement(self, clause: str) -> str:
        """“The assistant must …”, “Sources should be named”, “Emoji are allowed”."""
        clause = re.sub(r"^that (?=\w+ )", "the ", clause)
        for verb in FINITE.finditer(clause):
            subject = clause[: verb.start()].strip()
            if is_inside_relative(subject, self.names) or re.search(r"(?:^|\s)to$", subject):
                self.reason = REPORT if _REPORTS.search(subject) else self.reason
                continue
            if LEXICAL.fullmatch(verb[0]) and (not subject or self._class_of(subject) != OURS):
                continue
            whom = self._note_subject(subject) if subject else self.subject or self._refer("it")
            self.is_about_authors = head_of(subject) in ("we", "i")  # the authors
            if _REPORTS.search(subject) and not re.match(r"(?:this|that) means", subject):
                self.reason = REPORT
                return ""
            return self._read_predicate(whom, clause[verb.start() :])
        if " " in clause and not LEAD.match(clause) and not re.search(r"\b(?:being|having)\b", clause):
            self._note_subject(clause)
        return ""

    def _read_predicate(self, whom: str, predicate: str) -> str:
        """The kind of a clause from its verb on, for a subject of this class."""
        kind, reason = read_predicate(whom, predicate)
        self.reason = reason if reason and reason != DESCRIPTION else self.reason
        if re.fullmatch(r"(?:is|are) not", predicate) and self.previous and self.previous.kind == PERMISSION:
            kind = PROHIBITION  # “Humour is fine. Sarcasm is not.”
        if whom == PAGE and kind:
            self.reason = "about the document"
            return ""
        if whom == OTHER and kind and (self.is_about_authors or not is_treatment(predicate)):
            self.reason = ABOUT_OTHERS
            return ""
        return kind

    # --- subjects ---------------------------------------------------------------------------------------------------

    def _class_of(self, subject: str) -> str:
        return class_of(subject, self.names, self._refer)

    def _note_subject(self, subject: str) -> str:
        """The class of a subject; the first one is kept as that of the sentence."""
        whom = self._class_of(subject)
        if not self.subject:
            self.subject, head = whom, head_of(subject)
            if re.fullmatch(PRONOUN, head):
                self.noun = self.previous.noun if self.previous else ""
            else:
                self.noun = head if whom == OURS else ""
            self.is_plural = bool(re.search(r"[^s]s$|\bpeople$|^they$", head))
        return whom

    def _refer(self, pronoun: str) -> str:
        """The class of what a pronoun refers to: the subject of this sentence so far, or of the one before it."""
        before = self.previous or Reading()
        if pronoun in ("he", "she"):
            return OTHER
        if pronoun not in ("it", "they"):
            return THING if before.kind else PAGE
        if pronoun == "it" and self.subject in ("", THING) and mentions_us(self.words, self.names):
            return OURS
        if self.subject and self.subject != OTHER:
            return self.subject
        if pronoun == "they":
            return before.subject or OTHER if before.is_plural and not self.subject else OTHER
        is_apart = before.subject == THING and (before.is_plural or before.mentions_us)
        return OURS if before.subject in ("", OTHER) or is_apart else before.subject
