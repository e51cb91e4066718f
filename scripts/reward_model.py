"""Train a reward model on preferences, with the judge's probabilities as soft labels (paper, section 4.1).

    python scripts/reward_model.py --input preferences.jsonl --mix helpful.jsonl=0.5 --default-label 1 \
        --model runs/sft --output runs/reward

A causal language model's folder gives the body, under a new head of one score; a reward model's folder is
trained on. Beside the weights lie `holdout.json` and `reliability.png`, what the model is worth on held-out pairs;
evaluate.py measures it on other pairs. Leaves out ensembles, and a loss of its own for every source.
"""

import json
import math
import os
from pathlib import Path

import click

from cai.base import cli, hashing
from cai.base.errors import InputError
from cai.data import outputs, preferences
from cai.models import estimate, loading
from cai.models.scorer import TEMPERATURE
from cai.report import hub
from cai.stats import drawing, tables
from cai.train import common, reward_model

# What the summary shows of `reward_model.measured`; all of it is in holdout.json.
SHOWN = (
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


def sources_of(inputs, mix) -> dict[str, float]:
    """{file: weight} of --input (1) and --mix FILE=WEIGHT; InputError for what is no such pair."""
    weights: dict[str, float] = {}
    for given in [*(f"{file}=1" for file in inputs), *mix]:
        file, _, weight = given.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not file or not 0 < value < math.inf:
            raise InputError(
                f"--mix {given}",
                expected="FILE=WEIGHT, with a weight above 0",
                remedy="For example --mix helpful.jsonl=0.5",
            )
        if os.path.realpath(file) in map(os.path.realpath, weights):
            raise InputError("the same input twice", where=file, remedy="Name it once")
        weights[file] = value
    return weights


def read_sources(weights: dict[str, float], labels: str, limit: int | None, **chosen) -> tuple[list[dict], dict, dict]:
    """(pairs with their source and weight, counts over all sources, {file: digest and weight})."""
    pairs, counts, digests = [], {}, {}
    for file, weight in weights.items():
        found, counted, digest = preferences.read_pairs([file], labels, limit, **chosen)
        pairs += [{**pair, "source": file, "weight": weight} for pair in found]
        counts = {name: counts.get(name, 0) + counted.get(name, 0) for name in {**counts, **counted}}
        digests[file] = [digest, weight]
    return pairs, counts, digests


def looks(eval_steps: int | None, patience: int, steps: int, test_rows: list[dict]) -> int:
    """Optimizer steps between two looks at the held-out loss, 0 for none; by default ten looks where one may stop."""
    if not eval_steps and not patience:
        return 0
    if not test_rows:
        raise InputError(
            "no pair is held out to look at",
            where="--patience" if patience else "--eval-steps",
            remedy="Raise --holdout",
        )
    return eval_steps or max(1, steps // 10)


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option(
    "--mix",
    multiple=True,
    metavar="FILE=WEIGHT",
    help="More preferences, and how often each of their pairs comes in a pass over those of --input, such "
    "as human ones of helpfulness: 0.5 takes half of them each time. Repeatable.",
)
@click.option(
    "--labels",
    type=click.Choice(["soft", "hard"]),
    default="soft",
    show_default=True,
    help="Train to the judge's probability p_chosen, or to the chosen one being right for certain.",
)
@click.option(
    "--default-label",
    type=click.FloatRange(0.5, 1),
    default=None,
    help="p_chosen of pairs that have none, such as human ones. Default: they are refused.",
)
@click.option(
    "--min-margin",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Leave out pairs whose |2 p_chosen - 1| is less: labels near a toss-up.",
)
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
    help="Optimizer steps between two looks at the held-out loss. Default: a tenth of all with --patience.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Stop after so many looks without a better held-out loss, and keep the best; 0: never.",
)
@click.option(
    "--center",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Weight of a penalty that keeps the scores near 0; 0.01 is usual.",
)
@common.training_options(epochs=1, learning_rate=1e-5, batch_size=8, max_length=1024)
@hub.option
@cli.options("seed", "limit", "json", "dry_run", "overwrite")
def main(
    inputs,
    output,
    model,
    mix,
    labels,
    default_label,
    min_margin,
    holdout,
    eval_steps,
    patience,
    center,
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
    """Train a reward model on preferences with soft labels.

    With several files, --limit reads the first rows of each. Every row read is accounted for: train + held_out +
    undecided + identical + below_margin + overlong.

    \b
    Example:
      python scripts/reward_model.py --input preferences.jsonl --model tiny \\
          --output runs/reward --learning-rate 1e-3
    """
    loading.check_model(model, classifier=True)
    weights = sources_of(inputs, mix)
    pairs, counts, digests = read_sources(weights, labels, limit, min_margin=min_margin, default_label=default_label)
    parts = {"train": [], "held_out": []}
    for pair in pairs:
        parts["held_out" if reward_model.held_out(pair["prompt"], holdout, seed) else "train"].append(pair)
    if not parts["train"]:
        raise InputError(f"all {len(pairs)} pairs are held out", where="--holdout", remedy="Lower it")
    settings = {
        "model": hashing.identity(model),
        "input": list(digests.values()),
        "labels": labels,
        "default_label": default_label,
        "min_margin": min_margin,
        "holdout": holdout,
        "eval_steps": eval_steps,
        "patience": patience,
        "center": center,
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
        output, command="reward_model", fingerprint=settings, overwrite=overwrite, inputs=list(weights)
    )
    following = f"python scripts/ppo.py --model {model} --reward-model {output} --input PROMPTS --output NEW"
    if dry_run:
        plan = estimate.training_plan(
            model,
            estimate.lengths_of(model, preferences.prompt_and_sides(parts["train"])),
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            lora_rank=lora_rank if lora else None,
            gpu=gpu,
            device=device,
        )
        counts |= {name: len(found) for name, found in parts.items()}
        cli.finish({"output": output, **counts, **plan, **hub.planned()}, as_json=as_json, next_command=following)
        return
    if folder.complete:
        finish({"output": output, **folder.counts, **hub.push(output)}, as_json, following)
        return

    from transformers import set_seed

    loading.choose_device(device)
    chat = loading.load_chat(model)
    (rows, overlong), (test_rows, more) = (reward_model.tokenized(found, chat, max_length) for found in parts.values())
    counts |= {"train": len(rows), "held_out": len(test_rows), "overlong": overlong + more}
    if not rows:
        raise InputError(f"all {overlong} pairs are longer", where="--max-length", remedy="Raise it")
    order = reward_model.training_order(rows, batch_size, epochs, seed)
    together = batch_size * gradient_accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    every = looks(eval_steps, patience, -(-len(order) // together), test_rows)
    set_seed(seed)  # of the new head
    scorer = loading.load_reward_model(model, device, dtype, lora=lora)
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
            center_rewards_coefficient=center or None,
        )
        trainer = reward_model.make_trainer(
            scorer,
            chat.tokenizer,
            rows,
            arguments,
            output,
            common.lora_config(lora_rank, "SEQ_CLS") if lora else None,
            order=order,
            test_rows=test_rows,
            eval_steps=every,
            patience=patience,
        )
        figures = common.run_trainer(trainer, output)
        counts |= {"steps": trainer.state.global_step, "loss": round(figures.training_loss, 4)}
        found = reward_model.measured(reward_model.scores_of(trainer, test_rows), test_rows) if test_rows else {}
        # Also where none was fitted: that of a reward model that is trained on would be saved again.
        setattr(trainer.accelerator.unwrap_model(trainer.model).config, TEMPERATURE, found.get("temperature", 1.0))
        common.save_trained(trainer, chat.tokenizer, output)
        if found:
            counts["holdout"] = {name: found[name] for name in SHOWN}
            if loading.is_main_process():
                (Path(output) / "holdout.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                drawing.reliability(
                    Path(output) / "reliability.png",
                    {**found, "ece": found["scaled_ece"]},
                    "Reward model against held-out labels",
                )
        manifest = folder.finish(counts)
    if loading.is_main_process():
        finish({"output": output, **counts, "seconds": manifest["seconds"], **hub.push(output)}, as_json, following)


def finish(summary: dict, as_json: bool, following: str) -> None:
    """The summary; for people, rates with their intervals instead of nested objects."""
    if not as_json:
        figures = summary.pop("holdout", {})
        figures = {
            name: tables.show(figures[name]) if name in ("accuracy", "longer") else tables.show_number(figures[name])
            for name in figures
            if name != "pairs"
        }
        summary |= {f"held-out {name.replace('_', ' ')}": value for name, value in figures.items()}
    cli.finish(summary, as_json=as_json, next_command=following)


if __name__ == "__main__":
    main()
