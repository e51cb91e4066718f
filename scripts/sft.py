"""Fine-tune a model on revised responses, mixed with helpful ones: the supervised stage (paper, section 3).

    python scripts/sft.py --input revised.jsonl --helpful helpful.jsonl --model tiny --output runs/sft

The loss is taken on the response and the token that ends it, never on the prompt. Leaves out packing
(two conversations in one sequence) and the choice of what is a good revision: that is revise.py's gate.
"""

from collections import Counter

import click

from cai.base import cli, hashing
from cai.base.errors import InputError, shorten
from cai.data import outputs, sources
from cai.data.dialogue import as_messages
from cai.data.rounds import check_rounds
from cai.models import estimate, loading
from cai.models.chat import encode
from cai.report import hub
from cai.steps.flags import REASONS
from cai.train import common


def check_revised(row: dict, where, line: int) -> None:
    """InputError unless the row is one of revise.py: rounds that are complete, and flags that are words."""
    check_rounds(row, where, line, critiqued=False)
    if not row["rounds"]:
        raise InputError(
            "no round of revision",
            where=where,
            line=line,
            expected="rows of revise.py",
            remedy="Run critique.py and revise.py on them first",
        )
    for one in row["rounds"]:
        flags = one.get("flags", [])
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise InputError(f"the flags {shorten(flags)!r}", where=where, line=line, expected="a list of words")


def chosen_revisions(row: dict, rounds: str, keep: frozenset[str]) -> tuple[list[str], list[str]]:
    """The revisions of a row to train on, and the flags for which others were left out.

    Args:
        row: a row of revise.py.
        rounds: "last" takes the last revision that may be kept (an earlier one where the last is flagged),
            "all" every one.
        keep: flags that don't matter; "all" for any flag.
    """
    kept, flags = [], []
    for one in row["rounds"]:
        raised = set(one.get("flags", ()))
        if raised <= keep or "all" in keep:
            kept.append(one["revision"])
        else:
            flags.extend(sorted(raised - keep))
    return (kept[-1:] if rounds == "last" else kept), flags


def conversation(prompt: str | list[dict], response: str) -> dict:
    """One row as TRL names it: the prompt's messages and the assistant's answer to them."""
    return {"prompt": as_messages(prompt), "completion": [{"role": "assistant", "content": response}]}


def read_rows(inputs, helpful, rounds: str, keep: frozenset[str], limit: int | None):
    """(conversations, counts, {digests of the inputs}); InputError for a row that is not as it must be."""
    revised = sources.Source(inputs, require=("prompt", "rounds"), limit=limit, check=check_revised)
    rows, flags, without = [], Counter(), 0
    for row in revised:
        texts, raised = chosen_revisions(row, rounds, keep)
        flags.update(raised)
        without += not texts
        rows.extend(conversation(row["prompt"], text) for text in texts)
    counts = {"revised_rows": revised.count, "revisions": len(rows), "rows_left_out": without, "flagged": dict(flags)}
    digests = {"input": revised.digest}
    if helpful:
        answers = sources.Source(helpful, require=("prompt", "response"), limit=limit)
        rows.extend(conversation(row["prompt"], row["response"]) for row in answers)
        counts["helpful"] = answers.count
        digests["helpful"] = answers.digest
    if not rows:
        raise InputError(
            f"no revision left to train on (flags: {dict(flags)})",
            where=", ".join(inputs),
            remedy="Look at the revisions, or keep some flagged ones with --keep REASON",
        )
    return rows, counts, digests


def tokenized(rows: list[dict], chat, max_length: int) -> tuple[list[dict], int]:
    """(rows of {input_ids, labels}, how many were longer than `max_length` tokens and are left out).

    labels are -100, no loss, on the prompt's tokens.
    """
    kept, overlong = [], 0
    for row in rows:
        prompt, answer = encode(chat, row["prompt"], row["completion"][0]["content"])
        if len(prompt) + len(answer) > max_length:
            overlong += 1
            continue
        kept.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    if not kept:
        raise InputError(f"all {overlong} rows are longer", where="--max-length", remedy="Raise --max-length")
    return kept, overlong


@click.command(cls=cli.Command)
@cli.options("input")
@click.option(
    "--helpful",
    multiple=True,
    metavar="FILE",
    help="Rows with a helpful `response` to mix in, so that helpfulness is kept. Repeatable.",
)
@cli.options("output", "model")
@click.option(
    "--rounds",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Train on the last revision of a row that is not flagged, or on all of them.",
)
@click.option(
    "--keep",
    multiple=True,
    type=click.Choice([*REASONS, "all"]),
    help="Train on revisions with this flag too. Repeatable.",
)
@common.training_options(epochs=2, learning_rate=1e-5, batch_size=8, max_length=1024)
@hub.option
@cli.options("seed", "limit", "json", "dry_run", "overwrite")
def main(
    inputs,
    helpful,
    output,
    model,
    rounds,
    keep,
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
    """Fine-tune a model on revised responses, with helpful ones mixed in.

    \b
    Example:
      python scripts/sft.py --input revised.jsonl --helpful helpful.jsonl \\
          --model tiny --output runs/sft --learning-rate 1e-3
    """
    loading.check_model(model)
    rows, counts, digests = read_rows(inputs, helpful, rounds, frozenset(keep), limit)
    settings = {
        "model": hashing.identity(model),
        **digests,
        "rounds": rounds,
        "keep": sorted(keep),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "max_length": max_length,
        "lora_rank": lora_rank if lora else None,
        "dtype": dtype,
        "seed": seed,
    }
    folder = outputs.claim_folder(
        output, command="sft", fingerprint=settings, overwrite=overwrite, inputs=[*inputs, *helpful]
    )
    following = f"python scripts/generate.py --model {output} --input PROMPTS --output RESPONSES --samples 2"
    if dry_run:
        lengths = estimate.lengths_of(model, [(row["prompt"], [row["completion"][0]["content"]]) for row in rows])
        plan = estimate.training_plan(
            model,
            lengths,
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            lora_rank=lora_rank if lora else None,
            gpu=gpu,
            device=device,
        )
        cli.finish({"output": output, **counts, **plan, **hub.planned()}, as_json=as_json, next_command=following)
        return
    if folder.complete:
        cli.finish({"output": output, **folder.counts, **hub.push(output)}, as_json=as_json, next_command=following)
        return

    loading.choose_device(device)
    chat = loading.load_chat(model)
    rows, counts["overlong"] = tokenized(rows, chat, max_length)
    policy = loading.load_policy(model, device, dtype, lora=lora)
    order = common.training_order([len(row["input_ids"]) for row in rows], batch_size, epochs, seed)
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
        )
        trainer = make_trainer(
            policy,
            chat.tokenizer,
            [rows[i] for i in order],
            arguments,
            output,
            common.lora_config(lora_rank) if lora else None,
        )
        figures = common.run_trainer(trainer, output)
        common.save_trained(trainer, chat.tokenizer, output)
        counts |= {"steps": trainer.state.global_step, "loss": round(figures.training_loss, 4)}
        manifest = folder.finish(counts)
    if loading.is_main_process():
        cli.finish(
            {"output": output, **counts, "seconds": manifest["seconds"], **hub.push(output)},
            as_json=as_json,
            next_command=following,
        )


def make_trainer(policy, tokenizer, rows: list[dict], arguments: dict, output: str, adapters=None):
    """TRL's SFTTrainer over rows of {input_ids, labels}, in the order given.

    One change: where the batch's logits are small, as a small model's are, the model's own loss is taken. It
    is the same number; TRL's way never holds all logits, for which it takes 1.7 times as long on a CPU.
    """
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class CompletionTrainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids = inputs["input_ids"]
            logits = ids.numel() * self.model.config.get_text_config().vocab_size
            if ids.device.type == "cpu" and logits <= 2**26:
                plain = {**inputs, "use_cache": False}
                return Trainer.compute_loss(self, model, plain, return_outputs, num_items_in_batch)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    return CompletionTrainer(
        model=policy,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapters,
        # Rows are tokenized, short enough and in order: nothing is left for TRL to prepare.
        args=SFTConfig(**arguments, max_length=None, completion_only_loss=True),
        callbacks=[common.MetricsLog(output, "sft")],
    )


if __name__ == "__main__":
    main()
