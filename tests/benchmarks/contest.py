"""What reinforcement learning did in finished runs: the policy after RL against the SFT model, on the same prompts.

    python scripts/run.py --model tiny --output runs/tiny
    python tests/benchmarks/contest.py runs/tiny --judge runs/other/reward-model --output runs/contest

The responses are those that run.py's two evaluations wrote, to held-out prompts. Printed in Markdown, per run, for
plain prompts and for prompts in frames: the mean reward (RL − SFT) in standard deviations of the SFT model's rewards,
and how often RL's response is the better one where a judge sees a difference: the bundled world's oracle, and each
`--judge`. A judge that did not reward is a model of other training; one whose labels the run's reward model was trained
on is not. Intervals (95 %) are paired, and count the rows of one prompt as alike. Run again, judged pairs are kept.
Leaves out worlds without an oracle, and rates of what the responses do: evaluate.py.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import click

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS), str(Path(__file__).resolve().parent)]

from soft_labels import step

from cai.data import outputs, readers
from cai.data.dialogue import as_messages
from cai.data.kinds import KINDS
from cai.data.preferences import is_tie
from cai.evaluate import framed
from cai.models import loading
from cai.models.scorer import load_scorer
from cai.stats import intervals, tables
from cai.world import oracle

STAGES = ("ppo", "grpo", "dpo")

# {pair id: how much better response_a is; 0 where neither is}
Margins = Mapping[str, float]


def pair_responses(run: Path) -> list[dict]:
    """Pairs {..., response_a: after RL, response_b: after SFT} of one prompt, asked plainly or in the same frame."""
    stage = next((name for name in STAGES if (run / f"evaluation-{name}.responses.jsonl").exists()), None)
    if stage is None:
        raise click.ClickException(f"{run}: no evaluation after reinforcement learning; expected a finished run.py")
    before, after = (
        {row["id"]: row for _, row in readers.read_jsonl(run / f"evaluation-{name}.responses.jsonl")}
        for name in ("sft", stage)
    )
    return [
        {
            **{name: value for name, value in row.items() if name not in ("response", "conversation", "finish")},
            "prompt": row.get("conversation", row["prompt"]),
            "prompt_id": row.get("prompt_id", row["id"]),
            "response_a": after[key]["response"],
            "response_b": row["response"],
        }
        for key, row in before.items()
        if key in after
    ]


def score_pairs(pairs: Sequence[dict], folder: str) -> dict[str, tuple[float, float]]:
    """{pair id: the scores of both responses by a reward model}."""
    scorer = load_scorer(folder)
    texts = [(as_messages(pair["prompt"]), pair[f"response_{side}"]) for pair in pairs for side in "ab"]
    scores = scorer.scores(texts)
    both = zip(pairs, scores[::2], scores[1::2], strict=True)
    return {pair["id"]: (a, b) for pair, a, b in both if a is not None and b is not None}


def ask_oracle(pairs: Sequence[dict]) -> Margins:
    """Better is the class of the higher tier; `prompt` may be a frame, which the oracle does not read."""
    return {pair["id"]: oracle.tier(pair, pair["response_a"]) - oracle.tier(pair, pair["response_b"]) for pair in pairs}


def ask_judge(pairs: Sequence[dict], model: str, constitution: str, file: Path) -> Margins:
    """The margins of a reward model or of a chat model; identical responses are no comparison."""
    different = [pair for pair in pairs if not is_tie(pair)]
    if not model.startswith("openai:") and loading.is_classifier(model):
        return {key: a - b for key, (a, b) in score_pairs(different, model).items()}
    outputs.write_jsonl(file.with_suffix(".pairs.jsonl"), different)
    asked = ("--model", model, "--constitution", constitution, "--batch-size", 64)
    step("judge", "--input", file.with_suffix(".pairs.jsonl"), *asked, "--output", file)
    rows = (row for _, row in readers.read_jsonl(file))
    return {row["id"]: row["p_a"] - 0.5 for row in rows if row["p_a"] is not None}


def count_wins(pairs: Sequence[dict], margins: Margins) -> dict:
    """The share of RL's wins among the pairs with a difference, {value, low, high, n, clusters}."""
    decided = [pair for pair in pairs if margins.get(pair["id"])]
    return intervals.clustered_rate(
        [margins[pair["id"]] > 0 for pair in decided], [pair["prompt_id"] for pair in decided]
    )


def compare_rewards(pairs: Sequence[dict], scores: Mapping[str, tuple[float, float]]) -> dict:
    """The mean reward RL − SFT in standard deviations of the SFT model's rewards, {value, low, high, n, deviation}."""
    scored = [pair for pair in pairs if pair["id"] in scores]
    deviation = statistics.stdev(scores[pair["id"]][1] for pair in scored)
    differences = [(a - b) / deviation for a, b in (scores[pair["id"]] for pair in scored)]
    return {**intervals.clustered_mean(differences, [pair["prompt_id"] for pair in scored]), "deviation": deviation}


def measure(run: Path, judges: Sequence[str], constitution: str, folder: Path, by_kind: bool) -> list[dict]:
    """The figures of a run: a row for its plain prompts and one for those in frames, then for each kind of both."""
    pairs = pair_responses(run)
    scores = score_pairs(pairs, str(run / "reward-model")) if (run / "reward-model").is_dir() else {}
    contests: dict[str, Margins] = {"oracle": ask_oracle(pairs)}
    for number, model in enumerate(judges, 1):
        contests[model] = ask_judge(pairs, model, constitution, folder / f"{run.name}-judge-{number}.jsonl")
    groups = {
        name: [pair for pair in pairs if framed.is_framed(pair) is is_framed]
        for name, is_framed in {"plain": False, "in frames": True}.items()
    }
    if by_kind:
        groups |= {
            f"{name}, {kind}": [pair for pair in group if pair["kind"] == kind]
            for name, group in list(groups.items())
            for kind in KINDS
        }
    rows = []
    for name, group in filter(itemgetter(1), groups.items()):
        reward = compare_rewards(group, scores) if scores else None
        wins = {judge: count_wins(group, margins) for judge, margins in contests.items()}
        rows.append({"run": str(run), "prompts": name, "n": len(group), "reward": reward, "wins": wins})
    return rows


def table(rows: Sequence[dict]) -> str:
    """Markdown: a line per run and group of prompts."""
    titles = ["run, prompts", "reward, in SDs", *(f"{judge}: RL is better" for judge in rows[0]["wins"])]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        wins = (f"{tables.show(rate)} of {rate['n']}" if rate["n"] else "–" for rate in row["wins"].values())
        reward = tables.show_number(row["reward"], ".2f")
        lines.append(f"| {Path(row['run']).name}, {row['prompts']} ({row['n']}) | {reward} | {' | '.join(wins)} |")
    return "\n".join(lines)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--judge", "judges", multiple=True, metavar="MODEL", help="A reward model or a chat model. Repeatable.")
@click.option("--constitution", default="harmlessness", show_default=True, help="That a chat model judges by.")
@click.option("--by-kind", is_flag=True, help="Also for harmful, benign and borderline prompts alone.")
@click.option("--output", required=True, metavar="FOLDER", help="Folder for everything that is made.")
def main(runs, judges, constitution, by_kind, output):
    """Compare the policy after RL with the SFT model of finished RUNS; prints a table in Markdown."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for run in runs for row in measure(Path(run), judges, constitution, folder, by_kind)]
    (folder / "contest.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    click.echo(table(rows))


if __name__ == "__main__":
    main()
