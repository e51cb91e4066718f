"""judge.py by its command line, on small random judges."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice

import flat_memory
import models
import pytest
from conftest import ROOT
from launcher import launch

from cai.data.outputs import read_manifest
from cai.data.readers import read_jsonl
from cai.models.local import LocalEngine
from cai.stats import agreement


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def samples(prompts: int, each: int = 2):
    return [
        {
            "id": f"p{p}/{s}",
            "prompt_id": f"p{p}",
            "sample": s,
            "prompt": f"How do I open gate {p}?",
            "response": f"{'Ask the owner. ' * (1 + p % 4)}Or push {s} times.",
            "kind": "benign",
        }
        for p in range(prompts)
        for s in range(each)
    ]


def gold_pairs(n: int):
    return [
        {
            "id": f"g{i}",
            "prompt": f"Which way to gate {i}?",
            "response_a": f"Left, then {i} steps.",
            "response_b": "I won't say." + " No." * (i % 5),
            "gold": "ab"[i % 2],
            "category": "ways",
        }
        for i in range(n)
    ]


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
    assert manifest["fast_path"] is True
    assert manifest["status"] == "done" and manifest["counts"]["pairs"] == 14
    again, _ = judge(given, "--json", "--batch-size", "4")
    assert json.loads(again.stdout) == summary
    to_people, _ = judge(given, "--batch-size", "4")
    assert re.search(r"^nulls +0\.0 % \(0\.0–\d+\.\d\)$", to_people.stdout, re.MULTILINE)


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


@pytest.mark.slow
def test_killed_and_continued_it_has_the_same_rows(invoke, tmp_path):
    path = write(tmp_path / "rows.jsonl", samples(30, 3))
    arguments = ["--input", path, "--model", models.folder("llama"), "--batch-size", "2", "--device", "cpu"]
    whole = tmp_path / "whole.jsonl"
    assert invoke("judge", *arguments, "--output", whole).exit_code == 0
    output, journal = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.partial"
    command = [sys.executable, ROOT / "scripts" / "judge.py", *arguments, "--output", output]
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
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
        ([{**samples(1)[0], "rounds": [{"flags": None}]}], [], "rows.jsonl:1: the flags 'None'; expected a list"),
        ([samples(1)[0], {**samples(1)[1], "rounds": 5}], [], "rows.jsonl:2: `rounds` is '5'; expected a list"),
        ([*gold_pairs(1), {**gold_pairs(2)[1], "gold": "A"}], [], "rows.jsonl:2: gold is 'A'"),
        ([*gold_pairs(1), *samples(1)], [], "rows.jsonl:2: a row without 'response_a'"),
        (gold_pairs(2), ["--pairs-per-prompt", "1"], "rows that are pairs already"),
        (samples(2), ["--clamp", "0.3", "0.6"], "--clamp 0.3 0.6"),
        (samples(2), ["--against", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (samples(2), ["--constitution", "nowhere"], "nowhere"),
        (samples(2), ["--template", "nowhere"], "nowhere"),
        ([{"prompt": "Q?", "response_a": "x"}], [], "rows.jsonl:1: a row without 'response_b'"),
        ([{"prompt": "Q?", "response_a": "x", "response_b": None}], [], "rows.jsonl:1: a row without 'response_b'"),
        ([{"prompt": "Q?", "chosen": "x", "rejected": None}], [], "rows.jsonl:1: 'rejected' is null"),
        (samples(2), ["--judge", "nowhere/at/all"], "nowhere/at/all"),
        (samples(2), ["--endpoint", "http://localhost:1/v1"], "no judge of the kind openai:NAME"),
        (samples(2), ["--judge", "tiny", "--judge", "tiny"], "the judge tiny twice"),
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


# --- several judges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["mean", "majority", "dawid-skene"])
def test_several_judges_become_one_label(judge, invoke, tmp_path, way):
    names = [str(models.folder(family)) for family in ("llama", "qwen", "gemma3")]
    more = [part for name in names[1:] for part in ("--judge", name)]
    given = gold_pairs(12)
    given[3]["response_b"] = given[3]["response_a"]
    result, output = judge(given, *more, "--combine", way, "--json", "--audit", tmp_path / "audit.json")
    assert result.exit_code == 0, result.output
    summary, rows = json.loads(result.stdout), rows_of(output)
    assert (summary["pairs"], summary["identical"], summary["failed"]) == (11, 1, 0)
    assert summary["combine"] == way and summary["agreement"]["n"] == 11
    assert list(summary["judges"]) == names and summary["judges"][names[1]]["pairs"] == 11
    assert ("estimated_accuracy" in summary) == (way == "dawid-skene")
    alone = [{row["id"]: row for row in rows_of(output.with_name(f"preferences.judge{n}.jsonl"))} for n in (1, 2, 3)]
    assert rows[3]["tie"] and len(rows) == 12
    labels = [[one[row["id"]]["p_a"] for one in alone] for row in rows if "tie" not in row]
    expected = list(map(agreement.combiner(way, lambda: labels, len(labels[0])), labels))
    for row, each, p in zip([row for row in rows if "tie" not in row], labels, expected, strict=True):
        assert row["p_a"] == pytest.approx(p) and list(row["judges"].values()) == each
        assert [v["judge"] for v in row["verdicts"]] == [name for name in names for _ in "ab"]
        assert row["chosen"] == (row["response_a"] if p > 0.5 else row["response_b"] if p < 0.5 else None)
    audited = json.loads((tmp_path / "audit.json").read_text())
    assert list(audited["judges"]) == names and audited["agreement"] == summary["agreement"]
    assert audited["accuracy"]["value"] == pytest.approx(summary["accuracy"]["value"])
    # A judge's file is there already: it is not asked again.
    before = output.with_name("preferences.judge2.jsonl").stat().st_mtime_ns
    again, _ = judge(given, *more, "--combine", way, "--json", "--overwrite")
    assert json.loads(again.stdout)["agreement"] == summary["agreement"] and rows_of(output) == rows
    assert output.with_name("preferences.judge2.jsonl").stat().st_mtime_ns == before


def test_where_one_judge_is_too_small_the_others_decide(judge, tmp_path):
    short = models.build("llama", tmp_path / "short", max_position_embeddings=600)
    given = samples(3)
    given[2]["response"] = "word " * 400
    result, output = judge(given, "--judge", short, "--json")
    assert result.exit_code == 0, result.output
    summary, rows = json.loads(result.stdout), rows_of(output)
    assert summary["failed"] == 0 and summary["judges"][str(short)]["failed"] == 1 and summary["pairs"] == 3
    assert rows[1]["judges"][str(short)] is None and rows[1]["p_a"] is not None
    given[0]["response"] = "word " * 4000  # too long for both
    result, output = judge(given, "--judge", short, "--json", "--overwrite")
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["failed"] == 1 and "p0/0 vs p0/1: it does not fit" in result.stderr
    assert [row["id"] for row in rows_of(output)] == ["p1/0 vs p1/1", "p2/0 vs p2/1"]


def test_all_principles(judge):
    result, output = judge(samples(2), "--principles", "each", "--json")
    assert result.exit_code == 0, result.output
    for row in rows_of(output):
        assert row["principle"] == "each" and len(row["verdicts"]) == 32
        assert row["p_a"] == pytest.approx(sum(v["p_a"] for v in row["verdicts"]) / 32)
    assert json.loads(result.stdout)["same_position"]["n"] == 32


def test_all_principles_are_one_comparison(judge):
    result, output = judge(samples(2), "--principles", "all", "--json")
    assert result.exit_code == 0, result.output
    assert all(row["principle"] == "all" and len(row["verdicts"]) == 2 for row in rows_of(output))


def test_match_judges_under_the_principle_that_speaks_to_the_prompt(judge, tmp_path):
    given = samples(6, 3)
    result, output = judge(given, "--principles", "match", "--json")
    assert result.exit_code == 0, result.output
    by = {match["prompt"]: match["by"] for match in rows_of(output.with_name("preferences.matches.jsonl"))}
    assert len(by) == 6
    for row in rows_of(output):
        best, p = next(iter(by[row["prompt"]].items()))
        assert row["speaks"] == (p if p >= 0.5 else None) and (p < 0.5 or row["principle"] == best)
    assert json.loads(result.stdout)["unmatched"] == sum(row["speaks"] is None for row in rows_of(output))


def test_several_judges_share_the_matches_of_the_first(judge, tmp_path):
    pairs = [{**pair, "rounds": "no list"} for pair in gold_pairs(3)]
    options = ("--judge", models.folder("qwen"), "--principles", "match", "--matches", tmp_path / "m.jsonl")
    result, output = judge(pairs, *options)
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "m.jsonl")["fingerprint"]["model"] == str(models.folder("llama"))
    first, second = (rows_of(output.with_name(f"preferences.judge{n}.jsonl")) for n in (1, 2))
    assert [row["principle"] for row in first] == [row["principle"] for row in second]


@pytest.mark.slow
def test_two_processes_write_what_one_does(judge, tmp_path):
    given = gold_pairs(9)
    given[3]["response_b"] = given[3]["response_a"]
    given[6]["response_a"] = "word " * 4000  # in the first process' share: the tie is nobody's
    result, output = judge(given, "--json")
    assert result.exit_code == 3, result.output
    two = tmp_path / "two.jsonl"
    done = launch(
        "judge",
        "--input",
        tmp_path / "rows.jsonl",
        "--model",
        models.folder("llama"),
        "--output",
        two,
        "--device",
        "cpu",
        "--json",
    )
    first, second = rows_of(output), rows_of(two)
    assert [row["id"] for row in second] == [row["id"] for row in first] and len(first) == 8, done.stderr
    for one, other in zip(first, second, strict=True):
        assert other["p_a"] == pytest.approx(one["p_a"], abs=1e-5) and other["principle"] == one["principle"]
    [said] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    expected = json.loads(result.stdout)
    assert {name: said[name] for name in ("pairs", "identical", "failed")} == {"pairs": 7, "identical": 1, "failed": 1}
    assert said["accuracy"] == expected["accuracy"] and list(read_manifest(two)["failed_rows"]) == ["g6"]
    assert {path.name for path in tmp_path.glob("two.*")} == {"two.jsonl", "two.jsonl.run.json"}


# --- the audit -----------------------------------------------------------------------------------------------


def test_audit_of_a_finished_output(judge, tmp_path):
    result, _ = judge(gold_pairs(30), "--json")
    summary, path = json.loads(result.stdout), tmp_path / "audits" / "one.json"
    again, output = judge(gold_pairs(30), "--json", "--audit", path)
    assert again.exit_code == 0 and "done already" in again.stderr
    written = json.loads(again.stdout)["audit"]
    assert written == {"file": str(path), "reliability": str(path.with_suffix(".png"))}
    audited = json.loads(path.read_text())
    for name in ("accuracy", "same_position", "longer", "always_a", "nulls"):
        assert audited[name]["value"] == pytest.approx(summary[name]["value"]), name
        assert set(audited[name]) >= {"value", "low", "high", "n"}
    for name in ("ece", "length_correlation", "length_corrected_win_rate", "label_mass", "self_preference"):
        assert set(audited[name]) >= {"value", "low", "high", "n"}, name
    assert path.with_suffix(".png").stat().st_size > 1000
    for wrong in (output, tmp_path / "rows.jsonl", "audit.txt"):
        result, _ = judge(gold_pairs(30), "--audit", wrong)
        assert result.exit_code == 2 and "--audit" in result.stderr


# --- rows of other people ------------------------------------------------------------------------------------


def test_hh_rlhf_rows_are_all_accounted_for(judge, shared_data, tmp_path):
    """The first rows here; the whole file is judged by the same line (see the references)."""
    with gzip.open(shared_data / "hh-rlhf" / "harmless-base.test.first1500.jsonl.gz", "rt") as file:
        lines = list(islice(file, 60))
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(lines))
    result, output = judge(path, "--json", "--audit", tmp_path / "audit.json")
    assert result.exit_code in (0, 3), result.output  # the small model's context does not hold the longest
    summary, rows = json.loads(result.stdout), rows_of(output)
    assert summary["pairs"] + summary["identical"] + summary["failed"] == 60
    assert len(rows) == summary["pairs"] + summary["identical"] > 40
    assert len(read_manifest(output).get("failed_rows", {})) == summary["failed"]
    turns = [row["prompt"] for row in rows if isinstance(row["prompt"], list)]
    assert len(turns) > 0.5 * len(rows) and all(one[-1]["role"] == "user" for one in turns)
    assert all(one[n]["role"] == ("user", "assistant")[n % 2] for one in turns for n in range(len(one)))
    assert 0.2 < json.loads((tmp_path / "audit.json").read_text())["always_a"]["value"] < 0.8


def test_strange_responses(judge):
    given = gold_pairs(5)
    given[0]["response_a"] = ""
    given[1]["response_a"] = given[1]["response_b"] = "The same."
    given[2]["response_b"] = "x" * 100_000
    given[3]["response_a"] = given[3]["response_b"] = ""
    result, output = judge(given, "--json")
    assert result.exit_code == 3, result.output
    summary = json.loads(result.stdout)
    assert (summary["pairs"], summary["identical"], summary["empty"], summary["failed"]) == (2, 2, 1, 1)
    assert "row g2: it does not fit the model's context of 2048 tokens" in result.stderr
    rows = {row["id"]: row for row in rows_of(output)}
    assert rows.keys() == {"g0", "g1", "g3", "g4"} and rows["g1"]["tie"] and rows["g3"]["tie"]
    assert rows["g0"]["chosen"] is not None and len(rows["g0"]["verdicts"]) == 2


def test_responses_with_nobody_to_compare_with_are_counted(judge):
    result, output = judge([*samples(3), *samples(5, 1)[3:]], "--json")
    summary = json.loads(result.stdout)
    assert (summary["pairs"], summary["unpaired"]) == (3, 2) and len(rows_of(output)) == 3


def test_a_judge_that_refuses_is_no_verdict(judge, monkeypatch):
    """One whose log-probabilities can't be read, and which writes something else than a letter."""
    monkeypatch.setattr(LocalEngine, "scores_choices", False, raising=False)
    result, output = judge(gold_pairs(4), "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    unread = [row for row in rows_of(output) if row["p_a"] is None]
    assert summary["nulls"]["value"] == len(unread) / 4 and summary["label_mass"] is None and unread
    for row in unread:
        assert row["chosen"] is row["rejected"] is row["p_chosen"] is None and row["response_a"]
        assert any(v["p_a"] is None for v in row["verdicts"]) and all("answer" in v for v in row["verdicts"])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows():
    """A row here takes 3 kB once it is read: what a further one adds is its id, a few times over."""
    few, many = (flat_memory.measure(size, libraries=False) for size in (3000, 9000))  # above one window each
    assert (many - few) * 2**20 / 6000 < 1000
