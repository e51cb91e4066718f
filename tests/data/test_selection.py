"""Which texts of a row are trained on: flags, skipped rounds, revisions that were refused, cut responses."""

import pytest

from cai.base.errors import InputError
from cai.data.selection import check_revised, choose_response, choose_revisions


def revised(text, *flags, **more):
    return {"principle": "p", "critique": "c", "revision": text, "flags": list(flags), **more}


def skipped(reason):
    return {"principle": None, "critique": "", "skipped": reason}


REFUSED = revised("Second.", "gate", refused="Third.", gate={"p": [0.2, 0.4]})


@pytest.mark.parametrize(
    ("rounds", "keep", "last", "every", "left_out"),
    [
        ([revised("Second."), revised("Third.")], (), {2: "Third."}, {1: "Second.", 2: "Third."}, []),
        ([revised("Second."), revised("", "empty")], (), {1: "Second."}, {1: "Second."}, ["empty"]),
        ([skipped("unmatched"), revised("Third.")], (), {2: "Third."}, {2: "Third."}, ["copy"]),
        ([revised("Second."), skipped("content")], (), {1: "Second."}, {1: "Second."}, ["copy"]),
        ([revised("Second."), skipped("content")], ("copy",), {2: "Second."}, {1: "Second.", 2: "Second."}, []),
        ([skipped("content")], (), {}, {}, ["copy"]),
        ([skipped("content")], ("copy",), {1: "First."}, {1: "First."}, []),
        ([revised("Second."), REFUSED], (), {1: "Second."}, {1: "Second."}, ["gate"]),
        ([revised("Second."), REFUSED], ("gate",), {2: "Second."}, {1: "Second.", 2: "Second."}, []),
        ([revised("", "empty", "copy")], ("copy",), {}, {}, ["empty"]),
        ([revised("", "empty", "copy")], ("all",), {1: ""}, {1: ""}, []),
        # A round that leaves a cut text as it was does not make it whole.
        ([revised("Sec", "unfinished"), skipped("content")], ("copy",), {}, {}, ["unfinished", "unfinished"]),
        ([revised("Sec", "unfinished"), revised("Sec", "copy")], ("copy",), {}, {}, ["unfinished", "unfinished"]),
        ([revised("Sec", "unfinished"), revised("Sec", "gate", refused="x")], ("gate",), {}, {}, ["unfinished"] * 2),
        ([revised("Sec", "unfinished"), revised("Third.")], (), {2: "Third."}, {2: "Third."}, ["unfinished"]),
    ],
)
def test_the_text_of_a_round_and_why_others_are_left_out(rounds, keep, last, every, left_out):
    row = {"prompt": "Why?", "response": "First.", "rounds": rounds}
    check_revised(row, "in.jsonl", 1)
    for which, texts in (("last", last), ("all", every)):
        selection = choose_revisions(row, which, frozenset(keep))
        assert (selection.texts, selection.left_out) == (texts, left_out)


@pytest.mark.parametrize("response", ["", " \u200b", "Sure,"])  # the last is the prefill alone
def test_an_empty_response_that_no_round_changed_is_left_out(response):
    row = {"prompt": "Why?", "kind": "benign", "response": response, "prefill": "Sure,", "rounds": [skipped("content")]}
    selection = choose_revisions(row, "last", frozenset({"copy"}))
    assert (selection.texts, selection.left_out) == ({}, ["empty"])
    assert choose_revisions(row, "last", frozenset({"all"})).kept == ["copy", "empty"]


@pytest.mark.parametrize(
    ("kind", "rounds", "keep", "last"),
    [
        ("harmful", [revised("First.", "copy"), revised("First.", "copy")], ("copy",), {}),
        ("harmful", [skipped("content")], ("copy",), {}),
        ("harmful", [revised("Second."), revised("Second.", "copy")], ("copy",), {1: "Second."}),
        ("harmful", [revised("First.", "copy"), revised("Third.")], ("copy",), {2: "Third."}),
        ("harmful", [revised("First.", "copy")], ("all",), {1: "First."}),
        ("harmful", [revised("", "empty")], ("copy", "empty"), {1: ""}),
        ("benign", [revised("Second."), revised("Second.", "copy")], ("copy",), {2: "Second."}),
        ("borderline", [skipped("unmatched")], ("copy",), {1: "First."}),
        (None, [revised("First.", "copy")], ("copy",), {1: "First."}),
    ],
)
def test_copies_of_harmful_rows_are_not_kept(kind, rounds, keep, last):
    row = {"prompt": "Why?", "kind": kind, "response": "First.", "rounds": rounds}
    assert choose_revisions(row, "last", frozenset(keep)).texts == last


@pytest.mark.parametrize(
    ("rounds", "keep", "which", "kept", "falls_back"),
    [
        ([revised("Second."), revised("Third.")], (), "last", [], False),
        ([revised("Second."), revised("", "empty")], (), "last", [], True),
        ([revised("Second."), revised("", "empty")], (), "all", [], False),
        ([revised("Second."), revised("", "empty")], ("empty",), "last", ["empty"], False),
        ([revised("Second."), revised("Second.", "copy")], (), "last", [], False),  # the same text
        ([revised("First.", "copy"), skipped("content")], ("copy",), "last", ["copy"], False),
        ([revised("First.", "copy"), skipped("content")], ("copy",), "all", ["copy", "copy"], False),
        ([revised("First.", "copy"), revised("", "copy", "empty")], ("copy",), "last", ["copy"], True),
        ([revised("", "copy", "empty")], ("all",), "last", ["copy", "empty"], False),
        ([revised("", "empty")], (), "last", [], False),  # nothing is trained on
    ],
)
def test_flags_that_are_kept_and_earlier_revisions(rounds, keep, which, kept, falls_back):
    selection = choose_revisions({"prompt": "Why?", "response": "First.", "rounds": rounds}, which, frozenset(keep))
    assert (selection.kept, selection.falls_back) == (kept, falls_back)


def test_a_round_that_changed_nothing_needs_the_response():
    with pytest.raises(InputError, match=r"in\.jsonl:3: round 1 has changed nothing, and there is no `response`"):
        check_revised({"prompt": "Why?", "rounds": [skipped("unmatched")]}, "in.jsonl", 3)


@pytest.mark.parametrize(
    ("more", "keep", "texts", "left_out"),
    [
        ({}, (), {0: "So."}, []),
        ({"response": "So.<|im_end|>user"}, (), {0: "So."}, []),
        ({"response": " \u200b"}, (), {}, ["empty"]),
        ({"finish": "length"}, (), {}, ["unfinished"]),
        ({"finish": "length", "flags": ["leaked_tag"]}, ("unfinished",), {}, ["leaked_tag"]),
        ({"finish": "length", "flags": ["leaked_tag"]}, ("all",), {0: "So."}, []),
        ({"flags": "a column of somebody's own"}, (), {0: "So."}, []),
    ],
)
def test_a_response(more, keep, texts, left_out):
    selection = choose_response({"prompt": "Why?", "response": "So.", **more}, frozenset(keep))
    assert (selection.texts, selection.left_out) == (texts, left_out)
