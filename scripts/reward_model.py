"""Train a reward model on preferences, with the judge's probabilities as soft labels (paper, section 4.1).

    python scripts/reward_model.py --input preferences.jsonl --model runs/sft --output runs/reward

A causal language model's folder gives the body, under a new head of one score; a reward model's folder is
trained on. Leaves out pairs the judge could not decide, ensembles, and margins.
"""

import math

import click

from cai import cli, engines, metrics, records, training
from cai.errors import InputError, shorten
from cai.templates import as_messages, prompt_text


def check_label(row: dict, where, line: int) -> None:
    """InputError if a decided pair has no probability to train to."""
    p = row.get("p_chosen")
    if row["chosen"] is None or row["rejected"] is None:
        return
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise InputError(
            f"p_chosen is {shorten(p)!r}", where=where, line=line, expected="a probability from 0 to 1",
            remedy="Make the rows with judge.py, or train on --labels hard",
        )


def held_out(prompt, share: float, seed: int) -> bool:
    """Whether a prompt's pairs are kept for measuring: by hashing, so that a prompt's pairs stay together."""
    return records.hashed_seed("holdout", seed, prompt_text(prompt)) < share * 2**63


def read_pairs(inputs, labels: str, limit: int | None) -> tuple[list[dict], dict, str]:
    """(decided pairs of {prompt, chosen, rejected, p_chosen}, counts, digest of the input)."""
    source = records.Source(inputs, require=("prompt", "chosen", "rejected"), limit=limit,
                            check=check_label if labels == "soft" else None)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"],
         "p_chosen": float(row["p_chosen"]) if labels == "soft" else 1.0}
        for row in source
        if row["chosen"] is not None and row["rejected"] is not None
    ]
    if not pairs:
        raise InputError("no decided pair", where=", ".join(inputs), expected="rows with `chosen`")
    return pairs, {"rows": source.count, "undecided": source.count - len(pairs)}, source.digest


def tokenized(pairs: list[dict], chat, max_length: int) -> tuple[list[dict], int]:
    """(rows of {chosen_ids, rejected_ids, p_chosen, longer}, how many are too long and are left out).

    longer: whether the chosen response has more characters, for the baseline.
    """
    kept, overlong = [], 0
    for pair in pairs:
        prompt = as_messages(pair["prompt"])
        row = {"p_chosen": pair["p_chosen"], "longer": len(pair["chosen"]) > len(pair["rejected"])}
        for side in ("chosen", "rejected"):
            before, answer = training.encode(chat, prompt, pair[side])
            row[f"{side}_ids"] = before + answer
        if max(len(row["chosen_ids"]), len(row["rejected_ids"])) > max_length:
            overlong += 1
        else:
            kept.append(row)
    return kept, overlong


def measured(scores: list[float], rows: list[dict]) -> dict:
    """Accuracy and log-loss on held-out pairs, with the accuracy of "the longer one" to compare with.

    Args:
        scores: of the chosen responses, then of the rejected ones.
        rows: the pairs; the log-loss is taken against their soft labels, and can't be less than `least`.
    """
    n = len(rows)
    margins = [chosen - rejected for chosen, rejected in zip(scores[:n], scores[n:], strict=True)]
    return {
        "pairs": n,
        "accuracy": metrics.rate(sum(d > 0 for d in margins), n),
        "longer": metrics.rate(sum(row["longer"] for row in rows), n),
        "log_loss": sum(soft_loss(d, row["p_chosen"]) for d, row in zip(margins, rows, strict=True)) / n,
        "least": sum(soft_loss(logit(row["p_chosen"]), row["p_chosen"]) for row in rows) / n,
    }


def soft_loss(d: float, p: float) -> float:
    """−p·log σ(d) − (1−p)·log σ(−d), for one margin d = score of chosen − score of rejected."""
    return max(d, 0) - p * d + math.log1p(math.exp(-abs(d)))


def logit(p: float) -> float:
    """The margin whose sigmoid is p; 40 and −40 stand for infinity."""
    return 40.0 * (2 * p - 1) if p in (0, 1) else math.log(p / (1 - p))


def make_trainer(model, tokenizer, rows: list[dict], arguments: dict, output: str, adapters=None):
    """TRL's RewardTrainer with the soft-label loss, over rows of `tokenized` in the order given."""
    import torch
    from datasets import Dataset
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

    used = ("chosen_ids", "rejected_ids", "p_chosen")
    dataset = Dataset.from_list([{name: row[name] for name in used} for row in rows])
    return SoftRewardTrainer(
        model=model, processing_class=tokenizer, train_dataset=dataset, peft_config=adapters,
        data_collator=SoftCollator(pad_token_id=tokenizer.pad_token_id),
        # Every column is used: left to itself, Trainer drops those that the model does not know by name.
        args=RewardConfig(**arguments, max_length=None, disable_dropout=True, remove_unused_columns=False),
        callbacks=[training.MetricsLog(output, "reward model")],
    )


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option("--labels", type=click.Choice(["soft", "hard"]), default="soft", show_default=True,
              help="Train to the judge's probability p_chosen, or to the chosen one being right for certain.")
@click.option("--holdout", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True,
              help="Share of the prompts whose pairs are not trained on, but measured.")
@click.option("--center", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="Weight of a penalty that keeps the scores near 0; 0.01 is usual.")
@training.training_options(epochs=1, learning_rate=1e-5, batch_size=8, max_length=1024)
@cli.options("seed", "limit", "json", "dry_run", "overwrite")
def main(inputs, output, model, labels, holdout, center, epochs, learning_rate, batch_size,
         gradient_accumulation, max_length, lora, lora_rank, save_steps, device, dtype, seed, limit,
         as_json, dry_run, overwrite):
    """Train a reward model on preferences with soft labels.

    \b
    Example:
      python scripts/reward_model.py --input preferences.jsonl --model tiny \\
          --output runs/reward --learning-rate 1e-3
    """
    engines.check_model(model, classifier=True)
    pairs, counts, digest = read_pairs(inputs, labels, limit)
    train = [pair for pair in pairs if not held_out(pair["prompt"], holdout, seed)]
    test = [pair for pair in pairs if held_out(pair["prompt"], holdout, seed)]
    counts |= {"train": len(train), "held_out": len(test)}
    if not train:
        raise InputError(f"all {len(pairs)} pairs are held out", where="--holdout", remedy="Lower it")
    settings = {
        "model": records.identity(model), "input": digest, "labels": labels, "holdout": holdout,
        "center": center, "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation, "max_length": max_length,
        "lora_rank": lora_rank if lora else None, "dtype": dtype, "seed": seed,
    }
    folder = records.claim_folder(output, command="reward_model", fingerprint=settings, overwrite=overwrite,
                                  inputs=inputs)
    following = f"python scripts/ppo.py --model {model} --reward-model {output} --input PROMPTS --output NEW"
    if dry_run:
        lengths = [2 * len(prompt_text(p["prompt"])) + len(p["chosen"]) + len(p["rejected"]) for p in train]
        plan = training.plan(model, lengths, epochs=epochs, lora=lora,
                             batch=batch_size * gradient_accumulation)
        cli.finish({"output": output, **counts, **plan}, as_json=as_json, next_command=following)
        return
    if folder.complete:
        cli.finish({"output": output, **folder.counts}, as_json=as_json, next_command=following)
        return

    from transformers import set_seed

    training.choose_device(device)
    chat = training.load_chat(model)
    rows, counts["overlong"] = tokenized(train, chat, max_length)
    test_rows, more = tokenized(test, chat, max_length)
    counts["overlong"] += more
    if not rows:
        raise InputError(f"all {len(train)} pairs are longer", where="--max-length", remedy="Raise it")
    set_seed(seed)  # of the new head
    reward_model = training.load_reward_model(model, device, dtype, lora=lora)
    lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    order = training.training_order(lengths, batch_size, epochs, seed)
    with folder:
        arguments = training.trainer_arguments(
            output, learning_rate=learning_rate, batch_size=batch_size,
            gradient_accumulation=gradient_accumulation, save_steps=save_steps, seed=seed, device=device,
            dtype=dtype, lora=lora, center_rewards_coefficient=center or None,
        )
        trainer = make_trainer(reward_model, chat.tokenizer, [rows[i] for i in order], arguments, output,
                               training.lora_config(lora_rank, "SEQ_CLS") if lora else None)
        figures = training.run_trainer(trainer, output)
        counts |= {"steps": trainer.state.global_step, "loss": round(figures.training_loss, 4)}
        if test_rows:
            # Each process scores all of them: a sharded model needs every process in each forward pass.
            sequences = [row[side] for side in ("chosen_ids", "rejected_ids") for row in test_rows]
            pad_id = chat.tokenizer.pad_token_id
            scores = training.score(trainer.model_wrapped, pad_id, sequences, 2 * batch_size)
            counts["holdout"] = measured(scores, test_rows)
        training.save_trained(trainer, chat.tokenizer, output)
        manifest = folder.finish(counts)
    if training.is_main_process():
        cli.finish({"output": output, **counts, "seconds": manifest["seconds"]}, as_json=as_json,
                   next_command=following)


if __name__ == "__main__":
    main()
