"""Train a policy on preferences directly, without a reward model: DPO (arXiv 2305.18290), on TRL's DPOTrainer.

    python scripts/dpo.py --input preferences.jsonl --model runs/sft --output runs/dpo

Each pair is trained to the judge's own probability, p_chosen: −p·log σ(βd) − (1−p)·log σ(−βd), where d is by
how much more the policy has come to prefer the chosen response than the reference does. TRL's loss is the one
for p = 1. Leaves out TRL's other losses, a held-out share (evaluate.py measures the policy), and pairs that
the judge could not decide.
"""

import click

from cai.base import cli, hashing
from cai.base.errors import CaiError, InputError
from cai.data import outputs, preferences
from cai.data.dialogue import as_messages
from cai.models import estimate, loading
from cai.models.chat import encode
from cai.report import hub
from cai.train import common


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option(
    "--ref-model", metavar="MODEL", default=None, help="What the policy is held near to. Default: --model as it is now."
)
@click.option(
    "--labels",
    type=click.Choice(["soft", "hard"]),
    default="soft",
    show_default=True,
    help="Train to the judge's probability p_chosen, or to the chosen one being right for certain.",
)
@click.option(
    "--beta",
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    show_default=True,
    help="How firmly the policy is held near the reference.",
)
@common.training_options(epochs=1, learning_rate=1e-6, batch_size=8, max_length=1024)
@hub.option
@cli.options("seed", "limit", "json", "dry_run", "overwrite")
def main(
    inputs,
    output,
    model,
    ref_model,
    labels,
    beta,
    epochs,
    learning_rate,
    batch_size,
    gradient_accumulation,
    max_length,
    lora,
    lora_rank,
    save_steps,
    device,
    dtype,
    gpu,
    seed,
    limit,
    as_json,
    dry_run,
    overwrite,
):
    """Train a policy on preferences directly, with soft labels and no reward model.

    \b
    Example:
      python scripts/dpo.py --input preferences.jsonl --model runs/sft \\
          --output runs/dpo --learning-rate 1e-5
    """
    for name in filter(None, (model, ref_model)):
        loading.check_model(name)
    pairs, counts, digest = preferences.read_pairs(inputs, labels, limit)
    settings = {
        "model": hashing.identity(model),
        "ref_model": hashing.identity(ref_model or model),
        "input": digest,
        "labels": labels,
        "beta": beta,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "max_length": max_length,
        "lora_rank": lora_rank if lora else None,
        "dtype": dtype,
        "seed": seed,
    }
    folder = outputs.claim_folder(output, command="dpo", fingerprint=settings, overwrite=overwrite, inputs=inputs)
    following = f"python scripts/evaluate.py --model {output} --input PROMPTS --output FIGURES"
    if dry_run:
        # Under LoRA the policy without its adapters is the reference, unless another is named.
        frozen = [ref_model or model] if ref_model is not None or not lora else []
        found = estimate.training_plan(
            model,
            estimate.lengths_of(model, preferences.prompt_and_sides(pairs)),
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            lora_rank=lora_rank if lora else None,
            frozen=frozen,
            gpu=gpu,
            device=device,
        )
        cli.finish({"output": output, **counts, **found, **hub.planned()}, as_json=as_json, next_command=following)
        return
    if folder.complete:
        cli.finish({"output": output, **folder.counts, **hub.push(output)}, as_json=as_json, next_command=following)
        return

    loading.choose_device(device)
    chat = loading.load_chat(model)
    rows, counts["overlong"] = tokenized(pairs, chat, max_length)
    policy = loading.load_policy(model, device, dtype, lora=lora, dropout=False)
    reference = None
    if ref_model is not None or not lora:  # else: the policy with its adapters off
        # What is frozen needs no float32 where the device has bfloat16, which is what `lora` says of a base.
        reference = loading.load_policy(ref_model or model, device, dtype, lora=True, dropout=False)
        check_vocabulary(reference, policy, ref_model or model)
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    order = common.training_order(lengths, batch_size, epochs, seed)
    with folder:
        arguments = common.trainer_arguments(
            output,
            learning_rate=learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            save_steps=save_steps,
            seed=seed,
            device=device,
            dtype=dtype,
            lora=lora,
            beta=beta,
        )
        trainer = make_trainer(
            policy,
            reference,
            chat.tokenizer,
            [rows[i] for i in order],
            arguments,
            output,
            common.lora_config(lora_rank) if lora else None,
        )
        figures = common.run_trainer(trainer, output)
        common.save_trained(trainer, chat.tokenizer, output)
        counts |= {
            "steps": trainer.state.global_step,
            "loss": round(figures.training_loss, 4),
            **last_figures(trainer.state.log_history),
        }
        manifest = folder.finish(counts)
    if loading.is_main_process():
        cli.finish(
            {"output": output, **counts, "seconds": manifest["seconds"], **hub.push(output)},
            as_json=as_json,
            next_command=following,
        )


def check_vocabulary(reference, policy, name: str) -> None:
    """InputError unless both models have as many tokens; that they are the same ones is the caller's to know."""
    sizes = [one.config.get_text_config().vocab_size for one in (reference, policy)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"a vocabulary of {sizes[0]} tokens",
            where=name,
            expected=f"the policy's, of {sizes[1]}",
            remedy="Take a reference that the policy was trained from",
        )


def tokenized(pairs: list[dict], chat, max_length: int) -> tuple[list[dict], int]:
    """(rows of {prompt_ids, chosen_ids, rejected_ids, p_chosen}, how many are too long and are left out).

    TRL would cut them, and train on answers without an end.
    """
    kept, overlong = [], 0
    for pair in pairs:
        prompt = as_messages(pair["prompt"])
        before, chosen = encode(chat, prompt, pair["chosen"])
        _, rejected = encode(chat, prompt, pair["rejected"])
        if len(before) + max(len(chosen), len(rejected)) > max_length:
            overlong += 1
            continue
        kept.append(
            {"prompt_ids": before, "chosen_ids": chosen, "rejected_ids": rejected, "p_chosen": pair["p_chosen"]}
        )
    if not kept:
        raise InputError(f"all {overlong} pairs are longer", where="--max-length", remedy="Raise --max-length")
    return kept, overlong


def make_trainer(policy, reference, tokenizer, rows: list[dict], arguments: dict, output: str, adapters=None):
    """TRL's DPOTrainer with the soft-label loss, over rows of `tokenized` in the order given.

    reference: a frozen model, or None for the policy with its adapters off.
    """
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class SoftCollator(DataCollatorForPreference):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            batch["p_chosen"] = torch.tensor([example["p_chosen"] for example in examples])
            return batch

    class SoftDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # tokenized, short enough and in order; TRL 1.16 would begin anew from text

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            # Taken by name, so that a label lost on the way is an error and not the hard loss.
            p = inputs.pop("p_chosen")
            seen = []  # log-probabilities of the chosen, then of the rejected: the policy's, then the reference's
            watched = {id(one): one for one in (self.model, self.ref_model) if one is not None}.values()
            hooks = [
                one.register_forward_hook(lambda _module, _args, made: seen.append(made.log_probs.sum(1)))
                for one in watched
            ]
            try:
                hard = super().compute_loss(model, inputs, False, num_items_in_batch)
            finally:
                for hook in hooks:
                    hook.remove()
            of_policy, of_reference = seen
            chosen, rejected = (of_policy - of_reference).chunk(2)
            # −p·log σ(βd) − (1−p)·log σ(−βd)  =  −log σ(βd) + (1−p)·βd, and TRL's loss is the first term.
            loss = hard + ((1 - p) * self.beta * (chosen - rejected)).mean()
            if not torch.isfinite(loss):
                raise CaiError(
                    f"the loss is not finite at step {self.state.global_step} of {self.state.max_steps}. States saved "
                    "before it are kept. Start anew with a lower --learning-rate, or --dtype float32"
                )
            return loss

    return SoftDPOTrainer(
        model=policy,
        ref_model=reference,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapters,
        data_collator=SoftCollator(pad_token_id=tokenizer.pad_token_id),
        # Every column is used: left to itself, Trainer drops those that the model does not know by name.
        args=DPOConfig(**arguments, max_length=None, remove_unused_columns=False),
        callbacks=[common.MetricsLog(output, "dpo")],
    )


def last_figures(history: list[dict]) -> dict:
    """How the preferences stood when they were last logged, in the policy's own implied rewards."""
    last = next((row for row in reversed(history) if "rewards/margins" in row), {})
    names = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "chosen_reward": "rewards/chosen"}
    return {name: round(last[key], 4) for name, key in names.items() if key in last}


if __name__ == "__main__":
    main()
