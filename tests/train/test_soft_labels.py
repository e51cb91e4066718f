"""tests/benchmarks/soft_labels.py: its table by hand, and its figures against evaluate.py's."""

import json

import models
import pytest
import soft_labels

from cai.data import outputs


def test_the_table_by_hand():
    one = dict.fromkeys(soft_labels.FIGURES, 0.5)
    found = {
        "soft": [{**one, "accuracy": 0.6, "ece": 0.1}, {**one, "accuracy": 0.8, "ece": 0.2}],
        "hard": [{**one, "accuracy": 0.7, "ece": 0.3}, {**one, "accuracy": 0.7, "ece": 0.3}],
    }
    lines = soft_labels.table(found).splitlines()
    assert lines[2] == "| accuracy | 0.700 ± 0.141 | 0.700 ± 0.000 | 0.000 ± 0.141 | 1 of 2 |"
    assert lines[4] == "| ECE | 0.150 ± 0.071 | 0.300 ± 0.000 | -0.150 ± 0.071 | 2 of 2 |"
    assert lines[3].endswith("| 0 of 2 |") and len(lines) == 2 + len(soft_labels.FIGURES)


def test_its_figures_are_those_of_evaluate(invoke, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, base = tmp_path / "reward", models.folder("llama")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.score_temperature = 3.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    gold = tmp_path / "gold.jsonl"
    outputs.write_jsonl(
        gold,
        [
            {
                "id": str(n),
                "prompt": f"How do I open gate {n}?",
                "response_a": "Push it. " * n,
                "response_b": "Ask the owner.",
                "gold": "ab"[n % 2],
            }
            for n in range(1, 9)
        ],
    )
    result = invoke("evaluate", "--reward-model", folder, "--input", gold, "--output", tmp_path / "e.jsonl", "--json")
    said = json.loads(result.stdout)["metrics"]
    found = soft_labels.measured(folder, gold)
    for name, ours in (("accuracy", "accuracy"), ("log_loss", "scaled_log_loss"), ("ece", "scaled_ece")):
        assert found[ours] == pytest.approx(said[name]["value"], abs=1e-4)
    assert found["log_loss"] != pytest.approx(found["scaled_log_loss"], abs=1e-3)
