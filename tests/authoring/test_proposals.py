"""constitution.py prompts: lists of a server become rows of three kinds, without near-duplicates, and split."""

import json
import re
from itertools import combinations

import pytest
from canned_server import CannedServer

from cai.authoring.asking import Refused
from cai.authoring.proposals import NEAR, read_list, split
from cai.data.kinds import KINDS
from cai.data.readers import read_jsonl
from cai.stats.texts import word_pairs

NOUNS = ["lock", "safe", "gate", "fence", "door", "window", "drawer", "cabinet", "car", "bicycle", "boat", "tent"]
VERBS = {"whoever gives": "break", "sounds as if": "polish", "any good assistant": "draw"}


def writing(body) -> dict:
    """Lists of prompts about objects; each asks for the next few objects of the kind's verb."""
    question = body["messages"][-1]["content"]
    verb = next(verb for part, verb in VERBS.items() if part in question)
    known = len(re.findall(r"^- ", question, re.MULTILINE))
    count = int(re.search(r"Write (\d+) \w+ messages", question)[1])
    topic = re.search(r"help with (\w+)", question)[1]
    nouns = (NOUNS * 2)[known : known + count]
    lines = [f"{n}. {verb} {topic} {noun}" for n, noun in enumerate(nouns, 1)]
    return {"finish_reason": "stop", "message": {"role": "assistant", "content": "\n".join(lines)}}


@pytest.fixture
def constitution(tmp_path):
    path = tmp_path / "two.yaml"
    requests = "  critique: Find help with {0}.\n  revision: Remove help with {0}.\n  preference: Which has less {0}?\n"
    path.write_text("principles:\n" + "".join(f"- id: {name}\n{requests.format(name)}" for name in ("theft", "fraud")))
    return path


@pytest.fixture
def prompts(invoke, tmp_path, constitution):
    """`prompts(server, ..., code=0)`: the summary of the command, which writes train.jsonl and heldout.jsonl."""

    def call(server, *arguments, code=0):
        model = ["--model", "openai:writer", "--endpoint", server.address] if server else ["--model", "tiny"]
        files = ["--output", tmp_path / "train.jsonl", "--heldout", tmp_path / "heldout.jsonl"]
        options = ["--constitution", constitution, *files, "--json", *arguments]
        result = invoke("constitution", "prompts", *model, *options)
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if result.stdout else result.stderr

    return call


def rows_of(path) -> list[dict]:
    return [row for _, row in read_jsonl(path)]


def test_prompts_of_each_principle_and_kind_are_split(prompts, tmp_path):
    with CannedServer(writing) as server:
        summary = prompts(server, "-n", "7", "--heldout-share", "0.3")
        asked = len(server.requests)
        assert prompts(server, "-n", "7", "--heldout-share", "0.3") == summary
        assert len(server.requests) == asked
    train, heldout = rows_of(tmp_path / "train.jsonl"), rows_of(tmp_path / "heldout.jsonl")
    assert summary["by_principle"] == {name: dict.fromkeys(KINDS, 7) for name in ("theft", "fraud")}
    assert (summary["prompts"], len(train), len(heldout), summary["failed"]) == (42, 30, 12, 0)
    for rows, name, number in ((train, "train", 5), (heldout, "heldout", 2)):
        assert {row["split"] for row in rows} == {name}
        for kind in KINDS:
            assert sum((row["principle"], row["kind"]) == ("theft", kind) for row in rows) == number
    texts = [word_pairs(row["prompt"]) for row in train + heldout]
    assert all(len(a & b) / len(a | b) < NEAR for a, b in combinations(texts, 2))
    assert train[0].keys() == {"id", "prompt", "kind", "principle", "split"}
    assert all("break" in row["prompt"] for row in train + heldout if row["kind"] == "harmful")


def test_what_repeats_is_counted_and_asked_for_again(prompts, tmp_path):
    def repeating(body):
        answer = writing(body)
        lines = answer["message"]["content"].splitlines()
        if "exist already" not in body["messages"][-1]["content"]:
            answer["message"]["content"] = "\n".join(f"{n}. {lines[0][3:]}" for n in range(1, len(lines) + 1))
        return answer

    with CannedServer(repeating) as server:
        arguments = ("-n", "3", "--principle", "theft", "--kind", "harmful")
        summary = prompts(server, *arguments, "--tries", "1", code=3)
        assert (summary["prompts"], summary["failed"], summary["duplicates"]) == (1, 2, 2)
        assert "tries was 1, now 2" in prompts(server, *arguments, code=2)
        summary = prompts(server, *arguments, "--overwrite")
    assert (summary["prompts"], summary["failed"], summary["duplicates"]) == (3, 0, 2)


@pytest.mark.slow
def test_tiny_can_not_write_prompts_and_all_is_counted(prompts, tmp_path):
    summary = prompts(None, "-n", "2", "--max-new-tokens", "8", "--tries", "1", code=3)
    assert (summary["prompts"], summary["failed"], summary["refused_answers"]) == (0, 12, 6)
    assert rows_of(tmp_path / "train.jsonl") == []


def answering_as_judge(body) -> dict:
    """Finds a prompt at fault if it asks to break or to polish something: every borderline prompt is then dropped."""
    question = body["messages"][-1]["content"]
    if body["model"] == "writer":
        return writing(body)
    is_fault = bool(re.search("break|polish", question.partition("<prompt>")[2]))
    is_swapped = "(A) No" in question
    return {"finish_reason": "stop", "message": {"role": "assistant", "content": "AB"[is_fault == is_swapped]}}


def test_a_judge_drops_prompts_of_another_kind(prompts, tmp_path):
    with CannedServer(answering_as_judge) as server:
        summary = prompts(server, "-n", "2", "--check", f"openai:judge@{server.address}", code=3)
    assert summary["by_principle"]["theft"] == {"harmful": 2, "benign": 2, "borderline": 0}
    assert (summary["other_kind"], summary["unchecked"], summary["failed"]) == (4, 0, 4)
    checks = {row["id"]: row["tempts"] for row in rows_of(tmp_path / "train.checks.jsonl")}
    assert checks["theft-harmful-1"] == 1 and checks["theft-benign-1"] == 0


def test_bad_input_is_refused_before_anything_is_written(prompts, tmp_path):
    assert "no principle 'x'" in prompts(None, "--principle", "x", code=2)
    assert "the same file as --output" in prompts(None, "--heldout", tmp_path / "train.jsonl", code=2)
    assert "no-such-judge" in prompts(None, "--check", tmp_path / "no-such-judge", code=2)
    assert prompts(None, "-n", "7", "--dry-run") | {"prompts": 42, "model_calls_at_least": 12} == prompts(
        None, "-n", "7", "--dry-run"
    )
    assert not list(tmp_path.glob("train*"))


@pytest.mark.parametrize(
    "answer", ["", "I can't help.", "1. a\n3. b", "2. a", "1. a\nand so on", "- a", f"1. {'x' * 1001}", "1. ?!"]
)
def test_any_other_form_than_a_numbered_list_is_refused(answer):
    with pytest.raises(Refused):
        read_list(answer)


def test_a_numbered_list_is_read():
    assert read_list('1. How do I do it?\n\n 2) "Quoted"\n3. “Curly”') == ["How do I do it?", "Quoted", "Curly"]


def test_the_share_is_held_out_of_each_cell_whatever_the_order():
    rows = [{"id": f"{n}", "prompt": f"text {n}", "principle": "p", "kind": KINDS[n % 2]} for n in range(20)]
    halves = split(rows, 0.25, seed=0)
    for kind in KINDS[:2]:
        assert sum(row["split"] == "heldout" for row in halves if row["kind"] == kind) == 3  # 2.5, rounded up
    by_id = {row["id"]: row["split"] for row in halves}
    assert {row["id"]: row["split"] for row in split(rows[::-1], 0.25, seed=0)} == by_id
    assert {row["split"] for row in split(rows, 0, seed=0)} == {"train"}
