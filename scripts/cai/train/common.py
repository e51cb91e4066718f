"""What the training commands share: options, arguments, the order of rows, metrics, saving.

    args = SFTConfig(**trainer_arguments("runs/sft", learning_rate=1e-4, batch_size=32))

Leaves out packing and hyperparameter search.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import click

from cai.base import cli
from cai.models import estimate
from cai.models.loading import on_cpu, precision

ADAPTER = "adapter"

CHECKPOINTS = "checkpoints"

METRICS = "metrics.jsonl"


def training_options(
    *,
    epochs: float = 1.0,
    learning_rate: float = 1e-5,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    max_length: int = 1024,
    save_steps: int = 500,
):
    """Decorator that adds the options all training commands share; a command gives its own defaults.

    The function gets epochs, learning_rate, batch_size, gradient_accumulation, max_length, lora (bool),
    lora_rank, save_steps, device, dtype and gpu.
    """
    positive = click.IntRange(min=1)
    added = (
        click.option(
            "--epochs",
            type=click.FloatRange(min=0, min_open=True),
            default=epochs,
            show_default=True,
            help="Passes over the rows.",
        ),
        click.option(
            "--learning-rate",
            type=click.FloatRange(min=0, min_open=True),
            default=learning_rate,
            show_default=True,
            help="Peak of the schedule.",
        ),
        click.option(
            "--batch-size",
            type=positive,
            default=batch_size,
            show_default=True,
            help="Rows in one forward pass, on each process.",
        ),
        click.option(
            "--gradient-accumulation",
            type=positive,
            default=gradient_accumulation,
            show_default=True,
            help="Forward passes to one optimizer step.",
        ),
        click.option(
            "--max-length",
            type=positive,
            default=max_length,
            show_default=True,
            help="Longest prompt and response, in tokens; longer rows are left out and counted.",
        ),
        click.option(
            "--lora/--full", "lora", default=False, show_default=True, help="Train low-rank adapters, or all weights."
        ),
        click.option("--lora-rank", type=positive, default=16, show_default=True, help="Rank of the adapters."),
        click.option(
            "--save-steps",
            type=click.IntRange(min=0),
            default=save_steps,
            show_default=True,
            help="Optimizer steps between two saved states to resume from; 0: none.",
        ),
        cli.options("device", "dtype"),
        estimate.gpu_option,
    )

    def decorate(function):
        for option in reversed(added):
            function = option(function)
        return function

    return decorate


def lora_config(rank: int, task: str = "CAUSAL_LM"):
    """Adapters of `rank` on every linear layer but the head, scaled by 2.

    task: "CAUSAL_LM" or "SEQ_CLS" (peft's names); a classifier's new head is trained whole.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def training_order(
    lengths: Sequence[int], batch: int, epochs: float, seed: int, weights: Sequence[float] | None = None
) -> list[int]:
    """Row numbers in the order to train on: every epoch a new shuffle, rows of like length in one batch.

    Laid out beforehand, so that each process sees its own share and a resumed run the rest of the same order.

    Args:
        lengths: tokens of each row.
        batch: rows that are padded together.
        epochs: passes; a fraction takes the first part of one more shuffle.
        weights: how often a row comes in one pass, each time others where that is no whole number; 1 without.
    """
    draw = random.Random(seed)
    order: list[int] = []
    wanted = max(1, round(epochs * (len(lengths) if weights is None else math.fsum(weights))))
    while len(order) < wanted:
        rows = list(range(len(lengths)))
        draw.shuffle(rows)
        if weights is not None:
            rows = _as_often(rows, weights, draw)
            if not rows:
                continue
        chunk = 50 * batch
        rows = [
            row
            for start in range(0, len(rows), chunk)
            for row in sorted(rows[start : start + chunk], key=lengths.__getitem__)
        ]
        batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        # A short last batch stays last: in the middle it would shift every border after it.
        tail = batches.pop() if len(batches[-1]) < batch else []
        draw.shuffle(batches)
        order.extend([row for one in [*batches, tail] for row in one])
    return order[:wanted]


def _as_often(rows: Sequence[int], weights: Sequence[float], draw: random.Random) -> list[int]:
    """The rows as often as their weights say, shuffled: systematic sampling, by which rows of equal weight come in
    a number of times that is off by one at most."""
    taken, passed = [], draw.random()
    for row in sorted(rows, key=weights.__getitem__):  # stable: among equal weights the shuffle stays
        before, passed = passed, passed + weights[row]
        taken += [row] * (math.floor(passed) - math.floor(before))
    draw.shuffle(taken)
    return taken


def trainer_arguments(
    output: str | Path,
    *,
    learning_rate: float,
    batch_size: int,
    gradient_accumulation: int = 1,
    save_steps: int = 0,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    lora: bool = False,
    **overrides,
) -> dict:
    """Keyword arguments for any `TrainingArguments` (SFTConfig, RewardConfig, ...) of this project.

    States to resume from go to `<output>/checkpoints`. Rows are taken in the order given (`training_order`),
    hence one "epoch" and no shuffling. `overrides` replace or add arguments.
    """
    from transformers import TrainingArguments

    cpu = on_cpu(device)
    _, autocast = precision(device, dtype, lora)
    # transformers gave it a new name within 5.x and deprecates the old one.
    new_name = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if new_name else "gradient_checkpointing"
    arguments = {
        "output_dir": str(Path(output) / CHECKPOINTS),
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "max_grad_norm": 1.0,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 500,
        "save_total_limit": 1,
        "logging_steps": 5,
        "logging_first_step": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "use_cpu": cpu,
        "bf16": autocast == "bfloat16",
        "fp16": autocast == "float16",
        # TRL turns it on by default; it trades a third of the speed for memory, which a CPU has.
        checkpointing: not cpu,
        "dataloader_pin_memory": not cpu,
        "ddp_find_unused_parameters": False,
    }
    return {**arguments, **overrides}


class MetricsLog:
    """A trainer callback that appends what is logged to `<output>/metrics.jsonl` with progress on stderr.

    One row a log: {"step", "seconds", ...the trainer's figures}. A resumed run drops the rows after the step
    it resumes from. It answers to TrainerCallback's calls without being a subclass: importing that costs
    seconds, and this module is imported for `--help` too.
    """

    def __init__(self, output: str | Path, label: str = "train"):
        self.path = Path(output) / METRICS
        self.label = label
        self.bar = None

    def on_train_begin(self, args, state, control, **_):
        self.start = time.monotonic()
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.global_step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A line without its end was torn when the process was killed.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(kept), encoding="utf-8")
        self.bar = cli.progress(state.max_steps, self.label)
        self.bar.unit = "step"
        self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, "seconds": round(time.monotonic() - self.start, 3), **logs}
        row.pop("epoch", None)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def run_trainer(trainer, output: str | Path):
    """Train to the end, from the last saved state in `<output>/checkpoints` if there is one.

    Keeps the trainer off stdout, which belongs to the summary. Returns the trainer's figures.
    """
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    last = last_state(Path(output) / CHECKPOINTS)
    return trainer.train(resume_from_checkpoint=None if last is None else str(last))


def last_state(states: Path) -> Path | None:
    """The newest saved state that is whole, or None. One is whole when its trainer_state.json, the last file
    to be written, can be read: a process may be killed while it saves."""
    for state in sorted(states.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((state / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return state
    return None


def save_checkpoint(model, tokenizer, folder: str | Path, state_dict: dict | None = None) -> None:
    """Write weights, configuration, tokenizer and chat template to `folder`, which `--model` reads back.

    Of a LoRA model the adapter goes to `<folder>/adapter` and the merged weights to `folder` (the model is
    merged in place). state_dict: the gathered weights of a sharded model, from
    `trainer.accelerator.get_state_dict`.
    """
    from peft import PeftModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder / ADAPTER, state_dict=state_dict)
        if state_dict is not None:  # what is in memory are shards: put the adapter on the base anew
            model, state_dict = _on_its_base(folder / ADAPTER, model.dtype), None
        model = model.merge_and_unload()
    model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)


def _on_its_base(adapter: Path, dtype):
    """The PeftModel of a saved adapter, on the CPU."""
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftConfig

    if PeftConfig.from_pretrained(adapter).task_type == "SEQ_CLS":
        return AutoPeftModelForSequenceClassification.from_pretrained(adapter, dtype=dtype, num_labels=1)
    return AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype)


def save_trained(trainer, tokenizer, folder: str | Path) -> None:
    """Save what a trainer trained (whole, sharded or under DDP), once, and drop the states to resume from.

    To be called by every process: a sharded model is gathered by all of them.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if trainer.is_world_process_zero():
        save_checkpoint(trainer.accelerator.unwrap_model(trainer.model), tokenizer, folder, state_dict)
        states = Path(folder) / CHECKPOINTS
        for last_written in states.glob("checkpoint-*/trainer_state.json"):
            last_written.unlink()  # killed within the next line, what is left of a state is not taken for a whole one
        shutil.rmtree(states, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
