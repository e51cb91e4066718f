"""What generate, critique and revise have in common: resume, bad input, exit codes, windows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import models
import pytest
from conftest import ROOT
from launcher import launch

from cai.data.outputs import read_manifest
from cai.data.readers import read_jsonl
from cai.models import chat, local

STEPS = ["generate", "critique", "revise"]
COUNT = 72
SHORT = ("--max-new-tokens", 16)


def write_input(step: str, path, count: int = COUNT, **more):
    """Rows as the step reads them, with prompts of varied length."""
    with open(path, "w", encoding="utf-8") as file:
        for n in range(count):
            row = {"id": f"r{n}", "prompt": "How do I open the gate? " * (1 + n * 7 % 5) + str(n), "kind": "benign"}
            if step != "generate":
                row |= {"prompt_id": f"p{n}", "response": f"Lift bar {n}."}
            if step == "revise":
                row["rounds"] = [{"principle": "property", "critique": f"It harms {n}."}]
            file.write(json.dumps({**row, **more}) + "\n")
    return path


@pytest.fixture
def constitution(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("- id: property\n  principle: Respect property.\n- id: truth\n  principle: Tell the truth.\n")
    return path


@pytest.fixture
def arguments(tmp_path, constitution):
    """`arguments(step, input, output)`: the step's command line."""

    def build(step, source, output, *more):
        extra = () if step == "generate" else ("--constitution", constitution)
        return ["--input", source, "--output", output, "--model", models.folder("llama"), *extra, *SHORT, *more]

    return build


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_and_resumed_is_as_never_killed(step, invoke, tmp_path, arguments):
    source = write_input(step, tmp_path / "in.jsonl")
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    line = [str(part) for part in arguments(step, source, output, "--batch-size", 2)]
    journal = tmp_path / "out.jsonl.partial"
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / f"{step}.py"), *line],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while running.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 6):
            time.sleep(0.005)
        running.send_signal(signal.SIGSTOP)
        assert running.poll() is None, running.stderr.read()
        refused = invoke(step, *line)
        assert refused.exit_code == 2 and f"another process ({running.pid})" in refused.stderr
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
    done = journal.read_bytes().count(b"\n")
    assert 6 <= done < COUNT and not output.exists()
    with open(journal, "ab") as file:
        file.write(b'{"id": "r3", "prompt": "torn in the mid')

    changed = invoke(step, *line, "--seed", 1)
    assert changed.exit_code == 2 and "seed was 0, now 1" in changed.stderr
    assert invoke(step, *line).exit_code == 0
    assert read_manifest(output)["resumed"] == 1 and read_manifest(output)["tokens"]["rows"] == COUNT - done
    assert invoke(step, *arguments(step, source, whole, "--batch-size", 2)).exit_code == 0
    assert output.read_bytes() == whole.read_bytes()
    assert [row["id"].partition("/")[0] for _, row in read_jsonl(output)] == [f"r{n}" for n in range(COUNT)]
    assert read_manifest(output)["counts"] == read_manifest(whole)["counts"]
    assert {p.name for p in tmp_path.glob("out.*")} == {"out.jsonl", "out.jsonl.run.json"}


ROW = '{"id": "a", "prompt": "x", "response": "y", "rounds": [{"principle": "property", "critique": "c"}]}\n'
NO_ROUNDS = '{"id": "a", "prompt": "x", "response": "y"}\n'


def bad(name):
    """Spoils one thing: (input text or None, model folder, constitution) to their bad selves."""

    def spoil(good, model, constitution):
        first = good
        if name == "missing":
            return None
        if name == "not json":
            return first + "rubbish\n"
        if name == "no prompt":
            return first + '{"id": "b", "question": "x"}\n'
        if name == "duplicate":
            return first + first
        if name == "principle key":
            constitution.write_text("- id: property\n  critique: c\n  revison: r\n  preference: p\n")
        if name == "no tokenizer":
            for file in model.glob("*token*"):
                file.unlink()
        if name == "no template":
            (model / "chat_template.jinja").unlink()
        return first

    return spoil


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("missing", ["in.jsonl: no such file", "Check the path"]),
        ("not json", ["in.jsonl:2: not JSON", "'rubbish'", "one JSON object per line", "Fix or delete this line"]),
        ("no prompt", ["in.jsonl:2: a row without 'prompt'", "The row has: id, question"]),
        ("duplicate", ["in.jsonl:2: the id 'a' again, first on line 1", "Rename or delete"]),
        ("principle key", ["rules.yaml:3: unknown key 'revison'", "Did you mean 'revision'?"]),
        ("no tokenizer", ["model: the model folder has no tokenizer", "save_pretrained"]),
        ("no template", ["model: the model folder has no chat template", "chat_template.jinja"]),
    ],
)
def test_bad_input_ends_with_2_and_writes_nothing(step, name, parts, invoke, tmp_path, arguments, constitution):
    if step == "generate" and name == "principle key":
        pytest.skip("generate reads no constitution")
    model, source = models.copy("llama", tmp_path / "model"), tmp_path / "in.jsonl"
    text = bad(name)(ROW if step == "revise" else NO_ROUNDS, model, constitution)
    if text is not None:
        source.write_text(text)
    before = sorted(tmp_path.rglob("*"))
    line = arguments(step, source, tmp_path / "new" / "out.jsonl")
    line[line.index(models.folder("llama"))] = model
    for more in ([], ["--dry-run"], ["--overwrite"]):
        result = invoke(step, *line, *more)
        assert result.exit_code == 2 and result.stdout == ""
        for part in parts:
            assert part in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("step", STEPS)
def test_a_row_that_does_not_fit_is_counted_named_and_ends_with_3(step, invoke, tmp_path, arguments):
    source = write_input(step, tmp_path / "in.jsonl", 4)
    rows = [row for _, row in read_jsonl(source)]
    rows[2]["prompt"] = "very long " * 2000
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    line = arguments(step, source, output, "--json")
    failing = "r2/0" if step == "generate" else "r2"
    result = invoke(step, *line)
    assert result.exit_code == 3 and f"row {failing}: " in result.stderr and "2048" in result.stderr
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["failed"]) == (3, 1)
    assert summary["failed_rows"] == f"{output}.run.json"
    assert list(read_manifest(output)["failed_rows"]) == [failing]
    assert [row["id"].partition("/")[0] for _, row in read_jsonl(output)] == ["r0", "r1", "r3"]
    again = invoke(step, *line)
    assert again.exit_code == 3 and json.loads(again.stdout) == summary


@pytest.mark.parametrize("step", STEPS)
def test_dry_run_counts_and_writes_nothing(step, invoke, tmp_path, arguments):
    source = write_input(step, tmp_path / "in.jsonl", 10)
    result = invoke(step, *arguments(step, source, tmp_path / "out.jsonl", "--dry-run", "--json"))
    plan = json.loads(result.stdout)
    assert (plan["rows"], plan["done"], plan["model_calls"], plan["new_tokens_at_most"]) == (10, 0, 10, 160)
    assert plan["prompt_tokens_about"] > 100 and plan["weights_on_disk_mb"] > 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == []


@pytest.mark.parametrize("step", STEPS)
def test_help_and_dry_run_do_not_load_torch(step, tmp_path, arguments):
    source = write_input(step, tmp_path / "in.jsonl", 2)
    line = [str(part) for part in arguments(step, source, tmp_path / "out.jsonl", "--dry-run")]
    code = (
        "import runpy, sys\n"
        "script, line = sys.argv[1], sys.argv[2:]\n"
        "for arguments in (['--help'], line):\n"
        "    sys.argv = [script, *arguments]\n"
        "    try: runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "loaded = {'torch', 'trl', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)\n"
    )
    script = str(ROOT / "scripts" / f"{step}.py")
    result = subprocess.run(
        [sys.executable, "-c", code, script, *line],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
    )
    assert result.returncode == 0, result.stderr
    assert "Example:" in result.stdout and "model_calls" in result.stdout


def test_rows_are_read_a_window_ahead_of_the_model(invoke, tmp_path, arguments, monkeypatch):
    """So that memory does not grow with them, and reading does not hold up the model."""

    monkeypatch.setattr(local, "WINDOW", 2)
    read, ahead = [], []
    render, forward = chat.Chat.render, local.LocalEngine._generate

    def reading(self, talk):
        read.append(talk)
        return render(self, talk)

    def watching(self, batch, **others):
        ahead.append(len(read))
        return forward(self, batch, **others)

    monkeypatch.setattr(chat.Chat, "render", reading)
    monkeypatch.setattr(local.LocalEngine, "_generate", watching)
    source = write_input("critique", tmp_path / "in.jsonl", 20)
    result = invoke("critique", *arguments("critique", source, tmp_path / "a.jsonl", "--batch-size", 2))
    assert result.exit_code == 0 and len(read) == 20 and len(ahead) == 10
    assert all(seen <= 4 * (batch // 2 + 2) for batch, seen in enumerate(ahead))
    assert [row["id"] for _, row in read_jsonl(tmp_path / "a.jsonl")] == [f"r{n}" for n in range(20)]


def test_a_resumed_run_makes_the_same_batches(invoke, tmp_path, arguments, monkeypatch):
    """Rounding depends on the batch: a row that is left is asked in the company it would have had."""
    source, output = write_input("critique", tmp_path / "in.jsonl", 12), tmp_path / "out.jsonl"
    from cai.models.local import LocalEngine

    batches, stop = [], []
    forward = LocalEngine._generate

    def watching(self, batch, **others):
        if len(batches) in stop:
            raise KeyboardInterrupt
        batches.append([prompt.request.key for prompt in batch])
        return forward(self, batch, **others)

    monkeypatch.setattr(LocalEngine, "_generate", watching)
    line = arguments("critique", source, output, "--batch-size", 4)
    assert invoke("critique", *line).exit_code == 0
    whole, all_batches = output.read_bytes(), list(batches)
    assert [len(batch) for batch in all_batches] == [4, 4, 4]
    batches.clear()
    stop.append(2)
    assert invoke("critique", *line, "--overwrite").exit_code == 1
    journal = tmp_path / "out.jsonl.partial"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:6]))
    batches.clear()
    stop.clear()
    assert invoke("critique", *line).exit_code == 0
    assert batches == all_batches[1:], "the first is skipped, the half of the second that is there is made again"
    assert output.read_bytes() == whole


def test_the_order_of_rows_does_not_change_their_answers(invoke, tmp_path, arguments):
    source = write_input("generate", tmp_path / "in.jsonl", 12)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(source.read_text().splitlines()[::-1]) + "\n")
    for path in (source, turned):
        assert invoke("generate", *arguments("generate", path, tmp_path / f"of-{path.name}")).exit_code == 0
    one = {row["id"]: row for _, row in read_jsonl(tmp_path / "of-in.jsonl")}
    assert one == {row["id"]: row for _, row in read_jsonl(tmp_path / "of-turned.jsonl")}
    assert len({row["response"] for row in one.values()}) > 6


def test_the_same_name_with_other_weights_is_another_run(invoke, tmp_path, arguments):
    source, output = write_input("generate", tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    model = models.copy("llama", tmp_path / "model")
    line = arguments("generate", source, output)
    line[line.index(models.folder("llama"))] = model
    assert invoke("generate", *line).exit_code == 0
    shutil.rmtree(model)
    models.build("llama", model, seed=1)
    result = invoke("generate", *line)
    assert result.exit_code == 2 and "weights was" in result.stderr and "--overwrite" in result.stderr
    assert invoke("generate", *line, "--overwrite").exit_code == 0


@pytest.mark.slow
def test_two_processes_write_what_one_does(invoke, tmp_path, arguments):
    source = write_input("critique", tmp_path / "in.jsonl", 15)
    rows = [row for _, row in read_jsonl(source)]
    rows[5]["prompt"] = "very long " * 2000  # one that fails, in the second process' share
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert invoke("critique", *arguments("critique", source, one, "--device", "cpu")).exit_code == 3
    # What a run of three processes left behind when it was killed: two rows, and a torn one.
    lines = one.read_bytes().splitlines(keepends=True)
    (tmp_path / "two.jsonl.partial.2").write_bytes(lines[3] + lines[9] + lines[10][:20])
    running = {**read_manifest(one), "status": "running"}
    (tmp_path / "two.jsonl.run.json").write_text(json.dumps(running))
    done = launch("critique", *arguments("critique", source, two, "--device", "cpu", "--json"))
    assert two.read_bytes() == one.read_bytes(), done.stderr
    [summary] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (summary["rows"], summary["failed"]) == (14, 1)
    manifest = read_manifest(two)
    assert manifest["counts"] == read_manifest(one)["counts"] and list(manifest["failed_rows"]) == ["r5"]
    assert manifest["tokens"]["rows"] == 12
    assert {path.name for path in tmp_path.glob("two.*")} == {"two.jsonl", "two.jsonl.run.json"}
    again = launch("critique", *arguments("critique", source, two, "--device", "cpu"))
    assert "is done already" in again.stderr and two.read_bytes() == one.read_bytes()


def test_what_another_run_left_beside_the_output_is_not_taken_in(invoke, tmp_path, arguments):
    source, output = write_input("critique", tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial.1").write_text('{"id": "r1", "stale": true}\n')
    assert invoke("critique", *arguments("critique", source, output)).exit_code == 0
    assert len(list(read_jsonl(output))) == 3 and "stale" not in output.read_text()
    assert {path.name for path in tmp_path.glob("out.*")} == {"out.jsonl", "out.jsonl.run.json"}
