"""cai/data/preferences.py: which pairs are trained on, with which label, and what is said of the others."""

import pytest

from cai.base.errors import InputError
from cai.data import outputs, preferences


def pair(number, chosen="I can't help with that.", rejected="Push, then pull.", p=0.9):
    return {
        "id": str(number),
        "prompt": f"How do I open gate {number}?",
        "chosen": chosen,
        "rejected": rejected,
        "p_chosen": p,
    }


@pytest.fixture
def read(tmp_path):
    def from_rows(rows, labels="soft", limit=None, **more):
        path = tmp_path / "preferences.jsonl"
        outputs.write_jsonl(path, rows)
        return preferences.read_pairs([str(path)], labels, limit, **more)

    return from_rows


def test_undecided_and_identical_pairs_are_left_out_and_counted(read):
    same = pair(3, chosen="Push, then pull.\n")
    pairs, counts, _ = read([pair(1), {**pair(2, None, None, 0.5), "response_a": "a", "response_b": "b"}, same])
    assert [(p["prompt"], p["p_chosen"]) for p in pairs] == [("How do I open gate 1?", 0.9)]
    assert counts == {"rows": 3, "undecided": 1, "identical": 1}


def test_an_empty_response_is_a_response(read):
    pairs, counts, _ = read([pair(1, rejected="")])
    assert pairs[0]["rejected"] == "" and counts == {"rows": 1, "undecided": 0}


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_one_side_alone_is_refused(read, missing):
    with pytest.raises(InputError, match=f"preferences.jsonl:2: '{missing}' is null, and the other response is there"):
        read([pair(1), {**pair(2), missing: None}])
    without = pair(1)
    del without[missing]
    with pytest.raises(InputError, match=f"a row without '{missing}'"):
        read([without])


@pytest.mark.parametrize("p", [None, 1.5, -0.1, "0.9", True])
def test_a_soft_label_must_be_a_probability(read, p):
    with pytest.raises(InputError, match=r"preferences.jsonl:1: p_chosen is"):
        read([pair(1, p=p)])
    assert read([pair(1, p=p)], "hard")[0][0]["p_chosen"] == 1.0
    with pytest.raises(InputError, match="p_chosen is"):  # hard, but the margin is asked for
        read([pair(1, p=p)], "hard", min_margin=0.1)


def test_a_margin_leaves_out_toss_ups_whichever_side_they_lean_to(read):
    rows = [pair(n, p=p) for n, p in enumerate([0.5, 0.55, 0.6, 0.9, 0.3])]
    pairs, counts, _ = read(rows, min_margin=0.2)
    assert [p["p_chosen"] for p in pairs] == [0.6, 0.9, 0.3] and counts["below_margin"] == 2
    pairs, _, _ = read(rows, "hard", min_margin=0.2)
    assert [p["p_chosen"] for p in pairs] == [1.0, 1.0, 1.0]
    with pytest.raises(InputError, match=r"no decided pair that differs.*'below_margin': 5"):
        read(rows, min_margin=0.9)


def test_a_label_for_pairs_that_have_none_is_given_and_counted(read):
    human = pair(1)
    del human["p_chosen"]
    pairs, counts, _ = read([human, pair(2, p=0.7), pair(3, p=None)], default_label=0.95)
    assert [p["p_chosen"] for p in pairs] == [0.95, 0.7, 0.95]
    assert counts == {"rows": 3, "undecided": 0, "default_label": 2}
    with pytest.raises(InputError, match=r"p_chosen is '1.5'"):  # one that is there is not guessed anew
        read([pair(1, p=1.5)], default_label=1.0)


def test_all_of_hh_rlhf_is_read_with_all_turns(shared_data):
    file = shared_data / "hh-rlhf" / "harmless-base.test.first1500.jsonl.gz"
    pairs, counts, _ = preferences.read_pairs([str(file)], "hard", None)
    assert len(pairs) == counts["rows"] == 1500 and counts == {"rows": 1500, "undecided": 0}
    assert sum(isinstance(one["prompt"], list) for one in pairs) == 1058


def test_a_weight_is_what_follows_the_last_equals_sign_unless_the_name_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "split=1").mkdir()
    assert preferences.split_weight("split=1", 1.0) == ("split=1", 1.0)
    assert preferences.split_weight("split=1=0.5", 1.0) == ("split=1", 0.5)
    assert preferences.split_weight("owner/name:train=0.5", 1.0) == ("owner/name:train", 0.5)
    assert preferences.split_weight("more.jsonl", 1.0) == ("more.jsonl", 1.0)
    with pytest.raises(InputError, match="above 0"):
        preferences.split_weight("more.jsonl=-1", 1.0)
