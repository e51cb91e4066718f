"""Events of commands: their fields, by the table in references/data-formats.md, from real runs of small models."""

import math
import os
import re
import signal
import subprocess
import sys
import time

import models
import pytest
from conftest import ROOT
from event_files import COUNTED, FIELDS, OPTIONAL, read_events

from cai.base import events
from cai.data.outputs import read_manifest, write_jsonl


@pytest.fixture
def line(tmp_path):
    """Options of generate.py: four prompts, a small model."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": str(n), "prompt": f"What about gate {n}?"} for n in range(4)])
    return ["--input", tmp_path / "prompts.jsonl", "--model", models.folder("llama"), "--max-new-tokens", 4]


def test_a_command_reports_its_start_rows_figures_and_end_and_its_output_stays_the_same(invoke, tmp_path, line):
    path = tmp_path / "logs" / "events.jsonl"
    result = invoke("generate", *line, "--output", tmp_path / "a.jsonl", "--events", path)
    assert result.exit_code == 0, result.output
    rows = read_events(path)
    assert {row["command"] for row in rows} == {"generate"}
    assert [rows[0]["event"], rows[-2]["event"], rows[-1]["event"]] == ["started", "figures", "ended"]
    assert rows[0]["pid"] == os.getpid() and "step" not in rows[0]
    counted = [row for row in rows if row["event"] == "progress"]
    assert [(row["done"], row["total"]) for row in (counted[0], counted[-1])] == [(0, 4), (4, 4)]
    assert counted[-1]["eta_seconds"] == 0 and counted[-1]["rate"] > 0 and counted[-1]["unit"] == "row"
    assert rows[-2]["figures"]["rows"] == 4 and rows[-2]["figures"]["output"] == str(tmp_path / "a.jsonl")
    assert rows[-1]["exit_code"] == 0

    plain = invoke("generate", *line, "--output", tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert plain.stdout.replace("b.jsonl", "a.jsonl") == result.stdout
    with_events, without = (read_manifest(tmp_path / f"{name}.jsonl")["fingerprint"] for name in "ab")
    assert with_events == without
    # The next run appends: here the same command, which is done.
    assert invoke("generate", *line, "--output", tmp_path / "a.jsonl", "--events", path).exit_code == 0
    again = read_events(path)
    assert again[: len(rows)] == rows and [row["event"] for row in again[len(rows) :]][-1] == "ended"
    assert "is done already" in next(row["text"] for row in again[len(rows) :] if row["event"] == "progress")


def test_a_file_that_cannot_be_written_or_holds_something_else_stops_the_command_first(invoke, tmp_path, line):
    output = tmp_path / "out.jsonl"
    before = (tmp_path / "prompts.jsonl").read_bytes()
    for path, reason in (
        (tmp_path, "events can't be written"),
        (tmp_path / "prompts.jsonl" / "events.jsonl", "events can't be written"),
        (tmp_path / "prompts.jsonl", "the file is not one of events"),
    ):
        result = invoke("generate", *line, "--output", output, "--events", path)
        assert result.exit_code == 2 and reason in result.stderr and "--events another FILE" in result.stderr
    assert (tmp_path / "prompts.jsonl").read_bytes() == before and not output.exists()
    result = invoke("generate", *line, "--output", output, "--events", tmp_path / "e.jsonl", "--dry-run")
    assert result.exit_code == 2 and "--events would have no effect" in result.output
    assert not (tmp_path / "e.jsonl").exists()


def test_failures_are_the_last_event_with_their_exit_code(invoke, tmp_path, line):
    path = tmp_path / "events.jsonl"
    write_jsonl(tmp_path / "bad.jsonl", [{"id": "1"}])
    bad = ["--input", tmp_path / "bad.jsonl", *line[2:], "--output", tmp_path / "o.jsonl", "--events", path]
    assert invoke("generate", *bad).exit_code == 2
    failed = read_events(path)[-1]
    assert (failed["event"], failed["exit_code"]) == ("failed", 2) and "bad.jsonl:1" in failed["text"]
    # Some rows failed: the work is done.
    write_jsonl(tmp_path / "long.jsonl", [{"id": "1", "prompt": "gate " * 3000}, {"id": "2", "prompt": "Hello"}])
    long = ["--input", tmp_path / "long.jsonl", *line[2:], "--output", tmp_path / "l.jsonl", "--events", path]
    assert invoke("generate", *long).exit_code == 3
    rows = read_events(path)
    assert (rows[-1]["event"], rows[-1]["exit_code"]) == ("ended", 3)
    assert any(row["event"] == "warning" and "row 1" in row["text"] for row in rows)


def test_figures_are_numbers_and_names_of_files_never_texts(tmp_path):
    path = tmp_path / "events.jsonl"
    with events.record(str(path), "test", lambda error: (1, str(error)), line="test"):
        events.emit_figures(
            {"loss": math.nan, "output": "a", "text": "of a model", "nested": {"says": "of a model", "n": 1}, "rows": 2}
        )
        events.emit("warning", text='a "quote", \ud800 and a\nnew line')
    [figures] = [row["figures"] for row in read_events(path) if row["event"] == "figures"]
    assert figures == {"loss": None, "output": "a", "nested": {"n": 1}, "rows": 2}
    assert len(path.read_text().splitlines()) == 4


def test_every_long_command_has_the_option_and_the_table_names_every_field(invoke):
    for name in (
        *("generate", "critique", "revise", "judge", "sft", "reward_model", "ppo", "dpo", "grpo"),
        *("evaluate", "compare", "run"),
    ):
        assert "--events FILE" in invoke(name, "--help").output, name
    for part in ("coverage", "ablate", "derive", "prompts", "infer", "validate"):
        assert "--events FILE" in invoke("constitution", part, "--help").output, part
    section = (ROOT / "references" / "data-formats.md").read_text().partition("\n## Events")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", section))
    fields = {name for always, sometimes in FIELDS.values() for name in (*always, *sometimes)}
    assert {"time", "event", "command", *FIELDS, *fields, *COUNTED, *OPTIONAL} <= listed
    assert set(events.EVENTS) == set(FIELDS)


@pytest.mark.slow
def test_a_terminated_command_says_so(tmp_path, line):
    path, output = tmp_path / "events.jsonl", tmp_path / "out.jsonl"
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": str(n), "prompt": f"What about gate {n}?"} for n in range(300)])
    words = [*line[:-1], 200, "--batch-size", 1, "--output", output, "--events", path]
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "generate.py", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not (path.exists() and '"progress"' in path.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1].decode()
    assert process.returncode == 1, errors
    last = read_events(path)[-1]
    assert (last["event"], last["exit_code"]) == ("failed", 1) and "stopped by SIGTERM" in last["text"]
