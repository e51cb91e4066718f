"""Predicates: what a clause says of its subject, from its verb on: an order, a prohibition, a permission, or nothing.

    read_predicate(OURS, "should never guess")      # ("prohibition", "")

Rules over words, for English. Leaves out whom the clause is about (subjects.py).
"""

import re

from cai.constitution.polarity import DEMAND, PROHIBITION
from cai.constitution.subjects import OURS, THING

PERMISSION, PREFERENCE = "permission", "preference"

DESCRIPTION, ABOUT_OTHERS = "a description", "about somebody else"

OBLIGES = r"(?:must|should|shall|ought to|needs? to|(?:has|have) to)"

REFUSES = (
    r"(?:(?:must|should|shall|may|will|can|ought)(?:n't| not| never)(?: ever)?|mustn't|shouldn't|cannot|can't|won't)"
)

# “never hesitate to” is a demand
HEEDS = r"(?:hesitate|fail|forget|neglect|be afraid|be shy|shrink|shy away|lose sight|stop short|tire)\b"

# What a model can or may do by its nature: a description, and no permission.
_BY_NATURE = re.compile(
    r"^(?:(?:also|well|even|still|sometimes|often|occasionally|easily|already|not|simply|then|only|therefore|"
    r"nevertheless) )*(?:"
    r"have (?:to|no|been|\w+(?:ed|en)|said|meant|made|had|got|lost|left|read|seen|done|gone|come|heard|learnt)|be$|"
    r"be (?!\w+(?:ed|en|wn|ne|ght|ld|de|id|ad)\b|used|kept|put|set|left|sent|cut|shown|met|read\b)|"
    r"be (?:mistaken|confused|tempted|asked|told|needed|surprised|misled|deceived|unaided|called|given|led|trained|"
    r"deployed|driven|inclined|supposed)|"
    r"seem|appear|turn out|fail|lack|encounter|face|receive|meet|find itself|feel|need|become|misread|misunderstand|"
    r"misjudge|make (?:\w+ )?(?:mistake|error)s?|err|forget|know|not know|contain|help to|depend|come|happen|exist|"
    r"differ|vary|result|lead to|cause|damage|harm|destroy|affect|learn|see|hear|think|believe|sound|look|produce|"
    r"remember|understand|contradict|conflict|change|grow|get|lose|struggle|hallucinate|want|mean|reach|return|go|"
    r"take (?:time|place)|work|run|search|access|browse|process|generate|call|handle|read files)\b"
)

# What a model does or does not do by its nature.
_NATURE = re.compile(
    r"^(?:(?:yet|always|itself|really|actually|even|ever) )*(?:know|remember|have(?! to)|see|understand|learn|feel|"
    r"exist|own|mean|need|differ|apply|come|depend|matter|happen|seem|appear|work|imply|suggest|hear|concern|contain)s?\b"
)

_POWERS = re.compile(
    r"^(?:yet |always |itself |really )*(?:verify|check|change|say (?:that|whether|why)|tell whether)\b"
)

# What a thing can be demanded to do; who does anything else is somebody, and not the assistant.
_STATIVE = re.compile(
    r"^(?:(?:also|always|never|not|only|ever|then|therefore|still|at least|generally|usually|at most|\w+ly) )*"
    r"(?:be|begin|start|end|stay|remain|contain|include|come|run|fit|match|follow|show|say|state|name|sound|look|read|"
    r"take (?:precedence|priority|into|account|no|up|at)|prevail|apply|rest|cover|outweigh|yield|override|depend|last|"
    r"exceed|reflect|keep|have|lead|leave|give|make|add|hold|stand|go|serve|help|feel|carry|appear|mean|imply|become|"
    r"replace|cost|reveal|identify|mention|explain|account|hide|suggest|encourage|repeat|refer|respect|open|close|use|"
    r"distract|undermine|aim|avoid|decide|determine|outrank|trump|excuse|justify|stop|prevent|not)\b"
)

_TREATED = re.compile(
    r"^(?:(?:also|always|never|not|only|then|\w+ly) )*be (?:told|informed|warned|asked|given|shown|treated|helped|lied|"
    r"offered|reminded|directed|referred|spoken|addressed|pointed|allowed|encouraged|left|made|trusted|deceived|"
    r"misled|manipulated|pressured|pressed|shamed|lectured|judged|ridiculed|ignored|interrupted|mocked|insulted|"
    r"praised|blamed|punished|rewarded|flattered|rushed|thanked|quoted|identified|profiled|tracked|watched|exposed|"
    r"turned away|harmed|hurt|excluded|discriminated|respected|protected|heard|answered|refused|denied|patroni[sz]ed|"
    r"corrected|interviewed|diagnosed|photographed|recorded)\b"
)

# “X is allowed”: what makes a rule of a sentence about anything.
_JUDGED = re.compile(
    r"^(?:is|are)(?P<no> not|n't| never)?(?: (?:always|also|perfectly|strictly|generally|absolutely|entirely|ever|"
    r"simply|usually|to be|almost|completely|quite))* "
    r"(?P<word>allowed|permitted|acceptable|fine|ok|okay|welcome|permissible|forbidden|prohibited|banned|unacceptable|"
    r"off[- ]limits|out of bounds|ruled out|inappropriate|disallowed|taboo|never acceptable|preferable|preferred|"
    r"better than|best (?:kept|avoided|left|given)|required|mandatory|avoided|encouraged|discouraged)\b"
)

# “The assistant is expected to …”
_BOUND = re.compile(
    r"^(?:is|are)(?P<no> not|n't| never)?(?: (?:always|also|still|strictly|therefore|only|ever|generally|then))*"
    r" (?P<word>expected|required|obliged|obligated|supposed|meant|asked|encouraged|allowed|permitted|free|welcome|"
    r"entitled|authori[sz]ed|at liberty|forbidden|prohibited|bound|to|not to|never to)\b(?P<rest>.*)$"
)

_FREED = re.compile(
    r"(?:need not|needn't|(?:does|do)(?: not|n't) (?:have|need) to|(?:does|do)(?: not|n't) need|"
    r"(?:has|have) no (?:need|duty|obligation) to)\b"
)

_ADVERBS = re.compile(
    r"^(?:(?:also|generally|always|therefore|still|then|usually|instead|typically|only|at least|by default|normally|"
    r"ideally|gently|as a rule),? )+"
)


def is_treatment(predicate: str) -> bool:
    """Whether it is to be done to a person: “[users] should be warned …”."""
    modal = re.match(rf"(?:{REFUSES}|{OBLIGES}|may|can) ", predicate)
    return bool(_TREATED.match(predicate[modal.end() :] if modal else predicate))


def read_predicate(whom: str, predicate: str) -> tuple[str, str]:
    """(kind, reason) of a clause from its verb on: demand, prohibition, permission, preference, or "" with the reason.

    Args:
        whom: the class of the subject, see subjects.py.
    """
    predicate = re.sub(r"^(must|should|shall|may|can|will) also\b", r"\1", predicate)
    for reader in (_read_modal, _read_being, _read_habit):
        kind, reason = reader(whom, predicate)
        if kind or reason:
            return kind, reason
    return "", ""


def _read_modal(whom: str, predicate: str) -> tuple[str, str]:
    """“must …”, “may not …”, “need not …”, “can …”."""
    is_thing = whom in (THING, "")
    if freed := _FREED.match(predicate):
        is_rule = predicate[freed.end() :].startswith(" be ") if is_thing else whom == OURS
        return (PERMISSION, "") if is_rule else ("", ABOUT_OTHERS)
    if refused := re.match(rf"(?:{REFUSES}|ought not to)\b ?(?P<rest>.*)", predicate):
        if whom == THING and not _STATIVE.match(refused["rest"]):
            return "", ABOUT_OTHERS
        return _read_refusal(whom, predicate.split()[0], refused["rest"])
    if obliged := re.match(rf"{OBLIGES}\b ?(?P<rest>.*)", predicate):
        if whom == THING and not _STATIVE.match(obliged["rest"]):
            return "", ABOUT_OTHERS
        return _read_duty(obliged["rest"])
    if allowed := re.match(r"(?P<verb>may|can) (?P<rest>.*)", predicate):
        rest = allowed["rest"]
        treated = re.match(r"(?:only |also |freely |still |safely )?be (?:\w+ed|shown|given)\b", rest)
        is_rule = allowed["verb"] == "may" and treated if is_thing else True
        return (PERMISSION, "") if is_rule and not _BY_NATURE.match(rest) else ("", DESCRIPTION)
    if re.match(r"(?:could|might|would)\b", predicate):
        return "", "a supposition"
    if re.match(r"will\b", predicate):
        return (DEMAND, "") if whom == OURS and predicate.startswith("will always ") else ("", DESCRIPTION)
    return "", ""


def _read_refusal(whom: str, verb: str, rest: str) -> tuple[str, str]:
    """“must not …”, “may not …”, “cannot …”."""
    if re.match(rf"(?:only|just|merely|simply)\b.*\bbut\b|only\b|{HEEDS}", rest):
        return DEMAND, ""
    is_ability = verb in ("cannot", "can't", "can", "will", "won't", "may")
    is_lack = _POWERS.match(rest) or whom != OURS
    if is_ability and (_NATURE.match(rest) or re.match(r"be\b(?! \w+ed\b)", rest) or (verb != "may" and is_lack)):
        return "", DESCRIPTION
    return PROHIBITION, ""


def _read_duty(rest: str) -> tuple[str, str]:
    """What follows `must`, `should` and the like."""
    rest = _ADVERBS.sub("", rest)
    if re.match(rf"(?:(?:not|never|nor)\b(?! only)(?! {HEEDS})|neither\b|(?:under|on|in|at|by) no \w+|be no )", rest):
        return PROHIBITION, ""
    if re.match(r"(?:avoid|refrain|abstain|stop|be (?:avoided|withheld)|steer clear|desist|resist)\b", rest):
        return PROHIBITION, ""
    if re.match(r"(?:be|feel) (?:free|welcome|at liberty)\b", rest):
        return PERMISSION, ""
    if re.match(r"(?:rather )?(?:prefer|favou?r|lean|err)\b|rather\b", rest):
        return PREFERENCE, ""
    return ("", DESCRIPTION) if re.match(r"have\b(?: been)? \w+(?:ed|en)\b", rest) else (DEMAND, "")


def _read_being(whom: str, predicate: str) -> tuple[str, str]:
    """“is expected to …”, “is allowed”, “is better than …”."""
    bound, is_thing = _BOUND.match(predicate), whom in (THING, "")
    for_things = "free|welcome|entitled|authori[sz]ed|at liberty|(?:not |never )?to(?= be )"
    if bound and (not is_thing or re.match(for_things, f"{bound['word']}{bound['rest']}")):
        kind = _read_bond(bound["word"], bool(bound["no"]), bound["rest"])
        if kind:
            return kind, ""
    judged = _JUDGED.match(predicate)
    if not judged:
        return "", ""
    word, is_negated = judged["word"], bool(judged["no"])
    if re.match(r"prefer|better|best (?!avoided)|encouraged", word):
        return ("", DESCRIPTION) if is_negated else (PREFERENCE, "")
    if re.match(r"required|mandatory", word):
        return (PERMISSION if is_negated else DEMAND), ""
    is_good = re.match(r"allowed|permitted|acceptable|fine|ok|welcome|permissible", word)
    return (PERMISSION if bool(is_good) != is_negated else PROHIBITION), ""


def _read_bond(word: str, is_negated: bool, rest: str) -> str:
    """The kind of “is [not] expected to …”; "" if the word says nothing."""
    if word in ("not to", "never to"):
        return PROHIBITION
    if re.fullmatch("allowed|permitted|free|welcome|entitled|authori[sz]ed|at liberty", word):
        return PROHIBITION if is_negated else PERMISSION
    if word in ("forbidden", "prohibited"):
        return PERMISSION if is_negated else PROHIBITION
    if word == "to":
        return PROHIBITION if is_negated else _read_duty(rest.strip())[0]
    if not re.search(r" to\b", rest):
        return ""
    if re.match(r" (?:not|never) to\b", rest) or (is_negated and word in ("supposed", "meant")):
        return PROHIBITION
    return PERMISSION if is_negated else DEMAND


def _read_habit(whom: str, predicate: str) -> tuple[str, str]:
    """“never …”, “does not …”, “tries to …”, which are rules only for the assistant."""
    if whom != OURS:
        return "", ""
    if re.match(r"always \w", predicate):
        return DEMAND, ""
    if habit := re.match(r"(?:never|does not|doesn't|do not|don't) (?P<rest>.*)", predicate):
        return ("", DESCRIPTION) if _NATURE.match(habit["rest"]) else (PROHIBITION, "")
    if re.match(r"(?:avoids?|refrains? from|declines? to)\b|(?:tries|try|aims?|strives?|seeks?) not to\b", predicate):
        return PROHIBITION, ""
    if re.match(r"(?:tries|try|aims?|strives?|seeks?) to\b", predicate):
        return DEMAND, ""
    return (PREFERENCE, "") if re.match(r"prefers? \w", predicate) else ("", "")
