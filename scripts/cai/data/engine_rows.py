"""Rows in the formats of the engines that train on many machines, by engine and stage.

    rows = Export(inputs, BASES["reward"], convert=convert("openrlhf", "reward")).records

A row is made from a record in TRL's format (exports.py). Leaves out launch files (models/launch.py), and reward models
(models/reward_folders.py).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from cai.base.errors import InputError
from cai.data.outputs import write_jsonl
from cai.data.readers import Row

STAGES = ("sft", "reward", "ppo", "grpo", "dpo")

# {stage: the target of exports.py whose records hold what the stage reads}
BASES = {
    "sft": "trl-sft",
    "reward": "trl-preference",
    "dpo": "trl-preference",
    "ppo": "trl-prompt",
    "grpo": "trl-prompt",
}

# Why a record has no row in an engine's format, in the ledger.
SEVERAL_TURNS = "several turns, and the engine reads a single one"

Converter = Callable[[Row], Row | None]


def _conversation(record: Row) -> Row:
    return {"messages": record["prompt"] + record["completion"]}


def _split(prompt: Sequence[dict[str, str]]) -> tuple[str, str] | None:
    """(system message, user message) of a prompt with nothing else; None for any other."""
    system = prompt[0]["content"] if prompt[0]["role"] == "system" else ""
    turns = prompt[1:] if prompt[0]["role"] == "system" else prompt
    return (system, turns[0]["content"]) if [turn["role"] for turn in turns] == ["user"] else None


# --- OpenRLHF -----------------------------------------------------------------------------------------------


def _openrlhf_sft(record: Row) -> Row:
    return {"prompt": record["prompt"], "response": record["completion"]}


def _pair(record: Row) -> Row:
    return {name: record[name] for name in ("prompt", "chosen", "rejected")}


# --- verl ---------------------------------------------------------------------------------------------------


def _verl_prompt(record: Row) -> Row:
    """A prompt without a known answer: `ground_truth` is empty, since the reward comes from a model."""
    return {
        "data_source": "constitutional-ai",
        "prompt": record["prompt"],
        "ability": "alignment",
        "reward_model": {"style": "model", "ground_truth": ""},
        "extra_info": {"split": "train", "prompt": record["prompt"]},  # for templates/launch/reward_function.py
    }


# --- NeMo-RL ------------------------------------------------------------------------------------------------


def _nemo_pair(record: Row) -> Row:
    sides = (record["chosen"], record["rejected"])
    completions = [{"rank": rank, "completion": side} for rank, side in enumerate(sides)]
    return {"context": record["prompt"], "completions": completions}


def _nemo_prompt(record: Row) -> Row | None:
    parts = _split(record["prompt"])
    return {"input": parts[1], "output": ""} if parts and not parts[0] else None


# --- LLaMA-Factory ------------------------------------------------------------------------------------------


def _factory_pair(record: Row) -> Row:
    return {"messages": record["prompt"], "chosen": record["chosen"][0], "rejected": record["rejected"][0]}


def _factory_prompt(record: Row) -> Row | None:
    """A prompt in the Alpaca format, the one that may lack a response; earlier turns go into `history`."""
    prompt = record["prompt"]
    system = prompt[0]["content"] if prompt[0]["role"] == "system" else ""
    turns = prompt[1:] if system else prompt
    roles = [turn["role"] for turn in turns]
    if roles != [("user", "assistant")[n % 2] for n in range(len(turns))] or len(turns) % 2 == 0:
        return None
    texts = [turn["content"] for turn in turns]
    history = [texts[n : n + 2] for n in range(0, len(texts) - 1, 2)]
    return {"instruction": texts[-1], "input": "", "output": "", "system": system, "history": history}


# --- Axolotl ------------------------------------------------------------------------------------------------


def _axolotl_reward(record: Row) -> Row | None:
    parts = _split(record["prompt"])
    if parts is None:
        return None
    sides = {side: record[side][0]["content"] for side in ("chosen", "rejected")}
    return {"system": parts[0], "input": parts[1], **sides}


def _axolotl_dpo(record: Row) -> Row:
    return {"messages": record["prompt"], "chosen": record["chosen"][0], "rejected": record["rejected"][0]}


def _same(record: Row) -> Row:
    return record


# {engine: {stage that it has: a row in its format from a record of `BASES`, None where it can't hold the record}}
ENGINES: dict[str, dict[str, Converter]] = {
    "openrlhf": {"sft": _openrlhf_sft, "reward": _pair, "ppo": _same, "grpo": _same, "dpo": _pair},
    "verl": {"sft": _conversation, "ppo": _verl_prompt, "grpo": _verl_prompt},
    "trl": {"sft": _same, "reward": _pair, "grpo": _same, "dpo": _pair},
    "nemo-rl": {
        "sft": _conversation,
        "reward": _nemo_pair,
        "ppo": _nemo_prompt,
        "grpo": _nemo_prompt,
        "dpo": _nemo_pair,
    },
    "llamafactory": {"sft": _conversation, "reward": _factory_pair, "ppo": _factory_prompt, "dpo": _factory_pair},
    "axolotl": {"sft": _conversation, "reward": _axolotl_reward, "grpo": _same, "dpo": _axolotl_dpo},
}


def check_stage(engine: str, stage: str | None) -> None:
    """Raise InputError for a stage that the engine does not have."""
    stages = ENGINES[engine]
    if stage not in stages:
        problem = f"{engine} has no stage {stage}" if stage else f"--to {engine} needs a stage"
        others = [name for name, has in ENGINES.items() if stage in has]
        raise InputError(
            problem,
            where="--stage",
            expected=" or ".join(stages),
            remedy=f"Engines with this stage: {', '.join(others)}" if stage else None,
        )


def convert(engine: str, stage: str) -> Callable[[Row], Row | str]:
    """A function from a record to its row, or to the reason for which the engine's format can't hold it."""
    converter = ENGINES[engine][stage]

    def row_or_reason(record: Row) -> Row | str:
        row = converter(record)
        return SEVERAL_TURNS if row is None else row

    return row_or_reason


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON Lines, or as Parquet by the file's suffix."""
    if path.suffix != ".parquet":
        write_jsonl(path, rows)
        return
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
