"""dpo.py: the value of the soft-label loss, what it trains to, what is left out, and how it goes on."""

import json
import math
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import click
import conftest
import models
import pytest
from launcher import launch

from cai.data import outputs, preferences, readers
from cai.models import loading
from cai.models.engine import Sampling
from cai.models.loading import load_engine
from cai.train import common, dpo

FAST = ("--learning-rate", "1e-3", "--batch-size", "4", "--device", "cpu", "--json")


def pair(number, chosen="I can't help with that.", rejected="Push, then pull.", p=0.9, **more):
    return {
        "id": str(number),
        "prompt": f"How do I open gate {number}?",
        "chosen": chosen,
        "rejected": rejected,
        "p_chosen": p,
        "principle": "x",
        "verdicts": [],
        **more,
    }


def undecided(number):
    return pair(number) | {"chosen": None, "rejected": None, "p_chosen": 0.5}


def written(tmp_path, rows):
    path = tmp_path / "preferences.jsonl"
    outputs.write_jsonl(path, rows)
    return path


def test_pairs_without_a_label_take_the_default(invoke, tmp_path):
    path = written(tmp_path, [pair(1), {**pair(2), "p_chosen": None}])
    args = ("dpo", "--input", path, "--model", models.folder("qwen"), "--output", tmp_path / "out", *FAST)
    refused = invoke(*args)
    assert refused.exit_code == 2 and "p_chosen" in refused.stderr
    result = invoke(*args, "--default-label", "1")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["default_label"]) == (2, 1)
    assert "default_label was" in invoke(*args, "--default-label", "0.9").stderr
    unread = invoke(*args, "--default-label", "0.9", "--labels", "hard")
    assert unread.exit_code == 2 and "every pair is certain" in unread.stderr


def test_human_pairs_count_by_their_weight_and_labels_near_a_toss_up_are_left_out(invoke, tmp_path):
    judged = written(tmp_path, [pair(n, p=0.95 if n % 2 else 0.6) for n in range(40)])
    human = tmp_path / "helpful.jsonl"
    outputs.write_jsonl(human, [{**pair(n), "p_chosen": None} for n in range(100, 116)])
    args = ["dpo", "--input", judged, "--mix", f"{human}=0.25", "--default-label", "1", "--min-margin", "0.5"]
    args += ["--model", models.folder("qwen"), "--output", tmp_path / "out", "--holdout", "0.2", *FAST]
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["rows"], said["below_margin"], said["default_label"]) == (56, 20, 16)
    held_out = [row["prompt"] for _, row in readers.read_jsonl(tmp_path / "out" / "holdout.jsonl")]
    of_humans = sum(len(prompt.rstrip("?").split()[-1]) == 3 for prompt in held_out)
    judged_left = 20 - (len(held_out) - of_humans)
    assert said["steps"] == -(-round(judged_left + 0.25 * (16 - of_humans)) // 4)
    planned = json.loads(invoke(*args[:-1], "--dry-run", "--json", "--overwrite").stdout)
    assert planned["steps"] == said["steps"]
    assert "min_margin was" in invoke(*args[:7], *args[9:]).stderr
    refused = invoke(*args[:4], human, *args[5:])
    assert refused.exit_code == 2 and "FILE=WEIGHT" in refused.stderr
    written(tmp_path, [pair(n, p=0.6) for n in range(8)])
    unsure = invoke(*args, "--overwrite")
    assert unsure.exit_code == 0, "the pairs of people are enough"
    none_left = invoke(*args[:3], *args[5:], "--overwrite")
    assert none_left.exit_code == 2 and "Lower --min-margin" in none_left.stderr


def test_rows_to_train_on_are_counted_where_no_prompt_is_held_out(invoke, tmp_path):
    rows = [pair(1), pair(2), pair(3, rejected="Push, then pull. " * 400)]
    args = ["dpo", "--input", written(tmp_path, rows), "--model", models.folder("qwen"), "--output", tmp_path / "out"]
    result = invoke(*args, "--holdout", "0.01", *FAST)
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["train"], said["held_out"], said["overlong"], said["steps"]) == (2, 0, 1, 1)


def trainer(tmp_path, pairs, *, family="qwen", beta=0.5, apart=False, adapters=None, losses=None, **settings):
    """A trainer over the pairs, in their order. apart: from a reference with other weights."""
    path = str(models.folder(family))
    chat = loading.load_chat(path)
    rows = dpo.tokenize(pairs, chat)
    policy = loading.load_policy(path, dropout=False)
    other = str(models.build(family, tmp_path / "other", seed=1)) if apart else path
    reference = None if adapters else loading.load_policy(other, dropout=False)
    arguments = common.trainer_arguments(
        tmp_path, **{"learning_rate": 1e-3, "batch_size": len(rows), "device": "cpu", "beta": beta, **settings}
    )
    return dpo.make_trainer(policy, reference, chat.tokenizer, rows, arguments, tmp_path, adapters, losses), rows


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_probability(model, row, side):
    """Of a response after its prompt: the sum over its tokens, by a plain forward pass."""
    import torch

    ids = torch.tensor([row["prompt_ids"] + row[side]])
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    start = len(row["prompt_ids"]) - 1
    return logprobs[start:].gather(1, ids[0, start + 1 :, None]).sum().item()


# --- the loss --------------------------------------------------------------------------------------------


def test_the_loss_worked_by_hand(tmp_path):
    import torch

    targets = [0.75, 0.5, 1.0, 0.1]
    pairs = [pair(n, chosen="No. " * (n + 1), p=p) for n, p in enumerate(targets)]
    made, rows = trainer(tmp_path, pairs, beta=0.1, apart=True)
    batch = next(iter(made.get_train_dataloader()))
    assert batch["p_chosen"].tolist() == pytest.approx(targets)
    with torch.no_grad():
        loss = made.compute_loss(made.model, dict(batch)).item()
        by_hand, margins = 0, []
        for row, p in zip(rows, targets, strict=True):
            of = {
                (who, side): log_probability(model, row, side)
                for side in ("chosen_ids", "rejected_ids")
                for who, model in (("policy", made.model), ("reference", made.ref_model))
            }
            d = (
                of["policy", "chosen_ids"]
                - of["reference", "chosen_ids"]
                - of["policy", "rejected_ids"]
                + of["reference", "rejected_ids"]
            )
            margins.append(0.1 * d)
            by_hand += (-p * math.log(sigmoid(0.1 * d)) - (1 - p) * math.log(sigmoid(-0.1 * d))) / 4
    assert max(map(abs, margins)) > 0.3  # far enough apart to tell one formula from another
    assert loss == pytest.approx(by_hand, rel=1e-4)
    hard = sum(-math.log(sigmoid(margin)) for margin in margins) / 4
    assert abs(loss - hard) > 0.05


@pytest.mark.parametrize("loss", ["ipo", "simpo"])
def test_losses_per_token_worked_by_hand(tmp_path, loss):
    import torch

    targets = [0.75, 0.5, 1.0, 0.1]
    pairs = [pair(n, chosen="No. " * (n + 1), p=p) for n, p in enumerate(targets)]
    # As the command calls it, whose command line has no option without effect.
    with click.Context(click.Command("dpo")):
        _, losses = dpo.choose_loss(loss, 0.7, 0.4 if loss == "simpo" else None)
    made, rows = trainer(tmp_path, pairs, beta=0.7, apart=True, losses=losses)
    with torch.no_grad():
        batch = dict(next(iter(made.get_train_dataloader())))
        value = made.compute_loss(made.model, batch).item()
        by_hand = 0
        for row, p in zip(rows, targets, strict=True):
            d = 0
            for side, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
                ratio = log_probability(made.model, row, side)
                ratio -= log_probability(made.ref_model, row, side) if loss == "ipo" else 0
                d += sign * ratio / len(row[side])
            if loss == "ipo":
                by_hand += (p * (d - 1 / 1.4) ** 2 + (1 - p) * (d + 1 / 1.4) ** 2) / 4
            else:
                by_hand -= (p * math.log(sigmoid(0.7 * d - 0.4)) + (1 - p) * math.log(sigmoid(-0.7 * d - 0.4))) / 4
    assert value == pytest.approx(by_hand, rel=1e-4)


def test_with_adapters_the_reference_is_the_policy_without_them(tmp_path):
    import torch

    targets = [0.75, 1.0]
    made, rows = trainer(tmp_path, [pair(n, p=p) for n, p in enumerate(targets)], adapters=common.lora_config(4))
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
        loss = made.compute_loss(made.model, dict(next(iter(made.get_train_dataloader())))).item()
        by_hand = 0
        for row, p in zip(rows, targets, strict=True):
            d = log_probability(made.model, row, "chosen_ids") - log_probability(made.model, row, "rejected_ids")
            with made.model.disable_adapter():
                d -= log_probability(made.model, row, "chosen_ids") - log_probability(made.model, row, "rejected_ids")
            by_hand += (-p * math.log(sigmoid(0.5 * d)) - (1 - p) * math.log(sigmoid(-0.5 * d))) / 2
    assert abs(by_hand - math.log(2)) > 0.1
    assert loss == pytest.approx(by_hand, rel=1e-4)


def test_a_lost_label_is_an_error_and_not_the_hard_loss(tmp_path):
    made, _ = trainer(tmp_path, [pair(1)])
    batch = dict(next(iter(made.get_train_dataloader())))
    del batch["p_chosen"]
    with pytest.raises(KeyError):
        made.compute_loss(made.model, batch)


@pytest.mark.slow
def test_soft_labels_train_to_their_target_and_hard_ones_beyond(tmp_path):
    import torch

    probability = {}
    for labels in ("soft", "hard"):
        folder = tmp_path / labels
        folder.mkdir()
        pairs = preferences.read_pairs([str(written(folder, [pair(1, p=0.75)]))], labels, None)[0]
        made, rows = trainer(folder, pairs * 120, batch_size=1, learning_rate=3e-4)
        common.run_trainer(made, folder)
        made.model.eval()
        with torch.no_grad():
            of = [
                log_probability(model, rows[0], side)
                for model in (made.model, made.ref_model)
                for side in ("chosen_ids", "rejected_ids")
            ]
        probability[labels] = sigmoid(0.5 * (of[0] - of[1] - of[2] + of[3]))
    assert probability["soft"] == pytest.approx(0.75, abs=0.02)
    assert probability["hard"] > 0.95


# --- rows ------------------------------------------------------------------------------------------------


def test_rows_as_the_judge_writes_them(tmp_path):
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "A."},
        {"role": "user", "content": "And B?"},
    ]
    path = written(tmp_path, [pair(1), undecided(2), pair(3, prompt=turns), pair(4, rejected="Push. " * 100)])
    pairs, counts, _ = preferences.read_pairs([str(path)], "soft", None)
    assert counts == {"rows": 4, "undecided": 1} and len(pairs) == 3
    chat = loading.load_chat(str(models.folder("qwen")))
    options = SimpleNamespace(max_length=100, batch_size=1, epochs=1, seed=0)
    rows = dpo.tokenize(pairs, chat)
    kept, overlong = common.drop_overlong(rows, dpo.row_length, options)
    assert overlong == 1 and [row["p_chosen"] for row in kept] == [0.9, 0.9] and rows[2] not in kept
    assert rows[1]["prompt_ids"] == chat.encode(chat.render(turns))  # every turn is kept
    assert rows[0]["chosen_ids"][-1] == rows[0]["rejected_ids"][-1] == chat.stop_id


# --- the command -----------------------------------------------------------------------------------------


def many(tmp_path, n=48):
    return written(
        tmp_path, [undecided(0), *(pair(i, p=0.7 + i % 3 / 10) for i in range(1, n)), pair(n, rejected="Push. " * 2000)]
    )


@pytest.mark.parametrize("adapters", [False, True])
def test_it_prefers_what_is_chosen_and_is_read_back(invoke, tmp_path, adapters):
    path, out = many(tmp_path), tmp_path / "out"
    args = [
        "dpo",
        "--input",
        path,
        "--model",
        models.folder("llama"),
        "--output",
        out,
        *FAST,
        *(["--lora", "--lora-rank", "4"] if adapters else []),
    ]
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["rows"], said["undecided"], said["overlong"], said["steps"]) == (49, 1, 1, 12)
    assert said["accuracy"] == 1.0 and said["margin"] > 0.1 and "evaluate.py" in said["next"]
    log = [row for _, row in readers.read_jsonl(out / "metrics.jsonl")]
    assert [log[0]["loss"], log[0]["rewards/chosen"]] == pytest.approx([math.log(2), 0], abs=1e-4)
    assert log[-2]["loss"] < log[0]["loss"] and {"rewards/margins", "logps/chosen", "seconds"} <= set(log[0])

    assert not (out / "checkpoints").exists() and (out / "adapter").exists() == adapters
    before = loading.load_policy(str(models.folder("llama"))).state_dict()
    after = loading.load_policy(str(out)).state_dict()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and (not adapters or all("_proj" in name for name in changed))
    engine = load_engine(str(out), device="cpu")
    [answer] = models.generate(engine, [[{"role": "user", "content": "A?"}]], Sampling(max_new_tokens=3), [1])
    assert answer.tokens
    # Settings of the checkpoint, which training has no business with, are still there.
    assert json.loads((out / "generation_config.json").read_text())["repetition_penalty"] == 1.5
    manifest = json.loads((tmp_path / "out.run.json").read_text())
    assert manifest["status"] == "done" and manifest["fingerprint"]["beta"] == 0.1

    again = invoke(*args)
    assert again.exit_code == 0 and json.loads(again.stdout)["margin"] == said["margin"]
    other = invoke(*args, "--beta", "0.3")
    assert other.exit_code == 2 and "beta was 0.1, now 0.3" in other.stderr


def test_held_out_pairs_are_measured_and_written(invoke, tmp_path):
    path, out = many(tmp_path, 60), tmp_path / "out"
    args = ["dpo", "--input", path, "--model", models.folder("llama"), "--output", out, *FAST, "--holdout", "0.2"]
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["train"] + summary["held_out"] + summary["overlong"] + summary["undecided"] == summary["rows"] == 61
    assert summary["holdout"]["pairs"] == summary["held_out"] > 5 and summary["steps"] == -(-summary["train"] // 4)
    assert "--pairs" in summary["next"] and "holdout.jsonl --reference" in summary["next"]
    rows = [row for _, row in readers.read_jsonl(out / "holdout.jsonl")]
    measures = json.loads((out / "holdout.json").read_text())
    margins, outright = [], []
    chat = loading.load_chat(str(models.folder("llama")))
    policy, reference = (loading.load_policy(str(folder)).eval() for folder in (out, models.folder("llama")))
    for row in dpo.tokenize([row for row in rows if len(row["rejected"]) < 1000], chat):
        of = [
            log_probability(model, row, side)
            for model in (policy, reference)
            for side in ("chosen_ids", "rejected_ids")
        ]
        margins.append(of[0] - of[1] - of[2] + of[3])
        outright.append(of[0] > of[1])
    assert len(margins) == measures["pairs"] and min(map(abs, margins)) > 0.01
    assert measures["relative"]["value"] == sum(margin > 0 for margin in margins) / len(margins)
    assert measures["outright"]["value"] == sum(outright) / len(outright)
    assert measures["logp_margin"]["value"] == pytest.approx(sum(margins) / len(margins), abs=1e-3)
    text = invoke(*[a for a in args if a != "--json"]).stdout  # of the finished run
    assert "moved towards the chosen     yes" in text and "held-out logp margin" in text
    assert "holdout was 0.2, now 0.3" in invoke(*args[:-1], "0.3").stderr
    result = invoke(*args[:-1], "0.999999", "--dry-run")
    assert result.exit_code == 2 and "pairs are held out" in result.stderr


def test_a_reference_of_its_own(invoke, tmp_path):
    path = many(tmp_path, 8)
    reference = models.build("llama", tmp_path / "reference", seed=3)
    result = invoke(
        "dpo",
        "--input",
        path,
        "--model",
        models.folder("llama"),
        "--ref-model",
        reference,
        "--output",
        tmp_path / "out",
        *FAST,
        "--lora",
        "--beta",
        "1",
    )
    assert result.exit_code == 0, result.output
    first = next(row for _, row in readers.read_jsonl(tmp_path / "out" / "metrics.jsonl"))
    assert abs(first["rewards/chosen"]) > 0.1  # 0 is what a policy that is its own reference begins with


def test_a_dry_run_writes_nothing(invoke, tmp_path):
    result = invoke(
        "dpo",
        "--input",
        many(tmp_path),
        "--model",
        models.folder("qwen"),
        "--output",
        tmp_path / "out",
        "--dry-run",
        "--json",
    )
    said = json.loads(result.stdout)
    assert result.exit_code == 0 and said["rows"] == 48 and said["undecided"] == 1 and said["steps"] == 6
    assert said["memory_gb"]["frozen_models"] > 0 and [p.name for p in tmp_path.iterdir()] == ["preferences.jsonl"]


def test_bad_input_is_refused_and_nothing_written(invoke, tmp_path):
    cases = [
        ([pair(1), pair(2, p="high")], (), "2: p_chosen is 'high'"),
        ([undecided(1)], (), "no decided pair"),
        ([pair(1)], ("--max-length", 4), "all 1 rows are longer"),
        ([pair(1)], ("--beta", 0), "--beta"),
        ([pair(1)], ("--device", "tpu"), "tpu"),
        ([pair(1)], ("--ref-model", tmp_path / "nowhere"), "nowhere"),
        ([pair(1)], ("--ref-model", models.folder("mistral")), "a vocabulary of"),
    ]
    for rows, more, message in cases:
        path = written(tmp_path, rows)
        result = invoke("dpo", "--input", path, "--model", models.folder("qwen"), "--output", tmp_path / "out", *more)
        assert result.exit_code == 2 and message in result.stderr, (message, result.output)
        assert [p.name for p in tmp_path.iterdir()] == ["preferences.jsonl"], message
    assert (
        invoke(
            "dpo",
            "--input",
            written(tmp_path, [pair(1, p=None)]),
            "--model",
            models.folder("qwen"),
            "--output",
            tmp_path / "out",
            *FAST,
            "--labels",
            "hard",
        ).exit_code
        == 0
    )


def test_a_loss_that_is_no_number_stops_the_run(invoke, tmp_path):
    result = invoke(
        "dpo",
        "--input",
        many(tmp_path, 24),
        "--model",
        models.folder("qwen"),
        "--output",
        tmp_path / "out",
        *FAST,
        "--learning-rate",
        "1e30",
    )
    assert result.exit_code == 1 and "the loss is not finite at step" in result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_killed_and_started_again_it_ends_as_if_it_had_not_been(invoke, tmp_path):
    path = many(tmp_path, 60)

    def line(name):
        return [
            str(a)
            for a in (
                "--input",
                path,
                "--model",
                models.folder("llama"),
                "--output",
                tmp_path / name,
                *FAST,
                "--save-steps",
                2,
            )
        ]

    process = subprocess.Popen(
        [sys.executable, str(conftest.ROOT / "scripts" / "dpo.py"), *line("killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    states, until = tmp_path / "killed" / "checkpoints", time.monotonic() + 200
    while not list(states.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "config.json").exists()
    for name in ("killed", "whole"):
        result = invoke("dpo", *line(name))
        assert result.exit_code == 0, result.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]
    steps = [
        [row["step"] for _, row in readers.read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("killed", "whole")
    ]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_other_losses_are_trained_by_the_command(invoke, tmp_path):
    path, model = many(tmp_path, 12), models.folder("qwen")
    line = ["--input", path, "--model", model, *FAST]
    for loss in ("ipo", "simpo"):
        result = invoke("dpo", *line, "--output", tmp_path / loss, "--loss", loss)
        assert result.exit_code == 0, result.output
    other = invoke("dpo", *line, "--output", tmp_path / "simpo", "--loss", "simpo", "--target-margin", 0.5)
    assert other.exit_code == 2 and "target_margin" in other.stderr  # another run's output
    refused = invoke("dpo", *line, "--output", tmp_path / "x", "--target-margin", 0.5)
    assert refused.exit_code == 2 and "only --loss simpo has it" in refused.stderr


@pytest.mark.slow
def test_two_processes_train_what_one_does(invoke, tmp_path):
    import torch
    from safetensors.torch import load_file

    path = many(tmp_path, 40)
    args = ["--input", path, "--model", models.folder("qwen"), *FAST]
    done = launch("dpo", *args, "--output", tmp_path / "two", timeout=240)
    assert done.returncode == 0, done.stderr
    one = invoke("dpo", *args, "--output", tmp_path / "one", "--gradient-accumulation", "2")
    assert one.exit_code == 0, one.output
    two, one = json.loads(done.stdout.splitlines()[-1]), json.loads(one.stdout)
    assert two["steps"] == one["steps"] and two["overlong"] == one["overlong"] == 1
    assert two["margin"] == pytest.approx(one["margin"], rel=2e-2)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[1])
