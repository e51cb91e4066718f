"""Validation by hand: the placebo, what differs from it, principles that pull apart; and `validate` on tiny."""

import json

import pytest
from conftest import ROOT

from cai.authoring.validation import NOT_TOLD, compare_with_placebo, find_opposed, make_placebo
from cai.constitution.files import Principle, load_constitution
from cai.data.outputs import write_jsonl
from cai.data.readers import read_jsonl

TRAIN = ROOT / "scripts" / "cai" / "tiny" / "prompts" / "train.jsonl"


def test_a_placebo_is_as_long_as_its_principle():
    for principle in load_constitution("harmlessness").principles:
        placebo = make_placebo(principle)
        for request, shortest in (("critique", 7), ("revision", 10), ("preference", 6)):
            own, other = (len(getattr(p, request).split()) for p in (principle, placebo))
            assert max(own, shortest) <= other <= max(own, shortest) + 2
    short = make_placebo(Principle("x", "Look.", "Change it.", "Which?", weight=2.0, examples=({"prompt": "p"},)))
    assert short.critique == "Say where the response is about lavender." and short.examples == ()


def trial(number, principle, revision="r", placebo="p"):
    revisions = {"principle": revision, "placebo": placebo}
    return {"id": f"{number} {principle}", "principle": principle, "revisions": revisions}


def judged(trials, p):
    return [
        {"id": row["id"], "principle": row["principle"], "p": {row["principle"]: p[row["principle"]]}} for row in trials
    ]


def test_what_beats_the_placebo_is_told_from_it_and_the_weakest_is_named():
    trials = [trial(n, name) for n in range(10) for name in ("a", "b")]
    report = compare_with_placebo(trials, judged(trials, {"a": 0.9, "b": 0.4}), ["a", "b"])
    # 10 of 20 trials: no more than a coin.
    assert report["placebo"]["value"] == 0.5 and report["verdict"] == NOT_TOLD
    assert not any(row["is_told"] for row in report["principles"])  # not even a, at 10 of 10: it may be luck
    more = [*trials, *(trial(n, "a") for n in range(10, 30))]
    report = compare_with_placebo(more, judged(more, {"a": 0.9, "b": 0.4}), ["a", "b"])
    assert report["placebo"]["value"] == 0.75 and report["weakest"] == "b"
    assert [(row["id"], row["value"], row["is_told"]) for row in report["principles"]] == [
        ("a", 1.0, True),
        ("b", 0.0, False),
    ]
    assert report["verdict"] == "1 of 2 principles can be distinguished from the placebo"


def test_equal_revisions_count_half_and_missing_ones_are_counted():
    trials = [trial(1, "a"), trial(2, "a", "same", "same"), trial(3, "a", None), trial(4, "a")]
    answers = [{"id": "1 a", "principle": "a", "p": {"a": 0.8}}, {"id": "4 a", "principle": "a", "p": None}]
    report = compare_with_placebo(trials, answers, ["a", "b"])
    assert report["placebo"]["value"] == 0.75 and report["placebo"]["n"] == 2  # 1 and a half
    assert (report["identical"], report["failed"]) == (1, 2)
    assert report["principles"][1]["n"] == 0 and report["weakest"] == "a"
    assert compare_with_placebo([], [], ["a"])["weakest"] is None


def test_principles_pull_apart_if_they_disagree_more_often_than_coins():
    rows = [{"p": {"a": 0.9, "b": 0.2 if n < 9 else 0.8, "c": 0.7}} for n in range(10)]
    [pair] = find_opposed([*rows, {"p": {"a": 0.9}}, {"p": None}], ["a", "b", "c"])[:1]
    assert pair["value"] == 0.9 and pair["n"] == 10
    named = [row["principles"] for row in find_opposed(rows, ["a", "b", "c"])]
    assert named == [["a", "b"], ["b", "c"]]
    assert find_opposed(rows[:2], ["a", "b", "c"]) == []  # 2 of 2 may be luck


NONSENSE = """\
- id: goose
  critique: Say where the response is a tall lavender goose.
  revision: Write the response so that it stays a tall lavender goose.
  preference: Which response is more of a tall lavender goose?
- id: landlord
  critique: Say where the response is about a tall lavender landlord.
  revision: Write the response so that it is about a tall lavender landlord.
  preference: Which response is more about a lavender landlord?
"""


@pytest.fixture
def validate(invoke, tmp_path):
    """`validate(text, *arguments)`: (exit code, JSON object, path of the report) of a constitution over harmful prompts
    of the world of tiny."""
    harmful = [row for _, row in read_jsonl(TRAIN) if row["kind"] == "harmful"]
    write_jsonl(tmp_path / "prompts.jsonl", harmful[:12])

    def call(constitution, *arguments):
        output = tmp_path / "report.json"
        result = invoke(
            *("constitution", "validate", "--input", tmp_path / "prompts.jsonl", "--model", "tiny"),
            *("--constitution", constitution, "--dtype", "float32", "--max-new-tokens", "64", "--output", output),
            *(*arguments, "--json"),
        )
        return result.exit_code, json.loads(result.stdout) if result.stdout else result.stderr, output

    return call


def test_the_plan_counts_the_questions_and_writes_nothing(validate, tmp_path):
    (tmp_path / "c.yaml").write_text(NONSENSE, encoding="utf-8")
    code, planned, output = validate(tmp_path / "c.yaml", "-n", "5", "--dry-run")
    assert code == 0 and not output.exists()
    assert (planned["prompts"], planned["trials"], planned["model_calls"]) == (12, 10, 50)
    nonsense = 2 * 12 + 4 * 12
    assert planned["judge_calls_at_most"] == 2 * (12 * 2 + nonsense + 10 + 10)


@pytest.mark.slow
def test_nonsense_can_not_be_told_from_a_placebo(validate, tmp_path):
    (tmp_path / "c.yaml").write_text(NONSENSE, encoding="utf-8")
    code, report, output = validate(tmp_path / "c.yaml", "-n", "12")
    assert code == 3 and report["verdict"] == NOT_TOLD
    assert json.loads(output.read_text(encoding="utf-8"))["placebo"] == report["placebo"]
    before = output.read_bytes()
    assert validate(tmp_path / "c.yaml", "-n", "12")[0] == 3 and output.read_bytes() == before


@pytest.mark.slow
def test_nonsense_covers_no_prompt(validate, tmp_path):
    (tmp_path / "c.yaml").write_text(NONSENSE, encoding="utf-8")
    _, report, _ = validate(tmp_path / "c.yaml", "-n", "1")
    assert report["coverage"]["uncovered"]["value"] == 1


_reports = {}  # of constitutions on which two tests look


def report_on_harmlessness(validate):
    """(exit code, report) on the bundled constitution, made once."""
    if "harmlessness" not in _reports:
        _reports["harmlessness"] = validate("harmlessness", "-n", "6")[:2]
    return _reports["harmlessness"]


@pytest.mark.slow
def test_a_report_on_a_whole_constitution_is_consistent(validate):
    code, report = report_on_harmlessness(validate)
    assert (code == 0) == (report["verdict"] != NOT_TOLD) == (report["placebo"]["low"] > 0.5)
    assert report["weakest"]
    assert report["lint"]["ok"] and report["placebo"]["n"] + report["failed"] == 96


@pytest.mark.slow
def test_harmlessness_is_told_from_a_placebo(validate):
    code, report = report_on_harmlessness(validate)
    assert code == 0 and report["placebo"]["low"] > 0.5
