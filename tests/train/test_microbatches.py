"""Batches bounded by tokens: the parts hold every row once, and train what the whole batch trains."""

import json

import models
import pytest
import torch
from safetensors.torch import load_file

from cai.models import checks, estimate
from cai.train import microbatches

TEXTS = ["No.", "Ask the owner for a key. " * 4, "Lift the bar and push. " * 2, "Wait. " * 9, "Never.", "Push. " * 20]
TRAINING = {"sft": ["--helpful"], "reward_model": ["--holdout", 0, "--center", 0.01, "--input"], "dpo": ["--input"]}


def make_batch(lengths, sides):
    """Padded inputs whose tokens name their sequence, with a label per row."""
    width = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    ids = torch.arange(1, len(lengths) + 1)[:, None] * mask
    return {"input_ids": ids, "attention_mask": mask, "p_chosen": torch.arange(len(lengths) // sides) / 10}


def test_parts_by_hand():
    # pairs (3, 2), (8, 1), (2, 4), (1, 1): padded to 3, 8, 4 and 1
    batch = make_batch([3, 8, 2, 1, 2, 1, 4, 1], sides=2)
    parts = microbatches.split_batch(batch, tokens=16, sides=2)
    assert [share for _, share in parts] == [0.25, 0.5, 0.25]
    assert [part["input_ids"].tolist() for part, _ in parts] == [
        [[2] * 8, [6] + [0] * 7],
        [[3, 3, 0, 0], [1, 1, 1, 0], [7, 7, 7, 7], [5, 5, 0, 0]],
        [[4], [8]],
    ]
    assert [part["attention_mask"].shape for part, _ in parts] == [(2, 8), (4, 4), (2, 1)]
    assert [[round(p, 1) for p in part["p_chosen"].tolist()] for part, _ in parts] == [[0.1], [0.2, 0.0], [0.3]]
    [(whole, share)] = microbatches.split_batch(batch, tokens=64, sides=2)
    assert share == 1 and sorted(whole["input_ids"].flatten().tolist()) == sorted(batch["input_ids"].flatten().tolist())


def test_figures_of_the_parts_become_one_figure():
    logged = {
        "accuracy": [0.5, 1.0, 0.0],
        "min_reward": [9.0, -1.0, -3.0],
        "num_tokens": [40],
        "max_reward": [0.0, 2.0, 1.0],
    }
    microbatches.merge_metrics(logged, {"accuracy": 1, "min_reward": 1, "num_tokens": 1, "max_reward": 1}, [0.75, 0.25])
    assert logged == {
        "accuracy": [0.5, 0.75], "min_reward": [9.0, -3.0], "num_tokens": [40], "max_reward": [0.0, 2.0]
    }  # fmt: skip


@pytest.fixture
def train(invoke, tmp_path):
    """`train("dpo", "NAME", ...)` trains the small model; returns (weights, rows of metrics.jsonl, stderr)."""

    def call(command, name, *more):
        pairs = [
            {
                "prompt": f"How do I open gate {n}?",
                "chosen": TEXTS[n % 6],
                "rejected": TEXTS[(n + 2) % 6],
                "p_chosen": 0.8,
            }
            for n in range(8)
        ]
        rows = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]
        file, output = tmp_path / f"{command}.jsonl", tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in (rows if command == "sft" else pairs)))
        arguments = ["--model", models.folder("llama"), "--learning-rate", 1e-3, "--epochs", 1, "--batch-size", 4]
        result = invoke(command, *TRAINING[command], file, *arguments, "--output", output, *more)
        assert result.exit_code == 0, result.output
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return load_file(output / "model.safetensors"), metrics, result.stderr

    return call


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINING)
@pytest.mark.parametrize("more", [["--full"], ["--lora", "--gradient-accumulation", 2]], ids=["full", "lora"])
def test_a_batch_in_parts_trains_what_the_whole_batch_trains(train, command, more, monkeypatch):
    whole, whole_metrics, _ = train(command, "whole", *more)
    passes = []
    split = microbatches.split_batch
    monkeypatch.setattr(microbatches, "split_batch", lambda *batch: passes.append(split(*batch)) or passes[-1])
    monkeypatch.setitem(estimate.ACTIVATIONS, "cpu", 1.0)  # one row per part
    parts, metrics, _ = train(command, "parts", *more)
    assert [len(batch) for batch in passes] == [4, 4]
    assert all(torch.allclose(parts[name], whole[name], atol=1e-5) for name in whole)
    assert len(metrics) == len(whole_metrics)
    for ours, theirs in zip(metrics, whole_metrics, strict=True):
        assert ours.keys() == theirs.keys()
        names = [name for name in ours if "loss" in name or "grad" in name or "reward" in name or name == "margin"]
        assert names and all(ours[name] == pytest.approx(theirs[name], abs=2e-4) for name in names), (ours, theirs)


@pytest.mark.slow
def test_activations_are_computed_again_where_memory_is_short_and_change_no_bit(train, monkeypatch):
    kept, _, silent = train("reward_model", "kept", "--lora")
    monkeypatch.setattr(microbatches, "USABLE", 0.0)
    again, _, stderr = train("reward_model", "again", "--lora")
    assert "computed again" not in silent
    assert "activations are computed again instead of kept" in stderr
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_the_bound_follows_the_sizes_of_the_model():
    tiny = estimate.shape_of("tiny")
    assert estimate.bound_tokens(tiny, cpu=True) * estimate.token_bytes(
        tiny, autocast=False, checkpointing=False
    ) == pytest.approx(estimate.ACTIVATIONS["cpu"], rel=0.01)
    # a batch of the main job fits, so that it is trained as it always was
    assert estimate.bound_tokens(tiny, cpu=True) > 2 * 32 * 256
    assert checks.available_memory()[1] > 0


def test_a_large_batch_costs_no_more_than_its_bound():
    lengths = [1000] * 64
    small = estimate.training_plan("tiny", lengths, epochs=1, batch_size=32, device="cpu")["memory_gb"]
    large = estimate.training_plan("tiny", lengths, epochs=1, batch_size=64, device="cpu")["memory_gb"]
    assert small == large and large["activations"] < 3
