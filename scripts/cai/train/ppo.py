"""PPO for language models (arXiv 1707.06347, 2009.01325), on `transformers.Trainer`.

    prompts = encode_prompts(rows, chat, policy, settings.max_new_tokens)
    trainer = PPOTrainer(PolicyAndValue(policy, value_model), prompts, chat, reward, settings, arguments, output)
    common.run_trainer(trainer, output)

Read it from top to bottom: the batch arithmetic (`Settings`), the mathematics, the model, and the trainer, whose
`rollout` and `compute_loss` number the steps of the algorithm. The defaults are those of Huang et al.
(arXiv 2403.17031), who reproduced the method figure by figure. Rewards are in train/rewards.py, the alarms that
recognise a run going wrong in train/alarms.py, and what a row of metrics.jsonl holds in train/updates.py.

Only methods that Trainer lets one override are used (`get_train_dataloader`, `compute_loss`, `create_optimizer`,
`log`, `save_model`), so that checkpoints, schedules, mixed precision and several processes are its own.

A response that is too long for a reward model's context gets the lowest score of its update, and is counted as
`overlong`. Leaves out FSDP and DeepSpeed (refused), whitening of rewards, and early stopping within an update. A
response cut at its longest length counts as ended: its last value is not bootstrapped.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from cai.base import cli, hashing
from cai.base.errors import InputError
from cai.models import decoding, engine
from cai.models.chat import Chat, chat_stops
from cai.train import alarms, common, updates
from cai.train.prompts import Prompt
from cai.train.rewards import Reward, Total, compute_scores, fill_overlong
from cai.train.selection import Candidates

# What an additional forward pass costs, in tokens of a pass that runs anyway: fewer do not keep a GPU busy.
PASS_TOKENS = {"cpu": 32, "other": 2048}


@dataclass(frozen=True)
class Settings(updates.Settings):
    """The algorithm's settings; those that GRPO has too, and the counts, are in `updates.Settings`.

    An update draws `prompts_per_update` prompts and one response to each. Every epoch goes once over these rows, in
    `minibatches` of equal size; each minibatch is one optimizer step, computed in forward passes of at most
    `batch_size` rows on each of the `processes`.
    """

    prompts_per_update: int = 128
    epochs: int = 4
    learning_rate: float = 3e-6
    kl_coef: float = 0.05
    generation_batch_size: int = 128
    value_learning_rate: float | None = None  # None: the policy's
    value_warmup: int = 0  # updates that train the value model alone
    kl_estimator: str = "k1"
    kl_target: float | None = None  # None: kl_coef is constant
    kl_horizon: int = 10_000
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    scale_scores: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.kl_target is not None and not self.kl_coef:
            raise InputError(
                "--kl-target with --kl-coef 0",
                expected="a coefficient above 0, which is multiplied until the target is reached",
                remedy="Raise --kl-coef, or leave --kl-target out",
            )

    def draw_prompts(self, update: int, count: int) -> list[int]:
        """The prompts of an update: all of them in a random order, then in another one, and so on.

        They follow from seed and update alone, so that a resumed run needs no saved position.

        Args:
            update: from 0.
            count: how many prompts there are.
        """
        start, end = update * self.prompts_per_update, (update + 1) * self.prompts_per_update
        cycles = range(start // count, -(-end // count))
        seeds = [hashing.hashed_seed(self.seed, "prompts", cycle) for cycle in cycles]
        drawn = np.concatenate([np.random.default_rng(seed).permutation(count) for seed in seeds])
        return drawn[start % count :][: self.prompts_per_update].tolist()

    def draw_minibatches(self, update: int, lengths: Sequence[int], process: int = 0) -> list[list[list[list[int]]]]:
        """The rows of each forward pass of an update, on one process: [epoch][minibatch][pass] -> row numbers.

        The minibatches are drawn without regard to length or to the number of processes; within a minibatch, rows of
        similar length share a pass, so that little is padded.

        Args:
            lengths: tokens of each row.
        """
        draw = np.random.default_rng(hashing.hashed_seed(self.seed, "minibatches", update))
        epochs = []
        for _ in range(self.epochs):
            minibatches = np.split(draw.permutation(self.prompts_per_update), self.minibatches)
            ranked = [sorted(map(int, rows), key=lambda i: (lengths[i], i)) for rows in minibatches]
            shares = [rows[process :: self.processes] for rows in ranked]
            epochs.append([[part.tolist() for part in np.array_split(rows, self.accumulation)] for rows in shares])
        return epochs


# --- the mathematics -----------------------------------------------------------------------------------------
# Tensors of (rows, tokens) hold one number for each response token, from the left of each row; `mask` is true where
# there is a token. Tensors of (tokens,) hold those of several rows one after the other, without padding.


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """An estimate of KL(policy ‖ reference) for each sampled token (Schulman, "Approximating KL divergence").

    Args:
        logprobs, ref_logprobs: of the sampled tokens, any shape.
        estimator: k1 is the log-ratio itself, unbiased; k3 = 1/ρ − 1 + log ρ is never negative and varies less, but
            as a penalty on sampled tokens it has another gradient than the KL.
    """
    log_ratio = logprobs - ref_logprobs
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The reward of each token: the KL penalty at every token, and the response's score at its last one.

    Args:
        scores: (rows,), one per response.
        kl, mask: (rows, tokens); every row has at least one token.
    Returns:
        (rows, tokens), zero outside `mask`.
    """
    last = mask.sum(1, keepdim=True) - 1
    return torch.where(mask, -kl_coef * kl, 0.0).scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16).

    δₜ = rₜ + γ·Vₜ₊₁ − Vₜ and Aₜ = δₜ + γλ·Aₜ₊₁, with nothing after the last token; the returns are A + V.

    Args:
        rewards, values: (rows, tokens); entries outside `mask` are ignored.
    Returns:
        (advantages, returns), both (rows, tokens), zero outside `mask`.
    """
    values, rewards = (torch.where(mask, numbers, 0.0) for numbers in (values, rewards))
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values


def whiten(numbers: Tensor, mask: Tensor) -> Tensor:
    """The numbers shifted and scaled to mean 0 and variance 1 over `mask`; zero elsewhere."""
    masked = numbers[mask]
    return torch.where(mask, (numbers - masked.mean()) * torch.rsqrt(masked.var(correction=0) + 1e-8), 0.0)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7).

    Args:
        logprobs, old_logprobs, advantages: (tokens,).
        clip: how far the ratio ρ of the policy to the one that sampled may be from 1.
    Returns:
        (−min(ρA, clip(ρ)A), ρ), both (tokens,).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each token's value, or that of the value clipped around the old one if it is larger.

    Args:
        values, old_values, returns: (tokens,).
        clip: how far a value may move from its old one.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def merge_moments(moments: Tensor, numbers: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of more and more numbers (Chan et al. 1979).

    Args:
        moments: (3,), of the numbers so far.
        numbers: (n,), the new ones.
    Returns:
        (3,), of all of them.
    """
    count, mean, squares = moments
    shift, total = numbers.mean() - mean, count + len(numbers)
    squares = squares + ((numbers - numbers.mean()) ** 2).sum() + shift**2 * count * len(numbers) / total
    return torch.stack([total, mean + shift * len(numbers) / total, squares])


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − var(returns − values) / var(returns): 1 is perfect, 0 is no better than a constant.

    Args:
        values, returns: (tokens,).
    """
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0


def adapt_kl_coef(kl_coef: float, kl: float, target: float, rows: int, horizon: int) -> float:
    """The KL coefficient of the next update: higher if the KL is above its target, lower if it is below.

    Proportional control with the error clipped to ±0.2 (arXiv 1909.08593, section 2.2).

    Args:
        kl, target: in nats per response.
        rows: responses of the update.
        horizon: responses in which the coefficient changes by the whole error.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * rows / horizon)


def split_by_length(lengths: Sequence[int], overhead: int) -> list[range]:
    """Consecutive rows that are padded together, so that the fewest tokens are computed in all.

    Args:
        lengths: tokens of each row; sorted, there is most to gain.
        overhead: the cost of an additional forward pass, in tokens.
    """
    best = [(0, 0)]  # for the first n rows: tokens in all, and where the last part begins
    for end in range(1, len(lengths) + 1):
        widest, costs = 0, []
        for start in range(end - 1, -1, -1):
            widest = max(widest, lengths[start])
            costs.append((best[start][0] + (end - start) * widest + overhead, start))
        best.append(min(costs))
    ranges, end = [], len(lengths)
    while end:
        start = best[end][1]
        ranges.append(range(start, end))
        end = start
    return ranges[::-1]


# --- the model -----------------------------------------------------------------------------------------------


def split_pass(input_ids: Tensor, response_mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of one forward pass in parts (`split_by_length`), each without the columns that only pad it."""
    columns = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    lengths = (response_mask * columns).amax(1).tolist()
    for rows in split_by_length(lengths, PASS_TOKENS["cpu" if input_ids.device.type == "cpu" else "other"]):
        width = max(lengths[rows.start : rows.stop])
        yield input_ids[rows.start : rows.stop, :width], response_mask[rows.start : rows.stop, :width]


def response_logits(model, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that each response token was drawn from, and the hidden states that the head computed them from.

    The hidden states are selected before the head, so that the logits of prompts and padding are never computed, and
    what a model does after its head (capping, scaling) is still done.

    Args:
        input_ids: (rows, length), prompt and response, padded on the right. No token sees the tokens after it, so
            that neither an attention mask nor positions are needed.
        response_mask: the same shape, true at response tokens, in column 1 at the earliest.
    Returns:
        (logits (tokens, vocabulary), hidden states (tokens, hidden size)).
    """
    hidden = None

    def select_responses(_head, args):
        nonlocal hidden
        hidden = args[0][:, :-1][response_mask[:, 1:]]
        return (hidden.unsqueeze(0),)

    hook = model.get_output_embeddings().register_forward_pre_hook(select_responses)
    try:
        return model(input_ids=input_ids, use_cache=False).logits[0], hidden
    finally:
        hook.remove()


def token_logprobs(logits: Tensor, input_ids: Tensor, response_mask: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (tokens,) of the response tokens under the distribution that they were sampled from."""
    return -F.cross_entropy(logits.float() / temperature, input_ids[response_mask], reduction="none")


class PolicyAndValue(nn.Module):
    """Policy and value model as one module, which Trainer trains.

    Args:
        policy: a causal language model, or a PeftModel.
        value_model: a sequence classifier with one output (the reward model, usually), or a PeftModel. None puts a
            value head on the policy's last hidden states, which costs half as much.
        temperature: of the sampling; log-probabilities are those of the policy at this temperature.
        kl_coef: kept here so that it is saved and restored with the weights, as are the moments of the scores.
    """

    def __init__(self, policy, value_model=None, *, temperature: float = 1.0, kl_coef: float = 0.0):
        super().__init__()
        self.policy, self.temperature = policy, temperature
        if value_model is None:
            self.value = nn.Linear(policy.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)
        else:
            self.value = value_model
        self.has_value_model = value_model is not None
        self.register_buffer("kl_coef", torch.tensor(float(kl_coef)))
        self.register_buffer("score_moments", torch.zeros(3, dtype=torch.float64))  # `merge_moments`

    def forward(self, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of the response tokens; a token's value is that of the tokens before it.

        Args:
            input_ids, response_mask: see `response_logits`.
        Returns:
            (logprobs, values), both (tokens,).
        """
        parts = [self._forward_part(*part) for part in split_pass(input_ids, response_mask)]
        return tuple(torch.cat(numbers) for numbers in zip(*parts, strict=True))

    def _forward_part(self, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        logits, hidden = response_logits(self.policy, input_ids, response_mask)
        if self.has_value_model:
            classifier = base_of(self.value)
            hidden = classifier.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            values = classifier.score(hidden[:, :-1][response_mask[:, 1:]])
        else:
            values = self.value(hidden.to(self.value.weight.dtype))
        return token_logprobs(logits, input_ids, response_mask, self.temperature), values[:, 0].float()

    def train(self, mode: bool = True):
        """Leave dropout off: two forward passes over the same tokens must give the same log-probabilities.

        Only modules that recompute their activations are put into training mode, without which they would not.
        """
        super().train(False)
        for module in self.modules():
            module.training = mode and getattr(module, "gradient_checkpointing", False)
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **_):
        for model in map(base_of, (self.policy, self.value)[: 1 + self.has_value_model]):
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **_):
        """The same under the earlier name in transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, each tensor once: no frozen weights, no second name of a tied weight."""
        buffers = {"kl_coef": self.kl_coef, "score_moments": self.score_moments}
        state = {name: p for name, p in self.named_parameters() if p.requires_grad} | buffers
        return {name: p.detach().contiguous() for name, p in state.items()}

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load a `trained_state` or a complete state; only what training changes can be missing."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = self.trained_state()
        result.missing_keys[:] = [name for name in result.missing_keys if name in trained]
        if strict and (result.missing_keys or result.unexpected_keys):
            raise RuntimeError(f"state of another model: {result}")
        return result


def base_of(model):
    """The model itself, without PEFT's wrapper; its adapters are inside the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --- the trainer ---------------------------------------------------------------------------------------------

# What `compute_loss` takes of a rollout, beside the model's inputs.
TARGETS = ("old_logprobs", "old_values", "advantages", "returns")


@dataclass
class Rollout:
    """The rows of one update, each a prompt and the response to it."""

    sequences: list[Tensor]  # token ids of prompt and response
    prompt_lengths: list[int]
    mask: Tensor  # (rows, tokens)
    scores: Tensor  # (rows,), with the penalty for a missing end
    old_logprobs: Tensor | None = None  # (rows, tokens), as are those below
    old_values: Tensor | None = None
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def batch(self, rows: list[int], pad_id: int) -> dict[str, Tensor]:
        """The model's inputs for some rows: {input_ids, response_mask}, both (rows, length), padded on the right."""
        ids = nn.utils.rnn.pad_sequence([self.sequences[i] for i in rows], True, pad_id)
        columns = torch.arange(ids.shape[1])
        start = torch.tensor([self.prompt_lengths[i] for i in rows]).unsqueeze(1)
        end = torch.tensor([len(self.sequences[i]) for i in rows]).unsqueeze(1)
        return {"input_ids": ids, "response_mask": (columns >= start) & (columns < end)}

    def pick(self, name: str, rows: list[int]) -> Tensor:
        """The numbers `name` of some rows, one row after the other, without padding: (tokens,)."""
        return getattr(self, name)[rows][self.mask[rows]]


class PPOTrainer(Trainer):
    """PPO over prompts.

    Args:
        model: policy and value model.
        prompts: from `encode_prompts`.
        chat: the policy's tokenizer and chat template.
        reward: see train/rewards.py; the parts of a `Total` are logged as well.
        settings: `settings.processes` must be the number of processes.
        arguments: from `common.trainer_arguments`; what `settings` decides is overridden.
        output: folder for metrics and samples.
        reference: frozen policy that the KL is measured against. None takes the policy without its adapters.
        watch: raises the alarms, and says which of them stop the run.
        judge: a second reward that the policy is not trained on, whose mean is logged as `judge`.
        selection: prompts with their kinds, answered whenever a state is saved, and scored by the judge, or by the
            reward if there is no judge: `candidates` keeps the policy that did best.
    Raises:
        InputError: under FSDP or DeepSpeed. `train` raises `Stopped` where an alarm stops the run.
    """

    loss_is_scaled_for_ga = False  # Trainer divides what compute_loss returns by the number of passes

    def __init__(
        self,
        model: PolicyAndValue,
        prompts: Sequence[Prompt],
        chat: Chat,
        reward: Reward,
        settings: Settings,
        arguments: dict,
        output: str | Path,
        reference=None,
        watch: alarms.Watch | None = None,
        judge: Reward | None = None,
        selection: Sequence[Prompt] = (),
    ):
        self.settings, self.chat, self.prompts, self.output = settings, chat, prompts, Path(output)
        self.reward, self.judge, self.reference = reward, judge, reference
        self.candidates = Candidates(selection, output, arguments["output_dir"])
        self.update_log = updates.UpdateLog(output, "ppo", settings, watch or alarms.Watch())
        self.figures: dict[str, float] = {}  # of the row of metrics.jsonl that is logged next
        self.sums = 0  # of `compute_loss`, over the passes of an update
        super().__init__(
            model=model,
            args=TrainingArguments(**decide_arguments(arguments, settings)),
            processing_class=chat.tokenizer,
            callbacks=[self.update_log],
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "PPO does not run under FSDP or DeepSpeed",
                expected="one process, or several with a copy each",
                remedy="Launch with --multi_gpu, and use --lora for a model that does not fit",
            )
        if reference is not None:
            reference.eval().requires_grad_(False).to(self.args.device)
        policy = base_of(model.policy)
        self.stops, self.pad_id = set(chat_stops(chat, policy)), chat.tokenizer.pad_token_id
        self.slow_reason = decoding.slow_reason(policy)
        if self.slow_reason and self.is_world_process_zero():
            cli.warn(decoding.slow_warning("the policy", self.slow_reason))

    # ------------------------------------------------------------------------------------- one update

    def rollout(self, update: int) -> tuple[Rollout, list]:
        """Steps 1 to 7 of an update: sample responses, score them, compute advantages and figures.

        Each process computes its share of the rows and gets all of them, so that every statistic is that of the
        whole batch.

        Args:
            update: from 0.
        Returns:
            (the rows, `Settings.draw_minibatches` of this process).
        """
        settings, model = self.settings, self.accelerator.unwrap_model(self.model)
        clock = self._clock = time.monotonic()

        # 1. Draw prompts.
        prompts = [self.prompts[i] for i in settings.draw_prompts(update, len(self.prompts))]
        conversations, count = [prompt.messages for prompt in prompts], len(prompts)
        share = range(self.args.process_index, count, settings.processes)

        # 2. Sample a response to each. A row has its own seed, so that no process changes another's draws.
        seeds = [hashing.hashed_seed(settings.seed, "rollout", update, row) for row in share]
        responses, texts, ended = self.answer([prompts[row] for row in share], seeds)
        sampled = time.monotonic()

        # 3. Score the responses as text. One that is too long for a reward model gets the lowest score; a penalty is
        #    subtracted from the score of one that did not end.
        parts = self.score([conversations[row] for row in share], texts)
        rows = dict(gather_object(list(zip(share, zip(responses, texts, ended, parts, strict=True), strict=True))))
        responses, texts, ended, parts = zip(*(rows[row] for row in range(count)), strict=True)
        parts = {name: [part[name] for part in parts] for name in parts[0]}
        raw_scores = parts.pop("score")
        scores, scale, ended = torch.tensor(fill_overlong(raw_scores)), 1.0, torch.tensor(ended)
        if settings.scale_scores:
            model.score_moments.copy_(merge_moments(model.score_moments.cpu(), scores.double()))
            n, _, squares = model.score_moments.tolist()
            scale = math.sqrt(squares / n) or 1.0
        lengths = torch.tensor([len(response) for response in responses])
        rollout = Rollout(
            sequences=[torch.cat([prompt.ids, ids]) for prompt, ids in zip(prompts, responses, strict=True)],
            prompt_lengths=[len(prompt.ids) for prompt in prompts],
            mask=torch.arange(int(lengths.max())) < lengths.unsqueeze(1),
            scores=scores / scale - settings.missing_eos_penalty * ~ended,
        )
        scored = time.monotonic()

        # 4. Log-probabilities of the policy, values, and log-probabilities of the reference, in exactly the forward
        #    passes of the first epoch: until the first step, the ratio is 1 to the last bit.
        epochs = settings.draw_minibatches(update, [len(ids) for ids in rollout.sequences], self.args.process_index)
        self._compute_logprobs(rollout, list(itertools.chain.from_iterable(epochs[0])))

        # 5. A reward for each token: the KL penalty, and the score at the last token.
        kl_coef = float(model.kl_coef)
        kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, settings.kl_estimator)
        rewards = token_rewards(rollout.scores, kl, rollout.mask, kl_coef)

        # 6. Advantages and returns; the advantages are whitened over the batch.
        advantages, rollout.returns = gae(rewards, rollout.old_values, rollout.mask, settings.gamma, settings.lam)
        rollout.advantages = whiten(advantages, rollout.mask)

        # 7. Figures (`updates.FIGURES`), alarms, and the KL coefficient of the next update, if it has a target.
        values, returns = (rollout.pick(name, list(range(count))) for name in ("old_values", "returns"))
        response_kl = torch.where(rollout.mask, rollout.old_logprobs - rollout.ref_logprobs, 0.0).sum(1)
        self.figures = {
            "update": update + 1,
            "episodes": (update + 1) * count,
            "score": float(scores.mean()),
            "score_std": float(scores.std(correction=0)),
            **({"score_scale": scale} if settings.scale_scores else {}),
            **({"overlong": raw_scores.count(None)} if None in raw_scores else {}),
            **describe_parts(parts),
            "kl": float(response_kl.mean()),
            "kl_coef": kl_coef,
            "reward": float(rewards.sum(1).mean()),
            "entropy": -float(rollout.pick("old_logprobs", list(range(count))).mean()),
            "response_length": float(lengths.float().mean()),
            "eos_rate": float(ended.float().mean()),
            "value": float(values.mean()),
            "return": float(returns.mean()),
            "explained_variance": explained_variance(values, returns),
            "seconds_sampling": sampled - clock,
            "seconds_scoring": scored - sampled,
            "seconds_forward": time.monotonic() - scored,
        }
        if settings.kl_target is not None:
            mean_kl = self.figures["kl"]
            model.kl_coef.fill_(adapt_kl_coef(kl_coef, mean_kl, settings.kl_target, count, settings.kl_horizon))
        if update % settings.samples_every == 0 and self.is_world_process_zero():
            samples = [
                {
                    "prompt": conversations[row],
                    "response": texts[row],
                    "score": None if raw_scores[row] is None else round(float(scores[row]), 4),
                    "kl": round(float(response_kl[row]), 4),
                    "tokens": int(lengths[row]),
                    "ended": bool(ended[row]),
                }
                for row in range(min(updates.SAMPLES_PER_UPDATE, count))
            ]
            updates.write_samples(self.output, update + 1, samples)
        if alarm := self.update_log.check(self.figures, conversations, texts):
            figures, self.figures = self.figures, {}
            self.log(figures)  # the row that says why the run ends here
            self.update_log.stop(alarm, update + 1, self.args.output_dir)
        self._clock = time.monotonic()
        return rollout, epochs

    def get_train_dataloader(self) -> Iterator[dict[str, Tensor]]:
        """8. Several epochs of minibatches over the rows of an update, one optimizer step per minibatch.

        Trainer asks for one minibatch at a time, so that each rollout is the newest policy's.
        """
        if not self.state.global_step:
            self._add_candidate()
        while self.state.global_step < self.args.max_steps:
            rollout, epochs = self.rollout(self.state.global_step // self.settings.steps_per_update)
            for passes in itertools.chain.from_iterable(epochs):
                tokens = sum(gather_object([sum(int(rollout.mask[rows].sum()) for rows in passes)]))
                for rows in passes:
                    yield {
                        **rollout.batch(rows, self.pad_id),
                        **{name: rollout.pick(name, rows) for name in TARGETS},
                        "minibatch_tokens": tokens,
                    }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """9. The loss of one forward pass: its share of the mean over the minibatch's tokens."""
        settings = self.settings
        logprobs, values = model(inputs["input_ids"], inputs["response_mask"])
        surrogate, ratio = policy_loss(logprobs, inputs["old_logprobs"], inputs["advantages"], settings.clip_range)
        error = value_loss(values, inputs["old_values"], inputs["returns"], settings.value_clip_range)
        # Trainer divides by the number of passes, and several processes average their gradients: undo both.
        share = self.current_gradient_accumulation_steps * settings.processes / inputs["minibatch_tokens"]
        # A reward model says nothing of tokens before the last one: until its values mean something, the policy stays.
        is_warmup = self.state.global_step < settings.value_warmup * settings.steps_per_update
        loss = ((0.0 if is_warmup else 1.0) * surrogate.sum() + settings.vf_coef * error.sum()) * share
        if not torch.isfinite(loss):
            raise common.describe_not_finite(self, "the losses are")
        with torch.no_grad():
            update_kl = kl_penalty(inputs["old_logprobs"], logprobs, "k3")
            clipped = (ratio - 1).abs() > settings.clip_range
            columns = (torch.ones_like(ratio), surrogate, error, clipped, ratio, update_kl)
            self.sums = self.sums + torch.stack([column.sum() for column in columns])
        return (loss, (logprobs, values)) if return_outputs else loss

    # ------------------------------------------------------------------------------- parts of an update

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> tuple[list[Tensor], list[str], list[bool]]:
        """(responses as token ids, as text with their prefills, whether each came to its end)."""
        responses = self.sample([prompt.ids for prompt in prompts], seeds)
        ended = [int(response[-1]) in self.stops for response in responses]
        texts = [
            prompt.read_answer(self.chat, response[:-1] if end else response)
            for prompt, response, end in zip(prompts, responses, ended, strict=True)
        ]
        return responses, texts, ended

    def sample(self, prompts: Sequence[Tensor], seeds: Sequence[int]) -> list[Tensor]:
        """A response to each prompt (token ids in and out), with its end token if it came to one."""
        model = self.accelerator.unwrap_model(self.model)
        settings, responses = self.settings, [None] * len(prompts)
        sampling = engine.Sampling(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature)
        model.eval()
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), settings.generation_batch_size):
            rows = order[start : start + settings.generation_batch_size]
            sampler = decoding.RowSampler(sampling, [seeds[i] for i in rows])
            # Each prompt is drawn once, so that little is shared: a template's beginning is not worth its own pass.
            generated = decoding.generate_tokens(
                base_of(model.policy),
                [prompts[i].tolist() for i in rows],
                sampler,
                stop_ids=self.stops,
                pad_id=self.pad_id,
            )
            with torch.no_grad(), self.accelerator.autocast():
                for i, response in generated:
                    responses[rows[i]] = torch.tensor(response)
            sampler.check("the policy")
        model.train()
        return responses

    def score(self, conversations: list[list[dict]], texts: list[str]) -> list[dict[str, float | None]]:
        """For each response its score, the parts of it if the reward has several, and the judge's score."""
        columns = {"score": compute_scores(self.reward, "the reward", conversations, texts)}
        if isinstance(self.reward, Total) and len(self.reward.parts) > 1:
            columns |= {f"score_{name}": scores for name, scores in self.reward.parts.items()}
        if self.judge is not None:
            columns["judge"] = compute_scores(self.judge, "the judge", conversations, texts)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _compute_logprobs(self, rollout: Rollout, passes: list[list[int]]) -> None:
        """Step 4 of `rollout`, in the given forward passes; the shares of all processes are put together."""
        rows_and_numbers = []
        self.model_wrapped.train()
        with torch.no_grad():
            for rows in passes:
                batch = {name: x.to(self.args.device) for name, x in rollout.batch(rows, self.pad_id).items()}
                numbers = torch.stack([*self.model_wrapped(**batch), self._reference_logprobs(**batch)]).cpu()
                sizes = rollout.mask[rows].sum(1).tolist()
                rows_and_numbers.extend(zip(rows, numbers.split(sizes, dim=1), strict=True))
        table = torch.zeros(3, *rollout.mask.shape)
        for row, numbers in gather_object(rows_and_numbers):
            table[:, row, : numbers.shape[1]] = numbers
        if not torch.isfinite(table).all():
            raise common.describe_not_finite(self, "the log-probabilities or values are")
        rollout.old_logprobs, rollout.old_values, rollout.ref_logprobs = table

    def _reference_logprobs(self, input_ids: Tensor, response_mask: Tensor) -> Tensor:
        """Log-probabilities (tokens,) of the response tokens by the reference."""
        policy = self.accelerator.unwrap_model(self.model).policy
        adapters_off = policy.disable_adapter() if self.reference is None else nullcontext()
        reference = policy if self.reference is None else self.reference
        with adapters_off, self.accelerator.autocast():
            return torch.cat(
                [
                    token_logprobs(response_logits(reference, *part)[0], *part, self.settings.temperature)
                    for part in split_pass(input_ids, response_mask)
                ]
            )

    # --------------------------------------------------------------------- optimizer, metrics, saving

    def create_optimizer(self, model=None):
        """Trainer's optimizer, with a separate learning rate for the value model."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            policy_rate = self.settings.learning_rate
            rates = {"policy.": policy_rate, "value.": self.settings.value_learning_rate or policy_rate}
            trained = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            # Named here because Trainer does not: PyTorch's AdamW would take 0.01.
            decay = self.args.weight_decay
            groups = [
                {"params": [p for name, p in trained if name.startswith(part)], "lr": rate, "weight_decay": decay}
                for part, rate in rates.items()
            ]
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row per update: Trainer's figures and ours."""
        if torch.is_tensor(self.sums):
            tokens, *sums = self.accelerator.reduce(self.sums, "sum").tolist()
            self.sums = 0
            names = ("policy_loss", "value_loss", "clip_fraction", "ratio", "update_kl")
            self.figures |= {name: total / tokens for name, total in zip(names, sums, strict=True)}
            self.figures["seconds_training"] = time.monotonic() - self._clock
            logs, self.figures = {**self.figures, **logs}, {}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint to resume from, with the policy in it as a folder that `--model` reads.

        Raises CaiError instead of writing weights that are not finite: the checkpoint before stays.
        """
        model = self.accelerator.unwrap_model(self.model)
        self.check_finite(model)
        self._add_candidate()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(model.trained_state(), folder / "model.safetensors", metadata={"format": "pt"})
            common.save_checkpoint(model.policy, self.chat.tokenizer, folder / "policy", merge=False)
            self.update_log.save_alarms(folder)

    def check_finite(self, model: PolicyAndValue) -> None:
        """Raise CaiError if a weight is not finite."""
        for name, weights in model.trained_state().items():
            if not torch.isfinite(weights).all():
                raise common.describe_not_finite(self, f"the weights ({name}) are")

    def _add_candidate(self) -> None:
        """Answer and score the prompts of `candidates`, if there are any, and enter the policy among them."""
        prompts, model = self.candidates.prompts, self.accelerator.unwrap_model(self.model)
        if not prompts:
            return
        share = range(self.args.process_index, len(prompts), self.settings.processes)
        # The same draws for every candidate, so that only the policies differ.
        seeds = [hashing.hashed_seed(self.settings.seed, "selection", row) for row in share]
        _, texts, _ = self.answer([prompts[row] for row in share], seeds)
        reward, name = (self.judge, "the judge") if self.judge else (self.reward, "the reward")
        scores = compute_scores(reward, name, [prompts[row].messages for row in share], texts)
        by_row = dict(gather_object(list(zip(share, scores, strict=True))))
        if self.is_world_process_zero():
            update = self.state.global_step // self.settings.steps_per_update
            scores = fill_overlong([by_row[row] for row in range(len(prompts))])
            self.candidates.add(update, scores, model.trained_state)

    def save_policy(self, output: str | Path, *, merge: bool = True) -> dict:
        """Write the policy, of several candidates the best, and delete the states to resume from.

        Args:
            merge: write adapters merged into the weights, else alone.
        Returns:
            {selected_update} if there are candidates.
        """
        wrapper = self.accelerator.unwrap_model(self.model)
        selected = self.candidates.best() if self.candidates.prompts else None
        if selected is not None:
            wrapper.load_state_dict(load_file(self.candidates.weights(selected)))
        self.check_finite(wrapper)
        if self.is_world_process_zero():
            common.save_checkpoint(wrapper.policy, self.chat.tokenizer, output, merge=merge)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            common.delete_states(output)
        return {} if selected is None else {"selected_update": selected}


def decide_arguments(arguments: dict, settings: Settings) -> dict:
    """Trainer's arguments with what `settings` decides: steps, batches, schedule, and when to log and save."""
    return {
        **arguments,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "adam_epsilon": 1e-5,
        # One row of metrics per update, and checkpoints between updates only.
        "logging_strategy": "steps",
        "logging_steps": settings.steps_per_update,
        "logging_first_step": False,
        "logging_nan_inf_filter": False,
        "save_steps": arguments["save_steps"] * settings.steps_per_update,
        # The position in the data follows from the step.
        "ignore_data_skip": True,
    }


def describe_parts(parts: dict[str, list[float | None]]) -> dict[str, float]:
    """Figures of the parts of the reward and of the judge: the mean of each, and the judge's deviation.

    Args:
        parts: name -> one score per response, None for a response that was too long.
    """
    known = {name: torch.tensor([score for score in scores if score is not None]) for name, scores in parts.items()}
    figures = {name: float(scores.mean()) for name, scores in known.items() if len(scores)}
    return figures | ({"judge_std": float(known["judge"].std(correction=0))} if "judge" in figures else {})
