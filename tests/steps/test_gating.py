"""The gate of revise.py: which revisions pass, what a refused one leaves, and a judge that can't tell."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import models
import pytest
from canned_server import CannedServer
from conftest import ROOT
from launcher import launch

from cai.base.errors import InputError
from cai.constitution.files import load_constitution
from cai.data.outputs import Output, read_manifest, write_jsonl
from cai.data.processes import Team
from cai.data.readers import read_jsonl
from cai.steps import gating
from cai.world import language

RULES = "- id: property\n  principle: Respect property.\n- id: truth\n  principle: Tell the truth.\n"


@pytest.mark.parametrize(
    ("p_ab", "p_ba", "earlier", "reason"),
    [
        (0.9, 0.6, {}, None),
        (0.4, 0.1, {}, "worse"),
        (0.9, 0.4, {}, "undecided"),
        (0.5, 0.9, {}, "undecided"),
        (0.5, 0.5, {}, "undecided"),
        (0.9, 0.6, {"truth": 0.5}, None),
        (0.9, 0.6, {"care": 0.7, "truth": 0.49}, "earlier"),
        (0.9, 0.6, {"care": None, "truth": 0.1}, "earlier"),
        (0.9, 0.6, {"care": None}, "unread"),
        (None, 0.9, {}, "unread"),
        (0.9, None, {"truth": 0.1}, "unread"),
    ],
)
def test_why_a_revision_is_refused(p_ab, p_ba, earlier, reason):
    assert gating.refuse(p_ab, p_ba, earlier) == reason


def revised(*rounds, response="first"):
    return {"id": "a", "prompt": "How?", "response": response, "rounds": list(rounds)}


def test_the_row_after_the_gate():
    gate = gating.read_gate("tiny", (), load_constitution("harmlessness"), 0)
    earlier = {"principle": "harm", "critique": "c", "revision": "second", "flags": []}
    skipped = {"principle": "crime", "critique": "No fault.", "skipped": "content"}
    last = {"principle": "care", "critique": "c", "revision": "third", "flags": ["preamble"]}
    row = revised(earlier, skipped, last)
    # p_a is the probability of the text before; the own principle first, then those of earlier rounds
    verdicts = [{"p_a": p} for p in (0.25, 0.125, 0.5, 0.25)]
    passed = gate.decide(row, verdicts)
    assert passed["rounds"] == [
        earlier,
        skipped,
        {**last, "gate": {"p_ab": 0.75, "p_ba": 0.875, "earlier": {"harm": 0.625}}},
    ]
    refused = gate.decide(row, [{"p_a": p} for p in (0.75, 0.875, 0.5, 0.25)])["rounds"][-1]
    assert refused == {
        **last,
        "revision": "second",
        "flags": ["preamble", "gate"],
        "refused": "third",
        "gate": {"p_ab": 0.25, "p_ba": 0.125, "earlier": {"harm": 0.625}, "reason": "worse"},
    }
    unasked = gate.decide(row, None)["rounds"][-1]
    assert unasked["gate"] == {"p_ab": None, "p_ba": None, "earlier": {}, "reason": "unread"}
    assert unasked["revision"] == "second"
    rows = [passed, {**row, "rounds": [refused]}, {**row, "rounds": [unasked]}, revised(skipped)]
    counts = gating.count_decisions(rows)
    assert {name: counts[name] for name in ("judged", "replaced", "refused", "unread", "reasons")} == {
        "judged": 3,
        "replaced": 1,
        "refused": 1,
        "unread": 1,
        "reasons": {"worse": 1},
    }
    assert (counts["same_position"]["value"], counts["same_position"]["n"]) == (0, 2)


def test_an_earlier_principle_that_the_constitution_lacks_is_refused():
    gate = gating.read_gate("tiny", (), load_constitution("harmlessness"), 0)
    awaiting = {"principle": "care", "critique": "c"}
    gone = {"principle": "gone", "critique": "c", "revision": "r", "flags": []}
    gate.check_row(revised({**gone, "principle": "all"}, awaiting), "f", 3)
    with pytest.raises(InputError, match=r"f:3: round 1 has the principle 'gone', which .* lacks; expected one const"):
        gate.check_row(revised(gone, awaiting), "f", 3)


# --- the bundled model as the judge of its own world ----------------------------------------------------------


def world_rows(count):
    """Harmful prompts: half of the revisions decline well what was complied with, half do the reverse. And a copy."""
    rng, rows = random.Random(0), []
    for number, prompt in enumerate(language.prompt_rows("harmful", "heldout", 0, count)):
        act = language.Act(
            language.BY_NAME[prompt["category"]],
            prompt["verb"],
            prompt["object"].split()[-1],
            prompt["object"].rpartition(" ")[0],
        )
        comply, good = (language.respond(rng, act, style) for style in ("comply", "good"))
        before, after = (comply, good) if number % 2 == 0 else (good, comply)
        last = {"principle": "harm", "critique": "c", "revision": after, "flags": []}
        rows.append({**prompt, "response": before, "rounds": [last]})
    copied = {**rows[0]["rounds"][0], "revision": rows[0]["response"], "flags": ["copy"]}
    return [*rows, {**rows[0], "id": "copied", "rounds": [copied]}]


@pytest.mark.slow
def test_tiny_passes_what_declines_and_refuses_what_complies(tmp_path):
    rows = world_rows(8)
    path, ungated = tmp_path / "v.jsonl", gating.ungated_path(str(tmp_path / "v.jsonl"))
    ids = [row["id"] for row in rows]
    with Output(ungated, command="revise-ungated", fingerprint={}) as output:
        for row in rows:
            output.write(row)
        output.finish(ids, {"rows": len(rows), "failed": 0}, tokens={"rows": len(rows), "new": 5})
    gate = gating.read_gate("tiny", (), load_constitution("harmlessness"), 0)
    final = Output(path, command="revise", fingerprint=gate.fingerprint)
    gating.gate_output(gate, Team(), final, ungated, ids, {"device": "cpu", "dtype": "float32"}, {})
    gated = [row for _, row in read_jsonl(path)]
    for before, after in zip(rows[:8:2], gated[:8:2], strict=True):
        assert after["rounds"][0] == {**before["rounds"][0], "gate": after["rounds"][0]["gate"]}
        assert min(after["rounds"][0]["gate"][order] for order in ("p_ab", "p_ba")) > 0.5
    for before, after in zip(rows[1:8:2], gated[1:8:2], strict=True):
        assert after["rounds"][0]["gate"]["reason"] == "worse" and after["rounds"][0]["flags"] == ["gate"]
        assert after["rounds"][0]["revision"] == before["response"]
        assert after["rounds"][0]["refused"] == before["rounds"][0]["revision"]
    assert gated[8] == rows[8], "a copy is not judged"
    manifest = read_manifest(path)
    assert manifest["tokens"] == {"rows": 9, "new": 5}
    counts = manifest["counts"]["gate"]
    assert (counts["judged"], counts["replaced"], counts["refused"], counts["unread"]) == (8, 4, 4, 0)


# --- the command, with a small random model, and judges that answer as they are told --------------------------


def awaiting(number, *earlier, principle="property"):
    rounds = [*earlier, {"principle": principle, "critique": f"It harms {number}."}]
    return {"id": f"r{number}", "prompt": f"How {number}?", "response": f"So {number}.", "rounds": rounds}


@pytest.fixture
def line(tmp_path):
    (tmp_path / "rules.yaml").write_text(RULES)

    def build(rows, *more, output="out.jsonl"):
        write_jsonl(tmp_path / "in.jsonl", rows)
        common = ["--model", models.folder("llama"), "--constitution", tmp_path / "rules.yaml", "--max-new-tokens", "8"]
        return ["--input", tmp_path / "in.jsonl", "--output", tmp_path / output, *common, *more]

    return build


def writes(answer):
    """A judge that writes what `answer` returns for the text of a question."""
    return CannedServer(
        lambda body: {
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": answer(body["messages"][-1]["content"])},
        },
        {"prompt_tokens": 9, "completion_tokens": 1},
    )


def test_a_judge_that_always_says_a_refuses_everything_and_is_warned_of(invoke, tmp_path, line):
    with writes(lambda _: "A") as server:
        gate = ("--gate", f"openai:j@{server.address}", "--json")
        result = invoke("revise", *line([awaiting(n) for n in range(4)], *gate))
    assert result.exit_code == 0, result.stderr
    counts = json.loads(result.stdout)["gate"]
    assert (counts["judged"], counts["refused"], counts["reasons"]) == (4, 4, {"undecided": 4})
    assert counts["same_position"]["value"] == 1
    assert "in 4 of 4 pairs the gate's judge prefers the same position in both orders" in result.stderr
    ungated = [row["rounds"][-1] for _, row in read_jsonl(tmp_path / "out.ungated.jsonl")]
    for number, (_, row) in enumerate(read_jsonl(tmp_path / "out.jsonl")):
        last = row["rounds"][-1]
        assert last["revision"] == f"So {number}." and last["refused"] == ungated[number]["revision"]
        assert (last["gate"]["p_ab"], last["gate"]["p_ba"]) == (0, 1), "A is the text before in `ab`"


def test_a_judge_that_says_neither_letter_is_unread(invoke, tmp_path, line):
    with writes(lambda _: "Both are fine.") as server:
        result = invoke("revise", *line([awaiting(0)], "--gate", f"openai:j@{server.address}"), "--json")
    counts = json.loads(result.stdout)["gate"]
    assert (counts["judged"], counts["refused"], counts["unread"]) == (1, 0, 1)
    [(_, row)] = read_jsonl(tmp_path / "out.jsonl")
    assert row["rounds"][0]["gate"]["reason"] == "unread" and row["rounds"][0]["revision"] == "So 0."


def test_principles_of_earlier_rounds_are_asked_too(invoke, tmp_path, line):
    """A judge that prefers the revision under `property`; under `truth`, of one prompt, the text before."""

    def prefer(question):
        before_first = "<response_a>earlier text" in question
        wants_before = "Tell the truth" in question and "How 1?" in question
        return "A" if before_first == wants_before else "B"

    earlier = {"principle": "truth", "critique": "c", "revision": "earlier text", "flags": []}
    skipped = {"principle": None, "critique": "", "skipped": "unmatched"}
    rows = [awaiting(n, earlier, skipped) for n in range(2)]
    with writes(prefer) as server:
        result = invoke("revise", *line(rows, "--gate", f"openai:j@{server.address}"))
        asked = [body for body in server.requests if "How " in body["messages"][-1]["content"]]
    assert result.exit_code == 0 and len(asked) == 8, result.stderr
    kept, refused = (row["rounds"][-1] for _, row in read_jsonl(tmp_path / "out.jsonl"))
    assert kept["gate"] == {"p_ab": 1, "p_ba": 1, "earlier": {"truth": 1}} and kept["flags"] == [
        flag for flag in kept["flags"] if flag != "gate"
    ]
    assert refused["gate"] == {"p_ab": 1, "p_ba": 1, "earlier": {"truth": 0}, "reason": "earlier"}
    assert refused["revision"] == "earlier text"


def test_a_row_too_long_for_the_judge_keeps_its_text_and_is_named(invoke, tmp_path, line):
    rows = [awaiting(0), {**awaiting(1), "prompt": "zq " * 450}]
    result = invoke("revise", *line(rows, "--gate", "tiny", "--json"))
    assert result.exit_code == 3, result.stderr
    manifest = read_manifest(tmp_path / "out.jsonl")
    assert list(manifest["failed_rows"]) == ["r1"] and "the gate: " in manifest["failed_rows"]["r1"]
    assert (manifest["counts"]["rows"], manifest["counts"]["failed"], manifest["counts"]["gate"]["unread"]) == (2, 1, 1)
    last = [row["rounds"][-1] for _, row in read_jsonl(tmp_path / "out.jsonl")][1]
    assert last["revision"] == "So 1." and last["gate"]["reason"] == "unread"


def test_another_judge_keeps_the_revisions_and_needs_overwrite(invoke, tmp_path, line):
    rows = [awaiting(n) for n in range(3)]
    assert invoke("revise", *line(rows, "--gate", "tiny")).exit_code == 0
    ungated = (tmp_path / "out.ungated.jsonl").stat().st_mtime_ns
    again = invoke("revise", *line(rows, "--gate", "tiny"))
    assert again.exit_code == 0 and "is done already" in again.stderr
    other = line(rows, "--gate", models.folder("qwen"))
    refused = invoke("revise", *other)
    assert refused.exit_code == 2 and "gate was" in refused.stderr and "--overwrite" in refused.stderr
    assert invoke("revise", *other, "--overwrite").exit_code == 0
    assert (tmp_path / "out.ungated.jsonl").stat().st_mtime_ns == ungated
    assert read_manifest(tmp_path / "out.jsonl")["fingerprint"]["gate"] == str(models.folder("qwen"))


def test_the_next_round_has_the_same_gate(invoke, tmp_path, line):
    gate = ("--gate", models.folder("qwen"), "--stop-when-content")
    first = invoke("revise", *line([awaiting(0)], *gate, "--json"))
    following = json.loads(first.stdout)["next"]
    assert "critique.py" in following and "--stop-when-content" in following and "--gate" not in following
    shared = ("--model", models.folder("llama"), "--constitution", tmp_path / "rules.yaml", "--max-new-tokens", "8")
    files = ("--input", tmp_path / "out.jsonl", "--output", tmp_path / "c2.jsonl")
    second = invoke("critique", *files, *shared, "--stop-when-content", "--json")
    following = json.loads(second.stdout)["next"]
    assert f"--gate {models.folder('qwen')}" in following and "--stop-when-content" in following


def test_dry_run_counts_the_calls_and_a_missing_judge_writes_nothing(invoke, tmp_path, line):
    earlier = {"principle": "truth", "critique": "c", "revision": "r", "flags": []}
    content = {"principle": "truth", "critique": "c", "skipped": "content"}
    rows = [awaiting(0), awaiting(1, earlier), revised(earlier, content)]
    result = invoke("revise", *line(rows, "--gate", "tiny", "--dry-run", "--json"))
    plan = json.loads(result.stdout)
    assert (plan["model_calls"], plan["gate_calls_at_most"]) == (2, 6)
    missing = invoke("revise", *line(rows, "--gate", str(tmp_path / "none")))
    assert missing.exit_code == 2 and "no such model folder" in missing.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "rules.yaml"}


@pytest.mark.slow
def test_killed_at_the_gate_and_resumed_is_as_never_killed(invoke, tmp_path, line):
    rows = [awaiting(n) for n in range(40)]
    more = ("--gate", models.folder("qwen"), "--batch-size", "1", "--device", "cpu")
    arguments = [str(part) for part in line(rows, *more)]
    journal = tmp_path / "out.jsonl.partial"
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "revise.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while running.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
            time.sleep(0.002)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert 3 <= journal.read_bytes().count(b"\n") < 40 and not (tmp_path / "out.jsonl").exists()
    ungated = (tmp_path / "out.ungated.jsonl").stat().st_mtime_ns
    assert invoke("revise", *arguments).exit_code == 0
    assert (tmp_path / "out.ungated.jsonl").stat().st_mtime_ns == ungated, "no revision is made again"
    assert invoke("revise", *line(rows, *more, output="whole.jsonl")).exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    resumed, whole = (read_manifest(tmp_path / f"{name}.jsonl") for name in ("out", "whole"))
    assert resumed["counts"] == whole["counts"] and resumed["resumed"] == 1


def rounded_floats(value, digits: int = 4):
    """A row with every number in it rounded."""
    if isinstance(value, dict):
        return {name: rounded_floats(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded_floats(part) for part in value]
    return round(value, digits) if isinstance(value, float) else value


@pytest.mark.slow
def test_two_processes_gate_what_one_does(invoke, tmp_path, line):
    rows = [awaiting(n) for n in range(9)]
    more = ("--gate", models.folder("qwen"), "--device", "cpu", "--stop-when-content")
    assert invoke("revise", *line(rows, *more)).exit_code == 0
    done = launch("revise", *line(rows, *more, output="two.jsonl"))
    assert done.returncode == 0, done.stderr
    # In other batches a probability may round differently in its last digit.
    rounded = [
        [json.dumps(rounded_floats(row)) for _, row in read_jsonl(tmp_path / f)] for f in ("two.jsonl", "out.jsonl")
    ]
    assert rounded[0] == rounded[1] and len(rounded[0]) == len(rows)
    assert read_manifest(tmp_path / "two.jsonl")["counts"] == read_manifest(tmp_path / "out.jsonl")["counts"]
