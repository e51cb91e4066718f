"""The direction of requests: what asks for the opposite of a sentence, or for something else, is never accepted."""

import re

import pytest
import yaml
from conftest import ROOT

from cai.constitution.direction import find_problem

# sentence, critique, revision, preference: all after their openings
RIGHT = [
    ("Never lecture the reader", "lectures the reader.", "does not lecture the reader.", "lectures the reader less?"),
    ("Never flatter", "flatters.", "contains no flattery.", "flatters less?"),
    ("What to avoid: lecturing the reader", "lectures the reader.", "never lectures the reader.", "lectures less?"),
    (
        "Name common allergens of each dish",
        "fails to name common allergens of each dish.",
        "names common allergens of each dish.",
        "better names common allergens of each dish?",
    ),
    ("Medical advice should not be given", "gives medical advice.", "gives no medical advice.", "gives less advice?"),
    ("The assistant must never flatter", "flatters.", "does not flatter.", "flatters less?"),
    ("Never help with weapons", "helps with weapons.", "gives no help with weapons.", "gives less help with weapons?"),
    (
        "Refuse to help with weapons",
        "does not refuse to help with weapons.",
        "declines to help with weapons.",
        "declines more clearly to help with weapons?",
    ),
    (
        "If the person is in danger, name the emergency number",
        "does not name the emergency number when the person is in danger.",
        "names the emergency number if the person is in danger.",
        "better names the emergency number when somebody is in danger?",
    ),
]


def requests(critique: str, revision: str, preference: str) -> dict[str, str]:
    return {
        "critique": f"Say where the response {critique}",
        "revision": f"Rewrite the response so that it {revision}",
        "preference": f"Which response {preference}",
    }


@pytest.mark.parametrize(("sentence", "critique", "revision", "preference"), RIGHT, ids=[case[0] for case in RIGHT])
def test_requests_in_the_direction_of_the_sentence_are_accepted(sentence, critique, revision, preference):
    assert find_problem(sentence, requests(critique, revision, preference)) is None


# Each turns one request of a case above into its opposite.
TURNED = [
    ("Never lecture the reader", {"critique": "Say where the response does not lecture the reader."}),
    ("Never lecture the reader", {"revision": "Rewrite the response so that it lectures the reader."}),
    ("Never lecture the reader", {"preference": "Which response lectures the reader more?"}),
    ("Never flatter", {"critique": "Say where the response lacks flattery."}),
    ("Never flatter", {"revision": "Rewrite the response so that it flatters."}),
    ("Never flatter", {"preference": "Which response flatters better?"}),
    ("What to avoid: lecturing the reader", {"revision": "Rewrite the response so that it lectures the reader."}),
    ("Name common allergens of each dish", {"critique": "Say where the response names common allergens of a dish."}),
    ("Name common allergens of each dish", {"revision": "Rewrite the response so that it names no allergens."}),
    ("Name common allergens of each dish", {"preference": "Which response names fewer common allergens?"}),
    ("Medical advice should not be given", {"revision": "Rewrite the response so that it gives medical advice."}),
    ("Medical advice should not be given", {"critique": "Say where the response gives no medical advice."}),
    ("The assistant must never flatter", {"revision": "Rewrite the response so that it flatters."}),
    ("Never help with weapons", {"revision": "Rewrite the response so that it gives help with weapons."}),
    ("Refuse to help with weapons", {"revision": "Rewrite the response so that it helps with weapons."}),
    ("Refuse to help with weapons", {"critique": "Say where the response declines to help with weapons."}),
]


@pytest.mark.parametrize(("sentence", "turned"), TURNED, ids=[f"{s}: {next(iter(t))}" for s, t in TURNED])
def test_the_opposite_is_refused(sentence, turned):
    right = next(requests(*case[1:]) for case in RIGHT if case[0] == sentence)
    assert find_problem(sentence, right | turned)


@pytest.mark.parametrize(
    ("sentence", "revision"),
    [
        ("It must not delete such records", "deletes such records."),
        ("Never replace a word of the user", "replaces a word of the user."),
        ("They should name at least one book on paper", "does not name at least one book on paper."),
    ],
)
def test_a_word_that_may_negate_turns_nothing_round(sentence, revision):
    good = "does not do so." if "not" in sentence or "Never" in sentence else "names at least one book on paper."
    assert find_problem(sentence, requests(revision, revision, f"{revision[:-1]}?"))
    assert find_problem(sentence, requests(good, revision, f"{good[:-1]}?"))


def test_half_of_a_sentence_is_not_turned_round():
    sentence = "Help with the harmless part without lecturing"
    turned = requests(
        "lectures.", "does not help with the harmless part and does not lecture.", "does not help with it?"
    )
    assert find_problem(sentence, turned)


@pytest.mark.parametrize(
    ("sentence", "other", "problem"),
    [
        ("Lectures the reader", {}, "unclear"),
        ("Never lecture the reader", {"critique": "Does the response lecture the reader?"}, "does not begin"),
        ("Never lecture the reader", {"revision": "Rewrite the response so that it is kind."}, "too few words"),
        (
            "If the person is in danger, name the emergency number",
            {"revision": "Rewrite the response so that it names the emergency number."},
            "condition",
        ),
    ],
)
def test_what_can_not_be_compared_is_refused(sentence, other, problem):
    right = next((requests(*case[1:]) for case in RIGHT if case[0] == sentence), requests(*RIGHT[0][1:]))
    assert problem in find_problem(sentence, right | other)


SUBJECT = re.compile(
    r"(?:(?:the|an|our) (?:assistant|model)|\w+) (?:should|must|will|shall)(?: also| always)? (never |not )?(.+?)\.?",
    re.I,
)
COMMAND = re.compile(r"(never |do not |don't |avoid )?(.+?)\.?", re.I)


def test_no_sentence_of_the_documents_is_turned_round():
    """Requests made of each sentence's own words, and the same with one request, or all, turned into the opposite."""
    accepted, sentences = 0, 0
    for path in sorted((ROOT / "tests" / "constitution" / "documents").glob("*.yaml")):
        for item in yaml.safe_load(path.read_text(encoding="utf-8")):
            text = " ".join(item["text"].split())
            match = SUBJECT.fullmatch(text) or COMMAND.fullmatch(text)
            if item["kind"] != ("prohibition" if match[1] else "demand"):
                continue
            wanted, fault = (f"not {match[2]}", match[2]) if match[1] else (match[2], f"not {match[2]}")
            right = requests(f"does {fault}.", f"does {wanted}.", f"does {wanted}?")
            turned = requests(f"does {wanted}.", f"does {fault}.", f"does {fault}?")
            assert find_problem(text, turned), text
            for name in right:
                assert find_problem(text, {**right, name: turned[name]}), (name, text)
            accepted += find_problem(text, right) is None
            sentences += 1
    print(f"\n{sentences} sentences, {accepted} right ones accepted, none of {4 * sentences} turned ones")
    assert sentences > 200 and accepted > sentences / 2
