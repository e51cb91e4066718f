"""run.py: the plan, the script it prints, stopping and going on, and the whole loop on small models."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import models
import pytest
import torch
from conftest import ROOT, load_command
from event_files import read_events
from safetensors.torch import load_file

from cai.base.paths import TINY
from cai.data.kinds import KINDS
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.evaluate.rates import RATES
from cai.world import language

PRESETS = ["tiny", "default"]


@pytest.fixture
def prompts(tmp_path):
    """--input, --heldout: six prompts to train on, six to measure on, of all kinds."""
    for split in ("train", "heldout"):
        rows = [row for kind in KINDS for row in language.prompt_rows(kind, split, 3, 2)]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    return ["--input", tmp_path / "train.jsonl", "--heldout", tmp_path / "heldout.jsonl"]


def planned(invoke, *args):
    result = invoke("run", *args, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["steps"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--limit", 4, "--device", "cpu", "--overwrite", "--rounds", 3, "--helpful", "helpful.jsonl"],
        ["--frames", "frames", "--frame-share", 0.3, "--rl", "grpo"],
    ],
    ids=["plain", "full", "frames"],
)
def test_every_step_of_the_plan_is_a_command_that_takes_its_arguments(
    invoke, tmp_path, prompts, preset, more, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_jsonl("helpful.jsonl", [{"prompt": "p", "response": "r"}])
    steps = planned(invoke, "--model", "some/model", "--output", "out", *prompts, "--preset", preset, *more)
    for step in steps:
        python, script, *arguments = shlex.split(step["command"])
        assert Path(python).samefile(sys.executable)
        name = Path(script).stem
        # Parsed by the command itself: an option it does not know, or a wrong value, is an error.
        load_command(name).make_context(name, arguments)


@pytest.mark.parametrize("rl", ["ppo", "grpo", "dpo"])
def test_frames_go_to_the_steps_that_generate_measure_and_sample(invoke, tmp_path, prompts, rl):
    line = ("--model", "tiny", "--output", tmp_path / "out", *prompts, "--rl", rl)
    steps = {step["name"]: shlex.split(step["command"]) for step in planned(invoke, *line, "--frames", "frames")}
    framed = {name for name, words in steps.items() if "--frames" in words}
    of_rl = set() if rl == "dpo" else {rl}
    assert framed == {"responses", "samples", "evaluate-base", "evaluate-sft", f"evaluate-{rl}", *of_rl}
    seeds = {words[words.index("--seed") + 1] for name, words in steps.items() if name in framed}
    assert seeds == {"0"}, "one seed, or a prompt would have another frame in another step"
    assert "--frame-prompts" in steps["evaluate-base"] and "--frame-share" in steps["responses"]
    assert not [step for step in planned(invoke, *line) if "--frame" in step["command"]]
    smoke = {step["name"]: step["command"] for step in planned(invoke, *line, "--frames", "frames", "--smoke")}
    assert "--frames" in smoke["responses"] and "--frames" not in smoke["evaluate-base"]


@pytest.mark.parametrize(
    ("rl", "words"),
    [
        ("ppo", "--input {out}/05-preferences.jsonl --mix more.jsonl=1 --default-label 1.0 --model"),
        ("dpo", "--input {out}/05-preferences.jsonl --mix more.jsonl=1 --default-label 1.0 --model"),
    ],
)
def test_more_pairs_go_to_the_reward_model_or_dpo(invoke, tmp_path, prompts, monkeypatch, rl, words):
    monkeypatch.chdir(tmp_path)
    write_jsonl("more.jsonl", [{"prompt": f"p {n}", "chosen": "Yes.", "rejected": "No."} for n in range(50)])
    line = ("--model", "tiny", "--output", "out", *prompts, "--rounds", 1, "--rl", rl)
    plans = [{s["name"]: s for s in planned(invoke, *line, *mix)} for mix in ((), ("--mix", "more.jsonl"))]
    name = "dpo" if rl == "dpo" else "reward-model"
    assert words.format(out="out") in plans[1][name]["command"]
    [smoke] = [s for s in planned(invoke, *line, "--mix", "more.jsonl", "--smoke") if s["name"] == name]
    assert "--default-label 1.0 --limit" in smoke["command"], "or a smoke run trains on all of them"
    assert not [step for step in plans[0].values() if "default-label" in step["command"]]
    [smoke] = [
        s
        for s in planned(invoke, *line, "--preset", "smollm2", "--rl", "ppo", "--smoke")
        if s["name"] == "reward-model"
    ]
    assert "--limit 8 " in smoke["command"] and "--limit 800" not in smoke["command"]
    [weighed] = [s for s in planned(invoke, *line, "--mix", "more.jsonl=0.25") if s["name"] == name]
    assert "--mix more.jsonl=0.25 " in weighed["command"]


def test_a_preset_for_a_deeper_model_is_refused_before_the_first_step(invoke, tmp_path, prompts):
    line = ("run", "--model", "tiny", "--preset", "smollm2", "--output", tmp_path / "out", *prompts)
    refused = invoke(*line, "--rl", "dpo")
    assert refused.exit_code == 2 and "trains from block 16 on, and tiny has" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_more_pairs_are_refused_where_nothing_learns_from_them_and_where_they_are_none(invoke, tmp_path, prompts):
    path = tmp_path / "more.jsonl"
    write_jsonl(path, [{"prompt": "p", "chosen": "Yes."}])
    line = ("run", "--model", "tiny", "--output", tmp_path / "out", *prompts, "--mix", path)
    refused = invoke(*line)
    assert refused.exit_code == 2 and "more.jsonl:1" in refused.stderr and "rejected" in refused.stderr
    assert "--mix" in invoke(*line, "--rl", "none").stderr
    assert "a weight above 0" in invoke(*line[:-1], f"{path}=0").stderr
    assert "the same input twice" in invoke(*line, "--mix", f"{path}=0.5").stderr
    assert not (tmp_path / "out").exists()


def test_a_bad_frames_file_is_refused_before_the_first_step(invoke, tmp_path, prompts):
    bad = tmp_path / "frames.yaml"
    bad.write_text("frames:\n  - {id: x, kind: push, split: seen, prefil: x}\n")
    result = invoke("run", "--model", "tiny", "--output", tmp_path / "out", *prompts, "--frames", bad)
    assert result.exit_code == 2
    assert "frames.yaml:2: unknown key 'prefil' in a frame" in result.stderr and "'prefill'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_sequence_and_what_passes_between_the_steps(invoke, tmp_path, prompts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = planned(invoke, "--model", "some/model", "--output", "out", *prompts, "--rounds", 2)
    assert [(step["name"], step["output"]) for step in steps] == [
        ("evaluate-base", "out/evaluation-base.jsonl"),
        ("responses", "out/01-responses.jsonl"),
        ("critique-1", "out/02-critique-1.jsonl"),
        ("revision-1", "out/03-revision-1.jsonl"),
        ("critique-2", "out/04-critique-2.jsonl"),
        ("revision-2", "out/05-revision-2.jsonl"),
        ("sft", "out/sft"),
        ("evaluate-sft", "out/evaluation-sft.jsonl"),
        ("samples", "out/06-samples.jsonl"),
        ("preferences", "out/07-preferences.jsonl"),
        ("reward-model", "out/reward-model"),
        ("ppo", "out/ppo"),
        ("evaluate-ppo", "out/evaluation-ppo.jsonl"),
        ("report", "out/report.html"),
    ]
    train, heldout = str(prompts[1]), str(prompts[3])
    given = {step["name"]: values(step["command"]) for step in steps[:-1]}
    read = {name: (given[name]["--input"], given[name]["--model"]) for name in given}
    base = ["some/model"]
    assert read == {
        "evaluate-base": ([heldout], base),
        "responses": ([train], base),
        "critique-1": (["out/01-responses.jsonl"], base),
        "revision-1": (["out/02-critique-1.jsonl"], base),
        "critique-2": (["out/03-revision-1.jsonl"], base),
        "revision-2": (["out/04-critique-2.jsonl"], base),
        "sft": (["out/05-revision-2.jsonl"], base),
        "evaluate-sft": ([heldout], ["out/sft"]),
        "samples": ([train], ["out/sft"]),
        "preferences": (["out/06-samples.jsonl", "out/01-responses.jsonl"], base),
        "reward-model": (["out/07-preferences.jsonl"], ["out/sft"]),
        "ppo": ([train], ["out/sft"]),
        "evaluate-ppo": ([heldout], ["out/ppo"]),
    }
    assert given["ppo"]["--reward-model"] == ["out/reward-model"]
    assert given["evaluate-ppo"]["--judge"] == base


def test_the_mode_of_principles_is_that_of_every_round_and_of_the_judge(invoke, tmp_path, prompts):
    line = ("--model", "some/model", "--output", tmp_path / "out", *prompts, "--principles", "match")
    steps = {step["name"]: values(step["command"]) for step in planned(invoke, *line)[:-1]}
    for name in ("critique-1", "critique-2", "preferences"):
        assert steps[name]["--principles"] == ["match"]
        assert steps[name]["--matches"] == [str(tmp_path / "out" / "matches.jsonl")]
    steps = {step["name"]: values(step["command"]) for step in planned(invoke, *line[:-1], "all")[:-1]}
    assert steps["preferences"]["--principles"] == ["all"] and "--matches" not in steps["critique-1"]


def test_the_gate_and_stopping_when_content_are_those_of_every_round(invoke, tmp_path, prompts):
    line = ("--model", "some/model", "--output", tmp_path / "out", *prompts)
    more = ("--gate", "openai:judge@http://localhost:1/v1", "--stop-when-content")
    steps = {step["name"]: values(step["command"]) for step in planned(invoke, *line, *more)[:-1]}
    for number in (1, 2):
        assert steps[f"revision-{number}"]["--gate"] == ["openai:judge@http://localhost:1/v1"]
        for name in ("critique", "revision"):
            assert "--stop-when-content" in steps[f"{name}-{number}"]
        assert "--gate" not in steps[f"critique-{number}"]
    steps = {step["name"]: values(step["command"]) for step in planned(invoke, *line)[:-1]}
    assert not {"--gate", "--stop-when-content"} & {option for given in steps.values() for option in given}


def values(line):
    """{option: its values} of a command line."""
    found, name = {}, None
    for word in shlex.split(line)[2:]:
        if word.startswith("--"):
            name = word
            found.setdefault(name, [])
        else:
            found[name].append(word)
    return found


def test_a_limit_cuts_the_prompts_and_not_the_heldout_ones(invoke, tmp_path, prompts):
    """Six of each: --limit is for those to train on, --heldout-limit for those to measure on; the price follows."""
    line = ("--model", "tiny", "--output", tmp_path / "out", *prompts, "--rl", "none", "--gpu", "h100")
    for limits, calls in (
        ((), (6, 6)),
        (("--limit", 2), (2, 6)),
        (("--heldout-limit", 3), (6, 3)),
        (("--limit", 2, "--heldout-limit", 3), (2, 3)),
        (("--smoke", "--limit", 2), (2, 6)),
        (("--smoke", "--heldout-limit", 3), (6, 3)),
    ):
        steps = {step["name"]: step for step in planned(invoke, *line, *limits)}
        assert (steps["responses"]["calls"], steps["evaluate-base"]["calls"]) == calls, limits
    bundled = {step["name"]: step for step in planned(invoke, *line[:4], "--smoke", "--gpu", "h100")}
    limited = [values(bundled[name]["command"])["--limit"] for name in ("responses", "evaluate-base", "evaluate-ppo")]
    assert limited == [["8"], ["8"], ["8"]]


def test_some_update_of_ppo_trains_the_policy(invoke, tmp_path):
    """The value model's warm-up is cut where a run has few updates."""
    line = ("--model", "tiny", "--output", tmp_path / "out")
    for more, updates, warmup in (((), "36", ["2"]), (("--updates", 2), "2", ["1"]), (("--limit", 30), "1", None)):
        steps = {step["name"]: values(step["command"]) for step in planned(invoke, *line, *more)[:-1]}
        assert (steps["ppo"]["--updates"], steps["ppo"].get("--value-warmup")) == ([updates], warmup)


def test_the_oracle_is_asked_in_evaluations_only(invoke, tmp_path, prompts):
    steps = planned(invoke, "--model", "some/model", "--output", tmp_path / "out", *prompts, "--preset", "tiny")
    assert {step["name"] for step in steps if "--by oracle" in step["command"]} == {
        "evaluate-base",
        "evaluate-sft",
        "evaluate-ppo",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "no/such/folder", "--input", "train.jsonl", "--heldout", "heldout.jsonl"], "no such model folder"),
        (["--model", "some/model"], "no --input; expected a file of prompts"),
        (["--model", "some/model", "--input", "train.jsonl"], "no --heldout"),
        (["--model", "x", "--input", "no.jsonl", "--heldout", "heldout.jsonl"], "no.jsonl: no such file"),
        (["--model", "x", "--input", "train.jsonl", "--heldout", "plain.jsonl"], "plain.jsonl:1: a row without 'kind'"),
        (
            ["--model", "x", "--input", "train.jsonl", "--heldout", "heldout.jsonl", "--constitution", "no"],
            "expected a .yaml file, or one of: child-safe-tutoring",
        ),
        (["--model", "tiny", "--gate", "no/such/folder"], "no such model folder"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(invoke, tmp_path, prompts, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    write_jsonl("plain.jsonl", [{"prompt": "p"}])
    before = sorted(tmp_path.iterdir())
    for more in ([], ["--dry-run"]):
        result = invoke("run", *arguments, "--output", "out", *more)
        assert result.exit_code == 2 and expected in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def run(invoke, prompts, output, *more):
    """The loop without RL on a random model, one round."""
    return invoke(
        "run",
        "--model",
        models.folder("llama"),
        "--preset",
        "tiny",
        "--output",
        output,
        *prompts,
        "--rounds",
        1,
        "--rl",
        "none",
        *more,
    )


@pytest.mark.slow
def test_a_failing_step_stops_the_run_and_the_same_command_goes_on(invoke, tmp_path, prompts):
    output = tmp_path / "an output"
    (output / "sft").mkdir(parents=True)
    (output / "sft" / "somebody's").write_text("file")
    result = run(invoke, prompts, output)
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert "step 5 of 7 (sft) ended with exit code 2" in last and "the same command continues" in last
    assert result.stdout == ""
    kept = {path: path.stat().st_mtime_ns for path in output.glob("0*.jsonl")}
    assert [path.name for path in sorted(kept)] == ["01-responses.jsonl", "02-critique-1.jsonl", "03-revision-1.jsonl"]

    (output / "sft" / "somebody's").unlink()
    (output / "sft").rmdir()
    result = run(invoke, prompts, output, "--json")
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    said = json.loads(result.stdout)
    assert list(said) == ["stages", "judge", "report", "seconds", "output"]
    assert Path(said["report"]).read_text().startswith("<!doctype html>")
    assert list(said["stages"]) == ["base", "sft"] and said["judge"] is None
    assert all(list(stage) == list(RATES) for stage in said["stages"].values())
    assert {stage["harmful_compliance"]["n"] for stage in said["stages"].values()} == {2}

    # The script of --dry-run, pasted: it finds each step done, which it is only for the very same settings.
    script = invoke(
        "run",
        "--model",
        models.folder("llama"),
        "--preset",
        "tiny",
        "--output",
        output,
        *prompts,
        "--rounds",
        1,
        "--rl",
        "none",
        "--dry-run",
    ).stdout
    done = subprocess.run(["sh"], input=script, text=True, capture_output=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    # Each manifest says how to make its file again, as if the step had been typed.
    line = read_manifest(output / "02-critique-1.jsonl")["command_line"]
    assert shlex.split(line)[1].endswith("scripts/critique.py") and line in script


def test_the_printed_script_stops_at_an_error_but_not_at_failed_records(invoke, tmp_path, prompts):
    script = invoke(
        "run",
        "--model",
        models.folder("llama"),
        "--preset",
        "tiny",
        "--output",
        tmp_path / "out",
        *prompts,
        "--rl",
        "none",
        "--dry-run",
    ).stdout
    lines = [line for line in script.splitlines() if "scripts/" in line]
    for code, expected in ((0, 0), (1, 1), (2, 1), (3, 0)):
        replaced = script
        for line in lines:
            replaced = replaced.replace(line.partition(" || ")[0], f"sh -c 'echo ran; exit {code}'")
        done = subprocess.run(["sh"], input=replaced, text=True, capture_output=True)
        assert (done.returncode, done.stdout.count("ran")) == (expected, len(lines) if expected == 0 else 1)


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_rows(invoke, tmp_path, prompts, monkeypatch):
    """And one of its prompts is too long for the model, which is noted, and the run goes on to end with 3."""
    train = [row for _, row in read_jsonl(prompts[1])]
    train[1]["prompt"] = "gate " * 2100
    write_jsonl(prompts[1], train)
    more = [*prompts, "--rounds", 1, "--rl", "none", "--batch-size", 1, "--limit", 3, "--preset", "tiny"]
    arguments = ["--model", models.folder("llama"), "--output", "out", *more]
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "run.py", *map(str, arguments)],
        cwd=tmp_path / "killed",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    journal = tmp_path / "killed" / "out" / "02-critique-1.jsonl.partial"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    process.kill()
    errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors
    rows = {}
    for name in ("killed", "whole"):
        monkeypatch.chdir(tmp_path / name)
        result = invoke("run", *arguments)
        assert result.exit_code == 3, result.output
        rows[name] = {path.name: path.read_text() for path in Path("out").glob("*.jsonl")}
    assert len(rows["whole"]) == 9 and rows["killed"] == rows["whole"]
    assert len(list(read_jsonl("out/03-revision-1.jsonl"))) == 2
    assert "step 2 of 7 (responses): some records failed" in result.stderr
    assert "after SFT" in result.stdout and "harmful prompts (n = 2)" in result.stdout
    assert "$ " not in result.stdout and "$ " in result.stderr


@pytest.mark.slow
def test_the_whole_loop_on_tiny_shrunk(invoke, tmp_path):
    for split, count in (("train", 60), ("heldout", 30)):
        rows = sorted((row for _, row in read_jsonl(TINY / "prompts" / f"{split}.jsonl")), key=lambda row: row["id"])
        write_jsonl(tmp_path / f"{split}.jsonl", rows[:: len(rows) // count])  # of every kind
    arguments = [
        "--model",
        "tiny",
        "--input",
        tmp_path / "train.jsonl",
        "--heldout",
        tmp_path / "heldout.jsonl",
        "--limit",
        60,
        "--rounds",
        1,
        "--output",
        tmp_path / "out",
        "--json",
    ]
    result = invoke("run", *arguments)
    assert result.exit_code == 0, result.output
    [line] = result.stdout.splitlines()
    said = json.loads(line)
    assert list(said["stages"]) == ["base", "sft", "ppo"]
    assert all(stage[name]["n"] >= 6 for stage in said["stages"].values() for name in RATES)
    # The bundled model complies with everything: what a helpful-only model is.
    assert said["stages"]["base"]["harmful_compliance"]["value"] > 0.8
    assert said["stages"]["base"]["over_refusal"]["value"] == 0
    # A policy is trained at each stage, and it is the trained ones that are measured.
    weights = [load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "out/sft", tmp_path / "out/ppo")]
    for before, after in pairwise(weights):
        assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)
    measured = {
        read_manifest(tmp_path / f"out/evaluation-{stage}.responses.jsonl")["fingerprint"]["model"]
        for stage in ("base", "sft", "ppo")
    }
    assert len(measured) == 3
    answers = {
        stage: [row["response"] for _, row in read_jsonl(tmp_path / f"out/evaluation-{stage}.responses.jsonl")]
        for stage in ("base", "sft", "ppo")
    }
    assert answers["base"] != answers["sft"] != answers["ppo"]
    # Four responses a prompt and the base model's: of ten pairs five are judged, less the identical ones.
    assert 60 < said["judge"]["pairs"] + said["judge"]["identical"] <= 5 * 60
    assert said["output"] == str(tmp_path / "out") and said["seconds"] > 0
    made = times(tmp_path / "out")
    assert json.loads(invoke("run", *arguments).stdout)["stages"] == said["stages"]
    assert times(tmp_path / "out") == made


def times(folder):
    """When each file was written, but for the report, which is drawn anew."""
    files = [*folder.glob("*.jsonl"), *folder.glob("*/*.safetensors"), *folder.glob("*.run.json")]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    ("rl", "steps"),
    [
        ("dpo", ["samples", "preferences", "dpo", "evaluate-dpo", "report"]),
        ("grpo", ["samples", "preferences", "reward-model", "grpo", "evaluate-grpo", "report"]),
    ],
)
def test_other_ways_of_rl(invoke, tmp_path, prompts, rl, steps):
    planned_steps = planned(invoke, "--model", "some/model", "--output", tmp_path / "out", *prompts, "--rl", rl)
    assert [step["name"] for step in planned_steps][-len(steps) :] == steps
    for step in planned_steps:
        _, script, *arguments = shlex.split(step["command"])
        load_command(Path(script).stem).make_context(step["name"], arguments)


@pytest.mark.slow
def test_several_seeds_give_mean_and_range(invoke, tmp_path, prompts):
    result = run(invoke, prompts, tmp_path / "out", "--seeds", 2, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [Path(one["output"]).name for one in said["runs"]] == ["seed-0", "seed-1"]
    for stage, rates in said["stages"].items():
        for name, found in rates.items():
            each = [one["stages"][stage][name]["value"] for one in said["runs"]]
            assert (found["lowest"], found["highest"]) == (min(each), max(each)) and found["seeds"] == 2
            assert found["mean"] == pytest.approx(sum(each) / 2)
    shown = run(invoke, prompts, tmp_path / "out", "--seeds", 2).stdout
    assert "mean and range" in shown
    reports = re.findall(r"^report  (.+)$", shown, re.MULTILINE)
    assert len(set(reports)) == 2 and all(Path(report).is_file() for report in reports)


@pytest.mark.slow
def test_a_smoke_run_looks_for_signs_of_life(invoke, tmp_path):
    """The bundled model shows all of them; one drawn at random does not."""
    path = tmp_path / "events.jsonl"
    line = ("--model", "tiny", "--output", tmp_path / "out", "--rounds", 1, "--smoke", "--json", "--events", path)
    result = invoke("run", *line)
    said = json.loads(result.stdout)
    dead = [sign for sign in said["signs"] if not sign["alive"]]
    assert result.exit_code == 0 and said["alive"], dead
    assert {sign["step"] for sign in said["signs"]} >= {
        "generate",
        "critique",
        "revise",
        "sft",
        "judge",
        "reward_model",
        "ppo",
    }
    assert (tmp_path / "out/smoke/ppo").is_dir() and not (tmp_path / "out/ppo").exists()
    assert said["bounded"]["prompts"] == 8 and said["bounded"]["new_tokens"] == 32
    assert said["bounded"]["ppo --updates"] == 1 and said["bounded"]["qualification"].startswith("not measured")
    check_events_of_a_run(read_events(path), said)


def check_events_of_a_run(rows, said):
    """The steps of a smoke run, each with start, figures and end, in the run's own."""
    own = [row for row in rows if "step" not in row]
    assert [row["event"] for row in own if row["event"] != "progress"] == ["started", "figures", "ended"]
    assert own[0]["command"] == "run" and own[0] == rows[0] and own[-1] == rows[-1]
    assert own[-2]["figures"]["alive"] and own[-2]["figures"]["bounded"]["heldout_prompts"] == 8
    assert set(own[-2]["figures"]["signs"].values()) == {True} and not any("hello" in str(row).lower() for row in own)
    steps = list(dict.fromkeys(row["step"] for row in rows if "step" in row))
    assert steps[:3] == ["evaluate-base", "responses", "critique-1"] and steps[-1] == "report"
    for number, name in enumerate(steps, 1):
        of_step = [row for row in rows if row.get("step") == name]
        assert {(row["number"], row["steps"]) for row in of_step} == {(number, len(steps))}
        assert (of_step[0]["event"], of_step[-1]["event"], of_step[-1]["exit_code"]) == ("started", "ended", 0)
        assert len({row["command"] for row in of_step}) == 1
        if name != "report":
            assert "figures" in [row["event"] for row in of_step]
            assert any("done" in row for row in of_step)
    trained = [row for row in rows if row.get("step") == "ppo" and "done" in row]
    assert {row["unit"] for row in trained} >= {"step"}
    evaluated = next(row for row in rows if row.get("step") == "evaluate-ppo" and row["event"] == "figures")
    assert evaluated["figures"]["metrics"]["harmful_compliance"].keys() >= {"value", "low", "high", "n"}
    assert said["alive"]


@pytest.mark.slow
def test_a_smoke_run_without_life_exits_1(invoke, tmp_path, prompts):
    result = run(invoke, prompts, tmp_path / "out", "--smoke")
    assert result.exit_code == 1 and " NO " in result.stdout


def test_the_bundled_model_has_a_round_and_frames_of_its_own(invoke, tmp_path, prompts):
    """On the bundled prompts one round and the bundled frames; on others, as for another model, no frames."""
    frames = str((TINY / "frames.yaml").resolve())
    for more, rounds, framed in (
        ([], 1, True),
        (["--rounds", 2, "--frames", "frames"], 2, True),
        (["--frames", "none"], 1, False),
        (prompts, 1, False),
    ):
        steps = {
            step["name"]: values(step["command"])
            for step in planned(invoke, "--model", "tiny", "--output", tmp_path, *more)[:-1]
        }
        assert sum(name.startswith("critique-") for name in steps) == rounds
        asking = ("evaluate-base", "responses", "evaluate-sft", "samples", "ppo", "evaluate-ppo")
        assert ["--frames" in steps[name] for name in asking] == [framed] * len(asking)
        if framed and rounds == 1:
            assert {str(Path(steps[name]["--frames"][0]).resolve()) for name in asking} == {frames}
    others = {
        step["name"]: values(step["command"])
        for step in planned(invoke, "--model", "some/model", "--output", tmp_path, *prompts)[:-1]
    }
    assert "critique-2" in others and "--frames" not in others["responses"]
