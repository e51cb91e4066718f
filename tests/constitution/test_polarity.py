"""Polarity by words: what sentences are by themselves, what introductions say of items, and how both are combined."""

import pytest

from cai.constitution.files import phrase
from cai.constitution.polarity import DEMAND, PROHIBITION, UNCLEAR, judge, judge_sentence, signal


@pytest.mark.parametrize(
    ("sentence", "polarity"),
    [
        ("Name the source of each figure", DEMAND),
        ("Please choose the response that does least harm.", DEMAND),
        ("If the reader is in danger, name the emergency number", DEMAND),
        ("Say what you don't know", DEMAND),
        ("Refuse to help with a burglary", DEMAND),
        ("The assistant keeps the units that the user wrote", DEMAND),
        ("An assistant that does not know should say it", DEMAND),
        ("Always give the exact dose", DEMAND),
        ("Care: The assistant asks before it assumes", DEMAND),
        ("Do no harm: The assistant refuses to plan a burglary", DEMAND),
        ("Calibrated. The model states how sure it is.", DEMAND),
        ("Never promise a return", PROHIBITION),
        ("Don't moralise", PROHIBITION),
        ("Don’t moralise", PROHIBITION),
        ("Avoid slang", PROHIBITION),
        ("Refrain from irony", PROHIBITION),
        ("The assistant does not flatter.", PROHIBITION),
        ("Responses must not contain a customer's number", PROHIBITION),
        ("No answer may name a patient", PROHIBITION),
        ("Sharing a password is forbidden", PROHIBITION),
        ("No flattery", PROHIBITION),
        ("It's unacceptable to rewrite a poem unasked", PROHIBITION),
        ("A bad answer lectures the reader", PROHIBITION),
        ("A reader would object if the assistant lectured", PROHIBITION),
        ("What to avoid: Lectures the reader", PROHIBITION),
        ("The assistant must never: Tell a secret", PROHIBITION),
        ("Never: Tell a secret", PROHIBITION),
        ("Lectures the reader", UNCLEAR),
        ("Lecturing the reader", UNCLEAR),
        ("Home addresses", UNCLEAR),
        ("Is the answer kind?", UNCLEAR),
        ("Mistakes: Own up to them", UNCLEAR),
    ],
)
def test_a_sentence_that_stands_alone(sentence, polarity):
    assert judge_sentence(sentence).polarity == polarity


@pytest.mark.parametrize(
    ("introduction", "says"),
    [
        ("A thoughtful librarian would object if the assistant:", "forbids"),
        ("The assistant must never, under any circumstances:", "forbids"),
        ("It is not acceptable to:", "forbids"),
        ("Avoid the following:", "forbids"),
        ("We do not want an answer that:", "forbids"),
        ("Common mistakes to avoid:", "forbids"),
        ("These are things that it must not do.", "forbids"),
        ("Prohibited content:", "forbids"),
        ("Failing any of these is serious:", "unclear"),
        ("Never share personal data:", "command"),
        ("A good answer:", "demands"),
        ("To avoid harm, the assistant should:", "demands"),
        ("If a user asks for something bad, the assistant should:", "demands"),
        ("An assistant that does not know should:", "demands"),
        ("The assistant:", "demands"),
        ("The assistant must not fail to:", "unclear"),
        ("A customer leaves us if the assistant:", "unclear"),
        ("When a customer asks about money:", None),
    ],
)
def test_an_introduction(introduction, says):
    assert signal(introduction, "introduction") == says


@pytest.mark.parametrize(
    ("heading", "says"),
    [
        ("What to avoid", "forbids"),
        ("Don'ts", "forbids"),
        ("Never", "forbids"),
        ("Things the assistant never does", "forbids"),
        ("Unacceptable behaviour", "forbids"),
        ("3. Red lines", "forbids"),
        ("What a good answer does not do", "forbids"),
        ("Mistakes", "topic"),
        ("Do", "demands"),
        ("Our values", "demands"),
        ("Limits", "unclear"),
        ("Avoiding harm", None),
        ("What to do when you do not know", None),
        ("Harmful requests", None),
        ("Tone", None),
    ],
)
def test_a_heading(heading, says):
    assert signal(heading, "heading") == says


def test_the_nearest_context_that_says_something_decides():
    far, near = ("What to avoid", "heading"), ("A good answer:", "introduction")
    assert judge("Names the shelf", [near, far]) == judge("Names the shelf", [near])
    assert judge("Names the shelf", [("In letters:", "introduction"), far]).governing == 1
    assert judge("Names the shelf", [near, far]).polarity == DEMAND
    assert judge("Names the shelf", [far]).polarity == PROHIBITION


def test_a_heading_between_makes_it_unclear_whether_the_one_above_it_still_holds():
    above = [("Tone", "heading"), ("What to avoid", "heading")]
    assert judge("Lectures the reader", above).polarity == judge("Lecturing the reader", above).polarity == PROHIBITION
    assert (
        judge("Say when you do not know", above).polarity == judge("One question at a time", above).polarity == UNCLEAR
    )
    assert judge("No jargon", above) == judge("No jargon", [*above[1:]])
    assert judge("Say when you do not know", [("Do:", "introduction"), *above]).polarity == DEMAND


def test_an_order_below_a_prohibition_is_not_guessed():
    above = [("Avoid the following:", "introduction")]
    assert judge("The assistant must ask first", above).polarity == UNCLEAR
    assert judge("Do not use slang", above).governing is None
    assert judge("Use slang", above).polarity == PROHIBITION


def test_a_described_fault_is_not_phrased_as_something_to_follow():
    for sentence in (
        "What to avoid: Lectures the reader",
        "A reader would object if the assistant: Lectures the reader",
    ):
        assert all("forbids" in request and sentence in request for request in phrase(sentence).values())
    for sentence in ("Never lecture", "The assistant must never: Lecture the reader", "Be kind", "Care: Ask first"):
        assert all("forbids" not in request and sentence in request for request in phrase(sentence).values())
