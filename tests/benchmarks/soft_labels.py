"""Reward models trained to soft and to hard labels on the same pairs, over several seeds: a table in Markdown.

    python scripts/run.py --model tiny --output runs/tiny
    python tests/benchmarks/soft_labels.py --seeds 5 --policy runs/tiny/sft --output runs/soft-labels

Pairs to train on are those of the method: samples of the policy and the base model's response, labelled by `tiny` as
the judge. They are measured on pairs of fresh held-out prompts with the oracle's labels, as trained and divided by the
temperature that was fitted on a tenth of the judge's labels. Run again, it goes on where it was stopped. Leaves out
other worlds and other judges.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import click

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from cai.data import outputs, readers
from cai.data.dialogue import as_messages
from cai.models.scorer import load_scorer
from cai.stats import calibration
from cai.train import reward_model

FIGURES = {
    "accuracy": "accuracy",
    "log_loss": "log-loss",
    "ece": "ECE",
    "scaled_log_loss": "log-loss, scaled",
    "scaled_ece": "ECE, scaled",
}
LOWER_IS_BETTER = [name for name in FIGURES if name != "accuracy"]


def step(command: str, *arguments) -> None:
    """Run one of the project's commands; its output goes to stderr. 3 is done but for some records."""
    line = [sys.executable, str(SCRIPTS / f"{command}.py"), *map(str, arguments)]
    code = subprocess.run(line, stdout=sys.stderr, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    if code not in (0, 3):
        raise click.ClickException(f"{command}.py ended with exit code {code}; the same line goes on")


def make_pairs(policy: str, prompts: int, folder: Path) -> tuple[Path, Path]:
    """(preferences to train on, pairs with the oracle's gold label to measure on)."""
    preferences, gold = folder / "preferences.jsonl", folder / "gold.jsonl"
    sampling = ("--temperature", 1, "--max-new-tokens", 96)
    for split, seed, samples in (("train", 101, 2), ("heldout", 202, 4)):
        asked, said = folder / f"{split}.jsonl", folder / f"{split}-samples.jsonl"
        if not asked.exists():
            step("tiny", "prompts", "--split", split, "--seed", seed, "-n", prompts, "--output", asked)
        step("generate", "--input", asked, "--model", policy, "--samples", samples, *sampling, "--output", said)
    base = folder / "train-base.jsonl"
    step("generate", "--input", folder / "train.jsonl", "--model", "tiny", "--max-new-tokens", 96, "--output", base)
    step(
        "judge", "--input", folder / "train-samples.jsonl", "--input", base, "--model", "tiny", "--output", preferences
    )
    if not gold.exists():
        step(
            "tiny",
            "pairs",
            "--responses",
            folder / "heldout-samples.jsonl",
            "--seed",
            303,
            "-n",
            4 * prompts,
            "--output",
            gold,
        )
    return preferences, gold


def measured(folder: Path, gold: Path) -> dict[str, float]:
    """The figures of one reward model on the pairs with gold labels."""
    scorer = load_scorer(str(folder))
    rows, texts = [], []
    for _, row in readers.read_jsonl(gold):
        right, wrong = (row["response_a"], row["response_b"])[:: 1 if row["gold"] == "a" else -1]
        rows.append({"p_chosen": 1.0})
        texts += [(as_messages(row["prompt"]), right), (as_messages(row["prompt"]), wrong)]
    scores = scorer.scores(texts)
    margins = [right - wrong for right, wrong in zip(scores[::2], scores[1::2], strict=True)]
    found = {"accuracy": sum(d > 0 for d in margins) / len(rows)}
    for name, divisor in (("", 1.0), ("scaled_", scorer.temperature)):
        divided = [d / divisor for d in margins]
        found[f"{name}log_loss"] = reward_model.log_loss(divided, rows)
        found[f"{name}ece"] = calibration.calibrate_margins(divided, [1.0] * len(rows))["ece"]["value"]
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean ± standard deviation over the seeds, of the differences too, and how often soft is better."""
    lines = ["| held-out oracle labels | soft | hard | soft − hard | soft is better in |", "|---|---|---|---|---|"]
    for name, shown in FIGURES.items():
        soft, hard = ([one[name] for one in found[labels]] for labels in ("soft", "hard"))
        differences = [a - b for a, b in zip(soft, hard, strict=True)]
        better = sum(d < 0 if name in LOWER_IS_BETTER else d > 0 for d in differences)
        lines.append(f"| {shown} | {spread(soft)} | {spread(hard)} | {spread(differences)} | {better} of {len(soft)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Reward models of each kind.")
@click.option("--policy", required=True, metavar="MODEL", help="Whose samples are compared: the SFT model of a run.")
@click.option("--prompts", type=click.IntRange(min=1), default=600, show_default=True, help="Prompts of each kind.")
@click.option("--output", required=True, metavar="FOLDER", help="Folder for everything that is made.")
def main(seeds, policy, prompts, output):
    """Compare reward models trained to soft and to hard labels; prints a table in Markdown."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    preferences, gold = make_pairs(policy, prompts, folder)
    found: dict[str, list] = {"soft": [], "hard": []}
    for seed in range(seeds):
        for labels, rows in found.items():
            model = folder / f"{labels}-{seed}"
            # As run.py trains one for `tiny`; the same seed holds out the same prompts for both.
            step(
                "reward_model",
                "--input",
                preferences,
                "--model",
                policy,
                "--labels",
                labels,
                "--seed",
                seed,
                "--learning-rate",
                "5e-4",
                "--batch-size",
                32,
                "--max-length",
                512,
                "--output",
                model,
            )
            rows.append(measured(model, gold))
    trained = outputs.read_manifest(folder / "soft-0")["counts"]
    (folder / "soft-labels.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    click.echo(
        f"{trained['train']} pairs to train on, {sum(1 for _ in readers.read_jsonl(gold))} to measure on, "
        f"{seeds} seeds\n\n{table(found)}"
    )


if __name__ == "__main__":
    main()
