"""The reward model: pairs to token ids, training to soft labels, what is measured on held-out pairs, and scores.

    rows, overlong = tokenized(pairs, chat, max_length=1024)
    trainer = make_trainer(model, chat.tokenizer, rows, arguments, output)
    scorer = load_scorer("runs/reward"); scorer.scores([(messages, "I can't help with that.")])

A score says nothing alone: σ((score of one − score of the other) / temperature) is the probability that the one is
the better response to the same prompt. The temperature is fitted on held-out labels and saved in the model's
config.json as `score_temperature`. Leaves out ensembles of reward models, and models of each turn or step.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from cai.base import hashing
from cai.data.dialogue import as_messages, prompt_text
from cai.models import scorer
from cai.models.chat import encode
from cai.stats import calibration as calibration_
from cai.stats import intervals
from cai.stats.calibration import fit_temperature, logit, sigmoid, soft_loss
from cai.train import common

# Edges of the groups in which accuracy is shown: how sure the label is (|2p − 1|), and by which part of the longer
# response the right one is longer (negative: shorter).
MARGINS = (0.0, 0.25, 0.5, 0.75, 1.0)

LENGTH_DIFFERENCES = (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)


def held_out(prompt, share: float, seed: int) -> bool:
    """Whether a prompt's pairs are kept for measuring: by hashing, so that a prompt's pairs stay together."""
    return hashing.hashed_seed("holdout", seed, prompt_text(prompt)) < share * 2**63


def tokenized(pairs: list[dict], chat, max_length: int) -> tuple[list[dict], int]:
    """(rows to train on or to measure, how many pairs are too long and are left out).

    A row: {chosen_ids, rejected_ids, chosen_length, rejected_length (characters), p_chosen, prompt, source, weight}.
    """
    kept, overlong = [], 0
    for pair in pairs:
        prompt = as_messages(pair["prompt"])
        row = {
            "p_chosen": pair["p_chosen"],
            "prompt": prompt_text(pair["prompt"]),
            "source": pair.get("source", ""),
            "weight": pair.get("weight", 1.0),
        }
        for side in ("chosen", "rejected"):
            before, answer = encode(chat, prompt, pair[side])
            row |= {f"{side}_ids": before + answer, f"{side}_length": len(pair[side])}
        if max(len(row["chosen_ids"]), len(row["rejected_ids"])) > max_length:
            overlong += 1
        else:
            kept.append(row)
    return kept, overlong


def training_order(rows: list[dict], batch: int, epochs: float, seed: int) -> list[int]:
    """`common.training_order` of rows of `tokenized`, each as often as its weight says."""
    lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    weights = [row["weight"] for row in rows]
    return common.training_order(lengths, batch, epochs, seed, None if set(weights) == {1.0} else weights)


def make_trainer(
    model,
    tokenizer,
    rows: list[dict],
    arguments: dict,
    output,
    adapters=None,
    *,
    order: Sequence[int] | None = None,
    test_rows: Sequence[dict] = (),
    eval_steps: int = 0,
    patience: int = 0,
):
    """TRL's RewardTrainer with the soft-label loss, over rows of `tokenized`.

    Args:
        arguments: of `common.trainer_arguments`.
        order: row numbers in the order to train on; that of the rows by default.
        test_rows: held-out rows whose loss is looked at every `eval_steps` optimizer steps (0: never).
        patience: stop when so many looks in a row were no better than the best, and end with the weights of that
            one (0: go on to the end). A state to resume from is then saved at each look.
    """
    import torch
    from datasets import Dataset
    from transformers import EarlyStoppingCallback
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class SoftCollator(DataCollatorForPreference):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            batch["p_chosen"] = torch.tensor([example["p_chosen"] for example in examples])
            return batch

    class SoftRewardTrainer(RewardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            # Taken by name, so that a label lost on the way is an error and not the hard loss.
            p = inputs.pop("p_chosen")
            hard, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            # −p·log σ(d) − (1−p)·log σ(−d)  =  −log σ(d) + (1−p)·d, and TRL's loss is the first term.
            loss = hard + ((1 - p) * (chosen - rejected)).mean()
            return (loss, outputs) if return_outputs else loss

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            # Exact, and the same in every process: the usual one weighs the last batch otherwise.
            margins = _margins(self, test_rows)
            right = [d > 0 for d, row in zip(margins, test_rows, strict=True) if row["p_chosen"] > 0.5]
            found = {"eval_loss": log_loss(margins, test_rows)}
            if right:
                found["eval_accuracy"] = sum(right) / len(right)
            self.log(found)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found

    def dataset(of: Sequence[dict]):
        used = ("chosen_ids", "rejected_ids", "p_chosen")
        return Dataset.from_list([{name: row[name] for name in used} for row in of])

    callbacks = [common.MetricsLog(output, "reward model")]
    if eval_steps:
        arguments = {**arguments, "eval_strategy": "steps", "eval_steps": eval_steps}
    if patience:
        # How often in a row it was no better is saved with a state too: a resumed run stops where a whole one does.
        arguments |= {
            "save_strategy": "steps",
            "save_steps": eval_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "restore_callback_states_from_checkpoint": True,
        }
        callbacks.append(EarlyStoppingCallback(patience))
    train_dataset = dataset(rows)
    return SoftRewardTrainer(
        model=model,
        processing_class=tokenizer,
        peft_config=adapters,
        train_dataset=train_dataset if order is None else train_dataset.select(order),
        eval_dataset=dataset(test_rows) if eval_steps else None,
        data_collator=SoftCollator(pad_token_id=tokenizer.pad_token_id),
        # Every column is used: left to itself, Trainer drops those that the model does not know by name.
        # No length: TRL would drop pairs without a word, and `tokenized` has counted them.
        args=RewardConfig(**arguments, max_length=None, disable_dropout=True, remove_unused_columns=False),
        callbacks=callbacks,
    )


def scores_of(trainer, rows: Sequence[dict]) -> list[float]:
    """Scores of the chosen responses, then of the rejected ones, by the model as it is now.

    Each process scores all of them: a sharded model needs every process in each forward pass.
    """
    sequences = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    size = 2 * trainer.args.per_device_train_batch_size
    return scorer.score_sequences(trainer.model_wrapped, trainer.processing_class.pad_token_id, sequences, size)


def _margins(trainer, rows: Sequence[dict]) -> list[float]:
    scores = scores_of(trainer, rows)
    return [chosen - rejected for chosen, rejected in zip(scores[: len(rows)], scores[len(rows) :], strict=True)]


def measured(scores: Sequence[float], rows: Sequence[dict]) -> dict:
    """What the scores are worth on pairs with labels.

    Args:
        scores: of the chosen responses, then of the rejected ones.
        rows: the pairs; p_chosen may come from a judge or from somebody who knows (0 or 1).

    Returns accuracy (a tie is not right; pairs labelled 0.5 have no right side), beside it that of "the longer one";
    log_loss against the labels and the least that any model could have; ece; temperature, and log_loss and ece with
    it (`scaled`: each half of the prompts by the temperature of the other half); the correlation of score and length
    over all responses; accuracy by the label's margin, by the difference in length, and by source. Rates count the
    pairs of one prompt as alike. `bins` are those of the scaled ECE.
    """
    n = len(rows)
    margins = [chosen - rejected for chosen, rejected in zip(scores[:n], scores[n:], strict=True)]
    labels = [row["p_chosen"] for row in rows]
    temperature = fit_temperature(margins, labels)
    scaled = _cross_fitted(margins, rows)
    found_ece, scaled_ece = (calibration(one, labels) for one in (margins, scaled))
    lengths = [row[f"{side}_length"] for side in ("chosen", "rejected") for row in rows]
    by_source = {
        source: _accuracy(margins, rows, lambda row, source=source: row["source"] == source)
        for source in dict.fromkeys(row["source"] for row in rows)
    }
    return {
        "pairs": n,
        "accuracy": _accuracy(margins, rows),
        "longer": _accuracy([row["chosen_length"] - row["rejected_length"] for row in rows], rows),
        "log_loss": log_loss(margins, rows),
        "least": log_loss([logit(p) for p in labels], rows),
        "ece": found_ece["ece"],
        "temperature": temperature,
        "scaled_log_loss": log_loss(scaled, rows),
        "scaled_ece": scaled_ece["ece"],
        "length_correlation": intervals.correlation(scores, lengths),
        "mean_score": intervals.mean(scores),
        "by_margin": _grouped(margins, rows, MARGINS, lambda row: abs(2 * row["p_chosen"] - 1)),
        "by_length_difference": _grouped(margins, rows, LENGTH_DIFFERENCES, _longer_by),
        "by_source": by_source,
        "bins": scaled_ece["bins"],
    }


def _accuracy(margins: Sequence[float], rows: Sequence[dict], takes: Callable[[dict], bool] = lambda row: True) -> dict:
    """How often the margin (above 0: for the chosen one) is on the label's side, over the rows that `takes` says."""
    pairs = [(d, row) for d, row in zip(margins, rows, strict=True) if row["p_chosen"] != 0.5 and takes(row)]
    right = [d > 0 if row["p_chosen"] > 0.5 else d < 0 for d, row in pairs]
    return intervals.clustered_rate(right, [row["prompt"] for _, row in pairs])


def _grouped(margins, rows, edges: Sequence[float], value: Callable[[dict], float]) -> list[dict]:
    """Accuracy in each group [from, to) of the row's value; the last one has its upper edge too."""
    return [
        {
            "from": low,
            "to": high,
            "accuracy": _accuracy(
                margins,
                rows,
                lambda row, low=low, high=high: low <= value(row) < high or (high == edges[-1] and value(row) == high),
            ),
        }
        for low, high in pairwise(edges)
    ]


def _longer_by(row: dict) -> float:
    """By which part of the longer response the right one is longer, −1 to 1."""
    chosen, rejected = row["chosen_length"], row["rejected_length"]
    difference = (chosen - rejected) / max(chosen, rejected, 1)
    return difference if row["p_chosen"] >= 0.5 else -difference


def log_loss(margins: Sequence[float], rows: Sequence[dict]) -> float:
    """Mean of `soft_loss` over the rows."""
    return math.fsum(soft_loss(d, row["p_chosen"]) for d, row in zip(margins, rows, strict=True)) / len(rows)


def calibration(margins: Sequence[float], labels: Sequence[float]) -> dict:
    """Calibration of the side that the scores prefer: whether it is the better one as often as they say.

    With the chosen side's own probability the labels would all be above one half, and say which side is which.
    """
    return calibration_.calibration(
        [sigmoid(abs(d)) for d in margins], [p if d > 0 else 1 - p for d, p in zip(margins, labels, strict=True)]
    )


def _cross_fitted(margins: Sequence[float], rows: Sequence[dict]) -> list[float]:
    """The margins, those of each half of the prompts divided by the temperature that suits the other half."""
    half = [hashing.hashed_seed("half", row["prompt"]) % 2 for row in rows]
    fitted = [
        fit_temperature(
            *zip(
                *((d, row["p_chosen"]) for d, row, side in zip(margins, rows, half, strict=True) if side != one),
                strict=True,
            )
        )
        if len(set(half)) == 2
        else 1.0
        for one in (0, 1)
    ]
    return [d / fitted[side] for d, side in zip(margins, half, strict=True)]
