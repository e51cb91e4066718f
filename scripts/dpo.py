"""Train a policy on preferences directly, without a reward model: DPO (arXiv 2305.18290) on TRL's trainer, IPO, SimPO.

    python scripts/dpo.py --input preferences.jsonl --model runs/sft --output runs/dpo

Each pair is trained to the judge's own probability, p_chosen: −p·log σ(βd) − (1−p)·log σ(−βd), where d is by
how much more the policy has come to prefer the chosen response than the reference does. TRL's loss is the case
p = 1. --loss takes that of IPO or SimPO instead (`pair_losses` in cai/train/dpo.py). With --holdout, `holdout.json`
tells what the policy prefers on held-out pairs, and `holdout.jsonl` has them, for evaluate.py --pairs. Leaves out
TRL's other losses, and pairs that the judge could not decide.
"""

import click

from cai.base import cli, hashing
from cai.data import preferences
from cai.models import loading
from cai.train import common, dpo
from cai.train.arguments import ABOVE_0, pairs_options, training_options


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option(
    "--ref-model",
    metavar="MODEL",
    default=None,
    help="The model that the policy is kept near to. Default: --model before training.",
)
@pairs_options
@click.option(
    "--loss",
    type=click.Choice(list(dpo.BETAS)),
    default="sigmoid",
    show_default=True,
    help="sigmoid: DPO's; ipo: a squared one with a goal, per token; simpo: without a reference, per token.",
)
@click.option(
    "--beta",
    type=ABOVE_0,
    default=None,
    help="How strongly the policy is kept near the reference; of simpo the scale of its margin.  "
    "[default: 0.1; with simpo 2]",
)
@click.option("--target-margin", type=ABOVE_0, default=None, help="With --loss simpo: its γ.  [default: 1]")
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the prompts whose pairs are not trained on, but measured and written to OUTPUT/holdout.jsonl.",
)
@training_options(epochs=1, learning_rate=1e-6)
def main(options):
    """Train a policy on preferences directly, with soft labels and no reward model.

    With several files, --limit reads the first rows of each.

    \b
    Example:
      python scripts/dpo.py --input preferences.jsonl --model runs/sft \\
          --output runs/dpo --learning-rate 1e-5
    """
    loss, losses = dpo.choose_loss(options.loss, options.beta, options.target_margin)
    reference_name = options.ref_model or options.model
    loading.check_model(options.model, training=True)
    loading.check_model(reference_name)
    weights = preferences.read_weights(options.inputs, options.mix)
    pairs, counts, digests = preferences.read_sources(weights, options)
    parts = preferences.split_holdout(pairs, options.holdout, options.seed)
    run = common.TrainingRun(
        "dpo",
        options,
        {
            "model": hashing.identity(options.model),
            "ref_model": hashing.identity(reference_name),
            "input": digests[0][0] if len(digests) == 1 else digests,
            "labels": options.labels,
            **loss,
            **{name: value for name in ("holdout", "default_label", "min_margin") if (value := getattr(options, name))},
            **common.identify_options(options),
        },
        inputs=list(weights),
        next_command=dpo.next_command(options.output, reference_name, parts["held_out"]),
        show=dpo.show_holdout,
    )
    counts |= {name: len(part) for name, part in parts.items()} if options.holdout else {}
    # Under LoRA the policy without its adapters is the reference, unless another is named.
    references = [reference_name] if options.ref_model is not None or not options.lora else []
    if run.report_if_done(lambda: {**counts, **run.estimate(common.sides_in_a_pass(parts["train"]), references)}):
        return

    chat = loading.load_chat(options.model)
    # Left out here, because TRL would cut long pairs and train on responses without an end.
    longest = run.longest_row(reference_name)
    rows = dpo.tokenize(parts["train"], chat)
    rows, counts["overlong"] = common.drop_overlong(rows, dpo.row_length, options, longest)
    tests, counts = dpo.tokenize_holdout(parts, counts, chat, longest)
    policy, reference = run.load_policy(dropout=False), None
    for name in references:
        reference = run.load_policy(name, dropout=False)
        dpo.check_vocabulary(reference, policy, name)
    with run.folder:
        arguments, adapters = run.arguments(beta=loss["beta"]), run.adapters(policy)
        trainer = dpo.make_trainer(policy, reference, chat.tokenizer, rows, arguments, options.output, adapters, losses)
        counts |= run.train(trainer)
        logps = dpo.score_pairs(trainer, [row for _, row in tests])
        common.save_trained(trainer, chat.tokenizer, options.output)
        if parts["held_out"]:
            scored = [dpo.as_logprobs(*test, of_pair) for test, of_pair in zip(tests, logps, strict=True)]
            counts["holdout"] = dpo.write_holdout(parts["held_out"], scored, options.output)
        run.finish({**counts, **dpo.last_figures(trainer.state.log_history)})


if __name__ == "__main__":
    main()
