"""The reward model: pairs to token ids, training to soft labels, its quality on held-out pairs.

    rows, overlong = tokenize(pairs, chat, max_length=1024)
    trainer = make_trainer(model, chat.tokenizer, rows, arguments, output)
    measure(score_pairs(trainer, test_rows), test_rows)

A score means nothing alone: σ((score of one − score of the other) / temperature) is the probability that the first is
the better response to the same prompt. The temperature is fitted on held-out labels and saved in the model's
config.json as `score_temperature`. Leaves out ensembles of reward models, and models of each turn or step.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from cai.base import cli, files, hashing
from cai.base.errors import InputError
from cai.data import dialogue
from cai.models import loading, scorer
from cai.models.chat import encode
from cai.stats import calibration, drawing, intervals, tables
from cai.train import common, microbatches

# What the summary shows of `measure`; all of it is in holdout.json.
SUMMARY = (
    "pairs",
    "accuracy",
    "longer",
    "log_loss",
    "least",
    "ece",
    "temperature",
    "scaled_log_loss",
    "scaled_ece",
    "length_correlation",
)

# Edges of the groups in which accuracy is shown: how certain the label is (|2p − 1|), and by which part of the longer
# response the better one is longer (negative: shorter).
MARGINS = (0.0, 0.25, 0.5, 0.75, 1.0)

LENGTH_DIFFERENCES = (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)


def tokenize(pairs: list[dict], chat, max_length: int) -> tuple[list[dict], int]:
    """Token ids of the pairs.

    Returns:
        (rows to train on or to measure, how many pairs are too long and are left out). A row: {chosen_ids,
        rejected_ids, chosen_length, rejected_length (characters), p_chosen, prompt, source, weight}.
    """
    rows, overlong = [], 0
    for pair in pairs:
        messages = dialogue.as_messages(pair["prompt"])
        row = {
            "p_chosen": pair["p_chosen"],
            "prompt": dialogue.prompt_text(pair["prompt"]),
            "source": pair.get("source", ""),
            "weight": pair.get("weight", 1.0),
        }
        for side in ("chosen", "rejected"):
            before, answer = encode(chat, messages, pair[side])
            row |= {f"{side}_ids": before + answer, f"{side}_length": len(pair[side])}
        if max(len(row["chosen_ids"]), len(row["rejected_ids"])) > max_length:
            overlong += 1
        else:
            rows.append(row)
    return rows, overlong


def tokenize_parts(
    parts: dict[str, list[dict]], counts: dict, chat, longest: int, max_length: int
) -> tuple[list[dict], list[dict], dict]:
    """(rows to train on, held-out rows, counts) of `preferences.split_holdout`.

    Raises InputError if no row is left to train on.

    Args:
        longest, max_length: tokens, of `TrainingRun.longest_row` and of --max-length.
    """
    (rows, overlong), (test_rows, test_overlong) = (tokenize(part, chat, longest) for part in parts.values())
    if not rows:
        raise common.all_overlong(f"all {overlong} pairs", longest, max_length)
    if longest < max_length and overlong + test_overlong:
        cli.warn(
            f"{overlong + test_overlong} pairs are longer than the model's context of {longest} tokens and are left out"
        )
    return (
        rows,
        test_rows,
        {**counts, "train": len(rows), "held_out": len(test_rows), "overlong": overlong + test_overlong},
    )


def training_order(rows: list[dict], batch: int, epochs: float, seed: int) -> list[int]:
    """`common.training_order` of rows of `tokenize`, each as often as its weight says."""
    lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    return common.training_order(lengths, batch, epochs, seed, [row["weight"] for row in rows])


def choose_eval_steps(options, count: int, test_rows: list[dict]) -> int:
    """Optimizer steps between two evaluations of the held-out loss; 0 for none, by default ten if it may stop.

    Args:
        options: have eval_steps, patience, batch_size and gradient_accumulation.
        count: rows in the order to train on.
    """
    if not options.eval_steps and not options.patience:
        return 0
    if not test_rows:
        raise InputError(
            "no pair is held out to evaluate on",
            where="--patience" if options.patience else "--eval-steps",
            remedy="Raise --holdout",
        )
    rows_per_step = options.batch_size * options.gradient_accumulation * common.count_processes()
    return options.eval_steps or max(1, -(-count // rows_per_step) // 10)


def make_trainer(
    model,
    tokenizer,
    rows: list[dict],
    arguments: dict,
    output,
    adapters=None,
    *,
    test_rows: Sequence[dict] = (),
    eval_steps: int = 0,
    patience: int = 0,
):
    """TRL's RewardTrainer with the soft-label loss, over rows of `tokenize` in their order.

    Args:
        arguments: of `common.trainer_arguments`.
        test_rows: held-out rows whose loss is evaluated every `eval_steps` optimizer steps (0: never).
        patience: stop after this many evaluations in a row that were not better than the best, and keep the weights
            of the best (0: train to the end). A state to resume from is then saved at each evaluation.
    """
    from transformers import EarlyStoppingCallback
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class SoftRewardTrainer(RewardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            # Taken by name, so that a lost label is an error and not the hard loss.
            p = inputs.pop("p_chosen")
            hard, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            # −p·log σ(d) − (1−p)·log σ(−d)  =  −log σ(d) + (1−p)·d, and TRL's loss is the first term.
            loss = hard + ((1 - p) * (chosen - rejected)).mean()
            return (loss, outputs) if return_outputs else loss

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            # Exact, and the same in every process: Trainer's own gives the last batch another weight.
            margins = subtract(score_pairs(self, test_rows))
            is_right = [d > 0 for d, row in zip(margins, test_rows, strict=True) if row["p_chosen"] > 0.5]
            metrics = {"eval_loss": log_loss(margins, test_rows)}
            if is_right:
                metrics["eval_accuracy"] = sum(is_right) / len(is_right)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    arguments = {**arguments, **decide_evaluations(eval_steps, patience)}
    longest = max(len(ids) for row in rows for ids in (row["chosen_ids"], row["rejected_ids"]))
    tokens, arguments = microbatches.choose_bound(model, arguments, longest=2 * longest, adapters=adapters)
    return microbatches.bound_batches(common.make_state_folders(SoftRewardTrainer), tokens, sides=2)(
        model=model,
        processing_class=tokenizer,
        peft_config=adapters,
        train_dataset=make_dataset(rows),
        eval_dataset=make_dataset(test_rows) if eval_steps else None,
        data_collator=common.soft_label_collator(DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)),
        # Every column is used: by default, Trainer drops those that the model does not know by name.
        # No maximum length: TRL would drop pairs silently, and `tokenize` has counted them.
        args=RewardConfig(**arguments, max_length=None, disable_dropout=True, remove_unused_columns=False),
        callbacks=[common.MetricsLog(output, "reward model"), *([EarlyStoppingCallback(patience)] if patience else [])],
    )


def make_dataset(rows: Sequence[dict]):
    """The columns of `tokenize` that TRL and the loss read."""
    from datasets import Dataset

    return Dataset.from_list([{name: row[name] for name in ("chosen_ids", "rejected_ids", "p_chosen")} for row in rows])


def decide_evaluations(eval_steps: int, patience: int) -> dict:
    """Trainer's arguments for evaluating, and for keeping the best weights with `patience`."""
    if not eval_steps:
        return {}
    keeping = {
        "save_strategy": "steps",
        "save_steps": eval_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        # The count of evaluations that were not better is saved too: a resumed run stops where an unbroken one does.
        "restore_callback_states_from_checkpoint": True,
    }
    return {"eval_strategy": "steps", "eval_steps": eval_steps, **(keeping if patience else {})}


def _keep_ending(trainer, ending: str) -> None:
    config = trainer.accelerator.unwrap_model(trainer.model).config
    if ending != "eos":
        setattr(config, scorer.ENDING, ending)
    elif hasattr(config, scorer.ENDING):  # of the reward model that was trained further
        delattr(config, scorer.ENDING)


def measure_holdout(trainer, rows: Sequence[dict], ending: str = "eos") -> dict:
    """`measure` of the trained model, {} without rows; its temperature and where scored responses end (`chat.ENDINGS`)
    are put into the model's configuration."""
    _keep_ending(trainer, ending)
    measures = measure(score_pairs(trainer, rows), rows) if rows else {}
    # Also where none was fitted: the temperature of a reward model that is trained further would be saved again.
    config = trainer.accelerator.unwrap_model(trainer.model).config
    setattr(config, scorer.TEMPERATURE, measures.get("temperature", 1.0))
    return measures


def score_pairs(trainer, rows: Sequence[dict]) -> list[float]:
    """Scores of the chosen responses, then of the rejected ones, by the model as it is now.

    Each process scores all of them: a sharded model needs every process in each forward pass.
    """
    sequences = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    return scorer.score_sequences(
        trainer.model_wrapped,
        trainer.processing_class.pad_token_id,
        sequences,
        2 * trainer.args.per_device_train_batch_size,
    )


def subtract(scores: Sequence[float]) -> list[float]:
    """The margin of each pair: the score of its chosen response minus that of its rejected one.

    Args:
        scores: of the chosen responses, then of the rejected ones.
    """
    count = len(scores) // 2
    return [chosen - rejected for chosen, rejected in zip(scores[:count], scores[count:], strict=True)]


def measure(scores: Sequence[float], rows: Sequence[dict]) -> dict:
    """The quality of scores on pairs with labels.

    Args:
        scores: of the chosen responses, then of the rejected ones.
        rows: the pairs; p_chosen may come from a judge or from a source that is certain (0 or 1).
    Returns:
        accuracy (a tie is not right; pairs labelled 0.5 are not counted) and, beside it, that of "the longer one";
        log_loss against the labels and the least that any model could have; ece; temperature, and log_loss and ece
        with it (`scaled`: each half of the prompts by the temperature of the other half); the correlation of score
        and length over all responses; accuracy by the label's margin, by the difference in length, and by source.
        Intervals take the pairs of one prompt as dependent. `bins` are those of the scaled ECE.
    """
    margins, labels = subtract(scores), [row["p_chosen"] for row in rows]
    scaled = scale_across_halves(margins, rows)
    ece, scaled_ece = (calibration.calibrate_margins(each, labels) for each in (margins, scaled))
    lengths = [row[f"{side}_length"] for side in ("chosen", "rejected") for row in rows]
    return {
        "pairs": len(rows),
        "accuracy": measure_accuracy(margins, rows),
        "longer": measure_accuracy([row["chosen_length"] - row["rejected_length"] for row in rows], rows),
        "log_loss": log_loss(margins, rows),
        "least": log_loss([calibration.logit(p) for p in labels], rows),
        "ece": ece["ece"],
        "temperature": calibration.fit_temperature(margins, labels),
        "scaled_log_loss": log_loss(scaled, rows),
        "scaled_ece": scaled_ece["ece"],
        "length_correlation": intervals.correlation(scores, lengths),
        "mean_score": intervals.mean(scores),
        "by_margin": group_accuracy(margins, rows, MARGINS, lambda row: abs(2 * row["p_chosen"] - 1)),
        "by_length_difference": group_accuracy(margins, rows, LENGTH_DIFFERENCES, length_difference),
        "by_source": {
            source: measure_accuracy(margins, rows, lambda row, source=source: row["source"] == source)
            for source in dict.fromkeys(row["source"] for row in rows)
        },
        "bins": scaled_ece["bins"],
    }


def measure_accuracy(
    margins: Sequence[float], rows: Sequence[dict], takes: Callable[[dict], bool] = lambda row: True
) -> dict:
    """How often the margin (above 0: for the chosen response) is on the label's side, over the rows that `takes`."""
    pairs = [(d, row) for d, row in zip(margins, rows, strict=True) if row["p_chosen"] != 0.5 and takes(row)]
    is_right = [d > 0 if row["p_chosen"] > 0.5 else d < 0 for d, row in pairs]
    return intervals.clustered_rate(is_right, [row["prompt"] for _, row in pairs])


def group_accuracy(margins, rows, edges: Sequence[float], value: Callable[[dict], float]) -> list[dict]:
    """Accuracy in each group [from, to) of the row's value; the last one includes its upper edge."""
    return [
        {
            "from": low,
            "to": high,
            "accuracy": measure_accuracy(
                margins,
                rows,
                lambda row, low=low, high=high: low <= value(row) < high or (high == edges[-1] and value(row) == high),
            ),
        }
        for low, high in pairwise(edges)
    ]


def length_difference(row: dict) -> float:
    """By which part of the longer response the better one is longer, −1 to 1."""
    chosen, rejected = row["chosen_length"], row["rejected_length"]
    difference = (chosen - rejected) / max(chosen, rejected, 1)
    return difference if row["p_chosen"] >= 0.5 else -difference


def log_loss(margins: Sequence[float], rows: Sequence[dict]) -> float:
    """Mean of `calibration.soft_loss` over the rows."""
    return statistics.fmean(calibration.soft_loss(d, row["p_chosen"]) for d, row in zip(margins, rows, strict=True))


def scale_across_halves(margins: Sequence[float], rows: Sequence[dict]) -> list[float]:
    """The margins, those of each half of the prompts divided by the temperature fitted on the other half."""
    halves = [hashing.hashed_seed("half", row["prompt"]) % 2 for row in rows]
    temperatures = [1.0, 1.0]
    for half in set(halves) if len(set(halves)) == 2 else ():
        others = [i for i, other in enumerate(halves) if other != half]
        temperatures[half] = calibration.fit_temperature(
            [margins[i] for i in others], [rows[i]["p_chosen"] for i in others]
        )
    return [d / temperatures[half] for d, half in zip(margins, halves, strict=True)]


def write_holdout(measures: dict, output: str | Path) -> dict:
    """Write holdout.json and reliability.png, once; returns what the summary shows of `measure`."""
    if loading.is_main_process():
        folder = Path(output)
        files.write_text(folder / "holdout.json", json.dumps(measures, indent=1) + "\n")
        drawing.reliability(
            folder / "reliability.png",
            {**measures, "ece": measures["scaled_ece"]},
            "Reward model against held-out labels",
        )
    return {name: measures[name] for name in SUMMARY}


def show_holdout(summary: dict) -> dict:
    """The summary for people: rates with their intervals instead of nested objects."""
    lines = {
        f"held-out {name.replace('_', ' ')}": tables.show(value)
        if name in ("accuracy", "longer")
        else tables.show_number(value)
        for name, value in summary.get("holdout", {}).items()
        if name != "pairs"
    }
    return {name: value for name, value in summary.items() if name != "holdout"} | lines
