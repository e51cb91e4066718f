"""generate.py: responses to prompts."""

import json

import models
import pytest

from cai.data.outputs import read_manifest
from cai.data.readers import read_jsonl
from cai.data.sources import Source


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Why?"},
    ]
    rows = [{"id": "a", "prompt": "One?", "kind": "benign"}, {"prompt": turns}, {"id": 3, "prompt": "Three?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def generate(invoke, prompts, tmp_path):
    def call(*more, model=None, output="out.jsonl"):
        result = invoke(
            "generate",
            "--input",
            prompts,
            "--output",
            tmp_path / output,
            "--model",
            model or models.folder("llama"),
            "--max-new-tokens",
            8,
            *more,
        )
        rows = [row for _, row in read_jsonl(tmp_path / output)] if result.exit_code == 0 else None
        return result, rows

    return call


def test_rows_of_several_samples(generate, prompts, tmp_path):
    result, rows = generate("--samples", 3, "--json")
    made = Source([str(prompts)]).ids[1]
    assert [row["id"] for row in rows] == [f"{i}/{n}" for i in ("a", made, "3") for n in range(3)]
    assert [(row["prompt_id"], row["sample"]) for row in rows[:3]] == [("a", 0), ("a", 1), ("a", 2)]
    assert rows[0]["kind"] == "benign" and rows[0]["prompt"] == "One?" and len(rows[3]["prompt"]) == 3
    assert all(row["model"] == str(models.folder("llama")) for row in rows)
    assert {row["finish"] for row in rows} <= {"stop", "length"}
    assert len({row["response"] for row in rows[:3]}) == 3, "samples differ"
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["prompts"], summary["failed"]) == (9, 3, 0)
    assert summary["unfinished"] == sum(row["finish"] == "length" for row in rows)
    assert summary["next"].startswith("python scripts/critique.py --input ")
    tokens = read_manifest(tmp_path / "out.jsonl")["tokens"]
    assert tokens["rows"] == 9 and 9 <= tokens["new"] <= 72 and tokens["prompt"] > 50


def test_the_first_sample_does_not_depend_on_how_many_there_are(generate):
    _, one = generate()
    _, three = generate("--samples", 3, output="three.jsonl")
    assert one == three[::3]


def test_the_seed_the_system_message_and_greedy(generate):
    texts = {
        name: [row["response"] for row in generate(*more, output=f"{name}.jsonl")[1]]
        for name, more in {
            "plain": [],
            "seed": ["--seed", 1],
            "system": ["--system", "Be brief."],
            "greedy": ["--temperature", 0],
            "greedy again": ["--temperature", 0, "--seed", 5],
        }.items()
    }
    assert texts["plain"] != texts["seed"] and texts["plain"] != texts["system"] != texts["greedy"]
    assert texts["greedy"] == texts["greedy again"]


def test_a_new_response_leaves_old_rounds_behind(generate, prompts):
    old = {"id": "a", "prompt": "One?", "response": "old", "rounds": [{"principle": "p", "critique": "c"}]}
    prompts.write_text(json.dumps(old) + "\n")
    (row,) = generate()[1]
    assert "rounds" not in row and row["response"] != "old" and row["id"] == "a/0"


@pytest.mark.parametrize("family", ["qwen", "gemma3", "mistral"])
def test_other_architectures(generate, family):
    result, rows = generate("--system", "Be brief.", model=models.folder(family))
    assert result.exit_code == 0 and len(rows) == 3 and all(isinstance(row["response"], str) for row in rows)


def test_plain_text_in_and_a_human_summary_out(invoke, tmp_path):
    (tmp_path / "in.txt").write_text("One?\nTwo?\n")
    result = invoke(
        "generate",
        "--input",
        tmp_path / "in.txt",
        "--output",
        tmp_path / "o.jsonl",
        "--model",
        models.folder("llama"),
        "--max-new-tokens",
        4,
        "--limit",
        1,
    )
    assert result.exit_code == 0
    assert "rows        1\n" in result.stdout and "next        python scripts/critique.py" in result.stdout
