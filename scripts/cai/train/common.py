"""What the training commands share: the run of a command, trainer arguments, the order of rows, metrics, saving.

    run = TrainingRun("sft", options, fingerprint, inputs=["revised.jsonl"], next_command="python scripts/generate.py")
    if not run.report_if_done(plan):
        with run.folder:
            run.finish({**run.train(trainer), ...})

Leaves out packing and hyperparameter search.
"""

import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import chain, takewhile
from pathlib import Path

from cai.base import cli, files
from cai.base.errors import CaiError, InputError
from cai.data import outputs, preferences
from cai.models import estimate, folders, loading

ADAPTER, CHECKPOINTS, METRICS = "adapter", "checkpoints", "metrics.jsonl"

# Options that decide what sft.py, reward_model.py and dpo.py train.
DECIDING = ("epochs", "learning_rate", "batch_size", "gradient_accumulation", "max_length", "seed")

# Options that `trainer_arguments` takes as they are.
ARGUMENTS = ("learning_rate", "batch_size", "gradient_accumulation", "save_steps", "seed", "device", "dtype", "lora")


class TrainingRun:
    """A training command from the claimed folder to the summary.

    What fails before `folder` is entered leaves nothing on disk; a run that was stopped inside continues from its
    newest saved state when the same command is run again.

    Args:
        command: its name.
        options: of the command, as attributes.
        fingerprint: everything that decides the result, beside lora_rank, first_layer and dtype.
        inputs: paths that the output must not be.
        next_command: the line that the summary names.
        show: changes the summary for people; --json prints it as it is.
    Raises:
        InputError: the folder belongs to another run, or another process is writing it; --first-layer is no block.
    """

    def __init__(
        self,
        command: str,
        options,
        fingerprint: dict,
        *,
        inputs: Sequence[str],
        next_command: str,
        show: Callable[[dict], dict] = dict,
    ):
        self.options, self.next_command, self.show = options, next_command, show
        self.lora_rank = options.lora_rank if options.lora else None
        if options.first_layer is not None:
            fingerprint = {**fingerprint, "first_layer": options.first_layer}
            check_first_layer(options.first_layer, loading.read_blocks(options.model), options.model)
        self.folder = outputs.claim_folder(
            options.output,
            command=command,
            fingerprint={**fingerprint, "lora_rank": self.lora_rank, "dtype": options.dtype},
            overwrite=options.overwrite,
            inputs=inputs,
        )

    def report_if_done(self, plan: Callable[[], dict]) -> bool:
        """Print the plan under --dry-run, or the counts of a finished run; returns whether there is nothing to train.

        Args:
            plan: () -> what --dry-run reports.
        """
        if self.options.dry_run:
            self.summarise(plan())
        elif self.folder.complete:
            self.summarise(self.folder.counts)
        else:
            loading.choose_device(self.options.device)
        return self.options.dry_run or self.folder.complete

    def longest_row(self, *others: str) -> int:
        """Tokens of the longest row to train on: --max-length, or the context of the model if that is less.

        others: models that read the rows as well.
        """
        contexts = [loading.read_context(name) for name in (self.options.model, *others)]
        return min([self.options.max_length, *filter(None, contexts)])

    def estimate(self, rows: Sequence[tuple[Sequence[dict], Sequence[str]]], frozen: Sequence[str] = ()) -> dict:
        """Rows, steps, tokens, memory and hours of a training on (conversation, responses), for --dry-run."""
        options = self.options
        return estimate.training_plan(
            options.model,
            estimate.lengths_of(options.model, rows),
            epochs=options.epochs,
            batch_size=options.batch_size,
            gradient_accumulation=options.gradient_accumulation,
            lora_rank=self.lora_rank,
            frozen=frozen,
            gpu=options.gpu,
            device=options.device,
            processes=count_processes(),
        )

    def load_policy(self, name: str | None = None, **more):
        """The model of --model to train; or, with a `name`, a frozen one."""
        options = self.options
        # Frozen weights need no float32 where the device has bfloat16, which is what `lora` says of a base.
        model = loading.load_policy(
            name or options.model, options.device, options.dtype, lora=options.lora or name is not None, **more
        )
        return model if name else freeze_before(model, options.first_layer)

    def load_reward_model(self):
        """The model of --model with one score as its output, to train."""
        options = self.options
        return freeze_before(
            loading.load_reward_model(options.model, options.device, options.dtype, lora=options.lora),
            options.first_layer,
        )

    def arguments(self, **overrides) -> dict:
        """`trainer_arguments` from the options; `overrides` replace or add arguments."""
        options = vars(self.options)
        parameters = folders.count_parameters(self.options.model)
        return trainer_arguments(
            **{name: options[name] for name in ("output", *ARGUMENTS) if name in options}
            | {"parameters": parameters, **overrides}
        )

    def adapters(self, model, task: str = "CAUSAL_LM"):
        """`lora_config` of --lora-rank and --first-layer for the model; None under --full."""
        if not self.lora_rank:
            return None
        return lora_config(self.lora_rank, task, _earlier_blocks(model, self.options.first_layer))

    def train(self, trainer) -> dict:
        """Train to the end; returns the counts steps and loss."""
        figures = run_trainer(trainer, self.options.output)
        return {"steps": trainer.state.global_step, "loss": round(figures.training_loss, 4)}

    def finish(self, counts: dict, **info) -> None:
        """Mark the folder as done and print the summary.

        Args:
            counts: of the manifest and the summary.
            info: more for the manifest.
        """
        manifest = self.folder.finish(counts, **info)
        if loading.is_main_process():
            self.summarise({**counts, "seconds": manifest["seconds"]})

    def summarise(self, figures: dict) -> None:
        """Print the summary and the next command."""
        summary = {"output": self.options.output, **figures}
        as_json = self.options.as_json
        cli.finish(summary if as_json else self.show(summary), as_json=as_json, next_command=self.next_command)


def identify_options(options) -> dict:
    """The options that decide what sft.py, reward_model.py and dpo.py train, for their fingerprints."""
    return {name: getattr(options, name) for name in DECIDING}


def check_trackers(names: Sequence[str]) -> list[str] | str:
    """The trackers in Trainer's terms. Raises InputError for one that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"{name} is not installed", where="--report-to", remedy=f"pip install {name}")
    return sorted(set(names)) or "none"


def count_processes() -> int:
    """How many processes a launcher has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def freeze_before(model, first_layer: int | None):
    """The model, of which nothing is trained that comes before the block `first_layer`; None changes nothing.

    That is the blocks before it and the embeddings, and a head that is tied to these. InputError for a block that the
    model does not have.
    """
    if first_layer is None:
        return model
    _, blocks = find_blocks(model)
    check_first_layer(first_layer, len(blocks), model.name_or_path)
    first = next(blocks[first_layer].parameters())
    for parameter in takewhile(lambda parameter: parameter is not first, model.parameters()):
        parameter.requires_grad_(False)
    return model


def find_blocks(model):
    """(name, blocks) of the list of a model's blocks. InputError if it has none.

    Of a model that also sees pictures it is the language model's, which comes last; a list inside a block, such as its
    experts, is none of blocks.
    """
    from torch.nn import ModuleList

    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, part) for name, part in model.named_modules() if isinstance(part, ModuleList) and len(part) == count
    ]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of its {count} blocks",
            where="--first-layer",
            remedy="Leave the option out, or take another model",
        )
    return [found for found in lists if not any(found[0].startswith(f"{name}.") for name, _ in lists)][-1]


def check_first_layer(first_layer: int, blocks: int, model: str) -> None:
    """InputError unless a model of so many blocks has this one."""
    if first_layer >= blocks:
        raise InputError(
            f"{first_layer} is not a block of {model}, which has {blocks}",
            where="--first-layer",
            expected=f"0 to {blocks - 1}",
            remedy="Begin with about half of the blocks",
        )


def lora_config(rank: int, task: str = "CAUSAL_LM", exclude: str | None = None):
    """Adapters of `rank` on every linear layer except the head, scaled by 2.

    Args:
        task: "CAUSAL_LM" or "SEQ_CLS" (peft's names); a classifier's new head is trained in full.
        exclude: pattern of the names of layers that get no adapter.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=exclude,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def _earlier_blocks(model, first_layer: int | None) -> str | None:
    """A pattern of the names of layers in the blocks before the first that is trained; None if there are none.

    peft (0.21) has an option for blocks, which it refuses beside "all-linear".
    """
    if not first_layer:
        return None
    name, _ = find_blocks(model)
    return rf"{re.escape(name)}\.({'|'.join(map(str, range(first_layer)))})\..*"


def training_order(
    lengths: Sequence[int], batch: int, epochs: float, seed: int, weights: Sequence[float] | None = None
) -> list[int]:
    """Row numbers in the order to train on: every epoch a new shuffle, rows of similar length in one batch.

    The order is fixed beforehand, so that each process sees its own share and a resumed run the rest of it.

    Args:
        lengths: tokens of each row.
        batch: rows that are padded together.
        epochs: passes; a fraction takes the first part of one more shuffle.
        weights: how often a row comes in one pass; a fraction takes it in some of the passes. None: once each.
    """
    if weights is not None and set(weights) == {1.0}:
        weights = None
    draw = random.Random(seed)
    order: list[int] = []
    total = max(1, round(epochs * (len(lengths) if weights is None else math.fsum(weights))))
    while len(order) < total:
        rows = list(range(len(lengths)))
        draw.shuffle(rows)
        if weights is not None:
            rows = _repeat_by_weight(rows, weights, draw)
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
        order.extend(chain(*batches, tail))
    return order[:total]


def sides_in_a_pass(pairs: Sequence[dict]) -> list[tuple[list[dict], list[str]]]:
    """`preferences.prompt_and_sides` of as many pairs as one pass has by their `weight`, for `TrainingRun.estimate`."""
    weights = [pair["weight"] for pair in pairs]
    chosen = _repeat_by_weight(range(len(pairs)), weights, random.Random(0))
    return preferences.prompt_and_sides([pairs[number] for number in chosen])


def _repeat_by_weight(rows: Sequence[int], weights: Sequence[float], draw: random.Random) -> list[int]:
    """The rows as often as their weights say, shuffled.

    Sampled systematically: how often rows of one weight come in differs from their weight by less than one row.
    """
    sampled, position = [], draw.random()
    for row in sorted(rows, key=weights.__getitem__):  # stable: among equal weights the shuffle stays
        before, position = position, position + weights[row]
        sampled += [row] * (math.floor(position) - math.floor(before))
    draw.shuffle(sampled)
    return sampled


def drop_overlong(
    rows: list[dict], length: Callable[[dict], int], options, longest: int | None = None
) -> tuple[list[dict], int]:
    """The rows that are not too long, in the order to train on, and how many are longer.

    Args:
        rows: each comes as often as its `weight` says, once where it has none.
        length: of a row, in tokens.
        options: have max_length, batch_size, epochs and seed.
        longest: of `TrainingRun.longest_row`; None: --max-length.
    Raises:
        InputError: no row is left.
    """
    longest = options.max_length if longest is None else longest
    kept = [row for row in rows if length(row) <= longest]
    if not kept:
        raise all_overlong(f"all {len(rows)} rows", longest, options.max_length)
    warn_of_context([length(row) for row in rows], longest, options.max_length)
    weights = [row.get("weight", 1.0) for row in kept]
    order = training_order(list(map(length, kept)), options.batch_size, options.epochs, options.seed, weights)
    return [kept[i] for i in order], len(rows) - len(kept)


def all_overlong(rows: str, longest: int, max_length: int) -> InputError:
    """The error of a training without a row that is short enough.

    Args:
        rows: what is too long, in words.
        longest, max_length: tokens, of `TrainingRun.longest_row` and of --max-length.
    """
    if longest < max_length:
        return InputError(
            f"{rows} are longer than the model's context of {longest} tokens",
            where="--model",
            remedy="Take a model with a longer context, or shorter rows",
        )
    return InputError(f"{rows} are longer", where="--max-length", remedy="Raise --max-length")


def warn_of_context(lengths: Sequence[int], longest: int, max_length: int) -> None:
    """Warn of rows that --max-length allows and the model's context does not.

    Args:
        lengths: tokens of each row.
        longest, max_length: as for `all_overlong`.
    """
    beyond = sum(longest < length <= max_length for length in lengths)
    if beyond:
        cli.warn(
            f"{beyond} of {len(lengths)} rows are longer than the model's context of {longest} tokens and are left out "
            f"(--max-length allows {max_length})"
        )


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
    parameters: int | None = None,
    **overrides,
) -> dict:
    """Keyword arguments for any `TrainingArguments` (SFTConfig, RewardConfig, ...) of this project.

    States to resume from go to `<output>/checkpoints`. Rows are taken in the order of the data set
    (`training_order`), hence one "epoch" and no shuffling. `overrides` replace or add arguments.

    parameters: of the model, which on a CPU decides the dtype of the forward pass (`loading.precision`).
    """
    from transformers import TrainingArguments

    cpu = loading.on_cpu(device)
    _, autocast = loading.precision(device, dtype, lora, parameters)
    # transformers renamed it within 5.x and deprecates the old name.
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    return {
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
        **overrides,
    }


class MetricsLog:
    """A trainer callback that appends what is logged to `<output>/metrics.jsonl`, with a progress bar on stderr.

    One row per log: {"step", "seconds", ...the trainer's figures}. A resumed run drops the rows after the step it
    resumes from, and the row of the whole run, which Trainer logs again. The class has TrainerCallback's methods
    without being a subclass: importing that takes seconds, and this module is imported for `--help` too.

    Args:
        output: the folder of metrics.jsonl.
        label: in front of the progress bar.
    """

    def __init__(self, output: str | Path, label: str = "train"):
        self.path, self.label, self.bar = Path(output) / METRICS, label, None

    def on_train_begin(self, args, state, control, **_):
        self.start = time.monotonic()
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A line without its end was torn when the process was killed.
            kept = [row for row in lines if row.endswith("\n") and self.is_current(json.loads(row), state.global_step)]
        files.write_text(self.path, "".join(kept))
        self.bar = cli.progress(state.max_steps, self.label, state.global_step, unit="step")

    def is_current(self, row: dict, step: int) -> bool:
        """Whether a row stands for what was done up to a step."""
        # `train_runtime` is in the row of the whole run: it is there if a run was killed after its last step.
        return row["step"] <= step and "train_runtime" not in row

    def on_step_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or not logs:
            return
        figures = {name: value for name, value in logs.items() if name != "epoch"}
        row = {"step": state.global_step, "seconds": round(time.monotonic() - self.start, 3), **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def soft_label_collator(collate: Callable[[list[dict]], dict]) -> Callable[[list[dict]], dict]:
    """A collator of preference pairs that carries their soft labels along, as `p_chosen`: (pairs,).

    Args:
        collate: TRL's collator, which drops them.
    """
    import torch

    return lambda pairs: {**collate(pairs), "p_chosen": torch.tensor([pair["p_chosen"] for pair in pairs])}


def run_trainer(trainer, output: str | Path):
    """Train to the end, from the newest saved state in `<output>/checkpoints` if there is one.

    Keeps the trainer off stdout, which belongs to the summary. Returns the trainer's figures.
    """
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    arguments = trainer.args
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.warmup_steps and len(trainer.train_dataset) <= step:
        arguments.warmup_steps = 0  # the first step of a warm-up has a learning rate of 0, and there is no other
    last = last_state(Path(output) / CHECKPOINTS)
    return trainer.train(resume_from_checkpoint=None if last is None else str(last))


def make_state_folders(trainer_class: type) -> type:
    """The trainer's class, which makes the folder of a state before anything is saved in it.

    Trainer takes a state for the best only if its folder is there, and makes that of a sharded state later: processes
    would disagree on the best state, and wait for each other forever.
    """

    class FolderTrainer(trainer_class):  # type: ignore[misc, valid-type]
        def save_model(self, output_dir=None, _internal_call=False):
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
            super().save_model(output_dir, _internal_call)

    FolderTrainer.__name__ = trainer_class.__name__
    return FolderTrainer


def last_state(states: str | Path) -> Path | None:
    """The newest complete saved state in the folder, or None.

    A state is complete if its trainer_state.json, the last file to be written, can be read: a process may be killed
    while it saves.
    """
    for state in sorted(Path(states).glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((state / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return state
    return None


def describe_last_state(states: str | Path) -> str:
    """A sentence that names the newest saved policy."""
    state = last_state(states)
    if state is None:
        return "No checkpoint was saved yet"
    return f"The last good policy is {state / 'policy' if (state / 'policy').is_dir() else state}"


def describe_not_finite(trainer, subject: str) -> CaiError:
    """The error of a training whose numbers are NaN or infinite.

    Args:
        subject: what is not finite, with its verb: "the loss is".
    """
    return CaiError(
        f"{subject} not finite at step {trainer.state.global_step} of {trainer.state.max_steps}. "
        f"{describe_last_state(trainer.args.output_dir)}. Start again with a lower --learning-rate, or --dtype float32"
    )


def save_checkpoint(
    model, tokenizer, folder: str | Path, state_dict: dict | None = None, *, merge: bool = True
) -> None:
    """Write weights, configuration, tokenizer and chat template to `folder`, which `--model` reads back.

    Of a LoRA model the adapter goes to `<folder>/adapter` and the merged weights to `folder` (the model is
    merged in place).

    Args:
        state_dict: the gathered weights of a sharded model, from `trainer.accelerator.get_state_dict`.
        merge: False writes the adapter of a LoRA model alone, into `folder`.
    """
    from peft import PeftModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if merge and isinstance(model, PeftModel):
        model.save_pretrained(folder / ADAPTER, state_dict=state_dict)
        if state_dict is not None:  # the model in memory is a shard: load the base again with the adapter
            model, state_dict = loading.load_merged(folder / ADAPTER, model.dtype), None
        else:
            model = model.merge_and_unload()
    model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)


def save_trained(trainer, tokenizer, folder: str | Path) -> None:
    """Save once what a trainer trained, sharded or not, and delete the states to resume from.

    Every process must call it: a sharded model is gathered by all of them.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    # Another process may still read the best state, which is about to be deleted.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        save_checkpoint(trainer.accelerator.unwrap_model(trainer.model), tokenizer, folder, state_dict)
        delete_states(folder)
    trainer.accelerator.wait_for_everyone()


def delete_states(folder: str | Path) -> None:
    """Delete the states to resume from; a process killed half-way leaves none that looks complete."""
    states = Path(folder) / CHECKPOINTS
    for last_written in states.glob("checkpoint-*/trainer_state.json"):
        last_written.unlink()
    shutil.rmtree(states, ignore_errors=True)
