"""GRPO (arXiv 2402.03300) and RLOO (arXiv 2402.14740) on TRL's trainers: counts, configuration, reward, trainer.

    settings = Settings(updates=20, samples=8)
    trainer_class, config = make_config("grpo", "", arguments)
    trainer = make_trainer(trainer_class, config, policy, chat, prompts, scorer, output, settings, Watch())

A scorer is a callable: (rows, update, conversations, responses) -> (scores, figures). A response whose score is None
has no advantage and is left out of its group's baseline. Leaves out the algorithms themselves, which are TRL's.
"""

import argparse
import copy
import dataclasses
import importlib.util
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from cai.base.errors import CaiError, InputError, shorten
from cai.models import folders
from cai.models.chat import Chat, chat_stops
from cai.train import alarms, common, updates
from cai.train.prompts import Prompt

Scorer = Callable[[list[int], int, list[list[dict]], list[str]], tuple[list[float | None], dict[str, float]]]

# Figures of metrics.jsonl (`updates.FIGURES`) and TRL's names for them.
TRL_NAMES = {
    "score": "score",
    "score_std": "reward_std",
    "reward": "reward",
    "overlong": "overlong",
    "label_mass": "label_mass",
    "kl": "kl",
    "entropy": "entropy",
    "response_length": "completions/mean_length",
    "eos_rate": "completions/clipped_ratio",
    "groups_alike": "frac_reward_zero_std",
    "clip_fraction": "clip_ratio/region_mean",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}


@dataclasses.dataclass(frozen=True)
class Settings(updates.Settings):
    """The settings of a run; those that PPO has too, and the counts, are in `updates.Settings`.

    An update draws `prompts_per_update` prompts and `samples` responses to each, their group.
    """

    samples: int = 8

    @property
    def rows_per_pass(self) -> int:
        """Rows of a forward pass on each process: the largest number up to `batch_size` that divides a minibatch."""
        largest = min(self.rows_per_step, self.batch_size)
        return next(size for size in range(largest, 0, -1) if self.rows_per_step % size == 0)

    def trainer_arguments(self) -> dict:
        """What `common.trainer_arguments` takes for TRL."""
        return {
            "batch_size": self.rows_per_pass,
            "gradient_accumulation": self.accumulation,
            "max_steps": self.steps,
            "num_generations": self.samples,
            "steps_per_generation": self.rows_per_update // self.processes // self.rows_per_pass,
            "num_iterations": self.epochs,
            "max_completion_length": self.max_new_tokens,
            "temperature": self.temperature,
            "beta": self.kl_coef,
            "shuffle_dataset": False,  # `make_trainer` puts the prompts in order
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            # One row of metrics per update, and checkpoints between updates only.
            "logging_steps": self.steps_per_update,
            "logging_first_step": False,
            "logging_nan_inf_filter": False,
        }


def make_config(algorithm: str, flags: str, arguments: dict):
    """TRL's trainer class and its configuration: ours, and what TRL's own flags add.

    Args:
        algorithm: "grpo" or "rloo".
        flags: as on a command line.
        arguments: what the options decide.
    Raises:
        InputError: a flag that TRL does not know, that an option decides, or that TRL refuses.
    """
    import trl
    from transformers import HfArgumentParser

    name = algorithm.upper()
    config_class = getattr(trl, f"{name}Config")

    def refuse(message: str) -> InputError:
        return InputError(shorten(message, 300), where="--trl", expected=f"flags of TRL's {name}Config")

    class Parser(HfArgumentParser):
        def error(self, message):
            raise refuse(message)

    unset = object()
    namespace = argparse.Namespace(**{field.name: unset for field in dataclasses.fields(config_class)})
    try:
        parser = Parser(config_class, add_help=False, allow_abbrev=False)
        parsed = vars(parser.parse_args(shlex.split(flags), namespace))
        extra = {key: value for key, value in parsed.items() if value is not unset}
        if overridden := sorted(extra.keys() & arguments.keys()):
            raise refuse(f"{', '.join(overridden)}: decided by the options of this command")
        config = config_class(**arguments, **extra)
    except ValueError as error:
        raise refuse(str(error)) from error
    if config.use_vllm and importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed", where="--trl", remedy="pip install 'trl[vllm]', or leave it out")
    return getattr(trl, f"{name}Trainer"), config


class GroupReward:
    """The reward function that TRL calls. It also writes samples.jsonl.

    Args:
        prompts: of the run; TRL's rows name them by their number.
        stops: token ids that end a response.
        scorer: see the module.
        output: folder of samples.jsonl.
    Attributes:
        conversations, responses: of every row of the newest update, over all processes.
    """

    __name__ = "reward"  # TRL names its figures by it

    def __init__(
        self,
        prompts: Sequence[Prompt],
        chat: Chat,
        stops: set[int],
        scorer: Scorer,
        output: str | Path,
        settings: Settings,
    ):
        self.prompts, self.chat, self.stops, self.scorer = prompts, chat, stops, scorer
        self.output, self.settings = output, settings
        self.conversations: list[list[dict]] = []
        self.responses: list[str] = []

    def __call__(self, completion_ids, row, update, trainer_state, log_metric, **_) -> list[float | None]:
        """One reward per response: its score, less the penalty for a missing end; None without a score."""
        from accelerate.utils import gather_object

        ended = [ids[-1] in self.stops for ids in completion_ids]
        texts = [
            self.prompts[i].read_answer(self.chat, ids[:-1] if end else ids)
            for i, ids, end in zip(row, completion_ids, ended, strict=True)
        ]
        conversations = [self.prompts[i].messages for i in row]
        scores, figures = self.scorer(row, update[0], conversations, texts)
        self.conversations, self.responses = gather_object(conversations), gather_object(texts)
        known = [score for score in scores if score is not None]
        if not known or not all(map(math.isfinite, known)):
            raise CaiError(f"no finite score in update {update[0] + 1}")
        log_metric("score", sum(known) / len(known))
        for name, value in figures.items():
            log_metric(name, value)
        if overlong := sum(gather_object([scores.count(None)])):
            log_metric("overlong", overlong)
        if update[0] % self.settings.samples_every == 0 and trainer_state.is_world_process_zero:
            columns = {"prompt": conversations, "response": texts, "score": scores}
            columns |= {"tokens": map(len, completion_ids), "ended": ended}
            samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            updates.write_samples(self.output, update[0] + 1, samples[: updates.SAMPLES_PER_UPDATE])
        return [
            None if score is None else score - self.settings.missing_eos_penalty * (not end)
            for score, end in zip(scores, ended, strict=True)
        ]


class GroupLog(updates.UpdateLog):
    """`UpdateLog` of TRL's figures, under our names.

    Args:
        reward: knows the texts of the newest update.
    """

    def __init__(self, output: str | Path, settings: Settings, watch: alarms.Watch, reward: GroupReward):
        super().__init__(output, "train", settings, watch)
        self.reward = reward

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "reward" not in logs:
            super().on_log(args, state, control, logs)
            return
        row = {name: logs[key] for name, key in TRL_NAMES.items() if logs.get(key) is not None}
        row |= {"eos_rate": 1 - row["eos_rate"], "kl_coef": args.beta}
        if "kl" in row:  # TRL's is per token
            row["kl"] *= row["response_length"]
        update = state.global_step // self.settings.steps_per_update
        row = {"update": update, "episodes": update * self.settings.rows_per_update, **row}
        alarm = self.check(row, self.reward.conversations, self.reward.responses)
        super().on_log(args, state, control, row)
        if alarm:
            self.stop(alarm, update, args.output_dir)


def make_trainer(
    trainer_class,
    config,
    policy,
    chat: Chat,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    output: str | Path,
    settings: Settings,
    watch: alarms.Watch,
    adapters=None,
):
    """TRL's trainer over the prompts, each with a group of responses.

    Args:
        trainer_class, config: from `make_config`.
        scorer: see the module.
        watch: raises the alarms, and says which of them stop the run.
        adapters: a LoraConfig, or None.
    Returns:
        The trainer; its `saved_generation_config` is the policy's own, to be put back before it is saved.
    """
    import torch
    from datasets import Dataset
    from transformers import GenerationConfig

    class CheckedTrainer(trainer_class):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if not torch.isfinite(loss):
                raise common.describe_not_finite(self, "the loss is")
            return loss

        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                log.save_alarms(output_dir or self.args.output_dir)

    stops = chat_stops(chat, policy)
    reward = GroupReward(prompts, chat, stops, scorer, output, settings)
    log = GroupLog(output, settings, watch, reward)
    # NaN weights are to be reported by the loss, whose error names the remedy, and not by the sampling.
    sampling = {"stop_token_ids": sorted(stops)} if config.use_vllm else {"remove_invalid_values": True}
    config.generation_kwargs = {**(config.generation_kwargs or {}), **sampling}
    if config.beta and adapters is None:
        save_merged_reference(policy, config.output_dir)
    saved = policy.generation_config
    # Our own configuration: a checkpoint's sampling settings would act in addition to ours.
    policy.generation_config = GenerationConfig(eos_token_id=sorted(stops))
    trainer = CheckedTrainer(
        model=policy,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(arrange_prompts(prompts, chat, settings)),
        processing_class=without_special_tokens(chat.tokenizer),
        peft_config=adapters,
        callbacks=[log],
    )
    trainer.saved_generation_config = saved
    return trainer


def save_merged_reference(policy, states: str | Path) -> None:
    """Write a policy that is an adapter merged in memory beside the states to resume from, for the trainers of TRL.

    They load the reference again by the name of the policy's model, and can't load an adapter.
    """
    from accelerate import PartialState

    if folders.adapter_base(policy.name_or_path) is None:
        return
    folder = Path(states) / "reference"
    if PartialState().is_main_process:
        policy.save_pretrained(folder)
    PartialState().wait_for_everyone()
    policy.config._name_or_path = str(folder)


def arrange_prompts(prompts: Sequence[Prompt], chat: Chat, settings: Settings) -> list[dict]:
    """The prompts of all updates, in their order, as rows of {prompt, row, update}."""
    # Rendered here and not by TRL, so that text from a record can't end a turn.
    texts = [chat.render(prompt.conversation) for prompt in prompts]
    drawn = settings.updates * settings.prompts_per_update
    order = common.training_order([1] * len(prompts), 1, drawn / len(prompts), settings.seed)
    return [
        {"prompt": texts[i], "row": i, "update": position // settings.prompts_per_update}
        for position, i in enumerate(order)
    ]


def without_special_tokens(tokenizer):
    """A copy of the tokenizer that adds no token: a rendered prompt has all of its own."""
    kind = type(tokenizer)

    class Plain(kind):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **{**kwargs, "add_special_tokens": False})

    Plain.__name__ = kind.__name__  # it is written into saved states
    copied = copy.copy(tokenizer)
    copied.__class__ = Plain
    return copied
