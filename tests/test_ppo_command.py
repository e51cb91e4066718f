"""scripts/ppo.py: what it writes, what it refuses, and how it goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
from conftest import ROOT

from cai import training
from cai.engines import Sampling, load_engine

QUICK = ("--updates", 2, "--prompts-per-update", 8, "--epochs", 1, "--minibatches", 2, "--max-new-tokens", 6,
         "--learning-rate", 1e-3, "--device", "cpu")


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
    training.load_chat(source).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": str(i), "prompt": text} for i, text in enumerate(["A or B?", "How do I open the gate?"])]
    rows.append({"id": "turns", "prompt": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "A."},
                                           {"role": "user", "content": "And B?"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def common(prompts, reward_model, tmp_path):
    return ("--input", prompts, "--model", models.folder("llama"), "--reward-model", reward_model,
            "--output", tmp_path / "policy", *QUICK)


def test_the_policy_is_a_model_to_go_on_with(invoke, common, tmp_path):
    result = invoke("ppo", *common, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["updates"], summary["episodes"], summary["steps"], summary["prompts"]) == (2, 16, 4, 3)
    assert {"score", "score_at_first", "kl", "response_length", "eos_rate", "entropy", "next"} <= set(summary)

    folder = tmp_path / "policy"
    assert sorted(path.name for path in folder.glob("*.jsonl")) == ["metrics.jsonl", "samples.jsonl"]
    assert not (folder / "checkpoints").exists()
    engine = load_engine(str(folder), device="cpu")
    ((_, answer),) = engine.generate([[{"role": "user", "content": "A or B?"}]], Sampling(max_new_tokens=3), [1])
    assert answer.tokens
    trained, before = engine.model.state_dict(), training.load_policy(str(models.folder("llama"))).state_dict()
    assert not trained["model.layers.0.mlp.up_proj.weight"].equal(before["model.layers.0.mlp.up_proj.weight"])
    # Settings of the checkpoint, which the sampling of the rollouts must not see, are still there.
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.5
    manifest = json.loads((tmp_path / "policy.run.json").read_text())
    assert manifest["status"] == "done" and manifest["fingerprint"]["kl_coef"] == 0.05

    again = invoke("ppo", *common, "--json")
    repeated = json.loads(again.stdout)
    assert again.exit_code == 0 and {**summary, "seconds": 0} == {**repeated, "seconds": 0}
    other = invoke("ppo", *common, "--kl-coef", 0.2)
    assert other.exit_code == 2 and "kl_coef was 0.05, now 0.2" in other.stderr
    assert invoke("ppo", *common, "--batch-size", 2).exit_code == 0


def test_adapters_are_trained_and_merged(invoke, common, tmp_path):
    result = invoke("ppo", *common, "--lora", "--lora-rank", 4)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "policy"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    policy, base = training.load_policy(str(folder)), training.load_policy(str(models.folder("llama")))
    names = [name for name, weight in policy.state_dict().items() if not weight.equal(base.state_dict()[name])]
    assert names and all("_proj" in name for name in names)


@pytest.mark.parametrize("family", ["qwen", "gemma2", "mistral"])
def test_it_runs_on_other_models_with_a_value_head(invoke, prompts, tmp_path, family):
    reward = save_reward_model(family, tmp_path / "reward")
    result = invoke("ppo", "--input", prompts, "--model", models.folder(family), "--reward-model", reward,
                    "--output", tmp_path / "policy", *QUICK, "--updates", 1, "--value-head", "--kl-estimator", "k3")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "policy" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == 0 and rows[0]["value"] == 0
    training.load_policy(str(tmp_path / "policy"))


def test_a_dry_run_counts_and_writes_nothing(invoke, common, tmp_path):
    result = invoke("ppo", *common, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["prompts"], plan["updates"], plan["episodes"], plan["steps"]) == (3, 2, 16, 4)
    assert plan["new_tokens_at_most"] == 16 * 6 and plan["memory_gb_about"] >= 0
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
        ({"--temperature": 0}, "--temperature"),
        ({"--device": "tpu"}, "tpu"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for changes, message in cases:
        options = {**dict(zip(QUICK[::2], QUICK[1::2], strict=True)), **given, **changes}
        result = invoke("ppo", *[part for pair in options.items() for part in pair])
        assert result.exit_code == 2 and message in result.stderr, (message, result.output)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, message


def test_killed_and_started_again_it_ends_as_if_it_had_not_been(invoke, common, tmp_path):
    def line(name):
        options = {**dict(zip(common[::2], common[1::2], strict=True)), "--output": tmp_path / name, "--updates": 6,
                   "--save-every": 1, "--max-new-tokens": 24}
        return [str(part) for pair in options.items() for part in pair]

    process = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "ppo.py"), *line("killed")],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    states = tmp_path / "killed" / "checkpoints"
    until = time.monotonic() + 200
    while not list(states.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states.exists() and not (tmp_path / "killed" / "config.json").exists()
    for name in ("killed", "whole"):
        result = invoke("ppo", *line(name))
        assert result.exit_code == 0, result.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


def test_two_processes_train_as_one_does(invoke, common, tmp_path):
    from safetensors.torch import load_file

    options = dict(zip(common[::2], common[1::2], strict=True))
    lines = {name: [str(part) for pair in {**options, "--output": tmp_path / name, "--batch-size": 2}.items()
                    for part in pair] for name in ("one", "two")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(ROOT / "scripts" / "ppo.py"), *lines["two"], "--json"],
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = invoke("ppo", *lines["one"], "--json")
    one, two = (json.loads(text.splitlines()[-1]) for text in (result.stdout, done.stdout))
    for name in ("steps", "score", "kl", "response_length", "entropy"):
        assert one[name] == pytest.approx(two[name], abs=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-5 for name in weights[0])
