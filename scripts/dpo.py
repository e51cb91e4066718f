"""Train a policy on preferences directly, without a reward model: DPO (arXiv 2305.18290), on TRL's DPOTrainer.

    python scripts/dpo.py --input preferences.jsonl --model runs/sft --output runs/dpo

Each pair is trained to the judge's own probability, p_chosen: −p·log σ(βd) − (1−p)·log σ(−βd), where d is by
how much more the policy has come to prefer the chosen response than the reference does. TRL's loss is the case
p = 1. Leaves out TRL's other losses, a held-out share (evaluate.py measures the policy), and pairs that
the judge could not decide.
"""

import click

from cai.base import cli, hashing
from cai.base.errors import InputError
from cai.data import preferences
from cai.models import loading
from cai.models.chat import encode
from cai.train import common
from cai.train.arguments import ABOVE_0, labels_option, training_options


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option(
    "--ref-model",
    metavar="MODEL",
    default=None,
    help="The model that the policy is kept near to. Default: --model before training.",
)
@labels_option
@click.option(
    "--beta", type=ABOVE_0, default=0.1, show_default=True, help="How strongly the policy is kept near the reference."
)
@training_options(epochs=1, learning_rate=1e-6)
def main(options):
    """Train a policy on preferences directly, with soft labels and no reward model.

    \b
    Example:
      python scripts/dpo.py --input preferences.jsonl --model runs/sft \\
          --output runs/dpo --learning-rate 1e-5
    """
    reference_name = options.ref_model or options.model
    loading.check_model(options.model, training=True)
    loading.check_model(reference_name)
    pairs, counts, digest = preferences.read_pairs(
        options.inputs, options.labels, options.limit, reading=options.reading
    )
    run = common.TrainingRun(
        "dpo",
        options,
        {
            "model": hashing.identity(options.model),
            "ref_model": hashing.identity(reference_name),
            "input": digest,
            "labels": options.labels,
            "beta": options.beta,
            **common.identify_options(options),
        },
        inputs=options.inputs,
        next_command=f"python scripts/evaluate.py --model {options.output} --input PROMPTS --output FIGURES",
    )
    # Under LoRA the policy without its adapters is the reference, unless another is named.
    references = [reference_name] if options.ref_model is not None or not options.lora else []
    if run.report_if_done(lambda: {**counts, **run.estimate(preferences.prompt_and_sides(pairs), references)}):
        return

    chat = loading.load_chat(options.model)
    # Left out here, because TRL would cut long pairs and train on responses without an end.
    longest = run.longest_row(reference_name)
    rows, counts["overlong"] = common.drop_overlong(tokenize(pairs, chat), row_length, options, longest)
    policy, reference = run.load_policy(dropout=False), None
    for name in references:
        reference = run.load_policy(name, dropout=False)
        check_vocabulary(reference, policy, name)
    with run.folder:
        trainer = make_trainer(
            policy, reference, chat.tokenizer, rows, run.arguments(beta=options.beta), options.output, run.adapters()
        )
        counts |= run.train(trainer)
        common.save_trained(trainer, chat.tokenizer, options.output)
        run.finish({**counts, **last_figures(trainer.state.log_history)})


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
    """Token ids of the pairs: rows of {prompt_ids, chosen_ids, rejected_ids, p_chosen}.

    Args:
        pairs: of `preferences.read_pairs`.
    """
    rows = []
    for pair, (messages, texts) in zip(pairs, preferences.prompt_and_sides(pairs), strict=True):
        (prompt, chosen), (_, rejected) = (encode(chat, messages, text) for text in texts)
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "p_chosen": pair["p_chosen"]}
        )
    return rows


def row_length(row: dict) -> int:
    """Tokens of a pair's prompt and longer response."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def make_trainer(policy, reference, tokenizer, rows: list[dict], arguments: dict, output: str, adapters=None):
    """TRL's DPOTrainer with the soft-label loss, over rows of `tokenize` in their order.

    Args:
        reference: a frozen model, or None for the policy with its adapters off.
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
            of_policy, of_reference = sums
            chosen, rejected = (of_policy - of_reference).chunk(2)
            # −p·log σ(βd) − (1−p)·log σ(−βd)  =  −log σ(βd) + (1−p)·βd, and TRL's loss is the first term.
            loss = hard + ((1 - p) * self.beta * (chosen - rejected)).mean()
            if not torch.isfinite(loss):
                raise common.describe_not_finite(self, "the loss is")
            return loss

    return SoftDPOTrainer(
        model=policy,
        ref_model=reference,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapters,
        data_collator=common.soft_label_collator(DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)),
        # Every column is used: by default, Trainer drops those that the model does not know by name.
        args=DPOConfig(**arguments, max_length=None, remove_unused_columns=False),
        callbacks=[common.MetricsLog(output, "dpo")],
    )


def last_figures(history: list[dict]) -> dict:
    """Accuracy and margin of the policy's own implied rewards, as they were last logged."""
    last = next((row for row in reversed(history) if "rewards/margins" in row), {})
    names = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "chosen_reward": "rewards/chosen"}
    return {name: round(last[key], 4) for name, key in names.items() if key in last}


if __name__ == "__main__":
    main()
