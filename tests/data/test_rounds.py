"""Rounds in a row: the text after each, where it was skipped, refused by the gate, or awaits its revision."""

import pytest

from cai.base.errors import InputError
from cai.data import rounds

REVISED = {"principle": "harm", "critique": "c", "revision": "second", "flags": []}
REFUSED = {"principle": "harm", "critique": "c", "revision": "first", "flags": ["gate"], "refused": "worse", "gate": {}}
COPIED = {**REVISED, "revision": "first", "flags": ["copy"]}
UNMATCHED = {"principle": None, "critique": "", "skipped": "unmatched"}
CONTENT = {"principle": "truth", "critique": "No fault.", "skipped": "content"}
AWAITING = {"principle": "harm", "critique": "c"}


def row(*rounds_):
    return {"id": "a", "response": "first", "rounds": list(rounds_)}


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ([], ["first"]),
        ([AWAITING], ["first"]),
        ([UNMATCHED, REVISED], ["first", "first", "second"]),
        ([REVISED, CONTENT], ["first", "second", "second"]),
        ([REFUSED, REVISED, AWAITING], ["first", "first", "second"]),
    ],
)
def test_a_text_for_each_round_that_is_complete(given, texts):
    assert rounds.texts_of(row(*given)) == texts
    assert [rounds.text_of_round(row(*given), n) for n in range(len(texts))] == texts
    assert rounds.text_of_round(row(*given)) == texts[-1]


def test_a_content_row_keeps_its_text_and_another_has_no_such_round():
    assert rounds.text_of_round(row(REVISED, CONTENT), 5) == "second"
    for given in (row(REVISED), row(REVISED, UNMATCHED)):
        with pytest.raises(IndexError):
            rounds.text_of_round(given, 5)


def test_which_rounds_change_a_text_and_which_rows_are_finished():
    unchanged = (REFUSED, COPIED, UNMATCHED, CONTENT, AWAITING)
    assert rounds.is_changed(REVISED) and not any(map(rounds.is_changed, unchanged))
    assert [rounds.is_skipped(row(*given)) for given in ([], [UNMATCHED], [CONTENT, REVISED])] == [False, True, False]
    assert rounds.is_content(row(CONTENT)) and not rounds.is_content(row(UNMATCHED))


def test_skipped_rounds_are_in_order_for_both_commands():
    for critiqued in (False, True):
        rounds.check_rounds(row(REVISED, CONTENT), "f", 1, critiqued=critiqued)
        rounds.check_rounds(row(UNMATCHED), "f", 1, critiqued=critiqued)
        with pytest.raises(InputError, match=r"skipped .unmatched or content. and no revision"):
            rounds.check_rounds(row({**CONTENT, "revision": "x"}), "f", 1, critiqued=critiqued)
        with pytest.raises(InputError, match="skipped"):
            rounds.check_rounds(row({**CONTENT, "skipped": "tired"}), "f", 1, critiqued=critiqued)
