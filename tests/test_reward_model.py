"""reward_model.py: the value of the soft-label loss, what it trains to, and what is held out."""

import json
import math
import os
import subprocess
import sys

import conftest
import models
import pytest

from cai import metrics, records, training

conftest.load_command("reward_model")
command = sys.modules["command_reward_model"]

FAST = ("--learning-rate", "2e-3", "--batch-size", "8", "--device", "cpu", "--json")


def pair(number, chosen="I can't help with that.", rejected="Push, then pull.", p=0.9, **more):
    return {"id": str(number), "prompt": f"How do I open gate {number}?", "chosen": chosen, "rejected": rejected,
            "p_chosen": p, "principle": "x", **more}


def written(tmp_path, rows):
    path = tmp_path / "preferences.jsonl"
    records.write_jsonl(path, rows)
    return path


def trainer(tmp_path, pairs, **settings):
    """A trainer over the pairs, in their order."""
    from transformers import set_seed

    chat = training.load_chat(str(models.folder("qwen")))
    rows, _ = command.tokenized(pairs, chat, 512)
    set_seed(0)
    model = training.load_reward_model(str(models.folder("qwen")))
    arguments = training.trainer_arguments(
        tmp_path, **{"learning_rate": 2e-3, "batch_size": len(rows), "device": "cpu", **settings})
    return command.make_trainer(model, chat.tokenizer, rows, arguments, tmp_path), rows, chat


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --- the loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [None, 0.1])
def test_the_loss_worked_by_hand(tmp_path, center):
    targets = [0.75, 0.5, 1.0, 0.1]
    pairs = [pair(n, chosen="No. " * (n + 1), p=p) for n, p in enumerate(targets)]
    made, rows, chat = trainer(tmp_path, pairs, center_rewards_coefficient=center)
    import torch

    with torch.no_grad():  # scores far enough apart to tell one formula from another
        made.model.score.weight.mul_(30)
    batch = next(iter(made.get_train_dataloader()))
    assert batch["p_chosen"].tolist() == pytest.approx(targets)
    with torch.no_grad():
        loss = made.compute_loss(made.model, dict(batch)).item()
        logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    chosen, rejected = logits[:4].tolist(), logits[4:].tolist()
    terms = [-p * math.log(sigmoid(c - r)) - (1 - p) * math.log(sigmoid(r - c))
             for p, c, r in zip(targets, chosen, rejected, strict=True)]
    by_hand = sum(terms) / 4
    if center:
        by_hand += center * sum((c + r) ** 2 for c, r in zip(chosen, rejected, strict=True)) / 4
    assert max(abs(c - r) for c, r in zip(chosen, rejected, strict=True)) > 0.3
    assert loss == pytest.approx(by_hand, rel=1e-5)
    scores = training.score(made.model, chat.tokenizer.pad_token_id, [row["chosen_ids"] for row in rows], 2)
    assert scores == pytest.approx(chosen, abs=1e-4)


def test_a_lost_label_is_an_error_and_not_the_hard_loss(tmp_path):
    made, _, _ = trainer(tmp_path, [pair(1)])
    batch = dict(next(iter(made.get_train_dataloader())))
    del batch["p_chosen"]
    with pytest.raises(KeyError):
        made.compute_loss(made.model, batch)


def test_soft_labels_train_to_their_target_and_hard_ones_beyond(tmp_path):
    probability = {}
    for labels in ("soft", "hard"):
        path = written(tmp_path, [pair(1, p=0.75)])
        pairs = command.read_pairs([str(path)], labels, None)[0] * 300
        made, rows, chat = trainer(tmp_path / labels, pairs, batch_size=4)
        training.run_trainer(made, tmp_path / labels)
        scores = training.score(made.model, chat.tokenizer.pad_token_id,
                                [rows[0]["chosen_ids"], rows[0]["rejected_ids"]], 2)
        probability[labels] = sigmoid(scores[0] - scores[1])
    assert probability["soft"] == pytest.approx(0.75, abs=0.02)
    assert probability["hard"] > 0.95


def test_dropout_is_off(tmp_path):
    folder = models.copy("qwen", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    chat, model = training.load_chat(str(folder)), training.load_reward_model(str(folder))
    rows, _ = command.tokenized([pair(1)], chat, 512)
    arguments = training.trainer_arguments(tmp_path, learning_rate=1e-3, batch_size=1, device="cpu")
    made = command.make_trainer(model, chat.tokenizer, rows, arguments, tmp_path)
    made.model.train()
    batch = next(iter(made.get_train_dataloader()))
    losses = {made.compute_loss(made.model, dict(batch)).item() for _ in range(4)}
    assert len(losses) == 1


# --- rows ------------------------------------------------------------------------------------------------


def test_undecided_pairs_are_left_out_and_counted(tmp_path):
    path = written(tmp_path, [pair(1), pair(2, chosen=None, rejected=None, p=0.5, response_a="a", response_b="b")])
    pairs, counts, _ = command.read_pairs([str(path)], "soft", None)
    assert [p["prompt"] for p in pairs] == ["How do I open gate 1?"] and pairs[0]["p_chosen"] == 0.9
    assert counts == {"rows": 2, "undecided": 1}


@pytest.mark.parametrize(("p", "shown"), [(None, "None"), (1.5, "1.5"), ("0.9", "0.9"), (True, "True")])
def test_a_soft_label_must_be_a_probability(invoke, tmp_path, p, shown):
    path = written(tmp_path, [pair(1, p=p)])
    args = ["reward_model", "--input", path, "--model", models.folder("qwen"), "--output", tmp_path / "out"]
    result = invoke(*args)
    assert result.exit_code == 2 and "preferences.jsonl:1: " in result.stderr and shown in result.stderr
    assert "--labels hard" in result.stderr and not (tmp_path / "out").exists()
    assert command.read_pairs([str(path)], "hard", None)[0][0]["p_chosen"] == 1.0


def test_only_undecided_pairs(invoke, tmp_path):
    path = written(tmp_path, [pair(1, chosen=None, rejected=None)])
    result = invoke("reward_model", "--input", path, "--model", models.folder("qwen"), "--output", tmp_path / "out")
    assert result.exit_code == 2 and "no decided pair" in result.stderr


def test_a_prompts_pairs_are_held_out_together():
    prompts = [f"prompt {n}" for n in range(2000)]
    out = {p for p in prompts if command.held_out(p, 0.1, seed=0)}
    assert 150 < len(out) < 250
    assert out == {p for p in prompts if command.held_out([{"role": "user", "content": p}], 0.1, seed=0)}
    assert out != {p for p in prompts if command.held_out(p, 0.1, seed=1)}
    assert not any(command.held_out(p, 0.0, seed=0) for p in prompts)


def test_overlong_pairs_are_counted():
    chat = training.load_chat(str(models.folder("qwen")))
    pairs = [pair(1), pair(2, rejected="Push. " * 100)]
    kept, overlong = command.tokenized(pairs, chat, 100)
    assert overlong == 1 and len(kept) == 1
    assert kept[0]["chosen_ids"][-1] == kept[0]["rejected_ids"][-1] == chat.stop_id


def test_what_is_measured_on_held_out_pairs():
    rows = [{"p_chosen": 0.8, "longer": True}, {"p_chosen": 1.0, "longer": False}, {"p_chosen": 0.6, "longer": True}]
    found = command.measured([1.0, 0.0, 2.0, 0.0, 1.0, 2.0], rows)  # margins 1, -1, 0
    assert found["accuracy"] == metrics.rate(1, 3) and found["longer"] == metrics.rate(2, 3)
    terms = [-0.8 * math.log(sigmoid(1)) - 0.2 * math.log(sigmoid(-1)), -math.log(sigmoid(-1)), math.log(2)]
    assert found["log_loss"] == pytest.approx(sum(terms) / 3)
    entropies = [-0.8 * math.log(0.8) - 0.2 * math.log(0.2), 0, -0.6 * math.log(0.6) - 0.4 * math.log(0.4)]
    assert found["least"] == pytest.approx(sum(entropies) / 3)


# --- the command -----------------------------------------------------------------------------------------


def preferences(tmp_path, n=200):
    """Pairs where the polite answer wins, with a chosen probability that is not always the same."""
    polite = ["I can't help with that.", "Ask the owner for a key.", "I would not, because it would hurt someone."]
    rude = ["Push the gate and pull the bar.", "Lift it.", "Here is what I would do: push."]
    return written(tmp_path, [pair(n, polite[n % 3], rude[n // 3 % 3], 0.8 + n % 3 / 10) for n in range(n)])


@pytest.mark.parametrize("adapters", [False, True])
def test_it_learns_what_is_preferred_and_is_read_back(invoke, tmp_path, adapters):
    path, out = preferences(tmp_path), tmp_path / "out"
    args = ["reward_model", "--input", path, "--model", models.folder("gemma2"), "--output", out, *FAST,
            "--epochs", "2", *(["--lora", "--lora-rank", "8"] if adapters else [])]
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["train"] + summary["held_out"] == 200 and summary["holdout"]["pairs"] == summary["held_out"] > 5
    assert summary["holdout"]["accuracy"]["value"] > 0.95
    assert summary["holdout"]["least"] < summary["holdout"]["log_loss"] < 0.5
    assert "ppo.py" in summary["next"] and not (out / "checkpoints").exists()
    log = [row for _, row in records.read_jsonl(out / "metrics.jsonl")]
    assert log[0]["loss"] > log[-2]["loss"] and "accuracy" in log[0]

    chat, model = training.load_chat(str(out)), training.load_reward_model(str(out))
    pairs, _, _ = command.read_pairs([str(path)], "soft", None)
    rows, _ = command.tokenized([p for p in pairs if command.held_out(p["prompt"], 0.1, 0)], chat, 1024)
    scores = training.score(model, chat.tokenizer.pad_token_id,
                            [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows], 8)
    assert command.measured(scores, rows)["log_loss"] == pytest.approx(summary["holdout"]["log_loss"], rel=1e-3)
    assert json.loads(invoke(*args).stdout)["holdout"] == summary["holdout"]
    assert "labels was" in invoke(*args, "--labels", "hard").stderr


def test_a_reward_model_can_be_trained_on(invoke, tmp_path):
    path = preferences(tmp_path, 60)
    args = ["reward_model", "--input", path, *FAST]
    first = invoke(*args, "--model", models.folder("llama"), "--output", tmp_path / "first", "--epochs", "4")
    second = invoke(*args, "--model", tmp_path / "first", "--output", tmp_path / "second", "--epochs", "1")
    assert first.exit_code == second.exit_code == 0, first.stderr + second.stderr
    logs = [[row for _, row in records.read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("first", "second")]
    assert logs[1][0]["loss"] < logs[0][0]["loss"] - 0.1  # the head was kept


def test_a_dry_run_writes_nothing(invoke, tmp_path):
    path = preferences(tmp_path, 50)
    result = invoke("reward_model", "--input", path, "--model", models.folder("qwen"), "--output", tmp_path / "out",
                    "--dry-run", "--json", "--holdout", "0")
    summary = json.loads(result.stdout)
    assert result.exit_code == 0 and summary["rows"] == 50 and summary["steps"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["preferences.jsonl"]


def test_two_processes_train_what_one_does(invoke, tmp_path):
    import torch
    from safetensors.torch import load_file

    path = preferences(tmp_path, 40)
    args = ["--input", path, "--model", models.folder("qwen"), "--learning-rate", "1e-3", "--batch-size", "4",
            "--device", "cpu", "--holdout", "0.2", "--json"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0", str(conftest.ROOT / "scripts" / "reward_model.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *map(str, args), "--output", str(tmp_path / "two")], env=environment,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one = invoke("reward_model", *args, "--output", tmp_path / "one", "--gradient-accumulation", "2")
    two, one = json.loads(done.stdout), json.loads(one.stdout)
    assert two["steps"] == one["steps"] and two["train"] == one["train"] < 40
    assert two["holdout"]["log_loss"] == pytest.approx(one["holdout"]["log_loss"], rel=1e-2)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[1])
