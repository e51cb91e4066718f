"""scripts/ppo.py: what it writes, what it refuses, and how it goes on."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import models
import pytest
from conftest import ROOT

from cai.base.paths import TINY
from cai.data import outputs
from cai.models import loading
from cai.models.engine import Sampling
from cai.models.loading import load_engine
from cai.train.common import last_state

QUICK = (
    "--updates",
    2,
    "--prompts-per-update",
    8,
    "--epochs",
    1,
    "--minibatches",
    2,
    "--max-new-tokens",
    6,
    "--learning-rate",
    1e-3,
    "--device",
    "cpu",
)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    return save_reward_model("llama", tmp_path_factory.mktemp("reward"))


def save_reward_model(family: str, folder: Path, labels: int = 1) -> Path:
    """A random reward model on the family's small policy, with its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    source = str(models.folder(family))
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels).save_pretrained(folder)
    loading.load_chat(source).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": str(i), "prompt": text} for i, text in enumerate(["A or B?", "How do I open the gate?"])]
    rows.append(
        {
            "id": "turns",
            "prompt": [
                {"role": "user", "content": "A?"},
                {"role": "assistant", "content": "A."},
                {"role": "user", "content": "And B?"},
            ],
        }
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def common(prompts, reward_model, tmp_path):
    return (
        "--input",
        prompts,
        "--model",
        models.folder("llama"),
        "--reward-model",
        reward_model,
        "--output",
        tmp_path / "policy",
        *QUICK,
    )


def test_the_policy_is_a_model_to_go_on_with(invoke, common, tmp_path):
    result = invoke("ppo", *common, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["updates"], summary["episodes"], summary["steps"], summary["prompts"]) == (2, 16, 4, 3)
    assert {"score", "score_at_first", "kl", "response_length", "eos_rate", "entropy", "next"} <= set(summary)

    folder = tmp_path / "policy"
    assert sorted(path.name for path in folder.glob("*.jsonl")) == ["metrics.jsonl", "samples.jsonl"]
    assert not (folder / "checkpoints").exists()
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert isinstance(summary["alarms"], list)
    engine = load_engine(str(folder), device="cpu")
    [answer] = models.generate(engine, [[{"role": "user", "content": "A or B?"}]], Sampling(max_new_tokens=3), [1])
    assert answer.tokens
    trained, before = engine.model.state_dict(), loading.load_policy(str(models.folder("llama"))).state_dict()
    assert not trained["model.layers.0.mlp.up_proj.weight"].equal(before["model.layers.0.mlp.up_proj.weight"])
    # Settings of the checkpoint, which the sampling of the rollouts must not see, are still there.
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.5
    manifest = json.loads((tmp_path / "policy.run.json").read_text())
    assert manifest["fast_path"] is True
    assert manifest["status"] == "done" and manifest["fingerprint"]["kl_coef"] == 0.05

    again = invoke("ppo", *common, "--json")
    repeated = json.loads(again.stdout)
    assert again.exit_code == 0 and {**summary, "seconds": 0} == {**repeated, "seconds": 0}
    other = invoke("ppo", *common, "--kl-coef", 0.2)
    assert other.exit_code == 2 and "kl_coef was 0.05, now 0.2" in other.stderr
    assert invoke("ppo", *common, "--batch-size", 2).exit_code == 0


def test_the_blocks_before_the_first_that_is_trained_stay_as_they_are(invoke, common, tmp_path):
    model = models.folder("llama")
    last = loading.read_blocks(str(model)) - 1
    result = invoke("ppo", *common, "--first-layer", last)
    assert result.exit_code == 0, result.output
    changed = models.changed_weights(model, tmp_path / "policy")
    assert changed and all(name.startswith((f"model.layers.{last}.", "model.norm", "lm_head")) for name in changed)


@pytest.mark.slow
def test_adapters_are_trained_and_merged(invoke, common, tmp_path):
    result = invoke("ppo", *common, "--lora", "--lora-rank", 4)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "policy"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    policy, base = loading.load_policy(str(folder)), loading.load_policy(str(models.folder("llama")))
    names = [name for name, weight in policy.state_dict().items() if not weight.equal(base.state_dict()[name])]
    assert names and all("_proj" in name for name in names)


@pytest.mark.slow
def test_adapters_alone_on_request(invoke, common, tmp_path):
    result = invoke("ppo", *common, "--lora", "--lora-rank", 4, "--no-merge")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "policy"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    conversation = [{"role": "user", "content": "How do I open the gate?"}]
    answers = []
    for name in (folder, models.folder("llama")):
        engine = load_engine(str(name), device="cpu")
        [scores] = models.score(engine, [conversation], [" A", " B"])
        answers.append(scores)
    assert answers[0] != pytest.approx(answers[1], abs=1e-6)  # what was trained acts


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """Rewards of one's own, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rewards.py").write_text(
        "def length(prompts, responses):\n    return [len(r) / 10 for r in responses]\n\n\n"
        "def brief(prompts, responses):\n    return [1 / (1 + len(r)) for r in responses]\n"
    )
    yield
    sys.modules.pop("own_rewards", None)


def test_rewards_of_several_kinds_a_judge_and_a_choice(invoke, common, tmp_path, functions):
    kinds, harmless = tmp_path / "kinds.jsonl", {"id": "1", "prompt": "Bake it", "kind": "benign"}
    outputs.write_jsonl(kinds, [{"id": "0", "prompt": "Break it", "kind": "harmful"}, harmless])
    line = (
        *common,
        "--reward-model",
        "own_rewards:length",
        "--reward-weight",
        1,
        "--reward-weight",
        2,
        "--judge",
        "own_rewards:brief",
        "--select",
        kinds,
        "--save-every",
        1,
        "--json",
    )
    result = invoke("ppo", *line)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    candidates = [json.loads(line) for line in (tmp_path / "policy" / "selection.jsonl").read_text().splitlines()]
    assert [row["update"] for row in candidates] == [0, 1, 2]
    assert summary["selected_update"] in (0, 1, 2)
    rows = [json.loads(line) for line in (tmp_path / "policy" / "metrics.jsonl").read_text().splitlines()][:2]
    for row in rows:
        parts = [row[name] for name in row if name.startswith("score_") and name != "score_std"]
        assert len(parts) == 2 and 0 < row["judge"] <= 1
        reward = next(name for name in row if name.startswith("score_reward"))
        assert row["score"] == pytest.approx(row[reward] + 2 * row["score_own_rewards:length"], rel=1e-4)
    fingerprint = json.loads((tmp_path / "policy.run.json").read_text())["fingerprint"]
    assert len(fingerprint["reward_model"]) == 2 and fingerprint["judge"]["function"] == "own_rewards:brief"
    outputs.write_jsonl(kinds, [{"id": "0", "prompt": "Burn it", "kind": "harmful"}, harmless])
    result = invoke("ppo", *line)  # to choose by other prompts is another run, whatever their ids
    assert result.exit_code == 2 and "select was" in result.stderr


def test_a_function_alone_takes_a_value_head_and_prompts_with_kinds_choose(invoke, prompts, tmp_path, functions):
    prompts.write_text(
        "".join(
            json.dumps({"prompt": f"Say {i}", "kind": kind}) + "\n"
            for i, kind in enumerate(["harmful", "benign", "borderline"])
        )
    )
    line = (
        "--input",
        prompts,
        "--model",
        models.folder("llama"),
        "--reward-model",
        "own_rewards:length",
        "--output",
        tmp_path / "policy",
        *QUICK,
    )
    result = invoke("ppo", *line)
    assert result.exit_code == 2 and "--value-head" in result.stderr
    # A chat model as the judge, which is asked what each response does.
    result = invoke(
        "ppo", *line, "--value-head", "--judge", models.folder("llama"), "--select", "--save-every", 2, "--json"
    )
    assert result.exit_code == 0, result.output
    (first, last) = [json.loads(line) for line in (tmp_path / "policy" / "selection.jsonl").read_text().splitlines()]
    assert (first["update"], last["update"]) == (0, 2) and len(first["scores"]) == 3
    assert all(0 < score < 1 for score in first["scores"])


@pytest.mark.slow
def test_an_alarm_ends_it_with_1_or_with_the_policy_chosen_before(invoke, common, prompts, tmp_path, functions):
    line = [
        *common,
        "--updates",
        3,
        "--alarm",
        "kl=1e-6",
        "--stop-on",
        "kl",
        "--save-every",
        1,
        "--learning-rate",
        0.05,
    ]
    result = invoke("ppo", *line)
    assert result.exit_code == 1
    assert "stopped in update" in result.stderr and "The last good policy is" in result.stderr
    prompts.write_text(
        "".join(
            json.dumps({"prompt": text, "kind": kind}) + "\n"
            for text, kind in (("Break it", "harmful"), ("Bake it", "benign"))
        )
    )
    result = invoke("ppo", *line, "--select", "--json", "--overwrite")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert "--stop-on kl" in summary["stopped"] and summary["alarms"] == ["kl"]
    assert summary["selected_update"] < summary["updates"]
    loading.load_policy(str(tmp_path / "policy"))


def test_figures_go_to_a_tracker(invoke, common, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = invoke("ppo", *common, "--report-to", "tensorboard")
    assert result.exit_code == 0, result.output
    events = EventAccumulator(str(tmp_path / "policy" / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "policy" / "metrics.jsonl").read_text().splitlines()]
    for name in ("score", "kl", "entropy"):
        logged = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert logged == [(row["step"], pytest.approx(row[name], abs=1e-6)) for row in rows if "update" in row]


@pytest.mark.parametrize("family", ["qwen", "gemma2", "mistral"])
def test_it_runs_on_other_models_with_a_value_head(invoke, prompts, tmp_path, family):
    reward = save_reward_model(family, tmp_path / "reward")
    result = invoke(
        "ppo",
        "--input",
        prompts,
        "--model",
        models.folder(family),
        "--reward-model",
        reward,
        "--output",
        tmp_path / "policy",
        *QUICK,
        "--updates",
        1,
        "--value-head",
        "--kl-estimator",
        "k3",
    )
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == 0 and rows[0]["value"] == 0
    loading.load_policy(str(tmp_path / "policy"))


def test_a_dry_run_counts_and_writes_nothing(invoke, common, tmp_path):
    result = invoke("ppo", *common, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["prompts"], plan["updates"], plan["episodes"], plan["steps"]) == (3, 2, 16, 4)
    assert plan["new_tokens_at_most"] == 16 * 6 and plan["memory_gb"]["frozen_models"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]


def test_bad_input_is_refused_and_nothing_written(invoke, prompts, reward_model, tmp_path):
    folder = models.folder("llama")
    empty, long = tmp_path / "empty.jsonl", tmp_path / "long.jsonl"
    empty.write_text("")
    long.write_text(json.dumps({"prompt": "A or B? " * 900}) + "\n")
    given = {"--input": prompts, "--model": folder, "--reward-model": reward_model, "--output": tmp_path / "out"}
    cases = [
        ({"--reward-model": folder}, "not a reward model"),
        ({"--reward-model": save_reward_model("llama", tmp_path / "two", 2)}, "2 classes"),
        ({"--reward-model": save_reward_model("qwen", tmp_path / "qwen")}, "another tokenizer"),
        ({"--reward-model": tmp_path / "nowhere"}, "nowhere"),
        ({"--model": reward_model}, "reward model"),
        ({"--ref-model": models.folder("mistral")}, "another tokenizer"),
        ({"--input": empty}, "no rows"),
        ({"--input": long}, "do not fit the model's context of 2048"),
        ({"--minibatches": 3}, "do not divide by 3"),
        ({"--value-warmup": 99}, "leaves no update for the policy"),
        ({"--temperature": 0}, "--temperature"),
        ({"--device": "tpu"}, "tpu"),
        ({"--alarm": "speed=3"}, "no alarm 'speed'"),
        ({"--stop-on": "judge"}, "--stop-on judge would have no effect: without --judge"),
        ({"--lora-rank": 4}, "--lora-rank would have no effect: without --lora"),
        ({"--kl-target": 3, "--kl-coef": 0}, "--kl-target with --kl-coef 0"),
        ({"--reward-model": "no_such_module:score"}, "can't be imported"),
        ({"--select": empty}, "no rows"),
        ({"--select": prompts}, "without 'kind'"),
        ({"--select": TINY / "prompts" / "heldout.jsonl"}, "for the evaluation"),
        ({"--judge": folder}, "have no kind"),
        ({"--judge": tmp_path / "nowhere"}, "nowhere"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for changes, message in cases:
        options = {**dict(zip(QUICK[::2], QUICK[1::2], strict=True)), **given, **changes}
        result = invoke("ppo", *[part for pair in options.items() for part in pair])
        assert result.exit_code == 2 and message in result.stderr, (message, result.output)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, message


@pytest.mark.slow
def test_killed_and_started_again_the_next_20_updates_are_those_of_a_run_that_was_not(
    invoke, common, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deadly.py").write_text(
        "import os, pathlib, signal\n\ncalls = []\n\n\ndef nothing(prompts, responses):\n    calls.append(1)\n"
        "    if len(calls) == 6 and pathlib.Path('kill').exists():\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [0.0] * len(responses)\n"
    )

    def line(name):
        options = {
            **dict(zip(common[::2], common[1::2], strict=True)),
            "--output": tmp_path / name,
            "--updates": 24,
            "--save-every": 4,
            "--max-new-tokens": 12,
        }
        return [*(str(part) for pair in options.items() for part in pair), "--reward-model", "deadly:nothing"]

    Path("kill").touch()
    killed = subprocess.run([sys.executable, str(ROOT / "scripts" / "ppo.py"), *line("killed")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last_state(tmp_path / "killed" / "checkpoints").name == "checkpoint-8"  # of update 4
    assert not (tmp_path / "killed" / "config.json").exists()
    Path("kill").unlink()
    found = []
    for name in ("killed", "whole"):
        result = invoke("ppo", *line(name))
        assert result.exit_code == 0, result.output
        rows = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows if "update" in row])
    assert found[0] == found[1] and len(found[0]) == 24
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_train_as_one_does(invoke, common, tmp_path):
    from safetensors.torch import load_file

    options = dict(zip(common[::2], common[1::2], strict=True))
    lines = {
        name: [
            str(part) for pair in {**options, "--output": tmp_path / name, "--batch-size": 2}.items() for part in pair
        ]
        for name in ("one", "two")
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "scripts" / "ppo.py"), *lines["two"], "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = invoke("ppo", *lines["one"], "--json")
    one, two = (json.loads(text.splitlines()[-1]) for text in (result.stdout, done.stdout))
    for name in ("steps", "score", "kl", "response_length", "entropy"):
        assert one[name] == pytest.approx(two[name], abs=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-5 for name in weights[0])


# --- models that do not fit on one GPU -------------------------------------------------------------------------------


def write_large(where, billions):
    """A policy whose files say that it has so many parameters: a sparse file holds their zeros."""
    folder = models.copy("llama", where)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 80, "intermediate_size": 28672}
    (folder / "config.json").write_text(json.dumps(config))
    size = int(billions * 10**9) * 2
    header = json.dumps({"filler": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with open(folder / "filler.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return folder


def hand_over(invoke, common, policy, *more):
    line = [policy if part == models.folder("llama") else part for part in common]
    result = invoke("ppo", *line, "--dry-run", "--gpu", "h100", "--json", *more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout).get("hand_over")


@pytest.mark.parametrize("billions, engine, nodes", [(70, "openrlhf", 3), (140, "verl", 6)])
def test_a_dry_run_names_the_engine_for_a_model_that_fits_on_no_gpu(
    invoke, common, prompts, reward_model, tmp_path, billions, engine, nodes
):
    policy = write_large(tmp_path / "large", billions)
    line = shlex.split(hand_over(invoke, common, policy))
    assert line[:6] == ["python", "scripts/export.py", "--to", engine, "--stage", "ppo"]
    options = dict(zip(line[6::2], line[7::2], strict=True))
    assert options == {
        "--input": str(prompts),
        "--model": str(policy),
        "--reward-model": str(reward_model),
        "--nodes": str(nodes),
        "--output": f"{tmp_path / 'policy'}-{engine}",
    }


def test_a_model_that_fits_is_handed_to_nobody(invoke, common, tmp_path):
    assert hand_over(invoke, common, models.folder("llama")) is None
    # 4 bytes of weights, 4 of gradients and 8 of the optimizer per parameter, and 2 of the reference.
    assert hand_over(invoke, common, write_large(tmp_path / "fits", 4.4)) is None
    assert hand_over(invoke, common, write_large(tmp_path / "does-not", 4.5)) is not None
    # A frozen base takes two bytes; bfloat16 alone half of all that is trained.
    assert hand_over(invoke, common, write_large(tmp_path / "lora", 30), "--lora") is None
    assert hand_over(invoke, common, write_large(tmp_path / "half", 7), "--dtype", "bfloat16") is None


def test_a_launcher_that_shards_is_refused_with_the_command_before_anything_is_loaded(
    invoke, common, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    line = [write_large(tmp_path / "large", 70) if part == models.folder("llama") else part for part in common]
    result = invoke("ppo", *line)
    assert result.exit_code == 2 and "does not run under FSDP or DeepSpeed" in result.stderr
    assert "scripts/export.py --to openrlhf --stage ppo" in result.stderr
    assert not (tmp_path / "policy").exists()
