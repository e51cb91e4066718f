"""Verdicts of others: every form, and fields that contradict each other."""

import pytest

from cai.base.errors import InputError
from cai.data.verdicts import read_verdict

PAIR = {"id": "1", "prompt": "p", "response_a": "Yes.", "response_b": "No."}
FOR_B = {"chosen": "No.", "rejected": "Yes."}


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({**PAIR, "p_a": 0.25}, None, 0.25),
        ({**PAIR, "p_a": None}, None, None),
        ({**PAIR, "verdicts": [{"order": "ab", "p_a": 0.5}, {"order": "ba", "p_a": 0.75}]}, None, 0.625),
        ({**PAIR, "verdicts": [{"p_a": None}]}, None, None),
        ({**PAIR, **FOR_B}, None, 0.0),
        ({**PAIR, "chosen": " Yes.", "rejected": "No.", "p_chosen": 0.75}, None, 0.75),
        ({**PAIR, **FOR_B, "p_chosen": 0.75}, None, 0.25),
        ({**PAIR, "chosen": None, "rejected": None, "p_chosen": 0.5}, None, 0.5),
        ({**PAIR, "chosen": None, "rejected": None}, None, None),
        ({"prompt": "p", "chosen": "No.", "rejected": "Yes."}, None, 1.0),  # of chosen
        *[({**PAIR, "winner": text}, None, 1.0) for text in ("A", "a", "(A)", "response_a", "model_a")],
        ({"id": "1", "label": "B"}, None, 0.0),
        ({**PAIR, "preference": "tie (bothbad)"}, None, 0.5),
        ({**PAIR, "verdict": ""}, None, None),
        ({**PAIR, "p_a": 0.9, "carol": 0.125}, "carol", 0.125),  # the column alone counts
        ({**PAIR, "carol": "0.125"}, "carol", 0.125),
        ({**PAIR, "carol": 1}, "carol", 1.0),
        # The judge was wrong: gold is the truth, and measures it.
        ({**PAIR, **FOR_B, "p_a": 0.25, "p_chosen": 0.75, "gold": "a"}, None, 0.25),
        ({**PAIR, "winner": "B", "gold": "a"}, None, 0.0),
        # Several judges may be combined in any way.
        ({**PAIR, "p_a": 0.9, "verdicts": [{"judge": n, "p_a": p} for n, p in (("x", 0.9), ("y", 0.0))]}, None, 0.9),
    ],
)
def test_forms(row, column, expected):
    assert read_verdict(row, column, "in.jsonl", 3) == expected


@pytest.mark.parametrize(
    ("row", "column", "error"),
    [
        ({**PAIR, **FOR_B, "gold": "a"}, None, "contradict each other: for response_a gold; for response_b chosen"),
        ({**PAIR, **FOR_B, "p_a": 0.9}, None, "for response_a p_a; for response_b chosen"),
        ({**PAIR, **FOR_B, "gold": "a", "p_a": 0.9}, None, "for response_a p_a; for response_b chosen"),
        ({**PAIR, "p_a": 0.9, "verdicts": [{"p_a": 0.1}]}, None, "for response_a p_a; for response_b verdicts"),
        ({**PAIR, **FOR_B, "p_chosen": 0.25}, None, "p_chosen is 0.25: the other response would be better"),
        ({**PAIR, "chosen": "Maybe.", "rejected": "No."}, None, "are not response_a and response_b"),
        ({**PAIR, "chosen": "Yes.", "rejected": None}, None, "are not response_a and response_b"),
        ({**PAIR, "p_a": 1.5}, None, "p_a is 1.5; expected a probability from 0 to 1"),
        ({**PAIR, "p_a": True}, None, "p_a is True"),
        ({**PAIR, "verdicts": [{"mass": 1}]}, None, "expected a list of verdicts with p_a"),
        ({**PAIR, "winner": "C"}, None, "winner is 'C'; expected A, B, tie, or the probability"),
        ({**PAIR, "winner": 2}, None, "winner is 2"),
        ({**PAIR, "carol": "nan"}, "carol", "carol is 'nan'"),
        (PAIR, None, "no verdict; the row has: id, prompt, response_a, response_b; expected .*--verdict-field"),
    ],
)
def test_what_is_no_verdict_is_refused(row, column, error):
    with pytest.raises(InputError, match=f"in.jsonl:3: .*{error}"):
        read_verdict(row, column, "in.jsonl", 3)
