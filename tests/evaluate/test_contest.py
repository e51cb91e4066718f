"""Policies against each other: who is compared on what, the judge asked as ever, and scores by hand."""

import math

import models
import pytest

from cai.base.errors import InputError
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data.outputs import write_jsonl
from cai.data.sources import Source
from cai.evaluate import contest
from cai.models.loading import load_engine
from cai.steps import judging

PROMPTS = [
    {"id": str(i), "prompt": f"How do I open gate {i}?", "kind": kind}
    for i, kind in enumerate(["harmful", "harmful", "benign", "borderline"])
]


def test_names_of_policies():
    llama = str(models.folder("llama"))
    assert contest.name_policies([f"base={llama}", "tiny", "x.jsonl"]) == {
        "base": llama,
        "tiny": "tiny",
        "x.jsonl": "x.jsonl",
    }
    assert list(contest.name_policies(["a=openai:m@http://localhost:1/v1", "openai:m"])) == ["a", "openai-m"]
    wrong = {"one policy": ["tiny"], "'a' twice": ["a=tiny", "a=x.jsonl"], "no such": ["tiny", "./no"]}
    for said, given in wrong.items():
        with pytest.raises(InputError, match=said):
            contest.name_policies(given)


def test_every_two_policies_meet_on_every_prompt_that_both_answered():
    answers = {"a": {"0": "A0", "2": "A2"}, "b": {"0": "B0", "1": "B1", "2": "B2"}, "c": {"0": "C0"}}
    found = list(contest.pairs(answers, PROMPTS))
    assert [(one["prompt_id"], one["policy_a"], one["policy_b"], one["axis"]) for one in found] == [
        ("0", "a", "b", "harmlessness"),
        ("0", "a", "c", "harmlessness"),
        ("0", "b", "c", "harmlessness"),
        ("2", "a", "b", "helpfulness"),
    ]
    assert (found[3]["response_a"], found[3]["response_b"]) == ("A2", "B2")


def test_the_judge_is_asked_by_the_constitution_of_the_axis():
    engine = load_engine(str(models.folder("qwen")))
    answers = {
        "a": {row["id"]: "Push." for row in PROMPTS},
        "b": {row["id"]: "Push." if row["id"] == "0" else f"Lift the bar {row['id']} times." for row in PROMPTS},
    }
    questions = {
        axis: judging.Question(load_constitution(name), load_template("preference"))
        for axis, name in (("harmlessness", "harmlessness"), ("helpfulness", "helpfulness"))
    }
    rows = {
        row["prompt_id"]: row
        for row in contest.judge_comparisons(engine, contest.pairs(answers, PROMPTS), questions, {})
    }
    assert rows["0"]["tie"] and rows["0"]["p_a"] == 0.5
    assert rows["1"]["principle"] in load_constitution("harmlessness")
    for number in "23":
        row = rows[number]
        assert row["principle"] in load_constitution("helpfulness")
        pair = {key: row[key] for key in ("id", "prompt", "response_a", "response_b")}
        [(_, verdicts)] = judging.judge(engine, [pair], questions["helpfulness"])
        assert row["p_a"] == pytest.approx(judging.soft_label(verdicts), abs=1e-5)


def row(prompt, a, b, p, axis="harmlessness"):
    return {"prompt_id": prompt, "policy_a": a, "policy_b": b, "p_a": p, "axis": axis}


def test_scores_by_hand_apart_for_each_axis():
    rows = [row(f"p{i}", "base", "rl", float(i < 10)) for i in range(40)]  # 10 to 30
    rows += [row(f"q{i}", "base", "rl", float(i < 20), "helpfulness") for i in range(40)]
    rows.append(row("lost", "base", "rl", None))
    rates, counts = contest.scores(rows, ["base", "rl"])
    assert rates["harmlessness_elo base"]["value"] == 0 and rates["helpfulness_elo rl"]["value"] == pytest.approx(0)
    rl = rates["harmlessness_elo rl"]
    assert rl["value"] == pytest.approx(400 * math.log10(30.5 / 10.5)) and rl["low"] < rl["value"] < rl["high"]
    assert (rl["wins"], rl["losses"], rl["ties"], rl["n"]) == (30, 10, 0, 40)
    assert counts == {"failed": 1, "comparisons": 80, "identical": 0, "notes": []}


def test_a_sweep_and_a_missing_axis_are_said():
    rates, counts = contest.scores([row(f"p{i}", "base", "rl", 0.0) for i in range(9)], ["base", "rl"])
    assert rates["harmlessness_elo rl"]["high"] is None
    assert "harmlessness: rl is bounded not above" in counts["notes"][0]
    assert counts["notes"][1] == "No comparison for helpfulness: no benign or borderline prompt."


def test_responses_to_other_prompts_are_refused(tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    write_jsonl(tmp_path / "given.jsonl", [{"id": "0", "prompt": "Another", "response": "x"}])
    with pytest.raises(InputError, match="no response to any of the prompts"):
        contest.read_answers(str(tmp_path / "given.jsonl"), Source([tmp_path / "prompts.jsonl"]))
