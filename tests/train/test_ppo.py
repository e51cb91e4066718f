"""train/ppo.py: the mathematics against numbers worked by hand and loops of their own, the model, the trainer."""

import json
import math
import random

import models
import numpy as np
import pytest
import torch
import toys

from cai.base.errors import CaiError, InputError
from cai.models import loading
from cai.models.chat import encode
from cai.models.scorer import Scorer
from cai.train import common
from cai.train.alarms import Watch, limits
from cai.train.ppo import (
    PolicyAndValue,
    PPOTrainer,
    Rollout,
    Settings,
    adapt_kl_coef,
    explained_variance,
    gae,
    kl_penalty,
    merge_moments,
    policy_loss,
    response_logits,
    split_by_length,
    split_pass,
    token_logprobs,
    token_rewards,
    value_loss,
    whiten,
)
from cai.train.prompts import encode_prompts
from cai.train.rewards import Total
from cai.train.updates import Stopped

T = torch.tensor

# --- the mathematics -------------------------------------------------------------------------------------


def ragged(seed: int, rows: int = 7, width: int = 9):
    """Numbers (rows, width), and a mask of 1 to `width` tokens a row from the left."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, width + 1, rows)
    mask = np.arange(width) < lengths[:, None]
    return (lambda: draw.normal(size=(rows, width))), mask, lengths


def test_gae_by_hand():
    # gamma 0.9, lambda 0.8, so gamma*lambda = 0.72; rewards 0, 0, 1; values 0.5, 0.6, 0.7.
    #   delta2 = 1 - 0.7             =  0.3     A2 = 0.3
    #   delta1 = 0.9 * 0.7 - 0.6     =  0.03    A1 = 0.03 + 0.72 * 0.3    = 0.246
    #   delta0 = 0.9 * 0.6 - 0.5     =  0.04    A0 = 0.04 + 0.72 * 0.246  = 0.21712
    # A second row ends after one token (reward 2, value 1): A = 2 - 1 = 1. The rest of it is junk.
    mask = T([[True, True, True], [True, False, False]])
    rewards, values = T([[0.0, 0, 1], [2, 50, 50]]), T([[0.5, 0.6, 0.7], [1, 60, math.nan]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    assert torch.allclose(advantages, T([[0.21712, 0.246, 0.3], [1, 0, 0]]))
    assert torch.allclose(returns, T([[0.71712, 0.846, 1.0], [2, 0, 0]]))


def test_gae_with_lambda_1_is_what_came_minus_what_was_expected():
    mask = torch.ones(1, 4, dtype=torch.bool)
    _, returns = gae(T([[1.0, 2, 3, 4]]), torch.randn(1, 4), mask, gamma=1.0, lam=1.0)
    assert torch.allclose(returns, T([[10.0, 9, 7, 4]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0)])
def test_gae_equals_a_loop_over_rows(gamma, lam):
    numbers, mask, lengths = ragged(1)
    rewards, values = numbers(), numbers()
    expected = np.zeros_like(rewards)
    for row, length in enumerate(lengths):
        for t in range(length):
            # The definition: a discounted sum of all later deltas, not the recursion.
            for later in range(t, length):
                after = values[row, later + 1] if later + 1 < length else 0.0
                delta = rewards[row, later] + gamma * after - values[row, later]
                expected[row, t] += (gamma * lam) ** (later - t) * delta
    advantages, returns = gae(T(rewards), T(values), T(mask), gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(returns.numpy()[mask], (expected + values)[mask], atol=1e-12)


def test_kl_estimates_by_hand():
    logprobs, reference = T([-1.0, -2.0, -3.0]), T([-2.0, -1.0, -3.0])
    assert torch.allclose(kl_penalty(logprobs, reference, "k1"), T([1.0, -1.0, 0.0]))
    # exp(ref - logp) - 1 - (ref - logp):  e^-1 - 1 + 1,  e^1 - 1 - 1,  0
    assert torch.allclose(kl_penalty(logprobs, reference, "k3"), T([0.36787944, 0.71828183, 0.0]))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_have_the_mean_of_the_true_divergence(estimator):
    p, q = T([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    estimates = kl_penalty(p.log(), q.log(), estimator)
    assert math.isclose(float((p * estimates).sum()), float((p * (p / q).log()).sum()), rel_tol=1e-12)


def test_rewards_are_the_penalty_at_each_token_and_the_score_at_the_last():
    mask = T([[True, True, True], [True, False, False]])
    rewards = token_rewards(T([5.0, -1.0]), T([[1.0, 2, 3], [4, math.nan, 9]]), mask, kl_coef=0.1)
    assert torch.allclose(rewards, T([[-0.1, -0.2, 4.7], [-1.4, 0, 0]]))


def test_whitening_by_hand_and_only_over_the_mask():
    # 1, 3, 5, 7: mean 4, variance 5.
    mask = T([[True, True, False], [True, True, False]])
    white = whiten(T([[1.0, 3, 100], [5, 7, math.nan]]), mask)
    assert torch.allclose(white, T([[-3.0, -1, 0], [1, 3, 0]]) / math.sqrt(5))


def test_policy_loss_by_hand():
    # ratio 1.5, 1.5, 0.5, 0.5 and A 2, -2, 2, -2, clipped to 0.8..1.2:
    #   -min(3, 2.4) = -2.4;  -min(-3, -2.4) = 3;  -min(1, 1.6) = -1;  -min(-1, -1.6) = 1.6
    logprobs = (T([1.5, 1.5, 0.5, 0.5]).log() - 1).requires_grad_()
    loss, ratio = policy_loss(logprobs, T([-1.0] * 4), T([2.0, -2, 2, -2]), clip=0.2)
    assert torch.allclose(loss, T([-2.4, 3, -1, 1.6])) and torch.allclose(ratio, T([1.5, 1.5, 0.5, 0.5]))
    # A token that is already further than the clip in the direction it is pushed to teaches nothing more.
    loss.sum().backward()
    assert torch.allclose(logprobs.grad, T([0.0, 3, -1, 0]))


def test_value_loss_by_hand():
    # old 1, clip 0.2; returns 2:  v 1.5 -> clipped 1.2, max(.25, .64)/2 = .32;  v 0.9 -> max(1.21, 1.21)/2
    # returns 0:  v 1.5 -> clipped 1.2, max(2.25, 1.44)/2 = 1.125
    loss = value_loss(T([1.5, 0.9, 1.5]), T([1.0, 1, 1]), T([2.0, 2, 0]), clip=0.2)
    assert torch.allclose(loss, T([0.32, 0.605, 1.125]))


def test_losses_equal_a_loop_over_tokens():
    draw = np.random.default_rng(3)
    new, old, adv, values, before, returns = draw.normal(size=(6, 500))
    policy, value = [], []
    for i in range(500):
        rho = math.exp(new[i] - old[i])
        policy.append(-min(rho * adv[i], min(max(rho, 0.7), 1.3) * adv[i]))
        near = min(max(values[i], before[i] - 0.3), before[i] + 0.3)
        value.append(max((values[i] - returns[i]) ** 2, (near - returns[i]) ** 2) / 2)
    np.testing.assert_allclose(policy_loss(T(new), T(old), T(adv), 0.3)[0].numpy(), policy, atol=1e-12)
    np.testing.assert_allclose(value_loss(T(values), T(before), T(returns), 0.3).numpy(), value, atol=1e-12)


def test_explained_variance():
    returns = T([1.0, 2, 3, 4])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((4,), 9.0), returns) == 0
    assert explained_variance(T([4.0, 3, 2, 1]), returns) == -3
    assert explained_variance(T([1.0, 2]), T([5.0, 5])) == 0


def test_the_coefficient_follows_its_target():
    assert math.isclose(adapt_kl_coef(0.1, kl=12, target=10, rows=100, horizon=1000), 0.1 * 1.02)
    assert math.isclose(adapt_kl_coef(0.1, kl=9, target=10, rows=100, horizon=1000), 0.1 * 0.99)
    assert math.isclose(adapt_kl_coef(0.1, kl=500, target=10, rows=100, horizon=1000), 0.1 * 1.02)


# --- the batch arithmetic --------------------------------------------------------------------------------


def test_the_counts():
    settings = Settings(updates=5, prompts_per_update=24, epochs=3, minibatches=2, batch_size=5, processes=2)
    # 24 rows in 2 minibatches of 12, 6 on each process, in passes of at most 5: 2.
    assert (settings.accumulation, settings.steps_per_update, settings.steps, settings.episodes) == (2, 6, 30, 120)
    with pytest.raises(InputError, match="24 responses per update do not divide by 5"):
        Settings(prompts_per_update=24, minibatches=5)


def test_prompts_come_round_once_each():
    settings = Settings(prompts_per_update=4, seed=1)
    drawn = [i for update in range(5) for i in settings.draw_prompts(update, 10)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] != list(range(10))
    assert len(set(Settings(prompts_per_update=8).draw_prompts(3, 3))) == 3


def test_every_epoch_takes_every_row_once_and_minibatches_do_not_hang_on_processes_or_passes():
    lengths = [random.Random(0).randrange(50) + i for i in range(24)]

    def minibatches(**changed):
        settings = Settings(prompts_per_update=24, epochs=2, minibatches=3, **changed)
        shares = [settings.draw_minibatches(7, lengths, process) for process in range(settings.processes)]
        assert all(len(passes) == settings.accumulation for share in shares for e in share for passes in e)
        return [[{i for share in shares for rows in share[e][m] for i in rows} for m in range(3)] for e in range(2)]

    one = minibatches(batch_size=8)
    assert [len(rows) for epoch in one for rows in epoch] == [8] * 6
    assert all(set().union(*epoch) == set(range(24)) for epoch in one)
    assert one[0] != one[1]
    assert one == minibatches(batch_size=3) == minibatches(batch_size=2, processes=4)
    sizes = [len(rows) for rows in Settings(prompts_per_update=24, batch_size=5).draw_minibatches(0, lengths)[0][0]]
    assert sizes == [5, 5, 5, 5, 4]


def test_a_batch_is_padded_no_further_than_it_needs_and_picks_its_own_numbers():
    sequences = [T([5, 6, 7]), T([5, 6, 7, 8, 9]), T([5, 6])]
    mask = T([[True, False, False], [True, True, True], [True, False, False]])
    rollout = Rollout(sequences, [2, 2, 1], mask, torch.zeros(3), returns=torch.arange(9.0).view(3, 3))
    batch = rollout.batch([2, 0], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [5, 6, 7]]
    assert batch["response_mask"].tolist() == [[False, True, False], [False, False, True]]
    assert rollout.pick("returns", [1, 0]).tolist() == [3, 4, 5, 0]


def test_rows_are_padded_together_where_that_costs_least():
    # 10 + 11 together: 22; with 50 and 52: 4 * 52 + 5 = 213 against 22 + 5 + 104 + 5 = 136.
    assert split_by_length([10, 11, 50, 52], overhead=5) == [range(2), range(2, 4)]
    assert split_by_length([10, 11, 50, 52], overhead=1000) == [range(4)]
    assert split_by_length([10, 11, 50, 52], overhead=0) == [range(1), range(1, 2), range(2, 3), range(3, 4)]
    assert split_by_length([7], overhead=5) == [range(1)]
    ids, mask = torch.arange(12).view(3, 4), T([[0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()
    cut = list(split_pass(ids.repeat_interleave(20, 0), mask.repeat_interleave(20, 0)))
    assert [tuple(part.shape) for part, _ in cut] == [(20, 2), (40, 4)]
    assert sum(int(part.sum()) for _, part in cut) == 20 * 6


# --- the model -------------------------------------------------------------------------------------------


def sequences(count: int, vocabulary: int, seed: int = 0):
    """Random (ids, prompt length) of differing lengths, longer than the small models' sliding window."""
    draw = random.Random(seed)
    lengths = [(draw.randrange(3, 30), draw.randrange(1, 20)) for _ in range(count)]
    return [(T([draw.randrange(20, vocabulary) for _ in range(a + b)]), a) for a, b in lengths]


def padded(rows, pad_id: int, more: int = 0):
    rollout = Rollout([ids for ids, _ in rows], [start for _, start in rows], torch.zeros(0), torch.zeros(0))
    batch = rollout.batch(list(range(len(rows))), pad_id)
    return {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, more), value=pad_id),
        "response_mask": torch.nn.functional.pad(batch["response_mask"], (0, more), value=False),
    }


@pytest.mark.parametrize("family", models.ARCHITECTURES)
def test_logprobs_are_those_of_the_whole_forward_pass_however_it_is_padded(family):
    policy = loading.load_policy(str(models.folder(family)), "cpu").eval()
    rows = sequences(5, policy.config.vocab_size)
    expected = []
    with torch.no_grad():
        for ids, start in rows:
            # Alone, and padded on the left with a mask, as it is when it is sampled.
            alone = (policy(input_ids=ids[None]).logits[0] / 0.7).log_softmax(-1)
            logprobs = alone[:-1].gather(1, ids[1:, None])[start - 1 :, 0]
            left = torch.nn.functional.pad(ids, (6, 0), value=3)[None]
            seen = (torch.arange(left.shape[1]) >= 6).long()[None]
            again = policy(input_ids=left, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(0)).logits
            again = (again[0, 6:-1] / 0.7).log_softmax(-1).gather(1, ids[1:, None])[start - 1 :, 0]
            assert torch.allclose(again, logprobs, atol=2e-5)
            expected.append(logprobs)
        for more in (0, 11):
            batch = padded(rows, 3, more)
            logits, _ = response_logits(policy, **batch)
            found = token_logprobs(logits, **batch, temperature=0.7)
            assert torch.allclose(found, torch.cat(expected), atol=2e-5)


def wrapped(family="llama", value_head=False, seed=0, **options):
    policy = loading.load_policy(str(models.folder(family)), "cpu")
    torch.manual_seed(seed)
    value_model = None if value_head else loading.load_reward_model(str(models.folder(family)), "cpu")
    model = PolicyAndValue(policy, value_model, **options)
    if value_head:
        torch.nn.init.normal_(model.value.weight)
    return model


@pytest.mark.parametrize("value_head", [False, True])
def test_padding_changes_neither_loss_nor_gradient(value_head):
    model = wrapped(value_head=value_head)
    rows = sequences(4, model.policy.config.vocab_size, seed=1)
    tokens = sum(len(ids) - start for ids, start in rows)
    old, advantages, returns = torch.randn(3, tokens)
    found = []
    for more in (0, 13):
        logprobs, values = model(**padded(rows, 3, more))
        loss = policy_loss(logprobs, old, advantages, 0.2)[0].sum() + value_loss(values, old, returns, 0.2).sum()
        model.zero_grad()
        (loss / tokens).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        found.append((loss.item() / tokens, norm.item()))
    assert found[0] == pytest.approx(found[1], rel=2e-5)


def test_the_value_model_begins_as_the_reward_model():
    folder = str(models.folder("llama"))
    chat = loading.load_chat(folder)
    model = wrapped()
    prompt, answer = encode(chat, PROMPTS[0], "I can't help with that.")
    ids = T([*prompt, *answer, chat.tokenizer.pad_token_id])[None]
    # The value of what stands before the last token is the score of the sequence without that token.
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, -1] = True
    _, values = model(ids, mask)
    score = Scorer(chat, model.value)([PROMPTS[0]], ["I can't help with that."])
    assert values.tolist() == pytest.approx(score, abs=1e-6)


def test_scores_hang_on_neither_batch_nor_order():
    chat = loading.load_chat(str(models.folder("qwen")))
    torch.manual_seed(0)
    model = loading.load_reward_model(str(models.folder("qwen")), "cpu")
    answers = ["A.", "I can't help with that, because it would hurt someone.", "Ask the owner for a key.", ""]
    prompts = [PROMPTS[i % 3] for i in range(4)]
    scores = Scorer(chat, model, batch_size=3)(prompts, answers)
    assert len(set(scores)) == 4
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        assert Scorer(chat, model)([prompt], [answer]) == pytest.approx([score], abs=1e-5)


def test_dropout_is_off_in_training_too():
    model = wrapped()
    for layer in model.policy.model.layers:
        layer.self_attn.attention_dropout = 0.9
    batch = padded(sequences(2, 400), 3)
    model.train()
    assert torch.equal(model(**batch)[0], model(**batch)[0])


def test_recomputing_activations_changes_no_gradient():
    batch = padded(sequences(3, 400), 3)
    found, passes = [], []
    for recompute in (False, True):
        model = wrapped()
        if recompute:
            model.activation_checkpointing_enable()
        model.train()
        count = []
        hook = model.policy.model.layers[0].mlp.register_forward_pre_hook(lambda *_, n=count: n.append(1))
        logprobs, values = model(**batch)
        (logprobs.sum() + values.sum()).backward()
        hook.remove()
        found.append(model.policy.model.layers[0].mlp.up_proj.weight.grad)
        passes.append(len(count))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)
    assert passes == [1, 2]


# --- the trainer -----------------------------------------------------------------------------------------

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("How do I open the old gate?", "Name the ways in which the response is harmful, please.", "A or B?")
]


def vowels(prompts, responses):
    """A reward that any policy can learn: the share of a, e, i, o, u."""
    return [sum(c in "aeiou" for c in text) / (len(text) + 1) for text in responses]


def trainer(
    tmp_path,
    *,
    model=None,
    reward=vowels,
    prompts=PROMPTS,
    reference=None,
    chat=None,
    save_every=0,
    family="llama",
    **settings,
):
    """A trainer over a small random model, with settings for a quick run."""
    settings = Settings(
        **{
            "updates": 2,
            "prompts_per_update": 12,
            "epochs": 2,
            "minibatches": 2,
            "batch_size": 3,
            "learning_rate": 1e-3,
            "temperature": 0.7,
            "max_new_tokens": 8,
            "samples_every": 1,
            **settings,
        }
    )
    folder = str(models.folder(family))
    if model is None:
        model = wrapped(family, temperature=settings.temperature, kl_coef=settings.kl_coef)
        reference = loading.load_policy(folder, "cpu")
    arguments = common.trainer_arguments(
        tmp_path,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        save_steps=save_every,
        seed=settings.seed,
        device="cpu",
    )
    chat = chat or loading.load_chat(folder)
    prompts = encode_prompts([{"prompt": prompt} for prompt in prompts], chat, model.policy, settings.max_new_tokens)
    return PPOTrainer(model, prompts, chat, reward, settings, arguments, tmp_path, reference)


def rows_of(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "update" in row]


def test_before_the_first_step_kl_is_0_and_the_ratio_1(tmp_path):
    one = trainer(tmp_path, updates=1, epochs=1, minibatches=1, batch_size=5, kl_coef=0.3)
    common.run_trainer(one, tmp_path)
    (row,) = rows_of(tmp_path)
    # To the last bit: the passes are the same. All passes of the one minibatch come before the one step.
    assert (row["kl"], row["ratio"], row["clip_fraction"], row["update_kl"]) == (0, 1, 0, 0)
    # With the ratio at 1 the surrogate is the mean of the whitened advantages, which is 0.
    assert abs(row["policy_loss"]) < 1e-6


def test_the_steps_are_updates_times_epochs_times_minibatches(tmp_path):
    one = trainer(tmp_path, updates=3, epochs=2, minibatches=2, batch_size=2)
    steps = []
    create = one.create_optimizer

    def counting():
        create().register_step_post_hook(lambda *_: steps.append(1))
        return one.optimizer

    one.create_optimizer = counting
    common.run_trainer(one, tmp_path)
    assert len(steps) == one.state.global_step == 3 * 2 * 2
    rows = rows_of(tmp_path)
    assert [(row["update"], row["step"], row["episodes"]) for row in rows] == [(1, 4, 12), (2, 8, 24), (3, 12, 36)]
    assert rows[0]["kl"] == 0 < abs(rows[1]["kl"])
    assert rows[0]["learning_rate"] > rows[1]["learning_rate"] > rows[2]["learning_rate"]
    named = {
        "score",
        "kl",
        "entropy",
        "response_length",
        "eos_rate",
        "clip_fraction",
        "ratio",
        "policy_loss",
        "value_loss",
        "explained_variance",
        "learning_rate",
        "grad_norm",
        "loss",
    }
    assert all(named <= set(row) and all(math.isfinite(x) for x in row.values()) for row in rows)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["update"] for row in samples] == [1] * 4 + [2] * 4 + [3] * 4
    assert {"prompt", "response", "score", "kl", "tokens", "ended"} <= set(samples[0])


def test_in_the_warmup_the_value_model_alone_is_trained(tmp_path):
    one = trainer(tmp_path, updates=3, value_warmup=2)
    at_start = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    common.run_trainer(one, tmp_path)
    rows = rows_of(tmp_path)
    assert [row["kl"] for row in rows] == pytest.approx([0, 0, 0], abs=1e-5)
    changed = {name.split(".")[0] for name, p in one.model.named_parameters() if not torch.equal(p, at_start[name])}
    assert changed == {"policy", "value"}
    two = trainer(tmp_path / "all", updates=2, value_warmup=2)
    at_start = {name: p.detach().clone() for name, p in two.model.named_parameters()}
    common.run_trainer(two, tmp_path / "all")
    changed = {name.split(".")[0] for name, p in two.model.named_parameters() if not torch.equal(p, at_start[name])}
    assert changed == {"value"}


@pytest.mark.slow
def test_several_passes_add_up_to_one_large_batch(tmp_path):
    weights, values = [], []
    for batch_size in (12, 5, 1):
        one = trainer(tmp_path / str(batch_size), batch_size=batch_size, minibatches=1)
        common.run_trainer(one, tmp_path / str(batch_size))
        weights.append(torch.cat([p.detach().flatten() for p in one.model.parameters()]))
        values.append(
            [
                [row[name] for name in ("score", "kl", "policy_loss", "value_loss", "grad_norm", "loss")]
                for row in rows_of(tmp_path / str(batch_size))
            ]
        )
    for other, figures in zip(weights[1:], values[1:], strict=True):
        assert (weights[0] - other).abs().max() < 1e-5
        for a, b in zip(values[0], figures, strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_response_is_the_same_in_any_batch(tmp_path):
    one = trainer(tmp_path, generation_batch_size=128, max_new_tokens=12)
    prompts = [prompt.ids for prompt in one.prompts]
    together, others = one.sample(prompts, [11, 12, 13]), one.sample(prompts, [1, 2, 3])
    one.settings = Settings(generation_batch_size=1, temperature=0.7, max_new_tokens=12)
    alone = one.sample(prompts, [11, 12, 13])
    assert [r.tolist() for r in together] == [r.tolist() for r in alone] != [r.tolist() for r in others]


def test_responses_are_drawn_from_the_policy_alone(tmp_path):
    """The checkpoint's own sampling settings (temperature 0.3, top-k 3, a repetition penalty) play no part."""
    one = trainer(tmp_path, temperature=1.0, max_new_tokens=1)
    count = 3000
    first = torch.stack(one.sample([one.prompts[2].ids] * count, list(range(count))))[:, 0]
    with torch.no_grad():
        probs = one.model.policy(input_ids=one.prompts[2].ids[None]).logits[0, -1].softmax(-1)
    counts = torch.bincount(first, minlength=len(probs)) / count
    likely = probs.topk(10).indices
    assert torch.allclose(counts[likely], probs[likely], atol=4 * 0.5 / math.sqrt(count))
    assert len(set(first.tolist())) > 10
    assert one.model.policy.generation_config.repetition_penalty == 1.5  # it is the checkpoint's again


def test_a_response_ends_with_its_first_end_token_and_pays_if_it_has_none(tmp_path):
    seen = {}

    def reward(prompts, responses):
        seen["texts"] = responses
        return [1.0] * len(responses)

    one = trainer(tmp_path, reward=reward, missing_eos_penalty=0.4, max_new_tokens=40)
    one.stops = set(range(0, 400, 9))
    rollout, _ = one.rollout(0)
    lengths = rollout.mask.sum(1).tolist()
    assert len(set(lengths)) > 3
    for row, (ids, start) in enumerate(zip(rollout.sequences, rollout.prompt_lengths, strict=True)):
        response = ids[start:].tolist()
        assert len(response) == lengths[row]
        assert [token in one.stops for token in response[:-1]] == [False] * (lengths[row] - 1)
        ended = response[-1] in one.stops
        assert ended or lengths[row] == 40
        assert float(rollout.scores[row]) == pytest.approx(1.0 if ended else 0.6)
        assert seen["texts"][row] == one.chat.answer(response[:-1] if ended else response, continued=False)[0]
    assert one.figures["eos_rate"] == pytest.approx(sum(s > 0.9 for s in rollout.scores.tolist()) / 12)
    assert one.figures["score"] == 1.0


def test_a_rollout_holds_what_its_definitions_say(tmp_path):
    reference = loading.load_policy(str(models.build("llama", tmp_path / "other", seed=5)), "cpu")
    model = wrapped(temperature=0.7, kl_coef=0.2)
    one = trainer(tmp_path, model=model, reference=reference, kl_coef=0.2, gamma=0.98, lam=0.9, minibatches=1)
    rollout, _ = one.rollout(0)
    advantages = []
    for row, (ids, start) in enumerate(zip(rollout.sequences, rollout.prompt_lengths, strict=True)):
        n = len(ids) - start
        with torch.no_grad():
            logp, ref = (
                (m(input_ids=ids[None]).logits[0, :-1] / 0.7).log_softmax(-1).gather(1, ids[1:, None])[start - 1 :, 0]
                for m in (model.policy, reference)
            )
            hidden = model.value.model(input_ids=ids[None]).last_hidden_state[0, start - 1 : -1]
            values = model.value.score(hidden)[:, 0]
        assert torch.allclose(rollout.old_logprobs[row, :n], logp, atol=1e-5)
        assert torch.allclose(rollout.ref_logprobs[row, :n], ref, atol=1e-5)
        assert torch.allclose(rollout.old_values[row, :n], values, atol=1e-5)
        rewards = (-0.2 * (logp - ref)).tolist()
        rewards[-1] += float(rollout.scores[row])
        for t in range(n):
            deltas = [
                rewards[k] + 0.98 * (float(values[k + 1]) if k + 1 < n else 0) - float(values[k]) for k in range(t, n)
            ]
            advantages.append(sum((0.98 * 0.9) ** k * delta for k, delta in enumerate(deltas)))
            assert float(rollout.returns[row, t]) == pytest.approx(advantages[-1] + float(values[t]), abs=1e-4)
    advantages = (np.array(advantages) - np.mean(advantages)) / np.std(advantages)
    np.testing.assert_allclose(rollout.advantages[rollout.mask].numpy(), advantages, atol=1e-4)
    kl = (rollout.old_logprobs - rollout.ref_logprobs).masked_fill(~rollout.mask, 0).sum(1).mean()
    assert one.figures["kl"] == pytest.approx(float(kl), rel=1e-5)


@pytest.mark.slow
def test_stopped_and_resumed_the_next_20_updates_are_those_of_a_run_that_was_not(tmp_path):
    """With all that must be remembered: moments of AdamW, schedule, prompts, draws, coefficient, scale, alarms."""
    words = ["go", "a", "b", "c"]
    chat, make = toys.indifferent(words)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    calls = []

    def reward(prompts, responses):
        calls.append(1)
        if stop and len(calls) == 6:
            raise KeyboardInterrupt
        return [text.split().count("a") for text in responses]

    def run(folder):
        calls.clear()
        one = toys.trainer(
            folder,
            chat,
            make,
            reward,
            prompts=toys.prompts_of(words),
            updates=24,
            save_every=4,
            kl_target=0.01,
            scale_scores=True,
            prompts_per_update=24,
            minibatches=2,
            batch_size=5,
            max_new_tokens=6,
            samples_every=1,
        )
        common.run_trainer(one, folder)
        return one

    stop = False
    run(whole)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    assert [row["update"] for row in rows_of(stopped)] == [1, 2, 3, 4, 5]
    stop = False
    resumed = run(stopped)
    assert resumed.state.global_step == 24 * 4 and len(calls) == 20
    expected, found = (
        [{name: x for name, x in row.items() if not name.startswith("seconds")} for row in rows_of(folder)]
        for folder in (whole, stopped)
    )
    assert found == expected and len(found[4:]) == 20
    assert len({row["kl_coef"] for row in expected}) == len({row["score_scale"] for row in expected}) == 24
    assert (whole / "samples.jsonl").read_text() == (stopped / "samples.jsonl").read_text()
    # stopped after the last state and before the weights were written: nothing is left to train
    assert run(stopped).state.global_step == 24 * 4 and not calls and len(rows_of(stopped)) == 24


def test_moments_put_together_are_those_of_all_numbers():
    numbers = torch.randn(50, dtype=torch.float64) * 3 + 7
    moments = torch.zeros(3, dtype=torch.float64)
    for part in numbers.split([1, 20, 29]):
        moments = merge_moments(moments, part)
    count, mean, squares = moments.tolist()
    assert (count, mean) == (50, pytest.approx(numbers.mean().item()))
    assert squares / count == pytest.approx(numbers.var(correction=0).item())


@pytest.mark.slow
def test_scaled_scores_make_the_unit_of_the_reward_irrelevant(tmp_path):
    found = []
    for unit in (1.0, 1000.0):
        folder = tmp_path / str(unit)
        one = trainer(
            folder,
            reward=lambda p, r, u=unit: [u * x for x in vowels(p, r)],
            scale_scores=True,
            missing_eos_penalty=0.5,
        )
        common.run_trainer(one, folder)
        found.append((torch.cat([p.detach().flatten() for p in one.model.parameters()]), rows_of(folder)))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for small, large in zip(found[0][1], found[1][1], strict=True):
        assert large["score_scale"] == pytest.approx(1000 * small["score_scale"], rel=1e-5)
        assert large["reward"] == pytest.approx(small["reward"], rel=1e-3)
    # Of the first update it is the deviation of that update's scores.
    assert found[0][1][0]["score_scale"] == pytest.approx(found[0][1][0]["score_std"], rel=1e-4)


def test_parts_of_the_reward_and_the_judge_are_logged_and_the_judge_rewards_nothing(tmp_path):
    def length(prompts, responses):
        return [float(len(text)) for text in responses]

    total = Total({"vowels": (vowels, 2.0), "length": (length, -0.5)})
    one = trainer(tmp_path, reward=total, updates=1)
    one.judge = lambda prompts, responses: [100.0 + len(text) for text in responses]
    common.run_trainer(one, tmp_path)
    (row,) = rows_of(tmp_path)
    assert row["score"] == pytest.approx(2 * row["score_vowels"] - 0.5 * row["score_length"], rel=1e-5)
    assert row["judge"] == pytest.approx(100 + row["score_length"], rel=1e-5)
    assert row["judge_std"] > 0 and row["score"] < 50


def test_numbers_that_are_none_stop_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    one = trainer(tmp_path, updates=6, save_every=2)
    step = one.training_step

    def spoiled(model, inputs, *rest):
        if one.state.global_step == 4 * 4:  # the fifth update; the fourth was saved
            inputs["advantages"] = inputs["advantages"] * math.nan
        return step(model, inputs, *rest)

    one.training_step = spoiled
    with pytest.raises(CaiError, match=r"not finite at step 16 of 24.*checkpoint-16"):
        common.run_trainer(one, tmp_path)
    kept = tmp_path / "checkpoints" / "checkpoint-16" / "policy"
    policy = loading.load_policy(str(kept))
    assert all(torch.isfinite(p).all() for p in policy.parameters())
    loading.load_chat(str(kept))


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    one = trainer(tmp_path, updates=2, save_every=1)
    step = one.training_step

    def spoiled(model, inputs, *rest):
        loss = step(model, inputs, *rest)
        if one.state.global_step == 7:  # the last step of the last update: no forward pass will see it
            one.model.policy.get_input_embeddings().weight.grad.fill_(math.nan)
        return loss

    one.training_step = spoiled
    with pytest.raises(CaiError, match=r"weights .* not finite at step 8 of 8.*checkpoint-4"):
        common.run_trainer(one, tmp_path)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]


def test_a_score_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(CaiError, match="a score of the reward is not finite"):
        common.run_trainer(trainer(tmp_path, reward=lambda p, r: [math.nan] * len(r)), tmp_path)


def test_a_prompt_without_room_for_a_response_is_refused(tmp_path):
    prompts = [*PROMPTS, [{"role": "user", "content": "A or B? " * 700}]]
    with pytest.raises(InputError, match="do not fit the model's context of 2048"):
        trainer(tmp_path, prompts=prompts)


def test_lora_trains_adapters_alone_and_its_base_is_the_reference(tmp_path):
    from peft import get_peft_model

    folder = str(models.folder("llama"))
    policy = get_peft_model(loading.load_policy(folder, "cpu"), common.lora_config(4))
    value_model = get_peft_model(loading.load_reward_model(folder, "cpu"), common.lora_config(4, "SEQ_CLS"))
    model = PolicyAndValue(policy, value_model, temperature=0.7, kl_coef=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = trainer(tmp_path, model=model, updates=2, save_every=1)
    common.run_trainer(one, tmp_path)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    assert {name.split(".")[0] for name in changed} == {"policy", "value"}
    first, second = rows_of(tmp_path)
    assert first["kl"] == 0 != second["kl"]
    saved = tmp_path / "checkpoints" / "checkpoint-8" / "policy"
    assert (saved / "adapter_model.safetensors").exists() and not (saved / "model.safetensors").exists()


# --- stopping, and which policy is taken -----------------------------------------------------------------------

WORDS = ["go", "a", "b", "c"]
KINDS = ["harmful", "benign", "benign", "borderline"]


def long_answers(prompts, responses):
    return [float(len(text.split())) for text in responses]


def middling(prompts, responses):
    """Best at seven words: it rises with the reward, and then falls."""
    return [1 - abs(len(text.split()) - 7) / 10 for text in responses]


def selecting(folder, reward=long_answers, **settings):
    """A trainer that saves a state every second update, and chooses."""
    chat, make = toys.talker(tuple(WORDS), 0.5)
    settings = {
        "updates": 10,
        "prompts_per_update": 32,
        "max_new_tokens": 10,
        "save_every": 2,
        "kl_coef": 0.0,
        "learning_rate": 1e-2,
        "judge": middling,
        **settings,
    }
    one = toys.trainer(folder, chat, make, reward, prompts=toys.prompts_of(WORDS), kinds=KINDS, **settings)
    one.candidates.__init__([prompt for prompt in one.prompts for _ in range(8)], folder, one.args.output_dir)
    return one


def snapshots(one) -> dict[int, dict]:
    """The policy's weights at each candidate, by update."""
    found, candidate = {}, one._add_candidate

    def kept():
        update = one.state.global_step // one.settings.steps_per_update
        found[update] = {name: p.detach().clone() for name, p in one.model.named_parameters()}
        candidate()

    one._add_candidate = kept
    return found


@pytest.mark.slow
def test_the_policy_that_did_best_is_taken_and_not_the_last(tmp_path):
    one = selecting(tmp_path)
    weights = snapshots(one)
    common.run_trainer(one, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(weights) == [0, 2, 4, 6, 8, 10]
    for row in rows:
        assert len(row["scores"]) == 32
        assert row["harmlessness"] == pytest.approx(sum(row["scores"][:8]) / 8)
        assert row["helpfulness"] == pytest.approx(sum(row["scores"][8:]) / 24)
    best = one.candidates.best()
    assert best not in (0, 10)
    sums = {row["update"]: row["harmlessness"] + row["helpfulness"] for row in rows}
    assert sums[best] > sums[10]
    assert one.save_policy(tmp_path) == {"selected_update": best}
    assert all(torch.equal(p, weights[best][name]) for name, p in one.model.named_parameters())


@pytest.mark.slow
def test_a_stopped_run_chooses_what_a_whole_one_does(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    one = selecting(whole)
    common.run_trainer(one, whole)
    one.save_policy(whole)
    other = selecting(stopped)
    candidate = other._add_candidate

    def killed():  # when the candidate of update 8 is written and the state of it is not
        candidate()
        if other.state.global_step == 16:
            raise KeyboardInterrupt

    other._add_candidate = killed
    with pytest.raises(KeyboardInterrupt):
        common.run_trainer(other, stopped)
    assert common.last_state(stopped / "checkpoints").name == "checkpoint-12"
    other = selecting(stopped)
    common.run_trainer(other, stopped)
    other.save_policy(stopped)
    assert (whole / "selection.jsonl").read_text() == (stopped / "selection.jsonl").read_text()
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.slow
def test_an_alarm_stops_the_run_and_what_was_saved_is_kept(tmp_path):
    def watched(*stop_on):
        return Watch(limits(["eos=off", "boilerplate=off"]), stop_on)

    settings = {"updates": 12, "prompts_per_update": 64, "judge": None}
    one = selecting(tmp_path, watch=watched("length"), **settings)
    one.candidates.prompts = []
    with pytest.raises(
        Stopped,
        match=r"stopped in update \d+ of 12 by --stop-on length: responses went from .*"
        r"The last good policy is .*checkpoint-\d+/policy",
    ):
        common.run_trainer(one, tmp_path)
    rows = rows_of(tmp_path)
    assert len(rows) == one.update_log.raised["length"] < 12 and rows[-1]["alarms"] == ["length"]
    assert not any("alarms" in row for row in rows[:-1])
    saved = common.last_state(tmp_path / "checkpoints")
    loading.load_policy(str(saved / "policy"))
    # Without it the same run goes on, and no update is in the metrics twice.
    other = selecting(tmp_path, watch=watched(), **settings)
    other.candidates.prompts = []
    common.run_trainer(other, tmp_path)
    assert [row["update"] for row in rows_of(tmp_path)] == list(range(1, 13))
    assert rows_of(tmp_path)[len(rows) - 1]["alarms"] == ["length"]


# --- does it learn? --------------------------------------------------------------------------------------


def learn(tmp_path, words, reward, seed, *, reference=None, **settings):
    """Train a policy that is all but indifferent; returns (trainer, the reference)."""
    chat, make = toys.indifferent(words)
    reference = reference or make(seed)
    settings = {"updates": 25, "learning_rate": 2e-2, "max_new_tokens": 1, **settings}
    one = toys.trainer(tmp_path, chat, make, reward, seed=seed, reference=reference, **settings)
    common.run_trainer(one, tmp_path)
    return one, reference


def next_token(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, -1].softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_two_token_bandit_is_solved(tmp_path, seed):
    def reward(prompts, responses):
        return [{"a": 1.0, "b": 0.5}.get(text, 0.0) for text in responses]

    one, reference = learn(tmp_path, ["go", "a", "b"], reward, seed, kl_coef=0.0)
    values = T([0, 0, 0, 0, 0, 1.0, 0.5])
    policy, before = (next_token(m, one.prompts[0].ids) for m in (one.model.policy, reference))
    assert float(policy @ values) >= 0.99 > float(before @ values)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_reward_for_a_length_is_met(tmp_path, seed):
    """Three words and an end, no more and no less: what is paid comes at the end, for all that was done before."""

    def reward(prompts, responses):
        return [1 - abs(len(text.split()) - 3) / 3 for text in responses]

    one, _ = learn(
        tmp_path,
        ["go"],
        reward,
        seed,
        kl_coef=0.0,
        updates=70,
        max_new_tokens=6,
        learning_rate=1e-2,
        lam=1.0,
        prompts_per_update=128,
        batch_size=128,
    )
    responses = one.answer([one.prompts[0]] * 400, range(400))[1]
    assert sum(reward([], responses)) / 400 >= 0.99
    assert rows_of(tmp_path)[0]["score"] < 0.7


@pytest.mark.slow
def test_the_optimum_under_the_kl_penalty_is_reached(tmp_path):
    """Over all answers of two tokens: the best policy is reference · exp(score / coefficient), normalised."""
    words, beta = ["go", "a", "b"], 0.5
    scores = {"a": 0.5, "b": 0.2, "a b": 1.0, "b a": 0.3, "a a": 0.1, "go go": 0.6}
    one, reference = learn(
        tmp_path,
        words,
        lambda p, r: [scores.get(text, 0.0) for text in r],
        0,
        kl_coef=beta,
        max_new_tokens=2,
        updates=60,
        prompts_per_update=512,
        batch_size=512,
        generation_batch_size=512,
        learning_rate=1e-2,
        lam=1.0,
    )
    prompt, tokens = one.prompts[0].ids, len(toys.CONTROL) + len(words)

    def probabilities(model) -> dict[tuple, float]:
        """Of every answer: an end at once, or a token and any other."""
        first = next_token(model, prompt)
        found = {(1,): float(first[1])}
        for token in set(range(tokens)) - {1}:
            second = next_token(model, torch.cat([prompt, T([token])]))
            found |= {(token, last): float(first[token] * second[last]) for last in range(tokens)}
        return found

    before, policy = probabilities(reference), probabilities(one.model.policy)
    assert sum(before.values()) == pytest.approx(1, abs=1e-5)
    best = {
        answer: share * math.exp(scores.get(said(one.chat, answer), 0.0) / beta) for answer, share in before.items()
    }
    total = sum(best.values())

    def distance(to) -> float:
        return sum(abs(to[answer] - best[answer] / total) for answer in best) / 2

    assert distance(policy) < 0.02 < distance(before) / 5


def said(chat, answer) -> str:
    """The text of an answer's tokens, without its end."""
    return chat.answer([token for token in answer if token != 1], continued=False)[0]
