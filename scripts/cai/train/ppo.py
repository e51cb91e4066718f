"""PPO for language models (arXiv 1707.06347, 2009.01325), on `transformers.Trainer`.

    prompts = encode_prompts(conversations, chat, policy, settings.max_new_tokens)
    trainer = PPOTrainer(PolicyAndValue(policy, value_model), prompts, chat, reward, settings, arguments, output)
    training.run_trainer(trainer, output)

Read it from top to bottom: the batch arithmetic (`Settings`), the mathematics, the model, and the trainer, whose
`rollout` and `compute_loss` number the steps of the algorithm. The defaults are those of Huang et al.
(arXiv 2403.17031), who reproduced the method figure by figure. Rewards are in cai/scoring.py, and what gives away
a run that goes wrong in cai/alarms.py.

Trainer is used through what it lets one override (`get_train_dataloader`, `compute_loss`, `create_optimizer`,
`log`, `save_model`), so that checkpoints, schedules, mixed precision and several processes are its own.

Leaves out FSDP and DeepSpeed (refused), whitening of rewards, and early stopping within an update. A response
cut at its longest length counts as ended: its last value is not bootstrapped.
"""

import itertools
import json
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
from transformers import GenerationConfig, Trainer, TrainingArguments

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.base.hashing import hashed_seed
from cai.data import outputs, readers
from cai.models.chat import Chat, chat_stops
from cai.models.decoding import Prefixes, RowSampler, decode, slow_reason, slow_warning
from cai.models.engine import Sampling
from cai.train import common
from cai.train.alarms import Watch
from cai.train.prompts import Prompt
from cai.train.rewards import Reward, Total, checked
from cai.train.selection import axis_means, choose_update
from cai.train.updates import ALARMS, SAMPLES, Stopped, UpdateLog

SELECTION = "selection.jsonl"

# What one more forward pass costs, in tokens of one that is under way anyway: a GPU is not busy with fewer.
PASS_TOKENS = {"cpu": 32, "other": 2048}


@dataclass(frozen=True)
class Settings:
    """The algorithm's settings, and every count that follows from them.

    An update draws `prompts_per_update` prompts, one response each. Every epoch goes once over these rows, in
    `minibatches` of equal size; each minibatch is one optimizer step, computed in forward passes of at most
    `batch_size` rows on each of the `processes`.
    """

    updates: int = 100
    prompts_per_update: int = 128
    epochs: int = 4
    minibatches: int = 1
    batch_size: int = 8
    generation_batch_size: int = 128
    processes: int = 1
    learning_rate: float = 3e-6
    value_learning_rate: float | None = None  # None: the policy's
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_target: float | None = None  # None: kl_coef stays as it is
    kl_horizon: int = 10_000
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 0.7
    max_new_tokens: int = 256
    missing_eos_penalty: float = 1.0
    scale_scores: bool = False
    samples_every: int = 10
    seed: int = 0

    def __post_init__(self):
        for name, parts in (("minibatches", self.minibatches), ("processes", self.minibatches * self.processes)):
            if self.prompts_per_update % parts:
                raise InputError(
                    f"{self.prompts_per_update} prompts do not divide by {parts} ({name})",
                    where="--prompts-per-update",
                    expected=f"a multiple of {parts}",
                )

    @property
    def accumulation(self) -> int:
        """Forward passes to one optimizer step, on each process."""
        return math.ceil(self.prompts_per_update / self.minibatches / self.processes / self.batch_size)

    @property
    def steps_per_update(self) -> int:
        return self.epochs * self.minibatches

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.updates * self.steps_per_update

    @property
    def episodes(self) -> int:
        return self.updates * self.prompts_per_update

    def prompts_of(self, update: int, count: int) -> list[int]:
        """Which of `count` prompts an update (from 0) draws: all in a random order, then in another, and so on.

        They follow from seed and update alone, so that a resumed run needs no place in a file.
        """
        start = update * self.prompts_per_update
        drawn, passed = [], start // count
        while len(drawn) < start % count + self.prompts_per_update:
            drawn.extend(np.random.default_rng(hashed_seed(self.seed, "prompts", passed)).permutation(count))
            passed += 1
        return [int(i) for i in drawn[start % count :][: self.prompts_per_update]]

    def microbatches(self, update: int, lengths: Sequence[int], process: int = 0) -> list[list[list[list[int]]]]:
        """Rows of each forward pass of an update, for one process: [epoch][minibatch][pass] -> row numbers.

        The minibatches are drawn without regard to length or to the number of processes; within one, rows of
        like length go together, so that little is padded.
        """
        draw = np.random.default_rng(hashed_seed(self.seed, "minibatches", update))
        epochs = []
        for _ in range(self.epochs):
            minibatches = np.split(draw.permutation(self.prompts_per_update), self.minibatches)
            ranked = [sorted(map(int, rows), key=lambda i: (lengths[i], i)) for rows in minibatches]
            mine = [rows[process :: self.processes] for rows in ranked]
            epochs.append([[part.tolist() for part in np.array_split(rows, self.accumulation)] for rows in mine])
        return epochs


# Tensors of (rows, tokens) hold one number for each response token, row by row from the left; mask is true
# where there is one. Tensors of (tokens,) hold those of several rows one after the other, without padding.


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """An estimate of KL(policy ‖ reference) for each sampled token (Schulman, "Approximating KL divergence").

    k1 is the log-ratio itself, unbiased; k3 = 1/ρ − 1 + log ρ is never negative and varies less, and as a
    penalty on sampled tokens it has another gradient than the KL has.
    """
    log_ratio = logprobs - ref_logprobs
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (rows, tokens): the KL penalty at every token, and the response's score at its last one.

    scores: (rows,), one a response. Every row has a token at least.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): (advantages, returns), both (rows, tokens).

    δₜ = rₜ + γ·Vₜ₊₁ − Vₜ and Aₜ = δₜ + γλ·Aₜ₊₁, with nothing after the last token; the returns are A + V.
    """
    values = torch.where(mask, values, 0.0)
    rewards = torch.where(mask, rewards, 0.0)
    following = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values


def whiten(numbers: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the masked numbers; 0 elsewhere."""
    chosen = numbers[mask]
    return torch.where(mask, (numbers - chosen.mean()) * torch.rsqrt(chosen.var(correction=0) + 1e-8), 0.0)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(the clipped surrogate −min(ρA, clip(ρ)A), the ratio ρ), both for each token."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error for each token; the larger of that and of a value kept near the old one."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def merged(moments: Tensor, numbers: Tensor) -> Tensor:
    """(count, mean, sum of squared deviations) of all numbers so far and these (Chan et al. 1979)."""
    count, mean, squares = moments
    shift, total = numbers.mean() - mean, count + len(numbers)
    squares = squares + ((numbers - numbers.mean()) ** 2).sum() + shift**2 * count * len(numbers) / total
    return torch.stack([total, mean + shift * len(numbers) / total, squares])


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − var(returns − values) / var(returns): 1 is perfect, 0 is no better than a constant."""
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0


def adapted(kl_coef: float, kl: float, target: float, rows: int, horizon: int) -> float:
    """The coefficient of the next update: up where the KL is above its target, down where it is below.

    Proportional control with the error cut at ±0.2 (arXiv 1909.08593, section 2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * rows / horizon)


def parts(lengths: Sequence[int], overhead: int) -> list[range]:
    """Neighbouring rows that are padded together, so that fewest tokens are computed in all.

    Args:
        lengths: tokens of each row; sorted, there is most to gain.
        overhead: what a forward pass more costs, in tokens.
    """
    best = [(0, 0)]  # of the first n rows: tokens, and where the last part begins
    for end in range(1, len(lengths) + 1):
        widest, found = 0, []
        for start in range(end - 1, -1, -1):
            widest = max(widest, lengths[start])
            found.append((best[start][0] + (end - start) * widest + overhead, start))
        best.append(min(found))
    found, end = [], len(lengths)
    while end:
        start = best[end][1]
        found.append(range(start, end))
        end = start
    return found[::-1]


def trimmed(input_ids: Tensor, response_mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of one forward pass in `parts`, each without the columns that are padding in all of its rows."""
    place = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    lengths = (response_mask * place).amax(1).tolist()
    for rows in parts(lengths, PASS_TOKENS["cpu" if input_ids.device.type == "cpu" else "other"]):
        width = max(lengths[rows.start : rows.stop])
        yield input_ids[rows.start : rows.stop, :width], response_mask[rows.start : rows.stop, :width]


def response_logits(model, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (tokens, vocabulary) that each response token was drawn from, and what the head made them of.

    The hidden states are picked in front of the head, so that the logits of prompts and padding are never
    computed, and what a model does after its head (capping, scaling) is still done.

    Args:
        input_ids: (rows, length), prompt and response, padded on the right. No token sees what comes after
            it, so that neither an attention mask nor positions are needed.
        response_mask: the same shape, true at response tokens, in column 1 at the earliest.
    """
    hidden = None

    def pick(_head, args):
        nonlocal hidden
        hidden = args[0][:, :-1][response_mask[:, 1:]]
        return (hidden.unsqueeze(0),)

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        return model(input_ids=input_ids, use_cache=False).logits[0], hidden
    finally:
        hook.remove()


def token_logprobs(logits: Tensor, input_ids: Tensor, response_mask: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (tokens,) of the response tokens under the distribution they were sampled from."""
    return -F.cross_entropy(logits.float() / temperature, input_ids[response_mask], reduction="none")


class PolicyAndValue(nn.Module):
    """Policy and value model as one module, which Trainer trains.

    Args:
        policy: a causal language model, or a PeftModel of one.
        value_model: a sequence classifier with one output (the reward model, usually), or a PeftModel of one.
            None puts a value head on the policy's last hidden states, which costs half as much.
        temperature: of the sampling; log-probabilities are those of the policy at this temperature.
        kl_coef: kept here so that it is saved and restored with the weights, as the scores' moments are.
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
        self.register_buffer("score_moments", torch.zeros(3, dtype=torch.float64))  # of `merged`

    def forward(self, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(logprobs, values) of the response tokens, both (tokens,); see `response_logits` for the arguments.

        A token's value is that of what stands before it.
        """
        found = [self._forward(*part) for part in trimmed(input_ids, response_mask)]
        logprobs, values = (torch.cat(numbers) for numbers in zip(*found, strict=True))
        return logprobs, values

    def _forward(self, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        logits, hidden = response_logits(self.policy, input_ids, response_mask)
        logprobs = token_logprobs(logits, input_ids, response_mask, self.temperature)
        if self.has_value_model:
            classifier = base_of(self.value)
            hidden = classifier.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            values = classifier.score(hidden[:, :-1][response_mask[:, 1:]])
        else:
            values = self.value(hidden.to(self.value.weight.dtype))
        return logprobs, values[:, 0].float()

    def train(self, mode: bool = True):
        """Dropout stays off: two forward passes over the same tokens must give the same log-probabilities.

        Only modules that recompute their activations are told that this is training, or they would not.
        """
        super().train(False)
        for module in self.modules():
            module.training = mode and getattr(module, "gradient_checkpointing", False)
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **_):
        for model in (self.policy, self.value)[: 1 + self.has_value_model]:
            model = base_of(model)
            new_name = hasattr(model, "activation_checkpointing_enable")
            enable = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
            enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **_):
        """The same under the name that transformers used before."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, each tensor once: no frozen weights, no second name of a tied one."""
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        named |= {"kl_coef": self.kl_coef, "score_moments": self.score_moments}
        return {name: p.detach().contiguous() for name, p in named.items()}

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Takes `trained_state` as well as a whole state; only what training changes can be missing."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = self.trained_state()
        result.missing_keys[:] = [name for name in result.missing_keys if name in trained]
        if strict and (result.missing_keys or result.unexpected_keys):
            raise RuntimeError(f"state of another model: {result}")
        return result


def base_of(model):
    """The model itself, without PEFT around it (its adapters are inside)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass
class Rollout:
    """The rows of one update: what was drawn, and one number a token where it says (rows, tokens)."""

    sequences: list[Tensor]  # prompt and response, token ids
    prompt_lengths: list[int]
    mask: Tensor  # (rows, tokens)
    scores: Tensor  # (rows,), the penalty for a missing end included
    old_logprobs: Tensor | None = None  # (rows, tokens), and so are those below
    old_values: Tensor | None = None
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def batch(self, rows: list[int], pad_id: int) -> dict[str, Tensor]:
        """Model inputs of some rows: token ids padded on the right as far as they need, and where responses are."""
        ids = nn.utils.rnn.pad_sequence([self.sequences[i] for i in rows], True, pad_id)
        place = torch.arange(ids.shape[1])
        start = torch.tensor([self.prompt_lengths[i] for i in rows]).unsqueeze(1)
        end = torch.tensor([len(self.sequences[i]) for i in rows]).unsqueeze(1)
        return {"input_ids": ids, "response_mask": (place >= start) & (place < end)}

    def pick(self, name: str, rows: list[int]) -> Tensor:
        """The numbers `name` of some rows, one row after the other, without padding: (tokens,)."""
        return getattr(self, name)[rows][self.mask[rows]]


class PPOTrainer(Trainer):
    """PPO over prompts, with a reward of its caller's choice.

    While it trains it keeps watch (`watch`), asks a judge that the policy is not trained on (`judge`), and sets aside
    the policy that did best on the prompts of `selection` (`best`).

    Args:
        model: policy and value model.
        prompts: from `encode_prompts`.
        chat: the policy's tokenizer and chat template.
        reward: see cai/scoring.py; of a `Total` the parts are logged as well.
        settings: see there; `settings.processes` must be the number of processes.
        arguments: from `common.trainer_arguments`; what `settings` decides is put in here.
        output: folder for metrics and samples.
        reference: frozen policy that the KL is measured against. None takes the policy without its adapters.
        stops: token ids that end a response; None asks the tokenizer and the policy.
        watch: raises the alarms, and says which of them stop the run.
        judge: a second reward whose mean is logged as `judge`.
        selection: prompts with their kinds, answered whenever a state is saved, and scored by the judge, without one
            by the reward.

    Raises InputError under FSDP or DeepSpeed. `Stopped` leaves `train` where an alarm stops the run.
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
        stops: Sequence[int] | None = None,
        watch: Watch | None = None,
        judge: Reward | None = None,
        selection: Sequence[Prompt] = (),
    ):
        per_update = settings.steps_per_update
        arguments = {
            **arguments,
            "max_steps": settings.steps,
            "per_device_train_batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulation,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "adam_epsilon": 1e-5,
            # One row of metrics an update, and checkpoints between updates only.
            "logging_strategy": "steps",
            "logging_steps": per_update,
            "logging_first_step": False,
            "logging_nan_inf_filter": False,
            "save_steps": arguments["save_steps"] * per_update,
            # The place in the data follows from the step.
            "ignore_data_skip": True,
        }
        self.settings, self.chat, self.reward, self.reference = settings, chat, reward, reference
        self.prompts, self.output = prompts, Path(output)
        self.judge, self.selection = judge, list(selection)
        self.watch = Watch() if watch is None else watch
        self.raised: dict[str, int] = {}  # alarm -> the update that it was first raised in
        self.update_log = UpdateLog(output, "ppo", settings.steps_per_update)
        super().__init__(
            model=model,
            args=TrainingArguments(**arguments),
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
        self.stops = set(chat_stops(chat, policy) if stops is None else stops)
        self.pad_id = chat.tokenizer.pad_token_id
        self.slow_reason = slow_reason(policy)
        if self.slow_reason and self.is_world_process_zero():
            cli.warn(slow_warning("the policy", self.slow_reason))
        self.figures: dict[str, float] = {}
        self.sums = None

    # ------------------------------------------------------------------------------- what Trainer asks for

    def get_train_dataloader(self) -> Iterator[dict[str, Tensor]]:
        """The batches of all updates. Asked for a minibatch at a time, so each rollout is the newest policy's."""
        if self.state.global_step:
            state = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / ALARMS
            self.watch.restore(json.loads(state.read_text(encoding="utf-8")))
        else:
            self._candidate()
        while self.state.global_step < self.args.max_steps:
            update = self.state.global_step // self.settings.steps_per_update
            rollout, epochs = self.rollout(update)
            # 8. Several epochs of minibatches over the same rows, one optimizer step a minibatch.
            for minibatches in epochs:
                for passes in minibatches:
                    own = sum(int(rollout.mask[rows].sum()) for rows in passes)
                    tokens = sum(gather_object([own]))
                    for rows in passes:
                        yield {
                            **rollout.batch(rows, self.pad_id),
                            **{
                                name: rollout.pick(name, rows)
                                for name in ("old_logprobs", "old_values", "advantages", "returns")
                            },
                            "minibatch_tokens": tokens,
                        }

    def create_optimizer(self, model=None):
        """Trainer's optimizer, with a learning rate of its own for the value model."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            rates = {
                False: self.settings.learning_rate,
                True: self.settings.value_learning_rate or self.settings.learning_rate,
            }
            self.optimizer = kind(
                [
                    {
                        "params": [
                            p
                            for name, p in model.named_parameters()
                            if p.requires_grad and name.startswith("value.") == of_value
                        ],
                        "lr": rate,
                    }
                    for of_value, rate in rates.items()
                ],
                **options,
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row an update: Trainer's figures and ours."""
        if self.sums is not None:
            tokens, policy, value, clipped, ratio, moved = self.accelerator.reduce(self.sums, "sum").tolist()
            self.sums = None
            self.figures |= {
                "policy_loss": policy / tokens,
                "value_loss": value / tokens,
                "clip_fraction": clipped / tokens,
                "ratio": ratio / tokens,
                "update_kl": moved / tokens,
                "seconds_training": time.monotonic() - self._clock,
            }
            logs, self.figures = {**self.figures, **logs}, {}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint to resume from, with the policy in it as a folder that `--model` reads.

        Raises CaiError rather than write weights that are not numbers: the checkpoint before stays.
        """
        model = self.accelerator.unwrap_model(self.model)
        self.check_finite(model)
        self._candidate()
        state = model.trained_state()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            model.policy.save_pretrained(folder / "policy")
            self.chat.tokenizer.save_pretrained(folder / "policy")
            (folder / ALARMS).write_text(json.dumps(self.watch.state()), encoding="utf-8")

    def check_finite(self, model: PolicyAndValue) -> None:
        """Raise CaiError if a weight is not a number."""
        for name, weights in model.trained_state().items():
            if not torch.isfinite(weights).all():
                raise self._not_a_number(f"weights ({name})")

    def _not_a_number(self, what: str) -> CaiError:
        return CaiError(
            f"the {what} are not finite at step {self.state.global_step} of {self.state.max_steps}. "
            f"{self.last_saved()}. Start anew with a lower --learning-rate, or --dtype float32"
        )

    def last_saved(self) -> str:
        """Where the newest saved policy is, in words."""
        kept = common.last_state(Path(self.args.output_dir))
        return "No checkpoint was saved yet" if kept is None else f"The last good policy is {kept / 'policy'}"

    # ------------------------------------------------------------------------------ which policy is taken

    def _candidate(self) -> None:
        """Answer the prompts of `selection` and write the scores; the weights too if none before did better."""
        if not self.selection:
            return
        update = self.state.global_step // self.settings.steps_per_update
        mine = range(self.args.process_index, len(self.selection), self.settings.processes)
        prompts = [self.selection[row] for row in mine]
        # The same draws for every candidate, so that only the policies differ.
        seeds = [hashed_seed(self.settings.seed, "selection", row) for row in mine]
        _, texts, _ = self.answer(prompts, seeds)
        asked = checked(self.judge or self.reward, "the judge" if self.judge else "the reward")
        scores = asked([prompt.messages for prompt in prompts], texts)
        found = dict(gather_object(list(zip(mine, scores, strict=True))))
        if not self.is_world_process_zero():
            return
        kinds, scores = [prompt.kind for prompt in self.selection], [found[i] for i in range(len(self.selection))]
        rows = [row for row in self._candidates() if row["update"] < update]
        before = choose_update(kinds, {row["update"]: row["scores"] for row in rows}) if rows else update
        rows.append({"update": update, **axis_means(kinds, scores), "scores": scores})
        outputs.write_jsonl(self.output / SELECTION, rows)
        best = self.best()
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if best == update:
            model = self.accelerator.unwrap_model(self.model)
            save_file(model.trained_state(), folder / f"candidate-{update}.safetensors", metadata={"format": "pt"})
        # The best of the state before stays until this one is saved: a killed run goes on from there.
        for file in folder.glob("candidate-*.safetensors"):
            if int(file.stem.partition("-")[2]) not in (best, before):
                file.unlink()

    def _candidates(self) -> list[dict]:
        path = self.output / SELECTION
        return [row for _, row in readers.read_jsonl(path)] if path.exists() else []

    def best(self) -> int:
        """The update whose policy is chosen (0: the start)."""
        kinds = [prompt.kind for prompt in self.selection]
        return choose_update(kinds, {row["update"]: row["scores"] for row in self._candidates()})

    def load_best(self) -> int:
        """Put the weights of the chosen policy into the model; returns its update."""
        best = self.best()
        state = load_file(Path(self.args.output_dir) / f"candidate-{best}.safetensors")
        self.accelerator.unwrap_model(self.model).load_state_dict(state)
        return best

    # --------------------------------------------------------------------------------------- one update

    def rollout(self, update: int) -> tuple[Rollout, list]:
        """Steps 1 to 7: the rows of one update, and which of them go into each forward pass.

        Each process makes its share of the rows and gets all of them, so that every statistic is that of the
        whole batch.
        """
        settings, model = self.settings, self.accelerator.unwrap_model(self.model)
        clock = self._clock = time.monotonic()

        # 1. Draw prompts.
        drawn = settings.prompts_of(update, len(self.prompts))
        mine = range(self.args.process_index, len(drawn), settings.processes)

        # 2. Sample a response to each. A row's draws hang on its own seed, whichever process makes it.
        seeds = [hashed_seed(settings.seed, "rollout", update, row) for row in mine]
        responses, texts, ended = self.answer([self.prompts[drawn[row]] for row in mine], seeds)
        sampled = time.monotonic()

        # 3. Score the responses as text. One that did not end is marked down.
        parts = self._scores([self.prompts[drawn[row]].messages for row in mine], texts)
        made = dict(gather_object(list(zip(mine, zip(responses, texts, ended, parts, strict=True), strict=True))))
        responses, texts, ended, parts = zip(*(made[row] for row in range(len(drawn))), strict=True)
        lengths = torch.tensor([len(response) for response in responses])
        ended = torch.tensor(ended)
        parts = {name: torch.tensor([row[name] for row in parts], dtype=torch.float32) for name in parts[0]}
        scores, scale = parts.pop("score"), 1.0
        if settings.scale_scores:
            model.score_moments.copy_(merged(model.score_moments.cpu(), scores.double()))
            count, _, squares = model.score_moments.tolist()
            scale = math.sqrt(squares / count) or 1.0
        rollout = Rollout(
            sequences=[torch.cat([self.prompts[i].ids, r]) for i, r in zip(drawn, responses, strict=True)],
            prompt_lengths=[len(self.prompts[i].ids) for i in drawn],
            mask=torch.arange(int(lengths.max())) < lengths.unsqueeze(1),
            scores=scores / scale - settings.missing_eos_penalty * ~ended,
        )
        scored = time.monotonic()

        # 4. Log-probabilities of the policy, values, and log-probabilities of the reference, in the very forward
        #    passes of the first epoch: until the first step, the ratio is 1 to the last bit.
        epochs = settings.microbatches(update, [len(ids) for ids in rollout.sequences], self.args.process_index)
        self._fill(rollout, list(itertools.chain.from_iterable(epochs[0])))

        # 5. A reward for each token: the KL penalty, and the score at the last token.
        kl_coef = float(model.kl_coef)
        log_ratio = torch.where(rollout.mask, rollout.old_logprobs - rollout.ref_logprobs, 0.0)
        kl = kl_penalty(rollout.old_logprobs, rollout.ref_logprobs, settings.kl_estimator)
        rewards = token_rewards(rollout.scores, kl, rollout.mask, kl_coef)

        # 6. Advantages and returns; the advantages are whitened over the batch.
        advantages, rollout.returns = gae(rewards, rollout.old_values, rollout.mask, settings.gamma, settings.lam)
        rollout.advantages = whiten(advantages, rollout.mask)

        # 7. Figures; the coefficient of the next update, where it is to follow a target.
        everything = list(range(len(drawn)))
        values, returns = (rollout.pick(name, everything) for name in ("old_values", "returns"))
        mean_kl = float(log_ratio.sum(1).mean())
        self.figures = {
            "update": update + 1,
            "episodes": (update + 1) * len(drawn),
            "score": float(scores.mean()),
            "score_std": float(scores.std(correction=0)),
            **({"score_scale": scale} if settings.scale_scores else {}),
            **{name: float(of.mean()) for name, of in parts.items()},
            **({"judge_std": float(parts["judge"].std(correction=0))} if "judge" in parts else {}),
            "kl": mean_kl,  # of a response: summed over its tokens, averaged over responses
            "kl_coef": kl_coef,
            "reward": float(rewards.sum(1).mean()),
            "entropy": -float(rollout.pick("old_logprobs", everything).mean()),  # of a token, by those sampled
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
            model.kl_coef.fill_(adapted(kl_coef, mean_kl, settings.kl_target, len(drawn), settings.kl_horizon))
        if update % settings.samples_every == 0 and self.is_world_process_zero():
            self._write_samples(update, drawn, texts, scores, log_ratio.sum(1), lengths, ended)
        self._look(update, [self.prompts[i].messages for i in drawn], texts)
        self._clock = time.monotonic()
        return rollout, epochs

    def _scores(self, prompts: list[list[dict]], texts: list[str]) -> list[dict[str, float]]:
        """For each response its score, the parts of it if the reward has several, and the judge's."""
        found = {"score": checked(self.reward, "the reward")(prompts, texts)}
        if isinstance(self.reward, Total) and len(self.reward.parts) > 1:
            found |= {f"score_{name}": scores for name, scores in self.reward.parts.items()}
        if self.judge is not None:
            found["judge"] = checked(self.judge, "the judge")(prompts, texts)
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]

    def _look(self, update: int, prompts: list[list[dict]], texts: Sequence[str]) -> None:
        """Raise the alarms of an update, each once with its line; `Stopped` where one is to end the run."""
        alarms = self.watch.look(self.figures, prompts, texts)
        self.figures |= self.watch.figures
        self.update_log.alarms = [alarm.name for alarm in alarms]
        for alarm in alarms:
            if alarm.name not in self.raised and self.is_world_process_zero():
                cli.warn(f"alarm in update {update + 1}: {alarm.message}.")
            self.raised.setdefault(alarm.name, update + 1)
        if stopping := self.watch.stops(alarms):
            figures, self.figures = self.figures, {}
            self.log(figures)  # the row that says why it ends here
            self.update_log.on_train_end(self.args, self.state, self.control)
            raise Stopped(
                f"stopped in update {update + 1} of {self.settings.updates} by --stop-on {stopping.name}: "
                f"{stopping.message}. {self.last_saved()}"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """9. The loss of one forward pass: its share of the mean over the minibatch's tokens."""
        settings = self.settings
        logprobs, values = model(inputs["input_ids"], inputs["response_mask"])
        surrogate, ratio = policy_loss(logprobs, inputs["old_logprobs"], inputs["advantages"], settings.clip_range)
        error = value_loss(values, inputs["old_values"], inputs["returns"], settings.value_clip_range)
        # Trainer divides by the number of passes, and several processes average their gradients: both undone.
        share = self.current_gradient_accumulation_steps * settings.processes / inputs["minibatch_tokens"]
        loss = (surrogate.sum() + settings.vf_coef * error.sum()) * share
        if not torch.isfinite(loss):
            raise self._not_a_number("losses")
        with torch.no_grad():
            moved = kl_penalty(inputs["old_logprobs"], logprobs, "k3")
            outside = (ratio - 1).abs() > settings.clip_range
            sums = torch.stack([x.sum() for x in (torch.ones_like(ratio), surrogate, error, outside, ratio, moved)])
            self.sums = sums if self.sums is None else self.sums + sums
        return (loss, (logprobs, values)) if return_outputs else loss

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> tuple[list[Tensor], list[str], list[bool]]:
        """(responses as token ids, as text, whether each came to its end)."""
        responses = self.sample([prompt.ids for prompt in prompts], seeds)
        ended = [int(response[-1]) in self.stops for response in responses]
        texts = [
            self.chat.answer(response[:-1] if end else response, continued=False)[0]
            for response, end in zip(responses, ended, strict=True)
        ]
        return responses, texts, ended

    def sample(self, prompts: Sequence[Tensor], seeds: Sequence[int]) -> list[Tensor]:
        """A response to each prompt (token ids in and out), with its end token if it came to one."""
        model = self.accelerator.unwrap_model(self.model)
        settings, found = self.settings, [None] * len(prompts)
        sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature)
        make = self._generate if self.slow_reason else self._decode
        model.eval()
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), settings.generation_batch_size):
            rows = order[start : start + settings.generation_batch_size]
            with torch.no_grad(), self.accelerator.autocast():
                for i, response in make(model.policy, [prompts[i] for i in rows], [seeds[i] for i in rows], sampling):
                    found[rows[i]] = torch.tensor(response)
        model.train()
        return found

    def _decode(self, policy, prompts: list[Tensor], seeds: list[int], sampling: Sampling):
        """One batch by our own loop: (row, new tokens), not in order."""
        policy, ids, sampler = base_of(policy), [prompt.tolist() for prompt in prompts], RowSampler(sampling, seeds)
        # Each prompt is drawn alone, so that little is shared: a template's beginning is not worth a pass of its own.
        prefixes = Prefixes(policy, ids, self.pad_id, share=False)
        yield from decode(
            policy,
            ids,
            prefixes,
            sampler,
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=self.stops,
            pad_id=self.pad_id,
        )
        sampler.check("the policy")

    def _generate(self, policy, prompts: list[Tensor], seeds: list[int], sampling: Sampling):
        """The same by transformers' `generate`, for models that remember otherwise than by keys and values."""
        base, ids = base_of(policy), nn.utils.rnn.pad_sequence([p.flip(0) for p in prompts], True, self.pad_id).flip(1)
        width = ids.shape[1]
        mask = (torch.arange(width) >= width - torch.tensor([len(p) for p in prompts]).unsqueeze(1)).long()
        sampler = RowSampler(sampling, seeds, width)
        # One of its own: a checkpoint's sampling settings would act beside ours.
        own, base.generation_config = (
            base.generation_config,
            GenerationConfig(
                do_sample=False,
                use_cache=True,
                pad_token_id=self.pad_id,
                eos_token_id=sorted(self.stops) or None,
                max_new_tokens=sampling.max_new_tokens,
            ),
        )
        made = policy.generate(
            input_ids=ids.to(self.args.device), attention_mask=mask.to(self.args.device), logits_processor=[sampler]
        )[:, width:].tolist()
        base.generation_config = own
        sampler.check("the policy")
        for i, response in enumerate(made):
            ends = [place for place, token in enumerate(response) if token in self.stops]
            yield i, response[: ends[0] + 1] if ends else response

    def _fill(self, rollout: Rollout, passes: list[list[int]]) -> None:
        """Step 4 of `rollout`, in the forward passes given; the shares of all processes are put together."""
        names = ("old_logprobs", "old_values", "ref_logprobs")
        found = []
        self.model_wrapped.train()
        with torch.no_grad():
            for rows in passes:
                batch = {name: x.to(self.args.device) for name, x in rollout.batch(rows, self.pad_id).items()}
                numbers = torch.stack([*self.model_wrapped(**batch), self._reference_logprobs(**batch)]).cpu()
                sizes = rollout.mask[rows].sum(1).tolist()
                found.extend(zip(rows, numbers.split(sizes, dim=1), strict=True))
        table = torch.zeros(len(names), *rollout.mask.shape)
        for row, numbers in gather_object(found):
            table[:, row, : numbers.shape[1]] = numbers
        if not torch.isfinite(table).all():
            raise self._not_a_number("log-probabilities or values")
        rollout.old_logprobs, rollout.old_values, rollout.ref_logprobs = table

    def _reference_logprobs(self, input_ids: Tensor, response_mask: Tensor) -> Tensor:
        model = self.accelerator.unwrap_model(self.model)
        adapters_off = model.policy.disable_adapter() if self.reference is None else nullcontext()
        reference = model.policy if self.reference is None else self.reference
        with adapters_off, self.accelerator.autocast():
            return torch.cat(
                [
                    token_logprobs(response_logits(reference, *part)[0], *part, self.settings.temperature)
                    for part in trimmed(input_ids, response_mask)
                ]
            )

    def _write_samples(self, update, drawn, texts, scores, kl, lengths, ended) -> None:
        """Four rows of this update to samples.jsonl, in place of any that a stopped run wrote from here on."""
        path = self.output / SAMPLES
        kept = [row for _, row in readers.read_jsonl(path) if row["update"] <= update] if path.exists() else []
        new = [
            {
                "update": update + 1,
                "prompt": self.prompts[drawn[row]].messages,
                "response": texts[row],
                "score": round(float(scores[row]), 4),
                "kl": round(float(kl[row]), 4),
                "tokens": int(lengths[row]),
                "ended": bool(ended[row]),
            }
            for row in range(min(4, len(drawn)))
        ]
        outputs.write_jsonl(path, kept + new)
