"""run.py with several models: which step gets which, what is refused, and the price."""

import json
import shlex
from pathlib import Path

import models
import pytest
from conftest import load_command
from small_server import SmallServer

from cai.data.outputs import read_manifest, write_jsonl

CRITIC, JUDGE = "openai:big@http://127.0.0.1:1/v1", "openai:wise@http://127.0.0.1:2/v1"


@pytest.fixture
def line(tmp_path):
    """A small model to train, with prompts."""
    rows = [{"id": str(n), "prompt": f"What about gate {n}?", "kind": "harmful"} for n in range(30)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    files = ["--input", tmp_path / "prompts.jsonl", "--heldout", tmp_path / "prompts.jsonl"]
    return ["--model", models.folder("llama"), *files, "--output", tmp_path / "out"]


@pytest.fixture
def plan(invoke, line):
    """{step: (its command, {option: value})} that --dry-run prints; each line is parsed by its command."""

    def call(*more):
        result = invoke("run", *line, *more, "--dry-run", "--json")
        assert result.exit_code == 0, result.output
        steps = {}
        for step in json.loads(result.stdout)["steps"]:
            _, script, *words = shlex.split(step["command"])
            command = load_command(Path(script).stem)
            steps[step["name"]] = command.make_context("step", words).params
        return steps

    return call


def test_each_step_gets_the_model_of_its_role_with_its_server(plan, line):
    reader = models.folder("qwen")
    steps = plan("--critic", CRITIC, "--judge", JUDGE, "--reader", reader, "--gate", "tiny")
    asked = {name: (step["model"], step.get("endpoints")) for name, step in steps.items() if "model" in step}
    trained, base = str(line[-1]), str(line[1])
    for number in (1, 2):
        for name in ("critique", "revision"):
            assert asked[f"{name}-{number}"] == ("openai:big", ("http://127.0.0.1:1/v1",))
        assert steps[f"revision-{number}"]["gate"] == "tiny"
    assert asked["preferences"] == ("openai:wise", ("http://127.0.0.1:2/v1",))
    assert [steps[f"evaluate-{stage}"]["judge"] for stage in ("base", "sft", "ppo")] == [str(reader)] * 3
    assert asked["responses"] == (base, ()) and asked["samples"] == (f"{trained}/sft", ())
    assert steps["sft"]["model"] == base


def test_only_steps_that_ask_a_server_get_the_options_of_requests(invoke, line):
    servers = ["--critic", CRITIC, "--judge", JUDGE]
    result = invoke("run", *line, *servers, "--request-timeout", 7, "--no-server-seed", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    lines = {step["name"]: step["command"] for step in json.loads(result.stdout)["steps"]}
    patient = {name for name, words in lines.items() if "--request-timeout 7 --no-server-seed" in words}
    assert patient == {"critique-1", "critique-2", "revision-1", "revision-2", "preferences"}
    refused = invoke("run", *line, "--request-timeout", 7, "--dry-run")
    assert refused.exit_code == 2 and "no model is on a server" in refused.output


def test_a_reader_that_is_named_replaces_the_oracle(plan):
    assert plan("--preset", "tiny")["evaluate-base"]["by"] == "oracle"
    step = plan("--preset", "tiny", "--reader", "tiny")["evaluate-base"]
    assert (step["by"], step["judge"]) == ("judge", "tiny")


def test_a_judge_that_is_not_the_critic_has_matches_of_its_own(plan):
    for more, name in (([], "matches.jsonl"), (["--critic", "tiny"], "matches-judge.jsonl")):
        steps = plan("--principles", "match", *more)
        assert Path(steps["critique-2"]["matches"]).name == "matches.jsonl"
        assert Path(steps["preferences"]["matches"]).name == name


@pytest.mark.parametrize("preset", ["tiny", "default"])
@pytest.mark.parametrize("rl", ["ppo", "grpo"])
def test_new_tokens_and_updates_are_those_of_all_steps_that_have_them(plan, preset, rl):
    steps = plan("--preset", preset, "--rl", rl, "--max-new-tokens", 33, "--updates", 7)
    writing = ("evaluate-base", "responses", "critique-1", "revision-1", "samples", rl, f"evaluate-{rl}")
    assert {steps[name]["max_new_tokens"] for name in writing} == {33}
    assert steps[rl]["updates"] == 7
    # --limit makes a trial run of fewer prompts, and no fewer updates than were asked for.
    assert plan("--preset", preset, "--rl", rl, "--updates", 7, "--limit", 4)[rl]["updates"] == 7
    assert plan("--preset", preset, "--rl", rl, "--limit", 4)[rl]["updates"] == 1


@pytest.mark.parametrize("preset", ["tiny", "default"])
@pytest.mark.parametrize("rl", ["ppo", "grpo", "dpo"])
def test_a_smoke_run_is_bounded_in_rows_and_tokens(plan, preset, rl):
    steps = plan("--preset", preset, "--rl", rl, "--smoke")
    assert {
        step["max_new_tokens"]
        for name, step in steps.items()
        if name not in ("preferences",) and "max_new_tokens" in step
    } == {32}
    assert {steps[name]["limit"] for name in ("responses", "samples", "sft", "evaluate-base")} == {8}
    assert steps["sft"]["keep"] == ("all",) and steps["sft"]["epochs"] == 1
    assert steps["samples"]["samples"] == 2 and steps["preferences"]["pairs_per_prompt"] == 3
    assert {steps[name]["most_examples"] for name in ("critique-1", "revision-1", "preferences")} == {0}
    if rl != "dpo":
        assert (steps[rl]["updates"], steps[rl]["epochs"], steps[rl]["prompts_per_update"]) == (1, 1, 8)
    chosen = plan("--smoke", "--max-new-tokens", 900, "--updates", 2)
    assert chosen["responses"]["max_new_tokens"] == 900 and chosen["ppo"]["updates"] == 2


def test_the_script_of_a_smoke_run_measures_no_fitness_either(invoke, line):
    assert "export CAI_QUALIFICATION=kept\n" in invoke("run", *line, "--smoke", "--dry-run").stdout
    assert "CAI_QUALIFICATION" not in invoke("run", *line, "--dry-run").stdout


def test_a_smoke_run_reads_fewer_of_long_prompts(plan, tmp_path):
    rows = [{"prompt": f"{n} " + "gate " * 300, "kind": "benign"} for n in range(8)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    assert plan("--smoke")["responses"]["limit"] == 2


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--rl", "dpo", "--updates", 3], "--updates would have no effect: --rl dpo has none"),
        (["--rl", "none", "--updates", 3], "--updates would have no effect"),
        (["--rl", "none", "--judge", "tiny"], "--judge would have no effect"),
        (["--smoke", "--seeds", 2], "--seeds would have no effect"),
        (["--critic", "no/such/folder"], "no such model folder"),
        (["--reader", "openai:big"], "--reader: openai:big without its server"),
        (["--gate", "openai:big"], "--gate: openai:big without its server"),
        (["--model", CRITIC], "--model: openai:big@http://127.0.0.1:1/v1 is on a server"),
        (["--judge", "size:8b"], "--judge: size:8b is a size and no model"),
    ],
)
def test_an_option_without_effect_and_a_model_that_is_not_there_are_refused_first(invoke, line, more, reason):
    result = invoke("run", *line, *more)
    assert result.exit_code == 2 and reason in result.stderr, result.stderr
    assert not Path(line[-1]).exists()


@pytest.mark.slow
def test_a_run_asks_the_server_that_criticises_and_reads(invoke, line):
    """The policy is trained here; nothing else is asked of it than responses. A smoke run, which trains on what is cut
    off too; a random model shows no life."""
    with SmallServer(models.folder("qwen"), context=2048) as server:
        name = f"openai:small@{server.address}"
        more = ["--rl", "none", "--rounds", 1, "--limit", 2, "--heldout-limit", 2, "--max-new-tokens", 5, "--smoke"]
        result = invoke("run", *line, *more, "--critic", name, "--reader", name, "--device", "cpu", "--json")
    assert result.exit_code in (0, 1) and json.loads(result.stdout)["bounded"]["new_tokens"] == 5, result.output
    words = [json.dumps(body["messages"]) for body in server.requests]
    assert {body["model"] for body in server.requests} == {"small"}
    assert len(words) >= 2 + 2 + 2 * 2  # critiques, revisions, and the classes of two evaluations
    assert not any(json.loads(text)[0]["content"].startswith("What about gate") for text in words)
    manifest = read_manifest(Path(line[-1]) / "smoke" / "02-critique-1.jsonl")
    assert manifest["fingerprint"]["model"] == "openai:small"


SIZED = ["--model", "size:1b", "--prompts", 1000, "--rounds", 1, "--output", "out", "--dry-run", "--json"]
GPU = ["--gpu", "a100-80", "--gpu-hour", 2]


@pytest.fixture
def price(invoke):
    def call(*more):
        result = invoke("run", *SIZED, *more)
        assert result.exit_code == 0, result.output
        priced = json.loads(result.stdout)
        return {step["name"]: step for step in priced["steps"]}, priced

    return call


def test_the_price_is_that_of_each_steps_own_model(price):
    same, _ = price(*GPU)
    steps, priced = price(*GPU, "--critic", "size:8b", "--judge", "size:3b")
    assert {name for name in steps if steps[name]["hours"] != same[name]["hours"]} == {
        *("critique-1", "revision-1", "preferences")
    }
    eight, _ = price("--model", "size:8b", *GPU)
    for name in ("critique-1", "revision-1"):
        assert steps[name]["hours"] == eight[name]["hours"] and steps[name]["memory_gb"] == eight[name]["memory_gb"]
    told = "\n".join(priced["assumptions"])
    assert "for every model of the run except critic, judge" in told and "critic: " in told


def test_a_server_has_a_price_and_no_hours(price):
    alone, _ = price(*GPU)
    steps, priced = price(*GPU, "--price", 1, 2, "--critic", CRITIC, "--reader", JUDGE)
    critique = steps["critique-1"]
    assert critique["hours"] is None and critique["memory_gb"] is None
    cost = (critique["tokens_read"] + 2 * critique["tokens_written"]) / 1e6
    assert critique["cost"]["value"] == pytest.approx(cost, rel=0.01)
    # The policy's answers on the GPU, and the classes on the server.
    evaluation = steps["evaluate-base"]
    assert 0 < evaluation["hours"]["value"] < alone["evaluate-base"]["hours"]["value"]
    assert evaluation["cost"]["value"] > 2 * evaluation["hours"]["value"]
    assert steps["responses"]["cost"] == alone["responses"]["cost"]
    assert any("hours and memory leave out what the servers do in evaluate-base, crit" in w for w in priced["warnings"])
