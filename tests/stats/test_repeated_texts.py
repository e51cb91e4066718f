"""Texts that answer many different prompts, counted by hand."""

import pytest

from cai.stats.texts import RepeatedTexts

NO = "I can't help with that."


def repeated(answers, text=NO):
    texts = RepeatedTexts(answers)
    assert (texts.most_frequent() is not None) == (text in texts)
    return text in texts


@pytest.mark.parametrize(
    ("times", "others", "expected"),
    [
        (4, 0, False),  # fewer than five prompts
        (5, 0, True),
        (5, 95, True),  # five of a hundred prompts are 5 %
        (5, 96, False),  # of 101 they are not
        (6, 96, True),
    ],
)
def test_five_prompts_and_five_per_cent_of_them(times, others, expected):
    answers = [(f"p{n}", NO) for n in range(times)] + [(f"q{n}", f"Answer {n}.") for n in range(others)]
    assert repeated(answers) == expected


def test_case_punctuation_and_spaces_do_not_matter():
    forms = [
        NO,
        "i can't help with that",
        "I  can't help\nwith that!",
        "“I can't help with that”",
        "I CAN'T help with that",
    ]
    assert repeated([(f"p{n}", text) for n, text in enumerate(forms)])
    assert RepeatedTexts((f"p{n}", text) for n, text in enumerate(forms)).most_frequent() == (forms[-1], 5)
    assert not repeated([(f"p{n}", f"I can't help with {n}.") for n in range(9)], "I can't help with 3.")
    assert repeated([(f"p{n}", "?!") for n in range(5)], "?!")
    assert not repeated([(f"p{n}", "?" * (n + 1)) for n in range(5)], "??")


def test_samples_of_one_prompt_are_one():
    assert not repeated([("p", NO)] * 50 + [("q", NO)] * 50)
    # 60 prompts, four samples each: the share is of the prompts.
    answers = [(f"p{n}", NO if sample == 0 and n < 5 else f"{n} {sample}") for n in range(60) for sample in range(4)]
    assert repeated(answers)
    assert repeated([([{"role": "user", "content": f"p{n}"}], NO) for n in range(5)])


def test_blank_texts_are_left_out():
    assert not repeated([(f"p{n}", " ") for n in range(9)], " ") and not repeated([], "")
