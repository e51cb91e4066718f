"""Exports: the formats, which rows each is made from, duplicates, and a ledger that adds up."""

import json

import pytest

from cai.base.errors import InputError
from cai.data import exports
from cai.data.outputs import write_jsonl
from cai.data.sources import Source

SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    SYSTEM,
    {"role": "user", "content": "Hi", "name": "x"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
]
PLAIN = [{"role": message["role"], "content": message["content"]} for message in TURNS]


def a_round(text, *flags):
    return {"principle": "p", "critique": "c", "revision": text, "flags": list(flags)}


REVISED = {"id": "r", "prompt": TURNS, "response": "No.", "rounds": [a_round("So."), a_round("Therefore.")]}
JUDGED = {"id": "j", "prompt": "Why?", "response_a": "So.", "response_b": "No.", "chosen": "So.", "rejected": "No.",
          "p_chosen": 0.75}  # fmt: skip


def make(tmp_path, rows, target, **arguments):
    path = tmp_path / "in.jsonl"
    write_jsonl(path, rows)
    return exports.Export([str(path)], target, **arguments)


def ledger_of(export):
    return [(line["id"], line["outcome"], line["rounds"], line["output_lines"]) for line in export.ledger]


@pytest.mark.parametrize(
    ("row", "target", "record"),
    [
        (REVISED, "trl-sft", {"prompt": PLAIN, "completion": [{"role": "assistant", "content": "Therefore."}]}),
        (REVISED, "trl-prompt", {"prompt": PLAIN}),
        (REVISED, "openai", {"messages": [*PLAIN, {"role": "assistant", "content": "Therefore."}]}),
        (
            REVISED,
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Yes?"},
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "Therefore."},
                ]
            },
        ),
        (
            JUDGED,
            "trl-preference",
            {
                "prompt": [{"role": "user", "content": "Why?"}],
                "chosen": [{"role": "assistant", "content": "So."}],
                "rejected": [{"role": "assistant", "content": "No."}],
                "p_chosen": 0.75,
            },
        ),
        (JUDGED, "trl-prompt", {"prompt": [{"role": "user", "content": "Why?"}]}),
        ({"prompt": "Why?"}, "trl-prompt", {"prompt": [{"role": "user", "content": "Why?"}]}),
    ],
)
def test_the_formats(tmp_path, row, target, record):
    assert make(tmp_path, [row], target).records == [record]


@pytest.mark.parametrize("target", ["trl-sft", "openai", "sharegpt"])
def test_what_was_exported_is_read_again_as_the_same(tmp_path, target):
    """Also a text that looks like markup of a template or like a list of messages."""
    answer = '<|im_end|> is how [{"role": "user", "content": "x"}] {{ 7*7 }} ends.\u2028'
    row = {**REVISED, "rounds": [a_round(answer)]}
    write_jsonl(tmp_path / "out.jsonl", make(tmp_path, [row], target).records)
    if target == "trl-sft":
        [record] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
        assert record["prompt"] == PLAIN and record["completion"][0]["content"] == answer
        return
    [read] = Source([str(tmp_path / "out.jsonl")], require=("prompt", "response"))
    assert read["prompt"] == PLAIN and read["response"] == answer


@pytest.mark.parametrize(
    ("row", "target", "message"),
    [
        (JUDGED, "trl-sft", "pairs of judge.py, and --to trl-sft; .*For these rows: --to trl-preference or trl-prompt"),
        (REVISED, "trl-preference", "rows of revise.py, and --to trl-preference; .*run judge.py on them first"),
        ({"prompt": "Why?"}, "openai", "prompts, and --to openai; .*--to trl-prompt; .*run revise.py on them first"),
        ({"prompt": "Why?", "response_a": "a", "response_b": "b"}, "trl-preference", "without a preference.*judge.py"),
        ({"prompt": " "}, "trl-sft", "in.jsonl:1: a row without 'rounds'"),
        ({**JUDGED, "rejected": None}, "trl-preference", "in.jsonl:1: 'rejected' is null"),
        ({**REVISED, "rounds": [{"principle": "p", "critique": "c"}]}, "openai", "in.jsonl:1: round 1 has a critique"),
        ({**REVISED, "rounds": [a_round("x", "copy")]}, "trl-sft", "nothing to export .*'copy': 1.*--keep REASON"),
        ({**JUDGED, "chosen": None, "rejected": None}, "trl-preference", "nothing to export .*'undecided': 1"),
    ],
)
def test_rows_that_a_target_is_not_made_from(tmp_path, row, target, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, [row], target)


def test_the_round_that_is_kept_is_in_the_ledger(tmp_path):
    rows = [
        {**REVISED, "id": "a"},
        {**REVISED, "id": "b", "prompt": "B?", "rounds": [a_round("So."), a_round("", "empty")]},
        {**REVISED, "id": "c", "prompt": "C?", "rounds": [a_round("x", "copy", "preamble"), a_round("", "empty")]},
        {**REVISED, "id": "d", "prompt": "D?", "rounds": [{"principle": None, "critique": "", "skipped": "unmatched"}]},
    ]
    last = make(tmp_path, rows, "trl-sft")
    assert ledger_of(last) == [("a", "kept", [2], [1]), ("b", "kept", [1], [2]),
                               ("c", "left_out", [], []), ("d", "left_out", [], [])]  # fmt: skip
    assert [line["reason"] for line in last.ledger] == [None, None, "copy, preamble, empty", "copy"]
    assert last.counts["left_out_by"] == {"copy, preamble, empty": 1, "copy": 1}
    assert (last.counts["fallbacks"], last.counts["kept_flags"]) == (1, {})
    every = make(tmp_path, rows, "trl-sft", rounds="all", keep={"copy"})
    assert every.ledger[3]["flags"] == ["copy"] and every.counts["kept_flags"] == {"copy": 1}
    assert ledger_of(every)[0] == ("a", "kept", [1, 2], [1, 2]) and ledger_of(every)[3] == ("d", "kept", [1], [4])
    assert every.records[3]["completion"][0]["content"] == "No."
    assert (every.counts["kept"], every.counts["written"]) == (3, 4)


def test_duplicates(tmp_path):
    """The same text but for white space; the same prompt from two input rows, not from two samples of one."""
    rows = [
        {"id": "a/0", "prompt_id": "a", "prompt": "Why?", "response": "So.", "finish": "length"},
        {"id": "b/0", "prompt_id": "b", "prompt": " Why?\n", "response": "So."},
        {"id": "b/1", "prompt_id": "b", "prompt": "Why?", "response": "Because."},
        {"id": "b/2", "prompt_id": "b", "prompt": "Why?", "response": "So. "},
        {"id": "c/0", "prompt_id": "c", "prompt": "Why?", "response": "Therefore."},
        {"id": "d", "prompt": "Why?", "response": "No prompt_id."},
    ]
    export = make(tmp_path, rows, "trl-sft")
    assert [(line["outcome"], line["reason"]) for line in export.ledger] == [
        ("left_out", "unfinished"),
        ("kept", None),
        ("kept", None),
        ("duplicate", "the same as b/0"),
        ("duplicate", "the same prompt as b/0"),
        ("kept", None),
    ]
    assert export.counts == {"rows": 6, "lines": 6, "kept": 3, "left_out": 1, "duplicate": 2, "failed": 0, "invalid": 0,
                             "left_out_by": {"unfinished": 1}, "same_prompt": 2, "written": 3}  # fmt: skip
    assert make(tmp_path, rows, "trl-sft", keep_repeats=True).counts["duplicate"] == 1
    prompts = make(tmp_path, rows, "trl-prompt")
    assert prompts.counts["kept"] == 1 and prompts.counts["duplicate"] == 5
