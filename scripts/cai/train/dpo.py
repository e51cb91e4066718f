"""DPO: pairs to token ids, the trainer with the soft-label loss, and what the policy prefers on held-out pairs.

    trainer = make_trainer(policy, reference, chat.tokenizer, tokenize(pairs, chat), arguments, output)
    write_holdout(held_out, scored, output)

Leaves out sampled text, which evaluate.py --pairs adds to the figures on the held-out pairs.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cai.base import cli, files
from cai.base.errors import InputError
from cai.data import dialogue, outputs, preferences
from cai.models import loading
from cai.models.chat import encode
from cai.stats import preference, tables
from cai.train import common, microbatches

# {loss: beta by default}: that of each paper.
BETAS = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0}

TARGET_MARGIN = 1.0  # SimPO's gamma by default; its paper's are 0.3 to 1.6

# What the summary shows of `preference.figures`; all of it is in holdout.json.
SUMMARY = ("relative", "logp_margin", "outright", "outright_reference", "outright_change", "longer")


def check_vocabulary(reference, policy, name: str) -> None:
    """Raise InputError unless both models have the same number of tokens; that they are the same tokens is assumed."""
    size, expected = (model.config.get_text_config().vocab_size for model in (reference, policy))
    if size != expected:
        raise InputError(
            f"a vocabulary of {size} tokens",
            where=name,
            expected=f"the policy's, of {expected}",
            remedy="Take a reference that the policy was trained from",
        )


def tokenize(pairs: list[dict], chat) -> list[dict]:
    """Token ids of the pairs: rows of {prompt_ids, chosen_ids, rejected_ids, p_chosen, weight}.

    Args:
        pairs: of `preferences.read_sources`.
    """
    rows = []
    for pair, (messages, texts) in zip(pairs, preferences.prompt_and_continuations(pairs), strict=True):
        (prompt, chosen), (_, rejected) = (encode(chat, messages, text) for text in texts)
        rows.append(
            {
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "p_chosen": pair["p_chosen"],
                "weight": pair.get("weight", 1.0),
            }
        )
    return rows


def row_length(row: dict) -> int:
    """Tokens of a pair's prompt and longer response."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def pair_losses(loss: str, p, policy, reference, tokens, beta: float, target_margin: float):
    """The loss (pairs,) of each pair under IPO or SimPO, with the soft label p as the weight of its two directions.

    ipo (arXiv 2310.12036, eq. 17, per token as in TRL): p·(h − 1/2β)² + (1−p)·(h + 1/2β)², where h is the difference
    of the log-ratios to the reference. simpo (arXiv 2405.14734, eq. 6): −p·log σ(z − γ) − (1−p)·log σ(−z − γ), where z
    is β times the difference of the policy's log-probabilities per token; it has no reference.

    Args:
        p: (pairs,). policy, reference: log-probabilities (2 · pairs,), the chosen ones first. tokens: (2 · pairs,).
        target_margin: γ.
    """
    from torch.nn.functional import logsigmoid

    relative = policy if loss == "simpo" else policy - reference
    chosen, rejected = (relative / tokens.clamp(min=1)).chunk(2)
    if loss == "ipo":
        goal = 1 / (2 * beta)
        return p * (chosen - rejected - goal) ** 2 + (1 - p) * (chosen - rejected + goal) ** 2
    z = beta * (chosen - rejected)
    return -p * logsigmoid(z - target_margin) - (1 - p) * logsigmoid(-z - target_margin)


def choose_loss(loss: str, beta: float | None, target_margin: float | None) -> tuple[dict, Any]:
    """(what identifies the loss, `pair_losses` with its settings), or None in place of it for "sigmoid".

    beta, target_margin: None for the default of the loss. Raises UsageError for a margin of a loss without one.
    """
    if loss != "simpo":
        cli.refuse_options(["target_margin"], "only --loss simpo has it")
    settings = {"beta": beta or BETAS[loss]}
    if loss == "sigmoid":
        return settings, None
    margin = target_margin or TARGET_MARGIN
    named = {**settings, "loss": loss, **({"target_margin": margin} if loss == "simpo" else {})}
    return named, partial(pair_losses, loss, target_margin=margin, **settings)


def make_trainer(
    policy, reference, tokenizer, rows: list[dict], arguments: dict, output: str, adapters=None, losses=None
):
    """TRL's DPOTrainer with the soft-label loss, over rows of `tokenize` in their order.

    Args:
        reference: a frozen model, or None for the policy with its adapters off; for SimPO it is in the figures only.
        losses: of `choose_loss`; None for DPO's own.
    """
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class SoftDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # tokenized, short enough and in order; TRL 1.16 would start again from text

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            # Taken by name, so that a lost label is an error and not the hard loss.
            p = inputs.pop("p_chosen")
            hard, (of_policy, of_reference) = self.compute_logps(model, inputs, num_items_in_batch)
            if losses is None:
                chosen, rejected = (of_policy - of_reference).chunk(2)
                # −p·log σ(βd) − (1−p)·log σ(−βd)  =  −log σ(βd) + (1−p)·βd, and TRL's loss is the first term.
                loss = hard + ((1 - p) * self.beta * (chosen - rejected)).mean()
            else:
                loss = losses(p, of_policy, of_reference, inputs["completion_mask"][:, 1:].sum(1)).mean()
            if not torch.isfinite(loss):
                raise common.describe_not_finite(self, "the loss is")
            return loss

        def compute_logps(self, model, inputs, num_items_in_batch=None):
            """(TRL's loss, [the policy's, the reference's]): each (2 · pairs,), the chosen and then the rejected."""
            sums = []  # log-probabilities of the chosen, then of the rejected: the policy's, then the reference's
            models = {id(model): model for model in (self.model, self.ref_model) if model is not None}.values()
            hooks = [
                model.register_forward_hook(lambda _module, _args, output: sums.append(output.log_probs.sum(1)))
                for model in models
            ]
            try:
                hard = super().compute_loss(model, inputs, False, num_items_in_batch)
            finally:
                for hook in hooks:
                    hook.remove()
            return hard, sums

    longest = 2 * max(map(row_length, rows))
    tokens, arguments = microbatches.choose_bound(policy, arguments, longest=longest, adapters=adapters)
    return microbatches.bound_batches(SoftDPOTrainer, tokens, sides=2)(
        model=policy,
        ref_model=reference,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapters,
        data_collator=common.soft_label_collator(DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)),
        # Trainer would drop the columns that the model does not know by name.
        args=DPOConfig(**arguments, max_length=None, remove_unused_columns=False),
        callbacks=[common.MetricsLog(output, "dpo")],
    )


def score_pairs(trainer, rows: Sequence[dict]) -> list[list[float]]:
    """Log-probabilities of each pair: chosen and rejected by the policy as it is now, then by the reference.

    Each process scores all of them: a sharded model needs every process in each forward pass.
    """
    import torch

    logps, size = [], trainer.args.per_device_train_batch_size
    trainer.model.eval()
    for start in range(0, len(rows), size):
        inputs = trainer._prepare_inputs(trainer.data_collator(rows[start : start + size]))
        del inputs["p_chosen"]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            _, sums = trainer.compute_logps(trainer.model_wrapped, inputs)
        logps += torch.cat([of_model.float().view(2, -1) for of_model in sums]).T.tolist()
    return logps


def last_figures(history: list[dict]) -> dict:
    """Accuracy and margin of the policy's own implied rewards, as they were last logged."""
    last = next((row for row in reversed(history) if "rewards/margins" in row), {})
    names = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "chosen_reward": "rewards/chosen"}
    return {name: round(last[key], 4) for name, key in names.items() if key in last}


# --- held-out pairs ---------------------------------------------------------------------------------------------------


def tokenize_holdout(
    parts: dict[str, list[dict]], counts: dict, chat, longest: int
) -> tuple[list[tuple[dict, dict]], dict]:
    """([(pair, row of `tokenize`)] of the held-out pairs that are short enough, counts) of `preferences.split_holdout`.

    Args:
        counts: with the overlong rows to train on. longest: tokens, of `TrainingRun.longest_row`.
    """
    rows = zip(parts["held_out"], tokenize(parts["held_out"], chat), strict=True)
    tests = [(pair, row) for pair, row in rows if row_length(row) <= longest]
    if "held_out" not in counts:  # without --holdout
        return tests, counts
    overlong = len(parts["held_out"]) - len(tests)
    train = len(parts["train"]) - counts["overlong"]
    return tests, {**counts, "train": train, "held_out": len(tests), "overlong": counts["overlong"] + overlong}


def next_command(output: str, reference: str, held_out: Sequence[dict]) -> str:
    """The line that measures the policy: on the held-out pairs if there are any."""
    pairs = f"--pairs {pairs_file(output)} --reference {reference}" if held_out else "--input PROMPTS"
    return f"python scripts/evaluate.py --model {output} {pairs} --output FIGURES"


def pairs_file(output: str | Path) -> Path:
    """Where the held-out pairs are."""
    return Path(output) / "holdout.jsonl"


def as_logprobs(pair: dict, row: dict, logps: Sequence[float]) -> preference.PairLogprobs:
    """A held-out pair for `preference.figures`.

    Args:
        row: its token ids, of `tokenize`.
        logps: of `score_pairs`.
    """
    return preference.PairLogprobs(
        dialogue.prompt_text(pair["prompt"]),
        (logps[0], logps[1]),
        (len(row["chosen_ids"]), len(row["rejected_ids"])),
        (len(pair["chosen"]), len(pair["rejected"])),
        reference=(logps[2], logps[3]),
    )


def write_holdout(pairs: Sequence[dict], scored: Sequence[preference.PairLogprobs], output: str | Path) -> dict:
    """Write holdout.jsonl (all held-out pairs) and holdout.json, once; returns what the summary shows.

    Args:
        scored: those that were short enough to be measured; {} is returned, and no holdout.json written, for none.
    """
    measures = {"pairs": len(scored), **preference.figures(scored)} if scored else {}
    if loading.is_main_process():
        outputs.write_jsonl(
            pairs_file(output),
            [{name: value for name, value in pair.items() if name not in ("source", "weight")} for pair in pairs],
        )
        if measures:
            files.write_text(Path(output) / "holdout.json", json.dumps(measures, indent=1) + "\n")
        else:
            cli.warn("every held-out pair is too long: nothing was measured on them")
    return {name: measures[name] for name in ("pairs", *SUMMARY) if name in measures}


def show_holdout(summary: dict) -> dict:
    """The summary for people: figures with their intervals, and the two questions in words."""
    measures = summary.get("holdout", {})
    lines = {
        f"held-out {name.replace('_', ' ')}": (tables.show_number if name.startswith("logp_") else tables.show)(value)
        for name, value in measures.items()
        if name != "pairs"
    }
    if measures:
        lines["moved towards the chosen"] = preference.answer(measures["relative"])
        lines["prefers the chosen outright"] = preference.answer(measures["outright"])
    return {name: value for name, value in summary.items() if name != "holdout"} | lines
