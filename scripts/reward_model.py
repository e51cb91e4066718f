"""Train a reward model on preferences, with the judge's probabilities as soft labels (paper, section 4.1).

    python scripts/reward_model.py --input preferences.jsonl --mix helpful.jsonl=0.5 --default-label 1 \
        --model runs/sft --output runs/reward

A causal language model's folder gives the body, under a new head with one score; a reward model's folder is
trained further. Beside the weights are `holdout.json` and `reliability.png`, the model's quality on held-out pairs;
evaluate.py measures it on other pairs. Leaves out ensembles, and a separate loss for every source.
"""

import click

from cai.base import cli, hashing
from cai.data import preferences
from cai.models import loading
from cai.models.chat import ENDINGS
from cai.train import arguments, common, reward_model

# Options that decide the weights, beside those that all training commands have.
IDENTIFYING = ("labels", "default_label", "min_margin", "holdout", "eval_steps", "patience", "center")


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@arguments.pairs_options
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the prompts whose pairs are not trained on, but measured.",
)
@click.option(
    "--eval-steps",
    type=click.IntRange(min=1),
    default=None,
    help="Optimizer steps between two evaluations of the held-out loss. Default: a tenth of all with --patience.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Stop after this many evaluations without a better held-out loss, and keep the best weights; 0: never.",
)
@click.option(
    "--center",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Weight of a penalty that keeps the scores near 0; 0.01 is usual.",
)
@click.option(
    "--ending",
    type=click.Choice(ENDINGS),
    default="eos",
    show_default=True,
    help="Where the responses end that are scored. eos: at the end token, as a policy writes it; export.py then "
    "writes a folder that all engines score alike. template: where the chat template ends a turn, which in ChatML and "
    "Gemma is a line break later; engines that append token ids do not.",
)
@arguments.training_options(epochs=1, learning_rate=1e-5)
def main(options):
    """Train a reward model on preferences with soft labels.

    With several files, --limit reads the first rows of each. Every row read is accounted for: train + held_out +
    undecided + identical + below_margin + overlong.

    \b
    Example:
      python scripts/reward_model.py --input preferences.jsonl --model tiny \\
          --output runs/reward --learning-rate 1e-3
    """
    from transformers import set_seed

    loading.check_can_score(options.model)
    weights = preferences.read_weights(options.inputs, options.mix)
    pairs, counts, digests = preferences.read_sources(weights, options)
    parts = preferences.split_holdout(pairs, options.holdout, options.seed)
    run = common.TrainingRun(
        "reward_model",
        options,
        {
            "model": hashing.identity(options.model),
            "input": digests,
            **{name: getattr(options, name) for name in IDENTIFYING},
            **({"ending": options.ending} if options.ending != "eos" else {}),
            **common.identify_options(options),
        },
        inputs=list(weights),
        next_command=f"python scripts/ppo.py --model {options.model} --reward-model {options.output} --input PROMPTS "
        "--output NEW",
        show=reward_model.show_holdout,
    )
    counts |= {name: len(part) for name, part in parts.items()}
    if run.report_if_done(lambda: {**counts, **run.estimate(common.sides_in_a_pass(parts["train"]))}):
        return

    chat = loading.load_chat(options.model).set_ending(options.ending)
    rows, test_rows, counts = reward_model.tokenize_parts(parts, counts, chat, run.longest_row(), options.max_length)
    order = reward_model.training_order(rows, options.batch_size, options.epochs, options.seed)
    eval_steps = reward_model.choose_eval_steps(options, len(order), test_rows)
    set_seed(options.seed)  # of the new head
    model = run.load_reward_model()
    with run.folder:
        trainer = reward_model.make_trainer(
            model,
            chat.tokenizer,
            [rows[i] for i in order],
            run.arguments(center_rewards_coefficient=options.center or None),
            options.output,
            run.adapters(model, "SEQ_CLS"),
            test_rows=test_rows,
            eval_steps=eval_steps,
            patience=options.patience,
        )
        counts |= run.train(trainer)
        measures = reward_model.measure_holdout(trainer, test_rows, options.ending)
        common.save_trained(trainer, chat.tokenizer, options.output)
        if measures:
            counts["holdout"] = reward_model.write_holdout(measures, options.output)
        run.finish(counts)


if __name__ == "__main__":
    main()
