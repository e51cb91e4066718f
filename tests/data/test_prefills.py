"""Rows with a prefilled answer: what a model is asked, and which texts belong to it."""

import pytest

from cai.base.errors import InputError
from cai.data.prefills import check_prefill, continuation_of, conversation_of, join_prefill

ROW = {"prompt": "how?", "prefill": "Sure."}


def test_a_model_is_asked_to_go_on():
    assert conversation_of(ROW) == [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "Sure."}]
    assert conversation_of({"prompt": "how?"}) == [{"role": "user", "content": "how?"}]


def test_a_response_is_whole_and_can_be_taken_apart():
    assert join_prefill("Sure.", "But no.") == "Sure. But no."
    assert join_prefill("Sure.", "") == "Sure."
    assert join_prefill("", "No. ") == "No. "
    assert continuation_of(ROW, "Sure. But no.") == "But no."
    assert continuation_of({}, " No.") == " No."
    with pytest.raises(ValueError, match=r"does not begin with the prefill 'Sure.': 'No.'"):
        continuation_of(ROW, "No.")


def test_rows_without_a_prefill_pass():
    for row in ({"response": "x"}, {"prefill": None, "response": "x"}, {**ROW, "response": "Sure. x"}):
        check_prefill(row, "rows.jsonl", 3)


@pytest.mark.parametrize(
    "row",
    [
        {"prefill": 3},
        {"prefill": " "},
        {"prefill": "Sure.<|im_end|>"},
        {"prefill": "Sure. "},
        {**ROW, "response": "No."},
        {**ROW, "chosen": "Sure. No.", "rejected": "No."},
        {**ROW, "response": "Sure. No.", "rounds": [{"revision": "No."}]},
    ],
)
def test_a_text_that_does_not_begin_with_it_is_refused_with_its_line(row):
    with pytest.raises(InputError, match=r"rows.jsonl:3: .*prefill"):
        check_prefill(row, "rows.jsonl", 3)
