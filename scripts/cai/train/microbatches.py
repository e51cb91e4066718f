"""Batches bounded by tokens: a large one goes through the model in parts whose gradients add up to that of the batch.

    tokens, arguments = choose_bound(model, arguments, longest=1024, adapters=None)
    trainer = bound_batches(SoftRewardTrainer, tokens, sides=2)(args=RewardConfig(**arguments), ...)

The loss, its gradient and the number of optimizer steps are those of the whole batch; a batch that fits is trained
exactly as without a bound. Leaves out several processes, whose parts would have to agree in number (each device has
`--batch-size` rows), and the batches of ppo.py and grpo.py.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from cai.base import cli
from cai.models import checks, estimate

# The share of the free memory up to which activations are kept rather than computed again.
USABLE = 0.8


def choose_bound(model: Any, arguments: dict, *, longest: int, adapters=None) -> tuple[int | None, dict]:
    """(tokens of a part, None for no bound; the trainer's arguments).

    On a CPU without the memory for one part the arguments get activation checkpointing, which changes no number.

    Args:
        model: to train, before it gets adapters.
        arguments: of `common.trainer_arguments`.
        longest: tokens of the longest row, of a pair both sides with their padding.
        adapters: peft's configuration, or None to train all weights.
    """
    shape = estimate.shape_of_config(model.config.to_dict(), model.num_parameters())
    if shape is None:
        return None, arguments
    cpu = arguments["use_cpu"]
    tokens = estimate.bound_tokens(shape, cpu=cpu)
    _, free_gb = checks.available_memory() if cpu else (None, None)
    if free_gb is not None:
        rank = None if adapters is None else adapters.r
        parts = estimate.supervised_memory([shape], [], tokens=longest, longest=longest, lora_rank=rank, cpu=True)
        needed = sum(bytes_ for name, bytes_ in parts.items() if name != "weights") / 1e9  # they are loaded already
        if needed > USABLE * free_gb:
            cli.warn(
                f"a row of {longest} tokens needs about {needed:.1f} GB and {free_gb} GB are free: activations are "
                "computed again instead of kept, which takes a third more time"
            )
            name = next(name for name in arguments if name.endswith("_checkpointing"))
            arguments = {**arguments, name: True}
    return tokens, arguments


def bound_batches(trainer_class: type, tokens: int | None, *, sides: int = 1) -> type:
    """The trainer's class with its batches in parts of at most `tokens` tokens, padding counted, and at least one row.

    Args:
        trainer_class: whose loss is a mean over the rows, or is divided by its `num_items_in_batch`.
        sides: sequences per row; of a pair two, all chosen ones before all rejected ones in a batch.
    """
    if tokens is None:
        return trainer_class

    class BoundedTrainer(trainer_class):  # type: ignore[misc, valid-type]
        part_share = 1.0

        def training_step(self, model, inputs, num_items_in_batch=None):
            parts = split_batch(inputs, tokens, sides) if self.accelerator.num_processes == 1 else []
            if len(parts) < 2:
                return super().training_step(model, inputs, num_items_in_batch)
            logged = self._metrics["train"]
            before = {name: len(values) for name, values in logged.items()}
            losses = []
            try:
                for number, (part, self.part_share) in enumerate(parts, 1):
                    # One loss is scaled, and its gradient added, per part; the optimizer steps after the last one.
                    with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                        losses.append(super().training_step(model, part, num_items_in_batch))
            finally:
                self.part_share = 1.0
            merge_metrics(logged, before, [share for _, share in parts])
            return sum(losses)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self.part_share == 1.0 or num_items_in_batch is not None:
                return result  # a whole batch, or a sum that is divided by the tokens of the whole batch
            loss, *outputs = result if return_outputs else (result,)
            return (loss * self.part_share, *outputs) if return_outputs else loss * self.part_share

    BoundedTrainer.__name__ = trainer_class.__name__
    return BoundedTrainer


def split_batch(inputs: dict, tokens: int, sides: int) -> list[tuple[dict, float]]:
    """[(part, its share of the rows)] of a padded batch: rows of similar length together, cut to their longest.

    Args:
        inputs: tensors of (rows · sides, width), (rows · sides,) or (rows,); attention_mask is one, padded on the
            right.
        tokens: at most in a part, padding counted, unless one row has more.
    """
    import torch

    mask = inputs["attention_mask"]
    count = mask.shape[0] // sides
    widths = mask.sum(1).view(sides, count).amax(0).tolist()
    parts: list[list[int]] = []
    for row in sorted(range(count), key=lambda row: -widths[row]):
        # The first row of a part is its longest.
        if parts and (len(parts[-1]) + 1) * sides * widths[parts[-1][0]] <= tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    cut = []
    for rows in parts:
        every = [row + side * count for side in range(sides) for row in rows]
        part = {}
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.dim() and value.shape[0] in (count, count * sides):
                value = value[every if value.shape[0] == count * sides else rows]
                if value.dim() == 2 and value.shape[1] == mask.shape[1]:
                    value = value[:, : widths[rows[0]]]
            part[name] = value
        cut.append((part, len(rows) / count))
    return cut


def merge_metrics(logged: dict[str, list], before: dict[str, int], shares: Sequence[float]) -> None:
    """Make the figures of the parts one figure per batch, as without parts: their mean by `shares`, or their extreme.

    Args:
        logged: {name: figures} of the trainer, changed in place.
        before: how many figures each name had.
    """
    for name, values in logged.items():
        start = before.get(name, 0)
        new = values[start:]
        if len(new) != len(shares):
            continue  # not one per part: a running total
        extreme = {"min": min, "max": max}.get(name[:3])
        merged = extreme(new) if extreme else sum(share * value for share, value in zip(shares, new, strict=True))
        values[start:] = [merged]
