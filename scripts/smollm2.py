"""Train the adapters with which SmolLM2 criticises, revises and judges, from the demonstrations in cai/smollm2/.

    python scripts/smollm2.py build --output smollm2-new --seed 0

The rows are made in cai/train/adapter_rows.py, the training is cai/train/adapters.py. Leaves out measuring: the
commands, `doctor.py --as critic` among them, take the adapters as any model.
"""

import json
from dataclasses import replace
from pathlib import Path

import click

from cai.base import cli, files, hashing
from cai.base.paths import SMOLLM2
from cai.data import sources
from cai.models import loading
from cai.models.engine import Request, Sampling
from cai.train import adapter_rows, adapters

# The stages of each role: what makes the rows of an epoch, and the share of the learning rate. The critic's second
# stage is not to undo what the first one taught.
ROLES = {
    "critic": ((adapter_rows.critic_rows, 1.0), (adapter_rows.decision_rows, 0.3)),
    "judge": ((adapter_rows.judge_rows, 1.0),),
}

OWN_ANSWERS = "own-answers.json"

OWN_SAMPLING = Sampling(max_new_tokens=80, temperature=0.7)


@click.group()
def main():
    """The adapters that make a small language model a critic and a judge.

    \b
    Example:
      python scripts/smollm2.py build --output smollm2-new --seed 0
    """


@main.command(cls=cli.Command)
@click.option("--output", required=True, metavar="DIR", help="Folder for the adapters: DIR/critic and DIR/judge.")
@click.option("--model", default="smollm2", show_default=True, metavar="MODEL", help="The base of the adapters.")
@click.option(
    "--demonstrations",
    default=str(SMOLLM2 / "demonstrations.jsonl"),
    metavar="FILE",
    help="Rows with prompt, kind, category, topic, response, fault, critique, revision.  [default: the bundled ones]",
)
@click.option(
    "--role", "roles", multiple=True, type=click.Choice(list(ROLES)), help="Only this adapter.  [default: both]"
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Passes per stage, with other draws each.",
)
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Rank of the adapters.")
@click.option("--learning-rate", type=float, default=1.5e-3, show_default=True, help="Highest learning rate.")
@click.option("--batch-tokens", type=click.IntRange(min=1), default=1536, show_default=True, help="Tokens per step.")
@click.option(
    "--own-answers",
    "own_count",
    type=click.IntRange(min=0),
    default=240,
    show_default=True,
    help="Demonstrations whose prompt the model answers itself, as further responses to criticise and judge.",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
@cli.options("seed", "json", "dry_run")
def build(output, model, demonstrations, roles, epochs, own_count, threads, seed, as_json, dry_run, **training):
    """Train the adapters; resumes where it was stopped.

    \b
    Example:
      python scripts/smollm2.py build --output smollm2-new --seed 0 --threads 2
    """
    source = sources.Source([demonstrations], require=adapter_rows.FIELDS, check=adapter_rows.check_demonstration)
    rows = list(source)
    loading.check_model(model, training=True)
    settings = adapters.Settings(seed=seed, **training)
    record = {
        "model": hashing.identity(model),
        "demonstrations": source.digest,
        "epochs": epochs,
        "own_answers": own_count,
        **vars(settings),
    }
    if dry_run:
        return cli.finish({"would_build": output, "rows": len(rows), **record}, as_json=as_json)
    import torch

    torch.set_num_threads(threads)
    own = adapter_rows.own_demonstrations(rows, own_answers(rows, model, own_count, seed, Path(output)))
    chat = loading.load_chat(model)
    figures = {}
    for role in roles or ROLES:
        start = None
        for number, (make, share) in enumerate(ROLES[role], 1):
            folder = Path(output) / (role if number == len(ROLES[role]) else f"{role}-{number}")
            epochs_of_rows = [make(rows, own, chat, seed + epoch) for epoch in range(epochs)]
            stage = replace(settings, learning_rate=share * settings.learning_rate)
            figures[role] = train(model, epochs_of_rows, folder, stage, record, start)
            start = folder
    cli.finish(
        {"output": output, "own_answers": len(own), **figures},
        as_json=as_json,
        next_command=f"python scripts/run.py --model {model} --critic {output}/critic --judge {output}/judge "
        "--output runs/new",
    )


def own_answers(rows: list[dict], model: str, count: int, seed: int, output: Path) -> dict[str, str]:
    """{id: the model's own answer} of so many demonstrations, spread evenly over them; kept in the output folder."""
    file = output / OWN_ANSWERS
    wanted = {"model": hashing.identity(model), "count": count, "seed": seed, "rows": [row["prompt"] for row in rows]}
    key = hashing.sha256_text(json.dumps(wanted))
    if file.is_file() and (kept := json.loads(file.read_text(encoding="utf-8"))).get("key") == key:
        return kept["answers"]
    chosen = rows[:: max(1, len(rows) // count)][:count] if count else []
    requests = [
        Request(row["id"], [{"role": "user", "content": row["prompt"]}], hashing.hashed_seed("own", seed, row["id"]))
        for row in chosen
    ]
    engine = loading.load_engine(model)
    answers = {request.key: generation.text for request, generation in engine.generate(requests, OWN_SAMPLING)}
    loading.release_engines()
    output.mkdir(parents=True, exist_ok=True)
    files.write_text(file, json.dumps({"key": key, "answers": answers}, ensure_ascii=False, indent=1) + "\n")
    return answers


def train(
    model: str, epochs: list, folder: Path, settings: adapters.Settings, record: dict, start: Path | None
) -> dict:
    """Train one adapter from an earlier stage's, unless the folder has the same one already; its figures."""
    from transformers import AutoModelForCausalLM

    done = folder / "build.json"
    if done.is_file() and (built := json.loads(done.read_text(encoding="utf-8")))["settings"] == record:
        return built["figures"]
    loading.keep_freed_memory()
    policy = loading.load_weights(AutoModelForCausalLM, model, "bfloat16")
    cli.note(f"{folder}: {sum(len(row.ids) for rows in epochs for row in rows)} tokens")
    figures = adapters.adapt(policy, epochs, folder, settings, base=model, start=start, report=cli.note)
    files.write_text(done, json.dumps({"settings": record, "figures": figures}, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main()
