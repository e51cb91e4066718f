"""reward_model.py: what is trained on and what is left out, mixing, stopping, resuming, and what is saved."""

import json
import os
import signal
import subprocess
import sys
import time

import conftest
import launcher
import models
import pytest

from cai.data import outputs, readers
from cai.data.dialogue import as_messages
from cai.data.preferences import is_held_out
from cai.models import loading
from cai.models.scorer import load_scorer
from cai.train import reward_model

FAST = ("--learning-rate", "2e-3", "--batch-size", "8", "--device", "cpu", "--json")


def pair(number, chosen="I can't help with that.", rejected="Push, then pull.", p=0.9, **more):
    return {
        "id": str(number),
        "prompt": f"How do I open gate {number}?",
        "chosen": chosen,
        "rejected": rejected,
        "p_chosen": p,
        "principle": "x",
        **more,
    }


def written(tmp_path, rows, name="preferences.jsonl"):
    path = tmp_path / name
    outputs.write_jsonl(path, rows)
    return path


def preferences(tmp_path, n=200, name="preferences.jsonl"):
    """Pairs where the polite answer wins, with a chosen probability that is not always the same."""
    polite = ["I can't help with that.", "Ask the owner for a key.", "I would not, because it would hurt someone."]
    rude = ["Push the gate and pull the bar.", "Lift it.", "Here is what I would do: push."]
    return written(tmp_path, [pair(n, polite[n % 3], rude[n // 3 % 3], 0.8 + n % 3 / 10) for n in range(n)], name)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_it_learns_what_is_preferred_and_is_read_back(invoke, tmp_path, adapters):
    path, out = preferences(tmp_path), tmp_path / "out"
    args = [
        "reward_model",
        "--input",
        path,
        "--model",
        models.folder("gemma2"),
        "--output",
        out,
        *FAST,
        "--epochs",
        "2",
        *(["--lora", "--lora-rank", "8"] if adapters else []),
    ]
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["train"] + summary["held_out"] == 200 and summary["holdout"]["pairs"] == summary["held_out"] > 5
    assert summary["holdout"]["accuracy"]["value"] > 0.95
    assert summary["holdout"]["least"] < summary["holdout"]["log_loss"] < 0.5
    assert "ppo.py" in summary["next"] and not (out / "checkpoints").exists()
    log = [row for _, row in readers.read_jsonl(out / "metrics.jsonl")]
    assert log[0]["loss"] > log[-2]["loss"] and "accuracy" in log[0]

    scorer = load_scorer(str(out), device="cpu")
    assert scorer.temperature == pytest.approx(summary["holdout"]["temperature"]) != 1.0
    pairs = [row for _, row in readers.read_jsonl(path) if is_held_out(row["prompt"], 0.1, 0)]
    texts = [(as_messages(row["prompt"]), row[side]) for side in ("chosen", "rejected") for row in pairs]
    rows, _ = reward_model.tokenize(pairs, scorer.chat, 1024)
    found = reward_model.measure(scorer.scores(texts), rows)
    assert found["log_loss"] == pytest.approx(summary["holdout"]["log_loss"], rel=1e-3)
    kept = json.loads((out / "holdout.json").read_text())
    assert kept["log_loss"] == summary["holdout"]["log_loss"] and set(kept) == set(found)
    assert (out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "longer" in invoke(*[one for one in args if one != "--json"]).stdout
    assert json.loads(invoke(*args).stdout)["holdout"] == summary["holdout"]
    assert "labels was" in invoke(*args, "--labels", "hard").stderr


def test_the_blocks_before_the_first_that_is_trained_stay_as_they_are(invoke, tmp_path):
    out, model = tmp_path / "out", models.folder("gemma2")
    last = loading.read_blocks(str(model)) - 1
    args = ("--input", preferences(tmp_path, 8), "--model", model, "--output", out, *FAST, "--holdout", 0)
    assert invoke("reward_model", *args, "--first-layer", last).exit_code == 0
    changed = models.changed_weights(model, out)
    assert changed and all(name.startswith((f"model.layers.{last}.", "model.norm")) for name in changed)


@pytest.mark.slow
def test_a_reward_model_can_be_trained_on(invoke, tmp_path):
    path = preferences(tmp_path, 60)
    args = ["reward_model", "--input", path, *FAST]
    first = invoke(*args, "--model", models.folder("llama"), "--output", tmp_path / "first", "--epochs", "4")
    second = invoke(*args, "--model", tmp_path / "first", "--output", tmp_path / "second", "--epochs", "1")
    assert first.exit_code == second.exit_code == 0, first.stderr + second.stderr
    logs = [[row for _, row in readers.read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("first", "second")]
    assert logs[1][0]["loss"] < logs[0][0]["loss"] - 0.1  # the head was kept


def test_a_dry_run_writes_nothing(invoke, tmp_path):
    path = preferences(tmp_path, 50)
    result = invoke(
        "reward_model",
        "--input",
        path,
        "--model",
        models.folder("qwen"),
        "--output",
        tmp_path / "out",
        "--dry-run",
        "--json",
        "--holdout",
        "0",
    )
    summary = json.loads(result.stdout)
    assert result.exit_code == 0 and summary["rows"] == 50 and summary["steps"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["preferences.jsonl"]


@pytest.mark.slow
def test_two_processes_train_what_one_does(invoke, tmp_path):
    import torch
    from safetensors.torch import load_file

    path = preferences(tmp_path, 40)
    args = [
        "--input",
        path,
        "--model",
        models.folder("qwen"),
        "--learning-rate",
        "1e-3",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--holdout",
        "0.2",
        "--eval-steps",
        "2",
        "--patience",
        "9",
        "--json",
    ]
    done = launcher.launch("reward_model", *args, "--output", tmp_path / "two", timeout=240)
    assert done.returncode == 0, done.stderr
    one = invoke("reward_model", *args, "--output", tmp_path / "one", "--gradient-accumulation", "2")
    two, one = json.loads(done.stdout.splitlines()[-1]), json.loads(one.stdout)
    assert two["steps"] == one["steps"] and two["train"] == one["train"] < 40
    assert two["holdout"]["log_loss"] == pytest.approx(one["holdout"]["log_loss"], rel=1e-2)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[1])


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([pair(1, p=1.5)], (), "preferences.jsonl:1: p_chosen is '1.5'; expected a probability"),
        ([pair(1, p=None)], (), "--labels hard"),
        ([pair(1), pair(2, rejected=None)], (), "preferences.jsonl:2: 'rejected' is null"),
        ([pair(1, chosen=None, rejected=None)], (), "no decided pair"),
        ([pair(1, chosen="Same. ", rejected="Same.")], (), "'identical': 1"),
        ([pair(1)], ("--mix", "more.jsonl"), "FILE=WEIGHT"),
        ([pair(1)], ("--mix", "more.jsonl=0"), "a weight above 0"),
        ([pair(1)], ("--mix", "more.jsonl=many"), "FILE=WEIGHT"),
        ([pair(1)], ("--mix", "preferences.jsonl=2"), "the same input twice"),
        ([pair(1)], ("--input", "preferences.jsonl"), "the same input twice"),
        ([pair(1)], ("--mix", "no-such.jsonl=2"), "no-such.jsonl: no such file"),
        ([pair(1)], ("--patience", "2", "--holdout", "0"), "no pair is held out to evaluate on"),
        ([pair(1, rejected="Push. " * 20_000)], ("--holdout", "0"), "all 1 pairs are longer"),
    ],
)
def test_what_is_refused_and_nothing_written(invoke, tmp_path, monkeypatch, rows, more, said):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, rows)
    result = invoke(
        "reward_model", "--input", "preferences.jsonl", "--model", models.folder("qwen"), "--output", "out", *more
    )
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["preferences.jsonl"]


def test_every_row_is_accounted_for(invoke, tmp_path):
    rows = [pair(n, p=0.9) for n in range(20)]
    rows += [
        pair(20, None, None),
        pair(21, "Same.", "Same."),
        pair(22, p=0.55),
        pair(23, rejected=""),
        pair(24, rejected="Push. " * 17_000),
    ]
    result = invoke(
        "reward_model",
        "--input",
        written(tmp_path, rows),
        "--model",
        models.folder("qwen"),
        "--output",
        tmp_path / "out",
        *FAST,
        "--min-margin",
        "0.2",
        "--holdout",
        "0.2",
    )
    said = json.loads(result.stdout)
    assert (said["rows"], said["undecided"], said["identical"], said["below_margin"], said["overlong"]) == (
        25,
        1,
        1,
        1,
        1,
    )
    assert said["train"] + said["held_out"] == 21


@pytest.mark.slow
def test_all_of_hh_rlhf_is_accounted_for(invoke, tmp_path, shared_data):
    file = shared_data / "hh-rlhf" / "harmless-base.test.first1500.jsonl.gz"
    result = invoke(
        "reward_model",
        "--input",
        file,
        "--model",
        models.folder("qwen"),
        "--output",
        tmp_path / "out",
        *FAST,
        "--labels",
        "hard",
        "--epochs",
        "0.05",
        "--max-length",
        "200",
        "--holdout",
        "0.02",
    )
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["rows"] == said["train"] + said["held_out"] + said["overlong"] + said["undecided"] == 1500
    assert said["train"] > 100 and said["overlong"] > 100 and said["undecided"] == 0


# --- sources ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sources_are_mixed_by_weight_and_measured_apart(invoke, tmp_path):
    judged = preferences(tmp_path, 120)
    human = written(
        tmp_path,
        [
            {
                "prompt": f"What is gate {n} made of?",
                "chosen": "It is made of oak.",
                "rejected": "I can't help with that.",
            }
            for n in range(80)
        ],
        "helpful.jsonl",
    )
    args = [
        "reward_model",
        "--input",
        judged,
        "--mix",
        f"{human}=0.5",
        "--model",
        models.folder("gemma2"),
        *FAST,
        "--holdout",
        "0.2",
        "--epochs",
        "2",
    ]
    result = invoke(*args, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "helpful.jsonl:1: p_chosen is 'None'" in result.stderr
    args += ["--default-label", "1", "--output", tmp_path / "out"]
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["rows"], said["default_label"], said["train"] + said["held_out"]) == (200, 80, 200)
    found = json.loads((tmp_path / "out" / "holdout.json").read_text())["by_source"]
    assert set(found) == {str(judged), str(human)}
    assert found[str(judged)]["n"] + found[str(human)]["n"] == said["held_out"]
    trained = {str(judged): 120 - found[str(judged)]["n"], str(human): 80 - found[str(human)]["n"]}
    assert said["steps"] == -(-round(2 * (trained[str(judged)] + 0.5 * trained[str(human)])) // 8)
    assert "input was" in invoke(*args[:4], f"{human}=2", *args[5:]).stderr


# --- stopping and going on -------------------------------------------------------------------------------


def noisy(tmp_path, n=120):
    """Pairs whose label is a coin's: whatever is learned by heart, the held-out loss rises."""
    words = ["push", "pull", "lift", "key", "oak", "bar", "gate", "rope"]
    rows = [
        pair(
            n,
            f"{words[n % 8]} {words[n // 8 % 8]}.",
            f"{words[n // 3 % 8]} {words[n // 5 % 8]} it.",
            p=1.0 if n * 2654435761 % 7 < 4 else 0.0,
        )
        for n in range(n)
    ]
    return written(tmp_path, rows)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_it_stops_when_the_held_out_loss_rises_and_keeps_the_best(invoke, tmp_path):
    path, out = noisy(tmp_path), tmp_path / "out"
    result = invoke(
        "reward_model",
        "--input",
        path,
        "--model",
        models.folder("qwen"),
        "--output",
        out,
        *FAST,
        "--epochs",
        "40",
        "--holdout",
        "0.3",
        "--patience",
        "2",
        "--eval-steps",
        "4",
    )
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    log = [row for _, row in readers.read_jsonl(out / "metrics.jsonl")]
    losses = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert said["steps"] == best + 2 * 4 == max(losses) < 400
    assert list(losses) == list(range(4, said["steps"] + 1, 4))
    assert said["holdout"]["log_loss"] == pytest.approx(losses[best], rel=1e-5)


def launch(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = str(conftest.ROOT / "scripts" / "reward_model.py")
    return subprocess.Popen(
        [sys.executable, script, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def saved_states(folder, waiting: bool) -> list:
    """States saved so far; if `waiting`, those after a look that was no better, which a resumed run must remember."""
    found = []
    for path in folder.glob("checkpoints/checkpoint-*/trainer_state.json"):
        try:
            callbacks = json.loads(path.read_text())["stateful_callbacks"]
        except (OSError, ValueError):  # being written or deleted
            continue
        counter = callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
        if not waiting or counter["early_stopping_patience_counter"]:
            found.append(path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--save-steps", "10"), ("--patience", "4", "--eval-steps", "5")])
def test_killed_and_run_again_it_ends_with_the_same_weights(invoke, tmp_path, more):
    import torch

    args = [
        "--input",
        preferences(tmp_path, 60) if more[0] == "--save-steps" else noisy(tmp_path),
        "--model",
        models.folder("qwen"),
        *FAST,
        "--epochs",
        "30",
        "--holdout",
        "0.3",
        *more,
    ]
    process = launch(*args, "--output", tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not saved_states(tmp_path / "killed", waiting=more[0] == "--patience"):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    torch.set_num_threads(1)
    said = {}
    for name in ("killed", "whole"):
        result = invoke("reward_model", *args, "--output", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        said[name] = json.loads(result.stdout)
    assert said["killed"]["steps"] == said["whole"]["steps"] >= 20
    assert said["killed"]["holdout"] == said["whole"]["holdout"]
    killed, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_an_ending_of_the_template_is_kept_with_the_model_and_scored(invoke, tmp_path):
    """Gemma's template writes a line break after the end token, at which the score is then read."""
    import models

    from cai.models import scorer

    pairs = [{"prompt": f"Is it {n}?", "chosen": f"So {n}.", "rejected": "No.", "p_chosen": 0.9} for n in range(4)]
    outputs.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for ending in ("eos", "template"):
        output = tmp_path / ending
        result = invoke("reward_model", "--input", tmp_path / "pairs.jsonl", "--model", models.folder("gemma2"),
                        "--ending", ending, "--holdout", 0, "--device", "cpu", "--output", output)  # fmt: skip
        assert result.exit_code == 0, result.output
        chat = scorer.load_scorer(str(output), device="cpu").chat
        assert chat.tail == ("\n" if ending == "template" else "")
        config = json.loads((output / "config.json").read_text())
        assert config.get("score_ending", "eos") == ending and ("score_ending" in config) == (ending != "eos")
