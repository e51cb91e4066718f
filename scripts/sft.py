"""Fine-tune a model on revised responses, mixed with helpful ones: the supervised stage (paper, section 3).

    python scripts/sft.py --input revised.jsonl --helpful helpful.jsonl --model tiny --output runs/sft

Without --input it trains on the responses of --helpful alone, such as those of generate.py --in-context. The loss is
taken on the response and the token that ends it, never on the prompt. Leaves out packing (two conversations in one
sequence), and judging the quality of revisions: that is revise.py's gate.
"""

from collections import Counter

import click

from cai.base import cli, hashing
from cai.base.errors import InputError
from cai.data import dialogue, prefills, sources
from cai.data.dialogue import is_blank
from cai.data.reading import AS_THEY_ARE, Reading
from cai.data.selection import check_revised, choose_revisions
from cai.models import estimate, loading
from cai.models.chat import encode
from cai.stats import intervals, refusals
from cai.steps.flags import selection_options
from cai.train import common, microbatches
from cai.train.arguments import training_options


class CutText(str):
    """A response that was cut at its limit of tokens: no end token is trained after it, for it does not end there."""


MOST_COMPLYING = 0.2  # of the harmful rows that are trained on; above it a warning is printed


@click.command(cls=cli.Command)
@cli.rows_option(
    "--input",
    "inputs",
    help="Revised rows (JSONL and the like), a pattern such as 'part-*.jsonl', a folder of save_to_disk, or a dataset "
    "id. Repeatable. Without it the responses of --helpful alone are trained on.",
)
@cli.rows_option(
    "--helpful",
    help="Rows with a helpful `response` to mix in, so that helpfulness is kept; the options that name columns are for "
    "these. Repeatable.",
)
@cli.options("output", "model")
@selection_options("Train on")
@training_options(epochs=2, learning_rate=1e-5)
def main(options):
    """Fine-tune a model on revised responses, with helpful ones mixed in.

    \b
    Example:
      python scripts/sft.py --input revised.jsonl --helpful helpful.jsonl \\
          --model tiny --output runs/sft --learning-rate 1e-3
    """
    if not options.inputs:
        if not options.helpful:
            raise click.UsageError("--input is missing: the rows of revise.py. Or give --helpful alone.")
        cli.refuse_options(["rounds", "keep"], "without --input there are no revisions")
    if not options.helpful:
        columns = ["prompt_field", "response_field", "kind_field", "kind", "form"]
        cli.refuse_options(columns, "without --helpful all rows are those of revise.py")
    loading.check_model(options.model, training=True)
    rows, counts, digests = read_rows(
        options.inputs, options.helpful, options.rounds, frozenset(options.keep), options.limit, options.reading
    )
    run = common.TrainingRun(
        "sft",
        options,
        {
            "model": hashing.identity(options.model),
            **digests,
            "rounds": options.rounds,
            "keep": sorted(options.keep),
            **common.identify_options(options),
        },
        inputs=[*options.inputs, *options.helpful],
        next_command=f"python scripts/generate.py --model {options.output} --input PROMPTS "
        "--output RESPONSES --samples 2",
    )
    if run.report_if_done(lambda: {**counts, **run.estimate([(prompt, [response]) for prompt, response in rows])}):
        return

    chat = loading.load_chat(options.model)
    token_rows, counts["overlong"] = common.drop_overlong(
        tokenize(rows, chat), lambda row: len(row["input_ids"]), options, run.longest_row()
    )
    policy = run.load_policy()
    with run.folder:
        trainer = make_trainer(
            policy, chat.tokenizer, token_rows, run.arguments(), options.output, run.adapters(policy)
        )
        counts |= run.train(trainer)
        common.save_trained(trainer, chat.tokenizer, options.output)
        run.finish(counts)


def read_rows(inputs, helpful, rounds: str, keep: frozenset[str], limit: int | None, reading=AS_THEY_ARE):
    """The conversations to train on: revisions, and helpful responses.

    Args:
        inputs, helpful: files; one of the two may be empty.
        rounds, keep: see `selection.choose_revisions`.
        reading: how the helpful rows are read; its `skip_invalid` is for both.
    Returns:
        ([(prompt messages, response)], counts, {input, helpful: digest}). Where the answer is prefilled, the messages
        end with the prefill, and the response is what follows it.
    Raises:
        InputError: a row that is not one of revise.py, or no text to train on.
    """
    rows, counts, digests = [], {}, {}
    if inputs:
        ours = Reading(skip_invalid=reading.skip_invalid)
        revised = sources.Source(inputs, require=("prompt", "rounds"), limit=limit, check=check_revised, reading=ours)
        rows, counts = read_revisions(revised, rounds, keep)
        digests["input"] = revised.digest
    if helpful:
        answers = sources.Source(helpful, require=("prompt", "response"), limit=limit, reading=reading)
        # What follows an end token in an answer is no part of it (`cut_at_end_token`).
        texts = [(row, dialogue.cut_at_end_token(row["response"])) for row in answers]
        examples = [
            (prefills.conversation_of(row), as_finished(row, prefills.continuation_of(row, text), text))
            for row, text in texts
        ]
        written = [(conversation, text) for conversation, text in examples if not is_blank(text)]
        rows.extend(written)
        if cut := sum(text != row["response"] for row, text in texts):
            counts["helpful_cut"] = cut
            cli.warn(f"{cut} helpful responses hold control tokens and end at the first that ends a turn")
        counts["helpful"], digests["helpful"] = len(written), answers.digest
        if len(written) < answers.count:
            counts["helpful_empty"] = answers.count - len(written)
            cli.warn(f"{counts['helpful_empty']} helpful rows have an empty response and are left out")
    if not rows:
        raise InputError(
            f"no revision to train on (flags: {counts['flagged']})" if inputs else "every response is empty",
            where=", ".join(inputs or helpful),
            remedy="Look at the revisions, or keep some flagged ones with --keep REASON"
            if inputs
            else "Give responses with text",
        )
    return rows, counts, digests


def read_revisions(revised: sources.Source, rounds: str, keep: frozenset[str]):
    """([(prompt messages, revision)], counts); of rows with the kind harmful, how many of the texts still comply."""
    rows, left_out, kept, is_complying = [], Counter(), Counter(), []
    skipped = fallbacks = 0
    for row in revised:
        selection = choose_revisions(row, rounds, keep)
        left_out.update(selection.left_out)
        kept.update(selection.kept)
        skipped += not selection.texts
        fallbacks += selection.falls_back
        for text in selection.texts.values():
            rows.append((prefills.conversation_of(row), as_finished(row, prefills.continuation_of(row, text), text)))
        if row.get("kind") == "harmful" and selection.texts:
            *_, text = selection.texts.values()
            is_complying.append(refusals.read(dialogue.prompt_text(row["prompt"]), text) == "complied")
    counts = {"revised_rows": revised.count, "revisions": len(rows), "rows_left_out": skipped}
    counts |= {"flagged": dict(left_out), "kept_flags": dict(kept), "fallbacks": fallbacks}
    if is_complying:
        counts["still_complying"] = intervals.rate(sum(is_complying), len(is_complying))
        if counts["still_complying"]["value"] > MOST_COMPLYING:
            cli.warn(
                f"{sum(is_complying)} of {len(is_complying)} harmful rows have a text that does not decline, and SFT "
                "will teach it. Told by phrases alone, which know refusals only: read some of them before training"
            )
    return rows, counts


def as_finished(row: dict, answer: str, text: str) -> str:
    """The answer, marked as a `CutText` if the whole text is the row's response, and that was cut at its limit.

    An empty one never is: without an end token nothing would be left to train on.
    """
    is_cut = row.get("finish") == "length" and text == row.get("response") and not is_blank(answer)
    return CutText(answer) if is_cut else answer


def tokenize(rows: list[tuple[list[dict], str]], chat) -> list[dict]:
    """Token ids of the conversations, with a loss on the response alone.

    Args:
        rows: (prompt messages, response).
    Returns:
        rows of {input_ids, labels}; labels are -100, no loss, on the prompt's tokens. A `CutText` has no end token.
    """
    encoded = [encode(chat, messages, response, is_cut=isinstance(response, CutText)) for messages, response in rows]
    return [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in encoded]


def make_trainer(policy, tokenizer, rows: list[dict], arguments: dict, output: str, adapters=None):
    """TRL's SFTTrainer over rows of `tokenize`, in their order.

    One change: where the logits that a batch needs are few, as a small model's are, the model's own loss is computed,
    from the logits of trained tokens alone. It is the same number. TRL's way never holds all of these, for which it
    takes twice as long on a CPU; and the model's own way makes those of prompts and padding too.
    """
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class CompletionTrainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"][:, 1:]
            is_trained = labels != -100
            logits = is_trained.sum() * self.model.config.get_text_config().vocab_size
            if labels.device.type != "cpu" or logits > estimate.HELD_LOGITS:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            inputs = {**inputs, "shift_labels": labels[is_trained], "use_cache": False}
            hook = self.model.get_output_embeddings().register_forward_pre_hook(
                lambda _head, states: states[0][:, :-1][is_trained].unsqueeze(0)
            )
            with hook:
                return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    longest = max(len(row["input_ids"]) for row in rows)
    tokens, arguments = microbatches.choose_bound(policy, arguments, longest=longest, adapters=adapters)
    return microbatches.bound_batches(CompletionTrainer, tokens)(
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
