"""judge.py by its command line, on small random judges."""

import json
import os
import signal
import subprocess
import sys
import time

import models
import pytest
from conftest import ROOT

from cai.records import read_jsonl, read_manifest


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def samples(prompts: int, each: int = 2):
    return [
        {"id": f"p{p}/{s}", "prompt_id": f"p{p}", "sample": s, "prompt": f"How do I open gate {p}?",
         "response": f"{'Ask the owner. ' * (1 + p % 4)}Or push {s} times.", "kind": "benign"}
        for p in range(prompts) for s in range(each)
    ]


def gold_pairs(n: int):
    return [{"id": f"g{i}", "prompt": f"Which way to gate {i}?", "response_a": f"Left, then {i} steps.",
             "response_b": "I won't say." + " No." * (i % 5), "gold": "ab"[i % 2], "category": "ways"}
            for i in range(n)]


@pytest.fixture
def judge(invoke, tmp_path):
    """`judge(rows, *args)` runs judge.py on them and returns (result, output path)."""

    def call(rows, *args, model="llama"):
        path = write(tmp_path / "rows.jsonl", rows) if isinstance(rows, list) else rows
        output = tmp_path / "out" / "preferences.jsonl"
        folder = models.folder(model) if model in models.FAMILIES else model
        result = invoke("judge", "--input", path, "--model", folder, "--output", output, "--device", "cpu", *args)
        return result, output

    return call


def test_samples_become_preferences(judge):
    given = samples(5, 3)
    given[1]["response"] = f" {given[0]['response']}\n"
    result, output = judge(given, "--json", "--batch-size", "4")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["pairs"], summary["identical"], summary["failed"]) == (14, 1, 0)
    assert summary["next"].startswith(f"python scripts/reward_model.py --input {output} --model ")
    tie, *rows = rows_of(output)
    assert tie["id"] == "p0/0 vs p0/1" and tie["tie"] and tie["chosen"] is None and tie["p_chosen"] == 0.5
    assert [row["id"] for row in rows][:4] == ["p0/0 vs p0/2", "p0/1 vs p0/2", "p1/0 vs p1/1", "p1/0 vs p1/2"]
    for row in rows:
        assert {row["chosen"], row["rejected"]} == {row["response_a"], row["response_b"]}
        assert [v["order"] for v in row["verdicts"]] == ["ab", "ba"]
        p = sum(v["p_a"] for v in row["verdicts"]) / 2
        assert row["p_chosen"] == max(p, 1 - p) and (row["chosen"] == row["response_a"]) == (p > 0.5)
        assert row["kind"] == "benign" and row["prompt_id"] == row["id"][:2] and "sample" not in row
    assert len({row["principle"] for row in rows}) > 3
    manifest = read_manifest(output)
    assert manifest["status"] == "done" and manifest["counts"]["pairs"] == 14
    again, _ = judge(given, "--json", "--batch-size", "4")
    assert json.loads(again.stdout) == summary


def test_gold_gives_an_accuracy_and_what_it_is_worth(judge):
    result, output = judge(gold_pairs(30), "--json")
    summary, rows = json.loads(result.stdout), rows_of(output)
    right = sum(row["chosen"] == row[f"response_{row['gold']}"] for row in rows)
    assert summary["accuracy"]["value"] == right / 30 and summary["accuracy"]["n"] == 30
    assert summary["always_a"]["value"] == 0.5
    longer = sum((len(row["response_a"]) > len(row["response_b"])) == (row["gold"] == "a") for row in rows)
    assert summary["longer"]["value"] == longer / 30
    assert all(row["category"] == "ways" for row in rows)
    result, _ = judge(gold_pairs(30), "--overwrite")
    assert "accuracy" in result.stdout and "same_position" in result.stdout


def test_against(judge, tmp_path):
    others = [{**row, "response": f"Wait for {row['id']}."} for row in samples(4, 1)]
    path = write(tmp_path / "others.jsonl", others)
    result, output = judge(samples(5, 2), "--against", path, "--json")
    assert result.exit_code == 0, result.output
    rows = rows_of(output)
    assert len(rows) == 8 and all(row["response_b"].startswith("Wait for ") for row in rows)
    won = sum(row["chosen"] == row["response_a"] for row in rows)
    assert json.loads(result.stdout)["a_chosen"]["value"] == won / 8


def test_pairs_per_prompt_and_seed(judge):
    def ids(*args):
        result, output = judge(samples(6, 4), "--pairs-per-prompt", "2", "--overwrite", *args)
        assert result.exit_code == 0, result.output
        return {row["id"]: row["principle"] for row in rows_of(output)}

    first = ids()
    assert len(first) == 12 and all(sum(i.startswith(f"p{p}/") for i in first) == 2 for p in range(6))
    assert ids() == first and ids("--seed", "1").keys() != first.keys()


def test_reasoning_is_kept_and_clamped(judge):
    result, output = judge(samples(3), "--cot", "--max-new-tokens", "8", "--temperature", "1")
    assert result.exit_code == 0, result.output
    for row in rows_of(output):
        assert all(v["reasoning"] for v in row["verdicts"]) and 0.5 <= row["p_chosen"] <= 0.6
    result, output = judge(gold_pairs(20), "--clamp", "0.4995", "0.5005", "--overwrite")
    assert result.exit_code == 0, result.output
    free = [sum(v["p_a"] for v in row["verdicts"]) / 2 for row in rows_of(output)]
    assert max(abs(p - 0.5) for p in free) > 0.0005
    for row, p in zip(rows_of(output), free, strict=True):
        assert row["p_chosen"] == pytest.approx(min(max(p, 1 - p), 0.5005))


def test_undecided_is_null(judge, tmp_path):
    """A judge that is shown neither response prefers a place, never a response."""
    blind = tmp_path / "blind.jinja"
    blind.write_text("{% block user %}{{ prompt }} A or B?{% endblock %}{% block prefill %}It is ({% endblock %}")
    result, output = judge(gold_pairs(4), "--template", blind, "--batch-size", "1", "--json")
    summary = json.loads(result.stdout)
    assert summary["undecided"] == 4 and summary["same_position"]["value"] == 1
    assert "accuracy" not in summary and summary["mean_margin"] == 0
    for row in rows_of(output):
        assert row["chosen"] is None and row["rejected"] is None and row["p_chosen"] == 0.5


def test_what_does_not_fit_is_counted(judge, tmp_path):
    folder = models.build("llama", tmp_path / "short", max_position_embeddings=600)
    given = samples(3)
    given[2]["response"] = "word " * 400
    result, output = judge(given, "--json", model=str(folder))
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["failed"] == 1 and "p1/0 vs p1/1" in result.stderr
    assert [row["id"] for row in rows_of(output)] == ["p0/0 vs p0/1", "p2/0 vs p2/1"]
    assert list(read_manifest(output)["failed_rows"]) == ["p1/0 vs p1/1"]


def test_killed_and_continued_it_has_the_same_rows(invoke, tmp_path):
    path = write(tmp_path / "rows.jsonl", samples(30, 3))
    arguments = ["--input", path, "--model", models.folder("llama"), "--batch-size", "2", "--device", "cpu"]
    whole = tmp_path / "whole.jsonl"
    assert invoke("judge", *arguments, "--output", whole).exit_code == 0
    output, journal = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.partial"
    command = [sys.executable, ROOT / "scripts" / "judge.py", *arguments, "--output", output]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 10):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not output.exists()
    with open(journal, "ab") as file:
        file.write(b'{"id": "p29/0 vs p2')  # killed in the middle of a line
    kept = journal.read_bytes().count(b"\n")
    assert 10 <= kept < 90
    result = invoke("judge", *arguments, "--output", output)
    assert result.exit_code == 0, result.output
    assert "torn" in result.stderr and read_manifest(output)["resumed"] == 1
    first, second = rows_of(whole), rows_of(output)
    assert [row["id"] for row in first] == [row["id"] for row in second] and len(first) == 90
    for one, other in zip(first, second, strict=True):
        assert one["principle"] == other["principle"]
        assert one["p_chosen"] == pytest.approx(other["p_chosen"], abs=1e-5)


def test_another_run_is_refused(judge):
    assert judge(samples(2))[0].exit_code == 0
    result, _ = judge(samples(2), "--seed", "5")
    assert result.exit_code == 2 and "seed was 0, now 5" in result.stderr


def test_dry_run(judge):
    result, output = judge(samples(4, 3), "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert (plan["pairs"], plan["done"], plan["model_calls"], plan["new_tokens_at_most"]) == (12, 0, 24, 0)
    assert plan["prompt_tokens_about"] > 24 * 30 and not output.parent.exists()
    result, _ = judge(samples(4, 3), "--dry-run", "--json", "--cot", "--max-new-tokens", "10")
    plan = json.loads(result.stdout)
    assert (plan["model_calls"], plan["new_tokens_at_most"]) == (48, 240)


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ([{"prompt": "Q?"}], [], "rows.jsonl:1: a row without 'response'"),
        ([{"response": "R."}], [], "rows.jsonl:1: a row without 'prompt'"),
        ([*samples(1), samples(1)[0]], [], "the id 'p0/0' again"),
        (samples(2, 1), [], "no two responses to the same prompt"),
        ([*gold_pairs(1), {**gold_pairs(2)[1], "gold": "A"}], [], "rows.jsonl:2: gold is 'A'"),
        ([*gold_pairs(1), *samples(1)], [], "rows.jsonl:2: a row without 'response_a'"),
        (gold_pairs(2), ["--pairs-per-prompt", "1"], "rows that are pairs already"),
        (samples(2), ["--clamp", "0.3", "0.6"], "--clamp 0.3 0.6"),
        (samples(2), ["--against", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (samples(2), ["--constitution", "nowhere"], "nowhere"),
        (samples(2), ["--template", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(judge, tmp_path, rows, arguments, said):
    result, output = judge(rows, *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and "Traceback" not in result.stderr
    assert not output.parent.exists()


def test_a_model_without_a_chat_template_is_refused(judge, tmp_path):
    folder = models.copy("llama", tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    result, output = judge(samples(1), model=str(folder))
    assert result.exit_code == 2 and f"{folder}: the model folder has no chat template" in result.stderr
    assert not output.parent.exists()


def test_a_line_that_is_not_json(judge, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(samples(1)[0]) + "\nnot json\n")
    result, output = judge(path)
    assert result.exit_code == 2 and "rows.jsonl:2: not JSON" in result.stderr and not output.parent.exists()
