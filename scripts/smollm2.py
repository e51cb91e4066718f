"""Train the adapters with which SmolLM2 criticises, revises and judges, from the demonstrations in cai/smollm2/.

    python scripts/smollm2.py build --output smollm2-new --seed 0

The model's own texts are of cai/train/own_texts.py, the rows of adapter_rows.py, the training of adapters.py. Leaves
out measuring: the commands, `doctor.py --as critic` among them, take the adapters as any model.
"""

import json
from collections.abc import Collection
from pathlib import Path

import click

from cai.base import cli, files, hashing
from cai.base.errors import InputError
from cai.base.paths import SMOLLM2
from cai.data import sources
from cai.evaluate import classes
from cai.models import loading
from cai.train import adapter_rows, adapters, own_texts

ROLES = {"critic": adapter_rows.critic_rows, "judge": adapter_rows.judge_rows}


@click.group()
def main():
    """The adapters that make a small language model a critic and a judge.

    \b
    Example:
      python scripts/smollm2.py build --output smollm2-new --seed 0
    """


@main.command(cls=cli.Command)
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    help="Folder for the adapters DIR/critic and DIR/judge, and for texts that they are made with.",
)
@click.option("--model", default="smollm2", show_default=True, metavar="MODEL", help="The base of the adapters.")
@click.option(
    "--demonstrations",
    default=str(SMOLLM2 / "demonstrations.jsonl"),
    metavar="FILE",
    help="Rows with prompt, kind, category, topic, response, fault, critique, revision.  [default: the bundled ones]",
)
@click.option(
    "--prompts",
    multiple=True,
    default=[str(SMOLLM2 / "prompts" / name) for name in ("train.jsonl", "critic.jsonl")],
    metavar="FILE",
    help="Rows with prompt, kind, category, topic: critic and judge learn from the model's own answers to them. "
    "Repeatable.  [default: the bundled training prompts, and those that are for the critic alone]",
)
@click.option(
    "--principles",
    default=str(SMOLLM2 / "principles.jsonl"),
    metavar="FILE",
    help="Rows with principle (CONSTITUTION/ID), prompt, response, critique, revision, praise of the revision.  "
    "[default: the bundled ones]",
)
@click.option(
    "--role", "roles", multiple=True, type=click.Choice(list(ROLES)), help="Only this adapter.  [default: both]"
)
@click.option(
    "--start",
    metavar="DIR",
    help="An earlier build, with whose adapters training begins; with another --seed it sees other rows.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Passes over half of the texts each, with other draws.",
)
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the adapters.")
@click.option(
    "--first-layer",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="First of the model's blocks, from 0, that gets an adapter.",
)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Highest learning rate.")
@click.option("--batch-tokens", type=click.IntRange(min=1), default=1536, show_default=True, help="Tokens per step.")
@click.option(
    "--own-answers",
    "own_count",
    type=click.IntRange(min=0),
    default=240,
    show_default=True,
    help="Demonstrations whose prompt the model answers itself too, as further responses to criticise and judge.",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
@cli.options("seed", "json", "dry_run")
def build(
    output,
    model,
    demonstrations,
    prompts,
    principles,
    start,
    roles,
    epochs,
    own_count,
    threads,
    seed,
    as_json,
    dry_run,
    **training,
):
    """Train the adapters; resumes where it was stopped.

    \b
    Example:
      python scripts/smollm2.py build --output smollm2-new --seed 0 --threads 2
    """
    source = sources.Source([demonstrations], require=adapter_rows.FIELDS, check=adapter_rows.check_demonstration)
    asked = sources.Source(prompts, require=("prompt", "kind", "category", "topic"), check=classes.check_kind)
    shown = sources.Source([principles], require=adapter_rows.PRINCIPLE_FIELDS, check=adapter_rows.check_principle)
    rows, named = list(source), adapter_rows.principle_demonstrations(list(shown))
    loading.check_model(model, training=True)
    settings = adapters.Settings(seed=seed, **training)
    critic, begins = starting_points(roles or ROLES, start, output)
    record = {
        "model": hashing.identity(model),
        "dtype": loading.inference_dtype("cpu", "auto", model),
        "demonstrations": source.digest,
        "prompts": asked.digest,
        "principles": shown.digest,
        "epochs": epochs,
        "own_answers": own_count,
        **vars(settings),
    }
    if dry_run:
        counts = {"would_build": output, "rows": len(rows), "rows_of_prompts": asked.count}
        return cli.finish({**counts, **record}, as_json=as_json)
    import torch

    torch.set_num_threads(threads)
    chat = loading.load_chat(model)
    chosen = rows[:: max(1, len(rows) // own_count)][:own_count] if own_count else []
    materials = own_texts.materials(rows, chosen, list(asked), named, epochs, chat, model, Path(output))
    figures = {}
    for role in begins:
        if role == "judge":
            materials = own_texts.with_refusals(materials, model, critic, Path(output))
        taught = [ROLES[role](known, chat, seed + turn) for turn, known in enumerate(materials)]
        figures[role] = train(model, taught, Path(output) / role, settings, record, begins[role])
    cli.finish(
        {"output": output, "own_answers": len(materials[0].answered()), **figures},
        as_json=as_json,
        next_command=f"python scripts/doctor.py --model {output}/{role} --as {role}",
    )


def starting_points(roles: Collection[str], start: str | None, output: str) -> tuple[Path, dict[str, Path | None]]:
    """(the critic whose refusals the judge compares, {role: the adapter with which its training begins, or None}).

    The roles are in the order of training. What harm is the judge knows from the critic: from comparisons alone it
    learns it much more slowly. InputError for an adapter that is not there, and that this build does not make.
    """
    chosen = [role for role in ROLES if role in roles]
    before = Path(start or output)
    begins: dict[str, Path | None] = {role: before / role if start else None for role in chosen}
    critic = Path(output if "critic" in chosen else before) / "critic"
    if "judge" in begins and not start:
        begins["judge"] = critic
    made = {Path(output) / "critic"} if "critic" in chosen else set()
    needed = [*begins.values(), critic if "judge" in begins else None]
    for folder in filter(None, needed):
        if folder not in made and not (folder / adapters.WEIGHTS).is_file():
            raise InputError(f"no {folder.name}, with which training begins", where=folder, remedy="Build one first")
    return critic, begins


def train(
    model: str, epochs: list, folder: Path, settings: adapters.Settings, record: dict, start: Path | None
) -> dict:
    """Train one adapter, unless the folder has the same one already; its figures."""
    from transformers import AutoModelForCausalLM

    if start:
        record = {**record, "start": hashing.sha256_file(start / adapters.WEIGHTS)}
    done = folder / "build.json"
    if done.is_file() and (built := json.loads(done.read_text(encoding="utf-8")))["settings"] == record:
        return built["figures"]
    loading.keep_freed_memory()
    policy = loading.load_weights(AutoModelForCausalLM, model, record["dtype"])
    cli.note(f"{folder}: {sum(len(row.ids) for rows in epochs for row in rows)} tokens")
    figures = adapters.adapt(policy, epochs, folder, settings, base=model, start=start, report=cli.note)
    files.write_text(done, json.dumps({"settings": record, "figures": figures}, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main()
