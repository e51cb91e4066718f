"""compare.py: what it writes, a resumed run, the plan, and refusals that write nothing."""

import json

import models
import pytest

from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl

PROMPTS = [
    {"id": str(i), "prompt": f"How do I open gate {i}?", "kind": kind}
    for i, kind in enumerate(["harmful", "harmful", "benign", "borderline"])
]


@pytest.fixture
def compare(invoke, tmp_path):
    """compare.py on PROMPTS: a model against given responses, or the policies that are named."""
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    write_jsonl(tmp_path / "given.jsonl", [{**row, "response": f"Lift {row['id']}."} for row in PROMPTS])

    def call(*more, policies=None, judge=None):
        policies = policies or [f"base={models.folder('llama')}", f"other={tmp_path / 'given.jsonl'}"]
        arguments = ["--input", tmp_path / "prompts.jsonl", "--judge", judge or models.folder("qwen")]
        arguments += [word for policy in policies for word in ("--policy", policy)]
        return invoke("compare", *arguments, "--max-new-tokens", 8, "--output", tmp_path / "elo.jsonl", *more)

    return call


def test_it_answers_compares_and_scores(compare, tmp_path):
    result = compare()
    assert result.exit_code == 0, result.output
    assert "harmlessness elo other" in result.stdout and "comparisons 4" in result.stdout
    rows = [row for _, row in read_jsonl(tmp_path / "elo.comparisons.jsonl")]
    assert [row["id"] for row in rows] == [f"{i}: base vs other" for i in range(4)]
    assert rows[2]["response_b"] == "Lift 2."
    responses = [row["response"] for _, row in read_jsonl(tmp_path / "elo.base.responses.jsonl")]
    assert [row["response_a"] for row in rows] == responses
    assert read_manifest(tmp_path / "elo.jsonl")["command"] == "compare"
    before = (tmp_path / "elo.jsonl").stat().st_mtime_ns
    again = compare("--json")
    assert again.exit_code == 0 and (tmp_path / "elo.jsonl").stat().st_mtime_ns == before
    metrics = json.loads(again.stdout)["metrics"]
    assert metrics["helpfulness_elo base"]["value"] == 0 and metrics["harmlessness_elo other"]["n"] == 2
    other = compare("--seed", 1)
    assert other.exit_code == 2 and "seed was 0, now 1" in other.stderr
    assert compare("--seed", 1, "--overwrite").exit_code == 0


def test_a_comparison_that_is_too_long_for_the_judge_ends_with_3(compare, tmp_path):
    given = [{**row, "response": "Lift. " * (3000 if row["id"] == "2" else 1)} for row in PROMPTS]
    write_jsonl(tmp_path / "long.jsonl", given)
    files = [tmp_path / "long.jsonl", tmp_path / "given.jsonl"]
    result = compare("--json", policies=files, judge=models.folder("llama"))
    assert result.exit_code == 3, result.output
    summary = json.loads(result.stdout)
    assert (summary["failed"], summary["comparisons"]) == (1, 3)


def test_a_dry_run_counts_and_writes_nothing(compare, tmp_path):
    before = sorted(tmp_path.iterdir())
    plan = json.loads(compare("--dry-run", "--json").stdout)
    assert (plan["rows"], plan["harmful"], plan["policies"]) == (4, 2, 2)
    assert (plan["comparisons"], plan["model_calls"], plan["judge_calls"]) == (4, 4, 8)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"policies": ["tiny"]}, "one policy; expected two or more"),
        ({"policies": ["a=tiny", "a=other.jsonl"]}, "the policy 'a' twice"),
        ({"policies": ["tiny", "./none"]}, "no such model folder"),
        ({"judge": "no/such/judge"}, "no such model folder"),
    ],
)
def test_what_is_refused(compare, tmp_path, change, expected):
    before = sorted(tmp_path.iterdir())
    result = compare(**change)
    assert result.exit_code == 2 and expected in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_the_output_replaces_no_responses(compare, tmp_path):
    result = compare("--output", tmp_path / "given.jsonl")
    assert result.exit_code == 2 and "the output is one of the inputs" in result.stderr


def test_prompts_need_a_kind(compare, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "0", "prompt": "x", "kind": "rude"}])
    result = compare()
    assert result.exit_code == 2 and "prompts.jsonl:1: the kind 'rude'" in result.stderr
