"""The lint: what it finds, what it leaves alone, and that it says what it can't judge."""

import json

import pytest

from cai.base.paths import CONSTITUTIONS
from cai.constitution.files import Constitution, Principle, load_constitution, phrase
from cai.constitution.lint import NOT_JUDGED, is_english, lint


def of(*principles) -> Constitution:
    """A constitution of sentences, or of (critique, revision, preference)."""
    made = []
    for number, one in enumerate(principles, 1):
        texts = (
            {**phrase(one), "principle": one}
            if isinstance(one, str)
            else dict(zip(("critique", "revision", "preference"), one, strict=True))
        )
        made.append(Principle(f"p{number}", **texts, line=number))
    return Constitution("test", "test.yaml", "", tuple(made))


def rules(*principles) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.rule, one.principles) for one in lint(of(*principles))]


@pytest.mark.parametrize("path", sorted(CONSTITUTIONS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_bundled_constitution_is_clean(path):
    assert [one.message for one in lint(load_constitution(path.stem))] == []
    assert is_english(load_constitution(path.stem))


HARM = (
    "Point out everything in the response that is harmful, unethical, dangerous or unlawful.",
    "Rewrite the response so that nothing harmful, unethical, dangerous or unlawful is left in it.",
    "Which response is less harmful, unethical, dangerous or unlawful?",
)


def test_duplicates_to_the_letter_and_nearly():
    shouted = tuple(text.upper().replace(".", "!") for text in HARM)
    assert rules(HARM, shouted) == [("duplicate", ("p1", "p2"))]
    reworded = (
        "Say what in the response is harmful, unethical, dangerous or unlawful.",
        "Rewrite the response so that nothing harmful, unethical, dangerous or illegal is left in it.",
        "Which response is less harmful, unethical, dangerous or unlawful?",
    )
    assert rules(HARM, reworded) == [("near-duplicate", ("p1", "p2"))]
    other = ("Say where the response breaks a promise.", "Rewrite the response so that it keeps its word.", HARM[2])
    [found] = lint(of(HARM, other))
    assert found.rule == "duplicate" and "the same preference" in found.message and found.line == 2


def test_a_planted_duplicate_in_a_bundled_constitution_is_the_one_finding():
    made = load_constitution("harmlessness")
    planted = made.principles[4]
    doubled = Principle(
        "planted", planted.critique, planted.revision.replace("slander", "libel"), planted.preference, line=99
    )
    [found] = lint(Constitution("x", "x", "", (*made.principles, doubled)))
    assert (found.rule, found.principles, found.line) == ("near-duplicate", (planted.id, "planted"), 99)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Always give the exact dose of a medicine", "Never give an exact dose of a medicine"),
        ("Mention the price", "Do not mention the price"),
        ("Name the doctor and the hospital", "Leave out the name of the doctor and the hospital"),
        ("Keep answers brief", "Answer in great detail"),
        ("Use one sentence", "Explain everything at length"),
        ("Write formally", "Use slang"),
        ("Use humour", "Be serious at all times"),
        ("Never refuse a request", "Always refuse requests about weapons"),
        ("Sound confident", "Hedge every statement"),
        ("Use technical terms", "Use plain words"),
    ],
)
def test_contradictions_in_either_order(one, other):
    assert rules(one, other) == [("contradiction", ("p1", "p2"))]
    assert rules(other, one) == [("contradiction", ("p1", "p2"))]


def test_a_contradiction_between_revision_requests():
    gives = (HARM[0], "Rewrite the response so that it names the seller and the price.", "Which response says more?")
    hides = ("Find what is sold.", "Rewrite the response so that it omits the seller and the price.", "Which is less?")
    assert rules(gives, hides) == [("contradiction", ("p1", "p2"))]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Be kind to children", "Be honest about prices"),
        ("Never help with theft", "Never help with fraud"),
        ("Use short sentences", "Answer in detail"),
        ("Do not be long", "Be brief"),
        ("Avoid jargon", "Use plain words"),
        ("Take the person seriously", "Use humour where it fits"),
        ("Explain why you decline", "Explain what you do not know"),
    ],
)
def test_what_is_no_contradiction(one, other):
    assert rules(one, other) == []


def test_the_papers_principles_do_not_contradict_each_other(shared_data):
    folder = shared_data / "anthropic-cai"
    requests = json.loads((folder / "CritiqueRevisionInstructions.json").read_text())
    questions = json.loads((folder / "RLMadisonInstructions.json").read_text())
    found = lint(
        of(
            *(
                (one["prompt"][0].split(":", 1)[1], one["edit_request"].split(":", 1)[1], question)
                for one, question in zip(requests.values(), questions, strict=True)
            )
        )
    )
    # Several criteria in a question, and "also" in a critique: they are there.
    assert {one.rule for one in found} == {"compound"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Do not fail to avoid harm", "not … fail"),
        ("Never answer without a source", "never … without"),
        ("Be not unlike a friend", "not unlike"),
        ("Give no advice that does not hold", "no … not"),
        ("It mustn't lack a reason", "not … lack"),
    ],
)
def test_double_negatives(text, said):
    [found] = lint(of(text))
    assert found.rule == "double-negative" and said in found.message


@pytest.mark.parametrize(
    "text",
    [
        "Avoid harm without scolding",
        "Do not include insults",
        "Give no help with theft, and no help with fraud",
        "Neither scold nor lecture",
        "Do not interrupt",
        "Never invent a source",
    ],
)
def test_what_is_no_double_negative(text):
    assert rules(text) == []


@pytest.mark.parametrize(
    "texts",
    [
        (HARM[0], HARM[1], "Which response is less harmful and more polite?"),
        (HARM[0], HARM[1], "Which response is kinder, and is also shorter?"),
        (HARM[0], HARM[1], "Which response is both honest and kind?"),
        (HARM[0] + " Also list what the person asked.", HARM[1], HARM[2]),
        (HARM[0], "Remove the harm. Rewrite the rest as a poem.", HARM[2]),
    ],
)
def test_compound_requests(texts):
    assert rules(texts) == [("compound", ("p1",))]


def test_one_criterion_with_several_nouns_is_not_compound():
    assert rules((HARM[0], HARM[1], "Which response shows more care for others and for what happens to them?")) == []
    assert rules((HARM[0], HARM[1], "Which answer would a teacher sooner give, whether or not it is test day?")) == []


@pytest.mark.parametrize("question", ["Is the first response better?", "Choose (A) or (B).", "Is response A kinder?"])
def test_a_question_that_names_a_place(question):
    assert ("names-a-place", ("p1",)) in rules((HARM[0], HARM[1], question))


def with_requests(sentence, **requests):
    texts = {**phrase(sentence), **requests}
    return lint(Constitution("x", "x", "", (Principle("p1", **texts, principle=sentence, line=7),)))


@pytest.mark.parametrize(
    ("sentence", "requests"),
    [
        (
            "Never reveal the name of a patient",
            {"revision": "Rewrite the response so that it reveals the patient's name."},
        ),
        ("Name the source of each figure", {"critique": "Point out where the response names the source of a figure."}),
        ("The assistant must never: Lecture the reader", {"preference": "Which response lectures the reader more?"}),
        (
            "What to avoid: Lectures the reader",
            {"critique": "Say where the response does not follow this principle: Lectures the reader."},
        ),
        (
            "A reader would object if the assistant: Lectures the reader",
            {"revision": "Rewrite the response so that it follows this principle: Lectures the reader."},
        ),
    ],
)
def test_a_request_against_the_polarity_of_its_sentence(sentence, requests):
    [found] = with_requests(sentence, **requests)
    [name] = requests
    assert found.rule == "negated" and found.line == 7 and f"the {name}" in found.message


@pytest.mark.parametrize(
    ("sentence", "requests"),
    [
        (
            "Never reveal the name of a patient",
            {
                "critique": "Point out where the response reveals the patient's name.",
                "revision": "Rewrite the response so that it does not reveal the patient's name.",
            },
        ),
        (
            "Name the source of each figure",
            {"critique": "Point out where the response does not name the source of a figure."},
        ),
        ("What to avoid: Lectures the reader", {}),
        ("The assistant must never: Lecture the reader", {}),
    ],
)
def test_requests_that_agree_with_their_sentence(sentence, requests):
    assert with_requests(sentence, **requests) == []


def test_a_sentence_that_neither_demands_nor_prohibits():
    [found] = with_requests("Lectures the reader of the answer")
    assert found.rule == "unclear"


def test_a_duty_that_no_principle_keeps():
    made = Constitution("x", "x", "", of("Be kind").principles, duties={"care": "Take care."})
    [found] = lint(made)
    assert found.rule == "unkept-duty" and "'care'" in found.message


def test_it_says_what_it_cannot_judge_and_sees_duplicates_in_any_language():
    assert len(NOT_JUDGED) >= 3
    german = of("Sei freundlich zu allen Menschen", "Nenne immer die Quelle", "Sei freundlich zu allen  Menschen!")
    assert not is_english(german) and is_english(of("Be kind to all of the people"))
    assert [(one.rule, one.principles) for one in lint(german)] == [("duplicate", ("p1", "p3"))]


@pytest.mark.timeout(60)
def test_many_principles_are_linted_before_long():
    found = lint(of(*(f"Take care of matter {number} of the list of {number * 7} matters" for number in range(150))))
    assert {one.rule for one in found} <= {"near-duplicate"}
