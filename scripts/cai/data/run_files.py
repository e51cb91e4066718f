"""The files of a run folder that a stage of training reads, found by the manifests.

    files = find_files("runs/mine", "ppo")
    files.inputs, files.model, files.reward_model

Only finished steps count, the last of each command. Leaves out what the files hold, and figures (report/).
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cai.base.errors import InputError
from cai.data.dialogue import as_messages
from cai.data.outputs import read_manifest
from cai.data.preferences import is_pair, read_pairs
from cai.data.reading import Reading
from cai.data.sources import Source, first_row

# {stage: (the command whose rows it reads, the command whose model it trains)}
STEPS = {
    "sft": ("revise", None),
    "reward": ("judge", "sft"),
    "dpo": ("judge", "sft"),
    "ppo": ("generate", "sft"),
    "grpo": ("generate", "sft"),
}


@dataclass(frozen=True)
class RunFiles:
    """The files of a stage.

    inputs: files of rows. model: the folder or hub id that is trained. reward_model: a folder. preferences: a file of
    judge.py. The last three are None if the run has none.
    """

    inputs: tuple[str, ...]
    model: str | None
    reward_model: str | None
    preferences: str | None = None


def find_files(folder: str, stage: str) -> RunFiles:
    """The files of a run for one stage.

    Raises InputError for a folder without a finished step whose rows the stage reads.
    """
    last: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob("*.run.json")):
        output = str(path).removesuffix(".run.json")
        manifest = read_manifest(output) or {}
        if manifest.get("status") != "done" or not Path(output).exists():
            continue
        command = str(manifest.get("command"))
        if command not in last or str(manifest.get("finished")) >= str(last[command][1].get("finished")):
            last[command] = (output, manifest)
    rows, trained = STEPS[stage]
    if rows not in last:
        raise InputError(
            f"no finished output of {rows}.py in it",
            where=folder,
            expected="a run folder with the rows of this stage",
            remedy="Name the files with --input",
        )

    def output_of(command: str | None) -> str | None:
        return last[command][0] if command in last else None

    return RunFiles(
        inputs=(last[rows][0],),
        model=output_of(trained) or _argument(last[rows][1], "--model"),
        reward_model=output_of("reward_model"),
        preferences=output_of("judge"),
    )


def read_responses(
    inputs: Sequence[str], preferences: str | None, count: int, reading: Reading
) -> tuple[list[tuple[list[dict[str, str]], str]], bool]:
    """(at most `count` responses with the messages of their prompts, whether they alternate as chosen and rejected).

    Args:
        inputs: files of rows, which have a response or a pair.
        preferences: a file of judge.py, which is taken first.
    Raises:
        InputError: no row has a response.
    """
    files = [preferences] if preferences else list(inputs)
    row = first_row(files, reading)
    if row is not None and is_pair(row):
        pairs, _, _ = read_pairs(files, "hard", limit=None, reading=reading)
        sides = [(as_messages(pair["prompt"]), pair[side]) for pair in pairs for side in ("chosen", "rejected")]
        return sides[: count - count % 2 or 1], True
    if row is None or row.get("response") is None:
        raise InputError(
            "no responses to score",
            where=", ".join(files),
            expected="rows of judge.py or generate.py",
            remedy="Give a run folder, or rows with responses, as --input; or leave out --check",
        )
    source = Source(files, require=("prompt", "response"), limit=count, reading=reading)
    return [(as_messages(row["prompt"]), row["response"]) for row in source], False


def _argument(manifest: dict[str, Any], flag: str) -> str | None:
    """What follows the flag on the command line of a step, or None."""
    try:
        words = shlex.split(str(manifest.get("command_line", "")))
    except ValueError:
        return None
    return next((value for word, value in pairwise(words) if word == flag), None)
