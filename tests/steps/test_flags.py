"""The gate that flags revisions, and the order of rounds in a row."""

import pytest

from cai.base.errors import InputError
from cai.data.rounds import check_rounds, text_of_round, texts_of
from cai.steps.flags import DUPLICATE, REASONS, flags, repeats

GOOD = (
    "I won't help you break the lock, because the house belongs to someone else. "
    "I can help you write to the owner instead."
)


@pytest.mark.parametrize(
    ("revision", "expected"),
    [
        (GOOD, []),
        ("", ["empty"]),
        (" \n\t", ["empty"]),
        ("The old response,\n as it was.", ["copy"]),
        # preambles
        (f"Sure, here is a revised response:\n\n{GOOD}", ["preamble"]),
        (f"Certainly! Here's the rewritten version of the assistant's answer: {GOOD}", ["preamble"]),
        (f"**Revised response:** {GOOD}", ["preamble"]),
        (f"# Improved answer\n{GOOD}", ["preamble"]),
        (f"I have rewritten the response so that it is harmless. {GOOD}", ["preamble"]),
        (f"Here’s a better, kinder version. {GOOD}", ["preamble"]),
        ("Sure, here is how to bake the bread. First, mix the flour and water.", []),
        ("Here is a new recipe: mix flour and water, then write the message on top with icing.", []),
        ("This is a better idea than the first: call the owner.", []),
        # leaked tags
        (f"<response>{GOOD}</response>", ["leaked_tag"]),
        (f"{GOOD} </critique>", ["leaked_tag"]),
        (f"{GOOD} ‹/prompt>", ["leaked_tag"]),
        (f"{GOOD}<|im_end|>", ["leaked_tag"]),
        (f"[INST] {GOOD}", ["leaked_tag"]),
        (f"{GOOD}\n\nHuman: And then?", ["leaked_tag"]),
        (f"<think>hm</think>{GOOD}", ["leaked_tag"]),
        ("In HTML, <p> begins a paragraph, a < b compares, and the human: a riddle.", []),
        # tails
        (f"{GOOD} I care. I care. I care. I care.", ["repeated_tail"]),
        (f"{GOOD} {GOOD}", ["repeated_tail"]),
        ("Then we laugh: ha ha ha!", []),
        ("One, two, three, and on we go, one by one by one.", []),
        # bare refusals
        ("I can't help with that.", ["bare_refusal"]),
        ("I'm sorry, but I won’t answer this question.", ["bare_refusal"]),
        ("Sorry.", ["bare_refusal"]),
        ("I would rather not answer that. Is there anything else today?", ["bare_refusal"]),
        ("As an AI, I am not able to talk about it.", ["bare_refusal"]),
        ("I can't help with that because it would hurt your neighbour.", []),
        ("I won't do this. I can help you ask for it instead.", []),
        ("I can't wait to see your garden in the spring!", []),
        ("Sorry to hear about your cat.", []),
        # several at once, in the order of REASONS
        ("Revised response: <response>I can't help with that.", ["leaked_tag", "preamble", "bare_refusal"]),
    ],
)
def test_flags(revision, expected):
    assert flags("The old response, as it was.", revision, "stop") == expected


def test_a_cut_off_revision_is_unfinished():
    assert flags("x", GOOD, "length") == ["unfinished"]
    assert flags("x", "x", "length") == ["unfinished", "copy"]
    assert flags("", "", "length") == ["empty"]


def test_every_reason_has_been_seen_above():
    seen = {reason for case in test_flags.pytestmark[0].args[1] for reason in case[1]} | {"unfinished"}
    assert seen == {*REASONS} - {DUPLICATE}  # which one text alone cannot show


def test_loops_are_found_at_any_phase_and_not_taken_long_over():
    sentence = "We should all be kind to one another. "
    assert repeats(f"Well. {sentence * 4}"[:-9])
    assert repeats("Well. " + sentence * 3) and not repeats("Well. " + sentence * 2)
    assert repeats("!" * 12) and not repeats("!" * 9)
    assert not repeats("") and not repeats("x")
    assert not repeats(" ".join(map(str, range(200_000))))


def test_the_current_text_is_the_last_revision():
    row = {"response": "first"}
    assert text_of_round(row) == text_of_round({**row, "rounds": None}) == "first"
    one = {"principle": "p", "critique": "c"}
    assert text_of_round({**row, "rounds": [one]}) == "first"
    done = [{**one, "revision": "second"}, {**one, "revision": ""}]
    assert text_of_round({**row, "rounds": done[:1]}) == "second"
    assert text_of_round({**row, "rounds": [*done[:1], one]}) == "second"
    assert text_of_round({**row, "rounds": done}) == "", "an empty revision is one"
    skipped = {"principle": None, "critique": "", "skipped": "unmatched"}
    assert texts_of({**row, "rounds": [skipped, done[0], skipped]}) == ["first", "first", "second", "second"]


C = {"principle": "p", "critique": "c"}
R = {**C, "revision": "r"}
S = {"principle": None, "critique": "", "skipped": "unmatched"}


@pytest.mark.parametrize(
    ("rounds", "critiqued", "expected"),
    [
        (None, False, None),
        ([], False, None),
        ([R, R], False, None),
        ([C], True, None),
        ([R, {**C, "revision": None}], True, None),
        ([S], False, None),
        ([S], True, None),
        ([R, {**S, "principle": "p", "critique": "c", "skipped": "content"}], True, None),
        (
            [{**S, "skipped": "tired"}],
            False,
            r"round 1 is .*expected principle, critique, skipped \(unmatched or content",
        ),
        ([{**S, "revision": "r"}], False, "round 1 is"),
        ([{"skipped": "unmatched"}], False, "round 1 is"),
        ([{"skipped": "unmatched", "critique": ""}], False, "round 1 is"),
        ([C], False, "round 1 has a critique and no revision; .*Run revise.py"),
        ([R, C], False, "round 2 has a critique and no revision"),
        ([C, C], True, "round 1 has a critique and no revision"),
        ([], True, "no critique that awaits its revision; .*Run critique.py"),
        ([R], True, "no critique that awaits its revision"),
        ("x", False, "`rounds` is 'x'"),
        (["x"], False, "round 1 is 'x'"),
        ([{"principle": 1, "critique": "c"}], True, "round 1 is"),
        ([{**C, "revision": 3}], False, "round 1 is"),
    ],
)
def test_rounds_must_be_in_order(rounds, critiqued, expected):
    row = {"response": "x", "rounds": rounds}
    if expected is None:
        check_rounds(row, "in.jsonl", 4, critiqued=critiqued)
    else:
        with pytest.raises(InputError, match=f"in.jsonl:4: {expected}"):
            check_rounds(row, "in.jsonl", 4, critiqued=critiqued)
