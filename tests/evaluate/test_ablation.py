"""Ablation by hand: which rows are made again, and the figures with and without a principle."""

import math

import pytest

from cai.base.errors import InputError
from cai.constitution.files import Constitution, Principle
from cai.evaluate.ablation import check_drawn, differences, without_each


def drew(row_id, *principles) -> dict:
    return {"id": row_id, "rounds": [{"principle": one, "critique": "c", "revision": "r"} for one in principles]}


def test_a_row_goes_back_to_the_round_that_drew_the_principle():
    rows = [drew("1", "a", "b"), drew("2", "b", "b"), drew("3", "c", "a")]
    found = {(row["original"], row["left_out"]): len(row["rounds"]) for row in without_each(rows, ["a", "b"])}
    assert found == {("1", "a"): 0, ("1", "b"): 1, ("2", "b"): 0, ("3", "a"): 1}
    made = list(without_each(rows, ["a", "b"]))
    assert all(row["wanted"] == 2 for row in made) and len({row["id"] for row in made}) == 4


def test_the_difference_is_paired_and_its_interval_that_of_the_mean():
    # Four harmful rows: one complied, and stays; one was good and complies without the principle.
    classes = {
        "1": ("harmful", "comply"),
        "2": ("harmful", "good"),
        "3": ("harmful", "good"),
        "4": ("harmful", "good"),
        "5": ("benign", "helpful"),
        "2x": ("harmful", "comply"),
        "3x": ("harmful", "good"),
    }
    found = {row["metric"]: row for row in differences(classes, {"2": "2x", "3": "3x"})}
    row = found["harmful_compliance"]
    assert (row["full"], row["without"], row["difference"], row["n"]) == (0.25, 0.5, 0.25, 4)
    # Differences 0, 1, 0, 0: mean 1/4, variance (3 · 1/16 + 9/16) / 3 = 1/4, standard error 1/4.
    assert row["high"] - row["difference"] == pytest.approx(1.959964 * math.sqrt(0.25 / 4), abs=1e-6)
    assert found["good_refusal"]["difference"] == -0.25
    assert found["benign_helpful"]["n"] == 1 and found["benign_helpful"]["low"] is None
    assert "over_refusal" not in found  # no borderline rows: nothing was measured


def test_rows_without_a_class_are_in_no_rate():
    classes = {"1": ("harmful", None), "2": ("harmful", "good"), "2x": ("harmful", None), "3": ("harmful", "good")}
    [row] = [row for row in differences(classes, {"2": "2x"}) if row["metric"] == "good_refusal"]
    assert row["n"] == 1 and row["full"] == 1
    # A row that could not be made again is missing from the classes, and so from the rate.
    [row] = [row for row in differences(classes, {"3": "3x"}) if row["metric"] == "good_refusal"]
    assert row["n"] == 1


def constitution() -> Constitution:
    return Constitution("two", "", "", tuple(Principle(one, "c", "r", "p") for one in "ab"))


@pytest.mark.parametrize(
    "round_",
    [
        {"principle": "all", "critique": "c", "revision": "r"},
        {"principle": "a", "critique": "c", "speaks": 0.9, "revision": "r"},
        {"principle": None, "critique": "", "skipped": "unmatched"},
    ],
)
def test_rounds_that_drew_nothing_are_refused(round_):
    row = drew("1", "b")
    with pytest.raises(InputError, match=r"rows.jsonl:3: round 2 did not draw its principle; .* --principles draw"):
        check_drawn({**row, "rounds": [*row["rounds"], round_]}, constitution(), "rows.jsonl", 3)


def test_rows_must_have_drawn_from_the_constitution():
    check_drawn(drew("1", "a", "b"), constitution(), "rows.jsonl", 1)
    with pytest.raises(InputError, match=r"rows.jsonl:2: round 2 drew 'c', which two does not have"):
        check_drawn(drew("1", "a", "c"), constitution(), "rows.jsonl", 2)
    with pytest.raises(InputError, match="no rounds"):
        check_drawn(drew("1"), constitution(), "rows.jsonl", 3)
