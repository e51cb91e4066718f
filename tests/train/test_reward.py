"""train/reward_model.py: the soft-label loss, what it trains to, and what is measured on held-out pairs."""

import json
import math

import models
import pytest

from cai.base.errors import CaiError
from cai.data import preferences
from cai.models import loading
from cai.models.scorer import load_scorer, score_sequences
from cai.stats import calibration, intervals
from cai.train import common, reward_model


def pair(number, chosen="I can't help with that.", rejected="Push, then pull.", p=0.9, **more):
    return {"prompt": f"How do I open gate {number}?", "chosen": chosen, "rejected": rejected, "p_chosen": p, **more}


def trainer(tmp_path, pairs, **settings):
    """A trainer over the pairs, in their order."""
    from transformers import set_seed

    chat = loading.load_chat(str(models.folder("qwen")))
    rows, _ = reward_model.tokenize(pairs, chat, 512)
    set_seed(0)
    model = loading.load_reward_model(str(models.folder("qwen")))
    arguments = common.trainer_arguments(
        tmp_path, **{"learning_rate": 2e-3, "batch_size": len(rows), "device": "cpu", **settings}
    )
    return reward_model.make_trainer(model, chat.tokenizer, rows, arguments, tmp_path), rows, chat


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
    terms = [
        -p * math.log(sigmoid(c - r)) - (1 - p) * math.log(sigmoid(r - c))
        for p, c, r in zip(targets, chosen, rejected, strict=True)
    ]
    by_hand = sum(terms) / 4
    if center:
        by_hand += center * sum((c + r) ** 2 for c, r in zip(chosen, rejected, strict=True)) / 4
    assert max(abs(c - r) for c, r in zip(chosen, rejected, strict=True)) > 0.3
    assert loss == pytest.approx(by_hand, rel=1e-5)
    scores = score_sequences(made.model, chat.tokenizer.pad_token_id, [row["chosen_ids"] for row in rows], 2)
    assert scores == pytest.approx(chosen, abs=1e-4)


def test_a_lost_label_is_an_error_and_not_the_hard_loss(tmp_path):
    made, _, _ = trainer(tmp_path, [pair(1)])
    batch = dict(next(iter(made.get_train_dataloader())))
    del batch["p_chosen"]
    with pytest.raises(KeyError):
        made.compute_loss(made.model, batch)


@pytest.mark.slow
def test_soft_labels_train_to_their_target_and_hard_ones_beyond(tmp_path):
    probability = {}
    for label in (0.75, 1.0):
        made, rows, chat = trainer(tmp_path / str(label), [pair(1, p=label)] * 300, batch_size=4)
        common.run_trainer(made, tmp_path / str(label))
        scores = score_sequences(
            made.model, chat.tokenizer.pad_token_id, [rows[0]["chosen_ids"], rows[0]["rejected_ids"]], 2
        )
        probability[label] = sigmoid(scores[0] - scores[1])
    assert probability[0.75] == pytest.approx(0.75, abs=0.02)
    assert probability[1.0] > 0.95


def test_dropout_is_off(tmp_path):
    folder = models.copy("qwen", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    chat, model = loading.load_chat(str(folder)), loading.load_reward_model(str(folder))
    rows, _ = reward_model.tokenize([pair(1)], chat, 512)
    arguments = common.trainer_arguments(tmp_path, learning_rate=1e-3, batch_size=1, device="cpu")
    made = reward_model.make_trainer(model, chat.tokenizer, rows, arguments, tmp_path)
    made.model.train()
    batch = next(iter(made.get_train_dataloader()))
    losses = {made.compute_loss(made.model, dict(batch)).item() for _ in range(4)}
    assert len(losses) == 1


# --- rows ------------------------------------------------------------------------------------------------


def test_a_prompts_pairs_are_held_out_together():
    prompts = [f"prompt {n}" for n in range(2000)]
    out = {p for p in prompts if preferences.is_held_out(p, 0.1, seed=0)}
    assert 150 < len(out) < 250
    assert out == {p for p in prompts if preferences.is_held_out([{"role": "user", "content": p}], 0.1, seed=0)}
    assert out != {p for p in prompts if preferences.is_held_out(p, 0.1, seed=1)}
    assert not any(preferences.is_held_out(p, 0.0, seed=0) for p in prompts)


def test_overlong_pairs_are_counted():
    chat = loading.load_chat(str(models.folder("qwen")))
    pairs = [pair(1), pair(2, rejected="Push. " * 100)]
    kept, overlong = reward_model.tokenize(pairs, chat, 100)
    assert overlong == 1 and len(kept) == 1
    assert kept[0]["chosen_ids"][-1] == kept[0]["rejected_ids"][-1] == chat.stop_id


def test_weights_say_how_often_a_pair_comes():
    chat = loading.load_chat(str(models.folder("qwen")))
    pairs = [pair(n, weight=1.0 if n < 40 else 0.25) for n in range(80)]
    rows, _ = reward_model.tokenize(pairs, chat, 100)
    order = reward_model.training_order(rows, 8, 4, seed=0)
    assert len(order) == 4 * 50
    times = [order.count(n) for n in range(80)]
    assert sum(times[:40]) == pytest.approx(160, abs=4) and sum(times[40:]) == pytest.approx(40, abs=4)
    assert set(times[:40]) == {4} and max(times[40:]) <= 3
    even = reward_model.training_order([{**row, "weight": 1.0} for row in rows], 8, 1, seed=0)
    lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    assert even == common.training_order(lengths, 8, 1, seed=0)


# --- what is measured ------------------------------------------------------------------------------------


def row(p, chosen=1, rejected=1, prompt=None, source="x"):
    return {
        "p_chosen": p,
        "chosen_length": chosen,
        "rejected_length": rejected,
        "source": source,
        "prompt": prompt if prompt is not None else f"{p} {chosen} {rejected} {source}",
    }


def test_what_is_measured_on_held_out_pairs():
    rows = [row(0.8, 20, 10), row(1.0, 10, 20, source="y"), row(0.6, 20, 10)]
    found = reward_model.measure([1.0, 0.0, 2.0, 0.0, 1.0, 2.0], rows)  # margins 1, -1, 0
    assert found["pairs"] == 3
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (pytest.approx(1 / 3), 3)
    assert found["longer"]["value"] == pytest.approx(2 / 3)
    terms = [-0.8 * math.log(sigmoid(1)) - 0.2 * math.log(sigmoid(-1)), -math.log(sigmoid(-1)), math.log(2)]
    assert found["log_loss"] == pytest.approx(sum(terms) / 3)
    entropies = [-0.8 * math.log(0.8) - 0.2 * math.log(0.2), 0, -0.6 * math.log(0.6) - 0.4 * math.log(0.4)]
    assert found["least"] == pytest.approx(sum(entropies) / 3)
    # Preferred sides: chosen by σ(1) = 0.731 (label 0.8), rejected by 0.731 (label 0), a tie by 0.5 (label 0.4).
    assert found["ece"]["value"] == pytest.approx((2 * (sigmoid(1) - 0.4) + 0.1) / 3)
    assert {name: one["value"] for name, one in found["by_source"].items()} == {"x": 0.5, "y": 0.0}
    assert found["mean_score"]["value"] == 1.0
    # Scores 1 0 2 | 0 1 2 with lengths 20 10 20 | 10 20 10.
    assert found["length_correlation"]["value"] == pytest.approx(
        intervals.correlation([1, 0, 2, 0, 1, 2], [20, 10, 20, 10, 20, 10])["value"]
    )


def test_accuracy_in_groups_of_margin_and_of_length():
    rows = [row(1.0, 10, 10), row(0.9, 10, 40), row(0.55, 40, 10), row(0.05, 40, 10), row(0.5, 3, 2)]
    found = reward_model.measure([1, 1, 0, 0, 1, 0, 0, 1, 1, 0], rows)  # right, right, wrong, right, no right side
    assert [(one["from"], one["accuracy"]["value"], one["accuracy"]["n"]) for one in found["by_margin"]] == [
        (0.0, 0.0, 1),
        (0.25, None, 0),
        (0.5, None, 0),
        (0.75, 1.0, 3),
    ]
    # The right one is: as long, shorter by 3/4, longer by 3/4, and (the rejected one) shorter by 3/4.
    assert [(one["from"], one["accuracy"]["value"], one["accuracy"]["n"]) for one in found["by_length_difference"]] == [
        (-1.0, 1.0, 2),
        (-0.5, None, 0),
        (-0.1, 1.0, 1),
        (0.1, None, 0),
        (0.5, 0.0, 1),
    ]
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (0.75, 4)


def test_pairs_of_one_prompt_count_as_alike():
    scores = [1.0] * 20 + [0.0] * 20
    labels = [1.0] * 10 + [0.0] * 10
    apart = reward_model.measure(scores, [row(p, prompt=str(n)) for n, p in enumerate(labels)])["accuracy"]
    together = reward_model.measure(scores, [row(p, prompt=str(n // 5)) for n, p in enumerate(labels)])["accuracy"]
    assert apart["value"] == together["value"] == 0.5
    assert together["high"] - together["low"] > apart["high"] - apart["low"] + 0.2


def test_the_temperature_undoes_a_scale():
    margins = [d / 10 for d in range(-30, 31)]
    labels = [sigmoid(d) for d in margins]
    many = 50  # so that the prior hardly counts
    for scale in (0.25, 1.0, 4.0):
        fitted = calibration.fit_temperature([scale * d for d in margins] * many, labels * many)
        assert fitted == pytest.approx(scale, rel=0.02)
    few = calibration.fit_temperature([3.0, 2.0], [1.0, 1.0])  # all on the right side: the prior holds it
    assert 0.3 < few < 1
    assert calibration.fit_temperature([-3.0] * 1000, [1.0] * 1000) == pytest.approx(math.exp(3))


def test_scaled_figures_are_those_of_the_other_half():
    margins = [3.0 * d / 10 for d in range(-30, 31)] * 4
    rows = [row(sigmoid(d / 3), prompt=str(n)) for n, d in enumerate(margins)]
    found = reward_model.measure(margins + [0.0] * len(margins), rows)
    assert found["temperature"] == pytest.approx(3, rel=0.05)
    assert found["least"] < found["scaled_log_loss"] < found["log_loss"] - 0.01
    assert found["scaled_ece"]["value"] < 0.02 < found["ece"]["value"]
    assert sum(one["outcome"]["n"] for one in found["bins"]) == len(rows)


# --- a trained one ---------------------------------------------------------------------------------------


def test_a_scorer_knows_its_temperature_and_its_context(tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = models.folder("llama")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.score_temperature = 2.0
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    scorer = load_scorer(str(tmp_path), device="cpu")
    assert scorer.temperature == 2.0 and scorer.probability(3.0, 1.0) == pytest.approx(sigmoid(1))
    prompt = [{"role": "user", "content": "How do I open it?"}]
    texts = [(prompt, "Push."), (prompt, "Push, then pull. " * 6250), (prompt, "")]
    found = scorer.scores(texts)  # 100,000 characters are more than its 2,048 tokens
    assert found[1] is None and found[0] != found[2]
    assert found[0] == pytest.approx(scorer.scores(texts[:1])[0], abs=1e-4)
    assert load_scorer(str(base_reward_model(tmp_path / "plain")), device="cpu").temperature == 1.0


def base_reward_model(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(models.folder("qwen"), num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(models.folder("qwen")).save_pretrained(folder)
    return folder


def test_scores_that_are_no_numbers_are_an_error():
    import torch

    model = loading.load_reward_model(str(models.folder("qwen")))
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(CaiError, match="not finite"):
        score_sequences(model, 0, [[5, 6]], 1)
